//! The command line from outside: exit statuses, messages, signals.
//!
//! Needs the other parts beside the program: `cargo build --workspace` first.

use nvshare::map::{self, MappedPage, scribble};
use nvshare::record::Record;
use nvshare::{GpuUuid, paths};
use nvshare_tools::bench::stats::Row;
use nvshare_tools::node::{Environment, SimulatedGpu, TempDir};
use nvshare_tools::status;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn nvshare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare"));
    command.args(arguments).env_remove(paths::RUNTIME_DIR).env_remove("COLUMNS").stdin(Stdio::null());
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A machine with a simulated GPU and no arbiter.
struct Machine {
    gpu: SimulatedGpu,
    dir: TempDir,
}

impl Machine {
    fn new() -> Self {
        let gpu = SimulatedGpu::new(&[("MEMORY", "64MiB".into())]);
        let gpu = gpu.expect("the workspace is built: cargo build --workspace");
        Self { gpu, dir: TempDir::new().unwrap() }
    }

    fn environment(&self) -> Environment {
        let mut environment = self.gpu.environment(&[]);
        environment.push((paths::RUNTIME_DIR.into(), self.dir.path().into()));
        environment
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = nvshare(arguments);
        command.envs(self.environment());
        command
    }

    /// `nvshare run OPTIONS -- PROGRAM`, with a pool that fits the GPU.
    fn run(&self, program: &[&str]) -> Output {
        let arguments = [&["run", "--capacity", "32MiB", "--"], program].concat();
        self.command(&arguments).output().unwrap()
    }
}

#[test]
fn bad_input_is_named_and_ends_with_status_2() {
    for (arguments, named) in [
        (&["run", "--capacity", "lots", "--", "true"][..], "'lots'"),
        (&["run"], "PROGRAM"),
        (&["status", "--runtime-dir", "/nonexistent"], "/nonexistent"),
        (&["bench", "handoff", "--iterations", "5"], "5"),
        (&["bench", "switch", "--size", "10MiB"], "10.00 MiB"),
        (&["bench", "switch", "--size", "10 parsecs"], "'10 parsecs'"),
        (&["bench", "nothing"], "nothing"),
        (&["demo", "--jobs", "0"], "0"),
        (&["demo", "--jobs", "9"], "--jobs 9"),
        (&["demo", "--capacity", "1GiB"], "--gpu"),
        (&["demo", "--gpu", "--capacity", "1GiB", "--size", "2GiB"], "2.00 GiB"),
        (&["run", "--weight", "0", "--", "true"], "'0'"),
        (&["run", "--weight", "1001", "--", "true"], "1 to 1000"),
        (&["run", "--priority", "urgent", "--", "true"], "low, normal or high"),
        (&["run", "--memory-limit", "150%", "--", "true"], "'150%'"),
        (&["run", "--memory-limit", "1MiB", "--", "true"], "2MiB or more"),
        (&["set", "7"], "--weight"),
        (&["set", "7", "--weight", "heavy"], "'heavy'"),
        (&["set", "7", "--memory-limit", "lots"], "25%"),
        (&["set", "7", "--weight", "5", "--gpu", "card-0"], "'card-0'"),
        (&["set", "7", "--weight", "5", "--runtime-dir", "/nonexistent"], "/nonexistent"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let output = nvshare(arguments).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
}

#[test]
fn help_has_examples() {
    for arguments in [
        &["--help"][..],
        &["run", "--help"],
        &["status", "--help"],
        &["set", "--help"],
        &["bench", "--help"],
        &["demo", "--help"],
        &["ctl", "--help"],
        &["wait", "--help"],
        &["health", "--help"],
        &["device-plugin", "--help"],
        &["dra-driver", "--help"],
    ] {
        let output = nvshare(arguments).output().unwrap();
        assert!(output.status.success() && stdout(&output).contains("Examples:"), "{arguments:?}");
    }
    let version = nvshare(&["--version"]).output().unwrap();
    assert!(stdout(&version).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_program_for_kubernetes_is_started_where_it_is_installed_and_named_where_it_is_not() {
    let output = nvshare(&["device-plugin", "--shares", "0"]).output().unwrap();
    assert!(stderr(&output).contains("'--shares <N>'"), "its own message: {}", stderr(&output));
    // Where it is not beside this one. Another process writes what is to be started: one that this process had open for
    // writing could not be, while a child of another test still has it.
    let dir = TempDir::new().unwrap();
    let does = |script: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-ec", script, "sh", env!("CARGO_BIN_EXE_nvshare")]).current_dir(dir.path());
        assert!(shell.status().unwrap().success(), "{script}");
    };
    does("cp \"$1\" nvshare");
    let run = |subcommand: &str| {
        let mut command = Command::new(dir.path().join("nvshare"));
        command.args([subcommand, "--print", "-h"]).env("PATH", dir.path().join("bin")).output().unwrap()
    };
    let output = run("device-plugin");
    assert_eq!(output.status.code(), Some(2));
    for part in
        ["nvshare-kubernetes is neither beside this program nor in $PATH", "Debian package", "cargo build"]
    {
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
    // One of that name in PATH gets the arguments as they are.
    does(
        "mkdir bin; printf '#!/bin/sh\\necho told \"$@\"\\n' > bin/nvshare-kubernetes; chmod +x bin/nvshare-kubernetes",
    );
    for subcommand in ["device-plugin", "dra-driver"] {
        assert_eq!(stdout(&run(subcommand)), format!("told {subcommand} --print -h\n"));
    }
}

/// No line is longer than a screen of `width` columns.
fn fits(text: &str, width: usize, what: &dyn std::fmt::Debug) {
    for line in text.lines() {
        assert!(line.chars().count() <= width, "{what:?} at {width} columns: {line}\n{text}");
    }
}

#[test]
fn help_fits_the_screen_and_breaks_no_word() {
    let program = Path::new(env!("CARGO_BIN_EXE_nvshare"));
    let arbiter = program.with_file_name("nvshare-arbiter");
    let commands = [
        "",
        "run",
        "status",
        "set",
        "sim",
        "demo",
        "bench",
        "bench launch",
        "bench handoff",
        "bench switch",
        "bench sim",
        "bench bookkeeping",
        "ctl",
        "ctl get",
        "ctl set",
        "ctl reset",
        "ctl pause",
        "ctl resume",
        "ctl client",
        "wait",
        "health",
        "device-plugin",
        "dra-driver",
    ];
    let nvsharectl = program.with_file_name("nvsharectl");
    let others = [(arbiter.as_path(), ""), (nvsharectl.as_path(), "")];
    let helps = commands.iter().map(|command| (program, *command)).chain(others);
    for (program, command) in helps {
        let help = |columns: Option<&str>| {
            let mut help = Command::new(program);
            help.args(command.split_whitespace()).arg("--help").env_remove("COLUMNS");
            help.envs(columns.map(|columns| ("COLUMNS", columns)));
            let output = help.output().unwrap();
            assert!(output.status.success(), "{program:?} {command}: {}", stderr(&output));
            stdout(&output)
        };
        let usual = help(None);
        fits(&usual, 80, &(program, command));
        // A wide screen is no reason for long lines, and a narrow one is none to break a word.
        assert_eq!(help(Some("200")), usual, "{program:?} {command}");
        let narrow = help(Some("64"));
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&narrow), words(&usual), "{program:?} {command}");
    }
}

#[test]
fn every_option_has_a_sentence() {
    let arbiter = Path::new(env!("CARGO_BIN_EXE_nvshare")).with_file_name("nvshare-arbiter");
    let output = Command::new(arbiter).arg("--help").output().unwrap();
    let benches =
        ["launch", "handoff", "switch", "sim", "bookkeeping"].map(|what| vec!["bench", what, "--help"]);
    let commands = ["run", "status", "set", "sim", "demo", "bench", "wait", "health"]
        .map(|command| vec![command, "--help"]);
    let helps = commands.iter().chain(&benches);
    let helps: Vec<String> = helps.map(|help| stdout(&nvshare(help).output().unwrap())).collect();
    for help in helps.iter().chain([&stdout(&output)]) {
        // What is said of an option stands beside it or below it, further in, up to the next one.
        let options = help.split_once("Options:\n").expect("there are options").1;
        let options = options.split("\n  -h, --help").next().unwrap_or_default();
        for option in options.trim_start().split("\n      --") {
            let said = option.split("\n\n").next().unwrap_or_default();
            let words = said.split_whitespace().skip(1).filter(|word| !word.starts_with(['<', '[']));
            assert!(words.count() >= 5, "--{said}");
        }
    }
}

/// A scenario of the repository.
fn scenario(name: &str) -> String {
    format!("{}/../examples/scenarios/{name}.toml", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn what_sim_says_fits_80_columns_and_uses_more_where_there_are_more() {
    for name in ["four-jobs", "field-report-demand-paging", "interactive-beside-batch"] {
        let scenario = scenario(name);
        let sim = |columns: Option<&str>| {
            let mut sim = nvshare(&["sim", &scenario]);
            stdout(&sim.envs(columns.map(|columns| ("COLUMNS", columns))).output().unwrap())
        };
        let usual = sim(None);
        fits(&usual, 80, &name);
        assert!(usual.contains("slowdown") && usual.contains("answer"), "{usual}");
        fits(&sim(Some("60")), 60, &name);
        let wide = sim(Some("200"));
        let titles = |line: &&str| line.contains("slowdown") && line.contains("answer");
        assert_eq!(wide.lines().filter(titles).count(), 1, "{wide}");
    }
}

/// More clients than there are rows for.
#[test]
fn what_sim_says_of_classes_fits_80_columns() {
    let said = stdout(&nvshare(&["sim", &scenario("vgpus")]).output().unwrap());
    fits(&said, 80, &"vgpus");
    // Nobody of a class that goes on for ever is done.
    assert!(said.contains("class") && said.contains(" 0 of 32"), "{said}");
}

#[test]
fn sim_says_what_is_not_finished() {
    let scenario = scenario("interactive-beside-batch");
    let output = stdout(&nvshare(&["sim", &scenario]).env("COLUMNS", "200").output().unwrap());
    let batch: Vec<&str> =
        output.lines().find(|line| line.starts_with(" batch")).unwrap().split_whitespace().collect();
    // No answer, so no time of one and no slowdown by it.
    assert!(batch.ends_with(&["-", "unfinished"]) && !batch.contains(&"0.00"), "{output}");
    // Programs get the figures as ever.
    let json = nvshare(&["sim", &scenario, "--json", "-"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let batch = &report["clients"][0];
    assert_eq!((&batch["slowdown"], &batch["finish_seconds"]), (&0.0.into(), &serde_json::Value::Null));
}

#[test]
fn the_demo_fits_80_columns_and_says_when_it_is_too_short() {
    let machine = Machine::new();
    let arguments =
        ["demo", "--gpu", "--capacity", "40MiB", "--size", "24MiB", "--jobs", "2", "--iterations", "3"];
    let output = machine.command(&arguments).output().unwrap();
    let said = stdout(&output);
    assert!(output.status.success(), "{said}{}", stderr(&output));
    fits(&said, 80, &"demo");
    let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        words.contains("too short to tell much") && words.contains("More --iterations tell more."),
        "{said}"
    );
}

/// A page as an arbiter makes it and records it: this test's process has it.
fn page(dir: &Path, number: u8) -> MappedPage {
    let gpu = GpuUuid([number; 16]);
    let (file, page) = map::create(gpu, 50).unwrap();
    Record::create(dir, gpu, &file).unwrap();
    page
}

#[test]
fn status_shows_good_pages_and_says_what_is_wrong_with_others() {
    let dir = TempDir::new().unwrap();
    let runtime_dir = dir.path().to_str().unwrap();
    let status =
        |more: &[&str]| nvshare(&["status", "--runtime-dir", runtime_dir]).args(more).output().unwrap();
    let empty = status(&[]);
    assert!(empty.status.code() == Some(2) && stderr(&empty).contains("nvshare run"), "{empty:?}");

    let _good = page(dir.path(), 1);
    let output = status(&["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let node: status::Node = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((node.gpus.len(), node.gpus[0].capacity_bytes), (1, 100 << 20));

    // Not a page at all, a record that is none, and one whose page is gone.
    let other = page(dir.path(), 2);
    scribble(&other, &[0xdead_beef, 7]);
    std::fs::write(paths::page(dir.path(), GpuUuid([3; 16])), [0; 100]).unwrap();
    drop(page(dir.path(), 4));
    let output = status(&[]);
    let (shown, said) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(shown.contains("GPU-01010101") && shown.contains("100.00 MiB"), "{shown}");
    for words in ["0x00000000deadbeef", "wrong magic", "no client is left"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn status_describes_every_field_of_its_json() {
    let output = nvshare(&["status", "--describe", "--json"]).output().unwrap();
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = stdout(&nvshare(&["status", "--describe"]).env("COLUMNS", "80").output().unwrap());
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let described = |subject: &str, name: &str| {
        let subjects = all["subjects"].as_array().unwrap();
        let of = subjects.iter().find(|of| of["subject"] == subject).unwrap();
        of["fields"].as_array().unwrap().iter().any(|field| field["name"] == name)
    };
    let (node, gpu, client) = (status::Node::default(), status::Gpu::default(), status::Client::default());
    let fields = [
        ("node", serde_json::to_value(node).unwrap()),
        ("gpu", serde_json::to_value(gpu).unwrap()),
        ("client", serde_json::to_value(client).unwrap()),
    ];
    for (subject, json) in fields {
        for name in json.as_object().unwrap().keys() {
            assert!(described(subject, name), "{subject} {name}");
            assert!(text.contains(&format!("  {name} (")), "{subject} {name}: {text}");
        }
    }
    assert!(text.contains("held_ns (counter, ns)"), "{text}");
}

#[test]
fn status_survives_any_words_in_a_page() {
    let dir = TempDir::new().unwrap();
    let page = page(dir.path(), 1);
    for words in [&[u64::MAX][..], &[0x8000_0000_0000_0001, 3], &[1, 2, 3, 5, 7, u64::MAX, 1 << 63]] {
        scribble(&page, words);
        // The identity is right, so that the rest is looked at.
        page.initialise(GpuUuid([1; 16]), u32::MAX);
        for more in [&[][..], &["--json"]] {
            let arguments = [&["status", "--runtime-dir", dir.path().to_str().unwrap()], more].concat();
            let output = nvshare(&arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{words:x?}: {}", stderr(&output));
            assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
        }
    }
}

#[test]
fn run_ends_as_the_program_ends() {
    let machine = Machine::new();
    let output = machine.run(&["sh", "-c", "echo $LD_PRELOAD $CUDA_MODULE_LOADING; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("libnvshare.so") && stdout(&output).contains("LAZY"),
        "{}",
        stdout(&output)
    );
    assert_eq!(machine.run(&["sh", "-c", "kill -9 $$"]).status.code(), Some(128 + 9));
    let missing = machine.run(&["/nonexistent/program"]);
    assert!(missing.status.code() == Some(127) && stderr(&missing).contains("/nonexistent/program"));
    let not_a_program = machine.run(&["/etc/passwd"]);
    assert!(not_a_program.status.code() == Some(126) && stderr(&not_a_program).contains("/etc/passwd"));
}

/// Starts a program that says a line when it is ready, and waits for that line.
fn start(mut command: Command) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, output)
}

#[test]
fn run_passes_signals_on() {
    let machine = Machine::new();
    // A shell cannot trap what was ignored when it began, as SIGHUP is under nohup and SIGINT in the background.
    let shell = ["env", "--default-signal=TERM,USR1,HUP,INT", "sh", "-c"];
    for (signal, number) in [("TERM", 15), ("USR1", 10), ("HUP", 1), ("INT", 2)] {
        let script = format!("trap 'exit 42' {signal}; echo ready; while :; do sleep 0.01; done");
        let mut command = machine.command(&["run", "--capacity", "32MiB", "--"]);
        command.args(shell).arg(&script);
        let (mut child, _output) = start(command);
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::try_from(number).unwrap()).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(42), "SIG{signal}");
    }
}

/// Root's as well: what it would leave in the system's directory would be in everybody's way.
#[test]
fn an_arbiter_of_ones_own_is_in_ones_own_directory() {
    let machine = Machine::new();
    let system = Path::new(paths::SYSTEM_DIR);
    if paths::is_served(system) {
        eprintln!("an arbiter serves this machine: not tested");
        return;
    }
    let was_there = system.exists();
    let mut command =
        machine.command(&["run", "--capacity", "32MiB", "--", "sh", "-c", "echo $NVSHARE_RUNTIME_DIR"]);
    let output =
        command.env_remove(paths::RUNTIME_DIR).env("XDG_RUNTIME_DIR", machine.dir.path()).output().unwrap();
    let own = machine.dir.path().join("nvshare");
    assert_eq!((stdout(&output).trim(), stderr(&output).as_str()), (own.to_str().unwrap(), ""));
    assert_eq!(system.exists(), was_there);
    let begin = Instant::now();
    while own.exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "it is left behind");
    }
}

#[test]
fn several_at_once_share_one_arbiter_which_ends_after_them() {
    let machine = Machine::new();
    let arguments = ["run", "--capacity", "32MiB", "--", "sh", "-c", "echo ready; cat"];
    let children: Vec<_> = (0..6)
        .map(|_| {
            let mut command = machine.command(&arguments);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let children: Vec<_> = children
        .into_iter()
        .map(|mut child| {
            let mut line = String::new();
            BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
            child
        })
        .collect();
    let node = status::read(machine.dir.path()).unwrap();
    assert_eq!(node.gpus.len(), 1);
    assert!(node.gpus[0].arbiter_alive && node.gpus[0].arbiter_generation == 1, "{node:?}");

    // Another size than the running one's is not to be had, and this is said.
    let other = machine.command(&["run", "--capacity", "16MiB", "--", "true"]).output().unwrap();
    assert!(other.status.success());
    assert!(
        stderr(&other).contains("16.00 MiB") && stderr(&other).contains("32.00 MiB"),
        "{}",
        stderr(&other)
    );

    let arbiter = node.gpus[0].arbiter_pid;
    for mut child in children {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    let until = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{arbiter}")).exists() && state(arbiter) != Some('Z') {
        assert!(Instant::now() < until, "the arbiter is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

#[test]
fn run_says_what_the_arbiter_said() {
    let machine = Machine::new();
    let output = machine.command(&["run", "--quantum", "soon", "--", "true"]).output().unwrap();
    assert!(output.status.code() == Some(2) && stderr(&output).contains("'soon'"), "{}", stderr(&output));
    let output = machine.command(&["run", "--capacity", "1TiB", "--", "true"]).output().unwrap();
    assert!(output.status.code() == Some(2) && stderr(&output).contains("1.00 TiB"), "{}", stderr(&output));
    // The GPU has less than is left outside a pool.
    let output = machine.command(&["run", "--", "true"]).output().unwrap();
    let words = ["64.00 MiB", "--headroom 512.00 MiB", "--capacity"];
    let said = stderr(&output);
    assert!(output.status.code() == Some(2) && words.iter().all(|word| said.contains(word)), "{said}");
}

fn bench(arguments: &[&str]) -> Vec<Row> {
    let output = nvshare(&[&["bench", "--json"], arguments].concat()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let rows: Vec<Row> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let _ = std::io::stderr().write_all(&output.stdout);
    rows
}

fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no row {name} in {rows:?}"))
}

#[test]
fn bench_bookkeeping_has_its_rows() {
    let rows = bench(&["bookkeeping", "--regions", "400", "--rounds", "2"]);
    for part in ["allocate", "evict", "fill", "free"] {
        for regions in [100, 400] {
            assert!(row(&rows, &format!("{part}_{regions}_regions")).max > 0.0, "{part}");
        }
    }
}

#[test]
fn bench_handoff_has_its_rows() {
    let rows = bench(&["handoff", "--iterations", "2000"]);
    for name in ["handoff", "futex_pingpong"] {
        let row = row(&rows, name);
        assert!(row.n == 2_000 && row.p50 > 0.0 && row.p50 <= row.p99 && row.p99 <= row.max, "{row:?}");
    }
    assert!(row(&rows, "handoff_ratio_p50").p50 > 0.0);
    assert!(row(&rows, "handoff_ratio_p99").p50 > 0.0);
}

#[test]
fn bench_launch_has_its_rows_and_makes_no_system_call() {
    let rows = bench(&["launch", "--pairs", "100"]);
    for name in ["launch_native", "launch_nvshare", "launch_added_1_thread", "launch_added_8_threads"] {
        assert!(row(&rows, name).n >= 100, "{rows:?}");
    }
    let calls = row(&rows, "launch_syscalls_per_million");
    assert_eq!((calls.n, calls.max), (1_000_000, 0.0));
}

#[test]
fn bench_switch_switches_and_the_data_is_right() {
    let rows = bench(&["switch", "--capacity", "74MiB", "--size", "60MiB", "--iterations", "3"]);
    assert_eq!(row(&rows, "switch_time").n, 3);
    assert!(
        row(&rows, "switch_bandwidth").p50 > 0.0 && row(&rows, "switch_efficiency").p50 < 1.1,
        "{rows:?}"
    );
}
