//! Functions that call the driver's own, for the hooks, and the driver's address of each row.
//!
//! Each answers CUDA_ERROR_NOT_FOUND if the driver does not have it.

#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

use super::rows::with_rows;
use crate::cuda::abi::*;
use std::ffi::{c_char, c_void};

macro_rules! driver_calls {
    (
        forwarded { $($fclass:ident $fat:ident { $($fname:ident($arity:tt) $(checks($($checks:tt)+))? @ $fsince:literal;)* })* }
        hooked { $($hclass:ident { $($hname:ident($($arg:ident: $ty:ty),*) @ $hsince:literal;)* })* }
        passed { $($pname:ident @ $psince:literal;)* }
    ) => {
        /// The driver's addresses.
        #[allow(non_upper_case_globals, missing_docs)]
        pub mod symbol {
            use crate::cuda::symbol::Symbol;
            $($(pub static $fname: Symbol = Symbol::new(concat!(stringify!($fname), "\0"));)*)*
            $($(pub static $hname: Symbol = Symbol::new(concat!(stringify!($hname), "\0"));)*)*
        }

        $($(
            #[doc = concat!("The driver's `", stringify!($hname), "`.")]
            #[inline]
            #[allow(dead_code)]
            pub unsafe fn $hname($($arg: $ty),*) -> CuResult {
                let Some(real) = symbol::$hname.get() else { return CuResult::NOT_FOUND };
                let real: unsafe extern "C" fn($($ty),*) -> CuResult =
                    // SAFETY: the driver's function of this name has this signature, the one in cuda.h.
                    unsafe { std::mem::transmute(real) };
                // SAFETY: the caller's arguments.
                unsafe { real($($arg),*) }
            }
        )*)*
    };
}

with_rows!(driver_calls);
