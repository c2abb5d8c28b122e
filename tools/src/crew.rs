//! Several [jobs](crate::job) at once, each in a process of its own.

use crate::Failure;
use crate::job::{Event, Job};
use crate::node::{self, Environment};
use crate::{output, say};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What a job's process says.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// How it goes.
    Event(Event),
    /// It has closed its output; what it said on its standard error.
    Ended(String),
}

/// The processes. Those that still run are killed when this is dropped.
pub struct Crew {
    workers: Vec<Worker>,
    messages: Receiver<(usize, Message)>,
}

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
}

impl Crew {
    /// Starts them all.
    ///
    /// # Errors
    /// This program cannot be started again.
    pub fn start(jobs: &[Job], environment: &Environment) -> Result<Self, Failure> {
        let program = node::program()?;
        let (sender, messages) = channel();
        let mut crew = Self { workers: Vec::new(), messages };
        for (index, job) in jobs.iter().enumerate() {
            let mut command = Command::new(&program);
            command
                .args(["internal", "job"])
                .args(job.arguments())
                .envs(environment.iter().cloned())
                .env("NVSHARE_CLIENT_NAME", format!("job {}", index + 1))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                // Ctrl-C is for this process, which ends its jobs: one that a signal ends looks like one that failed.
                .process_group(0);
            // SAFETY: prctl is a plain system call, allowed between fork and exec. Should this process be killed, its
            // jobs must not go on for ever.
            unsafe {
                command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
            }
            let mut child = command
                .spawn()
                .map_err(|error| Failure::with_status(1, format!("{}: {error}", program.display())))?;
            listen(index, &mut child, sender.clone());
            let input = child.stdin.take();
            crew.workers.push(Worker { child, input });
        }
        Ok(crew)
    }

    /// Starts the iterations of controlled jobs.
    pub fn go(&mut self) {
        for input in self.workers.iter_mut().filter_map(|worker| worker.input.as_mut()) {
            // One that has died says so by itself.
            let _ = input.write_all(b"go\n");
        }
    }

    /// Ends the iterations of controlled jobs.
    pub fn stop(&mut self) {
        for worker in &mut self.workers {
            worker.input = None;
        }
    }

    /// What one of them says next, by `until`. `None` if none has said anything.
    pub fn next(&mut self, until: Instant) -> Option<(usize, Message)> {
        let left = until.saturating_duration_since(Instant::now());
        match self.messages.recv_timeout(left) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(left.min(Duration::from_millis(10)));
                None
            }
        }
    }

    /// The pid of a process.
    pub fn pid(&self, index: usize) -> u32 {
        self.workers[index].child.id()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
    }
}

/// The signal that asked this process to end, or 0.
static INTERRUPTED: AtomicI32 = AtomicI32::new(0);

extern "C" fn interrupt(signal: i32) {
    INTERRUPTED.store(signal, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP do not kill this process, so that it can take its jobs, its arbiter and its
/// simulated GPU with it: [`interrupted`] says that one has come.
pub fn clean_up_when_interrupted() {
    let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores into an atomic and does nothing else.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

/// # Errors
/// This process was asked to end, or nobody reads what it writes.
pub fn interrupted() -> Result<(), Failure> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        0 => output::check(),
        signal => {
            if std::io::stdout().is_terminal() {
                // Behind the ^C that the terminal shows.
                say!();
            }
            // Whoever sent it knows what happened.
            Err(Failure::with_status(128 + signal as u8, ""))
        }
    }
}

fn listen(index: usize, child: &mut Child, sender: Sender<(usize, Message)>) {
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    thread::spawn(move || {
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut errors) = errors {
                let _ = errors.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).trim().to_owned()
        });
        let lines = output.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok);
        for event in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
            let _ = sender.send((index, Message::Event(event)));
        }
        let _ = sender.send((index, Message::Ended(errors.join().unwrap_or_default())));
    });
}
