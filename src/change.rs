//! Changing a running client's shares: one [`Change`] to the arbiter's socket, one [`Reply`](crate::wire::Reply) back.
//!
//! The arbiter checks the user who asks (SO_PEERCRED), writes the client's row and decides anew; the client takes no part. The
//! message names the client by its slot *and* its owner word, so a change that arrives after the client has ended does not
//! reach the next client in that slot.

use crate::connection::{RegisterError, talk};
use crate::wire::{Change, Status};
use std::path::Path;
use std::time::Duration;

/// Asks the arbiter at `path` for a change. Returns its answer: a sentence with the client's new shares. Waits for an arbiter as
/// [`crate::register::register`] does.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn change(path: &Path, change: &Change, timeout: Duration) -> Result<String, RegisterError> {
    let answer = talk(path, bytemuck::bytes_of(change), Status::Changed, timeout)?;
    Ok(answer.reply.text())
}
