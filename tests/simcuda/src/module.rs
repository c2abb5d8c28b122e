//! Modules and their functions.
//!
//! A library (`cuLibraryLoadData`) is a module that isn't tied to a context, and a kernel of a library is a function:
//! the handles are the same.

use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::abi::{Error, Handle, Result};
use crate::context::Context;
use crate::driver::driver;
use crate::handles;
use crate::kernels::Kernel;

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

/// The real driver may synchronise the context when it loads a kernel, which CUDA's documentation of lazy loading names as a cause
/// of deadlocks: here with NVSHARE_SIM_LOADS_WAIT, and it holds its lock meanwhile.
fn await_work(context: Handle) {
    let Ok(driver) = driver() else { return };
    if driver.config.loads_wait {
        let _lock = LOCK.write().unwrap_or_else(PoisonError::into_inner);
        // Work that has failed is the next call's.
        let _ = driver.contexts.get(context).map(|context| context.synchronize());
    }
}

/// Calls that need the driver's lock wait for a thread that loads a module.
pub fn await_loads(call: &str) {
    const NEEDS: [&str; 8] = [
        "cuMemCreate",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemRelease",
        "cuEventRecord",
        "cuLaunchHostFunc",
        "cuMemsetD32Async",
    ];
    if driver().is_ok_and(|driver| driver.config.loads_wait) && NEEDS.contains(&call) {
        drop(LOCK.read().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Loads PTX text. The real driver's compiler is a library that it opens for that, so the dynamic loader's lock is needed.
pub fn load(image: &[u8], context: Handle) -> Result<Arc<Module>> {
    let driver = driver()?;
    let _loading = driver.contexts.get(context).ok().map(Loading::begin);
    // SAFETY: a C string, of a library that is loaded in any case.
    unsafe { libc::dlclose(libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY)) };
    std::thread::sleep(Duration::from_nanos(driver.config.compile_ns));
    await_work(context);
    let text = std::str::from_utf8(image).map_err(|_| Error::INVALID_IMAGE)?;
    if !text.contains(".version") || !text.contains(".target") {
        return Err(Error::INVALID_IMAGE);
    }
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
    let functions: Vec<_> = entries(text).into_iter().filter_map(Kernel::by_name).map(function).collect();
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
