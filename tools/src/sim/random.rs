//! Chance that comes out the same every time: PCG-64/32 (O'Neill's `pcg32`), a stream for each use.

use nvshare::units::Nanos;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;

/// A stream of chance.
#[derive(Debug, Clone)]
pub struct Chance(Pcg32);

impl Chance {
    /// The stream `stream` of `seed`. Streams know nothing of one another, so that a scenario's classes don't either.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(Pcg32::new(seed, stream))
    }

    /// At least 0 and less than 1.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of so many.
    pub fn below(&mut self, many: usize) -> usize {
        ((self.unit() * many as f64) as usize).min(many.saturating_sub(1))
    }

    /// The distance of two events of a Poisson process.
    pub fn exponential(&mut self, mean: Nanos) -> Nanos {
        (-(1.0 - self.unit()).ln() * mean as f64) as Nanos
    }

    /// Normal, of mean 0 and deviation 1 (Box and Muller's).
    pub fn normal(&mut self) -> f64 {
        let (radius, angle) = (1.0 - self.unit(), self.unit());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_what_was_asked_for() {
        let mut chance = Chance::new(7, 1);
        const N: usize = 100_000;
        let mean = |draw: &mut dyn FnMut() -> f64| (0..N).map(|_| draw()).sum::<f64>() / N as f64;
        assert!((mean(&mut || chance.unit()) - 0.5).abs() < 0.01);
        assert!((mean(&mut || chance.exponential(1_000_000) as f64) / 1e6 - 1.0).abs() < 0.02);
        assert!(mean(&mut || chance.normal()).abs() < 0.02);
        assert!((mean(&mut || chance.normal().powi(2)) - 1.0).abs() < 0.03);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let draw = |seed, stream| Chance::new(seed, stream).unit();
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
    }
}
