//! All definitions, for people who want to know what a field means and for programs that read the JSON.

use crate::definition::{Field, Kind, Statistics};
use crate::model::{Client, Gpu, Node, SCHEMA_VERSION, Switch};
use serde::Serialize;

/// One statistic, described.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldDescription {
    /// Its name in JSON.
    pub name: &'static str,
    /// gauge, counter, flag, state, identity, text or list.
    pub kind: &'static str,
    /// Its unit; null if it has none.
    pub unit: Option<&'static str>,
    /// The words that it can be; null if it is no state.
    pub states: Option<&'static [&'static str]>,
    /// Its name among metrics; null if it is not one of them.
    pub metric: Option<String>,
    /// What it says.
    pub description: &'static str,
}

/// All statistics of a node, a GPU, a client or a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SubjectDescription {
    /// Whose they are.
    pub subject: &'static str,
    /// What that is.
    pub description: &'static str,
    /// The statistics.
    pub fields: Vec<FieldDescription>,
}

/// All definitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The version of the JSON that they describe.
    pub schema_version: u32,
    /// By what they are of.
    pub subjects: Vec<SubjectDescription>,
}

/// All definitions.
pub fn describe() -> Description {
    // Switches are shown and counted; each by itself is no metric.
    let subjects = vec![of::<Node>(true), of::<Gpu>(true), of::<Client>(true), of::<Switch>(false)];
    Description { schema_version: SCHEMA_VERSION, subjects }
}

fn of<T: Statistics>(metrics: bool) -> SubjectDescription {
    let field = |field: &Field| {
        let unit = field.unit().name();
        FieldDescription {
            name: field.name,
            kind: field.kind().name(),
            unit: (!unit.is_empty()).then_some(unit),
            states: if let Kind::State(words) = field.kind() { Some(words) } else { None },
            metric: metrics.then(|| field.metric(T::SUBJECT)).flatten(),
            description: field.description,
        }
    };
    let fields = T::FIELDS.iter().map(field).collect();
    SubjectDescription { subject: T::SUBJECT, description: T::ABOUT, fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_described_with_unit_states_and_metric() {
        let all = describe();
        let find = |subject: &str, name: &str| {
            let of = all.subjects.iter().find(|of| of.subject == subject).unwrap();
            of.fields.iter().find(|field| field.name == name).unwrap().clone()
        };
        let resident = find("client", "resident_bytes");
        assert_eq!((resident.kind, resident.unit), ("gauge", Some("bytes")));
        assert_eq!(resident.metric.as_deref(), Some("nvshare_client_resident_bytes"));
        assert_eq!(find("client", "phase").states, Some(crate::model::PHASES));
        assert_eq!(find("switch", "took_ns").metric, None);
        assert_eq!(find("gpu", "repaired").metric.as_deref(), Some("nvshare_gpu_repairs_total"));
    }
}
