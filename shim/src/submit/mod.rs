//! Work on its way to the GPU: threads pass the gate, and a drain waits for what they have submitted.
//!
//! | file | what it holds |
//! |---|---|
//! | [`pass`] | how a thread goes through the gate, and comes out |
//! | [`flow`] | flow control: how much work may be in flight |
//! | [`queue`] | the name of a stream, as flow control and captures count |
//! | [`captures`], [`capture_begin`] | graphs that are being recorded |
//! | [`drain`] | markers behind all submitted work, and waiting for them |
//! | [`green`] | green contexts, and the primary context of each |
//! | [`gang`] | the GPUs of this process together: the gate is open when it has all of them |
//! | [`gate`] | the process's gate |
//!
//! May use `cuda` and the files of the crate's root, and nothing above.

pub mod capture_begin;
pub mod captures;
pub mod drain;
pub mod flow;
pub mod gang;
pub mod gate;
pub mod green;
pub mod pass;
pub mod queue;
