//! What happens a second: the difference between two readings of a node, and the latest of these figures.

use nvshare_stats::{Client, Gpu, Node};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Tells a client from all others, for as long as its process lives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientKey {
    /// The UUID of its GPU.
    pub gpu: String,
    /// Its slot.
    pub slot: usize,
    /// Its process, as the page has it.
    pub pid: u32,
}

impl ClientKey {
    /// The key of a client.
    pub fn of(gpu: &Gpu, client: &Client) -> Self {
        Self { gpu: gpu.uuid.clone(), slot: client.slot, pid: client.pid }
    }
}

/// What a client, or all clients of a GPU, did between two readings.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rates {
    /// Bytes a second to the GPU.
    pub bytes_in: f64,
    /// Bytes a second to the host.
    pub bytes_out: f64,
    /// Part of the GPU's time, 0 to 1.
    pub time: f64,
    /// Seconds a second for which threads were held at the gate, because the client did not have the compute turn.
    pub held: f64,
    /// Times a second that it gave way.
    pub switches: f64,
    /// Compute turns a second.
    pub turns: f64,
    /// Submissions of work a second, as far as the client's engine has told.
    pub submissions: f64,
}

impl Rates {
    /// What a client did between two readings. A counter that fell is another client's, or was overwritten, and counts as nothing.
    fn between(before: &Client, after: &Client, seconds: f64) -> Self {
        let per_second = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
        // In compute turns it is known who had the GPU; else the policy shares the time out among those who run.
        let in_turns = after.takes_turns && after.turns > 0;
        let time = |client: &Client| if in_turns { client.gpu_ns } else { client.charged_ns };
        Self {
            bytes_in: per_second(before.bytes_in, after.bytes_in),
            bytes_out: per_second(before.bytes_out, after.bytes_out),
            time: (per_second(time(before), time(after)) / 1e9).min(1.0),
            held: per_second(before.held_ns, after.held_ns) / 1e9,
            switches: per_second(before.yields, after.yields),
            turns: per_second(before.turns, after.turns),
            submissions: per_second(before.submissions, after.submissions),
        }
    }

    fn add(&mut self, other: Self) {
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.time = (self.time + other.time).min(1.0);
        self.held += other.held;
        self.switches += other.switches;
        self.turns += other.turns;
        self.submissions += other.submissions;
    }
}

/// How many figures of the past are kept.
pub const KEPT: usize = 600;

/// The latest figures, the oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ring(VecDeque<f64>);

impl Ring {
    fn push(&mut self, value: f64) {
        self.0.push_back(value);
        if self.0.len() > KEPT {
            self.0.pop_front();
        }
    }

    /// The latest `count` figures, the oldest first; fewer if there are fewer.
    pub fn latest(&self, count: usize) -> impl Iterator<Item = f64> {
        self.0.iter().skip(self.0.len().saturating_sub(count)).copied()
    }

    /// The largest of the latest `count` figures; 0 if there are none.
    pub fn largest(&self, count: usize) -> f64 {
        self.latest(count).fold(0.0, f64::max)
    }
}

/// The past of a GPU.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuPast {
    /// Part of the time that its clients had, 0 to 1.
    pub time: Ring,
    /// Bytes a second to the GPU.
    pub bytes_in: Ring,
    /// Bytes a second to the host.
    pub bytes_out: Ring,
}

/// Rates and what they were.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Past {
    last: Option<(Node, Duration)>,
    rates: BTreeMap<ClientKey, Rates>,
    gpu_rates: BTreeMap<String, Rates>,
    clients: BTreeMap<ClientKey, Ring>,
    gpus: BTreeMap<String, GpuPast>,
}

impl Past {
    /// Takes a reading in, made at the time `at` since the monitor began. Forgets whatever is no longer there. A reading that follows
    /// the last one in less than `least` changes no rate: over so short a time they would say little.
    pub fn take(&mut self, node: &Node, at: Duration, least: Duration) {
        if self.last.as_ref().is_some_and(|(_, then)| at.saturating_sub(*then) < least) {
            return;
        }
        let before = self.last.replace((node.clone(), at));
        let seconds = before.as_ref().map_or(0.0, |(_, then)| at.saturating_sub(*then).as_secs_f64());
        self.rates.clear();
        self.gpu_rates.clear();
        if let Some((before, _)) = before.filter(|_| seconds > 0.0) {
            self.compare(&before, node, seconds);
        }
        let there = |key: &ClientKey| node.gpus.iter().any(|gpu| gpu.uuid == key.gpu && has(gpu, key));
        self.clients.retain(|key, _| there(key));
        self.gpus.retain(|uuid, _| node.gpus.iter().any(|gpu| gpu.uuid == *uuid));
    }

    fn compare(&mut self, before: &Node, after: &Node, seconds: f64) {
        for gpu in &after.gpus {
            let then = before.gpus.iter().find(|then| then.uuid == gpu.uuid);
            let mut all = Rates::default();
            for client in &gpu.clients {
                let same = |then: &&Client| then.slot == client.slot && then.pid == client.pid;
                let rates = then
                    .and_then(|then| then.clients.iter().find(same))
                    .map(|then| Rates::between(then, client, seconds));
                if let Some(rates) = rates {
                    all.add(rates);
                    let key = ClientKey::of(gpu, client);
                    self.clients.entry(key.clone()).or_default().push(rates.time);
                    self.rates.insert(key, rates);
                }
            }
            let past = self.gpus.entry(gpu.uuid.clone()).or_default();
            past.time.push(all.time);
            past.bytes_in.push(all.bytes_in);
            past.bytes_out.push(all.bytes_out);
            self.gpu_rates.insert(gpu.uuid.clone(), all);
        }
    }

    /// What a client does now; `None` before there are two readings of it.
    pub fn rates(&self, key: &ClientKey) -> Option<Rates> {
        self.rates.get(key).copied()
    }

    /// What all clients of a GPU do now.
    pub fn gpu_rates(&self, uuid: &str) -> Option<Rates> {
        self.gpu_rates.get(uuid).copied()
    }

    /// A client's part of the GPU's time, lately.
    pub fn client(&self, key: &ClientKey) -> Option<&Ring> {
        self.clients.get(key)
    }

    /// A GPU's past.
    pub fn gpu(&self, uuid: &str) -> Option<&GpuPast> {
        self.gpus.get(uuid)
    }
}

fn has(gpu: &Gpu, key: &ClientKey) -> bool {
    gpu.clients.iter().any(|client| client.slot == key.slot && client.pid == key.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Duration = Duration::from_millis(500);

    fn node(clients: &[Client]) -> Node {
        let gpu = Gpu { uuid: "GPU-1".into(), clients: clients.to_vec(), ..Gpu::default() };
        Node { gpus: vec![gpu], ..Node::default() }
    }

    fn client(pid: u32, bytes_in: u64, charged_ns: u64) -> Client {
        Client { pid, bytes_in, charged_ns, ..Client::default() }
    }

    #[test]
    fn a_rate_is_the_difference_of_two_readings_by_the_time_between_them() {
        let mut past = Past::default();
        let key = ClientKey { gpu: "GPU-1".into(), slot: 0, pid: 7 };
        past.take(&node(&[client(7, 1_000, 0)]), Duration::from_secs(10), LEAST);
        assert_eq!((past.rates(&key), past.gpu_rates("GPU-1")), (None, None));
        past.take(&node(&[client(7, 5_000, 1_000_000_000)]), Duration::from_secs(12), LEAST);
        let rates = past.rates(&key).unwrap();
        assert_eq!((rates.bytes_in, rates.time), (2_000.0, 0.5));
        assert_eq!(past.gpu_rates("GPU-1").unwrap().bytes_in, 2_000.0);
        // A moment later: the rates of before stand, and the next ones are those of the whole time.
        past.take(&node(&[client(7, 9_000, 0)]), Duration::from_millis(12_100), LEAST);
        assert_eq!(past.rates(&key), Some(rates));
        past.take(&node(&[client(7, 9_000, 0)]), Duration::from_secs(14), LEAST);
        assert_eq!(past.rates(&key).unwrap().bytes_in, 2_000.0);
    }

    #[test]
    fn another_client_in_the_same_slot_begins_anew_and_the_past_of_the_old_one_is_forgotten() {
        let mut past = Past::default();
        for second in 0..3 {
            past.take(&node(&[client(7, 1_000 * second, 0)]), Duration::from_secs(second), LEAST);
        }
        let (old, new) = (7, 8);
        let key = |pid| ClientKey { gpu: "GPU-1".into(), slot: 0, pid };
        assert!(past.client(&key(old)).is_some());
        past.take(&node(&[client(8, 1 << 40, 1 << 40)]), Duration::from_secs(3), LEAST);
        assert_eq!((past.rates(&key(new)), past.client(&key(old))), (None, None));
        // Whatever a hostile page counts, a part is a part.
        past.take(&node(&[client(8, 0, u64::MAX)]), Duration::from_secs(4), LEAST);
        let rates = past.rates(&key(new)).unwrap();
        assert_eq!((rates.bytes_in, rates.time), (0.0, 1.0));
    }

    /// An embedder takes no compute turns, also where the shares differ.
    #[test]
    fn the_time_of_who_takes_no_turns_is_what_the_policy_says() {
        let shares =
            |turns, gpu_ns| Client { takes_turns: true, turns, gpu_ns, ..client(7, 0, gpu_ns + turns) };
        let between = |turns| Rates::between(&shares(turns, 0), &shares(turns, 400_000_000), 1.0).time;
        assert_eq!((between(0), between(9)), (0.4, 0.4));
        let charged = Client { charged_ns: 900_000_000, ..shares(0, 0) };
        assert_eq!(Rates::between(&shares(0, 0), &charged, 1.0).time, 0.9);
    }

    #[test]
    fn only_the_latest_figures_are_kept() {
        let mut ring = Ring::default();
        (0..KEPT + 5).for_each(|value| ring.push(value as f64));
        assert_eq!(ring.latest(3).collect::<Vec<_>>(), [602.0, 603.0, 604.0]);
        assert_eq!(ring.latest(usize::MAX).count(), KEPT);
        assert_eq!(ring.largest(2), 604.0);
    }
}
