//! The statistics themselves: of a node, a GPU, a client, a switch.
//!
//! A field's documentation is its description wherever it is shown; write it for whoever reads `nvshare status --describe`.

use crate::definition::Unit::{Bytes, BytesPerSecond, Celsius, Count, Nanoseconds, Ratio, Watts};
use crate::definition::{counter, flag, gauge, identity, list, state, text};
use crate::statistics;

/// The version of the JSON that the structs make: raised when a field goes away or changes its meaning, not when one is added.
pub const SCHEMA_VERSION: u32 = 1;

/// What a client can be doing.
pub const PHASES: &[&str] = &["idle", "waiting", "filling", "running", "draining", "leaving"];

/// Why a client cannot give way.
pub const STALLS: &[&str] = &["drain-awaits-submission", "endless-work", "open-capture", "no-host-memory"];

/// How soon a client's turn can come.
pub const PRIORITIES: &[&str] = &["low", "normal", "high"];

statistics! {
    /// All GPUs of a node.
    pub struct Node: "node" {
        /// Version of this JSON: raised when a field goes away or changes its meaning, not when one is added.
        schema_version: u32 => identity(),
        /// The release of nvshare that wrote this.
        release: String => identity(),
        /// The GPUs that have a page, by UUID.
        gpus: Vec<Gpu> => list(),
        /// Pages that cannot be read, and why.
        unreadable: Vec<String> => list(),
        /// Memory of the host.
        host_memory_bytes: Option<u64> => gauge(Bytes).named("host_memory"),
        /// Memory of the host that programs can still have, by the kernel's estimate (MemAvailable).
        host_available_bytes: Option<u64> => gauge(Bytes).named("host_memory_available"),
    }
}

statistics! {
    /// One GPU.
    pub struct Gpu: "gpu" {
        /// Its UUID.
        uuid: String => identity(),
        /// Its number on this node, as nvidia-smi shows it; null without NVML.
        index: Option<u32> => identity(),
        /// Its model, such as NVIDIA H100 80GB HBM3; null without NVML.
        model: Option<String> => text(),
        /// Bytes in the pool.
        capacity_bytes: u64 => gauge(Bytes),
        /// Bytes that are free; negative is a debt.
        free_bytes: i64 => gauge(Bytes),
        /// Bytes of all clients' contexts.
        pinned_bytes: u64 => gauge(Bytes).named("context"),
        /// Bytes that NVML shows for processes that are no clients.
        foreign_bytes: u64 => gauge(Bytes),
        /// How many such processes there are.
        foreign_processes: u32 => gauge(Count),
        /// Measured or assumed bandwidth into the GPU, bytes a second.
        bandwidth_in: u64 => gauge(BytesPerSecond),
        /// The same out of it.
        bandwidth_out: u64 => gauge(BytesPerSecond),
        /// The arbiter's pid.
        arbiter_pid: u32 => identity(),
        /// Whether the arbiter was alive within the last 3 s.
        arbiter_alive: bool => flag(),
        /// How many arbiters the page has had.
        arbiter_generation: u32 => counter(Count).named("arbiters"),
        /// Times that the books were checked.
        audits: u64 => counter(Count),
        /// Times that the books did not balance and were repaired: anything but 0 is a bug of nvshare's.
        repaired: u64 => counter(Count).named("repairs"),
        /// Clients that were cleaned up after: they ended, were killed, or left.
        reaped: u64 => counter(Count).named("reaped_clients"),
        /// All memory of the GPU; null without NVML.
        memory_bytes: Option<u64> => gauge(Bytes).named("memory"),
        /// Memory of the GPU that is in use, whoever uses it; null without NVML.
        memory_used_bytes: Option<u64> => gauge(Bytes).named("memory_used"),
        /// Part of the last moments in which some kernel ran, by NVML, 0 to 1; null without NVML.
        utilization: Option<f64> => gauge(Ratio),
        /// Its temperature; null without NVML.
        temperature_celsius: Option<u32> => gauge(Celsius),
        /// What it draws; null without NVML.
        power_watts: Option<f64> => gauge(Watts),
        /// Clients that are admitted: they may load and run.
        admitted: u32 => gauge(Count).named("admitted_clients"),
        /// Clients that run.
        running: u32 => gauge(Count).named("running_clients"),
        /// Clients that wait for the GPU.
        waiting: u32 => gauge(Count).named("waiting_clients"),
        /// A client that has waited for so long, and for two rounds of the shortest turns, has the GPU next, ns.
        deadline_ns: u64 => gauge(Nanoseconds),
        /// While a slice can end, its holder has no more work in flight than takes so long, ns.
        drain_target_ns: u64 => gauge(Nanoseconds),
        /// The client that has the compute turn: its slot; null if none has it.
        turn_slot: Option<u32> => identity(),
        /// The latest switches that the clients' journals still have, the latest first, at most 16.
        switches: Vec<Switch> => list(),
        /// The clients, by slot.
        clients: Vec<Client> => list(),
    }
}

statistics! {
    /// A switch: a client drained, and the next one that had waited for it runs.
    pub struct Switch: "switch" {
        /// How long ago it ended, ns.
        ago_ns: u64 => gauge(Nanoseconds),
        /// How long it took, from the beginning of the drain until all memory of the next client was in place, ns.
        took_ns: u64 => gauge(Nanoseconds),
        /// Bytes that came in for it.
        in_bytes: u64 => gauge(Bytes),
        /// The slot of the client that gave way first.
        from_slot: Option<u32> => identity(),
        /// Its pid, as it sees itself.
        from_pid: Option<u32> => identity(),
        /// The slot of the client that runs now.
        to_slot: u32 => identity(),
        /// Its pid, as it sees itself; 0 if its registration was not seen.
        to_pid: u32 => identity(),
    }
}

statistics! {
    /// One client: one process on one GPU.
    pub struct Client: "client" {
        /// Its slot.
        slot: usize => identity(),
        /// Its process, as the arbiter sees it.
        pid: u32 => identity(),
        /// What it calls itself.
        name: String => identity(),
        /// The user whose process it is; null if the process cannot be seen from here.
        uid: Option<u32> => identity(),
        /// The name of that user; null if there is none.
        user: Option<String> => text(),
        /// The id of the container that it runs in; null if it runs in none that is known.
        container_id: Option<String> => text(),
        /// The name of that container, as Kubernetes calls it; null if it is not known.
        container: Option<String> => text(),
        /// The UID of the Kubernetes pod that it runs in; null if it runs in none.
        pod_uid: Option<String> => text(),
        /// The name of that pod; null if it is not known.
        pod: Option<String> => text(),
        /// The namespace of that pod; null if it is not known.
        namespace: Option<String> => text(),
        /// idle, waiting, filling, running, draining or leaving.
        phase: String => state(PHASES),
        /// Whether it may load and run.
        admitted: bool => flag(),
        /// Bytes that its allocations need.
        demand_bytes: u64 => gauge(Bytes),
        /// Bytes of them on the GPU.
        resident_bytes: u64 => gauge(Bytes),
        /// Bytes of them that are not on the GPU: in host memory, or nowhere because they are zero or not there yet.
        evicted_bytes: u64 => gauge(Bytes),
        /// Bytes of its context.
        pinned_bytes: u64 => gauge(Bytes).named("context"),
        /// Bytes of the resident ones that cannot be evicted.
        unmovable_bytes: u64 => gauge(Bytes),
        /// How long it has been waiting, ns; null if it does not wait.
        waiting_ns: Option<u64> => gauge(Nanoseconds),
        /// How long its slice lasts yet, ns; null if nobody waits for its end.
        slice_left_ns: Option<u64> => gauge(Nanoseconds),
        /// The number of the gang of processes that it runs together with; null if it belongs to none.
        gang: Option<u64> => identity(),
        /// Whether a user has paused it: it is not admitted until it is resumed.
        paused: bool => flag(),
        /// Its share against others', 1 to 1000.
        weight: u32 => gauge(Count),
        /// low, normal or high: how soon its turn comes.
        priority: String => state(PRIORITIES),
        /// The most bytes that its allocations and its context may come to; null without a limit.
        memory_limit_bytes: Option<u64> => gauge(Bytes),
        /// The limit as it was given, such as 25%; null without one.
        memory_limit: Option<String> => text(),
        /// The most of the GPU's time that it may have over any two seconds, 0 to 1; null without a limit.
        compute_limit: Option<f64> => gauge(Ratio),
        /// Whether it takes compute turns: the clients of the GPU differ in their shares.
        takes_turns: bool => flag(),
        /// Whether it has the compute turn now.
        has_turn: bool => flag(),
        /// How long its threads have been waiting for a compute turn, ns; null if they do not wait.
        turn_waiting_ns: Option<u64> => gauge(Nanoseconds),
        /// GPU time that it has had in compute turns, in all, ns.
        gpu_ns: u64 => counter(Nanoseconds).named("gpu"),
        /// Its part of the GPU's time over the last seconds, 0 to 1; null if it takes no compute turns. A second ago counts half.
        gpu_share: Option<f64> => gauge(Ratio),
        /// GPU time that the policy has charged it with, ns: of each slice a k-th where k ran at once, whatever they did.
        charged_ns: u64 => counter(Nanoseconds),
        /// Time for which its threads have waited for a compute turn, ns.
        held_ns: u64 => counter(Nanoseconds),
        /// Compute turns that it has had.
        turns: u64 => counter(Count),
        /// Times that others went on beside it, because it did not give up a compute turn.
        overruns: u64 => counter(Count),
        /// Whether others go on beside it now.
        overdue: bool => flag(),
        /// Times that it was admitted and filled.
        slices: u64 => counter(Count),
        /// Times that it gave way.
        yields: u64 => counter(Count),
        /// Bytes copied to the GPU.
        bytes_in: u64 => counter(Bytes).named("copied_in"),
        /// Bytes copied to the host.
        bytes_out: u64 => counter(Bytes).named("copied_out"),
        /// Bytes given up on the GPU without a copy, because they were zero.
        bytes_elided: u64 => counter(Bytes).named("elided"),
        /// Bytes given up on the GPU without a copy, because host memory had the same ones.
        bytes_unchanged: u64 => counter(Bytes).named("unchanged"),
        /// Bytes whose GPU memory was handed to replicas (NVSHARE_REPLICAS).
        bytes_handed_over: u64 => counter(Bytes).named("handed_over"),
        /// Bytes whose GPU memory has come from replicas, so that they were not copied to the GPU.
        bytes_taken_over: u64 => counter(Bytes).named("taken_over"),
        /// Time spent copying in, ns.
        fill_ns: u64 => counter(Nanoseconds),
        /// Time spent copying out, ns.
        evict_ns: u64 => counter(Nanoseconds),
        /// Time spent running in slices that have ended, ns.
        run_ns: u64 => counter(Nanoseconds),
        /// Times that its process submitted work (launches, copies and the like), on all its GPUs. Brought up to date whenever the
        /// client's engine looks: often while somebody waits, and at the end of a slice.
        submissions: u64 => counter(Count),
        /// Of these, those that had to wait at the gate, because the client did not have the GPU.
        held_submissions: u64 => counter(Count),
        /// Why it cannot give way although it is to: drain-awaits-submission, endless-work, open-capture or no-host-memory;
        /// null if it can.
        stall: Option<String> => state(STALLS),
        /// How long it has been unable to, ns; null if it can.
        stalled_ns: Option<u64> => gauge(Nanoseconds),
        /// Times that it was unable to.
        stalls: u64 => counter(Count),
        /// Times that it let its threads go on in the middle of a drain, and began to drain again later.
        drain_retries: u64 => counter(Count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{Field, Kind, Statistics, Unit};
    use nvshare::page::{Phase, Stall};
    use nvshare::shares::Priority;
    use std::collections::BTreeSet;

    fn all() -> Vec<(&'static str, &'static Field)> {
        fn of<T: Statistics>() -> impl Iterator<Item = (&'static str, &'static Field)> {
            T::FIELDS.iter().map(|field| (T::SUBJECT, field))
        }
        of::<Node>().chain(of::<Gpu>()).chain(of::<Switch>()).chain(of::<Client>()).collect()
    }

    #[test]
    fn every_statistic_has_a_sentence_and_a_metric_name_of_its_own() {
        let mut names = BTreeSet::new();
        for (subject, field) in all() {
            assert!(field.description.ends_with('.'), "{subject} {}", field.name);
            assert!(!field.description.contains("  "), "{}", field.description);
            if let Some(metric) = field.metric(subject) {
                assert!(names.insert(metric.clone()), "{metric} stands for two statistics");
                assert!(!metric.contains("__"), "{metric}");
            }
        }
        assert!(names.contains("nvshare_client_copied_in_bytes_total"));
        assert!(names.contains("nvshare_client_run_seconds_total"));
        assert!(names.contains("nvshare_gpu_bandwidth_in_bytes_per_second"));
    }

    #[test]
    fn a_field_with_a_unit_in_its_name_has_that_unit() {
        for (subject, field) in all() {
            let unit = field.unit();
            assert_eq!(field.name.ends_with("_ns"), unit == Unit::Nanoseconds, "{subject} {}", field.name);
            if field.name.ends_with("_bytes") {
                assert_eq!(unit, Unit::Bytes, "{subject} {}", field.name);
            }
        }
    }

    #[test]
    fn the_words_of_a_state_are_those_that_the_page_can_say() {
        let phases: Vec<_> = (0..6).map(|word| Phase::from(word).name()).collect();
        assert_eq!(phases, PHASES);
        let stalls: Vec<_> = (1..5).map(|word| Stall::from(word).name()).collect();
        assert_eq!(stalls, STALLS);
        let priorities: Vec<_> = (0..)
            .map_while(Priority::read)
            .map(Priority::name)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let sorted: Vec<_> = PRIORITIES.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        assert_eq!(priorities, sorted);
        assert!(all().iter().any(|(_, field)| field.kind() == Kind::State(STALLS)));
    }

    #[test]
    fn json_has_the_fields_of_the_definition_and_no_others() {
        fn check<T: Statistics + Default + serde::Serialize>() {
            let json = serde_json::to_value(T::default()).unwrap();
            let found: BTreeSet<_> = json.as_object().unwrap().keys().cloned().collect();
            let defined: BTreeSet<_> = T::FIELDS.iter().map(|field| field.name.to_owned()).collect();
            assert_eq!(found, defined);
            assert_eq!(T::default().values().len(), T::FIELDS.len());
        }
        check::<Node>();
        check::<Gpu>();
        check::<Switch>();
        check::<Client>();
    }
}
