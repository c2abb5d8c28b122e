//! The CUDA driver, as far as the tools use it.
//!
//! It is loaded at run time, so that the tools start on machines without one, and its functions are looked up as any
//! program looks them up: under nvshare, these are the shim's hooks.
//!
//! **Why it is sound.** The function types are those of `cuda.h`. The driver writes only through pointers to locals
//! of the call, or into a [`Pinned`] buffer, whose length every copy checks. What a kernel does to device memory is the
//! driver's business: it cannot break this process. Kernels are launched through [`Kernels`], which passes as many
//! arguments as each of them takes.

use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr;

/// A driver call that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaError {
    /// There is no driver, or it lacks a function.
    Load(String),
    /// The driver refused.
    Call {
        /// The function.
        call: &'static str,
        /// `CUresult`.
        code: i32,
        /// Its name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
    },
}

impl std::fmt::Display for CudaError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Load(why) => write!(out, "the CUDA driver cannot be used: {why}"),
            Self::Call { call, code, name } => write!(out, "{call} said {name} ({code})"),
        }
    }
}

impl std::error::Error for CudaError {}

/// What calls come to.
pub type Result<T = ()> = std::result::Result<T, CudaError>;

/// An address in the GPU's memory.
pub type DevicePointer = u64;

/// A handle of the driver's: a pointer that nobody here follows.
pub type Handle = usize;

/// `cuLaunchKernel`.
pub type LaunchKernel = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *const *const c_void,
    *const *const c_void,
) -> c_int;

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> c_int,)* }

        impl Functions {
            fn find(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the types are those that cuda.h gives these names.
                Ok(unsafe { Self { $($field: *library.get($name)?,)* } })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    primary_retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, c_int);
    primary_release = "cuDevicePrimaryCtxRelease_v2": fn(c_int);
    set_current = "cuCtxSetCurrent": fn(Handle);
    mem_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    mem_alloc = "cuMemAlloc_v2": fn(*mut DevicePointer, usize);
    mem_alloc_managed = "cuMemAllocManaged": fn(*mut DevicePointer, usize, c_uint);
    mem_free = "cuMemFree_v2": fn(DevicePointer);
    host_alloc = "cuMemHostAlloc": fn(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost": fn(*mut c_void);
    copy_in = "cuMemcpyHtoDAsync_v2": fn(DevicePointer, *const c_void, usize, Handle);
    copy_out = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, DevicePointer, usize, Handle);
    copy_out_now = "cuMemcpyDtoH_v2": fn(*mut c_void, DevicePointer, usize);
    memset = "cuMemsetD8Async": fn(DevicePointer, u8, usize, Handle);
    module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    launch = "cuLaunchKernel": fn(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *const *const c_void,
        *const *const c_void
    );
    stream_create = "cuStreamCreate": fn(*mut Handle, c_uint);
    stream_synchronize = "cuStreamSynchronize": fn(Handle);
    begin_capture = "cuStreamBeginCapture_v2": fn(Handle, c_uint);
    end_capture = "cuStreamEndCapture": fn(Handle, *mut Handle);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Handle, Handle, u64);
    graph_launch = "cuGraphLaunch": fn(Handle, Handle);
    event_create = "cuEventCreate": fn(*mut Handle, c_uint);
    event_record = "cuEventRecord": fn(Handle, Handle);
    event_synchronize = "cuEventSynchronize": fn(Handle);
    error_name = "cuGetErrorName": fn(c_int, *mut *const c_char);
}

const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_BLOCKING_SYNC: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;
const ATTACH_GLOBAL: c_uint = 1;
const CAPTURE_RELAXED: c_uint = 2;

/// The driver with the primary context of a GPU, current in the thread that opened it.
pub struct Gpu {
    functions: Functions,
    library: Library,
    device: c_int,
    context: Handle,
}

impl Gpu {
    /// Loads the driver, as `libcuda.so.1`, and makes a context on a GPU.
    ///
    /// # Errors
    /// There is no driver, no such GPU, or no context to be had: under nvshare, because no arbiter answers.
    pub fn open(ordinal: i32) -> Result<Self> {
        Self::open_library(Path::new("libcuda.so.1"), ordinal)
    }

    fn open_library(library: &Path, ordinal: i32) -> Result<Self> {
        let failed = |error: libloading::Error| CudaError::Load(error.to_string());
        // SAFETY: loading a CUDA driver runs its constructors, which is what every CUDA program does.
        let library = unsafe { Library::new(library) }.map_err(failed)?;
        let functions = Functions::find(&library).map_err(failed)?;
        let mut gpu = Self { functions, library, device: 0, context: 0 };
        // SAFETY: cuInit takes a number.
        gpu.check("cuInit", unsafe { (gpu.functions.init)(0) })?;
        let (mut device, mut context) = (0, 0);
        // SAFETY: a place for the answer.
        gpu.check("cuDeviceGet", unsafe { (gpu.functions.device_get)(&mut device, ordinal) })?;
        gpu.device = device;
        // SAFETY: as above.
        let retained = unsafe { (gpu.functions.primary_retain)(&mut context, device) };
        gpu.check("cuDevicePrimaryCtxRetain", retained)?;
        gpu.context = context;
        gpu.make_current()?;
        Ok(gpu)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: a place for the answer, which is a string that lives as long as the driver.
        let name = unsafe {
            match (self.functions.error_name)(code, &mut name) {
                0 if !name.is_null() => CStr::from_ptr(name).to_string_lossy().into_owned(),
                _ => "an unknown error".into(),
            }
        };
        Err(CudaError::Call { call, code, name })
    }

    /// Makes the context current in the calling thread.
    ///
    /// # Errors
    /// The driver's.
    pub fn make_current(&self) -> Result {
        // SAFETY: the context lives as long as `self`.
        self.check("cuCtxSetCurrent", unsafe { (self.functions.set_current)(self.context) })
    }

    /// What the GPU is called.
    ///
    /// # Errors
    /// The driver's.
    pub fn name(&self) -> Result<String> {
        let mut text = [0; 128];
        // SAFETY: room for as many bytes as are announced, less the terminator.
        let code = unsafe { (self.functions.device_name)(text.as_mut_ptr(), 127, self.device) };
        self.check("cuDeviceGetName", code)?;
        // SAFETY: the last byte is zero, whatever the driver wrote.
        Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Free and total memory, as this process sees it.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for the answers.
        self.check("cuMemGetInfo", unsafe { (self.functions.mem_info)(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Allocates GPU memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn alloc(&self, bytes: u64) -> Result<DevicePointer> {
        let mut pointer = 0;
        // SAFETY: a place for the answer.
        let code = unsafe { (self.functions.mem_alloc)(&mut pointer, bytes as usize) };
        self.check("cuMemAlloc", code)?;
        Ok(pointer)
    }

    /// Allocates Unified Memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn alloc_managed(&self, bytes: u64) -> Result<DevicePointer> {
        let mut pointer = 0;
        // SAFETY: a place for the answer.
        let code = unsafe { (self.functions.mem_alloc_managed)(&mut pointer, bytes as usize, ATTACH_GLOBAL) };
        self.check("cuMemAllocManaged", code)?;
        Ok(pointer)
    }

    /// Frees either kind.
    ///
    /// # Errors
    /// The driver's: what was never allocated is one.
    pub fn free(&self, pointer: DevicePointer) -> Result {
        // SAFETY: the driver knows what it has given out.
        self.check("cuMemFree", unsafe { (self.functions.mem_free)(pointer) })
    }

    /// Allocates page-locked host memory, all zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned<'_>> {
        let mut address = ptr::null_mut();
        // SAFETY: a place for the answer.
        self.check("cuMemHostAlloc", unsafe { (self.functions.host_alloc)(&mut address, bytes, 0) })?;
        // SAFETY: the driver has just given out these bytes. Touched once, so that no copy pays for it.
        unsafe { address.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { gpu: self, address, bytes })
    }

    /// Copies a whole buffer to the GPU, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_in(&self, to: DevicePointer, from: &Pinned<'_>, stream: Handle) -> Result {
        // SAFETY: the buffer has these bytes, and its owner waits for the stream before it drops it (`Pinned`).
        let code = unsafe { (self.functions.copy_in)(to, from.address, from.bytes, stream) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    /// Fills a whole buffer from the GPU, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_out(&self, to: &mut Pinned<'_>, from: DevicePointer, stream: Handle) -> Result {
        // SAFETY: as above.
        let code = unsafe { (self.functions.copy_out)(to.address, from, to.bytes, stream) };
        self.check("cuMemcpyDtoHAsync", code)
    }

    /// Reads a word of GPU memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn read_word(&self, from: DevicePointer) -> Result<u64> {
        let mut word = 0u64;
        // SAFETY: eight bytes to write to; the call returns when they are written.
        let code = unsafe { (self.functions.copy_out_now)(ptr::from_mut(&mut word).cast(), from, 8) };
        self.check("cuMemcpyDtoH", code)?;
        Ok(word)
    }

    /// Sets GPU memory to zero, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear(&self, pointer: DevicePointer, bytes: u64, stream: Handle) -> Result {
        // SAFETY: device memory is the driver's business.
        self.check("cuMemsetD8Async", unsafe { (self.functions.memset)(pointer, 0, bytes as usize, stream) })
    }

    /// A stream that waits for no other.
    ///
    /// # Errors
    /// The driver's.
    pub fn stream(&self) -> Result<Handle> {
        let mut stream = 0;
        // SAFETY: a place for the answer.
        let code = unsafe { (self.functions.stream_create)(&mut stream, STREAM_NON_BLOCKING) };
        self.check("cuStreamCreate", code)?;
        Ok(stream)
    }

    /// Waits for all work of a stream.
    ///
    /// # Errors
    /// The driver's, that of the work included.
    pub fn synchronize(&self, stream: Handle) -> Result {
        // SAFETY: a handle of this driver's.
        self.check("cuStreamSynchronize", unsafe { (self.functions.stream_synchronize)(stream) })
    }

    /// An event that waits without burning a CPU.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self) -> Result<Handle> {
        let mut event = 0;
        // SAFETY: a place for the answer.
        let code =
            unsafe { (self.functions.event_create)(&mut event, EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING) };
        self.check("cuEventCreate", code)?;
        Ok(event)
    }

    /// Marks the end of a stream's work so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: Handle, stream: Handle) -> Result {
        // SAFETY: handles of this driver's.
        self.check("cuEventRecord", unsafe { (self.functions.event_record)(event, stream) })
    }

    /// Waits for what an event marks.
    ///
    /// # Errors
    /// The driver's, that of the work included.
    pub fn wait(&self, event: Handle) -> Result {
        // SAFETY: a handle of this driver's.
        self.check("cuEventSynchronize", unsafe { (self.functions.event_synchronize)(event) })
    }

    /// A graph of what `submit` submits to a stream, ready to be launched.
    ///
    /// # Errors
    /// The driver's, and those of `submit`.
    pub fn graph(&self, stream: Handle, submit: impl FnOnce() -> Result) -> Result<Handle> {
        let (mut graph, mut exec) = (0, 0);
        // SAFETY: a handle of this driver's.
        self.check("cuStreamBeginCapture", unsafe {
            (self.functions.begin_capture)(stream, CAPTURE_RELAXED)
        })?;
        submit()?;
        // SAFETY: a handle of this driver's, and places for the answers.
        self.check("cuStreamEndCapture", unsafe { (self.functions.end_capture)(stream, &mut graph) })?;
        // SAFETY: as above.
        let code = unsafe { (self.functions.graph_instantiate)(&mut exec, graph, 0) };
        self.check("cuGraphInstantiateWithFlags", code).map(|()| exec)
    }

    /// Launches a graph.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch_graph(&self, graph: Handle, stream: Handle) -> Result {
        // SAFETY: handles of this driver's.
        self.check("cuGraphLaunch", unsafe { (self.functions.graph_launch)(graph, stream) })
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// The driver's.
    pub fn kernels(&self) -> Result<Kernels<'_>> {
        let image = CString::new(KERNELS).expect("PTX is text without a zero");
        let mut module = 0;
        // SAFETY: a place for the answer, and an image that ends with a zero.
        let code = unsafe { (self.functions.module_load)(&mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", code)?;
        let function = |name: &CStr| {
            let mut function = 0;
            // SAFETY: a place for the answer, and a C string.
            let code = unsafe { (self.functions.module_function)(&mut function, module, name.as_ptr()) };
            self.check("cuModuleGetFunction", code).map(|()| function)
        };
        Ok(Kernels {
            gpu: self,
            null: function(c"nvshare_null")?,
            work: function(c"nvshare_work")?,
            iota: function(c"nvshare_iota_u64")?,
            mix: function(c"nvshare_mix_u64")?,
            checksum: function(c"nvshare_checksum_u64")?,
        })
    }

    /// `cuLaunchKernel` as this program finds it: under nvshare, the hook.
    pub fn launch_function(&self) -> LaunchKernel {
        self.functions.launch
    }

    /// `cuLaunchKernel` as the driver has it, under nvshare too. `None` without the shim.
    pub fn native_launch_function(&self) -> Option<LaunchKernel> {
        type RealAddress = unsafe extern "C" fn(*const c_char) -> *mut c_void;
        let process = libloading::os::unix::Library::this();
        // SAFETY: the shim exports the name with this type, and nobody else does.
        let found = unsafe { process.get::<RealAddress>(b"nvshare_real_address") }.ok()?;
        // SAFETY: a C string.
        let address = unsafe { found(c"cuLaunchKernel".as_ptr()) };
        // SAFETY: the driver's address of that name.
        (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, LaunchKernel>(address) })
    }

    /// Where the driver is, for messages.
    pub fn library(&self) -> &Library {
        &self.library
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.context != 0 {
            // SAFETY: retained once, released once.
            unsafe { (self.functions.primary_release)(self.device) };
        }
    }
}

/// Page-locked host memory. Its owner waits for the copies that use it before it lets go.
pub struct Pinned<'a> {
    gpu: &'a Gpu,
    address: *mut c_void,
    bytes: usize,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // SAFETY: allocated by this driver, freed once. The driver waits for copies that still use it.
        unsafe { (self.gpu.functions.host_free)(self.address) };
    }
}

/// The kernels' PTX, for real GPUs; the simulated one knows them by name.
pub const KERNELS: &str = include_str!("../../tests/simcuda/kernels.ptx");

/// The kernels, loaded into a context.
pub struct Kernels<'a> {
    gpu: &'a Gpu,
    null: Handle,
    work: Handle,
    iota: Handle,
    mix: Handle,
    checksum: Handle,
}

/// Blocks and threads of a launch. Every kernel walks its arrays with a stride of the whole grid.
const GRID: c_uint = 2_048;
const BLOCK: c_uint = 256;

impl Kernels<'_> {
    /// The kernel that does nothing, for who times launches.
    pub fn null(&self) -> Handle {
        self.null
    }

    fn launch<const N: usize>(&self, function: Handle, arguments: [u64; N], stream: Handle) -> Result {
        self.launch_grid((GRID, BLOCK), function, arguments, stream)
    }

    fn launch_grid<const N: usize>(
        &self,
        (grid, block): (c_uint, c_uint),
        function: Handle,
        arguments: [u64; N],
        stream: Handle,
    ) -> Result {
        let addresses = arguments.each_ref().map(|argument| ptr::from_ref(argument).cast::<c_void>());
        // SAFETY: as many arguments as the kernel has, each of 64 bits; the driver copies them before it returns.
        let code = unsafe {
            (self.gpu.functions.launch)(
                function,
                grid,
                1,
                1,
                block,
                1,
                1,
                0,
                stream,
                addresses.as_ptr(),
                ptr::null(),
            )
        };
        self.gpu.check("cuLaunchKernel", code)
    }

    /// So many multiply-adds in each thread of a block on some hundred processors: GPU time in proportion to them. `out` is a
    /// word of memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn work(&self, out: DevicePointer, iterations: u64, stream: Handle) -> Result {
        self.launch_grid((132, 128), self.work, [out, iterations], stream)
    }

    /// `pointer[i] = (seed + i) * GOLDEN`.
    ///
    /// # Errors
    /// The driver's.
    pub fn iota(&self, pointer: DevicePointer, words: u64, seed: u64, stream: Handle) -> Result {
        self.launch(self.iota, [pointer, words, seed], stream)
    }

    /// `pointer[i] = rotate_left(pointer[i], 13) * GOLDEN + seed`.
    ///
    /// # Errors
    /// The driver's.
    pub fn mix(&self, pointer: DevicePointer, words: u64, seed: u64, stream: Handle) -> Result {
        self.launch(self.mix, [pointer, words, seed], stream)
    }

    /// `out[0] += sum(pointer[i] * (2 i + 1))`; set `out[0]` to zero first.
    ///
    /// # Errors
    /// The driver's.
    pub fn checksum(&self, out: DevicePointer, pointer: DevicePointer, words: u64, stream: Handle) -> Result {
        self.launch(self.checksum, [out, pointer, words], stream)
    }
}
