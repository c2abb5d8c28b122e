//! What one process sees of the simulated GPU's driver. Every test runs in a process of its own on a machine of its own.

mod common;

use common::*;

#[test]
fn data_survives_eviction_at_the_same_address() {
    alone("data_survives_eviction_at_the_same_address", &[], || {
        let cuda = Cuda::with_context();
        let (bytes, words) = (2 * PAGE, 2 * PAGE / 8);
        let before = cuda.free_bytes();
        let pointer = cuda.reserve(bytes);
        cuda.back(pointer, PAGE);
        cuda.back(pointer + PAGE, PAGE);
        assert_eq!(cuda.free_bytes(), before - bytes);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), 0, &[pointer, words, 3]), 0);
        let saved = cuda.read(pointer, words as usize);
        assert!(saved.iter().enumerate().all(|(i, &x)| x == iota(i as u64, 3)));

        assert_eq!(cuda.unmap(pointer, bytes), 0);
        assert_eq!(cuda.free_bytes(), before);
        cuda.back(pointer, bytes);
        assert!(cuda.read(pointer, words as usize).iter().all(|&x| x == 0), "fresh memory is zero");
        cuda.write(pointer, &saved);

        assert_eq!(cuda.launch(cuda.function("nvshare_mix_u64"), 0, &[pointer, words, 9]), 0);
        let sums = cuda.alloc(16);
        assert_eq!(cuda.launch(cuda.function("nvshare_checksum_u64"), 0, &[sums, pointer, words]), 0);
        assert_eq!(cuda.launch(cuda.function("nvshare_nonzero_u64"), 0, &[sums + 8, pointer, words]), 0);
        let expected =
            (0..words).fold(0u64, |sum, i| sum.wrapping_add(mix(iota(i, 3), 9).wrapping_mul(2 * i + 1)));
        assert_eq!(cuda.read(sums, 2), [expected, words]);
        assert_eq!(cuda.counters().vmm_creates, 3);
    });
}

#[test]
fn vmm_misuse_is_refused() {
    alone("vmm_misuse_is_refused", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        let pointer = cuda.reserve(4 * PAGE);
        let handle = cuda.try_create(2 * PAGE, false).unwrap();
        assert_eq!(cuda.try_create(PAGE + 1, false), Err(1));
        assert_eq!(cuda.set_access(pointer, PAGE), 1, "nothing is mapped");
        assert_eq!(cuda.map(pointer + PAGE, 2 * PAGE, handle), 0);
        assert_eq!(cuda.map(pointer + 2 * PAGE, 2 * PAGE, handle), 1, "taken");
        assert_eq!(cuda.map(pointer + 3 * PAGE, 2 * PAGE, handle), 1, "beyond the reservation");
        assert_eq!(cuda.unmap(pointer + PAGE, PAGE), 1, "half a mapping");
        assert_eq!(call!(cuda, "cuMemAddressFree", pointer => u64, 4 * PAGE => u64), 1, "still mapped");
        assert_eq!(cuda.release(handle), 0);
        assert_eq!(cuda.release(handle), 1, "released twice");
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE, "the mapping keeps the memory");
        let mut again = 0usize;
        let at = pointer + 2 * PAGE;
        assert_eq!(call!(cuda, "cuMemRetainAllocationHandle", &mut again => &mut usize, at => u64), 0);
        assert_eq!(again, handle);
        assert_eq!(cuda.unmap(pointer + PAGE, 2 * PAGE), 0);
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE, "the handle keeps the memory");
        assert_eq!(cuda.release(handle), 0);
        assert_eq!(cuda.free_bytes(), before);
        assert_eq!(cuda.unmap(pointer + PAGE, 2 * PAGE), 0, "there is nothing left: seen on an H200");
        assert_eq!(cuda.unmap(pointer + 3 * PAGE, 2 * PAGE), 1, "beyond the reservation");
        assert_eq!(call!(cuda, "cuMemAddressFree", pointer => u64, PAGE => u64), 1, "half a reservation");
        assert_eq!(call!(cuda, "cuMemAddressFree", pointer => u64, 4 * PAGE => u64), 0);
    });
}

#[test]
fn host_memory_backs_device_addresses_for_free() {
    alone("host_memory_backs_device_addresses_for_free", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        let pointer = cuda.reserve(PAGE);
        let handle = cuda.try_create(PAGE, true).unwrap();
        assert_eq!(cuda.map(pointer, PAGE, handle), 0);
        assert_eq!(cuda.set_access(pointer, PAGE), 0);
        assert_eq!(cuda.free_bytes(), before);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), 0, &[pointer, 100, 1]), 0);
        assert_eq!(cuda.read(pointer, 100)[99], iota(99, 1));
    });
}

#[test]
fn an_illegal_access_is_found_when_it_runs_and_sticks() {
    alone("an_illegal_access_is_found_when_it_runs_and_sticks", &[], || {
        let cuda = Cuda::with_context();
        let stream = cuda.stream(1);
        let pointer = cuda.reserve(2 * PAGE);
        cuda.back(pointer, PAGE);
        let (spin, iota) = (cuda.function("nvshare_spin"), cuda.function("nvshare_iota_u64"));
        assert_eq!(cuda.launch(iota, stream, &[pointer, PAGE / 8, 0]), 0);
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(cuda.launch(spin, stream, &[300_000_000]), 0);
        assert_eq!(cuda.launch(iota, stream, &[pointer, PAGE / 8, 0]), 0, "not judged at the launch");
        assert_eq!(cuda.unmap(pointer, PAGE), 0);
        assert_eq!(call!(cuda, "cuStreamQuery", stream => usize), NOT_READY);
        assert_eq!(cuda.sync(stream), ILLEGAL_ADDRESS);
        assert_eq!(cuda.try_alloc(8), Err(ILLEGAL_ADDRESS));
        assert_eq!(call!(cuda, "cuCtxSynchronize"), ILLEGAL_ADDRESS);
        assert_eq!(cuda.launch(iota, stream, &[pointer, 1, 0]), ILLEGAL_ADDRESS);
        assert_eq!(cuda.counters().illegal_accesses, 1);
        assert_eq!(call!(cuda, "cuDevicePrimaryCtxReset_v2", 0 => i32), 0);
        let mut context = 0usize;
        let again = call!(cuda, "cuDevicePrimaryCtxRetain", &mut context => &mut usize, 0 => i32);
        assert_eq!(again, ILLEGAL_ADDRESS, "the process is broken for good");
    });
}

#[test]
fn a_mapping_without_access_is_illegal() {
    alone("a_mapping_without_access_is_illegal", &[], || {
        let cuda = Cuda::with_context();
        let pointer = cuda.reserve(PAGE);
        let handle = cuda.try_create(PAGE, false).unwrap();
        assert_eq!(cuda.map(pointer, PAGE, handle), 0);
        assert_eq!(call!(cuda, "cuMemsetD8_v2", pointer => u64, 1 => u8, 10 => u64), ILLEGAL_ADDRESS);
    });
}

#[test]
fn a_graph_replays_what_was_captured() {
    alone("a_graph_replays_what_was_captured", &[], || {
        let cuda = Cuda::with_context();
        let (origin, side) = (cuda.stream(1), cuda.stream(1));
        let (a, b) = (cuda.alloc(8000), cuda.alloc(8000));
        let (iota_kernel, mix_kernel) = (cuda.function("nvshare_iota_u64"), cuda.function("nvshare_mix_u64"));
        let (mut fork, mut join) = (0usize, 0usize);
        assert_eq!(call!(cuda, "cuEventCreate", &mut fork => &mut usize, 2 => u32), 0);
        assert_eq!(call!(cuda, "cuEventCreate", &mut join => &mut usize, 2 => u32), 0);

        assert_eq!(call!(cuda, "cuStreamBeginCapture_v2", origin => usize, 0 => u32), 0);
        let mut arguments = [a, 1000, 5];
        assert_eq!(cuda.launch(iota_kernel, origin, &arguments), 0);
        arguments.fill(6); // They were copied.
        std::hint::black_box(arguments);
        assert_eq!(call!(cuda, "cuEventRecord", fork => usize, origin => usize), 0);
        assert_eq!(call!(cuda, "cuStreamWaitEvent", side => usize, fork => usize, 0 => u32), 0);
        assert_eq!(call!(cuda, "cuMemcpyDtoDAsync_v2", b => u64, a => u64, 8000 => u64, side => usize), 0);
        assert_eq!(cuda.launch(mix_kernel, side, &[b, 1000, 7]), 0);
        assert_eq!(call!(cuda, "cuEventRecord", join => usize, side => usize), 0);
        assert_eq!(call!(cuda, "cuEventSynchronize", join => usize), 907);
        assert_eq!(call!(cuda, "cuStreamWaitEvent", origin => usize, join => usize, 0 => u32), 0);
        let (mut graph, mut exec, mut count) = (0usize, 0usize, 0usize);
        assert_eq!(call!(cuda, "cuStreamEndCapture", origin => usize, &mut graph => &mut usize), 0);
        assert_eq!(call!(cuda, "cuGraphGetNodes", graph => usize, 0 => usize, &mut count => &mut usize), 0);
        assert_eq!(count, 3);
        assert_eq!(cuda.counters().launches, 0, "nothing has run");
        assert_eq!(cuda.read(a, 1), [0]);

        let code =
            call!(cuda, "cuGraphInstantiateWithFlags", &mut exec => &mut usize, graph => usize, 0 => u64);
        assert_eq!(code, 0);
        assert_eq!(call!(cuda, "cuGraphDestroy", graph => usize), 0);
        for _ in 0..3 {
            assert_eq!(call!(cuda, "cuGraphLaunch", exec => usize, origin => usize), 0);
        }
        assert_eq!(cuda.sync(origin), 0);
        assert_eq!(cuda.counters().launches, 6);
        assert_eq!(cuda.read(b, 1000)[999], mix(iota(999, 5), 7));
    });
}

#[test]
fn capture_is_ruined_by_what_it_cannot_express() {
    alone("capture_is_ruined_by_what_it_cannot_express", &[], || {
        let cuda = Cuda::with_context();
        let (stream, blocking) = (cuda.stream(1), cuda.stream(0));
        let begin = |stream, mode| call!(cuda, "cuStreamBeginCapture_v2", stream => usize, mode => u32);
        let end = |stream| {
            let mut graph = 0usize;
            call!(cuda, "cuStreamEndCapture", stream => usize, &mut graph => &mut usize)
        };
        for mode in 0..3 {
            assert_eq!(begin(stream, mode), 0);
            assert_eq!(call!(cuda, "cuCtxSynchronize"), 900, "in every mode");
            assert_eq!(cuda.launch(cuda.function("nvshare_null"), stream, &[]), 901);
            assert_eq!(end(stream), 901);
        }
        assert_eq!(begin(stream, 0), 0);
        assert_eq!(cuda.sync(stream), 900);
        assert_eq!(end(stream), 901);

        assert_eq!(begin(stream, 0), 0);
        let other = cuda.stream(1);
        assert_eq!(cuda.sync(other), 0, "another stream may be waited for");
        cuda.reserve(PAGE);
        assert_eq!(cuda.try_alloc(8), Err(900), "unsafe in global mode");
        assert_eq!(end(stream), 901);

        assert_eq!(begin(stream, 2), 0);
        assert!(cuda.try_alloc(8).is_ok(), "but not in relaxed mode");
        assert_eq!(end(stream), 0);

        assert_eq!(begin(blocking, 2), 0);
        assert_eq!(
            cuda.launch(cuda.function("nvshare_null"), 0, &[]),
            906,
            "the null stream would have to wait"
        );
        assert_eq!(end(blocking), 901);

        assert_eq!(begin(stream, 2), 0);
        assert_eq!(
            call!(cuda, "cuStreamBeginCapture_v2", 0 => usize, 2 => u32),
            900,
            "never the null stream"
        );
        assert_eq!(end(stream), 0);
    });
}

#[test]
fn the_null_stream_is_ordered_with_blocking_streams() {
    alone("the_null_stream_is_ordered_with_blocking_streams", &[], || {
        let cuda = Cuda::with_context();
        let (blocking, free) = (cuda.stream(0), cuda.stream(1));
        let (spin, fill) = (cuda.function("nvshare_spin"), cuda.function("nvshare_iota_u64"));
        let pointer = cuda.alloc(4096);
        let query = |stream: usize| call!(cuda, "cuStreamQuery", stream => usize);

        assert_eq!(cuda.launch(spin, blocking, &[200_000_000]), 0);
        assert_eq!(cuda.launch(fill, blocking, &[pointer, 10, 1]), 0);
        assert_eq!(query(free), 0, "a non-blocking stream doesn't care");
        assert_eq!(query(0), NOT_READY);
        assert_eq!(cuda.read(pointer, 10)[9], iota(9, 1), "the copy in the null stream came after");
        assert_eq!(query(blocking), 0);

        assert_eq!(cuda.launch(spin, 0, &[200_000_000]), 0);
        assert_eq!(cuda.launch(cuda.function("nvshare_null"), blocking, &[]), 0);
        assert_eq!(query(blocking), NOT_READY, "behind the null stream");
        assert_eq!(cuda.launch(cuda.function("nvshare_null"), free, &[]), 0);
        assert_eq!(query(free), 0);
        assert_eq!(cuda.sync(blocking), 0);
        assert_eq!(query(0), 0);

        // The per-thread flavour of the null stream is a blocking stream of its own.
        assert_eq!(cuda.launch(spin, blocking, &[100_000_000]), 0);
        assert_eq!(call!(cuda, "cuStreamQuery_ptsz", 0 => usize), 0);
        assert_eq!(cuda.sync(0), 0);
    });
}

#[test]
fn events_and_waits_order_streams() {
    alone("events_and_waits_order_streams", &[], || {
        let cuda = Cuda::with_context();
        let (first, second) = (cuda.stream(1), cuda.stream(1));
        let (mut start, mut end) = (0usize, 0usize);
        assert_eq!(call!(cuda, "cuEventCreate", &mut start => &mut usize, 0 => u32), 0);
        assert_eq!(call!(cuda, "cuEventCreate", &mut end => &mut usize, 0 => u32), 0);
        assert_eq!(call!(cuda, "cuEventRecord", start => usize, first => usize), 0);
        assert_eq!(cuda.launch(cuda.function("nvshare_spin"), first, &[50_000_000]), 0);
        assert_eq!(call!(cuda, "cuEventRecord", end => usize, first => usize), 0);
        assert_eq!(call!(cuda, "cuEventQuery", end => usize), NOT_READY);
        assert_eq!(call!(cuda, "cuStreamWaitEvent", second => usize, end => usize, 0 => u32), 0);
        let pointer = cuda.alloc(4096);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), second, &[pointer, 1, 1]), 0);
        assert_eq!(cuda.sync(second), 0);
        assert_eq!(call!(cuda, "cuEventQuery", end => usize), 0, "the second stream waited");
        let mut ms = 0f32;
        let code = call!(cuda, "cuEventElapsedTime_v2", &mut ms => &mut f32, start => usize, end => usize);
        assert_eq!(code, 0);
        assert!(ms >= 50.0, "{ms}");
    });
}

#[test]
fn null_launches_need_no_thread() {
    alone("null_launches_need_no_thread", &[], || {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let cuda = Cuda::with_context();
        let (null, stream, before) = (cuda.function("nvshare_null"), cuda.stream(0), threads());
        for _ in 0..10_000 {
            assert_eq!(cuda.launch(null, stream, &[]), 0);
            assert_eq!(cuda.launch(null, 0, &[]), 0);
        }
        assert_eq!(cuda.sync(stream), 0);
        assert_eq!(threads(), before);
        assert_eq!(cuda.counters().launches, 20_000);
    });
}

#[test]
fn copies_of_boxes_and_patterns() {
    alone("copies_of_boxes_and_patterns", &[], || {
        #[repr(C)]
        struct Corner(usize, usize, u32, *mut u8, u64, usize, usize);
        #[repr(C)]
        struct Plane {
            src: Corner,
            dst: Corner,
            width: usize,
            height: usize,
        }
        let cuda = Cuda::with_context();
        let (mut pointer, mut pitch) = (0u64, 0usize);
        let code = call!(
            cuda, "cuMemAllocPitch_v2",
            &mut pointer => &mut u64, &mut pitch => &mut usize, 100 => usize, 10 => usize, 4 => u32,
        );
        assert_eq!((code, pitch), (0, 512));
        let code = call!(
            cuda, "cuMemsetD2D16_v2",
            pointer => u64, pitch => usize, 0xABCD => u16, 50 => usize, 10 => usize,
        );
        assert_eq!(code, 0);
        assert_eq!(cuda.read(pointer + 512, 14)[11..], [0xABCD_ABCD_ABCD_ABCD, 0xABCD_ABCD, 0]);
        let mut rows = vec![0u8; 20 * 5];
        let copy = Plane {
            src: Corner(10, 5, 2, std::ptr::null_mut(), pointer, 0, pitch),
            dst: Corner(0, 0, 1, rows.as_mut_ptr(), 0, 0, 20),
            width: 20,
            height: 5,
        };
        assert_eq!(call!(cuda, "cuMemcpy2D_v2", &copy => &Plane), 0);
        assert!(rows.chunks(2).all(|pair| pair == [0xCD, 0xAB]));
        assert_eq!(cuda.counters().bytes_out, 100 + 14 * 8);
    });
}

#[test]
fn addresses_agree_and_suffixes_are_honoured() {
    alone("addresses_agree_and_suffixes_are_honoured", &[], || {
        let cuda = Cuda::load();
        let look_up = |name: &std::ffi::CStr, version: i32, flags: u64| {
            let (mut function, mut status) = (0usize, 9u32);
            let code = call!(
                cuda, "cuGetProcAddress_v2",
                name.as_ptr() => *const std::ffi::c_char, &mut function => &mut usize, version => i32,
                flags => u64, &mut status => &mut u32,
            );
            (code, function, status)
        };
        assert_eq!(look_up(c"cuMemAlloc", 13000, 0), (0, cuda.symbol("cuMemAlloc_v2"), 0));
        assert_eq!(look_up(c"cuMemcpyHtoD", 13000, 2), (0, cuda.symbol("cuMemcpyHtoD_v2_ptds"), 0));
        assert_eq!(
            look_up(c"cuStreamSynchronize", 13000, 2),
            (0, cuda.symbol("cuStreamSynchronize_ptsz"), 0)
        );
        assert_eq!(look_up(c"cuStreamSynchronize", 13000, 1), (0, cuda.symbol("cuStreamSynchronize"), 0));
        assert_eq!(look_up(c"cuMemAlloc", 2000, 0), (500, 0, 2));
        assert_eq!(look_up(c"cuMemAllocNever", 13000, 0), (500, 0, 1), "what isn't supported isn't there");
    });
}

#[test]
fn faults_come_on_demand() {
    alone("faults_come_on_demand", &[("NVSHARE_SIM_FAIL", "cuMemCreate:2,cuMemMap:1:999")], || {
        let cuda = Cuda::with_context();
        assert_eq!(cuda.try_create(PAGE, false), Err(OUT_OF_MEMORY));
        assert_eq!(cuda.try_create(PAGE, false), Err(OUT_OF_MEMORY));
        let handle = cuda.try_create(PAGE, false).unwrap();
        let pointer = cuda.reserve(PAGE);
        assert_eq!(cuda.map(pointer, PAGE, handle), 999);
        assert_eq!(cuda.map(pointer, PAGE, handle), 0);
    });
}

#[test]
fn a_forked_child_cannot_use_the_driver() {
    alone("a_forked_child_cannot_use_the_driver", &[], || {
        let cuda = Cuda::with_context();
        // SAFETY: the child only calls the driver, which refuses at once, and leaves.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = call!(cuda, "cuCtxSynchronize");
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(i32::from(code != 3)) };
        }
        let mut status = -1;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        assert_eq!(status, 0);
        assert_eq!(call!(cuda, "cuCtxSynchronize"), 0);
    });
}

/// A machine with room for eight managed pages beside the context.
const EIGHT_PAGES: &[(&str, &str)] = &[
    ("NVSHARE_SIM_MEMORY", "18MiB"),
    ("NVSHARE_SIM_CONTEXT_BYTES", "2MiB"),
    ("NVSHARE_SIM_LINK_BANDWIDTH", "64GiB"),
];

#[test]
fn managed_memory_that_fits_is_faulted_once_and_what_does_not_every_time() {
    let test = "managed_memory_that_fits_is_faulted_once_and_what_does_not_every_time";
    alone(test, EIGHT_PAGES, || {
        let cuda = Cuda::with_context();
        let fill = cuda.function("nvshare_iota_u64");
        let walk = |pointer: u64, pages: u64| {
            let before = cuda.counters();
            for page in 0..pages {
                assert_eq!(cuda.launch(fill, 0, &[pointer + page * PAGE, PAGE / 8, page]), 0);
            }
            assert_eq!(cuda.sync(0), 0);
            let after = cuda.counters();
            (after.um_faults - before.um_faults, after.um_evictions - before.um_evictions)
        };
        let fits = cuda.managed(8 * PAGE);
        assert_eq!(walk(fits, 8), (8, 0));
        assert_eq!(walk(fits, 8), (0, 0));
        assert_eq!(cuda.free_bytes(), 0);
        cuda.free(fits);
        assert_eq!(cuda.free_bytes(), 8 * PAGE);

        let slightly_more = cuda.managed(9 * PAGE);
        assert_eq!(walk(slightly_more, 9), (9, 1));
        for _ in 0..3 {
            assert_eq!(walk(slightly_more, 9), (9, 9), "LRU finds nothing again");
        }
        assert_eq!(cuda.read(slightly_more + 8 * PAGE, 3)[2], iota(2, 8), "and yet nothing is lost");

        let device = cuda.alloc(4 * PAGE);
        assert_eq!(cuda.free_bytes(), 0, "an allocation drives managed pages out");
        assert_eq!(walk(slightly_more, 4), (4, 4));
        assert_eq!(walk(slightly_more, 4), (0, 0));
        cuda.free(device);
    });
}
