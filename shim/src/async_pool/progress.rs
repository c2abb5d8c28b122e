//! How far the streams have got that memory was freed in.
//!
//! A free takes a ticket of its stream and, in most streams, costs nothing else: most memory is used again in the
//! stream that it was freed in. Only when another stream looks for memory is a stream asked whether it is through
//! ([`StreamProgress::advance`]): if it has nothing left to do, all of its frees are over; if it has, an event marks how far
//! it must get, and the next one who looks asks the event.
//!
//! In default streams each free is marked at once. A thread's own can be marked by that thread alone. The legacy
//! stream cannot be asked: that it has nothing to do does not say that the streams it waits for have not, while an
//! event in it comes after all of theirs.
//!
//! While a capture is open, the legacy stream may neither be asked nor marked (that would spoil the capture), others
//! may be marked unless they capture themselves. What cannot be marked stays its stream's own until it can, or until
//! the client has drained.
//!
//! None of this passes the gate: events touch no memory, and a free must not wait for others' turns.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::devices;
use crate::submit::drain::Current;
use crate::submit::{captures, green};
use crate::thread::{self, ThreadId};
use nvshare::stream_arena::{Freed, StreamId, Ticket};
use std::collections::VecDeque;

/// A stream, as its order goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamRef {
    /// By an explicit name, not null.
    pub stream: CUstream,
    /// Its context.
    pub context: CUcontext,
    /// The GPU of that.
    pub device: CUdevice,
    /// For a thread's own default stream: which thread's.
    thread: Option<ThreadId>,
}

impl StreamRef {
    /// The stream that a call names. `None` if it captures, or if the driver doesn't say what it is, as in a context that is
    /// broken.
    pub fn find(driver: &Driver, stream: CUstream, per_thread: bool) -> Option<StreamRef> {
        let stream = stream.named(per_thread);
        // Asked always: in a context that is broken, the driver answers this with the context's error.
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
    /// The last ticket that the stream is known to be past.
    done: Ticket,
    /// Events in the stream, each after the free of that ticket.
    marks: VecDeque<(Ticket, CUevent)>,
    /// The stream is destroyed: its handle may come back as another's.
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
    /// Events to use again.
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

    /// Something is freed in that stream now.
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
            .expect("a line lives while a free of it is pending")
    }

    /// Looks how far every stream has got.
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

    /// How far every stream is known to have got. One that is gone and through is not named again.
    pub fn progress(&mut self) -> Vec<(StreamId, Ticket)> {
        let done = self.entries.iter().map(|entry| (entry.stream_id, entry.done)).collect();
        self.entries.retain(|entry| !entry.gone || entry.done < entry.freed);
        done
    }

    fn pass_marks(&mut self, driver: &Driver, index: usize) {
        let entry = &mut self.entries[index];
        while let Some((ticket, event)) = entry.marks.front().copied() {
            // What went wrong in a context that is broken will never use memory again.
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

    /// Marks the present end of a stream, if that can be done.
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
            Some(Err(result)) => tracing::debug!("the end of {stream:?} could not be marked: {result}"),
            None => self.spare.extend(spare.map(|event| (context, event))),
        }
    }

    /// Lets a stream wait until another is past a free. False if that one cannot be marked now.
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

    /// The events after the last free of each stream that is not through, to wait for.
    pub fn last_marks(&mut self, driver: &Driver) -> Vec<CUevent> {
        for index in 0..self.entries.len() {
            if !self.entries[index].marked() {
                self.mark(driver, index);
            }
        }
        self.entries.iter().filter_map(|entry| entry.marks.back()).map(|(_, event)| *event).collect()
    }

    /// A stream is about to be destroyed.
    pub fn end_stream(&mut self, driver: &Driver, stream: CUstream) {
        self.end(driver, |place| place.stream == stream);
    }

    /// The calling thread ends, and its own default streams with it. Whether it has freed anything there.
    pub fn end_thread(&mut self, driver: &Driver, thread: ThreadId) -> bool {
        self.end(driver, |place| place.thread == Some(thread))
    }

    /// Streams end. What they have to do goes on, so their ends are marked. Whether there was one.
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

    /// All that was submitted to a GPU is done.
    pub fn drained(&mut self, device: CUdevice) {
        for index in 0..self.entries.len() {
            if self.entries[index].place.device == device {
                self.all_passed(index);
            }
        }
    }

    /// A green context is gone. What it had to do goes on, and is marked; its default streams can be marked no more.
    pub fn end_green(&mut self, context: CUcontext) {
        self.entries
            .iter_mut()
            .filter(|entry| entry.place.context == context)
            .for_each(|entry| entry.gone = true);
        self.spare.retain(|(of, _)| *of != context);
    }

    /// A context has come to its end, with its streams and events; all its work is done.
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
