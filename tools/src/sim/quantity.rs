//! Amounts in a scenario: a number and a unit, so that no reader has to guess; and amounts by chance.

use super::random::Chance;
use nvshare::units::{Nanos, SECOND, parse_size, parse_time};
use serde::Deserialize;

/// A time, such as `"39ms"`, in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Time(pub Nanos);

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_time(&text).map(Self).map_err(|error| error.to_string())
    }
}

/// A size, such as `"11968MiB"`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_size(&text).map(Self).map_err(|error| error.to_string())
    }
}

/// A rate, such as `"11.2GiB"` (a second), in bytes a second; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate(pub u64);

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match parse_size(text.trim_end_matches("/s")) {
            Ok(0) => Err("a rate above 0 expected".into()),
            Ok(rate) => Ok(Self(rate)),
            Err(_) => {
                Err(format!("'{text}' is not a rate: expected a size for a second, such as \"11.2GiB/s\""))
            }
        }
    }
}

impl Rate {
    /// How long so many bytes take, ns.
    pub fn time(self, bytes: u64) -> Nanos {
        let ns = u128::from(bytes) * u128::from(SECOND) / u128::from(self.0);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// A time that may be by chance.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(
    untagged,
    expecting = "a time such as \"36s\", or {exponential = MEAN}, {uniform = [LEAST, MOST]} or {lognormal = MEDIAN, sigma = NUMBER}"
)]
pub enum Span {
    /// Always this.
    Always(Time),
    /// By chance.
    Chance(Distribution),
}

/// How a time is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Distribution {
    Exponential { exponential: Time },
    Uniform { uniform: (Time, Time) },
    Lognormal { lognormal: Time, sigma: f64 },
}

impl Span {
    /// One of them.
    pub fn draw(&self, chance: &mut Chance) -> Nanos {
        match *self {
            Self::Always(time) => time.0,
            Self::Chance(Distribution::Exponential { exponential }) => chance.exponential(exponential.0),
            Self::Chance(Distribution::Uniform { uniform: (least, most) }) => {
                least.0 + (chance.unit() * most.0.saturating_sub(least.0) as f64) as Nanos
            }
            Self::Chance(Distribution::Lognormal { lognormal, sigma }) => {
                (lognormal.0 as f64 * (sigma * chance.normal()).exp()).min(1e18) as Nanos
            }
        }
    }
}
