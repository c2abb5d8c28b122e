//! The books of a GPU's memory.
//!
//! A row belongs to a process and holds what it uses: bytes of allocations, bytes of contexts, resident managed pages.
//! There is no total anywhere; the total is the sum of the rows, so a row that is freed takes its share along.
//!
//! **Taking memory without a lock.** A process announces what it wants in its row (`pending`) and then sums all rows.
//! If announced and used memory together fit, it books the amount as used and withdraws the announcement. Two that do
//! this at once both see at least one announcement, so they can't both take the last room. If used memory alone leaves
//! no room, the request fails. If only the announcements of others are in the way, the one of the lower row insists
//! and the others withdraw and try again.
//!
//! Allocations that several processes hold are booked apart ([`shared`]). One that moves there is counted twice for a
//! moment, so its row says so (`moving`), and no request is refused while a row does.
//!
//! A sum is not a snapshot: memory that moves from one row to another while they are read could be counted twice and
//! make a request fail that had room. So every booking first raises `epoch`, and a sum during which it changed is
//! taken again.
//!
//! **Managed pages** give way to allocations. `managed` is one word, pages resident and pages stolen: a process that
//! needs room takes pages of another one by moving them from the first half to the second, and the victim finds out
//! when it next looks ([`Ledger::stolen_pages`]). The victim is the process whose least recently used page is oldest.
//!
//! **Dead processes.** A row is freed with a compare-and-swap of its owner, when room lacks, when a process joins and
//! when usage is asked for. Its next owner clears it, and until it says that it has, the row counts as empty.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::counters::{Count, RowCounters};
use crate::process::ProcessId;
use crate::segment::{Gpu, MAX_PROCESSES, Segment};
use crate::shared::{self, Share};
use crate::time::now_ns;

/// Managed memory moves in pages of this size.
pub const MANAGED_PAGE: u64 = 2 << 20;

/// An atomic word on a cache line of its own.
#[repr(C, align(64))]
pub struct Slot(pub(crate) AtomicU64);

/// A process's part of a GPU.
#[repr(C, align(64))]
pub struct Row {
    owner: AtomicU64,
    pending: AtomicU64,
    allocated: AtomicU64,
    context: AtomicU64,
    managed: AtomicU64,
    /// How many allocations are on their way to where several processes may hold them.
    moving: AtomicU64,
    /// When the least recently used resident managed page was last used.
    oldest_page: AtomicU64,
    pub(crate) counters: RowCounters,
}

/// How often a request steps aside for others before it fails: about a second, which means that one of them is stopped
/// in the middle of its own.
const MOST_TRIES: u32 = 30_000;

/// Set in a row's owner until the new owner has cleared it.
const SETTLING: u64 = 1 << 63;

/// The word `managed`: pages on the GPU, and pages that others have driven out since the owner last looked.
#[derive(Clone, Copy)]
struct Managed {
    resident: u32,
    stolen: u32,
}

impl Managed {
    fn from_bits(bits: u64) -> Managed {
        Managed { resident: bits as u32, stolen: (bits >> 32) as u32 }
    }

    fn bits(self) -> u64 {
        u64::from(self.stolen) << 32 | u64::from(self.resident)
    }
}

impl Row {
    fn owner(&self) -> Option<ProcessId> {
        match self.owner.load(SeqCst) {
            0 => None,
            bits if bits & SETTLING != 0 => None,
            bits => Some(ProcessId::from_bits(bits)),
        }
    }

    fn resident(&self) -> u64 {
        u64::from(Managed::from_bits(self.managed.load(SeqCst)).resident) * MANAGED_PAGE
    }

    fn used(&self) -> u64 {
        self.allocated.load(SeqCst).saturating_add(self.context.load(SeqCst)).saturating_add(self.resident())
    }

    /// Moves a resident page to the stolen ones.
    fn steal_page(&self) -> bool {
        let steal = |bits| {
            let managed = Managed::from_bits(bits);
            let resident = managed.resident.checked_sub(1)?;
            Some(Managed { resident, stolen: managed.stolen.saturating_add(1) }.bits())
        };
        self.managed.fetch_update(SeqCst, SeqCst, steal).is_ok()
    }
}

/// What memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Allocations of the application.
    Allocation,
    /// Contexts.
    Context,
}

/// What a process uses of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ProcessUsage {
    /// The process.
    pub pid: u32,
    /// Nothing; keeps the layout free of holes.
    pub reserved: u32,
    /// Bytes of its allocations.
    pub allocated: u64,
    /// Bytes of its contexts.
    pub context: u64,
    /// Bytes of its managed pages that are on the GPU.
    pub managed: u64,
}

impl ProcessUsage {
    /// All bytes.
    pub fn total(&self) -> u64 {
        self.allocated + self.context + self.managed
    }
}

/// The memory of one GPU is used up.
#[derive(Debug, thiserror::Error)]
#[error("out of GPU memory")]
pub struct OutOfMemory;

/// How a managed page got its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRoom {
    /// There was room.
    Free,
    /// A page of another process was driven out.
    EvictedOther,
    /// The caller's own least recently used page has to leave: it takes that page's place.
    EvictOwn,
    /// Allocations fill the GPU: the page stays where it is and is used from there.
    Nowhere,
}

struct Sums {
    used: u64,
    pending: u64,
    lower_pending: bool,
    /// Whether something may have been counted twice.
    moving: bool,
}

fn sums(gpu: &Gpu, own: usize) -> Sums {
    for _ in 0..10_000 {
        let epoch = gpu.epoch.0.load(SeqCst);
        let mut sums = Sums { used: 0, pending: 0, lower_pending: false, moving: false };
        for (index, row) in gpu.rows.iter().enumerate().filter(|(_, row)| row.owner().is_some()) {
            // Announcements before usage: a booking goes the other way round and is thus never missed.
            let pending = row.pending.load(SeqCst);
            sums.pending = sums.pending.saturating_add(pending);
            sums.lower_pending |= pending > 0 && index < own;
            sums.used = sums.used.saturating_add(row.used());
        }
        let live = gpu.live_rows();
        let shared = gpu.shared.iter().map(|slot| slot.used(live));
        sums.used = shared.fold(sums.used, u64::saturating_add);
        // Last: a move that is over by now has raised the epoch.
        sums.moving = gpu.rows.iter().any(|row| row.owner().is_some() && row.moving.load(SeqCst) > 0);
        if gpu.epoch.0.load(SeqCst) == epoch {
            return sums;
        }
    }
    // So many bookings at once never happen; a process of another build writing garbage could. Refuse.
    Sums { used: u64::MAX, pending: 0, lower_pending: false, moving: false }
}

impl Gpu {
    /// A bit for every row that has an owner.
    pub(crate) fn live_rows(&self) -> u64 {
        let bit = |(index, row): (usize, &Row)| u64::from(row.owner().is_some()) << index;
        self.rows.iter().enumerate().map(bit).fold(0, |live, bit| live | bit)
    }
}

/// Frees the rows of dead processes; says whether there were any.
pub fn reclaim(gpu: &Gpu) -> bool {
    let mut any = false;
    for row in &gpu.rows {
        let bits = row.owner.load(SeqCst);
        if bits != 0 && !ProcessId::from_bits(bits & !SETTLING).alive() {
            any |= row.owner.compare_exchange(bits, 0, SeqCst, SeqCst).is_ok();
        }
    }
    any
}

/// What every living process uses of a GPU.
pub fn usage(gpu: &Gpu) -> Vec<ProcessUsage> {
    reclaim(gpu);
    let live = gpu.live_rows();
    let shared: Vec<(usize, u64)> = gpu.shared.iter().filter_map(|slot| slot.shown_for(live)).collect();
    let of = |(index, row): (usize, &Row)| {
        let pid = row.owner()?.pid();
        let shared: u64 = shared.iter().filter(|(row, _)| *row == index).map(|(_, bytes)| bytes).sum();
        let (allocated, context) = (row.allocated.load(SeqCst) + shared, row.context.load(SeqCst));
        Some(ProcessUsage { pid, reserved: 0, allocated, context, managed: row.resident() })
    };
    gpu.rows.iter().enumerate().filter_map(of).collect()
}

/// Bytes in use on a GPU.
pub fn used(gpu: &Gpu) -> u64 {
    reclaim(gpu);
    sums(gpu, 0).used
}

/// This process's account with a GPU.
pub struct Ledger {
    gpu: &'static Gpu,
    index: usize,
    capacity: u64,
    /// A row announces one request at a time.
    taking: Mutex<()>,
}

impl Ledger {
    /// Opens an account; `None` if there is no such GPU or too many processes use it.
    pub fn open(segment: &Segment, index: usize) -> Option<Ledger> {
        let gpu = segment.gpu(index)?;
        reclaim(gpu);
        let me = ProcessId::current().bits();
        // A row that is already ours is what this process had before an exec.
        for row in &gpu.rows {
            let _ = row.owner.compare_exchange(me, 0, SeqCst, SeqCst);
        }
        let claim = |row: &Row| row.owner.compare_exchange(0, me | SETTLING, SeqCst, SeqCst).is_ok();
        let index = (0..MAX_PROCESSES).find(|&index| claim(&gpu.rows[index]))?;
        let row = &gpu.rows[index];
        for word in [&row.pending, &row.allocated, &row.context, &row.managed, &row.moving, &row.oldest_page]
        {
            word.store(0, SeqCst);
        }
        gpu.shared.iter().for_each(|slot| slot.forget(index));
        row.owner.store(me, SeqCst);
        Some(Ledger { gpu, index, capacity: segment.memory(), taking: Mutex::new(()) })
    }

    fn row(&self) -> &'static Row {
        &self.gpu.rows[self.index]
    }

    /// The GPU.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Raises a counter.
    pub fn count(&self, count: Count, n: u64) {
        self.row().counters.add(count, n);
    }

    fn word(&self, kind: Kind) -> &'static AtomicU64 {
        match kind {
            Kind::Allocation => &self.row().allocated,
            Kind::Context => &self.row().context,
        }
    }

    /// Books `bytes`, driving out managed pages of anybody if need be.
    pub fn take(&self, kind: Kind, bytes: u64) -> Result<(), OutOfMemory> {
        let evict = || match self.victim() {
            Some(index) => self.steal(index),
            None => false,
        };
        let word = self.word(kind);
        let taken = self.book(bytes, evict, || {
            word.fetch_add(bytes, SeqCst);
        });
        if taken { Ok(()) } else { Err(OutOfMemory) }
    }

    /// Gives `bytes` back.
    pub fn give(&self, kind: Kind, bytes: u64) {
        let _ = self.word(kind).fetch_update(SeqCst, SeqCst, |had| Some(had.saturating_sub(bytes)));
    }

    /// Moves an allocation of `bytes` that this process has booked to where several may hold it; `None` if as many as
    /// possible are there already.
    pub fn share(&self, bytes: u64) -> Option<Share> {
        reclaim(self.gpu);
        self.row().moving.fetch_add(1, SeqCst);
        let share = shared::claim(self.gpu, self.index, bytes);
        if share.is_some() {
            self.give(Kind::Allocation, bytes);
        }
        self.gpu.epoch.0.fetch_add(1, SeqCst);
        self.row().moving.fetch_sub(1, SeqCst);
        share
    }

    /// Lets this process hold an allocation too; `false` if nobody holds it any more.
    pub fn join(&self, share: Share) -> bool {
        reclaim(self.gpu);
        shared::join(self.gpu, self.index, share)
    }

    /// Ends this process's hold; says whether it was the last one.
    pub fn leave(&self, share: Share) -> bool {
        reclaim(self.gpu);
        shared::leave(self.gpu, self.index, share)
    }

    /// Bytes in use by everybody.
    pub fn used(&self) -> u64 {
        used(self.gpu)
    }

    /// The algorithm of the module's head. `evict` tries to make room.
    fn book(&self, bytes: u64, mut evict: impl FnMut() -> bool, commit: impl FnOnce()) -> bool {
        let _one = self.taking.lock().unwrap_or_else(|e| e.into_inner());
        let row = self.row();
        let mut tries = 0u32;
        let booked = loop {
            row.pending.store(bytes, SeqCst);
            let sums = sums(self.gpu, self.index);
            if sums.used.saturating_add(sums.pending) <= self.capacity {
                self.gpu.epoch.0.fetch_add(1, SeqCst);
                commit();
                break true;
            }
            if sums.used.saturating_add(bytes) > self.capacity {
                if reclaim(self.gpu) || evict() {
                    continue;
                }
                tries += 1;
                if !sums.moving || tries > MOST_TRIES {
                    break false;
                }
                std::thread::yield_now();
                continue;
            }
            // Only announcements are in the way.
            tries += 1;
            if tries > MOST_TRIES {
                break false;
            }
            if tries.is_multiple_of(64) {
                reclaim(self.gpu);
            }
            if sums.lower_pending {
                row.pending.store(0, SeqCst);
                std::thread::sleep(std::time::Duration::from_micros(u64::from(10 + tries % 7 * 5)));
            } else {
                std::thread::yield_now();
            }
        };
        row.pending.store(0, SeqCst);
        booked
    }

    /// The row whose least recently used managed page is oldest.
    fn victim(&self) -> Option<usize> {
        let rows = self.gpu.rows.iter().enumerate();
        rows.filter(|(_, row)| row.owner().is_some() && row.resident() > 0)
            .min_by_key(|(_, row)| row.oldest_page.load(SeqCst))
            .map(|(index, _)| index)
    }

    fn steal(&self, index: usize) -> bool {
        let stolen = self.gpu.rows[index].steal_page();
        if stolen {
            self.count(Count::UmEvictions, 1);
        }
        stolen
    }

    /// Finds room for a managed page that is about to be used.
    pub fn take_page(&self) -> PageRoom {
        let row = self.row();
        let mut room = PageRoom::Free;
        let mut own = false;
        let evict = || match self.victim() {
            Some(index) if index == self.index => {
                own = true;
                false
            }
            Some(index) => {
                room = PageRoom::EvictedOther;
                self.steal(index)
            }
            None => false,
        };
        let booked = self.book(MANAGED_PAGE, evict, || {
            let _ = row.managed.fetch_update(SeqCst, SeqCst, |bits| {
                let managed = Managed::from_bits(bits);
                Some(Managed { resident: managed.resident.saturating_add(1), ..managed }.bits())
            });
        });
        match (booked, own) {
            (true, _) => room,
            (false, true) => PageRoom::EvictOwn,
            (false, false) => PageRoom::Nowhere,
        }
    }

    /// Gives a managed page back; `false` if it had been stolen.
    pub fn give_page(&self) -> bool {
        let give = |bits| {
            let managed = Managed::from_bits(bits);
            Some(Managed { resident: managed.resident.checked_sub(1)?, ..managed }.bits())
        };
        self.row().managed.fetch_update(SeqCst, SeqCst, give).is_ok()
    }

    /// How many of the process's pages others have driven out since the last call.
    pub fn stolen_pages(&self) -> u32 {
        let look = |bits| Some(Managed { stolen: 0, ..Managed::from_bits(bits) }.bits());
        let before = self.row().managed.fetch_update(SeqCst, SeqCst, look);
        before.map_or(0, |bits| Managed::from_bits(bits).stolen)
    }

    /// Tells others how old the least recently used resident page is.
    pub fn publish_oldest_page(&self, when: Option<u64>) {
        self.row().oldest_page.store(when.unwrap_or_else(now_ns), SeqCst);
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.row().owner.store(0, SeqCst);
    }
}
