//! The shim's own kernels, by which it finds what it need not copy: `nvshare_zero_granules` (`shim/src/memory/zero_scan.ptx`) and
//! `nvshare_fingerprints` (`shim/src/memory/fingerprint.ptx`).
//!
//! Their table has for each chunk an address, a number of granules, and a place for what is found of each granule: a byte that
//! becomes 1 if all of it is zero, or its fingerprint. Like the real one, the first looks at a granule piece by
//! piece and gives up at the first piece that is not zero; the second reads all of it. The time that a kernel takes is that of
//! the bytes it has seen.

use simstate::time::transfer_ns;

use crate::abi::{Error, Result};
use crate::driver::{Device, driver};
use crate::memory::access::Range;
use crate::memory::va::User;
use crate::op::{compute, page_in};

const GRANULE: u64 = 2 << 20;
/// Granules of a chunk at most.
const SLOTS: u64 = 32;
/// What a block of the first kernel looks at before it decides whether to go on.
const PIECE: u64 = 16 << 10;
/// Threads of a block.
const THREADS: usize = 256;

/// The granules of a table's first `slots / 32` entries, of which each has so many bytes for what is found of a granule: the granule's
/// address and the address of that place.
fn granules(user: User, table: u64, slots: u64, found: u64) -> Result<Vec<(u64, u64)>> {
    if !table.is_multiple_of(16) {
        return Err(Error::MISALIGNED_ADDRESS);
    }
    let bytes = 16 + SLOTS * found;
    let entries = Range { address: table, element: bytes, write: true };
    driver()?.memory.check_arrays(user, &[entries], slots.div_ceil(SLOTS))?;
    let mut all = Vec::new();
    for slot in 0..slots {
        let (entry, index) = (table + slot / SLOTS * bytes, slot % SLOTS);
        if index >= word(user, entry + 8)? {
            continue;
        }
        let granule = word(user, entry)?.wrapping_add(index * GRANULE);
        if !granule.is_multiple_of(16) {
            return Err(Error::MISALIGNED_ADDRESS);
        }
        all.push((granule, entry + 16 + index * found));
    }
    Ok(all)
}

/// `nvshare_zero_granules`.
pub fn zeros(device: &'static Device, user: User, table: u64, slots: u64) -> Result {
    let driver = driver()?;
    let (mut seen, mut paging, mut zero) = (0, 0, Vec::new());
    for (granule, place) in granules(user, table, slots, 1)? {
        paging += page_in(device, granule, GRANULE)?;
        let first = first_in_use(user, granule)?;
        seen += bytes_seen(first);
        if first.is_none() {
            zero.push(place);
        }
    }
    let config = &driver.config;
    let ns = config.kernel_ns.max(transfer_ns(seen, config.device_bandwidth)).saturating_add(paging);
    compute(device, ns, || zero.iter().try_for_each(|&byte| driver.memory.fill(user, byte, 1, 1, 1)))
}

/// `nvshare_fingerprints`.
pub fn fingerprints(device: &'static Device, user: User, table: u64, slots: u64, keys: [u64; 2]) -> Result {
    let driver = driver()?;
    let granules = granules(user, table, slots, 16)?;
    let (mut paging, mut found) = (0, Vec::new());
    for &(granule, place) in &granules {
        paging += page_in(device, granule, GRANULE)?;
        found.push((place, fingerprint(user, granule, keys)?));
    }
    let config = &driver.config;
    let seen = granules.len() as u64 * GRANULE;
    let ns = config.kernel_ns.max(transfer_ns(seen, config.device_bandwidth)).saturating_add(paging);
    compute(device, ns, || {
        found.iter().try_for_each(|(place, sums)| {
            [0, 1].into_iter().try_for_each(|at| {
                driver.memory.with_word(user, place + 8 * at as u64, |word| *word = sums[at])
            })
        })
    })
}

fn word(user: User, address: u64) -> Result<u64> {
    let mut value = 0;
    driver()?.memory.with_word(user, address, |word| value = *word)?;
    Ok(value)
}

/// Shows `look` the words of a granule, piece by piece: the index of the first, and the words.
fn words(user: User, granule: u64, mut look: impl FnMut(u64, &[u64])) -> Result {
    let words = Range { address: granule, element: 8, write: false };
    driver()?.memory.pieces(user, &[words], GRANULE / 8, |at, index, n| {
        // SAFETY: `pieces` vouches for `n` words at `at`, which is aligned because the granule is.
        look(index, unsafe { std::slice::from_raw_parts(at[0] as *const u64, n as usize) });
    })
}

/// The first word of a granule that is not zero.
fn first_in_use(user: User, granule: u64) -> Result<Option<u64>> {
    let mut first = None;
    words(user, granule, |index, words| {
        if first.is_none() {
            first = words.iter().position(|&word| word != 0).map(|word| index + word as u64);
        }
    })?;
    Ok(first)
}

/// The bytes that a block sees of a granule whose first word in use is that one.
fn bytes_seen(first_in_use: Option<u64>) -> u64 {
    first_in_use.map_or(GRANULE, |word| (word * 8 / PIECE + 1) * PIECE)
}

fn fingerprint(user: User, granule: u64, keys: [u64; 2]) -> Result<[u64; 2]> {
    let mut sums = Sums::new(keys);
    words(user, granule, |index, words| sums.take(index, words))?;
    Ok(sums.all())
}

/// The sums of all threads of a block.
struct Sums {
    keys: [u64; 2],
    threads: Vec<[u64; 2]>,
}

impl Sums {
    fn new(keys: [u64; 2]) -> Self {
        Self {
            keys,
            threads: (0..THREADS as u64).map(|thread| keys.map(|key| key.wrapping_add(thread))).collect(),
        }
    }

    /// Takes in the words from the one with this index on. Two of them after each other are a thread's.
    fn take(&mut self, index: u64, words: &[u64]) {
        let [key0, key1] = self.keys;
        for (at, &word) in (index as usize..).zip(words) {
            let [a, b] = &mut self.threads[at / 2 % THREADS];
            *a = fold(*a ^ word, key1 | 1);
            *b = fold(*b ^ word, key0 | 1);
        }
    }

    fn all(&self) -> [u64; 2] {
        self.threads
            .iter()
            .fold([0; 2], |[a, b], thread| [a.wrapping_add(thread[0]), b.wrapping_add(thread[1])])
    }
}

/// The halves of the product, one over the other.
fn fold(x: u64, key: u64) -> u64 {
    let product = u128::from(x) * u128::from(key);
    product as u64 ^ (product >> 64) as u64
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

    fn sums(words: &[u64]) -> [u64; 2] {
        let mut sums = Sums::new([0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321]);
        // In pieces of any size.
        let mut index = 0;
        for piece in words.chunks(4099) {
            sums.take(index, piece);
            index += piece.len() as u64;
        }
        sums.all()
    }

    /// By tests/gpu/scan.py, which computes the same in another way.
    #[test]
    fn a_fingerprint_is_what_the_kernel_is_defined_to_compute() {
        let words: Vec<u64> =
            (0..GRANULE / 8).map(|index| index.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        assert_eq!(sums(&words), [0xa7fb_a19f_0c31_71a4, 0x9984_294b_9810_c6d5]);
    }

    #[test]
    fn words_that_change_their_value_or_their_places_change_it() {
        let mut words: Vec<u64> = (0..GRANULE / 8).collect();
        let before = sums(&words);
        for (one, other) in [(0, 1), (7, 519), (0, 2), (100, 200_001)] {
            words.swap(one, other);
            assert_ne!(sums(&words), before, "{one} and {other} are exchanged");
            words.swap(one, other);
        }
        for at in [0, 1, 511, 512, words.len() - 1] {
            words[at] ^= 1 << 63;
            assert_ne!(sums(&words), before, "the highest bit of {at}");
            words[at] ^= 1 << 63;
        }
        assert_eq!(sums(&words), before);
    }
}
