//! A program in C, built with the installed header and library, takes turns with a preloaded program on the simulated GPU. Its memory
//! is right to the last word.
//!
//! Needs the other parts beside the tests: `cargo build --release --workspace`, or of another profile as the tests'.

use nvshare_test_support::Patience;
use nvshare_tools::node::{self, Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// The library as `capi/install` installs it.
struct Installed {
    dir: tempfile::TempDir,
    built: PathBuf,
}

impl Installed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let library = node::beside("libnvshare_client.so").expect("cargo build --release --workspace");
        let built = library.parent().unwrap().to_owned();
        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        // The script takes what a release build makes, and these tests what their own profile does.
        std::os::unix::fs::symlink(&built, target.join("release")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install");
        let installed =
            Command::new(script).arg(dir.path()).env("CARGO_TARGET_DIR", &target).output().unwrap();
        assert!(installed.status.success(), "{}", text(&installed));
        Self { dir, built }
    }

    fn lib(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// Builds a program of a source file, with these arguments behind it.
    fn build(&self, source: &Path, name: &str, arguments: &[&str]) -> PathBuf {
        let program = self.dir.path().join(name);
        let built = Command::new("cc")
            .args([
                "-std=c11",
                "-D_GNU_SOURCE",
                "-O1",
                "-g",
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-pthread",
            ])
            .arg("-I")
            .arg(self.dir.path().join("include"))
            .arg("-o")
            .arg(&program)
            .arg(source)
            .args(arguments)
            .arg(self.built.join("libsimcuda.so"))
            .output()
            .expect("the C compiler, cc, can be started");
        assert!(built.status.success(), "{}", text(&built));
        program
    }

    fn example(&self, name: &str, linked: &[&str]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/c/share_gpu.c");
        self.build(&source, name, linked)
    }

    /// How a program finds the shared library: as pkg-config says, where there is one.
    fn shared(&self) -> Vec<String> {
        let lib = self.lib();
        let asked = Command::new("pkg-config")
            .args(["--cflags", "--libs", "nvshare-client"])
            .env("PKG_CONFIG_PATH", lib.join("pkgconfig"))
            .output();
        match asked {
            Ok(said) => {
                assert!(said.status.success(), "{}", text(&said));
                let said = String::from_utf8(said.stdout).unwrap();
                let flags = said.split_whitespace().map(str::to_owned);
                return flags.chain([format!("-Wl,-rpath,{}", lib.display())]).collect();
            }
            Err(why) => println!("pkg-config cannot be started ({why}): nvshare-client.pc is not tested"),
        }
        vec![
            format!("-L{}", lib.display()),
            format!("-Wl,-rpath,{}", lib.display()),
            "-lnvshare_client".into(),
        ]
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn gpu() -> SimulatedGpu {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    SimulatedGpu::new(&[set("MEMORY", "256MiB"), set("CONTEXT_BYTES", "2MiB"), set("LINK_BANDWIDTH", "8GiB")])
        .unwrap()
}

fn node(gpu: &SimulatedGpu, capacity: &str) -> Node {
    let arguments = ["--capacity", capacity, "--quantum", "20ms"].map(str::to_owned);
    Node::start(gpu.environment(&[]), &arguments).unwrap()
}

fn clients(node: &Node) -> Vec<Client> {
    status::read(node.dir()).unwrap().gpus.remove(0).clients
}

/// A program that works until its standard input is closed. Ended if the test fails.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Waits until it has given the GPU up so often, and its memory has gone out and in.
    fn takes_turns(&mut self, node: &Node, times: u64) {
        let pid = self.0.id();
        TIMEOUT.until("it has given way again and again", || {
            assert!(self.0.try_wait().unwrap().is_none(), "it has ended");
            clients(node).iter().any(|client| {
                client.pid == pid && client.yields >= times && client.bytes_in > 0 && client.bytes_out > 0
            })
        });
    }

    /// Closes its input and waits for its end.
    fn end(mut self) -> String {
        drop(self.0.stdin.take());
        let output = self.0.stdout.take().unwrap();
        let last = BufReader::new(output).lines().map_while(Result::ok).last().unwrap_or_default();
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}: {last}");
        last
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A job with the preloaded library, which checks its own data.
fn preloaded(node: &Node) -> Running {
    let mut command = Command::new(node::program().unwrap());
    command.args(["internal", "job", "--size", "32MiB", "--controlled"]).envs(node.environment());
    let mut job = Running::start(&mut command);
    use std::io::Write;
    job.0.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    job
}

/// A program that takes part by itself.
fn embedding(node: &Node, gpu: &SimulatedGpu, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).envs(gpu.environment(&[])).env(nvshare::paths::RUNTIME_DIR, node.dir());
    command
}

#[test]
fn programs_in_c_take_turns_with_a_preloaded_one_and_all_keep_their_data() {
    let (installed, gpu) = (Installed::new(), gpu());
    let shared = installed.shared();
    let shared = installed.example("shared", &shared.iter().map(String::as_str).collect::<Vec<_>>());
    let archive = installed.lib().join("libnvshare_client.a");
    let system = ["-lgcc_s", "-ldl", "-lm", "-lc"];
    let linked = installed.example("static", &[&[archive.to_str().unwrap()], &system[..]].concat());

    // Room for one of them beside the contexts of three.
    let node = node(&gpu, "56MiB");
    let mut programs = [
        Running::start(&mut embedding(&node, &gpu, &shared, &["32", "1"])),
        Running::start(&mut embedding(&node, &gpu, &linked, &["24", "2"])),
        preloaded(&node),
    ];
    programs.iter_mut().for_each(|program| program.takes_turns(&node, 3));
    let [shared, linked, preloaded] = programs;
    for said in [shared.end(), linked.end()] {
        assert!(said.starts_with("right after "), "{said}");
    }
    assert!(preloaded.end().contains("\"right\":true"));
    TIMEOUT.until("all clients have left", || clients(&node).is_empty());
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0), "the books balance");
}

/// What a person reads who has got something wrong, and what a program sees.
#[test]
fn errors_are_codes_with_a_sentence_each() {
    let (installed, gpu) = (Installed::new(), gpu());
    let node = node(&gpu, "56MiB");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/errors.c");
    let shared = installed.shared();
    let program = installed.build(&source, "errors", &shared.iter().map(String::as_str).collect::<Vec<_>>());
    let uuid = status::read(node.dir()).unwrap().gpus.remove(0).uuid;
    let said =
        embedding(&node, &gpu, &program, &[&uuid.replace("GPU-", "").replace('-', "")]).output().unwrap();
    assert!(said.status.success(), "{}", text(&said));
    let lines: Vec<_> = String::from_utf8(said.stdout).unwrap().lines().map(str::to_owned).collect();
    let expected = [
        ("nothing", "NVSHARE_ERROR_INVALID_ARGUMENT", "options is NULL"),
        ("no size", "NVSHARE_ERROR_INVALID_ARGUMENT", "options.size is 0 and must be"),
        ("no fill", "NVSHARE_ERROR_INVALID_ARGUMENT", "runtime.fill is NULL"),
        ("priority", "NVSHARE_ERROR_INVALID_ARGUMENT", "options.priority is 7"),
        ("no arbiter", "NVSHARE_ERROR_NO_ARBITER", "no arbiter answers at /nowhere/"),
        ("other gpu", "NVSHARE_ERROR_REFUSED", "is served here"),
        ("open", "NVSHARE_OK", ""),
        ("too large", "NVSHARE_ERROR_TOO_LARGE", "8.00 GiB more is more than"),
        ("enter", "NVSHARE_OK", ""),
        ("busy", "NVSHARE_ERROR_TIMED_OUT", "did not come within"),
        ("child", "NVSHARE_ERROR_FORKED", "forked from"),
        ("close", "NVSHARE_OK", ""),
        ("failing", "NVSHARE_ERROR_RUNTIME", "the runtime's fill returned -42"),
        ("close failed", "NVSHARE_ERROR_RUNTIME", "the runtime's fill returned -42"),
    ];
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for (line, (case, code, message)) in lines.iter().zip(expected) {
        assert!(line.starts_with(&format!("{case}: {code}: ")) && line.contains(message), "{line}");
    }
    TIMEOUT.until("all clients have left", || clients(&node).is_empty());
}
