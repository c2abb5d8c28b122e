//! One GPU of this process: its memory, its books, and what the application's threads do with them.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::engine_context::{DriverPinner, EngineContext, Successor};
use crate::memory::host::HostPool;
use crate::memory::map::Memory;
use crate::submit::drain::Streams;
use crate::submit::gang;
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::memory_info::MemoryInfo;
use nvshare::slot::SlotSet;
use nvshare::snapshot::Snapshot;
use nvshare::units::GpuUuid;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// What the engine and the application's threads share.
pub struct Device {
    /// The driver.
    pub driver: &'static Driver,
    /// The GPU's ordinal, as this process's driver counts.
    pub ordinal: CUdevice,
    /// The GPU.
    pub gpu: GpuUuid,
    /// What this client has and asks for.
    pub books: Books<MappedPage>,
    /// Host memory for what is evicted.
    pub host: HostPool,
    /// The streams that may have work.
    pub streams: Arc<Streams>,
    pub(super) memory: Mutex<Memory>,
    /// Memory moves no more.
    pub(super) settled: Condvar,
    /// Other processes may be given our memory to map.
    pub exportable: bool,
    /// More memory than there is may be allocated, and lies in host memory then.
    pub(super) oversubscribe: bool,
    /// The context that the engine works in.
    pub engine_context: EngineContext,
}

impl Device {
    /// The shared part of a client that has just registered.
    pub fn new(
        driver: &'static Driver,
        ordinal: CUdevice,
        gpu: GpuUuid,
        books: Books<MappedPage>,
        host: HostPool,
        pinner: Arc<DriverPinner>,
        oversubscribe: bool,
    ) -> Self {
        let attribute = CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
        Self {
            exportable: driver.device_attribute(attribute, ordinal) == Ok(1),
            oversubscribe,
            settled: Condvar::new(),
            driver,
            ordinal,
            gpu,
            books,
            host,
            engine_context: EngineContext::new(pinner),
            streams: Arc::default(),
            memory: Mutex::default(),
        }
    }

    /// The map of the application's memory.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        nvshare::sync::lock(&self.memory)
    }

    /// The map, in a moment when no memory moves.
    pub fn memory_at_rest(&self) -> MutexGuard<'_, Memory> {
        let at_rest = self.settled.wait_while(self.memory(), |memory| memory.moving);
        at_rest.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Memory begins to move, or has come to rest.
    pub fn set_moving(&self, moving: bool) {
        self.memory().moving = moving;
        if !moving {
            self.settled.notify_all();
        }
    }

    /// Wakes the engine: something that it looks at has changed.
    pub fn wake_engine(&self) {
        self.books.page().ring(self.books.slot());
    }

    /// What the page of the GPU says now.
    pub fn snapshot(&self) -> Snapshot {
        let page = self.books.page();
        Snapshot::take(page, page.admitted())
    }

    /// Has the engine move what it has in `context` to a successor, and waits until it has.
    pub fn leave_context(&self, context: CUcontext, successor: Successor) {
        self.engine_context.leave(context, successor, || self.wake_engine());
    }

    /// The last context is gone: the engine ends.
    pub fn end_engine(&self) {
        self.engine_context.end();
        self.wake_engine();
    }

    /// What the gang needs of this GPU.
    pub fn gang_member(&self) -> gang::Member {
        gang::Member {
            gpu: self.gpu,
            driver: self.driver,
            books: self.books.clone(),
            streams: self.streams.clone(),
        }
    }

    /// What this process is told about the GPU's memory.
    pub fn figures(&self) -> MemoryInfo {
        // Held, so that no free ends between the two looks.
        let memory = self.memory();
        let snapshot = Snapshot::take(self.books.page(), SlotSet::EMPTY);
        MemoryInfo::of(&snapshot, Some(self.books.slot()), self.memory_limit(), memory.deferred())
    }
}
