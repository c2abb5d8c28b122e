//! A runtime on plain memory: what it has "on the GPU" is a box that exists only while the granule for it is taken.

use crate::data::{self, Steps};
use nvshare::map::MappedPage;
use nvshare::page::Direction;
use nvshare::{Books, Fill, GRANULE, Granules, client};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One granule's data.
enum Chunk {
    OnGpu(Box<[u64]>),
    Evicted(Vec<u64>),
}

/// The program's memory. Clones are the same memory: one is the runtime's, the other the program's.
#[derive(Clone)]
pub struct PlainMemory {
    books: Books<MappedPage>,
    chunks: Arc<Mutex<Vec<Chunk>>>,
    seed: u64,
}

impl PlainMemory {
    /// No memory yet.
    pub fn new(books: &Books<MappedPage>, seed: u64) -> Self {
        Self { books: books.clone(), chunks: Arc::default(), seed }
    }

    /// Adds chunks, which begin in the host's memory. The caller raises the client's demand by as many granules.
    pub fn add(&self, chunks: Granules) {
        let mut all = self.chunks();
        for chunk in all.len()..all.len() + chunks as usize {
            all.push(Chunk::Evicted(data::first(self.seed, chunk).collect()));
        }
    }

    fn chunks(&self) -> MutexGuard<'_, Vec<Chunk>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes on the GPU.
    ///
    /// # Errors
    /// A chunk is not there, although the client runs.
    pub fn step(&self, step: u64) -> Result<(), String> {
        for (index, chunk) in self.chunks().iter_mut().enumerate() {
            let Chunk::OnGpu(words) = chunk else {
                return Err(format!("chunk {index} is not on the GPU, and this client runs"));
            };
            words.iter_mut().for_each(|word| *word = data::mix(*word, step));
        }
        Ok(())
    }

    /// Checks all data, wherever it is.
    ///
    /// # Errors
    /// Which word is wrong.
    pub fn check(&self, steps: &Steps) -> Result<(), String> {
        self.chunks().iter().enumerate().try_for_each(|(index, chunk)| {
            let words = match chunk {
                Chunk::OnGpu(words) => &words[..],
                Chunk::Evicted(words) => words,
            };
            steps.check(self.seed, index, words)
        })
    }
}

impl client::Runtime for PlainMemory {
    type Error = Infallible;

    fn fill(&mut self) -> Result<Fill, Infallible> {
        for chunk in self.chunks().iter_mut() {
            if let Chunk::Evicted(words) = chunk {
                // The granule before the memory: the GPU never holds more than the books say.
                if self.books.take(1) == Fill::Recalled {
                    return Ok(Fill::Recalled);
                }
                *chunk = Chunk::OnGpu(std::mem::take(words).into_boxed_slice());
                self.books.moved(Direction::In, GRANULE);
            }
        }
        Ok(Fill::Complete)
    }

    fn evict(&mut self, granules: Granules) -> Result<(), Infallible> {
        let mut left = granules;
        for chunk in self.chunks().iter_mut() {
            if let Chunk::OnGpu(words) = chunk
                && left > 0
            {
                *chunk = Chunk::Evicted(words.to_vec());
                self.books.moved(Direction::Out, GRANULE);
                // The memory before the granule, and chunk by chunk: whoever waits for room goes on with the first.
                self.books.give(1);
                left -= 1;
            }
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Result<(), Infallible> {
        for chunk in self.chunks().iter_mut() {
            if let Chunk::Evicted(words) = chunk {
                if !self.books.take_ahead(1) {
                    break;
                }
                *chunk = Chunk::OnGpu(std::mem::take(words).into_boxed_slice());
                self.books.moved(Direction::In, GRANULE);
            }
        }
        Ok(())
    }
}
