//! Which client a person means who types a pid, a slot or a name.
//!
//! The client is looked up in the pages, as `nvshare status` shows them.

use crate::Failure;
use crate::complain;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::snapshot::ClientInfo;
use nvshare::units::GpuUuid;
use nvshare::{paths, record};
use std::fmt;
use std::path::Path;

/// Whom a person means by a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whom {
    pid: Option<u32>,
    slot: Option<usize>,
    name: Option<String>,
}

impl Whom {
    /// Reads it.
    ///
    /// # Errors
    /// It cannot be a client.
    pub fn read(text: &str) -> Result<Self, Failure> {
        let nobody = Self { pid: None, slot: None, name: None };
        let fail = |what| Failure::usage(format!("'{text}': {what}, such as `nvshare status` shows"));
        if let Some(pid) = text.strip_prefix("pid:") {
            return Ok(Self {
                pid: Some(pid.parse().map_err(|_| fail("write pid: and a number"))?),
                ..nobody
            });
        }
        if let Some(slot) = text.strip_prefix("slot:") {
            return Ok(Self {
                slot: Some(slot.parse().map_err(|_| fail("write slot: and a number"))?),
                ..nobody
            });
        }
        if let Some(name) = text.strip_prefix("name:") {
            return Ok(Self { name: Some(name.into()), ..nobody });
        }
        Ok(Self { pid: text.parse().ok(), slot: text.parse().ok(), name: Some(text.into()) })
    }

    /// Whether this client is meant.
    pub fn means(&self, client: &ClientInfo) -> bool {
        self.pid == Some(client.owner.pid)
            || self.slot == Some(client.slot.get())
            || self.name.as_ref() == Some(&client.name)
    }
}

/// A client, and the GPU that it is one of.
#[derive(Debug)]
pub struct Found {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The client.
    pub client: ClientInfo,
}

impl fmt::Display for Found {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ClientInfo { slot, owner, name, .. } = &self.client;
        write!(out, "slot:{} on {}, pid:{}, name:{name}", slot.get(), self.gpu, owner.pid)
    }
}

/// All clients of the node. A page that cannot be read has none, and that is said.
///
/// # Errors
/// There is no node in this directory.
pub fn clients(dir: &Path) -> Result<Vec<Found>, Failure> {
    let no_node = |error| {
        Failure::usage(format!(
            "{}: there is no nvshare node here ({error}). Name its directory with --runtime-dir",
            dir.display()
        ))
    };
    let mut found = Vec::new();
    for (gpu, path) in paths::pages(dir).map_err(no_node)? {
        match record::view_page(dir, gpu) {
            Ok(page) => {
                let slots = (0..SLOTS).filter_map(SlotIndex::new);
                found.extend(slots.filter_map(|slot| page.details(slot)).map(|client| Found { gpu, client }));
            }
            Err(why) => complain!("nvshare: {}: {why}; its clients are left out", path.display()),
        }
    }
    Ok(found)
}

/// The one client that is meant.
///
/// # Errors
/// There is none, or several; then they are listed.
pub fn only(whom: &str, gpu: Option<GpuUuid>, clients: Vec<Found>) -> Result<Found, Failure> {
    let wanted = Whom::read(whom)?;
    let mut found: Vec<_> = clients
        .into_iter()
        .filter(|found| gpu.is_none_or(|gpu| found.gpu == gpu) && wanted.means(&found.client))
        .collect();
    match (found.pop(), found.len()) {
        (Some(found), 0) => Ok(found),
        (None, _) => Err(Failure::usage(format!(
            "'{whom}' is no client{}: no pid, no slot and no name that `nvshare status` shows",
            gpu.map(|gpu| format!(" of {gpu}")).unwrap_or_default()
        ))),
        (Some(last), more) => {
            found.push(last);
            let list: Vec<_> = found.iter().map(|found| format!("\n  {found}")).collect();
            Err(Failure::usage(format!(
                "'{whom}' means {} clients; say which one, with --gpu where the GPUs differ:{}",
                more + 1,
                list.concat()
            )))
        }
    }
}
