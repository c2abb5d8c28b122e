//! Captures: which are open, and which are over although nobody has ended them. When none is open its process gives way at
//! once; while one stays open, it does so beside it.

use nvshare_e2e::application::case::{Case, another_goes_through, is_right};
use nvshare_e2e::application::{Application, MIB, gpu, node};
use nvshare_tools::node::Node;

#[track_caller]
fn gives_way_after(case: &str) {
    is_right("captures", case, &[]);
}

#[test]
fn two_threads_capture_their_own_default_streams_by_one_handle() {
    gives_way_after("two-threads");
}

#[test]
fn two_threads_capture_their_own_default_streams_by_the_null_handle() {
    gives_way_after("two-threads-by-null");
}

#[test]
fn a_capture_is_over_when_the_thread_ends_whose_own_stream_it_is() {
    gives_way_after("thread-ends");
}

#[test]
fn a_capture_goes_on_when_the_driver_refuses_to_end_it() {
    gives_way_after("refused");
}

#[test]
fn a_ruined_capture_is_over_when_it_is_ended() {
    gives_way_after("ruined");
}

#[test]
fn a_capture_is_open_until_its_end_although_its_stream_was_to_be_destroyed() {
    gives_way_after("destroyed");
}

#[test]
fn no_end_of_a_stream_is_awaited_that_captures_and_was_to_be_destroyed() {
    gives_way_after("destroyed-apart");
}

#[test]
fn a_capture_to_a_graph_is_a_capture() {
    gives_way_after("to-a-graph");
}

#[test]
fn a_thread_captures_while_a_free_waits_for_the_gpu() {
    gives_way_after("during-a-free");
}

#[test]
fn a_capture_is_over_when_its_context_is_destroyed() {
    gives_way_after("context-destroyed");
}

#[test]
fn a_capture_is_over_when_its_context_is_reset() {
    gives_way_after("context-reset");
}

/// Memory under nvshare is mapped by hand, which is safe at any time. What is refused is what the driver would refuse of its
/// own memory.
#[test]
fn memory_is_neither_allocated_nor_freed_by_a_thread_that_a_capture_forbids_it() {
    gives_way_after("unsafe");
}

/// What only the driver can place needs room, for which another process would have to move. The driver refuses the call
/// whether there is room or not.
#[test]
fn a_call_that_a_capture_forbids_is_refused_for_that_where_there_is_no_room_either() {
    let gpu = gpu();
    let case = "unsafe-without-room";
    Case::ready("captures", case, gpu.environment(&[]), &[]).ends_well();
    let node = node(&gpu);
    let mut other = Application::ready(&node);
    // In pieces: of one piece all would go out, and leave room.
    let data: Vec<_> = (0..24).map(|_| other.alloc(2 * MIB)).collect();
    data.iter().for_each(|piece| other.writes(*piece, 2 * MIB, 1));
    Case::ready("captures", case, node.environment(), &[]).ends_well();
    data.iter().for_each(|piece| other.sees(*piece, 2 * MIB, 1));
    other.ends_well();
}

#[test]
fn a_capture_of_the_global_mode_stays_valid_when_another_thread_ends_that_freed_memory() {
    gives_way_after("another-thread-ends");
}

#[test]
fn who_has_a_capture_open_gives_way_and_can_end_it() {
    gives_way_after("open");
}

/// Its slice ends and it gives way while the work is still under way: what is evicted too early is lost.
#[track_caller]
fn waits_for_work(case: &str) {
    let gpu = gpu();
    let arguments = ["--capacity", "64MiB", "--quantum", "10ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    let program = Case::ready("captures", case, node.environment(), &[]);
    // It has the GPU for longer than the work would take.
    another_goes_through(&node, &["48", "2", "1500"]);
    program.ends_well();
}

#[test]
fn work_that_a_stream_had_before_it_captured_is_waited_for() {
    waits_for_work("open-after-work");
}

#[test]
fn work_that_a_stream_had_before_it_joined_a_capture_is_waited_for() {
    waits_for_work("open-joined-after-work");
}

#[test]
fn work_of_another_stream_beside_an_open_capture_is_waited_for() {
    waits_for_work("open-beside-work");
}

#[test]
fn work_of_the_legacy_stream_beside_an_open_capture_is_waited_for() {
    waits_for_work("open-beside-legacy-work");
}
