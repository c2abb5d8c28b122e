//! What a client did lately: a ring of its latest events in the page, which is always on.
//!
//! Each slot has a ring of [`ENTRIES`] events, 16 bytes each. The slot's owner writes it, from one thread; anybody who has the page
//! may read it, also after the owner has died. An event is a time and a word, so writing one costs a look at the clock and
//! three stores. A client writes three to eight of them in a turn and none while it runs alone: the ring holds the last
//! minutes.
//!
//! The writer never waits for readers, so a reader may look at an entry while it is overwritten. The ring has two counters for
//! that: the writer raises `begun` before it changes an entry, and `written` after it. A reader takes `written` first, then
//! the entries, then `begun`; it drops the entries that the writer may have begun to overwrite meanwhile. (A sequence lock
//! whose readers do not retry: Lameter, "Effective synchronization on Linux/NUMA systems", 2005, section 4.3.)
//!
//! As with all of the page, a reader trusts nothing: any word is some event, and a counter that makes no sense ends in fewer
//! events. [`crate::timeline`] joins events to the spans that programs show.

use crate::page::{Phase, Stall};
use crate::units::Nanos;

/// Events that a ring holds: with its two counters they are 8 KiB, so nothing is left of the last cache line.
/// In a model of the protocol, which does not read it, a ring is small: models are made on a small stack.
pub const ENTRIES: usize = if cfg!(loom) { 1 } else { 511 };

/// An atomic word that a ring is made of: real, or modelled by loom for the test of the ring itself. In a page it is always the
/// real one: nobody in the protocol reads the ring, and a model of the protocol would only become larger.
pub trait Word {
    /// A word of zero.
    fn zero() -> Self;
    /// As the atomic's own `load`, relaxed.
    fn get(&self) -> u64;
    /// As the atomic's own `store`, relaxed.
    fn set(&self, value: u64);
    /// A fence with release ordering.
    fn release();
    /// A fence with acquire ordering.
    fn acquire();
}

macro_rules! word {
    ($atomics:path) => {
        const _: () = {
            use $atomics as atomics;
            impl Word for atomics::AtomicU64 {
                fn zero() -> Self {
                    Self::new(0)
                }

                fn get(&self) -> u64 {
                    self.load(atomics::Ordering::Relaxed)
                }

                fn set(&self, value: u64) {
                    self.store(value, atomics::Ordering::Relaxed);
                }

                fn release() {
                    atomics::fence(atomics::Ordering::Release);
                }

                fn acquire() {
                    atomics::fence(atomics::Ordering::Acquire);
                }
            }
        };
    };
}

word!(std::sync::atomic);
#[cfg(loom)]
word!(loom::sync::atomic);

/// A ring of the latest `N` events of a slot.
#[repr(C, align(128))]
pub struct Journal<W = std::sync::atomic::AtomicU64, const N: usize = ENTRIES> {
    /// Events whose writing has begun, since the page was made.
    begun: W,
    /// Events that were written.
    written: W,
    /// Of each event its time, ns, and what it was.
    entries: [[W; 2]; N],
}

impl<W: Word, const N: usize> Journal<W, N> {
    /// An empty ring: zeros, as in a new page.
    pub fn new() -> Self {
        let pair = |_| [W::zero(), W::zero()];
        Self { begun: W::zero(), written: W::zero(), entries: std::array::from_fn(pair) }
    }

    /// Writes an event. Only one thread does so at a time.
    pub fn write(&self, time: Nanos, event: Event) {
        let number = self.written.get();
        self.begun.set(number.wrapping_add(1));
        // Whoever sees a part of the entry sees that it was begun.
        W::release();
        let [at, what] = &self.entries[(number % N as u64) as usize];
        at.set(time);
        what.set(event.into());
        W::release();
        self.written.set(number.wrapping_add(1));
    }

    /// The events from number `from` on that are still there, oldest first, and the number to go on from.
    pub fn read(&self, from: u64) -> Reading {
        let written = self.written.get();
        W::acquire();
        let oldest = written.saturating_sub(N as u64);
        // A counter that went back: whoever wrote it lies, or the page is another one. All that is there counts.
        let first = if from > written { oldest } else { from.max(oldest) };
        let events: Vec<_> = (first..written)
            .map(|number| {
                let [at, what] = &self.entries[(number % N as u64) as usize];
                (number, At { time: at.get(), event: Event::from(what.get()) })
            })
            .collect();
        W::acquire();
        let intact = self.begun.get().saturating_sub(N as u64);
        let events: Vec<_> =
            events.into_iter().filter(|(number, _)| *number >= intact).map(|(_, event)| event).collect();
        let lost = if from > written { 0 } else { (written - from).saturating_sub(events.len() as u64) };
        Reading { events, next: written, lost }
    }
}

impl<W: Word, const N: usize> Default for Journal<W, N> {
    fn default() -> Self {
        Self::new()
    }
}

/// What [`Journal::read`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The events, oldest first.
    pub events: Vec<At>,
    /// The number of the next event.
    pub next: u64,
    /// Events that were overwritten before they were read.
    pub lost: u64,
}

/// An event and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// CLOCK_MONOTONIC, ns.
    pub time: Nanos,
    /// What happened.
    pub event: Event,
}

/// Why a client began to drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its turn was over.
    TurnOver,
    /// Somebody whose deadline had come went before it, or who comes first.
    Interrupted,
    /// It gave way by itself: it was idle, or its process has to wait for another GPU, or its memory has to move.
    ByItself,
}

impl Why {
    /// A short name for programs and pictures.
    pub fn name(self) -> &'static str {
        match self {
            Self::TurnOver => "turn over",
            Self::Interrupted => "interrupted",
            Self::ByItself => "by itself",
        }
    }
}

/// What happened to a client. A word of it is `kind:8 | detail:8 | amount:48`; every word is some event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The process with this pid took the slot. It does not know its pid in the arbiter's namespace, so this is its own.
    Registered {
        /// Its pid as it sees itself.
        pid: u32,
    },
    /// It entered a phase that nothing more is known of.
    Phase(Phase),
    /// It entered phase Running, and so many bytes had come in since phase Filling.
    Runs {
        /// Bytes.
        bytes: u64,
    },
    /// It entered phase Draining.
    Drains(Why),
    /// It began to move memory out, for others.
    Evicts,
    /// It moved so many bytes out.
    Evicted {
        /// Bytes copied: what is all zero is not.
        bytes: u64,
    },
    /// It began to bring memory in ahead of its turn.
    Prefetches,
    /// It brought in so many bytes.
    Prefetched {
        /// Bytes copied.
        bytes: u64,
    },
    /// It is to give way and cannot; [`Stall::None`]: it can again.
    Stalled(Stall),
}

const AMOUNT_BITS: u32 = 48;
const MOST: u64 = (1 << AMOUNT_BITS) - 1;

impl From<Event> for u64 {
    fn from(event: Event) -> Self {
        let (kind, detail, amount): (u8, u32, u64) = match event {
            Event::Phase(phase) => (0, phase.into(), 0),
            Event::Registered { pid } => (1, 0, pid.into()),
            Event::Runs { bytes } => (2, 0, bytes),
            Event::Drains(Why::TurnOver) => (3, 0, 0),
            Event::Drains(Why::Interrupted) => (3, 1, 0),
            Event::Drains(Why::ByItself) => (3, 2, 0),
            Event::Evicts => (4, 0, 0),
            Event::Evicted { bytes } => (5, 0, bytes),
            Event::Prefetches => (6, 0, 0),
            Event::Prefetched { bytes } => (7, 0, bytes),
            Event::Stalled(stall) => (8, stall.into(), 0),
        };
        u64::from(kind) << 56 | u64::from(detail & 0xff) << AMOUNT_BITS | amount.min(MOST)
    }
}

impl From<u64> for Event {
    fn from(word: u64) -> Self {
        let (kind, detail, amount) = (word >> 56, (word >> AMOUNT_BITS) as u32 & 0xff, word & MOST);
        match kind {
            1 => Self::Registered { pid: amount as u32 },
            2 => Self::Runs { bytes: amount },
            3 => Self::Drains(match detail {
                0 => Why::TurnOver,
                1 => Why::Interrupted,
                _ => Why::ByItself,
            }),
            4 => Self::Evicts,
            5 => Self::Evicted { bytes: amount },
            6 => Self::Prefetches,
            7 => Self::Prefetched { bytes: amount },
            8 => Self::Stalled(Stall::from(detail)),
            _ => Self::Phase(Phase::from(detail)),
        }
    }
}

impl Event {
    /// The phase that the client entered with this event.
    pub fn phase(self) -> Option<Phase> {
        match self {
            Self::Phase(phase) => Some(phase),
            Self::Registered { .. } => Some(Phase::Idle),
            Self::Runs { .. } => Some(Phase::Running),
            Self::Drains(_) => Some(Phase::Draining),
            _ => None,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicU64;

    type Small = Journal<AtomicU64, 4>;

    fn bytes(number: u64) -> Event {
        Event::Evicted { bytes: number }
    }

    #[test]
    fn what_was_written_is_read_in_order_and_once() {
        let journal = Small::new();
        journal.write(1, Event::Registered { pid: 7 });
        journal.write(2, Event::Phase(Phase::Waiting));
        let first = journal.read(0);
        assert_eq!(first.events.len(), 2);
        assert_eq!(first.events[1], At { time: 2, event: Event::Phase(Phase::Waiting) });
        journal.write(3, Event::Drains(Why::Interrupted));
        let more = journal.read(first.next);
        assert_eq!(more.events, [At { time: 3, event: Event::Drains(Why::Interrupted) }]);
        assert_eq!(journal.read(more.next), Reading { events: vec![], next: 3, lost: 0 });
    }

    #[test]
    fn a_reader_that_comes_late_has_the_latest_and_knows_how_many_it_lacks() {
        let journal = Small::new();
        (0..10).for_each(|number| journal.write(number, bytes(number)));
        let reading = journal.read(2);
        assert_eq!(reading.events.iter().map(|at| at.time).collect::<Vec<_>>(), [6, 7, 8, 9]);
        assert_eq!((reading.next, reading.lost), (10, 4));
    }

    #[test]
    fn an_entry_that_is_being_overwritten_is_left_out() {
        let journal = Small::new();
        (0..6).for_each(|number| journal.write(number, bytes(number)));
        // The writer has begun with the seventh, in the place of the third.
        journal.begun.set(7);
        journal.entries[2][0].set(999);
        let reading = journal.read(0);
        assert_eq!(reading.events.iter().map(|at| at.time).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(reading.lost, 3);
    }

    #[test]
    fn a_counter_that_went_back_begins_anew() {
        let journal = Small::new();
        journal.write(5, bytes(1));
        let reading = journal.read(77);
        assert_eq!((reading.events.len(), reading.next, reading.lost), (1, 1, 0));
    }

    proptest! {
        #[test]
        fn an_event_is_its_word(kind in 0..9u8, detail in 0..8u8, amount in 0..=MOST) {
            let event = Event::from(u64::from(kind) << 56 | u64::from(detail) << 48 | amount);
            prop_assert_eq!(Event::from(u64::from(event)), event);
        }

        /// Whatever stands in the page, a reader ends, and has no more than the ring holds.
        #[test]
        fn any_words_are_some_events(words in prop::collection::vec(any::<u64>(), 10), from: u64) {
            let journal = Small::new();
            journal.begun.set(words[0]);
            journal.written.set(words[1]);
            for (entry, pair) in journal.entries.iter().zip(words[2..].chunks(2)) {
                entry[0].set(pair[0]);
                entry[1].set(pair[1]);
            }
            let reading = journal.read(from);
            prop_assert!(reading.events.len() <= 4);
            prop_assert_eq!(reading.next, words[1]);
        }

        #[test]
        fn bytes_beyond_the_word_are_the_most_it_holds(bytes: u64) {
            let event = Event::from(u64::from(Event::Runs { bytes }));
            prop_assert_eq!(event, Event::Runs { bytes: bytes.min(MOST) });
        }
    }
}
