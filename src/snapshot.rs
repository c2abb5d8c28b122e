//! What a decision looks at: the page at a moment, as plain numbers.
//!
//! A snapshot is not atomic as a whole, and need not be: a decision that missed a change loses its
//! swap to the decision that follows the change ([`crate::lock`]). Every value is masked to its bounds
//! on the way in, so the policy may add what it finds without overflow.

use crate::account::Operation;
use crate::page::{Direction, Page, Phase, Settings, Stall, Suspension};
use crate::shares::{Priority, Shares};
use crate::slot::{Owner, SLOTS, SlotIndex, SlotSet};
use crate::sync::{Ordering, now};
use crate::units::{Granules, MAX_GRANULES, Nanos};

/// One client, at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotView {
    /// What it is doing.
    pub phase: Phase,
    /// Granules its allocations need.
    pub demand: Granules,
    /// Granules it holds on the GPU.
    pub resident: Granules,
    /// Granules of its context.
    pub context: Granules,
    /// Granules of the resident ones that stay where they are whoever runs.
    pub unmovable: Granules,
    /// Its place in the queue.
    pub ticket: u64,
    /// When its slice began, ns, or [`crate::policy::NOT_BEGUN`]; 0 before it has the GPU.
    pub slice_start: Nanos,
    /// When it last ran, ns.
    pub last_ran: Nanos,
    /// When it should have its next slice, ns.
    pub deadline: Nanos,
    /// GPU time that it has had, by its weight, ns of virtual time, as it was at `last_ran` ([`crate::policy`]).
    pub virtual_time: Nanos,
    /// Its virtual time when its turn began, ns.
    pub turn_start: Nanos,
    /// What it had used of its turn before its present slice, ns; negative if the turn began within that slice.
    pub turn_used: i64,
    /// How far its virtual time was behind the mean when it came from phase Idle, ns.
    pub credit: Nanos,
    /// When it last had work, ns, if it has none.
    pub idle_since: Nanos,
    /// How long it is expected to have none from then on, ns; 0 if nobody knows.
    pub pause: Nanos,
    /// When it is expected to have work again, ns, if its pauses are regular; 0 if nobody knows.
    pub returns_at: Nanos,
    /// Turns that it has used up one after the other.
    pub consecutive_slices: u32,
    /// Its share against others', 1 to [`crate::usage::MAX_WEIGHT`]; 0 where there is no client.
    pub weight: u32,
    /// How soon its turn comes.
    pub priority: Priority,
    /// Its drain stands still ([`Stall`]): what it has on the GPU stays for nobody knows how long.
    pub stuck: bool,
    /// The number of its gang, 0 if it belongs to none.
    pub gang: u64,
    /// A user has paused it: it is not admitted ([`Suspension`]).
    pub paused: bool,
}

impl SlotView {
    /// Granules that it must bring in before it can run.
    pub fn missing(&self) -> Granules {
        self.demand.saturating_sub(self.resident)
    }

    /// Granules that it needs when it runs and not when it doesn't.
    pub fn movable(&self) -> Granules {
        self.demand.saturating_sub(self.unmovable)
    }

    /// Whether it came with a lag, and has not used up a turn since: it takes no turns with the others.
    pub fn has_credit(&self) -> bool {
        self.credit > 0 && self.consecutive_slices == 0
    }

    /// The same client as decisions see it, who know whether it is admitted: one that is paused and has nothing in hand asks
    /// for nothing and needs its memory after everybody else, whatever it would do if it were not paused.
    fn set_aside(self, admitted: bool) -> Self {
        if !self.paused || admitted {
            return self;
        }
        let phase = match self.phase {
            Phase::Waiting | Phase::Filling => Phase::Idle,
            other => other,
        };
        Self { phase, returns_at: 0, pause: Nanos::MAX, ..self }
    }

    /// Granules that it can make room with.
    pub fn evictable(&self) -> Granules {
        self.resident.saturating_sub(self.unmovable)
    }
}

/// A GPU's page, at a moment. Slots that nobody owns are absent from `occupied`, and zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The moment, CLOCK_MONOTONIC ns.
    pub now: Nanos,
    /// Granules in the pool.
    pub capacity: Granules,
    /// Free granules; negative is a debt.
    pub free: i32,
    /// Who may load and run.
    pub admitted: SlotSet,
    /// Slots that somebody owns.
    pub occupied: SlotSet,
    /// The operator's settings.
    pub settings: Settings,
    /// Bytes a second, into the GPU.
    pub bandwidth_in: u64,
    /// Bytes a second, out of the GPU.
    pub bandwidth_out: u64,
    /// The clients, by slot.
    pub slots: [SlotView; SLOTS],
}

impl Snapshot {
    /// Looks at the page, with the mask that the caller read from the lock word before.
    pub fn take(page: &Page, admitted: SlotSet) -> Self {
        let occupied = page.occupied();
        let mut slots = [SlotView::default(); SLOTS];
        for slot in occupied.iter() {
            slots[slot.get()] = page.view(slot).set_aside(admitted.contains(slot));
        }
        Self {
            now: now(),
            capacity: page.capacity(),
            free: page.free().granules,
            admitted,
            occupied,
            settings: page.settings(),
            bandwidth_in: page.bandwidth(Direction::In),
            bandwidth_out: page.bandwidth(Direction::Out),
            slots,
        }
    }

    /// The same at another moment, ns.
    #[must_use]
    pub fn at(&self, now: Nanos) -> Self {
        Self { now, ..self.clone() }
    }

    /// The clients: slot and view.
    pub fn clients(&self) -> impl Iterator<Item = (SlotIndex, &SlotView)> {
        self.occupied.iter().map(|slot| (slot, &self.slots[slot.get()]))
    }

    /// A client's view.
    pub fn view(&self, slot: SlotIndex) -> &SlotView {
        &self.slots[slot.get()]
    }

    /// Granules that take turns: the pool less the contexts, and less what cannot move.
    pub fn usable(&self) -> Granules {
        let elsewhere: u64 =
            self.clients().map(|(_, view)| u64::from(view.context) + u64::from(view.unmovable)).sum();
        u64::from(self.capacity).saturating_sub(elsewhere) as Granules
    }
}

fn granules(word: u64) -> Granules {
    word.min(u64::from(MAX_GRANULES)) as Granules
}

impl Page {
    /// One client, as the policy sees it.
    pub fn view(&self, slot: SlotIndex) -> SlotView {
        let row = self.slot(slot);
        let own = &row.own;
        let resident = self.account(slot).resident;
        let (weight, priority) = self.weight_and_priority(slot);
        let phase = own.phase.load(Ordering::Acquire);
        let stalled = own.stall.load(Ordering::Relaxed) != Stall::None;
        SlotView {
            phase,
            demand: granules(own.demand.load(Ordering::Relaxed)),
            resident,
            context: granules(row.context.load(Ordering::Relaxed)),
            // Only what is there can stay there: a page that claims more gains nothing.
            unmovable: granules(own.unmovable.load(Ordering::Relaxed)).min(resident),
            ticket: own.ticket.load(Ordering::Relaxed),
            slice_start: own.slice_start.load(Ordering::Relaxed),
            last_ran: own.last_ran.load(Ordering::Relaxed),
            deadline: own.deadline.load(Ordering::Relaxed),
            virtual_time: own.virtual_time.load(Ordering::Relaxed),
            turn_start: own.turn_start.load(Ordering::Relaxed),
            turn_used: own.turn_used.load(Ordering::Relaxed) as i64,
            credit: own.credit.load(Ordering::Relaxed),
            idle_since: own.idle_since.load(Ordering::Relaxed),
            pause: own.pause.load(Ordering::Relaxed),
            returns_at: own.returns_at.load(Ordering::Relaxed),
            consecutive_slices: own.consecutive_slices.load(Ordering::Relaxed),
            weight,
            priority,
            stuck: stalled && phase == Phase::Draining,
            gang: row.gang.load(Ordering::Relaxed),
            paused: self.suspension(slot) != Suspension::None,
        }
    }

    /// Everything that is known of a client, for people.
    pub fn details(&self, slot: SlotIndex) -> Option<ClientInfo> {
        let row = self.slot(slot);
        let own = &row.own;
        let owner = row.owner.load(Ordering::Acquire);
        if owner.pid == 0 {
            return None;
        }
        let read = |word: &crate::sync::AtomicU64| word.load(Ordering::Relaxed);
        Some(ClientInfo {
            slot,
            owner,
            name: self.name(slot),
            shares: self.shares(slot),
            view: self.view(slot),
            operation: self.account(slot).operation,
            wait_since: read(&own.wait_since),
            slices: read(&own.slices),
            yields: read(&own.yields),
            bytes_in: read(&own.bytes_in),
            bytes_out: read(&own.bytes_out),
            fill_ns: read(&own.fill_ns),
            evict_ns: read(&own.evict_ns),
            run_ns: read(&own.run_ns),
            charged_ns: read(&own.charged_ns),
            bytes_elided: read(&own.bytes_elided),
            bytes_unchanged: read(&own.bytes_unchanged),
            bytes_handed_over: read(&row.compute.bytes_handed_over),
            bytes_taken_over: read(&row.compute.bytes_taken_over),
            submissions: read(&own.submissions),
            held_submissions: read(&own.held_submissions),
            stall: own.stall.load(Ordering::Acquire),
            stall_since: read(&own.stall_since),
            stalls: read(&own.stalls),
            drain_retries: read(&own.drain_retries),
        })
    }

    fn name(&self, slot: SlotIndex) -> String {
        let bytes: Vec<u8> =
            self.slot(slot).name.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        crate::text::printable(&bytes)
    }
}

/// Everything that is known of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientInfo {
    /// Its slot.
    pub slot: SlotIndex,
    /// Its process.
    pub owner: Owner,
    /// What it calls itself.
    pub name: String,
    /// What it may expect against others.
    pub shares: Shares,
    /// What the policy sees of it.
    pub view: SlotView,
    /// The move of granules in flight.
    pub operation: Option<Operation>,
    /// Since when it waits, ns; 0 when it does not.
    pub wait_since: Nanos,
    /// Times that it was admitted and filled.
    pub slices: u64,
    /// Times that it gave way.
    pub yields: u64,
    /// Bytes copied to the GPU.
    pub bytes_in: u64,
    /// Bytes copied to the host.
    pub bytes_out: u64,
    /// Time that its copies in took, by the GPU's clock, ns.
    pub fill_ns: Nanos,
    /// Time that its copies out took, by the GPU's clock, ns.
    pub evict_ns: Nanos,
    /// Time spent running, ns.
    pub run_ns: Nanos,
    /// The part of that time with which the policy charges it, in slices that have ended, ns.
    pub charged_ns: Nanos,
    /// Bytes given up on the GPU without a copy, because they were zero.
    pub bytes_elided: u64,
    /// Bytes given up on the GPU without a copy, because the host had the same.
    pub bytes_unchanged: u64,
    /// Bytes whose GPU memory was handed to replicas.
    pub bytes_handed_over: u64,
    /// Bytes whose GPU memory has come from replicas, so that they were not copied to the GPU.
    pub bytes_taken_over: u64,
    /// Times that threads of its process passed the gate to submit work, on whatever GPU, as of its engine's last look.
    pub submissions: u64,
    /// Of these, those that had to wait at the gate.
    pub held_submissions: u64,
    /// Why it cannot give way, if it is to and cannot.
    pub stall: Stall,
    /// Since when it cannot, ns; 0 when it can.
    pub stall_since: Nanos,
    /// Times that it could not give way when it was to.
    pub stalls: u64,
    /// Times that it let its threads go on in the middle of a drain, and began to drain again later.
    pub drain_retries: u64,
}

impl ClientInfo {
    /// How long it has been unable to give way at this time, ns; `None` if it can. Its owner writes the two words one
    /// after the other, so the reason may be there without the time: then it has just begun.
    pub fn stalled_for(&self, now: Nanos) -> Option<Nanos> {
        let since = if self.stall_since == 0 { now } else { self.stall_since };
        (self.stall != Stall::None).then(|| now.saturating_sub(since))
    }
}
