//! The key with which the fingerprints of a group are taken, and how the group agrees on one.
//!
//! Each process draws a key. Two that meet show each other theirs, and the younger key gives way to the older one: so whoever joins
//! a group takes its key, and groups that meet become one. Fingerprints of another key say nothing, and are forgotten.
//!
//! Who knows the key could make two different contents that have the same fingerprint. It is shown only to processes of the same
//! user that say that they are of the group.

use bytemuck::{Pod, Zeroable};
use nvshare::sync::now;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;

/// A key. Of two keys the older one is less.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct Key {
    /// When it was drawn, CLOCK_MONOTONIC ns. Only the order counts, and that both see the same.
    drawn_at: u64,
    halves: [u64; 2],
}

impl Key {
    /// A new random key, from the system's source of randomness (which std seeds its hash maps with).
    pub fn draw() -> Self {
        let half = |which: u8| RandomState::new().hash_one(which);
        Self { drawn_at: now(), halves: [half(0), half(1)] }
    }

    /// What the kernel takes.
    pub fn halves(&self) -> [u64; 2] {
        self.halves
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Logs may be read by those who may choose data.
        write!(out, "Key(of {})", self.drawn_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_keys_the_older_one_is_less_and_neither_is_printed() {
        let (older, younger) = (Key::draw(), Key { drawn_at: u64::MAX, halves: [7777; 2] });
        assert!(older < younger);
        assert_ne!(older.halves(), Key::draw().halves());
        assert!(!format!("{younger:?}").contains("7777"));
    }
}
