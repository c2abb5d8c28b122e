//! The arbiter's part: it opens a client's books and closes a dead client's, writes how large contexts and the pool are, and
//! checks that the sums agree.
//!
//! One arbiter serves a page at a time (it holds a file lock), so these functions have one caller. The arbiter may be killed in
//! the middle of any of them; the next arbiter finishes what it has left half done.

use crate::account::Free;
use crate::page::{NAME_BYTES, Page, Phase, Stall, Suspension};
use crate::shares::Shares;
use crate::slot::{Owner, Process, SLOTS, SlotIndex, SlotSet};
use crate::sync::Ordering;
use crate::units::{Granules, MAX_GRANULES, Nanos};

/// What an audit found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {
    /// A move is in flight, or granules moved while the arbiter looked: the sums of this moment are not known.
    Busy,
    /// The sums agree.
    Balanced,
    /// The sums did not agree, and the pool's counter was corrected by this many granules. Positive: granules had leaked and
    /// are back.
    Repaired(i64),
}

/// What [`Page::reap`] found of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    /// The client's process.
    pub process: Process,
    /// Its last phase.
    pub phase: Phase,
    /// Granules that it held, which are back in the pool.
    pub returned: Granules,
}

impl Page {
    /// Opens a free slot for a process, with this weight and the default priority and limit. `None` if all slots are taken.
    pub fn open_slot(&self, process: Process, name: &str, weight: u32) -> Option<SlotIndex> {
        let occupied = self.occupied();
        let slot = (0..SLOTS).filter_map(SlotIndex::new).find(|slot| !occupied.contains(*slot))?;
        self.open_slot_at(slot, process, name, weight);
        Some(slot)
    }

    /// Opens this slot for a process, as [`Page::open_slot`] does. The arbiter keeps its own list of free slots, because
    /// everybody can write the page.
    pub fn open_slot_at(&self, slot: SlotIndex, process: Process, name: &str, weight: u32) {
        self.clear(slot);
        self.describe(slot, name, weight);
        self.set_owner(slot, process, self.generation(slot).wrapping_add(1));
    }

    /// Takes the slot that the process was given. False if it has been taken already: two threads of one process that register
    /// at the same time may be given the same slot, and the later one registers again.
    pub fn claim(&self, slot: SlotIndex) -> bool {
        let word = &self.slot(slot).claimed;
        word.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// How many owners a slot has had, the present one included.
    pub fn generation(&self, slot: SlotIndex) -> u32 {
        self.slot(slot).owner.load(Ordering::Relaxed).generation
    }

    /// Writes the owner of a slot if the page says something else; true if it did. The arbiter goes by its own list, because
    /// everybody can write the page.
    pub fn set_owner(&self, slot: SlotIndex, process: Process, generation: u32) -> bool {
        let row = self.slot(slot);
        let owner = Owner { generation, pid: process.pid };
        let right = row.owner.load(Ordering::Relaxed) == owner
            && row.started.load(Ordering::Relaxed) == process.started
            && self.occupied().contains(slot);
        if !right {
            row.started.store(process.started, Ordering::Relaxed);
            row.owner.store(owner, Ordering::Release);
            self.set_occupied(self.occupied().with(slot));
        }
        !right
    }

    /// Whether the process that a slot was opened for has [taken](Page::claim) it.
    pub fn is_claimed(&self, slot: SlotIndex) -> bool {
        self.slot(slot).claimed.load(Ordering::Acquire) != 0
    }

    /// Writes a slot's name, cut to [`NAME_BYTES`], and its weight; its priority and limit become the default ones.
    pub fn describe(&self, slot: SlotIndex, name: &str, weight: u32) {
        let mut bytes = [0; NAME_BYTES];
        let fits = name.floor_char_boundary(NAME_BYTES);
        bytes[..fits].copy_from_slice(&name.as_bytes()[..fits]);
        for (chunk, word) in bytes.chunks_exact(8).zip(&self.slot(slot).name) {
            word.store(u64::from_le_bytes(chunk.try_into().expect("eight bytes")), Ordering::Relaxed);
        }
        self.store_shares(slot, Shares { weight, ..Shares::default() });
    }

    fn set_occupied(&self, occupied: SlotSet) {
        self.header.occupied.store(occupied, Ordering::Release);
    }

    /// The process that owns a slot, if any.
    pub fn owner(&self, slot: SlotIndex) -> Option<Process> {
        let row = self.slot(slot);
        let owner = row.owner.load(Ordering::Acquire);
        (owner.pid != 0).then(|| Process { pid: owner.pid, started: row.started.load(Ordering::Relaxed) })
    }

    /// Closes the books of a client that is dead or has left: settles its move in flight, returns its granules to the pool,
    /// clears the slot and decides anew. `None` if nobody owns the slot.
    pub fn reap(&self, slot: SlotIndex) -> Option<Reaped> {
        let process = self.owner(slot)?;
        let view = self.view(slot);
        // Nobody must admit it or ask it to evict while its books are being closed.
        let own = &self.slot(slot).own;
        own.phase.store(Phase::Leaving, Ordering::Release);
        let returned = self.close_account(slot);
        self.clear(slot);
        let row = self.slot(slot);
        let generation = row.owner.load(Ordering::Relaxed).generation;
        row.owner.store(Owner { generation, pid: 0 }, Ordering::Release);
        self.set_occupied(self.occupied().without(slot));
        self.header.reaped.fetch_add(1, Ordering::Relaxed);
        self.decide();
        // Those who are left may not differ in their shares any more, and take no compute turns then.
        for slot in self.occupied().iter() {
            self.ring(slot);
        }
        Some(Reaped { process, phase: view.phase, returned })
    }

    /// Settles the account of a slot whose owner is dead, and returns to the pool the granules that it holds and those of its
    /// context. Returns how many it held. May be repeated after an arbiter was killed in the middle.
    pub fn close_account(&self, slot: SlotIndex) -> Granules {
        let balance = self.settle(slot);
        let returned = self.give(slot, balance.resident);
        self.set_context(slot, 0);
        returned
    }

    fn clear(&self, slot: SlotIndex) {
        let own = &self.slot(slot).own;
        own.phase.store(Phase::Idle, Ordering::Relaxed);
        own.consecutive_slices.store(0, Ordering::Relaxed);
        own.stall.store(Stall::None, Ordering::Relaxed);
        self.slot(slot).suspension.store(Suspension::None, Ordering::Relaxed);
        let words = [
            &own.demand,
            &own.ticket,
            &own.wait_since,
            &own.slice_start,
            &own.last_ran,
            &own.slices,
            &own.yields,
            &own.bytes_in,
            &own.bytes_out,
            &own.fill_ns,
            &own.evict_ns,
            &own.run_ns,
            &own.unmovable,
            &own.deadline,
            &own.virtual_time,
            &own.turn_start,
            &own.turn_used,
            &own.credit,
            &own.idle_since,
            &own.pause,
            &own.returns_at,
            &own.charged_ns,
            &own.bytes_elided,
            &own.submissions,
            &own.held_submissions,
            &own.bytes_unchanged,
            &own.stall_since,
            &own.stalls,
            &own.drain_retries,
            &own.host_promise,
            &self.slot(slot).claimed,
            &self.slot(slot).gang,
        ]
        .into_iter()
        .chain(self.slot(slot).compute.all());
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        self.forget_turn(slot);
    }

    /// Sets the size of a client's context, and takes the difference from the pool's counter. True if the size has changed.
    pub fn set_context(&self, slot: SlotIndex, context: Granules) -> bool {
        let context = context.min(MAX_GRANULES);
        let word = &self.slot(slot).context;
        let before = word.load(Ordering::Relaxed).min(u64::from(MAX_GRANULES)) as Granules;
        if before == context {
            return false;
        }
        word.store(u64::from(context), Ordering::Release);
        self.adjust_free(before as i32 - context as i32);
        true
    }

    /// Sets the size of the pool. True if it has changed; then the caller [decides](Page::decide).
    pub fn set_capacity(&self, capacity: Granules) -> bool {
        let (before, capacity) = (self.capacity(), capacity.min(MAX_GRANULES));
        if before == capacity {
            return false;
        }
        self.header.capacity.store(u64::from(capacity), Ordering::Release);
        self.adjust_free(capacity as i32 - before as i32);
        true
    }

    /// Checks I1, and repairs the pool's counter if I1 does not hold.
    ///
    /// The sums have a meaning only at a moment without a move in flight. If two looks at the counter and at every account find
    /// the same words, sequence numbers and tag included, there was such a moment between them.
    pub fn audit(&self) -> Audit {
        let look = || {
            let free = self.header.free.observe(Ordering::Acquire);
            let accounts: [_; SLOTS] =
                std::array::from_fn(|index| self.slots[index].account.observe(Ordering::Acquire));
            (free, accounts)
        };
        let first = look();
        let (free, accounts) = first;
        let mut held = 0;
        for account in accounts.map(|seen| seen.value) {
            if account.operation.is_some() {
                return Audit::Busy;
            }
            held += i64::from(account.resident);
        }
        let contexts: i64 =
            (0..SLOTS).filter_map(SlotIndex::new).map(|slot| i64::from(self.view(slot).context)).sum();
        if look() != first {
            return Audit::Busy;
        }
        self.header.audits.fetch_add(1, Ordering::Relaxed);
        let expected = i64::from(self.capacity()) - held - contexts;
        let off = expected - i64::from(free.value.granules);
        if off == 0 {
            return Audit::Balanced;
        }
        let granules = expected.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        let repaired = Free { granules, tag: None };
        // Only if no granules have moved since: the sums are of that moment.
        let swapped = self.header.free.compare_exchange(&free, repaired, Ordering::AcqRel, Ordering::Acquire);
        if swapped.is_err() {
            return Audit::Busy;
        }
        self.header.repaired.fetch_add(1, Ordering::Relaxed);
        crate::sync::futex_wake_low(self.header.free.atomic());
        Audit::Repaired(off)
    }

    /// Writes that the arbiter with this pid serves the page from now on.
    pub fn adopt(&self, pid: u32) {
        self.header.arbiter_pid.store(pid, Ordering::Relaxed);
        self.header.arbiter_generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the set of occupied slots anew, from the owners. For an arbiter that begins: the one before it may have been
    /// killed between the two stores of [`Page::open_slot_at`] or [`Page::reap`].
    pub fn rebuild_occupied(&self) {
        let owned = (0..SLOTS).filter_map(SlotIndex::new).filter(|slot| self.owner(*slot).is_some());
        self.set_occupied(owned.collect());
    }

    /// Writes that the arbiter was alive at this time (CLOCK_MONOTONIC ns).
    pub fn beat(&self, time: Nanos) {
        self.header.heartbeat.store(time, Ordering::Relaxed);
    }

    /// Since the page was made: audits that found an answer, audits that repaired the counter, clients reaped.
    pub fn audit_counts(&self) -> (u64, u64, u64) {
        let header = &self.header;
        (
            header.audits.load(Ordering::Relaxed),
            header.repaired.load(Ordering::Relaxed),
            header.reaped.load(Ordering::Relaxed),
        )
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const SOMEBODY: Process = Process { pid: 42, started: 7 };

    #[test]
    fn the_dead_leave_nothing_behind() {
        let page = Page::for_tests(100);
        let slot = page.open_slot(SOMEBODY, "job", 1).unwrap();
        page.set_context(slot, 10);
        page.take(slot, 30).unwrap();
        assert_eq!(page.free().granules, 60);
        let reaped = page.reap(slot).unwrap();
        assert_eq!((reaped.process, reaped.returned), (SOMEBODY, 30));
        assert_eq!(page.free().granules, 100);
        assert_eq!(page.owner(slot), None);
        assert_eq!(page.audit(), Audit::Balanced);
        assert_eq!(page.reap(slot), None);
    }

    #[test]
    fn a_leak_is_found_and_repaired() {
        let page = Page::for_tests(100);
        page.adjust_free(-5);
        assert_eq!(page.audit(), Audit::Repaired(5));
        assert_eq!(page.audit(), Audit::Balanced);
        page.adjust_free(3);
        assert_eq!(page.audit(), Audit::Repaired(-3));
        assert_eq!(page.free().granules, 100);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a quarter of an hour there, and each step of it is in other tests")]
    fn every_slot_can_be_had_and_no_more() {
        let page = Page::for_tests(100);
        for index in 0..SLOTS {
            let slot = page.open_slot(SOMEBODY, &"ä".repeat(60), 1).unwrap();
            assert_eq!(slot.get(), index);
        }
        assert_eq!(page.open_slot(SOMEBODY, "one too many", 1), None);
        let first = SlotIndex::new(0).unwrap();
        assert_eq!(page.details(first).unwrap().name, "ä".repeat(32));
        page.reap(first);
        assert_eq!(page.open_slot(SOMEBODY, "again", 1), Some(first));
    }

    #[test]
    fn a_slot_is_claimed_once() {
        let page = Page::for_tests(100);
        let slot = page.open_slot(SOMEBODY, "job", 1).unwrap();
        assert!(!page.is_claimed(slot) && page.claim(slot));
        assert!(page.is_claimed(slot) && !page.claim(slot), "by one of its threads");
        page.reap(slot);
        assert_eq!(page.open_slot(SOMEBODY, "job", 1), Some(slot));
        assert!(page.claim(slot), "its next owner has not claimed it");
    }

    #[test]
    fn whose_a_slot_is_can_be_put_right() {
        let page = Page::for_tests(100);
        let slot = page.open_slot(SOMEBODY, "job", 1).unwrap();
        let generation = page.generation(slot);
        assert!(!page.set_owner(slot, SOMEBODY, generation));
        for lie in [0, 7, u64::MAX] {
            page.slot(slot).owner.atomic().store(lie, Ordering::Relaxed);
            assert!(page.set_owner(slot, SOMEBODY, generation));
            assert_eq!(page.owner(slot), Some(SOMEBODY));
        }
        page.set_occupied(SlotSet::EMPTY);
        assert!(page.set_owner(slot, SOMEBODY, generation) && page.occupied().contains(slot));
    }

    #[test]
    fn a_smaller_pool_is_a_debt() {
        let page = Page::for_tests(100);
        let slot = page.open_slot(SOMEBODY, "job", 1).unwrap();
        page.take(slot, 90).unwrap();
        page.set_capacity(50);
        assert_eq!(page.free().granules, -40);
        assert_eq!(page.audit(), Audit::Balanced);
    }
}
