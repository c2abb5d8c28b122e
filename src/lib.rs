//! nvshare: several processes share one GPU as if each had all of it.
//!
//! This crate is the part that every participant agrees on. It knows nothing of CUDA.
//!
//! | module | what it holds |
//! |---|---|
//! | [`page`] | the control page: one per GPU, mapped by everyone |
//! | [`slot`] | the slots of a page, sets of them, and who owns one |
//! | [`account`], [`pool`] | who holds how many granules, and how they change hands |
//! | [`lock`], [`lock_word`] | the word that says who may load and run, and how a decision is published |
//! | [`policy`] | who runs, how long, who makes room: pure functions of a snapshot |
//! | [`shares`], [`usage`] | a client's weight, priority and memory limit; what it has used lately |
//! | [`gate`], [`drain_backoff`] | threads pass a gate to submit work; how long it stays shut for a drain that stands still |
//! | [`gang_order`] | which of its GPUs a process may ask for, and which it must give up |
//! | [`pace`] | how much work a stream may have in flight |
//! | [`stream_arena`] | blocks of memory that become free in the order of streams |
//! | [`memory_info`] | how much memory a process is told that there is |
//! | [`placement`] | which GPU a new client gets |
//! | [`step`] | what a client in a phase does next: a pure function, and the table of phases |
//! | [`books`] | what a client has and asks for, usable from every thread of its process |
//! | [`client`] | one process's part in the protocol: wait, fill, run, yield, evict |
//! | [`audit`] | the arbiter's part: open and close a slot's books, check the sums |
//! | [`wire`], [`scm_rights`] | the messages to and from the arbiter, and descriptors that travel with one |
//! | [`text`] | text of strangers, made fit to be shown |
//! | [`register`] | how a process gets its slot and the page's descriptor |
//! | [`presence`] | how the arbiter knows that a client lives: a connection and a lock that end with it |
//! | [`sealed`], [`record`] | the memory that a page is in, and what one arbiter writes down for the next |
//! | [`change`] | how a client's shares are changed while it runs |
//! | [`standard_error`] | a log line that never matters to the process that it is written in |
//! | [`runtime_dir`] | who may serve in a runtime directory, and whose arbiter is believed there |
//! | [`log_limit`] | a bound on log lines that a stranger can cause |
//! | [`sync`], [`packed`] | atomics and futexes, real or modelled by loom; atomic words that hold a packed value |
//!
//! The protocol rests on three invariants, named I1 to I3 throughout:
//!
//! - **I1** `free + sum(resident) + sum(context) == capacity`, but for operations in flight, which
//!   [`account::Account`] announces.
//! - **I2** a client submits GPU work only with its gate open, and that only in [`page::Phase::Running`], or in
//!   [`page::Phase::Draining`] when a drain is put off: either implies that all its memory is in place.
//! - **I3** whom a decision admits fits, or it admits exactly one.

pub mod account;
pub mod audit;
pub mod books;
pub mod client;
pub mod drain_backoff;
pub mod gang_order;
pub mod gate;
pub mod lock;
pub mod lock_word;
pub mod log_limit;
pub mod memory_info;
pub mod pace;
pub mod packed;
pub mod page;
pub mod placement;
pub mod policy;
pub mod pool;
pub mod shares;
pub mod slot;
pub mod snapshot;
pub mod step;
pub mod stream_arena;
pub mod sync;
pub mod text;
pub mod units;
pub mod usage;

#[cfg(not(loom))]
pub mod change;
#[cfg(not(loom))]
mod connection;
#[cfg(not(loom))]
pub mod map;
#[cfg(not(loom))]
pub mod paths;
#[cfg(not(loom))]
pub mod presence;
#[cfg(not(loom))]
pub mod record;
#[cfg(not(loom))]
pub mod register;
#[cfg(not(loom))]
pub mod runtime_dir;
#[cfg(not(loom))]
pub mod scm_rights;
#[cfg(not(loom))]
pub mod sealed;
#[cfg(not(loom))]
pub mod standard_error;
#[cfg(not(loom))]
pub mod wire;

pub use books::{Books, Fill};
pub use client::{Client, Runtime};
pub use page::{Page, Phase};
pub use slot::SlotIndex;
pub use units::{GRANULE, GpuUuid, Granules, Nanos};
