//! The rules of turns on a model of one GPU that runs kernels of one client at a time, and does not interrupt them.

use super::*;
use proptest::prelude::*;

fn slot(index: usize) -> SlotIndex {
    SlotIndex::new(index).expect("there is such a slot")
}

/// A client of the model that has work all the time, or bursts.
#[derive(Debug, Clone, Copy)]
struct Job {
    weight: u32,
    priority: Priority,
    limit: ComputeLimit,
    /// How long its kernels take, ns.
    kernel: Nanos,
    /// Of each period, ns, it has this much work; `None`: always.
    burst: Option<(Nanos, Nanos)>,
}

impl Job {
    fn busy(kernel: Nanos) -> Self {
        Self { weight: 100, priority: Priority::Normal, limit: ComputeLimit::None, kernel, burst: None }
    }
}

/// What a model has done: when which client had the GPU, ns.
struct Course {
    runs: Vec<(usize, Nanos, Nanos)>,
    /// The longest time that each client has waited for its turn, ns.
    longest_wait: [Nanos; SLOTS],
}

impl Course {
    /// GPU time of a client between two times, ns.
    fn had(&self, client: usize, from: Nanos, to: Nanos) -> Nanos {
        let within = |(_, begin, end): &(usize, Nanos, Nanos)| end.min(&to).saturating_sub(*begin.max(&from));
        self.runs.iter().filter(|(of, ..)| *of == client).map(within).sum()
    }
}

/// Runs jobs against each other for `time` ns, as the shim does: whoever has the turn submits one kernel after the other, looks when
/// its turn is over, and is charged.
fn run(jobs: &[Job], time: Nanos, deadline: Nanos) -> Course {
    const BEGIN: Nanos = 1_000 * SECOND;
    let mut course = Course { runs: Vec::new(), longest_wait: [0; SLOTS] };
    let mut left: Vec<Nanos> =
        jobs.iter().map(|job| job.burst.map_or(Nanos::MAX, |(work, _)| work)).collect();
    let mut due: Vec<Nanos> =
        jobs.iter().map(|job| job.burst.map_or(Nanos::MAX, |(_, period)| BEGIN + period)).collect();
    let mut state = Competition {
        now: BEGIN,
        turn: Turn { holder: None, began: 0 },
        deadline,
        occupied: (0..jobs.len()).map(slot).collect(),
        overdue: SlotSet::EMPTY,
        clients: [Contender::default(); SLOTS],
    };
    for (client, job) in state.clients.iter_mut().zip(jobs) {
        *client = Contender {
            weight: job.weight,
            priority: job.priority,
            limit: job.limit,
            ..Contender::default()
        };
    }
    while state.now < BEGIN + time {
        for (index, job) in jobs.iter().enumerate() {
            if let Some((work, period)) = job.burst
                && due[index] <= state.now
            {
                (left[index], due[index]) = (left[index].saturating_add(work), due[index] + period);
            }
            if left[index] > 0 && state.clients[index].claim.is_none() {
                state.clients[index].claim = Some(state.now);
                state.clients[index].virtual_time = state.entry(slot(index), false);
            }
        }
        let holder = match state.turn.holder {
            Some(holder) => holder,
            None => match state.next() {
                Some(next) => {
                    let waited = state.now - state.client(next).claim.expect("it has work");
                    let longest = &mut course.longest_wait[next.get()];
                    *longest = (*longest).max(waited);
                    state.turn = Turn { holder: Some(next), began: state.now };
                    next
                }
                None => {
                    let allowed = (0..jobs.len())
                        .filter(|index| left[*index] > 0)
                        .map(|index| state.clients[index].allowed_at(state.now));
                    state.now = allowed
                        .chain(due.iter().copied())
                        .filter(|at| *at > state.now)
                        .min()
                        .unwrap_or(Nanos::MAX);
                    continue;
                }
            },
        };
        let index = holder.get();
        if left[index] == 0 || state.turn_end(holder) <= state.now {
            state.clients[index].claim = (left[index] > 0).then_some(state.now);
            state.turn = Turn { holder: None, began: state.now };
            continue;
        }
        if state.now - state.turn.began >= TURN {
            state.turn.began = state.now;
        }
        let kernel = jobs[index].kernel.min(left[index]);
        course.runs.push((index, state.now - BEGIN, state.now - BEGIN + kernel));
        left[index] -= kernel;
        state.now += kernel;
        state.clients[index] = state.clients[index].charged(kernel, state.now);
    }
    course
}

const KERNELS: [Nanos; 4] = [50_000, 300_000, 1_650_000, 100 * MILLISECOND];

fn kernels() -> impl Strategy<Value = Nanos> {
    (0..KERNELS.len()).prop_map(|index| KERNELS[index])
}

fn priorities() -> impl Strategy<Value = Priority> {
    (0..3u32).prop_map(|word| Priority::read(word).expect("there are three"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Busy clients of one priority have GPU time by their weights, within 5 % of each other, whatever their kernels; and nothing
    /// of the GPU is left.
    #[test]
    fn busy_clients_share_by_weight(of in prop::collection::vec((50u32..=600, kernels()), 2..5)) {
        let jobs: Vec<Job> = of.iter().map(|(weight, kernel)| Job { weight: *weight, ..Job::busy(*kernel) }).collect();
        // Long enough for a kernel of 100 ms of the lightest to be little of what it has.
        let time = 60 * SECOND;
        let course = run(&jobs, time, 60 * SECOND);
        let weights: u32 = jobs.iter().map(|job| job.weight).sum();
        for (index, job) in jobs.iter().enumerate() {
            let part = course.had(index, 0, time) as f64 / time as f64;
            let fair = f64::from(job.weight) / f64::from(weights);
            prop_assert!((part / fair - 1.0).abs() <= 0.05, "client {index} of {jobs:?} had {part} and not {fair}");
        }
    }

    /// A limited client has at most its limit of any two seconds, and 2 points or a kernel; alone, and beside others that leave it so
    /// much, no less. Others leave it less whose turns take longer than the bucket takes to fill: what would come in then is lost.
    #[test]
    fn a_limit_holds_over_any_two_seconds(percent in 1u32..=90, kernel in kernels(), others in 0usize..3, other_kernel in kernels()) {
        let limit = ComputeLimit::Part(percent * WHOLE / 100);
        let mut jobs = vec![Job { limit, ..Job::busy(kernel) }];
        jobs.resize(others + 1, Job::busy(other_kernel));
        let course = run(&jobs, 20 * SECOND, 60 * SECOND);
        let window = 2 * SECOND;
        let allowed = window * u64::from(percent) / 100;
        let slack = (window / 50).max(kernel);
        let ends = course.runs.iter().filter(|(of, ..)| *of == 0).map(|(_, begin, _)| *begin).step_by(1 + course.runs.len() / 300);
        for begin in ends.filter(|begin| begin + window <= 20 * SECOND) {
            let had = course.had(0, begin, begin + window);
            prop_assert!(had <= allowed + slack, "{percent} % of kernels of {kernel} ns: {had} of {allowed} ns from {begin}");
            // Its part among equals is more than its limit.
            let in_time = others as u64 * (other_kernel + TURN) < CREDIT * 100 / u64::from(percent);
            if percent as usize * (others + 1) < 80 && in_time && begin > 2 * SECOND {
                prop_assert!(had + slack + 2 * other_kernel.max(TURN) >= allowed, "{percent} % of kernels of {kernel} ns: {had} of {allowed} ns from {begin}");
            }
        }
    }

    /// Nobody begins a kernel while somebody of higher priority has work and may have it done; what is under way ends.
    #[test]
    fn priority_is_strict(kernel in kernels(), burst in 1u64..20, period in 20u64..100) {
        let high = Job { priority: Priority::High, burst: Some((burst * MILLISECOND, period * MILLISECOND)), ..Job::busy(MILLISECOND / 2) };
        let low = Job { priority: Priority::Low, ..Job::busy(kernel) };
        let course = run(&[high, low], 10 * SECOND, 60 * SECOND);
        prop_assert!(course.longest_wait[0] <= kernel, "{} ns for kernels of {kernel}", course.longest_wait[0]);
        // What is left goes to the other.
        let had = course.had(0, 0, 10 * SECOND) + course.had(1, 0, 10 * SECOND);
        prop_assert!(had + kernel >= 10 * SECOND, "{had}");
    }

    /// Whatever the weights and priorities, nobody without a limit waits longer than twice the deadline, and then for one turn and one
    /// kernel of each other, which may have to wait as long.
    #[test]
    fn nobody_starves(of in prop::collection::vec((1u32..=1_000, priorities(), kernels()), 2..6)) {
        let jobs: Vec<Job> = of.iter().map(|(weight, priority, kernel)| Job { weight: *weight, priority: *priority, ..Job::busy(*kernel) }).collect();
        let deadline = SECOND;
        let course = run(&jobs, 20 * SECOND, deadline);
        let others: Nanos = jobs.iter().map(|job| TURN + job.kernel).sum();
        for (index, job) in jobs.iter().enumerate() {
            let patience = if job.priority == Priority::Low { 2 * deadline } else { deadline };
            prop_assert!(course.longest_wait[index] <= patience + 2 * others, "client {index} of {jobs:?} waited for {} ns", course.longest_wait[index]);
            prop_assert!(course.had(index, 0, 20 * SECOND) > 0);
        }
    }

    /// Whatever stands in the page, there is some answer.
    #[test]
    fn garbage_gives_some_answer(words in prop::collection::vec(any::<u64>(), 8 * SLOTS), overdue: u64, turn: u64, now: u64) {
        let mut clients = [Contender::default(); SLOTS];
        for (client, words) in clients.iter_mut().zip(words.chunks_exact(8)) {
            *client = Contender {
                weight: words[0] as u32,
                priority: Priority::from(words[1] as u32 % 4),
                limit: ComputeLimit::from(words[2] as u32),
                claim: (words[3] & 1 == 1).then_some(words[4]),
                virtual_time: words[5],
                paid_until: words[6],
            };
        }
        let competition = Competition {
            now,
            turn: Turn::from(turn),
            deadline: words[7],
            occupied: SlotSet::from_bits(words[1]),
            overdue: SlotSet::from_bits(overdue),
            clients,
        };
        let next = competition.next();
        prop_assert!(next.is_none_or(|next| competition.client(next).claim.is_some() && competition.occupied.contains(next)));
        for index in 0..SLOTS {
            let (slot, client) = (slot(index), competition.client(slot(index)));
            let _ = (competition.turn_end(slot), competition.work_in_flight(slot), competition.look_again(slot));
            let _ = (competition.entry(slot, false), competition.entry(slot, true), client.charged(words[0], now));
            prop_assert!(client.allowed_at(now) <= now.saturating_add(LONGEST_DEBT).saturating_add(100 * REFILL));
        }
    }

    #[test]
    fn a_turn_is_read_as_it_was_written(holder in 0..=SLOTS, began in 0..1u64 << 53, word: u64) {
        let turn = Turn { holder: holder.checked_sub(1).and_then(SlotIndex::new), began: began * MICROSECOND };
        prop_assert_eq!(Turn::from(u64::from(turn)), turn);
        let _ = Turn::from(word);
    }
}

/// An hour without work is no claim to an hour of the GPU, and neither is it to be paid for.
#[test]
fn who_comes_back_is_neither_far_behind_nor_far_ahead() {
    for (had, bounds) in [(0, 50 * SECOND..=50 * SECOND), (4_000 * SECOND, 51 * SECOND..=51 * SECOND)] {
        let mut state = Competition {
            now: 5_000 * SECOND,
            turn: Turn { holder: Some(slot(1)), began: 4_999 * SECOND },
            deadline: 60 * SECOND,
            occupied: [slot(0), slot(1)].into_iter().collect(),
            overdue: SlotSet::EMPTY,
            clients: [Contender { weight: 100, ..Contender::default() }; SLOTS],
        };
        state.clients[0].virtual_time = had;
        state.clients[1].virtual_time = 50 * SECOND;
        state.clients[1].claim = Some(1);
        assert!(bounds.contains(&state.entry(slot(0), false)), "{had}");
        assert_eq!(state.entry(slot(0), true), 50 * SECOND, "of another priority");
    }
}

fn page_of(shares: &[(u32, Priority, ComputeLimit)]) -> (Box<Page>, Vec<SlotIndex>) {
    use crate::shares::Shares;
    use crate::slot::Process;
    let page = Page::for_tests(16);
    let slots = shares.iter().map(|(weight, priority, compute_limit)| {
        let slot = page.open_slot(Process { pid: 7, started: 7 }, "", 100).expect("a slot is free");
        page.set_shares(
            slot,
            Shares {
                weight: *weight,
                priority: *priority,
                compute_limit: *compute_limit,
                ..Shares::default()
            },
        );
        slot
    });
    let slots = slots.collect();
    (page, slots)
}

const USUAL: (u32, Priority, ComputeLimit) = (100, Priority::Normal, ComputeLimit::None);

#[test]
fn turns_are_taken_where_clients_differ_and_nowhere_else() {
    let limited = (100, Priority::Normal, ComputeLimit::Part(300_000));
    let whole = (100, Priority::Normal, ComputeLimit::Part(WHOLE));
    for (shares, set) in [
        (&[][..], false),
        (&[USUAL], false),
        (&[(300, Priority::High, ComputeLimit::None)], false),
        (&[USUAL, USUAL, whole], false),
        (&[USUAL, (101, Priority::Normal, ComputeLimit::None)], true),
        (&[USUAL, (100, Priority::Low, ComputeLimit::None)], true),
        (&[limited], true),
    ] {
        assert_eq!(page_of(shares).0.shares_are_set(), set, "{shares:?}");
    }
}

#[test]
fn the_turn_goes_from_one_to_the_next() {
    let (page, slots) = page_of(&[USUAL, (100, Priority::High, ComputeLimit::None)]);
    let [low, high] = slots[..] else { panic!("two") };
    page.claim_turn(low);
    assert_eq!(page.turn().holder, Some(low));
    let (its, own) = (page.doorbell(low), page.doorbell(high));
    page.claim_turn(high);
    assert_eq!(page.turn().holder, Some(low), "it has to give it up first");
    assert!(
        page.doorbell(low) != its && page.doorbell(high) != own,
        "it is told, and who claims looks again"
    );
    assert!(Competition::take(&page).turn_end(low) <= now(), "at once");
    page.leave_turn(low, true);
    assert_eq!(page.turn().holder, Some(high));
    page.claim_turn(low);
    assert!(Competition::take(&page).turn_end(high) > now(), "as long as it has work");
    page.leave_turn(high, false);
    assert_eq!(page.turn().holder, Some(low));
    page.leave_turn(low, false);
    assert_eq!(page.turn().holder, None);
    assert_eq!([low, high].map(|slot| page.compute_use(slot, now()).turns), [2, 1]);
}

#[test]
fn who_does_not_give_the_turn_up_is_overdue_and_holds_nobody_up() {
    let (page, slots) = page_of(&[USUAL, USUAL, (200, Priority::Normal, ComputeLimit::None)]);
    let [stuck, other, third] = slots[..] else { panic!("three") };
    page.claim_turn(stuck);
    page.claim_turn(other);
    let began = page.turn().began;
    assert_eq!(page.seize_turn(began + PATIENCE - 1), None, "not yet");
    assert!(page.renew_turn(stuck) && page.seize_turn(began + PATIENCE).is_none(), "it has begun anew");
    assert_eq!(page.seize_turn(page.turn().began + PATIENCE), Some(stuck));
    assert_eq!((page.turn().holder, page.is_overdue(stuck)), (Some(other), true));
    assert!(!page.renew_turn(stuck), "it has lost it");
    page.claim_turn(third);
    page.leave_turn(other, false);
    assert_eq!(page.turn().holder, Some(third), "and is not waited for");
    page.leave_turn(third, false);
    assert_eq!(page.turn().holder, None);
    page.no_longer_overdue(stuck);
    assert_eq!((page.turn().holder, page.compute_use(stuck, now()).overruns), (Some(stuck), 1));
}

#[test]
fn who_dies_with_the_turn_leaves_it_to_the_next() {
    let (page, slots) = page_of(&[USUAL, (200, Priority::Normal, ComputeLimit::None)]);
    page.claim_turn(slots[0]);
    page.claim_turn(slots[1]);
    page.charge_turn(slots[0], SECOND, now());
    page.reap(slots[0]);
    assert_eq!(page.turn().holder, Some(slots[1]));
    assert_eq!(page.compute_use(slots[0], now()).gpu_ns, 0, "nothing of it is left for the next owner");
}

/// Somebody writes garbage: a holder that is no client, and a beginning in the far future.
#[test]
fn garbage_in_the_word_holds_nobody_up() {
    let (page, slots) = page_of(&[USUAL, (200, Priority::Normal, ComputeLimit::None)]);
    for word in [u64::MAX, 200, 40, u64::MAX << 8, u64::MAX << 8 | 40] {
        page.header.turn.atomic().store(word, Ordering::Relaxed);
        page.claim_turn(slots[0]);
        assert_eq!(page.turn().holder, Some(slots[0]), "{word:x}");
        page.leave_turn(slots[0], false);
    }
    // Nobody has it for ever.
    page.header.turn.atomic().store(u64::MAX << 8 | 1, Ordering::Relaxed);
    page.claim_turn(slots[1]);
    assert!(Competition::take(&page).look_again(slots[1]) <= now());
    assert_eq!(page.seize_turn(now()), Some(slots[0]));
    assert_eq!(page.turn().holder, Some(slots[1]));
}

#[test]
fn the_share_of_the_last_seconds_is_a_share() {
    let (page, slots) = page_of(&[USUAL]);
    let mut time = 1_000 * SECOND;
    page.begin_turns(slots[0], time);
    for turn in 1..=1_000u64 {
        time += 10 * MILLISECOND;
        page.charge_turn(slots[0], 3 * MILLISECOND, time);
        // From the beginning, although a second ago it had nothing.
        if turn.is_multiple_of(50) {
            let found = page.compute_use(slots[0], time);
            assert_eq!(found.gpu_ns, turn * 3 * MILLISECOND);
            assert!((found.recent_share - 0.3).abs() < 0.01, "{found:?} after {turn} turns");
        }
    }
    assert!((page.compute_use(slots[0], time + SECOND).recent_share - 0.15).abs() < 0.01);
}
