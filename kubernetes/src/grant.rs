//! What a container was promised of its GPUs, and the environment by which the shim learns it
//! (docs/operations/settings.md, "A client's environment").
//!
//! A process has one set of shares, which holds on each of its GPUs. So a promise is made for a GPU and not for the sum of them.

use nvshare::shares::{ComputeLimit, MemoryLimit, Priority};
use nvshare::units::bytes_of;
use nvshare::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};

/// What a container was promised of each of its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The memory that it sees and may have.
    pub memory: MemoryLimit,
    /// Its part of the GPU's time against others'.
    pub weight: u32,
    /// How soon its turn comes.
    pub priority: Priority,
    /// The most of the GPU's time that it may have.
    pub compute: ComputeLimit,
}

impl Default for Grant {
    fn default() -> Self {
        Self {
            memory: MemoryLimit::None,
            weight: DEFAULT_WEIGHT,
            priority: Priority::default(),
            compute: ComputeLimit::default(),
        }
    }
}

impl Grant {
    /// What somebody gets who has `count` of these of one GPU: so many times the memory and the weight. A part of the memory that would be
    /// more than all is no limit; no weight is above the largest.
    #[must_use]
    pub fn times(self, count: u32) -> Self {
        let memory = match self.memory {
            MemoryLimit::Size(granules) => MemoryLimit::Size(granules.saturating_mul(count)),
            MemoryLimit::Part(part) => MemoryLimit::Part(part.saturating_mul(count)),
            MemoryLimit::None => MemoryLimit::None,
        };
        const WHOLE: u32 = 1_000_000;
        let memory = match memory {
            MemoryLimit::Part(part) if part >= WHOLE => MemoryLimit::None,
            memory => memory,
        };
        Self { memory, weight: self.weight.saturating_mul(count).min(MAX_WEIGHT), ..self }
    }

    /// The variables that tell the shim. What is as usual is not named: then the container's own environment may.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let usual = Self::default();
        let mut variables = Vec::new();
        if self.memory != usual.memory {
            variables.push(("NVSHARE_MEMORY_LIMIT", exact(self.memory)));
        }
        if self.weight != usual.weight {
            variables.push(("NVSHARE_WEIGHT", self.weight.to_string()));
        }
        if self.priority != usual.priority {
            variables.push(("NVSHARE_PRIORITY", self.priority.to_string()));
        }
        if self.compute != usual.compute {
            variables.push(("NVSHARE_COMPUTE_LIMIT", self.compute.to_string()));
        }
        variables
    }
}

/// A limit as text that is read back as the same limit: [`MemoryLimit`]'s own text rounds, for people.
fn exact(limit: MemoryLimit) -> String {
    match limit {
        MemoryLimit::Size(granules) => match bytes_of(granules) >> 20 {
            mib if mib % 1_024 == 0 => format!("{}GiB", mib / 1_024),
            mib => format!("{mib}MiB"),
        },
        limit => limit.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(memory: &str, weight: u32) -> Grant {
        Grant { memory: memory.parse().unwrap(), weight, ..Grant::default() }
    }

    #[test]
    fn what_is_as_usual_is_not_named() {
        assert_eq!(Grant::default().environment(), []);
        let all = Grant { priority: Priority::High, compute: "30%".parse().unwrap(), ..one("8GiB", 300) };
        let named = [
            ("NVSHARE_MEMORY_LIMIT", "8GiB"),
            ("NVSHARE_WEIGHT", "300"),
            ("NVSHARE_PRIORITY", "high"),
            ("NVSHARE_COMPUTE_LIMIT", "30%"),
        ];
        assert_eq!(all.environment(), named.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn two_of_one_gpu_are_twice_the_memory_and_the_weight() {
        assert_eq!(one("4GiB", 100).times(2), one("8GiB", 200));
        assert_eq!(one("10%", 100).times(3), one("30%", 300));
        assert_eq!(one("40%", 600).times(3), one("none", 1_000));
        assert_eq!(one("4GiB", 100).times(1), one("4GiB", 100));
    }

    proptest! {
        #[test]
        fn a_limit_is_read_back_as_it_was_promised(granules in 1..=nvshare::units::MAX_GRANULES, part in 10_000..=1_000_000u32) {
            for limit in [MemoryLimit::Size(granules), MemoryLimit::Part(part)] {
                prop_assert_eq!(exact(limit).parse(), Ok(limit));
            }
        }
    }
}
