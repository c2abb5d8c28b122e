//! A program that makes the CUDA calls it is told to, right or wrong, one at a time.
//!
//! A line on the standard input is a call; a line on the standard output says what the driver returned: the
//! `CUresult`, and what else the call gave. Tests talk with it, so they know what has happened before they go on,
//! and see the code of every call. A call that fails is an answer and not the end: as in an application that handles
//! its errors.
//!
//! Contexts are numbered in the order in which they were made.

mod async_pool;
mod entry_points;
mod graphs;
mod host_limits;
mod ipc;
mod memory_info;
mod peer_access;
mod unmovable;
mod vmm;

use libloading::Library;
use nvshare_tools::Failure;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::io::{BufRead, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

/// `CUresult`.
type Code = c_int;
type Handle = usize;
type DevicePointer = u64;

/// What a call returned, and what it gave.
type Answer = (Code, String);

struct Caller {
    library: Arc<Library>,
    nvml: Option<Library>,
    contexts: Vec<Handle>,
    held: entry_points::Held,
    /// By context.
    kernels: HashMap<Handle, graphs::Kernels>,
    /// Where descriptors come in from other processes.
    mailbox: Option<UnixDatagram>,
}

/// The driver's function of that name, with the type that `cuda.h` gives it.
macro_rules! driver {
    ($caller:expr, $name:literal, fn($($argument:ty),*)) => {{
        // SAFETY: the types are those of cuda.h.
        let found = unsafe { $caller.library.get::<unsafe extern "C" fn($($argument),*) -> Code>($name) };
        *found.map_err(|error| Failure::with_status(1, error.to_string()))?
    }};
}
use driver;

impl Caller {
    fn call(&mut self, line: &str) -> Result<Answer, Failure> {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        let nothing = |code| Ok((code, String::new()));
        // SAFETY, for every call below: a place for each answer that lives until the call is over. Addresses of GPU
        // memory and handles may be wrong: to see what the driver says to that is what this program is for.
        match (name, &numbers[..]) {
            ("init", []) => {
                let init = driver!(self, b"cuInit", fn(c_uint));
                // SAFETY: as said.
                nothing(unsafe { init(0) })
            }
            ("create", devices @ ([] | [_])) => {
                let create = driver!(self, b"cuCtxCreate_v2", fn(*mut Handle, c_uint, c_int));
                let mut context = 0;
                let device = devices.first().copied().unwrap_or(0);
                // SAFETY: as said.
                let code = unsafe { create(&mut context, 0, device as c_int) };
                Ok(self.made(code, context))
            }
            ("retain", []) => {
                let retain = driver!(self, b"cuDevicePrimaryCtxRetain", fn(*mut Handle, c_int));
                let mut context = 0;
                // SAFETY: as said.
                let code = unsafe { retain(&mut context, 0) };
                Ok(self.made(code, context))
            }
            ("release", []) => {
                let release = driver!(self, b"cuDevicePrimaryCtxRelease_v2", fn(c_int));
                // SAFETY: as said.
                nothing(unsafe { release(0) })
            }
            ("reset", []) => {
                let reset = driver!(self, b"cuDevicePrimaryCtxReset_v2", fn(c_int));
                // SAFETY: as said.
                nothing(unsafe { reset(0) })
            }
            ("use", [context]) => {
                let set_current = driver!(self, b"cuCtxSetCurrent", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { set_current(self.context(*context)?) })
            }
            ("destroy", [context]) => {
                let destroy = driver!(self, b"cuCtxDestroy_v2", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { destroy(self.context(*context)?) })
            }
            ("alloc", [bytes]) => {
                let alloc = driver!(self, b"cuMemAlloc_v2", fn(*mut DevicePointer, usize));
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { alloc(&mut address, *bytes as usize) };
                Ok((code, address.to_string()))
            }
            ("pitch", [width, height, element]) => {
                let alloc = driver!(
                    self,
                    b"cuMemAllocPitch_v2",
                    fn(*mut DevicePointer, *mut usize, usize, usize, c_uint)
                );
                let (mut address, mut pitch) = (0, 0);
                // SAFETY: as said.
                let code = unsafe {
                    alloc(&mut address, &mut pitch, *width as usize, *height as usize, *element as c_uint)
                };
                Ok((code, address.to_string()))
            }
            ("free", [address]) => {
                let free = driver!(self, b"cuMemFree_v2", fn(DevicePointer));
                // SAFETY: as said.
                nothing(unsafe { free(*address) })
            }
            ("write", [address, bytes, seed]) => {
                let copy = driver!(self, b"cuMemcpyHtoD_v2", fn(DevicePointer, *const c_void, usize));
                let pattern = pattern(*bytes, *seed);
                // SAFETY: as said, and the pattern has these bytes.
                nothing(unsafe { copy(*address, pattern.as_ptr().cast(), pattern.len() * 8) })
            }
            ("check", [address, bytes, seed]) => {
                let copy = driver!(self, b"cuMemcpyDtoH_v2", fn(*mut c_void, DevicePointer, usize));
                let expected = pattern(*bytes, *seed);
                let mut found = vec![0u64; expected.len()];
                // SAFETY: as said, and the buffer has these bytes.
                let code = unsafe { copy(found.as_mut_ptr().cast(), *address, found.len() * 8) };
                Ok((code, if found == expected { "right" } else { "wrong" }.into()))
            }
            (name, numbers) => {
                let mut answer = self.async_pool(name, numbers)?;
                let others = [
                    Self::memory_info,
                    Self::graphs,
                    Self::entry_points,
                    Self::ipc,
                    Self::host_limits,
                    Self::vmm,
                    Self::peer_access,
                    Self::unmovable,
                ];
                for others in others {
                    answer = match answer {
                        None => others(self, name, numbers)?,
                        answer => answer,
                    };
                }
                answer.ok_or_else(|| Failure::usage(format!("'{line}' is no call that this program knows")))
            }
        }
    }

    fn made(&mut self, code: Code, context: Handle) -> Answer {
        if code == 0 {
            self.contexts.push(context);
        }
        (code, String::new())
    }

    fn context(&self, number: u64) -> Result<Handle, Failure> {
        self.contexts
            .get(number as usize)
            .copied()
            .ok_or_else(|| Failure::usage(format!("there is no context {number}")))
    }
}

/// Words that differ from each other, and from those of another seed.
fn pattern(bytes: u64, seed: u64) -> Vec<u64> {
    (0..bytes / 8).map(|word| (word ^ seed << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect()
}

/// Makes the calls that the standard input names, until it ends.
///
/// # Errors
/// There is no driver, or a line makes no sense.
pub fn run() -> Result<(), Failure> {
    // SAFETY: loading a CUDA driver runs its constructors, which is what every CUDA program does.
    let library = unsafe { Library::new("libcuda.so.1") }
        .map_err(|error| Failure::with_status(1, format!("the CUDA driver cannot be used: {error}")))?;
    let mut caller = Caller {
        library: Arc::new(library),
        nvml: None,
        contexts: Vec::new(),
        held: Default::default(),
        kernels: HashMap::new(),
        mailbox: None,
    };
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let (code, given) = caller.call(&line)?;
        // Nobody may be listening any more; then the input ends too.
        let _ = writeln!(std::io::stdout(), "{code} {given}");
    }
    Ok(())
}
