//! The 64 bytes of nvshare's CUipcMemHandle.
//!
//! The application sends them to another process by its own means, so they are not trusted: they name a
//! socket ([`super::channel`]) and the request to send there, and contain nothing that is used as an address, an index or a
//! size.

use crate::cuda::abi::CUipcMemHandle;
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// The first eight bytes of every handle and message. The driver's own handles begin with other numbers.
pub const MAGIC: u64 = u64::from_le_bytes(*b"nvshripc");

/// The version of the handle's layout and of the channel's messages.
pub const VERSION: u32 = 1;

/// A secret in the handle, which proves that a process was given the handle. Random for each allocation.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Key([u8; 16]);

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// The kernel's.
    pub fn draw() -> std::io::Result<Self> {
        random().map(Self)
    }

    /// Whether both keys are equal, in constant time.
    pub fn is(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differs, (ours, theirs)| differs | (ours ^ theirs)) == 0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Logs may be read by users who may not read the memory.
        out.write_str("Key(..)")
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: writes at most as many bytes as the array has.
    let drawn = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes are not interrupted by signals.
    if drawn == N as isize { Ok(bytes) } else { Err(std::io::Error::last_os_error()) }
}

/// The process that exports memory; it determines the name of its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Exporter {
    /// Random, so that no other process can bind the name first.
    token: [u8; 12],
    /// The process's id in its own namespace, for messages and for comparison.
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

    /// The abstract name of its socket.
    pub fn socket_name(&self) -> String {
        let token: String = self.token.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("nvshare-ipc-{}-{token}", self.pid)
    }
}

/// The contents of a handle.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Handle {
    magic: u64,
    version: u32,
    zero: u32,
    /// The process that exports the memory.
    pub exporter: Exporter,
    /// The number of the allocation.
    pub number: u64,
    /// The allocation's key.
    pub key: Key,
    zeros: u64,
}

/// The kinds of handles that an application may pass.
#[derive(Debug)]
pub enum Read {
    /// A handle of nvshare.
    Ours(Handle),
    /// A handle of another release of nvshare, which has this version, or a damaged one.
    Unreadable(u32),
    /// Not a handle of nvshare: the driver's, or garbage.
    Foreign,
}

impl Handle {
    /// The handle of an allocation.
    pub fn new(exporter: Exporter, number: u64, key: Key) -> Self {
        Self { magic: MAGIC, version: VERSION, zero: 0, exporter, number, key, zeros: 0 }
    }

    /// The bytes that the application gets.
    pub fn encode(&self) -> CUipcMemHandle {
        CUipcMemHandle { reserved: bytemuck::cast(*self) }
    }

    /// Reads the bytes that an application passes.
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
        fn a_handle_is_decoded_as_it_was_encoded(token: [u8; 12], pid: u32, number: u64, key: [u8; 16]) {
            let written = handle(token, pid, number, key);
            let Read::Ours(read) = Handle::decode(&written.encode()) else { panic!("not read") };
            prop_assert_eq!((read.exporter, read.number), (written.exporter, number));
            prop_assert!(read.key.is(&Key(key)));
            prop_assert_eq!(read.encode(), written.encode());
        }

        #[test]
        fn a_handle_of_another_origin_is_foreign(bytes in prop::array::uniform32(any::<u8>()), magic: u64) {
            let mut reserved = [0; 64];
            reserved[..32].copy_from_slice(&bytes);
            reserved[..8].copy_from_slice(&magic.to_le_bytes());
            prop_assume!(magic != MAGIC);
            let foreign = matches!(Handle::decode(&CUipcMemHandle { reserved }), Read::Foreign);
            prop_assert!(foreign);
        }

        /// Changing one byte never yields the same handle.
        #[test]
        fn every_byte_has_a_meaning(at in 0usize..64, change in 1u8.., key: [u8; 16]) {
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
    fn a_socket_name_is_short_enough_and_unique() {
        let mut exporter = Exporter::here().unwrap();
        exporter.pid = u32::MAX;
        assert!(exporter.socket_name().len() < 107, "{}", exporter.socket_name());
        assert_ne!(Exporter::here().unwrap(), Exporter::here().unwrap());
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", Key([7; 16])), "Key(..)");
    }
}
