//! What the books of many small allocations cost when they go out and come in.
//!
//! The shim itself measures it (`nvshare_bookkeeping` in `shim/src/interpose/probe.rs`), without a GPU and without memory: as many
//! regions of one granule as `--regions` says, and a quarter as many. What is linear takes four times as long for four times
//! as many.

use super::stats::Row;
use crate::{Failure, node};
use libloading::Library;

/// Options of `nvshare bench bookkeeping`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How many allocations of one granule (2 MiB) there are; 4 to 1000000
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(4..=1_000_000))]
    regions: u32,
    /// How often everything is measured; 1 to 1000
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
}

type Bookkeeping = unsafe extern "C" fn(u32, *mut u64) -> i32;

const PARTS: [&str; 4] = ["allocate", "evict", "fill", "free"];

/// Measures.
///
/// # Errors
/// The shim is not there, or there are no addresses for so much memory.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    let failed = |why: String| Failure::with_status(1, why);
    // SAFETY: the shim's constructors do nothing in a process that has no CUDA.
    let shim = unsafe { Library::new(node::shim()?) }.map_err(|error| failed(error.to_string()))?;
    // SAFETY: the function has this type.
    let bookkeeping = unsafe { shim.get::<Bookkeeping>(b"nvshare_bookkeeping") };
    let bookkeeping =
        bookkeeping.map_err(|error| failed(format!("the shim is of another release: {error}")))?;
    let mut rows = Vec::new();
    for regions in [options.regions / 4, options.regions] {
        let mut samples = vec![Vec::new(); PARTS.len()];
        for _ in 0..options.rounds {
            let mut took = [0; PARTS.len()];
            // SAFETY: it writes four numbers.
            if unsafe { bookkeeping(regions, took.as_mut_ptr()) } != 0 {
                return Err(failed(format!("there are no addresses for {regions} granules of host memory")));
            }
            for (samples, took) in samples.iter_mut().zip(took) {
                samples.push(took as f64 / 1e6);
            }
        }
        let named = PARTS.iter().zip(samples);
        rows.extend(
            named.map(|(part, samples)| Row::of(&format!("{part}_{regions}_regions"), "ms", samples)),
        );
    }
    Ok(rows)
}
