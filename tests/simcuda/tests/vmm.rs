//! Virtual memory management: handles, mappings, rights, and memory that goes to another process.

mod common;

use std::os::fd::RawFd;

use common::*;

const TWO_GPUS: &[(&str, &str)] = &[("NVSHARE_SIM_GPUS", "2")];

#[test]
fn a_handle_is_mapped_several_times_and_outlives_its_release() {
    alone("a_handle_is_mapped_several_times_and_outlives_its_release", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        let handle = cuda.try_create(2 * PAGE, false).unwrap();
        let pointer = cuda.reserve(8 * PAGE);
        assert_eq!(cuda.map(pointer, 2 * PAGE, handle), 0);
        assert_eq!(cuda.map(pointer + 2 * PAGE, PAGE, handle), 0, "its first half once more");
        let offset = call!(
            cuda, "cuMemMap",
            pointer + 4 * PAGE => u64, PAGE => u64, PAGE => u64, handle => usize, 0 => u64,
        );
        assert_eq!(offset, 801, "the real driver takes no offset but zero");
        assert_eq!(cuda.release(handle), 0);
        assert_eq!(cuda.set_access(pointer, 3 * PAGE), 0, "over both mappings");
        cuda.write(pointer + 8, &[42]);
        assert_eq!(cuda.read(pointer + 2 * PAGE, 2), [0, 42]);
        assert_eq!(cuda.free_bytes(), before - 2 * PAGE, "one allocation however often it is mapped");

        assert_eq!(cuda.unmap(pointer, 3 * PAGE - 4096), 1, "half a mapping");
        assert_eq!(cuda.read(pointer + 8, 1), [42], "a refused call changes nothing");
        assert_eq!(cuda.unmap(pointer, 4 * PAGE), 0, "both mappings, and a gap: seen on an H200");
        assert_eq!(cuda.free_bytes(), before);
    });
}

#[test]
fn every_gpu_has_rights_of_its_own() {
    alone("every_gpu_has_rights_of_its_own", TWO_GPUS, || {
        let cuda = Cuda::with_context();
        let iota = cuda.function("nvshare_iota_u64");
        let pointer = cuda.reserve(2 * PAGE);
        for page in 0..2 {
            let handle = cuda.try_create(PAGE, false).unwrap();
            assert_eq!(cuda.map(pointer + page * PAGE, PAGE, handle), 0);
        }
        let accesses = [Access(on_gpu(0), 3), Access(on_gpu(1), 1)];
        assert_eq!(cuda.set_accesses(pointer, 2 * PAGE, &accesses), 0);
        assert_eq!(cuda.set_accesses(pointer, PAGE, &[Access(on_gpu(2), 3)]), 1, "there is no such GPU");
        assert_eq!(
            cuda.set_accesses(pointer, PAGE, &[Access(HOST_NUMA, 3)]),
            1,
            "the host has no place there"
        );
        let rights = |device: i32, at: u64| {
            let (mut flags, location) = (9u64, on_gpu(device));
            let code =
                call!(cuda, "cuMemGetAccess", &mut flags => &mut u64, &location => &Location, at => u64);
            assert_eq!(code, 0);
            flags
        };
        assert_eq!([rights(0, pointer + PAGE), rights(1, pointer + PAGE)], [3, 1]);
        assert_eq!(cuda.launch(iota, 0, &[pointer, 2 * PAGE / 8, 1]), 0);
        assert_eq!(cuda.sync(0), 0);

        cuda.enter(1);
        assert_eq!(cuda.read(pointer + PAGE, 1), [common::iota(PAGE / 8, 1)], "it may read");
        let iota = cuda.function("nvshare_iota_u64");
        assert_eq!(cuda.set_accesses(pointer, PAGE, &[Access(on_gpu(1), 3)]), 0);
        assert_eq!([rights(0, pointer), rights(1, pointer)], [3, 3], "the other GPU keeps what it had");
        assert_eq!(cuda.launch(iota, 0, &[pointer, PAGE / 8, 2]), 0);
        assert_eq!(cuda.sync(0), 0);
        assert_eq!(cuda.launch(iota, 0, &[pointer + PAGE, 1, 2]), 0);
        assert_eq!(cuda.sync(0), ILLEGAL_ADDRESS, "it may not write to the second page");

        cuda.enter(0);
        assert_eq!(
            call!(cuda, "cuCtxSynchronize"),
            ILLEGAL_ADDRESS,
            "the other GPU's context is broken as well"
        );
    });
}

#[test]
fn host_memory_has_rules_of_its_own() {
    alone("host_memory_has_rules_of_its_own", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        assert_eq!(cuda.try_create_at(PAGE, HOST, 1), Err(1), "not for other processes");
        assert_eq!(cuda.try_create_at(PAGE, Location(4, 0), 0), Err(1), "current is no place");
        assert_eq!(cuda.try_create_at(PAGE, on_gpu(0), 2), Err(801), "a handle of Windows");
        let (mut prop, handle) =
            (Prop(0, 0, HOST, 0, [0; 8]), cuda.try_create_at(PAGE, HOST_NUMA, 1).unwrap());
        let code = call!(
            cuda, "cuMemGetAllocationPropertiesFromHandle", &mut prop => &mut Prop, handle => usize,
        );
        assert_eq!((code, prop.0, prop.1, prop.2.0, prop.2.1), (0, 1, 1, 3, 0));
        let pointer = cuda.show(PAGE, handle);
        assert_eq!(cuda.set_accesses(pointer, PAGE, &[Access(HOST_NUMA, 3)]), 0);
        cuda.write(pointer, &[7]);
        // SAFETY: the host was let in just now, and nothing else uses the page.
        assert_eq!(unsafe { (pointer as *const u64).read() }, 7);
        assert_eq!(cuda.free_bytes(), before);
    });
}

fn import(cuda: &Cuda, fd: RawFd) -> Result<usize, i32> {
    let mut handle = 0usize;
    let code = call!(
        cuda, "cuMemImportFromShareableHandle", &mut handle => &mut usize, fd as usize => usize, 1 => u32,
    );
    // SAFETY: the descriptor is ours and not used any more.
    unsafe { libc::close(fd) };
    if code == 0 { Ok(handle) } else { Err(code) }
}

fn export(cuda: &Cuda, handle: usize) -> RawFd {
    let mut fd = -1;
    let code = call!(
        cuda, "cuMemExportToShareableHandle", &mut fd => &mut RawFd, handle => usize, 1 => u32, 0 => u64,
    );
    assert_eq!(code, 0);
    fd
}

#[test]
fn exported_memory_is_the_same_in_both_processes_and_counted_once() {
    let test = "exported_memory_is_the_same_in_both_processes_and_counted_once";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[("NVSHARE_SIM_MEMORY", "64MiB")]);
            let mut maker = machine.start(test, "maker");
            said(&mut maker, "come");
            let mut user = machine.start(test, "user");
            said(&mut user, "mapped");
            kill(maker);
            assert!(user.wait_with_output().unwrap().status.success());
        }
        Some("maker") => {
            let cuda = Cuda::with_context();
            let before = cuda.free_bytes();
            let plain = cuda.try_create(PAGE, false).unwrap();
            let mut fd = -1;
            let code = call!(
                cuda, "cuMemExportToShareableHandle",
                &mut fd => &mut RawFd, plain => usize, 1 => u32, 0 => u64,
            );
            assert_eq!(code, 1, "nobody asked for that when it was made");
            assert_eq!(cuda.release(plain), 0);
            let handle = cuda.try_create_at(4 * PAGE, on_gpu(0), 1).unwrap();
            let pointer = cuda.show(4 * PAGE, handle);
            assert_eq!(cuda.free_bytes(), before - 4 * PAGE);
            let iota = cuda.function("nvshare_iota_u64");
            assert_eq!(cuda.launch(iota, 0, &[pointer, 4 * PAGE / 8, 5]), 0);
            assert_eq!(cuda.sync(0), 0);
            let stream = host_meeting();
            let fd = export(&cuda, handle);
            assert_eq!(cuda.free_bytes(), before - 4 * PAGE - 2 * MIB, "as before, and the other's context");
            let again = import(&cuda, export(&cuda, handle)).unwrap();
            assert_eq!(cuda.release(again), 0);
            send(&stream, b"memory", &[fd]);
            receive(&stream, 1);
            assert_eq!(cuda.read(pointer, 1), [common::mix(common::iota(0, 5), 6)], "the other wrote to it");
            assert_eq!(cuda.unmap(pointer, 4 * PAGE), 0);
            assert_eq!(cuda.release(handle), 0);
            assert_eq!(cuda.free_bytes(), before - 4 * PAGE - 2 * MIB, "the other has it still");
            send(&stream, b"r", &[]);
            say_and_wait("left");
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            let stream = meet();
            let (_, fds) = receive(&stream, 6);
            let before = cuda.free_bytes();
            let handle = import(&cuda, fds[0]).unwrap();
            assert_eq!(cuda.free_bytes(), before, "counted already");
            let pointer = cuda.show(4 * PAGE, handle);
            assert_eq!(cuda.release(handle), 0);
            let words = 4 * PAGE / 8;
            assert_eq!(cuda.read(pointer + (words - 1) * 8, 1), [common::iota(words - 1, 5)]);
            assert_eq!(cuda.launch(cuda.function("nvshare_mix_u64"), 0, &[pointer, words, 6]), 0);
            assert_eq!(cuda.sync(0), 0);
            send(&stream, b"m", &[]);
            receive(&stream, 1);
            println!("mapped");
            // The maker is killed; its context's room comes back, the memory's doesn't.
            while cuda.free_bytes() == before {
                std::thread::yield_now();
            }
            assert_eq!(cuda.free_bytes(), before + 2 * MIB);
            assert_eq!(cuda.try_create(62 * MIB, false), Err(OUT_OF_MEMORY));
            assert_eq!(cuda.read(pointer, 1), [common::mix(common::iota(0, 5), 6)]);
            assert_eq!(cuda.unmap(pointer, 4 * PAGE), 0);
            assert_eq!(cuda.free_bytes(), 62 * MIB, "gone with its last mapping");
        }
    }
}

#[test]
fn a_process_that_dies_with_the_last_hold_gives_the_room_back() {
    let test = "a_process_that_dies_with_the_last_hold_gives_the_room_back";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[("NVSHARE_SIM_MEMORY", "64MiB")]);
            let mut maker = machine.start(test, "maker");
            said(&mut maker, "come");
            let mut user = machine.start(test, "user");
            said(&mut user, "mapped");
            kill(maker);
            kill(user);
            machine.run(test, "heir");
        }
        Some("maker") => {
            let cuda = Cuda::with_context();
            let handle = cuda.try_create_at(40 * MIB, on_gpu(0), 1).unwrap();
            let stream = host_meeting();
            send(&stream, b"memory", &[export(&cuda, handle)]);
            say_and_wait("sent");
        }
        Some("user") => {
            let cuda = Cuda::with_context();
            let handle = import(&cuda, receive(&meet(), 6).1[0]).unwrap();
            cuda.show(40 * MIB, handle);
            say_and_wait("mapped");
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            assert_eq!(cuda.free_bytes(), 62 * MIB);
            assert!(cuda.try_create(62 * MIB, false).is_ok());
        }
    }
}

#[test]
fn processes_that_share_and_die_neither_lose_room_nor_refuse_any() {
    let test = "processes_that_share_and_die_neither_lose_room_nor_refuse_any";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[("NVSHARE_SIM_MEMORY", "64MiB")]);
            let children: Vec<_> = (0..3).map(|_| machine.start(test, "sharer")).collect();
            // They die where they happen to be when a fourth one has been round often enough.
            let counted = machine.start(test, "counter").wait_with_output().unwrap();
            children.into_iter().for_each(kill);
            assert!(counted.status.success(), "{}", String::from_utf8_lossy(&counted.stdout));
            machine.run(test, "heir");
        }
        Some(role @ ("sharer" | "counter")) => {
            let cuda = Cuda::with_context();
            // All fit, but one more that is counted twice would not.
            let bytes = 14 * MIB;
            let mut rounds = 0;
            while role == "sharer" || rounds < 5_000 {
                rounds += 1;
                let handle = cuda.try_create_at(bytes, on_gpu(0), 1).unwrap();
                let again = import(&cuda, export(&cuda, handle)).unwrap();
                assert_eq!(cuda.release(handle), 0);
                assert_eq!(cuda.release(again), 0);
            }
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            assert_eq!(cuda.counters().out_of_memory, 0);
            assert_eq!(cuda.free_bytes(), 62 * MIB);
        }
    }
}

#[test]
fn what_is_no_exported_memory_is_refused() {
    alone("what_is_no_exported_memory_is_refused", &[], || {
        let cuda = Cuda::with_context();
        assert_eq!(import(&cuda, 987), Err(1), "no descriptor");
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(import(&cuda, std::os::fd::IntoRawFd::into_raw_fd(file)), Err(1), "any other file");
    });
}
