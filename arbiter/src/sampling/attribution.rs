//! Whose is each byte that a GPU has in use? A pure function of one sample, and of what earlier ones have shown
//! (docs/decisions/0024-whose-memory-is-it.md).

use super::nvml::Reading;
use nvshare::slot::SlotIndex;
use nvshare::units::{GRANULE, Granules, granules_for};
use std::collections::HashSet;

/// Less than this, in bytes, is rounding: the driver's tables, a context that grows while the sample is taken.
pub(super) const NOISE: u64 = 16 * GRANULE;

/// How NVML shows the clients of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum View {
    /// By the pids that the arbiter knows.
    #[default]
    ByPid,
    /// By other pids: those of the host, while the arbiter is in a pid namespace of its own.
    OtherPids,
    /// Not at all: NVML lists no process, or does not show what it uses.
    Hidden,
}

/// A client's part of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sampled {
    pub slot: SlotIndex,
    /// Its pid, or a number that no process has if the arbiter cannot see it.
    pub pid: u32,
    /// Granules that it holds on the GPU, by the books.
    pub resident: Granules,
    /// Granules moved while the sample was taken: nothing is known of its context.
    pub moving: bool,
    /// It has handed memory to a replica, or was handed some.
    pub replica: bool,
}

/// What earlier samples have shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// Processes that are no clients.
    pub foreign: &'a HashSet<u32>,
    /// Whether NVML was found to hide processes.
    pub hidden_before: bool,
    /// Bytes in use that belonged to nobody while there was no client.
    pub idle: u64,
}

/// Whose the memory is that a GPU has in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attribution {
    pub view: View,
    /// The context of each client whose context is known.
    pub contexts: Vec<(SlotIndex, Granules)>,
    /// Bytes of processes that are no clients.
    pub foreign: u64,
    /// Bytes that are in use and belong to no process that NVML shows and to no client: memory of an exporter that died
    /// while others have it open. `None` if this sample does not show it.
    pub unattributed: Option<u64>,
    /// Processes that are neither clients nor known to be foreign.
    pub strangers: Vec<u32>,
}

fn bytes(granules: Granules) -> u64 {
    u64::from(granules) * GRANULE
}

/// Says whose the memory is.
pub(super) fn attribute(clients: &[Sampled], reading: &Reading, known: Known<'_>) -> Attribution {
    let (processes, other_slots) = merge_slots(clients);
    let (seen, unseen): (Vec<&Sampled>, Vec<&Sampled>) =
        processes.iter().partition(|process| reading.processes.contains_key(&process.pid));
    let mut found = Attribution::default();
    let mut contexts = add_seen_contexts(&mut found, &seen, reading);
    let strange = add_other_processes(&mut found, &processes, reading, known.foreign);
    let resident: u64 = processes.iter().map(|process| bytes(process.resident)).sum();
    let foreign = found.foreign;
    // What is in use and is neither a client's data, nor one of these contexts, nor another program's.
    let left = |contexts: u64| {
        let used = reading.memory.map(|memory| memory.used)?;
        Some(used.saturating_sub(resident).saturating_sub(contexts).saturating_sub(foreign))
    };
    let (view, sum) = unseen_contexts(&unseen, reading, strange, left(contexts), known);
    found.view = view;
    if let Some(sum) = sum {
        contexts += sum;
        add_equal_parts(&mut found, &unseen, sum);
    }
    for (slot, pid) in other_slots {
        if processes.iter().any(|process| process.pid == pid && !process.moving) {
            found.contexts.push((slot, 0));
        }
    }
    if !processes.iter().any(|process| process.moving) {
        found.unattributed = left(contexts);
    }
    found
}

/// One entry for each process, and the other slots of processes that have several on this GPU: one of them perhaps from an
/// arbiter that was killed before it had answered. The context of such a process is what it has less what is resident in
/// all its slots, and belongs to the first of them.
fn merge_slots(clients: &[Sampled]) -> (Vec<Sampled>, Vec<(SlotIndex, u32)>) {
    let mut processes: Vec<Sampled> = Vec::new();
    let mut others = Vec::new();
    for client in clients {
        match processes.iter_mut().find(|process| process.pid == client.pid) {
            Some(process) => {
                process.resident = process.resident.saturating_add(client.resident);
                process.moving |= client.moving;
                process.replica |= client.replica;
                others.push((client.slot, client.pid));
            }
            None => processes.push(*client),
        }
    }
    (processes, others)
}

/// Adds the contexts of the clients that NVML shows by their pids. Returns their sum in bytes.
///
/// Memory that was handed over may be shown for the process that made it, and another one holds it by the books. When a replica is
/// shown with less than it holds, only the sum of the replicas' contexts is known, and each counts as an equal part of it.
fn add_seen_contexts(found: &mut Attribution, seen: &[&Sampled], reading: &Reading) -> u64 {
    let shown = |process: &Sampled| reading.processes[&process.pid];
    let (replicas, others): (Vec<&Sampled>, Vec<&Sampled>) = seen.iter().partition(|process| process.replica);
    let is_short = replicas.iter().any(|process| shown(process) < bytes(process.resident));
    let (mut sum, each) = match is_short {
        true => {
            let all: u64 = replicas.iter().map(|process| shown(process)).sum();
            let resident: u64 = replicas.iter().map(|process| bytes(process.resident)).sum();
            let contexts = all.saturating_sub(resident);
            add_equal_parts(found, &replicas, contexts);
            (contexts, others.as_slice())
        }
        false => (0, seen),
    };
    for process in each {
        let context = shown(process).saturating_sub(bytes(process.resident));
        sum += context;
        if !process.moving {
            found.contexts.push((process.slot, granules_for(context)));
        }
    }
    sum
}

/// Adds the processes that are no clients, or not known as such. Returns what the latter have, in bytes.
fn add_other_processes(
    found: &mut Attribution,
    processes: &[Sampled],
    reading: &Reading,
    foreign: &HashSet<u32>,
) -> u64 {
    let is_client = |pid: &u32| processes.iter().any(|process| process.pid == *pid);
    let mut strange = 0;
    for (pid, used) in reading.processes.iter().filter(|(pid, _)| !is_client(pid)) {
        if foreign.contains(pid) {
            found.foreign += used;
        } else {
            found.strangers.push(*pid);
            strange += used;
        }
    }
    strange
}

/// How NVML shows the clients, and the sum in bytes of the contexts of those that it does not show by their pids, if that
/// can be known. `strange`: bytes of processes that nobody knows. `left`: bytes in use beside all that is known.
fn unseen_contexts(
    unseen: &[&Sampled],
    reading: &Reading,
    strange: u64,
    left: Option<u64>,
    known: Known<'_>,
) -> (View, Option<u64>) {
    let resident: u64 = unseen.iter().map(|process| bytes(process.resident)).sum();
    let nothing_shown = || reading.processes.is_empty() && left.is_some_and(|left| left > known.idle + NOISE);
    if unseen.is_empty() {
        (View::ByPid, None)
    } else if strange > 0 && strange >= resident {
        (View::OtherPids, Some(strange - resident))
    } else if known.hidden_before || resident > 0 || nothing_shown() {
        (View::Hidden, left.map(|left| left.saturating_sub(known.idle)))
    } else {
        // These clients have registered, and are about to make their contexts.
        (View::ByPid, None)
    }
}

/// Gives each of some clients an equal part of the sum of their contexts, in bytes.
fn add_equal_parts(found: &mut Attribution, clients: &[&Sampled], sum: u64) {
    if !clients.iter().any(|process| process.moving) {
        let each = granules_for(sum.div_ceil(clients.len() as u64));
        found.contexts.extend(clients.iter().map(|process| (process.slot, each)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::nvml::DeviceMemory;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever NVML shows, no byte in use is counted twice, and under whichever view none is forgotten.
        #[test]
        fn what_is_in_use_is_somebodys(
            residents in proptest::collection::vec(0u32..200, 1..6),
            contexts in proptest::collection::vec(1u64..40, 6),
            foreign in 0u64..100,
            shown in 0..3usize,
        ) {
            let clients: Vec<_> = residents.iter().enumerate().map(|(index, resident)| Sampled {
                slot: SlotIndex::new(index).unwrap(), pid: 10 + index as u32, resident: *resident, moving: false, replica: false,
            }).collect();
            let has = clients.iter().zip(&contexts).map(|(client, context)| (client.pid, u64::from(client.resident) + context));
            let used = has.clone().map(|(_, granules)| granules).sum::<u64>() + foreign;
            let processes: Vec<_> = match shown {
                0 => has.chain([(5, foreign)]).collect(),
                1 => has.map(|(pid, granules)| (pid + 1_000, granules)).chain([(5, foreign)]).collect(),
                _ => vec![(5, foreign)],
            };
            let reading = Reading {
                processes: processes.iter().map(|(pid, granules)| (*pid, granules * GRANULE)).collect(),
                memory: Some(DeviceMemory { total: 1_000 * GRANULE, reserved: 0, used: used * GRANULE }),
            };
            let foreign_pids = HashSet::from([5]);
            let known = Known { foreign: &foreign_pids, hidden_before: true, idle: 0 };
            let found = attribute(&clients, &reading, known);
            let sum: u64 = found.contexts.iter().map(|(_, context)| u64::from(*context)).sum();
            let expected: u64 = contexts.iter().take(clients.len()).sum();
            // Equal parts are rounded up to granules.
            prop_assert!((expected..expected + clients.len() as u64).contains(&sum), "{sum} and not {expected}");
            prop_assert_eq!(found.foreign, foreign * GRANULE);
            prop_assert_eq!(found.unattributed, Some(0));
        }

        /// Memory that was handed over counts once, whether NVML shows it for the replica that has it, for the one that made it, or for
        /// nobody; and another client's context is its own.
        #[test]
        fn memory_that_was_handed_over_is_no_context(
            residents in [0u32..200, 200u32..400],
            contexts in [1u64..40, 1u64..40],
            handed in 0u64..200,
            shown_for in 0..3usize,
        ) {
            let client = |index: usize, resident: u32, replica: bool| Sampled {
                slot: SlotIndex::new(index).unwrap(), pid: 10 + index as u32, resident, moving: false, replica,
            };
            let clients = [client(0, residents[0], true), client(1, residents[1], true), client(2, 50, false)];
            let has = [u64::from(residents[0]) + contexts[0], u64::from(residents[1]) + contexts[1], 50 + 7];
            // The second one holds what the first one made.
            let [mut first, mut second, third] = has;
            if shown_for > 0 {
                second -= handed;
            }
            if shown_for == 1 {
                first += handed;
            }
            let processes = [(10, first), (11, second), (12, third)];
            let reading = Reading {
                processes: processes.into_iter().map(|(pid, granules)| (pid, granules * GRANULE)).collect(),
                memory: Some(DeviceMemory { total: 2_000 * GRANULE, reserved: 0, used: has.iter().sum::<u64>() * GRANULE }),
            };
            let foreign = HashSet::new();
            let found = attribute(&clients, &reading, Known { foreign: &foreign, hidden_before: false, idle: 0 });
            let sum: u64 = found.contexts.iter().map(|(_, context)| u64::from(*context)).sum();
            let unattributed = found.unattributed.unwrap().div_ceil(GRANULE);
            let expected = contexts[0] + contexts[1] + 7;
            prop_assert!((expected..expected + 2).contains(&(sum + unattributed)), "{sum} and {unattributed}, not {expected}");
            prop_assert!(found.contexts.contains(&(SlotIndex::new(2).unwrap(), 7)));
        }
    }
}
