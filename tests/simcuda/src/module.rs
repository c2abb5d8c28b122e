//! Modules and their functions.
//!
//! A library (`cuLibraryLoadData`) is a module that isn't tied to a context, and a kernel of a library is a function:
//! the handles are the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::abi::{Error, Handle, Result};
use crate::context::Context;
use crate::driver::driver;
use crate::handles;
use crate::kernels::Kernel;

/// How an ELF file begins.
pub const ELF: &[u8] = b"\x7fELF";

/// A module or a library.
pub struct Module {
    pub handle: Handle,
    /// The context it belongs to; 0 for a library.
    pub context: Handle,
    pub functions: Vec<Arc<Function>>,
}

/// A function of a module.
pub struct Function {
    pub handle: Handle,
    pub module: Handle,
    pub context: Handle,
    pub kernel: &'static Kernel,
    /// The kernel's name as a C string that lives as long as the program.
    pub c_name: &'static std::ffi::CStr,
    pub dynamic_shared: AtomicI32,
    pub carveout: AtomicI32,
}

/// The names of the entry functions of PTX text, in order.
pub fn entries(ptx: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for line in ptx.lines() {
        let code = line.split_once("//").map_or(line, |(code, _)| code);
        let Some((_, rest)) = code.split_once(".entry") else { continue };
        let rest = rest.trim_start();
        let end =
            rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_$%".contains(c))).unwrap_or(rest.len());
        if end > 0 {
            names.push(&rest[..end]);
        }
    }
    names
}

/// A module is being loaded into a context, which must not end meanwhile.
struct Loading(Arc<Context>);

impl Loading {
    fn begin(context: Arc<Context>) -> Self {
        context.core.loading.fetch_add(1, SeqCst);
        Self(context)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.core.loading.fetch_sub(1, SeqCst);
    }
}

/// Held by a thread that loads a module and waits for the context's work.
static LOCK: RwLock<()> = RwLock::new(());

/// The real driver waits for all work of the context when it loads or unloads a module, and when it unregisters host memory, and
/// holds its lock meanwhile (tests/gpu/waits.cu). So does this one with NVSHARE_SIM_LOADS_WAIT.
pub fn await_work(context: Handle) {
    let Ok(driver) = driver() else { return };
    if driver.config.loads_wait {
        let _lock = LOCK.write().unwrap_or_else(PoisonError::into_inner);
        // Work that has failed is the next call's.
        let _ = driver.contexts.get(context).map(|context| context.synchronize());
    }
}

/// Calls that need the driver's lock wait for a thread that loads a module.
pub fn await_loads(call: &str) {
    const NEEDS: [&str; 9] = [
        "cuMemCreate",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemRelease",
        "cuEventRecord",
        "cuLaunchHostFunc",
        "cuMemsetD32Async",
        "cuMemcpyHtoDAsync_v2",
    ];
    if driver().is_ok_and(|driver| driver.config.loads_wait) && NEEDS.contains(&call) {
        drop(LOCK.read().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Takes the time that a compiler takes. The real driver's compiler is a library that it opens for that, so the dynamic loader's lock
/// is needed.
fn compile() -> Result {
    // SAFETY: a C string, of a library that is loaded in any case.
    unsafe { libc::dlclose(libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY)) };
    std::thread::sleep(Duration::from_nanos(driver()?.config.compile_ns));
    Ok(())
}

/// Whether it may be PTX text.
fn is_text(image: &[u8]) -> bool {
    std::str::from_utf8(image).is_ok_and(|text| text.contains(".version") && text.contains(".target"))
}

/// PTX texts that are being compiled, by the handle of the compilation. Each has a zero byte at its end.
static LINKERS: Mutex<BTreeMap<Handle, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// Begins a compilation.
pub fn begin_link() -> Handle {
    let handle = handles::fresh();
    crate::driver::lock(&LINKERS).insert(handle, vec![0]);
    handle
}

/// Compiles a text. What is made of it is the text: nobody interprets it.
pub fn add_to_link(linker: Handle, text: &[u8]) -> Result {
    compile()?;
    if !is_text(text) {
        return Err(Error::INVALID_IMAGE);
    }
    let mut linkers = crate::driver::lock(&LINKERS);
    let code = linkers.get_mut(&linker).ok_or(Error::INVALID_HANDLE)?;
    code.splice(code.len() - 1.., text.iter().copied().chain([0]));
    Ok(())
}

/// What was compiled: where it is, until the compilation ends, and how many bytes.
pub fn linked(linker: Handle) -> Result<(usize, usize)> {
    let linkers = crate::driver::lock(&LINKERS);
    let code = linkers.get(&linker).ok_or(Error::INVALID_HANDLE)?;
    Ok((code.as_ptr().addr(), code.len()))
}

/// Ends a compilation.
pub fn end_link(linker: Handle) -> Result {
    crate::driver::lock(&LINKERS).remove(&linker).map(|_| ()).ok_or(Error::INVALID_HANDLE)
}

/// The kernels that compiled code names.
fn names_in(code: &[u8]) -> Vec<&'static str> {
    let named = |name: &str| {
        code.windows(name.len() + 1)
            .any(|part| part[..name.len()] == *name.as_bytes() && part[name.len()] == 0)
    };
    crate::kernels::KERNELS.iter().map(|kernel| kernel.name).filter(|name| named(name)).collect()
}

/// Loads PTX text, or compiled code (an ELF file) that names kernels of the simulated GPU.
pub fn load(image: &[u8], context: Handle) -> Result<Arc<Module>> {
    let driver = driver()?;
    let _loading = driver.contexts.get(context).ok().map(Loading::begin);
    let is_code = image.starts_with(ELF);
    if !is_code {
        compile()?;
    } else if driver.config.refuses_code {
        return Err(Error::NO_BINARY_FOR_GPU);
    }
    await_work(context);
    if !is_code && !is_text(image) {
        return Err(Error::INVALID_IMAGE);
    }
    let names =
        if is_code { names_in(image) } else { entries(std::str::from_utf8(image).unwrap_or_default()) };
    let module = handles::fresh();
    let function = |kernel: &'static Kernel| {
        Arc::new(Function {
            handle: handles::fresh(),
            module,
            context,
            kernel,
            c_name: c_name(kernel),
            dynamic_shared: AtomicI32::new(48 << 10),
            carveout: AtomicI32::new(-1),
        })
    };
    let functions: Vec<_> = names.into_iter().filter_map(Kernel::by_name).map(function).collect();
    for function in &functions {
        driver.functions.insert(function.handle, function.clone());
    }
    let module = Arc::new(Module { handle: module, context, functions });
    driver.modules.insert(module.handle, module.clone());
    Ok(module)
}

fn c_name(kernel: &'static Kernel) -> &'static std::ffi::CStr {
    use std::collections::HashMap;
    use std::ffi::{CStr, CString};
    use std::sync::{Mutex, OnceLock};
    static NAMES: OnceLock<Mutex<HashMap<&'static str, &'static CStr>>> = OnceLock::new();
    let mut names = crate::driver::lock(NAMES.get_or_init(Mutex::default));
    // A name is leaked once per kernel.
    names
        .entry(kernel.name)
        .or_insert_with(|| Box::leak(CString::new(kernel.name).unwrap_or_default().into_boxed_c_str()))
}

/// Unloads a module or a library.
pub fn unload(handle: Handle, library: bool) -> Result {
    let driver = driver()?;
    if (driver.modules.get(handle)?.context == 0) != library {
        return Err(Error::INVALID_HANDLE);
    }
    if !library {
        await_work(driver.modules.get(handle)?.context);
    }
    let module = driver.modules.remove(handle)?;
    driver.functions.remove_if(|function| function.module == module.handle);
    Ok(())
}

impl Module {
    pub fn function(&self, name: &str) -> Result<&Arc<Function>> {
        self.functions.iter().find(|function| function.kernel.name == name).ok_or(Error::NOT_FOUND)
    }
}

impl Function {
    /// `cuFuncGetAttribute`.
    pub fn attribute(&self, attribute: u32) -> Result<i32> {
        Ok(match attribute {
            0 => 1024,
            1..=3 => 0,
            4 => 32,
            5 => 70,
            6 => 75,
            7 => 0,
            8 => self.dynamic_shared.load(SeqCst),
            9 => self.carveout.load(SeqCst),
            10..=17 => 0,
            _ => return Err(Error::INVALID_VALUE),
        })
    }

    /// `cuFuncSetAttribute`.
    pub fn set_attribute(&self, attribute: u32, value: i32) -> Result {
        match attribute {
            8 if (0..=65536).contains(&value) => self.dynamic_shared.store(value, SeqCst),
            9 if (-1..=100).contains(&value) => self.carveout.store(value, SeqCst),
            10..=17 => {}
            _ => return Err(Error::INVALID_VALUE),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::entries;

    #[test]
    fn entries_are_found_in_ptx() {
        let ptx =
            ".version 7.0\n// .entry no\n.visible .entry a_1(\n.param .u64 p\n)\n.entry b ()\n.func c()";
        assert_eq!(entries(ptx), ["a_1", "b"]);
    }
}
