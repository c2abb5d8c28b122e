//! What has not changed while it was on the GPU is not copied again (NVSHARE_KEEP_COPIES).

use nvshare_e2e::application::books::{Competitor, balances, client};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node, quick_gpu};
use nvshare_test_support::Dice;
use nvshare_tools::node::Node;

const GRANULE: u64 = 2 * MIB;

/// One chunk.
const BYTES: u64 = 22 * GRANULE;

/// An application that keeps copies in this way, with memory that holds the pattern of `seed`.
fn keeping(node: &Node, way: &str, seed: u64) -> (Application, u64) {
    let mut application = Application::start(node.environment(), &[("NVSHARE_KEEP_COPIES", way)]);
    application.does("init");
    application.does("create 0");
    let address = application.alloc(BYTES);
    application.writes(address, BYTES, seed);
    (application, address)
}

/// Bytes that have gone out, that were not copied because they had not changed, and that have come in.
fn moved(node: &Node, application: &Application) -> [u64; 3] {
    let client = client(node, application);
    [client.bytes_out, client.bytes_unchanged, client.bytes_in]
}

#[test]
fn what_is_only_read_goes_out_once() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut reader, data) = keeping(&node, "on", 1);
    let mut other = Competitor::start(&node);
    for turn in 0..5 {
        other.takes_all(&node, &reader);
        assert_eq!(moved(&node, &reader), [BYTES, turn * BYTES, turn * BYTES], "after {turn} turns");
        reader.sees(data, BYTES, 1);
    }
    other.ends();
    reader.ends_well();
    balances(&node);
}

#[test]
fn of_what_is_written_only_the_granules_go_out_that_were_written() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut writer, data) = keeping(&node, "on", 1);
    let mut other = Competitor::start(&node);
    other.takes_all(&node, &writer);
    // One word at the end of a granule, one that spans two, and the very last one.
    for (places, granules) in
        [(vec![GRANULE - 8], 1), (vec![5 * GRANULE - 8, 5 * GRANULE], 2), (vec![BYTES - 8], 1)]
    {
        let before = moved(&node, &writer);
        for place in &places {
            writer.writes(data + place, 8, 77);
        }
        other.takes_all(&node, &writer);
        let expected = [granules * GRANULE, BYTES - granules * GRANULE, BYTES];
        let after = moved(&node, &writer);
        assert_eq!([0, 1, 2].map(|at| after[at] - before[at]), expected, "{places:?}");
        for place in places {
            writer.sees(data + place, 8, 77);
        }
        // What is on either side is as it was.
        writer.writes(data, BYTES, 1);
        writer.sees(data, BYTES, 1);
        other.takes_all(&node, &writer);
        writer.sees(data, BYTES, 1);
        other.takes_all(&node, &writer);
    }
    other.ends();
    writer.ends_well();
    balances(&node);
}

/// Small chunks, of which some change altogether and most do not.
#[test]
fn of_many_chunks_those_leave_with_a_copy_that_have_changed() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut writer, first) = keeping(&node, "on", 1);
    writer.does(&format!("free {first}"));
    let chunks: Vec<u64> = (0..20).map(|_| writer.alloc(GRANULE)).collect();
    let mut seeds: Vec<u64> = (1..=20).collect();
    for (chunk, seed) in chunks.iter().zip(&seeds) {
        writer.writes(*chunk, GRANULE, *seed);
    }
    let mut other = Competitor::start(&node);
    other.takes_all(&node, &writer);
    // A chunk that has changed altogether goes without fingerprints for its next two evictions, so it is copied then, and once more.
    for (changed, copied) in [(vec![], 0), (vec![3], 1), (vec![18], 2), (vec![], 2), (vec![0, 19], 4)] {
        let before = moved(&node, &writer);
        for at in &changed {
            seeds[*at] += 100;
            writer.writes(chunks[*at], GRANULE, seeds[*at]);
        }
        for (chunk, seed) in chunks.iter().zip(&seeds) {
            writer.sees(*chunk, GRANULE, *seed);
        }
        other.takes_all(&node, &writer);
        let after = moved(&node, &writer);
        let (out, all) = (copied * GRANULE, 20 * GRANULE);
        assert_eq!([0, 1, 2].map(|at| after[at] - before[at]), [out, all - out, all], "{changed:?}");
    }
    for (chunk, seed) in chunks.iter().zip(&seeds) {
        writer.sees(*chunk, GRANULE, *seed);
    }
    other.ends();
    writer.ends_well();
    balances(&node);
}

#[test]
fn what_changes_each_time_is_copied_each_time_and_soon_keeps_no_copies() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut trainer, data) = keeping(&node, "on", 1);
    let mut other = Competitor::start(&node);
    for turn in 1..8 {
        other.takes_all(&node, &trainer);
        assert_eq!(moved(&node, &trainer), [turn * BYTES, 0, (turn - 1) * BYTES]);
        trainer.sees(data, BYTES, turn);
        trainer.writes(data, BYTES, turn + 1);
    }
    other.ends();
    trainer.ends_well();
    balances(&node);
}

/// Memory whose contents a test knows: the seeds of its pieces, and a piece that is zero has none.
struct Known {
    base: u64,
    seeds: Vec<Option<u64>>,
}

/// Less than a granule, and no whole part of one.
const PIECE: u64 = 3 * MIB / 2 - 8;

impl Known {
    fn changes(&mut self, application: &mut Application, dice: &mut Dice) {
        for _ in 0..dice.below(4) {
            let piece = dice.below(self.seeds.len() as u64) as usize;
            let at = self.base + piece as u64 * PIECE;
            // Zeros seldom: which granules are in use must mostly stay the same, or nothing is compared.
            self.seeds[piece] = match dice.below(10) {
                0 => {
                    application.does(&format!("set {at} {PIECE} 0 0"));
                    None
                }
                _ => {
                    let seed = dice.below(1 << 30);
                    application.writes(at, PIECE, seed);
                    Some(seed)
                }
            };
        }
    }

    #[track_caller]
    fn is_right(&self, application: &mut Application) {
        for (piece, seed) in self.seeds.iter().enumerate() {
            let at = self.base + piece as u64 * PIECE;
            match seed {
                Some(seed) => application.sees(at, PIECE, *seed),
                None => {
                    assert_eq!(application.ask(&format!("holds {at} {PIECE} 0")), (SUCCESS, "right".into()))
                }
            }
        }
    }
}

/// Some granules change, some become zero, and some are used again: all data is right, and in the mode that compares, no fingerprint
/// has lied.
fn whatever_changes_is_right(way: &str) {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut dice = Dice::from_environment(3);
    let (mut application, first) = keeping(&node, way, 1);
    application.does(&format!("free {first}"));
    let base = application.alloc(BYTES);
    application.does(&format!("set {base} {BYTES} 0 0"));
    let mut known = Known { base, seeds: vec![None; (BYTES / PIECE) as usize] };
    for piece in 0..known.seeds.len() {
        application.writes(base + piece as u64 * PIECE, PIECE, 7);
        known.seeds[piece] = Some(7);
    }
    let mut other = Competitor::start(&node);
    for _ in 0..12 {
        known.changes(&mut application, &mut dice);
        other.takes_all(&node, &application);
        known.is_right(&mut application);
    }
    other.ends();
    let said = application.ends_well();
    assert!(!said.contains("fingerprints"), "{said}");
    balances(&node);
}

#[test]
fn whatever_changes_is_right_with_copies() {
    whatever_changes_is_right("on");
}

#[test]
fn whatever_changes_is_right_and_no_fingerprint_lies() {
    whatever_changes_is_right("verify");
}

#[test]
fn without_the_setting_everything_goes_out_each_time() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut reader, data) = keeping(&node, "off", 1);
    let mut other = Competitor::start(&node);
    for turn in 1..4 {
        other.takes_all(&node, &reader);
        assert_eq!(moved(&node, &reader), [turn * BYTES, 0, (turn - 1) * BYTES]);
        reader.sees(data, BYTES, 1);
    }
    other.ends();
    reader.ends_well();
}
