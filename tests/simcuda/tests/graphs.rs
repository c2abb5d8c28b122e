//! Graphs made node by node, graphs inside graphs, clones, and changes of instances.

mod common;

use common::*;

const INVALID_VALUE: i32 = 1;
const NOT_SUPPORTED: i32 = 801;
const UPDATE_FAILURE: i32 = 910;

/// `CUDA_KERNEL_NODE_PARAMS_v1` for a kernel with these arguments, which must outlive it.
#[repr(C)]
struct KernelParams {
    function: usize,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    arguments: *const *const u64,
    extra: usize,
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[repr(C)]
struct MemsetParams {
    dst: u64,
    pitch: usize,
    value: u32,
    element: u32,
    width: usize,
    height: usize,
}

/// `CUDA_MEMCPY3D` from device to device.
fn copy_params(dst: u64, src: u64, bytes: u64) -> [u64; 25] {
    const DEVICE: u64 = 2;
    let mut words = [0; 25];
    (words[4], words[6], words[9]) = (DEVICE, src, bytes);
    (words[15], words[17], words[20]) = (DEVICE, dst, bytes);
    (words[22], words[23], words[24]) = (bytes, 1, 1);
    words
}

struct Graph<'a> {
    cuda: &'a Cuda,
    handle: usize,
}

impl<'a> Graph<'a> {
    fn new(cuda: &'a Cuda) -> Self {
        let mut handle = 0;
        assert_eq!(call!(cuda, "cuGraphCreate", &mut handle => &mut usize, 0 => u32), 0);
        Graph { cuda, handle }
    }

    fn kernel(&self, after: &[usize], name: &str, arguments: &[u64]) -> usize {
        let (cuda, mut node) = (self.cuda, 0usize);
        let code = with_kernel(cuda, name, arguments, |params| {
            call!(
                cuda, "cuGraphAddKernelNode",
                &mut node => &mut usize, self.handle => usize, after.as_ptr() => *const usize,
                after.len() => usize, params => &KernelParams,
            )
        });
        assert_eq!(code, 0);
        node
    }

    fn child(&self, after: &[usize], child: usize) -> Result<usize, i32> {
        let (cuda, mut node) = (self.cuda, 0usize);
        let code = call!(
            cuda, "cuGraphAddChildGraphNode",
            &mut node => &mut usize, self.handle => usize, after.as_ptr() => *const usize,
            after.len() => usize, child => usize,
        );
        if code == 0 { Ok(node) } else { Err(code) }
    }

    fn set(&self, after: &[usize], dst: u64, value: u32, words: usize) -> Result<usize, i32> {
        let (cuda, mut node) = (self.cuda, 0usize);
        let params = MemsetParams { dst, pitch: 0, value, element: 4, width: words, height: 1 };
        let code = call!(
            cuda, "cuGraphAddMemsetNode",
            &mut node => &mut usize, self.handle => usize, after.as_ptr() => *const usize,
            after.len() => usize, &params => &MemsetParams, context(cuda) => usize,
        );
        if code == 0 { Ok(node) } else { Err(code) }
    }

    fn copy(&self, after: &[usize], dst: u64, src: u64, bytes: u64) -> Result<usize, i32> {
        let (cuda, mut node) = (self.cuda, 0usize);
        let params = copy_params(dst, src, bytes);
        let code = call!(
            cuda, "cuGraphAddMemcpyNode",
            &mut node => &mut usize, self.handle => usize, after.as_ptr() => *const usize,
            after.len() => usize, &params => &[u64; 25], context(cuda) => usize,
        );
        if code == 0 { Ok(node) } else { Err(code) }
    }

    fn instance(&self) -> usize {
        let (cuda, mut exec) = (self.cuda, 0usize);
        let code = call!(
            cuda, "cuGraphInstantiateWithFlags",
            &mut exec => &mut usize, self.handle => usize, 0 => u64,
        );
        assert_eq!(code, 0);
        exec
    }

    fn edges(&self) -> Vec<(usize, usize)> {
        let (cuda, mut count) = (self.cuda, 0usize);
        let get = |from: *mut usize, to: *mut usize, count: &mut usize| {
            call!(
                cuda, "cuGraphGetEdges",
                self.handle => usize, from => *mut usize, to => *mut usize, count => &mut usize,
            )
        };
        assert_eq!(get(std::ptr::null_mut(), std::ptr::null_mut(), &mut count), 0);
        let (mut from, mut to) = (vec![0; count], vec![0; count]);
        assert_eq!(get(from.as_mut_ptr(), to.as_mut_ptr(), &mut count), 0);
        from.into_iter().zip(to).collect()
    }
}

fn context(cuda: &Cuda) -> usize {
    let mut context = 0usize;
    assert_eq!(call!(cuda, "cuCtxGetCurrent", &mut context => &mut usize), 0);
    context
}

fn with_kernel(cuda: &Cuda, name: &str, arguments: &[u64], use_it: impl FnOnce(&KernelParams) -> i32) -> i32 {
    let addresses: Vec<*const u64> = arguments.iter().map(|argument| argument as *const u64).collect();
    use_it(&KernelParams {
        function: cuda.function(name),
        grid: [8, 1, 1],
        block: [128, 1, 1],
        shared: 0,
        arguments: addresses.as_ptr(),
        extra: 0,
    })
}

fn run(cuda: &Cuda, exec: usize) {
    assert_eq!(call!(cuda, "cuGraphLaunch", exec => usize, 0 => usize), 0);
    assert_eq!(cuda.sync(0), 0);
}

fn update(cuda: &Cuda, exec: usize, graph: usize) -> (i32, u64, usize) {
    #[repr(C)]
    struct Info(u64, usize, usize);
    let mut info = Info(9, 9, 9);
    let code = call!(
        cuda, "cuGraphExecUpdate_v2",
        exec => usize, graph => usize, &mut info => &mut Info,
    );
    (code, info.0 & 0xffff_ffff, info.2)
}

#[test]
fn nodes_run_in_the_order_of_their_edges() {
    alone("nodes_run_in_the_order_of_their_edges", &[], || {
        let cuda = Cuda::with_context();
        let (a, b) = (cuda.alloc(8000), cuda.alloc(8000));
        let graph = Graph::new(&cuda);
        let first = graph.kernel(&[], "nvshare_iota_u64", &[a, 1000, 5]);
        let second = graph.copy(&[first], b, a, 8000).unwrap();
        let third = graph.kernel(&[second], "nvshare_mix_u64", &[b, 1000, 7]);
        let side = graph.set(&[first], a + 4000, 3, 2).unwrap();
        assert_eq!(graph.edges(), [(first, second), (second, third), (first, side)]);
        let (mut before, mut count) = ([0usize; 2], 2usize);
        let code = call!(
            cuda, "cuGraphNodeGetDependencies",
            third => usize, &mut before => &mut [usize; 2], &mut count => &mut usize,
        );
        assert_eq!((code, before, count), (0, [second, 0], 1));
        assert_eq!(graph.child(&[second, second], graph.handle), Err(INVALID_VALUE), "an edge twice");
        assert_eq!(graph.set(&[12345], a, 1, 1), Err(INVALID_VALUE), "behind what is no node of it");
        let exec = graph.instance();
        assert_eq!(call!(cuda, "cuGraphDestroy", graph.handle => usize), 0);
        run(&cuda, exec);
        assert_eq!(cuda.read(b, 1000)[999], mix(iota(999, 5), 7));
        assert_eq!(cuda.read(a + 4000, 1), [3 << 32 | 3]);
    });
}

/// As with a real driver, which asks whose memory it is when the node is made.
#[test]
fn a_copy_or_a_set_needs_its_memory_when_it_is_made() {
    alone("a_copy_or_a_set_needs_its_memory_when_it_is_made", &[], || {
        let cuda = Cuda::with_context();
        let (there, gone) = (cuda.alloc(PAGE), cuda.reserve(PAGE));
        let graph = Graph::new(&cuda);
        assert_eq!(graph.copy(&[], there, gone, 64), Err(INVALID_VALUE));
        assert_eq!(graph.copy(&[], gone, there, 64), Err(INVALID_VALUE));
        assert_eq!(graph.set(&[], gone, 1, 1), Err(INVALID_VALUE));
        cuda.back(gone, PAGE);
        assert!(graph.copy(&[], there, gone, 64).is_ok() && graph.set(&[], gone, 1, 1).is_ok());
        assert_eq!(cuda.counters().illegal_accesses, 0);
    });
}

#[test]
fn a_child_is_a_copy_that_can_be_replaced_by_one_of_the_same_shape() {
    alone("a_child_is_a_copy_that_can_be_replaced_by_one_of_the_same_shape", &[], || {
        let cuda = Cuda::with_context();
        let a = cuda.alloc(8000);
        let child = Graph::new(&cuda);
        child.kernel(&[], "nvshare_iota_u64", &[a, 1000, 1]);
        let parent = Graph::new(&cuda);
        let node = parent.child(&[], child.handle).unwrap();
        parent.kernel(&[node], "nvshare_mix_u64", &[a, 1000, 7]);
        // Too late for the copy.
        child.kernel(&[], "nvshare_null", &[]);
        let (mut inside, mut kind) = (0usize, 9u32);
        let code = call!(
            cuda, "cuGraphChildGraphNodeGetGraph", node => usize, &mut inside => &mut usize,
        );
        assert_eq!(code, 0);
        assert_eq!(call!(cuda, "cuGraphNodeGetType", node => usize, &mut kind => &mut u32), 0);
        assert_eq!(kind, 4);
        assert_eq!(call!(cuda, "cuGraphDestroy", inside => usize), INVALID_VALUE, "it is the node's");
        let exec = parent.instance();
        run(&cuda, exec);
        assert_eq!(cuda.read(a, 1000)[999], mix(iota(999, 1), 7));
        assert_eq!(cuda.counters().launches, 2);

        let set = |graph: usize| {
            call!(
                cuda, "cuGraphExecChildGraphNodeSetParams",
                exec => usize, node => usize, graph => usize,
            )
        };
        assert_eq!(set(child.handle), INVALID_VALUE, "it has another node now");
        let other = Graph::new(&cuda);
        other.kernel(&[], "nvshare_iota_u64", &[a, 1000, 2]);
        assert_eq!(set(other.handle), 0);
        run(&cuda, exec);
        assert_eq!(cuda.read(a, 1000)[999], mix(iota(999, 2), 7));
    });
}

#[test]
fn a_clone_is_a_graph_of_its_own() {
    alone("a_clone_is_a_graph_of_its_own", &[], || {
        let cuda = Cuda::with_context();
        let a = cuda.alloc(8000);
        let graph = Graph::new(&cuda);
        let node = graph.kernel(&[], "nvshare_iota_u64", &[a, 1000, 1]);
        let (mut clone, mut inside) = (0usize, 0usize);
        assert_eq!(call!(cuda, "cuGraphClone", &mut clone => &mut usize, graph.handle => usize), 0);
        let code = call!(
            cuda, "cuGraphNodeFindInClone", &mut inside => &mut usize, node => usize, clone => usize,
        );
        assert_eq!(code, 0);
        let code = with_kernel(
            &cuda,
            "nvshare_iota_u64",
            &[a, 1000, 9],
            |params| call!(cuda, "cuGraphKernelNodeSetParams", inside => usize, params => &KernelParams),
        );
        assert_eq!(code, 0);
        run(&cuda, graph.instance());
        assert_eq!(cuda.read(a, 1), [iota(0, 1)], "the original is as it was");
        run(&cuda, Graph { cuda: &cuda, handle: clone }.instance());
        assert_eq!(cuda.read(a, 1), [iota(0, 9)]);
        let code = call!(
            cuda, "cuGraphNodeFindInClone", &mut inside => &mut usize, clone => usize, clone => usize,
        );
        assert_eq!(code, INVALID_VALUE);
    });
}

#[test]
fn an_instance_is_updated_by_a_graph_of_its_shape_and_by_no_other() {
    alone("an_instance_is_updated_by_a_graph_of_its_shape_and_by_no_other", &[], || {
        let cuda = Cuda::with_context();
        let (a, b) = (cuda.alloc(8000), cuda.alloc(8000));
        let graph_of = |seed: u64, mixed: bool| {
            let graph = Graph::new(&cuda);
            let first = graph.kernel(&[], "nvshare_iota_u64", &[a, 1000, seed]);
            let second = match mixed {
                true => graph.kernel(&[first], "nvshare_mix_u64", &[a, 1000, seed]),
                false => graph.copy(&[first], b, a, 8000).unwrap(),
            };
            (graph, first, second)
        };
        let (graph, first, _) = graph_of(1, true);
        let exec = graph.instance();
        assert_eq!(update(&cuda, exec, graph_of(2, true).0.handle), (0, 0, 0));
        run(&cuda, exec);
        assert_eq!(cuda.read(a, 1), [mix(iota(0, 2), 2)]);

        let (copying, _, copy) = graph_of(3, false);
        assert_eq!(update(&cuda, exec, copying.handle), (UPDATE_FAILURE, 3, copy), "another kind of node");
        let (longer, _, last) = graph_of(3, true);
        let more = longer.kernel(&[last], "nvshare_null", &[]);
        assert_eq!(update(&cuda, exec, longer.handle), (UPDATE_FAILURE, 2, more), "another shape");
        run(&cuda, exec);
        assert_eq!(cuda.read(a, 1), [mix(iota(0, 2), 2)], "a refused update changes nothing");

        let set = |node: usize, name: &str, arguments: &[u64]| {
            with_kernel(&cuda, name, arguments, |params| {
                call!(
                    cuda, "cuGraphExecKernelNodeSetParams",
                    exec => usize, node => usize, params => &KernelParams,
                )
            })
        };
        assert_eq!(set(first, "nvshare_iota_u64", &[a, 1000, 4]), 0);
        assert_eq!(set(copy, "nvshare_null", &[]), INVALID_VALUE, "not a node of this graph");
        run(&cuda, exec);
        assert_eq!(cuda.read(a, 1), [mix(iota(0, 4), 2)]);
        let exec = copying.instance();
        let params = copy_params(b + 800, a, 80);
        let code = call!(
            cuda, "cuGraphExecMemcpyNodeSetParams",
            exec => usize, copy => usize, &params => &[u64; 25], context(&cuda) => usize,
        );
        assert_eq!(code, 0);
        run(&cuda, exec);
        assert_eq!(cuda.read(b + 800, 10)[9], iota(9, 3));
        assert_eq!(cuda.read(b, 1), [0]);
    });
}

#[test]
fn a_graph_with_memory_of_its_own_is_neither_cloned_nor_put_into_another() {
    alone("a_graph_with_memory_of_its_own_is_neither_cloned_nor_put_into_another", &[], || {
        let cuda = Cuda::with_context();
        let (stream, mut pointer, mut graph) = (cuda.stream(1), 0u64, 0usize);
        assert_eq!(call!(cuda, "cuStreamBeginCapture_v2", stream => usize, 2 => u32), 0);
        let code = call!(
            cuda, "cuMemAllocAsync", &mut pointer => &mut u64, PAGE => u64, stream => usize,
        );
        assert_eq!(code, 0);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), stream, &[pointer, 10, 1]), 0);
        assert_eq!(call!(cuda, "cuMemFreeAsync", pointer => u64, stream => usize), 0);
        assert_eq!(call!(cuda, "cuStreamEndCapture", stream => usize, &mut graph => &mut usize), 0);
        let mut clone = 0usize;
        assert_eq!(call!(cuda, "cuGraphClone", &mut clone => &mut usize, graph => usize), NOT_SUPPORTED);
        assert_eq!(Graph::new(&cuda).child(&[], graph), Err(NOT_SUPPORTED));
        let exec = Graph { cuda: &cuda, handle: graph }.instance();
        run(&cuda, exec);
        assert_eq!(update(&cuda, exec, graph).1, 6, "nor is an instance of it updated");
    });
}
