//! Calls in which the driver places memory, for the application or for itself ([`crate::process::reservation`]).

use crate::cuda::abi::CuResult;
use crate::process::contexts;
use crate::process::reservation::{self, Reservation};
use crate::state;
use crate::submit::pass;
use nvshare::units::GRANULE;

/// Makes a call that allocates `bytes` of memory that cannot move, with a reservation for them. On success `handle`
/// returns the handle under which the reservation is kept. Less than a granule needs no reservation: it counts as part of the
/// context.
pub fn reserve(bytes: u64, call: impl Fn() -> CuResult, handle: impl FnOnce() -> u64) -> CuResult {
    let reservation = match contexts::current() {
        Some((device, context)) if bytes >= GRANULE => {
            match Reservation::take(device, bytes, context, true) {
                Ok(reservation) => Some(reservation),
                Err(error) => return error,
            }
        }
        _ => None,
    };
    let result = with_room(call);
    if let (CuResult::SUCCESS, Some(reservation)) = (result, reservation) {
        reservation::keep(handle(), reservation);
    }
    result
}

/// Makes a call for which the driver may need memory of its own; if it finds none, repeats it with a reservation. The caller
/// is outside the gate.
pub fn with_room(call: impl Fn() -> CuResult) -> CuResult {
    let result = call();
    // A call within another call is inside the gate, and cannot wait for it.
    if result != CuResult::OUT_OF_MEMORY || !state::enabled() || pass::is_inside() {
        return result;
    }
    contexts::current().map_or(result, |(device, context)| reservation::make_room(&device, context, call))
}
