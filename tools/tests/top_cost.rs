//! What `nvshare top` costs the machine: 60 clients that take turns on 8 simulated GPUs, on a terminal of 200 columns. Not run by
//! itself, because a busy machine says nothing:
//!
//! ```sh
//! cargo test --release -p nvshare-tools --test top_cost -- --ignored --nocapture
//! ```

use nvshare::client::Bookkeeper;
use nvshare::wire::Hello;
use nvshare::{Session, paths, register};
use nvshare_tools::node::{self, Node, SimulatedGpu};
use nvshare_tools::status;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const GPUS: usize = 8;
const CLIENTS: usize = 60;

/// How long is measured.
const MEASURED: Duration = Duration::from_secs(20);

/// Processor time of a process, in seconds.
fn processor_time(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name in parentheses: the 12th and the 13th are the user's and the system's time, in ticks of 10 ms.
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[test]
#[ignore = "a measurement: it takes half a minute, and needs a machine with nothing else to do"]
fn sixty_clients_on_eight_gpus_cost_a_small_part_of_a_core() {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    let gpu = SimulatedGpu::new(&[set("MEMORY", "256MiB"), set("GPUS", "8")]).unwrap();
    let arguments = ["--capacity", "100MiB", "--quantum", "50ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    let uuids: Vec<_> = status::read(node.dir()).unwrap().gpus.into_iter().map(|gpu| gpu.uuid).collect();
    assert_eq!(uuids.len(), GPUS);
    let sessions: Vec<_> = (0..CLIENTS)
        .map(|at| {
            let hello = Hello::new(uuids[at % GPUS].parse().unwrap(), &format!("client {at}"));
            let client =
                register::register(&paths::socket(node.dir()), &hello, Duration::ZERO).unwrap().into_client();
            let keeper = Bookkeeper::new(client.books(), 1);
            let session: Session = Session::start(client, keeper).unwrap();
            session.grow(30, || ()).unwrap();
            session
        })
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for session in &sessions {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let pass = session.enter().unwrap();
                    while !pass.should_yield() && !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            });
        }
        // A terminal by `script`, which also says nothing of it.
        let top = format!(
            "stty cols 200 rows 60; exec {} top --runtime-dir {}",
            node::program().unwrap().display(),
            node.dir().display()
        );
        let mut terminal = Command::new("script")
            .args(["-q", "-e", "-c", &top, "/dev/null"])
            .envs(gpu.environment(&[]))
            .env("TERM", "xterm-256color")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script (bsdutils) can be started");
        let mut output = terminal.stdout.take().unwrap();
        let drawn = scope.spawn(move || {
            let mut bytes = 0;
            let mut buffer = [0; 65536];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                bytes += count;
            }
            bytes
        });
        let pid = child_of(terminal.id());
        std::thread::sleep(Duration::from_secs(3));
        let (before, begun) = (processor_time(pid), Instant::now());
        std::thread::sleep(MEASURED);
        let part = (processor_time(pid) - before) / begun.elapsed().as_secs_f64();
        let slices: u64 = status::read(node.dir())
            .unwrap()
            .gpus
            .iter()
            .flat_map(|gpu| &gpu.clients)
            .map(|it| it.slices)
            .sum();
        terminal.kill().unwrap();
        terminal.wait().unwrap();
        stop.store(true, Ordering::Relaxed);
        let bytes = drawn.join().unwrap();
        println!(
            "{CLIENTS} clients on {GPUS} GPUs, one reading a second: {:.2} % of a core; {slices} slices, {bytes} bytes drawn",
            part * 100.0
        );
        assert!(part < 0.05, "{part}");
        assert!(bytes > 10_000, "it drew");
    });
}

/// The monitor: the only child of `script`.
fn child_of(pid: u32) -> u32 {
    loop {
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let child = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        let is_top = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "nvshare")
        };
        if let Some(child) = child.filter(is_top) {
            return child;
        }
        std::thread::yield_now();
    }
}
