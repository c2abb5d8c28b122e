//! Compute turns: who submits work to the GPU, among clients whose memory is in place.
//!
//! Without MPS a GPU never runs kernels of two processes at the same time. It changes from one process to the next every millisecond
//! or two, whatever their weights and priorities. So while the clients of a GPU differ in their shares
//! ([`Page::shares_are_set`]), nvshare decides itself: one client has the *turn* and submits, and the others' submissions wait.
//! No memory moves for that. A turn takes [`TURN`], or longer while nobody else has a claim to the GPU; then the client's work in
//! flight ends, which is little ([`crate::pace`]), and the next client has the turn. So the time of a turn is GPU time that nobody
//! else had, and is counted as such.
//!
//! - **Priority** is strict: while a client of higher priority has work, those below it submit nothing.
//! - **Weights**: among equals, the next turn is for who has had least GPU time for its weight ([`Contender::virtual_time`]), as
//!   start-time fair queueing has it (Goyal, Vin and Cheng, "Start-time fair queueing", 1996).
//! - **A limit** is a bucket of [`CREDIT`] ns of GPU time that fills at the limit's rate; it may be overdrawn by the work that was
//!   in flight. So a client has at most its part of any time, and `CREDIT` and that work. The word is the time at which the
//!   bucket holds nothing ([`Contender::paid_until`]), as in the generic cell rate algorithm (ITU-T I.371).
//! - **Nobody starves**: who has waited for `--deadline` (twice that at low priority) is next, before everybody.
//! - **Nobody is held up** by a client that does not give its turn up, because it is stopped or its work does not end: after
//!   [`PATIENCE`] others go on beside it ([`Page::seize_turn`]), and do not wait for it before its work has ended.
//!
//! ```text
//!            claim: it has work         it is next                its time is over, or it has no more work
//!   nothing ───────────────────▶ waits ───────────▶ has the turn ──────────────────────────────────┐
//!      ▲                           ▲                                                               ▼
//!      │ it has no more work       └─────────────── it has more ────────────────────────── its work in flight ends
//!      └──────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The turn is one word, which anybody changes by compare-and-swap: there is no lock that a stopped process could hold. Who claims
//! the turn writes its claim, and then looks at the word; who gives the turn up empties the word, and then looks at the claims. So
//! one of the two sees the other, and no claim is overlooked.

mod page;

pub(crate) use page::GpuTime;

use crate::packed::Packed;
use crate::page::Page;
use crate::shares::{ComputeLimit, Priority};
use crate::slot::{SLOTS, SlotIndex, SlotSet};
use crate::sync::{AtomicU64, Ordering, now};
use crate::units::{MILLISECOND, Nanos, SECOND, scaled};
use crate::usage;

/// How long a turn takes, in ns, if somebody else of the same priority has work. A change from one client to the next takes 0.2 to
/// 0.3 ms of GPU time on an H200 (docs/decisions/0028-compute-shares.md): with turns of 5 ms, two equal clients had 47.9 % of the GPU
/// each. Longer turns make clients wait longer.
pub const TURN: Nanos = 10 * MILLISECOND;

/// After so long, in ns, a turn that has neither ended nor begun anew is taken from its client.
pub const PATIENCE: Nanos = SECOND;

/// The GPU time that a client with a limit may have at once after it had none for a while, in ns: 1 % of two seconds.
pub const CREDIT: Nanos = 20 * MILLISECOND;

/// A client that had used up what its limit allows goes on when it may have so much GPU time, in ns.
pub const REFILL: Nanos = 4 * MILLISECOND;

/// A client that comes back, having had more than its share before, is at most this GPU time ahead of the others, in ns.
const LEAD: Nanos = SECOND;

/// No client waits longer than this for its bucket, in ns, whatever its words say.
const LONGEST_DEBT: Nanos = 600 * SECOND;

/// GPU time that lies so far back counts half in [`Contender`]'s share of the last seconds, in ns.
const RECENT: Nanos = SECOND;

/// How much work may be in flight beyond the end of a turn, in ns.
const AHEAD: Nanos = MILLISECOND;

/// The same for a client that somebody with a higher priority may interrupt at any moment, in ns: enough for the GPU not to wait for
/// the client's thread.
const AHEAD_OF_HIGHER: Nanos = MILLISECOND / 2;

/// Who has the turn. One word: `began, in us:56 | slot + 1, or 0 for nobody:8`. No two turns begin at the same time, so the word is
/// another one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Who has it.
    pub holder: Option<SlotIndex>,
    /// Since when, ns, in whole microseconds.
    pub began: Nanos,
}

const MICROSECOND: Nanos = 1_000;

impl Turn {
    /// Since when, at the time `now`, ns. A beginning in the far future was written by nobody who keeps the protocol, and counts as
    /// one long ago.
    fn began_by(self, now: Nanos) -> Nanos {
        if self.began > now.saturating_add(SECOND) { 0 } else { self.began.min(now) }
    }
}

impl From<u64> for Turn {
    /// Any 64 bits are some turn.
    fn from(word: u64) -> Self {
        let holder = (word as usize & 0xff).checked_sub(1).and_then(SlotIndex::new);
        Self { holder, began: (word >> 8).saturating_mul(MICROSECOND) }
    }
}

impl From<Turn> for u64 {
    fn from(turn: Turn) -> Self {
        let holder = turn.holder.map_or(0, |slot| slot.get() as u64 + 1);
        (turn.began / MICROSECOND) << 8 | holder
    }
}

/// What a decision knows of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contender {
    /// Its weight, 1 to [`usage::MAX_WEIGHT`].
    pub weight: u32,
    /// Its priority.
    pub priority: Priority,
    /// Its limit.
    pub limit: ComputeLimit,
    /// Since when it has work and has not had the turn, ns; `None` if it has none. Of no meaning while it has the turn.
    pub claim: Option<Nanos>,
    /// GPU time that it has had, by its weight, ns of virtual time.
    pub virtual_time: Nanos,
    /// When its bucket holds nothing, ns: before now, it may have more; after now, it has had too much.
    pub paid_until: Nanos,
}

/// Whether some of these clients differ in weight or priority, or some client has a limit. If not, nobody takes turns.
pub fn shares_differ(clients: impl IntoIterator<Item = (u32, Priority, ComputeLimit)>) -> bool {
    let mut first = None;
    clients.into_iter().any(|(weight, priority, limit)| {
        let own = (weight, priority);
        *first.get_or_insert(own) != own || limit.millionths().is_some()
    })
}

/// GPU time as virtual time, ns ([`usage::virtual_of`]).
fn virtual_of(time: Nanos, weight: u32) -> Nanos {
    usage::virtual_of(time, u64::from(usage::weight(weight)))
}

/// The other way round.
fn real_of(time: Nanos, weight: u32) -> Nanos {
    usage::real_of(time, u64::from(usage::weight(weight)))
}

/// All of the time, in millionths.
const WHOLE: u32 = 1_000_000;

impl Contender {
    /// The time in which its limit allows `used` ns of GPU time, in ns; `None` without a limit.
    fn time_for(&self, used: Nanos) -> Option<Nanos> {
        self.limit.millionths().map(|part| scaled(used, u64::from(WHOLE), u64::from(part)))
    }

    /// When it may have the turn, as far as its limit goes, ns.
    pub fn allowed_at(&self, now: Nanos) -> Nanos {
        let Some(refill) = self.time_for(REFILL) else { return 0 };
        self.paid_until.min(now.saturating_add(LONGEST_DEBT)).saturating_add(refill)
    }

    /// When it has used up what its limit allows, if it has the GPU from now on, ns; `None` without a limit.
    fn used_up_at(&self, now: Nanos) -> Option<Nanos> {
        let (part, whole) = (u64::from(self.limit.millionths()?), u64::from(WHOLE));
        let credit = scaled(now.saturating_sub(self.paid_until), part, whole).min(CREDIT);
        // The bucket fills meanwhile.
        Some(now.saturating_add(scaled(credit, whole, whole - part)))
    }

    /// The same client after `used` ns of GPU time, up to now.
    #[must_use]
    pub fn charged(&self, used: Nanos, now: Nanos) -> Self {
        let full = now.saturating_sub(used).saturating_sub(self.time_for(CREDIT).unwrap_or(0));
        let paid_until = self
            .time_for(used)
            .map_or(self.paid_until, |time| self.paid_until.max(full).saturating_add(time));
        Self {
            virtual_time: self.virtual_time.saturating_add(virtual_of(used, self.weight)),
            paid_until,
            ..*self
        }
    }
}

/// Where a client stands among those who wait: the least is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// It has waited for so long that it is next, ns: the longest first.
    Late(Nanos, SlotIndex),
    /// By its priority (the rank: 0 is the highest), then by its virtual time, then by when it came.
    InTurn(u8, Nanos, Nanos, SlotIndex),
}

fn rank(priority: Priority) -> u8 {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
        Priority::Low => 2,
    }
}

/// The clients of a GPU that compete for the turn, at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Competition {
    /// The moment, CLOCK_MONOTONIC ns.
    pub now: Nanos,
    /// Who has the turn.
    pub turn: Turn,
    /// How long a client waits at most before it is next, ns; twice that at low priority.
    pub deadline: Nanos,
    /// The clients.
    pub occupied: SlotSet,
    /// Those that do not give up a turn that they had.
    pub overdue: SlotSet,
    /// The clients, by slot.
    pub clients: [Contender; SLOTS],
}

impl Competition {
    /// Looks at the page.
    pub fn take(page: &Page) -> Self {
        let occupied = page.occupied();
        let mut clients = [Contender::default(); SLOTS];
        for slot in occupied.iter() {
            clients[slot.get()] = page.contender(slot);
        }
        Self {
            now: now(),
            turn: page.turn(),
            deadline: page.settings().deadline,
            occupied,
            overdue: page.header.overdue.load(Ordering::Acquire),
            clients,
        }
    }

    /// What is known of a client.
    pub fn client(&self, slot: SlotIndex) -> &Contender {
        &self.clients[slot.get()]
    }

    /// Who has the turn, if it is a client.
    pub fn holder(&self) -> Option<SlotIndex> {
        self.turn.holder.filter(|slot| self.occupied.contains(*slot))
    }

    /// Those who have work and may have it done, without `except`.
    fn claimants(&self, except: Option<SlotIndex>) -> impl Iterator<Item = SlotIndex> {
        self.occupied.iter().filter(move |slot| {
            let client = self.client(*slot);
            Some(*slot) != except
                && client.claim.is_some()
                && !self.overdue.contains(*slot)
                && client.allowed_at(self.now) <= self.now
        })
    }

    /// When a client that waits since `claim` is next, whatever its priority, ns.
    fn due(&self, slot: SlotIndex, claim: Nanos) -> Nanos {
        let times = if self.client(slot).priority == Priority::Low { 2 } else { 1 };
        claim.saturating_add(self.deadline.saturating_mul(times))
    }

    fn place(&self, slot: SlotIndex) -> Place {
        let client = self.client(slot);
        let claim = client.claim.unwrap_or(self.now);
        match self.due(slot, claim) {
            due if due <= self.now => Place::Late(due, slot),
            _ => Place::InTurn(rank(client.priority), client.virtual_time, claim, slot),
        }
    }

    /// Whose turn is next if nobody has it: of those who have work and may have it done, by place.
    pub fn next(&self) -> Option<SlotIndex> {
        self.claimants(None).min_by_key(|slot| self.place(*slot))
    }

    /// When the turn of its holder is over, ns; now, or earlier: it is. If nobody else has a claim, some time from now: look
    /// again then.
    pub fn turn_end(&self, holder: SlotIndex) -> Nanos {
        let (now, client) = (self.now, self.client(holder));
        let least = self.turn.began_by(now).saturating_add(TURN);
        let rival = self.claimants(Some(holder)).map(|slot| self.place(slot)).min();
        let end = match rival {
            None => now.saturating_add(TURN),
            // It was late itself, and is not interrupted.
            Some(_) if client.claim.is_some_and(|claim| self.due(holder, claim) <= self.turn.began) => least,
            Some(Place::Late(..)) => now,
            Some(Place::InTurn(rank_of_rival, ..)) if rank_of_rival < rank(client.priority) => now,
            Some(Place::InTurn(rank_of_rival, had, ..)) if rank_of_rival == rank(client.priority) => {
                let lead = real_of(had.saturating_sub(client.virtual_time), client.weight);
                least.max(now.saturating_add(lead.min(TURN)))
            }
            Some(Place::InTurn(..)) => now.saturating_add(TURN),
        };
        client.used_up_at(now).map_or(end, |used_up| end.min(used_up))
    }

    /// How much work the holder of the turn may have in flight: beyond the end of its turn, in ns, and that end, ns
    /// ([`crate::pace::Pace::limit`]). Whom somebody of higher priority may interrupt at any moment is bounded at any moment.
    pub fn work_in_flight(&self, holder: SlotIndex) -> (Nanos, Nanos) {
        let own = rank(self.client(holder).priority);
        let above = |slot: SlotIndex| slot != holder && rank(self.client(slot).priority) < own;
        if self.occupied.iter().any(above) { (AHEAD_OF_HIGHER, 0) } else { (AHEAD, self.turn_end(holder)) }
    }

    /// The virtual time with which a client enters the competition, ns: no less than those of its priority who have work have
    /// come to, so that idle time is no claim to GPU time; and not far more. With `anew`, exactly as much: its priority has changed.
    pub fn entry(&self, slot: SlotIndex, anew: bool) -> Nanos {
        let client = self.client(slot);
        let same = |other: &SlotIndex| {
            let other_client = self.client(*other);
            *other != slot && other_client.claim.is_some() && other_client.priority == client.priority
        };
        let least = self.occupied.iter().filter(same).map(|other| self.client(other).virtual_time).min();
        let Some(least) = least else { return client.virtual_time };
        let lead = if anew { 0 } else { virtual_of(LEAD, client.weight) };
        client.virtual_time.clamp(least, least.saturating_add(lead))
    }

    /// When a waiting client looks again although nothing changes, ns: when its limit lets it have the turn, or when it may take the
    /// turn from a holder that does not give it up.
    pub fn look_again(&self, slot: SlotIndex) -> Nanos {
        let allowed = self.client(slot).allowed_at(self.now);
        if allowed > self.now {
            return allowed;
        }
        self.turn.began_by(self.now).saturating_add(PATIENCE)
    }
}

/// What a client has had of the GPU in turns, for people.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ComputeUse {
    /// GPU time, ns.
    pub gpu_ns: Nanos,
    /// Its part of the GPU's time over the last seconds, 0 to 1, or since it takes turns if that is less: a second ago counts half.
    pub recent_share: f64,
    /// Time for which its threads have waited for a turn, ns.
    pub held_ns: Nanos,
    /// Turns.
    pub turns: u64,
    /// Times that others went on beside it, because it did not give up the turn.
    pub overruns: u64,
    /// Others go on beside it now.
    pub overdue: bool,
    /// Whether it has the turn.
    pub has_turn: bool,
    /// How long it has been waiting for the turn with work to submit, ns; `None` if it does not.
    pub waiting: Option<Nanos>,
}

/// What is left of GPU time after `elapsed` ns without any.
fn faded(time: Nanos, elapsed: Nanos) -> f64 {
    time as f64 * libm::exp2(-(elapsed as f64) / RECENT as f64)
}

/// What GPU time that was used without a pause for `used` ns, up to now, has come to.
fn gained(used: Nanos) -> f64 {
    let most = RECENT as f64 / std::f64::consts::LN_2;
    most * (1.0 - libm::exp2(-(used as f64) / RECENT as f64))
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests;
