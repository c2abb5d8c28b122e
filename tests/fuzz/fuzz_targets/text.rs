//! Sizes and GPU names as people write them. The harness says what is done and what must hold.

#![no_main]

#[path = "../harness/text.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::run(bytes));
