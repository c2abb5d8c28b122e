//! Text from other processes, made safe to show.

/// The text up to the first zero byte, or all of it, with `?` for every control character and U+FFFD for every sequence that is
/// not UTF-8. Names and sentences of other processes end up on a terminal or in a log.
pub fn printable(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_replaced_and_a_zero_ends_the_text() {
        assert_eq!(printable(b"job\x1b[2J\n"), "job?[2J?");
        assert_eq!(printable(b"job\0rest"), "job");
        assert_eq!(printable(b"a\xffb"), "a\u{fffd}b");
    }
}
