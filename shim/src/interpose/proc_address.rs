//! `cuGetProcAddress`, by which the driver itself returns its entry points.
//!
//! The driver is called with the same arguments, and its answer is translated ([`translate`]). The address
//! identifies the row of the table; the requested name, version and stream flag are used only if the
//! driver returns other addresses than those in its symbol table. An entry point or version newer than the table is passed on
//! unchanged, because a hook for an older signature would be worse than none. It is counted
//! ([`nvshare_unknown_entry_points`]), and logged once with the count.
//!
//! This file and [`crate::interpose::entry_points`] import each other: cuGetProcAddress is a row of the table, and looks the
//! table up.

use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::interpose::entry_points::{self, Entry};
use crate::interpose::hook::Hooked;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often the driver returned an entry point that is not in the table, so that nvshare does not see its calls. For programs
/// in the same process; the log names the entry points.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn nvshare_unknown_entry_points() -> u64 {
    UNKNOWN.load(Ordering::Relaxed)
}

static UNKNOWN: AtomicU64 = AtomicU64::new(0);

/// `cuGetProcAddress` of CUDA 11.3.
///
/// # Safety
///
/// As for the driver's.
#[allow(non_snake_case)]
pub unsafe fn cuGetProcAddress(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuGetProcAddress(symbol, pfn, version, flags) };
    let again = |version| {
        let mut address = std::ptr::null_mut();
        // SAFETY: the caller's symbol, and a pointer for the driver to write.
        unsafe { driver_calls::cuGetProcAddress(symbol, &mut address, version, flags) }.ok().ok()?;
        Some(address as usize)
    };
    // SAFETY: the caller's symbol, and the pointer that the driver has written through.
    unsafe { answer(result, symbol, pfn, version, flags, again) }
}

/// `cuGetProcAddress` since CUDA 12.
///
/// # Safety
///
/// As for the driver's.
#[allow(non_snake_case)]
pub unsafe fn cuGetProcAddress_v2(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
    status: *mut CUdriverProcAddressQueryResult,
) -> CuResult {
    // SAFETY: the caller's arguments. The driver writes the status, which a hook does not change.
    let result = unsafe { driver_calls::cuGetProcAddress_v2(symbol, pfn, version, flags, status) };
    let again = |version| {
        let (mut address, mut status) = (std::ptr::null_mut(), 0);
        // SAFETY: the caller's symbol, and room for what the driver writes.
        unsafe { driver_calls::cuGetProcAddress_v2(symbol, &mut address, version, flags, &mut status) }
            .ok()
            .ok()?;
        Some(address as usize)
    };
    // SAFETY: the caller's symbol, and the pointer that the driver has written through.
    unsafe { answer(result, symbol, pfn, version, flags, again) }
}

/// Replaces the driver's answer by the hook.
///
/// # Safety
///
/// `symbol` and `pfn` as the driver requires them, if `result` is success.
unsafe fn answer(
    result: CuResult,
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
    again: impl Fn(i32) -> Option<usize>,
) -> CuResult {
    if !result.is_success() || symbol.is_null() || pfn.is_null() {
        return result;
    }
    // SAFETY: the driver has just written it, or the caller has initialised it.
    let address = unsafe { *pfn } as usize;
    // If the driver returns success without an address, `status` says that there is no such entry point.
    if address == 0 {
        return result;
    }
    // SAFETY: a C string that the driver has read.
    let base = unsafe { CStr::from_ptr(symbol) };
    let request = Request {
        base: base.to_bytes(),
        version: version.max(0) as u32,
        per_thread: flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM != 0,
    };
    match translate(&request, address, |hooked| hooked.real.get_if_loaded(), |v| again(v as i32)) {
        Translation::Hook(hooked) => {
            hooked.real.adopt(address);
            // SAFETY: the driver has just written it.
            unsafe { *pfn = hooked.hook.address() as *mut c_void };
        }
        Translation::Pass => {}
        Translation::Unknown => note_unknown(base, version),
    }
    result
}

/// A request to `cuGetProcAddress`.
struct Request<'a> {
    base: &'a [u8],
    version: u32,
    per_thread: bool,
}

/// What the application gets instead of the driver's answer.
#[derive(Clone, Copy)]
enum Translation {
    /// This hook.
    Hook(Hooked),
    /// The driver's answer: the row is not hooked.
    Pass,
    /// The driver's answer: no row is known to match.
    Unknown,
}

/// Finds the row of an address that the driver returned. `again` repeats the request for another version.
fn translate(
    request: &Request<'_>,
    address: usize,
    real_address: impl Fn(&Hooked) -> Option<usize>,
    again: impl Fn(u32) -> Option<usize>,
) -> Translation {
    let is_it = |e: &Entry| e.hooked.filter(|hooked| real_address(hooked) == Some(address));
    let version = request.version.min(entry_points::KNOWN_VERSION);
    let row = entry_points::by_version(request.base, version, request.per_thread);
    // The driver may export one function under several names, so the row that the request names comes first, then other rows
    // of its base name, because an older driver answers with an older form.
    if let Some(hooked) = row.and_then(is_it) {
        return Translation::Hook(hooked);
    }
    let mut of_base = entry_points::ENTRIES.iter().filter(|e| e.base.as_bytes() == request.base);
    if let Some(hooked) = of_base.find_map(is_it) {
        return Translation::Hook(hooked);
    }
    let Some(row) = row else {
        return entry_points::ENTRIES.iter().find_map(is_it).map_or(Translation::Unknown, Translation::Hook);
    };
    // The address matches no row. A request for a version newer than the table may have been answered with a newer signature,
    // unless the newest version in the table gets the same answer.
    if request.version > entry_points::KNOWN_VERSION && again(entry_points::KNOWN_VERSION) != Some(address) {
        return Translation::Unknown;
    }
    let Some(hooked) = row.hooked else { return Translation::Pass };
    if real_address(&hooked).is_some() {
        return Translation::Hook(hooked);
    }
    // The driver does not export this form, so there is only the name to go by. That is enough if the table has only one form
    // of that name, and so only one signature.
    let forms = entry_points::ENTRIES
        .iter()
        .filter(|e| e.base.as_bytes() == request.base && e.per_thread == row.per_thread && e.since <= version)
        .count();
    if forms == 1 { Translation::Hook(hooked) } else { Translation::Unknown }
}

fn note_unknown(base: &CStr, version: i32) {
    static NAMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let so_far = UNKNOWN.fetch_add(1, Ordering::Relaxed) + 1;
    let name = base.to_string_lossy().into_owned();
    let new = nvshare::sync::lock(&NAMED).insert(name);
    if new {
        // The CUDA runtime looks up all entry points before it calls cuInit.
        crate::log::initialise();
        tracing::info!(
            entry_point = ?base,
            version,
            so_far,
            "the driver gave out an entry point that nvshare doesn't know, because the driver is newer: nvshare does not see calls to it"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpose::entry_points::{Class, ENTRIES, by_export};

    /// A made-up address of a driver's function: the number of its row.
    fn made_up(entry: &Entry) -> usize {
        0x7000_0000 + ENTRIES.iter().position(|e| e.export == entry.export).unwrap() * 16
    }

    fn made_up_of(hooked: &Hooked) -> usize {
        let is_it = |e: &&Entry| e.hooked.is_some_and(|h| std::ptr::eq(h.real, hooked.real));
        made_up(ENTRIES.iter().find(is_it).unwrap())
    }

    fn row(export: &str) -> &'static Entry {
        by_export(export.as_bytes()).unwrap()
    }

    /// The translation of a request that the driver answers with the function of `answer`, or with an unknown address.
    fn translated(
        base: &str,
        version: u32,
        per_thread: bool,
        answer: Option<&str>,
    ) -> Result<&'static str, bool> {
        translated_by(base, version, per_thread, answer, |_| true, |_| None)
    }

    /// `Ok` is the hook; `Err` says whether the request was understood.
    fn translated_by(
        base: &str,
        version: u32,
        per_thread: bool,
        answer: Option<&str>,
        exports: impl Fn(&Entry) -> bool,
        again: impl Fn(u32) -> Option<usize>,
    ) -> Result<&'static str, bool> {
        let request = Request { base: base.as_bytes(), version, per_thread };
        let entry_of = |hooked: &Hooked| {
            ENTRIES.iter().find(|e| e.hooked.is_some_and(|h| std::ptr::eq(h.real, hooked.real))).unwrap()
        };
        let real = |hooked: &Hooked| exports(entry_of(hooked)).then(|| made_up_of(hooked));
        let address = answer.map_or(0x10, |export| made_up(row(export)));
        match translate(&request, address, real, again) {
            Translation::Hook(hooked) => Ok(entry_of(&hooked).export),
            Translation::Pass => Err(true),
            Translation::Unknown => Err(false),
        }
    }

    #[test]
    fn every_hooked_row_is_found_by_its_address() {
        for entry in ENTRIES.iter().filter(|e| e.hooked.is_some()) {
            let got = translated(entry.base, entry.since, entry.per_thread, Some(entry.export));
            assert_eq!(got, Ok(entry.export));
        }
    }

    #[test]
    fn rows_that_pass_are_left_alone() {
        for entry in ENTRIES.iter().filter(|e| e.class == Class::Pass) {
            assert_eq!(
                translated(entry.base, entry.since, entry.per_thread, Some(entry.export)),
                Err(true),
                "{}",
                entry.export
            );
        }
    }

    #[test]
    fn an_older_driver_answers_with_an_older_form() {
        assert_eq!(translated("cuCtxCreate", 12_050, false, Some("cuCtxCreate_v2")), Ok("cuCtxCreate_v2"));
        assert_eq!(
            translated("cuMemPrefetchAsync", 13_000, true, Some("cuMemPrefetchAsync_ptsz")),
            Ok("cuMemPrefetchAsync_ptsz")
        );
    }

    #[test]
    fn a_lookup_of_the_lookup_gives_the_hook_of_the_right_form() {
        assert_eq!(
            translated("cuGetProcAddress", 11_030, false, Some("cuGetProcAddress")),
            Ok("cuGetProcAddress")
        );
        assert_eq!(
            translated("cuGetProcAddress", 12_000, true, Some("cuGetProcAddress_v2")),
            Ok("cuGetProcAddress_v2")
        );
    }

    #[test]
    fn an_address_of_no_symbol_is_known_by_name_version_and_flag() {
        assert_eq!(translated("cuLaunchKernel", 12_000, true, None), Ok("cuLaunchKernel_ptsz"));
        assert_eq!(translated("cuLaunchKernel", 12_000, false, None), Ok("cuLaunchKernel"));
        assert_eq!(translated("cuGraphInstantiate", 12_000, false, None), Ok("cuGraphInstantiateWithFlags"));
        assert_eq!(translated("cuEventRecord", 12_000, false, None), Err(true));
        assert_eq!(translated("cuNeverHeardOf", 12_000, false, None), Err(false));
    }

    #[test]
    fn a_version_newer_than_the_table_is_hooked_only_if_nothing_changed() {
        let newer = entry_points::KNOWN_VERSION + 1000;
        let ask = |again: Option<usize>| {
            translated_by("cuMemcpyBatchAsync", newer, false, None, |_| true, move |_| again)
        };
        assert_eq!(ask(Some(0x10)), Ok("cuMemcpyBatchAsync_v2"));
        assert_eq!(ask(Some(0x20)), Err(false));
        // Known by its address: no second request.
        assert_eq!(translated("cuMemcpyAsync", newer, false, Some("cuMemcpyAsync")), Ok("cuMemcpyAsync"));
    }

    #[test]
    fn a_form_that_the_driver_does_not_export_is_hooked_only_if_there_is_no_other() {
        let none = |_: &Entry| false;
        assert_eq!(
            translated_by("cuGraphLaunch", 12_000, true, None, none, |_| None),
            Ok("cuGraphLaunch_ptsz")
        );
        assert_eq!(translated_by("cuMemPrefetchAsync", 12_020, false, None, none, |_| None), Err(false));
    }
}
