//! `nvshare trace`: what the clients of this node did lately, or do from now on.
//!
//! The pages keep each client's latest events ([`nvshare::journal`]), so nothing has to be switched on before, and no arbiter
//! need run. A recording reads them again and again before they are overwritten.
//!
//! | file | what it holds |
//! |---|---|
//! | `recording` | events of all slots, joined to spans |
//! | `chrome` | the spans in the format that Chrome's and Perfetto's viewers read |

mod chrome;
mod recording;

use crate::picture::{self, Lane, Segment, State};
use crate::{Failure, complain, crew, digits, output};
use nvshare::page::Phase;
use nvshare::paths;
use nvshare::sync::now;
use nvshare::timeline::{Activity, Span};
use nvshare::units::{MILLISECOND, Nanos, parse_time};
use recording::Recording;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `nvshare trace`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --record it writes what the pages still have: each client's last 511 events, which are three to eight a turn.

FILE.json is for https://ui.perfetto.dev or chrome://tracing; FILE.svg is a picture; - is JSON on the standard output.

Examples:
  nvshare trace last-minutes.json
  nvshare trace --last 30s picture.svg
  nvshare trace --record 2min run.json      Ctrl-C ends it early")]
pub struct Options {
    /// Where it goes: a name that ends in .json or .svg, or -
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Only what happened in this time, such as 30s [default: all that is there]
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "record")]
    last: Option<Nanos>,
    /// Record from now on for this time, such as 2min
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    record: Option<Nanos>,
    /// Directory of the control pages [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// How often a recording reads: a client would have to take a hundred turns in this time for an event to be missed.
const INTERVAL: Nanos = 200 * MILLISECOND;

/// What a client did for a while.
#[derive(Debug, Clone)]
pub struct Lived {
    /// The GPU's number among those of this node.
    pub gpu: usize,
    /// The slot.
    pub slot: usize,
    /// What it was.
    pub span: Span,
    /// What the client calls itself; empty if it has gone.
    pub name: String,
}

/// Writes a trace.
///
/// # Errors
/// There is no page, or the file cannot be written.
pub fn run(options: &Options) -> Result<(), Failure> {
    let format = Format::of(&options.file)?;
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let mut recording = Recording::of(&dir)?;
    let since = match options.record {
        Some(time) => {
            let begun = now();
            crew::clean_up_when_interrupted();
            recording.read();
            let until = begun.saturating_add(time);
            while now() < until && crew::interrupted().is_ok() {
                std::thread::sleep(Duration::from_nanos(INTERVAL.min(until.saturating_sub(now()))));
                recording.read();
            }
            begun
        }
        None => {
            recording.read();
            options.last.map_or(0, |last| now().saturating_sub(last))
        }
    };
    let (gpus, lost) = (recording.gpus(), recording.lost());
    let lived = recording.since(since, now());
    if lost > 0 && options.record.is_some() {
        complain!("nvshare: {lost} events were overwritten before they were read; the recording has gaps");
    }
    let text = match format {
        Format::Json => chrome::trace(&gpus, &lived),
        Format::Svg => draw(&gpus, &lived),
    };
    if options.file == Path::new("-") {
        output::write(format_args!("{text}"));
        return Ok(());
    }
    std::fs::write(&options.file, text)
        .map_err(|why| Failure::usage(format!("{}: cannot be written: {why}", options.file.display())))
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Svg,
}

impl Format {
    fn of(file: &Path) -> Result<Self, Failure> {
        match file.extension().and_then(|ending| ending.to_str()) {
            Some("json") => Ok(Self::Json),
            Some("svg") => Ok(Self::Svg),
            None if file == Path::new("-") => Ok(Self::Json),
            _ => Err(Failure::usage(format!(
                "{}: the file's name says what is written: it must end in .json or .svg, or be -",
                file.display()
            ))),
        }
    }
}

/// Draws what happened, a row for each process.
fn draw(gpus: &[String], lived: &[Lived]) -> String {
    let begun = lived.iter().map(|lived| lived.span.begun).min().unwrap_or(0);
    let ended = lived.iter().map(|lived| lived.span.ended).max().unwrap_or(0);
    let mut lanes: Vec<((usize, usize, u32), Lane)> = Vec::new();
    for Lived { gpu, slot, span, name } in lived {
        let key = (*gpu, *slot, span.pid);
        let lane = match lanes.iter_mut().find(|(of, _)| *of == key) {
            Some((_, lane)) => lane,
            None => {
                let group = format!("GPU {gpu} ({})", gpus[*gpu]);
                let label = if name.is_empty() { format!("pid {}", span.pid) } else { short(name) };
                lanes.push((key, Lane { group, label, segments: Vec::new(), remark: "" }));
                &mut lanes.last_mut().expect("it was just put there").1
            }
        };
        if let Some(state) = state(span.activity) {
            lane.segments.push(Segment { from: span.begun - begun, to: span.ended - begun, state });
        }
    }
    lanes.sort_by_key(|(key, _)| *key);
    let mut lanes: Vec<_> = lanes.into_iter().map(|(_, lane)| lane).collect();
    for lane in &mut lanes {
        // A client evicts while it waits or is idle: that lies over it.
        lane.segments.sort_by_key(|segment| (segment.state == State::Evicting, segment.from));
    }
    let title = format!("{} of nvshare", digits::time((ended - begun) as f64 / 1e9));
    picture::draw(&title, &lanes, ended - begun)
}

/// A name that fits before a row.
fn short(name: &str) -> String {
    const MOST: usize = 22;
    if name.chars().count() <= MOST {
        name.to_owned()
    } else {
        name.chars().take(MOST - 1).chain(['…']).collect()
    }
}

/// How the picture shows an activity; what it does not show is `None`.
fn state(activity: Activity) -> Option<State> {
    match activity {
        Activity::Phase(Phase::Idle | Phase::Leaving) => Some(State::Idle),
        Activity::Phase(Phase::Waiting) => Some(State::Waiting),
        Activity::Phase(Phase::Filling) | Activity::Prefetches => Some(State::Filling),
        Activity::Phase(Phase::Running) => Some(State::Running),
        Activity::Phase(Phase::Draining) => Some(State::Draining),
        Activity::Evicts => Some(State::Evicting),
        Activity::Stalled(_) => None,
    }
}
