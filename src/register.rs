//! Registration: how a process gets its slot and the page's descriptor.
//!
//! A process registers once for each GPU, over a SOCK_SEQPACKET Unix socket. It sends one [`Hello`] and receives one
//! [`Reply`](crate::wire::Reply); with the status [`Status::Welcome`](crate::wire::Status::Welcome) comes the page's descriptor
//! (SCM_RIGHTS). A container needs only the socket.
//!
//! A process that only wants to know how large the pool is sends the same hello with another magic. It gets the page, by a
//! read-only descriptor, and no slot ([`look`]). Changes of a running client's shares go over the same socket
//! ([`crate::change`]).
//!
//! The process then takes its slot in the page ([`Page::claim`](crate::page::Page::claim)). If the arbiter has ended after it
//! opened the slot and before it answered, the slot is not taken, and the next arbiter gives the process the same slot.
//!
//! A process takes only a page in sealed memory ([`crate::sealed`]), and only from an arbiter that [`crate::runtime_dir`]
//! believes.
//!
//! A page exists for as long as a process has it. If an arbiter ends after it has sent a page and before the process has mapped
//! it, the next arbiter may make another page. So the process looks after it has mapped the page whether the connection is
//! still open. If it is, every later arbiter will find this page; if not, the process registers again.
//!
//! With the slot comes a second descriptor, the slot's life file. The process keeps it and the connection for as long as it
//! lives and runs the same program, and so the arbiter knows that it does ([`crate::presence`]).

use crate::books::{NOT_TOLD, PrivatePhase};
use crate::client::Client;
use crate::connection::{Answer, DIAL_AGAIN, has_ended, talk};
use crate::map::MappedPage;
use crate::presence::{self, Presence};
use crate::sealed;
use crate::slot::SlotIndex;
use crate::sync::now;
use crate::units::GpuUuid;
use crate::wire::{Hello, RequestKind};
use nix::errno::Errno;
use std::path::Path;
use std::time::Duration;

pub use crate::connection::{RegisterError, dial};

/// A slot, and the page that it is in.
pub struct Registration {
    /// The GPU's page.
    pub page: MappedPage,
    /// The client's slot in the page.
    pub slot: SlotIndex,
    /// The word for the client's phase, which the arbiter may ask for ([`crate::Client::telling`]).
    pub private_phase: PrivatePhase,
}

impl Registration {
    /// The client that owns the slot.
    pub fn into_client(self) -> Client<MappedPage> {
        Client::new(self.page, self.slot).telling(self.private_phase)
    }
}

/// Registers this process with the arbiter at `path`. If the arbiter ends before it has answered, the
/// next one is asked, as long as `timeout` lasts.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn register(path: &Path, hello: &Hello, timeout: Duration) -> Result<Registration, RegisterError> {
    let begin = now();
    loop {
        let left = timeout.saturating_sub(Duration::from_nanos(now() - begin));
        let (registration, answer) = ask_for(path, hello, left)?;
        if hello.request_kind() == RequestKind::Look {
            return Ok(registration);
        }
        let claimed = registration.page.claim(registration.slot);
        if has_ended(&answer.connection) {
            drop((registration, answer));
            if left.is_zero() {
                let cause = Errno::ECONNRESET;
                return Err(RegisterError::NoArbiter { path: path.to_owned(), waited: now() - begin, cause });
            }
            // The next arbiter may not be there yet.
            std::thread::sleep(DIAL_AGAIN);
            continue;
        }
        if claimed {
            presence::keep(Presence::new(
                path,
                &registration.page,
                registration.slot,
                &registration.private_phase,
                answer,
            ));
            return Ok(registration);
        }
        // Another thread of this process has taken the slot, so ask again. Only a page that lies leads here again and again.
        if left.is_zero() {
            let what = format!("it gave slot {}, which is taken", registration.slot.get());
            return Err(RegisterError::Nonsense { path: path.to_owned(), what });
        }
    }
}

/// Asks the arbiter once: the page and a slot, which another thread of this process may have been given too, and the answer
/// that they came with.
fn ask_for(path: &Path, hello: &Hello, timeout: Duration) -> Result<(Registration, Answer), RegisterError> {
    let gpu = GpuUuid(hello.gpu);
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let answer = talk(path, bytemuck::bytes_of(hello), hello.request_kind().granted(), timeout)?;
    // A process that only looks ignores the slot.
    let slot = SlotIndex::new(answer.reply.slot as usize)
        .ok_or_else(|| nonsense(format!("it gave slot {}", answer.reply.slot)))?;
    let sent = answer.sent.first().ok_or_else(|| nonsense("it sent no page".into()))?;
    let page =
        MappedPage::open(sent).map_err(|cause| RegisterError::Page { path: path.to_owned(), gpu, cause })?;
    if !sealed::is_sealed(sent) {
        return Err(nonsense(format!(
            "the page that it sent for {gpu} is not sealed: others could shorten it"
        )));
    }
    if page.gpu() != gpu {
        return Err(nonsense(format!("it sent the page of {} for {gpu}", page.gpu())));
    }
    let private_phase = PrivatePhase::new(NOT_TOLD.into());
    Ok((Registration { page, slot, private_phase }, answer))
}

/// The page of a GPU, without a slot in it. Waits as [`register`] does.
///
/// # Errors
/// As for [`register`].
pub fn look(path: &Path, gpu: GpuUuid, timeout: Duration) -> Result<MappedPage, RegisterError> {
    register(path, &Hello::look(gpu), timeout).map(|registration| registration.page)
}
