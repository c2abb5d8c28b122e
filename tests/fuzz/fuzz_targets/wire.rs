//! What comes over the arbiter's socket. The harness says what is done and what must hold.

#![no_main]

#[path = "../harness/wire.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::run(bytes));
