//! How a capture begins: inside the gate, while no engine wants to drain.

use crate::cuda::abi::{CUstream, CuResult};
use crate::submit::captures::Beginning;
use crate::submit::gate::gate;
use crate::submit::pass::enter_query;

/// Begins a capture of a stream with `call`; waits until no engine wants to drain.
pub fn begin_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    let (_pass, beginning) = loop {
        match enter_query() {
            Ok(pass) => {
                if let Some(begun) = Beginning::unless_held(pass, || gate().is_open()) {
                    break begun;
                }
            }
            Err(result) => return result,
        }
    };
    beginning.begin(stream, per_thread, call)
}
