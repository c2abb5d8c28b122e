//! `nvshare top`: a monitor of a node's GPUs and clients.
//!
//! What it shows and what its keys mean is in the crate `nvshare_top`, without a terminal. Here is what needs one: `terminal.rs` takes
//! it over and gives it back, `steer.rs` asks the arbiter for a change. Like `nvshare status` it reads the pages itself, so it needs no
//! arbiter and no rights, and disturbs nobody.

mod steer;
mod terminal;

use crate::{Failure, layout, output, say};
use nvshare::paths;
use nvshare::units::parse_time;
use nvshare_stats::{Node, Reader};
use nvshare_top::{Event, Model, Settings, view};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Options of `nvshare top`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The keys are listed below the clients, and all of them by `?`. `w` gives the selected client another weight, and `+` and `-` \
another priority, as `nvshare set` does: whose client it is, whom the arbiter runs as, and root may.

It reads the pages and NVML, needs no arbiter and no rights, and disturbs no client. NO_COLOR, if it is set, is as \
--no-color.

Examples:
  nvshare top
  nvshare top --once                 one screen, as text
  nvshare top --once --json          the same as nvshare status --json
  nvshare top --json --interval 5s   a line of JSON every five seconds")]
pub struct Options {
    /// How often the node is read, 100ms or more
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Print one screen as text, with rates between two readings, and end
    #[arg(long)]
    once: bool,
    /// Write JSON, for programs: one object with --once, else a line for each reading
    #[arg(long)]
    json: bool,
    /// Use no colours
    #[arg(long)]
    no_color: bool,
    /// Directory of the control pages [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = Duration::from_nanos(parse_time(text).map_err(|error| error.to_string())?);
    if interval < Duration::from_millis(100) { Err("100ms is the shortest".into()) } else { Ok(interval) }
}

/// The NVML library, as the loader finds it.
const NVML: &str = "libnvidia-ml.so.1";

impl Options {
    fn dir(&self) -> PathBuf {
        self.runtime_dir.clone().unwrap_or_else(paths::runtime_dir)
    }

    fn settings(&self) -> Settings {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Settings { interval: self.interval, colour: !self.no_color && !unwanted }
    }
}

/// Shows the node until it is told to end, or as often as was asked for.
///
/// # Errors
/// There is no node and nothing but JSON or text was asked for, or the standard output is no terminal.
pub fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.dir();
    let mut reader = Reader::new(&dir).with_hardware(Path::new(NVML));
    match (options.json, options.once) {
        (true, true) => print_json(&reader.read()?, true),
        (true, false) => stream(&mut reader, options.interval),
        (false, true) => print_screen(&mut reader, options),
        (false, false) if std::io::stdout().is_terminal() => terminal::run(reader, &dir, options.settings()),
        (false, false) => Err(Failure::usage(
            "the standard output is no terminal: `nvshare top --once` prints one screen as text, and --json a line for each reading",
        )),
    }
}

fn print_json(node: &Node, pretty: bool) -> Result<(), Failure> {
    let text = if pretty { serde_json::to_string_pretty(node) } else { serde_json::to_string(node) };
    say!("{}", text.map_err(|error| Failure::with_status(1, error.to_string()))?);
    Ok(())
}

/// A line for each reading, until nobody reads them.
fn stream(reader: &mut Reader, interval: Duration) -> Result<(), Failure> {
    loop {
        let next = Instant::now() + interval;
        print_json(&reader.read()?, false)?;
        output::finish()?;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn print_screen(reader: &mut Reader, options: &Options) -> Result<(), Failure> {
    let mut model = Model::new(Settings { colour: false, ..options.settings() });
    let begun = Instant::now();
    model.update(Event::Reading(Box::new(reader.read()?), Duration::ZERO));
    std::thread::sleep(options.interval);
    model.update(Event::Reading(Box::new(reader.read()?), begun.elapsed()));
    output::write(format_args!("{}", view::text(&model, layout::width(), None)));
    Ok(())
}
