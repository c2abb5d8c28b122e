//! Quantities as Kubernetes writes them: `16Gi`, `15258Mi`, `10`, `1500m`.
//!
//! The API server writes a quantity in a form of its own (`1024Ki` comes back as `1Mi`), so quantities are compared as numbers.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// The suffixes: thousandths and so on up to exa, decimal and binary. Each is a power of ten or of two.
const DECIMAL: [(&str, i32); 9] =
    [("n", -9), ("u", -6), ("m", -3), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
const BINARY: [(&str, u32); 6] = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40), ("Pi", 50), ("Ei", 60)];

/// The whole number that a quantity is, or the next larger one, as Kubernetes rounds. `None`: it is no quantity, is negative, or
/// does not fit into 63 bits.
pub fn whole(quantity: &Quantity) -> Option<u64> {
    let text = quantity.0.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (tens, twos) = scale(suffix)?;
    let number = number.strip_prefix('+').unwrap_or(number);
    let (before, after) = number.split_once('.').unwrap_or((number, ""));
    if before.is_empty() && after.is_empty() || before.contains('+') || after.contains(['.', '+']) {
        return None;
    }
    let digits: u128 = format!("{before}{after}").parse().ok()?;
    let tens = tens.checked_sub(i32::try_from(after.len()).ok()?)?;
    let power = |exponent: u32| 10u128.checked_pow(exponent);
    let value = digits.checked_mul(1u128 << twos)?;
    let value = match tens {
        0.. => value.checked_mul(power(tens.unsigned_abs())?)?,
        _ => power(tens.unsigned_abs()).map_or(value.min(1), |divisor| value.div_ceil(divisor)),
    };
    u64::try_from(value).ok().filter(|value| i64::try_from(*value).is_ok())
}

/// The powers of ten and of two that a suffix stands for.
fn scale(suffix: &str) -> Option<(i32, u32)> {
    if suffix.is_empty() {
        return Some((0, 0));
    }
    if let Some((_, tens)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some((*tens, 0));
    }
    if let Some((_, twos)) = BINARY.iter().find(|(name, _)| *name == suffix) {
        return Some((0, *twos));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let exponent: i32 = exponent.parse().ok()?;
    (-64..=64).contains(&exponent).then_some((exponent, 0))
}

/// A number without unit, as a quantity.
pub fn plain(number: u64) -> Quantity {
    Quantity(number.to_string())
}

/// A size in bytes, as a quantity in the largest binary unit that leaves a whole number.
pub fn bytes(mut number: u64) -> Quantity {
    let mut unit = "";
    for (name, _) in BINARY {
        if number == 0 || !number.is_multiple_of(1024) {
            break;
        }
        number /= 1024;
        unit = name;
    }
    Quantity(format!("{number}{unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Option<u64> {
        whole(&Quantity(text.into()))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in [
            ("0", 0),
            ("10", 10),
            ("+5", 5),
            ("16Gi", 16 << 30),
            ("14.5Gi", 29 << 29),
            ("1k", 1_000),
            ("2M", 2_000_000),
            ("1500m", 2),
            ("1n", 1),
            ("0.1", 1),
            (".5Mi", 1 << 19),
            ("5.", 5),
            ("12e3", 12_000),
            ("12E-1", 2),
            ("1e-60", 1),
            ("7E", 7_000_000_000_000_000_000),
        ] {
            assert_eq!(read(text), Some(value), "{text}");
        }
        for bad in [
            "", "Gi", "-1", "8GiB", "1 Gi", "1..2", "1+1", "nonsense", "10E", "8Ei", "1e", "1e+", "1e99", ".",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(number in 0..=i64::MAX as u64, twos in 0u32..63) {
            let number = number >> twos << twos;
            prop_assert_eq!(whole(&bytes(number)), Some(number));
            prop_assert_eq!(whole(&plain(number)), Some(number));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "([0-9]{19,20}|[-+]?[0-9]{0,25})\\.?[0-9]{0,5}(e[-+]?[0-9]{1,3}|[KMGTPE]i|[numkMGTPE])?|\\PC{0,8}") {
            prop_assert!(read(&text).is_none_or(|value| i64::try_from(value).is_ok()));
        }
    }
}
