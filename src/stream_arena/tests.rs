//! The allocator against a model that remembers every byte's last free, and by hand.

use super::{ALIGNMENT, Arena, Freed, Live, StreamId, Ticket};
use proptest::prelude::*;
use std::ops::Range;

const SEGMENT: u64 = 64 << 10;
const STREAMS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Allocate this many bytes in this stream.
    Take(usize, u64),
    /// Free the block of this number in this stream, or without a stream, as cuMemFree does.
    Give(usize, Option<usize>),
    /// A stream gets past all of its frees but this many.
    Pass(usize, u64),
    /// Trim the pool to this many bytes.
    Trim(u64),
    /// Allocate this many bytes from a block whose free is pending. The stream then waits for that free.
    TakePending(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..STREAMS, 1..SEGMENT).prop_map(|(stream_id, size)| Step::Take(stream_id, size)),
        2 => (0..STREAMS, 1..4000u64).prop_map(|(stream_id, size)| Step::Take(stream_id, size)),
        5 => (any::<usize>(), proptest::option::weighted(0.9, 0..STREAMS)).prop_map(|(n, stream_id)| Step::Give(n, stream_id)),
        2 => (0..STREAMS, 0..4u64).prop_map(|(stream_id, left)| Step::Pass(stream_id, left)),
        1 => (0..4 * SEGMENT).prop_map(Step::Trim),
        1 => (1..SEGMENT).prop_map(Step::TakePending),
    ]
}

/// The same rules for each byte by itself.
#[derive(Default)]
struct Model {
    live: Vec<Live>,
    /// The last free of each range.
    freed: Vec<(Range<u64>, Freed)>,
    tickets: [Ticket; STREAMS],
    done: [Ticket; STREAMS],
    segments: Vec<u64>,
}

impl Model {
    fn taken(&mut self, base: u64, size: u64, by: Option<usize>) -> Result<(), TestCaseError> {
        let range = base..base + size;
        prop_assert_eq!(base % ALIGNMENT, 0);
        prop_assert!(self.segments.iter().any(|segment| *segment <= base && range.end <= segment + SEGMENT));
        for live in &self.live {
            prop_assert!(live.base + live.size <= base || range.end <= live.base, "it overlaps {:?}", live);
        }
        for (_, freed) in self.freed.iter().filter(|(other, _)| other.start < range.end && base < other.end) {
            let past = freed.ticket <= self.done[freed.stream_id.0 as usize];
            prop_assert!(
                by.is_none() || by == Some(freed.stream_id.0 as usize) || past,
                "{:?} is not over",
                freed
            );
        }
        self.remove(base..base + size.next_multiple_of(ALIGNMENT));
        self.live.push(Live { base, size });
        Ok(())
    }

    /// A range is no longer free: it is allocated again, or its segment is gone.
    fn remove(&mut self, gone: Range<u64>) {
        let rest = std::mem::take(&mut self.freed).into_iter().flat_map(|(range, freed)| {
            let left = range.start..range.end.min(gone.start);
            let right = range.start.max(gone.end)..range.end;
            [left, right].into_iter().filter(|part| !part.is_empty()).map(move |part| (part, freed))
        });
        self.freed = rest.collect();
    }
}

proptest! {
    /// Live blocks never overlap; a block goes to another stream only when its free is over; the sums are right.
    #[test]
    fn memory_changes_hands_in_order(steps in proptest::collection::vec(step(), 1..200)) {
        let (mut arena, mut model) = (Arena::default(), Model::default());
        for step in steps {
            match step {
                Step::Take(stream_id, size) => {
                    let found = arena.take(StreamId(stream_id as u64), size).or_else(|| {
                        // Directly behind another segment, so that blocks would be merged across the border if they could.
                        let base = model.segments.iter().max().map_or(1 << 30, |last| last + SEGMENT);
                        model.segments.push(base);
                        arena.add(base, SEGMENT);
                        arena.take(StreamId(stream_id as u64), size)
                    });
                    prop_assert!(found.is_some(), "a new segment has room");
                    model.taken(found.unwrap(), size, Some(stream_id))?;
                }
                Step::TakePending(size) => {
                    let Some(&(address, freed)) = arena.pending(size).first() else { continue };
                    prop_assert!(freed.ticket > model.done[freed.stream_id.0 as usize]);
                    let found = arena.take_at(address, size);
                    prop_assert_eq!(found, Some(address));
                    // The stream waits for that free, so its use of the block comes after it.
                    for (range, old) in &model.freed {
                        if range.start < address + size && address < range.end {
                            let past = old.ticket <= model.done[old.stream_id.0 as usize];
                            prop_assert!(past || (old.stream_id == freed.stream_id && old.ticket <= freed.ticket));
                        }
                    }
                    model.taken(address, size, None)?;
                }
                Step::Give(number, stream_id) if !model.live.is_empty() => {
                    let block = model.live.swap_remove(number % model.live.len());
                    let freed = stream_id.map(|stream_id| {
                        model.tickets[stream_id] += 1;
                        Freed { stream_id: StreamId(stream_id as u64), ticket: model.tickets[stream_id] }
                    });
                    prop_assert!(arena.give(block.base, freed));
                    prop_assert!(!arena.give(block.base, freed), "freed twice");
                    let end = block.base + block.size.next_multiple_of(ALIGNMENT);
                    model.freed.extend(freed.map(|freed| (block.base..end, freed)));
                }
                Step::Give(..) => {}
                Step::Pass(stream_id, left) => {
                    let done = model.tickets[stream_id].saturating_sub(left).max(model.done[stream_id]);
                    model.done[stream_id] = done;
                    arena.settle(StreamId(stream_id as u64), done);
                }
                Step::Trim(keep) => {
                    let before = arena.reserved.now;
                    let gone = arena.trim(keep);
                    prop_assert_eq!(arena.reserved.now, before - gone.len() as u64 * SEGMENT);
                    prop_assert!(gone.is_empty() || arena.reserved.now >= keep);
                    for base in gone {
                        let range = base..base + SEGMENT;
                        prop_assert!(model.live.iter().all(|live| !range.contains(&live.base)));
                        for (old, freed) in &model.freed {
                            let past = freed.ticket <= model.done[freed.stream_id.0 as usize];
                            prop_assert!(past || !range.contains(&old.start), "{:?} is not over", freed);
                        }
                        model.segments.retain(|segment| *segment != base);
                        model.remove(range);
                    }
                }
            }
            arena.check();
            for live in &model.live {
                prop_assert_eq!(arena.containing(live.base + live.size - 1), Some(*live));
            }
            let used: u64 = model.live.iter().map(|live| live.size.next_multiple_of(ALIGNMENT)).sum();
            prop_assert_eq!(arena.used.now, used);
        }
        // In the end everything can be trimmed.
        for block in std::mem::take(&mut model.live) {
            prop_assert!(arena.give(block.base, None));
        }
        for stream_id in 0..STREAMS {
            arena.settle(StreamId(stream_id as u64), model.tickets[stream_id]);
        }
        prop_assert_eq!(arena.trim(0).len(), model.segments.len());
        arena.check();
        prop_assert!(arena.is_empty() && !arena.is_pending());
    }
}

const MINE: StreamId = StreamId(0);
const OTHER: StreamId = StreamId(1);

fn arena() -> Arena {
    let mut arena = Arena::default();
    arena.add(1 << 30, SEGMENT);
    arena
}

#[test]
fn a_stream_has_its_own_free_back_at_once_and_another_waits() {
    let mut arena = arena();
    let block = arena.take(MINE, SEGMENT).unwrap();
    assert!(arena.give(block, Some(Freed { stream_id: MINE, ticket: 1 })));
    assert_eq!(arena.take(OTHER, 1), None);
    assert_eq!(arena.take(MINE, SEGMENT), Some(block));
    assert!(arena.give(block, Some(Freed { stream_id: MINE, ticket: 2 })));
    arena.settle(MINE, 1);
    assert_eq!(arena.take(OTHER, 1), None, "the first free is over, and not the second");
    arena.settle(MINE, 2);
    assert_eq!(arena.take(OTHER, 1), Some(block));
}

#[test]
fn neighbours_of_one_order_are_one_and_wait_for_the_last() {
    let mut arena = arena();
    let half = SEGMENT / 2;
    let (low, high) = (arena.take(MINE, half).unwrap(), arena.take(MINE, half).unwrap());
    arena.give(high, Some(Freed { stream_id: MINE, ticket: 1 }));
    arena.give(low, Some(Freed { stream_id: MINE, ticket: 2 }));
    assert_eq!(arena.pending(SEGMENT), [(low, Freed { stream_id: MINE, ticket: 2 })]);
    arena.settle(MINE, 1);
    assert!(arena.is_pending());
    assert_eq!(arena.trim(0), [] as [u64; 0], "the GPU may still use it");
    arena.settle(MINE, 2);
    assert_eq!(arena.trim(0), [low]);
}

#[test]
fn the_best_fit_wins_and_of_equals_the_streams_own() {
    let mut arena = arena();
    let blocks: Vec<_> = (0..4).map(|_| arena.take(MINE, 4096).unwrap()).collect();
    arena.give(blocks[0], None);
    arena.give(blocks[2], Some(Freed { stream_id: MINE, ticket: 1 }));
    assert_eq!(arena.take(MINE, 4096), Some(blocks[2]));
    assert_eq!(arena.take(MINE, 4000), Some(blocks[0]), "smaller than the rest of the segment");
}

#[test]
fn trimming_keeps_what_it_is_told_to() {
    let mut arena = arena();
    arena.add(1 << 31, 2 * SEGMENT);
    assert_eq!(arena.trim(2 * SEGMENT + 1), [] as [u64; 0], "less would be left");
    assert_eq!(arena.trim(SEGMENT), [1 << 31]);
    assert_eq!(arena.trim(0), [1 << 30]);
    assert_eq!((arena.reserved.now, arena.reserved.high), (0, 3 * SEGMENT));
    arena.reserved.reset_high();
    assert_eq!(arena.reserved.high, 0);
}

#[test]
fn addresses_between_blocks_belong_to_nobody() {
    let mut arena = arena();
    let block = arena.take(MINE, 700).unwrap();
    assert_eq!(arena.containing(block + 699), Some(Live { base: block, size: 700 }));
    assert_eq!(arena.containing(block + 700), None, "asked for 700 bytes");
    assert!(arena.owns(block + 700) && arena.owns(block + SEGMENT - 1) && !arena.owns(block + SEGMENT));
    assert!(!arena.give(block + 512, None), "inside a block");
    assert_eq!(arena.take(MINE, u64::MAX), None);
}
