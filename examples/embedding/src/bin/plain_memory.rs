//! A client in one thread, on plain memory. Start several of them, with more memory together than the pool has.
//!
//! ```sh
//! nvshare-arbiter --capacity 48MiB &
//! embed-plain-memory --mib 32 --seed 1 & embed-plain-memory --mib 32 --seed 2
//! ```
//!
//! The thread that works is the one that looks at the page. So it calls `should_yield` between two pieces of its work, and `serve`
//! when it has none: others may need the memory that it has on the GPU. A program that cannot do that uses a session, as `embed-vmm`
//! does.

use clap::Parser;
use nvshare::client::Client;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::MILLISECOND;
use nvshare_embedding_examples::data::Steps;
use nvshare_embedding_examples::plain::PlainMemory;
use nvshare_embedding_examples::{Common, ended, input_has_ended};
use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Takes turns with other clients, on plain memory, until its standard input ends
#[derive(Parser)]
#[command(max_term_width = 80)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// After so many steps it has nothing to do for a moment
    #[arg(long, default_value_t = 50)]
    burst: u64,
}

fn main() -> ExitCode {
    ended("embed-plain-memory", run(&Options::parse()))
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let mut client = options.common.register("plain-memory", None)?;
    let mut memory = PlainMemory::new(client.books(), options.common.seed);
    let granules = options.common.granules();
    if granules > client.books().usable() {
        return Err(format!("{} MiB do not fit into the pool", options.common.mib).into());
    }
    memory.add(granules);
    client.books().grow(granules);
    println!("client in slot {} of {}", client.books().slot().get(), client.books().page().gpu());

    let (stop, mut steps) = (input_has_ended(), Steps::default());
    while !stop.load(Ordering::Relaxed) {
        burst(&mut client, &mut memory, &mut steps, options.burst)?;
        // Nothing to do: it makes room for others if they need it.
        let pause_ends = now() + MILLISECOND;
        while now() < pause_ends {
            client.serve(&mut memory, Some(pause_ends))?;
        }
    }
    memory.check(&steps)?;
    println!("right after {} steps", steps.count);
    drop(memory);
    client.leave();
    Ok(())
}

/// A piece of work, in as many slices as it takes.
fn burst(
    client: &mut Client<MappedPage>,
    memory: &mut PlainMemory,
    steps: &mut Steps,
    count: u64,
) -> Result<(), Box<dyn Error>> {
    client.acquire(memory)?;
    for _ in 0..count {
        memory.step(steps.count)?;
        steps.step();
        if client.should_yield() {
            // The work is done; there is more, so it queues again at once.
            client.release(true);
            client.acquire(memory)?;
        }
    }
    client.release(false);
    Ok(())
}
