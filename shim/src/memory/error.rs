//! Why memory could not be moved.

use crate::cuda::abi::CuResult;

/// Why memory could not be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapError {
    /// A call to the driver failed.
    Driver {
        /// The call.
        call: &'static str,
        /// Its result.
        result: CuResult,
    },
    /// There is no host memory for a copy, or in place of GPU memory. It may help to wait.
    Host(String),
    /// The GPU has no memory although the pool has granules. It may help to wait.
    Gpu(String),
    /// The engine must do something else first: its context is being destroyed, or the process has failed.
    Interrupted,
    /// The client has work in flight, and what is to be done must wait for its end.
    InFlight,
    /// The engine panicked, because of a bug in nvshare or because the kernel refused something: the panic's message.
    Panic(String),
}

impl std::fmt::Display for SwapError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver { call, result } => write!(out, "{call} failed with {result}"),
            Self::Host(why) => write!(out, "no host memory: {why}"),
            Self::Gpu(why) => write!(out, "no memory on the GPU: {why}"),
            Self::Interrupted => write!(out, "interrupted"),
            Self::InFlight => write!(out, "work is in flight"),
            Self::Panic(why) => write!(out, "nvshare's engine has panicked, {why}"),
        }
    }
}

/// Makes an error of the driver's result of `call`.
pub fn driver_said(call: &'static str) -> impl Fn(CuResult) -> SwapError {
    move |result| SwapError::Driver { call, result }
}

impl SwapError {
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Driver { result: CuResult::OUT_OF_MEMORY, .. })
    }
}

impl SwapError {
    /// The result that the application's calls return.
    pub fn cuda(&self) -> CuResult {
        match self {
            Self::Driver { result, .. } => *result,
            Self::Host(_) | Self::Gpu(_) => CuResult::OUT_OF_MEMORY,
            Self::Interrupted | Self::InFlight | Self::Panic(_) => CuResult::UNKNOWN,
        }
    }

    /// Whether the error only means that the process is exiting or that its context was destroyed.
    pub fn is_shutdown(&self) -> bool {
        let shutdowns = [CuResult::DEINITIALIZED, CuResult::CONTEXT_IS_DESTROYED, CuResult::INVALID_CONTEXT];
        matches!(self, Self::Driver { result, .. } if shutdowns.contains(result))
    }
}
