//! What processes that share a simulated GPU see of each other.

mod common;

use std::io::{Read, Write};
use std::process::Child;

use common::*;

const SMALL: &[(&str, &str)] = &[("NVSHARE_SIM_MEMORY", "64MiB"), ("NVSHARE_SIM_CONTEXT_BYTES", "2MiB")];

#[test]
fn capacity_is_shared_and_comes_back_after_kill_9() {
    let test = "capacity_is_shared_and_comes_back_after_kill_9";
    match role().as_deref() {
        None => {
            let machine = Machine::new(SMALL);
            let mut hog = machine.start(test, "hog");
            said(&mut hog, "have 40");
            machine.run(test, "poor");
            kill(hog);
            machine.run(test, "rich");
        }
        Some("hog") => {
            let cuda = Cuda::with_context();
            cuda.alloc(40 * MIB);
            say_and_wait("have 40");
        }
        Some("poor") => {
            let cuda = Cuda::with_context();
            assert_eq!(cuda.free_bytes(), (64 - 40 - 2 - 2) * MIB);
            assert_eq!(cuda.try_alloc(22 * MIB), Err(OUT_OF_MEMORY));
            assert_eq!(cuda.try_create(22 * MIB, false), Err(OUT_OF_MEMORY));
            assert_eq!(cuda.counters().out_of_memory, 2);
            cuda.alloc(20 * MIB);
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            cuda.alloc(60 * MIB);
            assert_eq!(cuda.free_bytes(), 2 * MIB);
        }
    }
}

#[test]
fn processes_that_fight_for_room_never_overcommit_and_never_lose_any() {
    let test = "processes_that_fight_for_room_never_overcommit_and_never_lose_any";
    match role().as_deref() {
        None => {
            let machine = Machine::new(SMALL);
            let mut children: Vec<Child> = (0..4).map(|_| machine.start(test, "fighter")).collect();
            children.iter_mut().for_each(|child| said(child, "fighting"));
            std::thread::sleep(std::time::Duration::from_millis(300));
            children.into_iter().for_each(kill);
            machine.run(test, "heir");
        }
        Some("fighter") => {
            let cuda = Cuda::with_context();
            println!("fighting");
            loop {
                // 4 x 14 MiB fit, however they come and go, so nobody is ever refused.
                let pointer = cuda.reserve(14 * MIB);
                cuda.back(pointer, 14 * MIB);
                assert!(cuda.free_bytes() <= 64 * MIB);
                assert_eq!(cuda.unmap(pointer, 14 * MIB), 0);
                assert_eq!(call!(cuda, "cuMemAddressFree", pointer => u64, 14 * MIB => u64), 0);
            }
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            assert_eq!(cuda.free_bytes(), 62 * MIB);
            assert_eq!(cuda.counters().out_of_memory, 0);
        }
    }
}

#[test]
fn the_compute_engine_is_shared_fairly() {
    let test = "the_compute_engine_is_shared_fairly";
    match role().as_deref() {
        None => {
            let machine = Machine::new(&[]);
            let mut children: Vec<Child> = (0..2).map(|_| machine.start(test, "half")).collect();
            children.iter_mut().for_each(|child| said(child, "ready"));
            // Both begin when their input says so, and end when it ends.
            children.iter_mut().for_each(|child| child.stdin.as_mut().unwrap().write_all(b"go").unwrap());
            std::thread::sleep(std::time::Duration::from_secs(1));
            children.iter_mut().for_each(|child| drop(child.stdin.take()));
            let count = |child: Child| -> u64 {
                let output = child.wait_with_output().unwrap();
                let text = String::from_utf8(output.stdout).unwrap();
                text.lines().find_map(|line| line.strip_prefix("kernels: ")).unwrap().parse().unwrap()
            };
            let counts: Vec<u64> = children.into_iter().map(count).collect();
            let (least, most) = (counts[0].min(counts[1]), counts[0].max(counts[1]));
            assert!(least * 2 >= most, "{counts:?}");
            // A kernel takes 5 ms, so alone one of them could have done 200 in that second; the second may have
            // been a long one.
            assert!(least + most >= 50, "{counts:?}");
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            let spin = cuda.function("nvshare_spin");
            println!("ready");
            std::io::stdout().flush().unwrap();
            std::io::stdin().read_exact(&mut [0; 2]).unwrap();
            let over = std::thread::spawn(|| std::io::stdin().read(&mut [0]));
            let mut count = 0;
            while !over.is_finished() {
                assert_eq!(cuda.launch(spin, 0, &[5_000_000]), 0);
                assert_eq!(cuda.sync(0), 0);
                count += 1;
            }
            println!("kernels: {count}");
        }
    }
}

#[test]
fn managed_pages_of_an_idle_process_give_way() {
    let test = "managed_pages_of_an_idle_process_give_way";
    let walk = |cuda: &Cuda, pointer: u64, pages: u64| {
        let before = cuda.counters();
        assert_eq!(cuda.launch(cuda.function("nvshare_iota_u64"), 0, &[pointer, pages * PAGE / 8, 1]), 0);
        assert_eq!(cuda.sync(0), 0);
        let after = cuda.counters();
        (after.um_faults - before.um_faults, after.um_evictions - before.um_evictions)
    };
    match role().as_deref() {
        None => {
            // Beside two contexts there is room for eight pages.
            let machine = Machine::new(&[
                ("NVSHARE_SIM_MEMORY", "20MiB"),
                ("NVSHARE_SIM_CONTEXT_BYTES", "2MiB"),
                ("NVSHARE_SIM_LINK_BANDWIDTH", "64GiB"),
            ]);
            let mut idle = machine.start(test, "idle");
            said(&mut idle, "have six");
            machine.run(test, "busy");
            idle.stdin.take().unwrap().write_all(b"x").unwrap();
            assert!(idle.wait_with_output().unwrap().status.success());
        }
        Some("idle") => {
            let cuda = Cuda::with_context();
            let pointer = cuda.managed(6 * PAGE);
            assert_eq!(walk(&cuda, pointer, 6), (6, 0));
            say_and_wait("have six");
            // Four of ours were taken while the busy process was there; now there is room for them again.
            assert_eq!(walk(&cuda, pointer, 6), (4, 0));
        }
        Some(_) => {
            let cuda = Cuda::with_context();
            let pointer = cuda.managed(6 * PAGE);
            assert_eq!(walk(&cuda, pointer, 6), (6, 4));
            assert_eq!(walk(&cuda, pointer, 6), (0, 0));
        }
    }
}

#[test]
fn another_geometry_is_refused() {
    let test = "another_geometry_is_refused";
    match role().as_deref() {
        None => {
            let machine = Machine::new(SMALL);
            machine.run(test, "first");
            machine.run(test, "second");
        }
        Some("first") => drop(Cuda::load()),
        Some(_) => {
            // SAFETY: this process has only this thread.
            unsafe { std::env::set_var("NVSHARE_SIM_MEMORY", "128MiB") };
            // SAFETY: loading the driver has no effects.
            let library = unsafe { libloading::Library::new(library_path()) }.unwrap();
            // SAFETY: the type is that of `cuda.h`.
            let init = unsafe { library.get::<extern "C" fn(u32) -> i32>(b"cuInit") }.unwrap();
            assert_eq!(init(0), 1);
        }
    }
}
