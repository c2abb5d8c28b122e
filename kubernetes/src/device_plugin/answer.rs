//! What the plugin answers, as functions of what it is asked and of the GPUs as they are.

use super::protocol::{
    CdiDevice, ContainerAllocateResponse, ContainerPreferredAllocationRequest, Device, Mount, NumaNode,
    TopologyInfo,
};
use crate::cdi;
use crate::grant::Grant;
use crate::inventory::{Gpu, Health};
use crate::options::{DeviceInjection, DevicePlugin as Options};
use crate::placement;
use crate::virtual_gpu::VirtualGpu;
use std::collections::BTreeMap;
use tonic::Status;

/// The list for the kubelet: every virtual GPU of every GPU.
pub fn devices(gpus: &[Gpu], shares: u32) -> Vec<Device> {
    let mut list = Vec::with_capacity(gpus.len() * shares as usize);
    for gpu in gpus {
        let health = if gpu.health.is_healthy() { "Healthy" } else { "Unhealthy" };
        let topology = gpu.numa_node.map(|node| TopologyInfo { nodes: vec![NumaNode { id: node }] });
        list.extend(VirtualGpu::all_of(&gpu.uuid, shares).map(|one| Device {
            id: one.to_string(),
            health: health.into(),
            topology: topology.clone(),
        }));
    }
    list
}

/// Which virtual GPUs a container should get, by name.
///
/// # Errors
/// A name is none.
pub fn preferred(
    gpus: &[Gpu],
    shares: u32,
    request: &ContainerPreferredAllocationRequest,
) -> Result<Vec<String>, Status> {
    let available = names(&request.available_device_i_ds)?;
    let must_include = names(&request.must_include_device_i_ds)?;
    let size = usize::try_from(request.allocation_size).unwrap_or(0);
    let chosen = placement::choose(gpus, shares, &available, &must_include, size);
    Ok(chosen.iter().map(ToString::to_string).collect())
}

fn names(ids: &[String]) -> Result<Vec<VirtualGpu>, Status> {
    let read =
        |id: &String| id.parse().map_err(|error: crate::virtual_gpu::NameError| unknown(&error.to_string()));
    ids.iter().map(read).collect()
}

fn unknown(what: &str) -> Status {
    Status::not_found(format!(
        "{what}. The device plugin of nvshare has not offered it: delete the pod, so that it is scheduled anew"
    ))
}

/// The GPUs of a container that has these virtual ones, and how many it has of each, by their numbers on the node.
///
/// # Errors
/// One is unknown, is named twice, or its GPU takes no new clients: the message is for the pod's event.
pub fn gpus_of<'a>(gpus: &'a [Gpu], shares: u32, ids: &[String]) -> Result<Vec<(&'a Gpu, u32)>, Status> {
    let mut wanted = names(ids)?;
    if wanted.is_empty() {
        return Err(Status::invalid_argument("the request names no virtual GPU: request at least 1"));
    }
    wanted.sort();
    if let Some(twice) = wanted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Status::invalid_argument(format!("the request names {} twice", twice[0])));
    }
    let mut counts: BTreeMap<u32, (&Gpu, u32)> = BTreeMap::new();
    for one in wanted {
        let place = gpus.iter().position(|gpu| gpu.uuid == one.gpu);
        let place = place.ok_or_else(|| unknown(&format!("{one}: this node has no GPU {}", one.gpu)))?;
        if one.number >= shares {
            return Err(unknown(&format!(
                "{one}: each GPU of this node is offered as {shares} virtual ones (--shares)"
            )));
        }
        let gpu = &gpus[place];
        if let Health::Unhealthy(why) = &gpu.health {
            return Err(Status::failed_precondition(format!("{one} cannot be given to a container: {why}")));
        }
        counts.entry(place as u32).or_insert((gpu, 0)).1 += 1;
    }
    Ok(counts.into_values().collect())
}

/// What a container is promised that has these virtual GPUs.
///
/// A container has one grant, which holds on each of its GPUs. Several virtual GPUs of one GPU are one GPU for it, with so many times the
/// memory and the weight. If it has more of one GPU than of another, the grant is that of the largest number: what was
/// promised on one GPU is not cut short because of another.
pub fn grant(options: &Options, gpus: &[(&Gpu, u32)]) -> Grant {
    let one =
        Grant { memory: options.memory_per_share, weight: options.weight_per_share, ..Grant::default() };
    one.times(gpus.iter().map(|(_, count)| *count).max().unwrap_or(1))
}

/// What the container gets.
pub fn container(options: &Options, gpus: &[(&Gpu, u32)]) -> ContainerAllocateResponse {
    let mut envs = grant(options, gpus).environment();
    let mut names = Vec::new();
    let mut mounts = Vec::new();
    match options.device_injection {
        DeviceInjection::Cdi => {
            let vendor = options.common.gpu_cdi_kind();
            names.extend(
                vendor
                    .iter()
                    .flat_map(|kind| gpus.iter().map(move |(gpu, _)| format!("{kind}={}", gpu.uuid))),
            );
            names.push(cdi::client_device());
        }
        DeviceInjection::Mounts => {
            envs.extend(cdi::client_environment(&options.common));
            mounts = cdi::client_edits(&options.common).mounts.iter().map(mount).collect();
        }
    }
    if options.device_injection == DeviceInjection::Mounts || options.common.gpu_cdi_kind().is_none() {
        // Whoever else puts the GPU into the container is told which: NVIDIA's container runtime by this variable.
        let uuids: Vec<_> = gpus.iter().map(|(gpu, _)| gpu.uuid.as_str()).collect();
        envs.push(("NVIDIA_VISIBLE_DEVICES", uuids.join(",")));
    }
    ContainerAllocateResponse {
        envs: envs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        mounts,
        cdi_devices: names.into_iter().map(|name| CdiDevice { name }).collect(),
        ..ContainerAllocateResponse::default()
    }
}

fn mount(mount: &cdi::Mount) -> Mount {
    Mount {
        container_path: mount.container_path.display().to_string(),
        host_path: mount.host_path.display().to_string(),
        read_only: mount.options.iter().any(|option| option == "ro"),
    }
}
