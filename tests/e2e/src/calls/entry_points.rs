//! Calls of every entry point that nvshare's gate holds, each from a thread of its own.
//!
//! Which those are says the shim's own table ([`Row`]), so a row that is new is called too. They are called in two
//! ways: by the symbol that the shim exports, which is what the dynamic linker binds a program to; and by the address
//! that dlsym on the driver gives, and that cuGetProcAddress must give too.
//!
//! Arguments are zeros, but for a few: see [`Arguments`].

use super::{Answer, Caller, Code, DevicePointer, Handle, driver, pattern};
use libloading::Library;
use libloading::os::unix::Library as Process;
use nvshare_tools::Failure;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

const ILLEGAL_ADDRESS: Code = 700;

/// Bytes of the page that copies are about.
const PAGE: u64 = 4096;

/// A row of the shim's table.
struct Row {
    export: CString,
    base: CString,
    since: c_int,
    per_thread: bool,
    class: String,
}

impl Row {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split('\t').collect();
        let [export, base, since, flavour, class, _arity] = words[..] else { return None };
        Some(Self {
            export: CString::new(export).ok()?,
            base: CString::new(base).ok()?,
            since: since.parse().ok()?,
            per_thread: flavour == "ptds",
            class: class.to_owned(),
        })
    }

    fn name(&self) -> &str {
        self.export.to_str().unwrap_or_default()
    }

    /// Whether it stands for work, or for a look at memory: then the driver has it too.
    fn is_gated(&self) -> bool {
        matches!(self.class.as_str(), "Submit" | "NeedsMemory")
    }

    /// Whether it waits while memory is out: these, and what has hooks of its own that go through the gate.
    fn is_held(&self) -> bool {
        let name = self.name();
        match self.class.as_str() {
            "Capture" => name.starts_with("cuStreamBegin"),
            "Export" => true,
            // The driver's own, for streams that capture; what the shim allocates never waits.
            "Alloc" | "Free" => name.contains("Async"),
            "Placed" => !name.contains("Destroy"),
            "QueryMemory" => name.starts_with("cuPointerGetAttribute"),
            _ => self.is_gated(),
        }
    }
}

/// The shim's functions for tests.
struct Probe(Process);

impl Probe {
    fn find() -> Self {
        Self(Process::this())
    }

    fn rows(&self) -> Result<Vec<Row>, Failure> {
        // SAFETY: the type is the one in shim/src/interpose/probe.rs.
        let found = unsafe { self.0.get::<unsafe extern "C" fn() -> *const c_char>(b"nvshare_entry_points") };
        let entry_points = found.map_err(failed)?;
        // SAFETY: it takes nothing, and gives a C string that stays.
        let text = unsafe { CStr::from_ptr(entry_points()) }.to_string_lossy();
        let rows = text.lines().map(Row::parse).collect::<Option<Vec<_>>>();
        rows.ok_or_else(|| Failure::with_status(1, "a row of the shim's table has other columns"))
    }

    fn waiting(&self) -> Result<u32, Failure> {
        // SAFETY: as above.
        let found = unsafe { self.0.get::<unsafe extern "C" fn() -> u32>(b"nvshare_waiting") };
        let waiting = found.map_err(failed)?;
        // SAFETY: it takes nothing.
        Ok(unsafe { waiting() })
    }

    fn holds(&self) -> Result<u64, Failure> {
        // SAFETY: as above.
        let found = unsafe { self.0.get::<unsafe extern "C" fn() -> u64>(b"nvshare_holds") };
        let holds = found.map_err(failed)?;
        // SAFETY: it takes nothing.
        Ok(unsafe { holds() })
    }

    /// What a program that is linked with the driver calls.
    fn exported(&self, row: &Row) -> Result<usize, Failure> {
        // SAFETY: only the address is taken.
        let found = unsafe { self.0.get::<*const c_void>(row.export.as_bytes_with_nul()) };
        found.map(|symbol| *symbol as usize).map_err(failed)
    }

    /// The driver's own function.
    fn real(&self, row: &Row) -> Result<usize, Failure> {
        type RealAddress = unsafe extern "C" fn(*const c_char) -> usize;
        // SAFETY: as above.
        let found = unsafe { self.0.get::<RealAddress>(b"nvshare_real_address") };
        let real_address = found.map_err(failed)?;
        // SAFETY: a C string.
        Ok(unsafe { real_address(row.export.as_ptr()) })
    }
}

fn failed(error: libloading::Error) -> Failure {
    Failure::with_status(1, error.to_string())
}

/// As many words as any of the functions takes.
type Words = [usize; 11];

/// What a thread passes, and where it lets the driver write.
struct Arguments {
    words: Words,
    /// A page of the application's data, or a place for it.
    page: Vec<u64>,
    /// A place for a handle, and an array's description.
    place: Box<[u64; 8]>,
}

impl Arguments {
    /// Zeros; for the copies between host and GPU, a page of the application's data, which they read or write as it
    /// is; for captures, the mode that disturbs nobody; for memory that only the driver can place, four MiB of it.
    fn new(row: &Row, data: DevicePointer, seed: u64) -> Self {
        const RELAXED: usize = 2;
        const FLOAT: u64 = 0x20;
        const MANAGED_EVERYWHERE: usize = 1;
        let (mut words, mut page, mut place) = ([0; 11], pattern(PAGE, seed), Box::new([0; 8]));
        let (data, host) = (data as usize, page.as_mut_ptr() as usize);
        let (made, description) = (place.as_ptr() as usize, place[1..].as_ptr() as usize);
        let set = |words: &mut Words, values: &[usize]| words[..values.len()].copy_from_slice(values);
        match row.name().trim_end_matches("_ptds").trim_end_matches("_ptsz") {
            "cuMemcpyDtoH_v2" | "cuMemcpyDtoHAsync_v2" | "cuMemcpy" | "cuMemcpyAsync" => {
                page.fill(0);
                set(&mut words, &[host, data, PAGE as usize]);
            }
            "cuMemcpyHtoD_v2" | "cuMemcpyHtoDAsync_v2" => set(&mut words, &[data, host, PAGE as usize]),
            "cuStreamBeginCapture_v2" | "cuStreamBeginRecaptureToGraph" => words[1] = RELAXED,
            "cuStreamBeginCaptureToGraph" => words[5] = RELAXED,
            "cuArrayCreate_v2" => {
                place[1..4].copy_from_slice(&[1024, 1024, FLOAT | 1 << 32]);
                set(&mut words, &[made, description]);
            }
            "cuArray3DCreate_v2" | "cuMipmappedArrayCreate" => {
                place[1..5].copy_from_slice(&[1024, 1024, 0, FLOAT | 1 << 32]);
                set(&mut words, &[made, description, 1]);
            }
            "cuMemAllocManaged" => set(&mut words, &[made, 4 << 20, MANAGED_EVERYWHERE]),
            _ => {}
        }
        Self { words, page, place }
    }
}

/// Calls a function of the driver, or what stands in for it.
///
/// # Safety
/// The words are good arguments for it.
unsafe fn call(address: usize, words: &Words) -> Code {
    type Function = unsafe extern "C" fn(
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
    ) -> Code;
    // SAFETY: the address is a function's that takes as many words or fewer (shim/src/interpose/entry_points.rs says why words will do);
    // it does not look at the rest, which are the caller's to clean up in the C ABIs of x86-64 and aarch64.
    let function: Function = unsafe { std::mem::transmute::<usize, Function>(address) };
    let [a, b, c, d, e, f, g, h, i, j, k] = *words;
    // SAFETY: the caller's promise.
    unsafe { function(a, b, c, d, e, f, g, h, i, j, k) }
}

/// What came of a call.
struct Outcome {
    name: String,
    code: Code,
    /// It was to copy data.
    copies: bool,
    /// And has copied other data.
    wrong: bool,
}

/// The threads of a round, each in its call or back from it.
#[derive(Default)]
pub(super) struct Held {
    threads: Vec<JoinHandle<()>>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
}

impl Held {
    fn start(
        &mut self,
        caller: &Caller,
        row: Row,
        address: usize,
        (data, seed): (u64, u64),
    ) -> Result<(), Failure> {
        let set_current = driver!(caller, b"cuCtxSetCurrent", fn(Handle));
        let end_capture = driver!(caller, b"cuStreamEndCapture", fn(Handle, *mut Handle));
        let create_stream = driver!(caller, b"cuStreamCreate", fn(*mut Handle, c_uint));
        let context = caller.context(0)?;
        let outcomes = self.outcomes.clone();
        let body = move || {
            // SAFETY: a context that was made.
            unsafe { set_current(context) };
            let mut arguments = Arguments::new(&row, data, seed);
            let captures = row.class == "Capture";
            if captures {
                // A stream that the legacy stream does not wait for: while one that it waits for is captured, the
                // driver refuses the copies of the other threads.
                const NON_BLOCKING: c_uint = 1;
                // SAFETY: a place for the stream.
                unsafe { create_stream(&mut arguments.words[0], NON_BLOCKING) };
            }
            let copies = arguments.words[2] == PAGE as usize;
            // SAFETY: zeros, which the driver checks, or what `Arguments` made for this function, which lives on.
            let code = unsafe { call(address, &arguments.words) };
            if code == 0 && captures {
                // A capture that stays open is in everybody's way.
                // SAFETY: a place for the graph.
                unsafe { end_capture(arguments.words[0], (&raw mut arguments.place[0]).cast()) };
            }
            let wrong = copies && arguments.page != pattern(PAGE, seed);
            let outcome = Outcome { name: row.name().to_owned(), code, copies, wrong };
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
        };
        let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(body);
        self.threads.push(thread.map_err(|error| Failure::with_status(1, format!("no thread: {error}")))?);
        Ok(())
    }

    /// The calls that are over, with what they returned.
    fn returned(&self) -> String {
        let outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        let said: Vec<_> =
            outcomes.iter().map(|outcome| format!("{}={}", outcome.name, outcome.code)).collect();
        said.join(" ")
    }

    /// Waits for all: how many, copies, wrong ones, and illegal accesses.
    fn join(self) -> Answer {
        let died = self.threads.into_iter().filter_map(|thread| thread.join().err()).count() as Code;
        let outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        let count =
            |which: &dyn Fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| which(outcome)).count();
        let copied = count(&|outcome| outcome.copies && outcome.code == 0);
        let (wrong, illegal) =
            (count(&|outcome| outcome.wrong), count(&|outcome| outcome.code == ILLEGAL_ADDRESS));
        (died, format!("{} {copied} {wrong} {illegal}", outcomes.len()))
    }
}

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn entry_points(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let answer = match (name, numbers) {
            ("hold-exported", [data, seed]) => {
                let probe = Probe::find();
                self.hold((*data, *seed), |row| probe.exported(row).map(Some))?
            }
            ("hold-looked-up", [data, seed]) => {
                let library = self.library.clone();
                self.hold((*data, *seed), |row| looked_up(&library, row))?
            }
            ("waiting", []) => (0, Probe::find().waiting()?.to_string()),
            ("holds", []) => (0, Probe::find().holds()?.to_string()),
            ("returned", []) => (0, self.held.returned()),
            ("join", []) => std::mem::take(&mut self.held).join(),
            ("illegal", []) => self.illegal()?,
            ("past-gate", []) => self.past_gate()?,
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }

    /// Calls everything that waits for the gate; says how much that is.
    fn hold(
        &mut self,
        data: (u64, u64),
        address: impl Fn(&Row) -> Result<Option<usize>, Failure>,
    ) -> Result<Answer, Failure> {
        let mut held = Held::default();
        for row in Probe::find().rows()?.into_iter().filter(Row::is_held) {
            match address(&row)? {
                Some(address) => held.start(self, row, address, data)?,
                // Hooked, and this driver hasn't got it.
                None if !row.is_gated() => {}
                None => return Err(Failure::with_status(1, format!("nobody knows {}", row.name()))),
            }
        }
        let started = held.threads.len().to_string();
        self.held = held;
        Ok((0, started))
    }

    /// How many accesses of the simulated GPU were illegal.
    fn illegal(&self) -> Result<Answer, Failure> {
        let counters = driver!(self, b"nvsharesim_counters", fn(c_uint, *mut [u64; 8]));
        let mut counts = [0; 8];
        // SAFETY: it writes eight numbers.
        let code = unsafe { counters(0, &mut counts) };
        Ok((code, counts[3].to_string()))
    }

    /// Calls the driver's own functions, past the gate. How many there are, how many of the calls the simulated GPU
    /// has refused and counted as illegal accesses, and the names of the others.
    fn past_gate(&self) -> Result<Answer, Failure> {
        let probe = Probe::find();
        let (mut all, mut seen, mut unseen) = (0, 0, String::new());
        for row in probe.rows()?.into_iter().filter(Row::is_gated) {
            let before = self.illegal()?.1;
            let address = probe.real(&row)?;
            // SAFETY: zeros, which the driver checks.
            let code = if address == 0 { 0 } else { unsafe { call(address, &[0; 11]) } };
            let counted = before.parse::<u64>().map(|before| (before + 1).to_string());
            all += 1;
            if code == ILLEGAL_ADDRESS && counted == Ok(self.illegal()?.1) {
                seen += 1;
            } else {
                unseen = format!("{unseen} {}={code}", row.name());
            }
        }
        Ok((0, format!("{all} {seen}{unseen}")))
    }
}

/// The address that dlsym gives for an entry point, which must be the one that cuGetProcAddress gives.
fn looked_up(library: &Library, row: &Row) -> Result<Option<usize>, Failure> {
    type GetProcAddress = unsafe extern "C" fn(*const c_char, *mut usize, c_int, u64, *mut c_uint) -> Code;
    // SAFETY: only the address is taken.
    let found = unsafe { library.get::<*const c_void>(row.export.as_bytes_with_nul()) };
    let by_symbol = found.ok().map(|symbol| *symbol as usize);
    // SAFETY: the type is that of cuda.h.
    let get = unsafe { library.get::<GetProcAddress>(b"cuGetProcAddress_v2") }.map_err(failed)?;
    let (mut by_version, mut status) = (0, 0);
    let flags = if row.per_thread { 2 } else { 1 };
    // SAFETY: a C string, and places for the answers.
    let code = unsafe { get(row.base.as_ptr(), &mut by_version, row.since, flags, &mut status) };
    let by_version = (code == 0 && by_version != 0).then_some(by_version);
    if by_symbol != by_version {
        return Err(Failure::with_status(
            1,
            format!(
                "{} is {by_symbol:x?} for dlsym and {by_version:x?} for cuGetProcAddress({:?}, {})",
                row.name(),
                row.base,
                row.since
            ),
        ));
    }
    Ok(by_symbol)
}
