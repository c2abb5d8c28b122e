use super::*;
use crate::memory::CHUNK;
use crate::memory::fingerprint::Fingerprint;
use crate::memory::host::HostPool;
use crate::memory::region::WHOLE;
use crate::replicas::Digest;
use std::sync::Arc;

const CONTEXT: CUcontext = CUcontext(1);

/// Takes all deferred frees.
fn left(memory: &mut Memory) -> (Vec<Allocation>, Vec<Region>) {
    memory.take_left(memory.left()).expect("none were taken since")
}

/// Frees that are deferred after [`Memory::left`] are not taken, and none can be taken twice.
#[test]
fn deferred_frees_are_taken_as_far_as_they_were_reported() {
    let mut memory = Memory::default();
    let allocations: Vec<_> = [1 << 30, 2 << 30]
        .map(|base| {
            memory.add_whole(base, 2 << 20, 2 << 20, CUcontext::NULL);
            memory.begin_free(base).unwrap()
        })
        .to_vec();
    memory.defer_free(allocations[0]);
    let marked = memory.left();
    memory.defer_free(allocations[1]);
    assert_eq!(memory.take_left(marked).unwrap().0, allocations[..1]);
    assert!(memory.take_left(marked).is_none() && memory.has_deferred_frees());
    assert_eq!(left(&mut memory).0, allocations[1..]);
}

#[test]
fn a_region_is_cut_into_chunks() {
    let mut memory = Memory::default();
    memory.add_whole(1 << 40, 2 * CHUNK + GRANULE, 2 * CHUNK + 5, CONTEXT);
    let region = memory.region(1 << 40).unwrap();
    assert_eq!(region.chunks.iter().map(|chunk| chunk.size).collect::<Vec<_>>(), [CHUNK, CHUNK, GRANULE]);
    assert_eq!(region.chunks[2].address, (1 << 40) + 2 * CHUNK);
    assert!(memory.is_missing());
}

#[test]
fn addresses_find_their_allocation() {
    let mut memory = Memory::default();
    memory.add_whole(0x1000_0000, GRANULE, 100, CONTEXT);
    assert_eq!(memory.containing(0x1000_0000 + 99).map(|found| found.base), Some(0x1000_0000));
    assert_eq!(memory.containing(0x1000_0000 + 100), None);
    assert_eq!(memory.containing(0xfff_ffff), None);
    assert!(memory.begin_free(0x1000_0000).is_some());
    assert_eq!(memory.begin_free(0x1000_0000), None, "freed twice");
}

#[test]
fn small_allocations_share_a_slab_and_the_last_one_releases_it() {
    let mut memory = Memory::default();
    assert_eq!(memory.take_small(1, CONTEXT), None);
    memory.add_slab(0x4000_0000, CONTEXT);
    let first = memory.take_small(1, CONTEXT).unwrap();
    let second = memory.take_small(SMALL, CONTEXT).unwrap();
    assert_eq!((first, second), (0x4000_0000, 0x4000_0000 + ALIGNMENT));
    assert_eq!(memory.take_small(SMALL, CONTEXT), None, "full");
    assert_eq!(memory.take_small(1, CUcontext(2)), None, "another context's");
    for (base, left) in [(first, Freed::Nothing), (second, Freed::Region(0x4000_0000))] {
        let allocation = memory.begin_free(base).unwrap();
        assert_eq!(memory.finish_free(allocation), left);
    }
}

#[test]
fn adjacent_gaps_are_merged() {
    let mut gaps = Gaps::new(4096);
    let offsets: Vec<_> = (0..8).map(|_| gaps.take(512).unwrap()).collect();
    assert_eq!(gaps.take(1), None);
    for offset in
        [offsets[2], offsets[0], offsets[1], offsets[7], offsets[5], offsets[6], offsets[4], offsets[3]]
    {
        gaps.give(offset, 512);
    }
    assert!(gaps.empty());
}

#[test]
fn a_deferred_free_is_gone_for_the_application_and_not_for_the_engine() {
    let mut memory = Memory::default();
    memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
    let allocation = memory.begin_free(1 << 30).unwrap();
    memory.defer_free(allocation);
    assert_eq!(memory.containing(1 << 30), None);
    assert!(memory.region(1 << 30).is_some() && memory.has_deferred_frees());
    assert_eq!(left(&mut memory).0, [allocation]);
    assert_eq!(memory.finish_free(allocation), Freed::Region(1 << 30));
}

#[test]
fn deferred_granules_are_those_that_the_frees_will_release() {
    let mut memory = Memory::default();
    memory.add_whole(1 << 30, 3 * GRANULE, 3 * GRANULE, CONTEXT);
    memory.add_slab(1 << 31, CONTEXT);
    let small = [(); 3].map(|()| memory.take_small(1000, CONTEXT).unwrap());
    let mut defer_free = |base| {
        let allocation = memory.begin_free(base).unwrap();
        memory.defer_free(allocation);
        memory.deferred()
    };
    assert_eq!(defer_free(small[0]), 0, "its slab has others");
    assert_eq!(defer_free(1 << 30), 3);
    assert_eq!((defer_free(small[1]), defer_free(small[2])), (3, 4), "the slab goes with its last one, once");
    memory.lend(1 << 30);
    assert_eq!(memory.deferred(), 1, "another process keeps it");
    for allocation in left(&mut memory).0 {
        if let Freed::Region(base) = memory.finish_free(allocation) {
            memory.remove(base);
        }
    }
    assert_eq!(memory.deferred(), 0);
    assert!(memory.take_back(1 << 30));
    assert_eq!(memory.deferred(), 3, "and has closed it");
    assert_eq!((left(&mut memory).1.len(), memory.deferred()), (1, 0));
}

#[test]
fn a_region_open_elsewhere_outlives_its_free_but_its_export_number_does_not() {
    let mut memory = Memory::default();
    memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
    assert_eq!(memory.export(1 << 30, || 7), Some(7));
    assert_eq!(memory.export(1 << 30, || 8), Some(7), "asked for twice");
    assert_eq!(memory.export((1 << 30) + 512, || 9), None);
    memory.lend(1 << 30);
    memory.lend(1 << 30);
    let allocation = memory.begin_free(1 << 30).unwrap();
    assert!(memory.exported(1 << 30, 7).is_none());
    assert_eq!(memory.finish_free(allocation), Freed::Nothing);
    assert!(!memory.take_back(1 << 30) && memory.take_back(1 << 30));
    assert!(memory.has_deferred_frees());
    assert_eq!(left(&mut memory).1.len(), 1);
    assert!(memory.region(1 << 30).is_none() && !memory.has_deferred_frees());
    // An allocation at the same address is another one.
    memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
    assert!(memory.exported(1 << 30, 7).is_none());
    memory.lend(1 << 30);
    assert!(!memory.take_back(1 << 30), "the application still has it");
}

#[test]
fn a_slab_open_elsewhere_can_be_reused() {
    let mut memory = Memory::default();
    memory.add_slab(1 << 30, CONTEXT);
    let free = |memory: &mut Memory| {
        let allocation = memory.begin_free(1 << 30).unwrap();
        assert_eq!(memory.finish_free(allocation), Freed::Nothing);
    };
    assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30));
    memory.lend(1 << 30);
    free(&mut memory);
    assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30));
    assert!(!memory.take_back(1 << 30));
    memory.lend(1 << 30);
    free(&mut memory);
    assert!(memory.take_back(1 << 30));
    assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30), "before the engine came");
    assert!(left(&mut memory).1.is_empty());
    let allocation = memory.begin_free(1 << 30).unwrap();
    assert_eq!(memory.finish_free(allocation), Freed::Region(1 << 30));
}

#[test]
fn a_region_open_elsewhere_outlives_its_context() {
    let mut memory = Memory::default();
    memory.add_slab(1 << 30, CONTEXT);
    memory.take_small(1, CONTEXT).unwrap();
    memory.add_whole(1 << 31, GRANULE, GRANULE, CONTEXT);
    memory.lend(1 << 30);
    let gone: Vec<_> = memory.remove_context(CONTEXT).iter().map(|region| region.base).collect();
    assert_eq!(gone, [1 << 31]);
    assert_eq!((memory.containing(1 << 30), memory.take_small(1, CUcontext::NULL)), (None, None));
    assert!(memory.take_back(1 << 30));
    assert_eq!(left(&mut memory).1.len(), 1);
}

/// The addresses of the chunks that are to be filled in host memory.
fn spilled(memory: &Memory) -> Vec<CUdeviceptr> {
    let chunks = memory.regions().flat_map(|region| &region.chunks);
    chunks.filter(|chunk| chunk.spill).map(|chunk| chunk.address).collect()
}

#[test]
fn only_granules_in_use_are_copied_and_adjacent_ones_in_one_run() {
    assert_eq!(InUse::All.runs_of(CHUNK, InUse::All), [(0, 0, CHUNK)]);
    let in_use = InUse::Granules(0b1011_0110);
    let runs = in_use.runs_of(8 * GRANULE, InUse::All);
    assert_eq!(
        runs,
        [
            (GRANULE, 0, 2 * GRANULE),
            (4 * GRANULE, 2 * GRANULE, 2 * GRANULE),
            (7 * GRANULE, 4 * GRANULE, GRANULE)
        ]
    );
    assert_eq!(runs.iter().map(|(.., length)| length).sum::<u64>(), in_use.bytes(8 * GRANULE));
    assert!(InUse::Granules(0).runs_of(CHUNK, InUse::All).is_empty());
    // Some of them, each where it is in the copy; what is not in use is not there.
    let some = in_use.runs_of(8 * GRANULE, InUse::Granules(0b1000_1100));
    assert_eq!(some, [(2 * GRANULE, GRANULE, GRANULE), (7 * GRANULE, 4 * GRANULE, GRANULE)]);
}

#[test]
fn spilled_granules_are_spread_evenly_over_the_missing_ones() {
    let mut memory = Memory::default();
    let (first, second) = (1 << 40, 1 << 41);
    memory.add_whole(first, CHUNK, CHUNK, CONTEXT);
    memory.add_whole(second, CHUNK, CHUNK, CONTEXT);
    assert_eq!(memory.spill(4), 4);
    // Of 64 missing granules the middles of each sixteen.
    let at = |base, granule| base + granule * GRANULE;
    assert_eq!(spilled(&memory), [at(first, 8), at(first, 24), at(second, 8), at(second, 24)]);
    for base in [first, second] {
        let chunks = &memory.region(base).unwrap().chunks;
        assert_eq!(chunks.iter().map(|chunk| chunk.size).sum::<u64>(), CHUNK);
        assert!(chunks.windows(2).all(|pair| pair[0].address + pair[0].size == pair[1].address));
        assert!(chunks.iter().all(|chunk| !chunk.spill || chunk.size == GRANULE));
    }
    // They are filled first, or the rest would wait for room that cannot be made.
    for address in [at(second, 8), at(second, 24), at(first, 8), at(first, 24)] {
        let (place, _, spill) = memory.next_missing().unwrap();
        assert_eq!((place.address, place.size, spill), (address, GRANULE, true));
    }
    assert!(!memory.next_missing().unwrap().2);
    // If more is asked for than is missing, all missing granules are chosen; each call chooses again.
    assert!(memory.spill(1000) < 64);
}

#[test]
fn the_youngest_memory_is_spilled_at_whatever_address() {
    let mut memory = Memory::default();
    let (parameters, results) = (1 << 41, 1 << 40);
    memory.add_whole(parameters, 8 * CHUNK, 8 * CHUNK, CONTEXT);
    memory.add_whole(results, 8 * CHUNK, 8 * CHUNK, CONTEXT);
    assert_eq!(memory.spill(2), 2);
    // One in 64 granules of the youngest region, although its address is lower.
    assert_eq!(spilled(&memory), [results + 32 * GRANULE, results + 96 * GRANULE]);
    // For more than a 64th of it, older memory is spilled too.
    assert_eq!(memory.spill(8), 8);
    assert_eq!(spilled(&memory).iter().filter(|address| **address >= parameters).count(), 4);
}

#[test]
fn a_reservation_is_never_spilled_and_exportable_objects_only_if_nothing_else_is_left() {
    let mut memory = Memory::default();
    memory.add_reservation(4 * GRANULE, CONTEXT);
    let mut prop = CUmemAllocationProp::pinned(crate::cuda::abi::CUmemLocation::device(0));
    prop.requested_handle_types = crate::cuda::abi::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    memory.add_object(1 << 40, 3 * CHUNK, prop);
    assert_eq!(memory.region(1 << 40).unwrap().chunks.len(), 1, "one handle is handed on");
    assert_eq!(memory.spill(8), 96, "whole: a fill that waits for room that cannot be never ends");
    assert_eq!(spilled(&memory), [1 << 40]);
    assert_eq!((memory.spill(0), spilled(&memory)), (0, Vec::new()));
    memory.add_object(1 << 41, 2 * WHOLE, prop);
    assert_eq!(memory.region(1 << 41).unwrap().chunks.len() as u64, 2 * WHOLE / CHUNK, "too large for that");
    assert_eq!(memory.spill(8), 8);
    assert!(!spilled(&memory).contains(&(1 << 40)));
}

#[test]
fn an_object_exists_while_it_has_a_handle_or_a_view() {
    let mut memory = Memory::default();
    let (object, view) = (1 << 40, 1 << 50);
    memory.add_object(
        object,
        2 * CHUNK,
        CUmemAllocationProp::pinned(crate::cuda::abi::CUmemLocation::device(0)),
    );
    memory.add_view(object, View { address: view, size: 2 * CHUNK, access: Vec::new() });
    let seen = |memory: &Memory, address, size| {
        memory.views_in(address, size).into_iter().map(|(of, view)| (of, view.address)).collect::<Vec<_>>()
    };
    assert_eq!(seen(&memory, view + CHUNK, 1), [(object, view)]);
    assert_eq!(seen(&memory, view + 2 * CHUNK, 1), []);
    assert_eq!(seen(&memory, view - GRANULE, GRANULE), []);
    let places = memory.region(object).unwrap().missing();
    assert_eq!(places[1].views, [(view + CHUNK, Vec::new())]);
    memory.object(object).unwrap().object_mut().unwrap().references = 0;
    assert_eq!(memory.remove_view(view).map(|region| region.base), Some(object));
    assert!(memory.object(object).is_none());
}

/// Evicts and fills `count` regions of one granule as the engine does, with all of its queries in between. Returns how
/// many regions and chunks were visited for each of them.
fn visits_of_a_switch(count: u64) -> u64 {
    let mut memory = Memory::default();
    for index in 0..count {
        let base = (1 << 40) + 2 * index * GRANULE;
        memory.add_whole(base, GRANULE, GRANULE, CONTEXT);
        memory.settle(base, Backing::Device(1));
    }
    memory.visits.set(0);
    for (address, _) in memory.unseen() {
        memory.saw(address, Seen { in_use: InUse::Granules(0), fingerprints: None });
    }
    while let Some(Outgoing { place, .. }) = memory.next_resident(u64::MAX) {
        assert!(memory.is_missing() && memory.overflow() == 0 && memory.deferred() == 0);
        memory.settle(place.address, Backing::Absent);
    }
    memory.spill(0);
    while let Some((place, _, spill)) = memory.next_missing() {
        assert!(!spill && memory.next_evicted(1).is_none() && memory.next_overflow().is_none());
        assert_eq!(memory.take_small(100, CONTEXT), None);
        memory.settle(place.address, Backing::Device(1));
    }
    memory.unsee();
    assert!(!memory.is_missing());
    memory.visits.get() / count
}

#[test]
fn a_switch_visits_each_region_equally_often_however_many_there_are() {
    let few = visits_of_a_switch(100);
    assert!(few < 20, "{few}");
    assert_eq!(visits_of_a_switch(10_000), few);
}

/// After any sequence of changes the index is the same as one built from the chunks.
#[test]
fn the_index_agrees_with_the_chunks() {
    let fresh = |memory: &Memory| {
        let mut index = Index::default();
        for region in memory.regions.values() {
            region.chunks.iter().for_each(|chunk| index.insert(region.base, region.is_reservation(), chunk));
        }
        index
    };
    let pool = HostPool::untouched(64 << 30).unwrap();
    for seed in 1..=40u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut below = |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let (mut memory, mut bases, mut next) = (Memory::default(), Vec::new(), 1u64 << 40);
        for _ in 0..200 {
            match below(16) {
                0..=2 => {
                    let size = (1 + below(70)) * GRANULE;
                    match below(3) {
                        0 => bases.push(memory.add_reservation(size, CONTEXT)),
                        1 => {
                            memory.add_object(
                                next,
                                size,
                                CUmemAllocationProp::pinned(crate::cuda::abi::CUmemLocation::device(0)),
                            );
                            bases.push(next);
                        }
                        _ => {
                            memory.add_whole(next, size, size, CONTEXT);
                            bases.push(next);
                        }
                    }
                    next += 1 << 32;
                }
                3 | 4 => {
                    if let Some((place, backing, spill)) = memory.next_missing() {
                        let backing = match (place.reservation, spill, backing) {
                            (true, ..) => Backing::Booked,
                            (_, true, _) => Backing::Overflow(2),
                            (_, _, Backing::Evicted(copy)) => {
                                memory.settle_kept(place.address, 1, copy);
                                continue;
                            }
                            _ => Backing::Device(1),
                        };
                        memory.settle(place.address, backing);
                    }
                }
                5 => {
                    if let Some(Outgoing { place, seen, .. }) = memory.next_resident(below(40) * GRANULE) {
                        let bytes = seen.in_use.bytes(place.size);
                        let backing = match seen.fingerprints {
                            Some(fingerprints) if bytes > 0 => Backing::Evicted(HostCopy {
                                memory: pool.alloc(bytes).unwrap(),
                                in_use: seen.in_use,
                                fingerprints: Some(fingerprints),
                            }),
                            _ => Backing::Absent,
                        };
                        memory.settle(place.address, backing);
                    }
                }
                6 => {
                    memory.spill(below(20) as Granules);
                }
                7 => {
                    let unseen = memory.unseen();
                    for (address, _) in unseen {
                        let in_use = InUse::Granules(below(3) as u32);
                        let fingerprints = (below(3) > 0).then(|| Arc::new([Fingerprint::of(below(2)); 32]));
                        memory.saw(address, Seen { in_use, fingerprints });
                    }
                }
                8 => memory.unsee(),
                9 => {
                    if let Some((place, _)) = memory.next_overflow() {
                        memory.settle(place.address, Backing::Device(3));
                    }
                }
                10 if !bases.is_empty() => {
                    memory.pin(bases[below(bases.len() as u64) as usize]);
                }
                11 if !bases.is_empty() => {
                    memory.take_back(bases.swap_remove(below(bases.len() as u64) as usize));
                }
                12 => drop(memory.take_kept(below(4) * GRANULE)),
                13 => {
                    let offered: Vec<_> = digests(&memory).into_iter().filter(|_| below(2) > 0).collect();
                    let promised = memory.promise(&offered, below(40) as Granules);
                    let [mut take, mut back] = [Vec::new(), Vec::new()];
                    for (place, address) in promised {
                        [&mut take, &mut back][below(2) as usize].push((place, address));
                    }
                    memory.unpromise(&back.into_iter().map(|(_, address)| address).collect::<Vec<_>>());
                    for (place, address) in take.into_iter().filter(|_| below(2) > 0) {
                        let size = memory.chunk(address).map(|(region, at)| region.chunks[at].size).unwrap();
                        let (place, copy) =
                            memory.take_handed(address, size, offered[place as usize]).unwrap();
                        memory.settle_kept(place.address, 1, copy);
                    }
                }
                14 => {
                    let resident: Vec<_> = memory.index.by_need().collect();
                    if let Some(address) = resident.get(below(20) as usize)
                        && let Some(outgoing) = memory.take_resident(*address)
                    {
                        memory.settle(*address, outgoing.backing);
                    }
                }
                15 => drop(memory.forget_fingerprints()),
                _ => memory.deny_reservations(),
            }
            assert_eq!(memory.index, fresh(&memory), "seed {seed}");
        }
        memory.take_all();
        assert_eq!(memory.index, Index::default());
    }
}

/// A chunk of so many granules on the GPU, with a pool for its copies.
fn one_chunk(granules: u64) -> (Memory, CUdeviceptr, HostPool) {
    let (mut memory, base) = (Memory::default(), 1 << 40);
    memory.add_whole(base, granules * GRANULE, granules * GRANULE, CONTEXT);
    memory.settle(base, Backing::Device(1));
    (memory, base, HostPool::untouched(1 << 30).unwrap())
}

/// A look at a chunk whose granules have these contents; 0 is nothing but zeros.
fn look(contents: &[u64]) -> Seen {
    let mut fingerprints = [Fingerprint::of(0); 32];
    let mut bits = 0;
    for (granule, content) in contents.iter().enumerate() {
        fingerprints[granule] = Fingerprint::of(*content);
        bits |= u32::from(*content != 0) << granule;
    }
    let all = contents.iter().all(|content| *content != 0);
    let in_use = if all { InUse::All } else { InUse::Granules(bits) };
    Seen { in_use, fingerprints: Some(Arc::new(fingerprints)) }
}

/// What the swap engine does with a chunk that is to go out and to come back, if there is a copy to keep.
fn out_and_in(memory: &mut Memory, pool: &HostPool, outgoing: Outgoing) {
    let Outgoing { place, seen: Seen { in_use, fingerprints }, kept, changed, .. } = outgoing;
    let kept = kept.filter(|_| changed.is_some());
    let host = kept.map_or_else(|| pool.alloc(in_use.bytes(place.size)).unwrap(), |kept| kept.memory);
    memory.settle(place.address, Backing::Evicted(HostCopy { memory: host, in_use, fingerprints }));
    memory.unsee();
    let (place, backing, _) = memory.next_missing().unwrap();
    match backing {
        Backing::Evicted(copy) if copy.fingerprints.is_some() => memory.settle_kept(place.address, 1, copy),
        _ => memory.settle(place.address, Backing::Device(1)),
    }
}

#[test]
fn a_copy_that_was_kept_tells_what_has_changed() {
    let (mut memory, base, pool) = one_chunk(4);
    let mut evict = |contents: &[u64]| {
        memory.saw(base, look(contents));
        let need = memory.least_need();
        let outgoing = memory.next_resident(u64::MAX).unwrap();
        let changed = outgoing.changed;
        out_and_in(&mut memory, &pool, outgoing);
        (need / GRANULE, changed)
    };
    assert_eq!(evict(&[1, 2, 3, 4]), (4, None), "there is no copy");
    assert_eq!(evict(&[1, 2, 3, 4]), (0, Some(0)));
    assert_eq!(evict(&[1, 5, 3, 6]), (0, Some(0b1010)), "into the copy");
    assert_eq!(evict(&[1, 5, 3, 6]), (0, Some(0)), "which is a copy of that now");
    assert_eq!(evict(&[1, 5, 0, 6]), (3, None), "other granules are in use");
}

#[test]
fn what_changes_each_time_is_left_alone_for_longer_and_longer() {
    let (mut memory, base, pool) = one_chunk(2);
    let mut content = 0;
    // Whether fingerprints were asked for in each of the evictions, and a copy kept.
    let mut tries = |evictions: usize, changes: bool| -> String {
        (0..evictions)
            .map(|_| {
                content += u64::from(changes);
                let tried = !memory.tried(&memory.unseen()).is_empty();
                let seen = look(&[content + 1, content + 1]);
                memory.saw(base, Seen { fingerprints: seen.fingerprints.filter(|_| tried), ..seen });
                let outgoing = memory.next_resident(u64::MAX).unwrap();
                out_and_in(&mut memory, &pool, outgoing);
                let kept = memory.region(base).unwrap().chunks[0].kept.is_some();
                match (tried, kept) {
                    (true, true) => 'k',
                    (true, false) => 't',
                    (false, false) => '.',
                    (false, true) => panic!("kept for nothing"),
                }
            })
            .collect()
    };
    assert_eq!(tries(18, true), "kt..kt....kt......");
    assert_eq!(tries(4, true), "..kt", "eight of them");
    assert_eq!(tries(18, false), "................kk", "and once it stays the same it is kept again");
    assert_eq!(tries(3, false), "kkk");
    assert_eq!(tries(4, true), "t..k", "from the beginning");
}

#[test]
fn copies_are_given_up_for_other_memory_as_far_as_it_needs() {
    let (mut memory, pool) = (Memory::default(), HostPool::untouched(1 << 30).unwrap());
    for index in 0..3 {
        let base = (1 << 40) + index * (1 << 32);
        memory.add_whole(base, 4 * GRANULE, 4 * GRANULE, CONTEXT);
        let copy = HostCopy {
            memory: pool.alloc(4 * GRANULE).unwrap(),
            in_use: InUse::All,
            fingerprints: Some(Arc::new([Fingerprint::of(1); 32])),
        };
        memory.settle_kept(base, 1, copy);
    }
    assert_eq!(memory.take_kept(5 * GRANULE).len(), 2);
    assert_eq!(memory.take_kept(u64::MAX).len(), 1);
    assert!(memory.take_kept(1).is_empty() && memory.evictable() == 12, "the memory itself stays");
}

#[test]
fn a_copy_that_is_cut_keeps_its_fingerprints_in_their_places() {
    let (mut memory, base, pool) = one_chunk(4);
    let Seen { in_use, fingerprints } = look(&[1, 0, 3, 4]);
    let copy = HostCopy { memory: pool.alloc(3 * GRANULE).unwrap(), in_use, fingerprints };
    memory.settle(base, Backing::Evicted(copy));
    // The granule in the middle becomes a chunk of its own.
    assert_eq!(memory.spill(1), 1);
    let mut pieces = Vec::new();
    while let Some((place, backing, _)) = memory.next_missing() {
        let granules = place.granules();
        let now = look(
            &[[1, 0, 3, 4], [0; 4]].concat()[((place.address - base) / GRANULE) as usize..]
                [..granules as usize],
        );
        let changed = match &backing {
            Backing::Evicted(copy) => copy.changed(&Seen { in_use: copy.in_use, ..now }, granules),
            _ => None,
        };
        pieces.push(((place.address - base) / GRANULE, granules, changed));
        memory.settle(place.address, Backing::Device(1));
    }
    pieces.sort_unstable();
    assert!(pieces.len() > 1, "{pieces:?}");
    for (at, granules, changed) in pieces {
        let used = [1, 0, 3, 4][at as usize..][..granules as usize].iter().any(|content| *content != 0);
        assert_eq!(changed, used.then_some(0), "{granules} granules at {at}");
    }
}

/// What stands for the chunks that are in host memory.
fn digests(memory: &Memory) -> Vec<Digest> {
    let chunk = |address| memory.chunk(address).map(|(region, at)| &region.chunks[at]);
    memory.index.evicted().filter_map(|address| chunk(address)?.digest_of_copy()).collect()
}

/// Chunks of four granules, each with these contents, which have been evicted; and their addresses.
fn evicted(contents: &[[u64; 4]]) -> (Memory, Vec<CUdeviceptr>, HostPool) {
    let (mut memory, pool) = (Memory::default(), HostPool::untouched(1 << 30).unwrap());
    let bases: Vec<_> = (0..contents.len() as u64).map(|index| (1 << 40) + index * (1 << 32)).collect();
    for (base, contents) in bases.iter().zip(contents) {
        memory.add_whole(*base, 4 * GRANULE, 4 * GRANULE, CONTEXT);
        let Seen { in_use, fingerprints } = look(contents);
        let copy = HostCopy { memory: pool.alloc(in_use.bytes(4 * GRANULE)).unwrap(), in_use, fingerprints };
        memory.settle(*base, Backing::Evicted(copy));
    }
    (memory, bases, pool)
}

fn digest(contents: &[u64; 4]) -> Digest {
    look(contents).digest(4 * GRANULE).unwrap()
}

#[test]
fn chunks_with_the_same_contents_have_the_same_digest_and_no_others() {
    let of = |contents: &[u64]| look(contents).digest(contents.len() as u64 * GRANULE);
    assert_eq!(of(&[1, 2, 0, 4]), of(&[1, 2, 0, 4]));
    let all = [
        &[1, 2, 0, 4][..],
        &[1, 2, 0, 5],
        &[2, 1, 0, 4],
        &[1, 2, 4, 0],
        &[1, 2, 0],
        &[1, 2, 3, 4],
        &[1, 2, 0, 4, 0],
    ];
    let different: BTreeSet<_> = all.into_iter().map(|contents| of(contents).unwrap()).collect();
    assert_eq!(different.len(), all.len());
    assert_eq!(of(&[0, 0]), None, "nothing but zeros is no copy");
    assert_eq!(Seen { in_use: InUse::All, fingerprints: None }.digest(GRANULE), None);
    let whole = Seen { in_use: InUse::Granules(15), ..look(&[1, 2, 3, 4]) };
    assert_eq!(whole.digest(4 * GRANULE), of(&[1, 2, 3, 4]), "all granules, however that is said");
}

#[test]
fn of_what_is_offered_that_is_promised_which_lies_in_host_memory_and_it_comes_last() {
    let contents = [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [9, 0, 9, 0]];
    let (mut memory, bases, _pool) = evicted(&contents);
    let offered =
        [[5, 6, 7, 8], [4, 4, 4, 4], [9, 0, 9, 0], [5, 6, 7, 8], [5, 6, 7, 8]].map(|one| digest(&one));
    let promised = memory.promise(&offered, 100);
    assert_eq!(
        promised.iter().map(|(place, _)| *place).collect::<Vec<_>>(),
        [0, 2, 3],
        "as often as it lacks it"
    );
    let addresses: BTreeSet<_> = promised.iter().map(|(_, address)| *address).collect();
    assert_eq!(addresses, bases[1..].iter().copied().collect());
    assert!(memory.promise(&offered, 100).is_empty(), "not twice");
    assert_eq!(memory.next_evicted(100).unwrap().0.address, bases[0], "nor is it brought in ahead");
    assert_eq!(memory.next_on_gpu(), Some((4, true)), "nothing else is left");
    memory.unpromise(&[bases[2]]);
    assert_eq!(memory.next_on_gpu(), Some((4, false)));
    assert_eq!(memory.next_missing().unwrap().0.address, bases[2]);
    assert_eq!(memory.promised().len(), 2);
}

#[test]
fn no_more_is_promised_than_is_wanted_and_the_last_chunk_whole() {
    let contents = [[1; 4], [2; 4], [3; 4]];
    for (granules, chunks) in [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)] {
        let (mut memory, ..) = evicted(&contents);
        assert_eq!(memory.promise(&contents.map(|one| digest(&one)), granules).len(), chunks, "{granules}");
    }
}

#[test]
fn memory_from_a_replica_is_for_the_chunk_that_it_was_promised_for() {
    let (mut memory, bases, _pool) = evicted(&[[1, 2, 3, 4], [5, 6, 7, 8]]);
    let size = 4 * GRANULE;
    let right = digest(&[1, 2, 3, 4]);
    assert!(memory.take_handed(bases[0], size, digest(&[5, 6, 7, 8])).is_none(), "other contents");
    assert!(memory.take_handed(bases[0], 2 * size, right).is_none(), "another size");
    assert!(memory.take_handed(bases[0] + GRANULE, size, right).is_none(), "another address");
    assert!(memory.take_handed(7, size, right).is_none(), "none at all");
    let (place, copy) = memory.take_handed(bases[0], size, right).unwrap();
    assert!(memory.take_handed(bases[0], size, right).is_none(), "it is being moved");
    memory.settle_kept(place.address, 1, copy);
    assert!(memory.take_handed(bases[0], size, right).is_none(), "it is there");
    // What has come holds what the copy holds, or is taken away again.
    let found = |contents: &[u64]| *look(contents).fingerprints.unwrap();
    assert!(memory.take_wrong(bases[0], Some((0b1111, &found(&[1, 2, 3, 4])))).is_none());
    let (place, handle, copy) = memory.take_wrong(bases[0], Some((0b1111, &found(&[1, 2, 3, 5])))).unwrap();
    assert_eq!((place.address, handle), (bases[0], 1));
    memory.settle_kept(bases[0], 2, copy);
    let (_, _, copy) = memory.take_wrong(bases[0], None).expect("nor is it believed unseen");
    // The copy has no place for the last granule, which is zero.
    memory.settle_kept(bases[0], 3, HostCopy { in_use: InUse::Granules(0b0111), ..copy });
    assert!(memory.take_wrong(bases[0], Some((0b0011, &found(&[1, 2, 3, 4])))).is_none());
    assert!(memory.take_wrong(bases[0], Some((0b1011, &found(&[1, 2, 3, 4])))).is_some());
}

#[test]
fn memory_that_the_application_maps_itself_or_that_others_have_open_does_not_change_hands() {
    let (mut memory, bases, pool) = evicted(&[[1, 2, 3, 4], [5, 6, 7, 8]]);
    let object = 1 << 50;
    memory.add_object(
        object,
        4 * GRANULE,
        CUmemAllocationProp::pinned(crate::cuda::abi::CUmemLocation::device(0)),
    );
    let Seen { in_use, fingerprints } = look(&[9, 9, 9, 9]);
    let copy = HostCopy { memory: pool.alloc(4 * GRANULE).unwrap(), in_use, fingerprints };
    memory.settle(object, Backing::Evicted(copy));
    memory.lend(bases[0]);
    let offered = [[1, 2, 3, 4], [5, 6, 7, 8], [9; 4]].map(|one| digest(&one));
    assert_eq!(memory.promise(&offered, 100), [(1, bases[1])]);
    for address in [object, bases[0], bases[1]] {
        memory.settle(address, Backing::Device(1));
        memory.saw(address, look(&[1, 2, 3, 4]));
    }
    assert_eq!(memory.offers(10), [(bases[1], digest(&[1, 2, 3, 4]))]);
    assert!(memory.offers(0).is_empty());
}

#[test]
fn after_another_key_nothing_is_the_same_as_before() {
    let (mut memory, bases, pool) = evicted(&[[1, 2, 3, 4], [5, 6, 7, 8]]);
    let (place, backing, _) = memory.next_missing().unwrap();
    let Backing::Evicted(copy) = backing else { panic!("it was evicted") };
    memory.settle_kept(place.address, 1, copy);
    memory.saw(place.address, look(&[5, 6, 7, 8]));
    memory.forget_fingerprints().into_iter().for_each(|copy| pool.free(copy.memory));
    assert!(memory.offers(10).is_empty() && digests(&memory).is_empty());
    let outgoing = memory.next_resident(u64::MAX).unwrap();
    assert!(outgoing.kept.is_none() && outgoing.changed.is_none() && outgoing.place.address == bases[1]);
}
