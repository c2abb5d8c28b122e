//! The command line. Each option is also a variable: `NVSHARE_` and its name in capitals.

use crate::dra::options::DraDriver;
use crate::virtual_gpu::MOST_SHARES;
use clap::{Args, Parser, Subcommand, ValueEnum};
use nvshare::shares::{MemoryLimit, ShareError, parse_weight};
use nvshare::units::parse_time;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// Offers this node's GPUs to pods of Kubernetes, each to several.
#[derive(Debug, Parser)]
#[command(name = "nvshare-kubernetes", version, arg_required_else_help = true, max_term_width = 80)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Of the log.
    #[command(flatten)]
    pub log: Log,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Offer each GPU as several virtual ones, by the kubelet's device plugin protocol
    DevicePlugin(DevicePlugin),
    /// Offer each GPU as one device that claims share, by dynamic resource allocation
    DraDriver(DraDriver),
}

/// How lines of the log look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Options of the log.
#[derive(Debug, Clone, Args)]
pub struct Log {
    /// What is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "NVSHARE_LOG", value_parser = level, global = true)]
    pub log_level: LevelFilter,
    /// How log lines look: as text for people, or as JSON for programs
    #[arg(long, value_enum, default_value = "text", env = "NVSHARE_LOG_FORMAT", global = true)]
    pub log_format: LogFormat,
}

/// What every way to Kubernetes needs.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The kubelet's folder, with device-plugins, plugins and plugins_registry in it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet", env = "NVSHARE_KUBELET_DIR")]
    pub kubelet_dir: PathBuf,
    /// The folder of CDI specifications that the container runtime reads
    #[arg(long, value_name = "DIR", default_value = "/var/run/cdi", env = "NVSHARE_CDI_DIR")]
    pub cdi_dir: PathBuf,
    /// The arbiter's runtime directory, as this process sees it
    #[arg(long, value_name = "DIR", default_value = "/run/nvshare", env = "NVSHARE_RUNTIME_DIR")]
    pub runtime_dir: PathBuf,
    /// The same as the host sees it: containers mount it [default: --runtime-dir]
    #[arg(long, value_name = "DIR", env = "NVSHARE_HOST_RUNTIME_DIR")]
    pub host_runtime_dir: Option<PathBuf>,
    /// The folder with libnvshare.so on the host: containers mount it, read-only, at the same path
    #[arg(long, value_name = "DIR", default_value = "/usr/lib/nvshare", env = "NVSHARE_HOST_LIBRARY_DIR")]
    pub host_library_dir: PathBuf,
    /// The vendor's CDI kind, whose device KIND=UUID brings the driver and a GPU's device nodes; empty: the container has them
    /// from elsewhere
    #[arg(long, value_name = "KIND", default_value = "nvidia.com/gpu", env = "NVSHARE_GPU_CDI_KIND")]
    pub gpu_cdi_kind: String,
    /// The NVML library to load: a path, or a name that the loader finds
    #[arg(long, value_name = "PATH", default_value = "libnvidia-ml.so.1", env = "NVSHARE_NVML")]
    pub nvml: PathBuf,
    /// How many virtual GPUs each GPU is offered as
    #[arg(long, value_name = "N", default_value_t = 10, env = "NVSHARE_SHARES", value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_SHARES)))]
    pub shares: u32,
    /// For how long a GPU counts as healthy when its arbiter has stopped to answer: an arbiter that is restarted or upgraded is
    /// back before, and new clients wait for it
    #[arg(long, value_name = "TIME", default_value = "10s", env = "NVSHARE_ARBITER_GRACE", value_parser = time)]
    pub arbiter_grace: Duration,
}

impl Common {
    /// The runtime directory on the host.
    pub fn host_runtime_dir(&self) -> &Path {
        self.host_runtime_dir.as_deref().unwrap_or(&self.runtime_dir)
    }

    /// The vendor's CDI kind, if there is one.
    pub fn gpu_cdi_kind(&self) -> Option<&str> {
        Some(self.gpu_cdi_kind.as_str()).filter(|kind| !kind.is_empty())
    }
}

/// How containers get what a client needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceInjection {
    /// By names of CDI devices, which the container runtime looks up (containerd 1.7 and newer, CRI-O).
    Cdi,
    /// By mounts and environment, which the kubelet passes on itself. The GPU's device nodes and driver must come from elsewhere,
    /// such as NVIDIA's container runtime.
    Mounts,
}

/// What `--print` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrintFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Options of the device plugin.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  nvshare device-plugin --print                     the GPUs, and in which order the next pods get them
  nvshare device-plugin --shares 4 --memory-per-share 4GiB
  nvshare device-plugin --device-injection mounts   for container runtimes that know no CDI")]
pub struct DevicePlugin {
    /// What every way to Kubernetes needs.
    #[command(flatten)]
    pub common: Common,
    /// The resource that pods request
    #[arg(long, value_name = "NAME", default_value = "nvshare.com/gpu", env = "NVSHARE_RESOURCE_NAME", value_parser = resource_name)]
    pub resource_name: String,
    /// How containers get what a client needs: by the names of CDI devices, or by mounts and environment
    #[arg(long, value_enum, default_value = "cdi", env = "NVSHARE_DEVICE_INJECTION")]
    pub device_injection: DeviceInjection,
    /// The memory that a virtual GPU shows to its container, such as 8GiB or 10% of the GPU; none: all of the GPU's
    #[arg(long, value_name = "SIZE", default_value = "none", env = "NVSHARE_MEMORY_PER_SHARE", value_parser = memory)]
    pub memory_per_share: MemoryLimit,
    /// The weight of a virtual GPU, 1 to 1000: its part of the GPU's time against others'
    #[arg(long, value_name = "N", default_value = "100", env = "NVSHARE_WEIGHT_PER_SHARE", value_parser = weight)]
    pub weight_per_share: u32,
    /// How often health and load are looked at
    #[arg(long, value_name = "TIME", default_value = "1s", env = "NVSHARE_INTERVAL", value_parser = interval)]
    pub interval: Duration,
    /// If NVML does not answer for so long, all GPUs count as unhealthy until it does
    #[arg(long, value_name = "TIME", default_value = "30s", env = "NVSHARE_NVML_TIMEOUT", value_parser = time)]
    pub nvml_timeout: Duration,
    /// Write the GPUs and the order in which the next pods get them, and end
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub print: Option<PrintFormat>,
}

fn level(text: &str) -> Result<LevelFilter, String> {
    if text.is_empty() {
        // A variable that is set to nothing says nothing.
        return Ok(LevelFilter::INFO);
    }
    text.parse().map_err(|_| format!("'{text}' is no level: write error, warn, info, debug or trace"))
}

fn time(text: &str) -> Result<Duration, String> {
    parse_time(text).map(Duration::from_nanos).map_err(|error| error.to_string())
}

fn interval(text: &str) -> Result<Duration, String> {
    let bounds = Duration::from_millis(10)..=Duration::from_secs(60);
    time(text)
        .and_then(|time| bounds.contains(&time).then_some(time).ok_or(format!("'{text}' is not 10ms to 60s")))
}

fn memory(text: &str) -> Result<MemoryLimit, String> {
    text.parse().map_err(|error: ShareError| error.to_string())
}

fn weight(text: &str) -> Result<u32, String> {
    parse_weight(text).map_err(|error| error.to_string())
}

/// An extended resource's name as the kubelet takes it: a domain that is not Kubernetes' own, a slash, a name.
fn resource_name(text: &str) -> Result<String, String> {
    let word = |part: &str| {
        let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = part.as_bytes();
        part.len() <= 63
            && ends(bytes.first())
            && ends(bytes.last())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
    };
    let fits = text.split_once('/').is_some_and(|(domain, name)| {
        word(domain) && word(name) && domain.contains('.') && !domain.ends_with("kubernetes.io")
    });
    fits.then(|| text.to_owned())
        .ok_or_else(|| format!("'{text}' is no resource that a pod can request: write a domain of your own and a name, such as nvshare.com/gpu"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let plugin = |arguments: &[&str]| {
            let given = ["nvshare-kubernetes", "device-plugin"].iter().chain(arguments);
            Cli::try_parse_from(given).map(|cli| match cli.command {
                Command::DevicePlugin(options) => options,
                Command::DraDriver(_) => unreachable!(),
            })
        };
        let usual = plugin(&[]).unwrap();
        assert_eq!(usual.common.host_runtime_dir(), Path::new("/run/nvshare"));
        assert_eq!(usual.common.gpu_cdi_kind(), Some("nvidia.com/gpu"));
        assert_eq!(plugin(&["--gpu-cdi-kind", ""]).unwrap().common.gpu_cdi_kind(), None);
        assert_eq!(plugin(&["--print"]).unwrap().print, Some(PrintFormat::Table));
        let bad = [
            ["--shares", "0"],
            ["--shares", "1000000"],
            ["--resource-name", "gpu"],
            ["--resource-name", "kubernetes.io/gpu"],
            ["--resource-name", "a.b/c/d"],
            ["--memory-per-share", "much"],
            ["--weight-per-share", "0"],
            ["--interval", "1ms"],
            ["--arbiter-grace", "5"],
            ["--log-level", "chatty"],
        ];
        for bad in bad {
            let error = plugin(&bad).unwrap_err().to_string();
            assert!(error.contains(&format!("'{}'", bad[1])) || error.contains(bad[1]), "{error}");
        }
    }
}
