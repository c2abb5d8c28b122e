//! Calls of graphs: captured or made node by node, launched, changed.
//!
//! Graphs, instances and nodes go by the driver's handles. A node comes behind one other, or behind none if that is 0.
//! Two kernels give words that a test can check: `iota` makes them of a seed, `mix` mixes a seed into them.

use super::{Answer, Caller, Code, DevicePointer, Handle, driver};
use nvshare_tools::Failure;
use nvshare_tools::cuda::{KERNELS, LaunchKernel};
use std::ffi::{CStr, CString, c_char, c_uint, c_void};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The two kernels, in one context.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    iota: Handle,
    mix: Handle,
}

/// `CUDA_KERNEL_NODE_PARAMS_v1`.
#[repr(C)]
struct KernelParams {
    function: Handle,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    arguments: *const *const u64,
    extra: usize,
}

/// `CUgraphExecUpdateResultInfo`.
#[repr(C)]
#[derive(Default)]
struct Updated {
    result: c_uint,
    error_node: Handle,
    error_from_node: Handle,
}

/// What `mix` kernels with these seeds make of what an `iota` kernel has written.
fn mixed(word: u64, seed: u64, mixes: &[u64]) -> u64 {
    let iota = seed.wrapping_add(word).wrapping_mul(GOLDEN);
    mixes.iter().fold(iota, |x, seed| x.rotate_left(13).wrapping_mul(GOLDEN).wrapping_add(*seed))
}

/// Makes a node with what `add` is told: where the handle goes, and the nodes before.
fn node(after: u64, add: impl FnOnce(*mut Handle, *const Handle, usize) -> Code) -> Answer {
    let (mut made, before): (Handle, Handle) = (0, after as Handle);
    let code = add(&mut made, &before, usize::from(before != 0));
    (code, made.to_string())
}

impl Caller {
    /// The kernels in the current context, loaded into it when they are first asked for there.
    fn kernels(&mut self) -> Result<Kernels, Failure> {
        let current = driver!(self, b"cuCtxGetCurrent", fn(*mut Handle));
        let mut context = 0;
        // SAFETY: a place for the answer.
        let code = unsafe { current(&mut context) };
        if code != 0 {
            return Err(Failure::with_status(1, format!("the current context is not known: {code}")));
        }
        if let Some(kernels) = self.kernels.get(&context) {
            return Ok(*kernels);
        }
        let load = driver!(self, b"cuModuleLoadData", fn(*mut Handle, *const c_void));
        let function = driver!(self, b"cuModuleGetFunction", fn(*mut Handle, Handle, *const c_char));
        let image = CString::new(KERNELS).expect("PTX is text without a zero");
        let mut module = 0;
        // SAFETY: a place for the answer, and a text that ends in a zero byte.
        let code = unsafe { load(&mut module, image.as_ptr().cast()) };
        let find = |name: &CStr| {
            let mut found = 0;
            // SAFETY: as above.
            match unsafe { function(&mut found, module, name.as_ptr()) } {
                0 => Ok(found),
                code => Err(Failure::with_status(1, format!("no kernel {name:?}: {code}"))),
            }
        };
        if code != 0 {
            return Err(Failure::with_status(1, format!("the kernels cannot be loaded: {code}")));
        }
        let kernels = Kernels { iota: find(c"nvshare_iota_u64")?, mix: find(c"nvshare_mix_u64")? };
        self.kernels.insert(context, kernels);
        Ok(kernels)
    }

    /// The kernel of that name with its arguments: address, words, seed.
    fn with_kernel(
        &mut self,
        name: &str,
        arguments: [u64; 3],
        use_it: impl FnOnce(&KernelParams) -> Code,
    ) -> Result<Code, Failure> {
        let Kernels { iota, mix } = self.kernels()?;
        let function = if name.ends_with("iota") { iota } else { mix };
        let addresses = arguments.each_ref().map(|argument| argument as *const u64);
        let (grid, block, arguments) = ([8, 1, 1], [128, 1, 1], addresses.as_ptr());
        Ok(use_it(&KernelParams { function, grid, block, shared: 0, arguments, extra: 0 }))
    }

    /// `None` if it is no such call.
    pub(super) fn graphs(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let nothing = |code: Code| (code, String::new());
        // SAFETY, for every call below: as in the module above. Arguments of kernels are three words, and live until
        // the call is over, which copies them.
        let answer = match (name, numbers) {
            ("iota" | "mix", [address, words, seed, stream]) => {
                // SAFETY: the type is that of cuda.h.
                let launch = unsafe { self.library.get::<LaunchKernel>(b"cuLaunchKernel") };
                let launch = *launch.map_err(|error| Failure::with_status(1, error.to_string()))?;
                let (stream, none) = (*stream as Handle, std::ptr::null());
                nothing(self.with_kernel(name, [*address, *words, *seed], |kernel| {
                    let arguments = kernel.arguments.cast();
                    // SAFETY: as said.
                    unsafe { launch(kernel.function, 8, 1, 1, 128, 1, 1, 0, stream, arguments, none) }
                })?)
            }
            // Whether there is what an iota and then mixes with these seeds have made.
            ("mixed", [address, words, seed, mixes @ ..]) => {
                let copy = driver!(self, b"cuMemcpyDtoH_v2", fn(*mut c_void, DevicePointer, usize));
                let mut found = vec![0u64; *words as usize];
                // SAFETY: as said, and the buffer has these words.
                let code = unsafe { copy(found.as_mut_ptr().cast(), *address, found.len() * 8) };
                let right = found.iter().zip(0..).all(|(found, word)| *found == mixed(word, *seed, mixes));
                (code, if right { "right" } else { "wrong" }.into())
            }
            ("graph", []) => {
                let create = driver!(self, b"cuGraphCreate", fn(*mut Handle, c_uint));
                let mut graph = 0;
                // SAFETY: as said.
                let code = unsafe { create(&mut graph, 0) };
                (code, graph.to_string())
            }
            ("add-iota" | "add-mix", [graph, after, address, words, seed]) => {
                let add = driver!(
                    self,
                    b"cuGraphAddKernelNode",
                    fn(*mut Handle, Handle, *const Handle, usize, *const KernelParams)
                );
                let mut answer = (0, String::new());
                self.with_kernel(name, [*address, *words, *seed], |kernel| {
                    answer = node(*after, |node, before, count| {
                        // SAFETY: as said.
                        unsafe { add(node, *graph as Handle, before, count, kernel) }
                    });
                    answer.0
                })?;
                answer
            }
            ("add-child", [graph, after, child]) => {
                let add = driver!(
                    self,
                    b"cuGraphAddChildGraphNode",
                    fn(*mut Handle, Handle, *const Handle, usize, Handle)
                );
                node(*after, |node, before, count| {
                    // SAFETY: as said.
                    unsafe { add(node, *graph as Handle, before, count, *child as Handle) }
                })
            }
            ("add-copy", [graph, after, dst, src, bytes]) => {
                const DEVICE: u64 = 2;
                let add = driver!(
                    self,
                    b"cuGraphAddMemcpyNode",
                    fn(*mut Handle, Handle, *const Handle, usize, *const [u64; 25], Handle)
                );
                // CUDA_MEMCPY3D, one row from device to device.
                let mut params = [0; 25];
                (params[4], params[6], params[9]) = (DEVICE, *src, *bytes);
                (params[15], params[17], params[20]) = (DEVICE, *dst, *bytes);
                (params[22], params[23], params[24]) = (*bytes, 1, 1);
                let context = self.context(0)?;
                node(*after, |node, before, count| {
                    // SAFETY: as said.
                    unsafe { add(node, *graph as Handle, before, count, &params, context) }
                })
            }
            ("instantiate", [graph]) => {
                let instantiate = driver!(self, b"cuGraphInstantiateWithFlags", fn(*mut Handle, Handle, u64));
                let mut exec = 0;
                // SAFETY: as said.
                let code = unsafe { instantiate(&mut exec, *graph as Handle, 0) };
                (code, exec.to_string())
            }
            ("launch", [exec, stream]) => {
                let launch = driver!(self, b"cuGraphLaunch", fn(Handle, Handle));
                // SAFETY: as said.
                nothing(unsafe { launch(*exec as Handle, *stream as Handle) })
            }
            ("update", [exec, graph]) => {
                let update = driver!(self, b"cuGraphExecUpdate_v2", fn(Handle, Handle, *mut Updated));
                let mut updated = Updated::default();
                // SAFETY: as said.
                let code = unsafe { update(*exec as Handle, *graph as Handle, &mut updated) };
                (code, format!("{} {} {}", updated.result, updated.error_node, updated.error_from_node))
            }
            ("exec-iota" | "exec-mix", [exec, node, address, words, seed]) => {
                let set =
                    driver!(self, b"cuGraphExecKernelNodeSetParams", fn(Handle, Handle, *const KernelParams));
                let (exec, node) = (*exec as Handle, *node as Handle);
                // SAFETY: as said.
                let set = |kernel: &KernelParams| unsafe { set(exec, node, kernel) };
                nothing(self.with_kernel(name, [*address, *words, *seed], set)?)
            }
            ("exec-child", [exec, node, child]) => {
                let set = driver!(self, b"cuGraphExecChildGraphNodeSetParams", fn(Handle, Handle, Handle));
                // SAFETY: as said.
                nothing(unsafe { set(*exec as Handle, *node as Handle, *child as Handle) })
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
