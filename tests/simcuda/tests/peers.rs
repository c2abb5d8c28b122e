//! Two GPUs in one process.

mod common;

use common::*;

const TWO_GPUS: &[(&str, &str)] = &[("NVSHARE_SIM_GPUS", "2")];

fn enable(cuda: &Cuda, peer: usize) -> i32 {
    call!(cuda, "cuCtxEnablePeerAccess", peer => usize, 0 => u32)
}

#[test]
fn a_kernel_reaches_a_peer_once_it_is_enabled() {
    alone("a_kernel_reaches_a_peer_once_it_is_enabled", TWO_GPUS, || {
        let cuda = Cuda::load();
        let can = |device: i32, peer: i32| {
            let mut can = 9;
            let code = call!(cuda, "cuDeviceCanAccessPeer", &mut can => &mut i32, device => i32, peer => i32);
            assert_eq!(code, 0);
            can
        };
        assert_eq!([can(0, 1), can(1, 0), can(0, 0)], [1, 1, 0]);
        let attribute = |attribute: u32, to: i32| {
            let mut value = 9;
            let code = call!(
                cuda, "cuDeviceGetP2PAttribute",
                &mut value => &mut i32, attribute => u32, 0 => i32, to => i32,
            );
            (code, value)
        };
        assert_eq!([attribute(2, 1), attribute(3, 1)], [(0, 1), (0, 0)]);
        assert_eq!(attribute(2, 0).0, 101, "not between a GPU and itself");

        let second = cuda.enter(1);
        let there = cuda.alloc(PAGE);
        let first = cuda.enter(0);
        let (iota, here) = (cuda.function("nvshare_iota_u64"), cuda.alloc(PAGE));
        assert_eq!(enable(&cuda, first), 201);
        assert_eq!(call!(cuda, "cuCtxDisablePeerAccess", second => usize), 705);
        assert_eq!(enable(&cuda, second), 0);
        assert_eq!(enable(&cuda, second), 704);
        assert_eq!(cuda.launch(iota, 0, &[there, PAGE / 8, 3]), 0);
        assert_eq!(cuda.sync(0), 0);

        cuda.enter(1);
        assert_eq!(cuda.read(there, 2), [common::iota(0, 3), common::iota(1, 3)]);
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), 0, &[here, 1, 3]), 0);
        assert_eq!(cuda.sync(0), ILLEGAL_ADDRESS, "it was one way");
    });
}

#[test]
fn a_kernel_reaches_no_peer_that_was_disabled() {
    alone("a_kernel_reaches_no_peer_that_was_disabled", TWO_GPUS, || {
        let cuda = Cuda::load();
        let second = cuda.enter(1);
        let there = cuda.alloc(PAGE);
        cuda.enter(0);
        let iota = cuda.function("nvshare_iota_u64");
        assert_eq!(enable(&cuda, second), 0);
        assert_eq!(cuda.launch(iota, 0, &[there, 1, 3]), 0);
        assert_eq!(cuda.sync(0), 0);
        assert_eq!(call!(cuda, "cuCtxDisablePeerAccess", second => usize), 0);
        assert_eq!(cuda.launch(iota, 0, &[there, 1, 3]), 0);
        assert_eq!(cuda.sync(0), ILLEGAL_ADDRESS);
    });
}

#[test]
fn copies_between_gpus_need_no_peer_access_but_mappings_need_rights() {
    let test = "copies_between_gpus_need_no_peer_access_but_mappings_need_rights";
    alone(test, TWO_GPUS, || {
        let cuda = Cuda::load();
        let second = cuda.enter(1);
        let there = cuda.alloc(PAGE);
        let handle = cuda.try_create_at(PAGE, on_gpu(1), 0).unwrap();
        let mapped = cuda.reserve(PAGE);
        assert_eq!(cuda.map(mapped, PAGE, handle), 0);
        assert_eq!(cuda.set_accesses(mapped, PAGE, &[Access(on_gpu(1), 3)]), 0);
        let first = cuda.enter(0);
        let here = cuda.alloc(PAGE);
        cuda.write(here, &[1, 2, 3]);
        assert_eq!(call!(cuda, "cuMemcpyDtoD_v2", there => u64, here => u64, 24 => u64), 0);
        assert_eq!(cuda.read(there, 3), [1, 2, 3], "the driver knows whose it is");

        let peer_copy = |dst: u64, to: usize, src: u64, from: usize| {
            call!(
                cuda, "cuMemcpyPeerAsync",
                dst => u64, to => usize, src => u64, from => usize, 24 => u64, 0 => usize,
            )
        };
        assert_eq!(peer_copy(mapped, second, here, first), 0);
        assert_eq!(cuda.sync(0), 0, "each end is open to its own GPU");
        cuda.enter(1);
        assert_eq!(cuda.read(mapped, 3), [1, 2, 3]);

        cuda.enter(0);
        assert_eq!(enable(&cuda, second), 0);
        assert_eq!(call!(cuda, "cuMemcpyDtoD_v2", here => u64, mapped => u64, 24 => u64), ILLEGAL_ADDRESS);
    });
}
