//! What is said where programs of two releases meet that have different page layouts.
//!
//! A message, a page and a record each carry the layout of whoever made them, so a difference is noticed before anything else is
//! read. Both sides then name both layouts, and say which of them is the older one, because only that one has to be
//! started again.

use crate::page::LAYOUT_VERSION;
use crate::wire::Reply;

/// The release of this program.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// What an arbiter says to a process that has page layout `theirs`. It fits into a [`Reply`].
pub(crate) fn refusal(theirs: u32) -> String {
    let text = format!(
        "the client has page layout {theirs} and this arbiter, nvshare {RELEASE}, has {LAYOUT_VERSION}; {}",
        if theirs < LAYOUT_VERSION {
            "start the program again, so that it loads the libnvshare.so of the arbiter's release"
        } else {
            "restart the arbiter: systemctl restart nvshare-arbiter"
        }
    );
    debug_assert!(text.len() <= Reply::TEXT_BYTES, "{text}");
    text
}

/// What a program says that finds something of an arbiter's with page layout `theirs`: a sentence without its subject.
pub(crate) fn of_an_arbiter(theirs: u32) -> String {
    format!(
        "has page layout {theirs} and this program, nvshare {RELEASE}, has {LAYOUT_VERSION}; {}",
        if theirs < LAYOUT_VERSION {
            "it is of an older arbiter, so restart the arbiter: systemctl restart nvshare-arbiter"
        } else {
            "it is of a newer arbiter, so start this program again with the nvshare that the arbiter is of"
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_and_the_release_are_named() {
        for theirs in [0, LAYOUT_VERSION - 1, LAYOUT_VERSION + 1, u32::MAX] {
            for said in [refusal(theirs), of_an_arbiter(theirs)] {
                assert!(said.contains(&format!("page layout {theirs} and this")), "{said}");
                assert!(said.contains(&format!("nvshare {RELEASE}, has {LAYOUT_VERSION};")), "{said}");
            }
            assert_eq!(
                Reply::refuse(crate::wire::Status::LayoutVersion, &refusal(theirs)).text(),
                refusal(theirs)
            );
        }
    }

    #[test]
    fn the_older_side_is_to_be_started_again() {
        assert!(refusal(LAYOUT_VERSION - 1).contains("start the program again"));
        assert!(refusal(LAYOUT_VERSION + 1).contains("restart the arbiter"));
        assert!(of_an_arbiter(LAYOUT_VERSION - 1).contains("restart the arbiter"));
        assert!(of_an_arbiter(LAYOUT_VERSION + 1).contains("start this program again"));
    }
}
