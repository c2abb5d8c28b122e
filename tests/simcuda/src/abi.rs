//! The edge to C: error codes, pointers that callers pass, and the structs of `cuda.h`.
//!
//! A pointer argument arrives as an [`In`] or an [`Out`]. Nobody but a caller across the C ABI makes one, and that
//! caller promises what `cuda.h` asks for: the pointer is null or valid for its type. That promise is what the unsafe
//! blocks of this module lean on, and it leaves the entry points themselves free of unsafe code.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// A driver error (`CUresult` other than success).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error(pub i32);

/// What an entry point comes to.
pub type Result<T = ()> = std::result::Result<T, Error>;

#[allow(missing_docs)]
impl Error {
    pub const INVALID_VALUE: Error = Error(1);
    pub const OUT_OF_MEMORY: Error = Error(2);
    pub const NOT_INITIALIZED: Error = Error(3);
    pub const DEINITIALIZED: Error = Error(4);
    pub const INVALID_DEVICE: Error = Error(101);
    pub const INVALID_IMAGE: Error = Error(200);
    pub const NO_BINARY_FOR_GPU: Error = Error(209);
    pub const INVALID_CONTEXT: Error = Error(201);
    pub const UNSUPPORTED_LIMIT: Error = Error(215);
    pub const PEER_ACCESS_UNSUPPORTED: Error = Error(217);
    pub const FILE_NOT_FOUND: Error = Error(301);
    pub const OPERATING_SYSTEM: Error = Error(304);
    pub const INVALID_HANDLE: Error = Error(400);
    pub const ILLEGAL_STATE: Error = Error(401);
    pub const NOT_FOUND: Error = Error(500);
    pub const NOT_READY: Error = Error(600);
    pub const ILLEGAL_ADDRESS: Error = Error(700);
    pub const PEER_ACCESS_ALREADY_ENABLED: Error = Error(704);
    pub const PEER_ACCESS_NOT_ENABLED: Error = Error(705);
    pub const CONTEXT_IS_DESTROYED: Error = Error(709);
    pub const HOST_MEMORY_ALREADY_REGISTERED: Error = Error(712);
    pub const HOST_MEMORY_NOT_REGISTERED: Error = Error(713);
    pub const MISALIGNED_ADDRESS: Error = Error(716);
    pub const NOT_SUPPORTED: Error = Error(801);
    pub const STREAM_CAPTURE_UNSUPPORTED: Error = Error(900);
    pub const STREAM_CAPTURE_INVALIDATED: Error = Error(901);
    pub const STREAM_CAPTURE_MERGE: Error = Error(902);
    pub const STREAM_CAPTURE_UNMATCHED: Error = Error(903);
    pub const STREAM_CAPTURE_UNJOINED: Error = Error(904);
    pub const STREAM_CAPTURE_ISOLATION: Error = Error(905);
    pub const STREAM_CAPTURE_IMPLICIT: Error = Error(906);
    pub const CAPTURED_EVENT: Error = Error(907);
    pub const STREAM_CAPTURE_WRONG_THREAD: Error = Error(908);
    pub const GRAPH_EXEC_UPDATE_FAILURE: Error = Error(910);
    pub const INVALID_RESOURCE_TYPE: Error = Error(914);
    pub const STREAM_DETACHED: Error = Error(917);
}

/// An opaque handle; a number to us, a pointer to callers.
pub type Handle = usize;

/// A place for an answer.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// Fails if there is no place.
    pub fn required(self) -> Result {
        if self.is_null() { Err(Error::INVALID_VALUE) } else { Ok(()) }
    }

    /// Writes the answer, which the caller must want.
    pub fn set(self, value: T) -> Result {
        self.required()?;
        self.set_if_wanted(value);
        Ok(())
    }

    /// Writes the answer if there is a place for it.
    pub fn set_if_wanted(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, so the caller promises that a `T` may be written here. C callers may not align it.
            unsafe { self.0.write_unaligned(value) }
        }
    }

    /// Writes as many values as there is room for.
    pub fn fill(self, values: impl Iterator<Item = T>, room: usize) {
        if self.0.is_null() {
            return;
        }
        for (i, value) in values.take(room).enumerate() {
            // SAFETY: the caller promises `room` places, and `i` is below that.
            unsafe { self.0.add(i).write_unaligned(value) }
        }
    }

    /// Reads what an in-out argument holds.
    pub fn get(self) -> Result<T>
    where
        T: Copy,
    {
        In(self.0).get()
    }
}

impl Out<c_void> {
    /// The same place, for an answer whose type depends on another argument.
    pub fn of<T>(self) -> Out<T> {
        Out(self.0.cast())
    }
}

/// A value or an array that the caller passes by address.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<T> {}

impl<T> In<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }
}

impl<T> In<T> {
    /// The same address, read as another type.
    pub fn cast<U>(self) -> In<U> {
        In(self.0.cast())
    }

    /// An address that the caller passed inside a buffer.
    pub fn from_address(address: usize) -> In<T> {
        In(address as *const T)
    }
}

impl<T: Copy> In<T> {
    pub fn get(self) -> Result<T> {
        self.at(0)
    }

    /// The element of that number of an array.
    pub fn at(self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: not null, so the caller promises a readable array that has this element.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }

    pub fn to_vec(self, len: usize) -> Result<Vec<T>> {
        (0..len).map(|i| self.at(i)).collect()
    }
}

/// A C string that the caller passes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    pub fn get(self) -> Result<String> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: not null, so the caller promises a string that ends in a zero byte.
        let text = unsafe { CStr::from_ptr(self.0) };
        Ok(text.to_string_lossy().into_owned())
    }
}

impl In<c_void> {
    /// A module's image: text, or the binary kinds, of which only ELF files are read to their end.
    pub fn image(self) -> Result<Vec<u8>> {
        let text = self.bytes_to_zero()?;
        if !text.starts_with(crate::module::ELF) {
            return Ok(text);
        }
        // An ELF header of 64 bytes says where the table of sections is, and each of its 64-byte rows where a section is.
        // SAFETY: the caller promises a module image, and one that begins so is an ELF file.
        let at = |offset: usize, length: usize| unsafe {
            std::slice::from_raw_parts(self.0.cast::<u8>().add(offset), length)
        };
        let number = |offset: usize, length: usize| {
            at(offset, length).iter().rev().fold(0_usize, |number, byte| number << 8 | usize::from(*byte))
        };
        let (table, rows) = (number(0x28, 8), number(0x3c, 2));
        const NO_BITS: usize = 8;
        let ends = (0..rows).map(|row| table + 64 * row).map(|row| {
            let length = if number(row + 4, 4) == NO_BITS { 0 } else { number(row + 0x20, 8) };
            number(row + 0x18, 8) + length
        });
        let end = ends.chain([table + 64 * rows]).max().unwrap_or(0);
        Ok(at(0, end).to_vec())
    }

    /// So many bytes, for text whose length is given.
    pub fn bytes(self, length: usize) -> Result<Vec<u8>> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: the caller promises so many bytes.
        Ok(unsafe { std::slice::from_raw_parts(self.0.cast(), length) }.to_vec())
    }

    /// The bytes before the first zero byte, for a module image that may be text.
    pub fn bytes_to_zero(self) -> Result<Vec<u8>> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: the caller promises a module image. Text ends in a zero byte, and the headers of the binary kinds
        // have one within their first bytes.
        Ok(unsafe { CStr::from_ptr(self.0.cast()) }.to_bytes().to_vec())
    }
}

/// Writes a C string into a buffer of `len` bytes, cut if need be.
pub fn set_text(buffer: Out<c_char>, len: c_int, text: &str) -> Result {
    buffer.required()?;
    let room = usize::try_from(len).ok().filter(|&len| len > 0).ok_or(Error::INVALID_VALUE)?;
    let cut = text.len().min(room - 1);
    buffer.fill(text.as_bytes()[..cut].iter().map(|&b| b as c_char).chain([0]), room);
    Ok(())
}

/// `CUhostFn`.
pub type HostFn = Option<unsafe extern "C" fn(*mut c_void)>;

/// `CUstreamCallback`.
pub type StreamCallback = Option<unsafe extern "C" fn(Handle, c_int, *mut c_void)>;

/// A pointer that is the application's and is only handed back to it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct UserData(*mut c_void);

// SAFETY: the driver never follows it; whoever asked for a call-back on another thread expects it there.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

/// Calls an application's host function.
pub fn call_host(function: HostFn, data: UserData) {
    if let Some(function) = function {
        // SAFETY: the application passed the function with this argument to be called so.
        unsafe { function(data.0) }
    }
}

/// Calls an application's stream call-back.
pub fn call_stream(function: StreamCallback, stream: Handle, status: c_int, data: UserData) {
    if let Some(function) = function {
        // SAFETY: the application passed the function with this argument to be called so.
        unsafe { function(stream, status, data.0) }
    }
}

pub const MEMORYTYPE_HOST: c_uint = 1;
pub const MEMORYTYPE_DEVICE: c_uint = 2;
pub const MEMORYTYPE_ARRAY: c_uint = 3;
pub const MEMORYTYPE_UNIFIED: c_uint = 4;

/// `CUmemLocation`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemLocation {
    pub kind: c_uint,
    pub id: c_int,
}

pub const LOCATION_DEVICE: c_uint = 1;
pub const LOCATION_HOST: c_uint = 2;
pub const LOCATION_HOST_NUMA: c_uint = 3;
pub const LOCATION_HOST_NUMA_CURRENT: c_uint = 4;

/// `CUipcMemHandle` and `CUipcEventHandle`: 64 bytes that mean something to the driver only.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IpcHandle([u8; 64]);

impl IpcHandle {
    pub fn new(words: [u64; 8]) -> IpcHandle {
        let mut bytes = [0; 64];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        IpcHandle(bytes)
    }

    pub fn words(&self) -> [u64; 8] {
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(self.0.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        words
    }
}

/// `CUmemAllocationProp`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemAllocationProp {
    pub kind: c_uint,
    pub handle_types: c_uint,
    pub location: MemLocation,
    pub win32: usize,
    pub flags: [u8; 8],
}

/// `CUmemAccessDesc`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemAccessDesc {
    pub location: MemLocation,
    pub flags: c_uint,
}

/// `CUmemPoolProps`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemPoolProps {
    pub kind: c_uint,
    pub handle_types: c_uint,
    pub location: MemLocation,
    pub win32: usize,
    pub max_size: usize,
    pub usage: u16,
    pub reserved: [u8; 54],
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemAllocNodeParams {
    pub pool: MemPoolProps,
    pub accesses: In<MemAccessDesc>,
    pub access_count: usize,
    pub bytes: usize,
    pub pointer: u64,
}

/// `CUDA_ARRAY_DESCRIPTOR_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ArrayDescriptor {
    pub width: usize,
    pub height: usize,
    pub format: c_uint,
    pub channels: c_uint,
}

/// `CUDA_ARRAY3D_DESCRIPTOR_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Array3DDescriptor {
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    pub format: c_uint,
    pub channels: c_uint,
    pub flags: c_uint,
}

/// `CUDA_ARRAY_MEMORY_REQUIREMENTS`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ArrayRequirements {
    pub size: usize,
    pub alignment: usize,
    pub reserved: [c_uint; 4],
}

/// `CUDA_RESOURCE_DESC`: the words are a handle, or an address and what is there.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ResourceDesc {
    pub kind: c_uint,
    pub words: [u64; 16],
    pub flags: c_uint,
}

/// `CUDA_MEMCPY2D_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Memcpy2D {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: c_uint,
    pub src_host: u64,
    pub src_device: u64,
    pub src_array: Handle,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: c_uint,
    pub dst_host: u64,
    pub dst_device: u64,
    pub dst_array: Handle,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// `CUDA_MEMCPY3D_v2`, and `CUDA_MEMCPY3D_PEER` too, which has contexts where this one has reserved words.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Memcpy3D {
    pub src_x: usize,
    pub src_y: usize,
    pub src_z: usize,
    pub src_lod: usize,
    pub src_type: c_uint,
    pub src_host: u64,
    pub src_device: u64,
    pub src_array: Handle,
    pub src_context: Handle,
    pub src_pitch: usize,
    pub src_height: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_z: usize,
    pub dst_lod: usize,
    pub dst_type: c_uint,
    pub dst_host: u64,
    pub dst_device: u64,
    pub dst_array: Handle,
    pub dst_context: Handle,
    pub dst_pitch: usize,
    pub dst_height: usize,
    pub width: usize,
    pub height: usize,
    pub depth: usize,
}

/// `CUlaunchConfig`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Handle,
    pub attributes: usize,
    pub attribute_count: c_uint,
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GraphInstantiateParams {
    pub flags: u64,
    pub upload_stream: Handle,
    pub error_node: Handle,
    pub result: c_uint,
}

/// `CUDA_KERNEL_NODE_PARAMS_v1`; the second version has a kernel and a context behind it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct KernelNodeParams {
    pub function: Handle,
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub parameters: In<In<u64>>,
    pub extra: In<usize>,
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct KernelNodeParamsV2 {
    pub common: KernelNodeParams,
    /// In the place of a function.
    pub kernel: Handle,
    pub context: Handle,
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemsetNodeParams {
    pub dst: u64,
    pub pitch: usize,
    pub value: c_uint,
    pub element: c_uint,
    pub width: usize,
    pub height: usize,
}

/// `CUDA_HOST_NODE_PARAMS`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct HostNodeParams {
    pub function: HostFn,
    pub data: UserData,
}

/// `CUgraphExecUpdateResultInfo`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GraphExecUpdateResultInfo {
    pub result: c_uint,
    pub error_node: Handle,
    pub error_from_node: Handle,
}

/// `CUdevResource`: what a green context is made of.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DevResource {
    pub kind: c_uint,
    padding: [u8; 92],
    /// Multiprocessors.
    pub multiprocessors: c_uint,
    rest: [u8; 44],
}

impl DevResource {
    pub fn of(kind: c_uint, multiprocessors: c_uint) -> DevResource {
        DevResource { kind, padding: [0; 92], multiprocessors, rest: [0; 44] }
    }
}

/// `CUgraphEdgeData`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct GraphEdgeData {
    pub from_port: u8,
    pub to_port: u8,
    pub kind: u8,
    pub reserved: [u8; 5],
}
