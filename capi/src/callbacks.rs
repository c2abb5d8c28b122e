//! The runtime: the program's functions that move its memory, and the books by which they take granules and give them back.

use crate::error::Failure;
use nvshare::map::MappedPage;
use nvshare::page::Direction;
use nvshare::{Fill, Granules, SessionError, client};
use std::ffi::c_void;

/// What `fill` returns when all memory is in place, and `nvshare_take` when it has the granules.
pub const NVSHARE_FILL_COMPLETE: i32 = 0;

/// What `nvshare_take` returns when the client stopped being admitted; `fill` then returns it, too.
pub const NVSHARE_FILL_RECALLED: i32 = 1;

/// The program's functions that move its memory. They are called in one thread of the library's, one at a time, and never while
/// somebody has a pass, but for `fill` after `nvshare_grow`. Each returns 0, or an error of the program's own below 0, which ends the
/// client. They must not throw, and must not call `nvshare_enter`, `nvshare_grow` or `nvshare_close`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Runtime {
    /// Given to each of them.
    pub context: *mut c_void,
    /// Brings in all memory that is not on the GPU. Takes granules with `nvshare_take` before it maps memory, chunk by chunk, and
    /// returns NVSHARE_FILL_RECALLED as soon as that does; else NVSHARE_FILL_COMPLETE.
    pub fill: Option<unsafe extern "C" fn(context: *mut c_void, books: *const Books) -> i32>,
    /// Moves out at least `granules`, and gives each chunk back with `nvshare_give` as soon as it is unmapped.
    pub evict: Option<unsafe extern "C" fn(context: *mut c_void, books: *const Books, granules: u32) -> i32>,
    /// Brings in memory that fits into free granules while others run: takes granules with `nvshare_take_ahead`, and ends when that
    /// returns false. May be NULL.
    pub prefetch: Option<unsafe extern "C" fn(context: *mut c_void, books: *const Books) -> i32>,
    /// Frees all memory, before the client leaves. The last call, and the only one after an error. May be NULL.
    pub release: Option<unsafe extern "C" fn(context: *mut c_void)>,
}

/// What the client has: its granules.
pub struct Books {
    books: nvshare::Books<MappedPage>,
    pid: u32,
}

impl Books {
    pub(crate) fn new(books: &nvshare::Books<MappedPage>) -> Self {
        Self { books: books.clone(), pid: std::process::id() }
    }

    /// A forked child has no page.
    pub(crate) fn check_process(&self) -> Result<(), SessionError> {
        if std::process::id() == self.pid { Ok(()) } else { Err(SessionError::Forked { parent: self.pid }) }
    }

    /// # Safety
    /// It is NULL or points to books.
    unsafe fn here<'a>(books: *const Self) -> Option<&'a nvshare::Books<MappedPage>> {
        // SAFETY: the caller's word.
        let books = unsafe { books.as_ref() }?;
        books.check_process().is_ok().then_some(&books.books)
    }
}

/// Takes `granules`, waiting until the pool has them. NVSHARE_FILL_RECALLED if the client stopped being admitted; nothing was taken
/// then. For `fill`.
///
/// # Safety
/// `books` is what `fill` was called with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_take(books: *const Books, granules: u32) -> i32 {
    // SAFETY: the caller's word.
    match unsafe { Books::here(books) }.map(|books| books.take(granules)) {
        Some(Fill::Complete) => NVSHARE_FILL_COMPLETE,
        Some(Fill::Recalled) | None => NVSHARE_FILL_RECALLED,
    }
}

/// How many granules the client may bring in ahead of its turn at this moment.
///
/// # Safety
/// `books` is what `prefetch` was called with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_ahead(books: *const Books) -> u32 {
    // SAFETY: the caller's word.
    unsafe { Books::here(books) }.map_or(0, nvshare::Books::ahead)
}

/// Takes `granules` if the client is the first waiter and nobody else needs them now; false if not. For `prefetch`.
///
/// # Safety
/// `books` is what `prefetch` was called with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_take_ahead(books: *const Books, granules: u32) -> bool {
    // SAFETY: the caller's word.
    unsafe { Books::here(books) }.is_some_and(|books| books.take_ahead(granules))
}

/// Gives `granules` back, whose memory was unmapped and released. From every thread.
///
/// # Safety
/// `books` comes from the library, and its client is not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_give(books: *const Books, granules: u32) {
    // SAFETY: the caller's word.
    if let Some(books) = unsafe { Books::here(books) } {
        books.give(granules);
    }
}

/// Counts `bytes` that were copied to the GPU, for `nvshare status` and for the measured bandwidth of the link. `took_ns` is how long the
/// copy took by the GPU's clock, or 0 if that is not known. For `fill` and `prefetch`.
///
/// # Safety
/// `books` is what the runtime's function was called with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_copied_in(books: *const Books, bytes: u64, took_ns: u64) {
    // SAFETY: the caller's word.
    unsafe { copied(books, Direction::In, bytes, took_ns) }
}

/// As nvshare_copied_in, of bytes that were copied to the host. For `evict`.
///
/// # Safety
/// `books` is what the runtime's function was called with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_copied_out(books: *const Books, bytes: u64, took_ns: u64) {
    // SAFETY: the caller's word.
    unsafe { copied(books, Direction::Out, bytes, took_ns) }
}

/// # Safety
/// `books` is NULL or points to books.
unsafe fn copied(books: *const Books, direction: Direction, bytes: u64, took_ns: u64) {
    // SAFETY: the caller's word.
    match unsafe { Books::here(books) } {
        Some(books) if took_ns > 0 => books.copied(direction, bytes, took_ns),
        Some(books) => books.moved(direction, bytes),
        None => {}
    }
}

/// One of the program's functions returned this.
#[derive(Debug, thiserror::Error)]
#[error("the runtime's {function} returned {code}")]
pub struct CallbackError {
    function: &'static str,
    code: i32,
}

/// The program's functions as a runtime.
pub(crate) struct Callbacks {
    runtime: Runtime,
    fill: unsafe extern "C" fn(*mut c_void, *const Books) -> i32,
    evict: unsafe extern "C" fn(*mut c_void, *const Books, u32) -> i32,
    books: *const Books,
}

// SAFETY: the program was told that its functions are called in another thread; the books are `Sync`, and outlive the session.
unsafe impl Send for Callbacks {}

impl Callbacks {
    pub(crate) fn new(runtime: &Runtime, books: &Books) -> Result<Self, Failure> {
        Ok(Self {
            fill: runtime.fill.ok_or_else(|| Failure::null("runtime.fill"))?,
            evict: runtime.evict.ok_or_else(|| Failure::null("runtime.evict"))?,
            runtime: *runtime,
            books,
        })
    }
}

fn done(function: &'static str, code: i32) -> Result<(), CallbackError> {
    if code == 0 { Ok(()) } else { Err(CallbackError { function, code }) }
}

impl client::Runtime for Callbacks {
    type Error = CallbackError;

    fn fill(&mut self) -> Result<Fill, CallbackError> {
        // SAFETY: the functions are the program's, and the books outlive the session.
        match unsafe { (self.fill)(self.runtime.context, self.books) } {
            NVSHARE_FILL_RECALLED => Ok(Fill::Recalled),
            code => done("fill", code).map(|()| Fill::Complete),
        }
    }

    fn evict(&mut self, granules: Granules) -> Result<(), CallbackError> {
        // SAFETY: as above.
        done("evict", unsafe { (self.evict)(self.runtime.context, self.books, granules) })
    }

    fn prefetch(&mut self) -> Result<(), CallbackError> {
        let Some(prefetch) = self.runtime.prefetch else { return Ok(()) };
        // SAFETY: as above.
        done("prefetch", unsafe { prefetch(self.runtime.context, self.books) })
    }
}

impl Drop for Callbacks {
    fn drop(&mut self) {
        if let Some(release) = self.runtime.release {
            // SAFETY: as above.
            unsafe { release(self.runtime.context) };
        }
    }
}
