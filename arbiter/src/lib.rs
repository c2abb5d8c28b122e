//! The arbiter: creates the control pages, registers clients, closes the books of those that end, and watches. It takes no
//! part in a launch or a hand-off, and clients go on while it is down.
//!
//! - [`server`]: the arbiter at work: connections, requests, ends of clients.
//! - [`pages`]: the control pages: made, taken over, kept right.
//! - [`sampling`]: what NVML shows of a GPU's memory, and whose it is.
//! - [`monitor`]: metrics and a page over HTTP, in a thread of their own.
//! - [`client_lock`], [`gpu_lock`]: locks that the kernel releases with their process: which clients live, and which GPUs
//!   another arbiter serves.
//! - [`directory`], [`gpu_selection`]: the lock of the runtime directory, and which GPUs are served.
//! - [`configuration`], [`options`]: what the arbiter is configured to do: arguments, variables, the file, requests at run time.
//! - [`accept`], [`process`], [`permission`], [`stall_log`]: connections, pidfds, who may change what, the log of stalls.

pub mod accept;
pub mod client_lock;
pub mod configuration;
pub mod directory;
pub mod gpu_lock;
pub mod gpu_selection;
pub mod monitor;
pub mod options;
pub mod pages;
pub mod permission;
pub mod process;
pub mod sampling;
pub mod server;
pub mod stall_log;
