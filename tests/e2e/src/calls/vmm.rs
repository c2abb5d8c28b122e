//! Calls of memory that the application maps itself. Handles and addresses are the driver's: what made them answers
//! with one. Rights are `CUmemAccess_flags`: 0 for none, 1 to read, 3 to read and write.

use super::{Answer, Caller, Code, DevicePointer, driver};
use nix::sys::socket::MsgFlags;
use nvshare::scm_rights;
use nvshare_tools::Failure;
use std::ffi::{c_int, c_uint, c_void};
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Barrier;

/// `CUmemGenericAllocationHandle`.
type Object = u64;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Location {
    kind: c_uint,
    id: c_int,
}

impl Location {
    fn device(id: u64) -> Self {
        Self { kind: 1, id: id as c_int }
    }
}

/// `CUmemAllocationProp`.
#[repr(C)]
struct Prop {
    kind: c_uint,
    handle_types: c_uint,
    location: Location,
    win32: usize,
    flags: [u8; 8],
}

fn failed(error: impl Display) -> Failure {
    Failure::with_status(1, error.to_string())
}

/// The socket to which descriptors for a process are sent.
fn mailbox(pid: u64) -> Result<SocketAddr, Failure> {
    SocketAddr::from_abstract_name(format!("nvshare-test-calls-{pid}")).map_err(failed)
}

impl Prop {
    fn pinned(device: u64, handle_types: u64) -> Self {
        let location = Location::device(device);
        Self { kind: 1, handle_types: handle_types as c_uint, location, win32: 0, flags: [0; 8] }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
struct Access {
    location: Location,
    flags: c_uint,
}

const FILE_DESCRIPTOR: c_uint = 1;

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn vmm(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let nothing = |code: Code| (code, String::new());
        // SAFETY, for every call below: as in the module above.
        let answer = match (name, numbers) {
            ("object", [bytes, device, handle_types]) => {
                let create = driver!(self, b"cuMemCreate", fn(*mut Object, usize, *const Prop, u64));
                let mut object = 0;
                // SAFETY: as said.
                let code =
                    unsafe { create(&mut object, *bytes as usize, &Prop::pinned(*device, *handle_types), 0) };
                (code, object.to_string())
            }
            // So many threads at once; how many of them got one.
            ("race-objects", [threads, bytes, device]) => {
                let create = driver!(self, b"cuMemCreate", fn(*mut Object, usize, *const Prop, u64));
                let ready = Barrier::new(*threads as usize);
                let race = || {
                    let mut object = 0;
                    ready.wait();
                    // SAFETY: as said.
                    unsafe { create(&mut object, *bytes as usize, &Prop::pinned(*device, 0), 0) }
                };
                let codes: Vec<Code> = std::thread::scope(|scope| {
                    let racers: Vec<_> = (0..*threads).map(|_| scope.spawn(race)).collect();
                    racers.into_iter().map(|racer| racer.join().expect("it makes one call")).collect()
                });
                (0, codes.into_iter().filter(|code| *code == 0).count().to_string())
            }
            ("release-object", [object]) => {
                let release = driver!(self, b"cuMemRelease", fn(Object));
                // SAFETY: as said.
                nothing(unsafe { release(*object) })
            }
            ("retain-object", [address]) => {
                let retain = driver!(self, b"cuMemRetainAllocationHandle", fn(*mut Object, *mut c_void));
                let mut object = 0;
                // SAFETY: as said.
                let code = unsafe { retain(&mut object, *address as *mut c_void) };
                (code, object.to_string())
            }
            // Which GPU it is on, and by which handles it can be handed on.
            ("object-prop", [object]) => {
                let get = driver!(self, b"cuMemGetAllocationPropertiesFromHandle", fn(*mut Prop, Object));
                let mut prop = Prop::pinned(0, 0);
                // SAFETY: as said.
                let code = unsafe { get(&mut prop, *object) };
                (code, format!("{} {}", prop.location.id, prop.handle_types))
            }
            ("reserve", [bytes]) => {
                let reserve = driver!(
                    self,
                    b"cuMemAddressReserve",
                    fn(*mut DevicePointer, usize, usize, DevicePointer, u64)
                );
                let mut address = 0;
                // SAFETY: as said.
                let code = unsafe { reserve(&mut address, *bytes as usize, 0, 0, 0) };
                (code, address.to_string())
            }
            ("unreserve", [address, bytes]) => {
                let free = driver!(self, b"cuMemAddressFree", fn(DevicePointer, usize));
                // SAFETY: as said.
                nothing(unsafe { free(*address, *bytes as usize) })
            }
            ("map", [address, bytes, offset, object]) => {
                let map = driver!(self, b"cuMemMap", fn(DevicePointer, usize, usize, Object, u64));
                // SAFETY: as said.
                nothing(unsafe { map(*address, *bytes as usize, *offset as usize, *object, 0) })
            }
            ("unmap", [address, bytes]) => {
                let unmap = driver!(self, b"cuMemUnmap", fn(DevicePointer, usize));
                // SAFETY: as said.
                nothing(unsafe { unmap(*address, *bytes as usize) })
            }
            ("allow", [address, bytes, device, flags]) => {
                let set = driver!(self, b"cuMemSetAccess", fn(DevicePointer, usize, *const Access, usize));
                let access = Access { location: Location::device(*device), flags: *flags as c_uint };
                // SAFETY: as said.
                nothing(unsafe { set(*address, *bytes as usize, &access, 1) })
            }
            ("allowed", [address, device]) => {
                let get = driver!(self, b"cuMemGetAccess", fn(*mut u64, *const Location, DevicePointer));
                let mut flags = 0;
                // SAFETY: as said.
                let code = unsafe { get(&mut flags, &Location::device(*device), *address) };
                (code, flags.to_string())
            }
            // What the simulated GPU knows, whoever has mapped the memory.
            ("rights", [address, gpu]) => {
                let rights = driver!(self, b"nvsharesim_rights", fn(DevicePointer, c_uint, *mut u64));
                let mut flags = 0;
                // SAFETY: as said.
                let code = unsafe { rights(*address, *gpu as c_uint, &mut flags) };
                (code, flags.to_string())
            }
            ("export-object", [object]) => {
                let export =
                    driver!(self, b"cuMemExportToShareableHandle", fn(*mut c_int, Object, c_uint, u64));
                let mut descriptor = -1;
                // SAFETY: as said.
                let code = unsafe { export(&mut descriptor, *object, FILE_DESCRIPTOR, 0) };
                (code, descriptor.to_string())
            }
            // With no place for the descriptor, or flags that there are none of.
            ("export-object-wrongly", [object, flags]) => {
                let export =
                    driver!(self, b"cuMemExportToShareableHandle", fn(*mut c_int, Object, c_uint, u64));
                // SAFETY: as said.
                nothing(unsafe { export(std::ptr::null_mut(), *object, FILE_DESCRIPTOR, *flags) })
            }
            ("import-object", [descriptor]) => {
                let import = driver!(self, b"cuMemImportFromShareableHandle", fn(*mut Object, usize, c_uint));
                let mut object = 0;
                // SAFETY: as said; the descriptor travels in the place of a pointer.
                let code = unsafe { import(&mut object, *descriptor as usize, FILE_DESCRIPTOR) };
                (code, object.to_string())
            }
            // Descriptors are passed as applications do it: over a socket, which is named after the process that receives them.
            ("mailbox", []) => {
                let pid = std::process::id();
                if self.mailbox.is_none() {
                    self.mailbox = Some(UnixDatagram::bind_addr(&mailbox(pid.into())?).map_err(failed)?);
                }
                (0, pid.to_string())
            }
            ("post", [descriptor, pid]) => {
                let socket = UnixDatagram::unbound().map_err(failed)?;
                socket.connect_addr(&mailbox(*pid)?).map_err(failed)?;
                // SAFETY: the test says that it is a descriptor of this process, and this program closes none.
                let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor as RawFd) };
                scm_rights::send(socket.as_fd(), b"memory", &[descriptor]).map_err(failed)?;
                (0, String::new())
            }
            ("collect", []) => {
                let mailbox = self.mailbox.as_ref().ok_or_else(|| Failure::usage("there is no mailbox"))?;
                let (_, mut sent) =
                    scm_rights::receive(mailbox.as_fd(), 16, MsgFlags::empty()).map_err(failed)?;
                let descriptor = sent.pop().ok_or_else(|| Failure::usage("no descriptor came"))?;
                (0, descriptor.into_raw_fd().to_string())
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
