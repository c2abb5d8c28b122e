//! The GPUs that this process has attached to, and the contexts that it has on each.

use crate::cuda::abi::{CUcontext, CUdevice, CUgreenCtx};
use crate::memory::device::Device;
use crate::memory::engine_context::Successor;
use crate::submit::green::{self, Green};
use nvshare::units::GpuUuid;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// A GPU that this process has attached to.
pub struct Attached {
    /// The GPU.
    pub device: Arc<Device>,
    /// The contexts on it except green ones. Never empty while the GPU is in the list.
    pub contexts: Vec<CUcontext>,
    /// The thread that moves its memory.
    pub engine: Option<JoinHandle<()>>,
}

static DEVICES: Mutex<Vec<Attached>> = Mutex::new(Vec::new());

fn devices() -> MutexGuard<'static, Vec<Attached>> {
    nvshare::sync::lock(&DEVICES)
}

/// Adds a GPU to which the process has attached.
pub fn add(attached: Attached) {
    devices().push(attached);
}

/// Adds a context, if the process has attached to its GPU. False if it has not.
pub fn add_context(context: CUcontext, device: CUdevice) -> bool {
    let mut devices = devices();
    let Some(attached) = devices.iter_mut().find(|attached| attached.device.ordinal == device) else {
        return false;
    };
    if !attached.contexts.contains(&context) {
        attached.contexts.push(context);
        attached.device.streams.add_context(context);
    }
    true
}

/// What remains of a GPU in the process after a context was destroyed.
pub enum Left {
    /// The GPU, and another context on it.
    Context(Arc<Device>, CUcontext),
    /// That was the last context: the GPU is removed from the list, and the process must detach from it.
    Nothing(Attached),
}

/// Removes a context that was destroyed. `None` if it is not known, or is a green one.
pub fn remove_context(context: CUcontext) -> Option<Left> {
    let mut devices = devices();
    let index = devices.iter().position(|attached| attached.contexts.contains(&context))?;
    let attached = &mut devices[index];
    attached.contexts.retain(|known| *known != context);
    Some(match attached.contexts.first() {
        None => Left::Nothing(devices.swap_remove(index)),
        Some(other) => Left::Context(attached.device.clone(), *other),
    })
}

/// The GPU of a context that is about to be destroyed, and where its engine moves. `None` if the context is not known, or is
/// a green one.
pub fn ending(context: CUcontext) -> Option<(Arc<Device>, Successor)> {
    let devices = devices();
    let attached = devices.iter().find(|attached| attached.contexts.contains(&context))?;
    let other = attached.contexts.iter().copied().find(|other| *other != context);
    Some((attached.device.clone(), other.map_or(Successor::None, Successor::Context)))
}

/// The GPU of a context, and the context to which memory allocated in it belongs: itself, or for a green context its
/// primary context.
pub fn known(context: CUcontext) -> Option<(Arc<Device>, CUcontext)> {
    let owner = green::owner_of(context);
    let devices = devices();
    let attached = devices.iter().find(|attached| attached.contexts.contains(&owner))?;
    Some((attached.device.clone(), owner))
}

/// The GPU of a context.
pub fn of_context(context: CUcontext) -> Option<Arc<Device>> {
    known(context).map(|(device, _)| device)
}

/// A green context by its handle, and its GPU.
pub fn green(handle: CUgreenCtx) -> Option<(Arc<Device>, Green)> {
    let green = green::by_handle(handle)?;
    Some((of_context(green.owner)?, green))
}

/// Adds a green context, if its primary context is known.
pub fn green_made(green: Green) {
    if let Some(device) = of_context(green.owner)
        && green::add(green)
    {
        device.streams.add_green(green);
    }
}

/// Removes a green context that was destroyed, and its streams.
pub fn green_ended(green: &Green) {
    green::remove(green);
    all().iter().for_each(|device| device.streams.remove_green(green));
}

/// All GPUs.
pub fn all() -> Vec<Arc<Device>> {
    devices().iter().map(|attached| attached.device.clone()).collect()
}

/// All contexts of the process except green ones.
pub fn contexts() -> Vec<CUcontext> {
    devices().iter().flat_map(|attached| attached.contexts.clone()).collect()
}

/// A GPU, by the driver's ordinal.
pub fn of_device(ordinal: CUdevice) -> Option<Arc<Device>> {
    attached(ordinal).map(|(device, _)| device)
}

/// A GPU, by the driver's ordinal, and a context on it.
pub fn attached(ordinal: CUdevice) -> Option<(Arc<Device>, CUcontext)> {
    let devices = devices();
    let attached = devices.iter().find(|attached| attached.device.ordinal == ordinal)?;
    Some((attached.device.clone(), *attached.contexts.first()?))
}

/// A GPU, by its UUID.
pub fn of_gpu(gpu: GpuUuid) -> Option<Arc<Device>> {
    devices().iter().find(|attached| attached.device.gpu == gpu).map(|attached| attached.device.clone())
}
