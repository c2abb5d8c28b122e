//! What a statistic is: name, unit, kind and description, at the field that holds it.
//!
//! [`statistics!`](crate::statistics) makes a plain struct and, of the same lines, the list of its [`Field`]s. The field's name is its
//! name in JSON, its documentation is its description, and what stands behind `=>` is its [`Shape`]. Whatever shows statistics
//! (`nvshare status`, its JSON, metrics, the page) goes through [`Statistics`] and needs no list of its own.

use std::fmt;

/// What a number counts, in which it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Things, such as clients or turns.
    Count,
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Nanoseconds.
    Nanoseconds,
    /// A part of a whole, 0 to 1.
    Ratio,
    /// Degrees Celsius.
    Celsius,
    /// Watts.
    Watts,
}

impl Unit {
    /// The unit as it is written behind a number; empty for things that are counted.
    pub fn name(self) -> &'static str {
        match self {
            Self::Count => "",
            Self::Bytes => "bytes",
            Self::BytesPerSecond => "bytes/s",
            Self::Nanoseconds => "ns",
            Self::Ratio => "0 to 1",
            Self::Celsius => "degrees Celsius",
            Self::Watts => "W",
        }
    }

    /// The unit in a metric's name, which is a base unit (Prometheus' naming conventions); empty for things that are counted.
    pub fn in_metrics(self) -> &'static str {
        match self {
            Self::Count => "",
            Self::Bytes => "bytes",
            Self::BytesPerSecond => "bytes_per_second",
            Self::Nanoseconds => "seconds",
            Self::Ratio => "ratio",
            Self::Celsius => "celsius",
            Self::Watts => "watts",
        }
    }

    /// A number of this unit in the unit of metrics.
    pub fn scale(self, value: f64) -> f64 {
        if self == Self::Nanoseconds { value / 1e9 } else { value }
    }
}

/// What kind of thing a statistic is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number that rises and falls.
    Gauge(Unit),
    /// A number that only rises, from when its subject began.
    Counter(Unit),
    /// Yes or no.
    Flag,
    /// One of these words.
    State(&'static [&'static str]),
    /// Tells its subject from others.
    Identity,
    /// Text that says something about its subject.
    Text,
    /// Several things.
    List,
}

impl Kind {
    /// The kind, as `nvshare status --describe` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gauge(_) => "gauge",
            Self::Counter(_) => "counter",
            Self::Flag => "flag",
            Self::State(_) => "state",
            Self::Identity => "identity",
            Self::Text => "text",
            Self::List => "list",
        }
    }

    /// The unit of a number; [`Unit::Count`] of all else.
    pub fn unit(self) -> Unit {
        match self {
            Self::Gauge(unit) | Self::Counter(unit) => unit,
            _ => Unit::Count,
        }
    }
}

/// A field's kind, and its name among metrics where that is not made of the field's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    kind: Kind,
    metric: Option<&'static str>,
}

impl Shape {
    const fn of(kind: Kind) -> Self {
        Self { kind, metric: None }
    }

    /// The same under another name among metrics: without the subject before it, and without unit and `_total` behind it.
    #[must_use]
    pub const fn named(self, metric: &'static str) -> Self {
        Self { metric: Some(metric), ..self }
    }
}

/// A number that rises and falls.
pub const fn gauge(unit: Unit) -> Shape {
    Shape::of(Kind::Gauge(unit))
}

/// A number that only rises.
pub const fn counter(unit: Unit) -> Shape {
    Shape::of(Kind::Counter(unit))
}

/// Yes or no.
pub const fn flag() -> Shape {
    Shape::of(Kind::Flag)
}

/// One of these words.
pub const fn state(words: &'static [&'static str]) -> Shape {
    Shape::of(Kind::State(words))
}

/// What tells a subject from others.
pub const fn identity() -> Shape {
    Shape::of(Kind::Identity)
}

/// Text about a subject.
pub const fn text() -> Shape {
    Shape::of(Kind::Text)
}

/// Several things.
pub const fn list() -> Shape {
    Shape::of(Kind::List)
}

/// The definition of one statistic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Its name, in the struct and in JSON.
    pub name: &'static str,
    /// What it says, as a sentence.
    pub description: &'static str,
    shape: Shape,
}

impl Field {
    /// The definition that these three make.
    pub const fn new(name: &'static str, description: &'static str, shape: Shape) -> Self {
        // A line of documentation begins with a space.
        Self { name, description: description.trim_ascii(), shape }
    }

    /// What kind of thing it is.
    pub fn kind(&self) -> Kind {
        self.shape.kind
    }

    /// Its unit.
    pub fn unit(&self) -> Unit {
        self.shape.kind.unit()
    }

    /// Its name among metrics, such as `nvshare_client_resident_bytes` or `nvshare_client_run_seconds_total`. `subject` is what
    /// it is a statistic of. `None`: it is no number and no state.
    pub fn metric(&self, subject: &str) -> Option<String> {
        let total = match self.shape.kind {
            Kind::Counter(_) => "_total",
            Kind::Gauge(_) | Kind::Flag | Kind::State(_) => "",
            Kind::Identity | Kind::Text | Kind::List => return None,
        };
        let stem = self.metric_stem(subject)?;
        Some(format!("{stem}{total}"))
    }

    /// As [`Field::metric`], without the `_total` of a counter.
    pub fn metric_stem(&self, subject: &str) -> Option<String> {
        if matches!(self.shape.kind, Kind::Identity | Kind::Text | Kind::List) {
            return None;
        }
        let unit = self.unit().in_metrics();
        let own = ["_bytes", "_ns", "_ratio", "_celsius", "_watts"];
        let name = self.shape.metric.unwrap_or_else(|| {
            own.iter().find_map(|suffix| self.name.strip_suffix(suffix)).unwrap_or(self.name)
        });
        let gap = if unit.is_empty() { "" } else { "_" };
        Some(format!("nvshare_{subject}_{name}{gap}{unit}"))
    }
}

/// What a field holds at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Nothing: it is not known, or does not apply.
    Absent,
    /// A whole number.
    Unsigned(u64),
    /// A whole number that may be negative.
    Signed(i64),
    /// Any other number.
    Real(f64),
    /// Yes or no.
    Flag(bool),
    /// A word or a text.
    Text(&'a str),
    /// So many things.
    List(usize),
}

impl Value<'_> {
    /// The number in a field's own unit, with yes as 1. `None` if there is none.
    pub fn number(self) -> Option<f64> {
        match self {
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            Self::Real(value) => Some(value),
            Self::Flag(value) => Some(f64::from(u8::from(value))),
            Self::Absent | Self::Text(_) | Self::List(_) => None,
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => Ok(()),
            Self::Unsigned(value) => value.fmt(out),
            Self::Signed(value) => value.fmt(out),
            Self::Real(value) => value.fmt(out),
            Self::Flag(value) => value.fmt(out),
            Self::Text(value) => value.fmt(out),
            Self::List(count) => count.fmt(out),
        }
    }
}

/// What can stand in a field.
pub trait Valued {
    /// What stands there now.
    fn value(&self) -> Value<'_>;
}

macro_rules! valued {
    ($($type:ty => $variant:ident as $as:ty),*) => {
        $(impl Valued for $type {
            fn value(&self) -> Value<'_> {
                Value::$variant(*self as $as)
            }
        })*
    };
}

valued!(u64 => Unsigned as u64, u32 => Unsigned as u64, usize => Unsigned as u64, i64 => Signed as i64, f64 => Real as f64, bool => Flag as bool);

impl Valued for String {
    fn value(&self) -> Value<'_> {
        Value::Text(self)
    }
}

impl<T: Valued> Valued for Option<T> {
    fn value(&self) -> Value<'_> {
        self.as_ref().map_or(Value::Absent, Valued::value)
    }
}

impl<T> Valued for Vec<T> {
    fn value(&self) -> Value<'_> {
        Value::List(self.len())
    }
}

/// Something that statistics are of: a node, a GPU, a client.
pub trait Statistics {
    /// What it is, in one word: the part of a metric's name that says whose it is.
    const SUBJECT: &'static str;
    /// What it is, as a sentence.
    const ABOUT: &'static str;
    /// All its statistics, in the order in which the struct has them.
    const FIELDS: &'static [Field];

    /// What its fields hold, in the order of [`Statistics::FIELDS`].
    fn values(&self) -> Vec<Value<'_>>;

    /// The fields, each with what it holds.
    fn statistics(&self) -> impl Iterator<Item = (&'static Field, Value<'_>)> {
        Self::FIELDS.iter().zip(self.values())
    }
}

/// Defines a struct of statistics: a plain struct with the fields as they stand there, public, and its [`Statistics`].
///
/// ```
/// use nvshare_stats::definition::{Statistics, Unit, counter};
///
/// nvshare_stats::statistics! {
///     /// A kettle.
///     pub struct Kettle: "kettle" {
///         /// Water that it has boiled.
///         boiled_bytes: u64 => counter(Unit::Bytes),
///     }
/// }
/// let field = &Kettle::FIELDS[0];
/// assert_eq!(field.description, "Water that it has boiled.");
/// assert_eq!(field.metric(Kettle::SUBJECT).unwrap(), "nvshare_kettle_boiled_bytes_total");
/// ```
#[macro_export]
macro_rules! statistics {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident: $subject:literal {
            $($(#[doc = $doc:literal])+ $field:ident: $type:ty => $shape:expr,)*
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Default, PartialEq, ::serde::Serialize, ::serde::Deserialize)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
        }

        impl $crate::definition::Statistics for $name {
            const SUBJECT: &'static str = $subject;
            const ABOUT: &'static str = concat!($($about),+).trim_ascii();
            const FIELDS: &'static [$crate::definition::Field] = &[
                $($crate::definition::Field::new(stringify!($field), concat!($($doc),+), $shape),)*
            ];

            fn values(&self) -> Vec<$crate::definition::Value<'_>> {
                vec![$($crate::definition::Valued::value(&self.$field)),*]
            }
        }
    };
}
