//! What the examples share: how a program becomes a client, and memory that moves.
//!
//! | program | what it shows |
//! |---|---|
//! | `embed-plain-memory` | a runtime of its own on plain memory, in one thread: `acquire`, `should_yield`, `release`, `serve` |
//! | `embed-vmm` | CUDA's virtual memory management through cudarc, with a session |
//! | `embed-async` | an asynchronous program that awaits the GPU and blocks nothing |
//!
//! Each works until its standard input ends, and then checks every word of its memory.

pub mod data;
pub mod plain;

use nvshare::client::Client;
use nvshare::map::MappedPage;
use nvshare::units::granules_for;
use nvshare::wire::Hello;
use nvshare::{GpuUuid, Granules, paths, register};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long a program waits for an arbiter that is starting.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What all programs are told: which arbiter, which GPU, and what their memory is.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// The arbiter's directory [default: as for every client]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The GPU [default: the first that the arbiter serves]
    #[arg(long, value_name = "UUID")]
    gpu: Option<GpuUuid>,
    /// How much memory it has, MiB
    #[arg(long, default_value_t = 32)]
    pub mib: u64,
    /// What its data begins with
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Common {
    /// How much memory it has, in granules.
    pub fn granules(&self) -> Granules {
        granules_for(self.mib << 20)
    }

    /// Registers with the arbiter, for `gpu` if the program knows which one it uses.
    ///
    /// # Errors
    /// No arbiter answers, it serves no GPU, or it refuses; the message says what to do.
    pub fn register(&self, name: &str, gpu: Option<GpuUuid>) -> Result<Client<MappedPage>, Box<dyn Error>> {
        let dir = self.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
        let first = || Some(paths::pages(&dir).ok()?.first()?.0);
        let gpu = gpu.or(self.gpu).or_else(first).ok_or_else(|| {
            format!("{}: no arbiter serves a GPU there; start nvshare-arbiter, or name a directory with --runtime-dir", dir.display())
        })?;
        let hello = Hello::new(gpu, name);
        Ok(register::register(&paths::socket(&dir), &hello, TIMEOUT)?.into_client())
    }
}

/// The exit status of a program that has done its work, or that says why not.
pub fn ended(program: &str, result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Becomes true when the standard input ends.
pub fn input_has_ended() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let ended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let tell = ended.clone();
    std::thread::spawn(move || {
        // An input that cannot be read has ended.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        tell.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    ended
}
