//! What a client is doing: one word of its row.

/// What a client is doing. Only the client itself writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Phase {
    /// It does not ask for the GPU. Its memory stays there until somebody else needs the room.
    #[default]
    Idle = 0,
    /// It asks for the GPU, and waits until a decision admits it.
    Waiting = 1,
    /// It is admitted, and brings its memory in.
    Filling = 2,
    /// All its memory is in place, and its gate is open (I2), or opens when its process has its other GPUs too.
    Running = 3,
    /// It is to give way, and waits for the work that it has submitted. Its gate is shut; or the gate is open for a while,
    /// with all memory in place, because the work waits for more to be submitted. Nobody asks it to evict.
    Draining = 4,
    /// It has given everything back, and the arbiter is to clear its slot.
    Leaving = 5,
}

impl From<u32> for Phase {
    /// Any word is some phase: what stands for none is read as Idle, a client that asks for nothing and is given nothing.
    fn from(word: u32) -> Self {
        match word {
            1 => Self::Waiting,
            2 => Self::Filling,
            3 => Self::Running,
            4 => Self::Draining,
            5 => Self::Leaving,
            _ => Self::Idle,
        }
    }
}

impl From<Phase> for u32 {
    fn from(phase: Phase) -> Self {
        phase as Self
    }
}

impl Phase {
    /// Whether the client asks for the GPU or has it, so that a decision may admit it.
    pub fn wants_gpu(self) -> bool {
        matches!(self, Self::Waiting | Self::Filling | Self::Running)
    }

    /// The phase in lower case, as `nvshare status` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Waiting => "waiting",
            Self::Filling => "filling",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
        }
    }
}
