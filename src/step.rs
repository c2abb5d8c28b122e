//! What a client does next: a pure function of its phase and of what it sees.
//!
//! | phase | admitted | not admitted, work in flight | not admitted, none |
//! |---|---|---|---|
//! | Idle | [`GiveUpBit`](Action::GiveUpBit) | - | [`Serve`](Action::Serve) |
//! | Waiting | [`StartFilling`](Action::StartFilling) | - | [`Serve`](Action::Serve) |
//! | Filling | [`Fill`](Action::Fill) | [`Yield`](Action::Yield) | [`Queue`](Action::Queue) |
//! | Running | [`Run`](Action::Run) | [`Yield`](Action::Yield) | - |
//! | Draining | [`AwaitDrain`](Action::AwaitDrain) | [`AwaitDrain`](Action::AwaitDrain) | [`AwaitDrain`](Action::AwaitDrain) |
//! | Leaving | [`AwaitEnd`](Action::AwaitEnd) | - | [`AwaitEnd`](Action::AwaitEnd) |
//!
//! A dash is a combination that no client comes to: an Idle or a Waiting client has drained, and a Running one has not. The
//! function has an answer for these, too.
//!
//! The phase changes as follows, and by nothing else:
//!
//! | from | to | because of |
//! |---|---|---|
//! | Idle | Waiting | a request for the GPU, or the client is resumed |
//! | Waiting | Filling | [`StartFilling`](Action::StartFilling) |
//! | Waiting | Idle | the request is withdrawn, or the client is paused |
//! | Filling | Running | [`Fill`](Action::Fill) has put everything in place, and the client is still admitted |
//! | Filling | Waiting | [`Queue`](Action::Queue) |
//! | Filling, Running | Draining | [`Yield`](Action::Yield) |
//! | Running | Filling | an allocation grew |
//! | Draining | Waiting | the work has ended and there is more to do |
//! | Draining | Idle | the work has ended and there is no more |
//! | Draining | Filling | the work has not ended and nobody waits any more |
//! | any | Leaving | the client ends |
//!
//! [`crate::Client::poll`] acts on it with a real page and a real runtime, the simulator (`nvshare sim`) in virtual time.

use crate::page::Phase;

/// What a client sees of itself when it asks what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Its bit is set in the lock word.
    pub admitted: bool,
    /// It has run since it last drained: work that it submitted may be in flight, and what that uses must not move.
    pub in_flight: bool,
}

/// What a client does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Go to phase Filling.
    StartFilling,
    /// Bring in what is missing; run when all of it is in place.
    Fill,
    /// Go back to phase Waiting: the right to load was withdrawn before the client ran.
    Queue,
    /// Go on running, and decide anew when a slice is over.
    Run,
    /// Give way: shut the gate and begin to drain.
    Yield,
    /// Wait until the submitted work has ended.
    AwaitDrain,
    /// Write the phase again and decide anew. A decision that had not seen the release admitted the client, or the page lies
    /// about the phase.
    GiveUpBit,
    /// Make room for others if asked to. A waiter also brings memory in ahead of its turn, and decides anew when the slice of a
    /// running client is over.
    Serve,
    /// Do nothing: the arbiter closes the slot.
    AwaitEnd,
}

/// What a client in this phase does next, by these facts.
pub fn step(phase: Phase, facts: Facts) -> Action {
    match phase {
        Phase::Idle if facts.admitted => Action::GiveUpBit,
        Phase::Waiting if facts.admitted => Action::StartFilling,
        Phase::Idle | Phase::Waiting => Action::Serve,
        Phase::Filling if facts.admitted => Action::Fill,
        // Its memory grew while it ran: its memory must not go out before the work that uses it has ended.
        Phase::Filling if facts.in_flight => Action::Yield,
        Phase::Filling => Action::Queue,
        Phase::Running if facts.admitted => Action::Run,
        Phase::Running => Action::Yield,
        Phase::Draining => Action::AwaitDrain,
        Phase::Leaving => Action::AwaitEnd,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PHASES: [Phase; 6] =
        [Phase::Idle, Phase::Waiting, Phase::Filling, Phase::Running, Phase::Draining, Phase::Leaving];

    fn all() -> impl Iterator<Item = (Phase, Facts)> {
        PHASES.into_iter().flat_map(|phase| {
            [(true, true), (true, false), (false, true), (false, false)]
                .map(|(admitted, in_flight)| (phase, Facts { admitted, in_flight }))
        })
    }

    #[test]
    fn only_an_admitted_client_loads_or_runs() {
        for (phase, facts) in all() {
            if matches!(step(phase, facts), Action::StartFilling | Action::Fill | Action::Run) {
                assert!(facts.admitted, "{phase:?} {facts:?}");
            }
        }
    }

    #[test]
    fn a_recalled_client_with_work_in_flight_drains_before_it_queues() {
        let facts = Facts { admitted: false, in_flight: true };
        for phase in [Phase::Filling, Phase::Running] {
            assert_eq!(step(phase, facts), Action::Yield, "{phase:?}");
        }
        assert_eq!(step(Phase::Filling, Facts { in_flight: false, ..facts }), Action::Queue);
    }

    #[test]
    fn only_a_client_that_has_drained_makes_room() {
        for (phase, facts) in all() {
            let serves = step(phase, facts) == Action::Serve;
            assert_eq!(serves, matches!(phase, Phase::Idle | Phase::Waiting) && !facts.admitted, "{phase:?}");
        }
    }

    #[test]
    fn whoever_wants_nothing_gives_its_bit_up() {
        for in_flight in [false, true] {
            assert_eq!(step(Phase::Idle, Facts { admitted: true, in_flight }), Action::GiveUpBit);
        }
    }

    #[test]
    fn a_decision_moves_neither_a_drain_nor_an_end() {
        for (phase, facts) in all() {
            match phase {
                Phase::Draining => assert_eq!(step(phase, facts), Action::AwaitDrain),
                Phase::Leaving => assert_eq!(step(phase, facts), Action::AwaitEnd),
                _ => assert!(!matches!(step(phase, facts), Action::AwaitDrain | Action::AwaitEnd)),
            }
        }
    }
}
