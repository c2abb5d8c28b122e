//! How long clients run: the quantum, which a switch must be worth, and turns, which grow while they are used up.

use crate::page::Quantum;
use crate::policy::{copy_time, switch_time};
use crate::slot::SlotIndex;
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Granules, Nanos, scaled};
use crate::usage::virtual_of;
use std::cmp::Reverse;

/// A turn is at most so many times as long for its holder's weight: the bound on everybody's wait depends on it.
pub const MOST_SHARES: u32 = 10;

/// How long a slice is at least that ends because `waiter` waits, ns.
pub fn quantum(snapshot: &Snapshot, waiter: SlotIndex) -> Nanos {
    match snapshot.settings.quantum {
        Quantum::Fixed(ns) => ns,
        Quantum::Auto { factor_milli, min, max, .. } => {
            scaled(switch_time(snapshot, waiter), u64::from(factor_milli), 1_000).clamp(min, max.max(min))
        }
    }
}

/// Those who want the GPU or have it.
fn contenders(snapshot: &Snapshot) -> impl Iterator<Item = (SlotIndex, &SlotView)> {
    snapshot.clients().filter(|(_, view)| view.phase.wants_gpu())
}

/// Those of them who take turns: not who has come with a credit, and has not used up a turn since.
fn rotation(snapshot: &Snapshot) -> impl Iterator<Item = (SlotIndex, &SlotView)> {
    contenders(snapshot).filter(|(_, view)| !view.has_credit())
}

/// The weight whose turns are the shortest: the least, or a tenth of the largest if that is more.
fn shortest_weight(snapshot: &Snapshot) -> u32 {
    let weights = || rotation(snapshot).map(|(_, view)| view.weight.max(1));
    let most = weights().max().unwrap_or(1);
    weights().min().unwrap_or(1).max(most.div_ceil(MOST_SHARES))
}

/// How many times the client in `slot` would have to be as heavy, to have a tenth of the largest weight of those who take turns;
/// at most [`MOST_SHARES`].
pub(super) fn times_lighter(snapshot: &Snapshot, slot: SlotIndex) -> u32 {
    let weight = snapshot.view(slot).weight.max(1);
    let most = rotation(snapshot).map(|(_, view)| view.weight).max().unwrap_or(weight);
    most.div_ceil(MOST_SHARES).div_ceil(weight).clamp(1, MOST_SHARES)
}

/// A client's weight where turns are compared: not less than the shortest, and not more than [`MOST_SHARES`] times that.
fn turn_weight(view: &SlotView, shortest: u32) -> u32 {
    view.weight.clamp(shortest, shortest.saturating_mul(MOST_SHARES))
}

/// How long turns are, of all who take them: computed once for a decision.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turns {
    /// The weight whose turns are the shortest.
    lightest: u32,
    /// How long a turn is for that weight, ns.
    even: Nanos,
    /// How long it is for that weight as long as it has not grown, ns.
    least: Nanos,
    /// How long a switch takes while all take turns, ns.
    switch: Nanos,
    /// D, a setting, ns.
    deadline: Nanos,
}

impl Turns {
    pub fn of(snapshot: &Snapshot) -> Self {
        let (lightest, switch) = (shortest_weight(snapshot), common_switch_time(snapshot));
        let (even, least) = match snapshot.settings.quantum {
            Quantum::Fixed(ns) => (ns, ns),
            Quantum::Auto { factor_milli, longest_milli, min, max } => {
                let least = scaled(switch, u64::from(factor_milli), 1_000).clamp(min, max.max(min));
                let longest = longest_milli.max(factor_milli);
                let longest = scaled(least, u64::from(longest), u64::from(factor_milli));
                let longest = longest.min(max).min(within_deadline(snapshot, lightest, switch)).max(least);
                (UsedUp::of(snapshot).grown(least, longest), least)
            }
        };
        Self { lightest, even, least, switch, deadline: snapshot.settings.deadline }
    }

    /// How long a turn of a client is, ns: the quantum of a common switch, grown by a half in each round of turns that have
    /// been used up, times the client's weight over the least.
    ///
    /// A round's growth is spread evenly over its turns: those of four follow one another with an eighth more. So taking turns
    /// stays fair while it becomes cheaper: after any n turns of n clients, Jain's index over their GPU time is 0.98. Turns do
    /// not grow beyond what lets everybody have one within D, a setting. Who comes with a credit changes nothing in that until
    /// it has used up a turn.
    pub fn length(&self, view: &SlotView) -> Nanos {
        self.weighted(self.even, view)
    }

    fn weighted(&self, time: Nanos, view: &SlotView) -> Nanos {
        scaled(time, u64::from(turn_weight(view, self.lightest)), u64::from(self.lightest))
    }

    /// How long it takes, ns, until all others who want the GPU have had one of the shortest turns, with the switches.
    pub fn round(&self, snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
        contenders(snapshot)
            .filter(|(other, _)| *other != slot)
            .map(|(_, view)| self.weighted(self.least, view).saturating_add(self.switch))
            .fold(0, Nanos::saturating_add)
    }

    /// What a turn adds to anybody's virtual time, ns.
    fn worth(&self) -> Nanos {
        virtual_of(self.even, u64::from(self.lightest))
    }

    /// A lag up to this, ns of virtual time, is that of one who takes turns.
    pub fn tolerance(&self) -> Nanos {
        let worth = self.worth();
        worth.saturating_add(worth / 2)
    }

    /// Who is ahead of the mean by more than this, ns of virtual time, has more than turns or deadlines can have given it: a turn
    /// and a half, and D.
    pub fn far(&self) -> Nanos {
        virtual_of(self.deadline, u64::from(self.lightest)).saturating_add(self.tolerance())
    }

    /// How long those who take turns run and switch for each of them, on average, ns.
    pub fn distance(&self) -> Nanos {
        self.even.saturating_add(self.switch)
    }
}

/// How long a turn of the client in `slot` is, ns.
pub fn turn_length(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    Turns::of(snapshot).length(snapshot.view(slot))
}

/// How long a turn may be for the least weight, so that nobody waits for longer than D until all others have had one, ns.
/// Each switch takes `switch` ns.
fn within_deadline(snapshot: &Snapshot, lightest: u32, switch: Nanos) -> Nanos {
    let (mut clients, mut weights) = (0u64, 0u64);
    for (_, view) in rotation(snapshot) {
        clients += 1;
        weights += u64::from(turn_weight(view, lightest));
    }
    let others = weights.saturating_sub(u64::from(lightest)).max(1);
    let time = snapshot.settings.deadline.saturating_sub(switch.saturating_mul(clients));
    scaled(time, u64::from(lightest), others)
}

/// Turns that those who take them have used up.
struct UsedUp {
    /// All of them, so many times.
    rounds: u32,
    /// So many of them once more.
    since: u32,
    /// So many are there.
    clients: u32,
}

impl UsedUp {
    /// The one that has used up fewest says how many rounds, and the others' tickets whether they have queued once more
    /// since it queued. Whoever is further ahead counts no more for that: else the one behind would lift all of those with
    /// each turn of its own, and turns would grow by several steps at once (docs/decisions/0012-growth-by-rounds.md).
    fn of(snapshot: &Snapshot) -> Self {
        let turns = || rotation(snapshot).map(|(_, view)| view);
        let behind = turns().map(|view| (view.consecutive_slices, Reverse(view.ticket))).min();
        let (rounds, Reverse(ticket)) = behind.unwrap_or((0, Reverse(0)));
        let since = turns().filter(|view| view.ticket > ticket).count() as u32;
        Self { rounds, since, clients: turns().count().max(1) as u32 }
    }

    /// What `shortest` has grown to, at most `longest`, ns.
    fn grown(&self, shortest: Nanos, longest: Nanos) -> Nanos {
        // A hundred million times at least, and more than any longest; a page may claim four thousand million rounds.
        const ENOUGH: u32 = 48;
        let steps = self.rounds.min(ENOUGH) * self.clients + self.since;
        let more = |time: Nanos| time.saturating_add(time / (2 * u64::from(self.clients)));
        let lengths = std::iter::successors(Some(shortest), |time| (*time < longest).then(|| more(*time)));
        lengths.take(steps as usize + 1).last().unwrap_or(shortest).min(longest)
    }
}

/// How long a switch takes while those who want the GPU take turns, ns, whosever turn it is: the largest comes in, but for
/// what finds room beside the second largest before ([`crate::policy::prefetch`]); or, where any two fit, but for the room
/// for all.
///
/// What lies on the GPU at this moment does not count: of what has gone from its memory since, one waiter lacks a tenth more
/// than the next, and turns that differ by so much on top of their growth are not fair (seen on an H100).
fn common_switch_time(snapshot: &Snapshot) -> Nanos {
    let (mut largest, mut second, mut all) = (0, 0, 0u64);
    for (_, view) in rotation(snapshot) {
        let demand = view.movable();
        all += u64::from(demand);
        (largest, second) = if demand > largest { (demand, largest) } else { (largest, second.max(demand)) };
    }
    let usable = u64::from(snapshot.usable());
    let two = u64::from(largest) + u64::from(second);
    let moves = if two > usable { two } else { all }.saturating_sub(usable).min(u64::from(largest));
    let moves = moves as Granules;
    copy_time(moves, snapshot.bandwidth_in).max(copy_time(moves, snapshot.bandwidth_out))
}
