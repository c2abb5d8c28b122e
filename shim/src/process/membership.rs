//! What this process has in common with others that it waits for, and the arbiter's word on who those are.
//!
//! - A communicator of NCCL: its unique id, which all ranks are given ([`crate::interpose::nccl`] sees it).
//! - Memory of each other: two processes that have each opened memory of the other by CUDA IPC, or that have each imported a
//!   descriptor of the other's ([`crate::process::descriptors`]). A process that only reads what another one exports waits for
//!   nobody in a kernel, so one direction is not enough.
//! - A name: NVSHARE_GANG.
//!
//! Each becomes a key ([`nvshare::membership`]), which every client of the process tells the arbiter. An arbiter that begins
//! later is told again. A process without a key has no connection for this and no page.

use crate::log;
use crate::process::descriptors;
use crate::settings::settings;
use crate::state;
use crate::submit::gang;
use nvshare::wire::GangKey;
use nvshare::{membership, paths, presence, processes};
use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, Once};
use std::time::Duration;

/// How long the arbiter may take to answer. A process that is not told runs as if it waited for nobody.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A key, and how often this process has it.
struct Held {
    key: GangKey,
    size: u32,
    times: u32,
}

#[derive(Default)]
struct Keys {
    held: Vec<Held>,
    /// The processes whose memory this one has opened.
    opened: BTreeSet<[u8; 16]>,
    /// This process, for those who open its memory.
    exporter: Option<[u8; 16]>,
}

static KEYS: Mutex<Keys> = Mutex::new(Keys { held: Vec::new(), opened: BTreeSet::new(), exporter: None });

fn keys() -> MutexGuard<'static, Keys> {
    nvshare::sync::lock(&KEYS)
}

/// Tells the arbiter that every client of the process has a key, or has it no more.
fn tell(key: GangKey, size: u32, joins: bool) {
    gang::clients().into_iter().for_each(|(gpu, books)| {
        let page = books.page();
        let Some(client) = page.details(books.slot()) else { return };
        let path = paths::socket(&paths::runtime_dir());
        match membership::ask(&path, (gpu, books.slot(), client.owner), (key, size), joins, TIMEOUT) {
            Ok((page, place)) => gang::sit(gpu, page, place),
            Err(error) => tracing::warn!(
                %gpu,
                "the arbiter does not know which processes this one waits for, so that they may not run at the same time: {error}"
            ),
        }
    });
}

impl Keys {
    fn add(&mut self, key: GangKey, size: u32) {
        static AGAIN: Once = Once::new();
        AGAIN.call_once(|| presence::on_attach(tell_again));
        match self.held.iter_mut().find(|held| held.key == key) {
            Some(held) => held.times += 1,
            None => {
                self.held.push(Held { key, size, times: 1 });
                tell(key, size, true);
            }
        }
    }

    fn remove(&mut self, key: GangKey) {
        let Some(index) = self.held.iter().position(|held| held.key == key) else { return };
        self.held[index].times -= 1;
        if self.held[index].times == 0 {
            let size = self.held.swap_remove(index).size;
            tell(key, size, false);
        }
    }

    /// Adds the key of each process that this one has memory in common with, both ways as far as this one knows.
    fn add_peers(&mut self) {
        let Some(own) = self.exporter else { return };
        for peer in std::mem::take(&mut self.opened) {
            self.add(membership::key_of_two("ipc", &own, &peer), 0);
        }
    }
}

/// The process has one more of what has this key.
pub fn add(key: GangKey) {
    if state::enabled() {
        log::initialise();
        keys().add(key, 0);
    }
}

/// The process has one less of what has this key.
pub fn remove(key: GangKey) {
    if state::enabled() {
        keys().remove(key);
    }
}

/// The process has become a client of one more GPU.
pub fn attached() {
    static NAMED: Once = Once::new();
    NAMED.call_once(|| {
        if let Ok(Some((name, size))) = settings().map(|settings| settings.gang.as_ref()) {
            let user = nix::unistd::geteuid().as_raw().to_le_bytes();
            let key = membership::key("name", &[&user[..], name.as_bytes()].concat());
            let mut keys = keys();
            if !keys.held.iter().any(|held| held.key == key) {
                keys.held.push(Held { key, size: *size, times: 1 });
                presence::on_attach(tell_again);
            }
        }
    });
    tell_again();
}

/// Tells the arbiter all keys, once more if it has been told.
fn tell_again() {
    if state::enabled() {
        keys().held.iter().for_each(|held| tell(held.key, held.size, true));
    }
}

/// The process has opened memory of another one, by what identifies that one.
pub fn opened(peer: [u8; 16]) {
    let mut keys = keys();
    keys.opened.insert(peer);
    keys.add_peers();
}

/// What identifies a process of this pid namespace, in keys: the namespace, the pid and when the process started. `None` if it has
/// ended.
fn identity(pid: u32) -> Option<[u8; 24]> {
    let started = processes::started(pid)?;
    Some(bytemuck::cast([processes::own_namespace(), u64::from(pid), started]))
}

/// The process has exported memory as this descriptor, which the driver has just opened: those who import it will know whose it is.
pub fn exported(descriptor: RawFd) {
    if state::enabled() {
        descriptors::exported(descriptor);
    }
}

/// The process has imported memory that another one has exported as this descriptor. Each of two that have done so adds the same
/// key, and only then do two processes have it.
pub fn imported(descriptor: RawFd) {
    if !state::enabled() {
        return;
    }
    let Some(peer) = descriptors::exporter(descriptor).and_then(identity) else { return };
    let Some(own) = identity(std::process::id()) else { return };
    let key = membership::key_of_two("descriptors", &own, &peer);
    let mut keys = keys();
    // A process imports hundreds of descriptors of another.
    if !keys.held.iter().any(|held| held.key == key) {
        log::initialise();
        keys.add(key, 0);
    }
}

/// The process exports memory, and is identified by this.
pub fn exports(own: [u8; 16]) {
    let mut keys = keys();
    if keys.exporter.replace(own) != Some(own) {
        keys.add_peers();
    }
}
