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
pub fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    run(preemptions, None, model);
}

/// Checks a model that has too many interleavings for a test in the first `permutations` of them: loom
/// begins with those that have few preemptions, and these find most of what there is to find.
/// NVSHARE_LOOM_PERMUTATIONS sets another number, for a long run.
pub fn check_some(preemptions: usize, permutations: usize, model: impl Fn() + Sync + Send + 'static) {
    let most = std::env::var("NVSHARE_LOOM_PERMUTATIONS").ok().and_then(|text| text.parse().ok());
    run(preemptions, Some(most.unwrap_or(permutations)), model);
}

fn run(preemptions: usize, permutations: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.max_permutations = permutations;
    builder.check(model);
}
