//! Memory that the application maps itself, beside a competitor that takes the GPU: the bytes are right at every
//! address, whatever was mapped, unmapped and released while they were away, and the books come back to zero.

use nvshare_e2e::application::books::{Competitor, balances, books, client, come_to};
use nvshare_e2e::application::vmm::{READ, READ_WRITE};
use nvshare_e2e::application::{Application, INVALID_VALUE, MIB, SUCCESS, node, quick_gpu};
use nvshare_test_support::Dice;
use nvshare_tools::node::{Node, SimulatedGpu};

const OUT_OF_MEMORY: i32 = 2;
const ILLEGAL_ADDRESS: i32 = 700;
const NOT_SUPPORTED: i32 = 801;

/// The three of every test here: the machine's arbiter, the application, and who takes the GPU from it.
fn trio(gpu: &SimulatedGpu) -> (Node, Application, Competitor) {
    let node = node(gpu);
    let (application, other) = (Application::ready(&node), Competitor::start(&node));
    (node, application, other)
}

/// Nothing of it is left, here or there.
fn over(node: &Node, application: Application, other: Competitor) {
    come_to(node, &application, (0, 0, 0));
    application.ends_well();
    other.ends();
    balances(node);
}

#[test]
fn one_object_is_the_same_memory_at_each_of_its_addresses() {
    const SIZE: u64 = 24 * MIB;
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    let (object, range) = (one.object(SIZE), one.reserve(4 * SIZE));
    let at = |place: u64| range + place % 4 * SIZE;
    one.map(at(0), SIZE, object);
    one.map(at(1), SIZE, object);
    assert_eq!(books(&node, &one).0, SIZE, "it is counted once, wherever it is mapped");
    one.writes(at(0), SIZE, 1);
    // It is mapped at two of four places, and moves on by one place in each round, in and out of the GPU.
    for round in 0..6 {
        other.takes_all(&node, &one);
        one.unmap(at(round), SIZE);
        assert_eq!(books(&node, &one), (SIZE, 0, 0), "unmapping needs no turn");
        one.map(at(round + 2), SIZE, object);
        assert_eq!(books(&node, &one), (SIZE, 0, 0), "nor does mapping");
        for place in [round + 1, round + 2] {
            one.sees(at(place), SIZE, round + 1);
        }
        one.writes(at(round + 2), SIZE, round + 2);
        one.sees(at(round + 1), SIZE, round + 2);
        other.takes_all(&node, &one);
        one.sees(at(round + 1), SIZE, round + 2);
        // The same while it is in.
        one.unmap(at(round + 1), SIZE);
        one.map(at(round + 1), SIZE, object);
        one.sees(at(round + 1), SIZE, round + 2);
    }
    assert!(client(&node, &one).bytes_out >= 11 * SIZE, "it was out in each round");
    one.unmap(at(6), SIZE);
    one.unmap(at(7), SIZE);
    assert_eq!(books(&node, &one), (SIZE, SIZE, 0), "the handle holds it");
    one.release(object);
    one.does(&format!("unreserve {range} {}", 4 * SIZE));
    over(&node, one, other);
}

#[test]
fn memory_lives_as_long_as_its_handles_and_its_mappings() {
    const SIZE: u64 = 8 * MIB;
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    // The handle goes first, in or out; and what is never mapped goes with its handle.
    let range = one.reserve(4 * SIZE);
    let objects = [(); 3].map(|()| one.object(SIZE));
    for (place, object) in (0..).zip(&objects[..2]) {
        one.map(range + place * SIZE, SIZE, *object);
        one.writes(range + place * SIZE, SIZE, 10 + place);
    }
    one.release(objects[0]);
    other.takes_all(&node, &one);
    one.release(objects[1]);
    one.release(objects[2]);
    assert_eq!(books(&node, &one), (2 * SIZE, 0, 0));
    for object in objects {
        assert_eq!(one.call(&format!("release-object {object}")), INVALID_VALUE, "it is released");
        assert_eq!(one.call(&format!("map {} {SIZE} 0 {object}", range + 2 * SIZE)), INVALID_VALUE);
    }
    one.sees(range, SIZE, 10);
    one.sees(range + SIZE, SIZE, 11);
    // Who asks an address for its handle has another reference to the memory there.
    other.takes_all(&node, &one);
    let again = one.number(&format!("retain-object {}", range + SIZE + 5000));
    assert_eq!(one.ask(&format!("object-prop {again}")), (SUCCESS, "0 0".into()));
    one.unmap(range, 2 * SIZE);
    assert_eq!(books(&node, &one), (SIZE, 0, 0), "one has nothing that holds it, the other a handle");
    one.map(range + 3 * SIZE, SIZE, again);
    one.sees(range + 3 * SIZE, SIZE, 11);
    one.unmap(range + 3 * SIZE, SIZE);
    one.release(again);
    over(&node, one, other);
}

/// PyTorch's expandable segments: a large range, into which pieces are mapped as they are needed, and given back
/// from the middle.
#[test]
fn a_segment_grows_shrinks_in_the_middle_and_grows_again() {
    const PIECE: u64 = 4 * MIB;
    const PIECES: u64 = 10;
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    // Far more addresses than there is memory.
    let segment = one.reserve(1 << 34);
    let piece = |index: u64| segment + index * PIECE;
    let mut objects = Vec::new();
    for index in 0..PIECES {
        let object = one.object(PIECE);
        one.does(&format!("map {} {PIECE} 0 {object}", piece(index)));
        objects.push(object);
    }
    // Rights are given to the whole run at once, and the first one works on it as on one allocation.
    one.allow(segment, PIECES * PIECE, READ_WRITE);
    one.sees_zeros(segment, PIECES * PIECE);
    one.writes(segment, PIECES * PIECE, 77);
    other.takes_all(&node, &one);
    one.sees(segment, PIECES * PIECE, 77);
    let seed = |index, round: u64| 1000 * round + index;
    for index in 0..PIECES {
        one.writes(piece(index), PIECE, seed(index, 0));
    }
    for round in 1..5 {
        let middle = 3..3 + round;
        if round % 2 == 0 {
            other.takes_all(&node, &one);
        }
        one.unmap(piece(middle.start), round * PIECE);
        for index in middle.clone() {
            one.release(objects[index as usize]);
        }
        assert_eq!(books(&node, &one).0, (PIECES - round) * PIECE);
        if round % 2 == 1 {
            other.takes_all(&node, &one);
        }
        for index in middle.clone() {
            objects[index as usize] = one.object(PIECE);
            one.map(piece(index), PIECE, objects[index as usize]);
        }
        one.sees_zeros(piece(middle.start), round * PIECE);
        for index in middle {
            one.writes(piece(index), PIECE, seed(index, round));
        }
        other.takes_all(&node, &one);
        for index in 0..PIECES {
            // The last round in which it was in the middle.
            let last = if (3..3 + round).contains(&index) { round } else { 0 };
            one.sees(piece(index), PIECE, seed(index, last));
        }
    }
    one.unmap(segment, PIECES * PIECE);
    objects.into_iter().for_each(|object| one.release(object));
    one.does(&format!("unreserve {segment} {}", 1u64 << 34));
    over(&node, one, other);
}

/// More than a chunk moves in pieces: it can be mapped whole, or up to where a piece ends.
#[test]
fn a_large_object_moves_in_pieces_and_is_one_to_the_application() {
    const SIZE: u64 = 150 * MIB;
    const PART: u64 = 64 * MIB;
    const RANGE_SIZE: u32 = 12;
    let gpu = quick_gpu();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "200MiB"].map(str::to_owned)).unwrap();
    let (mut one, mut other) = (Application::ready(&node), Competitor::start(&node));
    let (object, range) = (one.object(SIZE), one.reserve(2 * SIZE));
    one.map(range, SIZE, object);
    one.writes(range, SIZE, 5);
    let part = range + SIZE;
    for out in [false, true] {
        if out {
            other.takes_all(&node, &one);
        }
        one.map(part, PART, object);
        assert_eq!(one.call(&format!("map {} {MIB} 0 {object}", part + PART)), NOT_SUPPORTED);
        one.sees(part, PART, 5);
        other.takes_all(&node, &one);
        let inside = range + 100 * MIB;
        assert_eq!(one.ask(&format!("range {inside}")), (SUCCESS, format!("{range} {SIZE}")));
        // The driver's answer is what was reserved, wherever the memory is.
        let reserved = (2 * SIZE).to_string();
        assert_eq!(one.ask(&format!("attribute {part} {RANGE_SIZE}")), (SUCCESS, reserved));
        one.sees(range, SIZE, 5);
        one.unmap(part, PART);
    }
    one.unmap(range, SIZE);
    one.release(object);
    over(&node, one, other);
}

#[test]
fn rights_are_what_was_given_to_each_mapping_wherever_the_memory_was() {
    const SIZE: u64 = 8 * MIB;
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    let (object, range) = (one.object(SIZE), one.reserve(3 * SIZE));
    let [written, read, none] = [0, 1, 2].map(|place| range + place * SIZE);
    one.map(written, SIZE, object);
    one.writes(written, SIZE, 3);
    other.takes_all(&node, &one);
    one.does(&format!("map {read} {SIZE} 0 {object}"));
    one.allow(read, SIZE, READ);
    one.does(&format!("map {none} {SIZE} 0 {object}"));
    for round in 0..3 {
        one.sees(read, SIZE, 3 + round);
        one.writes(written, SIZE, 4 + round);
        for (address, rights) in [(written, READ_WRITE), (read, READ), (none, 0)] {
            assert_eq!(one.ask(&format!("allowed {address} 0")), (SUCCESS, rights.to_string()));
        }
        other.takes_all(&node, &one);
    }
    // Taken away while it is out, and given.
    one.allow(written, SIZE, 0);
    one.allow(none, SIZE, READ_WRITE);
    one.writes(none, SIZE, 40);
    one.sees(read, SIZE, 40);
    assert_eq!(one.ask(&format!("allowed {written} 0")), (SUCCESS, "0".into()));
    assert_eq!(one.call(&format!("write {read} {SIZE} 41")), ILLEGAL_ADDRESS);
    drop(one);
    other.ends();
    balances(&node);
}

#[test]
fn what_is_wrong_is_refused_with_the_drivers_error_and_changes_nothing() {
    const SIZE: u64 = 8 * MIB;
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    let (object, range) = (one.object(SIZE), one.reserve(4 * SIZE));
    one.map(range, SIZE, object);
    one.writes(range, SIZE, 6);
    let before = books(&node, &one).0;
    let (free, stranger) = (range + 2 * SIZE, one.alloc(2 * MIB));
    let shared = one.number(&format!("object {} 0 1", 2 * MIB));
    let wrong = [
        (INVALID_VALUE, format!("map {} {SIZE} 0 {object}", range + 100 * SIZE)),
        (NOT_SUPPORTED, format!("map {} {SIZE} 0 {object}", range + 3 * SIZE + MIB)),
        (INVALID_VALUE, format!("map {} {SIZE} 0 {object}", range + 3 * SIZE + 2 * MIB)),
        (INVALID_VALUE, format!("unmap {} {}", range - 2 * MIB, SIZE + 2 * MIB)),
        (INVALID_VALUE, format!("unmap {range} {}", 4 * SIZE + 2 * MIB)),
        (INVALID_VALUE, format!("unmap {range} {}", SIZE + MIB)),
        (INVALID_VALUE, format!("unmap {} {}", range + MIB, 2 * SIZE)),
        (INVALID_VALUE, format!("allow {range} {} 0 1", 2 * SIZE)),
        (INVALID_VALUE, format!("allow {range} {SIZE} 0 2")),
        (INVALID_VALUE, format!("allow {range} {SIZE} 7 3")),
        (INVALID_VALUE, format!("export-object-wrongly {shared} 0")),
        (INVALID_VALUE, format!("export-object-wrongly {shared} 1")),
        (INVALID_VALUE, "object 0 0 0".into()),
        (INVALID_VALUE, format!("object {} 0 0", MIB + 1)),
        (OUT_OF_MEMORY, format!("object {} 0 0", 64 * MIB)),
        (INVALID_VALUE, format!("map {free} 0 0 {object}")),
        (NOT_SUPPORTED, format!("map {free} {} 0 {object}", 2 * SIZE)),
        (INVALID_VALUE, format!("map {range} {SIZE} 0 {object}")),
        (INVALID_VALUE, format!("map {} {SIZE} 0 {object}", range + SIZE / 2)),
        (NOT_SUPPORTED, format!("map {free} {} {} {object}", SIZE / 2, SIZE / 2)),
        (NOT_SUPPORTED, format!("map {free} {} 0 {object}", SIZE / 2)),
        (INVALID_VALUE, format!("map {free} {SIZE} 0 12345")),
        (INVALID_VALUE, format!("unmap {range} {}", SIZE / 2)),
        (INVALID_VALUE, format!("unmap {} {SIZE}", range + SIZE / 2)),
        (INVALID_VALUE, format!("allow {range} {} 0 3", SIZE / 2)),
        (INVALID_VALUE, format!("allow {free} {SIZE} 0 3")),
        (INVALID_VALUE, "release-object 12345".into()),
        (INVALID_VALUE, format!("retain-object {free}")),
        (INVALID_VALUE, format!("retain-object {stranger}")),
        (INVALID_VALUE, "object-prop 12345".into()),
        (INVALID_VALUE, format!("unreserve {range} {}", 4 * SIZE)),
    ];
    for round in 0..2 {
        for (code, call) in &wrong {
            if round == 1 {
                other.takes_all(&node, &one);
            }
            assert_eq!(one.call(call), *code, "{call}, round {round}");
        }
        one.sees(range, SIZE, 6);
        assert_eq!(one.ask(&format!("allowed {range} 0")), (SUCCESS, READ_WRITE.to_string()));
        let (demand, _, fixed) = books(&node, &one);
        assert_eq!((demand, fixed), (before + 4 * MIB, 0));
    }
    assert_eq!(one.call(&format!("free {range}")), INVALID_VALUE, "it was not allocated");
    one.unmap(range, SIZE);
    one.release(object);
    assert_eq!(one.call(&format!("release-object {object}")), INVALID_VALUE);
    one.release(shared);
    one.does(&format!("unreserve {range} {}", 4 * SIZE));
    one.does(&format!("free {stranger}"));
    over(&node, one, other);
}

/// A range may hold memory of the driver's own too, imported from another process for example. What a driver does with a
/// range that has holes was seen on a GPU.
#[test]
fn a_range_with_holes_is_unmapped_and_gets_rights_as_a_driver_does_it() {
    const SIZE: u64 = 4 * MIB;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Application::ready(&node));
    let large = other.alloc(52 * MIB);
    let (object, given) = (one.object(SIZE), one.number(&format!("object {SIZE} 0 1")));
    let descriptor = one.number(&format!("export-object {given}"));
    let imported = one.number(&format!("import-object {descriptor}"));
    let range = one.reserve(6 * SIZE);
    for out in [false, true] {
        one.map(range, SIZE, object);
        one.map(range + SIZE, SIZE, imported);
        one.map(range + 3 * SIZE, SIZE, object);
        one.map(range + 4 * SIZE, SIZE, imported);
        one.writes(range, SIZE, 1);
        one.writes(range + SIZE, SIZE, 2);
        let take = |other: &mut Application| {
            if out {
                // Ours goes out; what was imported stays.
                other.writes(large, 52 * MIB, 3);
            }
        };
        let rights = |one: &mut Application| {
            [0, 1, 2, 3, 4].map(|at| one.ask(&format!("allowed {} 0", range + at * SIZE)))
        };
        let given = |[first, second]: [u32; 2]| {
            let rights = |flags: u32| (SUCCESS, flags.to_string());
            let hole = (INVALID_VALUE, "0".into());
            [rights(first), rights(first), hole, rights(second), rights(second)]
        };
        take(&mut other);
        for refused in [
            // It ends in a hole, or begins in one, or in the middle of a mapping.
            format!("allow {range} {} 0 1", 3 * SIZE),
            format!("allow {range} {} 0 1", 6 * SIZE),
            format!("allow {} {} 0 1", range + 2 * SIZE, 3 * SIZE),
            format!("allow {range} {} 0 1", 5 * SIZE - 2 * MIB),
            format!("allow {} {} 0 1", range + 2 * MIB, 5 * SIZE - 2 * MIB),
            // The first or the last mapping is cut, one of the driver's own too; the range is longer than what is reserved.
            format!("unmap {} {}", range + 2 * MIB, 4 * SIZE - 2 * MIB),
            format!("unmap {range} {}", 3 * SIZE + 2 * MIB),
            format!("unmap {range} {}", 5 * SIZE - 2 * MIB),
            format!("unmap {} {}", range + SIZE + 2 * MIB, 3 * SIZE - 2 * MIB),
            format!("unmap {range} {}", 7 * SIZE),
            format!("unmap {range} {}", 6 * SIZE - MIB),
        ] {
            assert_eq!(one.call(&refused), INVALID_VALUE, "{refused}");
        }
        assert_eq!(rights(&mut one), given([READ_WRITE, READ_WRITE]));
        one.allow(range, 5 * SIZE, READ);
        assert_eq!(rights(&mut one), given([READ, READ_WRITE]), "rights are given up to the hole");
        one.sees(range, SIZE, 1);
        one.sees(range + SIZE, SIZE, 2);
        one.writes(range + 3 * SIZE, SIZE, 1);
        take(&mut other);
        one.does(&format!("unmap {} {}", range + SIZE, 3 * SIZE));
        one.sees(range, SIZE, 1);
        one.sees(range + 4 * SIZE, SIZE, 2);
        take(&mut other);
        one.does(&format!("unmap {range} {}", 6 * SIZE));
        one.does(&format!("unmap {range} {}", 6 * SIZE));
        assert_eq!(one.ask(&format!("allowed {range} 0")), (INVALID_VALUE, "0".into()));
    }
    one.does(&format!("unreserve {range} {}", 6 * SIZE));
    for object in [object, given, imported] {
        one.release(object);
    }
    come_to(&node, &one, (0, 0, 0));
    one.end();
    other.end();
    balances(&node);
}

/// A descriptor of it may be anywhere, so it stays where it is, and the books say so.
#[test]
fn what_is_handed_on_stays_on_the_gpu() {
    const SIZE: u64 = 8 * MIB;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Application::ready(&node));
    let (shared, own) = (one.number(&format!("object {SIZE} 0 1")), one.object(SIZE));
    let range = one.reserve(3 * SIZE);
    one.map(range, SIZE, shared);
    one.map(range + SIZE, SIZE, own);
    one.writes(range, SIZE, 1);
    one.writes(range + SIZE, SIZE, 2);
    assert_eq!(one.ask(&format!("object-prop {shared}")), (SUCCESS, "0 1".into()));
    assert_eq!(one.call(&format!("export-object {own}")), INVALID_VALUE, "it was not made to be handed on");
    let large = other.alloc(50 * MIB);
    // Handed on while it is out: then it has to come first.
    other.writes(large, 50 * MIB, 3);
    let descriptor = one.number(&format!("export-object {shared}"));
    let imported = one.number(&format!("import-object {descriptor}"));
    for round in 0..3 {
        other.writes(large, 50 * MIB, 3 + round);
        assert_eq!(books(&node, &one), (2 * SIZE, SIZE, SIZE));
        other.sees(large, 50 * MIB, 3 + round);
        one.sees(range, SIZE, 1);
        one.sees(range + SIZE, SIZE, 2);
    }
    // What comes in by the descriptor is the same memory.
    one.map(range + 2 * SIZE, SIZE, imported);
    one.writes(range + 2 * SIZE, SIZE, 8);
    one.sees(range, SIZE, 8);
    one.unmap(range, 3 * SIZE);
    for object in [shared, own, imported] {
        one.release(object);
    }
    come_to(&node, &one, (0, 0, 0));
    one.end();
    other.end();
    balances(&node);
}

/// What the application knows of an object.
struct Known {
    handle: u64,
    released: bool,
    /// Its places in the range.
    places: Vec<u64>,
    seed: u64,
}

/// Anything in any order, with the memory in or out: after each step every byte is where it should be.
#[test]
fn any_order_of_calls_leaves_the_bytes_and_the_books_right() {
    const SIZE: u64 = 4 * MIB;
    const PLACES: u64 = 12;
    const STEPS: u64 = 400;
    let mut dice = Dice::from_environment(0x3a9);
    let gpu = quick_gpu();
    let (node, mut one, mut other) = trio(&gpu);
    let range = one.reserve(PLACES * SIZE);
    let at = |place: u64| range + place * SIZE;
    let mut objects: Vec<Known> = Vec::new();
    let mut steps = [0; 6];
    for step in 1..=STEPS {
        let place = dice.below(PLACES);
        let free = objects.iter().all(|object| !object.places.contains(&place));
        let some = dice.below(objects.len().max(1) as u64) as usize;
        let (did, few) = (dice.below(6) as usize, objects.len() < 8);
        match (did, objects.get_mut(some)) {
            (0, _) if few => {
                let handle = one.object(SIZE);
                objects.push(Known { handle, released: false, places: Vec::new(), seed: 0 });
            }
            (1, Some(object)) if free && !object.released => {
                one.map(at(place), SIZE, object.handle);
                object.places.push(place);
            }
            (2, Some(object)) if !object.places.is_empty() => {
                one.unmap(at(object.places.swap_remove(0)), SIZE);
            }
            (3, Some(object)) if !object.released => {
                one.release(object.handle);
                object.released = true;
            }
            (4, Some(object)) if !object.places.is_empty() => {
                one.writes(at(object.places[0]), SIZE, step);
                object.seed = step;
            }
            (5, _) => other.takes_all(&node, &one),
            _ => continue,
        }
        steps[did] += 1;
        objects.retain(|object| !object.released || !object.places.is_empty());
        assert_eq!(books(&node, &one).0, objects.len() as u64 * SIZE, "step {step}");
        // Not all at every step, or nothing would ever stay out for two.
        if let Some(object) = objects.get(dice.below(16) as usize) {
            for place in &object.places {
                match object.seed {
                    0 => one.sees_zeros(at(*place), SIZE),
                    seed => one.sees(at(*place), SIZE, seed),
                }
            }
        }
    }
    println!("created, mapped, unmapped, released, written, out: {steps:?}");
    assert!(steps.iter().all(|count| *count > 0), "some step was never made: {steps:?}");
    for object in objects {
        for place in object.places {
            one.unmap(at(place), SIZE);
        }
        if !object.released {
            one.release(object.handle);
        }
    }
    over(&node, one, other);
}
