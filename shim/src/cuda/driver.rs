//! The real driver: what the shim itself calls in `libcuda.so.1` ([`crate::cuda::library`]).
//!
//! The methods of [`Driver`] are calls that nvshare makes for itself. They do not pass the gate. They are
//! safe where the worst outcome is an error code: a handle comes from the application or from the driver, and an application
//! that passes a stale one fails in the same way without nvshare. Calls after which the driver reads or writes host memory
//! are `unsafe`.

use crate::cuda::abi::*;
use crate::cuda::library::{Library, library};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::OnceLock;

/// An address that no allocation ever has, to get the driver's answer about an unknown pointer.
pub const NOBODYS: CUdeviceptr = 64;

/// Why there is no driver to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverError {
    /// The dynamic linker did not find the library, or refused it.
    NotLoaded {
        /// The linker's message.
        reason: String,
    },
    /// The library lacks functions that nvshare needs.
    Incomplete {
        /// The missing symbols.
        missing: Vec<&'static str>,
    },
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DriverError::NotLoaded { reason } => write!(
                f,
                "the CUDA driver's library could not be loaded ({reason}). Is the NVIDIA driver installed, and its \
                 libcuda.so.1 where the dynamic linker looks (ldconfig, LD_LIBRARY_PATH)? In a container it is put there \
                 by the NVIDIA container runtime"
            ),
            DriverError::Incomplete { missing } => write!(
                f,
                "the CUDA driver's library has no {}. nvshare needs a driver of CUDA 11.0 or newer; libcuda.so.1 must \
                 not be the stub that comes with the toolkit",
                missing.join(", ")
            ),
        }
    }
}

impl std::error::Error for DriverError {}

/// The type of a required symbol's field, or of an optional one's.
macro_rules! field {
    (required $type:ty) => {
        $type
    };
    (optional $type:ty) => {
        Option<$type>
    };
}

/// The address of a symbol as a value of the field's type. A missing required symbol is added to `missing`, and its field
/// gets a placeholder that is never called, because then no [`Driver`] is made.
macro_rules! load {
    (required $name:ident $library:ident $missing:ident $type:ty) => {{
        let address = $library.symbol(c_name!($name)).unwrap_or_else(|| {
            $missing.push(stringify!($name));
            absent as *const c_void as usize
        });
        // SAFETY: the driver's function of this name has the signature that the table gives it, the one in cuda.h.
        unsafe { std::mem::transmute::<usize, $type>(address) }
    }};
    (optional $name:ident $library:ident $missing:ident $type:ty) => {
        $library.symbol(c_name!($name)).map(|address| {
            // SAFETY: as for the required ones.
            unsafe { std::mem::transmute::<usize, $type>(address) }
        })
    };
}

macro_rules! c_name {
    ($name:ident) => {
        const {
            match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("an identifier has no NUL"),
            }
        }
    };
}

/// The field as a function to call, or `None` if the driver lacks it.
macro_rules! callable {
    (required $self:ident $name:ident) => {
        Some($self.$name)
    };
    (optional $self:ident $name:ident) => {
        $self.$name
    };
}

extern "C" fn absent() -> CuResult {
    CuResult::NOT_FOUND
}

/// The table of the driver functions that the shim calls.
///
/// `symbol => method(arguments)` makes a method for a function with these arguments; with `-> T`, the function's first
/// argument is a pointer to its result. A function under `by_hand` has a method written below. Without a `required` function
/// there is no [`Driver`]; the method of an `optional` one answers CUDA_ERROR_NOT_FOUND if it is missing.
macro_rules! driver {
    ($(
        $need:ident {
            plain { $($(#[$pdoc:meta])* $plain:ident => $pmethod:ident($($parg:ident: $pty:ty),*);)* }
            out { $($(#[$odoc:meta])* $out:ident => $omethod:ident($($oarg:ident: $oty:ty),*) -> $result:ty;)* }
            by_hand { $($hand:ident($($hty:ty),*);)* }
        }
    )*) => {
        /// The driver's functions that nvshare calls for itself.
        #[allow(non_snake_case, dead_code)]
        pub struct Driver {$(
            $($plain: field!($need unsafe extern "C" fn($($pty),*) -> CuResult),)*
            $($out: field!($need unsafe extern "C" fn(*mut $result $(, $oty)*) -> CuResult),)*
            $($hand: field!($need unsafe extern "C" fn($($hty),*) -> CuResult),)*
        )*}

        #[allow(dead_code)]
        impl Driver {
            fn load(library: Library) -> Result<Driver, DriverError> {
                let mut missing: Vec<&'static str> = Vec::new();
                let driver = Driver {$(
                    $($plain: load!($need $plain library missing unsafe extern "C" fn($($pty),*) -> CuResult),)*
                    $($out: load!(
                        $need $out library missing unsafe extern "C" fn(*mut $result $(, $oty)*) -> CuResult
                    ),)*
                    $($hand: load!($need $hand library missing unsafe extern "C" fn($($hty),*) -> CuResult),)*
                )*};
                if missing.is_empty() { Ok(driver) } else { Err(DriverError::Incomplete { missing }) }
            }

            $(
                $(
                    $(#[$pdoc])*
                    pub fn $pmethod(&self $(, $parg: $pty)*) -> Result<(), CuResult> {
                        let call = callable!($need self $plain).ok_or(CuResult::NOT_FOUND)?;
                        // SAFETY: the arguments are numbers and handles (see the module's head).
                        unsafe { call($($parg),*) }.ok()
                    }
                )*
                $(
                    $(#[$odoc])*
                    pub fn $omethod(&self $(, $oarg: $oty)*) -> Result<$result, CuResult> {
                        let call = callable!($need self $out).ok_or(CuResult::NOT_FOUND)?;
                        let mut result = <$result>::default();
                        // SAFETY: the result has room for what the driver writes; the other arguments are numbers and
                        // handles (see the module's head).
                        unsafe { call(&mut result $(, $oarg)*) }.ok()?;
                        Ok(result)
                    }
                )*
            )*
        }
    };
}

driver! {
    required {
        plain {
            /// Initialises the driver; has no effect if it is initialised.
            cuInit => init(flags: u32);
            /// Makes a context current to the calling thread.
            cuCtxSetCurrent => ctx_set_current(ctx: CUcontext);
            /// Makes a context current to the calling thread until it is popped.
            cuCtxPushCurrent_v2 => ctx_push_current(ctx: CUcontext);
            /// Releases a retained primary context.
            cuDevicePrimaryCtxRelease_v2 => primary_ctx_release(device: CUdevice);
            /// Frees memory of [`Driver::mem_alloc`]; waits for the work that may use it.
            cuMemFree_v2 => mem_free(ptr: CUdeviceptr);
            /// Frees a reserved range of addresses.
            cuMemAddressFree => mem_address_free(ptr: CUdeviceptr, size: usize);
            /// Releases physical memory, which exists until it is unmapped everywhere.
            cuMemRelease => mem_release(handle: CUmemGenericAllocationHandle);
            /// Maps physical memory at an address. `offset` and `flags` must be 0.
            cuMemMap => mem_map(
                ptr: CUdeviceptr, size: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: u64
            );
            /// Unmaps the memory at an address.
            cuMemUnmap => mem_unmap(ptr: CUdeviceptr, size: usize);
            /// Copies within the GPU, in the order of a stream.
            cuMemcpyDtoDAsync_v2 => memcpy_dtod_async(to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: CUstream);
            /// Fills memory of the GPU with a byte, in the order of a stream.
            cuMemsetD8Async => memset_d8_async(ptr: CUdeviceptr, value: u8, size: usize, stream: CUstream);
            /// Destroys a stream; returns at once, and its work goes on.
            cuStreamDestroy_v2 => stream_destroy(stream: CUstream);
            /// Waits for all work of a stream.
            cuStreamSynchronize => stream_synchronize(stream: CUstream);
            /// `Ok` if a stream has no work left, CUDA_ERROR_NOT_READY if it has.
            cuStreamQuery => stream_query(stream: CUstream);
            /// Makes a stream wait for an event.
            cuStreamWaitEvent => stream_wait_event(stream: CUstream, event: CUevent, flags: u32);
            /// Records an event, which passes when the work submitted to a stream so far is done.
            cuEventRecord => event_record(event: CUevent, stream: CUstream);
            /// `Ok` if an event has passed, CUDA_ERROR_NOT_READY if not.
            cuEventQuery => event_query(event: CUevent);
            /// Waits for an event.
            cuEventSynchronize => event_synchronize(event: CUevent);
            /// Destroys an event.
            cuEventDestroy_v2 => event_destroy(event: CUevent);
        }
        out {
            /// The newest API version of the driver, as in 13000.
            cuDriverGetVersion => driver_version() -> i32;
            /// The GPU of an ordinal.
            cuDeviceGet => device(ordinal: i32) -> CUdevice;
            /// The GPU's time between two events with timestamps that have passed, ms.
            cuEventElapsedTime => event_elapsed_ms(from: CUevent, to: CUevent) -> f32;
            /// How many GPUs there are.
            cuDeviceGetCount => device_count() -> i32;
            /// How much memory a GPU has, bytes.
            cuDeviceTotalMem_v2 => device_total_mem(device: CUdevice) -> usize;
            /// An attribute of a GPU, `CU_DEVICE_ATTRIBUTE_*`.
            cuDeviceGetAttribute => device_attribute(attribute: i32, device: CUdevice) -> i32;
            /// The calling thread's context, or null.
            cuCtxGetCurrent => ctx_current() -> CUcontext;
            /// Undoes [`Driver::ctx_push_current`].
            cuCtxPopCurrent_v2 => ctx_pop_current() -> CUcontext;
            /// The GPU of the calling thread's context.
            cuCtxGetDevice => ctx_device() -> CUdevice;
            /// Retains the primary context of a GPU, and creates it if there is none.
            cuDevicePrimaryCtxRetain => primary_ctx_retain(device: CUdevice) -> CUcontext;
            /// Allocates memory outside virtual memory management.
            cuMemAlloc_v2 => mem_alloc(size: usize) -> CUdeviceptr;
            /// Reserves a range of addresses. `flags` must be 0.
            cuMemAddressReserve => mem_address_reserve(
                size: usize, alignment: usize, hint: CUdeviceptr, flags: u64
            ) -> CUdeviceptr;
            /// Creates a stream.
            cuStreamCreate => stream_create(flags: u32) -> CUstream;
            /// Creates a stream with a priority; lower numbers go first.
            cuStreamCreateWithPriority => stream_create_with_priority(flags: u32, priority: i32) -> CUstream;
            /// Creates an event with flags `CU_EVENT_*`.
            cuEventCreate => event_create(flags: u32) -> CUevent;
        }
        by_hand {
            cuMemGetInfo_v2(*mut usize, *mut usize);
            cuMemCreate(*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, u64);
            cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
            cuMemGetAllocationGranularity(*mut usize, *const CUmemAllocationProp, u32);
            cuMemHostRegister_v2(*mut c_void, usize, u32);
            cuMemHostUnregister(*mut c_void);
            cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
            cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
            cuStreamIsCapturing(CUstream, *mut CUstreamCaptureStatus);
            cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
            cuGetErrorName(CuResult, *mut *const c_char);
            cuPointerGetAttribute(*mut c_void, CUpointer_attribute, CUdeviceptr);
            cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
            cuDeviceGetPCIBusId(*mut c_char, i32, CUdevice);
        }
    }
    optional {
        plain {
            /// Unloads a module of the current context.
            cuModuleUnload => module_unload(module: CUmodule);
            /// Records an event, which passes when the work submitted so far to all streams of a green context is done.
            /// CUDA 12.4.
            cuGreenCtxRecordEvent => green_ctx_record_event(green: CUgreenCtx, event: CUevent);
            /// Loads a function, which otherwise its first launch would do. CUDA 12.4.
            cuFuncLoad => func_load(function: CUfunction);
            /// Sets the flags of the current context. CUDA 12.1.
            cuCtxSetFlags => ctx_set_flags(flags: u32);
        }
        out {
            /// The flags of the current context. CUDA 7.
            cuCtxGetFlags => ctx_flags() -> u32;
            /// The UUID of a GPU, or of the MIG slice if the process sees one. CUDA 11.4.
            cuDeviceGetUuid_v2 => device_uuid_v2(device: CUdevice) -> CUuuid;
            /// The UUID of a whole GPU.
            cuDeviceGetUuid => device_uuid_v1(device: CUdevice) -> CUuuid;
            /// The current pool for stream-ordered memory of a GPU. CUDA 11.2.
            cuDeviceGetMemPool => device_mem_pool(device: CUdevice) -> CUmemoryPool;
            /// The context handle of a green context. CUDA 12.4.
            cuCtxFromGreenCtx => ctx_from_green(green: CUgreenCtx) -> CUcontext;
            /// Another handle to the physical memory mapped at an address. CUDA 11.
            cuMemRetainAllocationHandle => mem_retain(address: CUdeviceptr) -> CUmemGenericAllocationHandle;
            /// The default pool for stream-ordered memory of a GPU. CUDA 11.2.
            cuDeviceGetDefaultMemPool => device_default_mem_pool(device: CUdevice) -> CUmemoryPool;
        }
        by_hand {
            cuModuleLoadData(*mut CUmodule, *const c_void);
            cuLinkCreate_v2(u32, *mut u32, *mut *mut c_void, *mut CUlinkState);
            cuLinkAddData_v2(CUlinkState, u32, *mut c_void, usize, *const c_char, u32, *mut u32, *mut *mut c_void);
            cuLinkComplete(CUlinkState, *mut *mut c_void, *mut usize);
            cuLinkDestroy(CUlinkState);
            cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
            cuLaunchKernel(
                CUfunction, u32, u32, u32, u32, u32, u32, u32, CUstream, *mut *mut c_void, *mut *mut c_void
            );
            cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, u32);
            cuMemExportToShareableHandle(*mut c_void, CUmemGenericAllocationHandle, u32, u64);
            cuMemImportFromShareableHandle(*mut CUmemGenericAllocationHandle, *mut c_void, u32);
            cuStreamGetCtx(CUstream, *mut CUcontext);
            cuStreamGetCtx_v2(CUstream, *mut CUcontext, *mut CUgreenCtx);
            cuDevicePrimaryCtxGetState(CUdevice, *mut u32, *mut i32);
            cuGetProcAddress(*const c_char, *mut *mut c_void, i32, u64);
            cuGetProcAddress_v2(*const c_char, *mut *mut c_void, i32, u64, *mut CUdriverProcAddressQueryResult);
        }
    }
}

#[allow(dead_code)]
impl Driver {
    /// The driver, loaded on first use. A failure is final: it is not tried again.
    pub fn get() -> Result<&'static Driver, DriverError> {
        static DRIVER: OnceLock<Result<Driver, DriverError>> = OnceLock::new();
        DRIVER
            .get_or_init(|| {
                Driver::load(library().ok_or_else(|| DriverError::NotLoaded { reason: linker_error() })?)
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The UUID of a GPU, or of the MIG slice if the process sees one.
    pub fn device_uuid(&self, device: CUdevice) -> Result<CUuuid, CuResult> {
        match self.device_uuid_v2(device) {
            Err(CuResult::NOT_FOUND) => self.device_uuid_v1(device),
            uuid => uuid,
        }
    }

    /// Free and total memory of the current context's GPU, bytes.
    pub fn mem_info(&self) -> Result<(usize, usize), CuResult> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both have room for what the driver writes.
        unsafe { (self.cuMemGetInfo_v2)(&mut free, &mut total) }.ok()?;
        Ok((free, total))
    }

    /// Creates physical memory.
    pub fn mem_create(
        &self,
        size: usize,
        prop: &CUmemAllocationProp,
    ) -> Result<CUmemGenericAllocationHandle, CuResult> {
        let mut handle = 0;
        // SAFETY: the handle has room for what the driver writes; the properties are only read during the call.
        unsafe { (self.cuMemCreate)(&mut handle, size, prop, 0) }.ok()?;
        Ok(handle)
    }

    /// A descriptor by which another process can map physical memory too. It keeps the memory alive.
    pub fn mem_export(&self, handle: CUmemGenericAllocationHandle) -> Result<OwnedFd, CuResult> {
        let call = self.cuMemExportToShareableHandle.ok_or(CuResult::NOT_FOUND)?;
        let mut fd: RawFd = -1;
        // SAFETY: for this type of handle the driver writes an int.
        unsafe { call((&raw mut fd).cast(), handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) }.ok()?;
        if fd < 0 {
            return Err(CuResult::OPERATING_SYSTEM);
        }
        // The driver does not set close-on-exec, and a program that inherits the descriptor would keep the memory.
        // SAFETY: a descriptor that the driver has just opened for us; it becomes ours.
        unsafe {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }

    /// The physical memory behind a descriptor, which may be closed afterwards.
    pub fn mem_import(&self, fd: BorrowedFd<'_>) -> Result<CUmemGenericAllocationHandle, CuResult> {
        let call = self.cuMemImportFromShareableHandle.ok_or(CuResult::NOT_FOUND)?;
        let mut handle = 0;
        let fd = fd.as_raw_fd() as usize as *mut c_void;
        // SAFETY: for this type of handle the pointer is the descriptor itself; the handle has room for what
        // the driver writes.
        unsafe { call(&mut handle, fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) }.ok()?;
        Ok(handle)
    }

    /// Whether physical memory of any origin is mapped at an address. False before CUDA 11.
    pub fn is_mapped(&self, address: CUdeviceptr) -> bool {
        let retained = self.mem_retain(address);
        retained.is_ok_and(|handle| self.mem_release(handle).is_ok())
    }

    /// Address and bytes of the application's mapping that contains an address. `None` if nothing is mapped there.
    pub fn mapping_around(&self, address: CUdeviceptr) -> Option<(CUdeviceptr, u64)> {
        if !self.is_mapped(address) {
            return None;
        }
        // SAFETY: cuda.h says that the base is an address and the size a size_t.
        let (base, size) = unsafe {
            (
                self.pointer_attribute(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address),
                self.pointer_attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address),
            )
        };
        Some((base.ok()?, size.ok()?))
    }

    /// Sets which GPUs may access mapped memory.
    pub fn mem_set_access(
        &self,
        ptr: CUdeviceptr,
        size: usize,
        access: &[CUmemAccessDesc],
    ) -> Result<(), CuResult> {
        // SAFETY: the slice is only read during the call.
        unsafe { (self.cuMemSetAccess)(ptr, size, access.as_ptr(), access.len()) }.ok()
    }

    /// The number of bytes of which physical memory must be a multiple, for `CU_MEM_ALLOC_GRANULARITY_*`.
    pub fn mem_granularity(&self, prop: &CUmemAllocationProp, which: u32) -> Result<usize, CuResult> {
        let mut granularity = 0;
        // SAFETY: the number has room for what the driver writes; the properties are only read during the call.
        unsafe { (self.cuMemGetAllocationGranularity)(&mut granularity, prop, which) }.ok()?;
        Ok(granularity)
    }

    /// Pins host memory, so that copies run at full speed and asynchronously.
    ///
    /// # Safety
    ///
    /// The memory must be mapped, and stay mapped until [`Driver::mem_host_unregister`].
    pub unsafe fn mem_host_register(&self, ptr: *mut u8, size: usize, flags: u32) -> Result<(), CuResult> {
        // SAFETY: what the caller promises.
        unsafe { (self.cuMemHostRegister_v2)(ptr.cast(), size, flags) }.ok()
    }

    /// Undoes [`Driver::mem_host_register`].
    pub fn mem_host_unregister(&self, ptr: *mut u8) -> Result<(), CuResult> {
        // SAFETY: the driver looks the address up among those that it has pinned, and never follows it.
        unsafe { (self.cuMemHostUnregister)(ptr.cast()) }.ok()
    }

    /// Copies from the host to the GPU, in the order of a stream.
    ///
    /// # Safety
    ///
    /// The host memory must stay readable and unchanged until the copy is done.
    pub unsafe fn memcpy_htod_async(
        &self,
        to: CUdeviceptr,
        from: *const u8,
        size: usize,
        stream: CUstream,
    ) -> Result<(), CuResult> {
        // SAFETY: what the caller promises.
        unsafe { (self.cuMemcpyHtoDAsync_v2)(to, from.cast(), size, stream) }.ok()
    }

    /// Copies from the GPU to the host, in the order of a stream.
    ///
    /// # Safety
    ///
    /// The host memory must stay writable, and nobody else may touch it, until the copy is done.
    pub unsafe fn memcpy_dtoh_async(
        &self,
        to: *mut u8,
        from: CUdeviceptr,
        size: usize,
        stream: CUstream,
    ) -> Result<(), CuResult> {
        // SAFETY: what the caller promises.
        unsafe { (self.cuMemcpyDtoHAsync_v2)(to.cast(), from, size, stream) }.ok()
    }

    /// Pinned host memory of the current context, whole pages, as the host sees it and as the GPU does. It begins as zeros.
    ///
    /// It does not come from cuMemHostAlloc, which reuses addresses: an application that frees memory of cuMemHostAlloc twice
    /// might free this.
    ///
    /// # Errors
    /// The driver's; CUDA_ERROR_OUT_OF_MEMORY if the host has none.
    pub fn mem_host_alloc(&self, size: usize) -> Result<(NonNull<c_void>, CUdeviceptr), CuResult> {
        let device_pointer = self.cuMemHostGetDevicePointer_v2.ok_or(CuResult::NOT_FOUND)?;
        let length = NonZeroUsize::new(size).ok_or(CuResult::INVALID_VALUE)?;
        let (read_write, private) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: a new mapping, wherever there is room.
        let host = unsafe { mmap_anonymous(None, length, read_write, private) }
            .map_err(|_| CuResult::OUT_OF_MEMORY)?;
        // Pinned pages must not be copied on write by a fork.
        // SAFETY: the mapping that was just made.
        let kept = unsafe { madvise(host, size, MmapAdvise::MADV_DONTFORK) };
        let pinned = kept.map_err(|_| CuResult::OUT_OF_MEMORY).and_then(|()| {
            // SAFETY: as above; it is unmapped after it was unregistered.
            unsafe { self.mem_host_register(host.as_ptr().cast(), size, CU_MEMHOSTREGISTER_DEVICEMAP) }
        });
        if let Err(error) = pinned {
            // SAFETY: nobody else knows of it.
            let _ = unsafe { munmap(host, size) };
            return Err(error);
        }
        let mut device = 0;
        // SAFETY: the address has room for what the driver writes, and the memory was just pinned.
        match unsafe { device_pointer(&mut device, host.as_ptr(), 0) }.ok() {
            Ok(()) => Ok((host, device)),
            Err(error) => {
                // SAFETY: nobody else knows of it.
                unsafe { self.mem_free_host(host, size) };
                Err(error)
            }
        }
    }

    /// Frees memory of [`Driver::mem_host_alloc`].
    ///
    /// # Safety
    ///
    /// Neither the host nor work of the GPU uses it any more.
    pub unsafe fn mem_free_host(&self, host: NonNull<c_void>, size: usize) {
        // Fails if the context was destroyed, which unregisters the memory too.
        let _ = self.mem_host_unregister(host.as_ptr().cast());
        // SAFETY: what the caller promises.
        let _ = unsafe { munmap(host, size) };
    }

    /// Loads code that was compiled for the GPU (a cubin) into the current context. Waits for all work of the context.
    pub fn module_load(&self, code: &[u8]) -> Result<CUmodule, CuResult> {
        let call = self.cuModuleLoadData.ok_or(CuResult::NOT_FOUND)?;
        let mut module = CUmodule::NULL;
        // SAFETY: the module has room for what the driver writes; the code says itself how long it is, and is only read during the call.
        unsafe { call(&mut module, code.as_ptr().cast()) }.ok()?;
        Ok(module)
    }

    /// Compiles PTX text for the GPU of the current context. Does not wait for the GPU.
    pub fn compile(&self, ptx: &CStr) -> Result<Vec<u8>, CuResult> {
        let (create, add) = (
            self.cuLinkCreate_v2.ok_or(CuResult::NOT_FOUND)?,
            self.cuLinkAddData_v2.ok_or(CuResult::NOT_FOUND)?,
        );
        let complete = self.cuLinkComplete.ok_or(CuResult::NOT_FOUND)?;
        let destroy = self.cuLinkDestroy.ok_or(CuResult::NOT_FOUND)?;
        let (none, no_values) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut linker = CUlinkState::NULL;
        // SAFETY: no options; there is room for what the driver writes.
        unsafe { create(0, none, no_values, &mut linker) }.ok()?;
        let (mut code, mut size) = (std::ptr::null_mut::<c_void>(), 0);
        let text = ptx.to_bytes_with_nul();
        // SAFETY: the linker is a valid one. The text ends in NUL, as PTX must, and the driver only reads it.
        let compiled = unsafe {
            add(
                linker,
                CU_JIT_INPUT_PTX,
                text.as_ptr().cast_mut().cast(),
                text.len(),
                c"nvshare".as_ptr(),
                0,
                none,
                no_values,
            )
        }
        .ok()
        // SAFETY: as above; there is room for what the driver writes.
        .and_then(|()| unsafe { complete(linker, &mut code, &mut size) }.ok())
        .and_then(|()| if code.is_null() { Err(CuResult::INVALID_IMAGE) } else { Ok(()) })
        // SAFETY: the driver has written so many bytes there, which stay until the linker is destroyed.
        .map(|()| unsafe { std::slice::from_raw_parts(code.cast::<u8>(), size) }.to_vec());
        // SAFETY: a valid linker, which nobody uses any more.
        let _ = unsafe { destroy(linker) };
        compiled
    }

    /// A kernel of a module.
    pub fn module_function(&self, module: CUmodule, name: &CStr) -> Result<CUfunction, CuResult> {
        let call = self.cuModuleGetFunction.ok_or(CuResult::NOT_FOUND)?;
        let mut function = CUfunction::NULL;
        // SAFETY: the function has room for what the driver writes; the name is only read during the call.
        unsafe { call(&mut function, module, name.as_ptr()) }.ok()?;
        Ok(function)
    }

    /// Runs a kernel whose parameters are 64-bit numbers, on a grid and blocks of one dimension, in the order of a
    /// stream.
    ///
    /// # Safety
    ///
    /// The kernel must have exactly these parameters, and the memory that it accesses must be mapped until it is done.
    pub unsafe fn launch<const N: usize>(
        &self,
        function: CUfunction,
        blocks: u32,
        threads: u32,
        stream: CUstream,
        mut parameters: [u64; N],
    ) -> Result<(), CuResult> {
        let call = self.cuLaunchKernel.ok_or(CuResult::NOT_FOUND)?;
        let mut places = parameters.each_mut().map(|parameter| (&raw mut *parameter).cast::<c_void>());
        let none = std::ptr::null_mut();
        // SAFETY: the driver copies the parameters before it returns; the rest is what the caller promises.
        unsafe { call(function, blocks, 1, 1, threads, 1, 1, 0, stream, places.as_mut_ptr(), none) }.ok()
    }

    /// Whether a stream is capturing a graph.
    pub fn stream_capture_status(&self, stream: CUstream) -> Result<CUstreamCaptureStatus, CuResult> {
        let mut status = CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the status has room for what the driver writes.
        unsafe { (self.cuStreamIsCapturing)(stream, &mut status) }.ok()?;
        Ok(status)
    }

    /// The context of a stream.
    pub fn stream_ctx(&self, stream: CUstream) -> Result<CUcontext, CuResult> {
        let call = self.cuStreamGetCtx.ok_or(CuResult::NOT_FOUND)?;
        let mut ctx = CUcontext::NULL;
        // SAFETY: the context has room for what the driver writes.
        unsafe { call(stream, &mut ctx) }.ok()?;
        Ok(ctx)
    }

    /// The contexts of a stream: for a stream of a green context, the primary context and the green one; else its context and
    /// null. CUDA 12.5.
    pub fn stream_contexts(&self, stream: CUstream) -> Result<(CUcontext, CUgreenCtx), CuResult> {
        let call = self.cuStreamGetCtx_v2.ok_or(CuResult::NOT_FOUND)?;
        let (mut ctx, mut green) = (CUcontext::NULL, CUgreenCtx::NULL);
        // SAFETY: both have room for what the driver writes.
        unsafe { call(stream, &mut ctx, &mut green) }.ok()?;
        Ok((ctx, green))
    }

    /// Whether a GPU has a primary context now.
    pub fn primary_ctx_is_active(&self, device: CUdevice) -> Result<bool, CuResult> {
        let call = self.cuDevicePrimaryCtxGetState.ok_or(CuResult::NOT_FOUND)?;
        let (mut flags, mut active) = (0, 0);
        // SAFETY: both have room for what the driver writes.
        unsafe { call(device, &mut flags, &mut active) }.ok()?;
        Ok(active != 0)
    }

    /// Sets the capture mode of the calling thread, and returns the previous one.
    pub fn exchange_capture_mode(&self, mode: CUstreamCaptureMode) -> Result<CUstreamCaptureMode, CuResult> {
        let mut mode = mode;
        // SAFETY: the mode is there to be read and to be written.
        unsafe { (self.cuThreadExchangeStreamCaptureMode)(&mut mode) }.ok()?;
        Ok(mode)
    }

    /// Whether an event has passed, or can never pass because its context is broken or gone. False if the driver refuses the
    /// query because of a capture.
    pub fn event_is_past(&self, event: CUevent) -> bool {
        // An event that is part of a graph never passes.
        let refuses = |result: CuResult| result.is_of_capture() && result != CuResult::CAPTURED_EVENT;
        !self.event_query(event).is_err_and(|result| result == CuResult::NOT_READY || refuses(result))
    }

    /// Runs `action` in the relaxed capture mode, in which captures of other threads forbid it nothing. The thread's mode, which
    /// belongs to the application, is restored afterwards, also after a panic.
    pub fn relaxed<T>(&self, action: impl FnOnce() -> T) -> T {
        let mode = self.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
        let _before = mode.map(|mode| CaptureMode { driver: self, mode });
        action()
    }

    /// The driver's name of a result, for codes that [`CuResult::name`] does not know.
    pub fn error_name(&self, result: CuResult) -> Option<&'static CStr> {
        let mut name = std::ptr::null();
        // SAFETY: the pointer has room for what the driver writes.
        unsafe { (self.cuGetErrorName)(result, &mut name) }.ok().ok()?;
        // SAFETY: the driver's names are constants of a library that is never closed.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
    }

    /// An attribute of an address.
    ///
    /// # Safety
    ///
    /// `T` must be the type that `cuda.h` gives the attribute.
    pub unsafe fn pointer_attribute<T: Default>(
        &self,
        attribute: CUpointer_attribute,
        ptr: CUdeviceptr,
    ) -> Result<T, CuResult> {
        let mut value = T::default();
        // SAFETY: the value is of the type that the driver writes, as the caller promises.
        unsafe { (self.cuPointerGetAttribute)((&raw mut value).cast(), attribute, ptr) }.ok()?;
        Ok(value)
    }

    /// Address and bytes of the driver's allocation that contains an address.
    pub fn address_range(&self, ptr: CUdeviceptr) -> Result<(CUdeviceptr, usize), CuResult> {
        let (mut base, mut size) = (0, 0);
        // SAFETY: both have room for what the driver writes.
        unsafe { (self.cuMemGetAddressRange_v2)(&mut base, &mut size, ptr) }.ok()?;
        Ok((base, size))
    }

    /// Checks that the current context is not broken: after work in it has failed (by an illegal access, for example), the driver
    /// answers nearly every call with that error. This queries an address, which is allowed during a capture.
    ///
    /// # Errors
    /// The context's error; INVALID_CONTEXT if none is current.
    pub fn ctx_intact(&self) -> Result<(), CuResult> {
        match self.address_range(NOBODYS) {
            Ok(_) | Err(CuResult::NOT_FOUND) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The PCI address of a GPU, as in `0000:17:00.0`.
    pub fn pci_bus_id(&self, device: CUdevice) -> Result<String, CuResult> {
        let mut id = [0u8; 32];
        // SAFETY: the driver writes at most as many bytes as it is told.
        unsafe { (self.cuDeviceGetPCIBusId)(id.as_mut_ptr().cast(), id.len() as i32, device) }.ok()?;
        let id = CStr::from_bytes_until_nul(&id).map_err(|_| CuResult::UNKNOWN)?;
        Ok(id.to_string_lossy().into_owned())
    }

    /// Asks the driver for an entry point by base name, as in `cuMemAlloc`, at an API version.
    pub fn proc_address(&self, symbol: &CStr, version: i32, flags: u64) -> Result<usize, CuResult> {
        let mut address = std::ptr::null_mut();
        match (self.cuGetProcAddress_v2, self.cuGetProcAddress) {
            // SAFETY: a C string, and room for what the driver writes; the status may be null.
            (Some(call), _) => unsafe {
                call(symbol.as_ptr(), &mut address, version, flags, std::ptr::null_mut())
            },
            // SAFETY: as above.
            (None, Some(call)) => unsafe { call(symbol.as_ptr(), &mut address, version, flags) },
            (None, None) => CuResult::NOT_FOUND,
        }
        .ok()?;
        if address.is_null() { Err(CuResult::NOT_FOUND) } else { Ok(address as usize) }
    }
}

/// Restores a thread's capture mode when dropped.
struct CaptureMode<'a> {
    driver: &'a Driver,
    mode: CUstreamCaptureMode,
}

impl Drop for CaptureMode<'_> {
    fn drop(&mut self) {
        let _ = self.driver.exchange_capture_mode(self.mode);
    }
}

/// The dynamic linker's message about its last failure in this thread.
fn linker_error() -> String {
    // SAFETY: no arguments.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: a C string that stays until this thread's next call of the dynamic linker.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let error = DriverError::NotLoaded { reason: "libcuda.so.1: no such file".to_owned() };
        assert!(
            error.to_string().contains("libcuda.so.1: no such file")
                && error.to_string().contains("ldconfig")
        );
        let error = DriverError::Incomplete { missing: vec!["cuMemMap", "cuMemCreate"] };
        assert!(error.to_string().contains("no cuMemMap, cuMemCreate"));
    }

    #[test]
    fn a_library_without_the_driver_in_it_is_refused_by_name() {
        // SAFETY: a C string; the C library is loaded anyway.
        let libc = unsafe { libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        let libc = Library(NonZeroUsize::new(libc as usize).unwrap());
        match Driver::load(libc) {
            Err(DriverError::Incomplete { missing }) => {
                assert!(missing.contains(&"cuMemMap") && !missing.contains(&"cuDeviceGetUuid_v2"));
            }
            _ => panic!("the C library is no CUDA driver"),
        }
    }
}
