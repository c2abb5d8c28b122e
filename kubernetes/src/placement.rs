//! In which order GPUs are filled, and which virtual GPUs a container should get. Pure: no clock, no file, no NVML.
//!
//! The order, first to last:
//!
//! 1. healthy GPUs;
//! 2. GPUs without tenants, neither a client in the page nor a virtual GPU that was given away: a GPU of its own is the best that a
//!    container can have, whatever the others' figures say;
//! 3. the lowest score;
//! 4. the fewest tenants;
//! 5. the lowest number on the node.
//!
//! The score says how much a newcomer would be held up, as the sum of three parts. Each is 0 on an idle GPU and 1 where its matter is
//! used up, and all count the same: a GPU that computes without pause halves a newcomer's speed, one whose memory is
//! full makes it take turns, and where somebody has waited long the newcomer will too.
//!
//! | part | what it is | why so |
//! |---|---|---|
//! | memory | what clients need, by the pool; what is beyond the pool counts twice | as long as all fits, nobody's memory moves. Beyond, each turn copies what is too much out and in |
//! | time | the part of the last moments in which a kernel ran | computing time is shared, whatever the memory |
//! | waiting | the longest wait now, w / (w + 10 s) | NVML's figure cannot exceed 1 however many clients want the GPU; their waiting does. After 10 s, as long as a turn often takes, it is a half |
//!
//! A virtual GPU that was given away and has no client yet (its container starts, or is idle) counts as if it needed its part of the pool,
//! `1 / shares`. Otherwise twenty pods that come within a second would all go to the GPU that was idle before.
//!
//! A score is rounded to a twentieth, because live figures jitter: two GPUs that differ by a percent are the same, and then the number of
//! tenants decides.

use crate::inventory::Gpu;
use crate::virtual_gpu::VirtualGpu;
use nvshare::placement::{Standing, held_up};
use nvshare::units::Nanos;
use std::collections::{BTreeMap, BTreeSet};

/// A GPU that a container may come to.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The GPU as it is now.
    pub gpu: &'a Gpu,
    /// How many of its virtual GPUs other containers have.
    pub given: u32,
}

/// Where a GPU stands among others: the smallest is filled first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// It takes no new clients.
    pub unhealthy: bool,
    /// Where it stands among those that do ([`nvshare::placement`]). Its tenants are clients, or virtual GPUs that were given away,
    /// whichever are more; its number is that on the node.
    pub standing: Standing,
}

impl Candidate<'_> {
    /// Where it stands. `shares`: how many virtual GPUs each GPU is offered as.
    pub fn rank(&self, shares: u32) -> Rank {
        let tenants = self.gpu.load.tenants.max(self.given);
        Rank {
            unhealthy: !self.gpu.health.is_healthy(),
            standing: Standing::of(self.gpu.index as usize, tenants as usize, self.score(shares)),
        }
    }

    /// The score: 0 on an idle GPU.
    pub fn score(&self, shares: u32) -> f64 {
        let load = &self.gpu.load;
        let unseen = self.given.saturating_sub(load.tenants);
        let need =
            load.demand as f64 / self.gpu.memory.max(1) as f64 + f64::from(unseen) / f64::from(shares.max(1));
        held_up(need, load.busy, Nanos::try_from(load.waiting.as_nanos()).unwrap_or(Nanos::MAX))
    }
}

/// Sorts GPUs into the order in which they should be filled. `shares`: how many virtual GPUs each is offered as.
pub fn order(candidates: &mut [Candidate<'_>], shares: u32) {
    candidates.sort_by_key(|candidate| candidate.rank(shares));
}

/// Chooses `size` virtual GPUs for one container out of those that are available. Those in `must_include` are among
/// them. What is not available belongs to other containers.
///
/// Each is of another GPU for as long as there are GPUs; then of those that the container has the fewest of. If there are fewer than `size`,
/// all are chosen. GPUs that are not in `gpus` come last.
pub fn choose(
    gpus: &[Gpu],
    shares: u32,
    available: &[VirtualGpu],
    must_include: &[VirtualGpu],
    size: usize,
) -> Vec<VirtualGpu> {
    let free: BTreeSet<_> = available.iter().chain(must_include).collect();
    let mut numbers: BTreeMap<&str, Vec<&VirtualGpu>> = BTreeMap::new();
    // Downwards, so that the lowest number is taken first.
    for one in free.iter().rev() {
        numbers.entry(&one.gpu).or_default().push(one);
    }
    let rank = |uuid: &str| {
        let gpu = gpus.iter().find(|gpu| gpu.uuid == uuid)?;
        let given = shares.saturating_sub(numbers[uuid].len() as u32);
        Some(Candidate { gpu, given }.rank(shares))
    };
    let ranks: BTreeMap<_, _> = numbers.keys().map(|&uuid| (uuid, rank(uuid))).collect();
    let mut chosen: Vec<VirtualGpu> = Vec::with_capacity(size);
    for one in must_include {
        if !chosen.contains(one) {
            chosen.push(one.clone());
        }
    }
    while chosen.len() < size {
        let has = |uuid: &str| chosen.iter().filter(|one| one.gpu == uuid).count();
        let next_of = |uuid: &str| numbers[uuid].iter().rev().find(|one| !chosen.contains(one));
        let best = ranks
            .iter()
            .filter_map(|(&uuid, rank)| {
                next_of(uuid).map(|next| ((has(uuid), rank.is_none(), *rank, uuid), *next))
            })
            .min_by(|(one, _), (other, _)| one.cmp(other));
        match best {
            Some((_, next)) => chosen.push(next.clone()),
            None => break,
        }
    }
    chosen
}

#[cfg(test)]
mod tests;
