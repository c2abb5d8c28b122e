//! What the processes of this process's gang show each other ([`nvshare::gang_page`]): its own rows, and a look at the others'.
//!
//! Each GPU of a process in a gang has a *seat*, with a thread that sleeps on the seat's doorbell and wakes the GPU's engine.
//! The thread does nothing else, so a process that does not answer its doorbell is stopped, and is left out until it answers.
//! Meanwhile the others begin to run only on GPUs that nobody else needs, because their work may not end before it answers.

use nvshare::gang_cut::Row;
use nvshare::gang_order::Seat;
use nvshare::gang_page::Place;
use nvshare::map::MappedGangPage;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos, SECOND, format_nanos};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How long a process may take to answer its doorbell before the others go on without it, ns. Its answering thread waits for
/// nothing else, so it takes a moment unless the process is stopped or the machine stands still.
const ANSWER_TIMEOUT: Nanos = 2 * SECOND;

/// Bytes of stack for a thread that listens, whose calls do not nest deep.
const STACK: usize = 128 << 10;

/// This process's seat on one GPU.
struct OwnSeat {
    gpu: GpuUuid,
    page: MappedGangPage,
    place: Place,
    shown: (Row, Option<Nanos>),
    ended: Arc<AtomicBool>,
}

impl Drop for OwnSeat {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.page.expect(self.place, None);
        self.page.show(self.place, Row::default());
        self.page.ring(self.place);
    }
}

/// Another process's seat.
struct Other {
    page: MappedGangPage,
    place: Place,
    /// Its last answer and since when it has not answered since, ns.
    unanswered: Option<(u32, Nanos)>,
    left_out: bool,
}

/// This process's seats, and those of the other processes of its gang.
#[derive(Default)]
pub struct Seats {
    own: Vec<OwnSeat>,
    others: Vec<Other>,
    /// [`nvshare::gang_page::GangPage::changes`] of each seat's page when the others were last listed.
    listed: Vec<u64>,
}

impl Seats {
    /// No seats.
    pub const fn new() -> Self {
        Self { own: Vec::new(), others: Vec::new(), listed: Vec::new() }
    }

    /// Whether this process has no seat.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// Takes a seat for a GPU, in place of one on another arbiter's page. `wake` is called when the doorbell has rung.
    pub fn sit(
        &mut self,
        gpu: GpuUuid,
        page: MappedGangPage,
        place: Place,
        wake: impl Fn() + Send + 'static,
    ) {
        if self.own.iter().any(|seat| seat.gpu == gpu && seat.place == place && seat.page.is_same(&page)) {
            return;
        }
        self.leave(gpu);
        let ended = Arc::new(AtomicBool::new(false));
        let (listened, over) = (page.clone(), ended.clone());
        let listen = move || {
            let _ = nix::sys::signal::SigSet::all().thread_set_mask();
            while !over.load(Ordering::Acquire) {
                let seen = listened.answer(place);
                wake();
                listened.wait(place, seen, None);
            }
        };
        let thread = std::thread::Builder::new().name("nvshare-gang".into()).stack_size(STACK);
        if let Err(error) = thread.spawn(listen) {
            tracing::warn!(%gpu, "a thread could not be started: {error}; this process does not run together with those that it shares communicators with");
            return;
        }
        self.own.push(OwnSeat { gpu, page, place, shown: (Row::default(), None), ended });
        self.listed.clear();
    }

    /// Gives the seat for a GPU up, if there is one.
    pub fn leave(&mut self, gpu: GpuUuid) {
        let before = self.own.len();
        self.own.retain(|seat| seat.gpu != gpu);
        if self.own.len() != before {
            self.listed.clear();
            self.ring_others();
        }
    }

    /// Shows what `row` returns for each GPU: its row, and when its turn there is likely to come, ns. The others are rung if that is
    /// anything new.
    pub fn show(&mut self, row: impl Fn(GpuUuid) -> (Row, Option<Nanos>)) {
        let mut changed = false;
        for seat in &mut self.own {
            let shown = row(seat.gpu);
            if shown != seat.shown {
                seat.page.expect(seat.place, shown.1);
                seat.page.show(seat.place, shown.0);
                (seat.shown, changed) = (shown, true);
            }
        }
        if changed {
            self.ring_others();
        }
    }

    fn ring_others(&self) {
        self.others.iter().for_each(|other| other.page.ring(other.place));
    }

    /// Lists the others anew if a gang has got or lost a member since.
    fn list(&mut self) {
        let changes: Vec<_> = self.own.iter().map(|seat| seat.page.changes()).collect();
        if changes == self.listed && !self.listed.is_empty() {
            return;
        }
        let mut places: Vec<(MappedGangPage, Place)> = Vec::new();
        for seat in &self.own {
            for place in seat.page.members_with(seat.place) {
                let is = |page: &MappedGangPage, at| at == place && page.is_same(&seat.page);
                let own = self.own.iter().any(|seat| is(&seat.page, seat.place));
                if !own && !places.iter().any(|(page, at)| is(page, *at)) {
                    places.push((seat.page.clone(), place));
                }
            }
        }
        self.others
            .retain(|other| places.iter().any(|(page, at)| *at == other.place && page.is_same(&other.page)));
        for (page, place) in places {
            if !self.others.iter().any(|other| other.place == place && other.page.is_same(&page)) {
                self.others.push(Other { page, place, unanswered: None, left_out: false });
            }
        }
        self.listed = changes;
        // They may not have been listed when this process last showed something.
        self.ring_others();
    }

    /// What the others show, and when their turns are likely to come, ns, without those who do not answer.
    pub fn look(&mut self) -> Vec<(Seat, Row, Option<Nanos>)> {
        if self.own.is_empty() {
            return Vec::new();
        }
        self.list();
        let time = now();
        let mut rows = Vec::new();
        for other in &mut self.others {
            other.check(time);
            if !other.left_out {
                let seat = (other.page.gpu(other.place), other.place.slot());
                rows.push((seat, other.page.row(other.place), other.page.turn(other.place)));
            }
        }
        rows
    }

    /// Whether somebody is left out because it does not answer.
    pub fn is_somebody_silent(&self) -> bool {
        self.others.iter().any(|other| other.left_out)
    }

    /// When somebody who has not answered yet will be left out, ns.
    pub fn next_check(&self) -> Option<Nanos> {
        let waits = self.others.iter().filter(|other| !other.left_out);
        waits.filter_map(|other| other.unanswered.map(|(_, since)| since + ANSWER_TIMEOUT)).min()
    }
}

impl Other {
    fn check(&mut self, time: Nanos) {
        let Some(answer) = self.page.unanswered(self.place) else {
            if self.left_out {
                tracing::info!(gpu = %self.page.gpu(self.place), slot = self.place.slot().get(), "the gang's member answers again");
            }
            (self.unanswered, self.left_out) = (None, false);
            return;
        };
        let since = match self.unanswered {
            Some((before, since)) if before == answer => since,
            _ => time,
        };
        self.unanswered = Some((answer, since));
        let silent = time.saturating_sub(since) >= ANSWER_TIMEOUT;
        if silent && !self.left_out {
            tracing::warn!(
                gpu = %self.page.gpu(self.place), slot = self.place.slot().get(), pid = self.page.pid(self.place),
                "a process that this one waits for has not answered for {}: it is stopped, and the others of its gang go on without it",
                format_nanos(ANSWER_TIMEOUT)
            );
        }
        self.left_out = silent;
    }
}
