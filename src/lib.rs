//! nvshare: several processes share one GPU as if each had all of it.
//!
//! This crate is what all participants share: the control page, the protocol and the policy. There is no CUDA in it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`page`] | the control page: one per GPU, mapped by everyone |
//! | [`slot`] | the slots of a page, sets of them, and who owns one |
//! | [`account`], [`pool`] | how many granules each client holds, and how they move between the pool and a client |
//! | [`lock`], [`lock_word`] | the word that says which clients may load and run, and how a decision is published |
//! | [`policy`], [`snapshot`] | which clients run, for how long, and which make room: pure functions of a snapshot |
//! | [`shares`], [`usage`] | a client's weight, priority and limits; the GPU time that it has used lately |
//! | [`turns`] | which client submits work, among those whose memory is in place, while they differ in their shares |
//! | [`gate`], [`drain_backoff`] | threads pass the gate to submit work; how long it stays shut for a drain that stands still |
//! | [`gang_order`] | which of its GPUs a process or a gang of processes may ask for, and which it must give up |
//! | [`gang_cut`], [`gang_page`] | how processes that wait for each other stop together; what they show each other |
//! | [`pace`] | how much work a stream may have in flight |
//! | [`stream_arena`] | blocks of memory that become free in the order of streams |
//! | [`memory_info`] | what a process is told about a GPU's memory |
//! | [`placement`] | which GPU a new client gets |
//! | [`step`] | what a client in a phase does next: a pure function, and the table of phases |
//! | [`books`] | what a client has and asks for, usable from every thread of its process |
//! | [`journal`], [`timeline`] | a client's latest events, in the page; the spans of time that they make |
//! | [`client`] | one process's part in the protocol: it waits, fills, runs, drains and evicts |
//! | [`audit`] | the arbiter's part: it opens and closes a client's books and checks the sums |
//! | [`wire`], [`scm_rights`] | the messages to and from the arbiter; messages with file descriptors |
//! | [`text`] | text from other processes, made safe to show |
//! | [`register`] | how a process gets its slot and the page's descriptor |
//! | [`presence`] | how the arbiter knows that a client lives: a connection and a lock that end with it |
//! | [`map`], [`sealed`], [`record`] | the mapped page, the memory that it is in, and what one arbiter writes down for the next |
//! | [`release`] | what is said where two releases meet that do not fit together |
//! | [`change`], [`control`] | how clients and the arbiter are steered while they run |
//! | [`membership`] | how a client joins a gang of processes that wait for each other |
//! | [`standard_error`] | log lines that do no harm to the application |
//! | [`paths`], [`runtime_dir`] | the files in the runtime directory, and whose arbiter is believed there |
//! | [`log_limit`] | a bound on log lines that a stranger can cause |
//! | [`sync`], [`packed`] | atomics and futexes, real or modelled by loom; atomic words that hold a packed value |
//! | [`units`] | granules, times, sizes, and the names of GPUs |
//!
//! The protocol rests on three invariants, named I1 to I3 throughout:
//!
//! - **I1** `free + sum(resident) + sum(context) == capacity` at any moment without a move of granules in flight. A move is
//!   announced in the client's [`account::Account`].
//! - **I2** A client submits GPU work only while its gate is open. The gate is open only in [`page::Phase::Running`], and in
//!   [`page::Phase::Draining`] while the drain is paused. In both cases all the client's memory is in place.
//! - **I3** The clients that a decision admits fit into the GPU together, or there is exactly one.

pub mod account;
pub mod audit;
pub mod books;
pub mod client;
pub mod drain_backoff;
pub mod gang_cut;
pub mod gang_order;
pub mod gang_page;
pub mod gate;
pub mod journal;
pub mod lock;
pub mod lock_word;
pub mod log_limit;
pub mod memory_info;
pub mod pace;
pub mod packed;
pub mod page;
pub mod pauses;
pub mod placement;
pub mod policy;
pub mod pool;
pub mod shares;
pub mod slot;
pub mod snapshot;
pub mod step;
pub mod stream_arena;
mod suspension;
pub mod sync;
pub mod text;
pub mod timeline;
pub mod turns;
pub mod units;
pub mod usage;

#[cfg(all(test, not(miri)))]
mod reachable;

#[cfg(not(loom))]
pub mod change;
#[cfg(not(loom))]
mod connection;
#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
pub mod map;
#[cfg(not(loom))]
pub mod membership;
#[cfg(not(loom))]
pub mod paths;
#[cfg(not(loom))]
pub mod presence;
#[cfg(not(loom))]
pub mod record;
#[cfg(not(loom))]
pub mod register;
pub mod release;
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
