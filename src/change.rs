//! Changing a running client's shares: one [`Change`] to the arbiter's socket, one [`Reply`] back.
//!
//! The arbiter looks who asks (SO_PEERCRED), writes the client's row and decides anew; the client need not know. The
//! message names the client by slot *and* owner, so a change that comes when the client has ended does not hit the next
//! one in its slot.

use crate::fair::MAX_WEIGHT;
use crate::page::LAYOUT_VERSION;
use crate::presence::{ATTACH_MAGIC, Attach};
use crate::register::{self, Hello, RegisterError, Reply, Status, TALK_MAGICS};
use crate::shares::{MemoryLimit, Priority, Shares};
use crate::slot::{Owner, SlotIndex};
use crate::units::GpuUuid;
use bytemuck::{Pod, Zeroable};
use std::path::Path;
use std::time::Duration;

/// First eight bytes of a change.
pub const CHANGE_MAGIC: u64 = u64::from_le_bytes(*b"nvset???");

/// In [`Change::which`]: what is to change.
const WEIGHT: u32 = 1;
const PRIORITY: u32 = 2;
const MEMORY_LIMIT: u32 = 4;

/// What somebody wants changed.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Change {
    /// [`CHANGE_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of who asks.
    pub layout_version: u32,
    /// A bit for each of the last three that counts.
    pub which: u32,
    /// The client's GPU.
    pub gpu: [u8; 16],
    /// Its slot.
    pub slot: u32,
    /// Its pid, as the page has it.
    pub pid: u32,
    /// How many owners its slot has had, as the page has it.
    pub generation: u32,
    /// The weight, or 0.
    pub weight: u32,
    /// The priority's word, or 0.
    pub priority: u32,
    /// Zero.
    pub reserved: u32,
    /// The memory limit's word, or 0.
    pub memory_limit: u64,
}

/// Which of a client's shares become what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Edit {
    /// The weight.
    pub weight: Option<u32>,
    /// The priority.
    pub priority: Option<Priority>,
    /// The memory limit.
    pub memory_limit: Option<MemoryLimit>,
}

impl Edit {
    /// What becomes of these shares.
    pub fn of(self, shares: Shares) -> Shares {
        Shares {
            weight: self.weight.unwrap_or(shares.weight),
            priority: self.priority.unwrap_or(shares.priority),
            memory_limit: self.memory_limit.unwrap_or(shares.memory_limit),
        }
    }
}

impl Change {
    /// A request to change the shares of the client that owns this slot.
    pub fn new(gpu: GpuUuid, slot: SlotIndex, owner: Owner, edit: Edit) -> Self {
        let bit = |given: bool, bit| if given { bit } else { 0 };
        Self {
            magic: CHANGE_MAGIC,
            layout_version: LAYOUT_VERSION,
            which: bit(edit.weight.is_some(), WEIGHT)
                | bit(edit.priority.is_some(), PRIORITY)
                | bit(edit.memory_limit.is_some(), MEMORY_LIMIT),
            gpu: gpu.0,
            slot: slot.get() as u32,
            pid: owner.pid,
            generation: owner.generation,
            weight: edit.weight.unwrap_or_default(),
            priority: edit.priority.unwrap_or_default() as u32,
            reserved: 0,
            memory_limit: edit.memory_limit.unwrap_or_default().into(),
        }
    }

    /// Reads what came over a socket: the message, the slot, and what is to become of it.
    ///
    /// # Errors
    /// The reply to send instead: it says what is wrong.
    pub fn read(bytes: &[u8]) -> Result<(Self, SlotIndex, Edit), Box<Reply>> {
        let malformed = |why: &str| Reply::refuse(Status::Malformed, why);
        register::check_release(bytes)?;
        let change: Self = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| {
            malformed(&format!(
                "a change has {} bytes and this message has {}",
                size_of::<Self>(),
                bytes.len()
            ))
        })?;
        if change.magic != CHANGE_MAGIC {
            return Err(malformed("this is not a change (wrong magic)"));
        }
        let slot = SlotIndex::new(change.slot as usize)
            .ok_or_else(|| malformed(&format!("there is no slot {}", change.slot)))?;
        if change.which == 0
            || change.which & !(WEIGHT | PRIORITY | MEMORY_LIMIT) != 0
            || change.reserved != 0
        {
            return Err(malformed(
                "a change says that nothing is to change, or what no arbiter of this release knows",
            ));
        }
        let given = |bit| change.which & bit != 0;
        let weight = (1..=MAX_WEIGHT).contains(&change.weight).then_some(change.weight);
        let edit = Edit {
            weight: weight.filter(|_| given(WEIGHT)),
            priority: Priority::read(change.priority).filter(|_| given(PRIORITY)),
            memory_limit: MemoryLimit::read(change.memory_limit).filter(|_| given(MEMORY_LIMIT)),
        };
        // What is out of its bounds was dropped, and what does not count must be 0: then it is not the same again.
        let owner = Owner { generation: change.generation, pid: change.pid };
        if Self::new(GpuUuid(change.gpu), slot, owner, edit) != change {
            return Err(malformed(&format!(
                "a weight is 1 to {MAX_WEIGHT}, a priority 0 to 2, and a limit none, granules or a part of the pool"
            )));
        }
        Ok((change, slot, edit))
    }

    /// Whose slot it was when the change was asked for.
    pub fn owner(&self) -> Owner {
        Owner { generation: self.generation, pid: self.pid }
    }
}

/// What anybody may say to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A client wants a slot, or to see the page.
    Hello(Hello),
    /// Somebody wants a client's shares changed.
    Change(Change, SlotIndex, Edit),
    /// A client that was there before the arbiter makes itself known.
    Attach(Attach, SlotIndex),
}

impl Message {
    /// Reads what came over a socket.
    ///
    /// # Errors
    /// The reply to send instead: it says what is wrong.
    pub fn read(bytes: &[u8]) -> Result<Self, Box<Reply>> {
        if bytes.starts_with(&CHANGE_MAGIC.to_le_bytes()) {
            return Change::read(bytes).map(|(change, slot, edit)| Self::Change(change, slot, edit));
        }
        if bytes.starts_with(&ATTACH_MAGIC.to_le_bytes()) {
            return Attach::read(bytes).map(|(attach, slot)| Self::Attach(attach, slot));
        }
        Hello::read(bytes).map(Self::Hello)
    }
}

const _: () = assert!(TALK_MAGICS[2] == CHANGE_MAGIC);

/// Asks the arbiter at `path` for a change, and says what it answers: what the client's shares are now. Waits for an
/// arbiter as [`register::register`] does.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn change(path: &Path, change: &Change, timeout: Duration) -> Result<String, RegisterError> {
    let answer = register::talk(path, bytemuck::bytes_of(change), Status::Changed, timeout)?;
    Ok(answer.reply.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { generation: 3, pid: 77 };

    fn made(edit: Edit) -> Change {
        Change::new(GpuUuid([9; 16]), SlotIndex::new(5).unwrap(), OWNER, edit)
    }

    fn refused(change: Change) -> (Status, String) {
        let reply = Change::read(bytemuck::bytes_of(&change)).unwrap_err();
        (Reply::read(bytemuck::bytes_of(&*reply)).unwrap().1, reply.text())
    }

    #[test]
    fn a_change_is_read_as_it_was_made() {
        let limits = ["none", "2MiB", "8GiB", "25%"].map(|text| Some(text.parse().unwrap()));
        for memory_limit in limits.into_iter().chain([None]) {
            for priority in [Some(Priority::High), Some(Priority::Normal), Some(Priority::Low), None] {
                for weight in [Some(1), Some(MAX_WEIGHT), None] {
                    let edit = Edit { weight, priority, memory_limit };
                    let (change, slot, read) = match Change::read(bytemuck::bytes_of(&made(edit))) {
                        Ok(read) => read,
                        Err(refusal) => {
                            assert_eq!(edit, Edit::default(), "{}", refusal.text());
                            continue;
                        }
                    };
                    assert_eq!((slot.get(), read, change.owner()), (5, edit, OWNER));
                    assert_ne!(edit, Edit::default(), "it changes nothing");
                }
            }
        }
    }

    #[test]
    fn what_is_not_given_stays() {
        let shares = Shares { weight: 7, priority: Priority::Low, memory_limit: MemoryLimit::Size(3) };
        assert_eq!(Edit::default().of(shares), shares);
        let edit = Edit { memory_limit: Some(MemoryLimit::None), ..Edit::default() };
        assert_eq!(edit.of(shares), Shares { memory_limit: MemoryLimit::None, ..shares });
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let good = made(Edit {
            weight: Some(5),
            priority: Some(Priority::High),
            memory_limit: Some(MemoryLimit::Size(1)),
        });
        assert!(Change::read(bytemuck::bytes_of(&good)).is_ok());
        for bad in [
            Change { weight: 0, ..good },
            Change { weight: MAX_WEIGHT + 1, ..good },
            Change { priority: 3, ..good },
            Change { memory_limit: u64::MAX, ..good },
            Change { memory_limit: 1 << 40, ..good },
            Change { which: 15, ..good },
            Change { which: WEIGHT, ..good },
            Change { slot: 48, ..good },
            Change { reserved: 1, ..good },
            Change { magic: register::WIRE_MAGIC, ..good },
        ] {
            assert_eq!(refused(bad).0, Status::Malformed, "{bad:?}");
        }
        let (status, text) = refused(Change { layout_version: 77, ..good });
        assert!(status == Status::LayoutVersion && text.contains("77"), "{text}");
        assert!(Change::read(&bytemuck::bytes_of(&good)[1..]).is_err());
    }
}
