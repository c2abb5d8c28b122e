//! The rows of the table of entry points: one for each exported symbol of the driver.
//!
//! [`crate::interpose::entry_points`] says what a row means and makes the functions that replace the driver's;
//! [`crate::interpose::driver_calls`] makes functions that call the driver's own. Both take the rows from here.

/// `with_rows!(callback)` is `callback! { ...the rows... }`.
macro_rules! with_rows {
    ($then:ident) => {
        $then! {
            forwarded {
                Submit first {
                    cuLaunchHostFunc(3) @ 10_000;
                    cuLaunchHostFunc_ptsz(3) @ 10_000;
                    cuLaunchHostFunc_v2(4) @ 13_010;
                    cuLaunchHostFunc_v2_ptsz(4) @ 13_010;
                    cuStreamAddCallback(4) @ 5_000;
                    cuStreamAddCallback_ptsz(4) @ 7_000;
                    cuStreamAttachMemAsync(4) @ 6_000;
                    cuStreamAttachMemAsync_ptsz(4) @ 7_000;
                    cuStreamBatchMemOp(4) @ 8_000;
                    cuStreamBatchMemOp_ptsz(4) @ 8_000;
                    cuStreamBatchMemOp_v2(4) @ 11_070;
                    cuStreamBatchMemOp_v2_ptsz(4) @ 11_070;
                    cuStreamWaitValue32(4) @ 8_000;
                    cuStreamWaitValue32_ptsz(4) @ 8_000;
                    cuStreamWaitValue32_v2(4) @ 11_070;
                    cuStreamWaitValue32_v2_ptsz(4) @ 11_070;
                    cuStreamWaitValue64(4) @ 9_000;
                    cuStreamWaitValue64_ptsz(4) @ 9_000;
                    cuStreamWaitValue64_v2(4) @ 11_070;
                    cuStreamWaitValue64_v2_ptsz(4) @ 11_070;
                    cuStreamWriteValue32(4) @ 8_000;
                    cuStreamWriteValue32_ptsz(4) @ 8_000;
                    cuStreamWriteValue32_v2(4) @ 11_070;
                    cuStreamWriteValue32_v2_ptsz(4) @ 11_070;
                    cuStreamWriteValue64(4) @ 9_000;
                    cuStreamWriteValue64_ptsz(4) @ 9_000;
                    cuStreamWriteValue64_v2(4) @ 11_070;
                    cuStreamWriteValue64_v2_ptsz(4) @ 11_070;
                }
                Submit ninth {
                    cuLaunchCooperativeKernel(10) @ 9_000;
                    cuLaunchCooperativeKernel_ptsz(10) @ 9_000;
                    cuLaunchKernel(11) @ 4_000;
                    cuLaunchKernel_ptsz(11) @ 7_000;
                }
                Submit last {
                    cuGLMapBufferObjectAsync(4) @ 2_030;
                    cuGLMapBufferObjectAsync_v2(4) @ 3_020;
                    cuGLMapBufferObjectAsync_v2_ptsz(4) @ 7_000;
                    cuGLUnmapBufferObjectAsync(2) @ 2_030;
                    cuGraphLaunch(2) @ 10_000;
                    cuGraphLaunch_ptsz(2) @ 10_000;
                    cuGraphUpload(2) @ 11_010;
                    cuGraphUpload_ptsz(2) @ 11_010;
                    cuGraphicsMapResources(3) @ 3_000;
                    cuGraphicsMapResources_ptsz(3) @ 7_000;
                    cuGraphicsUnmapResources(3) @ 3_000;
                    cuGraphicsUnmapResources_ptsz(3) @ 7_000;
                    cuLaunchGridAsync(4) @ 2_000;
                    cuMemBatchDecompressAsync(5) @ 12_060;
                    cuMemBatchDecompressAsync_ptsz(5) @ 12_060;
                    cuMemDiscardAndPrefetchBatchAsync(8) @ 13_000;
                    cuMemDiscardAndPrefetchBatchAsync_ptsz(8) @ 13_000;
                    cuMemDiscardBatchAsync(5) @ 13_000;
                    cuMemDiscardBatchAsync_ptsz(5) @ 13_000;
                    cuMemMapArrayAsync(3) @ 11_010;
                    cuMemMapArrayAsync_ptsz(3) @ 11_010;
                    cuMemPrefetchAsync(4) @ 8_000;
                    cuMemPrefetchAsync_ptsz(4) @ 8_000;
                    cuMemPrefetchAsync_v2(5) @ 12_020;
                    cuMemPrefetchAsync_v2_ptsz(5) @ 12_020;
                    cuMemPrefetchBatchAsync(8) @ 13_000;
                    cuMemPrefetchBatchAsync_ptsz(8) @ 13_000;
                    cuMemcpy2DAsync(2) @ 2_000;
                    cuMemcpy2DAsync_v2(2) @ 3_020;
                    cuMemcpy2DAsync_v2_ptsz(2) @ 7_000;
                    cuMemcpy3DAsync(2) @ 2_000;
                    cuMemcpy3DAsync_v2(2) @ 3_020;
                    cuMemcpy3DAsync_v2_ptsz(2) @ 7_000;
                    cuMemcpy3DBatchAsync(5) @ 12_080;
                    cuMemcpy3DBatchAsync_ptsz(5) @ 12_080;
                    cuMemcpy3DBatchAsync_v2(4) @ 13_000;
                    cuMemcpy3DBatchAsync_v2_ptsz(4) @ 13_000;
                    cuMemcpy3DPeerAsync(2) @ 4_000;
                    cuMemcpy3DPeerAsync_ptsz(2) @ 7_000;
                    cuMemcpy3DWithAttributesAsync(3) @ 13_020;
                    cuMemcpy3DWithAttributesAsync_ptsz(3) @ 13_020;
                    cuMemcpyAsync(4) checks(both) @ 4_000;
                    cuMemcpyAsync_ptsz(4) checks(both) @ 7_000;
                    cuMemcpyAtoHAsync(5) @ 2_000;
                    cuMemcpyAtoHAsync_v2(5) @ 3_020;
                    cuMemcpyAtoHAsync_v2_ptsz(5) @ 7_000;
                    cuMemcpyBatchAsync(9) @ 12_080;
                    cuMemcpyBatchAsync_ptsz(9) @ 12_080;
                    cuMemcpyBatchAsync_v2(8) @ 13_000;
                    cuMemcpyBatchAsync_v2_ptsz(8) @ 13_000;
                    cuMemcpyDtoDAsync(4) @ 3_000;
                    cuMemcpyDtoDAsync_v2(4) checks(both) @ 3_020;
                    cuMemcpyDtoDAsync_v2_ptsz(4) checks(both) @ 7_000;
                    cuMemcpyDtoHAsync(4) @ 2_000;
                    cuMemcpyDtoHAsync_v2(4) checks(source) @ 3_020;
                    cuMemcpyDtoHAsync_v2_ptsz(4) checks(source) @ 7_000;
                    cuMemcpyHtoAAsync(5) @ 2_000;
                    cuMemcpyHtoAAsync_v2(5) @ 3_020;
                    cuMemcpyHtoAAsync_v2_ptsz(5) @ 7_000;
                    cuMemcpyHtoDAsync(4) @ 2_000;
                    cuMemcpyHtoDAsync_v2(4) checks(destination) @ 3_020;
                    cuMemcpyHtoDAsync_v2_ptsz(4) checks(destination) @ 7_000;
                    cuMemcpyPeerAsync(6) checks(peers) @ 4_000;
                    cuMemcpyPeerAsync_ptsz(6) checks(peers) @ 7_000;
                    cuMemcpyWithAttributesAsync(5) @ 13_020;
                    cuMemcpyWithAttributesAsync_ptsz(5) @ 13_020;
                    cuMemsetD16Async(4) checks(elements 2) @ 3_020;
                    cuMemsetD16Async_ptsz(4) checks(elements 2) @ 7_000;
                    cuMemsetD2D16Async(6) @ 3_020;
                    cuMemsetD2D16Async_ptsz(6) @ 7_000;
                    cuMemsetD2D32Async(6) @ 3_020;
                    cuMemsetD2D32Async_ptsz(6) @ 7_000;
                    cuMemsetD2D8Async(6) @ 3_020;
                    cuMemsetD2D8Async_ptsz(6) @ 7_000;
                    cuMemsetD32Async(4) checks(elements 4) @ 3_020;
                    cuMemsetD32Async_ptsz(4) checks(elements 4) @ 7_000;
                    cuMemsetD8Async(4) checks(elements 1) @ 3_020;
                    cuMemsetD8Async_ptsz(4) checks(elements 1) @ 7_000;
                    cuSignalExternalSemaphoresAsync(4) @ 10_000;
                    cuSignalExternalSemaphoresAsync_ptsz(4) @ 10_000;
                    cuWaitExternalSemaphoresAsync(4) @ 10_000;
                    cuWaitExternalSemaphoresAsync_ptsz(4) @ 10_000;
                }
                Submit attributes {
                    cuLaunchKernelEx(4) @ 11_060;
                    cuLaunchKernelEx_ptsz(4) @ 11_060;
                }
                Submit default {
                    cuFabricCpyBatchAsync(4) @ 13_050;
                    cuFabricCpyBatchAsync_ptsz(4) @ 13_050;
                    cuGLMapBufferObject(3) @ 2_000;
                    cuGLMapBufferObject_v2(3) @ 3_020;
                    cuGLMapBufferObject_v2_ptds(3) @ 7_000;
                    cuGLUnmapBufferObject(1) @ 2_000;
                    cuLaunch(1) @ 2_000;
                    cuLaunchCooperativeKernelMultiDevice(3) @ 9_000;
                    cuLaunchGrid(3) @ 2_000;
                    cuMemcpy(3) checks(both) @ 4_000;
                    cuMemcpy_ptds(3) checks(both) @ 7_000;
                    cuMemcpy2D(1) @ 2_000;
                    cuMemcpy2D_v2(1) @ 3_020;
                    cuMemcpy2D_v2_ptds(1) @ 7_000;
                    cuMemcpy2DUnaligned(1) @ 2_000;
                    cuMemcpy2DUnaligned_v2(1) @ 3_020;
                    cuMemcpy2DUnaligned_v2_ptds(1) @ 7_000;
                    cuMemcpy3D(1) @ 2_000;
                    cuMemcpy3D_v2(1) @ 3_020;
                    cuMemcpy3D_v2_ptds(1) @ 7_000;
                    cuMemcpy3DPeer(1) @ 4_000;
                    cuMemcpy3DPeer_ptds(1) @ 7_000;
                    cuMemcpyAtoA(5) @ 2_000;
                    cuMemcpyAtoA_v2(5) @ 3_020;
                    cuMemcpyAtoA_v2_ptds(5) @ 7_000;
                    cuMemcpyAtoD(4) @ 2_000;
                    cuMemcpyAtoD_v2(4) @ 3_020;
                    cuMemcpyAtoD_v2_ptds(4) @ 7_000;
                    cuMemcpyAtoH(4) @ 2_000;
                    cuMemcpyAtoH_v2(4) @ 3_020;
                    cuMemcpyAtoH_v2_ptds(4) @ 7_000;
                    cuMemcpyDtoA(4) @ 2_000;
                    cuMemcpyDtoA_v2(4) @ 3_020;
                    cuMemcpyDtoA_v2_ptds(4) @ 7_000;
                    cuMemcpyDtoD(3) @ 2_000;
                    cuMemcpyDtoD_v2(3) checks(both) @ 3_020;
                    cuMemcpyDtoD_v2_ptds(3) checks(both) @ 7_000;
                    cuMemcpyDtoH(3) @ 2_000;
                    cuMemcpyDtoH_v2(3) checks(source) @ 3_020;
                    cuMemcpyDtoH_v2_ptds(3) checks(source) @ 7_000;
                    cuMemcpyHtoA(4) @ 2_000;
                    cuMemcpyHtoA_v2(4) @ 3_020;
                    cuMemcpyHtoA_v2_ptds(4) @ 7_000;
                    cuMemcpyHtoD(3) @ 2_000;
                    cuMemcpyHtoD_v2(3) checks(destination) @ 3_020;
                    cuMemcpyHtoD_v2_ptds(3) checks(destination) @ 7_000;
                    cuMemcpyPeer(5) checks(peers) @ 4_000;
                    cuMemcpyPeer_ptds(5) checks(peers) @ 7_000;
                    cuMemsetD16(3) @ 2_000;
                    cuMemsetD16_v2(3) checks(elements 2) @ 3_020;
                    cuMemsetD16_v2_ptds(3) checks(elements 2) @ 7_000;
                    cuMemsetD2D16(5) @ 2_000;
                    cuMemsetD2D16_v2(5) @ 3_020;
                    cuMemsetD2D16_v2_ptds(5) @ 7_000;
                    cuMemsetD2D32(5) @ 2_000;
                    cuMemsetD2D32_v2(5) @ 3_020;
                    cuMemsetD2D32_v2_ptds(5) @ 7_000;
                    cuMemsetD2D8(5) @ 2_000;
                    cuMemsetD2D8_v2(5) @ 3_020;
                    cuMemsetD2D8_v2_ptds(5) @ 7_000;
                    cuMemsetD32(3) @ 2_000;
                    cuMemsetD32_v2(3) checks(elements 4) @ 3_020;
                    cuMemsetD32_v2_ptds(3) checks(elements 4) @ 7_000;
                    cuMemsetD8(3) @ 2_000;
                    cuMemsetD8_v2(3) checks(elements 1) @ 3_020;
                    cuMemsetD8_v2_ptds(3) checks(elements 1) @ 7_000;
                }
                NeedsMemory none {
                    cuGraphAddBatchMemOpNode(5) @ 11_070;
                    cuGraphAddChildGraphNode(5) @ 10_000;
                    cuGraphAddMemcpyNode(6) @ 10_000;
                    cuGraphAddMemsetNode(6) @ 10_000;
                    cuGraphAddNode(5) @ 12_020;
                    cuGraphAddNode_v2(6) @ 12_030;
                    cuGraphAddNode_v3(6) @ 13_040;
                    cuGraphBatchMemOpNodeSetParams(2) @ 11_070;
                    cuGraphExecBatchMemOpNodeSetParams(3) @ 11_070;
                    cuGraphExecChildGraphNodeSetParams(3) @ 11_010;
                    cuGraphExecMemcpyNodeSetParams(4) @ 10_020;
                    cuGraphExecMemsetNodeSetParams(4) @ 10_020;
                    cuGraphExecNodeSetParams(3) @ 12_020;
                    cuGraphExecUpdate(4) @ 10_020;
                    cuGraphExecUpdate_v2(3) @ 12_000;
                    cuGraphInstantiate(5) @ 10_000;
                    cuGraphInstantiate_v2(5) @ 11_000;
                    cuGraphInstantiateWithFlags(3) @ 11_040;
                    cuGraphInstantiateWithParams(3) @ 12_000;
                    cuGraphInstantiateWithParams_ptsz(3) @ 12_000;
                    cuGraphMemcpyNodeSetParams(2) @ 10_000;
                    cuGraphMemsetNodeSetParams(2) @ 10_000;
                    cuGraphNodeSetParams(2) @ 12_020;
                    cuGraphNodeSetParams_v2(2) @ 13_040;
                    cuLogicalEndpointBindAddr(6) @ 13_030;
                    cuMemAdvise(4) @ 8_000;
                    cuMemAdvise_v2(4) @ 12_020;
                    cuMemGetLocationInfo(5) @ 13_040;
                    cuMemRangeGetAttribute(5) @ 8_000;
                    cuMemRangeGetAttributes(6) @ 8_000;
                    cuMulticastBindAddr(5) @ 12_010;
                    cuMulticastBindAddr_v2(6) @ 13_010;
                    cuSurfObjectCreate(2) @ 5_000;
                    cuTexObjectCreate(4) @ 5_000;
                    cuTexRefSetAddress(4) @ 2_000;
                    cuTexRefSetAddress_v2(4) @ 3_020;
                    cuTexRefSetAddress2D(4) @ 2_020;
                    cuTexRefSetAddress2D_v2(4) @ 3_020;
                    cuTexRefSetAddress2D_v3(4) @ 4_010;
                }
                Grows none {
                    cuCtxSetLimit(2) @ 3_010;
                    cuEventCreate(2) @ 2_000;
                    cuFuncLoad(1) @ 12_040;
                    cuKernelGetFunction(2) @ 12_000;
                    cuLibraryGetGlobal(4) @ 12_000;
                    cuLibraryGetModule(2) @ 12_000;
                    cuLibraryLoadData(8) @ 12_000;
                    cuLibraryLoadFromFile(8) @ 12_000;
                    cuMemAllocHost(2) @ 2_000;
                    cuMemAllocHost_v2(2) @ 3_020;
                    cuMemHostAlloc(3) @ 2_020;
                    cuMemHostRegister(3) @ 4_000;
                    cuMemHostRegister_v2(3) @ 6_050;
                    cuModuleGetFunction(3) @ 2_000;
                    cuModuleGetGlobal(4) @ 2_000;
                    cuModuleGetGlobal_v2(4) @ 3_020;
                    cuModuleLoad(2) @ 2_000;
                    cuModuleLoadData(2) @ 2_000;
                    cuModuleLoadDataEx(5) @ 2_010;
                    cuModuleLoadFatBinary(2) @ 2_000;
                }
            }
            hooked {
                Init {
                    cuInit(flags: u32) @ 2_000;
                }
                Lookup {
                    cuGetProcAddress(symbol: *const c_char, pfn: *mut *mut c_void, version: i32, flags: u64) @ 11_030;
                    cuGetProcAddress_v2(
                        symbol: *const c_char, pfn: *mut *mut c_void, version: i32, flags: u64,
                        status: *mut CUdriverProcAddressQueryResult
                    ) @ 12_000;
                }
                Alloc {
                    cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) @ 3_020;
                    cuMemAllocPitch_v2(
                        dptr: *mut CUdeviceptr, pitch: *mut usize, width: usize, height: usize, element_size: u32
                    ) @ 3_020;
                    cuMemAllocAsync(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) @ 11_020;
                    cuMemAllocAsync_ptsz(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) @ 11_020;
                    cuMemAllocFromPoolAsync(
                        dptr: *mut CUdeviceptr, bytesize: usize, pool: CUmemoryPool, stream: CUstream
                    ) @ 11_020;
                    cuMemAllocFromPoolAsync_ptsz(
                        dptr: *mut CUdeviceptr, bytesize: usize, pool: CUmemoryPool, stream: CUstream
                    ) @ 11_020;
                }
                Free {
                    cuMemFree_v2(dptr: CUdeviceptr) @ 3_020;
                    cuMemFreeAsync(dptr: CUdeviceptr, stream: CUstream) @ 11_020;
                    cuMemFreeAsync_ptsz(dptr: CUdeviceptr, stream: CUstream) @ 11_020;
                }
                Pool {
                    cuMemPoolCreate(pool: *mut CUmemoryPool, props: *const CUmemPoolProps) @ 11_020;
                    cuMemPoolDestroy(pool: CUmemoryPool) @ 11_020;
                    cuMemPoolGetAttribute(
                        pool: CUmemoryPool, attribute: CUmemPool_attribute, value: *mut c_void
                    ) @ 11_020;
                    cuMemPoolSetAccess(pool: CUmemoryPool, map: *const CUmemAccessDesc, count: usize) @ 11_020;
                    cuMemPoolSetAttribute(
                        pool: CUmemoryPool, attribute: CUmemPool_attribute, value: *mut c_void
                    ) @ 11_020;
                    cuMemPoolTrimTo(pool: CUmemoryPool, min_bytes_to_keep: usize) @ 11_020;
                }
                Map {
                    cuMemCreate(
                        handle: *mut CUmemGenericAllocationHandle, size: usize, prop: *const CUmemAllocationProp, flags: u64
                    ) @ 10_020;
                    cuMemRelease(handle: CUmemGenericAllocationHandle) @ 10_020;
                    cuMemMap(
                        ptr: CUdeviceptr, size: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: u64
                    ) @ 10_020;
                    cuMemUnmap(ptr: CUdeviceptr, size: usize) @ 10_020;
                    cuMemSetAccess(ptr: CUdeviceptr, size: usize, desc: *const CUmemAccessDesc, count: usize) @ 10_020;
                    cuMemRetainAllocationHandle(
                        handle: *mut CUmemGenericAllocationHandle, addr: *mut c_void
                    ) @ 11_000;
                    cuMemAddressFree(ptr: CUdeviceptr, size: usize) @ 10_020;
                    cuMemAddressReserve(
                        ptr: *mut CUdeviceptr, size: usize, alignment: usize, addr: CUdeviceptr, flags: u64
                    ) @ 10_020;
                    cuMemGetAllocationPropertiesFromHandle(
                        prop: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle
                    ) @ 10_020;
                }
                Import {
                    cuIpcOpenMemHandle(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) @ 4_010;
                    cuIpcOpenMemHandle_v2(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) @ 11_000;
                    cuIpcCloseMemHandle(dptr: CUdeviceptr) @ 4_010;
                    cuMemImportFromShareableHandle(
                        handle: *mut CUmemGenericAllocationHandle, shareable: *mut c_void, kind: u32
                    ) @ 10_020;
                }
                Export {
                    cuIpcGetMemHandle(handle: *mut CUipcMemHandle, dptr: CUdeviceptr) @ 4_010;
                    cuMemExportToShareableHandle(
                        shareable: *mut c_void, handle: CUmemGenericAllocationHandle, kind: u32, flags: u64
                    ) @ 10_020;
                    cuMemGetHandleForAddressRange(
                        out: *mut c_void, ptr: CUdeviceptr, size: usize, kind: u32, flags: u64
                    ) @ 11_070;
                    cuMulticastBindMem(
                        multicast: CUmemGenericAllocationHandle, multicast_offset: usize,
                        handle: CUmemGenericAllocationHandle, offset: usize, size: usize, flags: u64
                    ) @ 12_010;
                    cuMulticastBindMem_v2(
                        multicast: CUmemGenericAllocationHandle, dev: CUdevice, multicast_offset: usize,
                        handle: CUmemGenericAllocationHandle, offset: usize, size: usize, flags: u64
                    ) @ 13_010;
                }
                Placed {
                    cuArrayCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY_DESCRIPTOR) @ 3_020;
                    cuArray3DCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY3D_DESCRIPTOR) @ 3_020;
                    cuMipmappedArrayCreate(
                        array: *mut CUarray, desc: *const CUDA_ARRAY3D_DESCRIPTOR, levels: u32
                    ) @ 5_000;
                    cuArrayDestroy(array: CUarray) @ 2_000;
                    cuMipmappedArrayDestroy(array: CUarray) @ 5_000;
                    cuMemAllocManaged(dptr: *mut CUdeviceptr, bytesize: usize, flags: u32) @ 6_000;
                }
                QueryMemory {
                    cuMemGetInfo(free: *mut u32, total: *mut u32) @ 2_000;
                    cuMemGetInfo_v2(free: *mut usize, total: *mut usize) @ 3_020;
                    cuMemGetAddressRange_v2(base: *mut CUdeviceptr, size: *mut usize, dptr: CUdeviceptr) @ 3_020;
                    cuDeviceTotalMem(bytes: *mut u32, dev: CUdevice) @ 2_000;
                    cuDeviceTotalMem_v2(bytes: *mut usize, dev: CUdevice) @ 3_020;
                    cuPointerGetAttribute(
                        data: *mut c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr
                    ) @ 4_000;
                    cuPointerGetAttributes(
                        num_attributes: u32, attributes: *mut CUpointer_attribute, data: *mut *mut c_void,
                        ptr: CUdeviceptr
                    ) @ 7_000;
                    cuPointerSetAttribute(
                        value: *const c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr
                    ) @ 6_000;
                    cuMemGetAccess(flags: *mut u64, location: *const CUmemLocation, ptr: CUdeviceptr) @ 10_020;
                    cuCtxGetFlags(flags: *mut u32) @ 7_000;
                    cuCtxSetFlags(flags: u32) @ 12_010;
                }
                Context {
                    cuDevicePrimaryCtxRetain(ctx: *mut CUcontext, dev: CUdevice) @ 7_000;
                    cuDevicePrimaryCtxRelease(dev: CUdevice) @ 7_000;
                    cuDevicePrimaryCtxRelease_v2(dev: CUdevice) @ 11_000;
                    cuDevicePrimaryCtxReset(dev: CUdevice) @ 7_000;
                    cuDevicePrimaryCtxReset_v2(dev: CUdevice) @ 11_000;
                    cuCtxCreate(ctx: *mut CUcontext, flags: u32, dev: CUdevice) @ 2_000;
                    cuCtxCreate_v2(ctx: *mut CUcontext, flags: u32, dev: CUdevice) @ 3_020;
                    cuCtxCreate_v3(
                        ctx: *mut CUcontext, params: *mut c_void, count: i32, flags: u32, dev: CUdevice
                    ) @ 11_040;
                    cuCtxCreate_v4(ctx: *mut CUcontext, params: *mut c_void, flags: u32, dev: CUdevice) @ 12_050;
                    cuCtxDestroy(ctx: CUcontext) @ 2_000;
                    cuCtxDestroy_v2(ctx: CUcontext) @ 4_000;
                    cuCtxAttach(ctx: *mut CUcontext, flags: u32) @ 2_000;
                    cuCtxDetach(ctx: CUcontext) @ 2_000;
                    cuCtxSetCurrent(ctx: CUcontext) @ 4_000;
                    cuCtxPushCurrent(ctx: CUcontext) @ 2_000;
                    cuCtxPushCurrent_v2(ctx: CUcontext) @ 4_000;
                    cuCtxEnablePeerAccess(peer: CUcontext, flags: u32) @ 4_000;
                    cuCtxDisablePeerAccess(peer: CUcontext) @ 4_000;
                    cuGreenCtxCreate(
                        ctx: *mut CUgreenCtx, desc: CUdevResourceDesc, dev: CUdevice, flags: u32
                    ) @ 12_040;
                    cuGreenCtxDestroy(ctx: CUgreenCtx) @ 12_040;
                }
                Stream {
                    cuStreamCreate(stream: *mut CUstream, flags: u32) @ 2_000;
                    cuStreamCreateWithPriority(stream: *mut CUstream, flags: u32, priority: i32) @ 5_050;
                    cuStreamDestroy(stream: CUstream) @ 2_000;
                    cuStreamDestroy_v2(stream: CUstream) @ 4_000;
                    cuGreenCtxStreamCreate(
                        stream: *mut CUstream, green_ctx: CUgreenCtx, flags: u32, priority: i32
                    ) @ 12_050;
                }
                Capture {
                    cuStreamBeginCapture(stream: CUstream) @ 10_000;
                    cuStreamBeginCapture_ptsz(stream: CUstream) @ 10_000;
                    cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode) @ 10_010;
                    cuStreamBeginCapture_v2_ptsz(stream: CUstream, mode: CUstreamCaptureMode) @ 10_010;
                    cuStreamBeginCaptureToGraph(
                        stream: CUstream, graph: CUgraph, dependencies: *const CUgraphNode,
                        dependency_data: *const c_void, num_dependencies: usize, mode: CUstreamCaptureMode
                    ) @ 12_030;
                    cuStreamBeginCaptureToGraph_ptsz(
                        stream: CUstream, graph: CUgraph, dependencies: *const CUgraphNode,
                        dependency_data: *const c_void, num_dependencies: usize, mode: CUstreamCaptureMode
                    ) @ 12_030;
                    cuStreamBeginRecaptureToGraph(
                        stream: CUstream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void,
                        user_data: *mut c_void
                    ) @ 13_030;
                    cuStreamBeginRecaptureToGraph_ptsz(
                        stream: CUstream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void,
                        user_data: *mut c_void
                    ) @ 13_030;
                    cuStreamBeginCaptureToCig(stream: CUstream, params: *mut c_void) @ 13_010;
                    cuStreamBeginCaptureToCig_ptsz(stream: CUstream, params: *mut c_void) @ 13_010;
                    cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) @ 10_000;
                    cuStreamEndCapture_ptsz(stream: CUstream, graph: *mut CUgraph) @ 10_000;
                    cuStreamEndCaptureToCig(stream: CUstream) @ 13_010;
                    cuStreamEndCaptureToCig_ptsz(stream: CUstream) @ 13_010;
                    // A stream that waits for an event of a capture takes part in it from then on.
                    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: u32) @ 3_020;
                    cuStreamWaitEvent_ptsz(stream: CUstream, event: CUevent, flags: u32) @ 7_000;
                }
            }
            passed {
                cuArray3DCreate @ 2_000;
                cuArray3DGetDescriptor @ 2_000;
                cuArray3DGetDescriptor_v2 @ 3_020;
                cuArrayCreate @ 2_000;
                cuArrayGetDescriptor @ 2_000;
                cuArrayGetDescriptor_v2 @ 3_020;
                cuArrayGetMemoryRequirements @ 11_060;
                cuArrayGetPlane @ 11_020;
                cuArrayGetSparseProperties @ 11_010;
                cuCheckpointOperationComplete @ 13_040;
                cuCheckpointProcessCheckpoint @ 12_080;
                cuCheckpointProcessGetRestoreThreadId @ 12_080;
                cuCheckpointProcessGetState @ 12_080;
                cuCheckpointProcessLock @ 12_080;
                cuCheckpointProcessRestore @ 12_080;
                cuCheckpointProcessUnlock @ 12_080;
                cuCoredumpDeregisterCompleteCallback @ 13_020;
                cuCoredumpDeregisterStartCallback @ 13_020;
                cuCoredumpGetAttribute @ 12_010;
                cuCoredumpGetAttributeGlobal @ 12_010;
                cuCoredumpRegisterCompleteCallback @ 13_020;
                cuCoredumpRegisterStartCallback @ 13_020;
                cuCoredumpSetAttribute @ 12_010;
                cuCoredumpSetAttributeGlobal @ 12_010;
                cuCtxFromGreenCtx @ 12_040;
                cuCtxGetApiVersion @ 3_020;
                cuCtxGetCacheConfig @ 3_020;
                cuCtxGetCurrent @ 4_000;
                cuCtxGetDevResource @ 12_040;
                cuCtxGetDevice @ 2_000;
                cuCtxGetDevice_v2 @ 13_000;
                cuCtxGetExecAffinity @ 11_040;
                cuCtxGetId @ 12_000;
                cuCtxGetLimit @ 3_010;
                cuCtxGetSharedMemConfig @ 4_020;
                cuCtxGetStreamPriorityRange @ 5_050;
                cuCtxPopCurrent @ 2_000;
                cuCtxPopCurrent_v2 @ 4_000;
                cuCtxRecordEvent @ 12_050;
                cuCtxResetPersistingL2Cache @ 11_000;
                cuCtxSetCacheConfig @ 3_020;
                cuCtxSetSharedMemConfig @ 4_020;
                cuCtxSynchronize @ 2_000;
                cuCtxSynchronize_v2 @ 13_000;
                cuCtxWaitEvent @ 12_050;
                cuDestroyExternalMemory @ 10_000;
                cuDestroyExternalSemaphore @ 10_000;
                cuDevResourceGenerateDesc @ 12_040;
                cuDevSmResourceSplit @ 13_010;
                cuDevSmResourceSplitByCount @ 12_040;
                cuDeviceCanAccessPeer @ 4_000;
                cuDeviceComputeCapability @ 2_000;
                cuDeviceGet @ 2_000;
                cuDeviceGetAttribute @ 2_000;
                cuDeviceGetByPCIBusId @ 4_010;
                cuDeviceGetCliqueCount @ 13_040;
                cuDeviceGetCliqueInfo @ 13_040;
                cuDeviceGetCount @ 2_000;
                cuDeviceGetDefaultMemPool @ 11_020;
                cuDeviceGetDevResource @ 12_040;
                cuDeviceGetExecAffinitySupport @ 11_040;
                cuDeviceGetFabricClusterUuid @ 13_040;
                cuDeviceGetGraphMemAttribute @ 11_040;
                cuDeviceGetHostAtomicCapabilities @ 13_000;
                cuDeviceGetLuid @ 10_000;
                cuDeviceGetMemPool @ 11_020;
                cuDeviceGetName @ 2_000;
                cuDeviceGetNvSciSyncAttributes @ 10_020;
                cuDeviceGetP2PAtomicCapabilities @ 13_000;
                cuDeviceGetP2PAttribute @ 8_000;
                cuDeviceGetPCIBusId @ 4_010;
                cuDeviceGetProperties @ 2_000;
                cuDeviceGetTexture1DLinearMaxWidth @ 11_010;
                cuDeviceGetUuid @ 9_020;
                cuDeviceGetUuid_v2 @ 11_040;
                cuDeviceGraphMemTrim @ 11_040;
                cuDevicePrimaryCtxGetState @ 7_000;
                cuDevicePrimaryCtxSetFlags @ 7_000;
                cuDevicePrimaryCtxSetFlags_v2 @ 11_000;
                cuDeviceRegisterAsyncNotification @ 12_040;
                cuDeviceSetGraphMemAttribute @ 11_040;
                cuDeviceSetMemPool @ 11_020;
                cuDeviceUnregisterAsyncNotification @ 12_040;
                cuDriverGetVersion @ 2_020;
                cuEGLStreamConsumerAcquireFrame @ 7_000;
                cuEGLStreamConsumerConnect @ 7_000;
                cuEGLStreamConsumerConnectWithFlags @ 8_000;
                cuEGLStreamConsumerDisconnect @ 7_000;
                cuEGLStreamConsumerReleaseFrame @ 7_000;
                cuEGLStreamProducerConnect @ 7_000;
                cuEGLStreamProducerDisconnect @ 7_000;
                cuEGLStreamProducerPresentFrame @ 7_000;
                cuEGLStreamProducerReturnFrame @ 7_000;
                cuEventCreateFromEGLSync @ 9_000;
                cuEventDestroy @ 2_000;
                cuEventDestroy_v2 @ 4_000;
                cuEventElapsedTime @ 2_000;
                cuEventElapsedTime_v2 @ 12_080;
                cuEventQuery @ 2_000;
                cuEventRecord @ 2_000;
                cuEventRecord_ptsz @ 7_000;
                cuEventRecordWithFlags @ 11_010;
                cuEventRecordWithFlags_ptsz @ 11_010;
                cuEventSynchronize @ 2_000;
                cuExternalMemoryGetMappedBuffer @ 10_000;
                cuExternalMemoryGetMappedMipmappedArray @ 10_000;
                cuFlushGPUDirectRDMAWrites @ 11_030;
                cuFuncGetAttribute @ 2_020;
                cuFuncGetModule @ 11_000;
                cuFuncGetName @ 12_030;
                cuFuncGetParamCount @ 13_020;
                cuFuncGetParamInfo @ 12_040;
                cuFuncIsLoaded @ 12_040;
                cuFuncSetAttribute @ 9_000;
                cuFuncSetBlockShape @ 2_000;
                cuFuncSetCacheConfig @ 3_000;
                cuFuncSetSharedMemConfig @ 4_020;
                cuFuncSetSharedSize @ 2_000;
                cuGLCtxCreate @ 2_000;
                cuGLCtxCreate_v2 @ 3_020;
                cuGLGetDevices @ 4_010;
                cuGLGetDevices_v2 @ 6_050;
                cuGLInit @ 2_000;
                cuGLRegisterBufferObject @ 2_000;
                cuGLSetBufferObjectMapFlags @ 2_030;
                cuGLUnregisterBufferObject @ 2_000;
                cuGetErrorName @ 6_000;
                cuGetErrorString @ 6_000;
                cuGetExportTable @ 3_000;
                cuGraphAddDependencies @ 10_000;
                cuGraphAddDependencies_v2 @ 12_030;
                cuGraphAddEmptyNode @ 10_000;
                cuGraphAddEventRecordNode @ 11_010;
                cuGraphAddEventWaitNode @ 11_010;
                cuGraphAddExternalSemaphoresSignalNode @ 11_020;
                cuGraphAddExternalSemaphoresWaitNode @ 11_020;
                cuGraphAddHostNode @ 10_000;
                cuGraphAddKernelNode @ 10_000;
                cuGraphAddKernelNode_v2 @ 12_000;
                cuGraphAddMemAllocNode @ 11_040;
                cuGraphAddMemFreeNode @ 11_040;
                cuGraphBatchMemOpNodeGetParams @ 11_070;
                cuGraphChildGraphNodeGetGraph @ 10_000;
                cuGraphClone @ 10_000;
                cuGraphConditionalHandleCreate @ 12_030;
                cuGraphCreate @ 10_000;
                cuGraphDebugDotPrint @ 11_030;
                cuGraphDestroy @ 10_000;
                cuGraphDestroyNode @ 10_000;
                cuGraphEventRecordNodeGetEvent @ 11_010;
                cuGraphEventRecordNodeSetEvent @ 11_010;
                cuGraphEventWaitNodeGetEvent @ 11_010;
                cuGraphEventWaitNodeSetEvent @ 11_010;
                cuGraphExecDestroy @ 10_000;
                cuGraphExecEventRecordNodeSetEvent @ 11_010;
                cuGraphExecEventWaitNodeSetEvent @ 11_010;
                cuGraphExecExternalSemaphoresSignalNodeSetParams @ 11_020;
                cuGraphExecExternalSemaphoresWaitNodeSetParams @ 11_020;
                cuGraphExecGetFlags @ 12_000;
                cuGraphExecGetId @ 13_010;
                cuGraphExecHostNodeSetParams @ 10_020;
                cuGraphExecKernelNodeSetParams @ 10_010;
                cuGraphExecKernelNodeSetParams_v2 @ 12_000;
                cuGraphExternalSemaphoresSignalNodeGetParams @ 11_020;
                cuGraphExternalSemaphoresSignalNodeSetParams @ 11_020;
                cuGraphExternalSemaphoresWaitNodeGetParams @ 11_020;
                cuGraphExternalSemaphoresWaitNodeSetParams @ 11_020;
                cuGraphGetEdges @ 10_000;
                cuGraphGetEdges_v2 @ 12_030;
                cuGraphGetId @ 13_010;
                cuGraphGetNodes @ 10_000;
                cuGraphGetRootNodes @ 10_000;
                cuGraphHostNodeGetParams @ 10_000;
                cuGraphHostNodeSetParams @ 10_000;
                cuGraphKernelNodeCopyAttributes @ 11_000;
                cuGraphKernelNodeGetAttribute @ 11_000;
                cuGraphKernelNodeGetParams @ 10_000;
                cuGraphKernelNodeGetParams_v2 @ 12_000;
                cuGraphKernelNodeSetAttribute @ 11_000;
                cuGraphKernelNodeSetParams @ 10_000;
                cuGraphKernelNodeSetParams_v2 @ 12_000;
                cuGraphMemAllocNodeGetParams @ 11_040;
                cuGraphMemFreeNodeGetParams @ 11_040;
                cuGraphMemcpyNodeGetParams @ 10_000;
                cuGraphMemsetNodeGetParams @ 10_000;
                cuGraphNodeFindInClone @ 10_000;
                cuGraphNodeGetContainingGraph @ 13_010;
                cuGraphNodeGetDependencies @ 10_000;
                cuGraphNodeGetDependencies_v2 @ 12_030;
                cuGraphNodeGetDependentNodes @ 10_000;
                cuGraphNodeGetDependentNodes_v2 @ 12_030;
                cuGraphNodeGetEnabled @ 11_060;
                cuGraphNodeGetLocalId @ 13_010;
                cuGraphNodeGetParams @ 13_020;
                cuGraphNodeGetToolsId @ 13_010;
                cuGraphNodeGetType @ 10_000;
                cuGraphNodeSetEnabled @ 11_060;
                cuGraphReleaseUserObject @ 11_030;
                cuGraphRemoveDependencies @ 10_000;
                cuGraphRemoveDependencies_v2 @ 12_030;
                cuGraphRetainUserObject @ 11_030;
                cuGraphicsEGLRegisterImage @ 7_000;
                cuGraphicsGLRegisterBuffer @ 3_000;
                cuGraphicsGLRegisterImage @ 3_000;
                cuGraphicsResourceGetMappedEglFrame @ 7_000;
                cuGraphicsResourceGetMappedMipmappedArray @ 5_000;
                cuGraphicsResourceGetMappedPointer @ 3_000;
                cuGraphicsResourceGetMappedPointer_v2 @ 3_020;
                cuGraphicsResourceSetMapFlags @ 3_000;
                cuGraphicsResourceSetMapFlags_v2 @ 6_050;
                cuGraphicsSubResourceGetMappedArray @ 3_000;
                cuGraphicsUnregisterResource @ 3_000;
                cuGraphicsVDPAURegisterOutputSurface @ 3_010;
                cuGraphicsVDPAURegisterVideoSurface @ 3_010;
                cuGreenCtxGetDevResource @ 12_040;
                cuGreenCtxGetId @ 12_090;
                cuGreenCtxRecordEvent @ 12_040;
                cuGreenCtxWaitEvent @ 12_040;
                cuImportExternalMemory @ 10_000;
                cuImportExternalSemaphore @ 10_000;
                cuIpcGetEventHandle @ 4_010;
                cuIpcOpenEventHandle @ 4_010;
                cuKernelGetAttribute @ 12_000;
                cuKernelGetLibrary @ 12_050;
                cuKernelGetName @ 12_030;
                cuKernelGetParamCount @ 13_020;
                cuKernelGetParamInfo @ 12_040;
                cuKernelSetAttribute @ 12_000;
                cuKernelSetCacheConfig @ 12_000;
                cuLibraryEnumerateKernels @ 12_040;
                cuLibraryGetKernel @ 12_000;
                cuLibraryGetKernelCount @ 12_040;
                cuLibraryGetManaged @ 12_000;
                cuLibraryGetUnifiedFunction @ 12_000;
                cuLibraryUnload @ 12_000;
                cuLinkAddData @ 5_050;
                cuLinkAddData_v2 @ 6_050;
                cuLinkAddFile @ 5_050;
                cuLinkAddFile_v2 @ 6_050;
                cuLinkComplete @ 5_050;
                cuLinkCreate @ 5_050;
                cuLinkCreate_v2 @ 6_050;
                cuLinkDestroy @ 5_050;
                cuLogicalEndpointAddDevice @ 13_030;
                cuLogicalEndpointBindMem @ 13_030;
                cuLogicalEndpointCreate @ 13_030;
                cuLogicalEndpointDestroy @ 13_030;
                cuLogicalEndpointExport @ 13_030;
                cuLogicalEndpointGetLimits @ 13_030;
                cuLogicalEndpointIdRelease @ 13_030;
                cuLogicalEndpointIdReserve @ 13_030;
                cuLogicalEndpointImport @ 13_030;
                cuLogicalEndpointQuery @ 13_030;
                cuLogicalEndpointUnbind @ 13_030;
                cuLogsCurrent @ 12_090;
                cuLogsDumpToFile @ 12_090;
                cuLogsDumpToMemory @ 12_090;
                cuLogsRegisterCallback @ 12_090;
                cuLogsUnregisterCallback @ 12_090;
                cuMemAlloc @ 2_000;
                cuMemAllocPitch @ 2_000;
                cuMemFree @ 2_000;
                cuMemFreeHost @ 2_000;
                cuMemGetAddressRange @ 2_000;
                cuMemGetAllocationGranularity @ 10_020;
                cuMemGetDefaultMemPool @ 13_000;
                cuMemGetMemPool @ 13_000;
                cuMemHostGetDevicePointer @ 2_020;
                cuMemHostGetDevicePointer_v2 @ 3_020;
                cuMemHostGetFlags @ 2_030;
                cuMemHostUnregister @ 4_000;
                cuMemPoolExportPointer @ 11_020;
                cuMemPoolExportToShareableHandle @ 11_020;
                cuMemPoolGetAccess @ 11_020;
                cuMemPoolImportFromShareableHandle @ 11_020;
                cuMemPoolImportPointer @ 11_020;
                cuMemSetMemPool @ 13_000;
                cuMipmappedArrayGetLevel @ 5_000;
                cuMipmappedArrayGetMemoryRequirements @ 11_060;
                cuMipmappedArrayGetSparseProperties @ 11_010;
                cuModuleEnumerateFunctions @ 12_040;
                cuModuleGetFunctionCount @ 12_040;
                cuModuleGetLoadingMode @ 11_070;
                cuModuleGetSurfRef @ 3_000;
                cuModuleGetTexRef @ 2_000;
                cuModuleUnload @ 2_000;
                cuMulticastAddDevice @ 12_010;
                cuMulticastCreate @ 12_010;
                cuMulticastGetGranularity @ 12_010;
                cuMulticastUnbind @ 12_010;
                cuOccupancyAvailableDynamicSMemPerBlock @ 10_020;
                cuOccupancyMaxActiveBlocksPerMultiprocessor @ 6_050;
                cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags @ 7_000;
                cuOccupancyMaxActiveClusters @ 11_070;
                cuOccupancyMaxPotentialBlockSize @ 6_050;
                cuOccupancyMaxPotentialBlockSizeWithFlags @ 7_000;
                cuOccupancyMaxPotentialClusterSize @ 11_070;
                cuParamSetSize @ 2_000;
                cuParamSetTexRef @ 2_000;
                cuParamSetf @ 2_000;
                cuParamSeti @ 2_000;
                cuParamSetv @ 2_000;
                cuProfilerInitialize @ 4_000;
                cuProfilerStart @ 4_000;
                cuProfilerStop @ 4_000;
                cuStreamCopyAttributes @ 11_000;
                cuStreamCopyAttributes_ptsz @ 11_000;
                cuStreamGetAttribute @ 11_000;
                cuStreamGetAttribute_ptsz @ 11_000;
                cuStreamGetCaptureInfo @ 10_010;
                cuStreamGetCaptureInfo_ptsz @ 10_010;
                cuStreamGetCaptureInfo_v2 @ 11_030;
                cuStreamGetCaptureInfo_v2_ptsz @ 11_030;
                cuStreamGetCaptureInfo_v3 @ 12_030;
                cuStreamGetCaptureInfo_v3_ptsz @ 12_030;
                cuStreamGetCtx @ 9_020;
                cuStreamGetCtx_ptsz @ 9_020;
                cuStreamGetCtx_v2 @ 12_050;
                cuStreamGetCtx_v2_ptsz @ 12_050;
                cuStreamGetDevResource @ 13_010;
                cuStreamGetDevResource_ptsz @ 13_010;
                cuStreamGetDevice @ 12_080;
                cuStreamGetDevice_ptsz @ 12_080;
                cuStreamGetFlags @ 5_050;
                cuStreamGetFlags_ptsz @ 7_000;
                cuStreamGetGreenCtx @ 12_040;
                cuStreamGetId @ 12_000;
                cuStreamGetId_ptsz @ 12_000;
                cuStreamGetPriority @ 5_050;
                cuStreamGetPriority_ptsz @ 7_000;
                cuStreamIsCapturing @ 10_000;
                cuStreamIsCapturing_ptsz @ 10_000;
                cuStreamQuery @ 2_000;
                cuStreamQuery_ptsz @ 7_000;
                cuStreamSetAttribute @ 11_000;
                cuStreamSetAttribute_ptsz @ 11_000;
                cuStreamSynchronize @ 2_000;
                cuStreamSynchronize_ptsz @ 7_000;
                cuStreamUpdateCaptureDependencies @ 11_030;
                cuStreamUpdateCaptureDependencies_ptsz @ 11_030;
                cuStreamUpdateCaptureDependencies_v2 @ 12_030;
                cuStreamUpdateCaptureDependencies_v2_ptsz @ 12_030;
                cuSurfObjectDestroy @ 5_000;
                cuSurfObjectGetResourceDesc @ 5_000;
                cuSurfRefGetArray @ 3_000;
                cuSurfRefSetArray @ 3_000;
                cuTensorMapEncodeIm2col @ 12_000;
                cuTensorMapEncodeIm2colWide @ 12_080;
                cuTensorMapEncodeTiled @ 12_000;
                cuTensorMapReplaceAddress @ 12_000;
                cuTensorMapSetAllocationClass @ 13_050;
                cuTexObjectDestroy @ 5_000;
                cuTexObjectGetResourceDesc @ 5_000;
                cuTexObjectGetResourceViewDesc @ 5_000;
                cuTexObjectGetTextureDesc @ 5_000;
                cuTexRefCreate @ 2_000;
                cuTexRefDestroy @ 2_000;
                cuTexRefGetAddress @ 2_000;
                cuTexRefGetAddress_v2 @ 3_020;
                cuTexRefGetAddressMode @ 2_000;
                cuTexRefGetArray @ 2_000;
                cuTexRefGetBorderColor @ 8_000;
                cuTexRefGetFilterMode @ 2_000;
                cuTexRefGetFlags @ 2_000;
                cuTexRefGetFormat @ 2_000;
                cuTexRefGetMaxAnisotropy @ 5_000;
                cuTexRefGetMipmapFilterMode @ 5_000;
                cuTexRefGetMipmapLevelBias @ 5_000;
                cuTexRefGetMipmapLevelClamp @ 5_000;
                cuTexRefGetMipmappedArray @ 5_000;
                cuTexRefSetAddressMode @ 2_000;
                cuTexRefSetArray @ 2_000;
                cuTexRefSetBorderColor @ 8_000;
                cuTexRefSetFilterMode @ 2_000;
                cuTexRefSetFlags @ 2_000;
                cuTexRefSetFormat @ 2_000;
                cuTexRefSetMaxAnisotropy @ 5_000;
                cuTexRefSetMipmapFilterMode @ 5_000;
                cuTexRefSetMipmapLevelBias @ 5_000;
                cuTexRefSetMipmapLevelClamp @ 5_000;
                cuTexRefSetMipmappedArray @ 5_000;
                cuThreadExchangeStreamCaptureMode @ 10_010;
                cuUserObjectCreate @ 11_030;
                cuUserObjectRelease @ 11_030;
                cuUserObjectRetain @ 11_030;
                cuVDPAUCtxCreate @ 3_010;
                cuVDPAUCtxCreate_v2 @ 3_020;
                cuVDPAUGetDevice @ 3_010;
                cuptiGetVersion @ 0;
            }
        }
    };
}

pub(super) use with_rows;
