//! A client that is paused and resumed, at any moment of its way to the GPU and from it: it runs in the end, and the arbiter
//! neither waits for it nor takes anything from it.
#![cfg(loom)]

use loom::thread;
use loom_tests::{Shared, check_some};
use nvshare::client::Bookkeeper;
use nvshare::page::{Quantum, Settings, Suspension};
use nvshare::slot::Process;
use nvshare::{Client, Phase};

/// Some 0.2 ms each.
const PERMUTATIONS: usize = 20_000;

const PROCESS: Process = Process { pid: 7, started: 7 };

#[test]
fn who_is_resumed_gets_the_gpu() {
    check_some(2, PERMUTATIONS, || {
        let page = Shared::new(2);
        page.set_settings(Settings { quantum: Quantum::Fixed(u64::MAX), ..Settings::default() });
        let slot = page.open_slot(PROCESS, "", 1).expect("a slot is free");
        let mut client = Client::new(page.clone(), slot);
        client.books().grow(1);
        let runs = thread::spawn(move || {
            let mut runtime = Bookkeeper::new(client.books(), 1);
            client.acquire(&mut runtime).unwrap();
            assert_eq!((client.phase(), client.books().resident()), (Phase::Running, 1));
            // It may have been paused once more meanwhile; its slice ends as any other.
            client.release(false);
            assert_eq!(client.phase(), Phase::Idle);
        });
        let arbiter = thread::spawn({
            let page = page.clone();
            move || {
                page.suspend(slot, Suspension::WithoutEnd);
                page.suspend(slot, Suspension::None);
            }
        });
        runs.join().unwrap();
        arbiter.join().unwrap();
        assert!(!page.admitted().contains(slot) && page.suspension(slot) == Suspension::None);
    });
}
