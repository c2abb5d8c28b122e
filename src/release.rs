//! What is said where programs of two releases meet that have different page layouts.
//!
//! A message, a page and a record each carry the layout of whoever made them, so a difference is noticed before anything else is
//! read. Both sides then name both layouts, and say which of them is the older one, because only that one has to be
//! started again.

/// The release of this program.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// What an arbiter, which has page layout `ours`, says to a process that has `theirs`. At most 256 bytes: that is the room in a reply.
#[cfg(not(loom))]
pub(crate) fn refusal(theirs: u32, ours: u32) -> String {
    format!(
        "the client has page layout {theirs} and this arbiter, nvshare {RELEASE}, has {ours}; {}",
        if theirs < ours {
            "start the program again, so that it loads the libnvshare.so of the arbiter's release"
        } else {
            "restart the arbiter: systemctl restart nvshare-arbiter"
        }
    )
}

/// What a program, which has page layout `ours`, says that finds something of an arbiter's with `theirs`: a sentence without its
/// subject.
pub(crate) fn of_an_arbiter(theirs: u32, ours: u32) -> String {
    format!(
        "has page layout {theirs} and this program, nvshare {RELEASE}, has {ours}; {}",
        if theirs < ours {
            "it is of an older arbiter, so restart the arbiter: systemctl restart nvshare-arbiter"
        } else {
            "it is of a newer arbiter, so start this program again with the nvshare that the arbiter is of"
        }
    )
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_and_the_release_are_named() {
        for (theirs, ours) in [(0, 7), (6, 7), (8, 7), (u32::MAX, u32::MAX - 1)] {
            for said in [refusal(theirs, ours), of_an_arbiter(theirs, ours)] {
                assert!(said.contains(&format!("page layout {theirs} and this")), "{said}");
                assert!(said.contains(&format!("nvshare {RELEASE}, has {ours};")), "{said}");
            }
        }
    }

    #[test]
    fn the_older_side_is_to_be_started_again() {
        assert!(refusal(6, 7).contains("start the program again"));
        assert!(refusal(8, 7).contains("restart the arbiter"));
        assert!(of_an_arbiter(6, 7).contains("restart the arbiter"));
        assert!(of_an_arbiter(8, 7).contains("start this program again"));
    }
}
