//! Follows what the memory of one GPU is used for, from sample to sample, and takes it into the GPU's page.

use super::attribution::{Attribution, Known, NOISE, Sampled, View, attribute};
use super::nvml::{DeviceMemory, Reading, Source};
use crate::process::UNSEEN;
use nvshare::account::Account;
use nvshare::page::{Page, Phase};
use nvshare::slot::SlotIndex;
use nvshare::snapshot::ClientInfo;
use nvshare::units::Granules;
use std::collections::{HashMap, HashSet};

/// So many samples in a row decide what one alone does not: that a client's context is smaller (a context does not shrink by
/// itself, and a wrong low figure would let others take memory that is not there); that a process is a program outside
/// nvshare (a client's context is there before the client has registered); that memory belongs to nobody; that NVML shows
/// the clients in another way.
const SAMPLES: u32 = 3;

/// Follows what the memory of one GPU is used for.
#[derive(Debug, Default)]
pub struct Tracker {
    /// Contexts that were sampled lower than the page has them: how many times in a row, and the highest of those samples.
    lower: HashMap<SlotIndex, (u32, Granules)>,
    /// How often each process was seen that is no client, while every client was seen by its pid.
    strangers: HashMap<u32, u32>,
    foreign: HashSet<u32>,
    /// Foreign processes that were not logged yet, and their bytes.
    unreported: Vec<(u32, u64)>,
    /// Bytes of programs outside nvshare, at the last sample.
    foreign_bytes: u64,
    /// Bytes in use that belong to nobody while there is no client.
    idle: u64,
    /// How the last sample with clients showed them.
    view: View,
    /// The view that the operator was told of, and how many samples in a row have shown another since.
    reported_view: View,
    other_views: u32,
    unattributed: Unattributed,
    memory: Option<DeviceMemory>,
}

/// Memory in use that no known process has.
#[derive(Debug, Default)]
struct Unattributed {
    /// How many samples in a row have shown some, since it was last below [`NOISE`].
    times: u32,
    /// Bytes: the least of the first [`SAMPLES`] of them, or the last one.
    bytes: u64,
}

impl Unattributed {
    fn update(&mut self, bytes: u64) {
        let (times, bytes) = match self.times {
            0 => (1, bytes),
            _ if bytes < NOISE => (0, 0),
            times if times < SAMPLES => (times + 1, self.bytes.min(bytes)),
            times => (times.saturating_add(1), bytes),
        };
        *self = Self { times, bytes };
    }

    /// Bytes that have been there for long enough to count.
    fn lasting(&self) -> u64 {
        if self.times >= SAMPLES { self.bytes } else { 0 }
    }
}

/// What a sample has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// A client's context has another size: decide anew.
    pub contexts: bool,
    /// NVML shows the clients in another way than the operator was told, and has done so for some samples. (One sample says
    /// nothing between a client's registration and its context, or in the life of a process whose contexts come and go.)
    pub view: Option<View>,
}

impl Tracker {
    /// Takes a sample of the GPU into its page.
    ///
    /// # Errors
    /// The source's: a sentence for the operator.
    pub fn sample(&mut self, page: &Page, source: &dyn Source) -> Result<Change, String> {
        let before: Vec<_> = page.occupied().iter().map(|slot| (slot, page.account(slot))).collect();
        let reading = source.read(page.gpu())?;
        let clients: Vec<_> =
            before.into_iter().filter_map(|(slot, account)| sampled(page, slot, account)).collect();
        let hidden_before = self.view == View::Hidden;
        let known = Known { foreign: &self.foreign, hidden_before, idle: self.idle };
        let found = attribute(&clients, &reading, known);
        self.memory = reading.memory;
        self.learn(&clients, &reading, &found);
        let contexts = self.update_contexts(page, &found.contexts);
        if !clients.is_empty() {
            self.view = found.view;
        }
        Ok(Change { contexts, view: self.view_to_report(!clients.is_empty()) })
    }

    /// Takes the sampled contexts into the page. True if one changed there.
    fn update_contexts(&mut self, page: &Page, contexts: &[(SlotIndex, Granules)]) -> bool {
        let mut changed = false;
        for (slot, context) in contexts {
            // While a client fills, something may be booked that is not on the GPU yet, and its context comes out too
            // small: such a sample can only raise the figure.
            if page.view(*slot).phase != Phase::Filling || *context >= page.view(*slot).context {
                changed |= self.update_context(page, *slot, *context);
            }
        }
        changed
    }

    fn update_context(&mut self, page: &Page, slot: SlotIndex, context: Granules) -> bool {
        if context >= page.view(slot).context {
            self.lower.remove(&slot);
            return page.set_context(slot, context);
        }
        let (times, highest) = self.lower.entry(slot).or_insert((0, 0));
        *times += 1;
        *highest = context.max(*highest);
        if *times < SAMPLES {
            return false;
        }
        let highest = *highest;
        self.lower.remove(&slot);
        page.set_context(slot, highest)
    }

    /// The view that the operator is to be told of now. `clients`: whether there are any.
    fn view_to_report(&mut self, clients: bool) -> Option<View> {
        if !clients || self.view == self.reported_view {
            self.other_views = 0;
            return None;
        }
        self.other_views += 1;
        (self.other_views >= SAMPLES).then(|| {
            (self.reported_view, self.other_views) = (self.view, 0);
            self.view
        })
    }

    /// Learns which processes are foreign, and how much memory belongs to nobody.
    fn learn(&mut self, clients: &[Sampled], reading: &Reading, found: &Attribution) {
        self.learn_foreign(clients, reading, &found.strangers);
        let Some(unattributed) = found.unattributed else { return };
        if clients.is_empty() {
            let strangers: u64 = found.strangers.iter().filter_map(|pid| reading.processes.get(pid)).sum();
            self.idle = unattributed.saturating_sub(strangers);
        }
        self.unattributed.update(unattributed);
    }

    fn learn_foreign(&mut self, clients: &[Sampled], reading: &Reading, strangers: &[u32]) {
        self.foreign.retain(|pid| reading.processes.contains_key(pid));
        self.foreign.retain(|pid| !clients.iter().any(|client| client.pid == *pid));
        self.strangers.retain(|pid, _| strangers.contains(pid));
        let all_seen = clients.iter().all(|client| reading.processes.contains_key(&client.pid));
        for pid in strangers.iter().filter(|_| all_seen) {
            let times = self.strangers.entry(*pid).or_default();
            *times += 1;
            if *times >= SAMPLES && self.foreign.insert(*pid) {
                self.unreported.push((*pid, reading.processes.get(pid).copied().unwrap_or(0)));
            }
        }
        self.foreign_bytes = self.foreign.iter().filter_map(|pid| reading.processes.get(pid)).sum();
    }

    /// A slot has another owner now, or none.
    pub fn slot_closed(&mut self, slot: SlotIndex) {
        self.lower.remove(&slot);
    }

    /// Bytes of programs outside nvshare.
    pub fn foreign(&self) -> u64 {
        self.foreign_bytes
    }

    /// How many programs outside nvshare there are.
    pub fn foreign_processes(&self) -> u32 {
        self.foreign.len() as u32
    }

    /// The programs outside nvshare that were found since the last call: NVML's pid, and bytes.
    pub fn take_unreported(&mut self) -> Vec<(u32, u64)> {
        std::mem::take(&mut self.unreported)
    }

    /// The most bytes that the GPU has for the pool, contexts included: all that others do not use. `None` if it is not
    /// known.
    pub fn physical(&self) -> Option<u64> {
        let memory = self.memory?;
        let left = memory.total.saturating_sub(memory.reserved);
        Some(left.saturating_sub(self.foreign_bytes).saturating_sub(self.unattributed.lasting()))
    }

    /// How NVML shows the clients.
    pub fn view(&self) -> View {
        self.view
    }
}

/// A client's part of a sample that has just been taken; `account` is its account as it was before. `None` if it has gone.
fn sampled(page: &Page, slot: SlotIndex, account: Account) -> Option<Sampled> {
    let owner = page.owner(slot)?;
    let moving = account.operation.is_some() || page.account(slot) != account;
    // A process in another pid namespace gets a number that NVML shows for none.
    let pid = if owner.started & UNSEEN == 0 { owner.pid } else { u32::MAX - slot.get() as u32 };
    let handed = |client: ClientInfo| client.bytes_handed_over > 0 || client.bytes_taken_over > 0;
    let replica = page.details(slot).is_some_and(handed);
    Some(Sampled { slot, pid, resident: account.resident, moving, replica })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Gpu;
    use nvshare::slot::Process;
    use nvshare::units::{GRANULE, GpuUuid};
    use std::cell::RefCell;

    struct Fake(RefCell<Reading>);

    impl Source for Fake {
        fn gpus(&self) -> Result<Vec<Gpu>, String> {
            Ok(Vec::new())
        }

        fn read(&self, _gpu: GpuUuid) -> Result<Reading, String> {
            Ok(self.0.borrow().clone())
        }
    }

    /// What NVML shows, in granules: each process's memory, and what is in use in all.
    fn reading(processes: &[(u32, u64)], used: u64) -> Reading {
        Reading {
            processes: processes.iter().map(|(pid, granules)| (*pid, granules * GRANULE)).collect(),
            memory: Some(DeviceMemory { total: 1_000 * GRANULE, reserved: 0, used: used * GRANULE }),
        }
    }

    /// A GPU with clients of these pids, each with so many granules on it.
    struct Scene {
        page: Box<Page>,
        slots: Vec<SlotIndex>,
        tracker: Tracker,
    }

    impl Scene {
        fn new(clients: &[(u32, Granules)]) -> Self {
            let page = Page::on_heap(GpuUuid([1; 16]), 1_000);
            let slots = clients.iter().map(|(pid, resident)| {
                let slot = page.open_slot(Process { pid: *pid, started: 1 }, "job", 1).unwrap();
                let client = nvshare::Client::new(&*page, slot);
                client.books().grow(*resident);
                client.books().try_take(*resident).unwrap();
                slot
            });
            let slots = slots.collect();
            Self { page, slots, tracker: Tracker::default() }
        }

        fn sees(&mut self, reading: Reading) -> Change {
            self.tracker.sample(&self.page, &Fake(RefCell::new(reading))).unwrap()
        }

        fn contexts(&self) -> Vec<Granules> {
            self.slots.iter().map(|slot| self.page.view(*slot).context).collect()
        }
    }

    #[test]
    fn a_context_rises_at_once_and_falls_after_three_samples() {
        let mut scene = Scene::new(&[(7, 0)]);
        let mut sample = |bytes| {
            let processes = HashMap::from([(7, bytes)]);
            let changed = scene.sees(Reading { processes, memory: None }).contexts;
            (changed, scene.contexts()[0], scene.page.free().granules)
        };
        assert_eq!(sample(10 * GRANULE + 1), (true, 11, 989));
        assert_eq!(sample(4 * GRANULE), (false, 11, 989));
        assert_eq!(sample(5 * GRANULE), (false, 11, 989));
        assert_eq!(sample(3 * GRANULE), (true, 5, 995), "the highest of the three");
    }

    #[test]
    fn what_one_slot_of_a_process_holds_is_not_the_context_of_its_other_slot() {
        // Its arbiter was killed before it could say which slot it had opened; the next one opened another.
        let mut scene = Scene::new(&[(7, 0), (7, 30)]);
        scene.sees(reading(&[(7, 32)], 32));
        assert_eq!(scene.contexts().iter().sum::<Granules>(), 2);
        assert_eq!(scene.page.free().granules, 968);
    }

    #[test]
    fn under_other_pids_clients_are_no_foreign_programs() {
        let mut scene = Scene::new(&[(7, 100), (8, 50)]);
        for _ in 0..2 * SAMPLES {
            // The host calls them 1007 and 1008: 100 + 20 and 50 + 20.
            scene.sees(reading(&[(1_007, 120), (1_008, 70)], 190));
        }
        assert_eq!(scene.tracker.view(), View::OtherPids);
        assert_eq!(scene.tracker.foreign(), 0);
        assert_eq!(scene.contexts(), [20, 20]);
        assert_eq!(scene.tracker.physical(), Some(1_000 * GRANULE));
    }

    #[test]
    fn a_program_that_was_there_before_the_clients_is_foreign_under_other_pids_too() {
        let mut scene = Scene::new(&[]);
        for _ in 0..SAMPLES {
            scene.sees(reading(&[(500, 300)], 300));
        }
        assert_eq!(scene.tracker.foreign(), 300 * GRANULE);
        scene.slots = vec![scene.page.open_slot(Process { pid: 7, started: 1 }, "job", 1).unwrap()];
        scene.sees(reading(&[(500, 300), (1_007, 25)], 325));
        assert_eq!(scene.contexts(), [25]);
        assert_eq!(scene.tracker.physical(), Some(700 * GRANULE));
        scene.sees(reading(&[(1_007, 25)], 25));
        assert_eq!(scene.tracker.foreign(), 0, "it has ended");
    }

    #[test]
    fn where_nvml_shows_no_process_contexts_are_what_is_in_use_beside_the_data() {
        let mut scene = Scene::new(&[]);
        scene.sees(reading(&[], 40));
        scene.slots =
            [7, 8].map(|pid| scene.page.open_slot(Process { pid, started: 1 }, "job", 1).unwrap()).into();
        let said: Vec<_> = (0..SAMPLES).filter_map(|_| scene.sees(reading(&[], 140)).view).collect();
        assert_eq!(said, [View::Hidden]);
        assert_eq!(scene.contexts(), [50, 50], "the 40 were there before");
        let books = nvshare::Client::new(&*scene.page, scene.slots[0]).books().clone();
        books.grow(200);
        books.try_take(200).unwrap();
        scene.sees(reading(&[], 340));
        assert_eq!(scene.contexts(), [50, 50], "data is no context");
        assert_eq!(scene.sees(reading(&[], 340)).view, None, "said once");
    }

    #[test]
    fn nothing_is_said_of_a_process_whose_contexts_come_and_go() {
        let mut scene = Scene::new(&[(7, 100), (8, 0)]);
        for _ in 0..5 {
            assert_eq!(scene.sees(reading(&[], 200)).view, None, "its context is not there for a moment");
            assert_eq!(scene.sees(reading(&[(7, 120), (8, 20)], 140)).view, None);
        }
    }

    #[test]
    fn a_client_that_makes_its_context_in_a_moment_hides_nothing() {
        // Of two clients one has registered to be given room for its first context.
        let mut scene = Scene::new(&[(7, 100), (8, 0)]);
        scene.sees(reading(&[(7, 120)], 130));
        assert_eq!(scene.tracker.view(), View::ByPid);
        assert_eq!(scene.contexts(), [20, 0]);
    }

    #[test]
    fn a_process_is_foreign_only_when_it_has_not_registered_for_a_while() {
        let mut scene = Scene::new(&[(7, 10)]);
        scene.sees(reading(&[(7, 12), (9, 30)], 42));
        assert_eq!(scene.tracker.foreign(), 0, "its context is made, and it is about to register");
        let slot = scene.page.open_slot(Process { pid: 9, started: 1 }, "job", 1).unwrap();
        scene.sees(reading(&[(7, 12), (9, 30)], 42));
        assert_eq!((scene.page.view(slot).context, scene.tracker.foreign()), (30, 0));
        for _ in 0..SAMPLES {
            scene.sees(reading(&[(7, 12), (9, 30), (99, 200)], 242));
        }
        assert_eq!(scene.tracker.foreign(), 200 * GRANULE);
        assert_eq!(scene.tracker.take_unreported(), [(99, 200 * GRANULE)]);
        scene.sees(reading(&[(7, 12), (9, 30), (99, 210)], 252));
        assert_eq!((scene.tracker.take_unreported(), scene.tracker.foreign_processes()), (vec![], 1));
    }

    #[test]
    fn memory_that_belongs_to_nobody_is_no_part_of_the_pool() {
        // An exporter has died, and 64 granules of it are open elsewhere: no process has them.
        let mut scene = Scene::new(&[(7, 100)]);
        for _ in 0..SAMPLES {
            assert_eq!(
                scene.tracker.physical().unwrap_or(1_000 * GRANULE),
                1_000 * GRANULE,
                "it may be a moment's"
            );
            scene.sees(reading(&[(7, 120)], 184));
        }
        assert_eq!(scene.tracker.physical(), Some(936 * GRANULE));
        scene.sees(reading(&[(7, 120)], 121));
        assert_eq!(scene.tracker.physical(), Some(1_000 * GRANULE), "it is closed");
    }
}
