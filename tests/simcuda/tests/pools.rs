//! Stream-ordered memory: pools, and memory of graphs.

mod common;

use std::ffi::c_void;
use std::sync::Barrier;

use common::*;

const RELEASE_THRESHOLD: u32 = 4;
const RESERVED: u32 = 5;
const RESERVED_HIGH: u32 = 6;
const USED: u32 = 7;
const USED_HIGH: u32 = 8;

/// `CUmemPoolProps`.
#[repr(C)]
struct Props(u32, u32, Location, usize, usize, [u8; 56]);

fn try_alloc(cuda: &Cuda, bytes: u64, stream: usize) -> Result<u64, i32> {
    let mut pointer = 0u64;
    match call!(cuda, "cuMemAllocAsync", &mut pointer => &mut u64, bytes => u64, stream => usize) {
        0 => Ok(pointer),
        error => Err(error),
    }
}

fn alloc(cuda: &Cuda, bytes: u64, stream: usize) -> u64 {
    try_alloc(cuda, bytes, stream).unwrap()
}

fn free(cuda: &Cuda, pointer: u64, stream: usize) -> i32 {
    call!(cuda, "cuMemFreeAsync", pointer => u64, stream => usize)
}

fn default_pool(cuda: &Cuda) -> usize {
    let mut pool = 0usize;
    assert_eq!(call!(cuda, "cuDeviceGetDefaultMemPool", &mut pool => &mut usize, 0 => i32), 0);
    pool
}

fn create_pool(cuda: &Cuda, max: usize) -> usize {
    let (mut pool, props) = (0usize, Props(1, 0, on_gpu(0), 0, max, [0; 56]));
    assert_eq!(call!(cuda, "cuMemPoolCreate", &mut pool => &mut usize, &props => &Props), 0);
    pool
}

fn alloc_from(cuda: &Cuda, pool: usize, bytes: u64, stream: usize) -> Result<u64, i32> {
    let mut pointer = 0u64;
    let code = call!(
        cuda, "cuMemAllocFromPoolAsync",
        &mut pointer => &mut u64, bytes => u64, pool => usize, stream => usize,
    );
    if code == 0 { Ok(pointer) } else { Err(code) }
}

fn get(cuda: &Cuda, pool: usize, attribute: u32) -> u64 {
    let mut value = 0u64;
    let code = call!(
        cuda, "cuMemPoolGetAttribute", pool => usize, attribute => u32, &mut value => &mut u64,
    );
    assert_eq!(code, 0);
    value
}

fn set(cuda: &Cuda, pool: usize, attribute: u32, value: u64) -> i32 {
    call!(cuda, "cuMemPoolSetAttribute", pool => usize, attribute => u32, &value => &u64)
}

static GATE: Barrier = Barrier::new(2);

/// Keeps a stream from going on until the test meets it at the gate. It is there when this returns.
fn hold(cuda: &Cuda, stream: usize) {
    extern "C" fn wait(_: *mut c_void) {
        GATE.wait();
        GATE.wait();
    }
    let function: extern "C" fn(*mut c_void) = wait;
    let code = call!(
        cuda, "cuLaunchHostFunc", stream => usize, function => extern "C" fn(*mut c_void), 0 => usize,
    );
    assert_eq!(code, 0);
    GATE.wait();
}

#[test]
fn memory_is_there_in_stream_order() {
    alone("memory_is_there_in_stream_order", &[], || {
        let cuda = Cuda::with_context();
        let (iota, mix) = (cuda.function("nvshare_iota_u64"), cuda.function("nvshare_mix_u64"));
        let (first, second, out) = (cuda.stream(1), cuda.stream(1), cuda.alloc(PAGE));
        let mut event = 0usize;
        assert_eq!(call!(cuda, "cuEventCreate", &mut event => &mut usize, 2 => u32), 0);
        let (before, pool) = (cuda.free_bytes(), default_pool(&cuda));
        hold(&cuda, first);
        let pointer = alloc(&cuda, PAGE, first);
        assert_eq!(cuda.free_bytes(), before - PAGE, "the room is taken at once");
        assert_eq!([get(&cuda, pool, USED), get(&cuda, pool, RESERVED)], [PAGE, PAGE]);
        assert_eq!(cuda.launch(iota, first, &[pointer, 100, 3]), 0);
        assert_eq!(call!(cuda, "cuEventRecord", event => usize, first => usize), 0);
        assert_eq!(call!(cuda, "cuStreamWaitEvent", second => usize, event => usize, 0 => u32), 0);
        assert_eq!(cuda.launch(mix, second, &[pointer, 100, 4]), 0);
        let copy = call!(
            cuda, "cuMemcpyDtoDAsync_v2", out => u64, pointer => u64, 800 => u64, second => usize,
        );
        assert_eq!(copy, 0);
        assert_eq!(free(&cuda, pointer, second), 0);
        assert_eq!(free(&cuda, pointer, second), 1, "once");
        assert_eq!([get(&cuda, pool, USED), get(&cuda, pool, RESERVED)], [0, PAGE]);
        GATE.wait();
        assert_eq!(cuda.sync(second), 0);
        assert_eq!(cuda.read(out, 100)[99], common::mix(common::iota(99, 3), 4));
        assert_eq!(cuda.free_bytes(), before, "given back when the host waited");
        assert_eq!([get(&cuda, pool, USED_HIGH), get(&cuda, pool, RESERVED_HIGH)], [PAGE, PAGE]);
        assert_eq!(set(&cuda, pool, USED_HIGH, 7), 1);
        assert_eq!(set(&cuda, pool, USED_HIGH, 0), 0);
        assert_eq!(get(&cuda, pool, USED_HIGH), 0);
    });
}

#[test]
fn a_use_before_the_allocation_is_illegal() {
    alone("a_use_before_the_allocation_is_illegal", &[], || {
        let cuda = Cuda::with_context();
        let (first, second) = (cuda.stream(1), cuda.stream(1));
        hold(&cuda, first);
        let pointer = alloc(&cuda, PAGE, first);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), second, &[pointer, 1, 1]), 0);
        assert_eq!(cuda.sync(second), ILLEGAL_ADDRESS, "no order between the streams");
        GATE.wait();
    });
}

#[test]
fn a_use_after_the_free_is_illegal() {
    alone("a_use_after_the_free_is_illegal", &[], || {
        let cuda = Cuda::with_context();
        // It is in nobody's way: the pool keeps its memory, and yet it is gone.
        assert_eq!(set(&cuda, default_pool(&cuda), RELEASE_THRESHOLD, u64::MAX), 0);
        let (iota, stream) = (cuda.function("nvshare_iota_u64"), cuda.stream(1));
        let pointer = alloc(&cuda, PAGE, stream);
        assert_eq!(cuda.launch(iota, stream, &[pointer, 1, 1]), 0);
        assert_eq!(free(&cuda, pointer, stream), 0);
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(cuda.launch(iota, stream, &[pointer, 1, 1]), 0);
        assert_eq!(cuda.sync(stream), ILLEGAL_ADDRESS);
    });
}

#[test]
fn a_pool_keeps_what_its_threshold_allows() {
    alone("a_pool_keeps_what_its_threshold_allows", &[], || {
        let cuda = Cuda::with_context();
        let (before, pool, stream) = (cuda.free_bytes(), default_pool(&cuda), cuda.stream(1));
        assert_eq!(set(&cuda, pool, RELEASE_THRESHOLD, 2 * PAGE), 0);
        let blocks: Vec<u64> = (0..3).map(|_| alloc(&cuda, PAGE, stream)).collect();
        assert!(blocks.iter().all(|&block| free(&cuda, block, stream) == 0));
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(get(&cuda, pool, RESERVED), 2 * PAGE);
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE);
        let again = alloc(&cuda, PAGE, stream);
        assert!(blocks.contains(&again), "what was kept is used again");
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE);
        assert_eq!(call!(cuda, "cuMemPoolTrimTo", pool => usize, 0 => usize), 0);
        assert_eq!(cuda.free_bytes(), before - PAGE, "all but what is in use");
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(call!(cuda, "cuMemFree_v2", again => u64), 0, "in no stream");
        assert_eq!(call!(cuda, "cuMemPoolTrimTo", pool => usize, 0 => usize), 0);
        assert_eq!(cuda.free_bytes(), before);
        let plain = cuda.alloc(PAGE);
        assert_eq!(free(&cuda, plain, stream), 0, "and what cuMemAlloc made goes in a stream");
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(cuda.free_bytes(), before);
    });
}

#[test]
fn a_full_gpu_refuses_or_waits_for_a_free() {
    alone("a_full_gpu_refuses_or_waits_for_a_free", &[("NVSHARE_SIM_MEMORY", "32MiB")], || {
        let cuda = Cuda::with_context();
        let (first, second) = (cuda.stream(1), cuda.stream(1));
        let before = cuda.free_bytes();
        let pointer = alloc(&cuda, 20 * MIB, first);
        assert_eq!(try_alloc(&cuda, 20 * MIB, second), Err(OUT_OF_MEMORY));
        hold(&cuda, first);
        assert_eq!(free(&cuda, pointer, first), 0);
        let same = alloc(&cuda, 20 * MIB, second);
        assert_eq!(same, pointer, "it has to wait for the free");
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), second, &[same, 10, 1]), 0);
        assert_eq!(call!(cuda, "cuStreamQuery", second => usize), NOT_READY);
        GATE.wait();
        assert_eq!(cuda.sync(second), 0);
        assert_eq!(free(&cuda, same, second), 0);
        assert_eq!(cuda.sync(second), 0);

        let pool = create_pool(&cuda, (4 * PAGE) as usize);
        assert_eq!(
            alloc_from(&cuda, pool, 5 * PAGE, first),
            Err(OUT_OF_MEMORY),
            "more than the pool may hold"
        );
        let pointer = alloc_from(&cuda, pool, 4 * PAGE, first).unwrap();
        assert_eq!(call!(cuda, "cuDeviceSetMemPool", 0 => i32, pool => usize), 0);
        assert_eq!(try_alloc(&cuda, PAGE, first), Err(OUT_OF_MEMORY), "the device's current pool is full");
        assert_eq!(call!(cuda, "cuMemPoolDestroy", pool => usize), 0);
        assert_eq!(alloc_from(&cuda, pool, PAGE, first), Err(1));
        let mut current = 0usize;
        assert_eq!(call!(cuda, "cuDeviceGetMemPool", &mut current => &mut usize, 0 => i32), 0);
        assert_eq!(current, default_pool(&cuda));
        assert_eq!(call!(cuda, "cuMemPoolDestroy", current => usize), 1, "not the device's own");
        assert_eq!(cuda.free_bytes(), before - 4 * PAGE, "it outlives the pool");
        assert_eq!(free(&cuda, pointer, first), 0);
        assert_eq!(cuda.sync(first), 0);
        assert_eq!(cuda.free_bytes(), before);
    });
}

#[test]
fn pools_are_opened_to_other_gpus_by_themselves() {
    let test = "pools_are_opened_to_other_gpus_by_themselves";
    alone(test, &[("NVSHARE_SIM_GPUS", "2")], || {
        let cuda = Cuda::load();
        let first = cuda.enter(0);
        let (pool, pointer) = (default_pool(&cuda), alloc(&cuda, PAGE, 0));
        assert_eq!(cuda.sync(0), 0);
        cuda.enter(1);
        let iota = cuda.function("nvshare_iota_u64");
        let allow = |device: i32, flags: u32| {
            let access = Access(on_gpu(device), flags);
            call!(cuda, "cuMemPoolSetAccess", pool => usize, &access => &Access, 1 => usize)
        };
        let allowed = |device: i32| {
            let (mut flags, location) = (9u32, on_gpu(device));
            let code = call!(
                cuda, "cuMemPoolGetAccess",
                &mut flags => &mut u32, pool => usize, &location => &Location,
            );
            assert_eq!(code, 0);
            flags
        };
        assert_eq!([allowed(0), allowed(1)], [3, 0]);
        assert_eq!(allow(0, 0), 1, "its own GPU can't be shut out");
        assert_eq!(allow(1, 3), 0);
        assert_eq!(cuda.launch(iota, 0, &[pointer, 10, 1]), 0);
        assert_eq!(cuda.sync(0), 0);
        assert_eq!(allow(1, 0), 0);
        assert_eq!(call!(cuda, "cuCtxEnablePeerAccess", first => usize, 0 => u32), 0);
        assert_eq!(cuda.launch(iota, 0, &[pointer, 10, 1]), 0);
        assert_eq!(cuda.sync(0), ILLEGAL_ADDRESS, "peer access is not for pools");
    });
}

const GRAPH_USED: u32 = 0;
const GRAPH_RESERVED: u32 = 2;

fn graph_memory(cuda: &Cuda, attribute: u32) -> u64 {
    let mut value = 9u64;
    let code = call!(
        cuda, "cuDeviceGetGraphMemAttribute", 0 => i32, attribute => u32, &mut value => &mut u64,
    );
    assert_eq!(code, 0);
    value
}

fn capture(cuda: &Cuda, stream: usize, body: impl FnOnce()) -> usize {
    assert_eq!(call!(cuda, "cuStreamBeginCapture_v2", stream => usize, 2 => u32), 0);
    body();
    let mut graph = 0usize;
    assert_eq!(call!(cuda, "cuStreamEndCapture", stream => usize, &mut graph => &mut usize), 0);
    graph
}

fn instantiate(cuda: &Cuda, graph: usize, flags: u64) -> Result<usize, i32> {
    let mut exec = 0usize;
    let code = call!(
        cuda, "cuGraphInstantiateWithFlags", &mut exec => &mut usize, graph => usize, flags => u64,
    );
    if code == 0 { Ok(exec) } else { Err(code) }
}

fn launch_graph(cuda: &Cuda, exec: usize, stream: usize) -> i32 {
    call!(cuda, "cuGraphLaunch", exec => usize, stream => usize)
}

#[test]
fn a_captured_allocation_belongs_to_the_graph() {
    alone("a_captured_allocation_belongs_to_the_graph", &[], || {
        let cuda = Cuda::with_context();
        let (iota, stream, out) = (cuda.function("nvshare_iota_u64"), cuda.stream(1), cuda.alloc(PAGE));
        let (before, outside) = (cuda.free_bytes(), alloc(&cuda, PAGE, stream));
        let mut pointer = 0;
        let graph = capture(&cuda, stream, || {
            pointer = alloc(&cuda, 2 * PAGE, stream);
            assert_eq!(cuda.launch(iota, stream, &[pointer, 2 * PAGE / 8, 7]), 0);
            let copy = call!(
                cuda, "cuMemcpyDtoDAsync_v2", out => u64, pointer => u64, 800 => u64, stream => usize,
            );
            assert_eq!(copy, 0);
            assert_eq!(free(&cuda, outside, stream), 1, "a graph can't free a pool's memory");
            assert_eq!(free(&cuda, pointer, stream), 0);
            assert_eq!(free(&cuda, pointer, stream), 1, "twice in one graph");
        });
        assert_eq!(free(&cuda, outside, stream), 0);
        assert_eq!(cuda.sync(stream), 0);
        let (mut nodes, mut count) = ([0usize; 4], 4usize);
        let code = call!(
            cuda, "cuGraphGetNodes", graph => usize, &mut nodes => &mut [usize; 4], &mut count => &mut usize,
        );
        assert_eq!((code, count), (0, 4));
        let kinds = nodes.map(|node| {
            let mut kind = 99u32;
            assert_eq!(call!(cuda, "cuGraphNodeGetType", node => usize, &mut kind => &mut u32), 0);
            kind
        });
        assert_eq!(kinds, [10, 0, 1, 11]);
        assert_eq!(cuda.free_bytes(), before, "nothing has been launched");

        let exec = instantiate(&cuda, graph, 0).unwrap();
        assert_eq!(instantiate(&cuda, graph, 0), Err(1), "one instance at a time");
        for _ in 0..2 {
            assert_eq!(launch_graph(&cuda, exec, stream), 0);
        }
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(cuda.read(out, 100)[99], common::iota(99, 7));
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE, "kept for the next launch");
        assert_eq!([graph_memory(&cuda, GRAPH_USED), graph_memory(&cuda, GRAPH_RESERVED)], [0, 2 * PAGE]);
        assert_eq!(call!(cuda, "cuDeviceGraphMemTrim", 0 => i32), 0);
        assert_eq!(cuda.free_bytes(), before);
        assert_eq!(launch_graph(&cuda, exec, stream), 0);
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(call!(cuda, "cuGraphExecDestroy", exec => usize), 0);
        assert!(instantiate(&cuda, graph, 0).is_ok(), "the first instance is gone");
        assert_eq!(cuda.launch(iota, stream, &[pointer, 1, 1]), 0);
        assert_eq!(cuda.sync(stream), ILLEGAL_ADDRESS, "it is there in the graph only");
    });
}

#[test]
fn memory_that_a_graph_leaves_is_freed_by_others() {
    alone("memory_that_a_graph_leaves_is_freed_by_others", &[], || {
        /// `CUDA_MEM_ALLOC_NODE_PARAMS`.
        #[repr(C)]
        struct Params(Props, usize, usize, u64, u64);
        let cuda = Cuda::with_context();
        let (before, stream) = (cuda.free_bytes(), cuda.stream(1));
        let (mut graph, mut node) = (0usize, 0usize);
        let mut params = Params(Props(1, 0, on_gpu(0), 0, 0, [0; 56]), 0, 0, PAGE, 0);
        assert_eq!(call!(cuda, "cuGraphCreate", &mut graph => &mut usize, 0 => u32), 0);
        let code = call!(
            cuda, "cuGraphAddMemAllocNode",
            &mut node => &mut usize, graph => usize, 0 => usize, 0 => usize, &mut params => &mut Params,
        );
        let (pointer, exec) = (params.4, instantiate(&cuda, graph, 0).unwrap());
        assert_eq!(code, 0);
        assert_eq!(free(&cuda, pointer, stream), 1, "not allocated yet");
        assert_eq!(launch_graph(&cuda, exec, stream), 0);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), stream, &[pointer, 10, 2]), 0);
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(cuda.read(pointer, 10)[9], common::iota(9, 2));
        assert_eq!(graph_memory(&cuda, GRAPH_USED), PAGE);
        assert_eq!(launch_graph(&cuda, exec, stream), 1, "the last one is still there");
        assert_eq!(call!(cuda, "cuDeviceGraphMemTrim", 0 => i32), 0);
        assert_eq!(cuda.free_bytes(), before - PAGE, "and not trimmed");
        assert_eq!(free(&cuda, pointer, stream), 0);
        assert_eq!(launch_graph(&cuda, exec, stream), 0, "freed in stream order");

        let mut other = 0usize;
        assert_eq!(call!(cuda, "cuGraphCreate", &mut other => &mut usize, 0 => u32), 0);
        let free_node = |node: &mut usize| {
            call!(
                cuda, "cuGraphAddMemFreeNode",
                node => &mut usize, other => usize, 0 => usize, 0 => usize, pointer => u64,
            )
        };
        assert_eq!(free_node(&mut node), 0);
        assert_eq!(free_node(&mut node), 1);
        let freeing = instantiate(&cuda, other, 0).unwrap();
        assert_eq!(launch_graph(&cuda, freeing, stream), 0);
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(graph_memory(&cuda, GRAPH_USED), 0);

        assert_eq!(call!(cuda, "cuGraphExecDestroy", exec => usize), 0);
        let forgiving = instantiate(&cuda, graph, 1).unwrap();
        for _ in 0..3 {
            assert_eq!(launch_graph(&cuda, forgiving, stream), 0, "frees what the last launch left");
        }
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(call!(cuda, "cuMemFree_v2", pointer => u64), 0);
        assert_eq!(call!(cuda, "cuDeviceGraphMemTrim", 0 => i32), 0);
        assert_eq!(cuda.free_bytes(), before);
    });
}
