//! The compute turn, as the threads that submit see it ([`nvshare::turns`]).
//!
//! While the clients of a GPU differ in their shares, a thread that submits waits here until the process has the turn. Who takes
//! and gives up the turn is in [`crate::submit::turn_taking`].
//!
//! Threads sleep on the slot's doorbell, which rings when the process has the turn: so the first one submits without another
//! thread in between. A process has turns on one GPU only: one with several GPUs takes none.

use crate::submit::gate::gate;
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::Nanos;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};

/// The process's place among those that take turns on a GPU.
pub struct Seat {
    books: Books<MappedPage>,
    /// The beginning of the turn that is about to end, ns: nobody submits in it any more. 0 if none is.
    ending: AtomicU64,
    /// Others go on beside this process, and it beside them.
    beside: AtomicBool,
    /// When a thread that had waited for the turn last went on to submit, and was the first to do so in its turn, ns.
    first: AtomicU64,
    /// Nobody takes turns any more.
    over: AtomicBool,
    /// How many threads wait.
    held: AtomicU32,
    /// Since when the first of them waits, ns; 0 if none does.
    held_since: AtomicU64,
}

static SEAT: Mutex<Option<Arc<Seat>>> = Mutex::new(None);

/// The process's place, if it takes turns.
fn seat() -> Option<Arc<Seat>> {
    nvshare::sync::lock(&SEAT).clone()
}

/// The process takes turns from now on.
pub fn sit(seat: &Arc<Seat>) {
    *nvshare::sync::lock(&SEAT) = Some(seat.clone());
}

/// It takes none any more: its threads go on.
pub fn stand_up() {
    let seat = nvshare::sync::lock(&SEAT).take();
    if let Some(seat) = seat {
        seat.over.store(true, Ordering::Release);
        seat.wake_threads();
    }
}

/// Waits until the process has the turn, if it takes turns. Returns early if the gate shuts: then the thread waits there.
pub fn wait() {
    if let Some(seat) = seat() {
        seat.wait();
    }
}

/// Whether a thread waits for a turn.
pub fn is_holding() -> bool {
    seat().is_some_and(|seat| seat.is_holding())
}

/// The gate has been shut: threads that wait for a turn wait there instead.
pub fn gate_shut() {
    if let Some(seat) = seat()
        && seat.is_holding()
    {
        seat.wake_threads();
    }
}

impl Seat {
    /// A place for the client of these books.
    pub fn new(books: Books<MappedPage>) -> Self {
        Self {
            books,
            ending: AtomicU64::new(0),
            beside: AtomicBool::new(false),
            first: AtomicU64::new(0),
            over: AtomicBool::new(false),
            held: AtomicU32::new(0),
            held_since: AtomicU64::new(0),
        }
    }

    /// The client takes turns no more.
    pub fn ends(&self) {
        self.books.page().end_turns(self.books.slot());
    }

    /// Whether a thread may submit now.
    fn may_submit(&self) -> bool {
        let turn = self.books.page().turn();
        let has = turn.holder == Some(self.books.slot()) && turn.began != self.ending.load(Ordering::Acquire);
        has || self.beside.load(Ordering::Acquire) || self.over.load(Ordering::Acquire)
    }

    fn wait(&self) {
        if self.may_submit() {
            return;
        }
        let (page, slot) = (self.books.page(), self.books.slot());
        let _ = self.held_since.compare_exchange(0, now().max(1), Ordering::Relaxed, Ordering::Relaxed);
        self.held.fetch_add(1, Ordering::SeqCst);
        // Either this thread finds that the claim was taken back, or who took it back finds this thread.
        fence(Ordering::SeqCst);
        loop {
            let seen = page.doorbell(slot);
            if self.may_submit() || !gate().is_limited() {
                break;
            }
            page.claim_turn(slot);
            if self.may_submit() {
                break;
            }
            page.wait_doorbell(slot, seen, None);
        }
        self.note_first();
        self.held.fetch_sub(1, Ordering::SeqCst);
        let since = self.held_since.swap(0, Ordering::Relaxed);
        if since != 0 {
            page.held_for_turn(slot, now().saturating_sub(since));
        }
    }

    fn note_first(&self) {
        let turn = self.books.page().turn();
        if turn.holder == Some(self.books.slot()) && self.first_submission(turn.began).is_none() {
            self.first.store(now().max(turn.began), Ordering::Release);
        }
    }

    /// When a thread that had waited for the turn that began at `began`, ns, went on to submit, ns.
    pub fn first_submission(&self, began: Nanos) -> Option<Nanos> {
        let first = self.first.load(Ordering::Acquire);
        (first >= began).then_some(first)
    }

    /// Whether a thread waits for a turn.
    pub fn is_holding(&self) -> bool {
        self.held.load(Ordering::SeqCst) > 0
    }

    /// The turn that began then, ns, is about to end: no thread submits in it any more.
    pub fn end_turn(&self, began: Nanos) {
        self.ending.store(began, Ordering::Release);
    }

    /// Whether the process goes on beside the others, without a turn.
    pub fn go_beside(&self, beside: bool) {
        self.beside.store(beside, Ordering::Release);
        if beside {
            self.wake_threads();
        }
    }

    fn wake_threads(&self) {
        self.books.page().ring(self.books.slot());
    }
}
