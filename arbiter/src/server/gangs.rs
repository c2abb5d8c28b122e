//! Which clients wait for each other's work: gangs, and the page on which their processes show each other what they have.
//!
//! A client says with a key what it has in common with others, such as a communicator. All clients with a key are one gang,
//! and so are gangs that share a client, or a process: one that waits for two others may have each of these wait for the
//! other. Whoever has a key that nobody else has is in no gang.

use super::poller::ClientId;
use super::state::State;
use nvshare::gang_page::{GangNumber, Place};
use nvshare::map::MappedGangPage;
use nvshare::slot::Process;
use nvshare::units::GpuUuid;
use nvshare::wire::GangKey;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;

/// Keys that one client may have. A process of a large training has some dozens of communicators.
const MAX_KEYS: usize = 1024;

/// What the clients with one key have said.
#[derive(Default)]
struct Common {
    clients: BTreeSet<ClientId>,
    /// How many processes there must be before they are a gang.
    size: u32,
}

/// The gangs of all GPUs.
pub(super) struct Gangs {
    page: MappedGangPage,
    /// The page's memory, which members get.
    pub file: File,
    keys: BTreeMap<GangKey, Common>,
    /// The gang of each client that is in one.
    gangs: BTreeMap<ClientId, GangNumber>,
    places: BTreeMap<ClientId, (Place, Process)>,
    next: GangNumber,
}

impl Gangs {
    /// No gangs yet, and an empty page. Errors: there is no memory for it.
    pub fn new(gpus: impl IntoIterator<Item = GpuUuid>) -> io::Result<Self> {
        let (file, page) = MappedGangPage::create(gpus)?;
        let (keys, gangs, places) = Default::default();
        Ok(Self { page, file, keys, gangs, places, next: 1 })
    }

    /// A client has a key. False if it has too many already.
    pub fn join(&mut self, id: ClientId, place: Place, process: Process, key: GangKey, size: u32) -> bool {
        let has = self.keys.values().filter(|common| common.clients.contains(&id)).count();
        if has >= MAX_KEYS {
            return false;
        }
        self.places.insert(id, (place, process));
        let common = self.keys.entry(key).or_default();
        common.size = common.size.max(size);
        if common.clients.insert(id) {
            self.regroup();
        }
        true
    }

    /// A client has a key no more.
    pub fn leave(&mut self, id: ClientId, key: GangKey) {
        let left = self.keys.get_mut(&key).is_some_and(|common| common.clients.remove(&id));
        if left {
            self.tidy();
        }
    }

    /// A client has ended.
    pub fn ended(&mut self, id: ClientId) {
        for common in self.keys.values_mut() {
            common.clients.remove(&id);
        }
        self.tidy();
    }

    fn tidy(&mut self) {
        self.keys.retain(|_, common| !common.clients.is_empty());
        self.regroup();
        let keys = &self.keys;
        self.places.retain(|id, _| keys.values().any(|common| common.clients.contains(id)));
    }

    /// Writes anew who is in a gang with whom, if that has changed, and tells all who are in one.
    fn regroup(&mut self) {
        let mut of: BTreeMap<ClientId, GangNumber> = BTreeMap::new();
        for set in self.sets() {
            // A gang keeps its number when it gets or loses a member.
            let known = set.iter().filter_map(|id| self.gangs.get(id)).min().copied();
            let number =
                known.filter(|number| !of.values().any(|taken| taken == number)).unwrap_or_else(|| {
                    self.next += 1;
                    self.next - 1
                });
            of.extend(set.into_iter().map(|id| (id, number)));
        }
        let mut changed = of != self.gangs;
        for (id, (place, process)) in &self.places {
            changed |= self.page.set_gang(*place, of.get(id).copied().unwrap_or(0), process.pid);
        }
        self.gangs = of;
        if changed {
            self.page.changed();
        }
    }

    /// The gangs: sets of clients that are connected by keys, or by being of one process, with more than one process in each.
    fn sets(&self) -> Vec<BTreeSet<ClientId>> {
        let processes = |set: &BTreeSet<ClientId>| -> BTreeSet<(u64, u32)> {
            let of = |id| self.places.get(id).map(|(_, process)| (process.started, process.pid));
            set.iter().filter_map(of).collect()
        };
        let enough = |common: &&Common| processes(&common.clients).len() >= (common.size as usize).max(2);
        let mut sets: Vec<BTreeSet<ClientId>> = Vec::new();
        for common in self.keys.values().filter(enough) {
            let mut set = common.clients.clone();
            let of = processes(&set);
            set.extend(
                self.places.iter().filter(|(_, (_, p))| of.contains(&(p.started, p.pid))).map(|(id, _)| *id),
            );
            sets.retain(|other| {
                let apart = other.is_disjoint(&set);
                if !apart {
                    set.extend(other);
                }
                apart
            });
            sets.push(set);
        }
        sets
    }

    /// How many processes have a key, and how many its clients said there are.
    pub fn count(&self, key: &GangKey) -> (usize, u32) {
        self.keys.get(key).map_or((0, 0), |common| {
            let processes: BTreeSet<_> = common
                .clients
                .iter()
                .filter_map(|id| self.places.get(id).map(|(_, process)| (process.started, process.pid)))
                .collect();
            (processes.len(), common.size)
        })
    }

    /// The number of a client's gang.
    pub fn of(&self, id: ClientId) -> Option<GangNumber> {
        self.gangs.get(&id).copied()
    }
}

/// Puts right, in the pages, what the arbiter alone decides and everybody can overwrite. To be called after a change, too.
pub(super) fn restore(state: &mut State) {
    state.gangs.regroup();
    for (id, client) in state.clients.iter() {
        let page = &state.gpus[client.gpu].served.page;
        if page.set_gang(client.slot, state.gangs.of(id).unwrap_or(0)) {
            page.decide();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::slot::SlotIndex;

    fn place(column: usize, slot: usize) -> Place {
        Place::new(column, SlotIndex::new(slot).unwrap()).unwrap()
    }

    fn process(pid: u32) -> Process {
        Process { pid, started: 5 }
    }

    fn gangs() -> Gangs {
        Gangs::new([GpuUuid([1; 16]), GpuUuid([2; 16])]).unwrap()
    }

    const A: GangKey = [1; 16];
    const B: GangKey = [2; 16];

    #[test]
    fn two_processes_with_a_key_are_a_gang_and_one_is_none() {
        let mut gangs = gangs();
        assert!(gangs.join(1, place(0, 0), process(10), A, 0));
        assert_eq!(gangs.of(1), None);
        assert!(gangs.join(2, place(1, 0), process(10), A, 0));
        assert_eq!(gangs.of(1), None, "one process with two GPUs");
        assert!(gangs.join(3, place(1, 1), process(11), A, 0));
        assert!(gangs.of(1).is_some() && gangs.of(1) == gangs.of(3) && gangs.of(2) == gangs.of(3));
        assert_eq!(gangs.page.members_with(place(0, 0)), [place(0, 0), place(1, 0), place(1, 1)]);
        gangs.ended(3);
        assert_eq!((gangs.of(1), gangs.page.gang(place(0, 0))), (None, 0));
    }

    #[test]
    fn gangs_that_share_a_process_are_one_and_part_again() {
        let mut gangs = gangs();
        gangs.join(1, place(0, 0), process(10), A, 0);
        gangs.join(2, place(0, 1), process(11), A, 0);
        gangs.join(3, place(1, 0), process(11), B, 0);
        gangs.join(4, place(1, 1), process(12), B, 0);
        assert_eq!((1..=4).map(|id| gangs.of(id)).collect::<BTreeSet<_>>().len(), 1, "process 11 is in both");
        gangs.leave(3, B);
        assert!(gangs.of(1).is_some() && gangs.of(2) == gangs.of(1));
        assert_eq!((gangs.of(3), gangs.of(4)), (None, None));
    }

    #[test]
    fn a_gang_with_a_size_begins_when_all_are_there() {
        let mut gangs = gangs();
        for id in 1..=3 {
            assert_eq!(gangs.of(1), None);
            gangs.join(id, place(0, id as usize), process(id as u32), A, 3);
        }
        assert!(gangs.of(1).is_some());
        assert_eq!(gangs.count(&A), (3, 3));
    }

    #[test]
    fn a_client_may_have_many_keys_and_not_any_number() {
        let mut gangs = gangs();
        let key = |number: usize| -> GangKey { std::array::from_fn(|at| number.to_le_bytes()[at % 8]) };
        assert!((0..MAX_KEYS).all(|number| gangs.join(1, place(0, 0), process(10), key(number), 0)));
        assert!(!gangs.join(1, place(0, 0), process(10), key(MAX_KEYS), 0));
    }
}
