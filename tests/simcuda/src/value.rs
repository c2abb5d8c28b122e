//! Values in memory that streams and kernels wait for, or write.
//!
//! Whoever waits occupies no engine: a kernel that spins takes one multiprocessor of many.

use std::time::Duration;

use crate::abi::{Error, Result};
use crate::context::Core;
use crate::driver::driver;

/// Between two looks.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// A word of 32 or 64 bits, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    pub address: u64,
    pub value: u64,
    pub wide: bool,
}

/// When a wait is over (`CUstreamWaitValue_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Cyclically greater, or equal.
    AtLeast,
    Equal,
    /// A bit of it is set.
    And,
    /// A bit of it is clear in both.
    Nor,
}

impl Condition {
    /// What flags say. To flush writes of other devices is not supported.
    pub fn of(flags: u32) -> Result<Self> {
        const FLUSH: u32 = 1 << 30;
        match flags & !FLUSH {
            _ if flags & FLUSH != 0 => Err(Error::NOT_SUPPORTED),
            0 => Ok(Self::AtLeast),
            1 => Ok(Self::Equal),
            2 => Ok(Self::And),
            3 => Ok(Self::Nor),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    fn holds(self, found: u64, value: Value) -> bool {
        let wanted = value.value;
        match self {
            Self::AtLeast if value.wide => found.wrapping_sub(wanted) as i64 >= 0,
            Self::AtLeast => (found as u32).wrapping_sub(wanted as u32) as i32 >= 0,
            Self::Equal => found == wanted,
            Self::And => found & wanted != 0,
            Self::Nor if value.wide => !(found | wanted) != 0,
            Self::Nor => !(found | wanted) as u32 != 0,
        }
    }
}

impl Value {
    pub fn bytes(self) -> u64 {
        if self.wide { 8 } else { 4 }
    }

    /// Waits until the memory there fulfils the condition, or the context has failed.
    pub fn wait(self, core: &Core, condition: Condition) -> Result {
        let memory = &driver()?.memory;
        while core.healthy().is_ok() {
            if condition.holds(memory.read_word(core.user(), self.address, self.wide)?, self) {
                break;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Writes it.
    pub fn write(self, core: &Core) -> Result {
        driver()?.memory.write_word(core.user(), self.address, self.value, self.wide)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_those_of_the_driver() {
        let narrow = |value| Value { address: 0, value, wide: false };
        let wide = |value| Value { wide: true, ..narrow(value) };
        let condition = |flags| Condition::of(flags).unwrap();
        assert!(condition(0).holds(7, narrow(7)) && condition(0).holds(3, narrow(0xffff_fff0)));
        assert!(!condition(0).holds(6, narrow(7)) && !condition(0).holds(3, wide(0xffff_fff0)));
        assert!(condition(1).holds(7, wide(7)) && !condition(1).holds(8, narrow(7)));
        assert!(condition(2).holds(6, narrow(2)) && !condition(2).holds(6, narrow(1)));
        assert!(condition(3).holds(1, narrow(2)) && !condition(3).holds(0xffff_fffe, narrow(1)));
        assert!(condition(3).holds(0xffff_fffe, wide(1)), "the upper half is clear");
        assert_eq!(
            (Condition::of(4), Condition::of(1 << 30)),
            (Err(Error::INVALID_VALUE), Err(Error::NOT_SUPPORTED))
        );
    }
}
