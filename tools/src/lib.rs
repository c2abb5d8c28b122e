//! The command line of nvshare, and what its tests share with it.

pub mod node;
pub mod run;
pub mod status;

/// Why a command failed, and with which exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit status.
    pub status: u8,
    /// A sentence for the person who typed the command.
    pub message: String,
}

impl Failure {
    /// Bad input, or a state of the node that the user must change: exit status 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { status: 2, message: message.into() }
    }

    /// With another exit status.
    pub fn with_status(status: u8, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}
