//! Contexts that end while others of their process go on.

mod application;

use application::{Application, INVALID_VALUE, MIB, SUCCESS, gpu, node};

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
