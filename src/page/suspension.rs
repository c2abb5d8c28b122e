//! A client that a user has paused: one word of its row, which the arbiter writes.
//!
//! A paused client gives the GPU up at once, as if its slice were over, and is not admitted until it is resumed. It keeps its slot,
//! its shares, its memory and its right to memory; what it has on the GPU goes when somebody needs the room. It stands in no
//! queue, so nobody waits for it ([`Snapshot::take`](crate::snapshot::Snapshot::take)).
//!
//! The word says when the pause ends, so a pause with an end needs nobody to end it, and an arbiter that ends changes nothing
//! about it. A client looks at the word before it sleeps, and sleeps no longer than until the end.

use super::layout::Page;
use crate::slot::SlotIndex;
use crate::suspension::Suspension;
use crate::sync::{Ordering, now};

impl Page {
    /// Whether a client is paused, and until when; [`Suspension::None`] if the pause is over.
    pub fn suspension(&self, slot: SlotIndex) -> Suspension {
        let suspension = self.slot(slot).suspension.load(Ordering::Acquire);
        if suspension != Suspension::None && suspension.holds(now()) { suspension } else { Suspension::None }
    }

    /// Pauses a client, or resumes it, decides anew and rings it. For the arbiter.
    pub fn suspend(&self, slot: SlotIndex, suspension: Suspension) {
        self.slot(slot).suspension.store(suspension, Ordering::Release);
        self.decide();
        // A client that is resumed stands in no queue, so no decision rings it.
        self.ring(slot);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::client::{Bookkeeper, Client, Runtime};
    use crate::page::{Phase, Quantum, Settings};
    use crate::slot::Process;
    use crate::units::{Granules, MILLISECOND};
    use std::sync::Arc;

    type Shared = Arc<Page>;

    /// A page with time for everything: no slice ends by itself.
    fn page(capacity: Granules) -> Shared {
        let page = Shared::from(Page::for_tests(capacity));
        page.set_settings(Settings { quantum: Quantum::Fixed(u64::MAX), ..Settings::default() });
        page
    }

    fn client(page: &Shared, demand: Granules) -> (Client<Shared>, Bookkeeper<Shared>) {
        let slot = page.open_slot(Process { pid: 7, started: 7 }, "", 100).expect("a slot is free");
        let client = Client::new(page.clone(), slot);
        client.books().grow(demand);
        let runtime = Bookkeeper::new(client.books(), 1);
        (client, runtime)
    }

    #[test]
    fn who_is_paused_gives_way_and_somebody_else_runs() {
        let page = page(10);
        let (mut paused, mut its_moves) = client(&page, 8);
        let (mut other, mut moves) = client(&page, 8);
        paused.acquire(&mut its_moves).unwrap();
        other.request();
        let slot = paused.books().slot();
        page.suspend(slot, Suspension::WithoutEnd);
        assert!(paused.should_yield(), "though its slice is not over");
        paused.release(true);
        assert!(matches!(paused.poll(&mut its_moves), Ok(crate::client::Next::Sleep { until: None, .. })));
        assert_eq!(paused.phase(), Phase::Idle, "it stands in no queue");
        other.acquire(&mut moves).unwrap();
        // Whoever holds the GPU is not awaited by one that is paused.
        assert!(!other.awaited() && !other.should_yield());
        other.release(false);
        assert!(!page.admitted().contains(slot));
        moves.evict(8).unwrap();
        page.suspend(slot, Suspension::None);
        paused.acquire(&mut its_moves).unwrap();
        assert_eq!((paused.phase(), paused.books().resident()), (Phase::Running, 8), "it wanted the GPU");
    }

    #[test]
    fn a_client_that_is_paused_while_everybody_fits_gives_way_too_and_keeps_its_memory() {
        let page = page(20);
        let (mut paused, mut its_moves) = client(&page, 8);
        let (mut other, mut moves) = client(&page, 8);
        paused.acquire(&mut its_moves).unwrap();
        other.acquire(&mut moves).unwrap();
        page.suspend(paused.books().slot(), Suspension::WithoutEnd);
        assert!(paused.should_yield() && !other.should_yield());
        paused.release(true);
        paused.poll(&mut its_moves).unwrap();
        assert_eq!(paused.books().resident(), 8, "nobody needs the room");
        // Now somebody does: the memory of one that is paused goes first.
        let (mut third, mut third_moves) = client(&page, 12);
        third.request();
        paused.poll(&mut its_moves).unwrap();
        assert_eq!(paused.books().resident(), 0);
        third.acquire(&mut third_moves).unwrap();
        assert!(page.admitted().contains(other.books().slot()), "12 and 8 fit");
    }

    #[test]
    fn a_pause_with_an_end_ends_without_anybody() {
        let page = page(10);
        let (mut paused, mut moves) = client(&page, 8);
        let slot = paused.books().slot();
        page.suspend(slot, Suspension::lasting(now(), 200 * MILLISECOND));
        assert_ne!(page.suspension(slot), Suspension::None);
        paused.acquire(&mut moves).unwrap();
        assert_eq!(page.suspension(slot), Suspension::None);
    }

    #[test]
    fn a_slots_next_owner_is_not_paused() {
        let page = page(10);
        let (paused, _) = client(&page, 8);
        let slot = paused.books().slot();
        page.suspend(slot, Suspension::WithoutEnd);
        page.reap(slot);
        let (next, _) = client(&page, 8);
        assert_eq!((next.books().slot(), page.suspension(slot)), (slot, Suspension::None));
    }
}
