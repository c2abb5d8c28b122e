//! Compute turns on a simulated GPU: among those whose memory is in place, one computes at a time while shares differ.
//!
//! The rules are those of [`nvshare::turns`], on the same [`Competition`]. A kernel (an iteration of the scenario) is not
//! interrupted. What the change from one client to the next takes is left out, and nobody is overdue: a kernel of more than a
//! second ends before the next client's turn begins, where real clients would go on beside it.

use super::job::Job;
use nvshare::slot::{SLOTS, SlotIndex, SlotSet};
use nvshare::turns::{Competition, Contender, TURN, Turn, shares_differ};
use nvshare::units::Nanos;

/// A client's work, as the GPU sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// It has none, or its memory is not in place.
    None,
    /// It has, and no kernel of it is under way.
    BetweenKernels,
    /// A kernel is under way, or it drains.
    UnderWay,
}

/// Who computes.
#[derive(Debug)]
pub struct Turns {
    competition: Competition,
    /// Whether the clients differ in their shares.
    taken: bool,
    /// How often turns have begun or ceased to be taken.
    changes: u64,
    /// GPU time of each client in turns, ns.
    had: [Nanos; SLOTS],
}

/// GPU time that a client had had in turns at a moment, and how often turns had begun or ceased to be taken by then.
#[derive(Debug, Clone, Copy, Default)]
pub struct GpuTime {
    had: Nanos,
    changes: u64,
}

impl Turns {
    /// Nobody, on a GPU where clients wait for `deadline` ns at most.
    pub fn new(deadline: Nanos) -> Self {
        let competition = Competition {
            now: 0,
            turn: Turn { holder: None, began: 0 },
            deadline,
            occupied: SlotSet::EMPTY,
            overdue: SlotSet::EMPTY,
            clients: [Contender::default(); SLOTS],
        };
        Self { competition, taken: false, changes: 0, had: [0; SLOTS] }
    }

    /// A client comes.
    pub fn arrive(&mut self, slot: SlotIndex, job: &Job) {
        let (weight, priority, limit) = (job.weight, job.priority, job.compute_limit);
        self.competition.clients[slot.get()] = Contender { weight, priority, limit, ..Contender::default() };
        self.competition.occupied = self.competition.occupied.with(slot);
        self.count();
    }

    /// A client goes.
    pub fn leave(&mut self, slot: SlotIndex) {
        self.competition.occupied = self.competition.occupied.without(slot);
        self.count();
    }

    fn count(&mut self) {
        let shares = |slot: SlotIndex| {
            let client = self.competition.client(slot);
            (client.weight, client.priority, client.limit)
        };
        let taken = shares_differ(self.competition.occupied.iter().map(shares));
        self.changes += u64::from(std::mem::replace(&mut self.taken, taken) != taken);
    }

    /// Whether the client may compute.
    pub fn has(&self, slot: SlotIndex) -> bool {
        !self.taken || self.competition.holder() == Some(slot)
    }

    /// The client computed for `time` ns, up to `now`, with the turn if turns are taken.
    pub fn computed(&mut self, slot: SlotIndex, time: Nanos, now: Nanos) {
        if self.taken {
            let client = &mut self.competition.clients[slot.get()];
            *client = client.charged(time, now);
            self.had[slot.get()] += time;
        }
    }

    /// What a client has had by now.
    pub fn gpu_time(&self, slot: SlotIndex) -> GpuTime {
        GpuTime { had: self.had[slot.get()], changes: self.changes }
    }

    /// What a client has had since then, ns, if turns have been taken all the time.
    pub fn measured(&self, slot: SlotIndex, since: GpuTime) -> Option<Nanos> {
        (self.taken && since.changes == self.changes).then(|| self.had[slot.get()] - since.had)
    }

    /// Ends a turn that is over at `now` and begins the next one. True if another client has it.
    pub fn look(&mut self, work: impl Fn(SlotIndex) -> Work, now: Nanos) -> bool {
        self.competition.now = now;
        if !self.taken {
            self.competition.turn.holder = None;
            return false;
        }
        let before = self.competition.holder();
        for slot in self.competition.occupied.iter() {
            let claims = self.competition.client(slot).claim.is_some();
            if work(slot) == Work::None {
                self.competition.clients[slot.get()].claim = None;
            } else if !claims {
                let entry = self.competition.entry(slot, false);
                let client = &mut self.competition.clients[slot.get()];
                (client.claim, client.virtual_time) = (Some(now), entry);
            }
        }
        if let Some(holder) = before {
            let over = self.competition.turn_end(holder) <= now;
            match work(holder) {
                Work::UnderWay => return false,
                Work::BetweenKernels if !over => {
                    if now.saturating_sub(self.competition.turn.began) >= TURN {
                        self.competition.turn.began = now;
                    }
                    return false;
                }
                Work::BetweenKernels => self.competition.clients[holder.get()].claim = Some(now),
                Work::None => {}
            }
        }
        self.competition.turn = Turn { holder: self.competition.next(), began: now };
        self.competition.holder() != before
    }

    /// Who has the turn, and when it is over, ns, as far as is known; nobody while turns are not taken.
    pub fn end(&self) -> Option<(SlotIndex, Nanos)> {
        let holder = self.competition.holder().filter(|_| self.taken)?;
        Some((holder, self.competition.turn_end(holder)))
    }

    /// When a client that waits may have the turn as far as its limit goes, ns; `None` if it may now.
    pub fn allowed_next(&self) -> Option<Nanos> {
        let now = self.competition.now;
        let waits = |slot: &SlotIndex| self.competition.client(*slot).claim.is_some();
        let allowed = |slot: SlotIndex| self.competition.client(slot).allowed_at(now);
        self.competition.occupied.iter().filter(waits).map(allowed).filter(|at| *at > now).min()
    }

    /// Whether somebody has work, and nobody may do any because of limits.
    pub fn all_wait(&self) -> bool {
        self.taken && self.competition.holder().is_none() && self.allowed_next().is_some()
    }
}
