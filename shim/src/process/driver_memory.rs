//! Calls in which the driver places memory, for the application or for itself ([`crate::process::reservation`]).

use crate::cuda::abi::{CUdeviceptr, CuResult};
use crate::process::contexts;
use crate::process::reservation::{self, Reservation};
use crate::state;
use crate::submit::{captures, pass};
use nvshare::units::GRANULE;

/// Makes a call that allocates `bytes` of memory that cannot move, with a reservation for them. On success `handle`
/// returns the handle under which the reservation is kept. Less than a granule needs no reservation: it counts as part of the
/// context.
///
/// # Errors
/// The call was not made: there is no room, or a capture forbids the call and there is no room.
pub fn reserve(
    bytes: u64,
    call: impl Fn() -> CuResult,
    handle: impl FnOnce() -> u64,
) -> Result<CuResult, CuResult> {
    let reservation = match contexts::current() {
        Some((device, context)) if bytes >= GRANULE => {
            match Reservation::take(device, bytes, context, true) {
                Ok(reservation) => Some(reservation),
                // Such calls are unsafe while a stream captures; where there is room the driver says so itself.
                Err(no_room) => return Err(captures::refuse_unsafe().err().unwrap_or(no_room)),
            }
        }
        _ => None,
    };
    let result = with_room(&call);
    if let (CuResult::SUCCESS, Some(reservation)) = (result, reservation) {
        reservation::keep(handle(), reservation);
    }
    Ok(result)
}

/// The same of a call that gives memory of GPU addresses. A refused one gives address 0, as the driver's does.
///
/// # Safety
/// `address` is null, or points to where the address goes; `call` has written it there when it succeeds.
pub unsafe fn reserve_address(
    address: *mut CUdeviceptr,
    bytes: u64,
    call: impl Fn() -> CuResult,
) -> CuResult {
    // SAFETY: the caller's promise; the call has succeeded by then.
    reserve(bytes, call, || unsafe { *address }).unwrap_or_else(|refused| {
        if !address.is_null() {
            // SAFETY: the caller's promise, and it is not null.
            unsafe { address.write(0) };
        }
        refused
    })
}

/// Makes a call for which the driver may need memory of its own; if it finds none, repeats it with a reservation. The caller
/// is outside the gate.
pub fn with_room(call: impl Fn() -> CuResult) -> CuResult {
    let result = call();
    if result == CuResult::OUT_OF_MEMORY { make_room(&call) } else { result }
}

/// Repeats a call for which the driver found no memory, with a reservation, if there can be one. The caller is outside the gate.
#[cold]
#[inline(never)]
pub fn make_room(call: &dyn Fn() -> CuResult) -> CuResult {
    // A call within another call is inside the gate, and cannot wait for it.
    let room = if state::enabled() && !pass::is_inside() { contexts::current() } else { None };
    room.map_or(CuResult::OUT_OF_MEMORY, |(device, context)| reservation::make_room(&device, context, call))
}
