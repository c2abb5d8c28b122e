//! The ring of a client's events: a reader beside the writer never sees half of an entry.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use loom_tests::check;
use nvshare::journal::{Event, Journal};

/// An event whose time tells what it is.
fn event(number: u64) -> Event {
    Event::Evicted { bytes: number }
}

#[test]
fn a_reader_sees_whole_entries_in_order() {
    check(3, || {
        let ring = Arc::new(Journal::<AtomicU64, 2>::new());
        ring.write(0, event(0));
        let writer = thread::spawn({
            let ring = ring.clone();
            move || (1..4).for_each(|number| ring.write(number, event(number)))
        });
        let reader = thread::spawn({
            let ring = ring.clone();
            move || {
                let first = ring.read(0);
                let second = ring.read(first.next);
                let mut next = 0;
                for at in first.events.iter().chain(&second.events) {
                    assert_eq!(at.event, event(at.time), "half of one entry and half of another");
                    assert!(at.time >= next, "an entry twice, or out of order");
                    next = at.time + 1;
                }
                assert!(second.next >= next);
            }
        });
        writer.join().unwrap();
        reader.join().unwrap();
    });
}
