//! A client that is paused, and resumed at any moment of its way to the GPU: it hears of it, and runs.
#![cfg(loom)]

use loom::thread;
use loom_tests::{Shared, check_some};
use nvshare::client::Bookkeeper;
use nvshare::page::{Quantum, Settings, Suspension};
use nvshare::slot::Process;
use nvshare::{Client, Phase};

/// Of them the first few find a ring that is not rung.
const PERMUTATIONS: usize = 5_000;

const PROCESS: Process = Process { pid: 7, started: 7 };

#[test]
fn who_is_resumed_gets_the_gpu() {
    check_some(2, PERMUTATIONS, || {
        let page = Shared::new(2);
        page.set_settings(Settings { quantum: Quantum::Fixed(u64::MAX), ..Settings::default() });
        let slot = page.open_slot(PROCESS, "", 1).expect("a slot is free");
        let mut client = Client::new(page.clone(), slot);
        client.books().grow(1);
        page.suspend(slot, Suspension::WithoutEnd);
        let runs = thread::spawn(move || {
            let mut runtime = Bookkeeper::new(client.books(), 1);
            client.acquire(&mut runtime).unwrap();
            assert_eq!((client.phase(), client.books().resident()), (Phase::Running, 1));
            client.release(false);
            assert_eq!(client.phase(), Phase::Idle);
        });
        let arbiter = thread::spawn({
            let page = page.clone();
            move || page.suspend(slot, Suspension::None)
        });
        runs.join().unwrap();
        arbiter.join().unwrap();
        assert!(!page.admitted().contains(slot) && page.suspension(slot) == Suspension::None);
    });
}
