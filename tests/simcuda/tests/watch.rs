//! Under NVSHARE_SIM_WATCH a call that comes while memory is out is an illegal access, whatever its arguments.

mod common;

use common::*;

const WATCHED: &[(&str, &str)] = &[("NVSHARE_SIM_WATCH", "1")];

/// The calls of another thread with the context of this one; `act` says what they returned.
fn elsewhere(cuda: &Cuda, act: impl FnOnce() -> i32 + Send) -> i32 {
    let mut context = 0usize;
    assert_eq!(call!(cuda, "cuCtxGetCurrent", &mut context => &mut usize), 0);
    let in_context = || {
        assert_eq!(call!(cuda, "cuCtxSetCurrent", context => usize), 0);
        act()
    };
    std::thread::scope(|scope| scope.spawn(in_context).join().unwrap())
}

/// A call that does no harm: nothing is copied.
fn harmless(cuda: &Cuda) -> i32 {
    call!(cuda, "cuMemcpyDtoD_v2", 0 => u64, 0 => u64, 0 => u64)
}

#[test]
fn a_harmless_call_is_seen_while_memory_is_out_and_not_before_or_after() {
    alone("a_harmless_call_is_seen_while_memory_is_out_and_not_before_or_after", WATCHED, || {
        let cuda = Cuda::with_context();
        let pointer = cuda.reserve(2 * PAGE);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), 0, "what was never mapped is not out");
        cuda.back(pointer, PAGE);
        cuda.back(pointer + PAGE, PAGE);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), 0);
        assert_eq!(cuda.unmap(pointer, PAGE), 0);
        cuda.back(pointer, PAGE);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), 0, "it is back");
        assert_eq!(cuda.unmap(pointer, 2 * PAGE), 0);
        assert_eq!(call!(cuda, "cuMemAddressFree", pointer => u64, 2 * PAGE => u64), 0);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), 0, "nobody has these addresses any more");
        assert_eq!(cuda.counters().illegal_accesses, 0);

        let pointer = cuda.reserve(2 * PAGE);
        cuda.back(pointer, 2 * PAGE);
        assert_eq!(cuda.unmap(pointer, 2 * PAGE), 0);
        cuda.back(pointer, PAGE);
        assert_eq!(elsewhere(&cuda, || call!(cuda, "cuStreamQuery", 0 => usize)), 0, "no work and no memory");
        assert_eq!(cuda.counters().illegal_accesses, 0);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), ILLEGAL_ADDRESS, "half of it is out");
        assert_eq!(elsewhere(&cuda, || call!(cuda, "cuGLUnmapBufferObject", 0 => u32)), ILLEGAL_ADDRESS);
        assert_eq!(cuda.counters().illegal_accesses, 2);
        cuda.back(pointer + PAGE, PAGE);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), ILLEGAL_ADDRESS, "it sticks");
        assert_eq!(cuda.counters().illegal_accesses, 2, "and is not counted again");
    });
}

#[test]
fn whoever_takes_memory_away_may_copy_meanwhile() {
    alone("whoever_takes_memory_away_may_copy_meanwhile", WATCHED, || {
        let cuda = Cuda::with_context();
        let pointer = cuda.reserve(2 * PAGE);
        cuda.back(pointer, PAGE);
        cuda.back(pointer + PAGE, PAGE);
        assert_eq!(cuda.unmap(pointer, PAGE), 0);
        cuda.write(pointer + PAGE, &[1, 2, 3]);
        assert_eq!(cuda.read(pointer + PAGE, 3), [1, 2, 3]);
        assert_eq!(cuda.counters().illegal_accesses, 0);
        let code = call!(cuda, "cuMemsetD8_v2", pointer => u64, 1 => u8, 10 => u64);
        assert_eq!(code, ILLEGAL_ADDRESS, "but not to where nothing is");
    });
}

#[test]
fn nobody_is_watched_who_has_not_asked_for_it() {
    alone("nobody_is_watched_who_has_not_asked_for_it", &[], || {
        let cuda = Cuda::with_context();
        let pointer = cuda.reserve(PAGE);
        cuda.back(pointer, PAGE);
        assert_eq!(cuda.unmap(pointer, PAGE), 0);
        assert_eq!(elsewhere(&cuda, || harmless(&cuda)), 0);
        let unsupported = elsewhere(&cuda, || call!(cuda, "cuGLUnmapBufferObject", 0 => u32));
        assert_eq!(unsupported, 801, "there is no GL");
    });
}
