//! The settings from the environment. Read once, at the first call into CUDA.

use nvshare::shares::{ComputeLimit, MemoryLimit, Priority, Shares, parse_weight};
use nvshare::units::parse_size;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

/// What to do when no arbiter answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMissingArbiter {
    /// cuInit fails.
    Fail,
    /// The process uses the GPU without nvshare.
    Passthrough,
}

/// Whether the copies of memory in host memory are kept when it comes back to the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepCopies {
    /// They are freed.
    Off,
    /// They are kept, and what has not changed since is not copied again.
    On,
    /// They are kept, everything is copied again, and what should not have changed is compared.
    Verify,
}

/// The process's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// NVSHARE_CLIENT_NAME: what the client is called in `nvshare status`; the program's name if unset.
    pub name: String,
    /// NVSHARE_CONNECT_TIMEOUT: how long to wait for an arbiter.
    pub connect_timeout: Duration,
    /// NVSHARE_ON_MISSING_ARBITER: `fail` or `passthrough`.
    pub on_missing_arbiter: OnMissingArbiter,
    /// NVSHARE_HOST_MEMORY: the most host memory for evicted data, in bytes.
    pub host_memory: Option<u64>,
    /// NVSHARE_ENABLE_SINGLE_OVERSUB: one process may allocate more than the GPU has; the rest lies in host
    /// memory.
    pub oversubscribe: bool,
    /// NVSHARE_FLOW_CONTROL: whether work in flight is limited to the drain target while a slice can end.
    pub flow_control: bool,
    /// NVSHARE_UNMOVABLE: whether the driver makes allocations itself; `None`: only if a tool watches them.
    pub unmovable: Option<bool>,
    /// NVSHARE_KEEP_FREED: how long memory that the application has freed is kept for its next allocation.
    pub keep_freed: Duration,
    /// NVSHARE_KEEP_COPIES: `off`, `on` or `verify`.
    pub keep_copies: KeepCopies,
    /// NVSHARE_REPLICAS: the name of the processes of this user that have the same data and hand GPU memory to each other.
    pub replicas: Option<String>,
    /// NVSHARE_GANG: the name of the processes that this one waits for and that wait for it, and how many they are with it.
    pub gang: Option<(String, u32)>,
    /// NVSHARE_WEIGHT, NVSHARE_PRIORITY, NVSHARE_MEMORY_LIMIT and NVSHARE_COMPUTE_LIMIT: the shares with which the process registers.
    pub shares: Shares,
}

impl Settings {
    /// Reads the settings from the variables that `get` returns.
    ///
    /// # Errors
    /// A message with the variable, its value, and what would be valid.
    fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        if let Some(text) = get("NVSHARE_DISABLE").filter(|text| !matches!(text.as_str(), "" | "0" | "1")) {
            return Err(format!(
                "NVSHARE_DISABLE='{text}': write 1 to run this process without nvshare, or 0"
            ));
        }
        fn parse<T>(
            value: Option<String>,
            name: &str,
            right: &str,
            default: T,
            read: impl Fn(&str) -> Option<T>,
        ) -> Result<T, String> {
            value.map_or(Ok(default), |text| read(&text).ok_or_else(|| format!("{name}='{text}': {right}")))
        }
        fn seconds(text: &str) -> Option<Duration> {
            let seconds =
                f64::from_str(text.trim()).ok().filter(|seconds| (0.0..=86_400.0).contains(seconds))?;
            Some(Duration::from_secs_f64(seconds))
        }
        Ok(Self {
            name: get("NVSHARE_CLIENT_NAME").filter(|name| !name.is_empty()).unwrap_or_else(program),
            connect_timeout: parse(
                get("NVSHARE_CONNECT_TIMEOUT"),
                "NVSHARE_CONNECT_TIMEOUT",
                "write seconds between 0 and 86400, such as 10 or 0.5",
                Duration::from_secs(10),
                seconds,
            )?,
            on_missing_arbiter: parse(
                get("NVSHARE_ON_MISSING_ARBITER"),
                "NVSHARE_ON_MISSING_ARBITER",
                "write fail or passthrough",
                OnMissingArbiter::Fail,
                |text| match text {
                    "fail" => Some(OnMissingArbiter::Fail),
                    "passthrough" => Some(OnMissingArbiter::Passthrough),
                    _ => None,
                },
            )?,
            host_memory: parse(
                get("NVSHARE_HOST_MEMORY"),
                "NVSHARE_HOST_MEMORY",
                "write a size, such as 64GiB",
                None,
                |text| parse_size(text).ok().map(Some),
            )?,
            oversubscribe: parse(
                get("NVSHARE_ENABLE_SINGLE_OVERSUB"),
                "NVSHARE_ENABLE_SINGLE_OVERSUB",
                "write 1 to let one process allocate more than the GPU has, or 0",
                false,
                |text| switch(text, false),
            )?,
            flow_control: parse(
                get("NVSHARE_FLOW_CONTROL"),
                "NVSHARE_FLOW_CONTROL",
                "write 0 to let work in flight grow while others wait, or 1",
                true,
                |text| switch(text, true),
            )?,
            unmovable: parse(
                get("NVSHARE_UNMOVABLE"),
                "NVSHARE_UNMOVABLE",
                "write 1 to leave allocations to the driver, so that they cannot move, 0 to never do so, or auto",
                None,
                |text| match text {
                    "" | "auto" => Some(None),
                    "0" => Some(Some(false)),
                    "1" => Some(Some(true)),
                    _ => None,
                },
            )?,
            keep_freed: parse(
                get("NVSHARE_KEEP_FREED"),
                "NVSHARE_KEEP_FREED",
                "write seconds between 0 and 86400 for which freed memory is kept for the next allocation, such as 1",
                Duration::from_secs(1),
                seconds,
            )?,
            keep_copies: parse(
                get("NVSHARE_KEEP_COPIES"),
                "NVSHARE_KEEP_COPIES",
                "write on to keep copies in host memory, so that what has not changed is not copied again, off, or verify to compare it",
                KeepCopies::On,
                |text| match text {
                    "" | "on" | "1" => Some(KeepCopies::On),
                    "off" | "0" => Some(KeepCopies::Off),
                    "verify" => Some(KeepCopies::Verify),
                    _ => None,
                },
            )?,
            replicas: get("NVSHARE_REPLICAS").filter(|text| !text.is_empty()),
            gang: parse(
                get("NVSHARE_GANG").filter(|text| !text.is_empty()),
                "NVSHARE_GANG",
                "write the name of a job and the number of its processes on this machine, such as training:2",
                None,
                |text| nvshare::membership::parse_name(text).map(Some),
            )?,
            shares: Shares {
                weight: parse(
                    get("NVSHARE_WEIGHT"),
                    "NVSHARE_WEIGHT",
                    "write a whole number from 1 to 1000; 100 is usual",
                    Shares::default().weight,
                    |text| parse_weight(text).ok(),
                )?,
                priority: parse(
                    get("NVSHARE_PRIORITY"),
                    "NVSHARE_PRIORITY",
                    "write low, normal or high",
                    Priority::default(),
                    |text| text.parse().ok(),
                )?,
                memory_limit: parse(
                    get("NVSHARE_MEMORY_LIMIT"),
                    "NVSHARE_MEMORY_LIMIT",
                    "write a size of 2MiB or more, such as 8GiB, a part of the GPU, such as 25%, or none",
                    MemoryLimit::default(),
                    |text| text.parse().ok(),
                )?,
                compute_limit: parse(
                    get("NVSHARE_COMPUTE_LIMIT"),
                    "NVSHARE_COMPUTE_LIMIT",
                    "write a part of the GPU's time from 1% to 100%, such as 30%, or none",
                    ComputeLimit::default(),
                    |text| text.parse().ok(),
                )?,
            },
        })
    }
}

fn switch(text: &str, default: bool) -> Option<bool> {
    match text {
        "" => Some(default),
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn program() -> String {
    std::fs::read_to_string("/proc/self/comm")
        .map_or_else(|_| "unnamed".into(), |name| name.trim().to_owned())
}

/// The settings of this process.
///
/// # Errors
/// The same message every time, if a variable is invalid.
pub fn settings() -> Result<&'static Settings, &'static str> {
    static SETTINGS: OnceLock<Result<Settings, String>> = OnceLock::new();
    // A value that is not UTF-8 is converted with replacement characters, so that it is refused and not ignored.
    let get = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    SETTINGS.get_or_init(|| Settings::read(get)).as_ref().map_err(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, value: &str) -> Result<Settings, String> {
        Settings::read(|asked| (asked == name).then(|| value.to_owned()))
    }

    #[test]
    fn an_invalid_value_is_named() {
        for (name, value) in [
            ("NVSHARE_CONNECT_TIMEOUT", "soon"),
            ("NVSHARE_CONNECT_TIMEOUT", "-1"),
            ("NVSHARE_CONNECT_TIMEOUT", "nan"),
            ("NVSHARE_ON_MISSING_ARBITER", "maybe"),
            ("NVSHARE_HOST_MEMORY", "lots"),
            ("NVSHARE_DISABLE", "yes"),
            ("NVSHARE_ENABLE_SINGLE_OVERSUB", "maybe"),
            ("NVSHARE_FLOW_CONTROL", "on"),
            ("NVSHARE_UNMOVABLE", "yes"),
            ("NVSHARE_KEEP_FREED", "-1"),
            ("NVSHARE_GANG", "training"),
            ("NVSHARE_GANG", ":2"),
            ("NVSHARE_GANG", "training:1"),
            ("NVSHARE_WEIGHT", "0"),
            ("NVSHARE_WEIGHT", "1001"),
            ("NVSHARE_PRIORITY", "urgent"),
            ("NVSHARE_MEMORY_LIMIT", "150%"),
            ("NVSHARE_MEMORY_LIMIT", "1MiB"),
            ("NVSHARE_COMPUTE_LIMIT", "30"),
            ("NVSHARE_COMPUTE_LIMIT", "0.5%"),
        ] {
            let error = read(name, value).unwrap_err();
            assert!(error.contains(name) && error.contains(&format!("'{value}'")), "{error}");
        }
    }

    #[test]
    fn valid_values_are_taken() {
        assert_eq!(
            read("NVSHARE_CONNECT_TIMEOUT", "0.5").unwrap().connect_timeout,
            Duration::from_millis(500)
        );
        assert_eq!(read("NVSHARE_KEEP_FREED", "0").unwrap().keep_freed, Duration::ZERO);
        assert_eq!(read("NVSHARE_HOST_MEMORY", "1GiB").unwrap().host_memory, Some(1 << 30));
        assert_eq!(read("NVSHARE_UNMOVABLE", "1").unwrap().unmovable, Some(true));
        assert_eq!(read("NVSHARE_UNMOVABLE", "auto").unwrap().unmovable, None);
        assert_eq!(read("NVSHARE_GANG", "a:b:2").unwrap().gang, Some(("a:b".into(), 2)));
        assert_eq!(read("NVSHARE_GANG", "").unwrap().gang, None);
        assert_eq!(read("NVSHARE_REPLICAS", "llama").unwrap().replicas, Some("llama".into()));
        assert_eq!(read("NVSHARE_REPLICAS", "").unwrap().replicas, None);
        assert_eq!(read("NVSHARE_CLIENT_NAME", "job 7").unwrap().name, "job 7");
        assert_eq!(
            read("NVSHARE_WEIGHT", "300").unwrap().shares,
            Shares { weight: 300, ..Shares::default() }
        );
        assert_eq!(read("NVSHARE_PRIORITY", "low").unwrap().shares.priority, Priority::Low);
        let limit = read("NVSHARE_MEMORY_LIMIT", "25%").unwrap().shares.memory_limit;
        assert_eq!(limit, MemoryLimit::Part(250_000));
        let limit = read("NVSHARE_COMPUTE_LIMIT", "30%").unwrap().shares.compute_limit;
        assert_eq!(limit, ComputeLimit::Part(300_000));
    }
}
