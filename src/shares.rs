//! A client's shares: how much of a GPU it gets in comparison with others.
//!
//! - Its *weight* sets the length of its slices in proportion to others', and how much its usage counts ([`crate::usage`]).
//! - Its *priority* sets how soon its turn comes ([`crate::policy::enter_queue`]), and, among clients whose memory is in place, who
//!   may compute while others have work ([`crate::turns`]).
//! - Its *compute limit* is the most of the GPU's time that it may have ([`crate::turns`]).
//! - Its *memory limit* is the most memory that its allocations and its context may have. It sees a GPU of that size.
//!
//! The arbiter writes them into the client's row: at registration those that the client asks for, and later those that an
//! authorised user asks for ([`crate::change`]). As every word of a page, they can be overwritten by anybody who maps it. They
//! are read within their bounds, so a client gains no more by a lie than by asking.

use crate::units::{GRANULE, Granules, MAX_GRANULES, bytes_of, format_size, granules_in, parse_size};
use crate::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};
use std::fmt;
use std::str::FromStr;

/// How soon a client's turn comes. It moves the client's deadline by a bounded time, so no client waits for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Priority {
    /// By its own deadline.
    #[default]
    Normal = 0,
    /// Later than clients that came at the same time.
    Low = 1,
    /// Next, as soon as the running client has had its shortest slice.
    High = 2,
}

impl Priority {
    const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    /// The priority that this word stands for, if any.
    pub fn read(word: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| u32::from(*priority) == word)
    }

    /// Its name, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

/// What stands in a page is read within its bounds: what is no priority is the usual one.
impl From<u32> for Priority {
    fn from(word: u32) -> Self {
        Self::read(word).unwrap_or_default()
    }
}

impl From<Priority> for u32 {
    fn from(priority: Priority) -> Self {
        priority as Self
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A text that is not a weight, a priority or a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// It is not a weight.
    #[error("'{0}' is not a weight: write a whole number from 1 to {MAX_WEIGHT}; {DEFAULT_WEIGHT} is usual")]
    Weight(String),
    /// It is not a priority.
    #[error("'{0}' is not a priority: write low, normal or high")]
    Priority(String),
    /// It is not a memory limit.
    #[error(
        "'{0}' is not a memory limit: write a size of 2MiB or more, such as 8GiB, a part of the GPU, such as 25%, or none"
    )]
    MemoryLimit(String),
    /// It is not a compute limit.
    #[error(
        "'{0}' is not a compute limit: write a part of the GPU's time from 1% to 100%, such as 30%, or none"
    )]
    ComputeLimit(String),
}

/// Reads a weight.
///
/// # Errors
/// It is no whole number, or out of bounds.
pub fn parse_weight(text: &str) -> Result<u32, ShareError> {
    let number = text.trim().parse().ok().filter(|weight| (1..=MAX_WEIGHT).contains(weight));
    number.ok_or_else(|| ShareError::Weight(text.to_owned()))
}

impl FromStr for Priority {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let found = Self::ALL.into_iter().find(|priority| priority.name() == text.trim());
        found.ok_or_else(|| ShareError::Priority(text.to_owned()))
    }
}

/// The whole of a pool, in the unit of [`MemoryLimit::Part`]: millionths.
const WHOLE: u32 = 1_000_000;

/// In a limit's word: the limit is a part of the pool, in the low bits.
const PART: u64 = 1 << 63;

/// The most memory that a client may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryLimit {
    /// No limit: the whole pool.
    #[default]
    None,
    /// This many granules, at least one.
    Size(Granules),
    /// This many millionths of the pool, at least one. It grows and shrinks with the pool.
    Part(u32),
}

impl MemoryLimit {
    /// The limit in granules, in a pool of this capacity; `None` without a limit.
    pub fn granules(self, capacity: Granules) -> Option<Granules> {
        match self {
            Self::None => None,
            Self::Size(granules) => Some(granules),
            Self::Part(part) => Some((u64::from(capacity) * u64::from(part) / u64::from(WHOLE)) as Granules),
        }
    }

    /// The granules that a client with this limit sees of a pool of this capacity.
    pub fn within(self, capacity: Granules) -> Granules {
        self.granules(capacity).unwrap_or(capacity).min(capacity)
    }

    /// The limit that this word stands for, if any.
    pub fn read(word: u64) -> Option<Self> {
        let limit = Self::from(word);
        (u64::from(limit) == word).then_some(limit)
    }
}

/// What stands in a page is read within its bounds.
impl From<u64> for MemoryLimit {
    fn from(word: u64) -> Self {
        match word {
            0 => Self::None,
            part if part & PART != 0 => Self::Part((part & !PART).clamp(1, u64::from(WHOLE)) as u32),
            size => Self::Size(size.min(u64::from(MAX_GRANULES)) as Granules),
        }
    }
}

impl From<MemoryLimit> for u64 {
    fn from(limit: MemoryLimit) -> Self {
        match limit {
            MemoryLimit::None => 0,
            MemoryLimit::Size(granules) => granules.into(),
            MemoryLimit::Part(part) => PART | Self::from(part),
        }
    }
}

impl FromStr for MemoryLimit {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let fail = || ShareError::MemoryLimit(text.to_owned());
        let trimmed = text.trim();
        if trimmed == "none" {
            return Ok(Self::None);
        }
        if let Some(number) = trimmed.strip_suffix('%') {
            let percent: f64 = number.trim().parse().map_err(|_| fail())?;
            let part = (percent * f64::from(WHOLE) / 100.0).round();
            return if (1.0..=f64::from(WHOLE)).contains(&part) {
                Ok(Self::Part(part as u32))
            } else {
                Err(fail())
            };
        }
        match parse_size(trimmed) {
            Ok(bytes) if bytes >= GRANULE => Ok(Self::Size(granules_in(bytes))),
            _ => Err(fail()),
        }
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => out.write_str("none"),
            Self::Size(granules) => out.write_str(&format_size(bytes_of(*granules))),
            Self::Part(part) => write!(out, "{}%", f64::from(*part) * 100.0 / f64::from(WHOLE)),
        }
    }
}

/// The most GPU time that a client may have, of any two seconds. A word of it is the limit in millionths; 0: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeLimit {
    /// No limit.
    #[default]
    None,
    /// This many millionths of the time, at least [`ComputeLimit::LEAST`] and at most the whole.
    Part(u32),
}

impl ComputeLimit {
    /// The least limit, in millionths: 1 %.
    pub const LEAST: u32 = WHOLE / 100;

    /// The limit in millionths, if it is one: the whole is none.
    pub fn millionths(self) -> Option<u32> {
        match self {
            Self::Part(part) if part < WHOLE => Some(part.max(Self::LEAST)),
            _ => None,
        }
    }

    /// The limit that this word stands for, if any.
    pub fn read(word: u32) -> Option<Self> {
        let limit = Self::from(word);
        (u32::from(limit) == word).then_some(limit)
    }
}

/// What stands in a page is read within its bounds.
impl From<u32> for ComputeLimit {
    fn from(word: u32) -> Self {
        if word == 0 { Self::None } else { Self::Part(word.clamp(Self::LEAST, WHOLE)) }
    }
}

impl From<ComputeLimit> for u32 {
    fn from(limit: ComputeLimit) -> Self {
        match limit {
            ComputeLimit::None => 0,
            ComputeLimit::Part(part) => part,
        }
    }
}

impl FromStr for ComputeLimit {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let trimmed = text.trim();
        if trimmed == "none" {
            return Ok(Self::None);
        }
        let percent = trimmed.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        let part = percent.map(|percent| (percent * f64::from(WHOLE) / 100.0).round());
        let part = part.filter(|part| (f64::from(Self::LEAST)..=f64::from(WHOLE)).contains(part));
        part.map(|part| Self::Part(part as u32)).ok_or_else(|| ShareError::ComputeLimit(text.to_owned()))
    }
}

impl fmt::Display for ComputeLimit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => out.write_str("none"),
            Self::Part(part) => write!(out, "{}%", f64::from(*part) * 100.0 / f64::from(WHOLE)),
        }
    }
}

/// A client's shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Its weight, 1 to [`MAX_WEIGHT`].
    pub weight: u32,
    /// Its priority.
    pub priority: Priority,
    /// The most memory that it may have.
    pub memory_limit: MemoryLimit,
    /// The most GPU time that it may have.
    pub compute_limit: ComputeLimit,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            weight: DEFAULT_WEIGHT,
            priority: Priority::default(),
            memory_limit: MemoryLimit::default(),
            compute_limit: ComputeLimit::default(),
        }
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weight, priority, memory_limit, compute_limit } = self;
        write!(
            out,
            "weight {weight}, priority {priority}, memory limit {memory_limit}, compute limit {compute_limit}"
        )
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_people_write_is_understood() {
        assert_eq!(parse_weight(" 300 "), Ok(300));
        assert_eq!("high".parse(), Ok(Priority::High));
        for (text, limit) in [
            ("8GiB", MemoryLimit::Size(4096)),
            ("2097152", MemoryLimit::Size(1)),
            // Down to whole granules: never more than was said.
            ("5MiB", MemoryLimit::Size(2)),
            ("25%", MemoryLimit::Part(250_000)),
            (" 12.5 %", MemoryLimit::Part(125_000)),
            ("100%", MemoryLimit::Part(WHOLE)),
            ("none", MemoryLimit::None),
        ] {
            assert_eq!(text.parse(), Ok(limit), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_what_would_is_said() {
        for text in ["", "0", "1001", "-1", "10.5", "heavy", "4294967396"] {
            let error = parse_weight(text).unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("1 to 1000"), "{error}");
        }
        for text in ["", "HIGH", "highest", "2"] {
            let error = text.parse::<Priority>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("low, normal or high"), "{error}");
        }
        for (text, limit) in [
            ("30%", ComputeLimit::Part(300_000)),
            (" 12.5 %", ComputeLimit::Part(125_000)),
            ("100%", ComputeLimit::Part(WHOLE)),
            ("none", ComputeLimit::None),
        ] {
            assert_eq!(text.parse(), Ok(limit), "{text}");
        }
        for text in ["", "0", "30", "0%", "0.9%", "101%", "-5%", "nan%", "inf%", "%", "8GiB"] {
            let error = text.parse::<ComputeLimit>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("30%"), "{error}");
        }
        for text in ["", "0", "2097151", "0%", "101%", "-5%", "nan%", "inf%", "%", "8 parsecs", "unlimited"] {
            let error = text.parse::<MemoryLimit>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("8GiB"), "{error}");
        }
    }

    #[test]
    fn a_part_follows_the_pool_and_a_size_does_not() {
        assert_eq!(MemoryLimit::Part(250_000).within(100), 25);
        assert_eq!(MemoryLimit::Part(250_000).within(50), 12);
        assert_eq!(MemoryLimit::Size(60).within(100), 60);
        assert_eq!(MemoryLimit::Size(60).within(50), 50, "no more than there is");
        assert_eq!(MemoryLimit::None.within(50), 50);
        assert_eq!(MemoryLimit::Part(WHOLE).within(MAX_GRANULES), MAX_GRANULES);
    }

    proptest! {
        /// Whatever stands in a page is a limit, and one that a message may carry.
        #[test]
        fn a_limit_of_garbage_is_within_its_bounds(word: u64, capacity in 0..=MAX_GRANULES) {
            let limit = MemoryLimit::from(word);
            prop_assert_eq!(MemoryLimit::read(limit.into()), Some(limit));
            prop_assert!(limit.within(capacity) <= capacity);
        }

        #[test]
        fn a_compute_limit_of_garbage_is_within_its_bounds(word: u32) {
            let limit = ComputeLimit::from(word);
            prop_assert_eq!(ComputeLimit::read(limit.into()), Some(limit));
            prop_assert!(limit.millionths().is_none_or(|part| (ComputeLimit::LEAST..WHOLE).contains(&part)));
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
        }

        /// What is shown can be written again.
        #[test]
        fn a_part_is_shown_as_it_is_written(part in 1..=WHOLE) {
            let limit = MemoryLimit::Part(part);
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
        }
    }
}
