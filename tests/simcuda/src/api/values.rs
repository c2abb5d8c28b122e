//! Memory operations of streams: a stream writes a value, or waits for one.

use std::ffi::c_uint;

use super::driver_api;
use crate::abi::{Error, Handle, Result};
use crate::context::{self, Null};
use crate::op::Op;
use crate::value::{Condition, Value};

/// `CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER`.
const NO_BARRIER: c_uint = 1;

fn value(address: u64, value: u64, wide: bool) -> Result<Value> {
    let value = Value { address, value, wide };
    // Null is a multiple of everything.
    if address != 0 && address.is_multiple_of(value.bytes()) { Ok(value) } else { Err(Error::INVALID_VALUE) }
}

fn wait(null: Null, stream: Handle, value: Result<Value>, flags: c_uint) -> Result {
    let condition = Condition::of(flags)?;
    context::stream(null, stream)?.enqueue(Op::AwaitValue(value?, condition)).map(|_| ())
}

fn write(null: Null, stream: Handle, value: Result<Value>, flags: c_uint) -> Result {
    if flags & !NO_BARRIER != 0 {
        return Err(Error::INVALID_VALUE);
    }
    context::stream(null, stream)?.enqueue(Op::WriteValue(value?)).map(|_| ())
}

driver_api! {
    fn cuStreamWaitValue32 / cuStreamWaitValue32_ptsz |null| (
        stream: Handle, address: u64, word: c_uint, flags: c_uint,
    ) {
        wait(null, stream, value(address, word.into(), false), flags)
    }

    fn cuStreamWaitValue32_v2 / cuStreamWaitValue32_v2_ptsz |null| (
        stream: Handle, address: u64, word: c_uint, flags: c_uint,
    ) {
        wait(null, stream, value(address, word.into(), false), flags)
    }

    fn cuStreamWaitValue64 / cuStreamWaitValue64_ptsz |null| (
        stream: Handle, address: u64, word: u64, flags: c_uint,
    ) {
        wait(null, stream, value(address, word, true), flags)
    }

    fn cuStreamWaitValue64_v2 / cuStreamWaitValue64_v2_ptsz |null| (
        stream: Handle, address: u64, word: u64, flags: c_uint,
    ) {
        wait(null, stream, value(address, word, true), flags)
    }

    fn cuStreamWriteValue32 / cuStreamWriteValue32_ptsz |null| (
        stream: Handle, address: u64, word: c_uint, flags: c_uint,
    ) {
        write(null, stream, value(address, word.into(), false), flags)
    }

    fn cuStreamWriteValue32_v2 / cuStreamWriteValue32_v2_ptsz |null| (
        stream: Handle, address: u64, word: c_uint, flags: c_uint,
    ) {
        write(null, stream, value(address, word.into(), false), flags)
    }

    fn cuStreamWriteValue64 / cuStreamWriteValue64_ptsz |null| (
        stream: Handle, address: u64, word: u64, flags: c_uint,
    ) {
        write(null, stream, value(address, word, true), flags)
    }

    fn cuStreamWriteValue64_v2 / cuStreamWriteValue64_v2_ptsz |null| (
        stream: Handle, address: u64, word: u64, flags: c_uint,
    ) {
        write(null, stream, value(address, word, true), flags)
    }
}
