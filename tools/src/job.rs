//! A job: the program that the bench, the demo and the tests run on the GPU, alone or beside others.
//!
//! It fills a few buffers with a pattern, walks over all of them again and again (each iteration mixes every word of
//! every buffer, or with `--read-only` reads it), and takes a checksum of each at the end. What the checksum must be is
//! computed on the CPU to the last bit, so memory that was lost, mixed up between processes or granules, or moved while a kernel used it is seen.
//!
//! On several GPUs it has a part of its buffers on each, and each iteration walks over all of them.
//!
//! The pattern repeats every `TILE` words, so the CPU mixes one tile and not gigabytes. The tile's length is no
//! divisor of a granule, so no two granules of a buffer are alike, and no two buffers either.

use crate::cuda::{DevicePointer, Gpu, Handle, Kernels, Result};
use serde::{Deserialize, Serialize};
use std::cell::OnceCell;
use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Words of the pattern.
const TILE: u64 = 65_537;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Iterations that the GPU has before it, so that it never waits for the CPU and the CPU never runs far ahead.
const AHEAD: usize = 2;

/// What a job does.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct Job {
    /// Bytes of GPU memory that it uses
    #[arg(long, value_parser = crate::size)]
    pub size: u64,
    /// Buffers that these are in
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub buffers: u64,
    /// The GPUs that these are on, in turn, as the driver counts; the context on each is made when all before work
    #[arg(long, default_value = "0", value_delimiter = ',')]
    pub devices: Vec<i32>,
    /// Walks over all of them
    #[arg(long, default_value_t = u64::MAX)]
    pub iterations: u64,
    /// What its pattern begins with
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Use Unified Memory, which the driver pages on demand
    #[arg(long)]
    pub managed: bool,
    /// Read all of them, and change none, as a server does with its weights
    #[arg(long)]
    pub read_only: bool,
    /// End after so many seconds of iterations, if they are not done
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Begin with the iterations at a line on the standard input, and end when it is closed
    #[arg(long)]
    pub controlled: bool,
}

/// What a job says, a line of JSON each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Its memory is allocated and filled.
    Ready {
        /// How long that took, s.
        seconds: f64,
    },
    /// So many iterations are done.
    Progress {
        /// How many.
        done: u64,
    },
    /// It is over.
    Done(Outcome),
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Iterations that it did.
    pub iterations: u64,
    /// How long they took, s.
    pub seconds: f64,
    /// Whether every buffer holds what it must.
    pub right: bool,
    /// Buffers that do not.
    pub wrong_buffers: Vec<u64>,
}

/// Between two lines about progress.
const SAY_EVERY: Duration = Duration::from_millis(50);

impl Job {
    /// Bytes of one buffer: whole words.
    fn buffer_bytes(&self) -> u64 {
        self.size / self.buffers / 8 * 8
    }

    /// The arguments with which `nvshare internal job` does this.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--size={}", self.size),
            format!("--buffers={}", self.buffers),
            format!("--iterations={}", self.iterations),
            format!("--seed={}", self.seed),
            format!("--devices={}", self.devices.iter().map(i32::to_string).collect::<Vec<_>>().join(",")),
        ];
        if self.managed {
            arguments.push("--managed".into());
        }
        if self.read_only {
            arguments.push("--read-only".into());
        }
        if let Some(seconds) = self.seconds {
            arguments.push(format!("--seconds={seconds}"));
        }
        if self.controlled {
            arguments.push("--controlled".into());
        }
        arguments
    }

    /// Does it, and tells `say` how it goes.
    ///
    /// # Errors
    /// The driver's.
    pub fn run(&self, say: &mut dyn FnMut(Event)) -> Result<Outcome> {
        let began = Instant::now();
        let places: Vec<OnceCell<Gpu>> = self.devices.iter().map(|_| OnceCell::new()).collect();
        let mut stations = Vec::new();
        for (index, (device, place)) in self.devices.iter().zip(&places).enumerate() {
            let gpu = Gpu::open(*device)?;
            stations.push(self.settle(place.get_or_init(|| gpu), index)?);
        }
        say(Event::Ready { seconds: began.elapsed().as_secs_f64() });

        let stop = self.wait_for_start();
        let began = Instant::now();
        let iterations = self.iterate(&stations, &stop, say)?;
        let seconds = began.elapsed().as_secs_f64();

        let mut sums = Vec::new();
        for station in stations {
            sums.extend(self.leave(station)?);
        }
        // The others need the room more than the arithmetic below does.
        drop(places);
        let words = self.buffer_bytes() / 8;
        let mixes = if self.read_only { 0 } else { iterations };
        let wrong = |(buffer, sum): &(u64, u64)| expected(words, self.seed_of(*buffer), mixes) != *sum;
        let mut wrong_buffers: Vec<_> = sums.into_iter().filter(wrong).map(|(buffer, _)| buffer).collect();
        wrong_buffers.sort_unstable();
        let outcome = Outcome { iterations, seconds, right: wrong_buffers.is_empty(), wrong_buffers };
        say(Event::Done(outcome.clone()));
        Ok(outcome)
    }

    /// Allocates and fills the buffers that are on a GPU, and waits until they are.
    fn settle<'a>(&self, gpu: &'a Gpu, index: usize) -> Result<Station<'a>> {
        gpu.make_current()?;
        let (kernels, stream) = (gpu.kernels()?, gpu.stream()?);
        let alloc = |bytes| if self.managed { gpu.alloc_managed(bytes) } else { gpu.alloc(bytes) };
        let (out, words) = (alloc(8)?, self.buffer_bytes() / 8);
        let mut buffers = Vec::new();
        for buffer in (index as u64..self.buffers).step_by(self.devices.len()) {
            let pointer = alloc(self.buffer_bytes())?;
            for start in (0..words).step_by(TILE as usize) {
                let length = TILE.min(words - start);
                kernels.iota(pointer + 8 * start, length, self.seed_of(buffer), stream)?;
            }
            buffers.push((buffer, pointer));
        }
        gpu.synchronize(stream)?;
        Ok(Station { gpu, kernels, stream, out, buffers })
    }

    /// The checksums of the buffers that are on a GPU. Frees them.
    fn leave(&self, station: Station<'_>) -> Result<Vec<(u64, u64)>> {
        let Station { gpu, kernels, stream, out, buffers } = station;
        gpu.make_current()?;
        let mut sums = Vec::new();
        for (buffer, pointer) in &buffers {
            gpu.clear(out, 8, stream)?;
            kernels.checksum(out, *pointer, self.buffer_bytes() / 8, stream)?;
            gpu.synchronize(stream)?;
            sums.push((*buffer, gpu.read_word(out)?));
        }
        for pointer in buffers.into_iter().map(|(_, pointer)| pointer).chain([out]) {
            gpu.free(pointer)?;
        }
        Ok(sums)
    }

    fn seed_of(&self, buffer: u64) -> u64 {
        // Far apart, so that no two buffers of any two jobs overlap in what they hold.
        self.seed.wrapping_mul(1 << 40).wrapping_add(buffer << 32)
    }

    fn iterate(
        &self,
        stations: &[Station<'_>],
        stop: &AtomicBool,
        say: &mut dyn FnMut(Event),
    ) -> Result<u64> {
        let words = self.buffer_bytes() / 8;
        let limit = self.seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
        let events = || stations.iter().map(Station::event).collect::<Result<Vec<_>>>();
        let mut spare = (0..AHEAD).map(|_| events()).collect::<Result<Vec<_>>>()?;
        let mut ahead = VecDeque::new();
        let (mut begun, mut said) = (0, Instant::now());
        while begun < self.iterations {
            if stop.load(Ordering::Relaxed) || limit.is_some_and(|limit| Instant::now() >= limit) {
                break;
            }
            let events = match spare.pop() {
                Some(events) => events,
                None => {
                    let oldest: Vec<Handle> = ahead.pop_front().expect("every event is spare or ahead");
                    stations.iter().zip(&oldest).try_for_each(|(station, event)| station.gpu.wait(*event))?;
                    oldest
                }
            };
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                say(Event::Progress { done: begun - ahead.len() as u64 });
            }
            for (station, event) in stations.iter().zip(&events) {
                station.walk(words, (!self.read_only).then_some(begun), *event)?;
            }
            ahead.push_back(events);
            begun += 1;
        }
        for station in stations {
            station.gpu.synchronize(station.stream)?;
        }
        say(Event::Progress { done: begun });
        Ok(begun)
    }

    /// Waits for the line that starts a controlled job; the flag goes up when it is to end.
    fn wait_for_start(&self) -> Arc<AtomicBool> {
        let stop = Arc::new(AtomicBool::new(false));
        if self.controlled {
            let mut line = String::new();
            let _ = std::io::stdin().lock().read_line(&mut line);
            let flag = stop.clone();
            std::thread::spawn(move || {
                let mut rest = Vec::new();
                let _ = std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut rest);
                flag.store(true, Ordering::Relaxed);
            });
        }
        stop
    }
}

/// What a job has on one GPU.
struct Station<'a> {
    gpu: &'a Gpu,
    kernels: Kernels<'a>,
    stream: Handle,
    /// Where a checksum goes.
    out: DevicePointer,
    /// Its buffers: their numbers, and where they are.
    buffers: Vec<(u64, DevicePointer)>,
}

impl Station<'_> {
    fn event(&self) -> Result<Handle> {
        self.gpu.make_current()?;
        self.gpu.event()
    }

    /// One iteration, and an event at its end. `mixes`: its number, if it changes what it walks over.
    fn walk(&self, words: u64, mixes: Option<u64>, event: Handle) -> Result {
        self.gpu.make_current()?;
        for (_, pointer) in &self.buffers {
            match mixes {
                Some(iteration) => self.kernels.mix(*pointer, words, iteration, self.stream)?,
                None => self.kernels.checksum(self.out, *pointer, words, self.stream)?,
            }
        }
        self.gpu.record(event, self.stream)
    }
}

/// The checksum of a buffer after so many iterations, computed on the CPU.
fn expected(words: u64, seed: u64, iterations: u64) -> u64 {
    // Several words at a time: one depends on its own past alone, and the CPU has room for more.
    const LANES: u64 = 8;
    let mut sum = 0u64;
    let tile = TILE.min(words);
    for first in (0..tile).step_by(LANES as usize) {
        let mut lanes: [u64; LANES as usize] =
            std::array::from_fn(|lane| seed.wrapping_add(first + lane as u64).wrapping_mul(GOLDEN));
        for iteration in 0..iterations {
            for word in &mut lanes {
                *word = word.rotate_left(13).wrapping_mul(GOLDEN).wrapping_add(iteration);
            }
        }
        for (at, word) in (first..tile).zip(lanes) {
            // The word stands at `at`, `at + TILE`, ... and counts 2 i + 1 times at place i.
            let times = (words - at).div_ceil(TILE);
            let strides = TILE.wrapping_mul(times.wrapping_mul(times - 1));
            sum = sum.wrapping_add(word.wrapping_mul(times.wrapping_mul(2 * at + 1).wrapping_add(strides)));
        }
    }
    sum
}

/// Runs a job in this process, saying its events on the standard output.
///
/// # Errors
/// The driver's.
pub fn run_here(job: &Job) -> Result<Outcome> {
    job.run(&mut |event| {
        let line = serde_json::to_string(&event).expect("events are plain data");
        // Nobody may be listening any more: the work goes on.
        let _ = writeln!(std::io::stdout(), "{line}");
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closed_form_is_the_sum() {
        let (seed, iterations) = (77, 3);
        for words in [1, 5, TILE - 1, TILE, TILE + 1, 5 * TILE + 123] {
            let mut sum = 0u64;
            for at in 0..words {
                let mut word = seed_word(seed, at % TILE);
                for iteration in 0..iterations {
                    word = word.rotate_left(13).wrapping_mul(GOLDEN).wrapping_add(iteration);
                }
                sum = sum.wrapping_add(word.wrapping_mul(2 * at + 1));
            }
            assert_eq!(expected(words, seed, iterations), sum, "{words} words");
        }
    }

    fn seed_word(seed: u64, at: u64) -> u64 {
        (seed + at).wrapping_mul(GOLDEN)
    }

    #[test]
    fn events_round_trip() {
        let outcome = Outcome { iterations: 3, seconds: 1.5, right: false, wrong_buffers: vec![2] };
        for event in [Event::Ready { seconds: 0.5 }, Event::Progress { done: 7 }, Event::Done(outcome)] {
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }
}
