//! `nvshare sim`: the scenarios of the repository come to what they must, and properties hold for any scenario.
//!
//! Times here are the simulation's own, so a verdict on them is the same on every machine.

use nvshare::page::Quantum;
use nvshare::units::{Nanos, SECOND};
use nvshare_tools::picture::State;
use nvshare_tools::sim::report::{Report, Row};
use nvshare_tools::sim::scenario::{Placement, Scenario, Work};
use nvshare_tools::sim::{draw, world};
use proptest::prelude::*;
use std::path::Path;

fn read(name: &str) -> Scenario {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/scenarios");
    Scenario::read(&folder.join(name)).unwrap_or_else(|failure| panic!("{}", failure.message))
}

fn report(scenario: &Scenario, seed: u64) -> Report {
    Report::of(scenario, seed, &world::simulate(scenario, seed, false))
}

fn row<'a>(report: &'a Report, name: &str) -> &'a Row {
    report.classes.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no class {name}"))
}

/// The report: iterations of 1.3 to 1.6 s and 113 s between turns where three share, 25.8 iterations/s alone.
#[test]
fn the_field_report_comes_out_of_demand_paging() {
    let report = report(&read("field-report-demand-paging.toml"), 1);
    let (shared, alone) = (row(&report, "shared"), row(&report, "alone"));
    assert!((1.3..=1.6).contains(&shared.iteration_seconds), "{} s", shared.iteration_seconds);
    assert!((111.0..=115.0).contains(&shared.wait.p50), "{} s", shared.wait.p50);
    assert!((25.0..=26.0).contains(&(1.0 / alone.iteration_seconds)), "{} s", alone.iteration_seconds);
}

/// 72 MiB more for the pool, and nothing thrashes within a turn.
#[test]
fn without_the_shortfall_nothing_thrashes() {
    let mut scenario = read("field-report-demand-paging.toml");
    scenario.gpus.memory.0 += 74 << 20;
    let report = report(&scenario, 1);
    let shared = row(&report, "shared");
    assert!(shared.iteration_seconds < 0.05, "{} s", shared.iteration_seconds);
}

#[test]
fn under_nvshare_the_same_jobs_are_done_in_minutes() {
    let paged = report(&read("field-report-demand-paging.toml"), 1);
    let report = report(&read("field-report-nvshare.toml"), 1);
    assert_eq!(row(&report, "shared").finished, 3);
    assert!(report.seconds * 20.0 < paged.seconds, "{} s against {} s", report.seconds, paged.seconds);
    // Every switch moves what the next one lacks, and no more.
    assert_eq!(report.bytes_in, report.bytes_out);
}

/// Two that take turns, whose iterations are longer than the quantum, beside a third that needs what each of them has: it
/// once took 2.4 s to fill, of which it copied for 30 ms.
#[test]
fn who_is_due_again_at_once_does_not_keep_others_from_its_memory() {
    let report = report(&read("starved-filler.toml"), 11979662431249294317);
    let filler = row(&report, "4");
    // An iteration of each of the two, the longer one beside the other, and the copy.
    assert!(filler.wait.max <= 0.45, "{} s", filler.wait.max);
    assert_eq!(filler.finished, 1);
}

/// Those who fit and differ in their shares: the service first, then the limit, and the rest by weight.
#[test]
fn shares_hold_among_clients_that_fit() {
    let report = report(&read("compute-shares.toml"), 1);
    let had = |name: &str| row(&report, name).gpu_seconds / report.seconds;
    assert!((had("service") / 0.053 - 1.0).abs() < 0.01, "{}", had("service"));
    // It comes to at most a kernel of the others, each time.
    let answer = row(&report, "service").answer.max;
    assert!(answer <= 0.002_650 + 0.001_651, "{answer} s");
    assert!((had("limited") - 0.1).abs() < 0.002, "{}", had("limited"));
    let ratio = had("heavy") / had("light");
    assert!((ratio - 3.0).abs() < 0.03, "{ratio}");
    // Nothing is left over, and nobody gives way.
    assert!(report.utilisation > 0.999, "{}", report.utilisation);
    assert_eq!((report.switches, report.bytes_in), (0, 0));
}

/// Two of weights 300 and 100 that fit together, and one of 100 that fits beside neither: the two take turns with the third, and
/// among each other with compute turns. Each has its share of the whole. If each of the two paid half for what they have at
/// once, the lighter one would pay for the heavier.
#[test]
fn shares_hold_where_some_fit_together_and_some_do_not() {
    let report = report(&read("weights-that-fit-partly.toml"), 1);
    let had = |name: &str| row(&report, name).gpu_seconds / report.gpu_seconds;
    for (name, share) in [("heavy", 0.6), ("light", 0.2), ("large", 0.2)] {
        assert!((had(name) / share - 1.0).abs() < 0.05, "{name}: {} of {share}", had(name));
    }
}

/// A person's requests are answered soon, whatever begins beside them.
#[test]
fn newcomers_hold_up_no_light_users() {
    let report = report(&read("new-jobs-beside-interactive.toml"), 1);
    let answer = row(&report, "interactive").answer;
    assert!(answer.p50 < 0.15 && answer.p99 < 1.0 && answer.max < 1.5, "{answer:?}");
    assert!(report.time.busy > 0.77, "{:?}", report.time);
}

/// And somebody who opens a notebook does not wait for a round of those who run.
#[test]
fn newcomers_are_served_soon() {
    let report = report(&read("new-notebooks-beside-jobs.toml"), 1);
    let answer = row(&report, "notebook").answer;
    assert!(answer.p50 < 0.6 && answer.p99 < 3.0, "{answer:?}");
    assert!(report.time.busy > 0.9, "{:?}", report.time);
}

/// The interactive client has the GPU while the training validates, and is not charged for what it does not use.
#[test]
fn who_holds_the_gpu_while_nobody_needs_it_is_not_held_up_for_that() {
    let report = report(&read("training-that-validates.toml"), 1);
    let answer = row(&report, "interactive").answer;
    assert!(answer.p99 < 0.7 && answer.mean < 0.15, "{answer:?}");
}

/// What nobody may use is left, and nobody is held up for it.
#[test]
fn a_limit_holds_for_a_client_that_is_alone() {
    let mut scenario = read("compute-shares.toml");
    scenario.clients.retain(|class| class.name == "limited");
    let report = report(&scenario, 1);
    let had = row(&report, "limited").gpu_seconds / report.seconds;
    assert!((had - 0.1).abs() < 0.002, "{had}");
    assert!((report.time.busy - 0.1).abs() < 0.002 && report.time.idle > 0.89, "{:?}", report.time);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_others() {
    let mut scenario = read("vgpus.toml");
    scenario.until = Some("6min".to_owned().try_into().unwrap());
    let run = |seed| {
        let outcome = world::simulate(&scenario, seed, true);
        (Report::of(&scenario, seed, &outcome).json(), draw(&scenario, &outcome))
    };
    assert!(run(4) == run(4));
    assert!(run(4).0 != run(5).0);
}

#[test]
fn the_picture_is_of_every_client_and_every_state() {
    let scenario = read("four-jobs.toml");
    let svg = draw(&scenario, &world::simulate(&scenario, 1, true));
    for number in 1..=4 {
        assert!(svg.contains(&format!(">job {number}</text>")), "job {number} has no lane");
    }
    for state in ["idle", "waiting", "filling", "running", "kept", "draining", "evicting"] {
        assert!(svg.contains(&format!(">{state}</text>")), "{state} is not in the legend");
    }
    // The legend has one each; the lanes have many.
    for color in ["#d9d9d9", "#4e9bd6", "#3a9d5d", "#c9583e"] {
        assert!(svg.matches(color).count() > 4, "{color} is nowhere drawn");
    }
    assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
}

/// Of two that take turns one pauses, and is drawn as keeping the GPU then; and whoever is not done at the end is marked.
#[test]
fn the_picture_shows_pauses_that_others_wait_for_and_who_is_unfinished() {
    let pauses = "work = { kind = \"batch\", iteration = \"10ms\", gpu_time = \"1h\", pause = \"3ms\", pause_every = 10 }";
    let pausing = format!("[[clients]]\nname = \"pausing\"\nmemory = \"60MiB\"\n{pauses}\n");
    let text = small("until = \"20s\"", &format!("{pausing}{}", job("done", 60, 300, "")));
    let scenario = Scenario::parse(&text).unwrap();
    let outcome = world::simulate(&scenario, 1, true);
    let kept = outcome.clients[0].segments.iter().flatten().filter(|segment| segment.state == State::Kept);
    assert_eq!(kept.map(|segment| segment.to - segment.from).sum::<Nanos>(), outcome.gpus[0].time.kept);
    assert!(outcome.gpus[0].time.kept > 30_000_000, "{:?}", outcome.gpus[0].time);
    let svg = draw(&scenario, &outcome);
    assert_eq!(svg.matches(">unfinished</text>").count(), 1);
}

/// Alone on the GPU it keeps the right to run between its requests, and does not run then.
#[test]
fn who_has_nothing_to_do_is_not_drawn_as_running() {
    let work = "work = { kind = \"interactive\", burst = \"50ms\", every = \"1s\", requests = 5 }";
    let client = format!("[[clients]]\nname = \"person\"\nmemory = \"8MiB\"\n{work}\n");
    let paging = "[gpus.paging]\nfault = \"1GiB\"\nevict = \"1GiB\"\nidle_release = \"5s\"\n";
    for (policy, paging) in [("", ""), ("[policy]\nmode = \"demand-paging\"\nquantum = \"30s\"", paging)] {
        let scenario = Scenario::parse(&small(policy, &format!("{paging}{client}"))).unwrap();
        let outcome = world::simulate(&scenario, 1, true);
        let person = &outcome.clients[0];
        let drawn = |state| {
            let segments = person.segments.iter().flatten().filter(|segment| segment.state == state);
            segments.map(|segment| segment.to - segment.from).sum::<Nanos>()
        };
        // Of Unified Memory, an iteration that brings something in is drawn as filling.
        let (running, filling) = (drawn(State::Running), drawn(State::Filling));
        assert_eq!(person.gpu, 250_000_000);
        assert!(running <= person.gpu && running + filling >= person.gpu, "{running}, {filling} ns");
        assert!(running + filling < 300_000_000, "{running}, {filling} ns");
    }
}

/// Whoever changes the policy draws it anew.
#[test]
fn the_picture_in_the_documentation_is_of_this_policy() {
    let scenario = read("four-jobs.toml");
    let drawn = draw(&scenario, &world::simulate(&scenario, scenario.seed, true));
    let stands = include_str!("../../docs/four-jobs.svg");
    assert!(drawn == stands, "nvshare sim examples/scenarios/four-jobs.toml --svg docs/four-jobs.svg");
}

fn small(extra: &str, clients: &str) -> String {
    format!(
        "name = \"small\"\n{extra}\n[gpus]\nmemory = \"64MiB\"\nlink_in = \"1GiB\"\nlink_out = \"1GiB\"\nchunk = \"4MiB\"\n{clients}"
    )
}

/// A batch job of iterations of 10 ms, with so many MiB.
fn job(name: &str, memory: u64, iterations: u64, more: &str) -> String {
    format!(
        "[[clients]]\nname = \"{name}\"\nmemory = \"{memory}MiB\"\n{more}\nwork = {{ kind = \"batch\", iteration = \"10ms\", iterations = {iterations} }}\n"
    )
}

/// Two of 60 MiB take turns in a pool of 100, after a third has left that needed all of it: neither of them had anything
/// there. While one runs the other brings in the 40 MiB that find room, so no switch moves more than the 20 MiB that the
/// two are in one another's way with.
#[test]
fn who_is_next_brings_in_what_finds_room_ahead_of_its_turn() {
    let scenario = Scenario::parse(&format!(
        "name = \"prefetch\"\n[policy]\nquantum = \"1s\"\n[gpus]\nmemory = \"100MiB\"\nlink_in = \"100MiB\"\nlink_out = \"100MiB\"\nchunk = \"4MiB\"\n{}{}{}",
        job("first", 60, 1_000, ""),
        job("second", 60, 1_000, ""),
        job("leaves", 100, 150, ""),
    ))
    .unwrap_or_else(|error| panic!("{error}"));
    let outcome = world::simulate(&scenario, 1, true);
    let gone = outcome.clients[2].finished.expect("it has ended");
    let fills = |client: usize| {
        let segments = outcome.clients[client].segments.iter().flatten();
        let fills = segments.filter(|segment| segment.state == State::Filling);
        fills.filter(|fill| fill.from >= gone).map(|fill| fill.to - fill.from).collect::<Vec<_>>()
    };
    let [first, second] = [0, 1].map(fills);
    // The first has nothing there; and a chunk of 4 MiB must go out before one can come in.
    assert!(first[0] >= 600_000_000, "{first:?}");
    assert!(first[1..].iter().chain(&second).all(|ns| *ns <= 240_000_000), "{first:?}, {second:?} ns");
    assert!(first.len() > 3 && second.len() > 3);
}

/// Six equals of which three fit at once, for four minutes: they are equal in every window of time. Windows of as many
/// turns as there are contenders would say that they are not, because the turns of three overlap.
#[test]
fn equals_of_whom_several_run_at_once_are_equal() {
    let class = "[[clients]]\nname = \"equal\"\ncount = 6\nmemory = \"20MiB\"\n";
    let work = "work = { kind = \"batch\", iteration = \"10ms\", gpu_time = \"1h\" }\n";
    let scenario = Scenario::parse(&small("until = \"4min\"", &format!("{class}{work}"))).unwrap();
    let Report { fairness, time, .. } = report(&scenario, 1);
    assert_eq!((fairness.window_seconds, fairness.time_windows), (120.0, 2));
    assert!(fairness.time_least.is_some_and(|least| least > 0.99), "{fairness:?}");
    assert_eq!((fairness.least, fairness.windows), (None, 0));
    assert!(time.busy > 0.5 && time.kept == 0.0 && time.idle == 0.0, "{time:?}");
    assert!((time.busy + time.switching - 1.0).abs() < 1e-12, "{time:?}");
}

/// One client has work for 1 s in each 4 s, alone on the GPU: the rest is idle and nobody waits. Another one that
/// waits gets the GPU in each pause when the grace is over; until then the GPU is kept.
#[test]
fn a_gpu_without_work_is_idle_and_one_that_is_kept_is_kept() {
    let class = |name: &str, work: &str| {
        format!("[[clients]]\nname = \"{name}\"\nmemory = \"60MiB\"\nwork = {{ {work} }}\n")
    };
    let training = "kind = \"training\", iteration = \"10ms\", iterations = 100, pause = \"3s\", rounds = 10";
    let alone = report(&Scenario::parse(&small("", &class("first", training))).unwrap(), 1);
    assert!((alone.time.idle - alone.seconds.recip() * 27.0).abs() < 0.08, "{:?}", alone.time);
    assert_eq!(alone.time.kept, 0.0);
    // Pauses of 3 s are never worth a wait, but the grace is.
    let batch = "kind = \"batch\", iteration = \"10ms\", gpu_time = \"20s\"";
    let policy = "[policy]\nidle_grace = \"500ms\"";
    let clients = class("first", training) + &class("second", batch);
    let both = report(&Scenario::parse(&small(policy, &clients)).unwrap(), 1);
    let kept = both.time.kept * both.seconds;
    assert!((2.0..=5.0).contains(&kept), "at most 0.5 s of each of ten pauses, and {kept} s");
    let sum = both.time.busy + both.time.switching + both.time.kept + both.time.idle;
    assert!((sum - 1.0).abs() < 1e-12, "{:?}", both.time);
}

/// How many steps two trainings that pause are done together, as a multiple of what one alone would be, and the bytes that came
/// in for each.
fn steps_of_two(pause: &str) -> (f64, u64) {
    let mut scenario = read("two-that-pause.toml");
    let Work::Training { pause: span, .. } = &mut scenario.clients[0].work else { panic!("trainings") };
    *span =
        toml::from_str::<std::collections::HashMap<String, _>>(&format!("pause = {pause}")).unwrap()["pause"];
    let report = report(&scenario, 1);
    let steps = row(&report, "training").answer.count;
    (steps as f64 / report.seconds * 1.08, report.bytes_in / steps)
}

/// Two would be 2. With switches that begin when a client is back it was 1.57.
#[test]
fn who_pauses_regularly_finds_its_memory_in_place() {
    for pause in ["\"1s\"", "{ uniform = [\"900ms\", \"1100ms\"] }"] {
        let (steps, _) = steps_of_two(pause);
        assert!(steps > 1.9, "{steps} with pauses of {pause}");
    }
}

/// Of pauses that are as long as they like, some three are alike by chance, and then memory moves for nothing.
#[test]
fn forecasts_that_are_wrong_move_little() {
    let (steps, bytes) = steps_of_two("{ uniform = [\"200ms\", \"1800ms\"] }");
    assert!(steps > 1.5, "{steps}");
    assert!(bytes <= 12 << 30, "{bytes} B for a step");
}

/// Memory that never changes is copied out the first time that it is evicted; of memory of which half changes, half goes out later.
#[test]
fn what_never_changes_is_copied_out_once() {
    let run = |unchanged: &str| {
        let jobs: String =
            ["a", "b"].map(|name| job(name, 40, 300, &format!("unchanged = {unchanged}"))).concat();
        let extra = "[policy]\nquantum = \"500ms\"";
        report(&Scenario::parse(&small(extra, &jobs)).unwrap_or_else(|error| panic!("{error}")), 1)
    };
    let (changing, half, reading) = (run("0"), run("0.5"), run("1"));
    assert_eq!(changing.bytes_unchanged, 0);
    assert!(changing.bytes_out > 100 << 20, "{} bytes", changing.bytes_out);
    assert!((1..=80 << 20).contains(&reading.bytes_out), "{} bytes", reading.bytes_out);
    for report in [&changing, &half, &reading] {
        assert_eq!(
            report.bytes_out + report.bytes_unchanged,
            report.bytes_in,
            "what leaves is what comes back"
        );
    }
    assert!(reading.bytes_out < half.bytes_out && half.bytes_out < changing.bytes_out);
    assert!(reading.seconds <= changing.seconds);
    for wrong in ["1.1", "-0.1"] {
        let text = small("", &job("a", 8, 1, &format!("unchanged = {wrong}")));
        assert!(Scenario::parse(&text).unwrap_err().contains("unchanged"));
    }
}

/// 100 iterations of 10 ms and a pause of 30 ms after every tenth but the last: 1.27 s, which alone is no slowdown.
#[test]
fn a_batch_job_pauses_after_so_many_iterations() {
    let work = "work = { kind = \"batch\", iteration = \"10ms\", iterations = 100, pause = \"30ms\", pause_every = 10 }";
    let text = small("", &format!("[[clients]]\nname = \"a\"\nmemory = \"8MiB\"\n{work}\n"));
    let report = report(&Scenario::parse(&text).unwrap(), 1);
    let row = row(&report, "a");
    assert_eq!((row.answer.count, row.answer.max, row.slowdown, row.gpu_seconds), (1, 1.27, 1.0, 1.0));
    assert!((report.time.idle - 0.27 / 1.27).abs() < 1e-9, "{:?}", report.time);
    let error = Scenario::parse(&text.replace("pause = \"30ms\", ", "")).unwrap_err();
    assert!(error.contains("work.pause"), "{error}");
}

#[test]
fn the_first_request_comes_after_an_interval_unless_it_is_to_come_at_once() {
    let first = |work: &str| {
        let text = small("", &format!("[[clients]]\nname = \"a\"\nmemory = \"8MiB\"\nwork = {{ {work} }}\n"));
        let outcome = world::simulate(&Scenario::parse(&text).unwrap(), 1, true);
        outcome.clients[0].segments.iter().flatten().find(|it| it.state == State::Running).unwrap().from
    };
    let interactive = "kind = \"interactive\", burst = \"1ms\", every = \"2s\", requests = 2";
    assert_eq!(first(interactive), 2 * SECOND);
    assert_eq!(first(&format!("{interactive}, first = \"at-once\"")), 0);
    let training = "kind = \"training\", iteration = \"1ms\", iterations = 5, pause = \"3s\", rounds = 2";
    assert_eq!(first(training), 3 * SECOND);
    assert_eq!(first(&format!("{training}, first = \"at-once\"")), 0);
}

/// It needs 20 MiB and after 16 steps 52. Alone it takes room at once and nothing moves. Beside another one of 40 MiB there
/// is room for 4 MiB, and the next step makes it fill, while an iteration that it has submitted goes on.
#[test]
fn a_client_that_grows_fills_with_work_in_flight() {
    let grower = "[[clients]]\nname = \"grower\"\nmemory = \"20MiB\"\nin_flight = 2\ngrows = { to = \"52MiB\", over = \"1s\" }\nwork = { kind = \"batch\", iteration = \"10ms\", iterations = 200 }\n";
    let run = |clients: &str| {
        let scenario = Scenario::parse(&small("", clients)).unwrap_or_else(|error| panic!("{error}"));
        world::simulate(&scenario, 1, true)
    };
    let alone = run(grower);
    assert_eq!((alone.time, alone.clients[0].bytes_in, alone.clients[0].waits.len()), (2 * SECOND, 0, 1));
    let both = run(&format!("{grower}{}", job("other", 40, 200, "")));
    assert_eq!((both.clients[0].gpu, both.clients[1].gpu), (2 * SECOND, 2 * SECOND));
    assert!(both.clients[0].bytes_in > 0 && both.clients[1].bytes_out > 0, "they take turns in the end");
    let segments: Vec<_> = both.clients[0].segments.iter().flatten().collect();
    let grew =
        segments.windows(2).find(|two| two[0].state == State::Running && two[1].state == State::Filling);
    let filling = grew.expect("from running it goes on to fill")[1];
    assert!(filling.from < SECOND, "{filling:?}");
    let other = both.clients[1].segments.iter().flatten();
    assert!(other.clone().any(|it| it.state == State::Evicting && it.from >= filling.from), "it makes room");
    // One that is idle has what the grower needs. Its eviction takes less time than the work in flight, so none is lost.
    let idle = "[[clients]]\nname = \"idle\"\nmemory = \"40MiB\"\nwork = { kind = \"interactive\", burst = \"1ms\", every = \"1h\", first = \"at-once\", requests = 2 }\n";
    let beside = run(&format!("{grower}{idle}"));
    assert!(beside.clients[1].bytes_out > 0);
    let finished = beside.clients[0].finished.unwrap();
    assert!((2_001_000_000..2_003_000_000).contains(&finished), "{finished} ns");
    // It came later, and the other one's turn is not over, so it is recalled when it has grown, and drains.
    let clients = format!("{}{grower}", job("other", 40, 200, ""));
    let scenario = Scenario::parse(&small("[policy]\nquantum = \"10s\"", &clients)).unwrap();
    let later = world::simulate(&scenario, 1, true);
    let segments: Vec<_> = later.clients[1].segments.iter().flatten().collect();
    let recalled = segments.windows(2).find(|two| two[0].state == State::Running).unwrap()[1];
    assert_eq!(recalled.state, State::Draining);
    assert!(recalled.to - recalled.from >= 20_000_000, "an iteration at half the speed: {recalled:?}");
    let refused = Scenario::parse(&small("", &grower.replace("52MiB", "66MiB"))).unwrap_err();
    assert!(refused.contains("grows.to") && refused.contains("64.00 MiB"), "{refused}");
}

#[test]
fn priority_decides_whose_turn_comes_sooner() {
    let job = |priority: &str| job(priority, 60, 1_000, &format!("priority = \"{priority}\""));
    let clients: String = ["low", "normal", "high"].map(job).concat();
    let report = report(&Scenario::parse(&small("[policy]\nquantum = \"1s\"", &clients)).unwrap(), 1);
    let wait = |name| row(&report, name).wait.max;
    assert!(wait("high") < wait("normal") && wait("normal") < wait("low"), "{report:?}");
    let error = Scenario::parse(&small("", &job("urgent"))).unwrap_err();
    assert!(error.contains("urgent") && error.contains("low, normal or high"), "{error}");
}

#[test]
fn errors_name_the_place_and_what_is_expected() {
    let client = |body: &str| small("", &format!("[[clients]]\nname = \"a\"\n{body}"));
    let work = "work = { kind = \"batch\", iteration = \"1ms\", iterations = 5 }";
    for (text, parts) in [
        (client(&format!("memory = \"12 parsecs\"\n{work}")), vec!["line 10", "12 parsecs", "12GiB"]),
        (client(&format!("memory = \"8MiB\"\nwieght = 3\n{work}")), vec!["line 11", "wieght", "weight"]),
        (
            client("memory = \"8MiB\"\nwork = { kind = \"batch\", iteration = \"5\", iterations = 5 }"),
            vec!["line 11", "'5' is not a time", "500ms"],
        ),
        (client(&format!("memory = \"80MiB\"\n{work}")), vec!["number 1 (\"a\")", "memory", "64.00 MiB"]),
        (client(&format!("memory = \"8MiB\"\ngpu = 1\n{work}")), vec!["number 1", "gpu", "0 to 0"]),
        (
            client("memory = \"8MiB\"\nwork = { kind = \"interactive\", burst = \"1ms\", every = \"1s\" }"),
            vec!["work.requests", "until"],
        ),
        (
            small(
                "[policy]\nmode = \"demand-paging\"",
                &format!("[[clients]]\nname = \"a\"\nmemory = \"8MiB\"\n{work}"),
            ),
            vec!["gpus.paging"],
        ),
        (small("[policy]\nquantum = \"often\"", ""), vec!["line 3", "often", "auto"]),
    ] {
        let error = Scenario::parse(&text).expect_err(&text);
        for part in parts {
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
    }
    let failure = Scenario::read(Path::new("/nowhere.toml")).unwrap_err();
    assert!(failure.status == 2 && failure.message.contains("/nowhere.toml"), "{failure:?}");
}

/// A client of a random scenario: MiB, batch or interactive, ms of an iteration or burst, how many, ms of arrival.
type Draw = (u64, bool, u64, u64, u64);

fn scenario(policy: &str, memory: u64, clients: &[Draw]) -> Scenario {
    of_draws(policy, memory, clients, false)
}

/// With `more`, some batch jobs pause and some clients grow.
fn of_draws(policy: &str, memory: u64, clients: &[Draw], more: bool) -> Scenario {
    let class = |(index, (size, batch, ms, many, from)): (usize, &Draw)| {
        let work = if *batch {
            let pauses = if more && many % 2 == 0 { ", pause = \"7ms\", pause_every = 3" } else { "" };
            format!("kind = \"batch\", iteration = \"{ms}ms\", iterations = {many}{pauses}")
        } else {
            format!(
                "kind = \"interactive\", burst = \"{ms}ms\", poisson = \"{}ms\", requests = {many}",
                7 * ms
            )
        };
        let grows = if more && ms % 2 == 0 { "grows = { to = \"70MiB\", over = \"300ms\" }\n" } else { "" };
        format!(
            "[[clients]]\nname = \"{index}\"\nmemory = \"{size}MiB\"\n{grows}arrival = {{ from = \"{from}ms\" }}\nwork = {{ {work} }}\n"
        )
    };
    let clients: String = clients.iter().enumerate().map(class).collect();
    Scenario::parse(&format!(
        "name = \"any\"\n[policy]\n{policy}\n[gpus]\nper_node = 2\nmemory = \"{memory}MiB\"\ncontext = \"2MiB\"\noverflow = \"1GiB\"\nlink_in = \"500MiB\"\nlink_out = \"400MiB\"\nchunk = \"4MiB\"\nswitch = \"1ms\"\ndrain = \"1ms\"\n{clients}"
    ))
    .unwrap_or_else(|error| panic!("{error}"))
}

fn draws() -> impl Strategy<Value = Vec<Draw>> {
    prop::collection::vec((2u64..60, any::<bool>(), 1u64..200, 1u64..40, 0u64..3_000), 1..9)
}

/// As [`draws`], of iterations so short that a drain is shorter than a quantum, also where all share the GPU.
fn short_draws() -> impl Strategy<Value = Vec<Draw>> {
    prop::collection::vec((2u64..60, any::<bool>(), 1u64..6, 1u64..400, 0u64..1_000), 1..9)
}

/// Few, that work for long, in iterations longer than a quantum.
fn long_draws() -> impl Strategy<Value = Vec<Draw>> {
    prop::collection::vec((2u64..60, prop::bool::weighted(0.8), 60u64..200, 100u64..300, 0u64..3_000), 4..8)
}

/// With a farthest deadline of so many ms.
fn waits_are_bounded(
    deadline_ms: u64,
    memory: u64,
    clients: &[Draw],
    seed: u64,
) -> Result<(), TestCaseError> {
    const QUANTUM: Nanos = 60_000_000;
    let policy = format!("quantum = \"60ms\"\ndeadline = \"{deadline_ms}ms\"");
    let scenario = scenario(&policy, memory, clients);
    prop_assert_eq!(scenario.policy.settings().quantum, Quantum::Fixed(QUANTUM));
    let outcome = world::simulate(&scenario, seed, false);
    let all = |of: &dyn Fn(&Draw) -> u64| clients.iter().map(of).max().unwrap_or(0) as f64 / 1e3;
    let n = outcome.gpus.iter().map(|gpu| gpu.most_clients).max().unwrap_or(0) as f64;
    let slice = QUANTUM as f64 / SECOND as f64;
    // The slower way of the link; who fits beside others shares it with them.
    let fill = all(&|client| client.0) * 1e3 / 400.0 * 2.0 + 0.001;
    // An iteration, n of which may share the GPU.
    let drain = all(&|client| client.2) * n + 0.001 + scenario.policy.settings().idle_grace as f64 / 1e9;
    let bound = deadline_ms as f64 / 1e3 + n * (slice + fill + drain);
    let report = Report::of(&scenario, seed, &outcome);
    for row in &report.classes {
        prop_assert!(row.wait.max <= bound, "{} waited {} s of {}", &row.name, row.wait.max, bound);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Everybody is done in the end, and gets all that it needs and no more; no second is handed out twice.
    #[test]
    fn work_is_conserved(
        fixed in any::<bool>(),
        more in any::<bool>(),
        memory in 80u64..200,
        clients in draws(),
        seed in any::<u64>(),
    ) {
        let policy = if fixed { "quantum = \"30ms\"" } else { "min = \"20ms\"" };
        let scenario = of_draws(policy, memory, &clients, more);
        let outcome = world::simulate(&scenario, seed, false);
        let report = Report::of(&scenario, seed, &outcome);
        for (row, (_, _, ms, many, _)) in report.classes.iter().zip(&clients) {
            prop_assert_eq!(row.finished, 1, "{} is stuck: {:?}", &row.name, row);
            let needed = *ms as f64 * *many as f64 / 1e3;
            prop_assert!((row.gpu_seconds - needed).abs() < 1e-6, "{} s for {}", row.gpu_seconds, needed);
            prop_assert!(row.slowdown >= 0.999_999);
        }
        let all = outcome.time as f64 / 1e9 * outcome.gpus.len() as f64;
        prop_assert!(report.gpu_seconds <= all * 1.000_001 + 1e-6);
        prop_assert!(report.utilisation <= 1.0);
        for gpu in &outcome.gpus {
            prop_assert_eq!(gpu.time.total(), outcome.time, "{:?}", gpu.time);
        }
    }

    /// Who fits together runs together.
    #[test]
    fn when_all_fits_nothing_moves(clients in draws(), seed in any::<u64>()) {
        let scenario = scenario("quantum = \"1ms\"", 600, &clients);
        let report = Report::of(&scenario, seed, &world::simulate(&scenario, seed, false));
        prop_assert_eq!((report.bytes_in, report.bytes_out), (0, 0));
        for row in &report.classes {
            // The time that the gate takes to open.
            prop_assert!(row.wait.max <= 0.002, "{:?}", row);
        }
    }

    /// The bound that `nvshare::policy` states (L1), for deadlines of less than two slices, where drains are shorter than
    /// slices.
    #[test]
    fn nobody_waits_longer_than_the_bound(memory in 64u64..200, clients in short_draws(), seed in any::<u64>()) {
        waits_are_bounded(90, memory, &clients, seed)?;
    }

    /// And where drains are longer than slices: who is due again when it has drained does not keep others from its memory.
    #[test]
    fn nobody_is_kept_from_memory_by_long_drains(memory in 64u64..120, clients in long_draws(), seed in any::<u64>()) {
        waits_are_bounded(2_000, memory, &clients, seed)?;
    }

    /// Under demand paging too, all that is needed is handed out.
    #[test]
    fn paging_is_slow_and_not_wrong(memory in 40u64..200, clients in draws(), seed in any::<u64>()) {
        let mut scenario = scenario("mode = \"nvshare\"", memory, &clients);
        scenario.policy.mode = nvshare_tools::sim::scenario::Mode::DemandPaging;
        scenario.gpus.paging = toml::from_str("fault = \"300MiB\"\nevict = \"900MiB\"").unwrap();
        let outcome = world::simulate(&scenario, seed, false);
        let report = Report::of(&scenario, seed, &outcome);
        for (row, (_, _, ms, many, _)) in report.classes.iter().zip(&clients) {
            prop_assert_eq!(row.finished, 1, "{:?}", row);
            prop_assert!((row.gpu_seconds - *ms as f64 * *many as f64 / 1e3).abs() < 1e-6);
        }
        for gpu in &outcome.gpus {
            prop_assert_eq!(gpu.time.total(), outcome.time, "{:?}", gpu.time);
        }
    }
}

/// By live figures clients come to where least has to move for them; filling one GPU after the other is the worst.
#[test]
fn where_clients_are_placed_decides_how_much_moves() {
    let moved = |placement| {
        let mut scenario = read("vgpus-come-and-go.toml");
        scenario.gpus.placement = placement;
        scenario.until.as_mut().expect("it has an end").0 = 45 * 60 * SECOND;
        let report = report(&scenario, 1);
        assert_eq!(report.unplaced, 0, "{placement:?}");
        report.bytes_in
    };
    let least_loaded = moved(Placement::LeastLoaded);
    let count = moved(Placement::Count);
    let random = moved(Placement::Random);
    let packed = moved(Placement::Packed);
    assert!(
        least_loaded < count && count < random && random < packed,
        "{least_loaded}, {count}, {random}, {packed}"
    );
}

/// Whatever the figures of the others are: who comes while a GPU is empty, gets that one.
#[test]
fn nobody_shares_a_gpu_while_another_one_is_empty() {
    let most_on_one = |placement, seed| {
        let mut scenario = read("vgpus-come-and-go.toml");
        scenario.gpus.placement = placement;
        // Eight at most at once.
        scenario.clients.retain(|class| class.name == "batch");
        scenario.clients[0].count = 8;
        report(&scenario, seed).gpus.iter().map(|gpu| gpu.most_clients).max()
    };
    for placement in [Placement::FewestClients, Placement::LeastLoaded, Placement::Count] {
        for seed in 1..=20 {
            assert_eq!(most_on_one(placement, seed), Some(1), "{placement:?}, seed {seed}");
        }
    }
    assert!(most_on_one(Placement::Packed, 1) > Some(1));
}
