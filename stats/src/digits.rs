//! Figures for people: three significant digits, and the unit that suits them.

/// Three significant digits, without an exponent: `27.2`, `0.0312`. Digits before the point are all there.
pub fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let exponent = |value: f64| value.abs().log10().floor() as i32;
    // 9.996 is 10.0, not 10.00: the digits are counted after rounding.
    let scale = 10f64.powi(2 - exponent(value));
    let rounded = (value * scale).round() / scale;
    let decimals = (2 - exponent(rounded)).max(0) as usize;
    format!("{value:.decimals$}")
}

/// A time: `3.08 ms`, `53.8 s`, `2.36 h`.
pub fn time(seconds: f64) -> String {
    /// Each with its length in seconds, and the time from which on the next one is used.
    const UNITS: [(&str, f64, f64); 6] = [
        ("ns", 1e-9, 1e-6),
        ("us", 1e-6, 1e-3),
        ("ms", 1e-3, 1.0),
        ("s", 1.0, 1_000.0),
        ("min", 60.0, 6_000.0),
        ("h", 3_600.0, f64::INFINITY),
    ];
    if seconds == 0.0 {
        return "0 s".into();
    }
    // What would be rounded up to the next unit is written in it.
    let suits = |(_, _, below): &&(&str, f64, f64)| seconds.abs() < below * 0.9995;
    let (unit, length, _) = UNITS.iter().find(suits).unwrap_or(&UNITS[5]);
    format!("{} {unit}", significant(seconds / length))
}

/// A rate of events: `27.2/s`.
pub fn rate(per_second: f64) -> String {
    format!("{}/s", significant(per_second))
}

/// A rate of bytes: `11.2 GiB/s`.
pub fn bandwidth(bytes_per_second: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes_per_second as f64;
    let mut unit = 0;
    while value >= 1_023.5 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    format!("{} {}/s", significant(value), UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_significant_digits() {
        let figures = [0.0, 0.01234, 0.9996, 1.0, 9.996, 27.170957645, 99.96, 123.4, 5432.1, -2.345];
        let expected = ["0", "0.0123", "1.00", "1.00", "10.0", "27.2", "100", "123", "5432", "-2.35"];
        assert_eq!(figures.map(significant), expected);
        assert_eq!(rate(27.170957645), "27.2/s");
    }

    #[test]
    fn times_and_rates_have_the_unit_that_suits_them() {
        let times = [0.0, 3e-9, 2.5e-6, 0.0030812, 0.99996, 53.842, 113.0, 1_894.0, 14_295.0];
        let expected =
            ["0 s", "3.00 ns", "2.50 us", "3.08 ms", "1.00 s", "53.8 s", "113 s", "31.6 min", "3.97 h"];
        assert_eq!(times.map(time), expected);
        let rates = [0, 512, 240_000_000, 12_000_000_000, (1 << 30) - 1];
        assert_eq!(rates.map(bandwidth), ["0 B/s", "512 B/s", "229 MiB/s", "11.2 GiB/s", "1.00 GiB/s"]);
    }
}
