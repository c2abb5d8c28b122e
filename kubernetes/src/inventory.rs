//! The GPUs of this node: which there are, by NVML; what their arbiter does with them, by its pages; whether new clients can
//! come to them.
//!
//! A GPU is remembered for as long as this process lives. One that NVML no longer finds stays in the list as unhealthy, so that
//! whoever uses it is told why.
//!
//! An arbiter that is restarted or upgraded is away for a second or two. Clients that run go on meanwhile, and new ones wait for it
//! ([`nvshare::register`]). So a GPU stays healthy for a while ([`Common::arbiter_grace`](crate::options::Common)) after its arbiter
//! was last seen: otherwise every upgrade would have pods refused that come just then.

use crate::Error;
use nvshare::paths;
use nvshare::register;
use nvshare::units::GpuUuid;
use nvshare_stats::Reader;
use nvshare_stats::hardware::{Hardware, watch_errors};
use nvshare_stats::model;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A GPU of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu {
    /// Its UUID.
    pub uuid: String,
    /// Its number on this node, as nvidia-smi shows it.
    pub index: u32,
    /// Its model; empty if NVML does not say.
    pub model: String,
    /// What clients may have of its memory together without taking turns (the pool), bytes. Before an arbiter has made its page, all
    /// of its memory.
    pub memory: u64,
    /// The NUMA node that it is next to.
    pub numa_node: Option<i64>,
    /// Whether new clients can come to it.
    pub health: Health,
    /// How much it has to do.
    pub load: Load,
}

/// Whether new clients can come to a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// They can.
    Healthy,
    /// They cannot: why, and what to do.
    Unhealthy(String),
}

impl Health {
    /// Whether new clients can come.
    pub fn is_healthy(&self) -> bool {
        *self == Self::Healthy
    }
}

/// How much a GPU has to do now.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Processes that are its clients.
    pub tenants: u32,
    /// What they need of its memory, with their contexts, bytes. More than the pool: they take turns.
    pub demand: u64,
    /// For how long the client has waited that waits longest now.
    pub waiting: Duration,
    /// Part of the last moments in which some kernel ran, 0 to 1.
    pub busy: f64,
}

impl Load {
    fn of(gpu: &model::Gpu, utilization: Option<f64>) -> Self {
        let clients = &gpu.clients;
        Self {
            tenants: clients.len() as u32,
            demand: clients
                .iter()
                .map(|client| client.demand_bytes.saturating_add(client.pinned_bytes))
                .sum(),
            waiting: Duration::from_nanos(
                clients.iter().filter_map(|client| client.waiting_ns).max().unwrap_or(0),
            ),
            // NVML has no such figure for a GPU in MIG mode.
            busy: utilization.unwrap_or(if gpu.running > 0 { 1.0 } else { 0.0 }),
        }
    }
}

/// What an arbiter was found to do for a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Service {
    /// It serves it.
    Serves,
    /// It does not: why, and what to do.
    Trouble(String),
}

/// A GPU that has been seen, and what is remembered of it.
struct Known {
    gpu: Gpu,
    /// When its arbiter was last seen to serve it.
    served: Option<Instant>,
}

/// The GPUs of this node. Looking takes a millisecond or two, and as long as NVML takes: not in a thread that others wait for.
pub struct Inventory {
    library: PathBuf,
    runtime_dir: PathBuf,
    grace: Duration,
    hardware: Hardware,
    reader: Reader,
    known: BTreeMap<GpuUuid, Known>,
    errors: Errors,
}

/// The critical error that the driver has reported of a GPU, if it has.
type Errors = Arc<Mutex<BTreeMap<GpuUuid, u64>>>;

/// Critical errors that a program of a user causes, by NVIDIA's list of Xids. The GPU goes on: an exception in a
/// kernel, an illegal address, a channel that was stopped because of it, preemptive cleanup, a video decoder's exception, a context switch
/// that timed out.
const OF_PROGRAMS: [u64; 6] = [13, 31, 43, 45, 68, 109];

impl Inventory {
    /// Loads NVML from `library` and looks for the first time. The arbiter of `runtime_dir` need not be there yet.
    ///
    /// # Errors
    /// NVML cannot be used, or lists no GPU.
    pub fn open(library: &Path, runtime_dir: &Path, grace: Duration) -> Result<Self, Error> {
        let nvml = |cause: String| Error::Nvml { library: library.to_owned(), cause };
        let hardware = Hardware::start(library).map_err(|error| nvml(error.to_string()))?;
        let gpus = hardware.gpus().map_err(|error| nvml(error.to_string()))?;
        if gpus.is_empty() {
            return Err(Error::NoGpu);
        }
        let errors = Errors::default();
        let heard = errors.clone();
        let hear = move |gpu, error| {
            tracing::warn!(%gpu, "the driver reports a critical error: Xid {error}");
            if !OF_PROGRAMS.contains(&error) {
                heard.lock().unwrap_or_else(PoisonError::into_inner).entry(gpu).or_insert(error);
            }
            true
        };
        if let Err(error) = watch_errors(library, &gpus, hear) {
            tracing::warn!(
                "the driver's reports of critical errors (Xid) cannot be had, so health does not depend on them: {error}"
            );
        }
        let mut inventory = Self {
            library: library.to_owned(),
            runtime_dir: runtime_dir.to_owned(),
            grace,
            hardware,
            reader: Reader::new(runtime_dir),
            known: BTreeMap::new(),
            errors,
        };
        inventory.look();
        Ok(inventory)
    }

    /// How the GPUs are now, by their numbers on this node.
    pub fn look(&mut self) -> Vec<Gpu> {
        let listed = self.listed();
        let answers = register::dial(&paths::socket(&self.runtime_dir), Duration::ZERO);
        let answers = answers.map(drop).map_err(|error| error.to_string());
        let node = self.reader.read().map_err(|error| error.to_string());
        for uuid in listed {
            self.known.entry(uuid).or_insert_with(|| Known { gpu: new(&self.hardware, uuid), served: None });
        }
        let now = Instant::now();
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (uuid, known) in &mut self.known {
            let reached = self.hardware.reach(*uuid).map_err(|error| error.to_string());
            let failed = errors.get(uuid).copied();
            let seen = self.hardware.look(*uuid);
            let gpu = &mut known.gpu;
            gpu.index = seen.index.unwrap_or(gpu.index);
            gpu.model = seen.model.unwrap_or(std::mem::take(&mut gpu.model));
            match (page_of(&node, *uuid), seen.memory) {
                (Some(page), _) => {
                    gpu.memory = page.capacity_bytes;
                    gpu.load = Load::of(page, seen.utilization);
                }
                (None, Some((total, _))) if gpu.memory == 0 => gpu.memory = total,
                (None, _) => {}
            }
            let service = service(&self.runtime_dir, &answers, &node, *uuid);
            if service == Service::Serves {
                known.served = Some(now);
            }
            let spared = known.served.is_some_and(|served| now - served < self.grace);
            gpu.health = health(*uuid, reached, failed, service, spared);
        }
        let mut gpus: Vec<_> = self.known.values().map(|known| known.gpu.clone()).collect();
        gpus.sort_by(|one, other| (one.index, &one.uuid).cmp(&(other.index, &other.uuid)));
        gpus
    }

    /// The GPUs that NVML lists. Where it lists none, it is started anew: the driver may have been loaded again.
    fn listed(&mut self) -> Vec<GpuUuid> {
        let listed = self.hardware.gpus().unwrap_or_default();
        if !listed.is_empty() {
            return listed;
        }
        match Hardware::start(&self.library) {
            Ok(hardware) => {
                self.hardware = hardware;
                self.hardware.gpus().unwrap_or_default()
            }
            Err(_) => listed,
        }
    }
}

/// A GPU that is seen for the first time, as far as NVML knows it.
fn new(hardware: &Hardware, uuid: GpuUuid) -> Gpu {
    Gpu {
        uuid: uuid.to_string(),
        index: u32::MAX,
        model: String::new(),
        memory: 0,
        numa_node: hardware.numa_node(uuid),
        health: Health::Unhealthy("it has not been looked at yet: wait a moment".into()),
        load: Load::default(),
    }
}

fn page_of(node: &Result<model::Node, String>, gpu: GpuUuid) -> Option<&model::Gpu> {
    let uuid = gpu.to_string();
    node.as_ref().ok()?.gpus.iter().find(|page| page.uuid == uuid)
}

/// What the arbiter does for a GPU.
fn service(
    dir: &Path,
    answers: &Result<(), String>,
    node: &Result<model::Node, String>,
    gpu: GpuUuid,
) -> Service {
    const START: &str = "start it again (the pod of nvshare-arbiter on this node, or systemctl restart nvshare-arbiter); \
                         containers that run go on meanwhile";
    let dir = dir.display();
    if let Err(why) = answers {
        return Service::Trouble(format!("no arbiter answers in {dir} ({why}): {START}"));
    }
    let unreadable = node.iter().flat_map(|node| &node.unreadable).find(|why| why.contains(&gpu.to_string()));
    match (node, page_of(node, gpu), unreadable) {
        (_, Some(page), _) if page.arbiter_alive => Service::Serves,
        (_, Some(_), _) => {
            Service::Trouble(format!("the arbiter in {dir} has done nothing for three seconds: {START}"))
        }
        (_, None, Some(why)) => Service::Trouble(format!(
            "its page cannot be read, {why}: give the arbiter and this program the same release"
        )),
        (Ok(_), None, None) => Service::Trouble(format!(
            "the arbiter in {dir} serves other GPUs and not this one: add it to the arbiter's --gpu, or leave that option out"
        )),
        (Err(why), None, None) => Service::Trouble(why.clone()),
    }
}

/// Puts together what NVML and the arbiter say of a GPU.
fn health(
    gpu: GpuUuid,
    reached: Result<(), String>,
    failed: Option<u64>,
    service: Service,
    spared: bool,
) -> Health {
    match (reached, failed, service) {
        (Err(why), _, _) => Health::Unhealthy(format!(
            "NVML does not reach {gpu} ({why}): it has failed or was taken away. `dmesg | grep Xid` on its node says what happened; reset \
             the GPU (nvidia-smi -r) or restart the node"
        )),
        (Ok(()), Some(error), _) => Health::Unhealthy(format!(
            "{gpu} has had the critical error Xid {error}. NVIDIA's list of Xid errors says what it means; reset the GPU (nvidia-smi -r) or restart \
             the node, then delete this node's pod of nvshare's device plugin, which forgets the error"
        )),
        (Ok(()), None, Service::Trouble(why)) if !spared => Health::Unhealthy(format!("{gpu}: {why}")),
        (Ok(()), None, _) => Health::Healthy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuUuid = GpuUuid([7; 16]);

    fn node(gpus: Vec<model::Gpu>, unreadable: &[&str]) -> Result<model::Node, String> {
        let unreadable = unreadable.iter().map(|&why| why.to_owned()).collect();
        Ok(model::Node { gpus, unreadable, ..Default::default() })
    }

    fn page(alive: bool) -> model::Gpu {
        model::Gpu { uuid: GPU.to_string(), arbiter_alive: alive, ..Default::default() }
    }

    #[test]
    fn every_trouble_with_the_arbiter_is_told_from_the_others() {
        let dir = Path::new("/run/nvshare");
        let trouble = |answers: Result<(), String>, node| match service(dir, &answers, &node, GPU) {
            Service::Trouble(why) => why,
            Service::Serves => panic!("it does not serve"),
        };
        let other = model::Gpu { uuid: GpuUuid([8; 16]).to_string(), arbiter_alive: true, ..page(true) };
        let cases = [
            (trouble(Err("refused".into()), node(vec![page(true)], &[])), "no arbiter answers"),
            (trouble(Ok(()), node(vec![page(false)], &[])), "for three seconds"),
            (trouble(Ok(()), node(vec![other], &[])), "--gpu"),
            (trouble(Ok(()), node(vec![], &[&format!("{GPU}.page: old")])), "same release"),
            (trouble(Ok(()), Err("no page yet".into())), "no page yet"),
        ];
        for (why, part) in &cases {
            assert!(why.contains(part), "'{why}' does not say '{part}'");
        }
        assert_eq!(service(dir, &Ok(()), &node(vec![page(true)], &[]), GPU), Service::Serves);
    }

    #[test]
    fn an_arbiter_that_has_just_gone_is_spared_and_a_gpu_that_has_gone_is_not() {
        let gone = || Service::Trouble("it is gone".into());
        assert_eq!(health(GPU, Ok(()), None, gone(), true), Health::Healthy);
        assert!(!health(GPU, Ok(()), None, gone(), false).is_healthy());
        let Health::Unhealthy(why) = health(GPU, Err("GPU is lost".into()), None, Service::Serves, true)
        else {
            panic!("NVML has lost it")
        };
        assert!(why.contains("GPU is lost") && why.contains(&GPU.to_string()), "{why}");
        let Health::Unhealthy(why) = health(GPU, Ok(()), Some(79), Service::Serves, true) else {
            panic!("the driver has reported an error")
        };
        assert!(why.contains("Xid 79") && why.contains(&GPU.to_string()), "{why}");
    }
}
