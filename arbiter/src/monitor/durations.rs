//! How long things took, as histograms: fed from the clients' journals.
//!
//! A journal keeps a client's latest 511 events, and is read twice a second. A client that writes more in between loses the oldest of
//! them, and the durations in them are not counted; how many events were lost is counted instead.

use nvshare::page::Phase;
use nvshare::timeline::Activity;
use nvshare::units::{GpuUuid, Nanos};
use nvshare_stats::News;
use prometheus_client::metrics::histogram::Histogram;
use std::collections::BTreeMap;

/// The histograms of a GPU.
#[derive(Debug, Clone)]
pub struct Durations {
    /// From when a holder began to drain until the next client ran.
    pub switch: Histogram,
    /// From when a client had drained until the next one began to bring its memory in.
    pub handoff: Histogram,
    /// Drains.
    pub drain: Histogram,
    /// Slices.
    pub slice: Histogram,
    /// Waits.
    pub wait: Histogram,
}

/// What a histogram is called, what it says, and which it is.
pub type Named = (&'static str, &'static str, fn(&Durations) -> &Histogram);

/// All of them.
pub const HISTOGRAMS: [Named; 5] = [
    (
        "nvshare_gpu_switch_duration_seconds",
        "How long switches took: from when a holder began to drain until all memory of the next client was in place.",
        |durations| &durations.switch,
    ),
    (
        "nvshare_gpu_handoff_duration_seconds",
        "How long hand-offs took: from when a client had drained until the next one began to bring its memory in. The decision and the wake-up, without copies.",
        |durations| &durations.handoff,
    ),
    (
        "nvshare_gpu_drain_duration_seconds",
        "How long drains took: clients that gave way waited so long for their submitted work.",
        |durations| &durations.drain,
    ),
    (
        "nvshare_gpu_slice_duration_seconds",
        "How long slices lasted: a client ran for so long before it gave way.",
        |durations| &durations.slice,
    ),
    (
        "nvshare_gpu_wait_duration_seconds",
        "How long clients waited for the GPU before they were admitted.",
        |durations| &durations.wait,
    ),
];

/// From 10 us on, where hand-offs are, in steps of about three.
const SHORT: [f64; 13] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
/// From 10 ms on, where slices and waits are.
const LONG: [f64; 13] = [0.01, 0.03, 0.1, 0.3, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

impl Default for Durations {
    fn default() -> Self {
        let (short, long) = (|| Histogram::new(SHORT), || Histogram::new(LONG));
        Self { switch: short(), handoff: short(), drain: short(), slice: long(), wait: long() }
    }
}

impl Durations {
    fn feed(&self, news: &News, since: Nanos) {
        let seconds = |time: Nanos| time as f64 / 1e9;
        for (_, span) in news.spans.iter().filter(|(_, span)| span.ended >= since) {
            let histogram = match span.activity {
                Activity::Phase(Phase::Draining) => &self.drain,
                Activity::Phase(Phase::Running) => &self.slice,
                Activity::Phase(Phase::Waiting) => &self.wait,
                _ => continue,
            };
            histogram.observe(seconds(span.length()));
        }
        for switch in news.switches.iter().filter(|switch| switch.ended >= since) {
            self.switch.observe(seconds(switch.took));
            self.handoff.observe(seconds(switch.handoff));
        }
    }
}

/// The histograms of all GPUs.
#[derive(Debug, Clone, Default)]
pub struct AllDurations {
    of: BTreeMap<GpuUuid, Durations>,
    /// What ended before, ns, is not counted: an arbiter before this one has.
    since: Nanos,
}

impl AllDurations {
    /// For what ends from the time `since` on, ns.
    pub fn since(since: Nanos) -> Self {
        Self { of: BTreeMap::new(), since }
    }

    /// A GPU's, with nothing in it so far if it has had none.
    pub fn of(&mut self, gpu: GpuUuid) -> &Durations {
        self.of.entry(gpu).or_default()
    }

    /// Takes in what has happened.
    pub fn feed(&mut self, news: &News) {
        let since = self.since;
        self.of(news.gpu).feed(news, since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::timeline::Span;
    use nvshare::units::SECOND;
    use nvshare_stats::history::SwitchSeen;
    use prometheus_client::encoding::prometheus_text;
    use prometheus_client::registry::Registry;

    #[test]
    fn what_ends_from_then_on_is_counted_with_its_length() {
        let span = |phase, begun, ended| {
            (0, Span { activity: Activity::Phase(phase), begun, ended, bytes: 0, why: None, pid: 1 })
        };
        let gpu = GpuUuid([1; 16]);
        let switch = SwitchSeen {
            ended: 12 * SECOND,
            took: SECOND,
            from: None,
            to: (1, 2),
            bytes: 0,
            handoff: 20_000,
        };
        let news = News {
            gpu,
            spans: vec![
                span(Phase::Waiting, 0, 4 * SECOND),
                span(Phase::Waiting, 0, 11 * SECOND),
                span(Phase::Running, 10 * SECOND, 12 * SECOND),
                span(Phase::Idle, 0, 13 * SECOND),
            ],
            switches: vec![switch],
        };
        let mut all = AllDurations::since(10 * SECOND);
        all.feed(&news);
        let mut registry = Registry::default();
        for (name, help, histogram) in HISTOGRAMS {
            registry.register(name, help, histogram(all.of(gpu)).clone());
        }
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).unwrap();
        for line in [
            "nvshare_gpu_wait_duration_seconds_count 1",
            "nvshare_gpu_wait_duration_seconds_sum 11.0",
            "nvshare_gpu_slice_duration_seconds_sum 2.0",
            "nvshare_gpu_drain_duration_seconds_count 0",
            "nvshare_gpu_switch_duration_seconds_sum 1.0",
            "nvshare_gpu_handoff_duration_seconds_bucket{le=\"0.00001\"} 0",
            "nvshare_gpu_handoff_duration_seconds_bucket{le=\"0.00003\"} 1",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
