//! The compute turn: no two clients have it at once, whoever claims it gets it (no lost wake-up), also from a client that is
//! killed with it, and from one that does not give it up.
#![cfg(loom)]

use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;
use loom_tests::{Shared, check_some};
use nvshare::SlotIndex;
use nvshare::slot::Process;
use nvshare::turns::PATIENCE;
use std::sync::Arc;

/// Some 0.2 ms each.
const PERMUTATIONS: usize = 20_000;

const PROCESS: Process = Process { pid: 7, started: 7 };

fn page(clients: usize) -> (Shared, Vec<SlotIndex>) {
    let page = Shared::new(3);
    let slots = (0..clients).map(|_| page.open_slot(PROCESS, "", 1).expect("a slot is free")).collect();
    (page, slots)
}

/// Waits for the turn as a thread of the client does.
fn await_turn(page: &Shared, slot: SlotIndex) {
    loop {
        let seen = page.doorbell(slot);
        if page.turn().holder == Some(slot) {
            return;
        }
        page.claim_turn(slot);
        if page.turn().holder == Some(slot) {
            return;
        }
        page.wait_doorbell(slot, seen, None);
    }
}

/// Has the turn alone, so many times.
fn take_turns(page: &Shared, slot: SlotIndex, times: u32, inside: &AtomicU32) {
    for left in (0..times).rev() {
        await_turn(page, slot);
        assert_eq!(inside.fetch_add(1, Ordering::AcqRel), 0, "nobody else has the turn");
        inside.fetch_sub(1, Ordering::AcqRel);
        page.leave_turn(slot, left > 0);
    }
}

fn turns(clients: usize, times: u32, preemptions: usize) {
    check_some(preemptions, PERMUTATIONS, move || {
        let (page, slots) = page(clients);
        let inside = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = slots
            .into_iter()
            .map(|slot| {
                let (page, inside) = (page.clone(), inside.clone());
                thread::spawn(move || take_turns(&page, slot, times, &inside))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.turn().holder, None, "nobody has work");
    });
}

/// Each has the turn twice, and waits for the second one without another claim.
#[test]
fn two_take_compute_turns() {
    turns(2, 2, 2);
}

#[test]
fn three_take_compute_turns() {
    turns(3, 1, 1);
}

/// One of two is killed, before, while or after it waits, or with the turn, and the arbiter reaps it: the other gets its turn.
#[test]
fn the_turn_of_one_that_is_killed_goes_on() {
    check_some(2, PERMUTATIONS, || {
        let (page, slots) = page(2);
        let [killed, survivor] = slots[..] else { unreachable!("two") };
        let threads = [
            thread::spawn({
                let page = page.clone();
                move || {
                    page.claim_turn(killed);
                    page.reap(killed).unwrap();
                }
            }),
            thread::spawn({
                let page = page.clone();
                move || take_turns(&page, survivor, 1, &AtomicU32::new(0))
            }),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.turn().holder, None, "neither has work");
    });
}

/// One does not give its turn up, and two take it from it at the same time. Both get their turns, one after the other, and it gets
/// another when its work has ended.
#[test]
fn a_turn_that_is_not_given_up_is_taken_once() {
    check_some(1, PERMUTATIONS, || {
        let (page, slots) = page(3);
        let [stuck, ..] = slots[..] else { unreachable!("three") };
        page.claim_turn(stuck);
        // The turns after it begin later, although the model's clock stands still: they have not lasted for so long then.
        let later = page.turn().began + PATIENCE;
        let seized = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = slots[1..]
            .iter()
            .map(|slot| {
                let (page, slot, seized) = (page.clone(), *slot, seized.clone());
                thread::spawn(move || {
                    page.claim_turn(slot);
                    if page.seize_turn(later) == Some(stuck) {
                        seized.fetch_add(1, Ordering::AcqRel);
                    }
                    // It may be the other one's by now, who gives it up.
                    await_turn(&page, slot);
                    page.leave_turn(slot, false);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(seized.load(Ordering::Acquire), 1);
        assert!(page.is_overdue(stuck) && page.turn().holder.is_none());
        page.no_longer_overdue(stuck);
        assert_eq!(page.turn().holder, Some(stuck), "its claim stands");
    });
}

/// A client's thread sleeps until it has the turn, and another of its threads takes it from a client that does not give it up.
#[test]
fn a_turn_that_is_seized_goes_to_whoever_sleeps() {
    check_some(2, PERMUTATIONS, || {
        let (page, slots) = page(2);
        let [stuck, slot] = slots[..] else { unreachable!("two") };
        page.claim_turn(stuck);
        let later = page.turn().began + PATIENCE;
        let threads = [
            thread::spawn({
                let page = page.clone();
                move || await_turn(&page, slot)
            }),
            thread::spawn({
                let page = page.clone();
                move || assert_eq!(page.seize_turn(later), Some(stuck))
            }),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.turn().holder, Some(slot));
    });
}

/// The client's thread for turns takes a claim back that no thread waits for, while one comes that does.
#[test]
fn a_claim_is_not_taken_back_from_a_thread_that_waits() {
    check_some(2, PERMUTATIONS, || {
        let (page, slots) = page(2);
        let [slot, other] = slots[..] else { unreachable!("two") };
        let waiting = Arc::new(AtomicU32::new(0));
        page.claim_turn(other);
        page.claim_turn(slot);
        let threads = [
            thread::spawn({
                let (page, waiting) = (page.clone(), waiting.clone());
                move || {
                    waiting.fetch_add(1, Ordering::SeqCst);
                    fence(Ordering::SeqCst);
                    await_turn(&page, slot);
                }
            }),
            thread::spawn({
                let (page, waiting) = (page.clone(), waiting.clone());
                move || {
                    if waiting.load(Ordering::SeqCst) == 0 {
                        page.unclaim_turn(slot);
                        if waiting.load(Ordering::SeqCst) > 0 {
                            page.claim_turn(slot);
                        }
                    }
                    page.leave_turn(other, false);
                }
            }),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.turn().holder, Some(slot));
    });
}
