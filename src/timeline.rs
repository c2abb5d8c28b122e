//! Events of a journal joined to spans of time: what `nvshare trace` draws and what the arbiter's histograms count.
//!
//! A client is in one phase at any time, so the phases of a [`Track`] are spans that follow one another. Moves of memory and
//! stalls lie beside them. Whoever reads journals feeds a track per slot with their events, in any number of portions.

use crate::journal::{At, Event, Why};
use crate::page::{Phase, Stall};
use crate::units::Nanos;

/// What a client did for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// It was in this phase.
    Phase(Phase),
    /// It moved memory out, for others.
    Evicts,
    /// It brought memory in ahead of its turn.
    Prefetches,
    /// It was to give way and could not.
    Stalled(Stall),
}

impl Activity {
    /// A name for people and programs: that of the phase, `evicts`, `prefetches` or `stalled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Phase(phase) => phase.name(),
            Self::Evicts => "evicts",
            Self::Prefetches => "prefetches",
            Self::Stalled(_) => "stalled",
        }
    }
}

/// Something that lasted for a while and is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// What it was.
    pub activity: Activity,
    /// When it began, CLOCK_MONOTONIC, ns.
    pub begun: Nanos,
    /// When it ended, ns; not before it began.
    pub ended: Nanos,
    /// Bytes that were copied meanwhile: in (Filling, Prefetches) or out (Evicts); 0 for others.
    pub bytes: u64,
    /// Why the drain began, of phase Draining.
    pub why: Option<Why>,
    /// The pid of the process, as it sees itself; 0 if its registration was not seen.
    pub pid: u32,
}

impl Span {
    /// How long it lasted, ns.
    pub fn length(&self) -> Nanos {
        self.ended - self.begun
    }
}

/// What is known of one slot so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Track {
    pid: u32,
    phase: Option<(Phase, Nanos, Option<Why>)>,
    moving: Option<(Activity, Nanos)>,
    stall: Option<(Stall, Nanos)>,
}

impl Track {
    /// Takes an event in, and gives the spans that end with it.
    pub fn feed(&mut self, at: At) -> impl Iterator<Item = Span> + use<> {
        let At { time, event } = at;
        let mut ended = [None, None];
        if let Event::Registered { pid } = event {
            // Another process has the slot: what the one before did last is over, and nobody knows when it ended.
            *self = Self { pid, ..Self::default() };
        }
        if let Some(next) = event.phase() {
            let why = if let Event::Drains(why) = event { Some(why) } else { None };
            let before = self.phase.replace((next, time, why));
            let bytes = if let Event::Runs { bytes } = event { bytes } else { 0 };
            ended[0] =
                before.map(|(phase, begun, why)| self.span(Activity::Phase(phase), begun, time, bytes, why));
        }
        match event {
            Event::Evicts => self.moving = Some((Activity::Evicts, time)),
            Event::Prefetches => self.moving = Some((Activity::Prefetches, time)),
            Event::Evicted { bytes } | Event::Prefetched { bytes } => {
                let begun = self.moving.take();
                ended[1] = begun.map(|(activity, begun)| self.span(activity, begun, time, bytes, None));
            }
            Event::Stalled(stall) => {
                let next = (stall != Stall::None).then_some((stall, time));
                let before = std::mem::replace(&mut self.stall, next);
                ended[1] =
                    before.map(|(stall, begun)| self.span(Activity::Stalled(stall), begun, time, 0, None));
            }
            _ => {}
        }
        ended.into_iter().flatten()
    }

    /// The pid of the process that has the slot or had it last, as it sees itself; 0 if its registration was not seen.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Events are missing: what went on has ended, and nobody knows when.
    pub fn forget(&mut self) {
        *self = Self { pid: self.pid, ..Self::default() };
    }

    /// What goes on at the time `now`, ns, as if it ended then.
    pub fn unfinished(&self, now: Nanos) -> impl Iterator<Item = Span> {
        let phase =
            self.phase.map(|(phase, begun, why)| self.span(Activity::Phase(phase), begun, now, 0, why));
        let moving = self.moving.map(|(activity, begun)| self.span(activity, begun, now, 0, None));
        let stall = self.stall.map(|(stall, begun)| self.span(Activity::Stalled(stall), begun, now, 0, None));
        [phase, moving, stall].into_iter().flatten()
    }

    fn span(&self, activity: Activity, begun: Nanos, ended: Nanos, bytes: u64, why: Option<Why>) -> Span {
        Span { activity, begun, ended: ended.max(begun), bytes, why, pid: self.pid }
    }
}

/// How long the GPU took to pass from one client to another: from when a holder began to drain until the next one ran that had
/// waited for it. Fed with the spans of all slots of a GPU, in the order in which they ended.
#[derive(Debug, Clone, Default)]
pub struct Switches {
    /// When the latest drain began that no switch has ended yet, ns.
    drains_since: Option<Nanos>,
}

impl Switches {
    /// Takes a span in. The time of the switch, ns, if it ends one: a fill has ended, and somebody gave way for it.
    pub fn feed(&mut self, span: &Span) -> Option<Nanos> {
        match span.activity {
            Activity::Phase(Phase::Draining) => {
                self.drains_since.get_or_insert(span.begun);
                None
            }
            Activity::Phase(Phase::Filling) => {
                let since = self.drains_since.take_if(|since| *since < span.ended)?;
                Some(span.ended - since)
            }
            _ => None,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fed(track: &mut Track, events: &[(Nanos, Event)]) -> Vec<Span> {
        events.iter().flat_map(|(time, event)| track.feed(At { time: *time, event: *event })).collect()
    }

    #[test]
    fn a_turn_is_the_spans_of_its_phases() {
        let mut track = Track::default();
        let spans = fed(
            &mut track,
            &[
                (10, Event::Registered { pid: 42 }),
                (20, Event::Phase(Phase::Waiting)),
                (30, Event::Phase(Phase::Filling)),
                (50, Event::Runs { bytes: 7 }),
                (90, Event::Drains(Why::TurnOver)),
                (95, Event::Phase(Phase::Waiting)),
                (96, Event::Evicts),
                (99, Event::Evicted { bytes: 5 }),
            ],
        );
        let told: Vec<_> =
            spans.iter().map(|span| (span.activity.name(), span.begun, span.ended, span.bytes)).collect();
        let expected = [
            ("idle", 10, 20, 0),
            ("waiting", 20, 30, 0),
            ("filling", 30, 50, 7),
            ("running", 50, 90, 0),
            ("draining", 90, 95, 0),
            ("evicts", 96, 99, 5),
        ];
        assert_eq!(told, expected);
        assert_eq!(spans[4].why, Some(Why::TurnOver));
        assert!(spans.iter().all(|span| span.pid == 42));
        let now: Vec<_> = track.unfinished(120).map(|span| (span.activity.name(), span.length())).collect();
        assert_eq!(now, [("waiting", 25)]);
    }

    #[test]
    fn a_stall_lasts_until_its_end_also_with_another_reason() {
        let mut track = Track::default();
        let spans = fed(
            &mut track,
            &[
                (1, Event::Stalled(Stall::EndlessWork)),
                (4, Event::Stalled(Stall::OpenCapture)),
                (9, Event::Stalled(Stall::None)),
                (11, Event::Stalled(Stall::None)),
            ],
        );
        let told: Vec<_> = spans.iter().map(|span| (span.activity, span.length())).collect();
        let stalled = Activity::Stalled;
        assert_eq!(told, [(stalled(Stall::EndlessWork), 3), (stalled(Stall::OpenCapture), 5)]);
    }

    #[test]
    fn the_next_process_of_a_slot_has_nothing_of_the_one_before() {
        let mut track = Track::default();
        fed(
            &mut track,
            &[(1, Event::Runs { bytes: 0 }), (2, Event::Evicts), (3, Event::Stalled(Stall::EndlessWork))],
        );
        assert_eq!(fed(&mut track, &[(9, Event::Registered { pid: 2 })]), []);
        assert_eq!(track.unfinished(10).map(|span| span.activity.name()).collect::<Vec<_>>(), ["idle"]);
    }

    #[test]
    fn a_switch_is_from_the_drain_of_one_to_the_run_of_the_next() {
        let phase = |phase, begun, ended| Span {
            activity: Activity::Phase(phase),
            begun,
            ended,
            bytes: 0,
            why: None,
            pid: 1,
        };
        let mut switches = Switches::default();
        assert_eq!(switches.feed(&phase(Phase::Filling, 0, 5)), None, "nobody gave way for the first");
        assert_eq!(switches.feed(&phase(Phase::Draining, 10, 12)), None);
        assert_eq!(switches.feed(&phase(Phase::Filling, 11, 30)), Some(20));
        assert_eq!(switches.feed(&phase(Phase::Filling, 31, 33)), None, "it grew");
    }

    proptest! {
        /// Whatever a page says, spans do not end before they begin, and an event ends at most two of them.
        #[test]
        fn any_events_make_sensible_spans(words in prop::collection::vec(any::<(u64, u64)>(), 0..50)) {
            let (mut track, mut switches) = (Track::default(), Switches::default());
            for (time, word) in words {
                let spans: Vec<_> = track.feed(At { time, event: Event::from(word) }).collect();
                prop_assert!(spans.len() <= 2);
                for span in &spans {
                    prop_assert!(span.begun <= span.ended);
                    switches.feed(span);
                }
            }
        }
    }
}
