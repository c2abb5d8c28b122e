//! A pause is not an end: two trainings that do not fit together each pause for some milliseconds after every step.

use nvshare_e2e::application::books::{balances, client};
use nvshare_e2e::application::{Application, MIB};
use nvshare_tools::node::{Node, SimulatedGpu};
use std::time::Duration;

/// More than half of the pool, and enough for a switch to be measured from; it takes a quarter of a second.
const MEMORY: u64 = 96 * MIB;
const POOL: &str = "128MiB";
const LINK: u64 = 384 * MIB;

/// Steps of each.
const STEPS: u64 = 25;
const STEP: u64 = 64 << 10;

/// What a training does between two steps: longer than the idle grace, and short against a switch.
const PAUSE: Duration = Duration::from_millis(20);

/// The slices last for longer than the test, so whoever gives way does it because it is idle. Each goes through its steps while
/// the other one waits. A holder that took its pauses for ends would give way after every step; and one that never gave way
/// would not let the other one finish.
#[test]
fn a_holder_keeps_the_gpu_in_its_pauses_and_gives_way_at_the_end() {
    let settings = [
        ("MEMORY", "256MiB".to_owned()),
        ("CONTEXT_BYTES", "2MiB".to_owned()),
        ("LINK_BANDWIDTH", LINK.to_string()),
    ];
    let gpu = SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace");
    let options = ["--capacity", POOL, "--quantum", "60min"];
    let node = Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap();
    let mut both = [1, 2].map(|seed| {
        let mut application = Application::ready(&node);
        let address = application.alloc(MEMORY);
        application.writes(address, MEMORY, seed);
        (application, address)
    });
    // Each once more, so that the link has been measured in both directions.
    for (seed, (application, address)) in (1..).zip(&mut both) {
        application.sees(*address, MEMORY, seed);
    }
    let yields = |both: &[(Application, u64); 2]| -> u64 {
        both.iter().map(|(application, _)| client(&node, application).yields).sum()
    };
    let before = yields(&both);
    std::thread::scope(|scope| {
        for (application, address) in &mut both {
            scope.spawn(|| {
                for step in 0..STEPS {
                    application.writes(*address, STEP, step);
                    application.sees(*address, STEP, step);
                    std::thread::sleep(PAUSE);
                }
            });
        }
    });
    let switches = yields(&both) - before;
    assert!(switches >= 1, "the first to finish gave way to the other one");
    assert!(switches < 2 * STEPS / 4, "{switches} switches in {} steps", 2 * STEPS);
    for (application, _) in both {
        drop(application.ends_well());
    }
    balances(&node);
}
