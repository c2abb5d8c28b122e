//! Unified Memory: managed pages that come to the GPU when they are used.
//!
//! The bytes of managed memory are always in host memory; what is simulated is where the pages would be. A page of
//! 2 MiB is resident or not. Using one that isn't costs a fault, and if the GPU is full, also the eviction of another:
//! that of the process whose least recently used page is the oldest, and in the own process the least recently used
//! one. So a walk round and round over slightly more than what fits finds none of its pages ever again: each was
//! driven out just before its turn came, as with any true LRU.
//!
//! Pages that another process took ([`Ledger::stolen_pages`]) were the oldest ones here, and are dropped as such when
//! the owner next looks. It pays for them when it touches them again.

use std::collections::{BTreeMap, HashMap};

use simstate::counters::Count;
use simstate::ledger::{Ledger, MANAGED_PAGE, PageRoom};
use simstate::time::now_ns;

/// Which managed pages of this process are on a GPU, and in which order they were used.
#[derive(Default)]
pub struct Pager {
    resident: HashMap<u64, u64>,
    by_age: BTreeMap<u64, u64>,
    clock: u64,
}

/// What using some pages took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Pages brought to the GPU.
    pub faulted: u64,
    /// Pages driven out for them.
    pub evicted: u64,
}

fn pages(address: u64, len: u64) -> std::ops::Range<u64> {
    address / MANAGED_PAGE..address.saturating_add(len).div_ceil(MANAGED_PAGE)
}

impl Pager {
    /// A time stamp that no page has yet, comparable between processes.
    fn tick(&mut self) -> u64 {
        self.clock = now_ns().max(self.clock + 1);
        self.clock
    }

    fn insert(&mut self, page: u64) {
        let stamp = self.tick();
        if let Some(old) = self.resident.insert(page, stamp) {
            self.by_age.remove(&old);
        }
        self.by_age.insert(stamp, page);
    }

    fn remove(&mut self, page: u64) -> bool {
        match self.resident.remove(&page) {
            Some(stamp) => self.by_age.remove(&stamp).is_some(),
            None => false,
        }
    }

    fn drop_oldest(&mut self) -> bool {
        match self.by_age.pop_first() {
            Some((_, page)) => self.resident.remove(&page).is_some(),
            None => false,
        }
    }

    fn settle_stolen(&mut self, ledger: &Ledger) {
        for _ in 0..ledger.stolen_pages() {
            self.drop_oldest();
        }
    }

    fn publish(&self, ledger: &Ledger) {
        ledger.publish_oldest_page(self.by_age.first_key_value().map(|(&stamp, _)| stamp));
    }

    /// Uses the pages of a range, in order.
    pub fn touch(&mut self, ledger: &Ledger, address: u64, len: u64) -> Moved {
        let mut moved = Moved::default();
        for page in pages(address, len) {
            self.settle_stolen(ledger);
            if self.resident.contains_key(&page) {
                self.insert(page);
                self.publish(ledger);
                continue;
            }
            moved.faulted += 1;
            loop {
                match ledger.take_page() {
                    PageRoom::Free => self.insert(page),
                    PageRoom::EvictedOther => {
                        moved.evicted += 1;
                        self.insert(page);
                    }
                    PageRoom::EvictOwn => {
                        self.settle_stolen(ledger);
                        if !self.drop_oldest() {
                            // Others took the last one in this very moment.
                            continue;
                        }
                        ledger.count(Count::UmEvictions, 1);
                        moved.evicted += 1;
                        self.insert(page);
                    }
                    PageRoom::Nowhere => {}
                }
                break;
            }
            self.publish(ledger);
        }
        ledger.count(Count::UmFaults, moved.faulted);
        moved
    }

    /// Moves the pages of a range away from the GPU; says how many were there.
    pub fn evict(&mut self, ledger: &Ledger, address: u64, len: u64) -> u64 {
        self.settle_stolen(ledger);
        let mut moved = 0;
        for page in pages(address, len) {
            if self.remove(page) {
                // If others took it in this very moment, it is accounted for already.
                ledger.give_page();
                moved += 1;
            }
        }
        self.publish(ledger);
        moved
    }

    /// Forgets the pages of a range that is being freed.
    pub fn forget(&mut self, ledger: &Ledger, address: u64, len: u64) {
        self.evict(ledger, address, len);
    }
}
