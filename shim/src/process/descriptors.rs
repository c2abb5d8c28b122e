//! Who has exported a descriptor of memory (cuMemExportToShareableHandle).
//!
//! The application itself passes such a descriptor to another process. It is an open file of the driver's device like any other, so
//! neither fstat nor /proc says whose memory it is. But an open file can have an *owner*: the process that the kernel would send SIGIO
//! to, if the file were made to send signals (fcntl(2), F_SETOWN). Nobody has the driver's descriptors send signals, so nvshare
//! writes there who has exported the memory, and whoever imports it reads that.
//!
//! - The owner belongs to the open file and not to the descriptor: SCM_RIGHTS, pidfd_getfd, dup and fork keep it.
//! - The kernel keeps a reference to the process and not its pid. Another process that has the same pid later is not the owner; of
//!   one that has ended, nothing is shown.
//! - The pid is shown as the reader's pid namespace has it, and not at all where that has no such process. So processes in
//!   containers with pid namespaces of their own do not know each other in this way.

use nix::errno::Errno;
use std::os::fd::RawFd;

/// This process has exported memory as this descriptor, which the driver has just opened.
pub fn exported(descriptor: RawFd) {
    // SAFETY: takes integers only, and the kernel checks the descriptor.
    let set = unsafe { libc::fcntl(descriptor, libc::F_SETOWN, libc::getpid()) };
    if let Err(error) = Errno::result(set) {
        tracing::debug!("those who import memory of this process will not know whose it is: {error}");
    }
}

/// The pid of the process that has exported the memory of a descriptor; `None` if it is this process, or if nobody knows.
pub fn exporter(descriptor: RawFd) -> Option<u32> {
    // SAFETY: as above.
    let pid = Errno::result(unsafe { libc::fcntl(descriptor, libc::F_GETOWN) }).ok()?;
    // A negative number is a group of processes, which nvshare does not set.
    u32::try_from(pid).ok().filter(|pid| *pid != 0 && *pid != std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    fn device() -> File {
        File::options().read(true).write(true).open("/dev/null").unwrap()
    }

    #[test]
    fn a_descriptor_that_nobody_has_exported_or_this_process_has_no_other_exporter() {
        let file = device();
        assert_eq!(exporter(file.as_raw_fd()), None);
        exported(file.as_raw_fd());
        assert_eq!(exporter(file.as_raw_fd()), None);
        assert_eq!(exporter(-1), None);
        exported(-1);
    }

    /// Another descriptor of the same open file has the same exporter, and another open file of the same device has none.
    #[test]
    fn the_exporter_is_known_by_the_open_file_as_long_as_it_lives() {
        let (file, other) = (device(), device());
        let mut process = Command::new("sleep").arg("100").spawn().unwrap();
        // As that process would do it.
        // SAFETY: takes integers only.
        let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, process.id()) };
        assert_eq!(set, 0);
        let duplicate = file.try_clone().unwrap();
        let known = [&file, &duplicate, &other].map(|file| exporter(file.as_raw_fd()));
        assert_eq!(known, [Some(process.id()), Some(process.id()), None]);
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(exporter(duplicate.as_raw_fd()), None);
    }
}
