//! Calls for which the driver places memory, of the application's or of its own ([`crate::process::reservation`]).

use crate::cuda::abi::CuResult;
use crate::process::contexts;
use crate::process::reservation::{self, Reservation};
use crate::state;
use crate::submit::pass;
use nvshare::units::GRANULE;

/// Makes a call that allocates `bytes` of memory that cannot move, with room for it. On success `handle`
/// says by what the memory goes. Less than a granule is left to the context's account.
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

/// Makes a call for which the driver may need memory of its own. The caller is outside the gate.
pub fn with_room(call: impl Fn() -> CuResult) -> CuResult {
    let result = call();
    // A call within a call cannot wait for the gate that it is inside of.
    if result != CuResult::OUT_OF_MEMORY || !state::enabled() || pass::is_inside() {
        return result;
    }
    contexts::current().map_or(result, |(device, context)| reservation::make_room(&device, context, call))
}
