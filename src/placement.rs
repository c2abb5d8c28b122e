//! Which GPU a new client gets. There are two rules.
//!
//! [`choose`] goes by what is known without looking at a GPU: the fewest clients, then the least demand, then the least busy. The number
//! of clients comes first, because each client costs memory that cannot move (its context) and takes turns, whatever it allocates
//! later. Demand comes second: it tells whether the clients that are there have to take turns. The GPU time used so far comes
//! last, because it says least about the future.
//!
//! [`Standing`] goes by live figures: a GPU without tenants first, and then the one where a newcomer would be held up least.

use crate::units::{Granules, Nanos, SECOND};

/// The load of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// Number of clients.
    pub clients: usize,
    /// Granules that their allocations need.
    pub demand: Granules,
    /// GPU time used lately, in ns, as [`crate::usage`] counts it.
    pub busy: Nanos,
}

/// The GPU with the least load, by its number; of equals the one with the lowest number. `None` without any.
pub fn choose(loads: impl IntoIterator<Item = (usize, Load)>) -> Option<usize> {
    loads.into_iter().min_by_key(|(gpu, load)| (*load, *gpu)).map(|(gpu, _)| gpu)
}

/// Beyond the pool, memory counts so many times: there each turn copies what is too much out and in.
const BEYOND_POOL: f64 = 2.0;

/// A wait so long counts as a half, ns: as long as a turn often takes.
const LONG_WAIT: Nanos = 10 * SECOND;

/// A score is rounded to one part in so many, because live figures jitter.
const STEPS: f64 = 20.0;

/// How much a newcomer would be held up on a GPU, from 0 on an idle one: the sum of three parts, each of which is 1 where its matter is
/// used up.
///
/// - `need`: what its clients need of its memory, contexts too, as a part of the pool. Beyond 1 it counts twice.
/// - `busy`: the part of the last moments in which some kernel ran, 0 to 1.
/// - `waiting`: for how long the client has waited that waits longest now, ns. NVML's figure cannot exceed 1, however many want the
///   GPU; their waiting does.
pub fn held_up(need: f64, busy: f64, waiting: Nanos) -> f64 {
    let memory = need + (need - 1.0).max(0.0) * (BEYOND_POOL - 1.0);
    let waiting = waiting as f64;
    memory + busy.clamp(0.0, 1.0) + waiting / (waiting + LONG_WAIT as f64)
}

/// Where a GPU stands among others by live figures: the smallest gets the newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    /// It has a tenant: a GPU of its own is the best that a client can have, whatever the others' figures say.
    pub occupied: bool,
    /// [`held_up`], in twentieths.
    pub score: u32,
    /// Its tenants.
    pub tenants: usize,
    /// Its number.
    pub gpu: usize,
}

impl Standing {
    /// Of a GPU with so many tenants, and what [`held_up`] says of it.
    pub fn of(gpu: usize, tenants: usize, held_up: f64) -> Self {
        Self { occupied: tenants > 0, score: (held_up * STEPS).round() as u32, tenants, gpu }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_gpu_goes_before_any_other_and_then_who_holds_up_least() {
        let standing = |tenants, need, busy, waiting| Standing::of(0, tenants, held_up(need, busy, waiting));
        assert!(standing(0, 0.0, 1.0, 0) < standing(1, 0.1, 0.0, 0));
        // More tenants that do less.
        assert!(standing(3, 0.3, 0.1, 0) < standing(1, 0.5, 1.0, 0));
        // What does not fit costs more than what is busy.
        assert!(standing(2, 0.9, 1.0, 0) < standing(2, 1.3, 0.5, 0));
        // Both are always busy; at one of them somebody waits.
        assert!(standing(2, 0.5, 1.0, 0) < standing(2, 0.5, 1.0, 30 * SECOND));
        // A percent is no difference: then the fewest tenants.
        assert!(standing(1, 0.51, 1.0, 0) < standing(2, 0.50, 1.0, 0));
    }

    fn load(clients: usize, demand: Granules, busy: Nanos) -> Load {
        Load { clients, demand, busy }
    }

    #[test]
    fn clients_then_demand_then_business() {
        assert_eq!(choose([(0, load(2, 0, 0)), (1, load(1, 9, 9))]), Some(1));
        assert_eq!(choose([(0, load(1, 9, 0)), (1, load(1, 8, 9))]), Some(1));
        assert_eq!(choose([(0, load(1, 8, 9)), (1, load(1, 8, 7))]), Some(1));
        assert_eq!(choose([(5, load(1, 8, 7)), (1, load(1, 8, 7))]), Some(1));
        assert_eq!(choose([]), None);
    }

    proptest! {
        /// Clients that come and stay are spread: no GPU has two more than another.
        #[test]
        fn nobody_shares_while_a_gpu_is_free(gpus in 1usize..9, demands in prop::collection::vec(0u32..100, 0..60)) {
            let mut loads = vec![load(0, 0, 0); gpus];
            for demand in demands {
                let chosen = choose(loads.iter().copied().enumerate()).unwrap();
                let fewest = loads.iter().map(|load| load.clients).min().unwrap();
                prop_assert_eq!(loads[chosen].clients, fewest);
                prop_assert!(loads.iter().filter(|load| load.clients == fewest).all(|load| load.demand >= loads[chosen].demand));
                loads[chosen].clients += 1;
                loads[chosen].demand += demand;
            }
            let counts = || loads.iter().map(|load| load.clients);
            prop_assert!(counts().max().unwrap() - counts().min().unwrap() <= 1);
        }
    }
}
