//! A small program against the simulated GPU's driver, loaded as programs load it, and the means to run scenarios in
//! processes of their own: a scenario starts this very test again with a machine of its own in the environment.

// Every test file uses its own part of it.
#![allow(dead_code)]

use std::ffi::{c_int, c_void};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use libloading::Library;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

pub const MIB: u64 = 1 << 20;
pub const PAGE: u64 = 2 * MIB;
pub const ILLEGAL_ADDRESS: i32 = 700;
pub const OUT_OF_MEMORY: i32 = 2;
pub const NOT_READY: i32 = 600;

const ROLE: &str = "SIM_TEST_ROLE";

/// What this process is to do: the scenario's role, or nothing for the test itself.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// A name that no segment has, also after a process with this pid was killed and left one.
fn segment_name() -> String {
    let taken = tempfile::Builder::new().prefix("simtest-").tempfile_in("/dev/shm").unwrap();
    taken.path().file_name().unwrap().to_str().unwrap().to_owned()
}

/// A simulated machine, gone when dropped.
pub struct Machine {
    name: String,
    vars: Vec<(&'static str, String)>,
}

impl Machine {
    pub fn new(vars: &[(&'static str, &str)]) -> Machine {
        let name = segment_name();
        Machine { name, vars: vars.iter().map(|(name, value)| (*name, value.to_string())).collect() }
    }

    /// Starts the test `test` of this file again in a role.
    pub fn start(&self, test: &str, role: &str) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env("NVSHARE_SIM_NAME", &self.name);
        command.envs(self.vars.iter().map(|(name, value)| (*name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// Runs the test `test` in a role to its end, which must be a good one.
    pub fn run(&self, test: &str, role: &str) {
        let output = self.start(test, role).wait_with_output().unwrap();
        assert!(output.status.success(), "{test} as {role}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(format!("/dev/shm/{}", self.name));
    }
}

/// Waits for a line that the child says.
pub fn said(child: &mut Child, wanted: &str) {
    let mut out = BufReader::new(child.stdout.as_mut().unwrap());
    let mut line = String::new();
    while out.read_line(&mut line).unwrap() > 0 {
        if line.trim_end().ends_with(wanted) {
            return;
        }
        line.clear();
    }
    panic!("the child ended without saying {wanted}");
}

/// Says a line and waits until the parent lets go of us, or forever.
pub fn say_and_wait(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

pub fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Runs `body` in a process of its own, on a machine with these settings.
pub fn alone(test: &str, vars: &[(&'static str, &str)], body: impl FnOnce()) {
    match role() {
        Some(_) => body(),
        None => Machine::new(vars).run(test, "alone"),
    }
}

/// Where the processes of a machine meet.
fn meeting_place() -> PathBuf {
    let machine = std::env::var("NVSHARE_SIM_NAME").unwrap();
    std::env::temp_dir().join(format!("{machine}.socket"))
}

/// Listens for the process that calls [`meet`], after saying that it may.
pub fn host_meeting() -> UnixStream {
    let path = meeting_place();
    let listener = UnixListener::bind(&path).unwrap();
    println!("come");
    std::io::stdout().flush().unwrap();
    let (stream, _) = listener.accept().unwrap();
    std::fs::remove_file(path).unwrap();
    stream
}

/// Connects to the process that said "come".
pub fn meet() -> UnixStream {
    UnixStream::connect(meeting_place()).unwrap()
}

/// Sends bytes and descriptors.
pub fn send(stream: &UnixStream, data: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(data)], rights, MsgFlags::empty(), None);
    assert_eq!(sent, Ok(data.len()));
}

/// Receives `len` bytes and what descriptors come with them.
pub fn receive(stream: &UnixStream, len: usize) -> (Vec<u8>, Vec<RawFd>) {
    let mut data = vec![0; len];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut data)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    assert_eq!(message.bytes, len, "the other side is gone");
    let rights = |message| match message {
        ControlMessageOwned::ScmRights(fds) => fds,
        other => panic!("{other:?}"),
    };
    let fds = message.cmsgs().unwrap().flat_map(rights).collect();
    (data, fds)
}

/// The built library, beside the directory of this test's executable.
pub fn library_path() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("libsimcuda.so")
}

/// The driver.
pub struct Cuda(Library);

/// Calls a function of the driver: `call!(cuda, "name", argument as type, ...)`.
macro_rules! call {
    ($cuda:expr, $name:literal $(, $arg:expr => $type:ty)* $(,)?) => {{
        // SAFETY: the types are those of `cuda.h`, and pointers are to locals that outlive the call.
        unsafe {
            let function = $cuda.symbol($name) as *const ();
            let function: extern "C" fn($($type),*) -> i32 = std::mem::transmute(function);
            function($($arg),*)
        }
    }};
}
pub(crate) use call;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location(pub u32, pub i32);

/// That GPU's memory.
pub fn on_gpu(device: i32) -> Location {
    Location(1, device)
}

pub const HOST: Location = Location(2, 0);
pub const HOST_NUMA: Location = Location(3, 0);

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Prop(pub u32, pub u32, pub Location, pub usize, pub [u8; 8]);

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Access(pub Location, pub u32);

/// `nvsharesim_counters`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub launches: u64,
    pub illegal_accesses: u64,
    pub out_of_memory: u64,
    pub vmm_creates: u64,
    pub um_faults: u64,
    pub um_evictions: u64,
}

impl Cuda {
    /// Loads and initialises the driver.
    pub fn load() -> Cuda {
        // SAFETY: loading the driver has no effects.
        let cuda = Cuda(unsafe { Library::new(library_path()) }.expect("libsimcuda.so"));
        assert_eq!(call!(cuda, "cuInit", 0 => u32), 0);
        cuda
    }

    /// With a context, too.
    pub fn with_context() -> Cuda {
        let cuda = Cuda::load();
        cuda.enter(0);
        cuda
    }

    /// Makes the primary context of a GPU current, and returns it.
    pub fn enter(&self, device: c_int) -> usize {
        let mut context = 0usize;
        assert_eq!(call!(self, "cuDevicePrimaryCtxRetain", &mut context => &mut usize, device => c_int), 0);
        assert_eq!(call!(self, "cuCtxSetCurrent", context => usize), 0);
        context
    }

    pub fn symbol(&self, name: &str) -> usize {
        // SAFETY: only the address is taken.
        match unsafe { self.0.get::<*const c_void>(name) } {
            Ok(symbol) => *symbol as usize,
            Err(_) => panic!("{name} is missing"),
        }
    }

    pub fn try_alloc(&self, bytes: u64) -> Result<u64, i32> {
        let mut pointer = 0u64;
        match call!(self, "cuMemAlloc_v2", &mut pointer => &mut u64, bytes => u64) {
            0 => Ok(pointer),
            error => Err(error),
        }
    }

    pub fn alloc(&self, bytes: u64) -> u64 {
        self.try_alloc(bytes).unwrap()
    }

    pub fn managed(&self, bytes: u64) -> u64 {
        let mut pointer = 0u64;
        assert_eq!(call!(self, "cuMemAllocManaged", &mut pointer => &mut u64, bytes => u64, 1 => u32), 0);
        pointer
    }

    pub fn free(&self, pointer: u64) {
        assert_eq!(call!(self, "cuMemFree_v2", pointer => u64), 0);
    }

    pub fn free_bytes(&self) -> u64 {
        let (mut free, mut total) = (0u64, 0u64);
        assert_eq!(call!(self, "cuMemGetInfo_v2", &mut free => &mut u64, &mut total => &mut u64), 0);
        free
    }

    pub fn stream(&self, flags: u32) -> usize {
        let mut stream = 0usize;
        assert_eq!(call!(self, "cuStreamCreate", &mut stream => &mut usize, flags => u32), 0);
        stream
    }

    pub fn sync(&self, stream: usize) -> i32 {
        call!(self, "cuStreamSynchronize", stream => usize)
    }

    pub fn function(&self, name: &str) -> usize {
        let ptx = concat!(include_str!("../../kernels.ptx"), "\0");
        let (mut module, mut function) = (0usize, 0usize);
        assert_eq!(call!(self, "cuModuleLoadData", &mut module => &mut usize, ptx.as_ptr() => *const u8), 0);
        let name = std::ffi::CString::new(name).unwrap();
        let code = call!(
            self, "cuModuleGetFunction",
            &mut function => &mut usize, module => usize, name.as_ptr() => *const std::ffi::c_char,
        );
        assert_eq!(code, 0);
        function
    }

    pub fn launch(&self, function: usize, stream: usize, arguments: &[u64]) -> i32 {
        let addresses: Vec<*const u64> = arguments.iter().map(|argument| argument as *const u64).collect();
        call!(
            self, "cuLaunchKernel",
            function => usize, 8 => u32, 1 => u32, 1 => u32, 128 => u32, 1 => u32, 1 => u32, 0 => u32,
            stream => usize, addresses.as_ptr() => *const *const u64, 0 => usize,
        )
    }

    pub fn read(&self, pointer: u64, words: usize) -> Vec<u64> {
        let mut data = vec![0u64; words];
        let bytes = words as u64 * 8;
        let code =
            call!(self, "cuMemcpyDtoH_v2", data.as_mut_ptr() => *mut u64, pointer => u64, bytes => u64);
        assert_eq!(code, 0);
        data
    }

    pub fn write(&self, pointer: u64, data: &[u64]) {
        let bytes = data.len() as u64 * 8;
        let code = call!(self, "cuMemcpyHtoD_v2", pointer => u64, data.as_ptr() => *const u64, bytes => u64);
        assert_eq!(code, 0);
    }

    pub fn reserve(&self, bytes: u64) -> u64 {
        let mut pointer = 0u64;
        let code = call!(
            self, "cuMemAddressReserve",
            &mut pointer => &mut u64, bytes => u64, 0 => u64, 0 => u64, 0 => u64,
        );
        assert_eq!(code, 0);
        pointer
    }

    pub fn try_create(&self, bytes: u64, on_host: bool) -> Result<usize, i32> {
        self.try_create_at(bytes, if on_host { HOST_NUMA } else { on_gpu(0) }, 0)
    }

    /// With the types of handles by which it can be exported.
    pub fn try_create_at(&self, bytes: u64, location: Location, types: u32) -> Result<usize, i32> {
        let (mut handle, prop) = (0usize, Prop(1, types, location, 0, [0; 8]));
        match call!(self, "cuMemCreate", &mut handle => &mut usize, bytes => u64, &prop => &Prop, 0 => u64) {
            0 => Ok(handle),
            error => Err(error),
        }
    }

    pub fn map(&self, pointer: u64, bytes: u64, handle: usize) -> i32 {
        call!(self, "cuMemMap", pointer => u64, bytes => u64, 0 => u64, handle => usize, 0 => u64)
    }

    pub fn set_access(&self, pointer: u64, bytes: u64) -> i32 {
        self.set_accesses(pointer, bytes, &[Access(on_gpu(0), 3)])
    }

    pub fn set_accesses(&self, pointer: u64, bytes: u64, accesses: &[Access]) -> i32 {
        let count = accesses.len() as u64;
        let first = accesses.as_ptr();
        call!(self, "cuMemSetAccess", pointer => u64, bytes => u64, first => *const Access, count => u64)
    }

    /// A free place with the handle's memory, open to GPU 0.
    pub fn show(&self, bytes: u64, handle: usize) -> u64 {
        let pointer = self.reserve(bytes);
        assert_eq!(self.map(pointer, bytes, handle), 0);
        assert_eq!(self.set_access(pointer, bytes), 0);
        pointer
    }

    pub fn unmap(&self, pointer: u64, bytes: u64) -> i32 {
        call!(self, "cuMemUnmap", pointer => u64, bytes => u64)
    }

    pub fn release(&self, handle: usize) -> i32 {
        call!(self, "cuMemRelease", handle => usize)
    }

    /// Creates, maps, opens and lets go of the handle.
    pub fn back(&self, pointer: u64, bytes: u64) {
        let handle = self.try_create(bytes, false).unwrap();
        assert_eq!(self.map(pointer, bytes, handle), 0);
        assert_eq!(self.set_access(pointer, bytes), 0);
        assert_eq!(self.release(handle), 0);
    }

    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        assert_eq!(call!(self, "nvsharesim_counters", 0 => u32, &mut counters => &mut Counters), 0);
        counters
    }
}

/// What `nvshare_iota_u64` writes.
pub fn iota(i: u64, seed: u64) -> u64 {
    seed.wrapping_add(i).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// What `nvshare_mix_u64` makes of a word.
pub fn mix(x: u64, seed: u64) -> u64 {
    x.rotate_left(13).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed)
}
