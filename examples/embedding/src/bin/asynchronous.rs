//! An asynchronous program on one thread: while it awaits the GPU, it goes on answering.
//!
//! It asks for the GPU at once, does a piece of work as soon as it has it, and meanwhile answers every line of its standard input. When
//! the input ends, it checks its data.

use clap::Parser;
use nvshare::Session;
use nvshare::units::granules_for;
use nvshare_embedding_examples::Where;
use nvshare_embedding_examples::data::Steps;
use nvshare_embedding_examples::plain::PlainMemory;
use std::error::Error;
use std::process::ExitCode;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Answers lines while it awaits the GPU
#[derive(Parser)]
#[command(max_term_width = 80)]
struct Options {
    #[command(flatten)]
    place: Where,
    /// How much memory it has, MiB
    #[arg(long, default_value_t = 32)]
    mib: u64,
    /// What its data begins with
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many steps its work has
    #[arg(long, default_value_t = 100)]
    steps: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(&Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embed-async: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let client = options.place.register("async", None)?;
    let memory = PlainMemory::new(client.books(), options.seed);
    let session = Session::start(client, memory.clone())?;
    let granules = granules_for(options.mib << 20);
    session.grow(granules, || memory.add(granules))?;
    println!("asks for the GPU");
    let (steps, ()) = tokio::try_join!(work(&session, &memory, options.steps), answer())?;
    memory.check(&steps)?;
    println!("right after {} steps", steps.count);
    session.close()?;
    Ok(())
}

/// The work, in as many slices as it takes. Between two steps the other task has its turn.
async fn work(session: &Session, memory: &PlainMemory, count: u64) -> Result<Steps, Box<dyn Error>> {
    let mut steps = Steps::default();
    while steps.count < count {
        let pass = session.entering().await?;
        println!("has the GPU");
        while !pass.should_yield() && steps.count < count {
            memory.step(steps.count)?;
            steps.step();
            tokio::task::yield_now().await;
        }
    }
    println!("has done its work");
    Ok(steps)
}

/// Answers each line of the standard input.
async fn answer() -> Result<(), Box<dyn Error>> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        println!("answers: {line}");
    }
    Ok(())
}
