//! A client looks at its memory ahead of need, to see how much of it would have to be moved. The look waits for the work on
//! the GPU, and what it was for may be over before it ends.

use nvshare_e2e::application::{Application, MIB, gpu, node};
use nvshare_test_support::{Patience, program};
use nvshare_tools::status;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(30);

/// Killed when dropped.
struct Program(Child, ChildStdin, Option<BufReader<ChildStdout>>);

impl Program {
    fn told(&mut self) {
        writeln!(self.1, "go on").unwrap();
    }

    fn says(&mut self, wanted: &str) {
        let mut output = self.2.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            (output, line)
        });
        TIMEOUT.until(&format!("it says {wanted}"), || said.is_finished());
        let (output, line) = said.join().unwrap();
        assert_eq!(line.trim_end(), wanted);
        self.2 = Some(output);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn memory_can_be_mapped_after_a_look_that_nobody_needs_any_more() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut command = Command::new(program("looked_at"));
    command.arg("40").envs(node.environment()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
    let mut looked_at = Program(process, input, Some(output));
    looked_at.says("ready");

    // Memory is short now, so it looks what it would have to move; its kernels keep the look from ending.
    let mut other = Application::ready(&node);
    let held = other.alloc(30 * MIB);
    other.writes(held, 30 * MIB, 5);
    looked_at.told();
    looked_at.says("busy");

    // And now there is enough.
    other.kill();
    let clients =
        || status::read(node.dir()).unwrap().gpus.iter().map(|gpu| gpu.clients.len()).sum::<usize>();
    TIMEOUT.until("the other one is gone", || clients() == 1);
    looked_at.told();
    looked_at.says("done");
}
