//! Calls of what only the driver can place: arrays, managed memory and modules. Arrays have one row of bytes.

use super::{Answer, Caller, Code, DevicePointer, Handle, driver, pattern};
use nvshare_tools::Failure;
use nvshare_tools::cuda::KERNELS;
use std::ffi::{CString, c_int, c_uint, c_void};

/// `CUDA_ARRAY_DESCRIPTOR`.
#[repr(C)]
struct Descriptor {
    width: usize,
    height: usize,
    format: c_uint,
    channels: c_uint,
}

const BYTES: c_uint = 1;

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn unmovable(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let nothing = |code: Code| (code, String::new());
        // SAFETY, for every call below: as in the module above.
        let answer = match (name, numbers) {
            ("array", [bytes]) => {
                let create = driver!(self, b"cuArrayCreate_v2", fn(*mut Handle, *const Descriptor));
                let mut array = 0;
                let row = Descriptor { width: *bytes as usize, height: 0, format: BYTES, channels: 1 };
                // SAFETY: as said.
                let code = unsafe { create(&mut array, &row) };
                (code, array.to_string())
            }
            ("destroy-array", [array]) => {
                let destroy = driver!(self, b"cuArrayDestroy", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { destroy(*array as Handle) })
            }
            ("write-array", [array, bytes, seed]) => {
                let copy = driver!(self, b"cuMemcpyHtoA_v2", fn(Handle, usize, *const c_void, usize));
                let pattern = pattern(*bytes, *seed);
                // SAFETY: as said, and the pattern has these bytes.
                nothing(unsafe { copy(*array as Handle, 0, pattern.as_ptr().cast(), pattern.len() * 8) })
            }
            ("check-array", [array, bytes, seed]) => {
                let copy = driver!(self, b"cuMemcpyAtoH_v2", fn(*mut c_void, Handle, usize, usize));
                let expected = pattern(*bytes, *seed);
                let mut found = vec![0u64; expected.len()];
                // SAFETY: as said, and the buffer has these bytes.
                let code = unsafe { copy(found.as_mut_ptr().cast(), *array as Handle, 0, found.len() * 8) };
                (code, if found == expected { "right" } else { "wrong" }.into())
            }
            ("managed", [bytes]) => {
                const GLOBAL: c_uint = 1;
                let alloc = driver!(self, b"cuMemAllocManaged", fn(*mut DevicePointer, usize, c_uint));
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { alloc(&mut address, *bytes as usize, GLOBAL) };
                (code, address.to_string())
            }
            ("load", []) => {
                let load = driver!(
                    self,
                    b"cuModuleLoadDataEx",
                    fn(*mut Handle, *const c_void, c_uint, *const c_int, *const usize)
                );
                let image = CString::new(KERNELS).expect("PTX is text without a zero");
                let mut module = 0;
                // SAFETY: as said, and a text that ends in a zero byte.
                let code = unsafe {
                    load(&mut module, image.as_ptr().cast(), 0, std::ptr::null(), std::ptr::null())
                };
                (code, module.to_string())
            }
            ("unload", [module]) => {
                let unload = driver!(self, b"cuModuleUnload", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { unload(*module as Handle) })
            }
            // How often the simulated GPU had no memory to give.
            ("refused", []) => {
                let counters = driver!(self, b"nvsharesim_counters", fn(c_uint, *mut [u64; 8]));
                let mut counts = [0; 8];
                // SAFETY: it writes eight numbers.
                let code = unsafe { counters(0, &mut counts) };
                (code, counts[4].to_string())
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
