//! Sizes, times, limits and GPU names as people write them: what is read can be written and read again.

use nvshare::shares::MemoryLimit;
use nvshare::units::{GpuUuid, format_nanos, format_size, granules_for, parse_size, parse_time};

/// Reads the bytes as text.
pub fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match parse_size(&text) {
        Ok(size) => {
            assert_eq!(parse_size(&size.to_string()), Ok(size));
            assert_eq!(parse_size(&format!("  {text}\n")), Ok(size), "white space around it");
            let _ = (format_nanos(size), granules_for(size));
            // Two decimals: within a hundredth of what was meant, where that is a size at all.
            if let Ok(again) = parse_size(&format_size(size)) {
                assert!(again.abs_diff(size) <= size / 100 + 1, "{size} came back as {again}");
            }
        }
        Err(error) => assert!(error.to_string().contains(&*text), "an error that does not say what it read"),
    }
    match parse_time(&text) {
        Ok(time) => {
            assert_eq!(parse_time(&format!("{time}ns")), Ok(time));
            // One decimal, from one on.
            let again = parse_time(&format_nanos(time)).expect("what is written is read");
            assert!(again.abs_diff(time) <= time / 20 + 1, "{time} came back as {again}");
        }
        Err(error) => assert!(error.to_string().contains(&*text), "an error that does not say what it read"),
    }
    match text.parse::<MemoryLimit>() {
        Ok(limit) => {
            assert_eq!(MemoryLimit::read(limit.into()), Some(limit));
            // A size is shown with two decimals; the others are what they were.
            if !matches!(limit, MemoryLimit::Size(_)) {
                assert_eq!(limit.to_string().parse(), Ok(limit));
            }
        }
        Err(error) => assert!(error.to_string().contains(&*text), "an error that does not say what it read"),
    }
    if let Ok(gpu) = text.parse::<GpuUuid>() {
        let written = gpu.to_string();
        assert_eq!(written.parse(), Ok(gpu));
        assert_eq!(written[4..].to_ascii_lowercase(), text[4..].to_ascii_lowercase(), "two names of one GPU");
    }
}
