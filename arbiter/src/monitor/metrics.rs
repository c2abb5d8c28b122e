//! Metrics in Prometheus' text format: every statistic of the one definition ([`nvshare_stats::model`]) that is a number or a state,
//! and what only this arbiter knows.

use super::durations::{AllDurations, HISTOGRAMS};
use super::tallies::{TALLIES, Tallies};
use nvshare::units::GpuUuid;
use nvshare_stats::definition::{Field, Kind, Statistics, Unit, Value};
use nvshare_stats::{Client, Gpu, Node};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

/// The media type of what [`text`] returns.
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// What metrics are made of, at a moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The pages.
    pub node: Node,
    /// The histograms.
    pub durations: AllDurations,
    /// What the arbiter has counted, by GPU.
    pub tallies: BTreeMap<GpuUuid, Arc<Tallies>>,
    /// Events of clients that were overwritten before they were read, by GPU.
    pub lost: BTreeMap<GpuUuid, u64>,
    /// When the arbiter started, seconds since 1970.
    pub started: f64,
}

/// The metrics as text.
///
/// # Errors
/// None: writing to a string does not fail.
pub fn text(sample: Sample) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(Mutex::new(sample))));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

/// A metric that is no statistic of the one definition: its name without `_total`, its kind, and what it says.
type Own = (&'static str, Kind, &'static str);

const INFO: Kind = Kind::Gauge(Unit::Count);

const BUILD_INFO: Own = ("nvshare_build_info", INFO, "1. Its label is the release of the arbiter.");
const START_TIME: Own =
    ("nvshare_arbiter_start_time_seconds", INFO, "When the arbiter started, seconds since 1970.");
const GPU_INFO: Own = ("nvshare_gpu_info", INFO, "1. Its labels say what is known of a GPU.");
const CLIENT_INFO: Own = ("nvshare_client_info", INFO, "1. Its labels say what is known of a client.");
const LOST_EVENTS: Own = (
    "nvshare_gpu_journal_lost_events",
    Kind::Counter(Unit::Count),
    "Events of clients that were overwritten before the arbiter read them: durations between them are in no histogram.",
);

/// All of them.
const OWN: [Own; 5] = [BUILD_INFO, START_TIME, GPU_INFO, CLIENT_INFO, LOST_EVENTS];

type Labels = Vec<(&'static str, String)>;

/// The labels that every metric of a GPU has.
fn gpu_labels(gpu: &Gpu) -> Labels {
    vec![("gpu", gpu.uuid.clone()), ("index", gpu.index.map(|index| index.to_string()).unwrap_or_default())]
}

/// The labels that every metric of a client has: its GPU, its slot, which is its alone, and who it is.
fn client_labels(gpu: &Gpu, client: &Client) -> Labels {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut labels = gpu_labels(gpu);
    labels.extend([
        ("slot", client.slot.to_string()),
        ("pid", client.pid.to_string()),
        ("client", client.name.clone()),
        ("namespace", text(&client.namespace)),
        ("pod", text(&client.pod)),
        ("container", text(&client.container)),
    ]);
    labels
}

/// A subject's texts as further labels: a field's name, and what it says.
fn texts<T: Statistics>(subject: &T) -> impl Iterator<Item = (&'static str, String)> {
    let texts = subject.statistics().filter(|(field, _)| field.kind() == Kind::Text);
    texts.map(|(field, value)| (field.name, value.to_string()))
}

/// Wraps the sample, because a collector must be shareable between threads and histograms are made when they are first asked for.
#[derive(Debug)]
struct Metrics(Mutex<Sample>);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let sample = &mut *nvshare::sync::lock(&self.0);
        let node = &sample.node;
        let gpus: Vec<_> = node.gpus.iter().map(|gpu| (gpu_labels(gpu), gpu)).collect();
        let clients: Vec<_> = node
            .gpus
            .iter()
            .flat_map(|gpu| gpu.clients.iter().map(move |client| (client_labels(gpu, client), client)))
            .collect();
        subjects(&mut encoder, &[(Labels::new(), node)])?;
        subjects(&mut encoder, &gpus)?;
        subjects(&mut encoder, &clients)?;
        info(&mut encoder, BUILD_INFO, [vec![("version", node.release.clone())]])?;
        own(&mut encoder, START_TIME, [(Labels::new(), sample.started)])?;
        let known = |labels: &Labels, texts: Vec<_>| labels.iter().cloned().chain(texts).collect::<Labels>();
        info(&mut encoder, GPU_INFO, gpus.iter().map(|(labels, gpu)| known(labels, texts(*gpu).collect())))?;
        let user = |client: &Client| client.uid.map(|uid| ("uid", uid.to_string()));
        info(
            &mut encoder,
            CLIENT_INFO,
            clients.iter().map(|(labels, client)| {
                // Its name is a label of all its metrics, and so are these.
                let others = texts(*client).filter(|(name, _)| labels.iter().all(|(label, _)| label != name));
                known(labels, others.chain(user(client)).collect())
            }),
        )?;
        let uuids: Vec<_> = gpus
            .iter()
            .filter_map(|(labels, gpu)| Some((labels, gpu.uuid.parse::<GpuUuid>().ok()?)))
            .collect();
        let lost = |gpu| sample.lost.get(gpu).copied().unwrap_or(0) as f64;
        own(&mut encoder, LOST_EVENTS, uuids.iter().map(|(labels, gpu)| ((*labels).clone(), lost(gpu))))?;
        for (name, kind, help, read) in TALLIES {
            let mut family = encoder.encode_descriptor(name, help, None, metric_type(kind))?;
            for (labels, gpu) in &uuids {
                let value = sample.tallies.get(gpu).map_or(0, |tallies| read(tallies));
                number(kind, value as f64, family.encode_family(*labels)?)?;
            }
        }
        for (name, help, histogram) in HISTOGRAMS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (labels, gpu) in &uuids {
                histogram(sample.durations.of(*gpu)).encode(family.encode_family(*labels)?)?;
            }
        }
        Ok(())
    }
}

/// The metrics of all subjects of a kind, a family for each field. A family is there also if none has a value: so whoever looks
/// finds all there are.
fn subjects<T: Statistics>(encoder: &mut DescriptorEncoder, subjects: &[(Labels, &T)]) -> fmt::Result {
    let values: Vec<_> = subjects.iter().map(|(labels, subject)| (labels, subject.values())).collect();
    for (index, field) in T::FIELDS.iter().enumerate() {
        let Some(name) = field.metric_stem(T::SUBJECT) else { continue };
        let mut family =
            encoder.encode_descriptor(&name, field.description, None, metric_type(field.kind()))?;
        for (labels, values) in &values {
            let value = values[index];
            // A number that is not known makes no line, and a state that does not apply makes zeros.
            if let Kind::State(words) = field.kind() {
                for word in words {
                    let mut labels = Labels::clone(labels);
                    labels.push((field.name, (*word).into()));
                    let is = value == Value::Text(word);
                    number(field.kind(), f64::from(u8::from(is)), family.encode_family(&labels)?)?;
                }
            } else if let Some(value) = value.number() {
                number(field.kind(), field.unit().scale(value), family.encode_family(*labels)?)?;
            }
        }
    }
    Ok(())
}

fn metric_type(kind: Kind) -> MetricType {
    if matches!(kind, Kind::Counter(_)) { MetricType::Counter } else { MetricType::Gauge }
}

fn number(kind: Kind, value: f64, encoder: MetricEncoder) -> fmt::Result {
    if matches!(kind, Kind::Counter(_)) {
        ConstCounter::new(value).encode(encoder)
    } else {
        ConstGauge::new(value).encode(encoder)
    }
}

fn own(
    encoder: &mut DescriptorEncoder,
    (name, kind, help): Own,
    values: impl IntoIterator<Item = (Labels, f64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, metric_type(kind))?;
    for (labels, value) in values {
        number(kind, value, family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn info(encoder: &mut DescriptorEncoder, which: Own, all: impl IntoIterator<Item = Labels>) -> fmt::Result {
    own(encoder, which, all.into_iter().map(|labels| (labels, 1.0)))
}

/// What a metric is: its name, its type, and what it says. For the documents.
pub fn all() -> Vec<(String, &'static str, &'static str)> {
    let kind = |kind: Kind| if matches!(kind, Kind::Counter(_)) { "counter" } else { "gauge" };
    let total = |kind: Kind| if matches!(kind, Kind::Counter(_)) { "_total" } else { "" };
    let of = |fields: &'static [Field], subject: &'static str| {
        fields
            .iter()
            .filter_map(move |field| Some((field.metric(subject)?, kind(field.kind()), field.description)))
    };
    let own = OWN.into_iter().chain(TALLIES.map(|(name, kind, help, _)| (name, kind, help)));
    let own = own.map(|(name, of, help)| (format!("{name}{}", total(of)), kind(of), help));
    let histograms = HISTOGRAMS.iter().map(|(name, help, _)| ((*name).to_owned(), "histogram", *help));
    of(Node::FIELDS, Node::SUBJECT)
        .chain(of(Gpu::FIELDS, Gpu::SUBJECT))
        .chain(of(Client::FIELDS, Client::SUBJECT))
        .chain(own)
        .chain(histograms)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        let client = Client {
            slot: 3,
            pid: 42,
            name: "a\"b\\c".into(),
            phase: "running".into(),
            priority: "normal".into(),
            run_ns: 1_500_000_000,
            bytes_in: 7,
            pod: Some("train".into()),
            user: Some("someone".into()),
            ..Client::default()
        };
        let gpu = Gpu {
            uuid: GpuUuid([1; 16]).to_string(),
            index: Some(2),
            free_bytes: -4,
            clients: vec![client],
            ..Gpu::default()
        };
        Sample {
            node: Node { gpus: vec![gpu], ..Node::default() },
            durations: AllDurations::default(),
            tallies: BTreeMap::new(),
            lost: BTreeMap::new(),
            started: 5.0,
        }
    }

    fn line<'a>(text: &'a str, begin: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{begin}: {text}"))
    }

    #[test]
    fn numbers_are_in_base_units_with_labels_that_say_whose_they_are() {
        let text = text(sample()).unwrap();
        let run = line(&text, "nvshare_client_run_seconds_total{");
        assert!(run.ends_with("} 1.5"), "{run}");
        for label in [
            "index=\"2\"",
            "slot=\"3\"",
            "pid=\"42\"",
            r#"client="a\"b\\c""#,
            "pod=\"train\"",
            "namespace=\"\"",
        ] {
            assert!(run.contains(label), "{label}: {run}");
        }
        assert!(line(&text, "nvshare_gpu_free_bytes{").ends_with(" -4.0"));
        assert!(line(&text, "nvshare_client_info{").contains("user=\"someone\""));
        let states: Vec<_> = text.lines().filter(|line| line.starts_with("nvshare_client_phase{")).collect();
        assert_eq!(states.len(), 6);
        let is = |state: &&&str| state.ends_with(" 1.0");
        assert_eq!(states.iter().filter(is).count(), 1);
        assert!(states.iter().find(is).unwrap().contains("phase=\"running\""));
    }

    #[test]
    fn what_is_not_known_is_no_line() {
        let text = text(sample()).unwrap();
        for name in [
            "nvshare_gpu_utilization_ratio",
            "nvshare_client_waiting_seconds",
            "nvshare_client_memory_limit_bytes",
        ] {
            assert!(!text.lines().any(|line| line.starts_with(name)), "{name}");
            assert!(text.contains(&format!("# TYPE {name} gauge")), "{name}");
        }
    }

    #[test]
    fn every_metric_is_described_once_and_none_is_left_out_of_the_list() {
        let listed: Vec<_> = all().into_iter().map(|(name, ..)| name).collect();
        let unique: std::collections::BTreeSet<_> = listed.iter().collect();
        assert_eq!(unique.len(), listed.len());
        for line in text(sample()).unwrap().lines().filter(|line| line.starts_with("# TYPE")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(listed.iter().any(|listed| listed == name), "{name} is in no list");
        }
    }
}
