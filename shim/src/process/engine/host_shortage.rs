//! A client that cannot make room, because the host has no memory for its data.
//!
//! What it cannot evict stays on the GPU, and counts as memory that cannot move ([`nvshare::Books::pin`]): so it runs
//! beside whoever comes, nobody asks for that memory, and the others have the rest of the GPU, and use host memory for
//! what they lack then. The client is named ([`Stall::NoHostMemory`]) and goes on.
//!
//! It tries again: not by evicting, for which it would have to stop, but by making host memory ahead, in a thread of its
//! own, less and less often. For as much as it has made, its memory can move again.
//!
//! The same happens to a client that comes in and would have to use host memory for what the GPU cannot give it: it
//! stands back, and asks again later.

use crate::cuda::abi::CU_STREAM_CAPTURE_MODE_RELAXED;
use crate::memory::device::Device;
use nvshare::page::Stall;
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How soon it is tried again first. Twice as long each time after.
const FIRST: Nanos = 500 * MILLISECOND;
/// And how soon at the latest.
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

/// What the want of host memory has come to.
#[derive(Default)]
pub struct HostShortage {
    /// Granules that count as memory that cannot move.
    held: Granules,
    /// When that began, ns.
    since: Nanos,
    evicts: Pause,
    /// A thread makes host memory.
    making: Arc<AtomicBool>,
    /// It has, since somebody last looked.
    made: Arc<AtomicBool>,
    /// It stood back instead of coming in.
    stands_back: bool,
    fills: Pause,
}

impl HostShortage {
    /// An eviction found no host memory: what the client still has on the GPU stays there.
    pub fn cannot_evict(&mut self, device: &Arc<Device>, why: &str) {
        let books = &device.books;
        let stays = device.memory().evictable().saturating_sub(self.held);
        if self.held == 0 {
            self.since = now();
            tracing::error!(
                gpu = %device.gpu,
                "{} stay on the GPU, and others have only the rest of it: {why}. This process goes on, and will make room when there is host memory",
                format_size(bytes_of(stays))
            );
        }
        self.held = self.held.saturating_add(stays);
        self.evicts.begin();
        books.stalled(Stall::NoHostMemory);
        books.pin(stays);
    }

    /// A fill needs host memory in place of the GPU's, and found none. The client has given its turn up.
    pub fn cannot_fill(&mut self, device: &Arc<Device>, why: &str) {
        self.fills.begin();
        device.books.stalled(Stall::NoHostMemory);
        if !std::mem::replace(&mut self.stands_back, true) {
            tracing::error!(
                gpu = %device.gpu,
                "this process waits, because its memory finds no place: {why}. It will ask for the GPU again and again"
            );
        }
    }

    /// All memory is in place.
    pub fn filled(&mut self, device: &Device) {
        if std::mem::take(&mut self.stands_back) {
            self.fills = Pause::default();
            tracing::warn!(gpu = %device.gpu, "its memory has found a place: this process runs again");
            if self.held == 0 {
                device.books.stall_ended();
            }
        }
    }

    /// The client can drain, or need not any more: it is stalled no longer, unless for want of host memory.
    pub fn drain_stall_ends(&self, device: &Device) {
        if self.held > 0 || self.stands_back {
            device.books.stalled(Stall::NoHostMemory);
        } else {
            device.books.stall_ended();
        }
    }

    /// When the client may ask for the GPU again, ns, if that is not now.
    pub fn asks_at(&self) -> Option<Nanos> {
        (self.stands_back && now() < self.fills.until).then_some(self.fills.until)
    }

    /// Tries again what is due. When something is due next, ns.
    pub fn look(&mut self, device: &Arc<Device>) -> Option<Nanos> {
        if self.held == 0 {
            return None;
        }
        // Something else may have been said meanwhile, and be over.
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
            // It rings when it has.
            return None;
        }
        if now() < self.evicts.until {
            return Some(self.evicts.until);
        }
        self.make(device);
        None
    }

    /// What has host memory to go to now may move again, and what the application has freed is not held. A chunk moves
    /// whole, so host memory that is too small for any does not count.
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
        // As loud as its beginning, or a log without it would tell of a fault that goes on.
        tracing::warn!(
            gpu = %device.gpu,
            "its memory can make room again: for {} there was no host memory",
            format_nanos(now() - self.since)
        );
    }

    /// Makes host memory for what the client has, if there is any for a part of it. In a thread, because it takes its time;
    /// if the process can have none, here.
    fn make(&self, device: &Arc<Device>) {
        let (least, all) = {
            let memory = device.memory();
            (memory.least_need(), bytes_of(memory.evictable()))
        };
        let (device, making, made) = (device.clone(), self.making.clone(), self.made.clone());
        let make = move || {
            // Registering memory here must not ruin a capture elsewhere.
            let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            // What would be of no use is left to others.
            if device.host.make_free(least, all).is_ok() {
                tracing::debug!(gpu = %device.gpu, "made host memory for what could not go out");
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
