//! Which GPUs the arbiter serves, by its options and NVML.

use crate::options::Options;
use crate::sampling::{Gpu, NvmlSource, Source};
use nvshare::units::{GRANULE, GpuUuid, format_size};

/// NVML, if it can be used.
pub type OptionalSource = Option<Box<dyn Source>>;

/// The GPUs that the options name, or all, and where samples of their memory come from.
///
/// # Errors
/// A sentence for the operator.
pub fn select_gpus(options: &Options) -> Result<(Vec<Gpu>, OptionalSource), String> {
    let source = match NvmlSource::open(&options.nvml_library) {
        Ok(source) => source,
        Err(error) => {
            let Some(total) = options.capacity.filter(|_| !options.gpus.is_empty()) else {
                return Err(format!(
                    "NVML ({}) cannot be used: {error}. Install the NVIDIA driver, name the library with --nvml-library, or give --gpu UUID and --capacity SIZE to do without",
                    options.nvml_library.display()
                ));
            };
            tracing::warn!("NVML cannot be used, so contexts are not counted: {error}");
            let named = options.gpus.iter().map(|uuid| Gpu { uuid: *uuid, total, link: None }).collect();
            return Ok((named, None));
        }
    };
    let found = source.gpus().map_err(|error| format!("NVML does not list the GPUs: {error}"))?;
    let list = |gpus: &[Gpu]| gpus.iter().map(|gpu| gpu.uuid.to_string()).collect::<Vec<_>>().join(", ");
    if let Some(unknown) = options.gpus.iter().find(|uuid| !found.iter().any(|gpu| gpu.uuid == **uuid)) {
        return Err(format!("--gpu {unknown}: there is no such GPU; there is {}", list(&found)));
    }
    let wanted = |uuid: GpuUuid| options.gpus.is_empty() || options.gpus.contains(&uuid);
    let served: Vec<_> = found.into_iter().filter(|gpu| wanted(gpu.uuid)).collect();
    if served.is_empty() {
        return Err("NVML lists no GPU on this node".into());
    }
    check_capacity(&served, options)?;
    Ok((served, Some(Box::new(source))))
}

/// Checks that each GPU has memory for its pool.
fn check_capacity(served: &[Gpu], options: &Options) -> Result<(), String> {
    let has_no_pool = |gpu: &&Gpu| gpu.total.saturating_sub(options.headroom) < GRANULE;
    if options.capacity.is_none()
        && let Some(small) = served.iter().find(has_no_pool)
    {
        return Err(format!(
            "{} has {}, and --headroom {} leaves no pool of it: give less, or --capacity",
            small.uuid,
            format_size(small.total),
            format_size(options.headroom)
        ));
    }
    if let Some(capacity) = options.capacity
        && let Some(small) = served.iter().find(|gpu| gpu.total < capacity)
    {
        return Err(format!(
            "--capacity {}: {} has {}",
            format_size(capacity),
            small.uuid,
            format_size(small.total)
        ));
    }
    Ok(())
}
