//! Why a client that is to give way cannot: one word of its row, and the words in which people and programs read it.

/// Why a client that is to give way cannot. Only the client itself writes it ([`crate::Books::stalled`]); its memory stays
/// in place meanwhile, and it tries again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Stall {
    /// It can give way, or need not.
    #[default]
    None = 0,
    /// Its submitted work does not end, and some of its threads wait before the gate: the work may wait for what they are
    /// about to submit.
    DrainAwaitsSubmission = 1,
    /// Its submitted work does not end, and none of its threads waits before the gate: a kernel that runs for ever.
    EndlessWork = 2,
    /// It captures a graph, and has not ended the capture.
    OpenCapture = 3,
    /// Its work is done, and the host has no memory for what must be copied out.
    NoHostMemory = 4,
}

impl From<u32> for Stall {
    /// Any word is some stall: what stands for no reason is read as no stall.
    fn from(word: u32) -> Self {
        match word {
            1 => Self::DrainAwaitsSubmission,
            2 => Self::EndlessWork,
            3 => Self::OpenCapture,
            4 => Self::NoHostMemory,
            _ => Self::None,
        }
    }
}

impl From<Stall> for u32 {
    fn from(stall: Stall) -> Self {
        stall as Self
    }
}

impl Stall {
    /// The reason as a word for programs, as in `nvshare status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::DrainAwaitsSubmission => "drain-awaits-submission",
            Self::EndlessWork => "endless-work",
            Self::OpenCapture => "open-capture",
            Self::NoHostMemory => "no-host-memory",
        }
    }

    /// The reason with this [name](Stall::name), if there is one.
    pub fn named(name: &str) -> Option<Self> {
        (1..=4).map(Self::from).find(|stall| stall.name() == name)
    }

    /// The reason for people: the end of a sentence that begins with "it cannot give way:".
    pub fn reason(self) -> &'static str {
        match self {
            Self::None => "no reason",
            Self::DrainAwaitsSubmission => {
                "its work on the GPU waits for work that its threads have yet to submit"
            }
            Self::EndlessWork => "its work on the GPU does not end",
            Self::OpenCapture => "it captures a graph and has not ended the capture",
            Self::NoHostMemory => "the host has no memory for its data",
        }
    }

    /// What an operator does about it, in the imperative.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::None => "do nothing",
            Self::DrainAwaitsSubmission => {
                "if it does not end: end the process, or run it alone on its GPU (a resident kernel cannot take turns)"
            }
            Self::EndlessWork => "end the process if its kernel never returns, or run it alone on its GPU",
            Self::OpenCapture => {
                "end the process if it is stopped or stuck between cuStreamBeginCapture and cuStreamEndCapture"
            }
            Self::NoHostMemory => {
                "free host memory, raise the control group's limit or NVSHARE_HOST_MEMORY, or end a process"
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_read_as_what_was_written_and_garbage_as_none() {
        for stall in [
            Stall::DrainAwaitsSubmission,
            Stall::EndlessWork,
            Stall::OpenCapture,
            Stall::NoHostMemory,
            Stall::None,
        ] {
            assert_eq!(Stall::from(u32::from(stall)), stall);
            assert!(stall == Stall::None || Stall::named(stall.name()) == Some(stall));
        }
        assert_eq!(Stall::from(u32::MAX), Stall::None);
    }
}
