//! Who gets past nvshare is seen: memory that NVML shows for a process that is no client is in the arbiter's log, once, by
//! name and pid, and in `nvshare status`.

use nvshare_e2e::application::{Application, MIB, gpu};
use nvshare_e2e::built;
use nvshare_test_support::Patience;
use nvshare_tools::node::{SimulatedGpu, TempDir};
use nvshare_tools::status::{self, Gpu};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// A context, in the simulated GPU of these tests.
const CONTEXT: u64 = 2 * MIB;
const DATA: u64 = 20 * MIB;

/// An arbiter whose log the test reads.
struct Arbiter {
    process: Child,
    log: BufReader<std::process::ChildStderr>,
    dir: TempDir,
}

impl Arbiter {
    fn start(gpu: &SimulatedGpu) -> Self {
        Self::start_with(gpu, &[])
    }

    fn start_with(gpu: &SimulatedGpu, environment: &[(&str, &Path)]) -> Self {
        let dir = TempDir::new().unwrap();
        let program = built("nvshare-arbiter");
        let mut process = Command::new(program)
            .args(["--headroom", "0MiB", "--runtime-dir"])
            .arg(dir.path())
            .envs(gpu.environment(&[]))
            .env("NVSHARE_LOG", "warn")
            .env(nvshare::paths::RUNTIME_DIR, dir.path())
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(process.stderr.take().unwrap());
        Self { process, log, dir }
    }

    /// The next line of the log.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.log.read_line(&mut line).unwrap();
        line
    }

    fn gpu(&self) -> Gpu {
        status::read(self.dir.path()).unwrap().gpus.remove(0)
    }
}

impl Drop for Arbiter {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A process that does not know of nvshare, with its context and data.
fn outside(gpu: &SimulatedGpu) -> Application {
    let mut application = Application::start(gpu.environment(&[]), &[]);
    application.does("init");
    application.does("create 0");
    application.alloc(DATA);
    application
}

#[test]
fn a_process_that_is_no_client_is_named_once_and_stands_in_status_until_it_ends() {
    let gpu = gpu();
    let mut arbiter = Arbiter::start(&gpu);
    for _ in 0..2 {
        let one = outside(&gpu);
        // The first line since the last one: it was not named twice.
        let said = arbiter.line();
        // Of a name the kernel keeps 15 characters: this is nvshare-test-calls.
        let named = said.contains(&format!("nvshare-test-ca (pid {})", one.pid()));
        assert!(named && said.contains("22.00 MiB") && said.contains("is no client"), "{said}");
        TIMEOUT.until("status shows it", || arbiter.gpu().foreign_bytes == CONTEXT + DATA);
        assert_eq!(arbiter.gpu().foreign_processes, 1);
        let text = Command::new(built("nvshare"))
            .args(["status", "--runtime-dir"])
            .arg(arbiter.dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        assert!(text.contains("1 process outside nvshare has 22.00 MiB"), "{text}");
        one.ends_well();
        TIMEOUT.until("it has gone", || arbiter.gpu().foreign_processes == 0);
        assert_eq!(arbiter.gpu().foreign_bytes, 0);
    }
}

/// With /etc/ld.so.preload the arbiter has loaded the shim too, which tells programs the pool as the GPU's memory.
#[test]
fn an_arbiter_that_has_loaded_the_shim_sees_the_gpu_as_it_is() {
    let gpu = gpu();
    let shim = nvshare_tools::node::shim().unwrap();
    let mut arbiter = Arbiter::start_with(&gpu, &[("LD_PRELOAD", &shim)]);
    // A foreign process is in its log, as the first line: nothing of the shim is before it.
    let one = outside(&gpu);
    let first = arbiter.line();
    assert!(first.contains("is no client"), "{first}");
    TIMEOUT.until("status shows it", || arbiter.gpu().foreign_bytes == CONTEXT + DATA);
    one.ends_well();
}
