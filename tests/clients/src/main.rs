//! A CUDA program on the crate `cudarc`: it copies two buffers to the GPU, mixes them there in rounds, copies them back
//! and checks every word. It knows nothing of nvshare. `cuda_bindings_client.py` does the same in Python.
//!
//! In each iteration the buffers change streams. The mixing of one iteration doesn't commute with that of another, so
//! the data is right only if the streams wait for each other; cudarc has them wait by events.
//!
//! Before each round it waits for a line, or the end, of the standard input. So a test can have several of these hold
//! their memory at the same time, however fast they are.

use clap::Parser;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::process::ExitCode;
use std::sync::Arc;

/// Mixes two buffers on the GPU and checks them
#[derive(Parser)]
struct Options {
    /// Size of each buffer in MiB
    #[arg(long)]
    mib: usize,
    /// Rounds of iterations
    #[arg(long)]
    rounds: u64,
    /// What the data begins with
    #[arg(long)]
    seed: u64,
}

const BUFFERS: usize = 2;

/// Iterations of a round.
const ITERATIONS: u64 = 10;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Options {
    fn words(&self) -> usize {
        (self.mib << 20) / 8
    }

    /// What a buffer holds at first. No word of any buffer of any seed is like another.
    fn data(&self, buffer: usize) -> impl Iterator<Item = u64> {
        let first = (self.seed << 40) | ((buffer as u64) << 32);
        (0..self.words() as u64).map(move |at| (first + at).wrapping_mul(GOLDEN))
    }

    /// What it must hold in the end.
    fn expected(&self, buffer: usize) -> impl Iterator<Item = u64> {
        let iterations = self.rounds * ITERATIONS;
        self.data(buffer).map(move |word| {
            (0..iterations).fold(word, |word, iteration| {
                word.rotate_left(13).wrapping_mul(GOLDEN).wrapping_add(iteration)
            })
        })
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(None) => {
            println!("cudarc: {BUFFERS} x {} MiB, {} rounds: right", options.mib, options.rounds);
            ExitCode::SUCCESS
        }
        Ok(Some(wrong)) => {
            println!("cudarc: {BUFFERS} x {} MiB, {} rounds: {wrong}", options.mib, options.rounds);
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("cudarc: {error}");
            ExitCode::from(2)
        }
    }
}

/// Does the work, and tells what is wrong with the data.
fn run(options: &Options) -> Result<Option<String>, DriverError> {
    let context = CudaContext::new(0)?;
    let module = context.load_module(Ptx::from_src(include_str!("../../simcuda/kernels.ptx")))?;
    let mix = module.load_function("nvshare_mix_u64")?;
    let streams = [context.new_stream()?, context.new_stream()?];
    let mut buffers = Vec::new();
    for (buffer, stream) in streams.iter().enumerate() {
        buffers.push(stream.clone_htod(&options.data(buffer).collect::<Vec<_>>())?);
    }
    for stream in &streams {
        stream.synchronize()?;
    }
    println!("loaded");

    let grid = LaunchConfig::for_num_elems(options.words() as u32);
    let words = options.words() as u64;
    for round in 0..options.rounds {
        wait_for_line();
        for iteration in round * ITERATIONS..(round + 1) * ITERATIONS {
            for (buffer, data) in buffers.iter_mut().enumerate() {
                let stream = &streams[(iteration as usize + buffer) % streams.len()];
                // SAFETY: the kernel takes an address, a number of words that are there, and a number.
                unsafe { stream.launch_builder(&mix).arg(data).arg(&words).arg(&iteration).launch(grid)? };
            }
        }
        for stream in &streams {
            stream.record_event(None)?.synchronize()?;
        }
        println!("round {}", round + 1);
    }

    for (buffer, data) in buffers.iter().enumerate() {
        if let Some(wrong) = check(options, &context, &streams[buffer], buffer, data)? {
            return Ok(Some(wrong));
        }
    }
    Ok(None)
}

/// Copies a buffer back, into pinned memory, and says which word of it is wrong.
fn check(
    options: &Options,
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    buffer: usize,
    data: &CudaSlice<u64>,
) -> Result<Option<String>, DriverError> {
    // SAFETY: nobody reads it before the copy has filled it.
    let mut copy = unsafe { context.alloc_pinned::<u64>(options.words())? };
    stream.memcpy_dtoh(data, &mut copy)?;
    let wrong = copy.as_slice()?.iter().copied().zip(options.expected(buffer)).enumerate();
    let wrong = wrong.into_iter().find(|(_, (found, expected))| found != expected);
    Ok(wrong.map(|(at, (found, expected))| {
        format!("wrong: word {at} of buffer {buffer} is {found:#018x} and should be {expected:#018x}")
    }))
}

fn wait_for_line() {
    // An end, or an input that can't be read, is as good as a line.
    let _ = std::io::stdin().read_line(&mut String::new());
}
