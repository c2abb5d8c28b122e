//! One truth about memory: whoever asks how much there is gets the same figures, whether from cuMemGetInfo,
//! cuDeviceTotalMem or NVML, before the process has a context and after.
//!
//! Frameworks size themselves by these figures, some by one, some by another: vLLM and JAX take a share of the total,
//! TensorFlow what is free, and vLLM compares what is free before and after a trial run. So the total is the pool,
//! which may be smaller than the card; what is free is what this client can still have *on the GPU*, as if the other
//! clients had no data there, since theirs moves out of its way; and what is neither is its own, or what others can't
//! move out of its way. A client with a memory limit is told of a GPU of that size ([`nvshare::shares`]): its context
//! counts, as it does on a GPU of that size.
//!
//! Before the process has attached, its figures come from the same page: it asks the arbiter to see it
//! ([`register::look`]), once for each GPU. It takes no slot for that, and whoever never asks connects to nobody.

use crate::abi::CUdevice;
use crate::driver::Driver;
use crate::session;
use crate::settings::settings;
use nvshare::map::MappedPage;
use nvshare::paths;
use nvshare::register::{self, RegisterError};
use nvshare::shares::MemoryLimit;
use nvshare::slot::{SlotIndex, SlotSet};
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Granules, Nanos, SECOND, bytes_of};
use std::sync::Mutex;
use std::time::Duration;

/// What a process is told about a GPU's memory, in bytes. The total is the sum of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// The pool, or the client's memory limit if that is less.
    pub total: u64,
    /// What this client's allocations can still have on the GPU.
    pub free: u64,
    /// What its allocations and its context have.
    pub own: u64,
    /// What others have that can't make room: their contexts, and what of their memory can't move.
    pub others: u64,
}

impl Figures {
    /// The figures of a client, or of a process that is none yet, with this memory limit. `put_off` is what it has freed
    /// and still counts in its demand: it is told as free, as cuMemFree has said.
    pub fn of(snapshot: &Snapshot, client: Option<SlotIndex>, limit: MemoryLimit, put_off: Granules) -> Self {
        let mut view = client.map(|slot| *snapshot.view(slot)).unwrap_or_default();
        view.demand = view.demand.saturating_sub(put_off);
        let total = limit.within(snapshot.capacity);
        let usable = snapshot.usable().saturating_add(view.unmovable).min(total.saturating_sub(view.pinned));
        let free = usable.saturating_sub(view.demand);
        // A client may need more than there is: the rest of it lies in host memory. Or its limit came later.
        let own = view.demand.saturating_add(view.pinned).min(total - free);
        Self {
            total: bytes_of(total),
            free: bytes_of(free),
            own: bytes_of(own),
            others: bytes_of(total - free - own),
        }
    }
}

/// The figures of a GPU of the driver's, if it has a pool.
pub fn of_device(device: CUdevice) -> Option<Figures> {
    if let Some(shared) = session::of_device(device) {
        return Some(shared.figures());
    }
    let uuid = Driver::get().ok()?.device_uuid(device).ok()?;
    // cuInit has found an arbiter: if it is gone now, another one is about to come.
    of_gpu(GpuUuid(uuid.bytes), settings().ok()?.connect_timeout)
}

/// The figures of a GPU, if it has a pool. Waits so long for an arbiter that may be starting.
pub fn of_gpu(gpu: GpuUuid, patience: Duration) -> Option<Figures> {
    if let Some(shared) = session::of_gpu(gpu) {
        return Some(shared.figures());
    }
    // What it will register with. If that makes no sense, cuInit fails and says so.
    let limit = settings().map(|settings| settings.shares.memory_limit).unwrap_or_default();
    seen(gpu, patience).map(|page| Figures::of(&Snapshot::take(&page, SlotSet::EMPTY), None, limit, 0))
}

/// What this process has seen of a GPU before it attached.
struct Seen {
    gpu: GpuUuid,
    /// Who has seen it. A child of fork has its parent's list and none of its mappings.
    pid: u32,
    /// `None` if the arbiter will not show it, however often it is asked.
    page: Option<MappedPage>,
}

/// An arbiter that has not been seen for this long has perhaps a successor with another page.
const ARBITER_SEEN_WITHIN: Nanos = 5 * SECOND;

impl Seen {
    /// A page that has no client goes with its arbiter, and the next one makes another: looks whether it has.
    fn renew(&mut self) {
        let Some(page) = &self.page else { return };
        let (_, _, heartbeat) = page.arbiter();
        if now().saturating_sub(heartbeat) < ARBITER_SEEN_WITHIN {
            return;
        }
        if let Ok(page) = register::look(&paths::socket(&paths::runtime_dir()), self.gpu, Duration::ZERO) {
            self.page = Some(page);
        }
    }
}

static SEEN: Mutex<Vec<Seen>> = Mutex::new(Vec::new());

fn seen(gpu: GpuUuid, patience: Duration) -> Option<MappedPage> {
    let pid = std::process::id();
    // Whoever forks may have held the lock in another thread, so nobody may wait for it: then the arbiter is asked.
    if let Ok(mut seen) = SEEN.try_lock() {
        forget_those_of_others(&mut seen, pid);
        if let Some(seen) = seen.iter_mut().find(|seen| seen.gpu == gpu) {
            seen.renew();
            return seen.page.clone();
        }
    }
    let page = match register::look(&paths::socket(&paths::runtime_dir()), gpu, patience) {
        Ok(page) => Some(page),
        Err(error) => {
            crate::log::initialise();
            let nobody = matches!(error, RegisterError::NoArbiter { .. });
            if nobody {
                tracing::info!(%gpu, "how large its pool is cannot be said: {error}");
                return None;
            }
            tracing::warn!(%gpu, "how large its pool is cannot be said, what the driver says is taken for it: {error}");
            None
        }
    };
    if let Ok(mut seen) = SEEN.try_lock() {
        seen.push(Seen { gpu, pid, page: page.clone() });
    }
    page
}

/// Something else may be mapped by now where a parent's page was: it must be neither read nor unmapped.
fn forget_those_of_others(seen: &mut Vec<Seen>, pid: u32) {
    while let Some(index) = seen.iter().position(|seen| seen.pid != pid) {
        std::mem::forget(seen.swap_remove(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::slot::Process;
    use nvshare::units::GRANULE;
    use nvshare::{Client, Page};

    fn figures(page: &Page, client: Option<SlotIndex>) -> [u64; 4] {
        figures_but(page, client, 0)
    }

    fn figures_but(page: &Page, client: Option<SlotIndex>, put_off: u32) -> [u64; 4] {
        figures_of(page, client, MemoryLimit::None, put_off)
    }

    fn figures_of(page: &Page, client: Option<SlotIndex>, limit: MemoryLimit, put_off: u32) -> [u64; 4] {
        let Figures { total, free, own, others } =
            Figures::of(&Snapshot::take(page, SlotSet::EMPTY), client, limit, put_off);
        assert_eq!(total, free + own + others);
        [total, free, own, others].map(|bytes| bytes / GRANULE)
    }

    #[test]
    fn what_others_have_is_free_unless_it_cannot_make_room() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        assert_eq!(figures(&page, None), [100, 100, 0, 0]);
        let slot = |pid| page.open_slot(Process { pid, started: 1 }, "job", 1).unwrap();
        let (mine, other) = (slot(1), slot(2));
        let (me, them) = (Client::new(&*page, mine), Client::new(&*page, other));
        page.set_pinned(mine, 5);
        me.books().grow(20);
        assert_eq!(figures(&page, Some(mine)), [100, 75, 25, 0]);
        them.books().grow(60);
        assert_eq!(figures(&page, Some(mine)), [100, 75, 25, 0], "their data makes room");
        page.set_pinned(other, 6);
        assert_eq!(figures(&page, Some(mine)), [100, 69, 25, 6], "their context does not");
        assert_eq!(figures(&page, None), [100, 89, 0, 11]);
        them.books().try_take(10).unwrap();
        them.books().fix(10);
        assert_eq!(figures(&page, Some(mine)), [100, 59, 25, 16], "nor does what cannot move");
        me.books().try_take(20).unwrap();
        me.books().fix(20);
        assert_eq!(figures(&page, Some(mine)), [100, 59, 25, 16], "it is its own, wherever it can go");
        me.books().unfix(20);
        me.books().shrink(20);
        assert_eq!(figures(&page, Some(mine))[1..], [79, 5, 16]);
    }

    #[test]
    fn what_is_freed_is_free_before_it_is_given_back() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 1).unwrap();
        page.set_pinned(slot, 5);
        Client::new(&*page, slot).books().grow(20);
        assert_eq!(figures_but(&page, Some(slot), 8), [100, 83, 17, 0]);
        assert_eq!(figures_but(&page, Some(slot), 20), [100, 95, 5, 0]);
        assert_eq!(figures_but(&page, Some(slot), 21), [100, 95, 5, 0], "no more than it had");
    }

    #[test]
    fn a_limit_is_a_smaller_gpu() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = |pid| page.open_slot(Process { pid, started: 1 }, "job", 1).unwrap();
        let (mine, other) = (slot(1), slot(2));
        let me = Client::new(&*page, mine);
        page.set_pinned(mine, 5);
        me.books().grow(20);
        let told = |limit| figures_of(&page, Some(mine), limit, 0);
        assert_eq!(told(MemoryLimit::Size(40)), [40, 15, 25, 0]);
        assert_eq!(told(MemoryLimit::Part(500_000)), [50, 25, 25, 0]);
        assert_eq!(told(MemoryLimit::Size(400)), [100, 75, 25, 0], "no more than there is");
        assert_eq!(
            figures_of(&page, None, MemoryLimit::Size(40), 0),
            [40, 40, 0, 0],
            "it has none of it yet"
        );
        // Others take room beside it, and only then from it.
        page.set_pinned(other, 50);
        assert_eq!(told(MemoryLimit::Size(40)), [40, 15, 25, 0]);
        page.set_pinned(other, 70);
        assert_eq!(told(MemoryLimit::Size(40)), [40, 5, 25, 10]);
        // A limit that came later takes nothing away, and nothing is free.
        page.set_pinned(other, 0);
        assert_eq!(told(MemoryLimit::Size(22)), [22, 0, 22, 0]);
        assert_eq!(told(MemoryLimit::Size(3)), [3, 0, 3, 0], "less than its context");
        assert_eq!(figures_of(&page, Some(mine), MemoryLimit::Size(22), 10), [22, 7, 15, 0]);
    }

    #[test]
    fn who_needs_more_than_there_is_has_all_of_it() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 1).unwrap();
        page.set_pinned(slot, 5);
        Client::new(&*page, slot).books().grow(300);
        assert_eq!(figures(&page, Some(slot)), [100, 0, 100, 0]);
        page.set_capacity(3);
        assert_eq!(figures(&page, Some(slot)), [3, 0, 3, 0]);
    }
}
