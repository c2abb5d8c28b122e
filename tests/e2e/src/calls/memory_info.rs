//! What the driver and NVML say about the GPU's memory, found as programs find them: by dlsym.

use super::{Answer, Caller, Code, Handle, driver};
use libloading::Library;
use nvshare_tools::Failure;
use std::ffi::{c_int, c_uint, c_void};

/// `nvmlMemory_v2_t`, and what its version word must be.
#[repr(C)]
#[derive(Default)]
struct MemoryV2 {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

const MEMORY_V2: c_uint = 0x0200_0028;

/// NVML's function of that name, with the type that `nvml.h` gives it.
macro_rules! nvml {
    ($caller:expr, $name:literal, fn($($argument:ty),*)) => {{
        let nvml = $caller.nvml()?;
        // SAFETY: the types are those of nvml.h.
        let found = unsafe { nvml.get::<unsafe extern "C" fn($($argument),*) -> Code>($name) };
        *found.map_err(|error| Failure::with_status(1, error.to_string()))?
    }};
}

impl Caller {
    /// Calls that tell about memory; `None` for others.
    pub(super) fn memory_info(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        // SAFETY, for every call below: a place for each answer that lives until the call is over.
        let answer = match (name, numbers) {
            ("info", []) => {
                let info = driver!(self, b"cuMemGetInfo_v2", fn(*mut usize, *mut usize));
                let (mut free, mut total) = (0, 0);
                // SAFETY: as said.
                let code = unsafe { info(&mut free, &mut total) };
                (code, format!("{free} {total}"))
            }
            ("info32", []) => {
                let info = driver!(self, b"cuMemGetInfo", fn(*mut c_uint, *mut c_uint));
                let (mut free, mut total) = (0, 0);
                // SAFETY: as said.
                let code = unsafe { info(&mut free, &mut total) };
                (code, format!("{free} {total}"))
            }
            ("total", [device]) => {
                let total_mem = driver!(self, b"cuDeviceTotalMem_v2", fn(*mut usize, c_int));
                let mut total = 0;
                // SAFETY: as said.
                let code = unsafe { total_mem(&mut total, *device as c_int) };
                (code, total.to_string())
            }
            ("total32", [device]) => {
                let total_mem = driver!(self, b"cuDeviceTotalMem", fn(*mut c_uint, c_int));
                let mut total = 0;
                // SAFETY: as said.
                let code = unsafe { total_mem(&mut total, *device as c_int) };
                (code, total.to_string())
            }
            ("nvml", [device]) => {
                let info = nvml!(self, b"nvmlDeviceGetMemoryInfo", fn(Handle, *mut [u64; 3]));
                let mut memory = [0; 3];
                // SAFETY: as said: total, free and used.
                let code = unsafe { info(self.nvml_device(*device)?, &mut memory) };
                let [total, free, used] = memory;
                (code, format!("{total} {free} {used}"))
            }
            ("nvml2", [device, version]) => {
                let info = nvml!(self, b"nvmlDeviceGetMemoryInfo_v2", fn(Handle, *mut MemoryV2));
                let version = if *version == 2 { MEMORY_V2 } else { *version as c_uint };
                let mut memory = MemoryV2 { version, ..MemoryV2::default() };
                // SAFETY: as said.
                let code = unsafe { info(self.nvml_device(*device)?, &mut memory) };
                let MemoryV2 { total, reserved, free, used, .. } = memory;
                (code, format!("{total} {reserved} {free} {used}"))
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }

    /// NVML, initialised.
    fn nvml(&mut self) -> Result<&Library, Failure> {
        if self.nvml.is_none() {
            let failed = |error: libloading::Error| Failure::with_status(1, error.to_string());
            // SAFETY: loading NVML runs its constructors, which is what every monitor does.
            let library = unsafe { Library::new("libnvidia-ml.so.1") }.map_err(failed)?;
            // SAFETY: the type is that of nvml.h.
            let init =
                unsafe { library.get::<unsafe extern "C" fn() -> Code>(b"nvmlInit_v2") }.map_err(failed)?;
            // SAFETY: it takes nothing.
            let code = unsafe { init() };
            if code != 0 {
                return Err(Failure::with_status(1, format!("nvmlInit said {code}")));
            }
            self.nvml = Some(library);
        }
        Ok(self.nvml.as_ref().expect("it is there"))
    }

    /// NVML's handle of a GPU, null for one that isn't there.
    fn nvml_device(&mut self, index: u64) -> Result<Handle, Failure> {
        let by_index = nvml!(self, b"nvmlDeviceGetHandleByIndex_v2", fn(c_uint, *mut *mut c_void));
        let mut device = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        let _ = unsafe { by_index(index as c_uint, &mut device) };
        Ok(device as Handle)
    }
}
