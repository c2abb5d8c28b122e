//! The simulator against real processes on the simulated GPU: what is counted and what is ordered.
//!
//! How long an iteration takes is this machine's affair, and the simulator is told it. Times are not compared here;
//! `nvshare bench sim` prints them side by side.

use nvshare_tools::bench::sim::{Options, Run, really, simulated};

/// Within 15 %.
#[track_caller]
fn near(what: &str, real: f64, simulated: f64) {
    let ratio = simulated / real;
    assert!((0.85..=1.15).contains(&ratio), "{what}: really {real}, simulated {simulated}");
}

/// Who runs after whom, from the first one on: each pair that follows on one another, and how often.
fn turns(run: &Run) -> Vec<usize> {
    let jobs = run.ran.len();
    run.order.windows(2).map(|pair| (pair[1] + jobs - pair[0]) % jobs).collect()
}

#[test]
fn jobs_that_take_turns() {
    let options = Options { jobs: 3, quantum: 300, iterations: 200 };
    let (real, iteration) = really(&options).unwrap_or_else(|failure| panic!("{}", failure.message));
    let simulated = simulated(&options, iteration).unwrap_or_else(|failure| panic!("{}", failure.message));
    near("switches", real.switches as f64, simulated.switches as f64);
    near("bytes in", real.bytes_in as f64, simulated.bytes_in as f64);
    near("bytes out", real.bytes_out as f64, simulated.bytes_out as f64);
    near(
        "bytes of a switch",
        real.bytes_in as f64 / real.switches as f64,
        simulated.bytes_in as f64 / simulated.switches as f64,
    );
    // Everybody follows the same one all the time, in both: they take turns, in whichever direction they came.
    for run in [&real, &simulated] {
        let turns = turns(run);
        let straight = turns.iter().filter(|step| **step == turns[0]).count();
        assert!(straight * 100 >= turns.len() * 85, "{:?}", run.order);
        near("share of the least favoured", 1.0, run.least_share());
    }
}
