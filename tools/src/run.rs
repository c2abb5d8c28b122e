//! `nvshare run`: a program on the shared GPUs.

use crate::complain;
use crate::simulate::{self, Simulated};
use crate::{Failure, node, status};
use nix::sys::signal::{SigSet, Signal};
use nvshare::paths;
use nvshare::shares::Priority;
use nvshare::units::format_size;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Options of `nvshare run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nvshare run -- python3 train.py
  nvshare run --name notebook --priority high --memory-limit 25% -- jupyter lab

  # A large GPU stands in for a small one
  nvshare run --capacity 14.9GiB -- python3 train.py

  # At most 30% of the GPU's time
  nvshare run --compute-limit 30% -- python3 train.py

  # Three times the GPU time of a program with the usual weight
  nvshare run --weight 300 -- python3 train.py

  # On a simulated GPU: no hardware, no driver
  nvshare run --simulate --memory 512MiB -- ./program

Without an arbiter on this machine, a private one is started; it ends after the last program.

Simulated GPUs (--simulate) are a CUDA driver and an NVML without a GPU. Memory is real: its bytes are kept, it is bounded, \
and an access to what is not there is an error. So allocations, copies, streams, events, graphs, IPC, several GPUs and \
several processes behave as on a GPU, and how nvshare moves memory can be seen. Times follow from the given rates and say \
nothing about any GPU. It computes only kernels that it knows, those of nvshare's own programs (internal job, internal compute), and refuses \
others, so PyTorch and the like do not run on it. For several programs beside each other, run a shell: nvshare run --simulate -- sh -c './a & ./b & wait'.")]
pub struct Options {
    /// Size of each GPU's pool, such as 14.9GiB; it counts if this command starts the arbiter [default: all its memory but
    /// 512MiB]
    #[arg(long, value_name = "SIZE", value_parser = crate::size)]
    capacity: Option<u64>,
    /// How long a client runs while others wait: auto, or a time such as 500ms; it counts if this command starts the
    /// arbiter [default: auto]
    #[arg(long, value_name = "auto|TIME")]
    quantum: Option<String>,
    /// Directory of the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR", conflicts_with = "simulate")]
    runtime_dir: Option<PathBuf>,
    /// What the program is called in `nvshare status` [default: its own name]
    #[arg(long)]
    name: Option<String>,
    /// Share of GPU time against other programs', 1 to 1000: slices are as much longer [default: 100]
    #[arg(long, value_parser = crate::weight)]
    weight: Option<u32>,
    /// How soon the program's turn comes: low, normal or high [default: normal]
    #[arg(long, value_parser = crate::priority)]
    priority: Option<Priority>,
    /// The most memory of each GPU that the program may have: a size, such as 8GiB, or a part, such as 25% [default: none]
    #[arg(long, value_name = "SIZE|PERCENT", value_parser = limit_as_written)]
    memory_limit: Option<String>,
    /// The most of each GPU's time that the program may have, over any two seconds, such as 30% [default: none]
    #[arg(long, value_name = "PERCENT", value_parser = compute_limit_as_written)]
    compute_limit: Option<String>,
    /// A name that processes on this machine which wait for each other's GPU work have in common, and how many they are,
    /// such as training:2. Processes that use NCCL are recognised without it
    #[arg(long, value_name = "NAME:SIZE", value_parser = gang_as_written)]
    gang: Option<String>,
    #[command(flatten)]
    simulated: simulate::Options,
    /// The program to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Signals that a terminal or an operator sends, for the program to decide about.
const FORWARDED: [Signal; 8] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
    Signal::SIGWINCH,
];

/// Runs the program, and ends as it ends.
///
/// # Errors
/// The program or the arbiter cannot be started.
pub fn run(options: Options) -> Result<ExitCode, Failure> {
    let mut dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let shim = node::shim()?;
    let mut arguments = Vec::new();
    if let Some(capacity) = options.capacity {
        arguments.extend(["--capacity".to_owned(), capacity.to_string()]);
    }
    if let Some(quantum) = &options.quantum {
        arguments.extend(["--quantum".to_owned(), quantum.clone()]);
    }
    // Lives until the program has ended.
    let simulated = match options.simulated.simulate {
        true => Some(Simulated::start(&options.simulated, &arguments)?),
        false => None,
    };
    if let Some(simulated) = &simulated {
        dir = simulated.dir();
    } else if node::answers(&dir) {
        check_capacity(&dir, options.capacity);
    } else {
        if options.runtime_dir.is_none() && !system_arbiter_is_starting(&dir)? {
            dir = paths::own_arbiter_dir();
        }
        if node::start_arbiter(&dir, &arguments, &[])?.is_none() {
            check_capacity(&dir, options.capacity);
        }
    }
    let mut preload = OsString::from(&shim);
    if let Some(before) = std::env::var_os("LD_PRELOAD").filter(|value| !value.is_empty()) {
        preload.push(":");
        preload.push(before);
    }
    let mut command = Command::new(&options.program[0]);
    command.envs(simulated.iter().flat_map(Simulated::environment));
    command.args(&options.program[1..]).env("LD_PRELOAD", preload).env(paths::RUNTIME_DIR, &dir);
    if std::env::var_os("CUDA_MODULE_LOADING").is_none() {
        command.env("CUDA_MODULE_LOADING", "LAZY");
    }
    if let Some(name) = &options.name {
        command.env("NVSHARE_CLIENT_NAME", name);
    }
    let variables = [
        ("NVSHARE_WEIGHT", options.weight.map(|weight| weight.to_string())),
        ("NVSHARE_PRIORITY", options.priority.map(|priority| priority.to_string())),
        ("NVSHARE_MEMORY_LIMIT", options.memory_limit),
        ("NVSHARE_COMPUTE_LIMIT", options.compute_limit),
        ("NVSHARE_GANG", options.gang),
    ];
    command.envs(variables.into_iter().filter_map(|(name, value)| Some((name, value?))));
    supervise(command, &options.program[0])
}

/// Whether the system's arbiter answers after all.
///
/// # Errors
/// It does not, and may have clients: a second one beside them would deal out their memory too.
fn system_arbiter_is_starting(dir: &Path) -> Result<bool, Failure> {
    if dir != Path::new(paths::SYSTEM_DIR) || !paths::is_served(dir) {
        return Ok(false);
    }
    // It may be starting.
    let found = nvshare::register::dial(&paths::socket(dir), Duration::from_secs(2));
    match found {
        Ok(_) => Ok(true),
        Err(error) => Err(Failure::usage(format!(
            "the arbiter of this system does not answer, and its clients may have memory on the GPUs: {error}. Start it again (systemctl start nvshare-arbiter), or have an arbiter of your own with --runtime-dir DIR"
        ))),
    }
}

/// A gang's name and size that make sense, as they were written: the program reads them again.
fn gang_as_written(text: &str) -> Result<String, String> {
    let right = nvshare::membership::parse_name(text).is_some();
    right.then(|| text.to_owned()).ok_or_else(|| {
        "write a name and the number of processes on this machine that have it, two or more, such as training:2".into()
    })
}

/// A limit that makes sense, as it was written: the program reads it again.
fn limit_as_written(text: &str) -> Result<String, String> {
    crate::memory_limit(text).map(|_| text.to_owned())
}

/// The same for a compute limit.
fn compute_limit_as_written(text: &str) -> Result<String, String> {
    crate::compute_limit(text).map(|_| text.to_owned())
}

/// A pool has one size; who asks for another is told.
fn check_capacity(dir: &Path, wanted: Option<u64>) {
    let Some(wanted) = wanted else { return };
    for gpu in status::read(dir).map(|node| node.gpus).unwrap_or_default() {
        if gpu.capacity_bytes.abs_diff(wanted) >= nvshare::GRANULE {
            complain!(
                "nvshare: --capacity {}: an arbiter runs already and has {} of {}; it keeps them",
                format_size(wanted),
                format_size(gpu.capacity_bytes),
                gpu.uuid
            );
        }
    }
}

/// Starts the program, passes signals on to it, and takes over its exit status.
fn supervise(mut command: Command, program: &OsString) -> Result<ExitCode, Failure> {
    let fail = |error: nix::Error| Failure::with_status(1, format!("signals cannot be passed on: {error}"));
    let mut waited: SigSet = FORWARDED.into_iter().collect();
    waited.add(Signal::SIGCHLD);
    let before = waited.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).map_err(fail)?;
    // SAFETY: sigprocmask is allowed between fork and exec. The program gets the mask that we had.
    unsafe { command.pre_exec(move || before.thread_set_mask().map_err(std::io::Error::from)) };
    let name = program.to_string_lossy();
    let mut child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::with_status(127, format!("{name}: no such program")),
        ErrorKind::PermissionDenied => Failure::with_status(126, format!("{name}: cannot be run: {error}")),
        _ => Failure::with_status(126, format!("{name}: {error}")),
    })?;
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    loop {
        match waited.wait().map_err(fail)? {
            Signal::SIGCHLD => {
                let ended = child.try_wait().map_err(|error| Failure::with_status(1, error.to_string()))?;
                if let Some(status) = ended {
                    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                    return Ok(ExitCode::from(code as u8));
                }
            }
            // A terminal sends SIGINT to the whole group: the program has it already.
            signal => {
                if signal != Signal::SIGINT
                    || nix::unistd::getpgrp() != nix::unistd::getpgid(Some(pid)).unwrap_or(pid)
                    || !at_terminal()
                {
                    let _ = nix::sys::signal::kill(pid, signal);
                }
            }
        }
    }
}

fn at_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stdin())
}
