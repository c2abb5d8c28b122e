//! What a measurement prints.

use serde::{Deserialize, Serialize};

/// One figure, as `--json` prints it: these keys and no others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// In what.
    pub unit: String,
    /// How many samples there were.
    pub n: u64,
    /// Half of them were at most this.
    pub p50: f64,
    /// 99 of 100 were.
    pub p99: f64,
    /// All were.
    pub max: f64,
}

impl Row {
    /// Of samples, in any order. No samples give zeros.
    pub fn of(name: &str, unit: &str, mut samples: Vec<f64>) -> Self {
        samples.sort_unstable_by(f64::total_cmp);
        Self {
            name: name.into(),
            unit: unit.into(),
            n: samples.len() as u64,
            p50: percentile(&samples, 50),
            p99: percentile(&samples, 99),
            max: percentile(&samples, 100),
        }
    }

    /// Of a single figure, which `n` events went into.
    pub fn single(name: &str, unit: &str, n: u64, value: f64) -> Self {
        Self { name: name.into(), unit: unit.into(), n, p50: value, p99: value, max: value }
    }

    /// The row as a line of JSON.
    pub fn json(&self) -> String {
        let rounded =
            Self { p50: round(self.p50), p99: round(self.p99), max: round(self.max), ..self.clone() };
        serde_json::to_string(&rounded).expect("a row is plain data")
    }
}

fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// The least sample that at least `percent` of 100 samples do not exceed; of sorted ones.
pub fn percentile(sorted: &[f64], percent: u64) -> f64 {
    let rank = (sorted.len() as u64 * percent).div_ceil(100).max(1) as usize;
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(
            (percentile(&samples, 50), percentile(&samples, 99), percentile(&samples, 100)),
            (100.0, 198.0, 200.0)
        );
        assert_eq!((percentile(&[7.0], 50), percentile(&[7.0], 99)), (7.0, 7.0));
        assert_eq!(percentile(&[], 99), 0.0);
    }

    #[test]
    fn a_row_sorts_what_it_is_given() {
        let row = Row::of("x", "ns", vec![3.0, 1.0, 2.0]);
        assert_eq!((row.n, row.p50, row.p99, row.max), (3, 2.0, 3.0, 3.0));
    }

    #[test]
    fn json_has_these_keys_and_no_others() {
        let line = Row::of("handoff", "ns", vec![1.23456]).json();
        assert_eq!(line, r#"{"name":"handoff","unit":"ns","n":1,"p50":1.235,"p99":1.235,"max":1.235}"#);
    }
}
