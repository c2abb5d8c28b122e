//! Memory of other processes that this one has open.

use crate::cuda::abi::{CUcontext, CUdeviceptr, CUmemAccessDesc, CuResult};
use crate::ipc::channel::Extent;
use crate::ipc::client::{Connection, OpenError};
use crate::ipc::handle::{Exporter, Handle};
use crate::memory::device::Device;
use crate::memory::devices;
use nvshare::sync::now;
use nvshare::units::{GRANULE, format_nanos, format_size};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// An allocation of another process, mapped here.
struct Import {
    handle: Handle,
    /// The context with which it is closed.
    context: CUcontext,
    mapping: Mapping,
    /// Where its allocation begins.
    address: CUdeviceptr,
    /// The allocation's bytes.
    bytes: u64,
    /// How often it was opened.
    opened: u32,
    connection: Arc<Connection>,
}

#[derive(Default)]
struct Imports {
    open: Vec<Import>,
    /// Closed, and still mapped because the work that may use it was not waited for yet.
    closing: Vec<Import>,
    /// The connection to each exporter while memory of it is open.
    exporters: HashMap<Exporter, Weak<Connection>>,
}

static IMPORTS: Mutex<Option<Imports>> = Mutex::new(None);

fn with<T>(action: impl FnOnce(&mut Imports) -> T) -> T {
    let mut imports: MutexGuard<'_, Option<Imports>> = nvshare::sync::lock(&IMPORTS);
    action(imports.get_or_insert_default())
}

/// Reserved addresses and the pieces mapped there so far. Unmapped and freed when dropped.
struct Mapping {
    device: Arc<Device>,
    base: CUdeviceptr,
    size: u64,
    pieces: Vec<(CUdeviceptr, u64)>,
}

impl Mapping {
    fn new(device: &Arc<Device>, size: u64) -> Result<Self, OpenError> {
        let base = device
            .driver
            .mem_address_reserve(size as usize, GRANULE as usize, 0, 0)
            .map_err(said("cuMemAddressReserve"))?;
        Ok(Self { device: device.clone(), base, size, pieces: Vec::new() })
    }

    fn add(&mut self, at: u64, fd: &std::os::fd::OwnedFd, size: u64) -> Result<(), OpenError> {
        use std::os::fd::AsFd;
        let (driver, address) = (self.device.driver, self.base + at);
        let handle = driver.mem_import(fd.as_fd()).map_err(said("cuMemImportFromShareableHandle"))?;
        let mapped = driver.mem_map(address, size as usize, 0, handle, 0);
        // The mapping keeps the memory.
        let _ = driver.mem_release(handle);
        mapped.map_err(said("cuMemMap"))?;
        self.pieces.push((address, size));
        Ok(())
    }

    /// Gives access to the GPU of the context, and if possible to the process's other GPUs.
    fn allow(&self) -> Result<(), OpenError> {
        let (driver, own) = (self.device.driver, self.device.ordinal);
        let all: Vec<_> =
            devices::all().iter().map(|device| CUmemAccessDesc::read_write(device.ordinal)).collect();
        if all.len() > 1 && driver.mem_set_access(self.base, self.size as usize, &all).is_ok() {
            return Ok(());
        }
        driver
            .mem_set_access(self.base, self.size as usize, &[CUmemAccessDesc::read_write(own)])
            .map_err(said("cuMemSetAccess"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let driver = self.device.driver;
        for (address, size) in &self.pieces {
            if let Err(result) = driver.mem_unmap(*address, *size as usize) {
                tracing::debug!(
                    gpu = %self.device.gpu,
                    "memory of another process at {address:#x} could not be unmapped: {result}"
                );
            }
        }
        let _ = driver.mem_address_free(self.base, self.size as usize);
    }
}

fn said(call: &'static str) -> impl Fn(CuResult) -> OpenError {
    move |result| OpenError::Driver { call, result }
}

impl Imports {
    /// Requests an allocation from its exporter, and maps it.
    fn fetch(
        &mut self,
        device: &Arc<Device>,
        handle: &Handle,
    ) -> Result<(Arc<Connection>, Extent, Mapping), OpenError> {
        self.exporters.retain(|_, connection| connection.strong_count() > 0);
        let known = self.exporters.get(&handle.exporter).and_then(Weak::upgrade);
        let connection = match &known {
            Some(connection) => connection.clone(),
            None => Arc::new(Connection::to(&handle.exporter)?),
        };
        let mut mapping = None;
        let opened = connection.open(handle, |extent, at, fd, size| {
            let mapping = match &mut mapping {
                Some(mapping) => mapping,
                none => none.insert(Mapping::new(device, extent.size)?),
            };
            mapping.add(at, &fd, size)
        });
        match (opened, mapping) {
            (Ok(extent), Some(mapping)) => {
                self.exporters.insert(handle.exporter, Arc::downgrade(&connection));
                Ok((connection, extent, mapping))
            }
            (Ok(_), None) => Err(OpenError::Nonsense("it has no pieces".into())),
            (Err(error), mapping) => {
                if !error.leaves_it_usable() {
                    // A late answer would be taken for the answer to another request.
                    self.exporters.remove(&handle.exporter);
                }
                if known.is_some() && mapping.is_none() && matches!(error, OpenError::HungUp(_)) {
                    // The connection was closed some time ago: try a new one.
                    return self.fetch(device, handle);
                }
                Err(error)
            }
        }
    }
}

/// cuIpcOpenMemHandle of nvshare's handle, in a context of that GPU.
///
/// # Errors
/// [`OpenError::cuda`] is the result for the application.
pub fn open(device: &Arc<Device>, context: CUcontext, handle: &Handle) -> Result<CUdeviceptr, OpenError> {
    sweep();
    with(|imports| {
        let same = |import: &&mut Import| {
            let name = (import.handle.exporter, import.handle.number, import.context);
            name == (handle.exporter, handle.number, context) && import.handle.key.is(&handle.key)
        };
        if let Some(import) = imports.open.iter_mut().find(same) {
            import.opened += 1;
            return Ok(import.address);
        }
        let began = now();
        let (connection, extent, mapping) = imports.fetch(device, handle)?;
        if let Err(error) = mapping.allow() {
            connection.close(handle);
            return Err(error);
        }
        tracing::debug!(
            gpu = %device.gpu,
            "{} of process {} mapped in {}",
            format_size(extent.size),
            handle.exporter.pid,
            format_nanos(now() - began)
        );
        let address = mapping.base + extent.offset;
        let handle = *handle;
        imports.open.push(Import {
            handle,
            context,
            mapping,
            address,
            bytes: extent.bytes,
            opened: 1,
            connection,
        });
        Ok(address)
    })
}

/// cuIpcCloseMemHandle. False if no memory of another process under nvshare is open there.
pub fn close(address: CUdeviceptr) -> bool {
    let closed = with(|imports| {
        let index = imports.open.iter().position(|import| import.address == address)?;
        let import = &mut imports.open[index];
        import.opened -= 1;
        if import.opened == 0 {
            let import = imports.open.swap_remove(index);
            imports.closing.push(import);
            CLOSING.store(true, Ordering::Release);
        }
        Some(())
    });
    sweep();
    closed.is_some()
}

/// The allocation of another process that contains an address: its address and bytes.
pub fn containing(address: CUdeviceptr) -> Option<(CUdeviceptr, u64)> {
    with(|imports| {
        let inside = |import: &&Import| (import.address..import.address + import.bytes).contains(&address);
        imports.open.iter().find(inside).map(|import| (import.address, import.bytes))
    })
}

/// Whether some memory is closed and still mapped, perhaps because an open capture forbids waiting for the work that may use
/// it.
static CLOSING: AtomicBool = AtomicBool::new(false);

/// Memory that is closed and still mapped.
pub struct Closing(Vec<Import>);

/// Takes the memory that is closed and still mapped, if there is any. The caller waits for the work that may use it.
pub fn closing() -> Option<Closing> {
    if !CLOSING.swap(false, Ordering::AcqRel) {
        return None;
    }
    // The lock is not waited for, because another thread may hold it while it waits for an exporter. That thread or the next
    // call will do this.
    match IMPORTS.try_lock().as_deref_mut() {
        Ok(Some(imports)) => Some(Closing(std::mem::take(&mut imports.closing))),
        _ => {
            CLOSING.store(true, Ordering::Release);
            None
        }
    }
}

impl Closing {
    /// Unmaps it, after the work that may use it is done.
    pub fn end(self) {
        self.0.into_iter().for_each(Import::end);
    }
}

/// Waits for the work that may use closed memory, and unmaps it. If a capture is open, the engine does that after its end.
fn sweep() {
    let Some(closing) = closing() else { return };
    // Work of any GPU may use it.
    if devices::all().iter().all(|device| device.wait_for_work()) {
        closing.end();
    } else {
        with(|imports| imports.closing.extend(closing.0));
        CLOSING.store(true, Ordering::Release);
    }
}

impl Import {
    fn end(self) {
        let Self { handle, mapping, connection, .. } = self;
        // Unmap first: once it is told, the exporter may consider the memory free.
        drop(mapping);
        connection.close(&handle);
    }
}

/// Closes the memory that was opened in a context that was destroyed.
pub fn context_ends(context: CUcontext) {
    let ended: Vec<_> = with(|imports| {
        let open = imports.open.extract_if(.., |import| import.context == context).collect::<Vec<_>>();
        open.into_iter().chain(imports.closing.extract_if(.., |import| import.context == context)).collect()
    });
    ended.into_iter().for_each(Import::end);
}

/// In a forked child: closes its copies of the connections, so that exporters notice when the parent closes them or ends.
pub fn after_fork() {
    // If the lock is held by a thread that exists only in the parent, the exporters notice it when the child ends.
    let Ok(imports) = IMPORTS.try_lock() else { return };
    for import in imports.iter().flat_map(|imports| imports.open.iter().chain(&imports.closing)) {
        // SAFETY: the copy of a descriptor that is not used in the child, where nvshare is inactive.
        unsafe { libc::close(import.connection.raw()) };
    }
}
