//! Why memory could not be moved.

use crate::cuda::abi::CuResult;

/// Why memory could not be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapError {
    /// The driver refused.
    Driver {
        /// What was tried.
        call: &'static str,
        /// What it said.
        result: CuResult,
    },
    /// There is no host memory for a copy, or in place of the GPU's. Waiting may mend it.
    Host(String),
    /// The GPU has no memory although the pool has. Waiting may mend it.
    Gpu(String),
    /// The engine is wanted elsewhere: its context goes, or the process has broken down. Nothing is wrong here.
    Interrupted,
    /// A bug of ours, or what the kernel refuses: the panic's message.
    Panic(String),
}

impl std::fmt::Display for SwapError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver { call, result } => write!(out, "{call} said {result}"),
            Self::Host(why) => write!(out, "no host memory: {why}"),
            Self::Gpu(why) => write!(out, "no memory on the GPU: {why}"),
            Self::Interrupted => write!(out, "interrupted"),
            Self::Panic(why) => write!(out, "nvshare's engine has panicked, {why}"),
        }
    }
}

/// Makes an error of what the driver said to `call`.
pub fn driver_said(call: &'static str) -> impl Fn(CuResult) -> SwapError {
    move |result| SwapError::Driver { call, result }
}

impl SwapError {
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Driver { result: CuResult::OUT_OF_MEMORY, .. })
    }
}

impl SwapError {
    /// What the application is told.
    pub fn cuda(&self) -> CuResult {
        match self {
            Self::Driver { result, .. } => *result,
            Self::Host(_) | Self::Gpu(_) => CuResult::OUT_OF_MEMORY,
            Self::Interrupted | Self::Panic(_) => CuResult::UNKNOWN,
        }
    }

    /// Whether the process is ending, or its context, and nothing is wrong.
    pub fn is_shutdown(&self) -> bool {
        let farewells = [CuResult::DEINITIALIZED, CuResult::CONTEXT_IS_DESTROYED, CuResult::INVALID_CONTEXT];
        matches!(self, Self::Driver { result, .. } if farewells.contains(result))
    }
}
