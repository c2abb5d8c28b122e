//! The scenario file: TOML, with units in every value. `docs/simulator.md` describes every field.

use super::quantity::{Rate, Size, Span, Time};
use crate::Failure;
use nvshare::page::Quantum;
use nvshare::shares::{ComputeLimit, Priority, ShareError};
use nvshare::slot::SLOTS;
use nvshare::units::{GRANULE, Granules, Nanos, granules_for, granules_in};
use nvshare::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};
use serde::Deserialize;
use std::path::Path;

/// A scenario as it stands in its file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called in the results.
    pub name: String,
    /// What chance begins with, unless the command line says otherwise.
    #[serde(default = "one")]
    pub seed: u64,
    /// The simulation ends then, whoever is not done.
    pub until: Option<Time>,
    /// Who runs, and how long.
    #[serde(default)]
    pub policy: Policy,
    /// The machines.
    pub gpus: Gpus,
    /// Kinds of clients.
    pub clients: Vec<Class>,
}

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// nvshare's own policy; memory moves in bulk.
    #[default]
    Nvshare,
    /// The C nvshare: turns of a fixed length, memory paged on demand by the driver.
    DemandPaging,
}

/// Which GPU a client gets that has none of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// `nvshare::placement::choose`: the fewest clients, then the least demand, then the least busy lately.
    #[default]
    FewestClients,
    /// `nvshare::placement::Standing`, by live figures: without clients first, then where a newcomer is held up least.
    LeastLoaded,
    /// The fewest clients, and of equals the lowest number.
    Count,
    /// The most clients, so that others stay free.
    Packed,
    /// Any that has a place, by chance.
    Random,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whose policy.
    pub mode: Mode,
    /// `"auto"`, or a time.
    pub quantum: QuantumSetting,
    /// Automatic quantum: so many times the switch.
    pub factor: f64,
    /// Automatic quantum: what it grows to, times the switch.
    pub longest: f64,
    /// Automatic quantum: never less.
    pub min: Time,
    /// Automatic quantum: never more.
    pub max: Time,
    /// How long a holder may have no work before it gives way.
    pub idle_grace: Time,
    /// How far away a deadline is at most.
    pub deadline: Time,
}

impl Default for Policy {
    fn default() -> Self {
        let Quantum::Auto { factor_milli, longest_milli, min, max } = Quantum::default() else {
            unreachable!("the default is automatic")
        };
        Self {
            mode: Mode::default(),
            quantum: QuantumSetting::Auto,
            factor: f64::from(factor_milli) / 1e3,
            longest: f64::from(longest_milli) / 1e3,
            min: Time(min),
            max: Time(max),
            idle_grace: Time(nvshare::page::Settings::default().idle_grace),
            deadline: Time(nvshare::page::Settings::default().deadline),
        }
    }
}

impl Policy {
    /// As the page has it.
    pub fn settings(&self) -> nvshare::page::Settings {
        let milli = |times: f64| (times * 1e3) as u32;
        let quantum = match self.quantum {
            QuantumSetting::Fixed(time) => Quantum::Fixed(time.0),
            QuantumSetting::Auto => Quantum::Auto {
                factor_milli: milli(self.factor),
                longest_milli: milli(self.longest),
                min: self.min.0,
                max: self.max.0,
            },
        };
        nvshare::page::Settings {
            quantum,
            idle_grace: self.idle_grace.0,
            deadline: self.deadline.0,
            ..nvshare::page::Settings::default()
        }
    }

    /// How long a turn of the C nvshare is.
    pub fn turn(&self) -> Nanos {
        /// Its default.
        const TURN: Nanos = 30 * nvshare::units::SECOND;
        match self.quantum {
            QuantumSetting::Fixed(time) => time.0,
            QuantumSetting::Auto => TURN,
        }
    }
}

/// `priority`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct PrioritySetting(pub Priority);

impl TryFrom<String> for PrioritySetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|error: ShareError| error.to_string())
    }
}

/// `compute_limit`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct ComputeLimitSetting(pub ComputeLimit);

impl TryFrom<String> for ComputeLimitSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|error: ShareError| error.to_string())
    }
}

/// `quantum`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum QuantumSetting {
    /// By the switch that the end of a slice causes.
    Auto,
    /// Always this long.
    Fixed(Time),
}

impl TryFrom<String> for QuantumSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        Time::try_from(text).map(Self::Fixed).map_err(|error| format!("{error}, or \"auto\""))
    }
}

/// `[gpus]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpus {
    /// Nodes.
    #[serde(default = "one_machine")]
    pub nodes: usize,
    /// GPUs of each node.
    #[serde(default = "one_machine")]
    pub per_node: usize,
    /// What NVML shows.
    pub memory: Size,
    /// What nvshare leaves alone.
    #[serde(default)]
    pub headroom: Size,
    /// What each client's context takes.
    #[serde(default)]
    pub context: Size,
    /// The most clients of a GPU.
    #[serde(default = "slots")]
    pub vgpus: usize,
    /// Which of the GPUs that have a place a client gets.
    #[serde(default)]
    pub placement: Placement,
    /// Pinned copies to the GPU.
    pub link_in: Rate,
    /// Pinned copies from the GPU.
    pub link_out: Rate,
    /// How fast kernels use memory of the host, where a client has more than the GPU can give it.
    pub overflow: Option<Rate>,
    /// In what pieces memory moves.
    #[serde(default = "chunk")]
    pub chunk: Size,
    /// What a switch costs beside the copies.
    #[serde(default)]
    pub switch: Time,
    /// What a drain costs beside the work in flight.
    #[serde(default)]
    pub drain: Time,
    /// Pages of Unified Memory.
    pub paging: Option<Paging>,
}

/// `[gpus.paging]`
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paging {
    /// How fast the driver brings faulting pages in while there is room.
    pub fault: Rate,
    /// What making room adds to that: how fast it drives pages out.
    pub evict: Rate,
    /// How long a holder without work keeps the GPU.
    #[serde(default = "idle_release")]
    pub idle_release: Time,
    /// Which page the driver drives out.
    #[serde(default)]
    pub order: Order,
}

/// Which page goes when there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The one that faulted in first.
    #[default]
    FirstIn,
    /// The one whose use lies back furthest.
    LeastRecentlyUsed,
}

/// `[[clients]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// What they are called.
    pub name: String,
    /// How many there are.
    #[serde(default = "one")]
    pub count: u64,
    /// The one GPU that they are on; else they are placed.
    pub gpu: Option<usize>,
    /// Memory of each: one size, or several of which each takes one by chance.
    pub memory: Sizes,
    /// Their share against others'.
    #[serde(default = "weight")]
    pub weight: u32,
    /// How soon each one's turn comes.
    #[serde(default)]
    pub priority: PrioritySetting,
    /// The most of each GPU's time that each may have.
    #[serde(default)]
    pub compute_limit: ComputeLimitSetting,
    /// On how many GPUs of one node each is, as clients that know nothing of one another.
    #[serde(default = "one_machine")]
    pub vgpus: usize,
    /// How many GPUs of one node each process needs at once.
    #[serde(default = "one_machine")]
    pub gpus: usize,
    /// Of how many processes each gang is, which run together on different GPUs of one node.
    #[serde(default = "one_machine")]
    pub ranks: usize,
    /// The GPUs that each is on, with several; else they are placed.
    pub on: Option<Vec<usize>>,
    /// When they come.
    #[serde(default)]
    pub arrival: Arrival,
    /// What they do.
    pub work: Work,
    /// How its memory grows while it runs.
    pub grows: Option<Growth>,
    /// The part of its memory that never changes after it was filled, as a server's weights: its copy in host memory is kept, and it
    /// leaves the GPU without another one (`NVSHARE_KEEP_COPIES=on`).
    #[serde(default)]
    pub unchanged: f64,
    /// How many iterations are submitted at once: what a drain must wait for.
    #[serde(default = "one")]
    pub in_flight: u64,
    /// How many equal buffers the memory is in: Unified Memory alone.
    #[serde(default = "one_machine")]
    pub buffers: usize,
    /// Which buffers an iteration walks over, abreast; one iteration after the other: Unified Memory alone.
    #[serde(default)]
    pub walks: Vec<Vec<usize>>,
}

/// `grows`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Growth {
    /// What memory grows to.
    pub to: Size,
    /// In which GPU time of the client, from its first on.
    pub over: Time,
}

/// `memory`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a size such as \"12GiB\", or a list of sizes of which each client takes one")]
pub enum Sizes {
    /// Of each.
    One(Size),
    /// Of each one of these, by chance.
    Any(Vec<Size>),
}

impl Sizes {
    /// All of them.
    pub fn all(&self) -> &[Size] {
        match self {
            Self::One(size) => std::slice::from_ref(size),
            Self::Any(sizes) => sizes,
        }
    }
}

/// `arrival`
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Arrival {
    /// When the first one may come.
    pub from: Time,
    /// One after the other at this distance; all at once without.
    pub every: Option<Time>,
    /// By chance, at this distance in the mean (a Poisson process).
    pub poisson: Option<Time>,
}

impl Default for Arrival {
    fn default() -> Self {
        Self { from: Time(0), every: None, poisson: None }
    }
}

/// `work.first`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum First {
    /// When an interval, drawn like all that follow, has passed since the client came.
    #[default]
    AfterInterval,
    /// When the client comes.
    AtOnce,
}

/// `work`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Work {
    /// Iterations, one after the other, to the end.
    Batch {
        /// GPU time of an iteration.
        iteration: Time,
        /// How many.
        iterations: Option<u64>,
        /// In place of a number of iterations: the GPU time, alone.
        gpu_time: Option<Span>,
        /// Without work for the GPU, each time.
        pause: Option<Span>,
        /// So many iterations lie between two pauses.
        pause_every: Option<u64>,
    },
    /// Batches with pauses between them.
    Training {
        /// GPU time of an iteration.
        iteration: Time,
        /// How many before a pause.
        iterations: u64,
        /// Without work for the GPU.
        pause: Span,
        /// How many times.
        rounds: Option<u64>,
        /// No round begins after so long.
        lifetime: Option<Span>,
        /// When the first round begins.
        #[serde(default)]
        first: First,
    },
    /// Requests that come from outside, whether the one before is answered or not.
    Interactive {
        /// GPU time of a request.
        burst: Span,
        /// A request at this distance.
        every: Option<Time>,
        /// By chance, at this distance in the mean.
        poisson: Option<Time>,
        /// How many.
        requests: Option<u64>,
        /// None comes after so long.
        lifetime: Option<Span>,
        /// When the first one comes.
        #[serde(default)]
        first: First,
    },
}

fn one() -> u64 {
    1
}

fn one_machine() -> usize {
    1
}

fn slots() -> usize {
    SLOTS
}

fn weight() -> u32 {
    DEFAULT_WEIGHT
}

fn chunk() -> Size {
    Size(64 << 20)
}

fn idle_release() -> Time {
    // Measured of the C nvshare at 1a8f211 (docs/driver-facts.md).
    Time(5 * nvshare::units::SECOND)
}

impl Class {
    /// On how many GPUs each of them is.
    pub fn seats(&self) -> usize {
        self.vgpus * self.gpus * self.ranks
    }

    /// Whether each of them runs on several GPUs at once.
    pub fn runs_together(&self) -> bool {
        self.gpus * self.ranks > 1
    }
}

impl Scenario {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or it is no scenario; the message names the file, the place and what is expected.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
        Self::parse(&text).map_err(|why| Failure::usage(format!("{}: {why}", path.display())))
    }

    /// As [`read`](Self::read), of text.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scenario: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        scenario.check()?;
        Ok(scenario)
    }

    /// The pool of a GPU.
    pub fn capacity(&self) -> Granules {
        granules_in(self.gpus.memory.0.saturating_sub(self.gpus.headroom.0))
    }

    /// How many GPUs there are.
    pub fn gpu_count(&self) -> usize {
        self.gpus.nodes * self.gpus.per_node
    }

    fn check(&self) -> Result<(), String> {
        let gpus = &self.gpus;
        let holds = |right: bool, field: &str, expected: &str| {
            if right { Ok(()) } else { Err(format!("{field}: {expected} expected")) }
        };
        holds((1..=100_000).contains(&gpus.nodes), "gpus.nodes", "1 to 100000")?;
        holds((1..=64).contains(&gpus.per_node), "gpus.per_node", "1 to 64")?;
        holds((1..=SLOTS).contains(&gpus.vgpus), "gpus.vgpus", &format!("1 to {SLOTS}"))?;
        holds(gpus.chunk.0 >= GRANULE, "gpus.chunk", "at least 2MiB")?;
        holds(self.capacity() > 0, "gpus.memory", "more than gpus.headroom")?;
        let policy = &self.policy;
        holds((0.0..=1e6).contains(&policy.factor), "policy.factor", "0 to 1000000")?;
        holds((0.0..=1e6).contains(&policy.longest), "policy.longest", "0 to 1000000")?;
        holds(
            policy.mode == Mode::Nvshare || gpus.placement != Placement::LeastLoaded,
            "gpus.placement",
            "another one, because the C nvshare has no live figures,",
        )?;
        if policy.mode == Mode::DemandPaging {
            holds(
                gpus.paging.is_some(),
                "gpus.paging",
                "a table, because policy.mode is \"demand-paging\",",
            )?;
        }
        holds(!self.clients.is_empty(), "clients", "at least one [[clients]]")?;
        for (index, class) in self.clients.iter().enumerate() {
            self.check_class(class)
                .map_err(|why| format!("[[clients]] number {} (\"{}\"), {why}", index + 1, class.name))?;
        }
        Ok(())
    }

    fn check_class(&self, class: &Class) -> Result<(), String> {
        let holds = |right: bool, field: &str, expected: &str| {
            if right { Ok(()) } else { Err(format!("{field}: {expected} expected")) }
        };
        let gpus = self.gpu_count();
        holds((1..=10_000_000).contains(&class.count), "count", "1 to 10000000")?;
        holds(
            class.gpu.is_none_or(|gpu| gpu < gpus),
            "gpu",
            &format!("the number of a GPU, 0 to {},", gpus - 1),
        )?;
        holds(
            (1..=self.gpus.per_node).contains(&class.vgpus),
            "vgpus",
            &format!("1 to {} (gpus.per_node)", self.gpus.per_node),
        )?;
        holds(class.gpu.is_none() || class.vgpus == 1, "vgpus", "1 with a fixed gpu")?;
        self.check_gang(class)?;
        holds((1..=MAX_WEIGHT).contains(&class.weight), "weight", &format!("1 to {MAX_WEIGHT}"))?;
        let limited = class.compute_limit.0.millionths().is_some();
        let expected = "none, because policy.mode is \"demand-paging\",";
        holds(!limited || self.policy.mode == Mode::Nvshare, "compute_limit", expected)?;
        holds((1..=1_000_000).contains(&class.in_flight), "in_flight", "1 to 1000000")?;
        holds((0.0..=1.0).contains(&class.unchanged), "unchanged", "0 to 1")?;
        let expected = "0, because policy.mode is \"demand-paging\",";
        holds(class.unchanged == 0.0 || self.policy.mode == Mode::Nvshare, "unchanged", expected)?;
        holds(!class.memory.all().is_empty(), "memory", "at least one size")?;
        let most = u64::from(self.capacity()) * GRANULE;
        let fits = |size: &Size| {
            granules_for(size.0).saturating_add(granules_for(self.gpus.context.0)) <= self.capacity()
        };
        let expected = format!(
            "with its context at most the pool's {} (gpus.memory less gpus.headroom)",
            nvshare::units::format_size(most)
        );
        // Unified Memory can be larger than the GPU, and so can memory that is used over the link.
        let larger = self.policy.mode == Mode::DemandPaging || self.gpus.overflow.is_some();
        let expected = format!("{expected}, or gpus.overflow,");
        holds(class.memory.all().iter().all(fits) || larger, "memory", &expected)?;
        if let Some(grows) = &class.grows {
            holds(class.memory.all().iter().all(|size| size.0 < grows.to.0), "grows.to", "more than memory")?;
            holds(fits(&grows.to) || larger, "grows.to", &expected)?;
            holds(grows.over.0 > 0, "grows.over", "more than 0")?;
            holds(
                self.policy.mode == Mode::Nvshare,
                "grows",
                "none, because policy.mode is \"demand-paging\",",
            )?;
        }
        holds(
            class.arrival.every.is_none() || class.arrival.poisson.is_none(),
            "arrival",
            "either every or poisson",
        )?;
        holds(class.buffers >= 1, "buffers", "at least 1")?;
        holds(
            class
                .walks
                .iter()
                .all(|walk| !walk.is_empty() && walk.iter().all(|buffer| *buffer < class.buffers)),
            "walks",
            "lists of buffers, each less than buffers,",
        )?;
        match &class.work {
            Work::Batch { iteration, iterations, gpu_time, pause, pause_every } => {
                holds(iteration.0 > 0, "work.iteration", "more than 0")?;
                holds(
                    pause.is_some() == pause_every.is_some(),
                    "work.pause",
                    "pause and pause_every, or neither",
                )?;
                holds(pause_every.is_none_or(|every| every > 0), "work.pause_every", "more than 0")?;
                holds(
                    iterations.is_some() != gpu_time.is_some(),
                    "work.iterations",
                    "either iterations or gpu_time",
                )
            }
            Work::Training { iteration, iterations, rounds, lifetime, .. } => {
                holds(iteration.0 > 0, "work.iteration", "more than 0")?;
                holds(*iterations > 0, "work.iterations", "more than 0")?;
                self.check_end(rounds.is_some() || lifetime.is_some(), "rounds")
            }
            Work::Interactive { every, poisson, requests, lifetime, .. } => {
                let distance = every.or(*poisson);
                holds(every.is_some() != poisson.is_some(), "work.every", "either every or poisson")?;
                holds(distance.is_some_and(|time| time.0 > 0), "work.every", "more than 0")?;
                self.check_end(requests.is_some() || lifetime.is_some(), "requests")
            }
        }
    }

    /// A process with several GPUs, or a gang.
    fn check_gang(&self, class: &Class) -> Result<(), String> {
        let holds = |right: bool, field: &str, expected: &str| {
            if right { Ok(()) } else { Err(format!("{field}: {expected} expected")) }
        };
        let most = self.gpus.per_node;
        holds((1..=most).contains(&class.gpus), "gpus", &format!("1 to {most} (gpus.per_node)"))?;
        let ranks = format!("1 to {} (as many as gpus.per_node has room for)", most / class.gpus);
        holds((1..=most / class.gpus).contains(&class.ranks), "ranks", &ranks)?;
        let seats = class.gpus * class.ranks;
        if let Some(on) = &class.on {
            holds(seats > 1, "on", "none without gpus or ranks (one GPU is `gpu`),")?;
            let node = |gpu: &usize| gpu / most;
            let different = on.iter().collect::<std::collections::BTreeSet<_>>().len() == on.len();
            let there = on.iter().all(|gpu| *gpu < self.gpu_count())
                && on.iter().all(|gpu| node(gpu) == node(&on[0]));
            let expected = format!("{seats} different GPUs of one node, 0 to {},", self.gpu_count() - 1);
            holds(on.len() == seats && different && there, "on", &expected)?;
        }
        if seats == 1 {
            return Ok(());
        }
        holds(class.vgpus == 1, "vgpus", "1 with gpus or ranks")?;
        holds(class.gpu.is_none(), "gpu", "none with gpus or ranks (but `on`)")?;
        holds(class.grows.is_none(), "grows", "none with gpus or ranks")?;
        let expected = "1, because policy.mode is \"demand-paging\",";
        holds(self.policy.mode == Mode::Nvshare, "gpus", expected)
    }

    fn check_end(&self, ends: bool, field: &str) -> Result<(), String> {
        if ends || self.until.is_some() {
            return Ok(());
        }
        Err(format!("work.{field}: this, work.lifetime or the scenario's `until` expected, or it never ends"))
    }
}
