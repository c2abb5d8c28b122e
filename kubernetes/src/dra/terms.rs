//! What a GPU is offered for: how much of it there is to give away, and what a claim gets that asks for nothing in particular.
//!
//! | capacity | there is | a claim gets without asking |
//! |---|---|---|
//! | `shares` | `--shares` | 1 |
//! | `memory` | the pool times `--memory-overcommit` | an equal part of it, and at most the pool |
//! | `cores` | 100 (percent of the GPU's time) | an equal part of it |
//!
//! The scheduler adds up what claims consume, so these are promises that can be kept together. `memory` may be more than the card
//! has: what does not fit at one time is evicted to the host. Without `--memory-overcommit` there is as much as lets every share
//! have the whole pool, and memory limits only those who ask for less.

use nvshare::units::GRANULE;

/// The name of the capacity that counts claims.
pub const SHARES: &str = "shares";
/// The name of the capacity of memory, bytes.
pub const MEMORY: &str = "memory";
/// The name of the capacity of computing, percent of the GPU's time.
pub const CORES: &str = "cores";

/// How GPUs are offered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// How many claims a GPU is for; at least 1.
    pub shares: u32,
    /// How many times its pool a GPU's memory is given away; `None`: as many times as there are shares.
    pub memory_overcommit: Option<f64>,
}

impl Terms {
    /// The memory that a GPU with a pool of this size has to give, bytes.
    pub fn memory(&self, pool: u64) -> u64 {
        let times = self.memory_overcommit.unwrap_or_else(|| self.shares.into());
        // A pool is far below 2^53, where f64 has every whole number.
        granules((pool as f64 * times) as u64).max(GRANULE)
    }

    /// The most memory that one claim may ask for, bytes: no client can have more than the pool.
    pub fn most_memory(&self, pool: u64) -> u64 {
        granules(pool).min(self.memory(pool)).max(GRANULE)
    }

    /// The memory that a claim gets without asking, bytes.
    pub fn usual_memory(&self, pool: u64) -> u64 {
        granules(self.memory(pool) / u64::from(self.shares)).clamp(GRANULE, self.most_memory(pool))
    }

    /// The percents of a GPU's time that there are to give: 100, and more only if there are more than 100 shares.
    pub fn cores(&self) -> u64 {
        (self.usual_cores() * u64::from(self.shares)).max(100)
    }

    /// The percents that a claim gets without asking.
    pub fn usual_cores(&self) -> u64 {
        (100 / u64::from(self.shares)).max(1)
    }
}

/// Down to whole granules.
fn granules(bytes: u64) -> u64 {
    bytes / GRANULE * GRANULE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn without_overcommit_named_every_share_may_have_the_whole_pool() {
        let terms = Terms { shares: 10, memory_overcommit: None };
        assert_eq!(terms.memory(16 * GIB), 160 * GIB);
        assert_eq!(terms.usual_memory(16 * GIB), 16 * GIB);
        assert_eq!((terms.cores(), terms.usual_cores()), (100, 10));
    }

    #[test]
    fn with_the_memory_given_away_once_each_share_gets_its_part() {
        let terms = Terms { shares: 8, memory_overcommit: Some(1.0) };
        assert_eq!(terms.memory(16 * GIB), 16 * GIB);
        assert_eq!(terms.usual_memory(16 * GIB), 2 * GIB);
        assert_eq!(terms.most_memory(16 * GIB), 16 * GIB);
    }

    proptest! {
        /// The scheduler can always give every share what it gets without asking.
        #[test]
        fn all_shares_fit_without_asking(shares in 1u32..=1000, times in prop::option::of(0.01f64..100.0), pool in 0u64..1 << 40) {
            let terms = Terms { shares, memory_overcommit: times };
            let count = u64::from(shares);
            prop_assert!(terms.usual_cores() * count <= terms.cores());
            prop_assert!(terms.usual_memory(pool) <= terms.most_memory(pool));
            prop_assert!(terms.most_memory(pool) <= terms.memory(pool));
            prop_assert!(terms.usual_memory(pool) * count <= terms.memory(pool) || terms.usual_memory(pool) == GRANULE);
            for size in [terms.usual_memory(pool), terms.most_memory(pool), terms.memory(pool)] {
                prop_assert!(size > 0 && size % GRANULE == 0);
            }
        }
    }
}
