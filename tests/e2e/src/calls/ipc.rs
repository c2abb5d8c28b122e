//! Calls of CUDA IPC. A handle goes by its 64 bytes, as eight numbers.

use super::{Answer, Caller, Code, DevicePointer, driver};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ForkResult;
use nvshare_tools::Failure;
use std::ffi::c_uint;
use std::os::fd::AsFd;

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Handle([u64; 8]);

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn ipc(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        // SAFETY, for every call below: as in the module above.
        let answer = match (name, numbers) {
            ("ipc-get", [address]) => {
                let get = driver!(self, b"cuIpcGetMemHandle", fn(*mut Handle, DevicePointer));
                let mut handle = Handle([0; 8]);
                // SAFETY: as said.
                let code = unsafe { get(&mut handle, *address) };
                (code, handle.0.map(|word| word.to_string()).join(" "))
            }
            ("ipc-open" | "ipc-open-v1", [flags, words @ ..]) => {
                let open = match name {
                    "ipc-open" => {
                        driver!(self, b"cuIpcOpenMemHandle_v2", fn(*mut DevicePointer, Handle, c_uint))
                    }
                    _ => driver!(self, b"cuIpcOpenMemHandle", fn(*mut DevicePointer, Handle, c_uint)),
                };
                let words = words.try_into().map_err(|_| Failure::usage("a handle has eight words"))?;
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { open(&mut address, Handle(words), *flags as c_uint) };
                (code, address.to_string())
            }
            ("ipc-close", [address]) => {
                let close = driver!(self, b"cuIpcCloseMemHandle", fn(DevicePointer));
                // SAFETY: as said.
                let code: Code = unsafe { close(*address) };
                (code, String::new())
            }
            // A child that does nothing until nobody listens to this process's answers any more.
            ("fork", []) => {
                // SAFETY: the child makes system calls only.
                let forked = unsafe { nix::unistd::fork() };
                match forked.map_err(|error| Failure::with_status(1, error.to_string()))? {
                    ForkResult::Child => {
                        let stdout = std::io::stdout();
                        while poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::empty())], PollTimeout::NONE)
                            .is_err()
                        {}
                        // SAFETY: ends the process at once, and runs nothing of the parent's.
                        unsafe { nix::libc::_exit(0) }
                    }
                    ForkResult::Parent { child } => (0, child.to_string()),
                }
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
