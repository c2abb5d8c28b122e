//! nvshare's client API for C: a process takes part in sharing a GPU with a runtime of its own.
//!
//! It is [`nvshare::Session`] with C's types; `docs/embedding.md` in the repository tells how a client behaves and when which function
//! may be called. The header `include/nvshare_client.h` is made of this crate by cbindgen, and a test compares the two.
//!
//! - Every function may be called from every thread, except where it says something else.
//! - No function panics across the border: a panic becomes `NVSHARE_ERROR_PANIC`.
//! - After fork(2), the child's calls return `NVSHARE_ERROR_FORKED`, or do nothing.

mod callbacks;
mod error;

pub use callbacks::{
    Books, NVSHARE_FILL_COMPLETE, NVSHARE_FILL_RECALLED, Runtime, nvshare_ahead, nvshare_copied_in,
    nvshare_copied_out, nvshare_give, nvshare_take, nvshare_take_ahead,
};
pub use error::{Code, nvshare_code_name, nvshare_message};

use callbacks::Callbacks;
use error::{Failure, guard};
use nvshare::shares::{Priority, Shares};
use nvshare::wire::Hello;
use nvshare::{GpuUuid, Session, paths, register};
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

/// Bytes in a granule, the unit of GPU memory.
pub const NVSHARE_GRANULE: u64 = 2_097_152_u64;

const _: () = assert!(NVSHARE_GRANULE == nvshare::GRANULE);

/// The version of this interface. It grows by one when functions or members are added; what there is stays.
pub const NVSHARE_CLIENT_API: u32 = 1;

/// The time that does not come, for `nvshare_enter`.
pub const NVSHARE_FOREVER: u64 = u64::MAX;

/// How a process becomes a client. All zero but `size` and `gpu` is a good choice.
#[repr(C)]
pub struct Options {
    /// sizeof(nvshare_options): a later version of this interface may have more members.
    pub size: usize,
    /// The GPU's UUID, as cuDeviceGetUuid gives it.
    pub gpu: [u8; 16],
    /// What `nvshare status` calls the client, in UTF-8, up to 48 bytes; NULL: the program's name.
    pub name: *const c_char,
    /// The arbiter's directory; NULL: where every client looks for it (NVSHARE_RUNTIME_DIR, /run/nvshare and so on).
    pub runtime_dir: *const c_char,
    /// How long an arbiter that is starting is waited for, ns; 0: 10 s.
    pub connect_timeout_ns: u64,
    /// Its share of GPU time against others', 1 to 1000; 0: 100, the usual one.
    pub weight: u32,
    /// How soon its turn comes: -1 low, 0 normal, 1 high.
    pub priority: i32,
}

/// How much memory there is for a client, in bytes. The total is the sum of the others.
#[repr(C)]
#[derive(Debug, Default)]
pub struct MemoryInfo {
    /// The pool, or the client's memory limit if that is less.
    pub total: u64,
    /// What the client can still have on the GPU.
    pub free: u64,
    /// What its memory and its context have.
    pub own: u64,
    /// What others have that cannot move.
    pub others: u64,
}

/// A client: one process on one GPU.
pub struct Client {
    session: Session,
    books: Box<Books>,
}

/// The right to use the GPU: all of the client's memory is in place until it is given back.
pub struct Pass(nvshare::Pass);

/// The version of this interface that the library has: NVSHARE_CLIENT_API when it was built.
#[unsafe(no_mangle)]
pub extern "C" fn nvshare_client_api() -> u32 {
    NVSHARE_CLIENT_API
}

/// Registers with the arbiter, and starts the thread that walks the client through its phases and calls the runtime. Make the CUDA
/// context before: what the process has on the GPU when it registers counts as its context.
///
/// # Safety
/// `options` and `runtime` point to what they say, for the time of this call; `client` is where the client goes. What the runtime
/// points to is there until `nvshare_close` has returned, and may be used by another thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_open(
    options: *const Options,
    runtime: *const Runtime,
    client: *mut *mut Client,
) -> Code {
    guard(|| {
        // SAFETY: the caller's word.
        let (options, runtime, place) = unsafe {
            (
                options.as_ref().ok_or_else(|| Failure::null("options"))?,
                runtime.as_ref().ok_or_else(|| Failure::null("runtime"))?,
                client.as_mut().ok_or_else(|| Failure::null("client"))?,
            )
        };
        *place = std::ptr::null_mut();
        if options.size < size_of::<Options>() {
            return Err(Failure::invalid(format!(
                "options.size is {} and must be sizeof(nvshare_options), {} or more",
                options.size,
                size_of::<Options>()
            )));
        }
        // SAFETY: as above.
        let registered = unsafe { options.register() }?;
        let books = Box::new(Books::new(registered.books()));
        let runtime = Callbacks::new(runtime, &books)?;
        let session = Session::start(registered, runtime)
            .map_err(|error| Failure::system(format!("no thread can be made: {error}")))?;
        *place = Box::into_raw(Box::new(Client { session, books }));
        Ok(())
    })
}

impl Options {
    /// # Safety
    /// The strings are strings.
    unsafe fn register(&self) -> Result<nvshare::Client<nvshare::map::MappedPage>, Failure> {
        // SAFETY: the caller's word.
        let text = |text: *const c_char| (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) });
        let name = match text(self.name) {
            Some(name) => {
                name.to_str().map_err(|_| Failure::invalid("options.name is not UTF-8".into()))?.to_owned()
            }
            None => own_name(),
        };
        let dir = text(self.runtime_dir).map(|dir| PathBuf::from(OsStr::from_bytes(dir.to_bytes())));
        let socket = paths::socket(&dir.unwrap_or_else(paths::runtime_dir));
        let priority = match self.priority {
            -1 => Priority::Low,
            0 => Priority::Normal,
            1 => Priority::High,
            other => {
                return Err(Failure::invalid(format!("options.priority is {other} and must be -1, 0 or 1")));
            }
        };
        let usual = Shares::default();
        let weight = match self.weight {
            0 => usual.weight,
            weight @ 1..=nvshare::usage::MAX_WEIGHT => weight,
            other => {
                return Err(Failure::invalid(format!("options.weight is {other} and must be 1 to 1000")));
            }
        };
        let timeout = match self.connect_timeout_ns {
            0 => Duration::from_secs(10),
            ns => Duration::from_nanos(ns),
        };
        let hello = Hello::new(GpuUuid(self.gpu), &name).with(Shares { weight, priority, ..usual });
        Ok(register::register(&socket, &hello, timeout)?.into_client())
    }
}

fn own_name() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Waits until the GPU is this client's and all its memory is in place, for at most `timeout_ns` (NVSHARE_FOREVER: however long).
/// Several threads may have a pass at a time. Give it back with `nvshare_leave` after the work is done; do not wait for a thread that
/// is about to enter while you have one.
///
/// # Safety
/// `client` comes from `nvshare_open` and is not closed; `pass` is where the pass goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_enter(client: *mut Client, timeout_ns: u64, pass: *mut *mut Pass) -> Code {
    guard(|| {
        // SAFETY: the caller's word.
        let (client, place) = unsafe {
            (
                client.as_ref().ok_or_else(|| Failure::null("client"))?,
                pass.as_mut().ok_or_else(|| Failure::null("pass"))?,
            )
        };
        *place = std::ptr::null_mut();
        let entered = match timeout_ns {
            NVSHARE_FOREVER => client.session.enter(),
            ns => client.session.enter_within(Duration::from_nanos(ns)),
        };
        *place = Box::into_raw(Box::new(Pass(entered?)));
        Ok(())
    })
}

/// Whether to give the pass back soon, because somebody else waits and this client's slice is over. Costs one load; ask between two
/// pieces of work. True for NULL.
///
/// # Safety
/// `pass` is NULL, or comes from `nvshare_enter` and was not given back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_should_yield(pass: *const Pass) -> bool {
    // SAFETY: the caller's word.
    unsafe { pass.as_ref() }.is_none_or(|pass| pass.0.should_yield())
}

/// Gives a pass back. The caller has waited for the work that it has submitted: the memory may move as soon as this is called.
/// Does nothing with NULL.
///
/// # Safety
/// `pass` is NULL, or comes from `nvshare_enter` and was not given back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_leave(pass: *mut Pass) {
    guard(|| {
        if !pass.is_null() {
            // SAFETY: the caller's word.
            drop(unsafe { Box::from_raw(pass) });
        }
        Ok(())
    });
}

/// Raises the client's demand by `granules`. Then calls `add(argument)`, which puts the memory where the runtime's `fill` finds it and
/// calls no function of this library; it is not called if the memory is refused. The memory is in place from the next pass on; passes
/// that are out should be given back soon. `add` may be NULL for memory that `fill` knows of already.
///
/// # Safety
/// `client` comes from `nvshare_open` and is not closed; `add` is a function or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_grow(
    client: *mut Client,
    granules: u32,
    add: Option<unsafe extern "C" fn(argument: *mut c_void)>,
    argument: *mut c_void,
) -> Code {
    guard(|| {
        // SAFETY: the caller's word.
        let client = unsafe { client.as_ref() }.ok_or_else(|| Failure::null("client"))?;
        let add = || {
            if let Some(add) = add {
                // SAFETY: as above.
                unsafe { add(argument) }
            }
        };
        Ok(client.session.grow(granules, add)?)
    })
}

/// Lowers the client's demand by `granules`, which the caller has freed and, as far as they were on the GPU, given back
/// (`nvshare_give`).
///
/// # Safety
/// `client` comes from `nvshare_open` and is not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_shrink(client: *mut Client, granules: u32) -> Code {
    guard(|| {
        // SAFETY: the caller's word.
        let client = unsafe { client.as_ref() }.ok_or_else(|| Failure::null("client"))?;
        Ok(client.session.shrink(granules)?)
    })
}

/// How much memory there is for this client.
///
/// # Safety
/// `client` comes from `nvshare_open` and is not closed; `info` is where the figures go.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_memory_info(client: *const Client, info: *mut MemoryInfo) -> Code {
    guard(|| {
        // SAFETY: the caller's word.
        let (client, place) = unsafe {
            (
                client.as_ref().ok_or_else(|| Failure::null("client"))?,
                info.as_mut().ok_or_else(|| Failure::null("info"))?,
            )
        };
        client.books.check_process()?;
        let nvshare::memory_info::MemoryInfo { total, free, own, others } = client.session.memory_info();
        *place = MemoryInfo { total, free, own, others };
        Ok(())
    })
}

/// The client's books, as the runtime's functions get them: for `nvshare_give` when memory is freed. They end with the client. NULL for
/// NULL.
///
/// # Safety
/// `client` is NULL, or comes from `nvshare_open` and is not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_books_of(client: *const Client) -> *const Books {
    // SAFETY: the caller's word.
    unsafe { client.as_ref() }.map_or(std::ptr::null(), |client| &raw const *client.books)
}

/// Ends the client: waits until the last pass is back, calls the runtime's `release` and leaves. NVSHARE_OK, or why the client had ended
/// before. The handle is gone in any case, also in a forked child.
///
/// # Safety
/// `client` is NULL, or comes from `nvshare_open` and is not closed, and no other thread uses it any more. Not to be called from one of
/// the runtime's functions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvshare_close(client: *mut Client) -> Code {
    guard(|| {
        if client.is_null() {
            return Err(Failure::null("client"));
        }
        // SAFETY: the caller's word.
        let Client { session, books } = *unsafe { Box::from_raw(client) };
        let closed = session.close();
        // The session's thread has used the books until now.
        drop(books);
        Ok(closed?)
    })
}
