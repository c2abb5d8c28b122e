//! Where the shim's log goes: standard error of the application, one line a message, unless the application has closed it
//! or nobody reads it ([`nvshare::standard_error`]).

use nvshare::standard_error::StandardError;
use std::io::Write;
use tracing_subscriber::filter::LevelFilter;

/// Which file standard error is, before the application has done anything with it.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = {
    extern "C" fn remember() {
        nvshare::standard_error::remember();
    }
    remember
};

/// Sets the log up, once. NVSHARE_LOG says what is logged, as in `debug` or `warn`; warnings and errors
/// if it says nothing. What makes no sense is told and then ignored: a log is no reason to fail.
pub fn initialise() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let wanted = std::env::var_os("NVSHARE_LOG").unwrap_or_default();
        let wanted = wanted.to_string_lossy();
        // Only a level: a filter by module would take any word for the name of one, and log nothing.
        let level = match wanted.trim() {
            "" => LevelFilter::WARN,
            word => word.parse().unwrap_or_else(|_| {
                let _ = writeln!(
                    StandardError,
                    "nvshare[{}]: NVSHARE_LOG='{wanted}': write error, warn, info, debug or trace; taking warn",
                    std::process::id()
                );
                LevelFilter::WARN
            }),
        };
        // A host program in Rust may have a subscriber of its own, in its own copy of the library.
        let _ = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(|| StandardError)
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
