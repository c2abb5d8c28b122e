//! libnvshare.so: preloaded into a process, it lets the process share its GPUs (see `docs/`).
//!
//! | module | what it holds |
//! |---|---|
//! | [`table`] | what is known about each entry point of the driver, and the functions that stand in for them |
//! | [`nvml`] | the same for NVML, as far as it tells how much memory there is |
//! | [`truth`] | how much that is, for whoever asks by whatever name |
//! | [`interpose`] | `dlsym` and `cuGetProcAddress`, which hand those functions out |
//! | [`hooks`] | the entry points that need more than the gate |
//! | [`gate`] | threads that submit work pass it, and memory moves only while it is shut |
//! | [`thread`] | a number for each thread, and what goes when one ends |
//! | [`session`] | the process: its gate, its GPUs, its captures |
//! | [`order`] | which GPUs a process with several may ask for, and which it must give up |
//! | [`together`] | its gate opens when it has all of them |
//! | [`contexts`] | how contexts come and go, green ones too |
//! | [`device`] | one GPU: allocating and freeing |
//! | [`spare`] | what was freed a moment ago, for the next allocation |
//! | [`memory`] | the map of what is allocated, and where its bytes are |
//! | [`peers`] | which GPUs may use the memory of which others |
//! | [`pools`] | stream-ordered memory: cuMemAllocAsync and the pools that it comes from |
//! | [`engine`] | the thread that walks the client through its phases |
//! | [`vmm`] | memory that the application maps itself |
//! | [`mappings`] | ranges of addresses with such memory in them: what the driver would refuse is refused before it is done |
//! | [`ipc`] | memory that several processes have open |
//! | [`room`] | memory that only the driver can place |
//! | [`arrival`] | room for a process's first context, on a GPU that others have filled |
//! | [`swap`] | moving memory in a pipeline |
//! | [`scan`] | finding the granules that hold nothing but zeros |
//! | [`drain`] | waiting for submitted work |
//! | [`hostpool`] | host memory for what is evicted |
//! | [`starved`] | what happens when there is none |
//! | [`bookkeeping`] | what the books of many regions cost |
//! | [`probe`] | what tests and benchmarks ask the shim itself |
//! | [`abi`], [`driver`] | the CUDA driver |

#![cfg_attr(test, allow(dead_code))]

mod abi;
mod arrival;
mod bookkeeping;
mod bounds;
mod contexts;
mod deepbind;
mod device;
mod drain;
mod driver;
mod engine;
mod flow;
mod gate;
mod hooks;
mod hostpool;
mod interpose;
mod ipc;
mod log;
mod mappings;
mod memory;
mod nvml;
mod order;
mod patience;
mod peers;
mod pools;
mod probe;
mod room;
mod scan;
mod session;
mod settings;
mod spare;
mod starved;
mod swap;
mod synchronous;
mod table;
mod thread;
mod together;
mod truth;
mod unmovable;
mod vmm;
