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
use std::io;
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
    text_of(&File::from(sent)).map_err(|error| nonsense(format!("its settings cannot be read: {error}")))
}

/// A file's text from its beginning, whatever its offset is.
fn text_of(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; file.metadata()?.len().min(MOST_BYTES) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    String::from_utf8(bytes).map_err(io::Error::other)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::SettingsChange;
    use crate::scm_rights::send;
    use crate::wire::{MESSAGE_BYTES, Reply};
    use nix::sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv, socket,
    };
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

    /// An arbiter that answers the one message that it gets with this.
    fn arbiter(path: &Path, answer: Reply) -> std::thread::JoinHandle<()> {
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        std::thread::spawn(move || {
            // SAFETY: accept has just made it, and nobody else has it.
            let peer = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
            // A connection that is closed with something unread takes its answer with it.
            recv(peer.as_raw_fd(), &mut [0; MESSAGE_BYTES], MsgFlags::empty()).unwrap();
            send(peer.as_fd(), bytemuck::bytes_of(&answer), &[]).unwrap();
        })
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets of that kind")]
    fn an_arbiter_that_does_not_know_the_request_is_said_to_be_older_and_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let ask = |name: &str, answer: Reply| {
            let path = folder.path().join(name);
            let arbiter = arbiter(&path, answer);
            let request = SettingsRequest::new(None, &SettingsChange::Ask).unwrap();
            let error = settings(&path, &request, Duration::from_secs(5)).unwrap_err().to_string();
            arbiter.join().unwrap();
            error
        };
        let unknown = "this is not an nvshare hello (wrong magic)";
        let error = ask("older", *Reply::refuse(Status::Malformed, unknown));
        assert!(error.contains("older than this program"), "{error}");
        assert!(error.contains("systemctl restart nvshare-arbiter"), "{error}");
        let error = ask("other", *Reply::refuse(Status::Refused, "you may not"));
        assert!(error.contains("you may not") && !error.contains("older"), "{error}");
        let error = ask("nonsense", Reply::settings());
        assert!(error.contains("it sent no settings"), "{error}");
    }
}
