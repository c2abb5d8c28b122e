//! The data of the examples: words that are mixed step by step, and what each of them must be in the end.

/// Words of 8 bytes in a chunk of one granule.
pub const WORDS: usize = nvshare::GRANULE as usize / 8;

const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// What a chunk holds at first. No word of any chunk of any seed is like another.
pub fn first(seed: u64, chunk: usize) -> impl Iterator<Item = u64> {
    let first = (seed << 40) | ((chunk as u64) << 24);
    (0..WORDS as u64).map(move |at| (first + at).wrapping_mul(FACTOR))
}

/// One step. The steps do not commute, so a chunk that has missed one, or had one twice, is wrong in every word.
pub fn mix(word: u64, step: u64) -> u64 {
    word.wrapping_mul(FACTOR).wrapping_add(step)
}

/// All steps so far at once: a word times `factor` plus `offset`.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    factor: u64,
    offset: u64,
    /// How many.
    pub count: u64,
}

impl Default for Steps {
    fn default() -> Self {
        Self { factor: 1, offset: 0, count: 0 }
    }
}

impl Steps {
    /// One more, whose number is the count before.
    pub fn step(&mut self) {
        self.factor = self.factor.wrapping_mul(FACTOR);
        self.offset = mix(self.offset, self.count);
        self.count += 1;
    }

    /// Checks a chunk.
    ///
    /// # Errors
    /// Which word is wrong.
    pub fn check(&self, seed: u64, chunk: usize, found: &[u64]) -> Result<(), String> {
        if found.len() != WORDS {
            return Err(format!("chunk {chunk} has {} words instead of {WORDS}", found.len()));
        }
        let expected =
            first(seed, chunk).map(|word| word.wrapping_mul(self.factor).wrapping_add(self.offset));
        match found.iter().zip(expected).position(|(found, expected)| *found != expected) {
            None => Ok(()),
            Some(at) => Err(format!("word {at} of chunk {chunk} is wrong after {} steps", self.count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_that_missed_a_step_is_found() {
        let mut steps = Steps::default();
        let mut words: Vec<_> = first(3, 1).collect();
        for step in 0..5 {
            assert_eq!(steps.check(3, 1, &words), Ok(()));
            words.iter_mut().for_each(|word| *word = mix(*word, step));
            assert!(steps.check(3, 1, &words).is_err());
            steps.step();
        }
        words[17] ^= 1;
        assert!(steps.check(3, 1, &words).unwrap_err().starts_with("word 17 of chunk 1"));
        assert!(steps.check(3, 1, &words[1..]).is_err());
    }
}
