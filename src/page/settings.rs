//! What the operator decides for a GPU, and its words in the header.

use super::layout::Page;
use crate::sync::Ordering;
use crate::units::{MILLISECOND, Nanos, SECOND};

/// How long a client runs while others wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantum {
    /// Always this long, in ns.
    Fixed(Nanos),
    /// A multiple of the time that the switch at the end of the slice takes ([`crate::policy::quantum`]).
    Auto {
        /// The multiple, in thousandths: 5,000 is five times the switch.
        factor_milli: u32,
        /// What the multiple grows to while all clients use up slice after slice, in thousandths.
        longest_milli: u32,
        /// No slice is shorter, in ns.
        min: Nanos,
        /// No slice is longer, in ns.
        max: Nanos,
    },
}

/// A quantum that no slice comes to the end of, ns: a hundred years. With it nobody is preempted.
pub const ENDLESS: Nanos = 100 * 365 * 86_400 * SECOND;

impl Default for Quantum {
    fn default() -> Self {
        Self::Auto { factor_milli: 5_000, longest_milli: 20_000, min: 100 * MILLISECOND, max: 60 * SECOND }
    }
}

/// What the operator decides, for one GPU. The arbiter writes it, and everybody reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How long a client runs while others wait.
    pub quantum: Quantum,
    /// A running client that has had no work for this long, in ns, gives way to a waiter.
    pub idle_grace: Nanos,
    /// The deadline of a client that begins to wait is at most this far away, in ns.
    pub deadline: Nanos,
    /// How much work, in ns of GPU time, a running client should have in flight while its slice can end; 0: any amount.
    pub drain_target: Nanos,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quantum: Quantum::default(),
            idle_grace: 5 * MILLISECOND,
            deadline: 60 * SECOND,
            drain_target: 50 * MILLISECOND,
        }
    }
}

/// In the word of the quantum's mode: a fixed one. Every other word stands for [`Quantum::Auto`].
const FIXED: u32 = 1;
const AUTO: u32 = 0;

impl Page {
    /// The operator's settings. An upper bound below its lower bound is read as equal to it.
    pub fn settings(&self) -> Settings {
        let header = &self.header;
        let quantum = if header.quantum_mode.load(Ordering::Relaxed) == FIXED {
            Quantum::Fixed(header.quantum_fixed.load(Ordering::Relaxed))
        } else {
            let min = header.quantum_min.load(Ordering::Relaxed);
            let factor_milli = header.factor_milli.load(Ordering::Relaxed);
            Quantum::Auto {
                factor_milli,
                longest_milli: header.longest_milli.load(Ordering::Relaxed).max(factor_milli),
                min,
                max: header.quantum_max.load(Ordering::Relaxed).max(min),
            }
        };
        Settings {
            quantum,
            idle_grace: header.idle_grace.load(Ordering::Relaxed),
            deadline: header.deadline.load(Ordering::Relaxed),
            drain_target: header.drain_target.load(Ordering::Relaxed),
        }
    }

    /// Puts the operator's settings into the page. The caller then [decides](Page::decide).
    pub fn set_settings(&self, settings: Settings) {
        let header = &self.header;
        match settings.quantum {
            Quantum::Fixed(ns) => {
                header.quantum_fixed.store(ns, Ordering::Relaxed);
                header.quantum_mode.store(FIXED, Ordering::Relaxed);
            }
            Quantum::Auto { factor_milli, longest_milli, min, max } => {
                header.factor_milli.store(factor_milli, Ordering::Relaxed);
                header.longest_milli.store(longest_milli, Ordering::Relaxed);
                header.quantum_min.store(min, Ordering::Relaxed);
                header.quantum_max.store(max, Ordering::Relaxed);
                header.quantum_mode.store(AUTO, Ordering::Relaxed);
            }
        }
        header.idle_grace.store(settings.idle_grace, Ordering::Relaxed);
        header.deadline.store(settings.deadline, Ordering::Relaxed);
        header.drain_target.store(settings.drain_target, Ordering::Relaxed);
    }
}
