//! The arbiter's options, of which each is an argument, a variable and a key of the configuration file
//! ([`crate::configuration`]).

use crate::monitor::Listen;
use clap::{Parser, ValueEnum};
use nvshare::page::{ENDLESS, Quantum, Settings};
use nvshare::paths::SYSTEM_DIR;
use nvshare::slot::SLOTS;
use nvshare::units::{GRANULE, GpuUuid, Nanos, SECOND, format_size, parse_size, parse_time};
use std::path::{Path, PathBuf};
use tracing_subscriber::filter::LevelFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Whether clients take turns when their memory does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AntiThrash {
    /// They do.
    On,
    /// Whoever has the GPU keeps it until it has no work.
    Off,
}

/// Creates the control pages of this node's GPUs, registers clients, and cleans up after the dead.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "nvshare-arbiter",
    version,
    max_term_width = 80,
    after_help = "\
Each option is also a variable and a key of the configuration file, which has the name of the option: quantum = \"2s\". \
An argument goes before a variable, a variable before the file.

A SIGHUP has the file read again (systemctl reload nvshare-arbiter). `nvshare ctl` shows what holds and why, and changes it."
)]
pub struct Options {
    /// Directory of the control pages and the socket [default: /run/nvshare for root, else $XDG_RUNTIME_DIR/nvshare]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Serve only this GPU (repeatable); without NVML, name every GPU and give --capacity
    #[arg(long = "gpu", value_name = "UUID", value_parser = gpu)]
    pub gpus: Vec<GpuUuid>,
    /// Size of each GPU's pool, such as 14.9GiB [default: all its memory but the headroom]
    #[arg(long, value_name = "SIZE", value_parser = pool)]
    pub capacity: Option<u64>,
    /// Memory of each GPU that stays outside a pool without --capacity, for the driver's own needs
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub headroom: u64,
    /// Whether clients take turns when their memory does not fit. Off: whoever has the GPU keeps it until it has no work, and
    /// the others wait; what fits runs at once either way
    #[arg(long, value_name = "on|off", value_enum, default_value = "on", hide_possible_values = true)]
    pub anti_thrash: AntiThrash,
    /// How long a client runs while others wait: auto, or a time such as 500ms or 2s
    #[arg(long, value_name = "auto|TIME", default_value = "auto", value_parser = quantum)]
    pub quantum: QuantumOption,
    /// With auto: how many times as long as a switch a slice lasts
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = factor)]
    pub quantum_factor: f64,
    /// With auto: how many times as long as a switch a slice becomes while all who want the GPU use up slice after slice
    #[arg(long, value_name = "N", default_value_t = 20.0, value_parser = factor)]
    pub quantum_longest: f64,
    /// With auto: the shortest time that a slice lasts, such as 100ms
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = time)]
    pub quantum_min: Nanos,
    /// With auto: the longest time that a slice lasts, such as 60s
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
    pub quantum_max: Nanos,
    /// Turns are short enough for all others to have one within this time, if the quantum allows it. A client that has
    /// waited for this time and two rounds of the shortest turns, has the GPU next
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
    pub deadline: Nanos,
    /// While a slice can end, its holder has no more work in flight than takes this long; 0s: any
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = time)]
    pub drain_target: Nanos,
    /// A holder without work for this long gives way to a waiter
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = time)]
    pub idle_grace: Nanos,
    /// Report a client that has not given way for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub unresponsive_after: Nanos,
    /// Kill such a client (SIGKILL) instead of only reporting it
    #[arg(long)]
    pub kill_unresponsive: bool,
    /// The most slots of a GPU that one user may have; root and the arbiter's own user may have all 48
    #[arg(long, value_name = "N", default_value_t = 36, value_parser = clap::value_parser!(u16).range(1..=SLOTS as i64))]
    pub slots_per_user: u16,
    /// The NVML library to load: a path, or a name that the loader finds
    #[arg(long, value_name = "PATH", default_value = "libnvidia-ml.so.1")]
    pub nvml_library: PathBuf,
    /// What is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level)]
    pub log_level: LevelFilter,
    /// How log lines look: as text for people, or as JSON for programs
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// The configuration file [default: /etc/nvshare/nvshare.toml, if there is one, unless the arbiter is private]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read arguments, variables and the configuration file, say what is wrong or what holds, and end
    #[arg(long)]
    pub check_config: bool,
    /// Serve metrics and a page here (repeatable): an address and a port, the path of a Unix socket, or none [default:
    /// 127.0.0.1:9478 if the directory is /run/nvshare, else none]
    #[arg(long, value_name = "ADDR:PORT|PATH", value_delimiter = ',')]
    pub listen: Vec<Listen>,
    /// End when the process --owner-pid has ended and no client is left
    #[arg(long, requires = "owner_pid")]
    pub exit_when_idle: bool,
    /// Serve a GPU although another arbiter of this machine serves it, in another directory: each deals out its memory
    #[arg(long)]
    pub allow_second_arbiter: bool,
    /// Process id of whoever started this private arbiter
    #[arg(long, value_name = "PID")]
    pub owner_pid: Option<i32>,
    /// Number of the open descriptor to which "ready" is written when clients can connect
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<i32>,
}

/// What --quantum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantumOption {
    /// A multiple of the switch.
    Auto,
    /// This long, in ns.
    Fixed(Nanos),
}

fn gpu(text: &str) -> Result<GpuUuid, String> {
    text.parse().map_err(|error: nvshare::units::UuidError| error.to_string())
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// The size of a pool, at least a granule.
fn pool(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < GRANULE {
        return Err(format!("'{text}' is no pool: memory is dealt out by {}", format_size(GRANULE)));
    }
    Ok(bytes)
}

fn level(text: &str) -> Result<LevelFilter, String> {
    if text.is_empty() {
        // A variable that is set to nothing says nothing.
        return Ok(LevelFilter::INFO);
    }
    text.parse().map_err(|_| format!("'{text}' is no level: write error, warn, info, debug or trace"))
}

/// A time, a day at most.
fn time(text: &str) -> Result<Nanos, String> {
    const DAY: Nanos = 86_400 * SECOND;
    match parse_time(text).map_err(|error| error.to_string())? {
        time @ 0..=DAY => Ok(time),
        _ => Err(format!("'{text}' is more than a day")),
    }
}

fn quantum(text: &str) -> Result<QuantumOption, String> {
    if text == "auto" { Ok(QuantumOption::Auto) } else { time(text).map(QuantumOption::Fixed) }
}

fn factor(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|factor| (0.1..=1_000.0).contains(factor))
        .ok_or_else(|| format!("'{text}' is not a factor: write a number between 0.1 and 1000, such as 5"))
}

impl Options {
    /// How the pools are sized and for whom, in words: a private arbiter takes living clients over only from one that
    /// said the same.
    pub fn pools(&self) -> String {
        let kind = if self.exit_when_idle { "a private arbiter" } else { "a service" };
        match self.capacity {
            Some(capacity) => format!("{kind} with --capacity {}", format_size(capacity)),
            None => format!("{kind} with --headroom {}", format_size(self.headroom)),
        }
    }

    /// Where metrics and page are served by an arbiter of this runtime directory, and whether somebody has asked for it: private
    /// arbiters come and go and listen nowhere by themselves.
    pub fn listen_in(&self, dir: &Path) -> (Vec<Listen>, bool) {
        match self.listen.is_empty() {
            false => (self.listen.clone(), true),
            true if dir == Path::new(SYSTEM_DIR) => (vec![Listen::DEFAULT], false),
            true => (Vec::new(), false),
        }
    }

    /// The most slots of a GPU that a user may have; `None` for whoever may have all.
    pub fn most_slots_of(&self, user: u32) -> Option<usize> {
        let bounded = user != 0 && user != nix::unistd::geteuid().as_raw();
        bounded.then_some(usize::from(self.slots_per_user))
    }

    /// What the pages are told.
    pub fn settings(&self) -> Settings {
        let quantum = match (self.anti_thrash, self.quantum) {
            (AntiThrash::Off, _) => Quantum::Fixed(ENDLESS),
            (AntiThrash::On, QuantumOption::Fixed(ns)) => Quantum::Fixed(ns),
            (AntiThrash::On, QuantumOption::Auto) => Quantum::Auto {
                factor_milli: (self.quantum_factor * 1_000.0) as u32,
                longest_milli: (self.quantum_longest.max(self.quantum_factor) * 1_000.0) as u32,
                min: self.quantum_min,
                max: self.quantum_max.max(self.quantum_min),
            },
        };
        Settings {
            quantum,
            idle_grace: self.idle_grace,
            deadline: self.deadline,
            drain_target: self.drain_target,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::units::MILLISECOND;

    #[test]
    fn times_have_units() {
        assert_eq!(time("1.5s"), Ok(1_500 * MILLISECOND));
        for bad in ["", "5", "1 parsec", "25h"] {
            assert!(time(bad).unwrap_err().contains(&format!("'{bad}'")), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Options::command().debug_assert();
        for bad in [["--capacity", "1MiB"], ["--log-level", "chatty"]] {
            let error = Options::try_parse_from(["nvshare-arbiter"].iter().chain(&bad)).unwrap_err();
            assert!(error.to_string().contains(&format!("'{}'", bad[1])), "{error}");
        }
        let (system, other) = (Path::new(SYSTEM_DIR), Path::new("/run/user/1000/nvshare"));
        let options = Options::parse_from(["nvshare-arbiter"]);
        assert_eq!(options.listen_in(system), (vec![Listen::DEFAULT], false));
        assert_eq!(options.listen_in(other), (vec![], false));
        let options = Options::parse_from(["nvshare-arbiter", "--listen", "none"]);
        assert_eq!(options.listen_in(system), (vec![Listen::None], true));
        let options = Options::parse_from(["nvshare-arbiter", "--quantum", "2s"]);
        assert_eq!(options.settings().quantum, Quantum::Fixed(2 * SECOND));
    }
}
