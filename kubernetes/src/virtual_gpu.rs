//! The name of a virtual GPU: `GPU-8ac1f0c2-...::3` is the fourth that GPU-8ac1f0c2-... is offered as.
//!
//! The name is all that is known of it: no list of them is kept anywhere, so a program that starts anew gives every virtual GPU the
//! name that it had before. The kubelet takes names of at most 63 characters.

use std::fmt;
use std::str::FromStr;

/// The most virtual GPUs that a GPU may be offered as. The arbiter has a slot for 48 processes on a GPU
/// ([`nvshare::slot::SLOTS`]); some pods have no process there.
pub const MOST_SHARES: u32 = 1_000;

/// One of the virtual GPUs that a GPU is offered as.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualGpu {
    /// The GPU's UUID.
    pub gpu: String,
    /// Its number among those of this GPU, from 0.
    pub number: u32,
}

/// A text that names no virtual GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not the name of a virtual GPU, which is a GPU's UUID, two colons and a number")]
pub struct NameError(String);

impl VirtualGpu {
    /// All that a GPU is offered as.
    pub fn all_of(gpu: &str, shares: u32) -> impl Iterator<Item = Self> + '_ {
        (0..shares).map(move |number| Self { gpu: gpu.to_owned(), number })
    }
}

impl fmt::Display for VirtualGpu {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}::{}", self.gpu, self.number)
    }
}

impl FromStr for VirtualGpu {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = text.rsplit_once("::").and_then(|(gpu, number)| {
            let number = number.parse().ok().filter(|parsed: &u32| parsed.to_string() == number)?;
            (!gpu.is_empty()).then(|| Self { gpu: gpu.to_owned(), number })
        });
        parsed.ok_or_else(|| NameError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::units::GpuUuid;

    #[test]
    fn a_name_is_read_as_it_was_written_and_fits_the_kubelet() {
        for one in VirtualGpu::all_of(&GpuUuid([0xab; 16]).to_string(), MOST_SHARES) {
            let name = one.to_string();
            assert!(name.len() <= 63, "{name}");
            assert_eq!(name.parse(), Ok(one));
        }
        for bad in ["", "GPU-1", "GPU-1::", "::1", "GPU-1::x", "GPU-1::01", "GPU-1::+1", "GPU-1::-1"] {
            assert!(
                bad.parse::<VirtualGpu>().unwrap_err().to_string().contains(&format!("'{bad}'")),
                "{bad}"
            );
        }
    }
}
