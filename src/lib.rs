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
//! | [`session`] | a client with a thread of its own, for programs that have threads or tasks |
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
//!
//! # A runtime of one's own
//!
//! A program whose memory the preloaded library cannot move (or that would rather move it itself) implements [`Runtime`]: how its memory
//! comes in and goes out. Here the "GPU" is a vector, and two clients of 3 granules each take turns in a pool of 4. A real program
//! [registers](register::register) with the arbiter instead of opening slots itself, and everything else is as here.
//!
//! ```
//! use nvshare::client::{Client, Runtime};
//! use nvshare::slot::Process;
//! use nvshare::{Books, Fill, Granules, GpuUuid, Page, Session};
//! use std::convert::Infallible;
//! use std::sync::{Arc, Mutex};
//!
//! /// Memory of one granule: its data is on the GPU or in the host's memory.
//! struct Chunk { data: Vec<u8>, on_gpu: bool }
//!
//! struct Memory { books: Books<Arc<Page>>, chunks: Arc<Mutex<Vec<Chunk>>> }
//!
//! impl Runtime for Memory {
//!     type Error = Infallible;
//!
//!     fn fill(&mut self) -> Result<Fill, Infallible> {
//!         for chunk in self.chunks.lock().unwrap().iter_mut().filter(|chunk| !chunk.on_gpu) {
//!             // First the granule, then the memory: the GPU never holds more than the books say.
//!             if self.books.take(1) == Fill::Recalled {
//!                 return Ok(Fill::Recalled);
//!             }
//!             chunk.on_gpu = true; // cuMemCreate, cuMemMap, copy in
//!         }
//!         Ok(Fill::Complete)
//!     }
//!
//!     fn evict(&mut self, granules: Granules) -> Result<(), Infallible> {
//!         let mut chunks = self.chunks.lock().unwrap();
//!         for chunk in chunks.iter_mut().filter(|chunk| chunk.on_gpu).take(granules as usize) {
//!             chunk.on_gpu = false; // copy out, cuMemUnmap, cuMemRelease
//!             self.books.give(1);
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let page = Arc::<Page>::from(Page::on_heap(GpuUuid([1; 16]), 4));
//! let program = |pid: u32| {
//!     let page = page.clone();
//!     // The arbiter opens slots, one after the other.
//!     let slot = page.open_slot(Process { pid, started: 1 }, "example", 100).unwrap();
//!     std::thread::spawn(move || {
//!         let client = Client::new(page, slot);
//!         let chunks = Arc::new(Mutex::new(Vec::new()));
//!         let memory = Memory { books: client.books().clone(), chunks: chunks.clone() };
//!         let session = Session::start(client, memory).unwrap();
//!         let add = || chunks.lock().unwrap().extend((0..3).map(|_| Chunk { data: vec![0], on_gpu: false }));
//!         session.grow(3, add).unwrap();
//!         let mut turns = 0;
//!         for step in 0..100_u8 {
//!             turns += 1;
//!             let pass = session.enter().unwrap(); // waits for its turn
//!             for chunk in chunks.lock().unwrap().iter_mut() {
//!                 assert!(chunk.on_gpu, "all memory is in place while there is a pass");
//!                 chunk.data[0] += 1;
//!             }
//!             if pass.should_yield() {
//!                 drop(pass); // the work is done: somebody else may run
//!             }
//!         }
//!         assert!(chunks.lock().unwrap().iter().all(|chunk| chunk.data[0] == 100));
//!         session.close().unwrap();
//!         turns
//!     })
//! };
//! let programs = [program(10), program(11)];
//! for program in programs {
//!     assert_eq!(program.join().unwrap(), 100);
//! }
//! // Both have left, and all granules are free again.
//! assert_eq!(page.free().granules, 4);
//! ```
//!
//! `docs/embedding.md` in the repository says what may be called from which thread, what happens when an arbiter dies or a process
//! forks, and what is stable; `examples/embedding/` has programs on plain memory, on CUDA's virtual memory management, and asynchronous
//! ones; `capi/` has the same for C.

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
pub mod processes;
#[cfg(not(loom))]
mod quiet_thread;
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
pub mod session;
#[cfg(not(loom))]
pub mod standard_error;
#[cfg(not(loom))]
pub mod wire;

pub use books::{Books, Fill};
pub use client::{Client, Runtime};
pub use page::{Page, Phase};
#[cfg(not(loom))]
pub use session::{Pass, Session, SessionError};
pub use slot::SlotIndex;
pub use units::{GRANULE, GpuUuid, Granules, Nanos};
