//! The 64 bytes of a CUipcMemHandle of ours.
//!
//! An application sends them to another process as it likes, so whoever gets them must believe nothing: they name a
//! channel ([`super::channel`]) and what to ask there, and hold nothing that is used as an address, an index or a
//! size.

use crate::cuda::abi::CUipcMemHandle;
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// First eight bytes of every handle and message. The driver's own handles begin with numbers of its kernel module.
pub const MAGIC: u64 = u64::from_le_bytes(*b"nvshripc");

/// What these bytes, and the messages of the channel, look like.
pub const VERSION: u32 = 1;

/// Shows that whoever asks for memory was given a handle to it. Drawn at random for each allocation.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Key([u8; 16]);

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn draw() -> std::io::Result<Self> {
        random().map(Self)
    }

    /// Whether it is this one. Takes as long for each wrong one.
    pub fn is(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differs, (ours, theirs)| differs | (ours ^ theirs)) == 0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Logs are read by others than those who may read the memory.
        out.write_str("Key(..)")
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: writes at most as many bytes as the array has.
    let drawn = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes come whole, whatever signals come.
    if drawn == N as isize { Ok(bytes) } else { Err(std::io::Error::last_os_error()) }
}

/// Whose memory it is: the channel's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Exporter {
    /// Drawn at random, so that nobody can wait at the name of a process to come.
    token: [u8; 12],
    /// As that process sees itself: for people, and to find it in a list.
    pub pid: u32,
}

impl Exporter {
    /// This process.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn here() -> std::io::Result<Self> {
        Ok(Self { token: random()?, pid: std::process::id() })
    }

    /// The abstract name of the socket where it can be asked.
    pub fn socket_name(&self) -> String {
        let token: String = self.token.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("nvshare-ipc-{}-{token}", self.pid)
    }
}

/// What a handle says.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Handle {
    magic: u64,
    version: u32,
    zero: u32,
    /// Whom to ask.
    pub exporter: Exporter,
    /// Which of its allocations.
    pub number: u64,
    /// What shows that we may.
    pub key: Key,
    zeros: u64,
}

/// What 64 bytes are.
#[derive(Debug)]
pub enum Read {
    /// A handle of ours.
    Ours(Handle),
    /// One of another release of nvshare's, whose version this is; or ours with something changed.
    Unreadable(u32),
    /// Not ours: the driver's, or nothing.
    Foreign,
}

impl Handle {
    /// The name of an allocation.
    pub fn new(exporter: Exporter, number: u64, key: Key) -> Self {
        Self { magic: MAGIC, version: VERSION, zero: 0, exporter, number, key, zeros: 0 }
    }

    /// As the application gets it.
    pub fn encode(&self) -> CUipcMemHandle {
        CUipcMemHandle { reserved: bytemuck::cast(*self) }
    }

    /// Reads what an application hands in.
    pub fn decode(handle: &CUipcMemHandle) -> Read {
        let read: Self = bytemuck::pod_read_unaligned(&handle.reserved);
        match (read.magic, read.version, read.zero, read.zeros) {
            (MAGIC, VERSION, 0, 0) => Read::Ours(read),
            (MAGIC, version, ..) => Read::Unreadable(version),
            _ => Read::Foreign,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn handle(token: [u8; 12], pid: u32, number: u64, key: [u8; 16]) -> Handle {
        Handle::new(Exporter { token, pid }, number, Key(key))
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(token: [u8; 12], pid: u32, number: u64, key: [u8; 16]) {
            let written = handle(token, pid, number, key);
            let Read::Ours(read) = Handle::decode(&written.encode()) else { panic!("not read") };
            prop_assert_eq!((read.exporter, read.number), (written.exporter, number));
            prop_assert!(read.key.is(&Key(key)));
            prop_assert_eq!(read.encode(), written.encode());
        }

        #[test]
        fn what_others_made_is_left_alone(bytes in prop::array::uniform32(any::<u8>()), magic: u64) {
            let mut reserved = [0; 64];
            reserved[..32].copy_from_slice(&bytes);
            reserved[..8].copy_from_slice(&magic.to_le_bytes());
            prop_assume!(magic != MAGIC);
            let foreign = matches!(Handle::decode(&CUipcMemHandle { reserved }), Read::Foreign);
            prop_assert!(foreign);
        }

        /// One changed byte is another handle, or none, and never the same one.
        #[test]
        fn no_byte_is_without_meaning(at in 0usize..64, change in 1u8.., key: [u8; 16]) {
            let written = handle([7; 12], 42, 3, key);
            let mut encoded = written.encode();
            encoded.reserved[at] ^= change;
            match Handle::decode(&encoded) {
                Read::Ours(read) => {
                    let same = read.exporter == written.exporter && read.number == 3 && read.key.is(&Key(key));
                    prop_assert!(!same, "byte {at}");
                }
                Read::Unreadable(_) => prop_assert!((8..16).contains(&at) || at >= 56),
                Read::Foreign => prop_assert!(at < 8),
            }
        }
    }

    #[test]
    fn a_name_is_one_that_a_socket_can_have() {
        let mut exporter = Exporter::here().unwrap();
        exporter.pid = u32::MAX;
        assert!(exporter.socket_name().len() < 107, "{}", exporter.socket_name());
        assert_ne!(Exporter::here().unwrap(), Exporter::here().unwrap());
    }

    #[test]
    fn a_key_does_not_go_into_logs() {
        assert_eq!(format!("{:?}", Key([7; 16])), "Key(..)");
    }
}
