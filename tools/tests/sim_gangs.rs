//! `nvshare sim` with processes that need several GPUs and with gangs: scenarios of the repository, and properties of any sets of
//! GPUs.
//!
//! Times are the simulation's own, so a verdict on them is the same on every machine.

use nvshare::units::{MILLISECOND, granules_for};
use nvshare_tools::sim::report::{Report, Row};
use nvshare_tools::sim::scenario::Scenario;
use nvshare_tools::sim::world::{self, Outcome};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

fn read(name: &str) -> Scenario {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/scenarios");
    Scenario::read(&folder.join(name)).unwrap_or_else(|failure| panic!("{}", failure.message))
}

fn run(name: &str) -> Report {
    let scenario = read(name);
    let outcome = world::simulate(&scenario, 1, false);
    // A context is there at once, whether there is room for it or not.
    let context = u64::from(granules_for(scenario.gpus.context.0));
    assert!(outcome.gpus.iter().all(|gpu| gpu.most_debt <= context), "a GPU's memory was given away twice");
    Report::of(&scenario, 1, &outcome)
}

/// GPU time that the clients of a class have had, of that of the simulation.
fn had(report: &Report, class: &str) -> f64 {
    let row = report.classes.iter().find(|row| row.name == class).expect("there is such a class");
    row.gpu_seconds / row.clients as f64 / report.seconds
}

/// All got on in every ten seconds, and are done after no more than 1.15 times what one after the other takes.
fn both_get_on(name: &str) {
    let report = run(name);
    assert!(report.progress.windows >= 40, "{:?}", report.progress);
    assert_eq!(report.progress.without, 0, "{:?}", report.progress);
    assert!(report.clients.iter().all(|row| row.finished == 1 && (row.gpu_seconds - 60.0).abs() < 1e-6));
    assert!(report.seconds <= 1.15 * 120.0, "{} s", report.seconds);
    // All GPUs of each are used alike, and are busy at the same time.
    let ends: BTreeSet<_> = report.clients.iter().map(|row| row.finish_seconds.map(f64::to_bits)).collect();
    assert_eq!(ends.len(), 2);
}

#[test]
fn two_gangs_that_do_not_fit_together_both_get_on() {
    both_get_on("two-gangs.toml");
}

#[test]
fn one_process_with_two_gpus_and_a_gang_both_get_on() {
    both_get_on("process-beside-gang.toml");
}

/// By weight: one has twice what each of the others has.
#[test]
fn three_gangs_share_their_gpus_by_weight() {
    let report = run("three-gangs.toml");
    let (each, heavy) = (had(&report, "training"), had(&report, "heavy"));
    assert!((heavy / each / 2.0 - 1.0).abs() < 0.05, "{heavy}, {each}");
    assert!(heavy + 2.0 * each > 0.94, "{heavy}, {each}");
}

/// Of three gangs, two fit into pools of 18 GiB but for the contexts, so a switch has little to move. On the GPUs that a gang asks for
/// later the next gang's memory is in place as on the first one, though the gang is idle there until it has that.
#[test]
fn the_next_gangs_memory_comes_in_on_all_its_gpus() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/scenarios");
    let text = std::fs::read_to_string(folder.join("two-gangs.toml")).unwrap();
    let text = text.replace("12GiB", "18GiB").replace("count = 2", "count = 3").replace("60s", "24s");
    let scenario = Scenario::parse(&text).unwrap();
    let report = Report::of(&scenario, 1, &world::simulate(&scenario, 1, false));
    assert!(report.clients.iter().all(|row| row.finished == 1), "{:?}", report.clients);
    assert!(report.seconds <= 1.05 * 3.0 * 24.0, "{} s", report.seconds);
}

/// The gang's first GPU is its own, and on the second one it takes turns with the other job.
#[test]
fn a_gang_beside_a_job_with_one_gpu() {
    let report = run("gang-beside-single.toml");
    let (gang, single) = (had(&report, "training"), had(&report, "single"));
    assert!((gang / single - 1.0).abs() < 0.05 && gang + single > 0.94, "{gang}, {single}");
    assert_eq!(report.progress.without, 0, "{:?}", report.progress);
}

/// Each has one GPU in common with each other one, so one at a time runs: nobody starves, and no GPU is handed to and fro for nothing.
#[test]
fn gangs_on_overlapping_gpus_take_turns() {
    let report = run("overlapping-gangs.toml");
    for gang in ["first", "second", "third"] {
        assert!(had(&report, gang) > 0.25, "{gang}: {}", had(&report, gang));
    }
    assert_eq!(report.progress.without, 0, "{:?}", report.progress);
    assert!(report.switches < 2_000, "{}", report.switches);
}

#[test]
fn the_same_seed_gives_the_same_results() {
    let scenario = read("overlapping-gangs.toml");
    let json = || Report::of(&scenario, 3, &world::simulate(&scenario, 3, false)).json();
    assert!(json() == json());
}

#[test]
fn what_cannot_be_is_refused() {
    let scenario = |class: &str| {
        Scenario::parse(&format!(
            "name = \"x\"\nuntil = \"1s\"\n[gpus]\nper_node = 2\nnodes = 2\nmemory = \"64MiB\"\nlink_in = \"1GiB\"\nlink_out = \"1GiB\"\n[[clients]]\nname = \"a\"\nmemory = \"8MiB\"\n{class}\nwork = {{ kind = \"batch\", iteration = \"1ms\", iterations = 5 }}\n"
        ))
    };
    for right in ["ranks = 2", "gpus = 2", "ranks = 2\non = [3, 2]", "ranks = 1"] {
        assert!(scenario(right).is_ok(), "{right}: {:?}", scenario(right));
    }
    for (class, field) in [
        ("ranks = 3", "ranks"),
        ("gpus = 2\nranks = 2", "ranks"),
        ("gpus = 0", "gpus"),
        ("ranks = 2\non = [1, 2]", "on"),
        ("ranks = 2\non = [1, 1]", "on"),
        ("ranks = 2\non = [0]", "on"),
        ("on = [0]", "on"),
        ("ranks = 2\ngpu = 0", "gpu"),
        ("ranks = 2\nvgpus = 2", "vgpus"),
        ("ranks = 2\ngrows = { to = \"16MiB\", over = \"1s\" }", "grows"),
    ] {
        let error = scenario(class).expect_err(class);
        assert!(
            error.contains("number 1 (\"a\")") && error.contains(&format!(", {field}:")),
            "{class}: {error}"
        );
    }
}

/// What runs on some of three GPUs: which ones (as bits, one at least), as a gang or as one process, ms of an iteration, how many, and ms of
/// arrival.
type Draw = (u8, bool, u64, u64, u64);

fn draws() -> impl Strategy<Value = Vec<Draw>> {
    prop::collection::vec((1u8..8, any::<bool>(), 1u64..20, 1u64..60, 0u64..500), 1..7)
}

const GPUS: usize = 3;
const QUANTUM_S: f64 = 0.06;
const DEADLINE_S: f64 = 0.09;

fn gpus_of(draw: &Draw) -> Vec<usize> {
    (0..GPUS).filter(|gpu| draw.0 >> gpu & 1 == 1).collect()
}

/// Of clients of so many MiB each in pools of 100 MiB.
fn simulate(draws: &[Draw], mib: u64, seed: u64) -> (Scenario, Outcome) {
    let class = |(index, draw): (usize, &Draw)| {
        let (_, gang, ms, many, from) = *draw;
        let gpus = gpus_of(draw);
        let place = match gpus.len() {
            1 => format!("gpu = {}", gpus[0]),
            n => format!("{} = {n}\non = {gpus:?}", if gang { "ranks" } else { "gpus" }),
        };
        format!(
            "[[clients]]\nname = \"{index}\"\nmemory = \"{mib}MiB\"\n{place}\narrival = {{ from = \"{from}ms\" }}\nwork = {{ kind = \"batch\", iteration = \"{ms}ms\", iterations = {many} }}\n"
        )
    };
    let clients: String = draws.iter().enumerate().map(class).collect();
    let text = format!(
        "name = \"any\"\n[policy]\nquantum = \"60ms\"\ndeadline = \"90ms\"\n[gpus]\nper_node = {GPUS}\nmemory = \"100MiB\"\nlink_in = \"2GiB\"\nlink_out = \"2GiB\"\nchunk = \"4MiB\"\nswitch = \"1ms\"\ndrain = \"1ms\"\n{clients}"
    );
    let scenario = Scenario::parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let outcome = world::simulate(&scenario, seed, false);
    (scenario, outcome)
}

/// The bound that the head of `src/policy.rs` has, s: what a client of each GPU waits there at most, from the last GPU of the one
/// order to the first.
fn bounds(draws: &[Draw], mib: u64) -> [f64; GPUS] {
    let fill = mib as f64 / 2048.0 * 2.0 + 0.001;
    let drain = draws.iter().map(|draw| draw.2).max().unwrap_or(0) as f64 / 1e3 + 0.001;
    let mut bounds = [0.0; GPUS];
    for gpu in (0..GPUS).rev() {
        let here: Vec<_> = draws.iter().filter(|draw| draw.0 >> gpu & 1 == 1).collect();
        let others = here.len().saturating_sub(1) as f64;
        let later = (gpu + 1..GPUS).filter(|later| here.iter().any(|draw| draw.0 >> later & 1 == 1));
        let waits: f64 = later.map(|later| bounds[later] + fill).sum();
        let until_deadline = DEADLINE_S + 2.0 * others * (QUANTUM_S + fill);
        bounds[gpu] = until_deadline + others * (2.5 * QUANTUM_S + fill + drain + waits);
    }
    bounds
}

fn row(report: &Report, index: usize) -> &Row {
    &report.classes[index]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the sets of GPUs: all are done in the end, with all of their work on each of their GPUs and no more, and no memory
    /// is given away twice.
    #[test]
    fn nobody_starves_and_memory_is_never_overbooked(draws in draws(), mib in 20u64..100, seed in any::<u64>()) {
        let (scenario, outcome) = simulate(&draws, mib, seed);
        let report = Report::of(&scenario, seed, &outcome);
        for (index, draw) in draws.iter().enumerate() {
            let row = row(&report, index);
            let gpus = gpus_of(draw).len() as u64;
            prop_assert_eq!(row.finished, gpus, "{} is stuck: {:?}", index, draws);
            let needed = draw.2 as f64 * draw.3 as f64 / 1e3 * gpus as f64;
            prop_assert!((row.gpu_seconds - needed).abs() < 1e-6, "{} s for {}", row.gpu_seconds, needed);
            // All GPUs of one process or gang are done at the same moment, but for a drain.
            let ends = || outcome.clients.iter().filter(|client| client.class == index).filter_map(|client| client.finished);
            let apart = ends().max().unwrap_or(0) - ends().min().unwrap_or(0);
            prop_assert!(apart <= 2 * MILLISECOND, "{apart} ns");
        }
        for gpu in &outcome.gpus {
            prop_assert_eq!(gpu.most_debt, 0);
            prop_assert_eq!(gpu.time.total(), outcome.time, "{:?}", gpu.time);
        }
    }

    /// No two fit together: each waits for its GPUs, one after the other, for no longer than the bounds of all of them and a fill
    /// of each.
    #[test]
    fn no_gang_waits_longer_than_the_bound(draws in draws(), seed in any::<u64>()) {
        const MIB: u64 = 60;
        let (scenario, outcome) = simulate(&draws, MIB, seed);
        let report = Report::of(&scenario, seed, &outcome);
        let bounds = bounds(&draws, MIB);
        let fill = MIB as f64 / 2048.0 * 2.0 + 0.001;
        for (index, draw) in draws.iter().enumerate() {
            let most: f64 = gpus_of(draw).into_iter().map(|gpu| bounds[gpu] + fill).sum();
            let waited = row(&report, index).wait.max;
            prop_assert!(waited <= most, "{index} waited {waited} s of {most}: {draws:?}");
        }
    }
}
