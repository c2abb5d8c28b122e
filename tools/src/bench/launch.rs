//! What nvshare adds to a kernel launch while its gate is open.
//!
//! One process under nvshare launches an empty kernel through the driver's own `cuLaunchKernel` and through the hook,
//! a batch of one and a batch of the other in turn. A sample is the difference between two neighbouring batches, per
//! launch. Time is the thread's CPU time, so that other programs, or more threads than CPUs, are not measured.
//!
//! A second process is run under ptrace: between two marked system calls it launches a million times, and every
//! system call of any of its threads in between is counted.

use super::stats::Row;
use crate::cuda::{Gpu, Handle, LaunchKernel};
use crate::node::{self, Environment, Node, SimulatedGpu};
use crate::{Failure, crew};
use crate::{complain, say};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::Duration;

/// Options of `nvshare bench launch`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Use the machine's GPU instead of a simulated one
    #[arg(long)]
    gpu: bool,
    /// Pairs of batches of launches, one natively and one under nvshare, for each thread; 100 to 1000000
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pairs: u32,
}

/// What the process under nvshare is told.
#[derive(Debug, clap::Args)]
pub struct Measured {
    #[arg(long)]
    pairs: u32,
}

/// Launches in a batch: fewer than a real driver queues, and many enough for the clock.
const BATCH: u32 = 500;
/// Pairs of batches that are not counted.
const WARM_UP: u32 = 50;
const THREADS: u32 = 8;
/// Launches in the traced process.
const TRACED: u64 = 1_000_000;
/// After the first launches, before the counted ones.
const SETTLE: Duration = Duration::from_millis(500);
/// Makes a getppid of ours unlike any other program's: its first argument, which the kernel ignores.
const MARK: u64 = 0x006e_7673_6861_7265;

/// Measures.
///
/// # Errors
/// A part of nvshare is missing, or the GPU cannot be used.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    crew::clean_up_when_interrupted();
    let simulated = (!options.gpu).then(|| SimulatedGpu::new(&[("MEMORY", "64MiB".into())])).transpose()?;
    let gpu = simulated.as_ref().map(|gpu| gpu.environment(&[])).unwrap_or_default();
    let capacity = if options.gpu { vec![] } else { vec!["--capacity".into(), "64MiB".into()] };
    let node = Node::start(gpu, &capacity)?;
    let output = Command::new(node::program()?)
        .args(["internal", "launches", "--pairs", &options.pairs.to_string()])
        .envs(node.environment())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::with_status(1, error.to_string()))?;
    crew::interrupted()?;
    if !output.status.success() {
        return Err(Failure::with_status(1, format!("the measured process failed: {}", output.status)));
    }
    let mut rows: Vec<Row> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    match count_system_calls(node.environment()) {
        Ok(calls) => {
            let all = calls.values().sum::<u64>() as f64;
            rows.push(Row::single("launch_syscalls_per_million", "calls", TRACED, all));
            for ((thread, number), times) in calls {
                complain!("nvshare: system call {number} of the thread {thread:?}, {times} times");
            }
        }
        Err(why) => complain!("nvshare: system calls are not counted: {why}"),
    }
    Ok(rows)
}

/// The launches, in the process under nvshare.
///
/// # Errors
/// It is not under nvshare, or the GPU cannot be used.
pub fn measured(options: &Measured) -> Result<(), Failure> {
    let gpu = Gpu::open(0)?;
    let native = gpu.native_launch_function().ok_or_else(|| {
        Failure::usage("this process is not under nvshare: start it with `nvshare bench launch`")
    })?;
    let bench = Bench { function: gpu.kernels()?.null(), native, hook: gpu.launch_function(), gpu: &gpu };
    if std::ptr::fn_addr_eq(bench.native, bench.hook) {
        return Err(Failure::with_status(1, "the shim is loaded, and cuLaunchKernel is not hooked"));
    }
    let alone = bench.thread(options.pairs)?;
    let barrier = Barrier::new(THREADS as usize);
    let together: Vec<Samples> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    gpu.make_current()?;
                    barrier.wait();
                    bench.thread(options.pairs)
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join().expect("a measuring thread panicked"));
        joined.collect::<Result<_, Failure>>()
    })?;
    let added = |samples: &Samples| -> Vec<f64> {
        samples.hook.iter().zip(&samples.native).map(|(hook, native)| hook - native).collect()
    };
    let all: Vec<f64> = together.iter().flat_map(added).collect();
    let rows = [
        Row::of("launch_added_1_thread", "ns", added(&alone)),
        Row::of("launch_added_8_threads", "ns", all),
        Row::of("launch_native", "ns", alone.native),
        Row::of("launch_nvshare", "ns", alone.hook),
    ];
    rows.iter().for_each(|row| say!("{}", row.json()));
    Ok(())
}

/// ns a launch, batch by batch.
#[derive(Default)]
struct Samples {
    native: Vec<f64>,
    hook: Vec<f64>,
}

struct Bench<'a> {
    gpu: &'a Gpu,
    function: Handle,
    native: LaunchKernel,
    hook: LaunchKernel,
}

impl Bench<'_> {
    /// One thread's batches, on a stream of its own.
    fn thread(&self, pairs: u32) -> Result<Samples, Failure> {
        let stream = self.gpu.stream()?;
        let mut samples = Samples::default();
        for pair in 0..WARM_UP + pairs {
            // Neither of the two is always the first.
            let (native, hook) = if pair % 2 == 0 {
                let native = self.batch(self.native, stream)?;
                (native, self.batch(self.hook, stream)?)
            } else {
                let hook = self.batch(self.hook, stream)?;
                (self.batch(self.native, stream)?, hook)
            };
            if pair >= WARM_UP {
                samples.native.push(native);
                samples.hook.push(hook);
            }
        }
        Ok(samples)
    }

    /// CPU time per launch, ns. The stream is empty before and after.
    fn batch(&self, launch: LaunchKernel, stream: Handle) -> Result<f64, Failure> {
        let begin = cpu_time()?;
        let refused = launch_many(launch, self.function, stream, BATCH.into());
        let took = cpu_time()? - begin;
        if refused != 0 {
            return Err(Failure::with_status(1, format!("cuLaunchKernel said {refused}")));
        }
        self.gpu.synchronize(stream)?;
        Ok(took / f64::from(BATCH))
    }
}

/// Launches an empty kernel `count` times; any refusal is in the result.
fn launch_many(launch: LaunchKernel, function: Handle, stream: Handle, count: u64) -> i32 {
    let (no_arguments, no_options) = (std::ptr::null::<*const c_void>(), std::ptr::null());
    // SAFETY: a kernel without parameters, in a stream of the same context.
    let one = || unsafe { launch(function, 1, 1, 1, 32, 1, 1, 0, stream, no_arguments, no_options) };
    (0..count).fold(0, |refused, _| refused | one())
}

fn cpu_time() -> Result<f64, Failure> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(|time| time.num_nanoseconds() as f64)
        .map_err(|error| Failure::with_status(1, error.to_string()))
}

/// The launches between two marks, in the traced process.
///
/// # Errors
/// The GPU cannot be used.
pub fn traced() -> Result<(), Failure> {
    let gpu = Gpu::open(0)?;
    let (function, stream) = (gpu.kernels()?.null(), gpu.stream()?);
    let launch = gpu.launch_function();
    // On a real GPU a launch waits where many are queued, which is no doing of nvshare's.
    launch_many(launch, function, stream, 1_000);
    gpu.synchronize(stream)?;
    // The engine has opened the gate, and goes to sleep in its own time.
    std::thread::sleep(SETTLE);
    mark();
    let refused = launch_many(launch, function, stream, TRACED);
    mark();
    if refused != 0 {
        return Err(Failure::with_status(1, format!("cuLaunchKernel said {refused}")));
    }
    gpu.synchronize(stream)?;
    Ok(())
}

fn mark() {
    // SAFETY: getppid has no arguments; the kernel ignores what is in the registers, and the tracer reads it.
    unsafe { nix::libc::syscall(nix::libc::SYS_getppid, MARK) };
}

/// How often each system call was made, by thread name and number.
type Calls = BTreeMap<(String, u64), u64>;

/// System calls between the marks, in all threads of the traced process.
fn count_system_calls(environment: Environment) -> Result<Calls, String> {
    // A thread of its own: tracing belongs to a thread, and so does waiting for its children alone.
    std::thread::spawn(move || {
        let mut command = Command::new(node::program().map_err(|failure| failure.message)?);
        command.args(["internal", "traced-launches"]).envs(environment).stdin(Stdio::null());
        // SAFETY: ptrace(PTRACE_TRACEME) is a plain system call, allowed between fork and exec.
        unsafe { command.pre_exec(|| ptrace::traceme().map_err(std::io::Error::from)) };
        let child = command.spawn().map_err(|error| format!("ptrace: {error}"))?;
        trace(Pid::from_raw(child.id() as i32)).map_err(|error| format!("ptrace: {error}"))?
    })
    .join()
    .unwrap_or_else(|_| Err("the tracer panicked".into()))
}

/// Follows a child that has asked to be traced, to its end.
fn trace(child: Pid) -> nix::Result<Result<Calls, String>> {
    let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    waitpid(child, Some(ours))?;
    let options = ptrace::Options::PTRACE_O_TRACECLONE
        | ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(child, options)?;
    ptrace::syscall(child, None)?;
    let (mut calls, mut marks) = (Calls::new(), 0);
    loop {
        match waitpid(None, Some(ours))? {
            WaitStatus::PtraceSyscall(thread) => {
                if let Some(call) = entered(thread)? {
                    match call {
                        Entered::Mark => marks += 1,
                        Entered::Other(number) if marks == 1 => {
                            *calls.entry((name(thread), number)).or_default() += 1;
                        }
                        Entered::Other(_) => {}
                    }
                }
                go_on(thread, None)?;
            }
            WaitStatus::PtraceEvent(thread, ..) => go_on(thread, None)?,
            // A new thread begins with a stop of its own.
            WaitStatus::Stopped(thread, Signal::SIGSTOP | Signal::SIGTRAP) => go_on(thread, None)?,
            WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal))?,
            WaitStatus::Exited(pid, status) if pid == child => {
                return Ok(match (status, marks) {
                    (0, 2) => Ok(calls),
                    _ => Err(format!("the traced process failed: status {status}, {marks} marks")),
                });
            }
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                return Ok(Err(format!("the traced process was killed by {signal}")));
            }
            _ => {}
        }
    }
}

enum Entered {
    Mark,
    Other(u64),
}

fn name(thread: Pid) -> String {
    std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default().trim().to_owned()
}

/// What a stopped thread is about to call; `None` if it comes back from a call.
fn entered(thread: Pid) -> nix::Result<Option<Entered>> {
    let info = ptrace::syscall_info(thread)?;
    if info.op != nix::libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Ok(None);
    }
    // SAFETY: `op` says that the entry is what the kernel has written.
    let entry = unsafe { info.u.entry };
    let mark = entry.nr == nix::libc::SYS_getppid as u64 && entry.args[0] == MARK;
    Ok(Some(if mark { Entered::Mark } else { Entered::Other(entry.nr) }))
}

/// Lets a thread go on; it may be gone by now.
fn go_on(thread: Pid, signal: Option<Signal>) -> nix::Result<()> {
    match ptrace::syscall(thread, signal) {
        Err(nix::errno::Errno::ESRCH) => Ok(()),
        result => result,
    }
}
