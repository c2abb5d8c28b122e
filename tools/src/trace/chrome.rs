//! The Trace Event Format, which Perfetto and Chrome's viewer read ("Trace Event Format", Google, 2016): a process is a GPU, a
//! thread is a slot, and every span is a complete event. Times are in us since the machine started.

use super::Lived;
use nvshare::page::Stall;
use nvshare::timeline::Activity;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The trace as one JSON object.
pub fn trace(gpus: &[String], lived: &[Lived]) -> String {
    let mut events: Vec<Value> = gpus
        .iter()
        .enumerate()
        .map(|(gpu, uuid)| json!({"ph": "M", "pid": gpu, "name": "process_name", "args": {"name": uuid}}))
        .collect();
    let mut names: BTreeMap<(usize, usize), String> = BTreeMap::new();
    for Lived { gpu, slot, span, name } in lived {
        let title =
            if name.is_empty() { format!("pid {}", span.pid) } else { format!("{name} ({})", span.pid) };
        names.insert((*gpu, *slot), title);
    }
    for ((gpu, slot), name) in names {
        events
            .push(json!({"ph": "M", "pid": gpu, "tid": slot, "name": "thread_name", "args": {"name": name}}));
    }
    events.extend(lived.iter().map(event));
    json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string()
}

fn event(Lived { gpu, slot, span, .. }: &Lived) -> Value {
    let mut args = json!({"pid": span.pid});
    if span.bytes > 0 {
        args["bytes"] = span.bytes.into();
    }
    if let Some(why) = span.why {
        args["why"] = why.name().into();
    }
    if let Activity::Stalled(stall) = span.activity
        && stall != Stall::None
    {
        args["why"] = stall.name().into();
    }
    json!({
        "ph": "X",
        "pid": gpu,
        "tid": slot,
        "name": span.activity.name(),
        "ts": span.begun as f64 / 1e3,
        "dur": span.length() as f64 / 1e3,
        "args": args,
    })
}
