//! Changing a running client's shares: one [`Change`] to the arbiter's socket, one [`Reply`](crate::wire::Reply) back.
//!
//! The arbiter checks who asks (SO_PEERCRED), writes the client's row and decides anew; the client need not know. The
//! message names the client by slot *and* owner, so a change that arrives after the client has ended does not hit the next
//! client in its slot.

use crate::connection::{RegisterError, talk};
use crate::wire::{Change, Status};
use std::path::Path;
use std::time::Duration;

/// Asks the arbiter at `path` for a change, and says what it answers: what the client's shares are now. Waits for an
/// arbiter as [`crate::register::register`] does.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn change(path: &Path, change: &Change, timeout: Duration) -> Result<String, RegisterError> {
    let answer = talk(path, bytemuck::bytes_of(change), Status::Changed, timeout)?;
    Ok(answer.reply.text())
}
