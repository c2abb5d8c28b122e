//! A simulated machine with an arbiter that can be killed and started again, and what must be left when all have ended.

use crate::autopsy;
use crate::children;
use nix::fcntl::{FcntlArg, FdFlag, OFlag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_tools::node::{self, Environment, SimulatedGpu, TempDir};
use nvshare_tools::status;
use simstate::{Config, Segment};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// How much more memory an idle arbiter may have than when it was first idle.
const ARBITER_GROWTH: u64 = 4 << 20;

/// What a machine is like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// GPUs.
    pub gpus: u32,
    /// Bytes of each GPU's memory.
    pub memory: u64,
    /// Bytes of each GPU's pool.
    pub pool: u64,
    /// Options of the arbiter.
    pub arbiter: Vec<String>,
}

/// The machine.
pub struct Machine {
    plan: Plan,
    gpu: SimulatedGpu,
    dir: TempDir,
    arbiter: Option<u32>,
    /// Descriptors and bytes of this arbiter when nobody was its client.
    idle: Option<(usize, u64)>,
    files: Option<BTreeSet<PathBuf>>,
    segment: Segment,
}

/// What somebody else says, as a message.
fn why<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

impl Machine {
    /// Makes it and starts its arbiter.
    pub fn start(plan: Plan) -> Result<Self, String> {
        let settings = [
            ("GPUS", plan.gpus.to_string()),
            ("MEMORY", plan.memory.to_string()),
            ("CONTEXT_BYTES", "2MiB".to_owned()),
            ("LINK_BANDWIDTH", "32GiB".to_owned()),
        ];
        let gpu = SimulatedGpu::new(&settings).map_err(|failure| failure.message)?;
        let dir = TempDir::new().map_err(|failure| failure.message)?;
        std::fs::create_dir(dir.path().join("run")).map_err(why("the runtime directory"))?;
        let environment = gpu.environment(&[]);
        let variable = |name: &str| {
            let found = environment.iter().find(|(its, _)| its == name);
            found.map(|(_, value)| value.to_string_lossy().into_owned())
        };
        let config = Config::from_vars(&variable).map_err(why("the simulated GPU's settings"))?;
        let segment = Segment::attach(&config).map_err(why("the simulated GPU"))?;
        let mut machine = Self { plan, gpu, dir, arbiter: None, idle: None, files: None, segment };
        machine.start_arbiter()?;
        Ok(machine)
    }

    /// The arbiter's directory.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A place for other files.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("arbiter.log")
    }

    /// The last lines of the arbiter's log.
    pub fn arbiter_log(&self) -> String {
        autopsy::tail(&self.log(), 30)
    }

    /// The arbiter's process, if it lives.
    pub fn arbiter(&self) -> Option<u32> {
        self.arbiter
    }

    /// Starts the arbiter and waits until clients can connect.
    pub fn start_arbiter(&mut self) -> Result<(), String> {
        let program = node::program().map_err(|failure| failure.message)?.with_file_name("nvshare-arbiter");
        let (ready, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(why("a pipe"))?;
        let log =
            File::options().create(true).append(true).open(self.log()).map_err(why("the arbiter's log"))?;
        let mut command = children::command(program);
        command
            .arg("--runtime-dir")
            .arg(self.runtime_dir())
            .args(["--capacity", &self.plan.pool.to_string(), "--ready-fd", &write.as_raw_fd().to_string()])
            .args(&self.plan.arbiter)
            .envs(self.gpu.environment(&[]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // SAFETY: fcntl is allowed between fork and exec, and the descriptor is open in the child.
        unsafe {
            command.pre_exec(move || {
                nix::fcntl::fcntl(&write, FcntlArg::F_SETFD(FdFlag::empty()))?;
                Ok(())
            })
        };
        let mut child = command.spawn().map_err(why("the arbiter"))?;
        drop(command);
        let mut word = String::new();
        let _ = BufReader::new(File::from(ready)).read_line(&mut word);
        if word.trim() != "ready" {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("the arbiter does not start:\n{}", self.arbiter_log()));
        }
        self.arbiter = Some(child.id());
        self.idle = None;
        Ok(())
    }

    /// Ends the arbiter. Whoever waits for this process's children sees its end.
    pub fn end_arbiter(&mut self, signal: Signal) -> Option<u32> {
        let pid = self.arbiter.take()?;
        let _ = kill(Pid::from_raw(pid as i32), signal);
        Some(pid)
    }

    /// For programs that run without nvshare.
    pub fn native(&self) -> Environment {
        self.gpu.environment(&[])
    }

    /// For programs that are to be clients.
    pub fn client(&self) -> Result<Environment, String> {
        let mut environment = self.native();
        let shim = node::shim().map_err(|failure| failure.message)?;
        environment.push(("LD_PRELOAD".into(), OsString::from(shim)));
        environment.push((nvshare::paths::RUNTIME_DIR.into(), OsString::from(self.runtime_dir())));
        Ok(environment)
    }

    /// What is not as it must be now that nobody is a client; none if all is.
    pub fn left_behind(&mut self) -> Vec<String> {
        let mut found = Vec::new();
        match status::read(&self.runtime_dir()) {
            Err(failure) => found.push(failure.message),
            Ok(node) => {
                found.extend(node.unreadable.iter().map(|why| format!("a page that cannot be read: {why}")));
                for gpu in &node.gpus {
                    for client in &gpu.clients {
                        found.push(format!(
                            "slot {} is still taken by {} ({})",
                            client.slot, client.pid, client.phase
                        ));
                    }
                    if gpu.free_bytes != gpu.capacity_bytes as i64 {
                        let (free, all) = (gpu.free_bytes, gpu.capacity_bytes);
                        found.push(format!("{free} bytes of the pool's {all} are free on {}", gpu.uuid));
                    }
                }
            }
        }
        for index in 0..self.segment.gpu_count() {
            let used = self.segment.gpu(index).map_or(0, simstate::ledger::used);
            if used != 0 {
                found.push(format!("{used} bytes of the simulated GPU {index} are still in use"));
            }
        }
        found.extend(self.new_files());
        found.extend(self.arbiter_growth());
        found
    }

    /// Times that the books did not balance.
    pub fn repairs(&self) -> u64 {
        status::read(&self.runtime_dir()).map_or(0, |node| node.gpus.iter().map(|gpu| gpu.repaired).sum())
    }

    fn new_files(&mut self) -> Vec<String> {
        let listing = |dir: &Path, prefix: &str| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
            ours.map(|entry| entry.path()).collect()
        };
        // Others on this machine may run tests: only what this process's machines made counts.
        let own = format!("nvshare-{}-", std::process::id());
        let mut now: BTreeSet<PathBuf> = listing(&self.runtime_dir(), "").into_iter().collect();
        now.extend(listing(Path::new("/dev/shm"), &own));
        let before = self.files.get_or_insert_with(|| now.clone());
        now.difference(before).map(|path| format!("{} is new", path.display())).collect()
    }

    fn arbiter_growth(&mut self) -> Vec<String> {
        let Some(pid) = self.arbiter else { return vec!["the arbiter is not there".into()] };
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let bytes = kib.unwrap_or(0) << 10;
        if descriptors == 0 {
            return vec![format!("the arbiter, {pid}, has ended")];
        }
        let (idle_descriptors, idle_bytes) = *self.idle.get_or_insert((descriptors, bytes));
        let mut found = Vec::new();
        if descriptors > idle_descriptors {
            found.push(format!(
                "the arbiter has {descriptors} descriptors open and had {idle_descriptors} when it began"
            ));
        }
        if bytes > idle_bytes + ARBITER_GROWTH {
            found.push(format!(
                "the arbiter has {bytes} bytes of memory and had {idle_bytes} when it was first idle"
            ));
        }
        found
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // An arbiter that hangs may be what failed.
        if let Some(pid) = self.end_arbiter(Signal::SIGKILL) {
            let _ = nix::sys::wait::waitpid(Pid::from_raw(pid as i32), None);
        }
    }
}
