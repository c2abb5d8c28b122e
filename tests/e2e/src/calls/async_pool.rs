//! Calls of streams, and of the memory that is allocated and freed in their order.
//!
//! Streams and pools go by the driver's handles: what made them answers with one. A stream can be held, so that a
//! test decides when its work is done: a host function in it waits to be let go.

use super::{Answer, Caller, Code, DevicePointer, Handle, driver};
use nvshare_tools::Failure;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Condvar, Mutex, PoisonError};

/// Whether held streams may go on.
static LET_GO: Mutex<bool> = Mutex::new(false);
static GOES_ON: Condvar = Condvar::new();

extern "C" fn hold(_: *mut c_void) {
    let held = LET_GO.lock().unwrap_or_else(PoisonError::into_inner);
    drop(GOES_ON.wait_while(held, |let_go| !*let_go));
}

fn let_go(value: bool) {
    *LET_GO.lock().unwrap_or_else(PoisonError::into_inner) = value;
    GOES_ON.notify_all();
}

/// `CUmemPoolProps` for a pool on the first GPU.
#[repr(C)]
struct PoolProps {
    kind: c_uint,
    handle_types: c_uint,
    location: [c_int; 2],
    win32: usize,
    max_size: usize,
    reserved: [u8; 56],
}

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn async_pool(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let nothing = |code: Code| (code, String::new());
        // SAFETY, for every call below: as in the module above.
        let answer = match (name, numbers) {
            ("stream", [flags]) => {
                let create = driver!(self, b"cuStreamCreate", fn(*mut Handle, c_uint));
                let mut stream = 0;
                // SAFETY: as said.
                let code = unsafe { create(&mut stream, *flags as c_uint) };
                (code, stream.to_string())
            }
            ("stream-with-priority", [flags]) => {
                let create = driver!(self, b"cuStreamCreateWithPriority", fn(*mut Handle, c_uint, c_int));
                let mut stream = 0;
                // SAFETY: as said.
                let code = unsafe { create(&mut stream, *flags as c_uint, 0) };
                (code, stream.to_string())
            }
            ("destroy-stream", [stream]) => {
                let destroy = driver!(self, b"cuStreamDestroy_v2", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { destroy(*stream as Handle) })
            }
            ("synchronize", [stream]) => {
                let synchronize = driver!(self, b"cuStreamSynchronize", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { synchronize(*stream as Handle) })
            }
            ("query", [stream]) => {
                let query = driver!(self, b"cuStreamQuery", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { query(*stream as Handle) })
            }
            ("hold", [stream]) => {
                let launch =
                    driver!(self, b"cuLaunchHostFunc", fn(Handle, extern "C" fn(*mut c_void), *mut c_void));
                let_go(false);
                // SAFETY: as said; the function needs no data.
                nothing(unsafe { launch(*stream as Handle, hold, std::ptr::null_mut()) })
            }
            ("let-go", []) => {
                let_go(true);
                nothing(0)
            }
            ("begin", [stream, mode]) => {
                let begin = driver!(self, b"cuStreamBeginCapture_v2", fn(Handle, c_uint));
                // SAFETY: as said.
                nothing(unsafe { begin(*stream as Handle, *mode as c_uint) })
            }
            ("end", [stream]) => {
                let end = driver!(self, b"cuStreamEndCapture", fn(Handle, *mut Handle));
                let mut graph = 0;
                // SAFETY: as said.
                let code = unsafe { end(*stream as Handle, &mut graph) };
                (code, graph.to_string())
            }
            ("alloc-async", [bytes, stream]) => {
                let alloc = driver!(self, b"cuMemAllocAsync", fn(*mut DevicePointer, usize, Handle));
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { alloc(&mut address, *bytes as usize, *stream as Handle) };
                (code, address.to_string())
            }
            ("alloc-per-thread", [bytes]) => {
                let alloc = driver!(self, b"cuMemAllocAsync_ptsz", fn(*mut DevicePointer, usize, Handle));
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { alloc(&mut address, *bytes as usize, 0) };
                (code, address.to_string())
            }
            ("alloc-from", [bytes, pool, stream]) => {
                let alloc =
                    driver!(self, b"cuMemAllocFromPoolAsync", fn(*mut DevicePointer, usize, Handle, Handle));
                let mut address = 0;
                // SAFETY: as said.
                let code =
                    unsafe { alloc(&mut address, *bytes as usize, *pool as Handle, *stream as Handle) };
                (code, address.to_string())
            }
            ("free-async", [address, stream]) => {
                let free = driver!(self, b"cuMemFreeAsync", fn(DevicePointer, Handle));
                // SAFETY: as said.
                nothing(unsafe { free(*address, *stream as Handle) })
            }
            ("free-per-thread", [address]) => {
                let free = driver!(self, b"cuMemFreeAsync_ptsz", fn(DevicePointer, Handle));
                // SAFETY: as said.
                nothing(unsafe { free(*address, 0) })
            }
            ("set", [address, bytes, value, stream]) => {
                let set = driver!(self, b"cuMemsetD8Async", fn(DevicePointer, u8, usize, Handle));
                // SAFETY: as said.
                nothing(unsafe { set(*address, *value as u8, *bytes as usize, *stream as Handle) })
            }
            ("holds", [address, bytes, value]) => {
                let copy = driver!(self, b"cuMemcpyDtoH_v2", fn(*mut c_void, DevicePointer, usize));
                let mut found = vec![0u8; *bytes as usize];
                // SAFETY: as said, and the buffer has these bytes.
                let code = unsafe { copy(found.as_mut_ptr().cast(), *address, found.len()) };
                let right = found.iter().all(|byte| *byte == *value as u8);
                (code, if right { "right" } else { "wrong" }.into())
            }
            ("default-pool" | "current-pool", []) => {
                let get = match name {
                    "default-pool" => driver!(self, b"cuDeviceGetDefaultMemPool", fn(*mut Handle, c_int)),
                    _ => driver!(self, b"cuDeviceGetMemPool", fn(*mut Handle, c_int)),
                };
                let mut pool = 0;
                // SAFETY: as said.
                let code = unsafe { get(&mut pool, 0) };
                (code, pool.to_string())
            }
            ("set-pool", [pool]) => {
                let set = driver!(self, b"cuDeviceSetMemPool", fn(c_int, Handle));
                // SAFETY: as said.
                nothing(unsafe { set(0, *pool as Handle) })
            }
            ("pool", [max_size, handle_types]) => {
                let create = driver!(self, b"cuMemPoolCreate", fn(*mut Handle, *const PoolProps));
                let props = PoolProps {
                    kind: 1,
                    handle_types: *handle_types as c_uint,
                    location: [1, 0],
                    win32: 0,
                    max_size: *max_size as usize,
                    reserved: [0; 56],
                };
                let mut pool = 0;
                // SAFETY: as said.
                let code = unsafe { create(&mut pool, &props) };
                (code, pool.to_string())
            }
            ("destroy-pool", [pool]) => {
                let destroy = driver!(self, b"cuMemPoolDestroy", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { destroy(*pool as Handle) })
            }
            ("trim", [pool, keep]) => {
                let trim = driver!(self, b"cuMemPoolTrimTo", fn(Handle, usize));
                // SAFETY: as said.
                nothing(unsafe { trim(*pool as Handle, *keep as usize) })
            }
            ("pool-get", [pool, attribute]) => {
                let get = driver!(self, b"cuMemPoolGetAttribute", fn(Handle, c_uint, *mut c_void));
                let mut value = 0u64;
                // SAFETY: as said; no attribute is larger.
                let code = unsafe { get(*pool as Handle, *attribute as c_uint, (&raw mut value).cast()) };
                (code, value.to_string())
            }
            ("pool-set", [pool, attribute, value]) => {
                let set = driver!(self, b"cuMemPoolSetAttribute", fn(Handle, c_uint, *mut c_void));
                let mut value = *value;
                // SAFETY: as said; no attribute is larger.
                nothing(unsafe { set(*pool as Handle, *attribute as c_uint, (&raw mut value).cast()) })
            }
            ("attribute", [address, attribute]) => {
                let get = driver!(self, b"cuPointerGetAttribute", fn(*mut c_void, c_uint, DevicePointer));
                let mut value = 0u64;
                // SAFETY: as said; no attribute that a test asks for is larger.
                let code = unsafe { get((&raw mut value).cast(), *attribute as c_uint, *address) };
                (code, value.to_string())
            }
            ("range", [address]) => {
                let range = driver!(
                    self,
                    b"cuMemGetAddressRange_v2",
                    fn(*mut DevicePointer, *mut usize, DevicePointer)
                );
                let (mut base, mut size) = (0, 0);
                // SAFETY: as said.
                let code = unsafe { range(&mut base, &mut size, *address) };
                (code, format!("{base} {size}"))
            }
            ("left", []) => {
                let info = driver!(self, b"cuMemGetInfo_v2", fn(*mut usize, *mut usize));
                let (mut free, mut total) = (0, 0);
                // SAFETY: as said.
                let code = unsafe { info(&mut free, &mut total) };
                (code, free.to_string())
            }
            // How often the simulated GPU was asked for physical memory.
            ("creates", []) => {
                let counters = driver!(self, b"nvsharesim_counters", fn(c_uint, *mut [u64; 8]));
                let mut counts = [0; 8];
                // SAFETY: it writes eight numbers.
                let code = unsafe { counters(0, &mut counts) };
                (code, counts[5].to_string())
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
