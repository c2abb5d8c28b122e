//! Submission of work to the GPU: threads pass the gate to submit, and a drain waits for the work that they have submitted.
//!
//! | file | what it holds |
//! |---|---|
//! | [`pass`] | how a thread passes the gate, and leaves it |
//! | [`flow`] | flow control: how much work may be in flight |
//! | [`queue`] | identifies a stream, for flow control and captures |
//! | [`captures`], [`capture_begin`] | captures of graphs |
//! | [`drain`] | markers of the end of all submitted work, and waiting for them |
//! | [`green`] | green contexts, and the primary context of each |
//! | [`gang`] | the GPUs of this process together, and its gang: the gate is open when all have theirs |
//! | `gang_seats` | what the processes of a gang show each other |
//! | [`gate`] | the process's gate |
//! | [`turn`], [`turn_taking`] | compute turns, for the threads that wait for one, and the thread that ends them |
//!
//! May use `cuda` and the files of the crate's root, and no room above.

pub mod capture_begin;
pub mod captures;
pub mod drain;
pub mod flow;
pub mod gang;
mod gang_seats;
pub mod gate;
pub mod green;
pub mod pass;
pub mod queue;
pub mod turn;
pub mod turn_taking;
