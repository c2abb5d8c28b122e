//! Reservations of GPU memory that only the driver can place: arrays, managed memory, modules, streams, contexts.
//!
//! Clients may have taken all of the pool's granules, so when the driver needs memory of its own, unused granules must be
//! found for it. A reservation is granules that the client takes from the pool like any others, waiting
//! for its turn if necessary, and at which nothing is mapped (a region of its own in [`crate::memory::map`]).
//!
//! - Memory that the application requests from the driver and that the shim cannot make movable
//!   ([`crate::process::driver_memory::reserve`]): the reservation is made before the call and kept until the memory is freed.
//!   It counts as memory that cannot move.
//! - Memory that the driver allocates for itself during a call ([`crate::process::driver_memory::with_room`]): its amount is
//!   not known, so the call is made first. If it fails because there is no memory, granules are reserved and the call
//!   is repeated. Then the reservation is released, and the arbiter counts the memory that the driver took as part of
//!   the context.
//!
//! The first context of a process on a GPU needs another way: see [`crate::process::first_context`].

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::region::Backing;
use crate::submit::pass;
use nvshare::units::{Granules, bytes_of, format_size, granules_for};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes that are reserved in turn for a call that found no memory: enough for a stream or a module, for a
/// context, for something large.
pub const TRIES: [u64; 3] = [64 << 20, 512 << 20, 2 << 30];

/// Granules of the client at which nothing is mapped. Released when dropped.
pub struct Reservation {
    device: Arc<Device>,
    base: CUdeviceptr,
}

impl Reservation {
    /// Reserves `bytes`, rounded up to granules, waiting for the client's turn. The reservation ends with `context`
    /// at the latest. If the application has `asked` for the memory, it counts against the client's memory limit; memory that
    /// the driver needs for itself does not.
    ///
    /// # Errors
    /// OUT_OF_MEMORY: the GPU can never have so much, or cannot while a capture is open, or the client's limit forbids it.
    pub fn take(device: Arc<Device>, bytes: u64, context: CUcontext, asked: bool) -> Result<Self, CuResult> {
        let granules = granules_for(bytes);
        let left = left(&device);
        if granules > left {
            return Err(device.refuse(
                bytes,
                &format!(
                    "the GPU has {} left for memory that only the driver can place (arrays, managed memory, modules)",
                    format_size(bytes_of(left))
                ),
            ));
        }
        let base = {
            let mut memory = device.memory();
            if asked {
                device.within_limit(bytes)?;
            }
            let base = memory.add_reservation(bytes_of(granules), context);
            device.populate(&mut memory, base)?;
            base
        };
        let reservation = Self { device, base };
        loop {
            // When the gate is open, all of the client's memory is in place, this reservation included.
            let pass = pass::enter_query()?;
            let mut memory = reservation.device.memory();
            // The context may have been destroyed meanwhile, and the reservation with it.
            let region = memory.region(base).ok_or(CuResult::CONTEXT_IS_DESTROYED)?;
            if region.chunks.iter().any(|chunk| matches!(chunk.backing, Backing::Denied)) {
                drop((memory, pass));
                let device = reservation.device.clone();
                // First, so that what the message says the process has is without it.
                drop(reservation);
                return Err(device
                    .refuse(bytes, "no room can be made for it on the GPU while a graph is being captured"));
            }
            if region.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Booked)) {
                // From now on it cannot be evicted.
                reservation.device.books.pin(memory.pin(base));
                drop((memory, pass));
                return Ok(reservation);
            }
        }
    }
}

/// Granules that the client could have beyond its demand.
fn left(device: &Device) -> Granules {
    device.books.usable().saturating_sub(device.books.demand())
}

impl Reservation {
    /// Whether it has ended with its context.
    fn has_gone(&self) -> bool {
        self.device.memory().region(self.base).is_none()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut memory = self.device.memory_at_rest();
        if let Some(region) = memory.remove(self.base) {
            self.device.dispose(region);
        }
    }
}

/// The reservations for memory that the driver has placed, by the driver's handle or address.
static KEPT: Mutex<Option<HashMap<u64, Reservation>>> = Mutex::new(None);

fn kept() -> MutexGuard<'static, Option<HashMap<u64, Reservation>>> {
    nvshare::sync::lock(&KEPT)
}

/// Keeps the reservation for memory that the driver has placed under this handle, until [`release`].
pub fn keep(handle: u64, reservation: Reservation) {
    let before = kept().get_or_insert_default().insert(handle, reservation);
    drop(before);
}

/// Releases the reservation for a handle whose memory was freed.
pub fn release(handle: u64) {
    let reservation = kept().as_mut().and_then(|kept| kept.remove(&handle));
    drop(reservation);
}

/// Drops the reservations that have ended with a context.
pub fn context_ended() {
    let gone: Vec<Reservation> = match kept().as_mut() {
        Some(kept) => kept
            .extract_if(|_, reservation| reservation.has_gone())
            .map(|(_, reservation)| reservation)
            .collect(),
        None => return,
    };
    drop(gone);
}

/// Repeats a call for which the driver found no memory, with larger and larger reservations, up to all granules that the
/// client could have. The reservation ends with `context` at the latest.
#[cold]
pub fn make_room(device: &Arc<Device>, context: CUcontext, call: impl Fn() -> CuResult) -> CuResult {
    for attempt in TRIES {
        let bytes = attempt.min(bytes_of(left(device)));
        if bytes == 0 {
            break;
        }
        let Ok(_reservation) = Reservation::take(device.clone(), bytes, context, false) else { break };
        tracing::debug!(gpu = %device.gpu, "the driver is out of memory: reserved {}, trying again", format_size(bytes));
        let result = call();
        if result != CuResult::OUT_OF_MEMORY || bytes < attempt {
            return result;
        }
    }
    CuResult::OUT_OF_MEMORY
}
