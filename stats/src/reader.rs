//! Reads a node: its pages, its processes, NVML.

use crate::hardware::{GpuHardware, Hardware};
use crate::history::{History, SwitchSeen};
use crate::model::{Client, Gpu, Node, SCHEMA_VERSION, Switch};
use crate::pages::{OpenPages, ReadError};
use crate::process::Processes;
use nvshare::map::MappedPage;
use nvshare::page::{Direction, Page, Phase};
use nvshare::policy;
use nvshare::shares::{MemoryLimit, Shares};
use nvshare::slot::{Process, SLOTS, SlotIndex};
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::timeline::Span;
use nvshare::units::{GRANULE, GpuUuid, Nanos, SECOND, bytes_of};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Reads all pages of a runtime directory once. Asks no NVML: [`Reader`] does.
///
/// # Errors
/// The directory has none.
pub fn read(dir: &Path) -> Result<Node, ReadError> {
    Reader::new(dir).read()
}

/// Where a reader finds its pages.
enum Source {
    /// In a runtime directory, where they may come and go.
    Directory(OpenPages),
    /// Whoever made it has them.
    Given(Vec<MappedPage>),
}

/// Reads a node again and again. It keeps the pages open and remembers what does not change, so that reading takes well under a
/// millisecond for a GPU with all its slots in use. It asks no arbiter but for the pages themselves, where this user may not
/// open them.
pub struct Reader {
    source: Source,
    processes: Processes,
    hardware: Option<Hardware>,
    histories: BTreeMap<GpuUuid, History>,
    /// What has happened since it was last taken, if somebody takes it.
    news: Option<Vec<News>>,
}

/// What has happened on a GPU between two readings, as its clients' journals have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// The GPU.
    pub gpu: GpuUuid,
    /// Spans that have ended, each with its slot, in the order in which they ended.
    pub spans: Vec<(usize, Span)>,
    /// Switches among them.
    pub switches: Vec<SwitchSeen>,
}

impl Reader {
    /// A reader of a runtime directory, which need not be there yet.
    pub fn new(dir: &Path) -> Self {
        Self::of(Source::Directory(OpenPages::new(dir)))
    }

    /// A reader of these pages.
    pub fn of_pages(pages: Vec<MappedPage>) -> Self {
        Self::of(Source::Given(pages))
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            processes: Processes::default(),
            hardware: None,
            histories: BTreeMap::new(),
            news: None,
        }
    }

    /// A reader that keeps what has happened for [`Reader::take_news`], which must then be called now and then.
    #[must_use]
    pub fn with_news(self) -> Self {
        Self { news: Some(Vec::new()), ..self }
    }

    /// What has happened since the last call, as far as it was read; the first time, all that the journals have.
    pub fn take_news(&mut self) -> Vec<News> {
        self.news.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// What has been read of a GPU's journals.
    pub fn history(&self, gpu: GpuUuid) -> Option<&History> {
        self.histories.get(&gpu)
    }

    /// With what NVML says, if `library` can be loaded: a path, or a name that the loader finds, such as `libnvidia-ml.so.1`.
    #[must_use]
    pub fn with_hardware(self, library: &Path) -> Self {
        Self { hardware: Hardware::open(library), ..self }
    }

    /// Reads everything now.
    ///
    /// # Errors
    /// The directory has no pages.
    pub fn read(&mut self) -> Result<Node, ReadError> {
        let (pages, unreadable) = self.pages()?;
        let mut seen = HashSet::new();
        let gpus: Vec<_> = pages.iter().map(|page| self.gpu(page, &mut seen)).collect();
        self.processes.keep(|process| seen.contains(process));
        let uuids: HashSet<_> = pages.iter().map(|page| page.gpu()).collect();
        self.histories.retain(|gpu, _| uuids.contains(gpu));
        let (total, available) = host_memory();
        Ok(Node {
            schema_version: SCHEMA_VERSION,
            release: env!("CARGO_PKG_VERSION").into(),
            gpus,
            unreadable,
            host_memory_bytes: total,
            host_available_bytes: available,
        })
    }

    /// Reads only what has happened, for [`Reader::take_news`]: so often that no client writes its journal full in between.
    ///
    /// # Errors
    /// The directory has no pages.
    pub fn follow(&mut self) -> Result<(), ReadError> {
        let (pages, _) = self.pages()?;
        pages.iter().for_each(|page| self.follow_page(page));
        Ok(())
    }

    /// The pages, and why others cannot be read.
    fn pages(&mut self) -> Result<(Vec<MappedPage>, Vec<String>), ReadError> {
        match &mut self.source {
            Source::Given(pages) => Ok((pages.clone(), Vec::new())),
            Source::Directory(open) => {
                open.refresh()?;
                let pages = open.pages.values().filter_map(|page| page.as_ref().ok()).cloned();
                let unreadable = open.pages.values().filter_map(|page| page.as_ref().err()).cloned();
                Ok((pages.collect(), unreadable.collect()))
            }
        }
    }

    fn follow_page(&mut self, page: &MappedPage) {
        let gpu = page.gpu();
        let (spans, switches) = self.histories.entry(gpu).or_default().read(page, now());
        if let Some(news) = &mut self.news
            && !spans.is_empty()
        {
            news.push(News { gpu, spans, switches });
        }
    }

    fn gpu(&mut self, page: &MappedPage, seen: &mut HashSet<Process>) -> Gpu {
        let uuid = page.gpu();
        self.follow_page(page);
        let time = now();
        let switches = self.histories[&uuid].latest().map(|switch| shown(switch, time)).collect();
        let snapshot = Snapshot::take(page, page.admitted());
        let clients: Vec<_> = (0..SLOTS)
            .filter_map(SlotIndex::new)
            .filter_map(|slot| client(page, &snapshot, slot, time, &mut self.processes, seen))
            .collect();
        let hardware = self.hardware.as_mut().map(|hardware| hardware.look(uuid)).unwrap_or_default();
        of_page(page, &snapshot, time, hardware, clients, switches)
    }
}

fn of_page(
    page: &Page,
    snapshot: &Snapshot,
    time: Nanos,
    hardware: GpuHardware,
    clients: Vec<Client>,
    switches: Vec<Switch>,
) -> Gpu {
    let (arbiter_pid, arbiter_generation, heartbeat) = page.arbiter();
    let (audits, repaired, reaped) = page.audit_counts();
    let foreign = page.foreign();
    let in_phase = |phase: Phase| clients.iter().filter(|client| client.phase == phase.name()).count() as u32;
    Gpu {
        uuid: page.gpu().to_string(),
        index: hardware.index,
        model: hardware.model,
        capacity_bytes: bytes_of(snapshot.capacity),
        free_bytes: i64::from(snapshot.free) * GRANULE as i64,
        pinned_bytes: snapshot.clients().map(|(_, view)| bytes_of(view.context)).sum(),
        foreign_bytes: bytes_of(foreign.granules),
        foreign_processes: foreign.processes,
        bandwidth_in: page.bandwidth(Direction::In),
        bandwidth_out: page.bandwidth(Direction::Out),
        arbiter_pid,
        arbiter_alive: time.saturating_sub(heartbeat) < 3 * SECOND,
        arbiter_generation,
        audits,
        repaired,
        reaped,
        memory_bytes: hardware.memory.map(|(total, _)| total),
        memory_used_bytes: hardware.memory.map(|(_, used)| used),
        utilization: hardware.utilization,
        temperature_celsius: hardware.temperature,
        power_watts: hardware.power,
        admitted: clients.iter().filter(|client| client.admitted).count() as u32,
        running: in_phase(Phase::Running),
        waiting: in_phase(Phase::Waiting),
        deadline_ns: snapshot.settings.deadline,
        drain_target_ns: snapshot.settings.drain_target,
        turn_slot: page.turn().holder.map(|slot| slot.get() as u32),
        switches,
        clients,
    }
}

fn shown(switch: &SwitchSeen, time: Nanos) -> Switch {
    Switch {
        ago_ns: time.saturating_sub(switch.ended),
        took_ns: switch.took,
        in_bytes: switch.bytes,
        from_slot: switch.from.map(|(slot, _)| slot as u32),
        from_pid: switch.from.map(|(_, pid)| pid),
        to_slot: switch.to.0 as u32,
        to_pid: switch.to.1,
    }
}

fn client(
    page: &Page,
    snapshot: &Snapshot,
    slot: SlotIndex,
    time: Nanos,
    processes: &mut Processes,
    seen: &mut HashSet<Process>,
) -> Option<Client> {
    let details = page.details(slot)?;
    let process = page.owner(slot)?;
    seen.insert(process);
    let info = processes.look(process);
    let kubernetes = info.kubernetes;
    let Shares { weight, priority, memory_limit, compute_limit } = details.shares;
    let compute = page.compute_use(slot, time);
    let takes_turns = page.shares_are_set();
    let stalled = details.stalled_for(time);
    Some(Client {
        slot: slot.get(),
        pid: details.owner.pid,
        name: details.name,
        uid: info.uid,
        user: info.user,
        container_id: info.place.container,
        container: kubernetes.as_ref().map(|name| name.container.clone()),
        pod_uid: info.place.pod,
        pod: kubernetes.as_ref().map(|name| name.pod.clone()),
        namespace: kubernetes.map(|name| name.namespace),
        phase: details.view.phase.name().into(),
        admitted: snapshot.admitted.contains(slot),
        demand_bytes: bytes_of(details.view.demand),
        resident_bytes: bytes_of(details.view.resident),
        evicted_bytes: bytes_of(details.view.missing()),
        pinned_bytes: bytes_of(details.view.context),
        unmovable_bytes: bytes_of(details.view.unmovable),
        waiting_ns: (details.wait_since != 0).then(|| time.saturating_sub(details.wait_since)),
        slice_left_ns: policy::slice_end(snapshot, slot)
            .filter(|_| snapshot.admitted.contains(slot))
            .map(|end| end.saturating_sub(time)),
        gang: (details.view.gang != 0).then_some(details.view.gang),
        paused: details.view.paused,
        weight,
        priority: priority.to_string(),
        memory_limit_bytes: memory_limit.granules(snapshot.capacity).map(bytes_of),
        memory_limit: (memory_limit != MemoryLimit::None).then(|| memory_limit.to_string()),
        compute_limit: compute_limit.millionths().map(|part| f64::from(part) / 1e6),
        takes_turns,
        has_turn: compute.has_turn,
        turn_waiting_ns: compute.waiting.filter(|_| takes_turns),
        gpu_ns: compute.gpu_ns,
        gpu_share: takes_turns.then_some(compute.recent_share),
        charged_ns: details.charged_ns.saturating_add(policy::charged(snapshot, slot)),
        held_ns: compute.held_ns,
        turns: compute.turns,
        overruns: compute.overruns,
        overdue: compute.overdue,
        slices: details.slices,
        yields: details.yields,
        bytes_in: details.bytes_in,
        bytes_out: details.bytes_out,
        bytes_elided: details.bytes_elided,
        bytes_unchanged: details.bytes_unchanged,
        bytes_handed_over: details.bytes_handed_over,
        bytes_taken_over: details.bytes_taken_over,
        fill_ns: details.fill_ns,
        evict_ns: details.evict_ns,
        run_ns: details.run_ns,
        submissions: details.submissions,
        held_submissions: details.held_submissions,
        stall: stalled.map(|_| details.stall.name().into()),
        stalled_ns: stalled,
        stalls: details.stalls,
        drain_retries: details.drain_retries,
    })
}

/// The host's memory, and what of it programs can still have, in bytes.
fn host_memory() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (kibibytes(&text, "MemTotal:"), kibibytes(&text, "MemAvailable:"))
}

/// Bytes behind a word in the text of /proc/meminfo.
fn kibibytes(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
}
