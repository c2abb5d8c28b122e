//! The driver as a whole: initialisation, devices, the registries, faults on demand, and what a fork does.
//!
//! Nothing exists before `cuInit`, and after it there is still no thread and no row in the shared segment: a device's
//! books are opened by the first call that needs them. A forked child can't use the driver, as with the real one:
//! every call that needs it is refused before a lock is taken that another thread may have held.
//!
//! When the process exits, the driver goes by an exit handler of `cuInit`'s, as the real one: handlers that were registered
//! later can still use it, and those from before, and static destructors, cannot.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use simstate::{Config, Gpu, Ledger, Segment};

use crate::abi::{Error, Result};
use crate::array::{Array, Mipmap, Object};
use crate::context::Context;
use crate::event::Event;
use crate::graph::{Exec, Graph, Node};
use crate::handles::Registry;
use crate::memory::Memory;
use crate::module::{Function, Module};
use crate::pool::{DevicePools, Pool};
use crate::stream::Stream;
use crate::um::Pager;

/// One GPU, as this process sees it.
pub struct Device {
    pub index: usize,
    pub gpu: &'static Gpu,
    pub primary: Mutex<Primary>,
    pub pager: Mutex<Pager>,
    pub pools: DevicePools,
    ledger: OnceLock<Option<Ledger>>,
}

/// The primary context of a device.
#[derive(Default)]
pub struct Primary {
    pub context: Option<std::sync::Arc<Context>>,
    /// What it goes by, whenever there is one.
    pub handle: Option<crate::abi::Handle>,
    pub references: u32,
    pub flags: u32,
}

/// Everything.
pub struct Driver {
    pub config: Config,
    pub segment: Segment,
    pub devices: Vec<Device>,
    pub memory: Memory,
    pub contexts: Registry<Context>,
    pub streams: Registry<Stream>,
    pub events: Registry<Event>,
    pub modules: Registry<Module>,
    pub functions: Registry<Function>,
    pub graphs: Registry<Graph>,
    pub nodes: Registry<Node>,
    pub execs: Registry<Exec>,
    pub pools: Registry<Pool>,
    pub arrays: Registry<Array>,
    pub mipmaps: Registry<Mipmap>,
    pub objects: Registry<Object>,
    pub greens: Registry<Context>,
    pub resources: Registry<crate::abi::DevResource>,
}

const UNINITIALISED: u8 = 0;
const READY: u8 = 1;
const FORKED: u8 = 2;
const GONE: u8 = 3;

static STATE: AtomicU8 = AtomicU8::new(UNINITIALISED);
static DRIVER: OnceLock<Driver> = OnceLock::new();
static INITIALISING: Mutex<()> = Mutex::new(());

/// The driver, if `cuInit` was called in this process.
pub fn driver() -> Result<&'static Driver> {
    match STATE.load(Ordering::Acquire) {
        READY => {}
        GONE => return Err(Error::DEINITIALIZED),
        _ => return Err(Error::NOT_INITIALIZED),
    }
    DRIVER.get().ok_or(Error::NOT_INITIALIZED)
}

/// `cuInit`.
pub fn init() -> Result {
    match STATE.load(Ordering::Acquire) {
        READY => return Ok(()),
        FORKED => return Err(Error::NOT_INITIALIZED),
        GONE => return Err(Error::DEINITIALIZED),
        _ => {}
    }
    let _one = lock(&INITIALISING);
    if STATE.load(Ordering::Acquire) == READY {
        return Ok(());
    }
    let driver = Driver::new()?;
    if driver.config.watch {
        crate::watch::start();
    }
    if DRIVER.set(driver).is_ok() {
        // SAFETY: the handlers are plain functions that store to an atomic, which is all a forked child may do.
        unsafe {
            libc::pthread_atfork(None, None, Some(after_fork));
            libc::atexit(at_exit);
        }
    }
    STATE.store(READY, Ordering::Release);
    Ok(())
}

unsafe extern "C" fn after_fork() {
    STATE.store(FORKED, Ordering::Release);
}

extern "C" fn at_exit() {
    let _ = STATE.compare_exchange(READY, GONE, Ordering::AcqRel, Ordering::Relaxed);
}

/// The calling thread's number, which no other thread of the process ever has.
pub fn this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|&number| number)
}

/// Locks, also after a thread panicked while it held the lock: the data is only the simulated GPU's.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Driver {
    fn new() -> Result<Driver> {
        let (config, segment) = match Segment::from_env() {
            Ok(both) => both,
            Err(error) => {
                eprintln!("libcuda (simulated): {error}");
                return Err(Error::INVALID_VALUE);
            }
        };
        let device = |index| {
            let gpu = segment.gpu(index)?;
            let (primary, pager, pools, ledger) = Default::default();
            Some(Device { index, gpu, primary, pager, pools, ledger })
        };
        let devices = (0..segment.gpu_count()).filter_map(device).collect();
        let memory = Memory::new().map_err(|error| {
            eprintln!("libcuda (simulated): cannot make a memfd: {error}");
            Error::OPERATING_SYSTEM
        })?;
        Ok(Driver {
            config,
            segment,
            devices,
            memory,
            contexts: Registry::new(),
            streams: Registry::new(),
            events: Registry::new(),
            modules: Registry::new(),
            functions: Registry::new(),
            graphs: Registry::new(),
            nodes: Registry::new(),
            execs: Registry::new(),
            pools: Registry::new(),
            arrays: Registry::new(),
            mipmaps: Registry::new(),
            objects: Registry::new(),
            greens: Registry::new(),
            resources: Registry::new(),
        })
    }

    pub fn device(&self, index: i32) -> Result<&Device> {
        usize::try_from(index).ok().and_then(|index| self.devices.get(index)).ok_or(Error::INVALID_DEVICE)
    }
}

impl Device {
    /// The process's account with this GPU, opened now if it wasn't.
    pub fn ledger(&'static self) -> Result<&'static Ledger> {
        let open = || Ledger::open(&driver().ok()?.segment, self.index);
        // Too many processes: the real driver's word for a GPU that can't take one more.
        self.ledger.get_or_init(open).as_ref().ok_or(Error::OUT_OF_MEMORY)
    }
}

struct Fault {
    function: String,
    left: AtomicU32,
    error: i32,
}

static FAULTS_WANTED: AtomicBool = AtomicBool::new(true);

/// The error that `NVSHARE_SIM_FAIL` wants this call to return.
#[inline]
pub fn injected_fault(function: &str) -> Option<i32> {
    if FAULTS_WANTED.load(Ordering::Relaxed) { look_for_fault(function) } else { None }
}

#[cold]
fn look_for_fault(function: &str) -> Option<i32> {
    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
    let faults = FAULTS.get_or_init(|| {
        // A malformed variable is reported by cuInit.
        let rules = Config::from_env().map(|config| config.fail).unwrap_or_default();
        let fault = |rule: simstate::config::FailRule| Fault {
            function: rule.function,
            left: AtomicU32::new(rule.count),
            error: rule.error,
        };
        rules.into_iter().map(fault).collect()
    });
    if faults.is_empty() {
        FAULTS_WANTED.store(false, Ordering::Relaxed);
    }
    let is_meant =
        |fault: &&Fault| fault.function == function || fault.function == crate::api::base_name(function);
    let spend = |fault: &Fault| {
        let spent = fault.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        spent.is_ok().then_some(fault.error)
    };
    faults.iter().filter(is_meant).find_map(spend)
}
