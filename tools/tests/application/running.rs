//! A process that does a job: `nvshare internal job`.

use nvshare_test_support::Patience;
use nvshare_tools::job::Job;
use nvshare_tools::node::Node;
use std::process::{Child, Command, ExitStatus, Stdio};

const PATIENCE: Patience = Patience::seconds(120);

/// Killed when dropped: two that block each other would stay for ever.
pub struct Running(Child);

impl Running {
    pub fn start(node: &Node, job: &Job) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_nvshare"))
            .args(["internal", "job"])
            .args(job.arguments())
            .envs(node.environment())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }

    /// Waits until it has ended, with right data.
    pub fn ends_well(&mut self) {
        PATIENCE.until("it has ended", || self.ended().is_some());
        assert!(self.ended().unwrap().success(), "wrong data, or a CUDA error");
    }

    pub fn kill(&mut self) -> ExitStatus {
        self.0.kill().unwrap();
        self.0.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
