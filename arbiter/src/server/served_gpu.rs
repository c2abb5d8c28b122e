//! A GPU that is served: its page, and what is known of its memory.

use crate::monitor::Tallies;
use crate::options::Options;
use crate::pages::ServedPage;
use crate::sampling::Tracker;
use nvshare::units::{bytes_of, format_size, granules_in};
use std::sync::Arc;

/// A change of the pool by less than this, in granules, is not worth a decision.
const SMALL_CHANGE: u32 = 16;

/// A GPU that is served.
pub(super) struct ServedGpu {
    /// Its page.
    pub served: ServedPage,
    /// All its memory in bytes.
    pub total: u64,
    /// What its memory is used for.
    pub tracker: Tracker,
    /// What the configuration says of it.
    pub options: Options,
    /// What is counted for the metrics.
    pub tallies: Arc<Tallies>,
}

impl ServedGpu {
    /// Does what the configuration says now, at once: clients decide anew, by settings and by a pool of another size.
    pub fn reconfigure(&mut self, options: Options) {
        self.options = options;
        let page = &self.served.page;
        page.set_settings(self.options.settings());
        self.resize_pool();
        page.decide();
        // Those who sleep until the end of a slice compute it anew.
        page.occupied().iter().for_each(|slot| page.ring(slot));
    }

    /// Keeps the pool no larger than what programs outside nvshare, and memory that belongs to nobody, leave of the GPU.
    /// True if its size changed.
    pub fn resize_pool(&self) -> bool {
        let (page, options) = (&self.served.page, &self.options);
        let foreign = self.tracker.foreign();
        let wanted = options
            .capacity
            .unwrap_or_else(|| self.total.saturating_sub(options.headroom).saturating_sub(foreign));
        let capacity = granules_in(self.tracker.physical().map_or(wanted, |physical| physical.min(wanted)));
        let small = capacity.abs_diff(page.capacity()) < SMALL_CHANGE;
        // A way back to exactly the size that was asked for is taken all the same.
        if capacity == page.capacity() || small && options.capacity.map(granules_in) != Some(capacity) {
            return false;
        }
        tracing::info!(
            gpu = %self.served.gpu,
            "the pool has {} now and had {}: {}",
            format_size(bytes_of(capacity)),
            format_size(bytes_of(page.capacity())),
            if foreign == 0 && capacity == granules_in(wanted) || options.capacity.map(granules_in) == Some(capacity) {
                "as it is configured"
            } else {
                "programs outside nvshare, or memory that outlived its process, take another part of the GPU"
            }
        );
        page.set_capacity(capacity)
    }
}
