//! Where the shim's log goes: standard error of the application, one line a message.

use tracing_subscriber::EnvFilter;

/// Sets the log up, once. NVSHARE_LOG says what is logged, as in `debug` or `warn`; warnings and errors
/// if it says nothing. What makes no sense is told and then ignored: a log is no reason to fail.
pub fn initialise() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let wanted = std::env::var("NVSHARE_LOG").unwrap_or_default();
        let filter = match EnvFilter::try_new(if wanted.is_empty() { "warn" } else { &wanted }) {
            Ok(filter) => filter,
            Err(_) => {
                eprintln!(
                    "nvshare: NVSHARE_LOG='{wanted}': write error, warn, info, debug or trace; taking warn"
                );
                EnvFilter::new("warn")
            }
        };
        // A host program in Rust may have a subscriber of its own, in its own copy of the library.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_target(false)
            .with_timer(Uptime)
            .try_init();
    });
}

/// Seconds since boot, as the page's times: logs of all processes of a node line up.
struct Uptime;

impl tracing_subscriber::fmt::time::FormatTime for Uptime {
    fn format_time(&self, out: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        let time = nvshare::sync::now();
        write!(
            out,
            "nvshare[{}] {}.{:06}",
            std::process::id(),
            time / 1_000_000_000,
            time / 1_000 % 1_000_000
        )
    }
}
