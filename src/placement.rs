//! Which GPU a new client gets: the one with the fewest clients, then the least demand, then the least busy.
//!
//! The number of clients comes first, because each client costs memory that cannot move (its context) and takes turns,
//! whatever it allocates later. Demand comes second: it tells whether the clients that are there have to take turns. The GPU
//! time used so far comes last, because it says least about the future.

use crate::units::{Granules, Nanos};

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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
