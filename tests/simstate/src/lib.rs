//! What the processes on a simulated GPU share.
//!
//! The simulated GPU's driver (`simcuda`) and NVML (`simnvml`) run inside many processes that have nothing in
//! common but a segment of POSIX shared memory, `/dev/shm/$NVSHARE_SIM_NAME`. In it are, for every GPU, a row per
//! process with the memory that it uses ([`ledger`]), the allocations that several hold ([`shared`]), the timelines of the compute engine and the two copy engines
//! ([`time`]) and the event counters that tests read ([`counters`]).
//!
//! Any process may be killed at any instruction. So there are only atomics in the segment and never a lock; whatever
//! a process uses is written in its own row alone, and freeing the row of a dead process (one compare-and-swap of its
//! owner) gives back all of it at once.
//!
//! Nobody owns the segment: no process removes it when it leaves. Whoever made up a name for a test unlinks it at the
//! end with [`segment::unlink`], or by removing the file.

pub mod config;
pub mod counters;
pub mod ledger;
pub mod process;
pub mod segment;
pub mod shared;
pub mod time;

pub use config::Config;
pub use counters::Counters;
pub use ledger::{Kind, Ledger, ProcessUsage};
pub use segment::{Gpu, Segment};
