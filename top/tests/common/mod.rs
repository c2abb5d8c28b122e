//! Nodes to show.

use nvshare_stats::{Client, Gpu, Node, Switch};
use nvshare_top::{Event, Model, Settings};
use std::time::Duration;

const GIB: u64 = 1 << 30;
const SECOND: u64 = 1_000_000_000;

pub fn model(node: &Node, colour: bool) -> Model {
    let mut model = Model::new(Settings { colour, ..Settings::default() });
    // What went before: a minute in which the clients took turns.
    for second in 0..60_u64 {
        let mut past = node.clone();
        for (at, client) in past.gpus.iter_mut().flat_map(|gpu| &mut gpu.clients).enumerate() {
            let runs = |second: &u64| (second / 5 + at as u64).is_multiple_of(3);
            client.charged_ns = (0..=second).filter(runs).count() as u64 * SECOND;
            // It comes in as its turn begins, and goes out when the next one's does.
            let moves = |of: u64| {
                (second + 1..=60).filter(|later| (later / 5 + at as u64) % 3 == of && later % 5 < 2).count()
                    as u64
            };
            client.bytes_in -= moves(0) * 6 * GIB;
            client.bytes_out -= moves(1) * 5 * GIB;
        }
        model.update(Event::Reading(Box::new(past), Duration::from_secs(second)));
    }
    let mut now = node.clone();
    for client in now.gpus.iter_mut().flat_map(|gpu| &mut gpu.clients) {
        client.charged_ns += 61 * SECOND;
    }
    let last = model.node.clone();
    for (gpu, before) in now.gpus.iter_mut().zip(&last.gpus) {
        for (client, before) in gpu.clients.iter_mut().zip(&before.clients) {
            let had = if client.phase == "running" { 970_000_000 } else { 0 };
            client.charged_ns = before.charged_ns + had;
        }
    }
    model.update(Event::Reading(Box::new(now), Duration::from_secs(60)));
    model
}

fn base() -> Node {
    Node {
        release: "0.1.0".into(),
        host_memory_bytes: Some(256 * GIB),
        host_available_bytes: Some(198 * GIB),
        ..Node::default()
    }
}

fn gpu(index: u32, clients: Vec<Client>) -> Gpu {
    let resident: u64 = clients.iter().map(|client| client.resident_bytes).sum();
    let pinned: u64 = clients.iter().map(|client| client.pinned_bytes).sum();
    let phase = |phase: &str| clients.iter().filter(|client| client.phase == phase).count() as u32;
    let capacity = 16 * GIB;
    Gpu {
        uuid: format!("GPU-7079e1a2-149f-4bda-8d12-756faa1d5e{index:02x}"),
        index: Some(index),
        model: Some("NVIDIA H200".into()),
        capacity_bytes: capacity,
        free_bytes: capacity as i64 - (resident + pinned) as i64,
        pinned_bytes: pinned,
        arbiter_alive: true,
        utilization: Some(0.97),
        temperature_celsius: Some(61),
        power_watts: Some(412.4),
        running: phase("running"),
        waiting: phase("waiting"),
        clients,
        ..Gpu::default()
    }
}

fn client(slot: usize, name: &str, phase: &str, needs: u64, resident: u64) -> Client {
    Client {
        slot,
        pid: 20_333 + 7 * slot as u32,
        name: name.into(),
        uid: Some(1000),
        user: Some("ada".into()),
        phase: phase.into(),
        admitted: ["running", "filling"].contains(&phase),
        demand_bytes: needs,
        resident_bytes: resident,
        evicted_bytes: needs - resident,
        pinned_bytes: GIB / 2,
        weight: 100,
        priority: "normal".into(),
        bytes_in: 900 * GIB,
        bytes_out: 300 * GIB,
        slices: 41,
        yields: 40,
        run_ns: 92 * SECOND,
        ..Client::default()
    }
}

/// One client, alone.
pub fn one() -> Node {
    let train = client(0, "train", "running", 12 * GIB, 12 * GIB);
    Node { gpus: vec![gpu(0, vec![Client { slices: 1, yields: 0, ..train }])], ..base() }
}

/// Four clients that do not fit beside each other.
pub fn four() -> Node {
    let mut clients = vec![
        client(0, "train", "running", 12 * GIB, 12 * GIB),
        client(1, "notebook", "waiting", 2 * GIB, GIB),
        client(2, "fine-tune", "waiting", 12 * GIB, 0),
        client(3, "serve", "idle", 6 * GIB, GIB / 2),
    ];
    clients[0].slice_left_ns = Some(1_200_000_000);
    (clients[1].waiting_ns, clients[2].waiting_ns) = (Some(3_400_000_000), Some(812_000_000));
    (clients[1].priority, clients[2].weight) = ("high".into(), 300);
    (clients[3].memory_limit_bytes, clients[3].memory_limit) = (Some(8 * GIB), Some("50%".into()));
    (clients[3].pod, clients[3].namespace) = (Some("serve-5f7c".into()), Some("models".into()));
    clients[3].container = Some("main".into());
    (clients[2].uid, clients[2].user) = (Some(1001), None);
    let switch = |ago, took, from, to| Switch {
        ago_ns: ago * SECOND / 10,
        took_ns: took,
        in_bytes: 12 * GIB,
        from_slot: Some(from),
        to_slot: to,
        ..Switch::default()
    };
    let switches =
        vec![switch(18, 487_000_000, 2, 0), switch(69, 512_000_000, 1, 2), switch(124, 96_000_000, 0, 1)];
    Node { gpus: vec![Gpu { switches, ..gpu(0, clients) }], ..base() }
}

/// Sixty clients on eight GPUs.
pub fn sixty() -> Node {
    const NAMES: [&str; 6] =
        ["train", "notebook", "serve", "fine-tune", "eval", "a-name-that-is-longer-than-its-column"];
    const PHASES: [&str; 5] = ["running", "waiting", "waiting", "idle", "filling"];
    let mut gpus: Vec<Vec<Client>> = vec![Vec::new(); 8];
    for at in 0..60_usize {
        let clients = &mut gpus[at % 8];
        let (slot, phase) = (clients.len(), PHASES[clients.len() % PHASES.len()]);
        let resident = if ["running", "filling"].contains(&phase) { 3 * GIB } else { GIB / 4 };
        let mut made = client(slot, NAMES[at % NAMES.len()], phase, (1 + at as u64 % 9) * GIB, GIB);
        made.resident_bytes = resident.min(made.demand_bytes);
        made.evicted_bytes = made.demand_bytes - made.resident_bytes;
        made.pid = 30_000 + at as u32;
        made.waiting_ns = (phase == "waiting").then_some((1 + at as u64 % 7) * 730_000_000);
        made.slice_left_ns = (phase == "running").then_some(2_100_000_000);
        clients.push(made);
    }
    Node {
        gpus: gpus.into_iter().enumerate().map(|(at, clients)| gpu(at as u32, clients)).collect(),
        ..base()
    }
}
