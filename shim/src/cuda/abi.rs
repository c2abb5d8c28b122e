//! The part of the CUDA driver's ABI that the shim itself uses: result codes, handles, constants, and the few
//! structs that its own calls need. Forwarded calls need none of this (see [`crate::interpose::entry_points`]).
//!
//! Names and values are those of `cuda.h` (checked against CUDA 13), so that a reader can search for them there. A
//! handle is a number to the shim, never a pointer to follow; handles are therefore newtypes over `usize`, which
//! travel in the same registers as the pointers that they are in C and are free to cross threads.

#![allow(non_camel_case_types)]
// A constant's neighbours are stated with it, used or not.
#![allow(dead_code)]

use crate::thread::{self, ThreadId};
use std::ffi::c_void;
use std::fmt;

/// What a driver call returned (`CUresult`).
///
/// A newtype and not an enum: a driver newer than this table may return codes that it doesn't list.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
#[must_use]
pub struct CuResult(pub i32);

macro_rules! results {
    ($($name:ident = $value:literal),* $(,)?) => {
        #[allow(missing_docs)]
        impl CuResult {
            $(pub const $name: CuResult = CuResult($value);)*

            /// The name that `cuda.h` gives it, as in `CUDA_ERROR_OUT_OF_MEMORY`.
            pub const fn name(self) -> &'static str {
                match self.0 {
                    0 => "CUDA_SUCCESS",
                    $($value => concat!("CUDA_ERROR_", stringify!($name)),)*
                    _ => "an error unknown to nvshare",
                }
            }
        }
    };
}

results! {
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    DEINITIALIZED = 4,
    PROFILER_DISABLED = 5,
    PROFILER_NOT_INITIALIZED = 6,
    PROFILER_ALREADY_STARTED = 7,
    PROFILER_ALREADY_STOPPED = 8,
    STUB_LIBRARY = 34,
    CALL_REQUIRES_NEWER_DRIVER = 36,
    DEVICE_UNAVAILABLE = 46,
    MULTICAST_RESOURCE_FULL = 47,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    DEVICE_NOT_LICENSED = 102,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    CONTEXT_ALREADY_CURRENT = 202,
    MAP_FAILED = 205,
    UNMAP_FAILED = 206,
    ARRAY_IS_MAPPED = 207,
    ALREADY_MAPPED = 208,
    NO_BINARY_FOR_GPU = 209,
    ALREADY_ACQUIRED = 210,
    NOT_MAPPED = 211,
    NOT_MAPPED_AS_ARRAY = 212,
    NOT_MAPPED_AS_POINTER = 213,
    ECC_UNCORRECTABLE = 214,
    UNSUPPORTED_LIMIT = 215,
    CONTEXT_ALREADY_IN_USE = 216,
    PEER_ACCESS_UNSUPPORTED = 217,
    INVALID_PTX = 218,
    INVALID_GRAPHICS_CONTEXT = 219,
    NVLINK_UNCORRECTABLE = 220,
    JIT_COMPILER_NOT_FOUND = 221,
    UNSUPPORTED_PTX_VERSION = 222,
    JIT_COMPILATION_DISABLED = 223,
    UNSUPPORTED_EXEC_AFFINITY = 224,
    UNSUPPORTED_DEVSIDE_SYNC = 225,
    CONTAINED = 226,
    INSUFFICIENT_LOADER_VERSION = 227,
    INVALID_SOURCE = 300,
    FILE_NOT_FOUND = 301,
    SHARED_OBJECT_SYMBOL_NOT_FOUND = 302,
    SHARED_OBJECT_INIT_FAILED = 303,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    LOSSY_QUERY = 402,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    LAUNCH_INCOMPATIBLE_TEXTURING = 703,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    PEER_ACCESS_NOT_ENABLED = 705,
    PRIMARY_CONTEXT_ACTIVE = 708,
    CONTEXT_IS_DESTROYED = 709,
    ASSERT = 710,
    TOO_MANY_PEERS = 711,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    HARDWARE_STACK_ERROR = 714,
    ILLEGAL_INSTRUCTION = 715,
    MISALIGNED_ADDRESS = 716,
    INVALID_ADDRESS_SPACE = 717,
    INVALID_PC = 718,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    TENSOR_MEMORY_LEAK = 721,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    SYSTEM_NOT_READY = 802,
    SYSTEM_DRIVER_MISMATCH = 803,
    COMPAT_NOT_SUPPORTED_ON_DEVICE = 804,
    MPS_CONNECTION_FAILED = 805,
    MPS_RPC_FAILURE = 806,
    MPS_SERVER_NOT_READY = 807,
    MPS_MAX_CLIENTS_REACHED = 808,
    MPS_MAX_CONNECTIONS_REACHED = 809,
    MPS_CLIENT_TERMINATED = 810,
    CDP_NOT_SUPPORTED = 811,
    CDP_VERSION_MISMATCH = 812,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_MERGE = 902,
    STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_UNJOINED = 904,
    STREAM_CAPTURE_ISOLATION = 905,
    STREAM_CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    STREAM_CAPTURE_WRONG_THREAD = 908,
    TIMEOUT = 909,
    GRAPH_EXEC_UPDATE_FAILURE = 910,
    EXTERNAL_DEVICE = 911,
    INVALID_CLUSTER_SIZE = 912,
    FUNCTION_NOT_LOADED = 913,
    INVALID_RESOURCE_TYPE = 914,
    INVALID_RESOURCE_CONFIGURATION = 915,
    KEY_ROTATION = 916,
    STREAM_DETACHED = 917,
    GRAPH_RECAPTURE_FAILURE = 918,
    FABRIC_NOT_READY = 919,
    UNKNOWN = 999,
}

impl CuResult {
    /// The call succeeded.
    pub const SUCCESS: CuResult = CuResult(0);

    /// Whether the call succeeded.
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }

    /// Whether the driver refused a call because of a capture, or reports an invalid capture.
    pub const fn is_of_capture(self) -> bool {
        Self::STREAM_CAPTURE_UNSUPPORTED.0 <= self.0 && self.0 <= Self::STREAM_CAPTURE_WRONG_THREAD.0
    }

    /// The same as a `Result`, for `?`.
    pub const fn ok(self) -> Result<(), CuResult> {
        if self.is_success() { Ok(()) } else { Err(self) }
    }
}

impl From<Result<(), CuResult>> for CuResult {
    fn from(result: Result<(), CuResult>) -> CuResult {
        result.err().unwrap_or(CuResult::SUCCESS)
    }
}

impl fmt::Display for CuResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

impl fmt::Debug for CuResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for CuResult {}

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(transparent)]
        pub struct $name(pub usize);

        impl $name {
            /// No object; for a stream, the default stream of the current context.
            pub const NULL: $name = $name(0);

            /// Whether it names no object.
            pub const fn is_null(self) -> bool {
                self.0 == 0
            }
        }
    )*};
}

handles! {
    /// A context.
    CUcontext;
    /// A green context: a context of a part of the GPU's multiprocessors.
    CUgreenCtx;
    /// A stream.
    CUstream;
    /// An event.
    CUevent;
    /// A graph.
    CUgraph;
    /// A node of a graph.
    CUgraphNode;
    /// A set of multiprocessors, for a green context.
    CUdevResourceDesc;
    /// Loaded code.
    CUmodule;
    /// A compilation in progress.
    CUlinkState;
    /// A kernel of a module.
    CUfunction;
    /// An array, mipmapped or not: memory that only the driver can place.
    CUarray;
    /// A pool of stream-ordered memory.
    CUmemoryPool;
}

/// `CUlaunchConfig`, as far as the shim reads it: grid, block and shared memory, and then the stream.
#[repr(C)]
#[derive(Debug)]
pub struct CUlaunchConfig {
    /// Grid and block in three dimensions each, and bytes of shared memory.
    pub shape: [u32; 7],
    /// The stream to which the launch is submitted.
    pub stream: CUstream,
}

const _: () = assert!(std::mem::offset_of!(CUlaunchConfig, stream) == 32);

impl CUstream {
    /// The explicit handle of the default stream that all threads of a context share.
    pub const LEGACY: CUstream = CUstream(1);
    /// The explicit handle of the calling thread's own default stream.
    pub const PER_THREAD: CUstream = CUstream(2);

    /// The explicit handle for this one: null is the thread's own default stream if `per_thread`, else the shared one.
    pub fn named(self, per_thread: bool) -> CUstream {
        match self {
            CUstream::NULL if per_thread => CUstream::PER_THREAD,
            CUstream::NULL => CUstream::LEGACY,
            named => named,
        }
    }

    /// Whether this is the explicit handle of a default stream, which means another stream in each context.
    pub fn is_default(self) -> bool {
        matches!(self, CUstream::LEGACY | CUstream::PER_THREAD)
    }

    /// The calling thread, if this is a thread's own default stream; else `None`.
    pub fn thread(self) -> Option<ThreadId> {
        (self == CUstream::PER_THREAD).then(thread::id_to_keep)
    }
}

/// An address on the GPU.
pub type CUdeviceptr = u64;
/// A GPU, by ordinal.
pub type CUdevice = i32;
/// Physical memory, from `cuMemCreate`.
pub type CUmemGenericAllocationHandle = u64;

/// `CUuuid`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct CUuuid {
    /// The sixteen bytes, in the order in which they are written.
    pub bytes: [u8; 16],
}

impl fmt::Display for CUuuid {
    /// As NVML and nvidia-smi write it: `GPU-8-4-4-4-12`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (i, byte) in self.bytes.iter().enumerate() {
            if matches!(i, 0 | 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Where physical memory is (`CUmemLocationType`).
pub type CUmemLocationType = u32;
/// On the GPU of that ordinal.
pub const CU_MEM_LOCATION_TYPE_DEVICE: CUmemLocationType = 1;
/// In host memory, anywhere.
pub const CU_MEM_LOCATION_TYPE_HOST: CUmemLocationType = 2;
/// In host memory of that NUMA node.
pub const CU_MEM_LOCATION_TYPE_HOST_NUMA: CUmemLocationType = 3;

/// `CUmemLocation`. C passes it by value in one register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct CUmemLocation {
    /// One of `CU_MEM_LOCATION_TYPE_*`.
    pub kind: CUmemLocationType,
    /// A device ordinal or a NUMA node, as `kind` says.
    pub id: i32,
}

impl CUmemLocation {
    /// The memory of a GPU.
    pub const fn device(device: CUdevice) -> CUmemLocation {
        CUmemLocation { kind: CU_MEM_LOCATION_TYPE_DEVICE, id: device }
    }

    /// The memory of a NUMA node of the host.
    pub const fn host_numa(node: i32) -> CUmemLocation {
        CUmemLocation { kind: CU_MEM_LOCATION_TYPE_HOST_NUMA, id: node }
    }
}

/// `CU_MEM_ALLOCATION_TYPE_PINNED`: memory that stays where it was made.
pub const CU_MEM_ALLOCATION_TYPE_PINNED: u32 = 1;

/// Memory that can be exported to another process as a file descriptor.
pub const CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR: u32 = 1;
/// `cuDeviceGetAttribute`: whether the GPU can export memory as file descriptors.
pub const CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: i32 = 103;

/// `CUmemAllocationProp`: what `cuMemCreate` should make.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CUmemAllocationProp {
    /// [`CU_MEM_ALLOCATION_TYPE_PINNED`]; there is no other.
    pub kind: u32,
    /// How the memory may be exported to other processes; 0: not at all.
    pub requested_handle_types: u32,
    /// Where it should be.
    pub location: CUmemLocation,
    /// Windows only.
    pub win32_handle_meta_data: usize,
    /// Compression, RDMA and usage.
    pub alloc_flags: CUmemAllocFlags,
}

/// `CUmemAllocationProp::allocFlags`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct CUmemAllocFlags {
    /// Compressible memory.
    pub compression_type: u8,
    /// Memory that GPUDirect RDMA may reach.
    pub gpu_direct_rdma_capable: u8,
    /// `CU_MEM_CREATE_USAGE_*`.
    pub usage: u16,
    /// Zero.
    pub reserved: [u8; 4],
}

impl CUmemAllocFlags {
    /// Whether no flag is set.
    pub fn is_plain(&self) -> bool {
        (self.compression_type, self.gpu_direct_rdma_capable, self.usage) == (0, 0, 0)
    }
}

/// `CUDA_ARRAY_DESCRIPTOR`: a two-dimensional array.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CUDA_ARRAY_DESCRIPTOR {
    /// Elements in a row.
    pub width: usize,
    /// Rows; 0 in an array of one dimension.
    pub height: usize,
    /// `CUarray_format`.
    pub format: u32,
    /// Channels of an element.
    pub channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`: an array of up to three dimensions.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CUDA_ARRAY3D_DESCRIPTOR {
    /// Elements in a row.
    pub width: usize,
    /// Rows; 0 in an array of one dimension.
    pub height: usize,
    /// Slices or layers; 0 in an array of two dimensions.
    pub depth: usize,
    /// `CUarray_format`.
    pub format: u32,
    /// Channels of an element.
    pub channels: u32,
    /// `CUDA_ARRAY3D_*`.
    pub flags: u32,
}

impl CUmemAllocationProp {
    /// Plain memory at `location`.
    pub const fn pinned(location: CUmemLocation) -> CUmemAllocationProp {
        CUmemAllocationProp {
            kind: CU_MEM_ALLOCATION_TYPE_PINNED,
            requested_handle_types: 0,
            location,
            win32_handle_meta_data: 0,
            alloc_flags: CUmemAllocFlags {
                compression_type: 0,
                gpu_direct_rdma_capable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        }
    }
}

/// `CUmemPoolProps`: what `cuMemPoolCreate` should make.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CUmemPoolProps {
    /// [`CU_MEM_ALLOCATION_TYPE_PINNED`] or managed.
    pub kind: u32,
    /// How its memory may be exported to other processes; 0: not at all.
    pub handle_types: u32,
    /// Where it should be.
    pub location: CUmemLocation,
    /// Windows only.
    pub win32_security_attributes: *mut c_void,
    /// The most that it may take; 0: no limit.
    pub max_size: usize,
    /// `CU_MEM_POOL_CREATE_USAGE_*`.
    pub usage: u16,
    /// Zero.
    pub reserved: [u8; 54],
}

/// A property of a pool (`CUmemPool_attribute`).
pub type CUmemPool_attribute = u32;
/// Whether freed memory may be reused in another stream that an event orders after the free.
pub const CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES: CUmemPool_attribute = 1;
/// Whether freed memory may be reused in another stream once the freeing stream has reached the free.
pub const CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC: CUmemPool_attribute = 2;
/// Whether the driver may make a stream wait for another, to reuse its memory.
pub const CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES: CUmemPool_attribute = 3;
/// How much unused memory the pool may keep, in bytes.
pub const CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: CUmemPool_attribute = 4;
/// Memory that the pool holds, in bytes.
pub const CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: CUmemPool_attribute = 5;
/// The most that it has held since this was last reset, in bytes.
pub const CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: CUmemPool_attribute = 6;
/// Memory that is allocated from it, in bytes.
pub const CU_MEMPOOL_ATTR_USED_MEM_CURRENT: CUmemPool_attribute = 7;
/// The most that was allocated from it since this was last reset, in bytes.
pub const CU_MEMPOOL_ATTR_USED_MEM_HIGH: CUmemPool_attribute = 8;

/// `CUipcMemHandle`: identifies memory to other processes. C passes it by value, on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CUipcMemHandle {
    /// Opaque bytes.
    pub reserved: [u8; 64],
}

/// `cuIpcOpenMemHandle`: access between GPUs is enabled where it is needed. The only flag, and a required one.
pub const CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: u32 = 1;

/// No access.
pub const CU_MEM_ACCESS_FLAGS_PROT_NONE: u32 = 0;
/// Reading.
pub const CU_MEM_ACCESS_FLAGS_PROT_READ: u32 = 1;
/// Reading and writing.
pub const CU_MEM_ACCESS_FLAGS_PROT_READWRITE: u32 = 3;

/// `CUmemAccessDesc`: who may do what with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CUmemAccessDesc {
    /// The GPU that may.
    pub location: CUmemLocation,
    /// One of `CU_MEM_ACCESS_FLAGS_PROT_*`.
    pub flags: u32,
}

impl CUmemAccessDesc {
    /// A GPU may read and write.
    pub const fn read_write(device: CUdevice) -> CUmemAccessDesc {
        CUmemAccessDesc { location: CUmemLocation::device(device), flags: CU_MEM_ACCESS_FLAGS_PROT_READWRITE }
    }
}

/// `cuMemGetAllocationGranularity`: the least there is.
pub const CU_MEM_ALLOC_GRANULARITY_MINIMUM: u32 = 0;
/// `cuMemGetAllocationGranularity`: what performs best.
pub const CU_MEM_ALLOC_GRANULARITY_RECOMMENDED: u32 = 1;

/// A stream that waits for the default stream and is waited for by it.
pub const CU_STREAM_DEFAULT: u32 = 0;
/// A stream that neither waits for the default stream nor is waited for by it.
pub const CU_STREAM_NON_BLOCKING: u32 = 1;

/// An event with all its features.
pub const CU_EVENT_DEFAULT: u32 = 0;
/// Waiting for the event sleeps instead of spinning.
pub const CU_EVENT_BLOCKING_SYNC: u32 = 1;
/// The event takes no timestamps, which makes it cheaper.
pub const CU_EVENT_DISABLE_TIMING: u32 = 2;

/// Whether a stream is capturing a graph (`CUstreamCaptureStatus`).
pub type CUstreamCaptureStatus = u32;
/// It is not.
pub const CU_STREAM_CAPTURE_STATUS_NONE: CUstreamCaptureStatus = 0;
/// It is.
pub const CU_STREAM_CAPTURE_STATUS_ACTIVE: CUstreamCaptureStatus = 1;
/// It is, but the capture is invalid; the application has not ended it yet.
pub const CU_STREAM_CAPTURE_STATUS_INVALIDATED: CUstreamCaptureStatus = 2;

/// Which threads may not make unsafe calls while a stream captures (`CUstreamCaptureMode`).
pub type CUstreamCaptureMode = u32;
/// Unsafe calls are forbidden to all threads.
pub const CU_STREAM_CAPTURE_MODE_GLOBAL: CUstreamCaptureMode = 0;
/// Unsafe calls are forbidden to the thread that captures.
pub const CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: CUstreamCaptureMode = 1;
/// Nothing is forbidden.
pub const CU_STREAM_CAPTURE_MODE_RELAXED: CUstreamCaptureMode = 2;

/// `cuMemHostRegister`: pinned for all contexts.
pub const CU_MEMHOSTREGISTER_PORTABLE: u32 = 1;
/// `cuMemHostRegister`: mapped into the GPU's address space.
pub const CU_MEMHOSTREGISTER_DEVICEMAP: u32 = 2;
/// `cuMemHostRegister`: memory of a device.
pub const CU_MEMHOSTREGISTER_IOMEMORY: u32 = 4;
/// `cuMemHostRegister`: the GPU only reads it.
pub const CU_MEMHOSTREGISTER_READ_ONLY: u32 = 8;

/// `cuGetProcAddress`: the forms whose default stream is shared by all threads.
pub const CU_GET_PROC_ADDRESS_LEGACY_STREAM: u64 = 1 << 0;
/// `cuGetProcAddress`: the forms whose default stream is the thread's own.
pub const CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM: u64 = 1 << 1;

/// The result of a `cuGetProcAddress_v2` (`CUdriverProcAddressQueryResult`).
pub type CUdriverProcAddressQueryResult = u32;
/// Found.
pub const CU_GET_PROC_ADDRESS_SUCCESS: CUdriverProcAddressQueryResult = 0;
/// No such name.
pub const CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND: CUdriverProcAddressQueryResult = 1;
/// The name exists only in newer versions than the one asked for.
pub const CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT: CUdriverProcAddressQueryResult = 2;

/// A context's flag: synchronous memory operations return only when they are done.
pub const CU_CTX_SYNC_MEMOPS: u32 = 0x80;

/// An attribute of an address (`CUpointer_attribute`).
pub type CUpointer_attribute = u32;
/// The context that it was allocated in.
pub const CU_POINTER_ATTRIBUTE_CONTEXT: CUpointer_attribute = 1;
/// Host or device, as a `CU_MEMORYTYPE_*`.
pub const CU_POINTER_ATTRIBUTE_MEMORY_TYPE: CUpointer_attribute = 2;
/// The address at which the GPU sees it.
pub const CU_POINTER_ATTRIBUTE_DEVICE_POINTER: CUpointer_attribute = 3;
/// The address at which the host sees it.
pub const CU_POINTER_ATTRIBUTE_HOST_POINTER: CUpointer_attribute = 4;
/// Tokens for the kernel interface of GPUDirect RDMA.
pub const CU_POINTER_ATTRIBUTE_P2P_TOKENS: CUpointer_attribute = 5;
/// Whether synchronous copies are really synchronous.
pub const CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: CUpointer_attribute = 6;
/// A number of the allocation, unique in the process.
pub const CU_POINTER_ATTRIBUTE_BUFFER_ID: CUpointer_attribute = 7;
/// Whether it is Unified Memory.
pub const CU_POINTER_ATTRIBUTE_IS_MANAGED: CUpointer_attribute = 8;
/// The GPU that it was allocated on.
pub const CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: CUpointer_attribute = 9;
/// Whether `cuIpcGetMemHandle` takes it.
pub const CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: CUpointer_attribute = 10;
/// Where its allocation begins.
pub const CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: CUpointer_attribute = 11;
/// How large its allocation is.
pub const CU_POINTER_ATTRIBUTE_RANGE_SIZE: CUpointer_attribute = 12;
/// Whether it is mapped to memory now.
pub const CU_POINTER_ATTRIBUTE_MAPPED: CUpointer_attribute = 13;
/// How it may be exported.
pub const CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: CUpointer_attribute = 14;
/// Whether GPUDirect RDMA may reach it.
pub const CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE: CUpointer_attribute = 15;
/// What the current GPU may do with it.
pub const CU_POINTER_ATTRIBUTE_ACCESS_FLAGS: CUpointer_attribute = 16;
/// The memory pool that it came from.
pub const CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: CUpointer_attribute = 17;
/// How large the mapping is that it lies in.
pub const CU_POINTER_ATTRIBUTE_MAPPING_SIZE: CUpointer_attribute = 18;
/// Where the mapping begins that it lies in.
pub const CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: CUpointer_attribute = 19;
/// A number of the physical allocation, unique in the process.
pub const CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID: CUpointer_attribute = 20;

/// The value of [`CU_POINTER_ATTRIBUTE_MEMORY_TYPE`] for host memory.
pub const CU_MEMORYTYPE_HOST: u32 = 1;
/// The value of [`CU_POINTER_ATTRIBUTE_MEMORY_TYPE`] for GPU memory.
pub const CU_MEMORYTYPE_DEVICE: u32 = 2;

/// `cuDeviceGetAttribute`: whether the GPU has virtual memory management.
pub const CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: i32 = 102;
/// `cuDeviceGetAttribute`: the NUMA node nearest to the GPU, or -1.
pub const CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: i32 = 134;
/// `cuDeviceGetAttribute`: whether host memory can be mapped by virtual memory management.
pub const CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: i32 = 141;
/// `cuDeviceGetAttribute`: how many copy engines there are.
pub const CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: i32 = 40;
/// `cuDeviceGetAttribute`: the 9 of compute capability 9.0.
pub const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: i32 = 75;
/// `cuDeviceGetAttribute`: the 0 of compute capability 9.0.
pub const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: i32 = 76;
/// `cuLinkAddData`: PTX text.
pub const CU_JIT_INPUT_PTX: u32 = 1;
/// `cuDeviceGetAttribute`: how many multiprocessors there are.
pub const CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: i32 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{align_of, offset_of, size_of};

    #[test]
    fn structs_lie_in_memory_as_in_c() {
        assert_eq!((size_of::<CUuuid>(), align_of::<CUuuid>()), (16, 1));
        assert_eq!((size_of::<CUmemLocation>(), align_of::<CUmemLocation>()), (8, 4));
        assert_eq!(offset_of!(CUmemLocation, id), 4);
        assert_eq!((size_of::<CUmemAccessDesc>(), align_of::<CUmemAccessDesc>()), (12, 4));
        assert_eq!(offset_of!(CUmemAccessDesc, flags), 8);
        assert_eq!((size_of::<CUmemAllocationProp>(), align_of::<CUmemAllocationProp>()), (32, 8));
        assert_eq!(offset_of!(CUmemAllocationProp, requested_handle_types), 4);
        assert_eq!(offset_of!(CUmemAllocationProp, location), 8);
        assert_eq!(offset_of!(CUmemAllocationProp, win32_handle_meta_data), 16);
        assert_eq!(offset_of!(CUmemAllocationProp, alloc_flags), 24);
        assert_eq!((size_of::<CUipcMemHandle>(), align_of::<CUipcMemHandle>()), (64, 1));
        assert_eq!(size_of::<CUmemAllocFlags>(), 8);
        assert_eq!(offset_of!(CUmemAllocFlags, usage), 2);
        assert_eq!((size_of::<CUmemPoolProps>(), align_of::<CUmemPoolProps>()), (88, 8));
        assert_eq!(offset_of!(CUmemPoolProps, location), 8);
        assert_eq!(offset_of!(CUmemPoolProps, max_size), 24);
        assert_eq!(offset_of!(CUmemPoolProps, usage), 32);
    }

    #[test]
    fn handles_and_results_are_as_wide_as_in_c() {
        assert_eq!(size_of::<CuResult>(), 4);
        assert_eq!(size_of::<CUstream>(), size_of::<*mut c_void>());
        assert_eq!(size_of::<CUdeviceptr>(), 8);
        assert_eq!(size_of::<CUdevice>(), 4);
    }

    #[test]
    fn results_tell_their_names() {
        assert_eq!(CuResult::OUT_OF_MEMORY.to_string(), "CUDA_ERROR_OUT_OF_MEMORY (2)");
        assert_eq!(CuResult::SUCCESS.name(), "CUDA_SUCCESS");
        assert_eq!(CuResult(12345).to_string(), "an error unknown to nvshare (12345)");
        assert_eq!(CuResult::NOT_READY.ok(), Err(CuResult::NOT_READY));
    }

    #[test]
    fn a_uuid_is_written_as_nvidia_smi_does() {
        let uuid = CUuuid { bytes: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255] };
        assert_eq!(uuid.to_string(), "GPU-00010203-0405-0607-0809-0a0b0c0d0eff");
    }
}
