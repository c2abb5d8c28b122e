//! Units: granules of GPU memory, nanoseconds, sizes and times as people write them, UUIDs of GPUs.

use std::fmt;
use std::str::FromStr;

/// Bytes in a granule, the pool's unit: the smallest piece that CUDA's virtual memory management maps
/// (cuMemGetAllocationGranularity).
pub const GRANULE: u64 = 2 << 20;

/// The most granules that one pool or one client can hold (2 TiB): what a field of the [account](crate::account) can hold.
pub const MAX_GRANULES: u32 = (1 << 20) - 1;

/// A count of granules. Never more than [`MAX_GRANULES`] where it comes from a page.
pub type Granules = u32;

/// A time on CLOCK_MONOTONIC, or a span of it, in nanoseconds.
pub type Nanos = u64;

/// Nanoseconds in a millisecond.
pub const MILLISECOND: Nanos = 1_000_000;
/// Nanoseconds in a second.
pub const SECOND: Nanos = 1_000_000_000;

/// How many granules hold `bytes`: rounded up, at most [`MAX_GRANULES`].
pub fn granules_for(bytes: u64) -> Granules {
    bytes.div_ceil(GRANULE).min(u64::from(MAX_GRANULES)) as Granules
}

/// How many whole granules are in `bytes`: rounded down, at most [`MAX_GRANULES`].
pub fn granules_in(bytes: u64) -> Granules {
    (bytes / GRANULE).min(u64::from(MAX_GRANULES)) as Granules
}

/// The bytes in `granules`.
pub fn bytes_of(granules: Granules) -> u64 {
    u64::from(granules) * GRANULE
}

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a size: write a number and a unit, such as 14.9GiB, 512MiB or 4096 (bytes)")]
pub struct SizeError {
    text: String,
}

/// Reads a size in bytes: a number, decimals allowed, and a unit.
///
/// Binary units are `K M G T`, with or without `iB`; decimal ones are `KB MB GB TB`. No unit means bytes.
///
/// # Errors
/// The text is no such number, is negative, or does not fit in 64 bits.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let fail = || SizeError { text: text.to_owned() };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(fail()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(fail);
    }
    let value = number.parse::<f64>().map_err(|_| fail())? * scale as f64;
    // Below 2^63, so that the conversion cannot overflow.
    if value.is_finite() && (0.0..9.2e18).contains(&value) { Ok(value as u64) } else { Err(fail()) }
}

/// A size in bytes, written for people: `11.69 GiB`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// A text that is not a span of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a time: write a number and a unit, one of ns, us, ms, s, min, h, d, such as 500ms, 1.5s or 2min"
)]
pub struct TimeError {
    text: String,
}

/// The longest span of time that is read, in ns: thirty years, so that the sum of a few does not overflow.
const LONGEST: f64 = 1e18;

/// `time`, ns, times `by`, divided by `of`, or by 1 if that is 0; [`Nanos::MAX`] if it is more than that.
pub fn scaled(time: Nanos, by: u64, of: u64) -> Nanos {
    let scaled = u128::from(time) * u128::from(by) / u128::from(of.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// Reads a span of time and returns ns: a number, decimals allowed, and a unit, `ns us ms s min h d` (`m` is a minute too).
///
/// # Errors
/// The text is no such number, has no unit, or means more than thirty years.
pub fn parse_time(text: &str) -> Result<Nanos, TimeError> {
    let fail = || TimeError { text: text.to_owned() };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(fail)?;
    let (number, unit) = trimmed.split_at(split);
    let scale = match unit.trim() {
        "ns" => 1,
        "us" => 1_000,
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" | "min" => 60 * SECOND,
        "h" => 3_600 * SECOND,
        "d" => 86_400 * SECOND,
        _ => return Err(fail()),
    };
    let ns = number.parse::<f64>().map_err(|_| fail())? * scale as f64;
    if ns <= LONGEST { Ok(ns.round() as Nanos) } else { Err(fail()) }
}

/// A span of time in ns, written for people: `12.3 ms`.
pub fn format_nanos(ns: Nanos) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..MILLISECOND => format!("{:.1} us", ns as f64 / 1e3),
        MILLISECOND..SECOND => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// A GPU's UUID, as `nvidia-smi -L` prints it: `GPU-` (or `MIG-`) and 32 hex digits in five groups.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuUuid(pub [u8; 16]);

/// A text that is not a GPU's UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a GPU UUID: `nvidia-smi -L` lists them, such as GPU-8ac1f0c2-...")]
pub struct UuidError {
    text: String,
}

impl FromStr for GpuUuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let fail = || UuidError { text: text.to_owned() };
        let body = text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-")).ok_or_else(fail)?;
        let groups: Vec<&str> = body.split('-').collect();
        if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12]) {
            return Err(fail());
        }
        let digits = groups.concat();
        // from_str_radix alone would take a plus sign for half a byte.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(fail());
        }
        let mut bytes = [0; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).map_err(|_| fail())?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for GpuUuid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("GPU-")?;
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                out.write_str("-")?;
            }
            write!(out, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for GpuUuid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        assert_eq!(parse_time("500ms"), Ok(500 * MILLISECOND));
        assert_eq!(parse_time(" 1.5 s "), Ok(1_500 * MILLISECOND));
        assert_eq!(parse_time("3.08ms"), Ok(3_080_000));
        assert_eq!(parse_time("0s"), Ok(0));
        assert_eq!(parse_time("1m"), parse_time("1min"));
        assert_eq!(parse_time("1d"), Ok(24 * 60 * 60 * SECOND));
        for bad in ["", "5", "-1s", "s", ".s", "1.2.3s", "1 parsec", "1e9s", "99999999999s", "1M"] {
            assert!(parse_time(bad).unwrap_err().to_string().contains(&format!("'{bad}'")), "{bad}");
        }
    }

    #[test]
    fn sizes_as_people_write_them() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size(" 2 M "), Ok(2 << 20));
        assert_eq!(parse_size("1.5k"), Ok(1536));
        assert_eq!(parse_size("2GB"), Ok(2_000_000_000));
        for bad in ["", "GiB", "-1", "1.2.3", "12 parsecs", "99999999999T", "nan", "1e400", "inf"] {
            let error = parse_size(bad).expect_err(bad);
            assert!(error.to_string().contains(&format!("'{bad}'")), "{error}");
        }
    }

    #[test]
    fn granules_round_up() {
        assert_eq!(granules_for(0), 0);
        assert_eq!(granules_for(1), 1);
        assert_eq!(granules_for(GRANULE), 1);
        assert_eq!(granules_for(GRANULE + 1), 2);
        assert_eq!(granules_for(u64::MAX), MAX_GRANULES);
    }

    #[test]
    fn uuids_round_trip() {
        let text = "GPU-8ac1f0c2-0123-4567-89ab-cdef01234567";
        assert_eq!(text.parse::<GpuUuid>().unwrap().to_string(), text);
        for bad in [
            "",
            "8ac1f0c2-0123-4567-89ab-cdef01234567",
            "GPU-8ac1f0c2",
            "GPU-zac1f0c2-0123-4567-89ab-cdef01234567",
            "GPU-+ac1f0c2-0123-4567-89ab-cdef01234567",
            "GPU-éac1f0c-0123-4567-89ab-cdef01234567",
        ] {
            assert!(bad.parse::<GpuUuid>().is_err(), "{bad}");
        }
    }
}
