//! Decisions and doorbells: whoever wants the GPU gets it (no lost wake-up), whoever runs has all its
//! memory (I2), and whoever run together fit (I3).
#![cfg(loom)]

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use loom_tests::{Shared, check_some};
use nvshare::audit::Audit;
use nvshare::client::Bookkeeper;
use nvshare::page::{Quantum, Settings};
use nvshare::slot::Process;
use nvshare::{Client, Phase};
use std::sync::Arc;

/// Some 0.2 ms each.
const PERMUTATIONS: usize = 50_000;

const PROCESS: Process = Process { pid: 7, started: 7 };

fn page(capacity: u32) -> Shared {
    let page = Shared::new(capacity);
    // Time stands still, so a slice must be over at once or never. At once: both sides then decide.
    page.set_settings(Settings { quantum: Quantum::Fixed(u64::MAX), ..Settings::default() });
    page
}

fn client(page: &Shared) -> Client<Shared> {
    let slot = page.open_slot(PROCESS, "", 1).expect("a slot is free");
    Client::new(page.clone(), slot)
}

/// Runs once, and then makes room for the others until they are done.
fn take_a_turn(
    mut client: Client<Shared>,
    demand: u32,
    capacity: u32,
    running: &AtomicU32,
    left: &AtomicU32,
) {
    let books = client.books().clone();
    let mut runtime = Bookkeeper::new(&books, demand);
    books.grow(demand);
    client.acquire(&mut runtime).unwrap();
    assert_eq!(books.resident(), demand, "I2: it runs with all its memory");
    let together = running.fetch_add(demand, Ordering::AcqRel) + demand;
    assert!(together <= capacity, "I3: those who run fit");
    running.fetch_sub(demand, Ordering::AcqRel);
    client.release(false);
    if left.fetch_sub(1, Ordering::AcqRel) == 1 {
        // The last one: wake the others, who serve.
        for slot in books.page().occupied().iter() {
            books.page().ring(slot);
        }
    }
    loop {
        // Before the look at `left`, or the last one's ring could fall between the look and the sleep.
        let seen = books.page().doorbell(books.slot());
        if left.load(Ordering::Acquire) == 0 {
            return;
        }
        client.poll(&mut runtime).unwrap();
        books.page().wait_doorbell(books.slot(), seen, None);
    }
}

fn turns(demands: &'static [u32], capacity: u32, preemptions: usize) {
    check_some(preemptions, PERMUTATIONS, move || {
        let page = page(capacity);
        let running = Arc::new(AtomicU32::new(0));
        let left = Arc::new(AtomicU32::new(demands.len() as u32));
        let clients: Vec<_> = demands.iter().map(|demand| (client(&page), *demand)).collect();
        let threads: Vec<_> = clients
            .into_iter()
            .map(|(client, demand)| {
                let (running, left) = (running.clone(), left.clone());
                thread::spawn(move || take_a_turn(client, demand, capacity, &running, &left))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.audit(), Audit::Balanced);
    });
}

/// Two clients of which one fits: both get their turn.
#[test]
fn two_take_turns() {
    turns(&[2, 2], 3, 2);
}

/// Three clients of which one fits: a decision may be overtaken twice, and each gets its turn.
#[test]
fn three_take_turns() {
    turns(&[2, 2, 2], 3, 1);
}

/// Two clients that fit: both run, in any order, without moving anything out.
#[test]
fn two_that_fit_run_together() {
    turns(&[1, 2], 3, 2);
}

/// One of two clients stops while it waits, and the arbiter reaps it: the other one gets its turn.
#[test]
fn a_waiter_that_is_killed_holds_nobody_up() {
    check_some(2, PERMUTATIONS, || {
        let page = page(3);
        let mut victim = client(&page);
        let survivor = client(&page);
        let killed = victim.books().slot();
        let arbiter = thread::spawn({
            let page = page.clone();
            move || {
                victim.books().grow(2);
                victim.request();
                // Killed here, waiting or already admitted.
                page.reap(killed).unwrap();
            }
        });
        let survivor =
            thread::spawn(move || take_a_turn(survivor, 2, 3, &AtomicU32::new(0), &AtomicU32::new(1)));
        survivor.join().unwrap();
        arbiter.join().unwrap();
        assert_eq!(page.audit(), Audit::Balanced);
        assert!(page.owner(killed).is_none() && page.view(killed).phase == Phase::Idle);
    });
}

/// A client begins to wait while the arbiter reaps the one that is admitted: whichever decides last has seen what the other
/// one changed, and admits it. The waiter's decision changes nothing as long as the other one is there, and it must be
/// published all the same (docs/decisions/0002-every-decision-is-published.md). Nobody fills or runs: with the waiter's whole
/// turn, its steps after that decision have more interleavings than a test has time for, and those come first.
#[test]
fn who_comes_while_the_holder_is_reaped_is_admitted() {
    check_some(2, PERMUTATIONS, || {
        let page = page(3);
        let (mut victim, mut survivor) = (client(&page), client(&page));
        victim.books().grow(2);
        victim.request();
        survivor.books().grow(2);
        let (killed, comes) = (victim.books().slot(), survivor.books().slot());
        assert!(page.admitted().contains(killed));
        let arbiter = thread::spawn({
            let page = page.clone();
            move || {
                page.reap(killed).unwrap();
            }
        });
        let survivor = thread::spawn(move || survivor.request());
        arbiter.join().unwrap();
        survivor.join().unwrap();
        assert!(page.admitted().contains(comes), "nobody decides again, and it waits for ever");
    });
}
