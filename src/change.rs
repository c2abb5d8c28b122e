//! Steering while it runs: one message to the arbiter's socket, one [`Reply`](crate::wire::Reply) back. A [`Change`] of a client's
//! shares, a [`PauseRequest`], a [`SettingsRequest`].
//!
//! The arbiter checks the user who asks (SO_PEERCRED), writes the page and decides anew; the client takes no part. A message
//! names the client by its slot *and* its owner word, so a change that arrives after the client has ended does not reach the next
//! client in that slot.

use crate::connection::{Answer, RegisterError, talk};
use crate::control::{PauseRequest, SettingsRequest};
use crate::wire::{Change, Status};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
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

/// Asks the arbiter at `path` to pause a client or to resume it. Returns its answer, a sentence.
///
/// # Errors
/// As for [`change`].
pub fn pause(path: &Path, request: &PauseRequest, timeout: Duration) -> Result<String, RegisterError> {
    ask(path, bytemuck::bytes_of(request), Status::Changed, timeout).map(|answer| answer.reply.text())
}

/// The most bytes of settings that are read.
const MOST_BYTES: u64 = 1 << 20;

/// Asks the arbiter at `path` for its settings, or to change them. Returns those that are in force then, as JSON.
///
/// # Errors
/// As for [`change`].
pub fn settings(path: &Path, request: &SettingsRequest, timeout: Duration) -> Result<String, RegisterError> {
    let answer = ask(path, bytemuck::bytes_of(request), Status::Settings, timeout)?;
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let sent = answer.sent.into_iter().next().ok_or_else(|| nonsense("it sent no settings".into()))?;
    let file = File::from(sent);
    let mut text = String::new();
    At(&file, 0)
        .take(MOST_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| nonsense(format!("its settings cannot be read: {error}")))?;
    Ok(text)
}

/// A file that is read from its beginning, whatever its offset is.
struct At<'a>(&'a File, u64);

impl Read for At<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read_at(bytes, self.1)?;
        self.1 += read as u64;
        Ok(read)
    }
}

/// As [`talk`]. An arbiter that does not know the request is older than this program.
fn ask(path: &Path, message: &[u8], wanted: Status, timeout: Duration) -> Result<Answer, RegisterError> {
    talk(path, message, wanted, timeout).map_err(|error| match error {
        RegisterError::Refused { path, status: Status::Malformed, text } if text.contains("hello") => {
            let text = format!(
                "it does not know this request, so it is older than this program, nvshare {}; restart the arbiter: systemctl restart nvshare-arbiter",
                crate::release::RELEASE
            );
            RegisterError::Refused { path, status: Status::Malformed, text }
        }
        other => other,
    })
}
