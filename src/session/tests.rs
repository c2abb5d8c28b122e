use super::*;
use crate::books::Fill;
use crate::page::{Quantum, Settings};
use crate::slot::{Process, SlotIndex};
use crate::units::{GRANULE, SECOND};
use std::sync::atomic::AtomicU32;
use std::task::Wake;

type Heap = Arc<Page>;

fn page(capacity: Granules) -> Heap {
    let page = Heap::from(Page::for_tests(capacity));
    page.set_settings(Settings { quantum: Quantum::Fixed(0), idle_grace: 0, ..Settings::default() });
    page
}

/// A runtime that is told how much memory it has, and what to do when it moves some.
struct Memory {
    books: Books<Heap>,
    wanted: Arc<AtomicU32>,
    on_fill: fn() -> Result<(), Broken>,
}

#[derive(Debug, thiserror::Error)]
#[error("the copy engine is on fire")]
struct Broken;

impl Runtime for Memory {
    type Error = Broken;

    fn fill(&mut self) -> Result<Fill, Broken> {
        (self.on_fill)()?;
        let missing = self.wanted.load(Ordering::SeqCst) - self.books.resident();
        Ok(if missing == 0 { Fill::Complete } else { self.books.take(missing) })
    }

    fn evict(&mut self, granules: Granules) -> Result<(), Broken> {
        self.books.give(granules);
        Ok(())
    }
}

struct Program {
    session: Session<Heap>,
    wanted: Arc<AtomicU32>,
    slot: SlotIndex,
}

impl Program {
    fn start(page: &Heap) -> Self {
        Self::start_with(page, || Ok(()))
    }

    fn start_with(page: &Heap, on_fill: fn() -> Result<(), Broken>) -> Self {
        let slot = page.open_slot(Process { pid: 7, started: 7 }, "", 1).expect("a slot is free");
        let client = Client::new(page.clone(), slot);
        let wanted = Arc::new(AtomicU32::new(0));
        let runtime = Memory { books: client.books().clone(), wanted: wanted.clone(), on_fill };
        Self { session: Session::start(client, runtime).unwrap(), wanted, slot }
    }

    fn grow(&self, granules: Granules) -> Result<(), SessionError> {
        self.session.grow(granules, || {
            self.wanted.fetch_add(granules, Ordering::SeqCst);
        })
    }

    fn with(page: &Heap, granules: Granules) -> Self {
        let program = Self::start(page);
        program.grow(granules).unwrap();
        program
    }
}

/// Waits for what must happen; a test that hangs is a test that fails.
fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        std::thread::yield_now();
    }
}

fn phase(page: &Page, slot: SlotIndex) -> Phase {
    page.view(slot).phase
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn programs_that_do_not_fit_take_turns_and_each_has_its_memory_in_its_turn() {
    let page = page(4);
    let program = |page: Heap| {
        std::thread::spawn(move || {
            let program = Program::with(&page, 3);
            for _ in 0..50 {
                let pass = program.session.enter().unwrap();
                assert_eq!(program.session.books().resident(), 3);
                assert_eq!(phase(&page, program.slot), Phase::Running);
                drop(pass);
            }
            program.session.close().unwrap();
        })
    };
    let programs = [program(page.clone()), program(page.clone()), program(page.clone())];
    for program in programs {
        program.join().unwrap();
    }
    assert_eq!(page.free().granules, 4, "all memory is back");
    let slices = |slot| page.details(slot).map_or(0, |details| details.slices);
    assert!((0..3).filter_map(SlotIndex::new).all(|slot| slices(slot) > 0));
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn a_pass_is_asked_back_when_somebody_waits_and_memory_stays_until_it_is_back() {
    let page = page(4);
    let (first, second) = (Program::with(&page, 3), Program::with(&page, 3));
    let pass = first.session.enter().unwrap();
    assert!(!pass.should_yield(), "nobody waits");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| second.session.enter().map(drop));
        until(|| pass.should_yield());
        until(|| phase(&page, first.slot) == Phase::Draining);
        assert_eq!(first.session.books().resident(), 3, "its work may use it");
        assert!(!waiter.is_finished());
        drop(pass);
        waiter.join().unwrap().unwrap();
    });
    assert_eq!(second.session.books().resident(), 3);
}

/// The first has nothing to do. It keeps its memory until the second needs the GPU, and then gives way without being asked.
#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn a_program_without_work_keeps_the_gpu_until_somebody_needs_it() {
    let page = page(4);
    page.set_settings(Settings { quantum: Quantum::Fixed(600 * SECOND), ..page.settings() });
    let (first, second) = (Program::with(&page, 3), Program::with(&page, 3));
    drop(first.session.enter().unwrap());
    for _ in 0..10 {
        drop(first.session.enter().unwrap());
    }
    assert_eq!(phase(&page, first.slot), Phase::Running);
    assert_eq!(page.details(first.slot).unwrap().slices, 1, "all in one slice");
    drop(second.session.enter().unwrap());
    until(|| phase(&page, first.slot) == Phase::Idle);
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn who_does_not_want_to_wait_any_longer_does_not_stand_in_the_queue() {
    let page = page(4);
    page.set_settings(Settings { quantum: Quantum::Fixed(600 * SECOND), ..page.settings() });
    let (first, second) = (Program::with(&page, 3), Program::with(&page, 3));
    let pass = first.session.enter().unwrap();
    let timeout = Duration::from_millis(1);
    assert!(matches!(second.session.enter_within(timeout), Err(SessionError::TimedOut(_))));
    until(|| phase(&page, second.slot) == Phase::Idle);
    drop(pass);
    assert!(second.session.enter_within(Duration::MAX).is_ok());
}

/// Counts how often it was woken.
#[derive(Default)]
struct Counter(AtomicU32);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn a_future_is_woken_when_its_turn_comes_and_takes_its_request_back_when_it_is_dropped() {
    let page = page(4);
    page.set_settings(Settings { quantum: Quantum::Fixed(600 * SECOND), ..page.settings() });
    let (first, second) = (Program::with(&page, 3), Program::with(&page, 3));
    let pass = first.session.enter().unwrap();
    let wakes = Arc::new(Counter::default());
    let waker = Waker::from(wakes.clone());
    let mut context = Context::from_waker(&waker);
    let mut entering = Box::pin(second.session.entering());
    assert!(entering.as_mut().poll(&mut context).is_pending());
    until(|| phase(&page, second.slot) == Phase::Waiting);
    drop(entering);
    until(|| phase(&page, second.slot) == Phase::Idle);

    let mut entering = Box::pin(second.session.entering());
    for _ in 0..3 {
        assert!(entering.as_mut().poll(&mut context).is_pending());
    }
    drop(pass);
    until(|| wakes.0.load(Ordering::SeqCst) > 0);
    let Poll::Ready(Ok(pass)) = entering.as_mut().poll(&mut context) else { panic!("it was woken") };
    assert_eq!(wakes.0.load(Ordering::SeqCst), 1, "polled three times, and woken once");
    assert_eq!(second.session.books().resident(), 3);
    drop(pass);
}

/// An executor that polls and drops its one future in the call that wakes it.
struct AtOnce {
    future: Mutex<Option<Pin<Box<Entering<Heap>>>>>,
    ready: AtomicBool,
}

impl Wake for AtOnce {
    fn wake(self: Arc<Self>) {
        let mut future = self.future.lock().unwrap().take().expect("it is woken once");
        let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.ready.store(matches!(polled, Poll::Ready(Ok(_))), Ordering::SeqCst);
    }
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn an_executor_may_poll_and_drop_a_future_in_the_call_that_wakes_it() {
    let page = page(4);
    let program = Program::with(&page, 3);
    let executor = Arc::new(AtOnce { future: Mutex::default(), ready: AtomicBool::new(false) });
    let waker = Waker::from(executor.clone());
    {
        // Its lock is kept until the future is in its place: the GPU may come at once.
        let mut place = executor.future.lock().unwrap();
        let mut entering = Box::pin(program.session.entering());
        assert!(entering.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        *place = Some(entering);
    }
    until(|| executor.ready.load(Ordering::SeqCst));
    drop(program.session.enter().unwrap());
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn new_memory_is_in_place_with_the_next_pass() {
    let page = page(8);
    let program = Program::with(&page, 2);
    let pass = program.session.enter().unwrap();
    program.grow(3).unwrap();
    // The gate is shut until it is in, which may be so already.
    let second = program.session.enter().unwrap();
    assert_eq!(program.session.books().resident(), 5);
    assert!(!second.should_yield() && !pass.should_yield(), "both go on");
    let error = program.grow(4).unwrap_err();
    let SessionError::TooLarge { wanted, left } = error else { panic!("{error}") };
    assert_eq!((wanted, left), (4 * GRANULE, 3 * GRANULE));
    assert_eq!((program.session.books().demand(), program.wanted.load(Ordering::SeqCst)), (5, 5));
    drop((pass, second));
    program.session.books().give(5);
    program.session.shrink(5).unwrap();
    assert_eq!(program.session.memory_info().free, 8 * GRANULE);
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn a_runtime_that_fails_or_panics_ends_its_session_and_no_other() {
    let page = page(4);
    let broken = Program::start_with(&page, || Err(Broken));
    let panics = Program::start_with(&page, || panic!("it is {}", "unwell"));
    let well = Program::with(&page, 3);
    for (program, said) in [(broken, "the copy engine is on fire"), (panics, "it is unwell")] {
        program.grow(2).unwrap();
        for _ in 0..2 {
            let error = program.session.enter().map(drop).unwrap_err();
            assert!(error.to_string().ends_with(said), "{error}");
        }
        until(|| phase(&page, program.slot) == Phase::Leaving);
        assert!(program.session.close().unwrap_err().to_string().ends_with(said));
    }
    assert_eq!(well.session.enter().map(drop).map_err(|error| error.to_string()), Ok(()));
    assert_eq!(page.free().granules, 1);
}

#[test]
#[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
fn a_session_that_is_closed_waits_for_the_last_pass_and_tells_those_who_wait() {
    let page = page(4);
    page.set_settings(Settings { quantum: Quantum::Fixed(600 * SECOND), ..page.settings() });
    let (holder, program) = (Program::with(&page, 3), Program::with(&page, 3));
    let held = holder.session.enter().unwrap();
    let waits = program.session.entering();
    let waker = Waker::noop();
    let mut waits = Box::pin(waits);
    assert!(waits.as_mut().poll(&mut Context::from_waker(waker)).is_pending());
    program.session.close().unwrap();
    let Poll::Ready(Err(error)) = waits.as_mut().poll(&mut Context::from_waker(waker)) else {
        panic!("nothing is left to wait for")
    };
    assert!(matches!(error, SessionError::Closed));
    let slot = holder.slot;
    let closes = std::thread::spawn(move || holder.session.close());
    until(|| held.should_yield());
    assert!(!closes.is_finished() && phase(&page, slot) != Phase::Leaving);
    drop(held);
    closes.join().unwrap().unwrap();
    assert_eq!(phase(&page, slot), Phase::Leaving);
}

#[test]
#[cfg_attr(miri, ignore = "Miri knows no fork")]
fn a_forked_child_is_told_that_it_is_no_client() {
    let page = page(4);
    let program = Program::with(&page, 3);
    let pass = program.session.enter().unwrap();
    // SAFETY: the child only calls functions that take no lock of another thread, and ends at once.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let told = [
                program
                    .session
                    .enter()
                    .map(drop)
                    .is_err_and(|error| matches!(error, SessionError::Forked { .. })),
                program.grow(1).is_err_and(|error| matches!(error, SessionError::Forked { .. })),
            ];
            drop(pass);
            drop(program);
            // SAFETY: it ends the child without the test's own end.
            unsafe { libc::_exit(if told == [true; 2] { 0 } else { 1 }) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    assert!(!pass.should_yield(), "the parent goes on");
    drop(pass);
    program.session.close().unwrap();
}
