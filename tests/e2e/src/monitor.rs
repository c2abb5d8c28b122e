//! An arbiter that serves metrics and the page, and requests to it over plain sockets.

use nvshare_tools::node::{Node, SimulatedGpu};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A node of 64 MiB whose arbiter serves metrics and page.
pub struct MonitoredNode {
    /// The node.
    pub node: Node,
    /// Where they are served.
    pub address: SocketAddr,
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head, in lower case.
    pub head: String,
    /// What follows it.
    pub body: String,
}

impl MonitoredNode {
    /// On this GPU, with further arguments.
    pub fn start(gpu: &SimulatedGpu, arguments: &[&str]) -> Self {
        let mut refused = Vec::new();
        // Somebody else may take the port before the arbiter does.
        for _ in 0..10 {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = free.local_addr().unwrap();
            drop(free);
            let listen = address.to_string();
            let own = ["--capacity", "64MiB", "--listen", &listen];
            let all = own.iter().chain(arguments);
            let all: Vec<_> = all.map(|argument| (*argument).to_owned()).collect();
            match Node::start(gpu.environment(&[]), &all) {
                Ok(node) => return Self { node, address },
                Err(error) => refused.push(error),
            }
        }
        panic!("no arbiter starts: {refused:?}");
    }

    /// A connection to it, with nothing said.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// What it answers to this request, whose lines end as they should.
    pub fn ask(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        read(&mut stream)
    }

    /// What it answers to a request for this path.
    pub fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address))
    }

    /// The JSON under this path.
    pub fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path).body).unwrap()
    }

    /// The metrics.
    pub fn metrics(&self) -> String {
        let answer = self.get("/metrics");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }
}

/// Reads an answer to its end.
pub fn read(stream: &mut TcpStream) -> Answer {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// The number in the line of this metric whose labels contain all of these.
pub fn number(metrics: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let begin = format!("{name}{{");
    let line = metrics
        .lines()
        .find(|line| line.starts_with(&begin) && labels.iter().all(|label| line.contains(label)))?;
    line.rsplit_once(' ')?.1.parse().ok()
}
