//! The gate of this process ([`nvshare::gate`]). It stands open until the process attaches to a GPU, because there is nothing
//! to guard before.

use nvshare::gate::Gate;
use std::sync::LazyLock;

static GATE: LazyLock<Gate> = LazyLock::new(|| {
    let gate = Gate::new();
    gate.open();
    gate
});

/// The process's gate.
pub fn gate() -> &'static Gate {
    &GATE
}
