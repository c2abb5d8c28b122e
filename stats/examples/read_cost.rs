//! What a reading of a node costs: 8 GPUs with 60 clients, all of this process, whose journals are full.
//! `cargo run --release -p nvshare-stats --example read_cost`

use nvshare::journal::Event;
use nvshare::map;
use nvshare::page::Phase;
use nvshare::slot::Process;
use nvshare::sync::now;
use nvshare::units::GpuUuid;
use nvshare_stats::{Reader, process};
use std::time::Instant;

const GPUS: u8 = 8;
const CLIENTS: usize = 60;
const READINGS: u32 = 200;

fn main() {
    let pid = std::process::id();
    let own = Process { pid, started: process::started(pid).expect("this process is there") };
    let made = (0..GPUS).map(|number| map::create(GpuUuid([number; 16]), 1_000).expect("there is memory"));
    let pages: Vec<_> = made.map(|(_, page)| page).collect();
    for client in 0..CLIENTS {
        let page = &pages[client % pages.len()];
        let slot = page.open_slot(own, "client", 100).expect("a slot is free");
        for number in 0..600 {
            let phase = if number % 2 == 0 { Phase::Waiting } else { Phase::Idle };
            page.journals[slot.get()].write(now(), Event::Phase(phase));
        }
    }
    let mut reader = Reader::of_pages(pages);
    let begun = Instant::now();
    reader.read().expect("pages that are given can be read");
    let first = begun.elapsed();
    let begun = Instant::now();
    for _ in 0..READINGS {
        std::hint::black_box(reader.read().expect("pages that are given can be read"));
    }
    println!("the first reading: {first:?}; each of the next: {:?}", begun.elapsed() / READINGS);
}
