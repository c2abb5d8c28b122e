//! The built library, preloaded into real processes: what their lookups find, and that those without CUDA notice nothing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The library under test, which cargo builds beside the tests.
fn shim() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let candidates = [deps.join("libnvshare.so"), deps.parent().unwrap().join("libnvshare.so")];
    candidates.into_iter().find(|path| path.exists()).expect("libnvshare.so is built with its tests")
}

/// Compiles C sources into `directory`.
fn compile(directory: &Path, output: &str, source: &str, options: &[&str]) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/preload");
    let status = Command::new("cc")
        .args(["-O1", "-o"])
        .arg(directory.join(output))
        .arg(sources.join(source))
        .args(options)
        .arg("-ldl")
        .status()
        .expect("the C compiler that Rust links with");
    assert!(status.success());
}

fn libraries(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    std::fs::create_dir_all(&directory).unwrap();
    // Bound to itself, as NVIDIA's is, so that preloading doesn't reach into it.
    let driver = ["-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wl,-soname,libcuda.so.1"];
    compile(&directory, "libcuda.so.1", "driver.c", &driver);
    compile(&directory, "libother.so", "other.c", &["-shared", "-fPIC"]);
    compile(&directory, "libfirst.so", "first.c", &["-shared", "-fPIC"]);
    compile(&directory, "app", "app.c", &[]);
    directory
}

fn run(directory: &Path, preload: &OsStr, variables: &[(&str, &str)], command: &[&str]) -> Output {
    Command::new(command[0])
        .args(&command[1..])
        .env("LD_LIBRARY_PATH", directory)
        .env("LD_PRELOAD", preload)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn lookups_find_the_hooks_of_the_driver_and_nothing_else() {
    let directory = libraries("lookups");
    let app = directory.join("app");
    let found = lines(&run(&directory, shim().as_os_str(), &[], &[app.to_str().unwrap()]));
    let expected = [
        "driver/cuInit libnvshare.so",
        "driver/cuLaunchKernel libnvshare.so",
        "driver/cuEventRecord libcuda.so.1",
        "driver/cuNoSuchThing nowhere",
        "error told",
        "driver/cuMemAlloc_v2 libnvshare.so",
        "error none",
        "other/cuLaunchKernel libother.so",
        "default/cuInit libnvshare.so",
        "next/cuInit libnvshare.so",
        "next/getpid libc.so.6",
        "next-of-other/getpid libc.so.6",
        "default/nvmlDeviceGetMemoryInfo libnvshare.so",
        "without-nvml 13",
        "asked/cuLaunchKernel libnvshare.so",
        "legacy same",
        "per-thread same",
        "asked/cuMemAlloc libnvshare.so",
        "asked/cuEventRecord libcuda.so.1",
        "itself same",
        "unknown 0 1",
        "asked/cuFromTheFuture libcuda.so.1",
        "passed 4",
    ];
    assert_eq!(found, expected);
}

/// The driver has entry points that nvshare doesn't know: the application gets them, and a person can learn of it.
#[test]
fn what_nvshare_does_not_know_is_named_once_in_the_log() {
    let directory = libraries("unknown");
    let app = directory.join("app");
    let said = |level| {
        let output = run(&directory, shim().as_os_str(), &[("NVSHARE_LOG", level)], &[app.to_str().unwrap()]);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let info = said("info");
    let lines: Vec<_> = info.lines().collect();
    assert_eq!(lines.len(), 2, "each once: {info}");
    for (line, parts) in lines.into_iter().zip([
        ["cuFromTheFuture", "so_far=1", "version=12000"],
        ["cuFromNextYear", "so_far=4", "version=12000"],
    ]) {
        assert!(line.starts_with("nvshare[") && parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert_eq!(said("warn"), "", "no reason to warn");
}

#[test]
fn switched_off_the_driver_is_found_as_it_is() {
    let directory = libraries("switched-off");
    let app = directory.join("app");
    let off = [("NVSHARE_DISABLE", "1")];
    let found = lines(&run(&directory, shim().as_os_str(), &off, &[app.to_str().unwrap()]));
    assert!(found.contains(&"driver/cuLaunchKernel libcuda.so.1".to_owned()), "{found:?}");
    assert!(found.contains(&"asked/cuMemAlloc libcuda.so.1".to_owned()), "{found:?}");
    assert!(found.contains(&"unknown 0 1".to_owned()), "{found:?}");
}

#[test]
fn a_lookup_before_any_constructor_works() {
    let directory = libraries("early");
    let mut preload = directory.join("libfirst.so").into_os_string();
    preload.push(":");
    preload.push(shim());
    assert_eq!(lines(&run(&directory, &preload, &[], &["echo", "fine"])), ["fine"]);
}

#[test]
fn programs_without_cuda_notice_nothing() {
    let directory = libraries("without-cuda");
    let plain = OsStr::new("");
    for command in
        [&["ls", "/"][..], &["sh", "-c", "echo $((6 * 7)); exec true"], &["cat", "/proc/self/comm"]]
    {
        let without = run(&directory, plain, &[], command);
        let with = run(&directory, shim().as_os_str(), &[], command);
        assert_eq!(lines(&with), lines(&without));
        assert_eq!(with.stderr, without.stderr);
    }
    // Being preloaded starts no thread and doesn't load the driver.
    let threads = run(
        &directory,
        shim().as_os_str(),
        &[],
        &["grep", "-c", "libcuda\\|Threads:.1$", "/proc/self/status"],
    );
    assert_eq!(lines(&threads), ["1"]);
    let mapped = run(&directory, shim().as_os_str(), &[], &["grep", "-c", "libcuda", "/proc/self/maps"]);
    assert_eq!(String::from_utf8_lossy(&mapped.stdout).trim(), "0");
}
