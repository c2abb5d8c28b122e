//! How captures begin and end, and how a stream joins one.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::guarded;
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::submit::{capture_begin, captures};
use std::ffi::c_void;

/// Entry points that begin or end a capture of their stream, or make it join one, each in the form for the legacy default
/// stream and in that for a thread's own.
macro_rules! captures {
    ($($module:ident::$action:ident $name:ident / $per_thread:ident (stream $(, $arg:ident: $ty:ty)*);)*) => {
        $(
            pub unsafe fn $name(stream: CUstream $(, $arg: $ty)*) -> CuResult {
                // SAFETY: the caller's arguments.
                guarded(|| $module::$action(stream, false, || unsafe { driver_calls::$name(stream $(, $arg)*) }))
            }

            pub unsafe fn $per_thread(stream: CUstream $(, $arg: $ty)*) -> CuResult {
                // SAFETY: the caller's arguments.
                guarded(|| $module::$action(stream, true, || unsafe { driver_calls::$per_thread(stream $(, $arg)*) }))
            }
        )*
    };
}

captures! {
    capture_begin::begin_capture cuStreamBeginCapture / cuStreamBeginCapture_ptsz (stream);
    capture_begin::begin_capture cuStreamBeginCapture_v2 / cuStreamBeginCapture_v2_ptsz (stream, mode: CUstreamCaptureMode);
    capture_begin::begin_capture cuStreamBeginCaptureToGraph / cuStreamBeginCaptureToGraph_ptsz (
        stream, graph: CUgraph, dependencies: *const CUgraphNode, dependency_data: *const c_void,
        num_dependencies: usize, mode: CUstreamCaptureMode
    );
    capture_begin::begin_capture cuStreamBeginRecaptureToGraph / cuStreamBeginRecaptureToGraph_ptsz (
        stream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void, user_data: *mut c_void
    );
    capture_begin::begin_capture cuStreamBeginCaptureToCig / cuStreamBeginCaptureToCig_ptsz (stream, params: *mut c_void);
    captures::end_capture cuStreamEndCapture / cuStreamEndCapture_ptsz (stream, graph: *mut CUgraph);
    captures::end_capture cuStreamEndCaptureToCig / cuStreamEndCaptureToCig_ptsz (stream);
    captures::join_capture cuStreamWaitEvent / cuStreamWaitEvent_ptsz (stream, event: CUevent, flags: u32);
}
