//! Stream-ordered memory, on the first GPU.

use super::Application;

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

impl Application {
    /// Makes a stream that does not wait for the null stream; its number.
    #[track_caller]
    pub fn stream(&mut self) -> u64 {
        self.number(&format!("stream {NON_BLOCKING}"))
    }

    /// Allocates in the order of a stream.
    #[track_caller]
    pub fn alloc_in(&mut self, bytes: u64, stream: u64) -> u64 {
        self.number(&format!("alloc-async {bytes} {stream}"))
    }

    /// Frees in the order of a stream.
    #[track_caller]
    pub fn free_in(&mut self, address: u64, stream: u64) {
        self.does(&format!("free-async {address} {stream}"));
    }

    /// A pool's attribute.
    #[track_caller]
    pub fn pool_get(&mut self, pool: u64, attribute: u32) -> u64 {
        self.number(&format!("pool-get {pool} {attribute}"))
    }

    /// What cuMemGetInfo says is free.
    #[track_caller]
    pub fn left(&mut self) -> u64 {
        self.number("left")
    }
}
