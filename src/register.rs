//! Registration: how a process gets its slot and the page's descriptor.
//!
//! Once per process and GPU, over a SOCK_SEQPACKET Unix socket: one [`Hello`] out, one [`Reply`](crate::wire::Reply) back,
//! with the page's descriptor (SCM_RIGHTS) when the status is [`Status::Welcome`](crate::wire::Status::Welcome). A container needs
//! only the socket. Messages are plain structs of fixed size, so there is nothing to parse and little
//! to get wrong; what does not fit is refused with a sentence that says why.
//!
//! Whoever only wants to know how large the pool is sends the same hello with another magic: it gets the page
//! and no slot ([`look`]). An arbiter that does not know this question refuses it as malformed. Over the same socket go
//! changes of a running client's shares ([`crate::change`]).
//!
//! The process then claims its slot in the page ([`Page::claim`](crate::page::Page::claim)). One that it has not claimed,
//! because the arbiter ended between opening it and answering, is what it is given when it asks again.
//!
//! Whoever only looks gets a descriptor that only reads. All descriptors of pages are of sealed memory
//! ([`crate::sealed`]), and no other is taken; nor is an answer of somebody whom [`crate::runtime_dir`] does not believe.
//!
//! A page exists for as long as somebody has it, so an arbiter that ends after it has sent a page, and before the process
//! has mapped it, may have a successor with another page. If the connection is still open when the page is mapped, every
//! later arbiter finds it; if not, the process asks again.
//!
//! With the slot comes a second descriptor, the slot's life file. Whoever registers keeps it and the connection for as
//! long as the process lives and runs the same program ([`crate::presence`]): that is how the arbiter knows.

use crate::books::{NOT_TOLD, PrivatePhase};
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
    /// The client's slot in it.
    pub slot: SlotIndex,
    /// What the client tells the arbiter of its phase ([`crate::Client::telling`]).
    pub private_phase: PrivatePhase,
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
            // Its successor may not be there yet.
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
        // Threads take the same slot once each. Only a page that lies gets here for ever.
        if left.is_zero() {
            let what = format!("it gave slot {}, which is taken", registration.slot.get());
            return Err(RegisterError::Nonsense { path: path.to_owned(), what });
        }
    }
}

/// The page, and the slot that the arbiter gives this process; another thread may have been given the same one. And the
/// answer that they came with.
fn ask_for(path: &Path, hello: &Hello, timeout: Duration) -> Result<(Registration, Answer), RegisterError> {
    let gpu = GpuUuid(hello.gpu);
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let answer = talk(path, bytemuck::bytes_of(hello), hello.request_kind().granted(), timeout)?;
    // The slot means nothing to whoever only looks.
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
