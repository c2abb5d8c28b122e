//! Contexts that end while others of their process go on, contexts that the driver does not end, and green contexts.

use nvshare_e2e::application::case::is_right;
use nvshare_e2e::application::{Application, INVALID_VALUE, MIB, SUCCESS, gpu, node};

/// The engine lives in the first context. When that one ends, the memory of the others moves all the same.
#[test]
fn memory_moves_on_when_the_first_context_is_destroyed() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut two, mut other) = (Application::ready(&node), Application::ready(&node));
    let gone = two.alloc(8 * MIB);
    assert_eq!(two.call(&format!("write {gone} {} 1", 8 * MIB)), SUCCESS);
    assert_eq!(two.call("create"), SUCCESS);
    let stays = two.alloc(24 * MIB);
    assert_eq!(two.call(&format!("write {stays} {} 2", 24 * MIB)), SUCCESS);
    // There is not room for both: everything of the first one's goes out, into host memory that its first
    // context registers.
    let large = other.alloc(40 * MIB);
    assert_eq!(other.call(&format!("write {large} {} 3", 40 * MIB)), SUCCESS);
    assert_eq!(two.call("destroy 0"), SUCCESS);
    for _ in 0..3 {
        assert_eq!(two.ask(&format!("check {stays} {} 2", 24 * MIB)), (SUCCESS, "right".into()));
        assert_eq!(other.ask(&format!("check {large} {} 3", 40 * MIB)), (SUCCESS, "right".into()));
    }
    assert_eq!(two.call(&format!("free {gone}")), INVALID_VALUE, "it went with its context");
    two.works();
    other.end();
    two.ends_well();
}

/// The same for the primary context, which ends when it is reset, and may be there again afterwards.
#[test]
fn memory_moves_on_when_the_primary_context_is_reset() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut two = Application::start(node.environment(), &[]);
    assert_eq!((two.call("init"), two.call("retain"), two.call("create")), (SUCCESS, SUCCESS, SUCCESS));
    let mut other = Application::ready(&node);
    let stays = two.alloc(24 * MIB);
    assert_eq!(two.call(&format!("write {stays} {} 2", 24 * MIB)), SUCCESS);
    assert_eq!(two.call("reset"), SUCCESS);
    let large = other.alloc(48 * MIB);
    assert_eq!(other.call(&format!("write {large} {} 3", 48 * MIB)), SUCCESS);
    assert_eq!(two.ask(&format!("check {stays} {} 2", 24 * MIB)), (SUCCESS, "right".into()));
    assert_eq!(other.ask(&format!("check {large} {} 3", 48 * MIB)), (SUCCESS, "right".into()));
}

#[test]
fn a_primary_context_is_not_destroyed_and_keeps_its_memory() {
    is_right("contexts", "primary-destroyed", &[]);
}

#[test]
fn a_context_that_is_gone_is_not_destroyed_again() {
    is_right("contexts", "destroyed-twice", &[]);
}

#[test]
fn a_primary_context_that_nobody_holds_is_not_released() {
    is_right("contexts", "released-too-often", &[]);
}

#[test]
fn a_context_ends_with_the_last_detach() {
    is_right("contexts", "attached", &[]);
}

#[test]
fn a_reset_ends_the_primary_context_and_leaves_it_retained() {
    is_right("contexts", "reset-with-holders", &[]);
}

/// A count that is too high leaves the engine in a context that has ended, and the driver crashes on its handles.
#[test]
fn the_reset_of_the_cuda_runtime_gives_its_hold_up() {
    is_right("contexts", "reset-by-the-runtime", &[]);
}

#[test]
fn physical_memory_is_released_after_the_last_context() {
    is_right("contexts", "objects-outlive-contexts", &[]);
}

#[test]
fn threads_retain_and_release_the_primary_context_at_once() {
    is_right("contexts", "retained-at-once", &[]);
}

#[test]
fn contexts_are_destroyed_while_a_thread_uses_another() {
    is_right("contexts", "others-destroyed", &[]);
}

#[test]
fn work_in_a_green_contexts_stream_is_drained() {
    is_right("contexts", "green-stream", &[]);
}

#[test]
fn work_in_a_blocking_stream_that_was_made_in_a_green_context_is_drained() {
    is_right("contexts", "green-blocking-stream", &[]);
}

#[test]
fn memory_of_a_green_context_is_counted_and_work_in_its_default_stream_is_drained() {
    is_right("contexts", "green-current", &[]);
}

#[test]
fn work_in_a_threads_own_stream_of_a_green_context_is_drained() {
    is_right("contexts", "green-per-thread", &[]);
}

#[test]
fn a_green_context_holds_its_primary_context_until_it_is_destroyed() {
    is_right("contexts", "green-destroyed", &[]);
}

#[test]
fn a_context_that_the_driver_fails_to_destroy_is_as_before() {
    is_right("contexts", "destroy-failed", &[("NVSHARE_SIM_FAIL", "cuCtxDestroy_v2:1:999")]);
}

#[test]
fn a_context_beside_another_that_the_driver_fails_to_destroy_is_as_before() {
    is_right("contexts", "destroy-failed-beside", &[("NVSHARE_SIM_FAIL", "cuCtxDestroy_v2:1:999")]);
}

#[test]
fn a_primary_context_that_the_driver_fails_to_release_is_as_before() {
    is_right("contexts", "release-failed", &[("NVSHARE_SIM_FAIL", "cuDevicePrimaryCtxRelease_v2:1:999")]);
}

#[test]
fn a_primary_context_that_the_driver_fails_to_reset_is_as_before() {
    is_right("contexts", "reset-failed", &[("NVSHARE_SIM_FAIL", "cuDevicePrimaryCtxReset_v2:1:999")]);
}

#[test]
fn a_stream_that_the_driver_fails_to_destroy_is_still_drained() {
    is_right("contexts", "stream-failed", &[("NVSHARE_SIM_FAIL", "cuStreamDestroy_v2:1:999")]);
}
