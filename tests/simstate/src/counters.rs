//! Counts of what happened on a GPU, for tests.
//!
//! They live in the processes' rows, spread over several cache lines so that threads that launch at once don't meet
//! in one. A row that passes to another process keeps its counts: the sum over all rows is what happened on the GPU
//! since the segment was made, dead processes included.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// What happened on a GPU, in all processes since the segment was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Bytes copied from the host to the GPU.
    pub bytes_in: u64,
    /// Bytes copied from the GPU to the host.
    pub bytes_out: u64,
    /// Kernels launched, those of replayed graphs included.
    pub launches: u64,
    /// Operations that failed with `CUDA_ERROR_ILLEGAL_ADDRESS`.
    pub illegal_accesses: u64,
    /// Allocations refused for lack of GPU memory.
    pub out_of_memory: u64,
    /// Successful calls of `cuMemCreate`.
    pub vmm_creates: u64,
    /// Managed pages of 2 MiB that had to be brought to the GPU.
    pub um_faults: u64,
    /// Managed pages of 2 MiB that were driven out of it.
    pub um_evictions: u64,
}

/// Which counter to raise.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Count {
    /// See [`Counters::bytes_in`].
    BytesIn,
    /// See [`Counters::bytes_out`].
    BytesOut,
    /// See [`Counters::launches`].
    Launches,
    /// See [`Counters::illegal_accesses`].
    IllegalAccesses,
    /// See [`Counters::out_of_memory`].
    OutOfMemory,
    /// See [`Counters::vmm_creates`].
    VmmCreates,
    /// See [`Counters::um_faults`].
    UmFaults,
    /// See [`Counters::um_evictions`].
    UmEvictions,
}

const SHARDS: usize = 8;
const COUNTS: usize = 8;

#[repr(C, align(64))]
struct Shard([AtomicU64; COUNTS]);

/// The counters of one row.
#[repr(C)]
pub struct RowCounters([Shard; SHARDS]);

static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHARD: usize = NEXT_SHARD.fetch_add(1, Relaxed) % SHARDS;
}

impl RowCounters {
    /// Raises a counter.
    pub fn add(&self, count: Count, n: u64) {
        let shard = SHARD.try_with(|&shard| shard).unwrap_or(0);
        self.0[shard].0[count as usize].fetch_add(n, Relaxed);
    }

    /// Adds this row's counts to `sum`.
    pub fn add_to(&self, sum: &mut Counters) {
        let of = |count: Count| -> u64 {
            self.0.iter().map(|shard| shard.0[count as usize].load(Relaxed)).fold(0, u64::wrapping_add)
        };
        sum.bytes_in += of(Count::BytesIn);
        sum.bytes_out += of(Count::BytesOut);
        sum.launches += of(Count::Launches);
        sum.illegal_accesses += of(Count::IllegalAccesses);
        sum.out_of_memory += of(Count::OutOfMemory);
        sum.vmm_creates += of(Count::VmmCreates);
        sum.um_faults += of(Count::UmFaults);
        sum.um_evictions += of(Count::UmEvictions);
    }
}
