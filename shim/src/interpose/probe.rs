//! Functions of the shim for tests and benchmarks. Applications do not need them.
//!
//! | function | result |
//! |---|---|
//! | `nvshare_real_address(name)` | the address of the driver's own function, which does not pass the gate |
//! | `nvshare_holds()` | how often flow control has made a thread wait |
//! | `nvshare_waiting()` | how many threads wait at the shut gate |
//! | `nvshare_entry_points()` | the table of entry points, as text |
//! | `nvshare_bookkeeping(regions, ns)` | the cost of the bookkeeping of `regions` regions: [`crate::memory::bookkeeping`] |

use crate::interpose::entry_points::{self, ENTRIES, Entry};
use crate::submit::gate::gate;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;

/// The driver's own address of an entry point, or null if it has none of that name.
///
/// # Safety
/// `name` is a C string.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn nvshare_real_address(name: *const c_char) -> *mut c_void {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) };
    entry_points::real_address(name).unwrap_or(0) as *mut c_void
}

/// How many threads wait at the shut gate. A thread that has just been woken and finds the gate shut again may be missing for
/// a moment.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn nvshare_waiting() -> u32 {
    gate().waiting()
}

/// See the module's head. Returns 0 if it could be measured, else 1.
///
/// # Safety
/// `ns` points to memory for four numbers.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn nvshare_bookkeeping(regions: u32, ns: *mut u64) -> i32 {
    let Ok(took) = crate::memory::bookkeeping::measure(regions) else { return 1 };
    // SAFETY: the caller's promise.
    unsafe { ns.copy_from_nonoverlapping(took.as_ptr(), took.len()) };
    0
}

/// See the module's head.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn nvshare_holds() -> u64 {
    crate::submit::flow::holds()
}

/// The table of entry points: a line for each, with the exported symbol, its base name for cuGetProcAddress, the first API
/// version that has it, `ptds` if its default stream is the thread's own, the class, and the number of arguments, separated by
/// tabs; `-` where there is none or it is not known. The text is static.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn nvshare_entry_points() -> *const c_char {
    static TEXT: OnceLock<CString> = OnceLock::new();
    let text = || CString::new(ENTRIES.iter().map(line).collect::<String>()).expect("no name has a NUL");
    TEXT.get_or_init(text).as_ptr()
}

fn line(entry: &Entry) -> String {
    let Entry { export, base, since, per_thread, class, arity, .. } = *entry;
    let flavour = if per_thread { "ptds" } else { "-" };
    let arity = arity.map_or("-".to_owned(), |arity| arity.to_string());
    format!("{export}\t{base}\t{since}\t{flavour}\t{class:?}\t{arity}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_a_line_of_six_words() {
        // SAFETY: a C string that stays.
        let text = unsafe { CStr::from_ptr(nvshare_entry_points()) }.to_str().unwrap();
        assert_eq!(text.lines().count(), ENTRIES.len());
        assert!(text.lines().all(|line| line.split('\t').count() == 6));
        assert!(text.lines().any(|line| line == "cuMemcpyHtoD_v2_ptds\tcuMemcpyHtoD\t7000\tptds\tSubmit\t3"));
        assert!(text.lines().any(|line| line == "cuEventRecord\tcuEventRecord\t2000\t-\tPass\t-"));
    }
}
