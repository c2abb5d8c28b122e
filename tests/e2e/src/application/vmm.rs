//! Memory that an application maps itself, on the first GPU.

use super::{Application, SUCCESS};

/// `CUmemAccess_flags`.
pub const READ: u32 = 1;
/// `CUmemAccess_flags`.
pub const READ_WRITE: u32 = 3;

impl Application {
    /// Makes an object that can be mapped; its handle.
    #[track_caller]
    pub fn object(&mut self, bytes: u64) -> u64 {
        self.number(&format!("object {bytes} 0 0"))
    }

    /// Reserves addresses; the first of them.
    #[track_caller]
    pub fn reserve(&mut self, bytes: u64) -> u64 {
        self.number(&format!("reserve {bytes}"))
    }

    /// Maps an object, to be read and written.
    #[track_caller]
    pub fn map(&mut self, address: u64, bytes: u64, object: u64) {
        self.does(&format!("map {address} {bytes} 0 {object}"));
        self.allow(address, bytes, READ_WRITE);
    }

    /// Sets the access rights.
    #[track_caller]
    pub fn allow(&mut self, address: u64, bytes: u64, rights: u32) {
        self.does(&format!("allow {address} {bytes} 0 {rights}"));
    }

    /// Unmaps what is there.
    #[track_caller]
    pub fn unmap(&mut self, address: u64, bytes: u64) {
        self.does(&format!("unmap {address} {bytes}"));
    }

    /// Releases the handle of an object.
    #[track_caller]
    pub fn release(&mut self, object: u64) {
        self.does(&format!("release-object {object}"));
    }

    /// Finds zeros there.
    #[track_caller]
    pub fn sees_zeros(&mut self, address: u64, bytes: u64) {
        let seen = self.ask(&format!("holds {address} {bytes} 0"));
        assert_eq!(seen, (SUCCESS, "right".into()), "zeros, {bytes} B at {address:#x}");
    }
}
