//! Model checking of the protocol: loom runs the real code of the pool, the lock word, the decision loop,
//! the doorbell and the gate through every interleaving of two or three participants, within a bound on
//! preemptions. Time stands still in the model, so a wake-up that is lost shows as a deadlock.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p loom-tests`; `mutants.sh`
//! breaks the code on purpose and demands that a test notices.
#![cfg(loom)]

use nvshare::sync::Arc;
use nvshare::{GpuUuid, Page};
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// A page that the participants of a model share.
#[derive(Clone)]
pub struct Shared(Arc<Box<Page>>);

impl Shared {
    /// A page with `capacity` free granules.
    pub fn new(capacity: u32) -> Self {
        Self(Arc::new(Page::on_heap(GpuUuid([1; 16]), capacity)))
    }
}

impl Deref for Shared {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.0
    }
}

/// Checks `model` in every interleaving with at most `preemptions` of them.
///
/// A model's participants are spawned, all of them, and its main thread only joins: loom 0.7 overlooks
/// interleavings of what the main thread does between a spawn and a join.
pub fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    run(preemptions, None, model);
}

/// Checks a model that has too many interleavings for a test in the first `permutations` of them, which
/// differ from each other mostly near the end. NVSHARE_LOOM_PERMUTATIONS sets another number, for a
/// long run.
pub fn check_some(preemptions: usize, permutations: usize, model: impl Fn() + Sync + Send + 'static) {
    let most = std::env::var("NVSHARE_LOOM_PERMUTATIONS").ok().and_then(|text| text.parse().ok());
    run(preemptions, Some(most.unwrap_or(permutations)), model);
}

fn run(preemptions: usize, permutations: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.max_permutations = permutations;
    // How often loom looks at `max_permutations`.
    builder.checkpoint_interval = 1_000;
    let count = std::sync::Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    builder.check({
        let count = count.clone();
        move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        }
    });
    let count = count.load(Ordering::Relaxed);
    println!("{count} interleavings with at most {preemptions} preemptions in {:?}", begun.elapsed());
    assert!(count > 1, "loom found nothing to interleave");
}
