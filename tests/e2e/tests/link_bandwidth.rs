//! What nvshare says of the link is what the link can do, however the two sides of a switch wait for each other.

use nvshare_e2e::application::books::client;
use nvshare_e2e::application::{Application, MIB};
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status;

/// Bytes a second, each way.
const LINK: u64 = 512 * MIB;

/// Each has twelve buffers of 8 MiB, so a switch is a pipeline of as many chunks.
const BUFFERS: u64 = 12;
const PIECE: u64 = 8 * MIB;

/// What fills takes a granule as soon as the other side has let it go, while its own copies go on: that wait is not time
/// that the link stood still. Taken off the time of the fill, it once made the link look four times as fast.
#[test]
fn the_link_is_as_fast_as_it_is() {
    let settings = [
        ("MEMORY", "256MiB".to_owned()),
        ("CONTEXT_BYTES", "2MiB".to_owned()),
        ("LINK_BANDWIDTH", LINK.to_string()),
    ];
    let gpu = SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace");
    let node = Node::start(gpu.environment(&[]), &["--capacity", "110MiB"].map(str::to_owned)).unwrap();
    let mut both = [(); 2].map(|()| {
        let mut application = Application::ready(&node);
        let buffers: Vec<u64> = (0..BUFFERS).map(|_| application.alloc(PIECE)).collect();
        buffers.iter().for_each(|buffer| application.writes(*buffer, PIECE, 7));
        (application, buffers)
    });
    for _ in 0..2 {
        for (application, buffers) in &mut both {
            buffers.iter().for_each(|buffer| application.sees(*buffer, PIECE, 7));
        }
    }
    let moved = both.each_ref().map(|(application, _)| client(&node, application).bytes_in);
    assert!(moved.iter().all(|bytes| *bytes >= 2 * 64 * MIB), "more than is measured from: {moved:?}");
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    for bandwidth in [gpu.bandwidth_in, gpu.bandwidth_out] {
        assert!(bandwidth <= LINK + LINK / 20, "{bandwidth} of {LINK} bytes a second");
    }
    for (application, _) in both {
        drop(application.ends_well());
    }
}
