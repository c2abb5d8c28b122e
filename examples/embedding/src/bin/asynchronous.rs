//! An asynchronous program on one thread: while it awaits the GPU, it goes on answering.
//!
//! It asks for the GPU at once, does a piece of work as soon as it has it, and meanwhile answers every line of its standard input. When
//! the input ends, it checks its data.

use clap::Parser;
use nvshare::Session;
use nvshare_embedding_examples::data::Steps;
use nvshare_embedding_examples::plain::PlainMemory;
use nvshare_embedding_examples::{Common, ended};
use std::error::Error;
use std::process::ExitCode;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Answers lines while it awaits the GPU
#[derive(Parser)]
#[command(max_term_width = 80)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// How many steps its work has
    #[arg(long, default_value_t = 100)]
    steps: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    ended("embed-async", run(&Options::parse()).await)
}

async fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let client = options.common.register("async", None)?;
    let memory = PlainMemory::new(client.books(), options.common.seed);
    let session = Session::start(client, memory.clone())?;
    let granules = options.common.granules();
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
