//! Which clients wait for each other's work: gangs, and the page on which their processes show each other what they have.
//!
//! A client says with a key what it has in common with others, such as a communicator. All clients with a key are one gang,
//! and so are gangs that share a client, or a process: one that waits for two others may have each of these wait for the
//! other. Whoever has a key that nobody else has is in no gang.

use super::poller::ClientId;
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
        if self.keys.get_mut(&key).is_some_and(|common| common.clients.remove(&id)) {
            self.tidy();
        }
    }

    /// A client has ended.
    pub fn ended(&mut self, id: ClientId) {
        if !self.places.contains_key(&id) {
            return;
        }
        for common in self.keys.values_mut() {
            common.clients.remove(&id);
        }
        self.tidy();
    }

    fn tidy(&mut self) {
        self.keys.retain(|_, common| !common.clients.is_empty());
        self.regroup();
        let holders: BTreeSet<_> = self.keys.values().flat_map(|common| &common.clients).copied().collect();
        self.places.retain(|id, _| holders.contains(id));
    }

    /// Decides anew who is in a gang with whom, and tells all who are in one if that has changed.
    fn regroup(&mut self) {
        let mut of: BTreeMap<ClientId, GangNumber> = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for set in self.sets() {
            // A gang keeps its number when it gets or loses a member.
            let known = set.iter().filter_map(|id| self.gangs.get(id)).min().copied();
            let number = known.filter(|number| !taken.contains(number)).unwrap_or_else(|| {
                self.next += 1;
                self.next - 1
            });
            taken.insert(number);
            of.extend(set.into_iter().map(|id| (id, number)));
        }
        self.gangs = of;
        self.write();
    }

    /// Writes into the page who is in which gang. Tells all who are in one if somebody was in another one there.
    pub fn write(&self) {
        let mut changed = false;
        for (id, (place, process)) in &self.places {
            changed |= self.page.set_gang(*place, self.of(*id).unwrap_or(0), process.pid);
        }
        if changed {
            self.page.changed();
        }
    }

    fn process(&self, id: ClientId) -> Option<(u64, u32)> {
        self.places.get(&id).map(|(_, process)| (process.started, process.pid))
    }

    fn processes_with(&self, common: &Common) -> BTreeSet<(u64, u32)> {
        common.clients.iter().filter_map(|id| self.process(*id)).collect()
    }

    /// The gangs: sets of clients that are connected by keys, or by being of one process, with more than one process in each.
    fn sets(&self) -> Vec<Vec<ClientId>> {
        // A client's set is found by following the clients that stand for others.
        let mut stands_for: BTreeMap<ClientId, ClientId> = BTreeMap::new();
        fn find(stands_for: &mut BTreeMap<ClientId, ClientId>, id: ClientId) -> ClientId {
            let mut root = id;
            while let Some(next) = stands_for.get(&root).filter(|next| **next != root) {
                root = *next;
            }
            stands_for.insert(id, root);
            root
        }
        let mut unite = |first: ClientId, second: ClientId| {
            let (first, second) = (find(&mut stands_for, first), find(&mut stands_for, second));
            stands_for.insert(second, first);
        };
        let (mut of_process, mut holders) = (BTreeMap::new(), BTreeSet::new());
        let (mut in_gang, mut sets) = (BTreeSet::new(), BTreeMap::<ClientId, Vec<ClientId>>::new());
        for common in self.keys.values() {
            let processes = self.processes_with(common);
            let enough = processes.len() >= (common.size as usize).max(2);
            holders.extend(&common.clients);
            if let (true, Some(first)) = (enough, common.clients.first()) {
                common.clients.iter().for_each(|id| unite(*first, *id));
                in_gang.extend(processes);
            }
        }
        let mut members = Vec::new();
        for id in holders {
            let Some(process) = self.process(id).filter(|process| in_gang.contains(process)) else {
                continue;
            };
            unite(*of_process.entry(process).or_insert(id), id);
            members.push(id);
        }
        for id in members {
            sets.entry(find(&mut stands_for, id)).or_default().push(id);
        }
        sets.into_values().collect()
    }

    /// How many processes have a key, and how many its clients said there are.
    pub fn count(&self, key: &GangKey) -> (usize, u32) {
        self.keys.get(key).map_or((0, 0), |common| (self.processes_with(common).len(), common.size))
    }

    /// The number of a client's gang.
    pub fn of(&self, id: ClientId) -> Option<GangNumber> {
        self.gangs.get(&id).copied()
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
