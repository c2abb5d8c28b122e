//! CUDA IPC: memory and events of another process.

mod common;

use common::*;

/// `CUipcMemHandle` and `CUipcEventHandle`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ipc([u8; 64]);

fn memory_handle(cuda: &Cuda, pointer: u64) -> Result<Ipc, i32> {
    let mut handle = Ipc([0; 64]);
    match call!(cuda, "cuIpcGetMemHandle", &mut handle => &mut Ipc, pointer => u64) {
        0 => Ok(handle),
        error => Err(error),
    }
}

fn open(cuda: &Cuda, handle: Ipc) -> Result<u64, i32> {
    let mut pointer = 0u64;
    match call!(cuda, "cuIpcOpenMemHandle_v2", &mut pointer => &mut u64, handle => Ipc, 1 => u32) {
        0 => Ok(pointer),
        error => Err(error),
    }
}

fn close(cuda: &Cuda, pointer: u64) -> i32 {
    call!(cuda, "cuIpcCloseMemHandle", pointer => u64)
}

fn receive_handle(stream: &std::os::unix::net::UnixStream) -> Ipc {
    Ipc(receive(stream, 64).0.try_into().unwrap())
}

#[test]
fn memory_of_another_process_is_the_same_memory() {
    let test = "memory_of_another_process_is_the_same_memory";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[("NVSHARE_SIM_MEMORY", "64MiB"), ("NVSHARE_SIM_GPUS", "2")]);
            let mut maker = machine.start(test, "maker");
            said(&mut maker, "come");
            machine.run(test, "user");
            assert!(maker.wait_with_output().unwrap().status.success());
        }
        Some("maker") => {
            let cuda = Cuda::with_context();
            let pointer = cuda.alloc(8 * MIB);
            cuda.write(pointer, &[1, 2, 3]);
            let handle = memory_handle(&cuda, pointer).unwrap();
            assert_eq!(memory_handle(&cuda, pointer + 4096), Ok(handle), "of the whole allocation");
            assert_eq!(open(&cuda, handle), Err(201), "not in the same process");
            let mapped = cuda.show(PAGE, cuda.try_create(PAGE, false).unwrap());
            assert_eq!(memory_handle(&cuda, mapped), Err(1), "mappings go by file descriptor");
            assert_eq!(memory_handle(&cuda, cuda.managed(PAGE)), Err(1));
            let room = cuda.free_bytes();
            let stream = host_meeting();
            send(&stream, &handle.0, &[]);
            receive(&stream, 1);
            assert_eq!(cuda.free_bytes(), room - 2 * MIB, "the other's context, and nothing else");
            assert_eq!(cuda.read(pointer, 3), [1, 9, 3]);
            cuda.free(pointer);
            assert_eq!(cuda.free_bytes(), room - 2 * MIB, "the other has it open");
            send(&stream, b"f", &[]);
            receive(&stream, 1);
            assert_eq!(cuda.free_bytes(), room + 8 * MIB - 2 * MIB);
            send(&stream, b"e", &[]);
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            let stream = meet();
            let handle = receive_handle(&stream);
            let mut none = 0u64;
            let code = call!(cuda, "cuIpcOpenMemHandle_v2", &mut none => &mut u64, handle => Ipc, 0 => u32);
            assert_eq!(code, 1, "the flag is required");
            assert_eq!(open(&cuda, Ipc([7; 64])), Err(1));
            let pointer = open(&cuda, handle).unwrap();
            assert_eq!(open(&cuda, handle), Ok(pointer), "opened twice, there once");
            assert_eq!(cuda.read(pointer, 3), [1, 2, 3]);
            cuda.write(pointer + 8, &[9]);
            assert_eq!(memory_handle(&cuda, pointer), Err(1), "it is not ours to pass on");
            assert_eq!(call!(cuda, "cuMemFree_v2", pointer => u64), 1, "nor to free");
            send(&stream, b"w", &[]);
            receive(&stream, 1);
            assert_eq!(cuda.read(pointer, 3), [1, 9, 3], "freed there, still open here");
            assert_eq!(close(&cuda, pointer), 0);
            assert_eq!(cuda.read(pointer, 1), [1], "still open once");
            assert_eq!(close(&cuda, pointer), 0);
            assert_eq!(close(&cuda, pointer), 1);
            assert_eq!(open(&cuda, handle), Err(1), "nobody has it any more");
            send(&stream, b"c", &[]);
            receive(&stream, 1);
            let before = cuda.counters().illegal_accesses;
            let mut word = 0u64;
            let code = call!(cuda, "cuMemcpyDtoH_v2", &mut word => &mut u64, pointer => u64, 8 => u64);
            assert_eq!((code, cuda.counters().illegal_accesses), (ILLEGAL_ADDRESS, before + 1));
        }
    }
}

#[test]
fn opened_memory_of_another_gpu_is_reached() {
    let test = "opened_memory_of_another_gpu_is_reached";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[("NVSHARE_SIM_GPUS", "2")]);
            let mut maker = machine.start(test, "maker");
            said(&mut maker, "come");
            machine.run(test, "user");
            assert!(maker.wait_with_output().unwrap().status.success());
        }
        Some("maker") => {
            let cuda = Cuda::load();
            cuda.enter(1);
            let pointer = cuda.alloc(PAGE);
            let stream = host_meeting();
            send(&stream, &memory_handle(&cuda, pointer).unwrap().0, &[]);
            receive(&stream, 1);
            assert_eq!(cuda.read(pointer, 10)[9], common::iota(9, 4));
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            let stream = meet();
            let pointer = open(&cuda, receive_handle(&stream)).unwrap();
            assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), 0, &[pointer, 10, 4]), 0);
            assert_eq!(cuda.sync(0), 0);
            send(&stream, b"d", &[]);
        }
    }
}

#[test]
fn an_event_orders_streams_of_two_processes() {
    let test = "an_event_orders_streams_of_two_processes";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[]);
            let mut maker = machine.start(test, "maker");
            said(&mut maker, "come");
            machine.run(test, "user");
            assert!(maker.wait_with_output().unwrap().status.success());
        }
        Some("maker") => {
            let cuda = Cuda::with_context();
            let mut event = 0usize;
            let create = |event: &mut usize, flags: u32| call!(cuda, "cuEventCreate", event => &mut usize, flags => u32);
            assert_eq!(create(&mut event, 4), 1, "such an event keeps no time");
            assert_eq!(create(&mut event, 2), 0);
            let mut handle = Ipc([0; 64]);
            let of = |handle: &mut Ipc, event: usize| call!(cuda, "cuIpcGetEventHandle", handle => &mut Ipc, event => usize);
            assert_eq!(of(&mut handle, event), 400, "not made for it");
            assert_eq!(create(&mut event, 6), 0);
            assert_eq!(of(&mut handle, event), 0);
            let (pointer, stream) = (cuda.alloc(PAGE), cuda.stream(1));
            let meeting = host_meeting();
            send(&meeting, &memory_handle(&cuda, pointer).unwrap().0, &[]);
            send(&meeting, &handle.0, &[]);
            // The other's part is a host function of its stream that waits until told: nothing here depends on time.
            receive(&meeting, 1);
            assert_eq!(call!(cuda, "cuEventQuery", event => usize), NOT_READY);
            assert_eq!(call!(cuda, "cuStreamWaitEvent", stream => usize, event => usize, 0 => u32), 0);
            assert_eq!(cuda.launch(cuda.function("nvshare_mix_u64"), stream, &[pointer, 10, 2]), 0);
            assert_eq!(call!(cuda, "cuStreamQuery", stream => usize), NOT_READY);
            send(&meeting, b"g", &[]);
            assert_eq!(cuda.sync(stream), 0);
            assert_eq!(call!(cuda, "cuEventSynchronize", event => usize), 0);
            assert_eq!(cuda.read(pointer, 10)[9], common::mix(common::iota(9, 1), 2), "theirs came first");
            // Recorded by one that dies before it comes to it: nobody waits for ever.
            send(&meeting, b"d", &[]);
            receive(&meeting, 1);
            assert_eq!(call!(cuda, "cuEventQuery", event => usize), NOT_READY);
            send(&meeting, b"d", &[]);
            assert_eq!(call!(cuda, "cuEventSynchronize", event => usize), 0);
        }
        Some(_) => {
            static GATE: std::sync::Barrier = std::sync::Barrier::new(2);
            unsafe extern "C" fn wait(_: *mut std::ffi::c_void) {
                GATE.wait();
            }
            let cuda = Cuda::with_context();
            let meeting = meet();
            let pointer = open(&cuda, receive_handle(&meeting)).unwrap();
            let mut event = 0usize;
            let handle = receive_handle(&meeting);
            assert_eq!(call!(cuda, "cuIpcOpenEventHandle", &mut event => &mut usize, handle => Ipc), 0);
            assert_eq!(call!(cuda, "cuEventQuery", event => usize), 0, "never recorded");
            let stream = cuda.stream(1);
            let hold = || {
                let function: unsafe extern "C" fn(*mut std::ffi::c_void) = wait;
                call!(
                    cuda, "cuLaunchHostFunc",
                    stream => usize, function => unsafe extern "C" fn(*mut std::ffi::c_void), 0 => usize,
                )
            };
            let record = || call!(cuda, "cuEventRecord", event => usize, stream => usize);
            assert_eq!(hold(), 0);
            assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), stream, &[pointer, 10, 1]), 0);
            assert_eq!(record(), 0);
            send(&meeting, b"r", &[]);
            receive(&meeting, 1);
            GATE.wait();
            receive(&meeting, 1);
            assert_eq!(hold(), 0);
            assert_eq!(record(), 0);
            send(&meeting, b"r", &[]);
            receive(&meeting, 1);
            std::process::exit(0);
        }
    }
}
