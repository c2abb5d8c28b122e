//! Memory that several processes hold.
//!
//! An allocation that one process exports and another one opens is charged once, for as long as anybody holds it, and
//! whoever made it may be long dead by then. So it leaves its maker's row when it is first exported and gets a slot
//! of its own: what it is ([`Share`]) and a bit for every row whose process holds it. It counts while a row with a bit
//! has an owner; a process that dies drops its bits with its row, and a row's next owner clears them.
//!
//! **Identity.** A slot is used again once nobody holds it, so what says which allocation a slot has (its size, who made
//! it, a number that counts up) is one word, and whoever joins compares it before and after setting its bit. A slot
//! that nobody holds is claimed by that word, too: with one compare-and-swap it says who is setting it up, everybody
//! else leaves it alone, and nobody can join yet. One whose claimer died meanwhile is free.
//!
//! While an allocation moves from a row to a slot it is counted twice for a moment, which [`crate::ledger`] allows for.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::segment::Gpu;

/// Most allocations of a GPU that several processes hold.
pub const MAX_SHARED: usize = 1024;

/// Sizes are counted in units of what the driver hands out at least.
const UNIT: u64 = 64 << 10;

/// An allocation that several processes may hold.
#[repr(C, align(16))]
pub struct SharedSlot {
    identity: AtomicU64,
    holders: AtomicU64,
}

/// Which allocation it is: the words by which processes tell each other of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// The slot's number.
    pub slot: u64,
    /// What the slot has to say of itself.
    pub identity: u64,
}

/// A slot's word: 24 bits of size in units, 6 of the maker's row, 33 of a number that is never zero, and whether the
/// maker is still setting it up.
#[derive(Clone, Copy)]
struct Identity(u64);

const NUMBERS: u64 = (1 << 33) - 1;

impl Identity {
    fn new(bytes: u64, maker: usize, number: u64) -> Option<Identity> {
        let (units, number) = (bytes.div_ceil(UNIT), number % NUMBERS + 1);
        (units < 1 << 24).then_some(Identity(units << 40 | (maker as u64) << 34 | number << 1))
    }

    fn bytes(self) -> u64 {
        (self.0 >> 40) * UNIT
    }

    fn maker(self) -> usize {
        (self.0 >> 34 & 63) as usize
    }

    fn unfinished(self) -> Identity {
        Identity(self.0 | 1)
    }

    fn is_unfinished(self) -> bool {
        self.0 & 1 == 1
    }
}

impl SharedSlot {
    /// Bytes that it stands for, if one of the rows of `live` holds it.
    pub(crate) fn used(&self, live: u64) -> u64 {
        match self.holders.load(SeqCst) & live {
            0 => 0,
            _ => Identity(self.identity.load(SeqCst)).bytes(),
        }
    }

    /// The row on whose account a monitor shows it: its maker's, and if that one has let go, the first that holds it.
    pub(crate) fn shown_for(&self, live: u64) -> Option<(usize, u64)> {
        let holders = self.holders.load(SeqCst) & live;
        let identity = Identity(self.identity.load(SeqCst));
        let maker = identity.maker();
        let row = if holders >> maker & 1 == 1 { maker } else { holders.trailing_zeros() as usize };
        (holders != 0).then_some((row, identity.bytes()))
    }

    /// Drops what an earlier owner of the row held, or was setting up.
    pub(crate) fn forget(&self, row: usize) {
        let bits = self.identity.load(SeqCst);
        if Identity(bits).is_unfinished() && Identity(bits).maker() == row {
            let _ = self.identity.compare_exchange(bits, 0, SeqCst, SeqCst);
        }
        if self.holders.load(SeqCst) & 1 << row != 0 {
            self.holders.fetch_and(!(1 << row), SeqCst);
        }
    }
}

/// Gives an allocation of the row's process a slot; `None` if there is none left.
pub(crate) fn claim(gpu: &Gpu, row: usize, bytes: u64) -> Option<Share> {
    let number = gpu.shares.0.fetch_add(1, SeqCst);
    let identity = Identity::new(bytes, row, number)?;
    let is_free = |entry: &SharedSlot, old: Identity| {
        let live = gpu.live_rows();
        let in_work = old.is_unfinished() && live >> old.maker() & 1 == 1;
        !in_work && entry.holders.load(SeqCst) & live == 0
    };
    for (slot, entry) in gpu.shared.iter().enumerate() {
        let old = entry.identity.load(SeqCst);
        if is_free(entry, Identity(old))
            && entry.identity.compare_exchange(old, identity.unfinished().0, SeqCst, SeqCst).is_ok()
        {
            entry.holders.store(1 << row, SeqCst);
            entry.identity.store(identity.0, SeqCst);
            return Some(Share { slot: slot as u64, identity: identity.0 });
        }
    }
    None
}

fn entry(gpu: &Gpu, share: Share) -> Option<&SharedSlot> {
    gpu.shared.get(usize::try_from(share.slot).ok()?)
}

/// Lets the row hold an allocation that somebody else holds; `false` if nobody does any more.
pub(crate) fn join(gpu: &Gpu, row: usize, share: Share) -> bool {
    let Some(entry) = entry(gpu, share) else { return false };
    let is_it = || entry.identity.load(SeqCst) == share.identity;
    let held = |holders: u64| (is_it() && holders & gpu.live_rows() != 0).then_some(holders | 1 << row);
    if entry.holders.fetch_update(SeqCst, SeqCst, held).is_err() {
        return false;
    }
    if !is_it() {
        entry.holders.fetch_and(!(1 << row), SeqCst);
    }
    is_it()
}

/// Ends the row's hold; says whether it was the last one.
pub(crate) fn leave(gpu: &Gpu, row: usize, share: Share) -> bool {
    let Some(entry) = entry(gpu, share).filter(|entry| entry.identity.load(SeqCst) == share.identity) else {
        return false;
    };
    let before = entry.holders.fetch_and(!(1 << row), SeqCst);
    before & !(1 << row) & gpu.live_rows() == 0
}
