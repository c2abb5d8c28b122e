//! What NVML tells: the GPUs, their memory, and how much of it each process has.
//!
//! A client's *context* is what NVML shows for its process less what the books say is resident: the CUDA context, its
//! modules, the libraries' workspaces. (The page calls it `pinned`.) A sample counts only if the client's account was at
//! rest and the same before and after, or a chunk on its way would be taken for a context.
//!
//! What all this comes to is decided by a pure function, [`attribute`]: whose is each byte that the GPU has in use? Three
//! views of NVML have to be told apart ([`View`]). In a container NVML may show the host's pids, which the arbiter can't
//! match with its clients, or no process at all; then the sum of all contexts is known, and each has an equal part of it.

use crate::server::UNSEEN;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvshare::page::{Page, Phase};
use nvshare::slot::SlotIndex;
use nvshare::units::{GRANULE, GpuUuid, Granules, granules_for};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// A GPU, as NVML sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its UUID.
    pub uuid: GpuUuid,
    /// Its memory in bytes.
    pub total: u64,
    /// Bytes a second over its link, from generation and width.
    pub link: Option<u64>,
}

/// Where samples come from: NVML, or a test.
pub trait Source {
    /// The GPUs of this node.
    ///
    /// # Errors
    /// A sentence.
    fn gpus(&self) -> Result<Vec<Gpu>, String>;

    /// What a GPU's memory is used for at this moment.
    ///
    /// # Errors
    /// A sentence.
    fn read(&self, gpu: GpuUuid) -> Result<Reading, String>;
}

/// What NVML tells of a GPU's memory at one moment, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// What each process has, by NVML's pid.
    pub processes: HashMap<u32, u64>,
    /// The memory as a whole; `None` if the driver is too old to tell (before 510).
    pub memory: Option<DeviceMemory>,
}

/// A GPU's memory as a whole, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total: u64,
    /// What the driver and the firmware keep for themselves. No part of `used`.
    pub reserved: u64,
    /// What is allocated, by whomever.
    pub used: u64,
}

/// The real one.
pub struct NvmlSource(Nvml);

impl NvmlSource {
    /// Loads the library.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(library: &Path) -> Result<Self, String> {
        Nvml::builder().lib_path(library.as_os_str()).init().map(Self).map_err(|error| error.to_string())
    }
}

/// Bytes a second that a PCIe link carries per lane, by generation, before protocol overhead.
const PER_LANE: [u64; 6] =
    [250_000_000, 500_000_000, 985_000_000, 1_969_000_000, 3_938_000_000, 7_563_000_000];

fn link(generation: u32, width: u32) -> Option<u64> {
    let lane = PER_LANE.get(generation.checked_sub(1)? as usize)?;
    // What copies reach of it in practice, on PCIe 5: 51.4 GiB/s of 63 GB/s.
    Some(lane * u64::from(width) * 85 / 100)
}

impl Source for NvmlSource {
    fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let said = |error: nvml_wrapper::error::NvmlError| error.to_string();
        (0..self.0.device_count().map_err(said)?)
            .map(|index| {
                let device = self.0.device_by_index(index).map_err(said)?;
                let uuid = device.uuid().map_err(said)?.parse().map_err(|error| format!("{error}"))?;
                let total = device.memory_info().map_err(said)?.total;
                let lanes = device.max_pcie_link_width().ok().zip(device.max_pcie_link_gen().ok());
                Ok(Gpu { uuid, total, link: lanes.and_then(|(width, generation)| link(generation, width)) })
            })
            .collect()
    }

    fn read(&self, gpu: GpuUuid) -> Result<Reading, String> {
        let said = |error: nvml_wrapper::error::NvmlError| error.to_string();
        let device = self.0.device_by_uuid(gpu.to_string()).map_err(said)?;
        let processes = device.running_compute_processes().map_err(said)?;
        let processes = processes.into_iter().filter_map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some((process.pid, bytes)),
            UsedGpuMemory::Unavailable => None,
        });
        let memory = device.memory_info().ok();
        Ok(Reading {
            processes: processes.collect(),
            memory: memory.map(|memory| DeviceMemory {
                total: memory.total,
                reserved: memory.reserved,
                used: memory.used,
            }),
        })
    }
}

/// How NVML shows the clients of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum View {
    /// By the pids that the arbiter knows.
    #[default]
    ByPid,
    /// By other pids: those of the host, while the arbiter is in a pid namespace of its own.
    OtherPids,
    /// Not at all: NVML lists no process, or does not say what it uses.
    Hidden,
}

/// A client's part of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sampled {
    slot: SlotIndex,
    pid: u32,
    /// Granules that it holds on the GPU, by the books.
    resident: Granules,
    /// Something was on its way while the sample was taken: nothing can be said of its context.
    moving: bool,
}

/// Whose the memory is that a GPU has in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Attribution {
    view: View,
    /// The context of each client that can be told.
    contexts: Vec<(SlotIndex, Granules)>,
    /// Bytes of processes that are no clients.
    foreign: u64,
    /// Bytes that are in use and belong to no process that NVML shows and to no client: memory of an exporter that died
    /// while others have it open. `None` if it cannot be told from this sample.
    unattributed: Option<u64>,
    /// Processes that are neither clients nor known to be foreign.
    strangers: Vec<u32>,
}

/// Less than this, in bytes, is rounding: the driver's tables, a context that grows while the sample is taken.
const NOISE: u64 = 16 * GRANULE;

/// Says whose the memory is. `foreign` are the processes that are known to be no clients, `hidden_before` whether NVML was
/// found to hide processes before, `idle` the bytes in use that belonged to nobody while there was no client.
fn attribute(
    clients: &[Sampled],
    reading: &Reading,
    foreign: &HashSet<u32>,
    hidden_before: bool,
    idle: u64,
) -> Attribution {
    // A process may have several slots on one GPU, one of them perhaps from an arbiter that was killed before it could
    // tell: its context is what it has less what is resident in all of them, and belongs to the first of them.
    let mut processes: Vec<Sampled> = Vec::new();
    let mut others = Vec::new();
    for client in clients {
        match processes.iter_mut().find(|process| process.pid == client.pid) {
            Some(process) => {
                process.resident = process.resident.saturating_add(client.resident);
                process.moving |= client.moving;
                others.push((client.slot, client.pid));
            }
            None => processes.push(*client),
        }
    }
    let bytes = |granules: Granules| u64::from(granules) * GRANULE;
    let (seen, unseen): (Vec<&Sampled>, Vec<&Sampled>) =
        processes.iter().partition(|process| reading.processes.contains_key(&process.pid));
    let mut found = Attribution::default();
    let mut contexts = 0;
    for process in &seen {
        let context = reading.processes[&process.pid].saturating_sub(bytes(process.resident));
        contexts += context;
        if !process.moving {
            found.contexts.push((process.slot, granules_for(context)));
        }
    }
    let is_client = |pid: &u32| processes.iter().any(|process| process.pid == *pid);
    let mut strange = 0;
    for (pid, used) in reading.processes.iter().filter(|(pid, _)| !is_client(pid)) {
        if foreign.contains(pid) {
            found.foreign += used;
        } else {
            found.strangers.push(*pid);
            strange += used;
        }
    }
    let resident: u64 = processes.iter().map(|process| bytes(process.resident)).sum();
    let resident_unseen: u64 = unseen.iter().map(|process| bytes(process.resident)).sum();
    let moving = processes.iter().any(|process| process.moving);
    // What is in use and neither a client's data, nor a context that NVML shows, nor another program's.
    let left = reading.memory.map(|memory| {
        memory.used.saturating_sub(resident).saturating_sub(contexts).saturating_sub(found.foreign)
    });
    // The contexts of the processes that NVML does not show by their pids: their sum, if it can be known.
    let sum = if unseen.is_empty() {
        None
    } else if strange > 0 && strange >= resident_unseen {
        found.view = View::OtherPids;
        Some(strange - resident_unseen)
    } else if hidden_before
        || resident_unseen > 0
        || (reading.processes.is_empty() && left.is_some_and(|left| left > idle + NOISE))
    {
        found.view = View::Hidden;
        left.map(|left| left.saturating_sub(idle))
    } else {
        // They have registered, and make their contexts in a moment.
        None
    };
    if let Some(sum) = sum {
        contexts += sum;
        if !unseen.iter().any(|process| process.moving) {
            let each = granules_for(sum.div_ceil(unseen.len() as u64));
            found.contexts.extend(unseen.iter().map(|process| (process.slot, each)));
        }
    }
    for (slot, pid) in others {
        if processes.iter().any(|process| process.pid == pid && !process.moving) {
            found.contexts.push((slot, 0));
        }
    }
    if !moving {
        found.unattributed = reading.memory.map(|memory| {
            memory.used.saturating_sub(resident).saturating_sub(contexts).saturating_sub(found.foreign)
        });
    }
    found
}

/// Lower samples in a row before a client's context goes down: a context does not shrink by itself, and a wrong low
/// figure would let others take what is not there. As many before a process counts as a program outside nvshare, because
/// a client's context is there before the client has registered, and before memory that is nobody's is taken from the
/// pool.
const SAMPLES: u32 = 3;

/// Follows what the memory of one GPU is used for.
#[derive(Debug, Default)]
pub struct Follower {
    lower: HashMap<SlotIndex, (u32, Granules)>,
    /// How often each process was seen that is no client, while every client was seen by its pid.
    strangers: HashMap<u32, u32>,
    foreign: HashSet<u32>,
    /// Those of them that nobody has been told of yet, and their bytes.
    unreported: Vec<(u32, u64)>,
    /// Bytes of programs outside nvshare, at the last sample.
    foreign_bytes: u64,
    /// Bytes in use that belong to nobody while there is no client.
    idle: u64,
    view: View,
    /// What the operator was told of that, and how many samples in a row have shown another view since.
    said: View,
    others: u32,
    /// Bytes that nobody known uses: the least of the samples since it was last below the noise, and how many those are.
    unattributed: (u32, u64),
    memory: Option<DeviceMemory>,
}

/// What a sample showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// A client's context is another size: decide anew.
    pub contexts: bool,
    /// NVML shows the clients in another way than the operator was told, and has done so for some samples: between a client's
    /// registration and its context, or in the life of a process whose contexts come and go, one sample says nothing.
    pub view: Option<View>,
}

impl Follower {
    /// Takes a sample of one GPU into its page.
    ///
    /// # Errors
    /// The source's.
    pub fn sample(&mut self, page: &Page, source: &dyn Source) -> Result<Change, String> {
        let before: Vec<_> = page.occupied().iter().map(|slot| (slot, page.account(slot))).collect();
        let reading = source.read(page.gpu())?;
        let sampled = |(slot, account): &(SlotIndex, nvshare::account::Account)| {
            let owner = page.owner(*slot)?;
            let moving = account.operation.is_some() || page.account(*slot) != *account;
            // The pid of a process in another namespace says nothing here: NVML shows it by none that is known.
            let pid = if owner.started & UNSEEN == 0 { owner.pid } else { u32::MAX - slot.get() as u32 };
            Some(Sampled { slot: *slot, pid, resident: account.resident, moving })
        };
        let clients: Vec<_> = before.iter().filter_map(sampled).collect();
        let was_hidden = self.view == View::Hidden;
        let found = attribute(&clients, &reading, &self.foreign, was_hidden, self.idle);
        self.memory = reading.memory;
        self.learn(&clients, &reading, &found);
        let mut changed = false;
        for (slot, context) in &found.contexts {
            // While it fills, something may be booked that is not there yet, and the rest comes out too low: such a
            // sample can only raise the figure.
            if page.view(*slot).phase != Phase::Filling || *context >= page.view(*slot).pinned {
                changed |= self.follow(page, *slot, *context);
            }
        }
        if !clients.is_empty() {
            self.view = found.view;
        }
        Ok(Change { contexts: changed, view: self.news(!clients.is_empty()) })
    }

    /// What is to be said of how NVML shows the clients, if there are any.
    fn news(&mut self, clients: bool) -> Option<View> {
        if !clients || self.view == self.said {
            self.others = 0;
            return None;
        }
        self.others += 1;
        (self.others >= SAMPLES).then(|| {
            (self.said, self.others) = (self.view, 0);
            self.view
        })
    }

    /// Who is foreign, and what belongs to nobody.
    fn learn(&mut self, clients: &[Sampled], reading: &Reading, found: &Attribution) {
        self.foreign.retain(|pid| reading.processes.contains_key(pid));
        self.foreign.retain(|pid| !clients.iter().any(|client| client.pid == *pid));
        self.strangers.retain(|pid, _| found.strangers.contains(pid));
        let all_seen = clients.iter().all(|client| reading.processes.contains_key(&client.pid));
        for pid in found.strangers.iter().filter(|_| all_seen) {
            let times = self.strangers.entry(*pid).or_default();
            *times += 1;
            if *times >= SAMPLES && self.foreign.insert(*pid) {
                self.unreported.push((*pid, reading.processes.get(pid).copied().unwrap_or(0)));
            }
        }
        self.foreign_bytes = self.foreign.iter().filter_map(|pid| reading.processes.get(pid)).sum();
        let Some(unattributed) = found.unattributed else { return };
        if clients.is_empty() {
            let strangers: u64 = found.strangers.iter().filter_map(|pid| reading.processes.get(pid)).sum();
            self.idle = unattributed.saturating_sub(strangers);
        }
        let (times, least) = self.unattributed;
        self.unattributed = match times {
            0 => (1, unattributed),
            _ if unattributed < NOISE => (0, 0),
            _ => (
                times.saturating_add(1),
                if times < SAMPLES { least.min(unattributed) } else { unattributed },
            ),
        };
    }

    fn follow(&mut self, page: &Page, slot: SlotIndex, context: Granules) -> bool {
        if context >= page.view(slot).pinned {
            self.lower.remove(&slot);
            return page.set_pinned(slot, context);
        }
        let (times, highest) = self.lower.entry(slot).or_insert((0, 0));
        *times += 1;
        *highest = context.max(*highest);
        if *times < SAMPLES {
            return false;
        }
        let highest = *highest;
        self.lower.remove(&slot);
        page.set_pinned(slot, highest)
    }

    /// A slot has another owner now, or none.
    pub fn forget(&mut self, slot: SlotIndex) {
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

    /// The programs outside nvshare that have come since this was last asked: NVML's pid, and bytes.
    pub fn take_unreported(&mut self) -> Vec<(u32, u64)> {
        std::mem::take(&mut self.unreported)
    }

    /// The most bytes that the GPU has for the pool, contexts included: all that others do not use. `None` if it is not
    /// known.
    pub fn physical(&self) -> Option<u64> {
        let memory = self.memory?;
        let (times, least) = self.unattributed;
        let nobodys = if times >= SAMPLES { least } else { 0 };
        let left = memory.total.saturating_sub(memory.reserved);
        Some(left.saturating_sub(self.foreign_bytes).saturating_sub(nobodys))
    }

    /// How NVML shows the clients.
    pub fn view(&self) -> View {
        self.view
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::slot::Process;
    use proptest::prelude::*;
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
        follower: Follower,
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
            Self { page, slots, follower: Follower::default() }
        }

        fn sees(&mut self, reading: Reading) -> Change {
            self.follower.sample(&self.page, &Fake(RefCell::new(reading))).unwrap()
        }

        fn contexts(&self) -> Vec<Granules> {
            self.slots.iter().map(|slot| self.page.view(*slot).pinned).collect()
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
        assert_eq!(scene.follower.view(), View::OtherPids);
        assert_eq!(scene.follower.foreign(), 0);
        assert_eq!(scene.contexts(), [20, 20]);
        assert_eq!(scene.follower.physical(), Some(1_000 * GRANULE));
    }

    #[test]
    fn a_program_that_was_there_before_the_clients_is_foreign_under_other_pids_too() {
        let mut scene = Scene::new(&[]);
        for _ in 0..SAMPLES {
            scene.sees(reading(&[(500, 300)], 300));
        }
        assert_eq!(scene.follower.foreign(), 300 * GRANULE);
        scene.slots = vec![scene.page.open_slot(Process { pid: 7, started: 1 }, "job", 1).unwrap()];
        scene.sees(reading(&[(500, 300), (1_007, 25)], 325));
        assert_eq!(scene.contexts(), [25]);
        assert_eq!(scene.follower.physical(), Some(700 * GRANULE));
        scene.sees(reading(&[(1_007, 25)], 25));
        assert_eq!(scene.follower.foreign(), 0, "it has ended");
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
        assert_eq!(scene.follower.view(), View::ByPid);
        assert_eq!(scene.contexts(), [20, 0]);
    }

    #[test]
    fn a_process_is_foreign_only_when_it_has_not_registered_for_a_while() {
        let mut scene = Scene::new(&[(7, 10)]);
        scene.sees(reading(&[(7, 12), (9, 30)], 42));
        assert_eq!(scene.follower.foreign(), 0, "its context is made, and it is about to register");
        let slot = scene.page.open_slot(Process { pid: 9, started: 1 }, "job", 1).unwrap();
        scene.sees(reading(&[(7, 12), (9, 30)], 42));
        assert_eq!((scene.page.view(slot).pinned, scene.follower.foreign()), (30, 0));
        for _ in 0..SAMPLES {
            scene.sees(reading(&[(7, 12), (9, 30), (99, 200)], 242));
        }
        assert_eq!(scene.follower.foreign(), 200 * GRANULE);
        assert_eq!(scene.follower.take_unreported(), [(99, 200 * GRANULE)]);
        scene.sees(reading(&[(7, 12), (9, 30), (99, 210)], 252));
        assert_eq!((scene.follower.take_unreported(), scene.follower.foreign_processes()), (vec![], 1));
    }

    #[test]
    fn memory_that_belongs_to_nobody_is_no_part_of_the_pool() {
        // An exporter has died, and 64 granules of it are open elsewhere: no process has them.
        let mut scene = Scene::new(&[(7, 100)]);
        for _ in 0..SAMPLES {
            assert_eq!(
                scene.follower.physical().unwrap_or(1_000 * GRANULE),
                1_000 * GRANULE,
                "it may be a moment's"
            );
            scene.sees(reading(&[(7, 120)], 184));
        }
        assert_eq!(scene.follower.physical(), Some(936 * GRANULE));
        scene.sees(reading(&[(7, 120)], 121));
        assert_eq!(scene.follower.physical(), Some(1_000 * GRANULE), "it is closed");
    }

    proptest! {
        /// Whatever NVML shows, no byte in use is counted twice, and under whichever view none is forgotten.
        #[test]
        fn what_is_in_use_is_somebodys(
            residents in proptest::collection::vec(0u32..200, 1..6),
            contexts in proptest::collection::vec(1u64..40, 6),
            foreign in 0u64..100,
            shown in 0..3usize,
        ) {
            let clients: Vec<_> = residents.iter().enumerate().map(|(index, resident)| Sampled {
                slot: SlotIndex::new(index).unwrap(), pid: 10 + index as u32, resident: *resident, moving: false,
            }).collect();
            let has = clients.iter().zip(&contexts).map(|(client, context)| (client.pid, u64::from(client.resident) + context));
            let used = has.clone().map(|(_, granules)| granules).sum::<u64>() + foreign;
            let processes: Vec<_> = match shown {
                0 => has.chain([(5, foreign)]).collect(),
                1 => has.map(|(pid, granules)| (pid + 1_000, granules)).chain([(5, foreign)]).collect(),
                _ => vec![(5, foreign)],
            };
            let found = attribute(&clients, &reading(&processes, used), &HashSet::from([5]), true, 0);
            let sum: u64 = found.contexts.iter().map(|(_, context)| u64::from(*context)).sum();
            let expected: u64 = contexts.iter().take(clients.len()).sum();
            // Equal parts are rounded up to granules.
            prop_assert!((expected..expected + clients.len() as u64).contains(&sum), "{sum} and not {expected}");
            prop_assert_eq!(found.foreign, foreign * GRANULE);
            prop_assert_eq!(found.unattributed, Some(0));
        }
    }

    #[test]
    fn a_link_is_generation_times_width() {
        assert_eq!(link(5, 16), Some(53_556_800_000));
        assert_eq!(link(0, 16), None);
        assert_eq!(link(9, 16), None);
    }
}
