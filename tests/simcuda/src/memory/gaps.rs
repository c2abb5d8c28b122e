//! Ranges whose memory is out: mapped once, unmapped now, and still reserved.
//!
//! A gap remembers which thread made it. Whoever takes memory away or brings it back knows that it is out, and copies
//! the rest of it meanwhile; everybody else has no business with the GPU ([`crate::watch`]).

use std::collections::BTreeMap;

use crate::driver::this_thread;

struct Gap {
    size: u64,
    made_by: usize,
}

/// The gaps of an address space, by their first address.
#[derive(Default)]
pub struct Gaps(BTreeMap<u64, Gap>);

impl Gaps {
    /// The calling thread has unmapped the range, all of which was mapped.
    pub fn open(&mut self, address: u64, size: u64) {
        self.0.insert(address, Gap { size, made_by: this_thread() });
    }

    /// The range is mapped again, or no longer reserved.
    pub fn close(&mut self, address: u64, size: u64) {
        let end = address + size;
        let met: Vec<u64> = self
            .0
            .range(..end)
            .filter(|(begin, gap)| **begin + gap.size > address)
            .map(|(begin, _)| *begin)
            .collect();
        for begin in met {
            let Some(Gap { size, made_by }) = self.0.remove(&begin) else { continue };
            if begin < address {
                self.0.insert(begin, Gap { size: address - begin, made_by });
            }
            if begin + size > end {
                self.0.insert(end, Gap { size: begin + size - end, made_by });
            }
        }
    }

    /// How many bytes other threads have taken away.
    pub fn made_by_others(&self) -> u64 {
        let me = this_thread();
        self.0.values().filter(|gap| gap.made_by != me).map(|gap| gap.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread that made none of the gaps sees.
    fn seen(gaps: &Gaps) -> u64 {
        std::thread::scope(|scope| scope.spawn(|| gaps.made_by_others()).join().unwrap())
    }

    #[test]
    fn a_gap_is_closed_by_parts_and_none_of_its_makers_business() {
        let mut gaps = Gaps::default();
        gaps.open(100, 50);
        gaps.open(200, 50);
        assert_eq!((gaps.made_by_others(), seen(&gaps)), (0, 100));
        gaps.close(110, 10);
        assert_eq!(seen(&gaps), 90);
        gaps.close(140, 70);
        assert_eq!(seen(&gaps), 70, "100 to 110, 120 to 140, 210 to 250");
        gaps.close(0, 50);
        assert_eq!(seen(&gaps), 70);
        gaps.close(0, 1000);
        assert_eq!(seen(&gaps), 0);
    }
}
