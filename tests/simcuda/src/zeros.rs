//! `nvshare_zero_granules`, the kernel by which the shim finds granules that it need not copy (`shim/src/memory/zero_scan.ptx`).
//!
//! Its table has for each chunk an address, a number of granules, and a byte for each granule, which becomes 1 if all
//! of the granule is zero. Like the real one it looks at a granule piece by piece and gives up at the first piece that
//! is not zero, and the time that it takes is that of the bytes it has seen.

use simstate::time::transfer_ns;

use crate::abi::{Error, Result};
use crate::driver::{Device, driver};
use crate::memory::access::Range;
use crate::memory::va::User;
use crate::op::{compute, page_in};

const GRANULE: u64 = 2 << 20;
/// Granules of a chunk at most.
const SLOTS: u64 = 32;
/// Bytes of the table for a chunk.
const ENTRY: u64 = 16 + SLOTS;
/// What a block of the kernel looks at before it decides whether to go on.
const PIECE: u64 = 16 << 10;

/// Answers the table's first `slots / 32` entries.
pub fn execute(device: &'static Device, user: User, table: u64, slots: u64) -> Result {
    let driver = driver()?;
    if !table.is_multiple_of(16) {
        return Err(Error::MISALIGNED_ADDRESS);
    }
    let entries = Range { address: table, element: ENTRY, write: true };
    driver.memory.check_arrays(user, &[entries], slots.div_ceil(SLOTS))?;
    let (mut seen, mut paging, mut zero) = (0, 0, Vec::new());
    for slot in 0..slots {
        let entry = table + slot / SLOTS * ENTRY;
        if slot % SLOTS >= word(user, entry + 8)? {
            continue;
        }
        let granule = word(user, entry)?.wrapping_add(slot % SLOTS * GRANULE);
        if !granule.is_multiple_of(16) {
            return Err(Error::MISALIGNED_ADDRESS);
        }
        paging += page_in(device, granule, GRANULE)?;
        let first = first_in_use(user, granule)?;
        seen += bytes_seen(first);
        if first.is_none() {
            zero.push(entry + 16 + slot % SLOTS);
        }
    }
    let config = &driver.config;
    let ns = config.kernel_ns.max(transfer_ns(seen, config.device_bandwidth)).saturating_add(paging);
    compute(device, ns, || zero.iter().try_for_each(|&byte| driver.memory.fill(user, byte, 1, 1, 1)))
}

fn word(user: User, address: u64) -> Result<u64> {
    let mut value = 0;
    driver()?.memory.with_word(user, address, |word| value = *word)?;
    Ok(value)
}

/// The first word of a granule that is not zero.
fn first_in_use(user: User, granule: u64) -> Result<Option<u64>> {
    let words = Range { address: granule, element: 8, write: false };
    let mut first = None;
    driver()?.memory.pieces(user, &[words], GRANULE / 8, |at, index, n| {
        if first.is_none() {
            // SAFETY: `pieces` vouches for `n` words at `at`, which is aligned because the granule is.
            let words = unsafe { std::slice::from_raw_parts(at[0] as *const u64, n as usize) };
            first = words.iter().position(|&word| word != 0).map(|word| index + word as u64);
        }
    })?;
    Ok(first)
}

/// The bytes that a block sees of a granule whose first word in use is that one.
fn bytes_seen(first_in_use: Option<u64>) -> u64 {
    first_in_use.map_or(GRANULE, |word| (word * 8 / PIECE + 1) * PIECE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_use_costs_next_to_nothing() {
        let last = GRANULE / 8 - 1;
        assert_eq!([Some(0), Some(2047), Some(2048)].map(bytes_seen), [PIECE, PIECE, 2 * PIECE]);
        assert_eq!([Some(last), None].map(bytes_seen), [GRANULE, GRANULE]);
    }
}
