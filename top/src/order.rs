//! Which clients are shown, and in which order.

use crate::rates::{ClientKey, Past, Rates};
use nvshare_stats::{Client, Gpu, Node};
use std::cmp::Ordering;

/// What the clients are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sort {
    /// GPU, then slot.
    #[default]
    Gpu,
    /// Process.
    Pid,
    /// Name.
    Name,
    /// The part of the GPU's time, the most first.
    Time,
    /// Memory that it needs, the most first.
    Memory,
    /// How long it has waited, the longest first.
    Waiting,
    /// Bytes that it has copied lately, the most first.
    Link,
    /// Weight, the largest first.
    Weight,
}

impl Sort {
    /// All, in the order in which a key goes through them.
    pub const ALL: [Self; 8] =
        [Self::Gpu, Self::Pid, Self::Name, Self::Time, Self::Memory, Self::Waiting, Self::Link, Self::Weight];

    /// As the screen calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "GPU",
            Self::Pid => "pid",
            Self::Name => "name",
            Self::Time => "GPU time",
            Self::Memory => "memory",
            Self::Waiting => "waiting",
            Self::Link => "link",
            Self::Weight => "weight",
        }
    }

    /// So many further on, around the end.
    #[must_use]
    pub fn step(self, by: isize) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or(0) as isize;
        Self::ALL[(at + by).rem_euclid(Self::ALL.len() as isize) as usize]
    }
}

/// What is shown, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    /// What the clients are sorted by.
    pub sort: Sort,
    /// The other way round.
    pub reverse: bool,
    /// Only clients in whose line this text is, in small or capital letters; empty: all.
    pub filter: String,
    /// Only this GPU, by its place on the screen.
    pub gpu: Option<usize>,
}

/// A client, and what goes with it.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The place of its GPU on the screen.
    pub place: usize,
    /// Its GPU.
    pub gpu: &'a Gpu,
    /// The client.
    pub client: &'a Client,
    /// What it does now, as soon as that is known.
    pub rates: Option<Rates>,
}

impl Row<'_> {
    /// The client's key.
    pub fn key(&self) -> ClientKey {
        ClientKey::of(self.gpu, self.client)
    }

    /// The GPU's number, as far as it is known; else its place on the screen.
    pub fn index(&self) -> u32 {
        self.gpu.index.unwrap_or(self.place as u32)
    }

    fn contains(&self, text: &str) -> bool {
        let Client { name, user, container, pod, namespace, phase, pid, .. } = self.client;
        let texts =
            [Some(name), user.as_ref(), container.as_ref(), pod.as_ref(), namespace.as_ref(), Some(phase)];
        texts.into_iter().flatten().any(|word| word.to_lowercase().contains(text)) || pid.to_string() == text
    }

    fn compare(&self, other: &Self, sort: Sort) -> Ordering {
        let (own, others) = (self.client, other.client);
        let rate = |row: &Self, figure: fn(Rates) -> f64| row.rates.map_or(0.0, figure);
        let by_rate = |figure| rate(other, figure).total_cmp(&rate(self, figure));
        match sort {
            Sort::Gpu => Ordering::Equal,
            Sort::Pid => own.pid.cmp(&others.pid),
            Sort::Name => own.name.cmp(&others.name),
            Sort::Time => by_rate(|rates| rates.time),
            Sort::Memory => others.demand_bytes.cmp(&own.demand_bytes),
            Sort::Waiting => others.waiting_ns.cmp(&own.waiting_ns),
            Sort::Link => by_rate(|rates| rates.bytes_in + rates.bytes_out),
            Sort::Weight => others.weight.cmp(&own.weight),
        }
    }
}

/// The clients that are shown, in their order.
pub fn rows<'a>(node: &'a Node, past: &Past, choice: &Choice) -> Vec<Row<'a>> {
    let wanted = choice.filter.to_lowercase();
    let mut rows: Vec<_> = node
        .gpus
        .iter()
        .enumerate()
        .filter(|(place, _)| choice.gpu.is_none_or(|only| only == *place))
        .flat_map(|(place, gpu)| {
            gpu.clients.iter().map(move |client| {
                let rates = past.rates(&ClientKey::of(gpu, client));
                Row { place, gpu, client, rates }
            })
        })
        .filter(|row| wanted.is_empty() || row.contains(&wanted))
        .collect();
    // A stable sort: equals stay in the order of GPU and slot, so the lines do not jump about.
    rows.sort_by(|one, other| one.compare(other, choice.sort));
    if choice.reverse {
        rows.reverse();
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn node(bytes: u64) -> Node {
        let client = |slot, name: &str, demand_bytes, waiting_ns, weight| Client {
            slot,
            pid: 10 + slot as u32,
            name: name.into(),
            demand_bytes,
            waiting_ns,
            weight,
            bytes_in: bytes * slot as u64,
            ..Client::default()
        };
        let gpu = |uuid: &str, clients: Vec<Client>| Gpu { uuid: uuid.into(), clients, ..Gpu::default() };
        let first = vec![client(0, "train", 30, None, 100), client(3, "Notebook", 10, Some(5), 300)];
        Node {
            gpus: vec![gpu("a", first), gpu("b", vec![client(1, "serve", 20, Some(9), 100)])],
            ..Node::default()
        }
    }

    fn slots(choice: &Choice) -> Vec<usize> {
        let mut past = Past::default();
        past.take(&node(0), Duration::ZERO, Duration::ZERO);
        past.take(&node(100), Duration::from_secs(1), Duration::ZERO);
        rows(&node(100), &past, choice).iter().map(|row| row.client.slot).collect()
    }

    #[test]
    fn clients_are_sorted_by_what_was_chosen() {
        let by = |sort| slots(&Choice { sort, ..Choice::default() });
        assert_eq!(by(Sort::Gpu), [0, 3, 1]);
        assert_eq!(by(Sort::Pid), [0, 1, 3]);
        assert_eq!(by(Sort::Memory), [0, 1, 3]);
        assert_eq!(by(Sort::Waiting), [1, 3, 0]);
        assert_eq!(by(Sort::Link), [3, 1, 0]);
        assert_eq!(by(Sort::Weight), [3, 0, 1]);
        assert_eq!(slots(&Choice { reverse: true, ..Choice::default() }), [1, 3, 0]);
    }

    #[test]
    fn a_filter_finds_names_pids_and_phases() {
        let with = |filter: &str| slots(&Choice { filter: filter.into(), ..Choice::default() });
        assert_eq!(with("NOTE"), [3]);
        assert_eq!(with("11"), [1]);
        assert_eq!(with("1"), [] as [usize; 0], "a pid is meant as a whole");
        assert_eq!(slots(&Choice { gpu: Some(1), ..Choice::default() }), [1]);
    }

    #[test]
    fn a_key_goes_through_all_orders_and_back() {
        let all: Vec<_> = (0..8).map(|step| Sort::Gpu.step(step)).collect();
        assert_eq!(all, Sort::ALL);
        assert_eq!(Sort::Gpu.step(-1), Sort::Weight);
    }
}
