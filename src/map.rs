//! The mapped page. This is one of the two places where this project needs `unsafe`; the other is the CUDA ABI.
//!
//! **Why it is sound.** A mapping is shared with processes that may write anything at any time. Rust
//! allows that for atomics and for nothing else, so [`Page`] consists of atomics, and of padding in an `UnsafeCell` that nothing
//! reads or writes. Every bit pattern is a valid `AtomicU32` or
//! `AtomicU64`. The mapping is page-aligned, so every field is aligned, and its length is checked
//! against the file's before mapping. What is left is a file that shrinks under the mapping: an access then raises
//! SIGBUS. Pages are in memory whose size is sealed ([`crate::sealed`]), and a client takes no other
//! ([`crate::register`]).
//!
//! A process that only looks has a read-only descriptor. Its mapping is read-only, too: a store into it is a fault.

use crate::gang_page::{GANG_PAGE_BYTES, GangPage};
use crate::page::{PAGE_BYTES, Page, PageError};
use crate::sealed;
use crate::units::{GpuUuid, Granules};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;

/// A page in shared memory. Clones share the mapping.
#[derive(Clone)]
pub struct MappedPage {
    mapping: Arc<MmapRaw>,
}

/// Makes a page in sealed memory, with a pool of `capacity` free granules.
///
/// # Errors
/// There is no memory for it, or the kernel will not map it.
pub fn create(gpu: GpuUuid, capacity: Granules) -> Result<(File, MappedPage), MapError> {
    let file = sealed::create(&format!("nvshare:{gpu}"), PAGE_BYTES)?;
    let page = MappedPage::map(&file)?;
    page.initialise(gpu, capacity);
    Ok((file, page))
}

/// Why a page could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel refused.
    #[error("the kernel would not map it: {0}")]
    Io(#[from] io::Error),
    /// It is not a page of this layout.
    #[error(transparent)]
    Page(#[from] PageError),
}

impl MappedPage {
    /// Maps a page and checks that it is one.
    ///
    /// # Errors
    /// The file cannot be mapped, is too short, or is not a page of this layout.
    pub fn open(fd: impl AsFd) -> Result<Self, MapError> {
        let page = Self::map(fd)?;
        page.check()?;
        Ok(page)
    }

    /// Maps a page that nobody has initialised yet. The file has [`PAGE_BYTES`] bytes.
    ///
    /// # Errors
    /// The file cannot be mapped or is too short.
    pub fn map(fd: impl AsFd) -> Result<Self, MapError> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        let found = file.metadata()?.len();
        if found < PAGE_BYTES as u64 {
            return Err(PageError::Short { found }.into());
        }
        Ok(Self { mapping: Arc::new(map_file(&file, PAGE_BYTES)?) })
    }

    /// Where the mapping begins, to tell whether it is still there after a fork.
    pub fn address(&self) -> usize {
        self.mapping.as_ptr() as usize
    }
}

impl Deref for MappedPage {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: the mapping is PAGE_BYTES long (`map` checked), aligned to a memory page, lives as
        // long as `self`, and consists of atomics, for which any bits and any concurrent writer are
        // allowed.
        unsafe { &*self.mapping.as_mut_ptr().cast::<Page>() }
    }
}

/// Maps the first `bytes` bytes of a file.
fn map_file(file: &File, bytes: usize) -> io::Result<MmapRaw> {
    let mut options = MmapOptions::new();
    options.len(bytes);
    let reads = sealed::is_read_only(file);
    let memory = if reads { options.map_raw_read_only(file) } else { options.map_raw(file) }?;
    // A child of fork is no client: it must not even see the page.
    #[cfg(not(miri))]
    memory.advise(memmap2::Advice::DontFork)?;
    Ok(memory)
}

/// The gangs' page in shared memory. Clones share the mapping.
#[derive(Clone)]
pub struct MappedGangPage {
    mapping: Arc<MmapRaw>,
    identity: sealed::Identity,
}

impl MappedGangPage {
    /// Makes the page in sealed memory, with a column for each GPU.
    ///
    /// # Errors
    /// There is no memory for it, or the kernel will not map it.
    pub fn create(gpus: impl IntoIterator<Item = GpuUuid>) -> io::Result<(File, Self)> {
        let file = sealed::create("nvshare:gangs", GANG_PAGE_BYTES)?;
        let page = Self::map(&file)?;
        page.initialise(gpus);
        Ok((file, page))
    }

    /// Maps a page that the arbiter sent.
    ///
    /// # Errors
    /// It cannot be mapped, others could shorten it, or it is not a page of this layout.
    pub fn open(fd: impl AsFd) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        if !sealed::is_sealed(&file) || file.metadata()?.len() != GANG_PAGE_BYTES as u64 {
            return Err(invalid("it is not sealed memory of the gangs' page's size"));
        }
        let page = Self::map(&file)?;
        if page.is_valid() { Ok(page) } else { Err(invalid("it is no page of gangs of this release")) }
    }

    fn map(file: &File) -> io::Result<Self> {
        let identity = sealed::Identity::of(file)?;
        Ok(Self { mapping: Arc::new(map_file(file, GANG_PAGE_BYTES)?), identity })
    }

    /// Whether both are mappings of the same page.
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Deref for MappedGangPage {
    type Target = GangPage;

    fn deref(&self) -> &GangPage {
        // SAFETY: the mapping is GANG_PAGE_BYTES long, and its file cannot be shortened (`create` and `open` checked). It is
        // aligned to a memory page, lives as long as `self`, and consists of atomics, and of padding that nobody accesses.
        unsafe { &*self.mapping.as_mut_ptr().cast::<GangPage>() }
    }
}

/// Overwrites a whole page with these words, again and again until it is full. For tests of its readers: a hostile or broken
/// process can do the same.
pub fn scribble(page: &Page, words: &[u64]) {
    use crate::sync::{AtomicU64, Ordering};
    if words.is_empty() {
        return;
    }
    // SAFETY: a page is a whole number of 8-byte aligned words, all of them atomics or padding that nobody
    // else touches.
    let all =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(page).cast::<AtomicU64>(), PAGE_BYTES / 8) };
    for (word, value) in all.iter().zip(words.iter().cycle()) {
        word.store(*value, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GpuUuid;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps no files")]
    fn two_mappings_are_one_page() {
        let file = file(&vec![0; PAGE_BYTES]);
        let first = MappedPage::map(&file).unwrap();
        first.initialise(GpuUuid([1; 16]), 9);
        let second = MappedPage::open(&file).unwrap();
        first.set_capacity(12);
        assert_eq!((second.capacity(), second.free().granules, second.gpu()), (12, 12, GpuUuid([1; 16])));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn whoever_only_looks_sees_the_same_page() {
        let (file, page) = create(GpuUuid([1; 16]), 9).unwrap();
        let looked_at = MappedPage::open(sealed::read_only(&file).unwrap()).unwrap();
        page.set_capacity(12);
        assert_eq!((looked_at.capacity(), looked_at.gpu()), (12, GpuUuid([1; 16])));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps no files")]
    fn what_is_no_page_is_refused() {
        assert!(matches!(
            MappedPage::open(file(b"short")),
            Err(MapError::Page(PageError::Short { found: 5 }))
        ));
        let zeros = vec![0; PAGE_BYTES];
        assert!(matches!(MappedPage::open(file(&zeros)), Err(MapError::Page(PageError::Magic { found: 0 }))));
    }
}
