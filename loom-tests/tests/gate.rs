//! The gate: nobody is inside while memory moves (I2), and nobody is left standing before it.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use loom_tests::check;
use nvshare::gate::Gate;
use nvshare::units::Nanos;
use std::cell::Cell;

/// What the gate guards: submitters read it inside, the engine writes it while the gate is shut. Loom
/// fails the model if a read and the write can meet.
struct Memory(UnsafeCell<u32>);

// SAFETY: whether it is right to share it is what the model finds out.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

fn look(memory: &Memory) {
    // SAFETY: loom checks the access.
    memory.0.with(|value| assert_ne!(unsafe { *value }, 1, "inside while memory moves"));
}

/// Which lane it was.
fn submit(gate: &Gate, memory: &Memory) -> usize {
    let lane = gate.lane();
    let which = (&raw const *lane).addr();
    gate.enter(&lane, || (), || ());
    look(memory);
    gate.leave(&lane);
    gate.retire(lane);
    which
}

fn submitter(gate: &Arc<Gate>, memory: &Arc<Memory>) -> thread::JoinHandle<usize> {
    let (gate, memory) = (gate.clone(), memory.clone());
    thread::spawn(move || submit(&gate, &memory))
}

/// When it returns, nobody is inside, and nobody comes in.
fn shut(gate: &Gate) {
    gate.close();
    while !gate.vacated(Nanos::MAX) {}
}

fn swap(gate: &Gate, memory: &Memory) {
    shut(gate);
    // SAFETY: loom checks the access.
    memory.0.with_mut(|value| unsafe { *value = 1 });
    // SAFETY: as above.
    memory.0.with_mut(|value| unsafe { *value = 2 });
    gate.open();
}

/// One submitter and the engine.
#[test]
fn memory_moves_while_nobody_is_inside() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        gate.open();
        let submitter = submitter(&gate, &memory);
        let engine = thread::spawn(move || swap(&gate, &memory));
        engine.join().unwrap();
        submitter.join().unwrap();
    });
}

/// Two submitters and the engine. The second one tries once: in the model a wake-up wakes everybody, and
/// two threads that turn back before the shut gate would wake each other for ever.
#[test]
fn two_submitters_and_a_swap() {
    check(2, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        gate.open();
        let patient = thread::spawn({
            let (gate, memory) = (gate.clone(), memory.clone());
            move || submit(&gate, &memory)
        });
        let hasty = thread::spawn({
            let (gate, memory) = (gate.clone(), memory.clone());
            move || {
                let lane = gate.lane();
                if gate.try_enter(&lane) {
                    look(&memory);
                    gate.leave(&lane);
                }
                gate.retire(lane);
            }
        });
        let engine = thread::spawn(move || swap(&gate, &memory));
        patient.join().unwrap();
        hasty.join().unwrap();
        engine.join().unwrap();
    });
}

/// A thread ends and another one gets its lane while the gate shuts.
#[test]
fn memory_moves_while_nobody_is_inside_in_a_lane_that_changes_hands() {
    check(2, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        gate.open();
        let submitters = thread::spawn({
            let (gate, memory) = (gate.clone(), memory.clone());
            move || {
                let first = submit(&gate, &memory);
                // Whoever waits for the lane's counter sees it of two threads.
                assert_eq!(submitter(&gate, &memory).join().unwrap(), first);
            }
        });
        let engine = thread::spawn(move || swap(&gate, &memory));
        engine.join().unwrap();
        submitters.join().unwrap();
    });
}

/// A thread that stands before the gate from the beginning gets in when it opens.
#[test]
fn whoever_waits_is_let_in() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        let submitter = submitter(&gate, &memory);
        let engine = thread::spawn(move || gate.open());
        engine.join().unwrap();
        submitter.join().unwrap();
    });
}

/// A thread that stands before the shut gate goes in when one is let in by a step, and so does one that comes just then.
#[test]
fn whoever_waits_is_let_in_by_a_step() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        let submitter = submitter(&gate, &memory);
        let engine = thread::spawn(move || gate.let_in(1));
        engine.join().unwrap();
        submitter.join().unwrap();
    });
}

/// The gate is limited while somebody goes in, and shut: who takes the long way in is inside, too.
#[test]
fn memory_moves_while_nobody_is_inside_a_limited_gate() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        gate.open();
        let submitter = submitter(&gate, &memory);
        let engine = thread::spawn(move || {
            gate.limit();
            swap(&gate, &memory);
            gate.limit();
        });
        engine.join().unwrap();
        submitter.join().unwrap();
    });
}

/// A gate that is limited before it opens lets nobody in who has not kept the pace.
#[test]
fn nobody_goes_into_a_limited_gate_unpaced() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        gate.limit();
        let submitter = thread::spawn({
            let gate = gate.clone();
            move || {
                let paced = Cell::new(false);
                let lane = gate.lane();
                assert!(!gate.try_enter(&lane));
                gate.enter(&lane, || paced.set(true), || ());
                assert!(paced.get());
                gate.leave(&lane);
                gate.retire(lane);
            }
        });
        gate.open();
        submitter.join().unwrap();
    });
}

/// Who limits a gate, or takes that back, does not open one that is shut.
#[test]
fn a_limit_does_not_open_the_gate() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        gate.open();
        let limits = thread::spawn({
            let gate = gate.clone();
            move || {
                gate.limit();
                gate.unlimit();
            }
        });
        gate.close();
        assert!(!gate.is_open());
        limits.join().unwrap();
        assert!(!gate.is_open());
    });
}

/// The drain is put off in the middle, because somebody is inside, and tried again: memory moves only when nobody is.
#[test]
fn a_drain_that_is_put_off_moves_nothing() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        let memory = Arc::new(Memory(UnsafeCell::new(0)));
        gate.open();
        let submitter = submitter(&gate, &memory);
        let engine = thread::spawn(move || {
            gate.close();
            // Time stands still: it waits for nobody.
            if !gate.vacated(0) {
                gate.open();
            }
            swap(&gate, &memory);
        });
        engine.join().unwrap();
        submitter.join().unwrap();
    });
}

/// Whoever stands before the gate, or comes to it, is let in when it fails, whoever shuts it, and is not let in quickly.
#[test]
fn nobody_stands_before_a_gate_that_has_failed() {
    check(3, || {
        let gate = Arc::new(Gate::new());
        gate.open();
        let submitter = thread::spawn({
            let gate = gate.clone();
            move || {
                let lane = gate.lane();
                gate.enter(&lane, || (), || ());
                gate.leave(&lane);
                gate.retire(lane);
            }
        });
        let engine = thread::spawn({
            let gate = gate.clone();
            move || {
                gate.close();
                gate.fail();
                gate.close();
            }
        });
        engine.join().unwrap();
        submitter.join().unwrap();
        assert!(!gate.try_enter(&gate.lane()));
    });
}

/// A thread that is let in through the shut gate, or is not any more: nobody is inside while memory moves.
#[test]
fn whoever_is_let_in_is_seen() {
    check(3, || {
        let (gate, memory) = (Arc::new(Gate::new()), Arc::new(Memory(UnsafeCell::new(0))));
        let one = submitter(&gate, &memory);
        gate.let_in(1);
        gate.let_nobody_in();
        swap(&gate, &memory);
        one.join().unwrap();
    });
}
