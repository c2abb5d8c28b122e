//! What the arbiter's own thread counts for the metrics: plain atomics, which cost it nothing to write.

use nvshare_stats::definition::{Kind, Unit};
use std::sync::atomic::{AtomicU64, Ordering};

/// What the arbiter counts of a GPU.
#[derive(Debug, Default)]
pub struct Tallies {
    unresponsive: AtomicU64,
    reported: AtomicU64,
    killed: AtomicU64,
}

/// What a metric of the arbiter's is called, without `_total`, its kind, what it says, and where it stands.
pub type Named = (&'static str, Kind, &'static str, fn(&Tallies) -> u64);

/// All of them.
pub const TALLIES: [Named; 3] = [
    (
        "nvshare_gpu_unresponsive_clients",
        Kind::Gauge(Unit::Count),
        "Clients that hold the GPU now though they were to give way, for longer than --unresponsive-after.",
        |tallies| tallies.unresponsive.load(Ordering::Relaxed),
    ),
    (
        "nvshare_gpu_unresponsive_reports",
        Kind::Counter(Unit::Count),
        "Times that a client was found unresponsive, since the arbiter started.",
        |tallies| tallies.reported.load(Ordering::Relaxed),
    ),
    (
        "nvshare_gpu_killed_clients",
        Kind::Counter(Unit::Count),
        "Clients that were killed because they were unresponsive (--kill-unresponsive), since the arbiter started.",
        |tallies| tallies.killed.load(Ordering::Relaxed),
    ),
];

impl Tallies {
    /// So many clients are unresponsive now.
    pub fn set_unresponsive(&self, clients: usize) {
        self.unresponsive.store(clients as u64, Ordering::Relaxed);
    }

    /// A client was found unresponsive.
    pub fn reported(&self) {
        self.reported.fetch_add(1, Ordering::Relaxed);
    }

    /// A client was killed.
    pub fn killed(&self) {
        self.killed.fetch_add(1, Ordering::Relaxed);
    }
}
