//! The gate of this process ([`nvshare::gate`]). It is open until the process attaches to a GPU, because before that there is
//! no memory to guard.

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
