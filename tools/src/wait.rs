//! `nvshare wait`: until an arbiter serves, or until a client is in some state, for scripts.

use crate::whom::Whom;
use crate::{Failure, node, output};
use clap::ValueEnum;
use nvshare::page::Phase;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::snapshot::ClientInfo;
use nvshare::units::{GpuUuid, Nanos, format_nanos};
use nvshare::{paths, record};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The exit status if the time is up before.
const TIME_IS_UP: u8 = 1;

/// Options of `nvshare wait`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without CLIENT: until an arbiter answers. With one: until any client of that pid, slot or name is in the state; gone: until \
there is none, be it that there never was one.

Exit status: 0 it is so; 1 the time was up before; 2 the command makes no sense.

Examples:
  nvshare wait && python3 train.py
  nvshare wait train --until running --timeout 30s
  nvshare wait pid:4242 --until gone")]
pub struct Options {
    /// Which client: its pid, slot or name, or one of them by pid:N, slot:N or name:TEXT
    client: Option<String>,
    /// Until it is in this state
    #[arg(long, value_enum, value_name = "STATE", default_value = "registered", requires = "client")]
    until: State,
    /// Give up after this time, such as 30s [default: never]
    #[arg(long, value_name = "TIME", value_parser = crate::time)]
    timeout: Option<Nanos>,
    /// Look for the client on this GPU only
    #[arg(long, value_name = "UUID", value_parser = crate::gpu, requires = "client")]
    gpu: Option<GpuUuid>,
    /// Directory of the control pages and the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of
    /// your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// What is waited for of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// It has a slot
    Registered,
    /// It waits for the GPU
    Waiting,
    /// It runs
    Running,
    /// It has no work
    Idle,
    /// It is paused, and has given the GPU up
    Paused,
    /// There is no such client
    Gone,
}

impl State {
    /// Whether these are all clients that are meant, and one is in this state.
    fn holds(self, clients: &[ClientInfo]) -> bool {
        let any = |is: &dyn Fn(&ClientInfo) -> bool| clients.iter().any(is);
        match self {
            Self::Registered => !clients.is_empty(),
            Self::Waiting => any(&|client| client.view.phase == Phase::Waiting && !client.view.paused),
            Self::Running => any(&|client| client.view.phase == Phase::Running && !client.view.paused),
            Self::Idle => any(&|client| client.view.phase == Phase::Idle && !client.view.paused),
            Self::Paused => any(&|client| client.view.phase == Phase::Idle && client.view.paused),
            Self::Gone => clients.is_empty(),
        }
    }
}

/// Between two looks. The pages tell nobody that a client has come.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Waits.
///
/// # Errors
/// The time is up, or the client makes no sense.
pub fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let whom = options.client.as_deref().map(Whom::read).transpose()?;
    let until = options.timeout.map(|timeout| Instant::now() + Duration::from_nanos(timeout));
    loop {
        let so = match &whom {
            None => node::answers(&dir),
            Some(whom) => options.until.holds(&clients(&dir, whom, options.gpu)),
        };
        if so {
            return Ok(());
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            let what = match &options.client {
                None => format!("no arbiter answers in {}", dir.display()),
                Some(client) => {
                    let state = options.until.to_possible_value().expect("a state has a name");
                    format!("'{client}' is not {}", state.get_name())
                }
            };
            let after = format_nanos(options.timeout.unwrap_or_default());
            return Err(Failure::with_status(TIME_IS_UP, format!("{what}, after {after}")));
        }
        output::check()?;
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// The clients that are meant; none where there is no node yet, or no page that can be read.
fn clients(dir: &Path, whom: &Whom, gpu: Option<GpuUuid>) -> Vec<ClientInfo> {
    let pages = paths::pages(dir).unwrap_or_default().into_iter();
    let pages = pages.filter(|(of, _)| gpu.is_none_or(|gpu| *of == gpu));
    let pages = pages.filter_map(|(gpu, _)| record::view_page(dir, gpu).ok());
    let slots = || (0..SLOTS).filter_map(SlotIndex::new);
    pages
        .flat_map(|page| slots().filter_map(|slot| page.details(slot)).collect::<Vec<_>>())
        .filter(|client| whom.means(client))
        .collect()
}
