//! The kernels' code for the GPUs that it was compiled for, by `shim/src/memory/scan/compile`.

/// A kernel's code for one kind of GPU: a file for the driver's loader ("cubin").
#[derive(Clone, Copy)]
pub struct Compiled {
    /// The compute capability that it was compiled for.
    pub capability: Capability,
    /// The file.
    pub code: &'static [u8],
}

/// What kind of GPU it is, as in 9.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capability {
    /// 9 of 9.0.
    pub major: i32,
    /// 0 of 9.0.
    pub minor: i32,
}

impl Capability {
    /// Of these numbers.
    pub const fn new(major: i32, minor: i32) -> Self {
        Self { major, minor }
    }

    /// Whether code for this kind of GPU runs on another: on those of the same generation that are not older (CUDA C++ Programming Guide,
    /// "Binary Compatibility").
    fn runs_on(self, gpu: Self) -> bool {
        self.major == gpu.major && self.minor <= gpu.minor
    }
}

/// The code of a kernel, by the name of its PTX file.
macro_rules! compiled {
    ($name:literal) => {
        compiled!($name, 7 5, 8 0, 9 0, 10 0, 12 0)
    };
    ($name:literal, $($major:literal $minor:literal),+) => {
        &[$($crate::memory::scan::compiled::Compiled {
            capability: $crate::memory::scan::compiled::Capability::new($major, $minor),
            code: include_bytes!(concat!("scan/compiled/", $name, ".sm_", $major, $minor, ".cubin")),
        }),+]
    };
}
pub(crate) use compiled;

/// The code for a GPU, if there is any.
pub fn code_for(kernel: &'static [Compiled], gpu: Capability) -> Option<&'static [u8]> {
    let fitting = kernel.iter().filter(|compiled| compiled.capability.runs_on(gpu));
    fitting.max_by_key(|compiled| compiled.capability).map(|compiled| compiled.code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fingerprint::FingerprintEntry;
    use crate::memory::scan::Entry;
    use crate::memory::zero_scan::ZeroEntry;

    #[test]
    fn a_gpu_gets_the_newest_code_of_its_generation() {
        let (old, new): (&[u8], &[u8]) = (b"8.0", b"8.6");
        let of = |major, minor, code| Compiled { capability: Capability::new(major, minor), code };
        static KERNEL: std::sync::OnceLock<[Compiled; 3]> = std::sync::OnceLock::new();
        let kernel = KERNEL.get_or_init(|| [of(8, 6, new), of(8, 0, old), of(9, 0, b"9.0")]);
        let code = |major, minor| code_for(kernel, Capability::new(major, minor));
        assert_eq!(code(8, 0), Some(old));
        assert_eq!(code(8, 5), Some(old));
        assert_eq!(code(8, 9), Some(new));
        assert_eq!(code(9, 0).map(<[u8]>::len), Some(3));
        assert_eq!([code(7, 5), code(10, 0)], [None, None]);
    }

    #[test]
    fn the_code_has_the_kernel() {
        fn check<E: Entry>() {
            let name = E::KERNEL.to_bytes();
            for Compiled { capability, code } in E::COMPILED {
                assert!(code.starts_with(b"\x7fELF"), "{capability:?}");
                assert!(code.windows(name.len()).any(|part| part == name), "{capability:?}");
            }
        }
        check::<ZeroEntry>();
        check::<FingerprintEntry>();
    }
}
