//! Atomic words that hold a packed value.
//!
//! A packed value is a struct or an enum in one 32-bit or 64-bit word: an [`Account`](crate::account::Account), a
//! [`LockWord`](crate::lock_word::LockWord), a [`Phase`](crate::page::Phase). Its type has both conversions, `From` the word and
//! back. The first one must accept every word, because any process that maps the page may write any word into it.
//!
//! **A compare-and-swap compares words and not values.** Decoding drops what the value has no field for, so a word of
//! garbage is not what its value encodes to. A compare-and-swap that expects the encoded value would fail on such a word for
//! ever, and a loop around it would never end. So [`Packed::compare_exchange`] takes what [`Packed::observe`] has seen, which
//! still has the word.

use crate::sync::{AtomicU32, AtomicU64, Ordering};
use std::fmt;
use std::marker::PhantomData;

/// An atomic integer that a [`Packed`] can be made of: [`AtomicU32`] or [`AtomicU64`], real or modelled by loom.
pub trait Atomic {
    /// The plain integer.
    type Word: Copy + Eq + Default + fmt::Debug;

    /// An atomic that holds `word`.
    fn new(word: Self::Word) -> Self;
    /// As the atomic's own `load`.
    fn load(&self, order: Ordering) -> Self::Word;
    /// As the atomic's own `store`.
    fn store(&self, word: Self::Word, order: Ordering);
    /// As the atomic's own `swap`.
    fn swap(&self, word: Self::Word, order: Ordering) -> Self::Word;
    /// As the atomic's own `compare_exchange`.
    ///
    /// # Errors
    /// The word that stood there, if that was not `current`.
    fn compare_exchange(
        &self,
        current: Self::Word,
        new: Self::Word,
        success: Ordering,
        failure: Ordering,
    ) -> Result<Self::Word, Self::Word>;
    /// As the atomic's own `compare_exchange_weak`.
    ///
    /// # Errors
    /// The word that stood there: another one than `current`, or `current` for no reason.
    fn compare_exchange_weak(
        &self,
        current: Self::Word,
        new: Self::Word,
        success: Ordering,
        failure: Ordering,
    ) -> Result<Self::Word, Self::Word>;
}

macro_rules! atomic {
    ($atomic:ty, $word:ty) => {
        impl Atomic for $atomic {
            type Word = $word;

            fn new(word: $word) -> Self {
                <$atomic>::new(word)
            }

            #[inline]
            fn load(&self, order: Ordering) -> $word {
                self.load(order)
            }

            #[inline]
            fn store(&self, word: $word, order: Ordering) {
                self.store(word, order);
            }

            #[inline]
            fn swap(&self, word: $word, order: Ordering) -> $word {
                self.swap(word, order)
            }

            #[inline]
            fn compare_exchange(
                &self,
                current: $word,
                new: $word,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$word, $word> {
                self.compare_exchange(current, new, success, failure)
            }

            #[inline]
            fn compare_exchange_weak(
                &self,
                current: $word,
                new: $word,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$word, $word> {
                self.compare_exchange_weak(current, new, success, failure)
            }
        }
    };
}

atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);

/// What an atomic word held at one moment: the value, and the word that it was decoded from. Two of them are equal if the words
/// are equal.
#[derive(Debug, Clone, Copy)]
pub struct Observed<T, W = u64> {
    /// The decoded value.
    pub value: T,
    word: W,
}

impl<T, W: PartialEq> PartialEq for Observed<T, W> {
    fn eq(&self, other: &Self) -> bool {
        self.word == other.word
    }
}

/// An atomic word that holds a `T`. It has the size, the alignment and the bytes of the atomic `A`.
#[repr(transparent)]
pub struct Packed<T, A = AtomicU64> {
    atomic: A,
    /// As a function's result: no `T` is stored, so the word may be shared between threads whatever `T` is.
    holds: PhantomData<fn() -> T>,
}

impl<T, A: Atomic> Packed<T, A>
where
    T: From<A::Word> + Into<A::Word>,
{
    /// A word that holds `value`.
    pub fn new(value: T) -> Self {
        Self { atomic: A::new(value.into()), holds: PhantomData }
    }

    /// A word whose bits are `word`, whatever value they stand for.
    pub fn of_word(word: A::Word) -> Self {
        Self { atomic: A::new(word), holds: PhantomData }
    }

    /// The atomic integer itself: for a futex on it, and for tests that write garbage.
    pub fn atomic(&self) -> &A {
        &self.atomic
    }

    /// Reads the value.
    #[inline]
    pub fn load(&self, order: Ordering) -> T {
        self.atomic.load(order).into()
    }

    /// Writes a value.
    #[inline]
    pub fn store(&self, value: T, order: Ordering) {
        self.atomic.store(value.into(), order);
    }

    /// Writes a value, and returns the one before.
    pub fn swap(&self, value: T, order: Ordering) -> T {
        self.atomic.swap(value.into(), order).into()
    }

    /// Reads the value and keeps the word that it was in, for [`Packed::compare_exchange`] or to tell later whether the word
    /// has changed.
    pub fn observe(&self, order: Ordering) -> Observed<T, A::Word> {
        Self::observed(self.atomic.load(order))
    }

    fn observed(word: A::Word) -> Observed<T, A::Word> {
        Observed { value: word.into(), word }
    }

    /// Writes `new` if the word is still the one that was `seen`.
    ///
    /// # Errors
    /// What the word holds, if that is something else. Nothing was written then.
    pub fn compare_exchange(
        &self,
        seen: &Observed<T, A::Word>,
        new: T,
        success: Ordering,
        failure: Ordering,
    ) -> Result<(), Observed<T, A::Word>> {
        let swapped = self.atomic.compare_exchange(seen.word, new.into(), success, failure);
        swapped.map(drop).map_err(Self::observed)
    }

    /// Replaces the value by what `change` makes of it. Calls `change` again whenever the word has changed in between.
    ///
    /// # Errors
    /// The value for which `change` returned `None`. Nothing was written then.
    pub fn fetch_update(
        &self,
        success: Ordering,
        failure: Ordering,
        mut change: impl FnMut(&T) -> Option<T>,
    ) -> Result<(), T> {
        let mut seen = self.observe(failure);
        while let Some(new) = change(&seen.value) {
            match self.atomic.compare_exchange_weak(seen.word, new.into(), success, failure) {
                Ok(_) => return Ok(()),
                Err(word) => seen = Self::observed(word),
            }
        }
        Err(seen.value)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::account::Free;
    use crate::page::Phase;
    use Ordering::Relaxed;

    #[test]
    fn a_packed_word_has_the_layout_of_its_atomic() {
        assert_eq!(size_of::<Packed<Free>>(), size_of::<AtomicU64>());
        assert_eq!(align_of::<Packed<Free>>(), align_of::<AtomicU64>());
        assert_eq!(size_of::<Packed<Phase, AtomicU32>>(), 4);
    }

    /// 0x80 is no slot, so the tag is read as none, which is written as 0xff.
    const GARBAGE: u64 = 0x80 << 32 | 5;

    #[test]
    fn a_word_of_garbage_can_be_replaced() {
        let word = Packed::<Free>::of_word(GARBAGE);
        assert_ne!(u64::from(word.load(Relaxed)), GARBAGE, "its value is written in another way");
        let more = |free: &Free| Some(Free { granules: free.granules + 1, tag: None });
        // By a loop that ends.
        let mut tries = 0;
        let updated = word.fetch_update(Relaxed, Relaxed, |free| {
            tries += 1;
            assert!(tries < 100, "it never finds what it has read");
            more(free)
        });
        assert_eq!((updated, word.load(Relaxed).granules), (Ok(()), 6));
        word.atomic().store(GARBAGE, Relaxed);
        let seen = word.observe(Relaxed);
        assert!(word.compare_exchange(&seen, Free { granules: 9, tag: None }, Relaxed, Relaxed).is_ok());
        assert_eq!(word.load(Relaxed).granules, 9);
    }

    #[test]
    fn a_word_that_has_changed_is_not_replaced() {
        let word = Packed::<Free>::new(Free { granules: 1, tag: None });
        let seen = word.observe(Relaxed);
        word.store(Free { granules: 2, tag: None }, Relaxed);
        assert!(word.observe(Relaxed) != seen);
        let found = word.compare_exchange(&seen, Free { granules: 3, tag: None }, Relaxed, Relaxed);
        assert_eq!(found.map_err(|found| found.value.granules), Err(2));
        assert_eq!(word.fetch_update(Relaxed, Relaxed, |_| None).map_err(|free| free.granules), Err(2));
        assert_eq!(word.swap(Free { granules: 4, tag: None }, Relaxed).granules, 2);
        assert_eq!(word.load(Relaxed).granules, 4);
    }

    #[test]
    fn two_words_of_one_value_are_told_apart() {
        let [garbage, clean] = [GARBAGE, 0xff << 32 | 5].map(Packed::<Free>::of_word);
        assert_eq!(garbage.load(Relaxed), clean.load(Relaxed));
        assert!(garbage.observe(Relaxed) != clean.observe(Relaxed));
    }
}
