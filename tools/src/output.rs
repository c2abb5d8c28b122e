//! What the commands write: lines on the standard output, and complaints on standard error.
//!
//! Whoever reads the output may stop (`nvshare status | head -1`). Rust programs ignore SIGPIPE, so that the processes and
//! files that a command has made are cleaned up and not left behind by a signal; so a line that cannot be written is
//! remembered here, those after it are not tried, and the command ends as soon as it looks ([`check`]), without a word and
//! with the status that SIGPIPE would have given it. A complaint that nobody can read is no reason for anything.

use crate::Failure;
use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::Mutex;

/// The status that a shell shows for a process that SIGPIPE has ended.
const BROKEN_PIPE: u8 = 128 + nix::libc::SIGPIPE as u8;

/// Why the standard output takes no more.
static FAILED: Mutex<Option<(ErrorKind, String)>> = Mutex::new(None);

fn failed() -> std::sync::MutexGuard<'static, Option<(ErrorKind, String)>> {
    nvshare::sync::lock(&FAILED)
}

/// Writes to the standard output, unless that has failed before.
pub fn write(text: Arguments<'_>) {
    remember(|output| output.write_fmt(text));
}

fn remember(action: impl FnOnce(&mut io::StdoutLock<'static>) -> io::Result<()>) {
    let mut failed = failed();
    if failed.is_none() {
        *failed = action(&mut io::stdout().lock()).err().map(|error| (error.kind(), error.to_string()));
    }
}

/// Writes to standard error, if that can be written.
pub fn complain(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// # Errors
/// Something could not be written to the standard output.
pub fn check() -> Result<(), Failure> {
    match &*failed() {
        None => Ok(()),
        Some((ErrorKind::BrokenPipe, _)) => Err(Failure::with_status(BROKEN_PIPE, "")),
        Some((_, why)) => {
            Err(Failure::with_status(1, format!("the standard output cannot be written: {why}")))
        }
    }
}

/// As [`check`], when everything has been written.
///
/// # Errors
/// As for [`check`].
pub fn finish() -> Result<(), Failure> {
    remember(Write::flush);
    check()
}

/// A line on the standard output.
#[macro_export]
macro_rules! say {
    () => { $crate::output::write(format_args!("\n")) };
    ($($part:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($part)*))) };
}

/// A line on standard error.
#[macro_export]
macro_rules! complain {
    ($($part:tt)*) => { $crate::output::complain(format_args!("{}\n", format_args!($($part)*))) };
}
