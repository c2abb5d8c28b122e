//! A client that cannot evict, because the host has no memory for its data.
//!
//! Memory that it cannot evict stays on the GPU and counts as memory that cannot move ([`nvshare::Books::pin`]). So the client
//! runs beside every other client, none of which asks for that memory; the others share the rest of the GPU, and use host
//! memory for what does not fit there. The client is reported as stalled ([`Stall::NoHostMemory`]) and goes on.
//!
//! It retries, with growing pauses. It does not evict to do so, because it would have to stop for that: a separate thread
//! allocates host memory in advance. As much of its memory as then fits in host memory can move again.
//!
//! A client that fills and needs host memory for what does not fit on the GPU, but finds none, gives up its turn and asks
//! again later.

use crate::cuda::abi::CU_STREAM_CAPTURE_MODE_RELAXED;
use crate::memory::device::Device;
use nvshare::page::Stall;
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The pause before the first retry. It doubles with each further one.
const FIRST: Nanos = 500 * MILLISECOND;
/// The longest pause.
const LAST: Nanos = 30 * SECOND;

/// Pauses between attempts that get longer.
#[derive(Debug, Default)]
struct Pause {
    length: Nanos,
    until: Nanos,
}

impl Pause {
    fn begin(&mut self) {
        self.length = (2 * self.length).clamp(FIRST, LAST);
        self.until = now() + self.length;
    }
}

/// The state of a client that lacks host memory.
#[derive(Default)]
pub struct HostShortage {
    /// Granules on the GPU that count as memory that cannot move.
    held: Granules,
    /// Since when there are any, ns.
    since: Nanos,
    /// Until the next attempt to allocate host memory for evictions.
    evicts: Pause,
    /// A thread allocates host memory.
    making: Arc<AtomicBool>,
    /// That thread has ended since the last call of [`HostShortage::look`].
    made: Arc<AtomicBool>,
    /// The client has given up its turn, because a fill found no memory.
    stands_back: bool,
    /// Until the client asks for the GPU again.
    fills: Pause,
}

impl HostShortage {
    /// An eviction found no host memory: the client's memory on the GPU stays there.
    pub fn cannot_evict(&mut self, device: &Arc<Device>, why: &str) {
        let books = &device.books;
        let stays = device.memory().evictable().saturating_sub(self.held);
        if self.held == 0 {
            self.since = now();
            tracing::error!(
                gpu = %device.gpu,
                "{} of this process cannot be evicted and stay on the GPU, so other processes have only the rest of it: {why}. This process goes on, and makes room as soon as there is host memory",
                format_size(bytes_of(stays))
            );
        }
        self.held = self.held.saturating_add(stays);
        self.evicts.begin();
        books.stalled(Stall::NoHostMemory);
        books.pin(stays);
    }

    /// A fill needed host memory in place of GPU memory and found none. The client gives up its turn.
    pub fn cannot_fill(&mut self, device: &Arc<Device>, why: &str) {
        self.fills.begin();
        device.books.stalled(Stall::NoHostMemory);
        if !std::mem::replace(&mut self.stands_back, true) {
            tracing::error!(
                gpu = %device.gpu,
                "this process waits, because its memory fits neither on the GPU nor in host memory: {why}. It goes on trying"
            );
        }
    }

    /// All memory is in place.
    pub fn filled(&mut self, device: &Device) {
        if std::mem::take(&mut self.stands_back) {
            self.fills = Pause::default();
            tracing::warn!(gpu = %device.gpu, "this process runs again: there is room for its memory now");
            if self.held == 0 {
                device.books.stall_ended();
            }
        }
    }

    /// The client can drain, or need not any more: it is no longer stalled, unless it lacks host memory.
    pub fn drain_stall_ends(&self, device: &Device) {
        if self.held > 0 || self.stands_back {
            device.books.stalled(Stall::NoHostMemory);
        } else {
            device.books.stall_ended();
        }
    }

    /// When the client may ask for the GPU again, ns; `None` if now.
    pub fn asks_at(&self) -> Option<Nanos> {
        (self.stands_back && now() < self.fills.until).then_some(self.fills.until)
    }

    /// Retries what is due. Returns when to call again, ns.
    pub fn look(&mut self, device: &Arc<Device>) -> Option<Nanos> {
        if self.held == 0 {
            return None;
        }
        // Another stall may have been reported meanwhile and have ended.
        device.books.stalled(Stall::NoHostMemory);
        if self.made.swap(false, Ordering::AcqRel) {
            self.evicts.begin();
        }
        self.release(device);
        if self.held == 0 {
            self.over(device);
            return None;
        }
        if self.making.load(Ordering::Acquire) {
            // That thread rings the doorbell when it ends.
            return None;
        }
        if now() < self.evicts.until {
            return Some(self.evicts.until);
        }
        self.make(device);
        None
    }

    /// Counts memory as movable again, as far as there is host memory for it or the application has freed it. A chunk moves
    /// whole, so host memory that is too small for any chunk does not count.
    fn release(&mut self, device: &Device) {
        let stays = {
            let memory = device.memory();
            memory.evictable().saturating_sub(memory.evictable_with(device.host.free_bytes()))
        };
        let released = self.held.saturating_sub(stays);
        if released > 0 {
            self.held -= released;
            device.books.unpin(released);
        }
    }

    fn over(&mut self, device: &Device) {
        self.evicts = Pause::default();
        if !self.stands_back {
            device.books.stall_ended();
        }
        // At the level of a warning: a log that shows only the beginning would seem to say that the shortage goes on.
        tracing::warn!(
            gpu = %device.gpu,
            "this process can evict its memory again: there was no host memory for {}",
            format_nanos(now() - self.since)
        );
    }

    /// Allocates host memory for the client's memory, or for a part of it. In a separate thread, because that takes long;
    /// in this one if no thread can be started.
    fn make(&self, device: &Arc<Device>) {
        let (least, all) = {
            let memory = device.memory();
            (memory.least_need(), bytes_of(memory.evictable()))
        };
        let (device, making, made) = (device.clone(), self.making.clone(), self.made.clone());
        let make = move || {
            // Registering memory must not invalidate a capture of another thread.
            let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            // Less than the smallest chunk needs would be of no use, and is left to other processes.
            if device.host.make_free(least, all).is_ok() {
                tracing::debug!(gpu = %device.gpu, "allocated host memory for memory that could not be evicted");
            }
            made.store(true, Ordering::Release);
            making.store(false, Ordering::Release);
            device.wake_engine();
        };
        self.making.store(true, Ordering::Release);
        let thread = std::thread::Builder::new().name("nvshare-host".into());
        if thread.spawn(make.clone()).is_err() {
            make();
        }
    }

    /// Waits for its thread.
    pub fn end(&self) {
        while self.making.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_get_longer_up_to_a_bound() {
        let mut pause = Pause::default();
        let lengths: Vec<_> = (0..9)
            .map(|_| {
                pause.begin();
                pause.length / MILLISECOND
            })
            .collect();
        assert_eq!(lengths, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
    }
}
