//! The table as the kernel has it, and the kernel of the simulated GPU through the driver's own interface. A test on
//! the simulated GPU runs in a process of its own, because a process has one driver and one machine.

use super::*;
use crate::memory::fingerprint::{FingerprintEntry, own_keys};
use crate::memory::zero_scan::ZeroEntry;
use nvshare_test_support::Dice;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn an_entry_is_for_whole_granules_of_at_most_a_chunk() {
    let at = 7 * CHUNK;
    for size in [GRANULE, 3 * GRANULE, CHUNK] {
        assert_eq!(
            entry::<ZeroEntry>(at, size).map(|entry| entry.answer().count_ones()),
            Some((size / GRANULE) as u32)
        );
    }
    for (address, size) in [
        (at, 0),
        (at, GRANULE - 1),
        (at, GRANULE + 512),
        (at, CHUNK + GRANULE),
        (at, u64::MAX),
        (at + 512, GRANULE),
    ] {
        assert!(entry::<ZeroEntry>(address, size).is_none(), "{address:x} {size}");
    }
}

/// The driver that cargo has built beside the tests.
fn simulated_driver() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let candidates = [deps.join("libsimcuda.so"), deps.parent().unwrap().join("libsimcuda.so")];
    candidates.into_iter().find(|path| path.exists()).expect("libsimcuda.so is built with the tests")
}

/// Runs `body` in a process that has a simulated GPU of 512 MiB to itself, and a context and a stream on it.
fn on_a_gpu(test: &str, variables: &[(&str, &str)], body: impl FnOnce(&'static Driver, CUstream)) {
    const ROLE: &str = "NVSHARE_TEST_ROLE";
    if std::env::var_os(ROLE).is_none() {
        // A name that no segment has, also after a process with this pid was killed and left one.
        let folder = tempfile::tempdir().unwrap();
        let unique = folder.path().file_name().unwrap().to_string_lossy();
        let machine = format!("nvshare-scan-{unique}-{test}");
        let output = Command::new(std::env::current_exe().unwrap())
            .args([&format!("memory::scan::tests::{test}"), "--exact", "--nocapture"])
            .envs([(ROLE, "application"), ("NVSHARE_SIM_NAME", &machine), ("NVSHARE_SIM_MEMORY", "512MiB")])
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let _ = std::fs::remove_file(format!("/dev/shm/{machine}"));
        let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let path = std::ffi::CString::new(simulated_driver().into_os_string().into_encoded_bytes()).unwrap();
    // SAFETY: a C string; the library is a driver. It has the driver's name, by which it is found from now on.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null());
    let driver = Driver::get().unwrap();
    driver.init(0).unwrap();
    driver.ctx_set_current(driver.primary_ctx_retain(0).unwrap()).unwrap();
    body(driver, driver.stream_create(CU_STREAM_NON_BLOCKING).unwrap());
}

/// The kernel, from the code that is at hand for the simulated GPU.
fn loaded<E: Entry>(driver: &'static Driver) -> Result<Scanner<E>, SwapError> {
    Scanner::new(driver, compiled::code_for(E::COMPILED, compiled::Capability::new(7, 5)).unwrap())
}

/// A chunk of the GPU's memory, all zero.
fn chunk(driver: &Driver, stream: CUstream, granules: u64) -> (CUdeviceptr, u64) {
    let size = granules * GRANULE;
    let address = driver.mem_alloc(size as usize).unwrap();
    driver.memset_d8_async(address, 0, size as usize, stream).unwrap();
    (address, size)
}

/// Scans, and waits for the result.
fn answer<E: Entry>(
    scanner: &mut Scanner<E>,
    chunks: &[(CUdeviceptr, u64)],
    stream: CUstream,
) -> Result<Vec<E::Answer>, SwapError> {
    let scan = scanner.scan(chunks, stream, own_keys())?;
    scanner.finish(scan)
}

#[test]
fn zero_sparse_and_dense_chunks_of_all_sizes_are_told_apart() {
    on_a_gpu("zero_sparse_and_dense_chunks_of_all_sizes_are_told_apart", &[], |driver, stream| {
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let mut dice = Dice::from_environment(1);
        let (mut chunks, mut expected) = (Vec::new(), Vec::new());
        for granules in [1, 2, 5, 31, 32] {
            let (zero, sparse, dense) = (
                chunk(driver, stream, granules),
                chunk(driver, stream, granules),
                chunk(driver, stream, granules),
            );
            driver.memset_d8_async(dense.0, 0x5a, dense.1 as usize, stream).unwrap();
            // One byte in about every second granule: its first, its last, one in the middle, one at an odd offset.
            let mut bits = 0u32;
            for granule in (0..granules).filter(|granule| granules == 1 || granule % 2 == 1) {
                let somewhere = dice.below(GRANULE);
                let offset = [0, GRANULE - 1, GRANULE / 2, somewhere | 1, somewhere][dice.below(5) as usize];
                let value = 1 << dice.below(8);
                driver.memset_d8_async(sparse.0 + granule * GRANULE + offset, value, 1, stream).unwrap();
                bits |= 1 << granule;
            }
            chunks.extend([zero, sparse, dense]);
            expected.extend([0, bits, (u64::from(u32::MAX) >> (32 - granules)) as u32]);
        }
        assert_eq!(answer(&mut scanner, &chunks, stream).unwrap(), expected);
        // The complement, in a table that still has the previous results.
        chunks.reverse();
        expected.reverse();
        assert_eq!(answer(&mut scanner, &chunks, stream).unwrap(), expected);
        assert!(answer(&mut scanner, &[], stream).unwrap().is_empty());
        scanner.destroy();
    });
}

#[test]
fn a_scan_sees_the_work_before_it_in_its_stream() {
    on_a_gpu("a_scan_sees_the_work_before_it_in_its_stream", &[], |driver, stream| {
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let chunk = chunk(driver, stream, 4);
        let before = scanner.scan(&[chunk], stream, own_keys()).unwrap();
        driver.memset_d8_async(chunk.0 + 2 * GRANULE, 1, 1, stream).unwrap();
        let after = scanner.scan(&[chunk], stream, own_keys()).unwrap();
        assert_eq!(scanner.finish(after).unwrap(), [0b0100]);
        assert_eq!(scanner.finish(before).unwrap(), [0b0000], "its table was not used for the other");
    });
}

#[test]
fn more_chunks_than_a_table_holds_are_one_scan() {
    on_a_gpu("more_chunks_than_a_table_holds_are_one_scan", &[], |driver, stream| {
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let (base, _) = chunk(driver, stream, 32);
        driver.memset_d8_async(base + 5 * GRANULE, 1, 1, stream).unwrap();
        let chunks: Vec<_> =
            (0..3 * LEAST as u64).map(|index| (base + index % 32 * GRANULE, GRANULE)).collect();
        let found = answer(&mut scanner, &chunks, stream).unwrap();
        assert!(found.iter().enumerate().all(|(index, bits)| *bits == u32::from(index % 32 == 5)));
    });
}

#[test]
fn it_takes_no_room_on_the_gpu() {
    on_a_gpu("it_takes_no_room_on_the_gpu", &[], |driver, stream| {
        let chunk = chunk(driver, stream, 1);
        while driver.mem_alloc(GRANULE as usize).is_ok() {}
        let (free, _) = driver.mem_info().unwrap();
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        assert_eq!(answer(&mut scanner, &[chunk], stream).unwrap(), [0]);
        assert_eq!(driver.mem_info().unwrap().0, free);
    });
}

#[test]
fn it_moves_to_another_context() {
    on_a_gpu("it_moves_to_another_context", &[], |driver, stream| {
        let first = loaded::<ZeroEntry>(driver).unwrap();
        first.destroy();
        let _ = driver.stream_destroy(stream);
        driver.primary_ctx_release(0).unwrap();
        driver.ctx_set_current(driver.primary_ctx_retain(0).unwrap()).unwrap();
        let stream = driver.stream_create(CU_STREAM_NON_BLOCKING).unwrap();
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let chunk = chunk(driver, stream, 2);
        assert_eq!(answer(&mut scanner, &[chunk], stream).unwrap(), [0]);
    });
}

#[test]
fn a_driver_that_cannot_load_is_an_error_and_no_harm() {
    let refuses = [("NVSHARE_SIM_FAIL", "cuModuleLoadData:1:209,cuModuleGetFunction:1:500")];
    on_a_gpu("a_driver_that_cannot_load_is_an_error_and_no_harm", &refuses, |driver, stream| {
        let refused = |call, result| Some(SwapError::Driver { call, result });
        let said = loaded::<ZeroEntry>(driver).err();
        assert_eq!(said, refused("cuModuleLoadData", CuResult::NO_BINARY_FOR_GPU));
        assert_eq!(loaded::<ZeroEntry>(driver).err(), refused("cuModuleGetFunction", CuResult::NOT_FOUND));
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let chunk = chunk(driver, stream, 1);
        assert_eq!(answer(&mut scanner, &[chunk], stream).unwrap(), [0]);
    });
}

#[test]
fn a_failed_launch_is_an_error_and_its_table_is_reused() {
    let refused = [("NVSHARE_SIM_FAIL", "cuLaunchKernel:1:701")];
    on_a_gpu("a_failed_launch_is_an_error_and_its_table_is_reused", &refused, |driver, stream| {
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let chunk = chunk(driver, stream, 1);
        let failed = answer(&mut scanner, &[chunk], stream);
        let result = CuResult::LAUNCH_OUT_OF_RESOURCES;
        assert_eq!(failed, Err(SwapError::Driver { call: "cuLaunchKernel", result }));
        assert_eq!(scanner.spare.len(), 1);
        assert!(answer(&mut scanner, &[(chunk.0, CHUNK + GRANULE)], stream).is_err(), "no chunk");
        assert_eq!(answer(&mut scanner, &[chunk], stream).unwrap(), [0]);
    });
}

#[test]
fn unmapped_memory_has_no_result() {
    on_a_gpu("unmapped_memory_has_no_result", &[], |driver, stream| {
        let mut scanner = loaded::<ZeroEntry>(driver).unwrap();
        let there = chunk(driver, stream, 1);
        let gone = driver.mem_address_reserve(GRANULE as usize, 0, 0, 0).unwrap();
        let failed = answer(&mut scanner, &[there, (gone, GRANULE)], stream);
        let result = CuResult::ILLEGAL_ADDRESS;
        assert_eq!(failed, Err(SwapError::Driver { call: "cuEventSynchronize", result }));
        assert!(scanner.spare.is_empty(), "nobody knows whether the kernel is done with the table");
    });
}

#[test]
fn a_granule_that_has_changed_in_any_byte_has_another_fingerprint() {
    on_a_gpu("a_granule_that_has_changed_in_any_byte_has_another_fingerprint", &[], |driver, stream| {
        let mut scanner = loaded::<FingerprintEntry>(driver).unwrap();
        let mut dice = Dice::from_environment(2);
        let chunks = [1, 5, 32].map(|granules| chunk(driver, stream, granules));
        let before = answer(&mut scanner, &chunks, stream).unwrap();
        let again = answer(&mut scanner, &chunks, stream).unwrap();
        for ((_, size), (one, other)) in chunks.iter().zip(before.iter().zip(&again)) {
            let granules = (size / GRANULE) as usize;
            assert!(
                (0..granules).all(|granule| one[granule].is_still(other[granule])),
                "nothing has changed"
            );
            assert!(
                !(granules..SLOTS).any(|granule| one[granule].is_still(other[granule])),
                "there is nothing"
            );
        }
        // The table of a scan that is over is used again: nothing of the last answers is left.
        for _ in 0..40 {
            let which = dice.below(3) as usize;
            let (base, size) = chunks[which];
            let granule = dice.below(size / GRANULE);
            let offset = [0, GRANULE - 1, GRANULE / 2, dice.below(GRANULE)][dice.below(4) as usize];
            let byte = base + granule * GRANULE + offset;
            driver.memset_d8_async(byte, 1 << dice.below(8), 1, stream).unwrap();
            let now = answer(&mut scanner, &chunks, stream).unwrap();
            for (index, (one, other)) in before.iter().zip(&now).enumerate() {
                for at in 0..(chunks[index].1 / GRANULE) as usize {
                    let same = (index, at as u64) != (which, granule);
                    assert_eq!(
                        one[at].is_still(other[at]),
                        same,
                        "{offset} in granule {granule} of {which}; {at} of {index}"
                    );
                }
            }
            driver.memset_d8_async(byte, 0, 1, stream).unwrap();
        }
        scanner.destroy();
    });
}

#[test]
fn fingerprints_of_memory_that_is_gone_are_an_error() {
    on_a_gpu("fingerprints_of_memory_that_is_gone_are_an_error", &[], |driver, stream| {
        let mut scanner = loaded::<FingerprintEntry>(driver).unwrap();
        let gone = driver.mem_address_reserve(GRANULE as usize, 0, 0, 0).unwrap();
        let failed = answer(&mut scanner, &[(gone, GRANULE)], stream);
        let result = CuResult::ILLEGAL_ADDRESS;
        assert_eq!(failed.err(), Some(SwapError::Driver { call: "cuEventSynchronize", result }));
    });
}

#[test]
fn the_drivers_compiler_makes_the_code_where_there_is_none() {
    let refuses = [("NVSHARE_SIM_FAIL", "cuLinkCreate_v2:1:221,cuLinkAddData_v2:1:218")];
    on_a_gpu("the_drivers_compiler_makes_the_code_where_there_is_none", &refuses, |driver, stream| {
        assert_eq!(driver.compile(ZeroEntry::PTX), Err(CuResult::JIT_COMPILER_NOT_FOUND));
        assert_eq!(driver.compile(ZeroEntry::PTX), Err(CuResult(218)));
        let code = driver.compile(ZeroEntry::PTX).unwrap();
        let mut scanner = Scanner::<ZeroEntry>::new(driver, &code).unwrap();
        let chunk = chunk(driver, stream, 1);
        assert_eq!(answer(&mut scanner, &[chunk], stream).unwrap(), [0]);
    });
}
