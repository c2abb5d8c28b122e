//! How pods spread over the GPUs of a node although the scheduler takes the first device that fits. Pure.
//!
//! Kubernetes has no scores for devices: it goes through the devices of a node in the order in which the driver has published
//! them. So they are published by [`crate::placement`]'s order, the one that is to be filled next first, and again when that
//! order changes.
//!
//! Order alone is too slow for pods that come at once: the scheduler places a pod every few milliseconds and would fill the first
//! GPU before the driver has said that there is a better one. Therefore each device also has a capacity `places`, of which every
//! claim takes one: as many as it has taken already, and one more. When a GPU has got its claim, it has no place until the
//! driver has seen the claim and has published anew; meanwhile the next pod goes to the next GPU. So no GPU gets a second claim
//! while another one is empty, however fast pods come. The number is absolute: a claim that the driver has not seen yet has
//! taken its place in the scheduler's books, so a slow driver makes pods wait and never has two go where one should.
//! (Places of claims that leave are free at once: for the milliseconds until the driver has published anew, as many as have left may
//! go there.)
//!
//! While claims come ([`Pace::Busy`]), only the GPUs that are best for the next one have a place. When none has come for a
//! while ([`Pace::Quiet`]), each GPU has one: whoever asks for several GPUs, or for a certain one, must find them.
//!
//! What this does not allow: a pod whose containers together ask for more devices than the node has GPUs, each in a request of its
//! own. Such containers share one claim, or their requests ask for `places: 0`, or the driver runs with `--spread order`.

use crate::placement::{Candidate, Rank};
use clap::ValueEnum;

/// The name of the capacity that spreads claims.
pub const PLACES: &str = "places";

/// As many places as no node can use up.
pub const UNLIMITED: u64 = 1_000_000;

/// How claims are spread over GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Spread {
    /// By the order, and by places: no GPU gets a second claim while another is empty, however fast pods come.
    Even,
    /// By the order alone: pods that come within a moment may go to one GPU.
    Order,
}

/// Whether claims come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// One has come a moment ago.
    Busy,
    /// None has for a while.
    Quiet,
}

/// A GPU, and what claims have of it.
#[derive(Debug, Clone, Copy)]
pub struct Seat<'a> {
    /// The GPU, and how many claims have it.
    pub candidate: Candidate<'a>,
    /// The shares that they take.
    pub shares: u64,
    /// The places that they take.
    pub places: u64,
}

/// A GPU's place in the order, and how many places it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Which of the seats.
    pub seat: usize,
    /// Its capacity of places.
    pub places: u64,
}

/// The GPUs in the order in which the scheduler should fill them. `shares`: how many claims a GPU is for.
pub fn turns(seats: &[Seat<'_>], shares: u32, spread: Spread, pace: Pace) -> Vec<Turn> {
    let mut ranked: Vec<(Rank, usize)> =
        seats.iter().enumerate().map(|(number, seat)| (seat.candidate.rank(shares), number)).collect();
    ranked.sort();
    let full = |number: usize| seats[number].shares >= u64::from(shares);
    let best = ranked.iter().find(|(rank, number)| !rank.unhealthy && !full(*number)).map(|(rank, _)| *rank);
    let unlimited = spread == Spread::Order || seats.len() == 1;
    let open = |rank: &Rank, number: usize| {
        !full(number) && (pace == Pace::Quiet || best.is_some_and(|best| as_good(rank, &best)))
    };
    ranked
        .iter()
        .map(|&(rank, seat)| {
            let taken = seats[seat].places;
            let places = if unlimited { UNLIMITED } else { taken + u64::from(open(&rank, seat)) };
            Turn { seat, places }
        })
        .collect()
}

/// Whether a GPU is as good for the next claim as the best one: the number on the node says nothing, and among empty ones
/// neither does the load of those who use the GPU without being clients.
fn as_good(rank: &Rank, best: &Rank) -> bool {
    let empty = |rank: &Rank| !rank.unhealthy && !rank.occupied;
    if empty(best) { empty(rank) } else { Rank { index: best.index, ..*rank } == *best }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{Gpu, Health, Load};
    use proptest::prelude::*;

    const SHARES: u32 = 10;

    fn gpu(index: u32, load: Load) -> Gpu {
        Gpu {
            uuid: format!("GPU-{index}"),
            index,
            model: "Simulated".into(),
            memory: 16 << 30,
            numa_node: None,
            health: Health::Healthy,
            load,
        }
    }

    fn idle(count: u32) -> Vec<Gpu> {
        (0..count).map(|index| gpu(index, Load::default())).collect()
    }

    fn seats<'a>(gpus: &'a [Gpu], given: &[u32]) -> Vec<Seat<'a>> {
        let seat = |(gpu, &given): (&'a Gpu, &u32)| Seat {
            candidate: Candidate { gpu, given },
            shares: given.into(),
            places: given.into(),
        };
        gpus.iter().zip(given).map(seat).collect()
    }

    fn open(gpus: &[Gpu], given: &[u32], pace: Pace) -> Vec<usize> {
        let seats = seats(gpus, given);
        let turns = turns(&seats, SHARES, Spread::Even, pace);
        turns.iter().filter(|turn| turn.places > seats[turn.seat].places).map(|turn| turn.seat).collect()
    }

    /// What the scheduler does: the first device that fits.
    fn first_fit(turns: &[Turn], taken: &[u64]) -> Option<usize> {
        turns.iter().find(|turn| taken[turn.seat] < turn.places).map(|turn| turn.seat)
    }

    #[test]
    fn empty_gpus_come_first_and_each_has_one_place() {
        let gpus = idle(4);
        assert_eq!(open(&gpus, &[1, 0, 3, 0], Pace::Busy), [1, 3]);
        assert_eq!(open(&gpus, &[1, 1, 3, 2], Pace::Busy), [0, 1]);
    }

    #[test]
    fn when_none_has_come_for_a_while_each_gpu_has_a_place_but_a_full_one() {
        assert_eq!(open(&idle(4), &[1, 0, 10, 2], Pace::Quiet), [1, 0, 3]);
    }

    #[test]
    fn load_goes_before_number() {
        let mut gpus = idle(2);
        gpus[0].load = Load { tenants: 1, busy: 1.0, demand: 15 << 30, ..Load::default() };
        gpus[1].load = Load { tenants: 3, busy: 0.0, demand: 3 << 30, ..Load::default() };
        assert_eq!(open(&gpus, &[1, 3], Pace::Busy), [1]);
        assert_eq!(open(&gpus, &[1, 3], Pace::Quiet), [1, 0]);
    }

    #[test]
    fn an_unhealthy_gpu_comes_last_and_keeps_nobody_waiting() {
        let mut gpus = idle(2);
        gpus[0].health = Health::Unhealthy("broken".into());
        assert_eq!(open(&gpus, &[0, 4], Pace::Busy), [1]);
        assert_eq!(open(&gpus, &[0, 4], Pace::Quiet), [1, 0]);
    }

    #[test]
    fn one_gpu_alone_and_order_alone_have_no_limit() {
        let gpus = idle(2);
        for turns in [
            turns(&seats(&gpus[..1], &[5]), SHARES, Spread::Even, Pace::Busy),
            turns(&seats(&gpus, &[5, 4]), SHARES, Spread::Order, Pace::Busy),
        ] {
            assert!(turns.iter().all(|turn| turn.places == UNLIMITED), "{turns:?}");
        }
    }

    proptest! {
        /// However often the scheduler allocates before the driver sees it, and whenever the driver publishes: no GPU gets a second
        /// claim while another is empty, all shares can be used, and a driver that keeps up leaves no two GPUs further apart than one.
        #[test]
        fn nobody_shares_while_a_gpu_is_free(count in 1usize..9, publish in prop::collection::vec(any::<bool>(), 0..200), quiet: bool) {
            let gpus = idle(count as u32);
            let pace = if quiet { Pace::Quiet } else { Pace::Busy };
            let mut taken = vec![0u64; count];
            let mut steps = publish.iter();
            let seen = |taken: &[u64]| {
                let given: Vec<u32> = taken.iter().map(|taken| *taken as u32).collect();
                turns(&seats(&gpus, &given), SHARES, Spread::Even, pace)
            };
            let mut turns = seen(&taken);
            loop {
                if steps.next().copied().unwrap_or(true) {
                    turns = seen(&taken);
                }
                let Some(chosen) = first_fit(&turns, &taken).filter(|chosen| taken[*chosen] < SHARES.into()) else {
                    if seen(&taken) == turns {
                        break;
                    }
                    turns = seen(&taken);
                    continue;
                };
                taken[chosen] += 1;
                if count > 1 {
                    prop_assert!(taken[chosen] == 1 || taken.iter().all(|taken| *taken > 0), "{taken:?}");
                    let (most, fewest) = (taken.iter().max().unwrap(), taken.iter().min().unwrap());
                    prop_assert!(most - fewest <= 1, "{taken:?}");
                }
            }
            prop_assert!(taken.iter().all(|taken| *taken == u64::from(SHARES)), "{taken:?}");
        }

        /// Nothing is lost or named twice, and a place that was taken is not taken away.
        #[test]
        fn all_gpus_are_published(given in prop::collection::vec(0u32..12, 0..9), busy in prop::collection::vec(0.0f64..1.0, 9), quiet: bool) {
            let gpus: Vec<_> = given.iter().zip(&busy).enumerate().map(|(index, (given, busy))| {
                gpu(index as u32, Load { tenants: *given, busy: *busy, ..Load::default() })
            }).collect();
            let seats = seats(&gpus, &given);
            let turns = turns(&seats, SHARES, Spread::Even, if quiet { Pace::Quiet } else { Pace::Busy });
            let mut named: Vec<_> = turns.iter().map(|turn| turn.seat).collect();
            named.sort();
            prop_assert_eq!(named, (0..given.len()).collect::<Vec<_>>());
            prop_assert!(turns.iter().all(|turn| turn.places >= seats[turn.seat].places));
            // One alone has places without end, also when it has no share left.
            let room = given.len() == 1 || given.iter().any(|given| *given < SHARES);
            prop_assert_eq!(room, turns.iter().any(|turn| turn.places > seats[turn.seat].places));
        }
    }
}
