//! Memory that several applications have open.

use super::{Application, SUCCESS};

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only flags that there are.
const LAZY: u32 = 1;

impl Application {
    /// The handle of an allocation, as text.
    #[track_caller]
    pub fn export(&mut self, address: u64) -> String {
        let (code, handle) = self.ask(&format!("ipc-get {address}"));
        assert_eq!(code, SUCCESS);
        handle
    }

    /// Opens another's memory: where it is, or the error.
    pub fn try_open(&mut self, handle: &str) -> Result<u64, i32> {
        match self.ask(&format!("ipc-open {LAZY} {handle}")) {
            (SUCCESS, address) => Ok(address.parse().unwrap()),
            (code, _) => Err(code),
        }
    }

    /// Opens another's memory: where it is.
    #[track_caller]
    pub fn open(&mut self, handle: &str) -> u64 {
        self.try_open(handle).unwrap()
    }

    /// Closes what was opened.
    #[track_caller]
    pub fn close(&mut self, address: u64) {
        self.does(&format!("ipc-close {address}"));
    }
}
