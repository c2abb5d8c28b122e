//! The kernels that the simulated GPU knows, and running them.
//!
//! A module's image is PTX text. Nobody interprets it: the entry names are read, and those of the kernels below can be
//! launched. `kernels.ptx`, beside this crate's manifest, has the same kernels for a real GPU, but for those in
//! [`crate::scans`], which are the shim's own.
//!
//! A kernel that touches memory takes `max(NVSHARE_SIM_KERNEL_NS, bytes / NVSHARE_SIM_DEVICE_BANDWIDTH)` of the
//! compute engine, plus what its managed pages cost. The empty kernel takes nothing: in an idle stream it is complete
//! when the launch returns, so that benchmarks of the launch path measure nothing else.

use simstate::counters::Count;
use simstate::time::transfer_ns;

use crate::abi::{Error, In, Result};
use crate::context::Core;
use crate::driver::driver;
use crate::memory::access::Range;
use crate::memory::va::User;
use crate::op::{compute, page_in};
use crate::scans;
use crate::value::{Condition, Value};

/// A kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    pub name: &'static str,
    /// Bytes of each parameter.
    pub parameters: &'static [usize],
    body: Body,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Null,
    Spin,
    Work,
    FillU32,
    IotaU64,
    MixU64,
    AffineU64,
    AddF32,
    ChecksumU64,
    NonzeroU64,
    AwaitU32,
    ZeroGranules,
    Fingerprints,
}

/// All kernels.
pub static KERNELS: [Kernel; 13] = [
    Kernel { name: "nvshare_null", parameters: &[], body: Body::Null },
    Kernel { name: "nvshare_spin", parameters: &[8], body: Body::Spin },
    // An iteration takes a nanosecond.
    Kernel { name: "nvshare_work", parameters: &[8, 8], body: Body::Work },
    Kernel { name: "nvshare_fill_u32", parameters: &[8, 8, 4], body: Body::FillU32 },
    Kernel { name: "nvshare_iota_u64", parameters: &[8, 8, 8], body: Body::IotaU64 },
    Kernel { name: "nvshare_mix_u64", parameters: &[8, 8, 8], body: Body::MixU64 },
    Kernel { name: "nvshare_affine_u64", parameters: &[8, 8, 8], body: Body::AffineU64 },
    Kernel { name: "nvshare_add_f32", parameters: &[8, 8, 8, 8], body: Body::AddF32 },
    Kernel { name: "nvshare_checksum_u64", parameters: &[8, 8, 8], body: Body::ChecksumU64 },
    Kernel { name: "nvshare_nonzero_u64", parameters: &[8, 8, 8], body: Body::NonzeroU64 },
    Kernel { name: "nvshare_await_u32", parameters: &[8, 4], body: Body::AwaitU32 },
    Kernel { name: "nvshare_zero_granules", parameters: &[8, 8], body: Body::ZeroGranules },
    Kernel { name: "nvshare_fingerprints", parameters: &[8, 8, 8, 8], body: Body::Fingerprints },
];

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Kernel {
    pub fn by_name(name: &str) -> Option<&'static Kernel> {
        KERNELS.iter().find(|kernel| kernel.name == name)
    }

    /// Whether it does nothing.
    pub fn is_null(&self) -> bool {
        self.body == Body::Null
    }

    /// Where a parameter is in the parameter buffer, and its size.
    pub fn parameter(&self, index: usize) -> Option<(usize, usize)> {
        let mut end: usize = 0;
        for (i, &size) in self.parameters.iter().enumerate() {
            let offset = end.next_multiple_of(size);
            if i == index {
                return Some((offset, size));
            }
            end = offset + size;
        }
        None
    }

    /// Reads the arguments of a launch, from the array of addresses or the buffer.
    pub fn arguments(&self, addresses: In<In<u64>>, extra: In<usize>) -> Result<[u64; 4]> {
        let mut arguments = [0; 4];
        if self.parameters.is_empty() {
            return Ok(arguments);
        }
        let buffer = if addresses.is_null() { Some(parameter_buffer(extra)?) } else { None };
        for (i, argument) in arguments.iter_mut().enumerate().take(self.parameters.len()) {
            let (offset, size) = self.parameter(i).ok_or(Error::INVALID_VALUE)?;
            let at = match buffer {
                None => addresses.at(i)?,
                Some((_, len)) if offset + size > len => return Err(Error::INVALID_VALUE),
                Some((at, _)) => In::from_address(at + offset),
            };
            *argument = if size == 4 { u64::from(at.cast::<u32>().get()?) } else { at.get()? };
        }
        Ok(arguments)
    }
}

/// The address and size of the parameter buffer that a launch's `extra` list names.
fn parameter_buffer(extra: In<usize>) -> Result<(usize, usize)> {
    const END: usize = 0;
    const POINTER: usize = 1;
    const SIZE: usize = 2;
    let (mut pointer, mut size) = (None, None);
    // Two entries are known; a longer list than a few words is garbage.
    for i in (0..16).step_by(2) {
        match extra.at(i)? {
            END => break,
            POINTER => pointer = Some(extra.at(i + 1)?),
            SIZE => size = Some(In::<usize>::from_address(extra.at(i + 1)?).get()?),
            _ => return Err(Error::INVALID_VALUE),
        }
    }
    pointer.filter(|&at| at != 0).zip(size).ok_or(Error::INVALID_VALUE)
}

/// A kernel with its arguments.
#[derive(Clone, Copy)]
pub struct Launch {
    pub kernel: &'static Kernel,
    pub arguments: [u64; 4],
}

impl Launch {
    /// The arrays that it uses, how many elements they have, and the word that it writes in the end.
    fn memory(&self) -> (Vec<Range>, u64, Option<u64>) {
        let [a, b, c, d] = self.arguments;
        let array = |address, element, write| Range { address, element, write };
        match self.kernel.body {
            Body::Null
            | Body::Spin
            | Body::Work
            | Body::AwaitU32
            | Body::ZeroGranules
            | Body::Fingerprints => (vec![], 0, None),
            Body::FillU32 => (vec![array(a, 4, true)], b, None),
            Body::IotaU64 | Body::MixU64 | Body::AffineU64 => (vec![array(a, 8, true)], b, None),
            Body::AddF32 => (vec![array(a, 4, true), array(b, 4, false), array(c, 4, false)], d, None),
            Body::ChecksumU64 | Body::NonzeroU64 => (vec![array(b, 8, false)], c, Some(a)),
        }
    }

    pub fn execute(&self, core: &Core) -> Result {
        let driver = driver()?;
        let (device, user) = (core.device, core.user());
        device.ledger()?.count(Count::Launches, 1);
        let ns = match self.kernel.body {
            Body::Null => return Ok(()),
            Body::Spin => {
                compute(device, self.arguments[0], || ());
                return Ok(());
            }
            Body::Work => {
                compute(device, self.arguments[1], || ());
                return Ok(());
            }
            Body::AwaitU32 => {
                let value = Value { address: self.arguments[0], value: self.arguments[1], wide: false };
                if !value.address.is_multiple_of(value.bytes()) {
                    return Err(Error::MISALIGNED_ADDRESS);
                }
                return value.wait(core, Condition::Equal);
            }
            Body::ZeroGranules => return scans::zeros(device, user, self.arguments[0], self.arguments[1]),
            Body::Fingerprints => {
                let [table, slots, keys @ ..] = self.arguments;
                return scans::fingerprints(device, user, table, slots, keys);
            }
            _ => driver.config.kernel_ns,
        };
        let (arrays, count, result) = self.memory();
        let aligned = |array: &Range| array.address.is_multiple_of(array.element);
        if !arrays.iter().all(aligned) || !result.is_none_or(|at| at.is_multiple_of(8)) {
            return Err(Error::MISALIGNED_ADDRESS);
        }
        driver.memory.check_arrays(user, &arrays, count)?;
        if let Some(at) = result {
            driver.memory.check_arrays(user, &[Range { address: at, element: 8, write: true }], 1)?;
        }
        let mut bytes = 0u64;
        let mut paging = 0;
        for array in &arrays {
            let len = array.element.saturating_mul(count);
            bytes = bytes.saturating_add(len);
            paging += page_in(device, array.address, len)?;
        }
        if let Some(at) = result {
            paging += page_in(device, at, 8)?;
        }
        let ns = ns.max(transfer_ns(bytes, driver.config.device_bandwidth)).saturating_add(paging);
        compute(device, ns, || self.work(user, &arrays, count, result))
    }

    fn work(&self, user: User, arrays: &[Range], count: u64, result: Option<u64>) -> Result {
        let memory = &driver()?.memory;
        let [_, _, argument, _] = self.arguments;
        let mut sum = 0u64;
        memory.pieces(user, arrays, count, |at, first, n| {
            for i in 0..n {
                let index = first + i;
                match self.kernel.body {
                    Body::Null
                    | Body::Spin
                    | Body::Work
                    | Body::AwaitU32
                    | Body::ZeroGranules
                    | Body::Fingerprints => {}
                    Body::FillU32 => store(at[0], i, argument as u32),
                    Body::IotaU64 => store(at[0], i, argument.wrapping_add(index).wrapping_mul(GOLDEN)),
                    Body::MixU64 => {
                        let x: u64 = load(at[0], i);
                        store(at[0], i, x.rotate_left(13).wrapping_mul(GOLDEN).wrapping_add(argument));
                    }
                    Body::AffineU64 => {
                        store(at[0], i, load::<u64>(at[0], i).wrapping_mul(GOLDEN).wrapping_add(argument));
                    }
                    Body::AddF32 => store(at[0], i, load::<f32>(at[1], i) + load::<f32>(at[2], i)),
                    Body::ChecksumU64 => {
                        let factor = index.wrapping_mul(2).wrapping_add(1);
                        sum = sum.wrapping_add(load::<u64>(at[0], i).wrapping_mul(factor));
                    }
                    Body::NonzeroU64 => sum += u64::from(load::<u64>(at[0], i) != 0),
                }
            }
        })?;
        match result {
            Some(at) => memory.with_word(user, at, |word| *word = sum),
            None => Ok(()),
        }
    }
}

/// Reads element `i` of a piece of an array.
fn load<T: Copy>(base: u64, i: u64) -> T {
    // SAFETY: called for elements of a piece that `Memory::pieces` vouches for while it runs.
    unsafe { (base as *const T).add(i as usize).read() }
}

/// Writes element `i` of a piece of an array.
fn store<T>(base: u64, i: u64, value: T) {
    // SAFETY: as in `load`, and the piece may be written.
    unsafe { (base as *mut T).add(i as usize).write(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_naturally_aligned() {
        let fill = Kernel::by_name("nvshare_fill_u32").unwrap();
        assert_eq!(fill.parameter(2), Some((16, 4)));
        assert_eq!(fill.parameter(3), None);
    }

    #[test]
    fn the_ptx_has_every_kernel() {
        let ptx = concat!(
            include_str!("../kernels.ptx"),
            include_str!("../../../shim/src/memory/zero_scan.ptx"),
            include_str!("../../../shim/src/memory/fingerprint.ptx")
        );
        let names = crate::module::entries(ptx);
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        assert_eq!(names, known);
    }
}
