//! Operations on a page, with lies between them. The harness says what is done and what must hold.

#![no_main]

#[path = "../harness/page.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::run(bytes));
