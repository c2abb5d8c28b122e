//! A process that does a job: `nvshare internal job`.

use crate::built;
use nvshare_test_support::Patience;
use nvshare_tools::job::Job;
use nvshare_tools::node::Node;
use std::process::{Child, Command, ExitStatus, Stdio};

const TIMEOUT: Patience = Patience::seconds(120);

/// Killed when dropped: two that block each other would stay for ever.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it in the arbiter's environment.
    pub fn start(node: &Node, job: &Job) -> Self {
        let child = Command::new(built("nvshare"))
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
        TIMEOUT.until("it has ended", || self.ended().is_some());
        assert!(self.ended().unwrap().success(), "wrong data, or a CUDA error");
    }

    /// Kills it.
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
