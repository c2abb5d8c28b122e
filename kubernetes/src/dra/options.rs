//! The command line of the driver.

use super::spread::Spread;
use super::terms::Terms;
use crate::options::Common;
use clap::Args;
use nvshare::units::parse_time;
use std::path::PathBuf;
use std::time::Duration;

/// Options of the driver for dynamic resource allocation.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  nvshare dra-driver --node-name \"$NODE\"                          in a pod, with a service account
  nvshare dra-driver --node-name n1 --kubeconfig ~/.kube/config     anywhere else
  nvshare dra-driver --node-name n1 --shares 4 --memory-overcommit 1  memory is given away once: four claims get a quarter each")]
pub struct DraDriver {
    /// What every way to Kubernetes needs.
    #[command(flatten)]
    pub common: Common,
    /// The driver's name, as DeviceClasses and claims have it
    #[arg(long, value_name = "NAME", default_value = "gpu.nvshare.com", env = "NVSHARE_DRIVER_NAME", value_parser = driver_name)]
    pub driver_name: String,
    /// The name of this node in Kubernetes; in a pod, of the field spec.nodeName
    #[arg(long, value_name = "NAME", env = "NVSHARE_NODE_NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub node_name: String,
    /// How to reach the API server [default: as a pod, with its service account]
    #[arg(long, value_name = "FILE", env = "NVSHARE_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// How many times its pool a GPU's memory is given away. What does not fit at one time is evicted to the host [default: as
    /// many times as there are shares, so that a claim that asks for no memory may have the whole pool]
    #[arg(long, value_name = "FACTOR", env = "NVSHARE_MEMORY_OVERCOMMIT", value_parser = overcommit)]
    pub memory_overcommit: Option<f64>,
    /// How claims are spread: even, so that no GPU gets a second claim while another is empty, or order, by the order of the
    /// devices alone, which pods that come at once overtake
    #[arg(long, value_enum, default_value = "even", env = "NVSHARE_SPREAD")]
    pub spread: Spread,
    /// The least time between two publications of nothing but another order
    #[arg(long, value_name = "TIME", default_value = "10s", env = "NVSHARE_REORDER_INTERVAL", value_parser = reorder)]
    pub reorder_interval: Duration,
    /// How often health and load are looked at
    #[arg(long, value_name = "TIME", default_value = "1s", env = "NVSHARE_INTERVAL", value_parser = interval)]
    pub interval: Duration,
    /// If NVML does not answer for so long, all GPUs count as unhealthy until it does
    #[arg(long, value_name = "TIME", default_value = "30s", env = "NVSHARE_NVML_TIMEOUT", value_parser = interval)]
    pub nvml_timeout: Duration,
    /// Remove this node's ResourceSlices at the end, as before the driver is taken away for good. Pods that run go on either way
    #[arg(long, env = "NVSHARE_WITHDRAW")]
    pub withdraw: bool,
}

impl DraDriver {
    /// How GPUs are offered.
    pub fn terms(&self) -> Terms {
        Terms { shares: self.common.shares, memory_overcommit: self.memory_overcommit }
    }
}

fn time(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let time = parse_time(text).map(Duration::from_nanos).map_err(|error| error.to_string())?;
    if (least..=most).contains(&time) {
        return Ok(time);
    }
    Err(format!("'{text}' is not between {least:?} and {most:?}"))
}

fn interval(text: &str) -> Result<Duration, String> {
    time(text, Duration::from_millis(10), Duration::from_secs(60))
}

fn reorder(text: &str) -> Result<Duration, String> {
    time(text, Duration::ZERO, Duration::from_secs(3_600))
}

fn overcommit(text: &str) -> Result<f64, String> {
    let factor = text.trim().parse().ok().filter(|factor| (0.01..=1_000.0).contains(factor));
    factor.ok_or_else(|| format!("'{text}' is no factor: write a number from 0.01 to 1000, such as 1 or 2.5"))
}

/// A driver's name as Kubernetes takes it: a DNS subdomain of at most 63 characters.
fn driver_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let edge = |byte: Option<&u8>| byte.is_some_and(|byte| inner(byte) && *byte != b'-');
        let bytes = label.as_bytes();
        bytes.iter().all(inner) && edge(bytes.first()) && edge(bytes.last())
    };
    if text.len() <= 63 && text.split('.').all(label) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "'{text}' is no driver's name: write a domain in small letters, at most 63 characters, such as gpu.nvshare.com"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        driver: DraDriver,
    }

    fn read(arguments: &[&str]) -> Result<DraDriver, String> {
        let line = ["x", "--node-name", "n"].iter().chain(arguments);
        Line::try_parse_from(line).map(|line| line.driver).map_err(|error| error.to_string())
    }

    #[test]
    fn the_usual_is_right_for_a_pod() {
        let usual = read(&[]).unwrap();
        assert_eq!((usual.driver_name.as_str(), usual.spread), ("gpu.nvshare.com", Spread::Even));
        assert_eq!(usual.terms(), Terms { shares: 10, memory_overcommit: None });
    }

    #[test]
    fn a_wrong_value_is_named_with_what_would_be_right() {
        for (arguments, part) in [
            (["--driver-name", "GPU.nvshare.com"], "such as gpu.nvshare.com"),
            (["--driver-name", "gpu..com"], "such as gpu.nvshare.com"),
            (["--driver-name", "gpu-.com"], "such as gpu.nvshare.com"),
            (["--memory-overcommit", "0"], "such as 1 or 2.5"),
            (["--memory-overcommit", "NaN"], "such as 1 or 2.5"),
            (["--reorder-interval", "2h"], "'2h'"),
            (["--interval", "1ms"], "between"),
            (["--spread", "evenly"], "even"),
            (["--node-name", ""], "--node-name"),
        ] {
            let error = read(&arguments).unwrap_err();
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }
}
