//! The control page: one for each GPU, in shared memory, mapped by everyone.
//!
//! Anybody who maps the page may write anything into it at any moment. So no reader trusts a value: counts are bounded, enums
//! are decoded so that every word is one of them, and an index comes out of [`SlotIndex::new`]. Every access is atomic, so a
//! hostile writer can cause wrong numbers and never undefined behaviour.
//!
//! | file | what it holds |
//! |---|---|
//! | `layout` | the words and their places |
//! | `phase`, `stall` | what a client is doing, and why it cannot give way |
//! | `settings` | what the operator decides |
//! | `bandwidth` | the link's average |
//! | `shares` | a client's weight, priority and limits, as they stand in its row |
//! | `suspension` | whether a client is paused |
//!
//! The functions of [`Page`] that belong to one part of the protocol are with that part: [`crate::pool`], [`crate::lock`],
//! [`crate::audit`], [`crate::snapshot`].

mod bandwidth;
mod layout;
mod phase;
mod settings;
mod shares;
mod stall;
mod suspension;

pub use bandwidth::{DEFAULT_BANDWIDTH, Direction};
pub use layout::{
    ComputeWords, ForeignMemory, Header, LAYOUT_VERSION, Line, MAGIC, NAME_BYTES, OwnWords, PAGE_BYTES, Page,
    Slot,
};
pub use phase::Phase;
pub use settings::{ENDLESS, Quantum, Settings};
pub use stall::Stall;

pub use crate::suspension::Suspension;

use crate::account::Free;
use crate::release;
use crate::slot::{SLOTS, SlotIndex, SlotSet};
use crate::sync::Ordering;
use crate::units::{GpuUuid, Granules, MAX_GRANULES, Nanos};
use bandwidth::Bandwidth;

/// Why a mapped file is not a page that this program can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The file is shorter than a page.
    #[error(
        "it has {found} bytes and a control page of layout {LAYOUT_VERSION} has {PAGE_BYTES}; it was truncated or is some other file"
    )]
    Short {
        /// Bytes found.
        found: u64,
    },
    /// It does not begin with [`MAGIC`].
    #[error(
        "it does not begin with nvshare's magic (found {found:#018x}); it is not a control page, or it was overwritten"
    )]
    Magic {
        /// The first eight bytes.
        found: u64,
    },
    /// A release with another layout wrote it.
    #[error(
        "it {}", release::of_an_arbiter(*.found, LAYOUT_VERSION)
    )]
    Version {
        /// The page's version.
        found: u32,
    },
    /// The version is right, and the number of slots or of bytes is not.
    #[error(
        "it claims {slots} slots in {bytes} bytes, and layout {LAYOUT_VERSION} has {SLOTS} in {PAGE_BYTES}; it was overwritten"
    )]
    Geometry {
        /// Slots claimed.
        slots: u32,
        /// Bytes claimed.
        bytes: u64,
    },
}

impl Page {
    /// Makes a page of a zeroed one: identity, a pool of `capacity` free granules, default settings. The magic comes last, so
    /// that nobody takes a half-made page for a whole one.
    pub fn initialise(&self, gpu: GpuUuid, capacity: Granules) {
        let header = &self.header;
        let capacity = capacity.min(MAX_GRANULES);
        header.capacity.store(u64::from(capacity), Ordering::Relaxed);
        header.free.store(Free { granules: capacity as i32, tag: None }, Ordering::Relaxed);
        header.next_ticket.store(1, Ordering::Relaxed);
        self.set_settings(Settings::default());
        for word in &header.bandwidth {
            word.store(Bandwidth::guess(DEFAULT_BANDWIDTH), Ordering::Relaxed);
        }
        self.restore_identity(gpu);
    }

    /// Writes what [`check`](Page::check) reads, whatever stood there: everybody can write the page, and the arbiter
    /// knows which page it is.
    pub fn restore_identity(&self, gpu: GpuUuid) {
        let header = &self.header;
        header.layout_version.store(LAYOUT_VERSION, Ordering::Relaxed);
        header.slot_count.store(SLOTS as u32, Ordering::Relaxed);
        header.page_bytes.store(PAGE_BYTES as u64, Ordering::Relaxed);
        for (half, word) in gpu.0.chunks_exact(8).zip(&header.gpu) {
            word.store(u64::from_le_bytes(half.try_into().expect("eight bytes")), Ordering::Relaxed);
        }
        header.magic.store(MAGIC, Ordering::Release);
    }

    /// Checks that this is a page of this layout.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence that begins with "it".
    pub fn check(&self) -> Result<(), PageError> {
        let header = &self.header;
        let magic = header.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(PageError::Magic { found: magic });
        }
        let version = header.layout_version.load(Ordering::Relaxed);
        if version != LAYOUT_VERSION {
            return Err(PageError::Version { found: version });
        }
        let (slots, bytes) =
            (header.slot_count.load(Ordering::Relaxed), header.page_bytes.load(Ordering::Relaxed));
        if (slots, bytes) != (SLOTS as u32, PAGE_BYTES as u64) {
            return Err(PageError::Geometry { slots, bytes });
        }
        Ok(())
    }

    /// The GPU that the page is for.
    pub fn gpu(&self) -> GpuUuid {
        let mut bytes = [0; 16];
        for (half, word) in bytes.chunks_exact_mut(8).zip(&self.header.gpu) {
            half.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        GpuUuid(bytes)
    }

    /// Granules in the pool.
    pub fn capacity(&self) -> Granules {
        self.header.capacity.load(Ordering::Relaxed).min(u64::from(MAX_GRANULES)) as Granules
    }

    /// The row of a slot.
    pub fn slot(&self, slot: SlotIndex) -> &Slot {
        &self.slots[slot.get()]
    }

    /// The slots that have an owner.
    pub fn occupied(&self) -> SlotSet {
        self.header.occupied.load(Ordering::Acquire)
    }

    /// What processes that are no clients have on the GPU.
    pub fn foreign(&self) -> ForeignMemory {
        self.header.foreign.load(Ordering::Relaxed)
    }

    /// Writes what processes that are no clients have on the GPU. For the arbiter, which asks NVML.
    pub fn set_foreign(&self, foreign: ForeignMemory) {
        self.header.foreign.store(foreign, Ordering::Relaxed);
    }

    /// The link's bandwidth, in bytes a second, measured or as first guessed; never 0.
    pub fn bandwidth(&self, direction: Direction) -> u64 {
        self.header.bandwidth[direction as usize].load(Ordering::Relaxed).bytes_per_second
    }

    /// Takes a copy of `bytes` that took `took` ns into the average. The first one replaces the guess, and copies of less
    /// than 64 MiB are left out.
    pub fn observe_copy(&self, direction: Direction, bytes: u64, took: Nanos) {
        let word = &self.header.bandwidth[direction as usize];
        // Not one atomic step: a lost update loses one sample of an average.
        if let Some(average) = word.load(Ordering::Relaxed).with_copy(bytes, took) {
            word.store(average, Ordering::Relaxed);
        }
    }

    /// Writes which gang the client in a slot belongs to, 0 for none. For the arbiter, which then decides anew. True if it was
    /// another one.
    pub fn set_gang(&self, slot: SlotIndex, gang: u64) -> bool {
        self.slot(slot).gang.swap(gang, Ordering::Relaxed) != gang
    }

    /// Sets the bandwidth that holds until the first measurement, in bytes a second each way. What is measured stays.
    pub fn guess_bandwidth(&self, bytes_per_second: u64) {
        for word in self.header.bandwidth.iter().filter(|word| word.load(Ordering::Relaxed).guessed) {
            word.store(Bandwidth::guess(bytes_per_second), Ordering::Relaxed);
        }
    }

    /// The arbiter that serves this page: its pid (0: none yet), how many arbiters the page has had, and when the last one
    /// was last alive (CLOCK_MONOTONIC ns).
    pub fn arbiter(&self) -> (u32, u32, Nanos) {
        let header = &self.header;
        (
            header.arbiter_pid.load(Ordering::Relaxed),
            header.arbiter_generation.load(Ordering::Relaxed),
            header.heartbeat.load(Ordering::Relaxed),
        )
    }

    /// Sleeps while a slot's doorbell shows `seen`, at most until the time `until` (CLOCK_MONOTONIC ns). May return for no
    /// reason: the caller looks again.
    pub fn wait_doorbell(&self, slot: SlotIndex, seen: u32, until: Option<Nanos>) {
        crate::sync::futex_wait(&self.slot(slot).doorbell, seen, until);
    }

    /// What a slot's doorbell shows: a count of rings. Read it before the words whose change a ring announces, and give it to
    /// [`Page::wait_doorbell`].
    pub fn doorbell(&self, slot: SlotIndex) -> u32 {
        self.slot(slot).doorbell.load(Ordering::Acquire)
    }

    /// Rings a slot's doorbell: its owner looks at the page again.
    pub fn ring(&self, slot: SlotIndex) {
        let bell = &self.slot(slot).doorbell;
        bell.fetch_add(1, Ordering::AcqRel);
        crate::sync::futex_wake(bell);
    }

    /// An [initialised](Page::initialise) page on the heap, for models and tests.
    pub fn on_heap(gpu: GpuUuid, capacity: Granules) -> Box<Self> {
        let page = Box::new(Self::zeroed());
        page.initialise(gpu, capacity);
        page
    }

    /// A page on the heap, of some GPU.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn for_tests(capacity: Granules) -> Box<Self> {
        Self::on_heap(GpuUuid([7; 16]), capacity)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_kind_is_refused_by_name() {
        let page = Page::for_tests(1);
        assert_eq!(page.check(), Ok(()));
        let other = LAYOUT_VERSION + 1;
        page.header.layout_version.store(other, Ordering::Relaxed);
        let error = page.check().unwrap_err().to_string();
        assert!(error.contains(&format!("page layout {other} ")), "{error}");
        assert!(error.contains(&format!("has {LAYOUT_VERSION}")), "{error}");
        page.header.magic.store(3, Ordering::Relaxed);
        assert!(matches!(page.check(), Err(PageError::Magic { found: 3 })));
    }
}
