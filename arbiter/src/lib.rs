//! The arbiter: creates the control pages, registers clients, cleans up after the dead, and watches. It is
//! not on the path of a launch or of a hand-off, and everything goes on while it is down.

pub mod changes;
pub mod claim;
pub mod connections;
pub mod liveness;
pub mod lives;
pub mod options;
pub mod pages;
pub mod sampling;
pub mod server;
pub mod stalls;
