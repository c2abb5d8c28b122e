//! The arbiter at work.
//!
//! - `start`: signals, locks, pages, the socket.
//! - `event_loop`: waits for descriptors and ticks, and calls the rest.
//! - `state`: the GPUs, the clients, and what was logged; the following files are functions of it.
//! - `connections`, `requests`, `registration`: a connection's first message, what it may ask for, how a slot is given.
//! - `steering`: clients that are paused, settings that change at run time.
//! - `closing`: how clients end.
//! - `unresponsive`: clients that do not give way.
//!
//! What the state is made of: `clients`, `gangs`, `served_gpu`, `sampler`, `overdue`, `log_limits`, `poller`. `socket` and
//! `pending_connections` are beneath `connections`.

mod clients;
mod closing;
mod connections;
mod error;
mod event_loop;
mod gangs;
mod log_limits;
mod overdue;
mod pending_connections;
mod poller;
mod registration;
mod requests;
mod sampler;
mod served_gpu;
mod socket;
mod start;
mod state;
mod steering;
mod unresponsive;

pub use error::StartError;
pub use event_loop::Server;
pub use state::SetLogLevel;
