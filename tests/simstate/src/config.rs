//! The environment variables that describe the simulated machine.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `NVSHARE_SIM_NAME` | name of the shared segment, and so of the machine | `nvshare-sim-<uid>` |
//! | `NVSHARE_SIM_GPUS` | number of GPUs, 1 to 16 | 1 |
//! | `NVSHARE_SIM_MEMORY` | memory of each | 256MiB |
//! | `NVSHARE_SIM_CONTEXT_BYTES` | what a context costs | 2MiB |
//! | `NVSHARE_SIM_LINK_BANDWIDTH` | bytes/s from or to pinned memory, each way | 2GiB |
//! | `NVSHARE_SIM_PAGEABLE_BANDWIDTH` | the same for pageable memory | a quarter of the link |
//! | `NVSHARE_SIM_DEVICE_BANDWIDTH` | bytes/s inside the GPU | 8GiB |
//! | `NVSHARE_SIM_KERNEL_NS` | least duration of a kernel that touches memory | 0 |
//! | `NVSHARE_SIM_COMPILE_NS` | how long the driver's compiler takes for PTX text | 0 |
//! | `NVSHARE_SIM_LOADS_WAIT` | 1: loading and unloading a module and unregistering host memory wait for all work of the context, and calls that need the driver's lock wait for that, as on a real GPU (`tests/gpu/waits.cu`); 0: they do not | 0 |
//! | `NVSHARE_SIM_REFUSES_CODE` | 1: code that was compiled before (a cubin) is for another GPU, so only PTX text can be loaded | 0 |
//! | `NVSHARE_SIM_UM_FAULT_BANDWIDTH` | bytes/s of demand-faulted managed pages | 8/51 of the link, as measured |
//! | `NVSHARE_SIM_UM_EVICT_BANDWIDTH` | bytes/s of evicted managed pages | the same |
//! | `NVSHARE_SIM_NVML_PIDS` | how the simulated GPU's NVML shows processes: `own`; `other`: as from a container, by pids of another namespace; `none`: not at all | own |
//! | `NVSHARE_SIM_NVML_FAULTS` | a file with faults that the simulated GPU's NVML lets GPUs have (`tests/simnvml/src/faults.rs`) | none |
//! | `NVSHARE_SIM_UUIDS` | the order of the GPUs' UUIDs: `ascending` with their numbers; `any`: as the machine's name makes them | any |
//! | `NVSHARE_SIM_WATCH` | 1: a call that submits work while memory is out is an illegal access | 0 |
//! | `NVSHARE_SIM_SPOIL_IMPORTS` | 1: memory that comes as a file descriptor has another first byte than it had | 0 |
//! | `NVSHARE_SIM_FAIL` | `name:count[:error],...`: the next calls of a driver function fail | none |
//!
//! Sizes and rates are numbers with an optional suffix: `K`, `M`, `G`, `T` or `KiB`, ... (all powers of 1,024).

use std::str::FromStr;

/// A variable whose value can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{variable}={value}: {wanted} expected")]
pub struct ConfigError {
    /// The variable's name.
    pub variable: &'static str,
    /// Its value.
    pub value: String,
    /// What it should have been.
    pub wanted: &'static str,
}

/// A driver function that is to fail, from `NVSHARE_SIM_FAIL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailRule {
    /// The function's exported name, or the name without `_v2`, `_ptsz`, ...
    pub function: String,
    /// How many calls fail.
    pub count: u32,
    /// The error code that they return.
    pub error: i32,
}

/// The simulated machine as the environment describes it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the shared segment.
    pub name: String,
    /// Number of GPUs; `None` takes what the segment has.
    pub gpus: Option<u32>,
    /// Loading and unloading a module and unregistering host memory wait for all work of the context, and calls that need the
    /// driver's lock wait for that.
    pub loads_wait: bool,
    /// Compiled code is for another GPU.
    pub refuses_code: bool,
    /// Bytes of memory per GPU; `None` takes what the segment has.
    pub memory: Option<u64>,
    /// Bytes that a context costs.
    pub context_bytes: u64,
    /// Pinned copies, bytes/s each way.
    pub link_bandwidth: u64,
    /// Pageable copies, bytes/s each way.
    pub pageable_bandwidth: u64,
    /// Bytes/s that a kernel, a memset or a copy inside the GPU touches.
    pub device_bandwidth: u64,
    /// Least duration of a kernel that touches memory.
    pub kernel_ns: u64,
    /// How long the compiler takes for PTX text.
    pub compile_ns: u64,
    /// Bytes/s of managed pages that a kernel faults in.
    pub um_fault_bandwidth: u64,
    /// Bytes/s of managed pages that have to leave.
    pub um_evict_bandwidth: u64,
    /// Whether the GPUs' UUIDs ascend with their numbers.
    pub ascending_uuids: bool,
    /// Whether calls that come while memory is out are illegal accesses.
    pub watch: bool,
    /// Whether memory that is imported has another first byte than it had.
    pub spoil_imports: bool,
    /// Functions that are to fail.
    pub fail: Vec<FailRule>,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl Config {
    /// Bytes of memory per GPU where nobody says otherwise.
    pub const DEFAULT_MEMORY: u64 = 256 * MIB;

    /// Reads the environment.
    pub fn from_env() -> Result<Config, ConfigError> {
        Config::from_vars(&|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    /// Reads the variables from `var`, which stands for the environment.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let link = bytes(var, "NVSHARE_SIM_LINK_BANDWIDTH")?.unwrap_or(2 * GIB);
        let um = (link / 51 * 8).max(1);
        let name = var("NVSHARE_SIM_NAME").unwrap_or_else(|| {
            // SAFETY: getuid has no preconditions and can't fail.
            format!("nvshare-sim-{}", unsafe { libc::getuid() })
        });
        if name.is_empty() || name.len() > 200 || name.contains('/') {
            return Err(ConfigError {
                variable: "NVSHARE_SIM_NAME",
                value: name,
                wanted: "a file name of 1 to 200 bytes without a slash",
            });
        }
        let gpus = number::<u32>(var, "NVSHARE_SIM_GPUS", "a number from 1 to 16")?;
        if let Some(gpus) = gpus
            && !(1..=16).contains(&gpus)
        {
            return Err(ConfigError {
                variable: "NVSHARE_SIM_GPUS",
                value: gpus.to_string(),
                wanted: "a number from 1 to 16",
            });
        }
        Ok(Config {
            name,
            gpus,
            memory: bytes(var, "NVSHARE_SIM_MEMORY")?,
            context_bytes: size_or_zero(var, "NVSHARE_SIM_CONTEXT_BYTES")?.unwrap_or(2 * MIB),
            link_bandwidth: link,
            pageable_bandwidth: bytes(var, "NVSHARE_SIM_PAGEABLE_BANDWIDTH")?.unwrap_or((link / 4).max(1)),
            device_bandwidth: bytes(var, "NVSHARE_SIM_DEVICE_BANDWIDTH")?.unwrap_or(8 * GIB),
            kernel_ns: number(var, "NVSHARE_SIM_KERNEL_NS", "a number of nanoseconds")?.unwrap_or(0),
            compile_ns: number(var, "NVSHARE_SIM_COMPILE_NS", "a number of nanoseconds")?.unwrap_or(0),
            loads_wait: number::<u8>(var, "NVSHARE_SIM_LOADS_WAIT", "0 or 1")?.unwrap_or(0) != 0,
            refuses_code: number::<u8>(var, "NVSHARE_SIM_REFUSES_CODE", "0 or 1")?.unwrap_or(0) != 0,
            um_fault_bandwidth: bytes(var, "NVSHARE_SIM_UM_FAULT_BANDWIDTH")?.unwrap_or(um),
            um_evict_bandwidth: bytes(var, "NVSHARE_SIM_UM_EVICT_BANDWIDTH")?.unwrap_or(um),
            ascending_uuids: match var("NVSHARE_SIM_UUIDS").as_deref() {
                None | Some("any") => false,
                Some("ascending") => true,
                Some(value) => {
                    return Err(ConfigError {
                        variable: "NVSHARE_SIM_UUIDS",
                        value: value.to_owned(),
                        wanted: "ascending or any",
                    });
                }
            },
            watch: number::<u8>(var, "NVSHARE_SIM_WATCH", "0 or 1")?.unwrap_or(0) != 0,
            spoil_imports: number::<u8>(var, "NVSHARE_SIM_SPOIL_IMPORTS", "0 or 1")?.unwrap_or(0) != 0,
            fail: fail_rules(var)?,
        })
    }
}

fn number<T: FromStr>(
    var: &dyn Fn(&str) -> Option<String>,
    variable: &'static str,
    wanted: &'static str,
) -> Result<Option<T>, ConfigError> {
    match var(variable) {
        None => Ok(None),
        Some(value) => match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(ConfigError { variable, value, wanted }),
        },
    }
}

fn size_or_zero(
    var: &dyn Fn(&str) -> Option<String>,
    variable: &'static str,
) -> Result<Option<u64>, ConfigError> {
    let Some(value) = var(variable) else { return Ok(None) };
    match parse_bytes(&value) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(ConfigError { variable, value, wanted: "a size such as 256MiB" }),
    }
}

fn bytes(var: &dyn Fn(&str) -> Option<String>, variable: &'static str) -> Result<Option<u64>, ConfigError> {
    match size_or_zero(var, variable)? {
        Some(0) => {
            Err(ConfigError { variable, value: "0".into(), wanted: "a size above zero such as 256MiB" })
        }
        other => Ok(other),
    }
}

/// Parses a size such as `256MiB`, `2G` or `4096`.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => 1024 * GIB,
        _ => return None,
    };
    number.checked_mul(unit)
}

fn fail_rules(var: &dyn Fn(&str) -> Option<String>) -> Result<Vec<FailRule>, ConfigError> {
    const VARIABLE: &str = "NVSHARE_SIM_FAIL";
    let Some(value) = var(VARIABLE) else { return Ok(Vec::new()) };
    let rule = |text: &str| {
        let mut parts = text.trim().split(':');
        let function = parts.next().filter(|name| name.starts_with("cu"))?.to_string();
        let count = parts.next()?.parse().ok()?;
        // Out of memory is what nearly every fault test wants.
        let error = parts.next().map_or(Some(2), |code| code.parse().ok())?;
        parts.next().is_none().then_some(FailRule { function, count, error })
    };
    let rules: Option<Vec<_>> = value.split(',').filter(|text| !text.trim().is_empty()).map(rule).collect();
    rules.ok_or(ConfigError { variable: VARIABLE, value, wanted: "name:count[:error],..." })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_vars(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_bytes("4096"), Some(4096));
        assert_eq!(parse_bytes("256MiB"), Some(256 * MIB));
        assert_eq!(parse_bytes("2 g"), Some(2 * GIB));
        assert_eq!(parse_bytes("99999999999999T"), None);
        assert_eq!(parse_bytes("lots"), None);
    }

    #[test]
    fn a_bad_value_is_named() {
        let error = read(&[("NVSHARE_SIM_MEMORY", "much")]).unwrap_err();
        assert!(error.to_string().contains("NVSHARE_SIM_MEMORY=much"), "{error}");
        assert!(read(&[("NVSHARE_SIM_GPUS", "17")]).is_err());
        assert!(read(&[("NVSHARE_SIM_NAME", "a/b")]).is_err());
    }

    #[test]
    fn fail_rules_are_a_list() {
        let config = read(&[("NVSHARE_SIM_FAIL", "cuMemCreate:3,cuMemMap:1:999")]).unwrap();
        assert_eq!(
            config.fail,
            [
                FailRule { function: "cuMemCreate".into(), count: 3, error: 2 },
                FailRule { function: "cuMemMap".into(), count: 1, error: 999 },
            ]
        );
        assert!(read(&[("NVSHARE_SIM_FAIL", "cuMemCreate")]).is_err());
    }
}
