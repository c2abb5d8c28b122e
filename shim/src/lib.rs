//! libnvshare.so: preloaded into a process, it lets the process share its GPUs (see `docs/architecture.md`).
//!
//! The rooms, from the uppermost down. A room may use those below it and nothing above; a test holds that
//! (`tools/tests/structure.rs`).
//!
//! | room | what it holds |
//! |---|---|
//! | [`interpose`] | the entry points of the driver and of NVML, and the functions that replace them |
//! | [`process`] | the process as a client: attaching, contexts, the engine that walks it through its phases |
//! | [`ipc`] | memory that several processes have open |
//! | [`async_pool`] | stream-ordered memory: cuMemAllocAsync and the pools that it comes from |
//! | [`memory`] | what is allocated, where its bytes are, and how they move |
//! | [`replicas`] | how processes with the same data find each other and hand memory over |
//! | [`submit`] | the gate that threads pass, flow control, and waiting for submitted work |
//! | [`state`] | whether nvshare does anything in this process, and whether its memory is intact |
//! | [`cuda`] | the driver |
//! | [`thread`], [`settings`], [`log`], [`local_socket`] | a number for each thread, the environment's settings, the log, sockets to other processes of the user |
//!
//! Pure parts are in the core crate: the gate, the order of several GPUs, figures of memory, the policy.
//!
//! # Locks
//!
//! The process-wide locks, from the outermost to the innermost: a thread that holds one may take those further down.
//!
//! | lock | what it keeps | where |
//! |---|---|---|
//! | coming and going | contexts of one GPU are created and destroyed one at a time | `process/contexts.rs` |
//! | `MAKING` | making the first context on a full GPU | `process/first_context.rs` |
//! | `ATTACHING` | attaching to a GPU, while the arbiter answers | `process/attach.rs` |
//! | `process/membership.rs`' `KEYS` | what the process has in common with others, while the arbiter answers | `process/membership.rs` |
//! | `KEPT` | reservations for memory that the driver has placed; no thread blocks while it holds this | `process/reservation.rs` |
//! | pools | all pools of stream-ordered memory | `async_pool/mod.rs` |
//! | map of a GPU's memory | `Device::memory` | `memory/device.rs` |
//! | flow | the pace of each stream | `submit/flow.rs` |
//! | captures | the captures that are open | `submit/captures.rs` |
//! | `DEVICES` | the GPUs and contexts of the process; no thread blocks while it holds this | `memory/devices.rs` |
//! | streams of a GPU | the streams that are tracked | `submit/drain.rs` |
//! | `GANG` | the state of the process on each GPU; the gate is opened and shut under it | `submit/gang.rs` |
//! | leaves | `GREENS`, `ENDS`, `PAIRS`, `PRIMARIES`, `FLAGGED`, `GONE`, a group's keys and inbox (`replicas/`): held only to read or write one entry | in their files |

#![cfg_attr(test, allow(dead_code))]

mod async_pool;
mod cuda;
mod interpose;
mod ipc;
mod local_socket;
mod log;
mod memory;
mod process;
mod replicas;
mod settings;
mod state;
mod submit;
mod thread;
