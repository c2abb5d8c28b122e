//! The memory of one pool of stream-ordered allocations (cuMemAllocAsync): segments that are cut into blocks, each live or
//! free.
//!
//! cuMemFreeAsync puts a free into the order of a stream, and a free block remembers that place ([`Freed`]). Before the
//! stream has reached it, only this stream may use the block again, because its next use in that stream comes after the free.
//! When the stream has reached it ([`Arena::settle`]), every stream may. Neighbours that were freed in the same stream become
//! one block.
//!
//! This module calls no driver. Its caller finds out how far each stream has got.

use std::collections::{BTreeMap, BTreeSet};

/// Bytes: the alignment of every block, and the unit of its size.
pub const ALIGNMENT: u64 = 512;

/// A stream that memory was freed in. Unlike the driver's handle, the number is never given to another stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// A place in the order of a stream: the number of a free in it.
pub type Ticket = u64;

/// The place in a stream's order after which a free block is for every stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    /// The stream that it was freed in.
    pub stream_id: StreamId,
    /// Which of the frees in that stream it was.
    pub ticket: Ticket,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The application has it, and has asked for this many bytes.
    Live { requested: u64 },
    /// It is free: for every stream, or until that place only for that stream.
    Free(Option<Freed>),
}

#[derive(Debug, Clone, Copy)]
struct Block {
    size: u64,
    state: State,
}

/// A block that the application has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Where it begins.
    pub base: u64,
    /// Bytes asked for.
    pub size: u64,
}

/// A number of bytes, and the highest that it has been.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Level {
    /// Bytes now.
    pub now: u64,
    /// The most since it was last reset.
    pub high: u64,
}

impl Level {
    fn rise(&mut self, bytes: u64) {
        self.now += bytes;
        self.high = self.high.max(self.now);
    }

    fn fall(&mut self, bytes: u64) {
        self.now -= bytes;
    }

    /// Forgets the highest level so far: the present one is the highest.
    pub fn reset_high(&mut self) {
        self.high = self.now;
    }
}

/// A free block in the index: the stream that alone may use it, its size, its address.
type FreeKey = (Option<StreamId>, u64, u64);

/// The memory of one pool.
#[derive(Debug, Default)]
pub struct Arena {
    /// Sizes in bytes, by base address.
    segments: BTreeMap<u64, u64>,
    /// Every block of every segment, by address.
    blocks: BTreeMap<u64, Block>,
    free: BTreeSet<FreeKey>,
    /// Bytes of the segments.
    pub reserved: Level,
    /// Bytes of the live blocks.
    pub used: Level,
}

/// The size of a block for `bytes` bytes: rounded up to [`ALIGNMENT`]. `None` if that is more than 64 bits can say.
pub fn rounded(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(ALIGNMENT)
}

impl Arena {
    /// Adds a segment of `size` bytes, all of it free for every stream.
    pub fn add(&mut self, base: u64, size: u64) {
        self.segments.insert(base, size);
        self.reserved.rise(size);
        self.put_free(base, size, None);
    }

    /// Takes the smallest block with room for `requested` bytes that a stream may use at once: one that was freed in that
    /// stream, or one that is free for every stream. Returns its address.
    pub fn take(&mut self, stream_id: StreamId, requested: u64) -> Option<u64> {
        let size = rounded(requested)?;
        let best = |owner| self.free.range((owner, size, 0)..=(owner, u64::MAX, u64::MAX)).next().copied();
        // Of two of one size, the stream's own: the other can serve more streams.
        let key =
            [best(Some(stream_id)), best(None)].into_iter().flatten().min_by_key(|(_, size, _)| *size)?;
        Some(self.occupy(key, requested, size))
    }

    /// The free blocks with room for `requested` bytes whose streams have not got past the free yet, the smallest first: their
    /// addresses, and what has to come first.
    pub fn pending(&self, requested: u64) -> Vec<(u64, Freed)> {
        let Some(size) = rounded(requested) else { return Vec::new() };
        let mut found: Vec<_> =
            self.free.iter().filter(|(owner, room, _)| owner.is_some() && *room >= size).copied().collect();
        found.sort_unstable_by_key(|(_, room, address)| (*room, *address));
        let order = |address: u64| match self.blocks.get(&address)?.state {
            State::Free(freed) => freed,
            State::Live { .. } => None,
        };
        found.into_iter().filter_map(|(_, _, address)| Some((address, order(address)?))).collect()
    }

    /// Takes the free block at `address`, one of [`Arena::pending`]. The caller makes sure that its next use comes after the
    /// free. `None` if there is no such block any more, or it is too small.
    pub fn take_at(&mut self, address: u64, requested: u64) -> Option<u64> {
        let size = rounded(requested)?;
        let block = self.blocks.get(&address).filter(|block| block.size >= size)?;
        let State::Free(freed) = block.state else { return None };
        let key = (freed.map(|freed| freed.stream_id), block.size, address);
        Some(self.occupy(key, requested, size))
    }

    fn occupy(&mut self, key: FreeKey, requested: u64, size: u64) -> u64 {
        let (_, whole, address) = key;
        self.free.remove(&key);
        let block = Block { size, state: State::Live { requested } };
        let before = self.blocks.insert(address, block).map(|block| block.state);
        if whole > size {
            let rest = before.unwrap_or(State::Free(None));
            self.blocks.insert(address + size, Block { size: whole - size, state: rest });
            self.free.insert((key.0, whole - size, address + size));
        }
        self.used.rise(size);
        address
    }

    /// Takes back the live block that begins at `address`. It is free for every stream when that stream has reached the free,
    /// or at once with `None`. False if no live block begins there.
    pub fn give(&mut self, address: u64, freed: Option<Freed>) -> bool {
        let Some(&Block { size, state: State::Live { .. } }) = self.blocks.get(&address) else {
            return false;
        };
        self.used.fall(size);
        self.put_free(address, size, freed);
        true
    }

    /// Writes a free block down, merged with the free neighbours of the same stream.
    fn put_free(&mut self, mut address: u64, mut size: u64, mut freed: Option<Freed>) {
        self.blocks.remove(&address);
        let stream_id = freed.map(|freed| freed.stream_id);
        let same = |block: &Block| match block.state {
            State::Free(other) if other.map(|other| other.stream_id) == stream_id => {
                Some(other.map(|other| other.ticket))
            }
            _ => None,
        };
        let later = |freed: Option<Freed>, ticket: Option<Ticket>| {
            freed.map(|freed| Freed { ticket: freed.ticket.max(ticket.unwrap_or(0)), ..freed })
        };
        // Blocks are not merged across the border of two segments, which go back one by one.
        if !self.segments.contains_key(&address)
            && let Some((&before, &block)) = self.blocks.range(..address).next_back()
            && let Some(ticket) = same(&block)
        {
            freed = later(freed, ticket);
            self.free.remove(&(stream_id, block.size, before));
            (address, size) = (before, size + block.size);
        }
        let end = address + size;
        if !self.segments.contains_key(&end)
            && let Some(&block) = self.blocks.get(&end)
            && let Some(ticket) = same(&block)
        {
            freed = later(freed, ticket);
            self.free.remove(&(stream_id, block.size, end));
            size += block.size;
            self.blocks.remove(&end);
        }
        self.blocks.insert(address, Block { size, state: State::Free(freed) });
        self.free.insert((stream_id, size, address));
    }

    /// A stream has got past its free number `done`: blocks that were freed in it until then are free for every stream.
    pub fn settle(&mut self, stream_id: StreamId, done: Ticket) {
        let of_line = (Some(stream_id), 0, 0)..=(Some(stream_id), u64::MAX, u64::MAX);
        let past = |(_, size, address): &FreeKey| match self.blocks.get(address)?.state {
            State::Free(Some(freed)) if freed.ticket <= done => Some((*address, *size)),
            _ => None,
        };
        let settled: Vec<_> = self.free.range(of_line).filter_map(past).collect();
        for (address, size) in settled {
            self.free.remove(&(Some(stream_id), size, address));
            self.put_free(address, size, None);
        }
    }

    /// Whether there is a free block whose stream has not got past the free.
    pub fn is_pending(&self) -> bool {
        self.free.last().is_some_and(|(owner, ..)| owner.is_some())
    }

    /// Removes segments that are free as a whole, the largest first, as long as at least `keep` bytes stay. Returns the base
    /// addresses of those removed.
    pub fn trim(&mut self, keep: u64) -> Vec<u64> {
        let mut unused: Vec<FreeKey> = self
            .free
            .range((None, 0, 0)..=(None, u64::MAX, u64::MAX))
            .filter(|(_, size, address)| self.segments.get(address) == Some(size))
            .copied()
            .collect();
        unused.reverse();
        unused.retain(|key| {
            let (_, size, base) = *key;
            let goes = self.reserved.now - size >= keep;
            if goes {
                self.free.remove(key);
                self.blocks.remove(&base);
                self.segments.remove(&base);
                self.reserved.fall(size);
            }
            goes
        });
        unused.into_iter().map(|(_, _, base)| base).collect()
    }

    /// Whether an address lies in a segment, in a live block or not.
    pub fn owns(&self, address: u64) -> bool {
        let below = self.segments.range(..=address).next_back();
        below.is_some_and(|(base, size)| address - base < *size)
    }

    /// The live block that an address lies in, within the bytes that were asked for.
    pub fn containing(&self, address: u64) -> Option<Live> {
        let (base, block) = self.blocks.range(..=address).next_back()?;
        match block.state {
            State::Live { requested } if address - base < requested => {
                Some(Live { base: *base, size: requested })
            }
            _ => None,
        }
    }

    /// Whether there is no segment.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Removes everything, because the GPU's last context has ended.
    pub fn clear(&mut self) {
        *self = Arena::default();
    }
}

#[cfg(test)]
impl Arena {
    /// Asserts what holds between any two calls.
    pub fn check(&self) {
        let (mut used, mut free) = (0, BTreeSet::new());
        for (base, size) in &self.segments {
            // The blocks of a segment lie one behind the other, from its beginning to its end.
            let mut at = *base;
            let mut before = None;
            while at < base + size {
                let block = self.blocks.get(&at).unwrap_or_else(|| panic!("a hole at {at:#x}"));
                let owner = match block.state {
                    State::Live { requested } => {
                        assert_eq!(Some(block.size), rounded(requested));
                        used += block.size;
                        None
                    }
                    State::Free(freed) => {
                        free.insert((freed.map(|freed| freed.stream_id), block.size, at));
                        Some(freed.map(|freed| freed.stream_id))
                    }
                };
                assert!(owner.is_none() || owner != before, "two neighbours at {at:#x} should be one");
                before = owner;
                at += block.size;
            }
            assert_eq!(at, base + size, "a block reaches beyond its segment");
        }
        let blocks = self.blocks.values().map(|block| block.size).sum::<u64>();
        assert_eq!(blocks, self.segments.values().sum::<u64>(), "a block outside of all segments");
        assert_eq!((self.reserved.now, self.used.now), (blocks, used));
        assert_eq!(self.free, free);
        assert!(self.reserved.high >= self.reserved.now && self.used.high >= self.used.now);
    }
}

#[cfg(test)]
mod tests;
