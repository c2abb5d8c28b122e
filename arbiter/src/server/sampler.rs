//! When NVML is sampled, and what follows from a sample: contexts and the pool's size in the page, lines in the log.

use super::served_gpu::ServedGpu;
use crate::sampling::{Change, Source, View};
use nvshare::page::ForeignMemory;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos, format_size, granules_in};

/// Between two samples.
const SAMPLE_INTERVAL: Nanos = 500 * MILLISECOND;

/// Samples the memory of the GPUs.
pub(super) struct Sampler {
    source: Option<Box<dyn Source>>,
    /// Whether the last sample failed.
    failed: bool,
    /// When all GPUs were last sampled.
    sampled: Nanos,
}

impl Sampler {
    /// Without a `source` nothing is ever sampled.
    pub fn new(source: Option<Box<dyn Source>>) -> Self {
        Self { source, failed: false, sampled: 0 }
    }

    pub fn source(&self) -> Option<&dyn Source> {
        self.source.as_deref()
    }

    /// Samples all GPUs, if the last time is long enough ago at `time` (ns).
    pub fn sample_if_due(&mut self, gpus: &mut [ServedGpu], time: Nanos) {
        if time.saturating_sub(self.sampled) >= SAMPLE_INTERVAL {
            self.sampled = time;
            gpus.iter_mut().for_each(|gpu| self.sample(gpu));
        }
    }

    /// Samples a GPU and shows the result in its page. A failure is logged, once until a sample succeeds.
    pub fn sample(&mut self, gpu: &mut ServedGpu) {
        let Some(source) = &self.source else { return };
        match gpu.tracker.sample(&gpu.served.page, source.as_ref()) {
            Ok(change) => {
                self.failed = false;
                apply(gpu, change);
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!(gpu = %gpu.served.gpu, "NVML does not answer, contexts are not counted meanwhile: {error}");
                }
            }
        }
    }
}

/// Applies a sample that has been taken.
fn apply(gpu: &mut ServedGpu, change: Change) {
    let (page, uuid) = (&gpu.served.page, gpu.served.gpu);
    if let Some(view) = change.view {
        log_view(uuid, view, gpu.tracker.physical().is_some());
    }
    for (pid, bytes) in gpu.tracker.take_unreported() {
        log_foreign(uuid, pid, bytes);
    }
    let (processes, granules) = (gpu.tracker.foreign_processes(), granules_in(gpu.tracker.foreign()));
    page.set_foreign(ForeignMemory { processes, granules });
    if change.contexts | gpu.resize_pool() {
        page.decide();
    }
}

/// Logs how the size of contexts is known from now on.
fn log_view(gpu: GpuUuid, view: View, memory_known: bool) {
    match view {
        View::ByPid => tracing::info!(%gpu, "NVML shows each client's process: contexts are counted exactly"),
        View::OtherPids => tracing::warn!(
            %gpu,
            "NVML shows the clients' processes under other pids, as in a container: each context is counted as an equal part of what they have beside their data. For exact figures run the arbiter in the host's pid namespace (hostPID: true, or docker run --pid=host)"
        ),
        View::Hidden if memory_known => tracing::warn!(
            %gpu,
            "NVML does not show the clients' processes: each context is counted as an equal part of what the GPU has in use beside the clients' data. For exact figures run the arbiter in the host's pid namespace (hostPID: true, or docker run --pid=host)"
        ),
        View::Hidden => tracing::warn!(
            %gpu,
            "NVML shows neither the clients' processes nor what the GPU has in use: contexts are counted as 0 bytes, and memory may be promised that is not there. Give --headroom as much as all contexts need, 0.5 to 2 GiB for each client"
        ),
    }
}

/// Logs that a process that is no client has memory of a GPU.
fn log_foreign(gpu: GpuUuid, pid: u32, bytes: u64) {
    let who = std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(
        |_| format!("a process that NVML calls {pid}, and that cannot be seen from here,"),
        |name| format!("{} (pid {pid})", name.trim()),
    );
    tracing::warn!(
        %gpu,
        "{who} has {} of the GPU and is no client: nvshare neither moves its memory nor holds its work. It was started without `nvshare run`, or LD_PRELOAD does not reach it: it is linked statically, has other rights than who started it (setuid), or loads the driver in a namespace of its own (dlmopen)",
        format_size(bytes)
    );
}
