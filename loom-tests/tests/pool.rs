//! The pool: I1, also when a participant stops in the middle of a move.
#![cfg(loom)]

use loom::thread;
use loom_tests::{Shared, check};
use nvshare::audit::Audit;
use nvshare::books::Books;
use nvshare::slot::Process;
use nvshare::{Client, SlotIndex};

const PROCESS: Process = Process { pid: 7, started: 7 };

fn client(page: &Shared) -> (SlotIndex, Books<Shared>) {
    let slot = page.open_slot(PROCESS, "", 1).expect("a slot is free");
    (slot, Client::new(page.clone(), slot).books().clone())
}

/// I1: whatever two clients take and give at once, nothing is lost and nothing appears.
#[test]
fn two_clients_move_granules() {
    check(3, || {
        let page = Shared::new(3);
        let (first, first_books) = client(&page);
        let (second, second_books) = client(&page);
        let other = thread::spawn(move || {
            if second_books.try_take(2).is_ok() {
                second_books.give(1);
            }
        });
        let one = thread::spawn(move || {
            if first_books.try_take(2).is_ok() {
                first_books.give(2);
            }
        });
        one.join().unwrap();
        other.join().unwrap();
        let held = page.account(first).resident + page.account(second).resident;
        assert_eq!(page.free().granules + held as i32, 3);
        assert_eq!(page.audit(), Audit::Balanced);
    });
}

/// No lost wake-up: a client that waits for granules is woken by the one that gives them back.
#[test]
fn a_starved_fill_is_woken() {
    check(3, || {
        let page = Shared::new(2);
        let (_, holder) = client(&page);
        let (_, waiter) = client(&page);
        holder.try_take(2).unwrap();
        let other = thread::spawn(move || holder.give(2));
        let starved = thread::spawn(move || {
            // The waiter is not admitted in this model, so it waits as `take` does, on the counter.
            while let Err(free) = waiter.try_take(2) {
                waiter.wait_for_granules(free);
            }
        });
        starved.join().unwrap();
        other.join().unwrap();
        assert_eq!(page.free().granules, 0);
    });
}

/// A client that is killed at any step of a move, while another moves and the arbiter reaps: the books
/// balance to the granule.
#[test]
fn a_killed_move_is_settled_exactly() {
    for steps in 0..4 {
        check(2, move || {
            let page = Shared::new(4);
            let (dead, dead_books) = client(&page);
            let (_, live) = client(&page);
            dead_books.try_take(1).unwrap();
            let killed = thread::spawn({
                let page = page.clone();
                move || {
                    page.stop_in_take(dead, 2, steps);
                    // The arbiter, when it has seen the death.
                    page.reap(dead).unwrap();
                }
            });
            let other = thread::spawn(move || {
                live.try_take(1).unwrap();
                live.give(1);
            });
            killed.join().unwrap();
            other.join().unwrap();
            assert_eq!(page.free().granules, 4);
            assert_eq!(page.audit(), Audit::Balanced);
        });
    }
}

/// An audit beside honest moves never finds a leak.
#[test]
fn an_audit_repairs_nothing_that_is_whole() {
    check(2, || {
        let page = Shared::new(3);
        let (_, books) = client(&page);
        let mover = thread::spawn(move || {
            books.try_take(2).unwrap();
            books.give(2);
        });
        let auditor = thread::spawn({
            let page = page.clone();
            move || assert!(!matches!(page.audit(), Audit::Repaired(_)))
        });
        mover.join().unwrap();
        auditor.join().unwrap();
        assert_eq!(page.audit(), Audit::Balanced);
    });
}
