//! Requests to steer an arbiter and its clients while they run, byte by byte: as [`crate::wire`] has it, of which they are a part.
//!
//! | message | what it is for | answer |
//! |---|---|---|
//! | [`PauseRequest`] | pauses or resumes a client | a sentence |
//! | [`SettingsRequest`] | asks for the arbiter's settings, or changes them | the settings as JSON in a descriptor |
//!
//! Settings are text, `name=value` by lines: the arbiter reads a value as it reads the argument of that name.

use crate::page::{LAYOUT_VERSION, Suspension};
use crate::slot::{Owner, SlotIndex};
use crate::text::printable;
use crate::units::GpuUuid;
use bytemuck::{Pod, Zeroable};

/// First eight bytes of a [`PauseRequest`].
pub const PAUSE_MAGIC: u64 = u64::from_le_bytes(*b"nvpause?");

/// First eight bytes of a [`SettingsRequest`].
pub const SETTINGS_MAGIC: u64 = u64::from_le_bytes(*b"nvctl???");

/// A request to pause a client, or to resume it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct PauseRequest {
    magic: u64,
    layout_version: u32,
    /// Its slot.
    slot: u32,
    /// The UUID of the client's GPU.
    pub gpu: [u8; 16],
    /// Its pid, as the page has it.
    pub pid: u32,
    /// How many owners its slot has had, as the page has it.
    pub generation: u32,
    /// A [`Suspension`] as a word; 0 resumes.
    suspension: u32,
    reserved: u32,
}

impl PauseRequest {
    /// A request to pause the client that owns this slot, or to resume it with [`Suspension::None`].
    pub fn new(gpu: GpuUuid, slot: SlotIndex, owner: Owner, suspension: Suspension) -> Self {
        Self {
            magic: PAUSE_MAGIC,
            layout_version: LAYOUT_VERSION,
            slot: slot.get() as u32,
            gpu: gpu.0,
            pid: owner.pid,
            generation: owner.generation,
            suspension: suspension.into(),
            reserved: 0,
        }
    }

    /// Reads a message of this release that came over a socket: the message, the client's slot, and what is asked for.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<(Self, SlotIndex, Suspension), String> {
        let request: Self = bytemuck::try_pod_read_unaligned(bytes)
            .map_err(|_| wrong_length("a request to pause", size_of::<Self>(), bytes))?;
        if request.magic != PAUSE_MAGIC || request.reserved != 0 {
            return Err("this is not a request to pause".into());
        }
        let slot = SlotIndex::new(request.slot as usize)
            .ok_or_else(|| format!("there is no slot {}", request.slot))?;
        Ok((request, slot, Suspension::from(request.suspension)))
    }
}

/// A request for the arbiter's settings, or to change them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct SettingsRequest {
    magic: u64,
    layout_version: u32,
    /// 0 to ask, 1 to change, 2 to go back to what holds without changes at run time.
    kind: u32,
    /// The UUID of the GPU; zeros for all.
    gpu: [u8; 16],
    /// Lines of UTF-8, zero-padded.
    text: [u8; SettingsRequest::TEXT_BYTES],
}

/// What a [`SettingsRequest`] asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettingsChange {
    /// Nothing: it only asks.
    Ask,
    /// These settings get these values.
    Set(Vec<(String, String)>),
    /// These settings get back the values that they have without changes at run time; all if none is named.
    Reset(Vec<String>),
}

impl SettingsRequest {
    /// Bytes for its settings.
    pub const TEXT_BYTES: usize = 1024;

    /// A request of this kind, for one GPU or for all.
    ///
    /// # Errors
    /// It does not fit: a sentence.
    pub fn new(gpu: Option<GpuUuid>, change: &SettingsChange) -> Result<Self, String> {
        let (kind, lines) = match change {
            SettingsChange::Ask => (0, Vec::new()),
            SettingsChange::Set(values) => {
                (1, values.iter().map(|(name, value)| format!("{name}={value}")).collect())
            }
            SettingsChange::Reset(names) => (2, names.clone()),
        };
        let text = lines.join("\n");
        if text.len() > Self::TEXT_BYTES
            || text.contains('\0')
            || lines.iter().any(|line| line.contains('\n'))
        {
            return Err(format!(
                "settings are lines of {} bytes together at most, without zeros and line breaks",
                Self::TEXT_BYTES
            ));
        }
        let mut bytes = [0; Self::TEXT_BYTES];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        let gpu = gpu.map_or([0; 16], |gpu| gpu.0);
        Ok(Self { magic: SETTINGS_MAGIC, layout_version: LAYOUT_VERSION, kind, gpu, text: bytes })
    }

    /// Reads a message of this release that came over a socket: the GPU, or none for all, and what is asked for.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<(Option<GpuUuid>, SettingsChange), String> {
        let request: Self = bytemuck::try_pod_read_unaligned(bytes)
            .map_err(|_| wrong_length("a request about settings", size_of::<Self>(), bytes))?;
        let end = request.text.iter().position(|byte| *byte == 0).unwrap_or(Self::TEXT_BYTES);
        let lines = || {
            let lines = request.text[..end].split(|byte| *byte == b'\n').map(printable);
            lines.filter(|line| !line.is_empty())
        };
        let pair = |line: String| {
            let (name, value) = line.split_once('=').ok_or_else(|| format!("'{line}' is not NAME=VALUE"))?;
            Ok((name.trim().to_owned(), value.trim().to_owned()))
        };
        let change = match (request.magic, request.kind) {
            (SETTINGS_MAGIC, 0) => SettingsChange::Ask,
            (SETTINGS_MAGIC, 1) => SettingsChange::Set(lines().map(pair).collect::<Result<_, String>>()?),
            (SETTINGS_MAGIC, 2) => SettingsChange::Reset(lines().collect()),
            _ => return Err("this is not a request about settings".into()),
        };
        Ok(((request.gpu != [0; 16]).then_some(GpuUuid(request.gpu)), change))
    }
}

fn wrong_length(what: &str, wanted: usize, bytes: &[u8]) -> String {
    format!("{what} has {wanted} bytes and this message has {}", bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWNER: Owner = Owner { generation: 3, pid: 77 };

    #[test]
    fn a_request_to_pause_is_read_as_it_was_made() {
        for suspension in [Suspension::None, Suspension::WithoutEnd, Suspension::Until(9)] {
            let made = PauseRequest::new(GpuUuid([9; 16]), SlotIndex::new(5).unwrap(), OWNER, suspension);
            let (read, slot, asked) = PauseRequest::read(bytemuck::bytes_of(&made)).unwrap();
            assert_eq!((read, slot.get(), asked), (made, 5, suspension));
            for bad in [PauseRequest { slot: 48, ..made }, PauseRequest { magic: 1, ..made }] {
                assert!(PauseRequest::read(bytemuck::bytes_of(&bad)).is_err());
            }
        }
        assert!(PauseRequest::read(&[0; 47]).unwrap_err().contains("has 47"));
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_is_sent() {
        for value in ["x".repeat(SettingsRequest::TEXT_BYTES), "a\nb".into(), "a\0b".into()] {
            let change = SettingsChange::Set(vec![("quantum".into(), value)]);
            assert!(SettingsRequest::new(None, &change).unwrap_err().contains("1024"));
        }
    }

    proptest! {
        #[test]
        fn a_request_about_settings_is_read_as_it_was_made(
            gpu in prop::option::of(prop::array::uniform16(1..u8::MAX)),
            names in prop::collection::vec("[a-z-]{1,20}", 0..8),
            value in "[!-~]{1,40}",
        ) {
            let gpu = gpu.map(GpuUuid);
            let values = names.iter().map(|name| (name.clone(), value.clone())).collect();
            for change in [SettingsChange::Ask, SettingsChange::Set(values), SettingsChange::Reset(names)] {
                let made = SettingsRequest::new(gpu, &change).unwrap();
                prop_assert_eq!(SettingsRequest::read(bytemuck::bytes_of(&made)), Ok((gpu, change)));
            }
        }

        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..1_100)) {
            let _ = SettingsRequest::read(&bytes);
            let _ = PauseRequest::read(&bytes);
        }
    }
}
