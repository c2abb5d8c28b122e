//! The ResourceSlices of a node: what the scheduler reads. Pure.
//!
//! One pool a node, with the node's name; one device a GPU, named after its UUID, in the order of [`super::spread`]. A slice has
//! room for 64 devices, because they may have taints.

use super::quantity::{self, bytes, plain};
use super::spread::{PLACES, Turn};
use super::terms::{CORES, MEMORY, SHARES, Terms};
use crate::inventory::{Gpu, Health};
use k8s_openapi::api::resource::v1::{
    CapacityRequestPolicy, CapacityRequestPolicyRange, Device, DeviceAttribute, DeviceCapacity, DeviceTaint,
    ResourcePool, ResourceSlice, ResourceSliceSpec,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use nvshare::units::GRANULE;
use std::collections::BTreeMap;

/// The most devices of a slice.
const DEVICES: usize = 64;

/// The longest text of an attribute, bytes.
const LONGEST: usize = 64;

/// Whose devices these are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The driver's name.
    pub driver: String,
    /// The node's name, which is also the pool's.
    pub node: String,
    /// The node's UID: its slices go when it goes.
    pub node_uid: String,
}

/// The name of a GPU's device: its UUID in small letters, which is a DNS label.
pub fn device_name(uuid: &str) -> String {
    uuid.to_ascii_lowercase()
}

/// The device of a GPU.
pub fn device(driver: &str, gpu: &Gpu, places: u64, terms: &Terms) -> Device {
    let pool = gpu.memory;
    let range = |min: Quantity, max: Quantity, step: Quantity, default: Quantity| CapacityRequestPolicy {
        default: Some(default),
        valid_range: Some(CapacityRequestPolicyRange { min, max: Some(max), step: Some(step) }),
        valid_values: None,
    };
    let memory = range(
        bytes(GRANULE),
        bytes(terms.most_memory(pool)),
        bytes(GRANULE),
        bytes(terms.usual_memory(pool)),
    );
    let shares = plain(terms.shares.into());
    let cores = terms.cores();
    // Nothing bounds a request for places: the bounds may not be above the capacity, which is 0 at times.
    let one = CapacityRequestPolicy { default: Some(plain(1)), ..CapacityRequestPolicy::default() };
    let capacity = |value, policy| DeviceCapacity { value, request_policy: Some(policy) };
    let capacities = [
        (MEMORY, capacity(bytes(terms.memory(pool)), memory)),
        (SHARES, capacity(shares.clone(), range(plain(1), shares, plain(1), plain(1)))),
        (CORES, capacity(plain(cores), range(plain(1), plain(cores), plain(1), plain(terms.usual_cores())))),
        (PLACES, capacity(plain(places), one)),
    ];
    let taint = DeviceTaint {
        key: format!("{driver}/unhealthy"),
        // Pods that run go on: an arbiter that is away harms none of them, and on a broken GPU they fail by themselves.
        effect: "NoSchedule".into(),
        time_added: None,
        value: None,
    };
    Device {
        name: device_name(&gpu.uuid),
        attributes: Some(attributes(gpu)),
        capacity: Some(capacities.map(|(name, capacity)| (name.to_owned(), capacity)).into()),
        allow_multiple_allocations: Some(true),
        taints: (gpu.health != Health::Healthy).then(|| vec![taint]),
        ..Device::default()
    }
}

fn attributes(gpu: &Gpu) -> BTreeMap<String, DeviceAttribute> {
    let string = |text: &str| {
        let end = (0..=text.len().min(LONGEST)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        DeviceAttribute { string: Some(text[..end].to_owned()), ..DeviceAttribute::default() }
    };
    let int = |number: i64| DeviceAttribute { int: Some(number), ..DeviceAttribute::default() };
    let version =
        |text: &str| DeviceAttribute { version: Some(text.to_owned()), ..DeviceAttribute::default() };
    let mut attributes = BTreeMap::from([
        ("uuid", string(&gpu.uuid)),
        ("index", int(gpu.index.into())),
        ("nvshareRelease", version(env!("CARGO_PKG_VERSION"))),
        // The capacity is what may be promised; this is what is there.
        ("poolMebibytes", int((gpu.memory >> 20) as i64)),
    ]);
    if !gpu.model.is_empty() {
        attributes.insert("productName", string(&gpu.model));
    }
    if let Some(node) = gpu.numa_node {
        attributes.insert("numaNode", int(node));
    }
    attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The devices of a node in their order.
pub fn devices(driver: &str, gpus: &[Gpu], turns: &[Turn], terms: &Terms) -> Vec<Device> {
    turns.iter().map(|turn| device(driver, &gpus[turn.seat], turn.places, terms)).collect()
}

/// What is to be done so that the API server has the devices.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Slices to be made.
    pub create: Vec<ResourceSlice>,
    /// Slices to be replaced, with the version that they replace.
    pub replace: Vec<ResourceSlice>,
    /// Slices to be deleted.
    pub delete: Vec<String>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Compares the devices with the slices that are there. If anything differs, all slices get a new generation: consumers use only the
/// newest. `published`: the newest generation that this process has made, which may have been deleted meanwhile.
pub fn plan(owner: &Owner, devices: &[Device], present: &[ResourceSlice], published: i64) -> Plan {
    let current = slices(owner, devices, newest(present));
    let same = |wanted: &ResourceSlice| present.iter().any(|present| is_same(wanted, present));
    if present.len() == current.len() && current.iter().all(same) {
        return Plan::default();
    }
    anew(owner, devices, present, published)
}

/// All slices with a new generation, whether or not anything differs.
pub fn anew(owner: &Owner, devices: &[Device], present: &[ResourceSlice], published: i64) -> Plan {
    let slices = slices(owner, devices, newest(present).max(published).saturating_add(1));
    let names = present.iter().filter_map(|slice| slice.metadata.name.clone());
    let delete =
        names.filter(|name| !slices.iter().any(|slice| slice.metadata.name.as_ref() == Some(name))).collect();
    let mut plan = Plan { delete, ..Plan::default() };
    for mut slice in slices {
        match present.iter().find(|present| present.metadata.name == slice.metadata.name) {
            Some(present) => {
                slice.metadata.resource_version.clone_from(&present.metadata.resource_version);
                slice.metadata.uid.clone_from(&present.metadata.uid);
                plan.replace.push(slice);
            }
            None => plan.create.push(slice),
        }
    }
    plan
}

fn newest(present: &[ResourceSlice]) -> i64 {
    present.iter().map(|slice| slice.spec.pool.generation).max().unwrap_or_default()
}

/// The slices of these devices in a generation.
fn slices(owner: &Owner, devices: &[Device], generation: i64) -> Vec<ResourceSlice> {
    // A pool without devices has a slice too: who looks sees that the driver is there.
    let chunks: Vec<&[Device]> =
        if devices.is_empty() { vec![&[]] } else { devices.chunks(DEVICES).collect() };
    let pool =
        ResourcePool { generation, name: owner.node.clone(), resource_slice_count: chunks.len() as i64 };
    let numbered = chunks.iter().enumerate();
    numbered.map(|(number, devices)| slice(owner, number, devices, pool.clone())).collect()
}

fn slice(owner: &Owner, number: usize, devices: &[Device], pool: ResourcePool) -> ResourceSlice {
    let node = OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: owner.node.clone(),
        uid: owner.node_uid.clone(),
        controller: Some(true),
        ..OwnerReference::default()
    };
    ResourceSlice {
        metadata: ObjectMeta {
            name: Some(slice_name(owner, number)),
            owner_references: Some(vec![node]),
            ..ObjectMeta::default()
        },
        spec: ResourceSliceSpec {
            driver: owner.driver.clone(),
            node_name: Some(owner.node.clone()),
            pool,
            devices: Some(devices.to_vec()),
            ..ResourceSliceSpec::default()
        },
    }
}

/// The name of a slice: the same after every start, and in the order of the slices, by which the scheduler goes.
fn slice_name(owner: &Owner, number: usize) -> String {
    let name = format!("{}-{}-{number:05}", owner.node, owner.driver);
    if name.len() <= 253 {
        return name;
    }
    // FNV-1a: the same in every process and every release, which std's hasher does not promise.
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let hash = owner.node.bytes().fold(0xcbf2_9ce4_8422_2325, mix);
    let start: String = owner.node.chars().take(150).collect();
    format!("{}-{hash:016x}-{}-{number:05}", start.trim_end_matches(['-', '.']), owner.driver)
}

/// Whether a slice says what it should. The API server adds to it and writes quantities in its own form.
fn is_same(wanted: &ResourceSlice, present: &ResourceSlice) -> bool {
    let owners = |slice: &ResourceSlice| {
        let owners = slice.metadata.owner_references.iter().flatten();
        owners.map(|owner| (owner.kind.clone(), owner.uid.clone())).collect::<Vec<_>>()
    };
    wanted.metadata.name == present.metadata.name
        && owners(wanted) == owners(present)
        && wanted.spec.pool == present.spec.pool
        && comparable(wanted.spec.devices.as_deref()) == comparable(present.spec.devices.as_deref())
}

/// Devices in a form in which the same things look the same.
pub fn comparable(devices: Option<&[Device]>) -> Vec<Device> {
    let number = |quantity: &mut Quantity| {
        if let Some(whole) = quantity::whole(quantity) {
            *quantity = plain(whole);
        }
    };
    let mut devices = devices.unwrap_or_default().to_vec();
    for device in &mut devices {
        for capacity in device.capacity.iter_mut().flat_map(BTreeMap::values_mut) {
            number(&mut capacity.value);
            let Some(policy) = &mut capacity.request_policy else { continue };
            policy.default.iter_mut().for_each(number);
            if let Some(range) = &mut policy.valid_range {
                number(&mut range.min);
                range.max.iter_mut().chain(&mut range.step).for_each(number);
            }
        }
        for taint in device.taints.iter_mut().flatten() {
            taint.time_added = None;
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::Load;
    use proptest::prelude::*;
    use serde_json::json;

    const TERMS: Terms = Terms { shares: 10, memory_overcommit: None };

    fn owner() -> Owner {
        Owner { driver: "gpu.nvshare.com".into(), node: "node-1".into(), node_uid: "u".into() }
    }

    fn gpu(index: u32) -> Gpu {
        Gpu {
            uuid: format!("GPU-0000000A-0000-0000-0000-{index:012X}"),
            index,
            model: "NVIDIA T4".into(),
            memory: 15 << 30,
            numa_node: Some(1),
            health: Health::Healthy,
            load: Load::default(),
        }
    }

    fn some(count: u32) -> Vec<Device> {
        (0..count).map(|index| device(&owner().driver, &gpu(index), 1, &TERMS)).collect()
    }

    /// What the API server makes of a plan.
    fn apply(plan: &Plan, present: &mut Vec<ResourceSlice>) {
        present.retain(|slice| !plan.delete.contains(slice.metadata.name.as_ref().unwrap()));
        for slice in &plan.replace {
            let old = present.iter_mut().find(|old| old.metadata.name == slice.metadata.name).unwrap();
            assert_eq!(old.metadata.resource_version, slice.metadata.resource_version, "of what it replaces");
            *old = slice.clone();
            old.metadata.resource_version = Some(format!("{}", slice.spec.pool.generation));
        }
        for slice in &plan.create {
            let mut slice = slice.clone();
            slice.metadata.resource_version = Some("1".into());
            present.push(slice);
        }
    }

    #[test]
    fn a_device_says_all_that_a_claim_may_choose_by() {
        let device = serde_json::to_value(device("gpu.nvshare.com", &gpu(3), 2, &TERMS)).unwrap();
        assert_eq!(
            device,
            json!({
                "name": "gpu-0000000a-0000-0000-0000-000000000003",
                "allowMultipleAllocations": true,
                "attributes": {
                    "uuid": {"string": "GPU-0000000A-0000-0000-0000-000000000003"},
                    "index": {"int": 3},
                    "numaNode": {"int": 1},
                    "nvshareRelease": {"version": env!("CARGO_PKG_VERSION")},
                    "poolMebibytes": {"int": 15 * 1024},
                    "productName": {"string": "NVIDIA T4"},
                },
                "capacity": {
                    "memory": {"value": "150Gi", "requestPolicy": {
                        "default": "15Gi", "validRange": {"min": "2Mi", "max": "15Gi", "step": "2Mi"}}},
                    "shares": {"value": "10", "requestPolicy": {
                        "default": "1", "validRange": {"min": "1", "max": "10", "step": "1"}}},
                    "cores": {"value": "100", "requestPolicy": {
                        "default": "10", "validRange": {"min": "1", "max": "100", "step": "1"}}},
                    "places": {"value": "2", "requestPolicy": {"default": "1"}},
                },
            })
        );
    }

    #[test]
    fn a_gpu_in_trouble_has_a_taint_that_lets_pods_run_on() {
        let gpu = Gpu { health: Health::Unhealthy("no arbiter answers".into()), ..gpu(0) };
        let taints = device("gpu.nvshare.com", &gpu, 0, &TERMS).taints.unwrap();
        assert_eq!(
            serde_json::to_value(taints).unwrap(),
            json!([{"key": "gpu.nvshare.com/unhealthy", "effect": "NoSchedule"}])
        );
    }

    #[test]
    fn slices_are_made_once_and_left_alone_while_nothing_changes() {
        let mut present = Vec::new();
        let first = plan(&owner(), &some(2), &present, 0);
        assert_eq!((first.create.len(), first.replace.len(), first.delete.len()), (1, 0, 0));
        let slice = serde_json::to_value(&first.create[0]).unwrap();
        assert_eq!(slice["metadata"]["name"], "node-1-gpu.nvshare.com-00000");
        assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], "u");
        assert_eq!(slice["spec"]["nodeName"], "node-1");
        assert_eq!(
            slice["spec"]["pool"],
            json!({"name": "node-1", "generation": 1, "resourceSliceCount": 1})
        );
        apply(&first, &mut present);
        assert!(plan(&owner(), &some(2), &present, 0).is_empty());
    }

    #[test]
    fn what_the_api_server_writes_in_its_own_way_is_no_change() {
        let mut devices = some(1);
        devices[0].taints =
            Some(vec![DeviceTaint { key: "k".into(), effect: "NoSchedule".into(), ..Default::default() }]);
        let mut present = plan(&owner(), &devices, &[], 0).create;
        let there = &mut present[0].spec.devices.as_mut().unwrap()[0];
        there.capacity.as_mut().unwrap().get_mut(MEMORY).unwrap().value = Quantity("153600Mi".into());
        there.taints.as_mut().unwrap()[0].time_added =
            Some(serde_json::from_value(json!("2026-11-30T04:00:00Z")).unwrap());
        assert!(plan(&owner(), &devices, &present, 0).is_empty());
        there_is_more(&mut present);
        assert_eq!(plan(&owner(), &devices, &present, 0).replace.len(), 1);
    }

    fn there_is_more(present: &mut [ResourceSlice]) {
        let there = &mut present[0].spec.devices.as_mut().unwrap()[0];
        there.capacity.as_mut().unwrap().get_mut(MEMORY).unwrap().value = Quantity("151Gi".into());
    }

    #[test]
    fn another_order_is_a_new_generation_of_the_same_slice() {
        let mut present = Vec::new();
        let mut devices = some(2);
        apply(&plan(&owner(), &devices, &present, 0), &mut present);
        devices.reverse();
        let second = plan(&owner(), &devices, &present, 0);
        assert_eq!((second.create.len(), second.replace.len()), (0, 1));
        assert_eq!(second.replace[0].spec.pool.generation, 2);
        assert_eq!(second.replace[0].spec.devices.as_ref().unwrap()[0].name, device_name(&gpu(1).uuid));
    }

    #[test]
    fn more_gpus_than_a_slice_holds_are_several_slices_of_one_pool() {
        let mut present = Vec::new();
        apply(&plan(&owner(), &some(65), &present, 0), &mut present);
        let counts: Vec<_> = present.iter().map(|slice| slice.spec.devices.as_ref().unwrap().len()).collect();
        assert_eq!(counts, [64, 1]);
        assert!(present.iter().all(|slice| slice.spec.pool.resource_slice_count == 2));
        let fewer = plan(&owner(), &some(3), &present, 0);
        assert_eq!(fewer.delete, ["node-1-gpu.nvshare.com-00001"]);
        apply(&fewer, &mut present);
        assert!(plan(&owner(), &some(3), &present, 0).is_empty());
    }

    #[test]
    fn a_name_is_never_too_long_and_stays_another_for_another_node() {
        let long = |end: &str| Owner { node: format!("{}{end}", "n".repeat(250)), ..owner() };
        let names: Vec<_> = ["a", "b"].iter().map(|end| slice_name(&long(end), 0)).collect();
        assert!(names.iter().all(|name| name.len() <= 253), "{names:?}");
        assert_ne!(names[0], names[1]);
        // Whoever changes it leaves slices behind that nobody replaces.
        assert_eq!(names[0], slice_name(&long("a"), 0));
    }

    #[test]
    fn a_long_model_is_cut_at_a_letter() {
        let gpu = Gpu { model: format!("{}é", "x".repeat(63)), ..gpu(0) };
        assert_eq!(attributes(&gpu)["productName"].string.as_deref(), Some("x".repeat(63).as_str()));
    }

    proptest! {
        /// Whatever was there, carrying a plan out leaves nothing to do, and consumers see a newer generation than before.
        #[test]
        fn a_plan_is_enough(before in 0u32..140, after in 0u32..140, generation in 0i64..1000) {
            let mut present = Vec::new();
            apply(&plan(&owner(), &some(before), &present, 0), &mut present);
            for slice in &mut present {
                slice.spec.pool.generation = generation;
            }
            let plan_of = plan(&owner(), &some(after), &present, 0);
            prop_assert_eq!(before == after, plan_of.is_empty());
            apply(&plan_of, &mut present);
            prop_assert!(plan(&owner(), &some(after), &present, 0).is_empty());
            let newest = present.iter().map(|slice| slice.spec.pool.generation).max().unwrap();
            prop_assert!(newest > generation || before == after);
            let total: usize = present.iter().map(|slice| slice.spec.devices.as_ref().unwrap().len()).sum();
            prop_assert_eq!(total, after as usize);
        }
    }
}
