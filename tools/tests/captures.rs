//! Captures: which are open, and which are over although nobody has ended them. While one is open its process cannot
//! give way; when none is, it must.

mod application;

use application::case::is_right;

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
