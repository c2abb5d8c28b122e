//! What a process is told about a GPU's memory, by cuMemGetInfo, cuDeviceTotalMem and NVML alike.
//!
//! Frameworks choose their sizes by these figures: vLLM and JAX take a share of the total, TensorFlow takes what is free, and
//! vLLM compares what is free before and after a trial run. So
//!
//! - the **total** is the pool, which may be smaller than the card;
//! - **free** is what this client can still have *on the GPU*. Other clients' data does not count, because it moves out;
//! - the rest is **its own**, or memory of **others** that cannot move.
//!
//! A client with a memory limit ([`crate::shares`]) is told of a GPU of that size. Its context counts, as it does on a real
//! GPU.

use crate::shares::MemoryLimit;
use crate::slot::SlotIndex;
use crate::snapshot::Snapshot;
use crate::units::{Granules, bytes_of};

/// What a process is told about a GPU's memory, in bytes. The total is the sum of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// The pool, or the client's memory limit if that is less.
    pub total: u64,
    /// What this client's allocations can still have on the GPU.
    pub free: u64,
    /// What its allocations and its context have.
    pub own: u64,
    /// What others have that cannot move: their contexts and their unmovable memory.
    pub others: u64,
}

impl MemoryInfo {
    /// The figures for a client with this memory limit, or for a process that is no client yet. `deferred` granules have been
    /// freed by the application and are still in the client's demand: they are reported free immediately and released later.
    pub fn of(
        snapshot: &Snapshot,
        client: Option<SlotIndex>,
        limit: MemoryLimit,
        deferred: Granules,
    ) -> Self {
        let mut view = client.map(|slot| *snapshot.view(slot)).unwrap_or_default();
        view.demand = view.demand.saturating_sub(deferred);
        let total = limit.within(snapshot.capacity);
        let usable = snapshot.usable().saturating_add(view.unmovable).min(total.saturating_sub(view.context));
        let free = usable.saturating_sub(view.demand);
        // A client may need more than there is: the rest is in host memory. Or its limit was set after it had allocated.
        let own = view.demand.saturating_add(view.context).min(total - free);
        Self {
            total: bytes_of(total),
            free: bytes_of(free),
            own: bytes_of(own),
            others: bytes_of(total - free - own),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::Process;
    use crate::slot::SlotSet;
    use crate::units::GRANULE;
    use crate::units::GpuUuid;
    use crate::{Client, Page};

    fn figures(page: &Page, client: Option<SlotIndex>) -> [u64; 4] {
        figures_but(page, client, 0)
    }

    fn figures_but(page: &Page, client: Option<SlotIndex>, deferred: u32) -> [u64; 4] {
        figures_of(page, client, MemoryLimit::None, deferred)
    }

    fn figures_of(page: &Page, client: Option<SlotIndex>, limit: MemoryLimit, deferred: u32) -> [u64; 4] {
        let MemoryInfo { total, free, own, others } =
            MemoryInfo::of(&Snapshot::take(page, SlotSet::EMPTY), client, limit, deferred);
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
        page.set_context(mine, 5);
        me.books().grow(20);
        assert_eq!(figures(&page, Some(mine)), [100, 75, 25, 0]);
        them.books().grow(60);
        assert_eq!(figures(&page, Some(mine)), [100, 75, 25, 0], "their data makes room");
        page.set_context(other, 6);
        assert_eq!(figures(&page, Some(mine)), [100, 69, 25, 6], "their context does not");
        assert_eq!(figures(&page, None), [100, 89, 0, 11]);
        them.books().try_take(10).unwrap();
        them.books().pin(10);
        assert_eq!(figures(&page, Some(mine)), [100, 59, 25, 16], "nor does what cannot move");
        me.books().try_take(20).unwrap();
        me.books().pin(20);
        assert_eq!(figures(&page, Some(mine)), [100, 59, 25, 16], "it is its own, wherever it can go");
        me.books().unpin(20);
        me.books().shrink(20);
        assert_eq!(figures(&page, Some(mine))[1..], [79, 5, 16]);
    }

    #[test]
    fn what_is_freed_is_free_before_it_is_given_back() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 1).unwrap();
        page.set_context(slot, 5);
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
        page.set_context(mine, 5);
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
        page.set_context(other, 50);
        assert_eq!(told(MemoryLimit::Size(40)), [40, 15, 25, 0]);
        page.set_context(other, 70);
        assert_eq!(told(MemoryLimit::Size(40)), [40, 5, 25, 10]);
        // A limit that came later takes nothing away, and nothing is free.
        page.set_context(other, 0);
        assert_eq!(told(MemoryLimit::Size(22)), [22, 0, 22, 0]);
        assert_eq!(told(MemoryLimit::Size(3)), [3, 0, 3, 0], "less than its context");
        assert_eq!(figures_of(&page, Some(mine), MemoryLimit::Size(22), 10), [22, 7, 15, 0]);
    }

    #[test]
    fn who_needs_more_than_there_is_has_all_of_it() {
        let page = Page::on_heap(GpuUuid([1; 16]), 100);
        let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 1).unwrap();
        page.set_context(slot, 5);
        Client::new(&*page, slot).books().grow(300);
        assert_eq!(figures(&page, Some(slot)), [100, 0, 100, 0]);
        page.set_capacity(3);
        assert_eq!(figures(&page, Some(slot)), [3, 0, 3, 0]);
    }
}
