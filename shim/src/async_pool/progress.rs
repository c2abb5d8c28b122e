//! The progress of the streams in which memory was freed.
//!
//! A free takes a ticket of its stream and, in most streams, costs nothing else, because most memory is reused in the
//! stream in which it was freed. Only when another stream needs memory are the streams queried
//! ([`StreamProgress::advance`]). If a stream is idle, it has passed all of its frees. If not, an event marks its last free,
//! and the next query polls that event.
//!
//! In default streams each free is marked at once. A thread's own default stream can be marked only by that thread. Querying
//! the legacy stream is not enough: it may be idle while the streams for which it waits are not, whereas an
//! event in it comes after all of their work.
//!
//! While a capture is open, the legacy stream may be neither queried nor marked (that would invalidate the capture); other
//! streams may be marked unless they capture themselves. Memory whose free cannot be marked is reused only in its own stream,
//! until the free can be marked or the client has drained.
//!
//! None of this passes the gate: events access no memory, and a free must not wait for a turn.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::devices;
use crate::submit::drain::Current;
use crate::submit::{captures, green};
use crate::thread::{self, ThreadId};
use nvshare::stream_arena::{Freed, StreamId, Ticket};
use std::collections::VecDeque;

/// Identifies a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamRef {
    /// Its explicit handle, not null.
    pub stream: CUstream,
    /// Its context.
    pub context: CUcontext,
    /// The GPU of the context.
    pub device: CUdevice,
    /// For a thread's own default stream: the thread.
    thread: Option<ThreadId>,
}

impl StreamRef {
    /// The stream that a call names. `None` if it captures, or if the driver does not know it.
    pub fn find(driver: &Driver, stream: CUstream, per_thread: bool) -> Option<StreamRef> {
        let stream = stream.named(per_thread);
        // Queried even if no capture is open: in a broken context the driver answers this with the context's error.
        if driver.stream_capture_status(stream) != Ok(CU_STREAM_CAPTURE_STATUS_NONE) {
            return None;
        }
        let context = if stream.is_default() {
            driver.ctx_current().ok()?
        } else {
            green::owner_of(driver.stream_ctx(stream).ok()?)
        };
        let device = devices::of_context(context)?.ordinal;
        Some(StreamRef { stream, context, device, thread: stream.thread() })
    }
}

#[derive(Debug)]
struct Entry {
    stream_id: StreamId,
    place: StreamRef,
    /// The last ticket given.
    freed: Ticket,
    /// The last ticket that the stream is known to have passed.
    done: Ticket,
    /// Events in the stream, each after the free with that ticket.
    marks: VecDeque<(Ticket, CUevent)>,
    /// The stream is destroyed: its handle may be reused.
    gone: bool,
}

impl Entry {
    fn marked(&self) -> bool {
        self.done == self.freed || self.marks.back().is_some_and(|(ticket, _)| *ticket == self.freed)
    }

    fn is_reachable(&self) -> bool {
        !self.gone && self.place.thread.is_none_or(|thread| thread == thread::id())
    }
}

/// All streams in which memory was freed.
#[derive(Debug, Default)]
pub struct StreamProgress {
    entries: Vec<Entry>,
    named: u64,
    /// Events to be reused, with their context.
    spare: Vec<(CUcontext, CUevent)>,
}

impl StreamProgress {
    /// The identity of a stream.
    pub fn of(&mut self, place: &StreamRef) -> StreamId {
        if let Some(entry) = self.entries.iter().find(|entry| !entry.gone && entry.place == *place) {
            return entry.stream_id;
        }
        self.named += 1;
        let stream_id = StreamId(self.named);
        self.entries.push(Entry {
            stream_id,
            place: *place,
            freed: 0,
            done: 0,
            marks: VecDeque::new(),
            gone: false,
        });
        stream_id
    }

    /// Takes a ticket for memory that is freed in a stream now.
    pub fn free(&mut self, driver: &Driver, place: &StreamRef) -> Freed {
        let stream_id = self.of(place);
        let index = self.index(stream_id);
        let entry = &mut self.entries[index];
        entry.freed += 1;
        let freed = Freed { stream_id, ticket: entry.freed };
        if place.stream.is_default() {
            self.pass_marks(driver, index);
            self.mark(driver, index);
        }
        freed
    }

    fn index(&self, stream_id: StreamId) -> usize {
        self.entries
            .iter()
            .position(|entry| entry.stream_id == stream_id)
            .expect("a stream's entry exists while one of its frees is pending")
    }

    /// Queries or marks every stream with pending frees.
    pub fn advance(&mut self, driver: &Driver) {
        for index in 0..self.entries.len() {
            self.pass_marks(driver, index);
            let entry = &self.entries[index];
            if entry.done == entry.freed || !entry.is_reachable() {
                continue;
            }
            let stream = entry.place.stream;
            let idle = !entry.place.stream.is_default()
                && captures::with_no_capture(|| driver.stream_query(stream)) == Some(Ok(()));
            if idle {
                self.all_passed(index);
            } else if !entry.marked() {
                self.mark(driver, index);
            }
        }
    }

    /// The last ticket that each stream is known to have passed. Drops the entries of destroyed streams that have passed all.
    pub fn progress(&mut self) -> Vec<(StreamId, Ticket)> {
        let done = self.entries.iter().map(|entry| (entry.stream_id, entry.done)).collect();
        self.entries.retain(|entry| !entry.gone || entry.done < entry.freed);
        done
    }

    fn pass_marks(&mut self, driver: &Driver, index: usize) {
        let entry = &mut self.entries[index];
        while let Some((ticket, event)) = entry.marks.front().copied() {
            // An event of a broken context counts as past: its work will not use memory any more.
            if !driver.event_is_past(event) {
                break;
            }
            entry.marks.pop_front();
            entry.done = ticket;
            self.spare.push((entry.place.context, event));
        }
    }

    fn all_passed(&mut self, index: usize) {
        let entry = &mut self.entries[index];
        entry.done = entry.freed;
        let context = entry.place.context;
        self.spare.extend(entry.marks.drain(..).map(|(_, event)| (context, event)));
    }

    /// Marks the end of a stream's work so far, if possible.
    fn mark(&mut self, driver: &Driver, index: usize) {
        let entry = &mut self.entries[index];
        let StreamRef { stream, context, .. } = entry.place;
        if !entry.is_reachable() {
            return;
        }
        let spare = self.spare.iter().position(|(of, _)| *of == context);
        let spare = spare.map(|at| self.spare.swap_remove(at).1);
        let record = || {
            let _current = Current::new(driver, context)?;
            let event = match spare {
                Some(event) => event,
                None => driver.event_create(CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC)?,
            };
            driver.event_record(event, stream).map(|()| event).inspect_err(|_| {
                let _ = driver.event_destroy(event);
            })
        };
        let recorded = captures::with_no_capture(record).or_else(|| {
            let apart = stream != CUstream::LEGACY
                && driver.stream_capture_status(stream) == Ok(CU_STREAM_CAPTURE_STATUS_NONE);
            apart.then(record)
        });
        match recorded {
            Some(Ok(event)) => entry.marks.push_back((entry.freed, event)),
            Some(Err(result)) => tracing::debug!(
                "the work of {stream:?} could not be marked, so memory freed there is reused only there: {result}"
            ),
            None => self.spare.extend(spare.map(|event| (context, event))),
        }
    }

    /// Makes a stream wait until another has passed a free. False if that one cannot be marked now.
    pub fn follow(&mut self, driver: &Driver, freed: Freed, waiter: &StreamRef) -> bool {
        let index = self.index(freed.stream_id);
        let covers = |entry: &Entry| {
            entry.marks.iter().find(|(ticket, _)| *ticket >= freed.ticket).map(|(_, event)| *event)
        };
        if covers(&self.entries[index]).is_none() {
            self.mark(driver, index);
        }
        let Some(event) = covers(&self.entries[index]) else {
            return self.entries[index].done >= freed.ticket;
        };
        driver.stream_wait_event(waiter.stream, event, 0).is_ok()
    }

    /// For each stream with pending frees the event after the last one, to wait for.
    pub fn last_marks(&mut self, driver: &Driver) -> Vec<CUevent> {
        for index in 0..self.entries.len() {
            if !self.entries[index].marked() {
                self.mark(driver, index);
            }
        }
        self.entries.iter().filter_map(|entry| entry.marks.back()).map(|(_, event)| *event).collect()
    }

    /// Marks the end of a stream that is about to be destroyed.
    pub fn end_stream(&mut self, driver: &Driver, stream: CUstream) {
        self.end(driver, |place| place.stream == stream);
    }

    /// Marks the ends of the calling thread's own default streams, because it ends. Whether it has freed memory in one.
    pub fn end_thread(&mut self, driver: &Driver, thread: ThreadId) -> bool {
        self.end(driver, |place| place.thread == Some(thread))
    }

    /// Marks the ends of streams that are about to end, whose work goes on. Whether there was one.
    fn end(&mut self, driver: &Driver, ends: impl Fn(&StreamRef) -> bool) -> bool {
        let mut any = false;
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if !entry.gone && ends(&entry.place) {
                if !entry.marked() {
                    self.mark(driver, index);
                }
                self.entries[index].gone = true;
                any = true;
            }
        }
        any
    }

    /// All work of a GPU is done: its streams have passed all frees.
    pub fn drained(&mut self, device: CUdevice) {
        for index in 0..self.entries.len() {
            if self.entries[index].place.device == device {
                self.all_passed(index);
            }
        }
    }

    /// A green context was destroyed. Its work goes on, up to existing markers; its default streams cannot be marked any more.
    pub fn end_green(&mut self, context: CUcontext) {
        self.entries
            .iter_mut()
            .filter(|entry| entry.place.context == context)
            .for_each(|entry| entry.gone = true);
        self.spare.retain(|(of, _)| *of != context);
    }

    /// A context is being destroyed with its streams and events; all its work is done.
    pub fn end_context(&mut self, context: CUcontext) {
        for index in 0..self.entries.len() {
            if self.entries[index].place.context == context {
                self.all_passed(index);
                self.entries[index].gone = true;
            }
        }
        self.spare.retain(|(of, _)| *of != context);
    }
}
