//! The messages between clients and the arbiter, byte by byte.
//!
//! | message | who sends it | what it is for |
//! |---|---|---|
//! | [`Hello`] | a process | asks for a slot, or only for the page |
//! | [`Change`] | anybody | changes a running client's shares |
//! | [`Attach`] | a client | makes itself known to an arbiter that began later |
//! | [`GangRequest`] | a client | joins a gang of processes, or leaves it |
//! | [`PauseRequest`], [`SettingsRequest`] | anybody | steer a client or the arbiter ([`crate::control`]) |
//! | [`Told`] | a client | answers [`Status::Asked`] with its phase |
//! | [`Reply`] | the arbiter | answers each of them |
//!
//! Messages are structs of fixed size, little-endian, one in each message of a SOCK_SEQPACKET socket. Each begins with a magic
//! that tells its kind and with the sender's [`LAYOUT_VERSION`], so a difference between releases is noticed before the length
//! is checked. A message that makes no sense is refused with a sentence that says why. This module only reads and writes
//! bytes; [`crate::register`] has the sockets.

use crate::control::{PAUSE_MAGIC, PauseRequest, SETTINGS_MAGIC, SettingsChange, SettingsRequest};
use crate::page::{LAYOUT_VERSION, NAME_BYTES, Suspension};
use crate::release;
use crate::shares::{ComputeLimit, MemoryLimit, Priority, Shares};
use crate::slot::{Owner, SlotIndex};
use crate::text::printable;
use crate::units::GpuUuid;
use crate::usage::MAX_WEIGHT;
use bytemuck::{Pod, Zeroable};

/// First eight bytes of a hello that asks for a slot, and of every reply.
pub const WIRE_MAGIC: u64 = u64::from_le_bytes(*b"nvshare?");

/// First eight bytes of a hello that asks for the page and for no slot.
pub const LOOK_MAGIC: u64 = u64::from_le_bytes(*b"nvlook??");

/// First eight bytes of a change.
pub const CHANGE_MAGIC: u64 = u64::from_le_bytes(*b"nvset???");

/// First eight bytes of an [`Attach`].
pub const ATTACH_MAGIC: u64 = u64::from_le_bytes(*b"nvattach");

/// First eight bytes of a [`Told`].
pub const TOLD_MAGIC: u64 = u64::from_le_bytes(*b"nvtold!!");

/// First eight bytes of a [`GangRequest`].
pub const GANG_MAGIC: u64 = u64::from_le_bytes(*b"nvgang??");

/// The magics with which a message to the arbiter may begin.
const TALK_MAGICS: [u64; 7] =
    [WIRE_MAGIC, LOOK_MAGIC, CHANGE_MAGIC, ATTACH_MAGIC, GANG_MAGIC, PAUSE_MAGIC, SETTINGS_MAGIC];

/// The most bytes of a message to the arbiter.
pub const MESSAGE_BYTES: usize = size_of::<SettingsRequest>();

/// A process's request for a slot or for the page.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Hello {
    /// [`WIRE_MAGIC`] for a slot, [`LOOK_MAGIC`] for the page alone.
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the client.
    pub layout_version: u32,
    /// Its weight, 1 to [`crate::usage::MAX_WEIGHT`].
    pub weight: u32,
    /// The UUID of the GPU.
    pub gpu: [u8; 16],
    /// The client's name, zero-padded UTF-8.
    pub name: [u8; NAME_BYTES],
    /// Its memory limit as a word ([`MemoryLimit`]).
    pub memory_limit: u64,
    /// Its priority as a word ([`Priority`]).
    pub priority: u32,
    /// Its pid in its own namespace. An arbiter that cannot see the process uses it as a name.
    pub pid: u32,
    /// Its compute limit as a word ([`ComputeLimit`]).
    pub compute_limit: u32,
    /// Zero.
    pub reserved: u32,
}

impl Hello {
    /// A client's request for a slot on a GPU, with the usual shares.
    pub fn new(gpu: GpuUuid, name: &str) -> Self {
        Self {
            magic: WIRE_MAGIC,
            layout_version: LAYOUT_VERSION,
            weight: 0,
            gpu: gpu.0,
            name: padded(name),
            memory_limit: 0,
            priority: 0,
            pid: std::process::id(),
            compute_limit: 0,
            reserved: 0,
        }
        .with(Shares::default())
    }

    /// The same request, for these shares.
    pub fn with(self, shares: Shares) -> Self {
        Self {
            weight: shares.weight,
            priority: shares.priority as u32,
            memory_limit: shares.memory_limit.into(),
            compute_limit: shares.compute_limit.into(),
            ..self
        }
    }

    /// The shares that it asks for, within their bounds.
    pub fn shares(&self) -> Shares {
        Shares {
            weight: crate::usage::weight(self.weight),
            priority: Priority::read(self.priority).unwrap_or_default(),
            memory_limit: self.memory_limit.into(),
            compute_limit: self.compute_limit.into(),
        }
    }

    /// A request for a GPU's page without a slot.
    pub fn look(gpu: GpuUuid) -> Self {
        Self { magic: LOOK_MAGIC, ..Self::new(gpu, "") }
    }

    /// What the sender wants.
    pub fn request_kind(&self) -> RequestKind {
        if self.magic == LOOK_MAGIC { RequestKind::Look } else { RequestKind::Slot }
    }

    /// The client's name, made [safe to show](printable).
    pub fn name(&self) -> String {
        printable(&self.name)
    }

    /// Reads a message that came over a socket.
    ///
    /// # Errors
    /// The reply that refuses it, and says why.
    pub fn read(bytes: &[u8]) -> Result<Self, Box<Reply>> {
        check_release(bytes)?;
        let hello: Self = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| {
            Reply::refuse(
                Status::Malformed,
                &format!("a hello has {} bytes and this message has {}", size_of::<Self>(), bytes.len()),
            )
        })?;
        if ![WIRE_MAGIC, LOOK_MAGIC].contains(&hello.magic) {
            return Err(Reply::refuse(Status::Malformed, "this is not an nvshare hello (wrong magic)"));
        }
        Ok(hello)
    }
}

/// Checks the release of a message by its first bytes. This comes before the check of its length, which may differ between
/// releases.
fn check_release(bytes: &[u8]) -> Result<(), Box<Reply>> {
    let Some((magic, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    let Some(version) = rest.first_chunk().map(|version| u32::from_le_bytes(*version)) else { return Ok(()) };
    if !TALK_MAGICS.contains(&u64::from_le_bytes(*magic)) || version == LAYOUT_VERSION {
        return Ok(());
    }
    Err(Reply::refuse(Status::LayoutVersion, &release::refusal(version, LAYOUT_VERSION)))
}

/// What a hello asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// A slot, and the page that it is in.
    Slot,
    /// The page alone.
    Look,
}

impl RequestKind {
    /// The answer that grants it.
    pub(crate) fn granted(self) -> Status {
        match self {
            Self::Slot => Status::Welcome,
            Self::Look => Status::Shown,
        }
    }
}

/// The kind of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// A slot is granted. The descriptors of the page and of the life file come with the reply.
    Welcome = 1,
    /// The two sides have different page layouts.
    LayoutVersion = 2,
    /// The arbiter does not serve that GPU.
    UnknownGpu = 3,
    /// All slots of this GPU are taken.
    Full = 4,
    /// The message made no sense.
    Malformed = 5,
    /// Refused for another reason, which the text says.
    Refused = 6,
    /// The page's descriptor comes with the reply, and no slot, as was asked for.
    Shown = 7,
    /// The client's shares were changed; the text says what they are now.
    Changed = 8,
    /// The arbiter has taken over a client that was there before it.
    Attached = 9,
    /// The client's slot is closed. Also sent without a request, over the connection that the client keeps.
    Closed = 10,
    /// The arbiter asks the client for its phase, over the connection that the client keeps.
    Asked = 11,
    /// The client has joined or left a gang. The slot's index is that of its GPU's column in the gangs' page, whose
    /// descriptor comes with the reply.
    Ganged = 12,
    /// The descriptor of the arbiter's settings comes with the reply ([`crate::control`]).
    Settings = 13,
}

impl Status {
    fn parse(word: u32) -> Option<Self> {
        [
            Self::Welcome,
            Self::LayoutVersion,
            Self::UnknownGpu,
            Self::Full,
            Self::Malformed,
            Self::Refused,
            Self::Shown,
            Self::Changed,
            Self::Attached,
            Self::Closed,
            Self::Asked,
            Self::Ganged,
            Self::Settings,
        ]
        .into_iter()
        .find(|status| *status as u32 == word)
    }
}

/// The arbiter's answer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Reply {
    /// [`WIRE_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the arbiter.
    pub layout_version: u32,
    /// A [`Status`].
    pub status: u32,
    /// The slot's index.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
    /// A sentence for a person, zero-padded UTF-8.
    pub text: [u8; Reply::TEXT_BYTES],
}

impl Reply {
    /// Bytes that it has for its sentence.
    pub const TEXT_BYTES: usize = 256;

    /// Grants a slot.
    pub fn welcome(slot: SlotIndex) -> Self {
        Self { slot: slot.get() as u32, ..*Self::refuse(Status::Welcome, "") }
    }

    /// Grants a look at the page.
    pub fn shown() -> Self {
        *Self::refuse(Status::Shown, "")
    }

    /// Says that the client was taken over.
    pub fn attached(slot: SlotIndex) -> Self {
        Self { slot: slot.get() as u32, ..*Self::refuse(Status::Attached, "") }
    }

    /// Says that the client has joined or left a gang, and which column of the gangs' page its GPU has.
    pub fn ganged(column: usize) -> Self {
        Self { slot: column as u32, ..*Self::refuse(Status::Ganged, "") }
    }

    /// Asks the client for its phase.
    pub fn asked() -> Self {
        *Self::refuse(Status::Asked, "")
    }

    /// Says that the client's slot is closed, and why.
    pub fn closed(why: &str) -> Box<Self> {
        Self::refuse(Status::Closed, why)
    }

    /// Says what has been done, as was asked for.
    pub fn done(what: &str) -> Self {
        *Self::refuse(Status::Changed, what)
    }

    /// Says that the settings come with it.
    pub fn settings() -> Self {
        *Self::refuse(Status::Settings, "")
    }

    /// Says what the client's shares are now.
    pub fn changed(shares: Shares) -> Self {
        *Self::refuse(Status::Changed, &shares.to_string())
    }

    /// A reply without a slot, of this status and with this sentence.
    pub fn refuse(status: Status, why: &str) -> Box<Self> {
        Box::new(Self {
            magic: WIRE_MAGIC,
            layout_version: LAYOUT_VERSION,
            status: status as u32,
            slot: 0,
            reserved: 0,
            text: padded(why),
        })
    }

    /// The sentence, made [safe to show](printable).
    pub fn text(&self) -> String {
        printable(&self.text)
    }

    /// Reads a reply that came over a socket, and its status.
    ///
    /// # Errors
    /// What is wrong with it: a sentence that begins with "its answer".
    pub fn read(bytes: &[u8]) -> Result<(Self, Status), String> {
        let reply: Self = bytemuck::try_pod_read_unaligned(bytes)
            .map_err(|_| format!("its answer has {} bytes instead of {}", bytes.len(), size_of::<Self>()))?;
        if reply.magic != WIRE_MAGIC {
            return Err("its answer begins with the wrong magic".into());
        }
        let status = Status::parse(reply.status)
            .ok_or_else(|| format!("its answer has the unknown status {}", reply.status))?;
        Ok((reply, status))
    }
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let fits = text.floor_char_boundary(N);
    bytes[..fits].copy_from_slice(&text.as_bytes()[..fits]);
    bytes
}

/// Bits of [`Change::which`]: which of the shares are to change.
const WEIGHT: u32 = 1;
const PRIORITY: u32 = 2;
const MEMORY_LIMIT: u32 = 4;
const COMPUTE_LIMIT: u32 = 8;

/// A request to change a running client's shares.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Change {
    /// [`CHANGE_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the sender.
    pub layout_version: u32,
    /// Which of the shares are to change: 1 the weight, 2 the priority, 4 the memory limit, 8 the compute limit.
    pub which: u32,
    /// The UUID of the client's GPU.
    pub gpu: [u8; 16],
    /// Its slot.
    pub slot: u32,
    /// Its pid, as the page has it.
    pub pid: u32,
    /// How many owners its slot has had, as the page has it.
    pub generation: u32,
    /// The new weight; 0 if it stays.
    pub weight: u32,
    /// The new priority as a word; 0 if it stays.
    pub priority: u32,
    /// The new compute limit as a word; 0 if it stays.
    pub compute_limit: u32,
    /// The new memory limit as a word; 0 if it stays.
    pub memory_limit: u64,
}

/// New values for some of a client's shares; `None` for a share that stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SharesUpdate {
    /// The weight.
    pub weight: Option<u32>,
    /// The priority.
    pub priority: Option<Priority>,
    /// The memory limit.
    pub memory_limit: Option<MemoryLimit>,
    /// The compute limit.
    pub compute_limit: Option<ComputeLimit>,
}

impl SharesUpdate {
    /// These shares with the new values.
    pub fn of(self, shares: Shares) -> Shares {
        Shares {
            weight: self.weight.unwrap_or(shares.weight),
            priority: self.priority.unwrap_or(shares.priority),
            memory_limit: self.memory_limit.unwrap_or(shares.memory_limit),
            compute_limit: self.compute_limit.unwrap_or(shares.compute_limit),
        }
    }
}

impl Change {
    /// A request to change the shares of the client that owns this slot.
    pub fn new(gpu: GpuUuid, slot: SlotIndex, owner: Owner, edit: SharesUpdate) -> Self {
        let bit = |given: bool, bit| if given { bit } else { 0 };
        Self {
            magic: CHANGE_MAGIC,
            layout_version: LAYOUT_VERSION,
            which: bit(edit.weight.is_some(), WEIGHT)
                | bit(edit.priority.is_some(), PRIORITY)
                | bit(edit.memory_limit.is_some(), MEMORY_LIMIT)
                | bit(edit.compute_limit.is_some(), COMPUTE_LIMIT),
            gpu: gpu.0,
            slot: slot.get() as u32,
            pid: owner.pid,
            generation: owner.generation,
            weight: edit.weight.unwrap_or_default(),
            priority: edit.priority.unwrap_or_default() as u32,
            compute_limit: edit.compute_limit.unwrap_or_default().into(),
            memory_limit: edit.memory_limit.unwrap_or_default().into(),
        }
    }

    /// Reads a change that came over a socket: the message, the client's slot, and the new values.
    ///
    /// # Errors
    /// The reply that refuses it, and says why.
    pub fn read(bytes: &[u8]) -> Result<(Self, SlotIndex, SharesUpdate), Box<Reply>> {
        let malformed = |why: &str| Reply::refuse(Status::Malformed, why);
        check_release(bytes)?;
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
        if change.which == 0 || change.which & !(WEIGHT | PRIORITY | MEMORY_LIMIT | COMPUTE_LIMIT) != 0 {
            return Err(malformed(
                "a change says that nothing is to change, or what no arbiter of this release knows",
            ));
        }
        let given = |bit| change.which & bit != 0;
        let weight = (1..=MAX_WEIGHT).contains(&change.weight).then_some(change.weight);
        let edit = SharesUpdate {
            weight: weight.filter(|_| given(WEIGHT)),
            priority: Priority::read(change.priority).filter(|_| given(PRIORITY)),
            memory_limit: MemoryLimit::read(change.memory_limit).filter(|_| given(MEMORY_LIMIT)),
            compute_limit: ComputeLimit::read(change.compute_limit).filter(|_| given(COMPUTE_LIMIT)),
        };
        // A value out of its bounds was dropped above, and a share that stays must be 0. Either makes the message differ from
        // one made anew.
        let owner = Owner { generation: change.generation, pid: change.pid };
        if Self::new(GpuUuid(change.gpu), slot, owner, edit) != change {
            return Err(malformed(&format!(
                "a weight is 1 to {MAX_WEIGHT}, a priority 0 to 2, a memory limit none, granules or a part of the pool, and a compute limit none or 1 to 100 %"
            )));
        }
        Ok((change, slot, edit))
    }

    /// The slot's owner when the change was asked for.
    pub fn owner(&self) -> Owner {
        Owner { generation: self.generation, pid: self.pid }
    }
}

/// A message to the arbiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A process asks for a slot, or for the page.
    Hello(Hello),
    /// A user asks for a change of a client's shares.
    Change(Change, SlotIndex, SharesUpdate),
    /// A client that was there before the arbiter makes itself known.
    Attach(Attach, SlotIndex),
    /// A client joins or leaves a gang.
    Gang(GangRequest, SlotIndex),
    /// A user pauses or resumes a client.
    Pause(PauseRequest, SlotIndex, Suspension),
    /// A user asks for the settings of a GPU, or of all, or changes them.
    Settings(Option<GpuUuid>, SettingsChange),
}

impl Message {
    /// Reads a message that came over a socket.
    ///
    /// # Errors
    /// The reply that refuses it, and says why.
    pub fn read(bytes: &[u8]) -> Result<Self, Box<Reply>> {
        if bytes.starts_with(&CHANGE_MAGIC.to_le_bytes()) {
            return Change::read(bytes).map(|(change, slot, edit)| Self::Change(change, slot, edit));
        }
        if bytes.starts_with(&ATTACH_MAGIC.to_le_bytes()) {
            return Attach::read(bytes).map(|(attach, slot)| Self::Attach(attach, slot));
        }
        if bytes.starts_with(&GANG_MAGIC.to_le_bytes()) {
            return GangRequest::read(bytes).map(|(request, slot)| Self::Gang(request, slot));
        }
        let malformed = |why: String| Reply::refuse(Status::Malformed, &why);
        if bytes.starts_with(&PAUSE_MAGIC.to_le_bytes()) {
            check_release(bytes)?;
            let read = PauseRequest::read(bytes).map_err(malformed);
            return read.map(|(request, slot, suspension)| Self::Pause(request, slot, suspension));
        }
        if bytes.starts_with(&SETTINGS_MAGIC.to_le_bytes()) {
            check_release(bytes)?;
            let read = SettingsRequest::read(bytes).map_err(malformed);
            return read.map(|(gpu, change)| Self::Settings(gpu, change));
        }
        Hello::read(bytes).map(Self::Hello)
    }
}

/// What the processes of a gang have in common and others have not: a digest of the unique id of a communicator, of the names
/// of two processes that have memory of each other open, or of a name that the user has given.
pub type GangKey = [u8; 16];

/// A client's request to belong to the gang of all processes with a key, or not to any more. A client may have several keys,
/// and whoever shares a member is one gang.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct GangRequest {
    magic: u64,
    layout_version: u32,
    /// 1 to join, 0 to leave.
    joins: u32,
    /// The client's GPU.
    pub gpu: [u8; 16],
    /// Its slot.
    slot: u32,
    /// Its pid, as the page has it.
    pub pid: u32,
    /// How many owners its slot has had, as the page has it.
    pub generation: u32,
    /// How many processes there must be before they are a gang; 0 if any two are.
    pub size: u32,
    /// What they have in common.
    pub key: GangKey,
}

impl GangRequest {
    /// The request of the client that has this slot: to join, or to leave.
    pub fn new(gpu: GpuUuid, slot: SlotIndex, owner: Owner, key: GangKey, size: u32, joins: bool) -> Self {
        Self {
            magic: GANG_MAGIC,
            layout_version: LAYOUT_VERSION,
            joins: joins.into(),
            gpu: gpu.0,
            slot: slot.get() as u32,
            pid: owner.pid,
            generation: owner.generation,
            size,
            key,
        }
    }

    /// Whether the client joins; else it leaves.
    pub fn joins(&self) -> bool {
        self.joins == 1
    }

    /// Reads a message that came over a socket, and the slot that it names.
    ///
    /// # Errors
    /// The reply that refuses it, and says why.
    pub fn read(bytes: &[u8]) -> Result<(Self, SlotIndex), Box<Reply>> {
        let malformed = |why: &str| Reply::refuse(Status::Malformed, why);
        check_release(bytes)?;
        let request: Self = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| {
            malformed(&format!(
                "a request about gangs has {} bytes and this message has {}",
                size_of::<Self>(),
                bytes.len()
            ))
        })?;
        if request.magic != GANG_MAGIC || request.joins > 1 {
            return Err(malformed(
                "this is not a request about gangs (wrong magic, or neither joins nor leaves)",
            ));
        }
        let slot = SlotIndex::new(request.slot as usize)
            .ok_or_else(|| malformed(&format!("there is no slot {}", request.slot)))?;
        Ok((request, slot))
    }
}

/// What a client sends to an arbiter that began after the client. The descriptors of its life file and of its page come with the
/// message.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Attach {
    /// [`ATTACH_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the client.
    pub layout_version: u32,
    /// Its slot.
    pub slot: u32,
    /// Its GPU.
    pub gpu: [u8; 16],
    /// How many owners its slot has had, this client included.
    pub generation: u32,
    /// Its pid, as the arbiter before has it.
    pub pid: u32,
}

impl Attach {
    /// The message of the client that has this slot.
    pub fn new(gpu: GpuUuid, slot: SlotIndex, owner: Owner) -> Self {
        Self {
            magic: ATTACH_MAGIC,
            layout_version: LAYOUT_VERSION,
            slot: slot.get() as u32,
            gpu: gpu.0,
            generation: owner.generation,
            pid: owner.pid,
        }
    }

    /// Reads a message that came over a socket, and the slot that it names.
    ///
    /// # Errors
    /// The reply that refuses it, and says why.
    pub fn read(bytes: &[u8]) -> Result<(Self, SlotIndex), Box<Reply>> {
        let malformed = |why: &str| Reply::refuse(Status::Malformed, why);
        check_release(bytes)?;
        let attach: Self = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| {
            malformed(&format!(
                "an attach has {} bytes and this message has {}",
                size_of::<Self>(),
                bytes.len()
            ))
        })?;
        if attach.magic != ATTACH_MAGIC {
            return Err(malformed("this is not an attach (wrong magic)"));
        }
        let slot = SlotIndex::new(attach.slot as usize)
            .ok_or_else(|| malformed(&format!("there is no slot {}", attach.slot)))?;
        Ok((attach, slot))
    }

    /// The owner that the client says its slot has.
    pub fn owner(&self) -> Owner {
        Owner { generation: self.generation, pid: self.pid }
    }
}

/// A client's answer to [`Status::Asked`], over the connection that only this client has. The page has the phase too, but
/// everybody can write the page. So the arbiter asks the process itself before it closes a slot because its client leaves, or
/// kills a process because it does not give way.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Told {
    magic: u64,
    layout_version: u32,
    /// A [`crate::Phase`], or `u32::MAX` if the process does not say (`crate::books::NOT_TOLD`).
    pub phase: u32,
}

impl Told {
    /// The answer of a client in this phase, or [`crate::books::NOT_TOLD`].
    pub fn new(phase: u32) -> Self {
        Self { magic: TOLD_MAGIC, layout_version: LAYOUT_VERSION, phase }
    }

    /// Reads a message that came over a client's connection. `None` if it is something else.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let told: Self = bytemuck::try_pod_read_unaligned(bytes).ok()?;
        ((told.magic, told.layout_version) == (TOLD_MAGIC, LAYOUT_VERSION)).then_some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { generation: 3, pid: 77 };

    fn made(edit: SharesUpdate) -> Change {
        Change::new(GpuUuid([9; 16]), SlotIndex::new(5).unwrap(), OWNER, edit)
    }

    fn refused(change: Change) -> (Status, String) {
        let reply = Change::read(bytemuck::bytes_of(&change)).unwrap_err();
        (Reply::read(bytemuck::bytes_of(&*reply)).unwrap().1, reply.text())
    }

    #[test]
    fn a_change_is_read_as_it_was_made() {
        let limits = [("none", "none"), ("2MiB", "1%"), ("8GiB", "100%"), ("25%", "30%")];
        let limits = limits.map(|(memory, compute)| (memory.parse().ok(), compute.parse().ok()));
        let others = limits
            .map(|(memory, _)| (memory, None))
            .into_iter()
            .chain(limits.map(|(_, compute)| (None, compute)));
        for (memory_limit, compute_limit) in limits.into_iter().chain(others).chain([(None, None)]) {
            for priority in [Some(Priority::High), Some(Priority::Normal), Some(Priority::Low), None] {
                for weight in [Some(1), Some(MAX_WEIGHT), None] {
                    let edit = SharesUpdate { weight, priority, memory_limit, compute_limit };
                    let (change, slot, read) = match Change::read(bytemuck::bytes_of(&made(edit))) {
                        Ok(read) => read,
                        Err(refusal) => {
                            assert_eq!(edit, SharesUpdate::default(), "{}", refusal.text());
                            continue;
                        }
                    };
                    assert_eq!((slot.get(), read, change.owner()), (5, edit, OWNER));
                    assert_ne!(edit, SharesUpdate::default(), "it changes nothing");
                }
            }
        }
    }

    #[test]
    fn a_refusal_for_another_release_is_not_cut_off() {
        for version in [0, LAYOUT_VERSION + 1, u32::MAX] {
            let refusal = Hello::read(bytemuck::bytes_of(&Hello {
                layout_version: version,
                ..Hello::look(GpuUuid([9; 16]))
            }));
            assert_eq!(refusal.unwrap_err().text(), release::refusal(version, LAYOUT_VERSION));
        }
    }

    #[test]
    fn what_is_not_given_stays() {
        let shares = Shares {
            weight: 7,
            priority: Priority::Low,
            memory_limit: MemoryLimit::Size(3),
            compute_limit: ComputeLimit::Part(300_000),
        };
        assert_eq!(SharesUpdate::default().of(shares), shares);
        let edit = SharesUpdate { memory_limit: Some(MemoryLimit::None), ..SharesUpdate::default() };
        assert_eq!(edit.of(shares), Shares { memory_limit: MemoryLimit::None, ..shares });
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let good = made(SharesUpdate {
            weight: Some(5),
            priority: Some(Priority::High),
            memory_limit: Some(MemoryLimit::Size(1)),
            compute_limit: Some(ComputeLimit::Part(300_000)),
        });
        assert!(Change::read(bytemuck::bytes_of(&good)).is_ok());
        for bad in [
            Change { weight: 0, ..good },
            Change { weight: MAX_WEIGHT + 1, ..good },
            Change { priority: 3, ..good },
            Change { memory_limit: u64::MAX, ..good },
            Change { memory_limit: 1 << 40, ..good },
            Change { compute_limit: 9_999, ..good },
            Change { compute_limit: 1_000_001, ..good },
            Change { which: 31, ..good },
            Change { which: WEIGHT, ..good },
            Change { slot: 48, ..good },
            Change { magic: WIRE_MAGIC, ..good },
        ] {
            assert_eq!(refused(bad).0, Status::Malformed, "{bad:?}");
        }
        let (status, text) = refused(Change { layout_version: 77, ..good });
        assert!(status == Status::LayoutVersion && text.contains("77"), "{text}");
        assert!(Change::read(&bytemuck::bytes_of(&good)[1..]).is_err());
    }
}
