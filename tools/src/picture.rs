//! What clients did when, as an SVG that needs nothing beside it: simulated (`nvshare sim --svg`) or real (`nvshare trace`).

use nvshare::units::Nanos;
use std::fmt::Write;

/// What a client is doing, as the picture shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It has nothing to do, whether it has the GPU or not.
    Idle,
    /// It wants the GPU.
    Waiting,
    /// Its memory comes in; of Unified Memory: it runs, and pages fault.
    Filling,
    /// It has the GPU and works.
    Running,
    /// It pauses, and keeps the GPU while others wait.
    Kept,
    /// It gives way, and its work in flight goes on.
    Draining,
    /// It makes room.
    Evicting,
}

/// A span of a client's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// When it began, ns after the picture's beginning.
    pub from: Nanos,
    /// When it ended, ns after the picture's beginning.
    pub to: Nanos,
    /// What the client did.
    pub state: State,
}

/// One client's row.
#[derive(Debug, Clone)]
pub struct Lane {
    /// The rows of one group stand together, below its name.
    pub group: String,
    /// What stands before the row.
    pub label: String,
    /// Where one covers another, the later one is seen.
    pub segments: Vec<Segment>,
    /// What stands behind the row; often nothing.
    pub remark: &'static str,
}

/// More lanes than that nobody can read; the picture says what it leaves out.
const MOST_LANES: usize = 120;
const LEFT: f64 = 150.0;
const WIDTH: f64 = 1_200.0;
const TOP: f64 = 64.0;
const LANE: f64 = 16.0;
const BAR: f64 = 12.0;
const GAP: f64 = 26.0;
/// What is narrower is drawn with its neighbour.
const HAIR: f64 = 0.2;

const LEGEND: [(State, &str, &str); 7] = [
    (State::Idle, "idle", "#fff"),
    (State::Waiting, "waiting", "#d9d9d9"),
    (State::Filling, "filling", "#4e9bd6"),
    (State::Running, "running", "#3a9d5d"),
    (State::Kept, "kept", "#a58fc9"),
    (State::Draining, "draining", "#e0b83c"),
    (State::Evicting, "evicting", "#c9583e"),
];

/// Draws the lanes, those of a group one after the other, over so many ns.
pub fn draw(title: &str, lanes: &[Lane], time: Nanos) -> String {
    let left_out = lanes.len().saturating_sub(MOST_LANES);
    let lanes = &lanes[..lanes.len() - left_out];
    let groups = lanes.chunk_by(|one, next| one.group == next.group).count();
    let height = TOP + lanes.len() as f64 * LANE + groups as f64 * GAP + 50.0;
    let mut out = String::new();
    let remarks = lanes.iter().any(|lane| !lane.remark.is_empty());
    let full = LEFT + WIDTH + if remarks { 75.0 } else { 30.0 };
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{full:.0}" height="{height:.0}" viewBox="0 0 {full:.0} {height:.0}" font-family="sans-serif" font-size="11" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="10" y="20" font-size="15">{}</text>"##,
        escape(title)
    );
    legend(&mut out);
    let scale = WIDTH / time.max(1) as f64;
    let (mut y, mut group) = (TOP, None);
    for lane in lanes {
        if group != Some(&lane.group) {
            group = Some(&lane.group);
            y += GAP;
            let _ = writeln!(
                out,
                r#"<text x="10" y="{:.1}" font-size="12" font-weight="bold">{}</text>"#,
                y - 7.0,
                escape(&lane.group)
            );
        }
        let _ = writeln!(
            out,
            r#"<text x="{:.0}" y="{:.1}" text-anchor="end">{}</text>"#,
            LEFT - 8.0,
            y + 10.0,
            escape(&lane.label)
        );
        for (from, to, color) in bars(&lane.segments, scale) {
            let _ = writeln!(
                out,
                r#"<rect x="{:.2}" y="{y:.1}" width="{:.2}" height="{BAR}" fill="{color}"/>"#,
                LEFT + from,
                to - from
            );
        }
        if !lane.remark.is_empty() {
            let _ = writeln!(
                out,
                r#"<text x="{:.0}" y="{:.1}">{}</text>"#,
                LEFT + WIDTH + 8.0,
                y + 10.0,
                lane.remark
            );
        }
        y += LANE;
    }
    axis(&mut out, time, y + 6.0);
    if left_out > 0 {
        let _ = writeln!(
            out,
            r#"<text x="10" y="{:.1}">{left_out} more clients are not drawn.</text>"#,
            y + 40.0
        );
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String) {
    for (index, (_, name, color)) in LEGEND.iter().enumerate() {
        let x = LEFT + 90.0 * index as f64;
        let _ = writeln!(
            out,
            r##"<rect x="{x:.0}" y="34" width="12" height="12" fill="{color}" stroke="#999" stroke-width="0.5"/><text x="{:.0}" y="44">{name}</text>"##,
            x + 17.0
        );
    }
}

/// Where a lane's bars begin and end, and their colours. Of what is too narrow to see, the widest stands for all.
fn bars(segments: &[Segment], scale: f64) -> Vec<(f64, f64, &'static str)> {
    let color = |state| LEGEND.iter().find(|(it, ..)| *it == state).map_or("#fff", |(_, _, color)| *color);
    let mut bars: Vec<(f64, f64, &'static str)> = Vec::new();
    let mut narrow: Option<(f64, f64, f64, &'static str)> = None;
    for Segment { from, to, state } in segments.iter().copied() {
        let (from, to) = (from as f64 * scale, to as f64 * scale);
        if let Some((begin, end, widest, of)) = narrow.take() {
            if from - end < HAIR && to - begin < 2.0 * HAIR {
                let wins = to - from > widest;
                narrow = Some((begin, to, widest.max(to - from), if wins { color(state) } else { of }));
                continue;
            }
            bars.push((begin, end.max(begin + HAIR / 2.0), of));
        }
        if to - from < HAIR {
            narrow = Some((from, to, to - from, color(state)));
        } else {
            match bars.last_mut() {
                Some((_, end, last)) if *last == color(state) && from - *end < 1e-6 => *end = to,
                _ => bars.push((from, to, color(state))),
            }
        }
    }
    bars.extend(narrow.map(|(from, to, _, of)| (from, to.max(from + HAIR / 2.0), of)));
    bars
}

fn axis(out: &mut String, time: Nanos, y: f64) {
    let seconds = time as f64 / 1e9;
    let step = step(seconds);
    let unit = if step >= 3_600.0 {
        (3_600.0, "h")
    } else if step >= 1.0 {
        (1.0, "s")
    } else {
        (1e-3, "ms")
    };
    let _ = writeln!(
        out,
        r##"<line x1="{LEFT}" y1="{y:.1}" x2="{:.0}" y2="{y:.1}" stroke="#222"/>"##,
        LEFT + WIDTH
    );
    let ticks = if seconds > 0.0 { (seconds / step).floor() as u32 } else { 0 };
    for tick in 0..=ticks {
        let at = f64::from(tick) * step;
        let x = if seconds > 0.0 { LEFT + WIDTH * at / seconds } else { LEFT };
        let label = (at / unit.0 * 1e3).round() / 1e3;
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" y1="{y:.1}" x2="{x:.1}" y2="{:.1}" stroke="#222"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{label} {}</text>"##,
            y + 5.0,
            y + 18.0,
            unit.1
        );
    }
}

/// A round distance of the axis' marks: about ten of them.
fn step(seconds: f64) -> f64 {
    let rough = (seconds / 10.0).max(1e-9);
    let ladder = [
        1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_200.0, 1_800.0, 3_600.0, 7_200.0,
        14_400.0, 21_600.0, 43_200.0, 86_400.0,
    ];
    if rough > 86_400.0 {
        return 86_400.0 * (rough / 86_400.0).ceil();
    }
    if rough > 1.0 {
        return ladder.into_iter().find(|step| *step >= rough).unwrap_or(86_400.0);
    }
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| *step >= rough).unwrap_or(rough)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
