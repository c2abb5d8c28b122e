//! What NVML tells: the GPUs, their memory, and how much of it each process has.
//!
//! A client's *pinned* memory is what NVML shows for its process less what the books say is resident:
//! its context, its modules, the libraries' workspaces. A sample counts only if the client's account
//! was at rest and the same before and after, or a chunk on its way would be taken for a context.

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvshare::page::{Page, Phase, SlotIndex};
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

    /// Bytes of GPU memory that each process has on a GPU.
    ///
    /// # Errors
    /// A sentence.
    fn used(&self, gpu: GpuUuid) -> Result<HashMap<u32, u64>, String>;
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

    fn used(&self, gpu: GpuUuid) -> Result<HashMap<u32, u64>, String> {
        let said = |error: nvml_wrapper::error::NvmlError| error.to_string();
        let device = self.0.device_by_uuid(gpu.to_string()).map_err(said)?;
        let processes = device.running_compute_processes().map_err(said)?;
        Ok(processes
            .into_iter()
            .filter_map(|process| match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some((process.pid, bytes)),
                UsedGpuMemory::Unavailable => None,
            })
            .collect())
    }
}

/// Lower samples in a row before a client's pinned memory goes down: a context does not shrink by
/// itself, and a wrong low figure would let others take what is not there.
const LOWER_SAMPLES: u32 = 3;

/// Follows each client's pinned memory.
#[derive(Debug, Default)]
pub struct Pinned {
    lower: HashMap<SlotIndex, (u32, Granules)>,
}

impl Pinned {
    /// Takes a sample of one GPU into its page. True if a client's pinned memory changed: decide anew.
    ///
    /// # Errors
    /// The source's.
    pub fn sample(&mut self, page: &Page, source: &dyn Source) -> Result<bool, String> {
        let before: Vec<_> = page.occupied().iter().map(|slot| (slot, page.account(slot))).collect();
        if before.is_empty() {
            return Ok(false);
        }
        let mut used = source.used(page.gpu())?;
        // A process may have several slots on one GPU, one of them perhaps from an arbiter that was killed
        // before it could tell: its context is what it has less what is resident in all of them.
        let (mut resident, mut moving) = (HashMap::<_, u64>::new(), HashSet::new());
        for (slot, account) in &before {
            let Some(owner) = page.owner(*slot) else { continue };
            *resident.entry(owner.pid).or_default() += u64::from(account.resident) * GRANULE;
            if account.operation.is_some() || page.account(*slot) != *account {
                moving.insert(owner.pid);
            }
        }
        let mut changed = false;
        for (slot, _) in before {
            let Some(owner) = page.owner(slot).filter(|owner| !moving.contains(&owner.pid)) else { continue };
            // It belongs to the first of them.
            let bytes = used.insert(owner.pid, 0).unwrap_or(0);
            let resident = resident.get(&owner.pid).copied().unwrap_or(0);
            let pinned = granules_for(bytes.saturating_sub(resident));
            // While it fills, something may be booked that is not there yet, and the rest comes out too
            // low: such a sample can only raise the figure.
            if page.view(slot).phase != Phase::Filling || pinned >= page.view(slot).pinned {
                changed |= self.follow(page, slot, pinned);
            }
        }
        Ok(changed)
    }

    fn follow(&mut self, page: &Page, slot: SlotIndex, pinned: Granules) -> bool {
        if pinned >= page.view(slot).pinned {
            self.lower.remove(&slot);
            return page.set_pinned(slot, pinned);
        }
        let (times, highest) = self.lower.entry(slot).or_insert((0, 0));
        *times += 1;
        *highest = pinned.max(*highest);
        if *times < LOWER_SAMPLES {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::audit::Process;
    use std::cell::Cell;

    struct Fake(Cell<u64>);

    impl Source for Fake {
        fn gpus(&self) -> Result<Vec<Gpu>, String> {
            Ok(Vec::new())
        }

        fn used(&self, _gpu: GpuUuid) -> Result<HashMap<u32, u64>, String> {
            Ok(HashMap::from([(7, self.0.get())]))
        }
    }

    #[test]
    fn pinned_rises_at_once_and_falls_after_three_samples() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = page.open_slot(Process { pid: 7, started: 1 }, "job", 1).unwrap();
        let (fake, mut pinned) = (Fake(Cell::new(10 * GRANULE + 1)), Pinned::default());
        let mut sample = |bytes| {
            fake.0.set(bytes);
            pinned.sample(&page, &fake).unwrap()
        };
        assert!(sample(10 * GRANULE + 1));
        assert_eq!((page.view(slot).pinned, page.free().granules), (11, 89));
        assert!(!sample(4 * GRANULE) && !sample(5 * GRANULE));
        assert_eq!(page.view(slot).pinned, 11);
        assert!(sample(3 * GRANULE));
        assert_eq!((page.view(slot).pinned, page.free().granules), (5, 95), "the highest of the three");
    }

    #[test]
    fn what_one_slot_of_a_process_holds_is_not_the_context_of_its_other_slot() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let process = Process { pid: 7, started: 1 };
        // Its arbiter was killed before it could say which slot it had opened; the next one opened another.
        let orphan = page.open_slot(process, "job", 1).unwrap();
        let slot = page.open_slot(process, "job", 1).unwrap();
        let client = nvshare::Client::new(&*page, slot);
        client.books().grow(30);
        client.books().try_take(30).unwrap();
        Pinned::default().sample(&page, &Fake(Cell::new(32 * GRANULE))).unwrap();
        assert_eq!(page.view(orphan).pinned + page.view(slot).pinned, 2);
        assert_eq!(page.free().granules, 68);
    }

    #[test]
    fn a_link_is_generation_times_width() {
        assert_eq!(link(5, 16), Some(53_556_800_000));
        assert_eq!(link(0, 16), None);
        assert_eq!(link(9, 16), None);
    }
}
