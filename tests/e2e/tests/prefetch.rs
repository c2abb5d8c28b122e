//! The next client fills what room is free while another runs, and gives it back if that one needs it.

use nvshare_e2e::application::books::{balances, books, client, come_to};
use nvshare_e2e::application::{Application, MIB, quick_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;
use std::time::{Duration, Instant};

const TIMEOUT: Patience = Patience::seconds(60);

/// Memory goes in and out in such pieces, so that a part of it can.
const PIECE: u64 = 2 * MIB;

/// Between two works of one client lie two of these.
const PAUSE: Duration = Duration::from_millis(150);

struct Pieces(Vec<u64>);

impl Pieces {
    fn alloc(application: &mut Application, bytes: u64) -> Self {
        Self((0..bytes / PIECE).map(|_| application.alloc(PIECE)).collect())
    }

    fn write(&self, application: &mut Application) {
        for (seed, address) in (1..).zip(&self.0) {
            application.writes(*address, PIECE, seed);
        }
    }

    fn check(&self, application: &mut Application) {
        for (seed, address) in (1..).zip(&self.0) {
            application.sees(*address, PIECE, seed);
        }
    }
}

fn turns(node: &Node, application: &Application) -> (u64, u64) {
    let client = client(node, application);
    (client.slices, client.yields)
}

/// Of a pool of 64 MiB three contexts have 6.
#[test]
fn the_next_client_fills_free_room_while_another_runs() {
    let gpu = quick_gpu();
    // No slice is over in the time of the test.
    let options = ["--capacity", "64MiB", "--quantum", "60m"];
    let node = Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap();
    let [mut idle, mut next, mut holder] = [(); 3].map(|()| Application::ready(&node));
    // It cannot move, so the others make room for each other.
    let array = idle.number(&format!("array {}", 20 * MIB));
    let data = Pieces::alloc(&mut next, 30 * MIB);
    data.write(&mut next);
    come_to(&node, &next, (30 * MIB, 30 * MIB, 0));

    let first = holder.alloc(30 * MIB);
    holder.writes(first, 30 * MIB, 1);
    assert_eq!(books(&node, &idle), (20 * MIB, 20 * MIB, 20 * MIB));
    come_to(&node, &next, (30 * MIB, 8 * MIB, 0));
    // Its work does not end, so it neither falls idle nor drains.
    let stream = holder.number("stream 1");
    holder.does(&format!("hold {stream}"));
    let before = (turns(&node, &holder), turns(&node, &next));
    let counted = client(&node, &next).bytes_in + 20 * MIB;

    let check = format!("check {} {PIECE} 1", data.0[0]);
    next.tell(&check);
    idle.does(&format!("destroy-array {array}"));
    come_to(&node, &next, (30 * MIB, 28 * MIB, 0));
    assert_eq!(books(&node, &holder), (30 * MIB, 30 * MIB, 0));
    TIMEOUT.until("the copies are counted", || client(&node, &next).bytes_in == counted);
    assert_eq!((turns(&node, &holder), turns(&node, &next)), before, "nobody's turn is over");

    // The holder grows, and has what it needs, from who is only waiting.
    let second = holder.alloc(24 * MIB);
    come_to(&node, &holder, (54 * MIB, 54 * MIB, 0));
    assert_eq!(books(&node, &next), (30 * MIB, 4 * MIB, 0));
    holder.does("let-go");
    assert_eq!(next.answer(&check).1, "right");
    data.check(&mut next);
    holder.sees(first, 30 * MIB, 1);
    holder.writes(second, 24 * MIB, 2);
    data.check(&mut next);
    holder.sees(second, 24 * MIB, 2);
    [idle, next, holder].into_iter().for_each(|application| drop(application.ends_well()));
    balances(&node);
}

/// What was left lying of one who waits goes while another runs, for the one who is next: the switch then moves that much less.
#[test]
fn who_is_not_next_makes_room_for_who_is() {
    let gpu = quick_gpu();
    let options = ["--capacity", "64MiB", "--quantum", "60m"];
    let node = Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap();
    let mut three = [(); 3].map(|()| {
        let mut application = Application::ready(&node);
        let pieces = Pieces::alloc(&mut application, 30 * MIB);
        pieces.write(&mut application);
        (application, pieces)
    });
    TIMEOUT.until("one has the GPU and the others want nothing", || {
        let [_, _, (application, pieces)] = &mut three;
        pieces.check(application);
        three.each_ref().map(|(application, _)| client(&node, application).phase)
            == ["idle", "idle", "running"]
    });
    let [one, other, (mut holder, of_holder)] = three;
    let has = |of: &(Application, Pieces)| books(&node, &of.0).1;
    assert!(has(&one) + has(&other) > 0);
    // Whoever made room first, one of them has something left.
    let [(mut late, of_late), (mut next, of_next)] =
        if has(&one) > has(&other) { [one, other] } else { [other, one] };
    let stream = holder.number("stream 1");
    holder.does(&format!("hold {stream}"));
    let before = [&late, &next, &holder].map(|application| turns(&node, application));

    let check = |pieces: &Pieces| format!("check {} {PIECE} 1", pieces.0[0]);
    next.tell(&check(&of_next));
    TIMEOUT.until("it waits", || client(&node, &next).phase == "waiting");
    late.tell(&check(&of_late));
    come_to(&node, &late, (30 * MIB, 0, 0));
    come_to(&node, &next, (30 * MIB, 28 * MIB, 0));
    assert_eq!(books(&node, &holder), (30 * MIB, 30 * MIB, 0));
    assert_eq!(
        [&late, &next, &holder].map(|application| turns(&node, application)),
        before,
        "nobody's turn is over"
    );

    holder.does("let-go");
    for (application, pieces) in [(&mut next, &of_next), (&mut late, &of_late)] {
        assert_eq!(application.answer(&check(pieces)).1, "right");
        pieces.check(application);
    }
    of_holder.check(&mut holder);
    [late, next, holder].into_iter().for_each(|application| drop(application.ends_well()));
    balances(&node);
}

/// Its pauses are regular, so it is known when it will be back, and the other one, which pauses too, will be back later.
#[test]
fn who_is_expected_back_has_its_memory_before() {
    let gpu = quick_gpu();
    let options = ["--capacity", "64MiB", "--quantum", "60m"];
    let node = Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap();
    let mut two = [(); 2].map(|()| {
        let mut application = Application::ready(&node);
        let pieces = Pieces::alloc(&mut application, 40 * MIB);
        pieces.write(&mut application);
        (application, pieces)
    });
    // How alike its pauses are depends on what else the machine does: until they are.
    TIMEOUT.until("its memory comes in though it asks for nothing", || {
        for _ in 0..4 {
            for (application, pieces) in &mut two {
                std::thread::sleep(PAUSE);
                pieces.check(application);
            }
        }
        // The first one is idle, the second one runs, and neither comes back.
        let end = Instant::now() + 4 * PAUSE;
        let [first, second] = two.each_ref().map(|(application, _)| application);
        std::iter::repeat_with(|| {
            let idle = [first, second].map(|one| client(&node, one).phase) == ["idle", "idle"];
            idle && books(&node, first).1 == 40 * MIB
        })
        .take_while(|_| Instant::now() < end)
        .any(|is_back| is_back)
    });
    for (application, pieces) in &mut two {
        pieces.check(application);
    }
    two.into_iter().for_each(|(application, _)| drop(application.ends_well()));
    balances(&node);
}
