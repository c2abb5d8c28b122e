//! One GPU of this process: its memory, its accounts, and the operations of the application's threads on them.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::engine_context::{DriverPinner, EngineContext, Successor};
use crate::memory::host::HostPool;
use crate::memory::imported::Imported;
use crate::memory::map::Memory;
use crate::replicas::Group;
use crate::submit::drain::Streams;
use crate::submit::gang;
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::memory_info::MemoryInfo;
use nvshare::slot::SlotSet;
use nvshare::snapshot::Snapshot;
use nvshare::units::GpuUuid;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

/// One GPU: the state that the engine and the application's threads share.
pub struct Device {
    /// The driver.
    pub driver: &'static Driver,
    /// The GPU's ordinal in this process.
    pub ordinal: CUdevice,
    /// The GPU.
    pub gpu: GpuUuid,
    /// The client's accounts in the page: what it has and what it asks for.
    pub books: Books<MappedPage>,
    /// Host memory for what is evicted.
    pub host: HostPool,
    /// The streams that may have work.
    pub streams: Arc<Streams>,
    pub(super) memory: Mutex<Memory>,
    /// Signalled when memory no longer moves.
    pub(super) settled: Condvar,
    /// The GPU can export memory to other processes as file descriptors.
    pub exportable: bool,
    /// The application may allocate more than the GPU has; the excess lies in host memory.
    pub(super) oversubscribe: bool,
    /// The context that the engine works in.
    pub engine_context: EngineContext,
    /// The descriptors of memory that came from other processes.
    pub imported: Imported,
    /// The group of replicas that the client is a member of, if it is one.
    pub replicas: OnceLock<Arc<Group>>,
}

impl Device {
    /// The device of a client that has just registered.
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
            imported: Imported::default(),
            replicas: OnceLock::new(),
        }
    }

    /// The map of the application's memory.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        nvshare::sync::lock(&self.memory)
    }

    /// The map; waits until no memory moves.
    pub fn memory_at_rest(&self) -> MutexGuard<'_, Memory> {
        let at_rest = self.settled.wait_while(self.memory(), |memory| memory.moving);
        at_rest.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Records that memory begins to move, or no longer moves.
    pub fn set_moving(&self, moving: bool) {
        self.memory().moving = moving;
        if !moving {
            self.settled.notify_all();
        }
    }

    /// Wakes the engine, to check what has changed.
    pub fn wake_engine(&self) {
        self.books.page().ring(self.books.slot());
    }

    /// A snapshot of the GPU's page.
    pub fn snapshot(&self) -> Snapshot {
        let page = self.books.page();
        Snapshot::take(page, page.admitted())
    }

    /// Has the engine leave `context` for a successor, and waits until it has.
    pub fn leave_context(&self, context: CUcontext, successor: Successor) {
        self.engine_context.leave(context, successor, || self.wake_engine());
    }

    /// Ends the engine, because the last context is gone.
    pub fn end_engine(&self) {
        self.engine_context.end();
        self.wake_engine();
    }

    /// This GPU as a member of the gang.
    pub fn gang_member(&self) -> gang::Member {
        gang::Member {
            gpu: self.gpu,
            driver: self.driver,
            books: self.books.clone(),
            streams: self.streams.clone(),
        }
    }

    /// The amounts of memory that this process is told the GPU has.
    pub fn figures(&self) -> MemoryInfo {
        // The lock is held so that no deferred free ends between the reads of the page and of the map.
        let memory = self.memory();
        let snapshot = Snapshot::take(self.books.page(), SlotSet::EMPTY);
        MemoryInfo::of(&snapshot, Some(self.books.slot()), self.memory_limit(), memory.deferred())
    }
}
