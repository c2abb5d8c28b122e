//! Memory that goes from one replica to another instead of over the link ([`crate::replicas`]).
//!
//! The giver evicts first what the other one lacks. The taker leaves that out as long as there is something else to copy from host
//! memory, and then waits for it, a moment at a time. Each has a copy of the chunk in host memory before its physical memory changes
//! hands, so whatever goes wrong costs a copy and no data.

use super::Swap;
use crate::cuda::abi::{CUdeviceptr, CUmemGenericAllocationHandle};
use crate::local_socket::Socket;
use crate::memory::error::{SwapError, driver_said};
use crate::memory::fingerprint::Fingerprints;
use crate::memory::region::{Backing, ChunkMapping};
use crate::replicas::MOST_OFFERED;
use crate::replicas::giving::PATIENCE;
use crate::replicas::inbox::Handed;
use nvshare::sync::now;
use nvshare::units::{Granules, Nanos, format_size};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Once;
use std::time::Duration;

/// How long a fill that waits for a replica sleeps before it looks whether it is still admitted.
const LOOK: Duration = Duration::from_millis(10);

impl Swap {
    /// Finds other replicas, and takes the key that the group has agreed on. Before a scan.
    pub(super) fn agree_on_key(&mut self) {
        let Some(giving) = &mut self.giving else { return };
        giving.meet(self.device.books.page(), self.device.books.slot());
        if giving.group().adopt() {
            let copies = self.device.memory().forget_fingerprints();
            self.free_copies(copies);
        }
    }

    /// Offers what is on the GPU to replicas that are being filled. The chunks that they lack, which are to be evicted first.
    pub(super) fn offer(&mut self, granules: Granules) -> VecDeque<CUdeviceptr> {
        let Some(giving) = &mut self.giving else { return VecDeque::new() };
        let books = &self.device.books;
        let admitted = books.page().admitted().without(books.slot());
        if admitted.is_empty() || granules == 0 {
            return VecDeque::new();
        }
        let (addresses, digests): (Vec<_>, Vec<_>) =
            self.device.memory().offers(MOST_OFFERED).into_iter().unzip();
        let mut wanted = giving.offer(admitted, &digests, granules);
        wanted.sort_unstable_by_key(|wanted| wanted.at);
        self.handing = wanted.iter().map(|wanted| (addresses[wanted.at], *wanted)).collect();
        wanted.iter().map(|wanted| addresses[wanted.at]).collect()
    }

    /// Unmaps a chunk and releases its memory, after it was handed to the replica that lacks it, if there is one and it takes it.
    pub(super) fn unmap_or_hand_over(&mut self, place: &ChunkMapping, handle: CUmemGenericAllocationHandle) {
        let Some(memory) = self.memory_for_replica(place, handle) else {
            return self.device.release(place, handle);
        };
        // The replica may write to it as soon as it has it.
        self.device.unmap(place);
        if let (Some(giving), Some(wanted)) = (&mut self.giving, self.handing.remove(&place.address))
            && giving.send(&wanted, place.size, memory.as_fd())
        {
            self.device.books.handed_over(place.size);
        }
        self.device.release_unmapped(place, handle);
    }

    /// The descriptor of a chunk's memory, if a replica lacks the chunk and can be sent it now.
    fn memory_for_replica(
        &mut self,
        place: &ChunkMapping,
        handle: CUmemGenericAllocationHandle,
    ) -> Option<Socket> {
        let (giving, wanted) = (self.giving.as_mut()?, self.handing.get(&place.address)?);
        if !giving.has_room(wanted) {
            self.handing.remove(&place.address);
            return None;
        }
        match self.device.imported.export(self.device.driver, handle) {
            Ok(memory) => Some(Socket::new(memory)),
            Err(result) => {
                self.handing.remove(&place.address);
                static ONCE: Once = Once::new();
                ONCE.call_once(|| {
                    tracing::warn!(
                        gpu = %self.device.gpu,
                        "GPU memory cannot be handed to replicas of this process, which copy it from host memory (cuMemExportToShareableHandle): {result}"
                    );
                });
                None
            }
        }
    }

    /// The eviction has ended: what was promised and not handed over will not come.
    pub(super) fn end_handing(&mut self) {
        self.handing.clear();
        if let Some(giving) = &mut self.giving {
            giving.over();
        }
    }

    /// Whether a replica has handed something over.
    pub(super) fn has_handed(&self) -> bool {
        self.device.replicas.get().is_some_and(|group| group.inbox.has_some())
    }

    /// Takes what a replica has handed over. Waits for it if nothing else is left to fill; and for granules for the next chunk, because
    /// a chunk for which granules are waited for elsewhere is being moved and cannot be promised. False if there is something else
    /// to do. `heard` is when the last chunk came or the wait for one began, ns.
    ///
    /// # Errors
    /// The driver's, of a copy that was in flight.
    pub(super) fn takes_handed(&mut self, heard: &mut Option<Nanos>) -> Result<bool, SwapError> {
        let Some(group) = self.device.replicas.get().cloned() else { return Ok(false) };
        if let Some(handed) = group.inbox.pop() {
            self.take_over(&handed);
            *heard = Some(now());
            return Ok(true);
        }
        let next = self.device.memory().next_on_gpu();
        let Some((granules, promised)) = next else { return Ok(false) };
        let books = &self.device.books;
        let goes_on = books.admitted() && !self.is_called_away() && self.shortage() == 0;
        let free = books.page().free();
        if !promised {
            let waits = goes_on && free.granules < granules as i32;
            if waits {
                books.wait_for_granules(free);
            }
            return Ok(waits);
        }
        // The copies in flight are done meanwhile.
        self.finish()?;
        let since = *heard.get_or_insert_with(now);
        if goes_on && now().saturating_sub(since) < PATIENCE {
            group.inbox.wait(LOOK);
        } else {
            // It is copied from host memory, as if there was no replica.
            self.unpromise_all();
        }
        Ok(true)
    }

    fn unpromise_all(&self) {
        let mut memory = self.device.memory();
        let promised = memory.promised();
        memory.unpromise(&promised);
    }

    /// Maps what a replica has handed over in place of a chunk with the same contents. If that fails, the chunk is copied from host
    /// memory.
    fn take_over(&mut self, handed: &Handed) {
        let Handed { address, size, digest, .. } = *handed;
        let taken = self.device.memory().take_handed(address, size, digest);
        // It has come too late: the chunk was copied, or freed.
        let Some((place, copy)) = taken else { return };
        let granules = place.granules();
        if !self.take_for_handed(granules) {
            self.device.memory().settle(address, Backing::Evicted(copy));
            return self.device.memory().unpromise(&[address]);
        }
        let mapped = self.device.imported.import(self.device.driver, handed.memory.as_fd());
        let mapped = mapped.map_err(driver_said("cuMemImportFromShareableHandle")).and_then(|handle| {
            self.device.map_at(&place, handle).map(|()| handle).inspect_err(|_| {
                self.device.imported.forget(handle);
                let _ = self.device.driver.mem_release(handle);
            })
        });
        match mapped {
            Ok(handle) => {
                self.device.books.taken_over(size);
                self.device.memory().settle_kept(address, handle, copy);
                self.taken.push((address, size));
                self.arrivals.get_or_insert((now(), 0)).1 += size;
            }
            Err(error) => {
                let mut memory = self.device.memory();
                memory.settle(address, Backing::Evicted(copy));
                memory.unpromise(&[address]);
                drop(memory);
                self.device.books.give(granules);
                static ONCE: Once = Once::new();
                ONCE.call_once(|| {
                    tracing::warn!(
                        gpu = %self.device.gpu,
                        "GPU memory that a replica has handed over cannot be mapped, and is copied from host memory instead: {error}"
                    );
                });
            }
        }
    }

    /// Takes granules for a chunk that was handed over. The giver gives them back just after it has sent the memory, so this waits for
    /// them, but not for long: meanwhile the GPU holds memory that is in nobody's books.
    fn take_for_handed(&self, granules: Granules) -> bool {
        let (books, until) = (&self.device.books, now() + PATIENCE);
        while books.admitted() {
            match books.try_take(granules) {
                Ok(()) => return true,
                Err(_) if now() >= until => return false,
                Err(free) => books.wait_for_granules(free),
            }
        }
        false
    }

    /// Looks at what has come from replicas in this fill: memory with other contents than the copy in host memory is dropped, to be copied
    /// from there. Then this client hands and takes nothing any more, because one of the group is not what it says. What cannot be
    /// looked at is copied too, and nobody is blamed. True if memory was dropped.
    ///
    /// # Errors
    /// The driver's: the context is broken.
    pub(super) fn drop_what_is_wrong(&mut self) -> Result<bool, SwapError> {
        let taken = std::mem::take(&mut self.taken);
        if taken.is_empty() {
            return Ok(false);
        }
        let found = self.look_at(&taken)?;
        let mut dropped = 0;
        for (at, (address, size)) in taken.into_iter().enumerate() {
            let now = found.as_ref().map(|found| (found[at].0, &found[at].1));
            let wrong = self.device.memory().take_wrong(address, now);
            if let Some((place, handle, copy)) = wrong {
                self.device.release(&place, handle);
                self.device.memory().settle(address, Backing::Evicted(copy));
                self.device.books.give(place.granules());
                dropped += size;
            }
        }
        if dropped > 0 && found.is_some() {
            tracing::error!(
                gpu = %self.device.gpu,
                "{} of GPU memory that replicas have handed over hold something else than they said, and are copied from host memory: this process has no replicas from now on. If all processes with this NVSHARE_REPLICAS run the same release of nvshare, report this as a bug",
                format_size(dropped)
            );
            self.device.leave_replicas();
            // It takes fingerprints with a key of its own from now on.
            self.giving = None;
            let copies = self.device.memory().forget_fingerprints();
            self.free_copies(copies);
        }
        Ok(dropped > 0)
    }

    /// What chunks hold: the granules that are not all zero, and fingerprints. `None` if that cannot be found out: a kernel is not loaded, or
    /// there is no memory for its table.
    ///
    /// # Errors
    /// The driver's: the context is broken.
    fn look_at(
        &mut self,
        chunks: &[(CUdeviceptr, u64)],
    ) -> Result<Option<Vec<(u32, Fingerprints)>>, SwapError> {
        let (keys, stream) = (self.keys(), self.stream);
        let (Some(zeros), Some(prints)) = (self.zero_scan.ready(), self.fingerprints.ready()) else {
            return Ok(None);
        };
        let Ok(zero_scan) = zeros.scan(chunks, stream, [0; 2]) else { return Ok(None) };
        let fingerprints = prints.scan(chunks, stream, keys);
        let not_zero = zeros.finish(zero_scan)?;
        let Ok(fingerprints) = fingerprints else { return Ok(None) };
        Ok(Some(not_zero.into_iter().zip(prints.finish(fingerprints)?).collect()))
    }

    /// The fill has ended, in whatever way.
    pub(super) fn end_taking(&self) {
        if let Some(group) = self.device.replicas.get() {
            group.inbox.clear();
            self.unpromise_all();
        }
    }
}
