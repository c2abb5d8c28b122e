//! What the simulated GPU's NVML shows of memory that a process uses, through the library as programs load it.

use std::ffi::CStr;
use std::path::PathBuf;

use libloading::Library;
use simstate::{Config, Kind, Ledger, Segment, segment};

const MIB: u64 = 1 << 20;

fn library() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("libsimnvml.so")
}

/// Calls a function of NVML: `call!(library, "name", argument => type, ...)`.
macro_rules! call {
    ($library:expr, $name:literal $(, $arg:expr => $type:ty)* $(,)?) => {{
        // SAFETY: the types are those of `nvml.h`, and pointers are to locals that outlive the call.
        unsafe {
            let function = $library.get::<extern "C" fn($($type),*) -> u32>($name).unwrap();
            function($($arg),*)
        }
    }};
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Process {
    pid: u32,
    used: u64,
    instances: [u32; 2],
}

#[test]
fn memory_and_processes_are_those_of_the_segment() {
    let taken = tempfile::Builder::new().prefix("simtest-nvml-").tempfile_in("/dev/shm").unwrap();
    let name = taken.path().file_name().unwrap().to_str().unwrap().to_owned();
    drop(taken);
    // SAFETY: the only test of this file, and no other thread reads the environment now.
    unsafe {
        std::env::set_var("NVSHARE_SIM_NAME", &name);
        std::env::set_var("NVSHARE_SIM_MEMORY", "64MiB");
        std::env::set_var("NVSHARE_SIM_GPUS", "2");
    }
    // SAFETY: loading the library has no effects.
    let nvml = unsafe { Library::new(library()) }.unwrap();
    let mut count = 0u32;
    assert_eq!(call!(nvml, "nvmlDeviceGetCount_v2", &mut count => &mut u32), 1, "not initialised");
    assert_eq!(call!(nvml, "nvmlInit_v2"), 0);
    assert_eq!(call!(nvml, "nvmlDeviceGetCount_v2", &mut count => &mut u32), 0);
    assert_eq!(count, 2);

    let segment = Segment::attach(&Config::from_env().unwrap()).unwrap();
    let ledger = Ledger::open(&segment, 1).unwrap();
    ledger.take(Kind::Context, 2 * MIB).unwrap();
    ledger.take(Kind::Allocation, 30 * MIB).unwrap();
    assert!(ledger.take(Kind::Allocation, 33 * MIB).is_err());

    let (mut device, mut memory) = (0usize, [0u64; 3]);
    assert_eq!(call!(nvml, "nvmlDeviceGetHandleByIndex_v2", 2 => u32, &mut device => &mut usize), 2);
    assert_eq!(call!(nvml, "nvmlDeviceGetHandleByIndex_v2", 1 => u32, &mut device => &mut usize), 0);
    assert_eq!(call!(nvml, "nvmlDeviceGetMemoryInfo", device => usize, &mut memory => &mut [u64; 3]), 0);
    assert_eq!(memory, [64 * MIB, 32 * MIB, 32 * MIB]);

    let (mut room, mut process) = (0u32, Process::default());
    let list = |room: &mut u32, process: &mut Process| {
        call!(
            nvml, "nvmlDeviceGetComputeRunningProcesses_v3",
            device => usize, room => &mut u32, process => &mut Process,
        )
    };
    assert_eq!(list(&mut room, &mut process), 7, "no room");
    assert_eq!(room, 1);
    assert_eq!(list(&mut room, &mut process), 0);
    assert_eq!((process.pid, process.used), (std::process::id(), 32 * MIB));

    let mut uuid = [0 as std::ffi::c_char; 96];
    let uuid_ptr = uuid.as_mut_ptr();
    assert_eq!(
        call!(nvml, "nvmlDeviceGetUUID", device => usize, uuid_ptr => *mut std::ffi::c_char, 96 => u32),
        0
    );
    // SAFETY: NVML has just written a string there.
    let text = unsafe { CStr::from_ptr(uuid.as_ptr()) };
    assert_eq!(text.to_str().unwrap(), segment.uuid_text(1));
    let mut found = 0usize;
    let text = text.as_ptr();
    let code = call!(
        nvml, "nvmlDeviceGetHandleByUUID",
        text => *const std::ffi::c_char, &mut found => &mut usize,
    );
    assert_eq!((code, found), (0, device));

    drop(ledger);
    assert_eq!(call!(nvml, "nvmlDeviceGetMemoryInfo", device => usize, &mut memory => &mut [u64; 3]), 0);
    assert_eq!(memory, [64 * MIB, 64 * MIB, 0]);
    assert_eq!(call!(nvml, "nvmlShutdown"), 0);
    segment::unlink(&name).unwrap();
}
