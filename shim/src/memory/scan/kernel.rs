//! A scan kernel from the first need of it to its end, and when it may be loaded.
//!
//! To load a kernel, or to unload it, the driver waits until all work of the context is done, and other threads' copies and launches wait for the
//! thread that loads (measured: tests/gpu/waits.cu). Work that ends only with a later copy or launch would never end: a kernel
//! that is fed by copies, a collective that another process has not joined yet. So the engine loads a kernel while the client has no work in
//! flight: before the gate opens for the first time, or after a drain.

use crate::cuda::abi::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR, CUcontext,
};
use crate::memory::device::Device;
use crate::memory::scan::compiled::{Capability, code_for};
use crate::memory::scan::compiling::Compiling;
use crate::memory::scan::{Entry, Scanner};

/// A scan kernel.
pub enum Kernel<E: Entry> {
    /// Nothing has been done for it.
    NotTried,
    /// There is no code for this GPU, so the driver's compiler makes it.
    Compiling(Compiling<E>),
    /// It is loaded.
    Ready(Scanner<E>),
    /// It cannot be had: memory is copied as if it had not been scanned.
    Unavailable,
}

impl<E: Entry> Kernel<E> {
    /// Loads it, if its code is at hand. No work of the client may be in flight.
    pub fn load_if_compiled(&mut self, device: &Device) {
        if !matches!(self, Self::NotTried) {
            return;
        }
        let Some(code) = Self::code(device) else { return };
        match Scanner::new(device.driver, code) {
            Ok(scanner) => *self = Self::Ready(scanner),
            // The GPU is full. It is tried again the next time.
            Err(error) if error.is_out_of_memory() => {}
            // Perhaps the driver is too old for this code. Its own compiler makes code that it takes.
            Err(error) => {
                tracing::debug!(gpu = %device.gpu, "the driver does not load the code of {}, so it is compiled: {error}", Self::name());
                self.compile(device);
            }
        }
    }

    /// Begins to compile it, if its code is not at hand. The application's work may go on.
    pub fn prepare(&mut self, device: &Device) {
        if matches!(self, Self::NotTried) && Self::code(device).is_none() {
            self.compile(device);
        }
    }

    /// Its code for the GPU, if that is at hand.
    fn code(device: &Device) -> Option<&'static [u8]> {
        let driver = device.driver;
        let of_gpu =
            |attribute| driver.ctx_device().and_then(|gpu| driver.device_attribute(attribute, gpu)).ok();
        code_for(E::COMPILED, Capability::new(of_gpu(MAJOR)?, of_gpu(MINOR)?))
    }

    fn compile(&mut self, device: &Device) {
        let context = device.driver.ctx_current().unwrap_or(CUcontext::NULL);
        match Compiling::begin(device.driver, context) {
            Ok(compiling) => *self = Self::Compiling(compiling),
            Err(error) => self.unavailable(device, &error),
        }
    }

    /// Loads it, if it can be had now. The first call waits for the compiler. No work of the client may be in flight.
    pub fn load(&mut self, device: &Device) -> Option<&mut Scanner<E>> {
        self.load_if_compiled(device);
        self.prepare(device);
        if let Self::Compiling(compiling) = self {
            match compiling.look()?.and_then(|code| Scanner::new(device.driver, &code)) {
                Ok(scanner) => *self = Self::Ready(scanner),
                Err(error) if error.is_out_of_memory() => *self = Self::NotTried,
                Err(error) => self.unavailable(device, &error),
            }
        }
        self.ready()
    }

    /// The kernel, if it is loaded.
    pub fn ready(&mut self) -> Option<&mut Scanner<E>> {
        match self {
            Self::Ready(scanner) => Some(scanner),
            _ => None,
        }
    }

    fn name() -> std::borrow::Cow<'static, str> {
        E::KERNEL.to_string_lossy()
    }

    fn unavailable(&mut self, device: &Device, why: &dyn std::fmt::Display) {
        tracing::info!(
            gpu = %device.gpu,
            "cannot load the kernel {}, so memory that it would have found needless to copy is copied: {why}",
            Self::name()
        );
        *self = Self::Unavailable;
    }

    /// Unloads it. The context may be destroyed afterwards.
    pub fn leave(&mut self) {
        match std::mem::replace(self, Self::NotTried) {
            Self::Ready(scanner) => scanner.destroy(),
            // Dropping it waits for its thread.
            Self::Compiling(compiling) => drop(compiling),
            Self::NotTried | Self::Unavailable => {}
        }
    }
}
