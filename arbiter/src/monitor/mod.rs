//! Metrics and a page over HTTP, in a thread of their own: whatever goes wrong there, the arbiter's loop neither waits for it nor
//! ends with it. The two share the pages, which everybody may look at, and a few counters.
//!
//! | file | what it holds |
//! |---|---|
//! | `listen` | where it is served |
//! | `http` | connections, requests, answers |
//! | `watch` | what is known, read when it is asked for, and twice a second what has happened |
//! | [`metrics`] | metrics as text |
//! | [`durations`], [`tallies`] | histograms, and what the arbiter's loop counts |
//! | `timeline` | what the clients did in the last minutes |

pub mod durations;
mod http;
mod listen;
pub mod metrics;
pub mod tallies;
mod timeline;
mod watch;

pub use listen::{Listen, Listener, PORT};
pub use tallies::Tallies;

use nvshare::map::MappedPage;
use nvshare::units::GpuUuid;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use watch::Watch;

/// Before the thread begins anew after a panic: doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Serves metrics and page of these pages until the process ends. The thread handles no signals that its maker has blocked.
///
/// # Errors
/// The system makes no thread.
pub fn start(
    listeners: Vec<Listener>,
    pages: Vec<MappedPage>,
    tallies: BTreeMap<GpuUuid, Arc<Tallies>>,
    nvml: PathBuf,
) -> io::Result<()> {
    let serve = move || {
        let listeners = listeners.iter().map(Listener::try_clone).collect::<io::Result<Vec<_>>>()?;
        http::serve(listeners, Watch::new(pages.clone(), tallies.clone(), &nvml))
    };
    let run = move || keep_serving(serve, std::thread::sleep);
    std::thread::Builder::new().name("nvshare-monitor".into()).spawn(run).map(drop)
}

/// Serves again and again, also after a panic or an error, which are logged. `sleep` is called in between; it ends when `serve`
/// returns without either.
fn keep_serving(serve: impl Fn() -> io::Result<()>, sleep: impl Fn(Duration)) {
    let mut pause = FIRST_PAUSE;
    loop {
        match catch_unwind(AssertUnwindSafe(&serve)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!("metrics and page are not served for {pause:?}: {error}"),
            Err(_) => tracing::error!(
                "metrics and page are not served for {pause:?}: a bug of nvshare's, the message stands before; the GPUs are shared as before"
            ),
        }
        sleep(pause);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[test]
    fn a_panic_is_survived_and_followed_by_another_try() {
        let (tries, pauses) = (Cell::new(0), RefCell::new(Vec::new()));
        keep_serving(
            || {
                tries.set(tries.get() + 1);
                match tries.get() {
                    1 => panic!("on purpose"),
                    2 => Err(io::Error::other("on purpose")),
                    _ => Ok(()),
                }
            },
            |pause| pauses.borrow_mut().push(pause.as_secs()),
        );
        assert_eq!((tries.get(), pauses.into_inner()), (3, vec![1, 2]));
    }
}
