//! Where the shim's log goes: standard error of the application, one line a message, unless the application has closed it
//! or nobody reads it ([`nvshare::standard_error`]).
//!
//! The line is formatted here and not by `tracing_subscriber::fmt`, which keeps a buffer in a thread-local and panics in
//! a thread whose thread-locals are destroyed; such a thread may still make CUDA calls ([`crate::thread`]).

use nvshare::standard_error::StandardError;
use std::fmt::Write as _;
use std::io::Write as _;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Remembers which file standard error is, before the application can change it.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = {
    extern "C" fn remember() {
        nvshare::standard_error::remember();
    }
    remember
};

/// Sets up the log, once. NVSHARE_LOG is the level, as in `debug`; the default is `warn`. An invalid value is reported and the
/// default used: the log is no reason to fail.
pub fn initialise() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let wanted = std::env::var_os("NVSHARE_LOG").unwrap_or_default();
        let wanted = wanted.to_string_lossy();
        // Only a level: a filter by module would accept any word as the name of a module, and log nothing.
        let level = match wanted.trim() {
            "" => LevelFilter::WARN,
            word => word.parse().unwrap_or_else(|_| {
                let _ = writeln!(
                    StandardError,
                    "nvshare[{}]: NVSHARE_LOG='{wanted}' is no level: set it to error, warn, info, debug or trace; taking warn",
                    std::process::id()
                );
                LevelFilter::WARN
            }),
        };
        // Fails only if this copy of the library has a subscriber already. A program in Rust has its own copy.
        let _ = tracing_subscriber::registry().with(level).with(Lines).try_init();
    });
}

/// Writes each message as a line.
struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let _ = StandardError.write_all(line(&event.metadata().level().to_string(), event).as_bytes());
    }
}

fn line(level: &str, fields: impl RecordFields) -> String {
    let (pid, time) = (std::process::id(), nvshare::sync::now());
    // Seconds since boot, like the times in the page, so that the logs of all processes of a node can be merged.
    let (seconds, micros) = (time / 1_000_000_000, time / 1_000 % 1_000_000);
    let mut line = format!("nvshare[{pid}] {seconds}.{micros:06} {level:>5} ");
    let _ = DefaultFields::new().format_fields(Writer::new(&mut line), fields);
    let _ = writeln!(line);
    line
}
