//! The memory of a page: a sealed memfd.
//!
//! Every client maps the page for writing, so every client has a descriptor that can write. With such a descriptor of an
//! ordinary file, a process can also shorten the file, and then SIGBUS kills every process that touches the page. The size of a
//! memfd can be sealed: no descriptor of it can shorten it, not even root's, for as long as it exists.
//!
//! Its bytes are allocated before anybody maps it, so a system without memory refuses the arbiter and kills no client later. Its
//! mode is 0600: a process with a read-only descriptor cannot open it again for writing through /proc, unless it runs as the
//! arbiter's user.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, posix_fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

/// The seals: the memory never becomes shorter or longer, and never loses or gains a seal.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// The name of the thread in which a client keeps its descriptor of the memory (`crate::presence`).
pub(crate) const PRESENCE_THREAD: &str = "nvshare-alive";

/// `MFD_NOEXEC_SEAL` of Linux 6.3: the memory can never be executed as a program. Some systems refuse a memfd without it.
const NO_PROGRAM: MFdFlags = MFdFlags::from_bits_retain(8);

/// Makes sealed memory of `bytes` bytes, all zero.
///
/// # Errors
/// The kernel's; ENOSPC and ENOMEM mean that there is no memory for it.
pub fn create(name: &str, bytes: usize) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match memfd_create(name, flags | NO_PROGRAM) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        made => made,
    }?;
    posix_fallocate(&fd, 0, bytes as i64)?;
    let file = File::from(fd);
    file.set_permissions(Permissions::from_mode(0o600))?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file)
}

/// Whether this is memory whose size is sealed.
pub fn is_sealed(fd: impl AsFd) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS).is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SEALS))
}

/// A descriptor of the same memory that can only read.
///
/// # Errors
/// The kernel's.
pub fn read_only(fd: impl AsFd) -> io::Result<File> {
    File::open(PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())))
}

/// Whether a descriptor can only read.
pub fn is_read_only(fd: impl AsFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}

/// Identifies a memfd among all that exist at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The device number of the kernel's internal file system.
    pub device: u64,
    /// The inode number in it.
    pub inode: u64,
}

impl Identity {
    /// The identity of an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|data| Self::from(&data))
    }
}

impl From<&std::fs::Metadata> for Identity {
    fn from(data: &std::fs::Metadata) -> Self {
        Self { device: data.dev(), inode: data.ino() }
    }
}

/// Whether an open file is this memory, sealed, and made by the user `owner`.
pub fn is(file: &File, wanted: Identity, owner: u32) -> bool {
    file.metadata().is_ok_and(|data| Identity::from(&data) == wanted && data.uid() == owner)
        && is_sealed(file)
}

/// Opens sealed memory of the user `owner` through a process that has it open or mapped. `None` if that process has not, or if
/// the caller has no right to trace it (root and the same user have).
pub fn at_process(pid: u32, wanted: Identity, owner: u32) -> Option<File> {
    let open = |path: PathBuf| {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
        is(&file, wanted, owner).then_some(file)
    };
    mapped(pid, wanted).and_then(open).or_else(|| opened(pid, wanted).and_then(open))
}

/// The link to a mapping of the memory. Only root may follow it.
fn mapped(pid: u32, wanted: Identity) -> Option<PathBuf> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let range = maps.lines().find_map(|line| range_of(line, wanted))?;
    Some(format!("/proc/{pid}/map_files/{range}").into())
}

/// The addresses of a line of /proc/PID/maps, if it is a mapping of this memory.
fn range_of(line: &str, wanted: Identity) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    let (range, _access, _offset) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = words.next()?.split_once(':')?;
    let number = |hex| u32::from_str_radix(hex, 16).ok();
    let device = libc::makedev(number(major)?, number(minor)?);
    let inode = words.next()?.parse().ok()?;
    (Identity { device, inode } == wanted).then_some(range)
}

/// The link to a descriptor of the memory: in the table of the thread that keeps it ([`crate::presence`]), or in the
/// process's.
fn opened(pid: u32, wanted: Identity) -> Option<PathBuf> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten().map(|thread| thread.path());
    let presence_threads = threads.filter(|thread| {
        std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim_end() == PRESENCE_THREAD)
    });
    presence_threads.chain([format!("/proc/{pid}").into()]).find_map(|place| {
        let links = std::fs::read_dir(place.join("fd")).ok()?;
        links
            .flatten()
            .map(|link| link.path())
            .find(|link| std::fs::metadata(link).is_ok_and(|data| Identity::from(&data) == wanted))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn no_descriptor_can_change_the_size() {
        let mut file = create("nvshare-test", 8192).unwrap();
        assert!(is_sealed(&file) && !is_read_only(&file));
        for size in [0, 4096, 8191, 8193] {
            assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM), "{size}");
        }
        assert!(
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err(),
            "nobody makes it read-only"
        );
        file.write_all(b"written").unwrap();
        let mut reader = read_only(&file).unwrap();
        assert!(is_sealed(&reader) && is_read_only(&reader));
        let mut word = [0; 7];
        reader.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"written");
        assert!(reader.write_all(b"no").is_err() && reader.set_len(0).is_err());
        assert!(!is_sealed(File::open("/proc/self/exe").unwrap()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn memory_is_found_at_whoever_has_it() {
        let file = create("nvshare-test", 4096).unwrap();
        let (wanted, pid) = (Identity::of(&file).unwrap(), std::process::id());
        let user = nix::unistd::geteuid().as_raw();
        let found = at_process(pid, wanted, user).unwrap();
        assert_eq!(Identity::of(&found).unwrap(), wanted);
        drop(found);
        assert!(at_process(pid, wanted, user + 1).is_none(), "of another user");
        let other = Identity { inode: wanted.inode + 1_000_000, ..wanted };
        assert!(at_process(pid, other, user).is_none());
        // Only mapped: root can follow that link.
        let mapping = memmap2::MmapOptions::new().len(4096).map_raw(&file).unwrap();
        drop(file);
        assert_eq!(at_process(pid, wanted, user).is_some(), user == 0);
        drop(mapping);
        assert!(at_process(pid, wanted, user).is_none());
    }

    #[test]
    fn a_line_of_mappings_is_read() {
        let line = "7f00-7f02 rw-s 00000000 00:01 2134                       /memfd:nvshare (deleted)";
        let wanted = Identity { device: 1, inode: 2134 };
        assert_eq!(range_of(line, wanted), Some("7f00-7f02"));
        assert_eq!(range_of(line, Identity { inode: 2135, ..wanted }), None);
        assert_eq!(range_of("", wanted), None);
    }
}
