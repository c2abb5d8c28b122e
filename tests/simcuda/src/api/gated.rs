//! Every entry point that submits work to the GPU, or looks at memory that it is given an address of: the ones that
//! nvshare holds at its gate while memory is out, and that [`crate::watch`] watches.
//!
//! Most are implemented in the other modules. The rest are here too, so that every one of them can be called and seen
//! to come too early: GL and EGL interoperability, external semaphores, batches, memory operations of streams, the
//! oldest forms. They have one body, which refuses as a driver without the feature does.
//!
//! Arguments are words, as many as the function has: pointers, handles and integers, none of which is looked at.

use std::collections::HashSet;
use std::ffi::c_int;
use std::sync::OnceLock;

use crate::abi::{Error, Result};
use crate::context;

/// Whether calls of this name pass nvshare's gate.
pub(crate) fn is_gated(name: &str) -> bool {
    static NAMES: OnceLock<HashSet<&'static str>> = OnceLock::new();
    let names = || IMPLEMENTED.iter().copied().chain(EXPORTS.iter().map(|export| export.name)).collect();
    NAMES.get_or_init(names).contains(name)
}

fn unsupported() -> Result {
    context::healthy()?;
    Err(Error::NOT_SUPPORTED)
}

macro_rules! gated {
    (
        implemented { $($implemented:ident)* }
        unsupported { $($arguments:tt { $($name:ident @ $since:literal)* })* }
    ) => {
        /// Those that other modules implement.
        const IMPLEMENTED: &[&str] = &[$(stringify!($implemented),)*];

        pub(super) const EXPORTS: &[super::Export] = &[
            $($(super::Export { name: stringify!($name), address: $name as *const std::ffi::c_void },)*)*
        ];

        /// The version of the API that each of `EXPORTS` came with.
        pub(super) const SINCE: &[(&str, c_int)] = &[$($((stringify!($name), $since),)*)*];

        $($(gated!(@function $name $arguments);)*)*
    };
    (@function $name:ident ($($argument:ident)*)) => {
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments)]
        extern "C" fn $name($($argument: usize),*) -> i32 {
            let _ = ($($argument,)*);
            super::enter(stringify!($name), unsupported)
        }
    };
}

gated! {
    implemented {
        cuGraphAddChildGraphNode cuGraphAddMemcpyNode cuGraphAddMemsetNode cuGraphExecChildGraphNodeSetParams
        cuGraphExecMemcpyNodeSetParams cuGraphExecMemsetNodeSetParams cuGraphExecUpdate cuGraphExecUpdate_v2
        cuGraphInstantiate cuGraphInstantiateWithFlags cuGraphInstantiateWithParams
        cuGraphInstantiateWithParams_ptsz cuGraphInstantiate_v2 cuGraphLaunch cuGraphLaunch_ptsz
        cuGraphMemcpyNodeSetParams cuGraphMemsetNodeSetParams cuGraphUpload cuGraphUpload_ptsz
        cuIpcGetMemHandle cuLaunchCooperativeKernel cuLaunchCooperativeKernel_ptsz cuLaunchHostFunc
        cuLaunchHostFunc_ptsz cuLaunchHostFunc_v2 cuLaunchHostFunc_v2_ptsz cuLaunchKernel cuLaunchKernelEx
        cuLaunchKernelEx_ptsz cuLaunchKernel_ptsz cuMemAdvise cuMemAdvise_v2 cuMemGetAccess cuMemPrefetchAsync
        cuMemPrefetchAsync_ptsz cuMemPrefetchAsync_v2 cuMemPrefetchAsync_v2_ptsz cuMemcpy cuMemcpy2DAsync_v2
        cuMemcpy2DAsync_v2_ptsz cuMemcpy2DUnaligned_v2 cuMemcpy2DUnaligned_v2_ptds cuMemcpy2D_v2
        cuMemcpy2D_v2_ptds cuMemcpy3DAsync_v2 cuMemcpy3DAsync_v2_ptsz cuMemcpy3DPeer cuMemcpy3DPeerAsync
        cuMemcpy3DPeerAsync_ptsz cuMemcpy3DPeer_ptds cuMemcpy3D_v2 cuMemcpy3D_v2_ptds cuMemcpyAsync
        cuMemcpyAsync_ptsz cuMemcpyAtoA_v2 cuMemcpyAtoA_v2_ptds cuMemcpyAtoD_v2 cuMemcpyAtoD_v2_ptds
        cuMemcpyAtoHAsync_v2 cuMemcpyAtoHAsync_v2_ptsz cuMemcpyAtoH_v2 cuMemcpyAtoH_v2_ptds cuMemcpyDtoA_v2
        cuMemcpyDtoA_v2_ptds cuMemcpyDtoDAsync_v2 cuMemcpyDtoDAsync_v2_ptsz cuMemcpyDtoD_v2
        cuMemcpyDtoD_v2_ptds cuMemcpyDtoHAsync_v2 cuMemcpyDtoHAsync_v2_ptsz cuMemcpyDtoH_v2
        cuMemcpyDtoH_v2_ptds cuMemcpyHtoAAsync_v2 cuMemcpyHtoAAsync_v2_ptsz cuMemcpyHtoA_v2
        cuMemcpyHtoA_v2_ptds cuMemcpyHtoDAsync_v2 cuMemcpyHtoDAsync_v2_ptsz cuMemcpyHtoD_v2
        cuMemcpyHtoD_v2_ptds cuMemcpyPeer cuMemcpyPeerAsync cuMemcpyPeerAsync_ptsz cuMemcpyPeer_ptds
        cuMemcpy_ptds cuMemsetD16Async cuMemsetD16Async_ptsz cuMemsetD16_v2 cuMemsetD16_v2_ptds
        cuMemsetD2D16Async cuMemsetD2D16Async_ptsz cuMemsetD2D16_v2 cuMemsetD2D16_v2_ptds cuMemsetD2D32Async
        cuMemsetD2D32Async_ptsz cuMemsetD2D32_v2 cuMemsetD2D32_v2_ptds cuMemsetD2D8Async
        cuMemsetD2D8Async_ptsz cuMemsetD2D8_v2 cuMemsetD2D8_v2_ptds cuMemsetD32Async cuMemsetD32Async_ptsz
        cuMemsetD32_v2 cuMemsetD32_v2_ptds cuMemsetD8Async cuMemsetD8Async_ptsz cuMemsetD8_v2
        cuMemsetD8_v2_ptds cuPointerSetAttribute cuStreamAddCallback cuStreamAddCallback_ptsz
        cuStreamAttachMemAsync cuStreamAttachMemAsync_ptsz cuSurfObjectCreate cuTexObjectCreate
        cuStreamWaitValue32 cuStreamWaitValue32_ptsz cuStreamWaitValue32_v2 cuStreamWaitValue32_v2_ptsz
        cuStreamWaitValue64 cuStreamWaitValue64_ptsz cuStreamWaitValue64_v2 cuStreamWaitValue64_v2_ptsz
        cuStreamWriteValue32 cuStreamWriteValue32_ptsz cuStreamWriteValue32_v2 cuStreamWriteValue32_v2_ptsz
        cuStreamWriteValue64 cuStreamWriteValue64_ptsz cuStreamWriteValue64_v2 cuStreamWriteValue64_v2_ptsz
    }
    unsupported {
        (a) {
            cuGLUnmapBufferObject @ 2_000 cuLaunch @ 2_000 cuMemcpy2D @ 2_000 cuMemcpy2DUnaligned @ 2_000
            cuMemcpy3D @ 2_000
        }
        (a b) {
            cuGLUnmapBufferObjectAsync @ 2_030 cuGraphBatchMemOpNodeSetParams @ 11_070
            cuGraphNodeSetParams @ 12_020 cuGraphNodeSetParams_v2 @ 13_040 cuMemcpy2DAsync @ 2_000
            cuMemcpy3DAsync @ 2_000
        }
        (a b c) {
            cuGLMapBufferObject @ 2_000 cuGLMapBufferObject_v2 @ 3_020 cuGLMapBufferObject_v2_ptds @ 7_000
            cuGraphExecBatchMemOpNodeSetParams @ 11_070 cuGraphExecNodeSetParams @ 12_020
            cuGraphicsMapResources @ 3_000 cuGraphicsMapResources_ptsz @ 7_000
            cuGraphicsUnmapResources @ 3_000 cuGraphicsUnmapResources_ptsz @ 7_000
            cuLaunchCooperativeKernelMultiDevice @ 9_000 cuLaunchGrid @ 2_000 cuMemMapArrayAsync @ 11_010
            cuMemMapArrayAsync_ptsz @ 11_010 cuMemcpy3DWithAttributesAsync @ 13_020
            cuMemcpy3DWithAttributesAsync_ptsz @ 13_020 cuMemcpyDtoD @ 2_000 cuMemcpyDtoH @ 2_000
            cuMemcpyHtoD @ 2_000 cuMemsetD16 @ 2_000 cuMemsetD32 @ 2_000 cuMemsetD8 @ 2_000
        }
        (a b c d) {
            cuFabricCpyBatchAsync @ 13_050 cuFabricCpyBatchAsync_ptsz @ 13_050
            cuGLMapBufferObjectAsync @ 2_030 cuGLMapBufferObjectAsync_v2 @ 3_020
            cuGLMapBufferObjectAsync_v2_ptsz @ 7_000 cuLaunchGridAsync @ 2_000
            cuMemcpy3DBatchAsync_v2 @ 13_000 cuMemcpy3DBatchAsync_v2_ptsz @ 13_000 cuMemcpyAtoD @ 2_000
            cuMemcpyAtoH @ 2_000 cuMemcpyDtoA @ 2_000 cuMemcpyDtoDAsync @ 3_000 cuMemcpyDtoHAsync @ 2_000
            cuMemcpyHtoA @ 2_000 cuMemcpyHtoDAsync @ 2_000 cuSignalExternalSemaphoresAsync @ 10_000
            cuSignalExternalSemaphoresAsync_ptsz @ 10_000 cuStreamBatchMemOp @ 8_000
            cuStreamBatchMemOp_ptsz @ 8_000 cuStreamBatchMemOp_v2 @ 11_070 cuStreamBatchMemOp_v2_ptsz @ 11_070
            cuTexRefSetAddress @ 2_000 cuTexRefSetAddress2D @ 2_020
            cuTexRefSetAddress2D_v2 @ 3_020 cuTexRefSetAddress2D_v3 @ 4_010 cuTexRefSetAddress_v2 @ 3_020
            cuWaitExternalSemaphoresAsync @ 10_000 cuWaitExternalSemaphoresAsync_ptsz @ 10_000
        }
        (a b c d e) {
            cuGraphAddBatchMemOpNode @ 11_070 cuGraphAddNode @ 12_020 cuMemBatchDecompressAsync @ 12_060
            cuMemBatchDecompressAsync_ptsz @ 12_060 cuMemDiscardBatchAsync @ 13_000
            cuMemDiscardBatchAsync_ptsz @ 13_000 cuMemGetLocationInfo @ 13_040 cuMemRangeGetAttribute @ 8_000
            cuMemcpy3DBatchAsync @ 12_080 cuMemcpy3DBatchAsync_ptsz @ 12_080 cuMemcpyAtoA @ 2_000
            cuMemcpyAtoHAsync @ 2_000 cuMemcpyHtoAAsync @ 2_000 cuMemcpyWithAttributesAsync @ 13_020
            cuMemcpyWithAttributesAsync_ptsz @ 13_020 cuMemsetD2D16 @ 2_000 cuMemsetD2D32 @ 2_000
            cuMemsetD2D8 @ 2_000 cuMulticastBindAddr @ 12_010
        }
        (a b c d e f) {
            cuGraphAddNode_v2 @ 12_030 cuGraphAddNode_v3 @ 13_040 cuLogicalEndpointBindAddr @ 13_030
            cuMemRangeGetAttributes @ 8_000 cuMulticastBindAddr_v2 @ 13_010
        }
        (a b c d e f g h) {
            cuMemDiscardAndPrefetchBatchAsync @ 13_000 cuMemDiscardAndPrefetchBatchAsync_ptsz @ 13_000
            cuMemPrefetchBatchAsync @ 13_000 cuMemPrefetchBatchAsync_ptsz @ 13_000
            cuMemcpyBatchAsync_v2 @ 13_000 cuMemcpyBatchAsync_v2_ptsz @ 13_000
        }
        (a b c d e f g h i) {
            cuMemcpyBatchAsync @ 12_080 cuMemcpyBatchAsync_ptsz @ 12_080
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_to_be_implemented_is_exported_by_another_module() {
        let own: HashSet<_> = EXPORTS.iter().map(|export| export.name).collect();
        let all: HashSet<_> = crate::api::exports().map(|export| export.name).collect();
        for name in IMPLEMENTED {
            assert!(all.contains(name) && !own.contains(name), "{name}");
        }
        assert!(
            is_gated("cuLaunchKernel")
                && is_gated("cuStreamWaitValue32_v2_ptsz")
                && !is_gated("cuMemAlloc_v2")
        );
    }
}
