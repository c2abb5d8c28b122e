//! Since when clients have held a GPU though they should have given way.

use nvshare::page::Phase;
use nvshare::policy;
use nvshare::slot::SlotIndex;
use nvshare::snapshot::Snapshot;
use nvshare::units::Nanos;
use std::collections::{HashMap, HashSet};

/// A slot of the GPU with this index.
type GpuSlot = (usize, SlotIndex);

/// A client that has been overdue for too long and was not reported yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overdue {
    /// Its slot.
    pub slot: SlotIndex,
    /// The phase that the page shows.
    pub phase: Phase,
    /// Since when it is overdue, in ns.
    pub since: Nanos,
}

/// The clients that are overdue.
#[derive(Default)]
pub(super) struct OverdueClients {
    since: HashMap<GpuSlot, Nanos>,
    reported: HashSet<GpuSlot>,
}

/// Whether a client was recalled and has the GPU still, or is admitted while others wait and has not taken it.
fn is_overdue(snapshot: &Snapshot, slot: SlotIndex, phase: Phase) -> bool {
    if snapshot.admitted.contains(slot) {
        return phase == Phase::Waiting && policy::first_waiter(snapshot).is_some();
    }
    matches!(phase, Phase::Running | Phase::Filling | Phase::Draining)
}

impl OverdueClients {
    /// The slot has no client, or another one, or its client is not overdue.
    pub fn remove(&mut self, gpu: usize, slot: SlotIndex) {
        self.reported.remove(&(gpu, slot));
        self.since.remove(&(gpu, slot));
    }

    /// Takes a snapshot of a GPU's page in. The result: who has been overdue for at least `bound` at `time` (both ns) and
    /// was not reported.
    pub fn update(&mut self, gpu: usize, snapshot: &Snapshot, bound: Nanos, time: Nanos) -> Vec<Overdue> {
        let mut found = Vec::new();
        for (slot, view) in snapshot.clients() {
            if !is_overdue(snapshot, slot, view.phase) {
                self.remove(gpu, slot);
                continue;
            }
            let since = *self.since.entry((gpu, slot)).or_insert(time);
            if time - since >= bound && !self.reported.contains(&(gpu, slot)) {
                found.push(Overdue { slot, phase: view.phase, since });
            }
        }
        found
    }

    /// How many clients of a GPU are overdue and have been reported.
    pub fn reported(&self, gpu: usize) -> usize {
        self.reported.iter().filter(|(of, _)| *of == gpu).count()
    }

    /// The client says that it is in another phase: its time counts from `time` (ns) again.
    pub fn restart(&mut self, gpu: usize, slot: SlotIndex, time: Nanos) {
        self.since.insert((gpu, slot), time);
    }

    /// The client has been reported, and is not again until it has given way once.
    pub fn set_reported(&mut self, gpu: usize, slot: SlotIndex) {
        self.reported.insert((gpu, slot));
    }
}
