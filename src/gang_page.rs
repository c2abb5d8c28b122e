//! What the processes of gangs show each other: one page for all GPUs of an arbiter, in shared memory.
//!
//! A client has a row at its GPU's column and its slot. The arbiter says there which gang the client belongs to, and the client
//! writes what the others must know ([`crate::gang_cut::Row`]). Whoever changes a row rings the doorbells of the gang's other
//! members. A client has this page only while it belongs to a gang, so processes without one pay nothing.
//!
//! Each row has a doorbell and an *answer*. A thread of the client sleeps on the doorbell and writes into the answer what the
//! doorbell shows. It does nothing else that could take long, so a client that does not answer for a while is stopped, and
//! the others go on without it.
//!
//! As in [`crate::page`], anybody who maps the page may write anything into it at any time: every access is atomic, every
//! word is decoded to some value, and indices are bounded.
//!
//! The page lives as long as its arbiter. The next arbiter makes another one, and the members join there.

use crate::gang_cut::Row;
use crate::packed::Packed;
use crate::slot::{SLOTS, SlotIndex};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence, futex_wait, futex_wake};
use crate::units::{GpuUuid, Nanos};

/// The first eight bytes of the page.
const MAGIC: u64 = u64::from_le_bytes(*b"nvgangs\n");

/// Version of this layout.
const VERSION: u32 = 1;

/// The most GPUs whose clients can belong to gangs. A machine of eight GPUs has 56 MIG instances at most.
pub const COLUMNS: usize = if cfg!(loom) { 2 } else { 64 };

const PLACES: usize = COLUMNS * SLOTS;

/// Bytes in the page.
pub const GANG_PAGE_BYTES: usize = size_of::<GangPage>();

/// A gang's number; 0 is none. The arbiter gives it.
pub type GangNumber = u64;

/// A row of the page: that of a slot in a GPU's column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place(u16);

impl Place {
    /// The place of a slot in a column, if there is such a column.
    pub fn new(column: usize, slot: SlotIndex) -> Option<Self> {
        (column < COLUMNS).then(|| Self((column * SLOTS + slot.get()) as u16))
    }

    fn get(self) -> usize {
        usize::from(self.0)
    }

    fn column(self) -> usize {
        self.get() / SLOTS
    }

    /// The slot.
    pub fn slot(self) -> SlotIndex {
        SlotIndex::new(self.get() % SLOTS).expect("a place is made of a slot")
    }
}

/// A client's row, on two cache lines of its own.
#[repr(C, align(128))]
struct Line {
    /// What the client shows.
    row: Packed<Row>,
    /// The client's pid as the arbiter sees it. The arbiter writes it.
    pid: AtomicU64,
    /// A futex that the gang's other members write: how often it has rung.
    doorbell: AtomicU32,
    /// What the client last saw there.
    answer: AtomicU32,
    /// When the client's turn on its GPU is likely to come, CLOCK_MONOTONIC ns, or [`NEXT`](crate::policy::NEXT); 0 if it does not wait.
    turn: AtomicU64,
    /// Nothing. Atomic, because other processes may write it all the same.
    _rest: [AtomicU64; 12],
}

/// The page.
#[repr(C)]
pub struct GangPage {
    magic: AtomicU64,
    version: AtomicU32,
    columns: AtomicU32,
    bytes: AtomicU64,
    /// How often a gang has got or lost a member.
    changes: AtomicU64,
    /// The GPU of each column; zeros where there is none.
    gpus: [[AtomicU64; 2]; COLUMNS],
    /// The gang of each place. The arbiter writes it. Apart from the rows, because all are searched for a gang's members.
    gangs: [AtomicU64; PLACES],
    lines: [Line; PLACES],
}

impl GangPage {
    /// Makes a page of zeroed memory, with a column for each of these GPUs. The GPUs beyond [`COLUMNS`] get none.
    pub fn initialise(&self, gpus: impl IntoIterator<Item = GpuUuid>) {
        for (gpu, words) in gpus.into_iter().zip(&self.gpus) {
            for (half, word) in gpu.0.chunks_exact(8).zip(words) {
                word.store(u64::from_le_bytes(half.try_into().expect("eight bytes")), Ordering::Relaxed);
            }
        }
        self.version.store(VERSION, Ordering::Relaxed);
        self.columns.store(COLUMNS as u32, Ordering::Relaxed);
        self.bytes.store(GANG_PAGE_BYTES as u64, Ordering::Relaxed);
        self.magic.store(MAGIC, Ordering::Release);
    }

    /// Whether this is a page of this layout.
    pub fn is_valid(&self) -> bool {
        self.magic.load(Ordering::Acquire) == MAGIC
            && self.version.load(Ordering::Relaxed) == VERSION
            && self.columns.load(Ordering::Relaxed) == COLUMNS as u32
            && self.bytes.load(Ordering::Relaxed) == GANG_PAGE_BYTES as u64
    }

    /// A page on the heap, for models and tests.
    pub fn on_heap(gpus: impl IntoIterator<Item = GpuUuid>) -> Box<Self> {
        let page = Box::new(Self {
            magic: AtomicU64::new(0),
            version: AtomicU32::new(0),
            columns: AtomicU32::new(0),
            bytes: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            gpus: std::array::from_fn(|_| [AtomicU64::new(0), AtomicU64::new(0)]),
            gangs: std::array::from_fn(|_| AtomicU64::new(0)),
            lines: std::array::from_fn(|_| Line {
                row: Packed::of_word(0),
                pid: AtomicU64::new(0),
                doorbell: AtomicU32::new(0),
                answer: AtomicU32::new(0),
                turn: AtomicU64::new(0),
                _rest: std::array::from_fn(|_| AtomicU64::new(0)),
            }),
        });
        page.initialise(gpus);
        page
    }

    fn line(&self, place: Place) -> &Line {
        &self.lines[place.get()]
    }

    /// The GPU of a place's column.
    pub fn gpu(&self, place: Place) -> GpuUuid {
        let mut bytes = [0; 16];
        for (half, word) in bytes.chunks_exact_mut(8).zip(&self.gpus[place.column()]) {
            half.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        GpuUuid(bytes)
    }

    /// A number that is another one after a gang has got or lost a member.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The gang of a place; 0 if it has none.
    pub fn gang(&self, place: Place) -> GangNumber {
        self.gangs[place.get()].load(Ordering::Relaxed)
    }

    /// The places that belong to the gang of a place, this one included; none if it belongs to no gang.
    pub fn members_with(&self, place: Place) -> Vec<Place> {
        let gang = self.gang(place);
        let those = self.gangs.iter().zip(0..).filter(|(word, _)| word.load(Ordering::Relaxed) == gang);
        if gang == 0 { Vec::new() } else { those.map(|(_, index)| Place(index)).collect() }
    }

    /// Writes which gang a client belongs to, and its pid. For the arbiter, which then calls [`GangPage::changed`]. True if it
    /// was another one.
    pub fn set_gang(&self, place: Place, gang: GangNumber, pid: u32) -> bool {
        let line = self.line(place);
        line.pid.store(pid.into(), Ordering::Relaxed);
        if self.gang(place) == gang {
            return false;
        }
        if gang == 0 {
            line.row.store(Row::default(), Ordering::Relaxed);
            line.turn.store(0, Ordering::Relaxed);
        }
        self.gangs[place.get()].store(gang, Ordering::Relaxed);
        if gang == 0 {
            // `changed` rings only those who have a gang, and this one may be waiting for the others of the one that it had.
            self.changes.fetch_add(1, Ordering::Release);
            self.ring(place);
        }
        true
    }

    /// Says that gangs have other members now, and rings all who belong to one. For the arbiter.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        let members = self.gangs.iter().zip(0..).filter(|(word, _)| word.load(Ordering::Relaxed) != 0);
        members.for_each(|(_, index)| self.ring(Place(index)));
    }

    /// What a client shows.
    pub fn row(&self, place: Place) -> Row {
        self.line(place).row.load(Ordering::SeqCst)
    }

    /// The pid of the client of a place, as the arbiter sees it.
    pub fn pid(&self, place: Place) -> u32 {
        self.line(place).pid.load(Ordering::Relaxed) as u32
    }

    /// Writes what a client shows. Rows that are read after this call are at least as new as any that the others wrote before
    /// they saw this one ([`crate::gang_cut`]).
    pub fn show(&self, place: Place, row: Row) {
        self.line(place).row.store(row, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// When the client's turn on its GPU is likely to come, ns, if it waits and has said so.
    pub fn turn(&self, place: Place) -> Option<Nanos> {
        Some(self.line(place).turn.load(Ordering::Relaxed)).filter(|turn| *turn > 0)
    }

    /// Writes when the client's turn on its GPU is likely to come, ns. A forecast, so in no order with anything else.
    pub fn expect(&self, place: Place, turn: Option<Nanos>) {
        self.line(place).turn.store(turn.unwrap_or(0), Ordering::Relaxed);
    }

    /// Rings the doorbell of a client.
    pub fn ring(&self, place: Place) {
        let bell = &self.line(place).doorbell;
        bell.fetch_add(1, Ordering::AcqRel);
        futex_wake(bell);
    }

    /// Answers the doorbell, and returns what it shows. Read the rows after that.
    pub fn answer(&self, place: Place) -> u32 {
        let line = self.line(place);
        let seen = line.doorbell.load(Ordering::Acquire);
        line.answer.store(seen, Ordering::Relaxed);
        seen
    }

    /// Whether the client has not answered its doorbell yet, and what that showed when it last did.
    pub fn unanswered(&self, place: Place) -> Option<u32> {
        let line = self.line(place);
        let answer = line.answer.load(Ordering::Relaxed);
        (line.doorbell.load(Ordering::Relaxed) != answer).then_some(answer)
    }

    /// Sleeps while the doorbell shows `seen`, at most until the time `until` (CLOCK_MONOTONIC ns). May return for no reason.
    pub fn wait(&self, place: Place, seen: u32, until: Option<Nanos>) {
        futex_wait(&self.line(place).doorbell, seen, until);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn place(column: usize, slot: usize) -> Place {
        Place::new(column, SlotIndex::new(slot).unwrap()).unwrap()
    }

    /// It may be waiting for the others at its gate.
    #[test]
    fn a_client_that_is_in_no_gang_any_more_is_rung() {
        let page = GangPage::on_heap([GpuUuid([1; 16])]);
        page.set_gang(place(0, 0), 1, 7);
        page.answer(place(0, 0));
        assert_eq!(page.unanswered(place(0, 0)), None);
        let before = page.changes();
        page.set_gang(place(0, 0), 0, 7);
        assert!(page.unanswered(place(0, 0)).is_some());
        assert_ne!(page.changes(), before, "it would not look who is with it");
    }

    #[test]
    fn every_place_is_a_row_of_its_own() {
        assert_eq!(Place::new(COLUMNS, SlotIndex::new(0).unwrap()), None);
        let page = GangPage::on_heap([GpuUuid([1; 16]), GpuUuid([2; 16])]);
        assert!(page.is_valid());
        let (first, second) = (place(0, SLOTS - 1), place(1, 0));
        page.show(first, Row { works: true, ..Row::default() });
        assert!(page.row(first).works && !page.row(second).works);
        assert_eq!((page.gpu(first), page.gpu(second)), (GpuUuid([1; 16]), GpuUuid([2; 16])));
        assert_eq!((first.slot().get(), second.slot().get()), (SLOTS - 1, 0));
    }

    #[test]
    fn a_gang_is_those_with_its_number_and_whoever_leaves_shows_nothing() {
        let page = GangPage::on_heap([GpuUuid([1; 16])]);
        assert!(page.members_with(place(0, 0)).is_empty());
        for slot in [0, 3] {
            assert!(page.set_gang(place(0, slot), 7, 70));
        }
        page.set_gang(place(0, 1), 8, 71);
        assert_eq!(page.members_with(place(0, 3)), [place(0, 0), place(0, 3)]);
        page.show(place(0, 3), Row { works: true, ..Row::default() });
        assert_eq!(page.turn(place(0, 3)), None);
        page.expect(place(0, 3), Some(5));
        assert_eq!((page.turn(place(0, 3)), page.turn(place(0, 0))), (Some(5), None));
        assert!(!page.set_gang(place(0, 3), 7, 70), "it is in that gang already");
        assert!(page.set_gang(place(0, 3), 0, 0) && !page.row(place(0, 3)).works);
        assert_eq!(page.turn(place(0, 3)), None);
        assert_eq!(page.members_with(place(0, 0)), [place(0, 0)]);
    }

    #[test]
    fn who_does_not_answer_is_seen() {
        let page = GangPage::on_heap([GpuUuid([1; 16])]);
        let (bell, changes) = (place(0, 2), page.changes());
        page.set_gang(bell, 1, 1);
        assert_eq!(page.unanswered(bell), None);
        page.changed();
        assert!(page.unanswered(bell).is_some() && page.changes() != changes);
        let seen = page.answer(bell);
        assert_eq!(page.unanswered(bell), None);
        page.ring(bell);
        assert_eq!(page.unanswered(bell), Some(seen));
    }
}
