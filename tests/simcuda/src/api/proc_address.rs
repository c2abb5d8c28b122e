//! `cuGetProcAddress`: from a name, a version and a flavour to an entry point.
//!
//! A name such as `cuMemAlloc` stands for several functions. Each came with some version of the API, and the caller gets
//! the newest that is not newer than the version it asks for; of those, the per-thread-default-stream form if it asks
//! for that and there is one. A name that leads nowhere is `CUDA_ERROR_NOT_FOUND`, which is what real drivers return
//! (compute-sanitizer shows it) although `cuda.h` promises success and a null pointer.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::driver_api;
use crate::abi::{Error, Out, Result, Text};

const FLAG_LEGACY: u64 = 1;
const FLAG_PER_THREAD: u64 = 2;

const FOUND: c_uint = 0;
const NOT_FOUND: c_uint = 1;
const VERSION_NOT_SUFFICIENT: c_uint = 2;

driver_api! {
    fn cuGetProcAddress(symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64) {
        function.required()?;
        self::look_up(symbol, function, version, flags).1
    }

    fn cuGetProcAddress_v2(
        symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64, status: Out<c_uint>,
    ) {
        function.required()?;
        let (found, result) = self::look_up(symbol, function, version, flags);
        status.set_if_wanted(found);
        result
    }
}

fn look_up(symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64) -> (c_uint, Result) {
    let name = match symbol.get() {
        Ok(name) if flags & !(FLAG_LEGACY | FLAG_PER_THREAD) == 0 => name,
        _ => return (NOT_FOUND, Err(Error::INVALID_VALUE)),
    };
    match find(&name, version, flags & FLAG_PER_THREAD != 0) {
        Ok(address) => (FOUND, function.set(address as *const c_void)),
        Err(status) => {
            function.set_if_wanted(std::ptr::null());
            (status, Err(Error::NOT_FOUND))
        }
    }
}

struct Candidate {
    since: c_int,
    per_thread: bool,
    address: usize,
}

fn find(name: &str, version: c_int, per_thread: bool) -> std::result::Result<usize, c_uint> {
    static CANDIDATES: OnceLock<HashMap<&'static str, Vec<Candidate>>> = OnceLock::new();
    let candidates = CANDIDATES.get_or_init(collect).get(name).ok_or(NOT_FOUND)?;
    let eligible = candidates
        .iter()
        .filter(|candidate| candidate.since <= version && (per_thread || !candidate.per_thread));
    let best = eligible.max_by_key(|candidate| (generation(candidate, candidates), candidate.per_thread));
    best.map(|candidate| candidate.address).ok_or(VERSION_NOT_SUFFICIENT)
}

/// By which a candidate ranks: its own version, but for a per-thread form that came later than its plain form the
/// plain form's, so that both forms of a function rank alike.
fn generation(candidate: &Candidate, all: &[Candidate]) -> c_int {
    if !candidate.per_thread {
        return candidate.since;
    }
    let plain = all.iter().filter(|other| !other.per_thread && other.since <= candidate.since);
    plain.map(|other| other.since).max().unwrap_or(candidate.since)
}

fn collect() -> HashMap<&'static str, Vec<Candidate>> {
    let since = since();
    let mut candidates: HashMap<&str, Vec<Candidate>> = HashMap::new();
    for export in super::exports() {
        let Some(&since) = since.get(export.name) else { continue };
        let per_thread = export.name.ends_with("_ptsz") || export.name.ends_with("_ptds");
        let address = export.address as usize;
        candidates.entry(super::base_name(export.name)).or_default().push(Candidate {
            since,
            per_thread,
            address,
        });
        // Since CUDA 12 the plain name means this one.
        if export.name == "cuGraphInstantiateWithFlags" {
            let candidate = Candidate { since: 12000, per_thread, address };
            candidates.entry("cuGraphInstantiate").or_default().push(candidate);
        }
    }
    candidates
}

/// The version of the API that each function came with.
fn since() -> HashMap<&'static str, c_int> {
    SINCE.iter().chain(super::gated::SINCE).copied().collect()
}

/// The same, but for those of [`super::gated`], as in `cudaTypedefs.h`.
const SINCE: &[(&str, c_int)] = &[
    ("cuArray3DCreate_v2", 3020),
    ("cuArray3DGetDescriptor_v2", 3020),
    ("cuArrayCreate_v2", 3020),
    ("cuArrayDestroy", 2000),
    ("cuArrayGetDescriptor_v2", 3020),
    ("cuArrayGetMemoryRequirements", 11060),
    ("cuCtxAttach", 2000),
    ("cuCtxCreate_v2", 3020),
    ("cuCtxCreate_v3", 11040),
    ("cuCtxCreate_v4", 12050),
    ("cuCtxDestroy_v2", 4000),
    ("cuCtxDetach", 2000),
    ("cuCtxDisablePeerAccess", 4000),
    ("cuCtxEnablePeerAccess", 4000),
    ("cuCtxFromGreenCtx", 12040),
    ("cuCtxGetApiVersion", 3020),
    ("cuCtxGetCacheConfig", 3020),
    ("cuCtxGetCurrent", 4000),
    ("cuCtxGetDevResource", 12040),
    ("cuCtxGetDevice", 2000),
    ("cuCtxGetDevice_v2", 13000),
    ("cuCtxGetFlags", 7000),
    ("cuCtxGetId", 12000),
    ("cuCtxGetLimit", 3010),
    ("cuCtxGetStreamPriorityRange", 5050),
    ("cuCtxPopCurrent_v2", 4000),
    ("cuCtxPushCurrent_v2", 4000),
    ("cuCtxResetPersistingL2Cache", 11000),
    ("cuCtxSetCacheConfig", 3020),
    ("cuCtxSetCurrent", 4000),
    ("cuCtxSetFlags", 12010),
    ("cuCtxSetLimit", 3010),
    ("cuCtxSynchronize", 2000),
    ("cuCtxSynchronize_v2", 13000),
    ("cuDevResourceGenerateDesc", 12040),
    ("cuDevSmResourceSplitByCount", 12040),
    ("cuDeviceCanAccessPeer", 4000),
    ("cuDeviceComputeCapability", 2000),
    ("cuDeviceGet", 2000),
    ("cuDeviceGetAttribute", 2000),
    ("cuDeviceGetByPCIBusId", 4010),
    ("cuDeviceGetCount", 2000),
    ("cuDeviceGetDefaultMemPool", 11020),
    ("cuDeviceGetDevResource", 12040),
    ("cuDeviceGetExecAffinitySupport", 11040),
    ("cuDeviceGetGraphMemAttribute", 11040),
    ("cuDeviceGetMemPool", 11020),
    ("cuDeviceGetName", 2000),
    ("cuDeviceGetP2PAttribute", 8000),
    ("cuDeviceGetPCIBusId", 4010),
    ("cuDeviceGetUuid", 9020),
    ("cuDeviceGetUuid_v2", 11040),
    ("cuDeviceGraphMemTrim", 11040),
    ("cuDevicePrimaryCtxGetState", 7000),
    ("cuDevicePrimaryCtxRelease", 7000),
    ("cuDevicePrimaryCtxRelease_v2", 11000),
    ("cuDevicePrimaryCtxReset", 7000),
    ("cuDevicePrimaryCtxReset_v2", 11000),
    ("cuDevicePrimaryCtxRetain", 7000),
    ("cuDevicePrimaryCtxSetFlags", 7000),
    ("cuDevicePrimaryCtxSetFlags_v2", 11000),
    ("cuDeviceSetGraphMemAttribute", 11040),
    ("cuDeviceSetMemPool", 11020),
    ("cuDeviceTotalMem", 2000),
    ("cuDeviceTotalMem_v2", 3020),
    ("cuDriverGetVersion", 2020),
    ("cuEventCreate", 2000),
    ("cuEventDestroy_v2", 4000),
    ("cuEventElapsedTime", 2000),
    ("cuEventElapsedTime_v2", 12080),
    ("cuEventQuery", 2000),
    ("cuEventRecord", 2000),
    ("cuEventRecordWithFlags", 11010),
    ("cuEventRecordWithFlags_ptsz", 11010),
    ("cuEventRecord_ptsz", 7000),
    ("cuEventSynchronize", 2000),
    ("cuFuncGetAttribute", 2020),
    ("cuFuncGetModule", 11000),
    ("cuFuncGetName", 12030),
    ("cuFuncGetParamCount", 13020),
    ("cuFuncGetParamInfo", 12040),
    ("cuFuncIsLoaded", 12040),
    ("cuFuncLoad", 12040),
    ("cuFuncSetAttribute", 9000),
    ("cuFuncSetCacheConfig", 3000),
    ("cuGetErrorName", 6000),
    ("cuGetErrorString", 6000),
    ("cuGetExportTable", 3000),
    ("cuGetProcAddress", 11030),
    ("cuGetProcAddress_v2", 12000),
    ("cuGraphAddChildGraphNode", 10000),
    ("cuGraphAddEmptyNode", 10000),
    ("cuGraphAddHostNode", 10000),
    ("cuGraphAddKernelNode", 10000),
    ("cuGraphAddKernelNode_v2", 12000),
    ("cuGraphAddMemAllocNode", 11040),
    ("cuGraphAddMemFreeNode", 11040),
    ("cuGraphAddMemcpyNode", 10000),
    ("cuGraphAddMemsetNode", 10000),
    ("cuGraphChildGraphNodeGetGraph", 10000),
    ("cuGraphClone", 10000),
    ("cuGraphCreate", 10000),
    ("cuGraphDestroy", 10000),
    ("cuGraphExecChildGraphNodeSetParams", 11010),
    ("cuGraphExecDestroy", 10000),
    ("cuGraphExecGetFlags", 12000),
    ("cuGraphExecKernelNodeSetParams", 10010),
    ("cuGraphExecKernelNodeSetParams_v2", 12000),
    ("cuGraphExecMemcpyNodeSetParams", 10020),
    ("cuGraphExecMemsetNodeSetParams", 10020),
    ("cuGraphExecUpdate", 10020),
    ("cuGraphExecUpdate_v2", 12000),
    ("cuGraphGetEdges", 10000),
    ("cuGraphGetEdges_v2", 12030),
    ("cuGraphGetNodes", 10000),
    ("cuGraphGetRootNodes", 10000),
    ("cuGraphInstantiate", 10000),
    ("cuGraphInstantiateWithFlags", 11040),
    ("cuGraphInstantiateWithParams", 12000),
    ("cuGraphInstantiateWithParams_ptsz", 12000),
    ("cuGraphInstantiate_v2", 11000),
    ("cuGraphKernelNodeSetParams", 10000),
    ("cuGraphKernelNodeSetParams_v2", 12000),
    ("cuGraphLaunch", 10000),
    ("cuGraphLaunch_ptsz", 10000),
    ("cuGraphMemFreeNodeGetParams", 11040),
    ("cuGraphMemcpyNodeSetParams", 10000),
    ("cuGraphMemsetNodeSetParams", 10000),
    ("cuGraphNodeFindInClone", 10000),
    ("cuGraphNodeGetDependencies", 10000),
    ("cuGraphNodeGetType", 10000),
    ("cuGraphUpload", 11010),
    ("cuGraphUpload_ptsz", 11010),
    ("cuGreenCtxCreate", 12040),
    ("cuGreenCtxDestroy", 12040),
    ("cuGreenCtxGetDevResource", 12040),
    ("cuGreenCtxGetId", 12090),
    ("cuGreenCtxRecordEvent", 12040),
    ("cuGreenCtxStreamCreate", 12050),
    ("cuGreenCtxWaitEvent", 12040),
    ("cuInit", 2000),
    ("cuIpcCloseMemHandle", 4010),
    ("cuIpcGetEventHandle", 4010),
    ("cuIpcGetMemHandle", 4010),
    ("cuIpcOpenEventHandle", 4010),
    ("cuIpcOpenMemHandle", 4010),
    ("cuIpcOpenMemHandle_v2", 11000),
    ("cuKernelGetAttribute", 12000),
    ("cuKernelGetFunction", 12000),
    ("cuKernelGetLibrary", 12050),
    ("cuKernelGetName", 12030),
    ("cuKernelGetParamCount", 13020),
    ("cuKernelGetParamInfo", 12040),
    ("cuKernelSetAttribute", 12000),
    ("cuLaunchCooperativeKernel", 9000),
    ("cuLaunchCooperativeKernel_ptsz", 9000),
    ("cuLaunchHostFunc", 10000),
    ("cuLaunchHostFunc_ptsz", 10000),
    ("cuLaunchHostFunc_v2", 13010),
    ("cuLaunchHostFunc_v2_ptsz", 13010),
    ("cuLaunchKernel", 4000),
    ("cuLaunchKernelEx", 11060),
    ("cuLaunchKernelEx_ptsz", 11060),
    ("cuLaunchKernel_ptsz", 7000),
    ("cuLibraryEnumerateKernels", 12040),
    ("cuLibraryGetGlobal", 12000),
    ("cuLibraryGetKernel", 12000),
    ("cuLibraryGetKernelCount", 12040),
    ("cuLibraryGetModule", 12000),
    ("cuLibraryLoadData", 12000),
    ("cuLibraryLoadFromFile", 12000),
    ("cuLibraryUnload", 12000),
    ("cuLinkAddData_v2", 6050),
    ("cuLinkComplete", 5050),
    ("cuLinkCreate_v2", 6050),
    ("cuLinkDestroy", 5050),
    ("cuMemAddressFree", 10020),
    ("cuMemAddressReserve", 10020),
    ("cuMemAdvise", 8000),
    ("cuMemAdvise_v2", 12020),
    ("cuMemAllocAsync", 11020),
    ("cuMemAllocAsync_ptsz", 11020),
    ("cuMemAllocFromPoolAsync", 11020),
    ("cuMemAllocFromPoolAsync_ptsz", 11020),
    ("cuMemAllocHost_v2", 3020),
    ("cuMemAllocManaged", 6000),
    ("cuMemAllocPitch_v2", 3020),
    ("cuMemAlloc_v2", 3020),
    ("cuMemCreate", 10020),
    ("cuMemExportToShareableHandle", 10020),
    ("cuMemFreeAsync", 11020),
    ("cuMemFreeAsync_ptsz", 11020),
    ("cuMemFreeHost", 2000),
    ("cuMemFree_v2", 3020),
    ("cuMemGetAccess", 10020),
    ("cuMemGetAddressRange_v2", 3020),
    ("cuMemGetAllocationGranularity", 10020),
    ("cuMemGetAllocationPropertiesFromHandle", 10020),
    ("cuMemGetDefaultMemPool", 13000),
    ("cuMemGetInfo", 2000),
    ("cuMemGetInfo_v2", 3020),
    ("cuMemGetMemPool", 13000),
    ("cuMemHostAlloc", 2020),
    ("cuMemHostGetDevicePointer_v2", 3020),
    ("cuMemHostGetFlags", 2030),
    ("cuMemHostRegister_v2", 6050),
    ("cuMemHostUnregister", 4000),
    ("cuMemImportFromShareableHandle", 10020),
    ("cuMemMap", 10020),
    ("cuMemPoolCreate", 11020),
    ("cuMemPoolDestroy", 11020),
    ("cuMemPoolGetAccess", 11020),
    ("cuMemPoolGetAttribute", 11020),
    ("cuMemPoolSetAccess", 11020),
    ("cuMemPoolSetAttribute", 11020),
    ("cuMemPoolTrimTo", 11020),
    ("cuMemPrefetchAsync", 8000),
    ("cuMemPrefetchAsync_ptsz", 8000),
    ("cuMemPrefetchAsync_v2", 12020),
    ("cuMemPrefetchAsync_v2_ptsz", 12020),
    ("cuMemRelease", 10020),
    ("cuMemRetainAllocationHandle", 11000),
    ("cuMemSetAccess", 10020),
    ("cuMemSetMemPool", 13000),
    ("cuMemUnmap", 10020),
    ("cuMemcpy", 4000),
    ("cuMemcpy2DAsync_v2", 3020),
    ("cuMemcpy2DAsync_v2_ptsz", 7000),
    ("cuMemcpy2DUnaligned_v2", 3020),
    ("cuMemcpy2DUnaligned_v2_ptds", 7000),
    ("cuMemcpy2D_v2", 3020),
    ("cuMemcpy2D_v2_ptds", 7000),
    ("cuMemcpy3DAsync_v2", 3020),
    ("cuMemcpy3DAsync_v2_ptsz", 7000),
    ("cuMemcpy3DPeer", 4000),
    ("cuMemcpy3DPeerAsync", 4000),
    ("cuMemcpy3DPeerAsync_ptsz", 7000),
    ("cuMemcpy3DPeer_ptds", 7000),
    ("cuMemcpy3D_v2", 3020),
    ("cuMemcpy3D_v2_ptds", 7000),
    ("cuMemcpyAsync", 4000),
    ("cuMemcpyAsync_ptsz", 7000),
    ("cuMemcpyAtoA_v2", 3020),
    ("cuMemcpyAtoA_v2_ptds", 7000),
    ("cuMemcpyAtoD_v2", 3020),
    ("cuMemcpyAtoD_v2_ptds", 7000),
    ("cuMemcpyAtoHAsync_v2", 3020),
    ("cuMemcpyAtoHAsync_v2_ptsz", 7000),
    ("cuMemcpyAtoH_v2", 3020),
    ("cuMemcpyAtoH_v2_ptds", 7000),
    ("cuMemcpyDtoA_v2", 3020),
    ("cuMemcpyDtoA_v2_ptds", 7000),
    ("cuMemcpyDtoDAsync_v2", 3020),
    ("cuMemcpyDtoDAsync_v2_ptsz", 7000),
    ("cuMemcpyDtoD_v2", 3020),
    ("cuMemcpyDtoD_v2_ptds", 7000),
    ("cuMemcpyDtoHAsync_v2", 3020),
    ("cuMemcpyDtoHAsync_v2_ptsz", 7000),
    ("cuMemcpyDtoH_v2", 3020),
    ("cuMemcpyDtoH_v2_ptds", 7000),
    ("cuMemcpyHtoAAsync_v2", 3020),
    ("cuMemcpyHtoAAsync_v2_ptsz", 7000),
    ("cuMemcpyHtoA_v2", 3020),
    ("cuMemcpyHtoA_v2_ptds", 7000),
    ("cuMemcpyHtoDAsync_v2", 3020),
    ("cuMemcpyHtoDAsync_v2_ptsz", 7000),
    ("cuMemcpyHtoD_v2", 3020),
    ("cuMemcpyHtoD_v2_ptds", 7000),
    ("cuMemcpyPeer", 4000),
    ("cuMemcpyPeerAsync", 4000),
    ("cuMemcpyPeerAsync_ptsz", 7000),
    ("cuMemcpyPeer_ptds", 7000),
    ("cuMemcpy_ptds", 7000),
    ("cuMemsetD16Async", 3020),
    ("cuMemsetD16Async_ptsz", 7000),
    ("cuMemsetD16_v2", 3020),
    ("cuMemsetD16_v2_ptds", 7000),
    ("cuMemsetD2D16Async", 3020),
    ("cuMemsetD2D16Async_ptsz", 7000),
    ("cuMemsetD2D16_v2", 3020),
    ("cuMemsetD2D16_v2_ptds", 7000),
    ("cuMemsetD2D32Async", 3020),
    ("cuMemsetD2D32Async_ptsz", 7000),
    ("cuMemsetD2D32_v2", 3020),
    ("cuMemsetD2D32_v2_ptds", 7000),
    ("cuMemsetD2D8Async", 3020),
    ("cuMemsetD2D8Async_ptsz", 7000),
    ("cuMemsetD2D8_v2", 3020),
    ("cuMemsetD2D8_v2_ptds", 7000),
    ("cuMemsetD32Async", 3020),
    ("cuMemsetD32Async_ptsz", 7000),
    ("cuMemsetD32_v2", 3020),
    ("cuMemsetD32_v2_ptds", 7000),
    ("cuMemsetD8Async", 3020),
    ("cuMemsetD8Async_ptsz", 7000),
    ("cuMemsetD8_v2", 3020),
    ("cuMemsetD8_v2_ptds", 7000),
    ("cuMipmappedArrayCreate", 5000),
    ("cuMipmappedArrayDestroy", 5000),
    ("cuMipmappedArrayGetLevel", 5000),
    ("cuModuleEnumerateFunctions", 12040),
    ("cuModuleGetFunction", 2000),
    ("cuModuleGetFunctionCount", 12040),
    ("cuModuleGetGlobal_v2", 3020),
    ("cuModuleGetLoadingMode", 11070),
    ("cuModuleLoad", 2000),
    ("cuModuleLoadData", 2000),
    ("cuModuleLoadDataEx", 2010),
    ("cuModuleLoadFatBinary", 2000),
    ("cuModuleUnload", 2000),
    ("cuOccupancyAvailableDynamicSMemPerBlock", 10020),
    ("cuOccupancyMaxActiveBlocksPerMultiprocessor", 6050),
    ("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", 7000),
    ("cuOccupancyMaxPotentialBlockSize", 6050),
    ("cuOccupancyMaxPotentialBlockSizeWithFlags", 7000),
    ("cuPointerGetAttribute", 4000),
    ("cuPointerGetAttributes", 7000),
    ("cuPointerSetAttribute", 6000),
    ("cuProfilerStart", 4000),
    ("cuProfilerStop", 4000),
    ("cuStreamAddCallback", 5000),
    ("cuStreamAddCallback_ptsz", 7000),
    ("cuStreamAttachMemAsync", 6000),
    ("cuStreamAttachMemAsync_ptsz", 7000),
    ("cuStreamBeginCaptureToGraph", 12030),
    ("cuStreamBeginCaptureToGraph_ptsz", 12030),
    ("cuStreamBeginCapture_v2", 10010),
    ("cuStreamBeginCapture_v2_ptsz", 10010),
    ("cuStreamCreate", 2000),
    ("cuStreamCreateWithPriority", 5050),
    ("cuStreamDestroy_v2", 4000),
    ("cuStreamEndCapture", 10000),
    ("cuStreamEndCapture_ptsz", 10000),
    ("cuStreamGetCaptureInfo_v2", 11030),
    ("cuStreamGetCaptureInfo_v2_ptsz", 11030),
    ("cuStreamGetCaptureInfo_v3", 12030),
    ("cuStreamGetCaptureInfo_v3_ptsz", 12030),
    ("cuStreamGetCtx", 9020),
    ("cuStreamGetCtx_ptsz", 9020),
    ("cuStreamGetCtx_v2", 12050),
    ("cuStreamGetCtx_v2_ptsz", 12050),
    ("cuStreamGetDevice", 12080),
    ("cuStreamGetDevice_ptsz", 12080),
    ("cuStreamGetFlags", 5050),
    ("cuStreamGetFlags_ptsz", 7000),
    ("cuStreamGetGreenCtx", 12040),
    ("cuStreamGetId", 12000),
    ("cuStreamGetId_ptsz", 12000),
    ("cuStreamGetPriority", 5050),
    ("cuStreamGetPriority_ptsz", 7000),
    ("cuStreamIsCapturing", 10000),
    ("cuStreamIsCapturing_ptsz", 10000),
    ("cuStreamQuery", 2000),
    ("cuStreamQuery_ptsz", 7000),
    ("cuStreamSynchronize", 2000),
    ("cuStreamSynchronize_ptsz", 7000),
    ("cuStreamUpdateCaptureDependencies", 11030),
    ("cuStreamUpdateCaptureDependencies_ptsz", 11030),
    ("cuStreamUpdateCaptureDependencies_v2", 12030),
    ("cuStreamUpdateCaptureDependencies_v2_ptsz", 12030),
    ("cuStreamWaitEvent", 3020),
    ("cuStreamWaitEvent_ptsz", 7000),
    ("cuStreamWaitValue32", 8000),
    ("cuStreamWaitValue32_ptsz", 8000),
    ("cuStreamWaitValue32_v2", 11070),
    ("cuStreamWaitValue32_v2_ptsz", 11070),
    ("cuStreamWaitValue64", 9000),
    ("cuStreamWaitValue64_ptsz", 9000),
    ("cuStreamWaitValue64_v2", 11070),
    ("cuStreamWaitValue64_v2_ptsz", 11070),
    ("cuStreamWriteValue32", 8000),
    ("cuStreamWriteValue32_ptsz", 8000),
    ("cuStreamWriteValue32_v2", 11070),
    ("cuStreamWriteValue32_v2_ptsz", 11070),
    ("cuStreamWriteValue64", 9000),
    ("cuStreamWriteValue64_ptsz", 9000),
    ("cuStreamWriteValue64_v2", 11070),
    ("cuStreamWriteValue64_v2_ptsz", 11070),
    ("cuSurfObjectCreate", 5000),
    ("cuSurfObjectDestroy", 5000),
    ("cuSurfObjectGetResourceDesc", 5000),
    ("cuTexObjectCreate", 5000),
    ("cuTexObjectDestroy", 5000),
    ("cuTexObjectGetResourceDesc", 5000),
    ("cuTexObjectGetResourceViewDesc", 5000),
    ("cuTexObjectGetTextureDesc", 5000),
    ("cuThreadExchangeStreamCaptureMode", 10010),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn address(name: &str) -> usize {
        super::super::exports()
            .find(|export| export.name == name)
            .map(|export| export.address as usize)
            .unwrap()
    }

    #[test]
    fn versions_and_flavours_are_honoured() {
        assert_eq!(find("cuMemcpyHtoD", 13000, false), Ok(address("cuMemcpyHtoD_v2")));
        assert_eq!(find("cuMemcpyHtoD", 13000, true), Ok(address("cuMemcpyHtoD_v2_ptds")));
        assert_eq!(find("cuMemAlloc", 2000, false), Err(VERSION_NOT_SUFFICIENT));
        assert_eq!(find("cuCtxCreate", 11040, false), Ok(address("cuCtxCreate_v3")));
        assert_eq!(find("cuEventElapsedTime", 12000, true), Ok(address("cuEventElapsedTime")));
        assert_eq!(find("cuMemPrefetchAsync", 13000, true), Ok(address("cuMemPrefetchAsync_v2_ptsz")));
        assert_eq!(find("cuMemPrefetchAsync", 8000, true), Ok(address("cuMemPrefetchAsync_ptsz")));
        assert_eq!(
            find("cuStreamGetCaptureInfo", 12030, true),
            Ok(address("cuStreamGetCaptureInfo_v3_ptsz"))
        );
        assert_eq!(find("cuGraphInstantiate", 12000, false), Ok(address("cuGraphInstantiateWithFlags")));
        assert_eq!(find("cuNothing", 13000, false), Err(NOT_FOUND));
    }

    #[test]
    fn every_function_has_a_version() {
        let since = since();
        for export in super::super::exports() {
            assert!(since.contains_key(export.name), "{} has none", export.name);
        }
    }
}
