//! Where metrics and page are served: an address and a port, or the path of a Unix socket.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::str::FromStr;

/// The port of the system's arbiter.
pub const PORT: u16 = 9478;

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An address and a port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// Nowhere, said so.
    None,
}

impl Listen {
    /// Where the system's arbiter listens unless it is told otherwise.
    pub const DEFAULT: Self = Self::Tcp(SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), PORT));

    /// Whether programs of other machines can reach it.
    pub fn is_on_the_network(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }

    /// Opens it. A Unix socket is for its owner and group; one that nobody serves any more is replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self) -> io::Result<Option<Listener>> {
        match self {
            Self::None => Ok(None),
            Self::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Some(Listener::Tcp(listener)))
            }
            Self::Unix(path) => {
                let stale = path.symlink_metadata().is_ok_and(|data| data.file_type().is_socket())
                    && std::os::unix::net::UnixStream::connect(path).is_err();
                if stale {
                    std::fs::remove_file(path)?;
                }
                let listener = std::os::unix::net::UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
                listener.set_nonblocking(true)?;
                Ok(Some(Listener::Unix(listener)))
            }
        }
    }
}

/// An open place to listen at.
#[derive(Debug)]
pub enum Listener {
    /// Of TCP.
    Tcp(std::net::TcpListener),
    /// A Unix socket.
    Unix(std::os::unix::net::UnixListener),
}

impl Listener {
    /// The same place, to be served again.
    ///
    /// # Errors
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(listener) => listener.try_clone().map(Self::Tcp),
            Self::Unix(listener) => listener.try_clone().map(Self::Unix),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(out, "http://{address}"),
                Err(error) => error.fmt(out),
            },
            Self::Unix(listener) => match listener.local_addr() {
                Ok(address) => address.as_pathname().unwrap_or(std::path::Path::new("?")).display().fmt(out),
                Err(error) => error.fmt(out),
            },
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if ["none", ""].contains(&text) {
            return Ok(Self::None);
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!(
                "'{text}' is no place to listen at: write an address and a port, such as 127.0.0.1:{PORT} or [::1]:{PORT}, the path of a Unix socket, or none"
            )
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(out, "http://{address}"),
            Self::Unix(path) => path.display().fmt(out),
            Self::None => out.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_a_path_and_none_are_read_and_all_else_is_refused_by_name() {
        assert_eq!("127.0.0.1:9478".parse(), Ok(Listen::DEFAULT));
        assert_eq!("/run/x".parse(), Ok(Listen::Unix("/run/x".into())));
        assert_eq!("none".parse(), Ok(Listen::None));
        assert_eq!("".parse(), Ok(Listen::None), "a variable that is set to nothing");
        for bad in ["9478", "localhost", "localhost:9478", "127.0.0.1"] {
            assert!(bad.parse::<Listen>().unwrap_err().contains(&format!("'{bad}'")), "{bad}");
        }
        assert!("0.0.0.0:1".parse::<Listen>().unwrap().is_on_the_network());
        assert!(!"[::1]:1".parse::<Listen>().unwrap().is_on_the_network());
    }

    #[test]
    fn a_socket_that_nobody_serves_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.sock");
        let listen = Listen::Unix(path.clone());
        drop(listen.open().unwrap());
        let second = listen.open().unwrap();
        assert!(listen.open().is_err(), "the second one serves");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        drop(second);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(listen.open().is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
