//! Room for what only the driver can place: arrays, managed memory, modules, streams, contexts.
//!
//! The pool's granules are all given out, in the end, so the driver must find some that nobody uses when it
//! needs memory of its own. *Room* is granules that the client takes from the pool like any others, waiting
//! for its turn if it must, and behind which nothing is mapped.
//!
//! - Memory that the application asks the driver for, and that the shim cannot make movable
//!   ([`crate::process::driver_memory::reserve`]): its room is taken before the call and kept until the memory is freed. It
//!   counts as memory that cannot move.
//! - What the driver takes for itself in passing ([`crate::process::driver_memory::with_room`]): nobody can say how much that
//!   will be, so the call is made first; if it fails for want of memory, room is made, and the call is made again. The room
//!   is given back afterwards, and the arbiter sees what became of it as part of the context.
//!
//! A process's first context on a GPU comes before all this: see [`crate::process::first_context`].

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::region::Backing;
use crate::submit::pass;
use nvshare::units::{Granules, bytes_of, format_size, granules_for};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of room that are tried one after the other for a call that found no memory: a stream, a module, a
/// context, something large.
pub const TRIES: [u64; 3] = [64 << 20, 512 << 20, 2 << 30];

/// Granules of the client's behind which nothing is mapped. Given back when dropped.
pub struct Reservation {
    device: Arc<Device>,
    base: CUdeviceptr,
}

impl Reservation {
    /// Takes `bytes` of room, rounded up to granules, waiting for the client's turn. It goes with `context`
    /// at the latest. What is `asked` for by the application counts against the client's memory limit; what the driver
    /// needs in passing does not.
    ///
    /// # Errors
    /// OUT_OF_MEMORY: the GPU can never have so much, or not before an open capture ends, or the client may not.
    pub fn take(device: Arc<Device>, bytes: u64, context: CUcontext, asked: bool) -> Result<Self, CuResult> {
        let granules = granules_for(bytes);
        let left = left(&device);
        if granules > left {
            return Err(device.refuse(
                bytes,
                &format!(
                    "the GPU has {} left for what only the driver can place",
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
            // The gate is open when all that the client has is in place.
            let _pass = pass::enter_query()?;
            let mut memory = reservation.device.memory();
            // The context may have gone meanwhile, and the room with it.
            let region = memory.region(base).ok_or(CuResult::CONTEXT_IS_DESTROYED)?;
            if region.chunks.iter().any(|chunk| matches!(chunk.backing, Backing::Denied)) {
                return Err(reservation
                    .device
                    .refuse(bytes, "there is no room on the GPU that it could have"));
            }
            if region.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Booked)) {
                // From now on nobody takes it away.
                reservation.device.books.pin(memory.pin(base));
                drop(memory);
                return Ok(reservation);
            }
        }
    }
}

/// Granules of the GPU that the client could have beside what it has.
fn left(device: &Device) -> Granules {
    device.books.usable().saturating_sub(device.books.demand())
}

impl Reservation {
    /// Whether its context has taken it along.
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

/// The room of what the driver has placed, by the driver's handle or address.
static KEPT: Mutex<Option<HashMap<u64, Reservation>>> = Mutex::new(None);

fn kept() -> MutexGuard<'static, Option<HashMap<u64, Reservation>>> {
    nvshare::sync::lock(&KEPT)
}

/// Keeps a reservation for what the driver has placed, which goes by this handle, until [`release`].
pub fn keep(handle: u64, reservation: Reservation) {
    let before = kept().get_or_insert_default().insert(handle, reservation);
    drop(before);
}

/// What went by this handle is freed.
pub fn release(handle: u64) {
    let reservation = kept().as_mut().and_then(|kept| kept.remove(&handle));
    drop(reservation);
}

/// A context has gone, and with it what the driver had placed there.
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

/// Makes a call with more and more room on a GPU, for which the driver found no memory: at most all that the client
/// could have. The room goes with `context` at the latest.
#[cold]
pub fn make_room(device: &Arc<Device>, context: CUcontext, call: impl Fn() -> CuResult) -> CuResult {
    for attempt in TRIES {
        let bytes = attempt.min(bytes_of(left(device)));
        if bytes == 0 {
            break;
        }
        let Ok(_reservation) = Reservation::take(device.clone(), bytes, context, false) else { break };
        tracing::debug!(gpu = %device.gpu, "the driver is out of memory: made room for {}, trying again", format_size(bytes));
        let result = call();
        if result != CuResult::OUT_OF_MEMORY || bytes < attempt {
            return result;
        }
    }
    CuResult::OUT_OF_MEMORY
}
