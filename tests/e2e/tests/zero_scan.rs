//! What holds nothing but zeros does not travel.

use nvshare_e2e::application::books::Competitor;
use nvshare_e2e::application::{Application, MIB, SUCCESS, gpu, node};
use nvshare_tools::node::SimulatedGpu;

/// Two that do not fit together take turns; the one has written to a part of what it has.
#[test]
fn a_switch_moves_what_is_used_and_not_what_is_allocated() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut sparse, mut dense) = (Application::ready(&node), Application::ready(&node));
    // Granules 1, 2 and 11 of 12.
    let block = sparse.alloc(24 * MIB);
    for (offset, bytes) in [(3 * MIB, 2 * MIB), (23 * MIB, MIB)] {
        assert_eq!(sparse.call(&format!("write {} {bytes} 5", block + offset)), SUCCESS);
    }
    let large = dense.alloc(48 * MIB);
    for turn in 1..=3 {
        assert_eq!(dense.call(&format!("write {large} {} 3", 48 * MIB)), SUCCESS);
        let status = nvshare_tools::status::read(node.dir()).unwrap();
        let clients: Vec<_> = status.gpus.iter().flat_map(|gpu| &gpu.clients).collect();
        let moved = clients.iter().find(|client| client.slot == 0);
        let moved = moved.map(|client| (client.bytes_out, client.bytes_unchanged));
        // Once, because nobody has changed it since.
        assert_eq!(moved, Some((6 * MIB, (turn - 1) * 6 * MIB)), "bytes that have left, after {turn} turns");
        let elided = clients.iter().find(|client| client.slot == 0).map(|client| client.bytes_elided);
        assert_eq!(elided, Some(turn * 18 * MIB), "bytes that were zero, after {turn} turns");
        for (offset, bytes) in [(3 * MIB, 2 * MIB), (23 * MIB, MIB)] {
            let asked = sparse.ask(&format!("check {} {bytes} 5", block + offset));
            assert_eq!(asked, (SUCCESS, "right".into()));
        }
    }
    sparse.works();
    dense.end();
    sparse.ends_well();
}

/// The driver's compiler takes longer than the engine waits for the kernel that looks at memory, and the context ends meanwhile.
#[test]
fn no_context_ends_while_the_kernel_is_being_loaded_into_it() {
    let settings = [("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB"), ("COMPILE_NS", "4000000000")];
    let gpu = SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned()))).unwrap();
    let node = node(&gpu);
    let mut one = Application::ready(&node);
    let block = one.alloc(32 * MIB);
    one.does(&format!("set {block} {} 7 0", 32 * MIB));
    let mut other = Competitor::start(&node);
    // All of it goes out, and the GPU looks at none of it first.
    other.takes_all(&node, &one);
    one.does("destroy 0");
    one.does("create");
    let block = one.alloc(MIB);
    one.does(&format!("set {block} {MIB} 7 0"));
    other.ends();
    one.end();
}
