use super::*;
use crate::inventory::{Health, Load};
use proptest::prelude::*;
use std::time::Duration;

const GIB: u64 = 1 << 30;

fn gpu(index: u32, load: Load) -> Gpu {
    Gpu {
        uuid: format!("GPU-{index}"),
        index,
        model: "a model".into(),
        memory: 16 * GIB,
        numa_node: None,
        health: Health::Healthy,
        load,
    }
}

fn load() -> impl Strategy<Value = Load> {
    (0..50u32, 0..64 * GIB, 0..100_000u64, 0.0..=1.0).prop_map(|(tenants, demand, wait, busy)| Load {
        tenants,
        demand,
        waiting: Duration::from_millis(wait),
        busy,
    })
}

/// Up to eight GPUs, of which some are idle and some unhealthy.
fn node() -> impl Strategy<Value = Vec<Gpu>> {
    let one = (prop_oneof![Just(Load::default()), load()], prop::bool::weighted(0.1));
    prop::collection::vec(one, 1..=8).prop_map(|loads| {
        let health = |bad| if bad { Health::Unhealthy("broken".into()) } else { Health::Healthy };
        let gpus = loads.into_iter().zip(0..);
        gpus.map(|((load, bad), index)| Gpu { health: health(bad), ..gpu(index, load) }).collect()
    })
}

/// A node, some of its virtual GPUs, some of these that must be in the answer, and how many are wanted.
fn request() -> impl Strategy<Value = (Vec<Gpu>, Vec<VirtualGpu>, Vec<VirtualGpu>, usize)> {
    node().prop_flat_map(|gpus| {
        let all: Vec<_> = gpus.iter().flat_map(|gpu| VirtualGpu::all_of(&gpu.uuid, 10)).collect();
        let count = all.len();
        let available = prop::sample::subsequence(all, 1..=count).prop_shuffle();
        (Just(gpus), available).prop_flat_map(|(gpus, available)| {
            let count = available.len();
            let must = prop::sample::subsequence(available.clone(), 0..=count.min(3));
            (Just(gpus), Just(available), must, 1..=count).prop_map(|(gpus, available, must, size)| {
                let size = size.max(must.len());
                (gpus, available, must, size)
            })
        })
    })
}

fn distinct<'a>(all: impl IntoIterator<Item = &'a VirtualGpu>) -> BTreeSet<&'a str> {
    all.into_iter().map(|one| one.gpu.as_str()).collect()
}

/// Gives single virtual GPUs away until `count` are, as a kubelet does that follows the hint. `given`: those of each GPU.
fn give(gpus: &[Gpu], given: &mut BTreeSet<VirtualGpu>) -> VirtualGpu {
    let all = gpus.iter().flat_map(|gpu| VirtualGpu::all_of(&gpu.uuid, 10));
    let available: Vec<_> = all.filter(|one| !given.contains(one)).collect();
    let chosen = choose(gpus, 10, &available, &[], 1).pop().expect("one is free");
    given.insert(chosen.clone());
    chosen
}

fn count_of(given: &BTreeSet<VirtualGpu>, gpu: &Gpu) -> usize {
    given.iter().filter(|one| one.gpu == gpu.uuid).count()
}

proptest! {
    #[test]
    fn the_answer_has_the_size_that_was_asked_and_only_what_is_available((gpus, available, must, size) in request()) {
        let chosen = choose(&gpus, 10, &available, &must, size);
        prop_assert_eq!(chosen.len(), size);
        prop_assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), size, "one was chosen twice");
        prop_assert!(chosen.iter().all(|one| available.contains(one)));
        prop_assert!(must.iter().all(|one| chosen.contains(one)));
    }

    #[test]
    fn a_container_gets_different_gpus_for_as_long_as_there_are((gpus, available, must, size) in request()) {
        let chosen = choose(&gpus, 10, &available, &must, size);
        let most = distinct(&available).len().min(distinct(&must).len() + size - must.len());
        prop_assert_eq!(distinct(&chosen).len(), most);
    }

    #[test]
    fn the_order_of_the_lists_does_not_matter((gpus, available, must, size) in request()) {
        let chosen = choose(&gpus, 10, &available, &must, size);
        let turned: Vec<_> = available.iter().rev().cloned().collect();
        let gpus: Vec<_> = gpus.iter().rev().cloned().collect();
        prop_assert_eq!(choose(&gpus, 10, &turned, &must, size), chosen);
    }

    #[test]
    fn nothing_unhealthy_and_nothing_with_tenants_is_chosen_before_what_is_free((gpus, available, _, size) in request()) {
        let chosen = choose(&gpus, 10, &available, &[], size);
        let left: BTreeSet<_> = distinct(&available).difference(&distinct(&chosen)).copied().collect();
        let find = |uuid: &str| gpus.iter().find(|gpu| gpu.uuid == uuid).unwrap();
        let given = |uuid: &str| 10 - available.iter().filter(|one| one.gpu == uuid).count() as u32;
        let state = |uuid: &str| {
            let gpu = find(uuid);
            (!gpu.health.is_healthy(), gpu.load.tenants > 0 || given(uuid) > 0)
        };
        for left in left {
            for taken in distinct(&chosen) {
                prop_assert!(state(taken) <= state(left), "{} before {}", taken, left);
            }
        }
    }

    /// Whatever the figures are and however they change: the case of the issue.
    #[test]
    fn eighty_requests_fill_eight_gpus_evenly(loads in prop::collection::vec(prop::collection::vec(load(), 8), 80)) {
        let mut given = BTreeSet::new();
        for loads in loads {
            // Figures are of those that have come: a GPU that nobody has been given has no client.
            let gpus: Vec<_> = loads.into_iter().zip(0..).map(|(load, index)| {
                let plain = gpu(index, Load::default());
                if count_of(&given, &plain) == 0 { plain } else { Gpu { load, ..plain } }
            }).collect();
            let empty = gpus.iter().filter(|gpu| count_of(&given, gpu) == 0).count();
            let came_to = give(&gpus, &mut given).gpu;
            let there = given.iter().filter(|one| one.gpu == came_to).count();
            prop_assert!(there == 1 || empty == 0, "a second one on {} while {} are empty", came_to, empty);
        }
        let counts: Vec<_> = (0..8).map(|index| count_of(&given, &gpu(index, Load::default()))).collect();
        prop_assert_eq!(counts, vec![10; 8]);
    }

    /// Pods that need nothing yet come in a burst: the figures say nothing, and the burst is spread all the same.
    #[test]
    fn a_burst_of_pods_is_spread(count in 1..80usize) {
        let gpus: Vec<_> = (0..8).map(|index| gpu(index, Load::default())).collect();
        let mut given = BTreeSet::new();
        for _ in 0..count {
            give(&gpus, &mut given);
        }
        let counts: Vec<_> = gpus.iter().map(|gpu| count_of(&given, gpu)).collect();
        prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", counts);
    }

    #[test]
    fn more_of_anything_never_makes_a_gpu_more_wanted(
        less in load(), more in load(), given in 0..10u32, memory in 1..64 * GIB
    ) {
        let demand = less.demand.saturating_add(more.demand);
        let worse = Load { demand, waiting: less.waiting + more.waiting, busy: less.busy.max(more.busy), ..less };
        let of = |load| Gpu { memory, ..gpu(0, load) };
        let rank = |gpu: &Gpu, given| Candidate { gpu, given }.rank(10);
        prop_assert!(rank(&of(less), given) <= rank(&of(worse), given));
        prop_assert!(rank(&of(less), given) <= rank(&of(less), given + 1));
    }
}

/// The order of GPUs that have one tenant each and these loads, by their places in the list.
fn order_of(loads: &[Load]) -> Vec<u32> {
    let gpus: Vec<_> =
        loads.iter().zip(0..).map(|(load, index)| gpu(index, Load { tenants: 1, ..*load })).collect();
    let mut candidates: Vec<_> = gpus.iter().map(|gpu| Candidate { gpu, given: 1 }).collect();
    order(&mut candidates, 10);
    candidates.iter().map(|candidate| candidate.gpu.index).collect()
}

#[test]
fn live_figures_decide_among_gpus_with_tenants() {
    let demand = |gib| Load { demand: gib * GIB, ..Load::default() };
    let busy = |busy| Load { busy, ..Load::default() };
    let waiting = |seconds| Load { waiting: Duration::from_secs(seconds), ..Load::default() };
    assert_eq!(order_of(&[demand(12), demand(4), demand(8)]), [1, 2, 0]);
    assert_eq!(order_of(&[busy(1.0), busy(0.2), busy(0.6)]), [1, 2, 0]);
    assert_eq!(order_of(&[waiting(30), waiting(1), waiting(10)]), [1, 2, 0]);
    // A quarter of the pool too much is worse than half an hour of computing without pause in memory that fits.
    assert_eq!(order_of(&[demand(28), Load { busy: 1.0, ..demand(16) }]), [1, 0]);
    // A percent is noise: the number decides.
    assert_eq!(order_of(&[busy(0.51), busy(0.50)]), [0, 1]);
}

#[test]
fn with_equal_figures_the_one_with_fewer_tenants_is_first() {
    let quiet = |index, tenants| gpu(index, Load { tenants, ..Load::default() });
    let (first, second) = (quiet(0, 3), quiet(1, 2));
    let mut both = [Candidate { gpu: &first, given: 3 }, Candidate { gpu: &second, given: 2 }];
    order(&mut both, 10);
    assert_eq!(both.map(|candidate| candidate.gpu.index), [1, 0]);
}

#[test]
fn a_container_that_wants_more_than_there_are_gpus_gets_the_rest_evenly() {
    let gpus = [gpu(0, Load::default()), gpu(1, Load::default())];
    let available: Vec<_> = gpus.iter().flat_map(|gpu| VirtualGpu::all_of(&gpu.uuid, 10)).collect();
    let chosen: Vec<_> = choose(&gpus, 10, &available, &[], 5).iter().map(ToString::to_string).collect();
    assert_eq!(chosen, ["GPU-0::0", "GPU-1::0", "GPU-0::1", "GPU-1::1", "GPU-0::2"]);
    // A GPU that nobody knows is taken when nothing else is left.
    let stranger = VirtualGpu { gpu: "GPU-A".into(), number: 0 };
    let known = VirtualGpu { gpu: "GPU-1".into(), number: 4 };
    assert_eq!(choose(&gpus, 10, &[stranger.clone(), known.clone()], &[], 1), [known]);
    assert_eq!(choose(&gpus, 10, std::slice::from_ref(&stranger), &[], 3), [stranger]);
}
