//! The turn's word and the clients' words in the page: claiming the turn, giving it up, and taking it away.

use super::*;
use crate::sync::fence;

/// Swaps that are lost before somebody gives up: only a process that writes garbage into the word all the time causes so many.
const MOST_LOST: u32 = if cfg!(loom) { u32::MAX } else { 1_000 };

impl Page {
    /// Whether the clients of the GPU differ in weight or priority, or somebody has a compute limit. If not, nobody takes turns.
    pub fn shares_are_set(&self) -> bool {
        shares_differ(self.occupied().iter().map(|slot| {
            let (weight, priority) = self.weight_and_priority(slot);
            (weight, priority, self.compute_limit(slot))
        }))
    }

    /// Who has the turn.
    pub fn turn(&self) -> Turn {
        self.header.turn.load(Ordering::Acquire)
    }

    /// A client's part in the competition.
    pub(super) fn contender(&self, slot: SlotIndex) -> Contender {
        let words = &self.slot(slot).compute;
        let (weight, priority) = self.weight_and_priority(slot);
        let claim = words.claim.load(Ordering::Acquire);
        Contender {
            weight,
            priority,
            limit: self.compute_limit(slot),
            claim: (claim != 0).then_some(claim),
            virtual_time: words.virtual_time.load(Ordering::Relaxed),
            paid_until: words.paid_until.load(Ordering::Relaxed),
        }
    }

    /// The client in `slot` has work: it claims the turn, and has it at once if nobody else has it or is before it. Else its
    /// doorbell rings when it has it, and now, so that it looks when [`Competition::look_again`] says. Any thread of the client
    /// may call it.
    pub fn claim_turn(&self, slot: SlotIndex) {
        let claim = &self.slot(slot).compute.claim;
        let new = claim.compare_exchange(0, now().max(1), Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if new {
            self.enter_competition(slot, false);
        }
        // Either this look at the turn sees that it was given up, or who gives it up sees the claim.
        fence(Ordering::SeqCst);
        let holder = self.settle_turn();
        if new && holder != Some(slot) {
            // Its turn may be over now, or it has no work.
            holder.into_iter().for_each(|holder| self.ring(holder));
            self.ring(slot);
        }
    }

    /// Brings a client's virtual time to that of the others. With `anew`, because its priority has changed.
    pub fn enter_competition(&self, slot: SlotIndex, anew: bool) {
        let entry = Competition::take(self).entry(slot, anew);
        self.slot(slot).compute.virtual_time.store(entry, Ordering::Relaxed);
    }

    /// The client in `slot` has no work any more: takes its claim back. Its threads look whether it is still there.
    pub fn unclaim_turn(&self, slot: SlotIndex) {
        self.slot(slot).compute.claim.store(0, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// If nobody has the turn, gives it to whoever is next. Returns who has it.
    pub fn settle_turn(&self) -> Option<SlotIndex> {
        for _ in 0..MOST_LOST {
            let seen = self.header.turn.observe(Ordering::Acquire);
            let competition = Competition { turn: seen.value, ..Competition::take(self) };
            if let Some(holder) = competition.holder() {
                return Some(holder);
            }
            let next = competition.next()?;
            if self.swap_turn(&seen, Some(next)) {
                add(&self.slot(next).compute.turns, 1);
                self.ring(next);
                return Some(next);
            }
        }
        None
    }

    /// Changes who has the turn, if nobody has changed it since.
    fn swap_turn(&self, seen: &crate::packed::Observed<Turn>, holder: Option<SlotIndex>) -> bool {
        let time = now();
        let last = if seen.value.began > time.saturating_add(SECOND) { 0 } else { seen.value.began };
        let turn = Turn { holder, began: time.max(last.saturating_add(MICROSECOND)) };
        self.header.turn.compare_exchange(seen, turn, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Begins the turn of the client in `slot` anew, because it goes on. False if the client does not have the turn.
    pub fn renew_turn(&self, slot: SlotIndex) -> bool {
        let seen = self.header.turn.observe(Ordering::Acquire);
        seen.value.holder == Some(slot) && self.swap_turn(&seen, Some(slot))
    }

    /// The client in `slot` gives the turn up, for whoever is next; with `more`, it waits for its next turn from now on. Does nothing
    /// if the client does not have the turn.
    pub fn leave_turn(&self, slot: SlotIndex, more: bool) {
        let claim = if more { now().max(1) } else { 0 };
        self.slot(slot).compute.claim.store(claim, Ordering::Release);
        let seen = self.header.turn.observe(Ordering::Acquire);
        if seen.value.holder == Some(slot) {
            self.swap_turn(&seen, None);
        }
        // As in `claim_turn`.
        fence(Ordering::SeqCst);
        self.settle_turn();
    }

    /// Takes the turn from a holder that has neither given it up nor begun it anew for [`PATIENCE`]. From then on nobody waits for
    /// that client, until it says that its work has ended ([`Page::no_longer_overdue`]). Returns whose turn it was.
    pub fn seize_turn(&self, time: Nanos) -> Option<SlotIndex> {
        let seen = self.header.turn.observe(Ordering::Acquire);
        let holder = seen.value.holder?;
        if seen.value.began_by(time).saturating_add(PATIENCE) > time {
            return None;
        }
        // Before the turn is free: whoever gives it away then must not give it to this client again.
        self.set_overdue(holder, true);
        if !self.swap_turn(&seen, None) {
            if self.turn().holder == Some(holder) {
                // It has begun its turn anew.
                self.set_overdue(holder, false);
            } else {
                // Somebody else has taken the turn from it; or it has given it up, and then it ends being overdue itself.
                self.ring(holder);
            }
            return None;
        }
        add(&self.slot(holder).compute.overruns, 1);
        fence(Ordering::SeqCst);
        self.settle_turn();
        Some(holder)
    }

    /// Whether others go on beside the client in `slot`, because it did not give the turn up.
    pub fn is_overdue(&self, slot: SlotIndex) -> bool {
        self.header.overdue.load(Ordering::Acquire).contains(slot)
    }

    /// The work of the client in `slot` has ended: it takes turns again.
    pub fn no_longer_overdue(&self, slot: SlotIndex) {
        self.set_overdue(slot, false);
        fence(Ordering::SeqCst);
        self.settle_turn();
    }

    fn set_overdue(&self, slot: SlotIndex, overdue: bool) {
        let bit = SlotSet::EMPTY.with(slot).bits();
        let word: &AtomicU64 = Packed::atomic(&self.header.overdue);
        if overdue {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// The client in `slot` has had the GPU for `used` ns, up to the time `time`, ns. Only one thread of the client may call it.
    pub fn charge_turn(&self, slot: SlotIndex, used: Nanos, time: Nanos) {
        let words = &self.slot(slot).compute;
        let charged = self.contender(slot).charged(used, time);
        words.virtual_time.store(charged.virtual_time, Ordering::Relaxed);
        words.paid_until.store(charged.paid_until, Ordering::Relaxed);
        add(&words.gpu_ns, used);
        let since = time.saturating_sub(words.recent_at.load(Ordering::Relaxed));
        let recent = faded(words.recent_ns.load(Ordering::Relaxed), since) + gained(used);
        words.recent_ns.store(recent as Nanos, Ordering::Relaxed);
        words.recent_at.store(time, Ordering::Relaxed);
    }

    /// The client in `slot` takes turns from the time `time` on, ns: its share of the last seconds begins there.
    pub fn begin_turns(&self, slot: SlotIndex, time: Nanos) {
        let words = &self.slot(slot).compute;
        words.recent_ns.store(0, Ordering::Relaxed);
        words.recent_at.store(time, Ordering::Relaxed);
        words.since.store(time, Ordering::Relaxed);
    }

    /// The client in `slot` takes no turns any more.
    pub fn end_turns(&self, slot: SlotIndex) {
        self.slot(slot).compute.since.store(0, Ordering::Relaxed);
    }

    /// Threads of the client in `slot` have waited for a turn for `time` ns.
    pub fn held_for_turn(&self, slot: SlotIndex, time: Nanos) {
        self.slot(slot).compute.held_ns.fetch_add(time, Ordering::Relaxed);
    }

    /// What a client has had of the GPU in turns, at the time `time`, ns.
    pub fn compute_use(&self, slot: SlotIndex, time: Nanos) -> ComputeUse {
        let words = &self.slot(slot).compute;
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let recent = faded(read(&words.recent_ns), time.saturating_sub(read(&words.recent_at)));
        // What it would have come to if the client had had the GPU all the time since it takes turns.
        let most = gained(time.saturating_sub(read(&words.since)).max(1));
        let has_turn = self.turn().holder == Some(slot);
        let claim = read(&words.claim);
        ComputeUse {
            gpu_ns: read(&words.gpu_ns),
            recent_share: (recent / most).clamp(0.0, 1.0),
            held_ns: read(&words.held_ns),
            turns: read(&words.turns),
            overruns: read(&words.overruns),
            overdue: self.is_overdue(slot),
            has_turn,
            waiting: (claim != 0 && !has_turn).then(|| time.saturating_sub(claim)),
        }
    }

    /// A slot's client is gone: it has no turn, and nobody waits for it. For the arbiter, which has cleared its words.
    pub(crate) fn forget_turn(&self, slot: SlotIndex) {
        self.set_overdue(slot, false);
        self.leave_turn(slot, false);
    }
}

/// The GPU time that a client had had in turns at a moment, to be compared with what it has had later.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct GpuTime {
    gpu_ns: Nanos,
    overruns: u64,
    /// Since when the client takes turns, ns; 0: it takes none.
    since: Nanos,
    overdue: bool,
}

impl GpuTime {
    /// As it is now.
    pub fn now(page: &Page, slot: SlotIndex) -> Self {
        let words = &page.slot(slot).compute;
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let (gpu_ns, overruns, since) = (read(&words.gpu_ns), read(&words.overruns), read(&words.since));
        Self { gpu_ns, overruns, since, overdue: page.is_overdue(slot) }
    }

    /// What the client has had since then, ns. `None` if it has not taken turns all the time, or did not give one up: then nobody
    /// has measured it.
    pub fn since(self, page: &Page, slot: SlotIndex) -> Option<Nanos> {
        let now = Self::now(page, slot);
        let gave_all_up = !self.overdue && !now.overdue && now.overruns == self.overruns;
        let measured = now.since != 0 && now.since == self.since && gave_all_up;
        measured.then(|| now.gpu_ns.wrapping_sub(self.gpu_ns))
    }
}

/// As [`crate::books`]' own: several threads may add.
fn add(word: &AtomicU64, more: u64) {
    word.fetch_add(more, Ordering::Relaxed);
}
