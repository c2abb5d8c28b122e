//! What a program without CUDA pays for being started under nvshare.

use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use nvshare_tools::node;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Of the dynamic loader's: it opens, reads, looks at, maps in five calls and closes the library, and protects a part.
const OF_A_LIBRARY: usize = 11;

/// System calls of `true`, from the start of the program to its end.
fn system_calls(preload: &OsStr) -> usize {
    let mut command = Command::new("true");
    command.env("LD_PRELOAD", preload).stdout(Stdio::null());
    // SAFETY: ptrace is allowed between fork and exec.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let mut child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    assert!(matches!(waitpid(pid, None), Ok(WaitStatus::Stopped(..))), "it stops when the program begins");
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
    // A call stops at its beginning and at its end.
    let mut stops = 0;
    loop {
        ptrace::syscall(pid, None).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => stops += 1,
            WaitStatus::Exited(_, 0) => break,
            other => panic!("{other:?}"),
        }
    }
    // Waited for already.
    let _ = child.wait();
    stops / 2
}

#[test]
fn a_program_without_cuda_starts_with_the_system_calls_that_load_one_library() {
    let natively = system_calls(OsStr::new(""));
    let preloaded = system_calls(node::shim().unwrap().as_os_str());
    println!("{natively} natively, {preloaded} under nvshare");
    assert!(preloaded <= natively + OF_A_LIBRARY, "{natively} natively, {preloaded} under nvshare");
}
