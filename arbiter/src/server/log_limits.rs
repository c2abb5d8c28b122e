//! Bounds on what other processes can write into the arbiter's log: each kind of message has its own.

use super::pending_connections::Peer;
use nvshare::log_limit::LogLimit;
use nvshare::sync::now;
use nvshare::units::Nanos;
use nvshare::wire::Reply;
use std::collections::HashMap;

/// What strangers can do that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Nuisance {
    /// A malformed message.
    Nonsense,
    /// A well-formed message that asks for something refused.
    Request,
    /// A word in the page is not what the arbiter wrote.
    Overwritten,
}

/// How much of each kind has been logged lately.
#[derive(Default)]
pub(super) struct LogLimits(HashMap<Nuisance, LogLimit>);

impl LogLimits {
    /// Whether another line of this kind may be logged at `time` (ns); if not, it is counted.
    pub fn allows(&mut self, kind: Nuisance, time: Nanos) -> bool {
        self.0.entry(kind).or_default().allows(time)
    }

    /// Logs that a process is refused.
    pub fn log_refusal(&mut self, kind: Nuisance, peer: Peer, refusal: &Reply) {
        if self.allows(kind, now()) {
            tracing::warn!(pid = peer.pid, user = peer.user, "somebody is refused: {}", refusal.text());
        }
    }

    /// Logs how many lines were left out, for each kind whose window has ended at `time` (ns).
    pub fn log_suppressed(&mut self, time: Nanos) {
        for (kind, limit) in &mut self.0 {
            if let Some(count) = limit.suppressed(time) {
                tracing::warn!(count, "not logged, more of the same: {kind:?}");
            }
        }
    }
}
