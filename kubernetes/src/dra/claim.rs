//! What a claim was given, and what its pods are promised for it. Pure functions of the claim as the API server has it.
//!
//! | in the claim | the promise |
//! |---|---|
//! | `capacity.requests.memory` | the client's memory limit, if it is less than the pool |
//! | `capacity.requests.cores` | the client's weight: with all of a GPU's cores given away, a busy client gets at least its percents of the time, and more while others are idle |
//! | `capacity.requests.shares` | so many fewer claims have this GPU |
//! | `config[].opaque`, a [`ClientConfig`] | weight, priority, memory limit and compute limit as they are written there |
//!
//! What the scheduler sees (capacities) it refuses itself: the pod waits, and says why. What it does not see, the configuration, is
//! refused here, and the kubelet shows the sentence in an event of the pod.

use super::quantity;
use super::terms::{CORES, MEMORY, Terms};
use k8s_openapi::api::resource::v1::{
    DeviceAllocationConfiguration, DeviceRequestAllocationResult, ResourceClaim,
};
use nvshare::shares::{ComputeLimit, MemoryLimit, Priority, ShareError, Shares, parse_weight};
use nvshare::units::{GRANULE, bytes_of, format_size, granules_in};
use nvshare::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};
use serde::Deserialize;

/// What stands in a [`ClientConfig`] as its version.
const API_VERSION: &str = "nvshare.com/v1";
/// What stands in a [`ClientConfig`] as its kind.
const KIND: &str = "ClientConfig";

/// Configuration of a claim or of a DeviceClass, in `config[].opaque.parameters`.
///
/// ```yaml
/// apiVersion: nvshare.com/v1
/// kind: ClientConfig
/// weight: 300          # 1 to 1000; in place of what `cores` comes to
/// priority: high       # low, normal, high
/// memoryLimit: 8Gi     # at most what the claim asks for; a size or a part such as 25%
/// computeLimit: 30%    # never more of the GPU's time than this
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClientConfig {
    /// `nvshare.com/v1`.
    api_version: String,
    /// `ClientConfig`.
    kind: String,
    /// How much of the GPU's time clients get in comparison with others.
    weight: Option<u32>,
    /// How soon their turns come.
    priority: Option<String>,
    /// The most memory that each has.
    memory_limit: Option<String>,
    /// The most of the GPU's time that each has.
    compute_limit: Option<String>,
}

impl ClientConfig {
    /// This one, where it says something, and the other where it does not.
    fn over(self, other: Self) -> Self {
        Self {
            api_version: self.api_version,
            kind: self.kind,
            weight: self.weight.or(other.weight),
            priority: self.priority.or(other.priority),
            memory_limit: self.memory_limit.or(other.memory_limit),
            compute_limit: self.compute_limit.or(other.compute_limit),
        }
    }
}

/// Why a claim cannot be made ready. The kubelet puts the claim's name before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The scheduler has given it nothing of this driver.
    #[error(
        "it has no device of {driver}: the claim was deallocated meanwhile. Delete the pod, so that it is scheduled anew"
    )]
    NotAllocated {
        /// This driver.
        driver: String,
    },
    /// Its configuration is wrong.
    #[error("the configuration {place} is wrong: {why}. Correct it, and make claim and pod anew")]
    Config {
        /// Where it stands.
        place: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// Its configuration promises more memory than the scheduler knows of.
    #[error(
        "memoryLimit of request {request} is {limit}, and the claim was given {given}: ask for as much in \
         capacity.requests.memory of the request, so that the scheduler counts it, or leave memoryLimit out"
    )]
    MemoryLimit {
        /// The request.
        request: String,
        /// What the configuration says.
        limit: String,
        /// What the scheduler counts.
        given: String,
    },
    /// The GPU's pool has shrunk since the claim was given its memory.
    #[error(
        "request {request} was given {given} on {gpu}, whose pool is {pool} now: a smaller --capacity or another headroom of the arbiter. \
         Delete the pod and its claim, so that they are scheduled anew"
    )]
    Memory {
        /// The request.
        request: String,
        /// What it was given.
        given: String,
        /// The GPU.
        gpu: String,
        /// The size of its pool.
        pool: String,
    },
}

/// One device that a claim was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allotment {
    /// The request that got it; `request/subrequest` if there were several to choose from.
    pub request: String,
    /// The pool.
    pub pool: String,
    /// The device in the pool.
    pub device: String,
    /// Which of the device's allocations it is.
    pub share_id: Option<String>,
    /// The memory that it takes, bytes.
    pub memory: Option<u64>,
    /// The percents of the GPU's time that it takes.
    pub cores: Option<u64>,
    /// What the configuration says, with the claim's over the class's.
    pub config: ClientConfig,
}

/// What a claim was given of this driver's devices, in the order of the API server.
///
/// # Errors
/// Nothing, or the configuration is wrong.
pub fn allotments(claim: &ResourceClaim, driver: &str) -> Result<Vec<Allotment>, Refusal> {
    let allocation = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    let devices = allocation.and_then(|allocation| allocation.devices.as_ref());
    let results = devices.and_then(|devices| devices.results.as_deref()).unwrap_or_default();
    let configs = devices.and_then(|devices| devices.config.as_deref()).unwrap_or_default();
    let ours: Vec<_> = results.iter().filter(|result| result.driver == driver).collect();
    if ours.is_empty() {
        return Err(Refusal::NotAllocated { driver: driver.to_owned() });
    }
    ours.into_iter().map(|result| allotment(result, configs, driver)).collect()
}

fn allotment(
    result: &DeviceRequestAllocationResult,
    configs: &[DeviceAllocationConfiguration],
    driver: &str,
) -> Result<Allotment, Refusal> {
    let mut config = ClientConfig::default();
    // The API server lists those of classes first, and of equals the later one holds.
    for entry in configs.iter().filter(|entry| applies(entry, &result.request)) {
        let Some(opaque) = entry.opaque.as_ref().filter(|opaque| opaque.driver == driver) else { continue };
        let read = read_config(&opaque.parameters.0);
        let wrong = |why| Refusal::Config { place: place(entry), why };
        config = read.map_err(wrong)?.over(config);
    }
    let consumed = |name: &str| {
        let consumed = result.consumed_capacity.as_ref()?;
        let quantity = consumed.get(name).or_else(|| consumed.get(&format!("{driver}/{name}")))?;
        quantity::whole(quantity)
    };
    Ok(Allotment {
        request: result.request.clone(),
        pool: result.pool.clone(),
        device: result.device.clone(),
        share_id: result.share_id.clone(),
        memory: consumed(MEMORY),
        cores: consumed(CORES),
        config,
    })
}

/// Whether a configuration is for this request: it names none, or this one, or the one of which this is an alternative.
fn applies(entry: &DeviceAllocationConfiguration, request: &str) -> bool {
    let named = entry.requests.as_deref().unwrap_or_default();
    let main = request.split_once('/').map_or(request, |(main, _)| main);
    named.is_empty() || named.iter().any(|name| name == request || name == main)
}

/// Where a configuration stands.
fn place(entry: &DeviceAllocationConfiguration) -> String {
    let owner = if entry.source == "FromClass" { "of the DeviceClass" } else { "of the claim" };
    match entry.requests.as_deref().unwrap_or_default() {
        [] => format!("{owner} for all requests"),
        named => format!("{owner} for {}", named.join(", ")),
    }
}

fn read_config(parameters: &serde_json::Value) -> Result<ClientConfig, String> {
    // First who it is: a wrong kind is not told about in terms of its fields.
    for (field, right) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        let found = parameters.get(field).and_then(serde_json::Value::as_str);
        if found != Some(right) {
            return Err(format!("{field} is '{}' and must be '{right}'", found.unwrap_or_default()));
        }
    }
    let config: ClientConfig =
        serde_json::from_value(parameters.clone()).map_err(|error| error.to_string())?;
    // Read once here, so that what is wrong is told with the place where it stands.
    shares(&config).map_err(|error| error.to_string())?;
    Ok(config)
}

/// What a configuration says, and the usual where it says nothing.
fn shares(config: &ClientConfig) -> Result<Shares, ShareError> {
    Ok(Shares {
        weight: config.weight.map_or(Ok(DEFAULT_WEIGHT), |weight| parse_weight(&weight.to_string()))?,
        priority: config.priority.as_deref().map_or(Ok(Priority::default()), str::parse)?,
        memory_limit: config.memory_limit.as_deref().map_or(Ok(MemoryLimit::None), memory_limit)?,
        compute_limit: config.compute_limit.as_deref().map_or(Ok(ComputeLimit::None), str::parse)?,
    })
}

/// A memory limit as people write it for Kubernetes (8Gi) or for nvshare (8GiB, 25%, none).
fn memory_limit(text: &str) -> Result<MemoryLimit, ShareError> {
    let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.to_owned());
    match quantity::whole(&quantity) {
        Some(bytes) if bytes >= GRANULE => Ok(MemoryLimit::Size(granules_in(bytes))),
        _ => text.parse(),
    }
}

/// What a client is promised for this allotment, on a GPU with a pool of this size.
///
/// # Errors
/// It cannot be kept, or the scheduler knows of less than the configuration promises.
pub fn promise(allotment: &Allotment, gpu: &str, pool: u64, terms: &Terms) -> Result<Shares, Refusal> {
    let Allotment { request, memory, cores, config, .. } = allotment;
    let most = terms.most_memory(pool);
    if let Some(given) = memory.filter(|given| *given > most) {
        return Err(Refusal::Memory {
            request: request.clone(),
            given: format_size(given),
            gpu: gpu.to_owned(),
            pool: format_size(pool),
        });
    }
    let mut shares = shares(config).map_err(|error| Refusal::Config {
        place: format!("for request {request}"),
        why: error.to_string(),
    })?;
    if config.weight.is_none() {
        shares.weight = cores.map_or(DEFAULT_WEIGHT, |cores| weight(cores, terms));
    }
    let capacity = granules_in(pool);
    let given = memory.map_or(capacity, granules_in).min(capacity);
    match shares.memory_limit.granules(capacity) {
        Some(limit) if limit > given => {
            return Err(Refusal::MemoryLimit {
                request: request.clone(),
                limit: config.memory_limit.clone().unwrap_or_default(),
                given: format_size(bytes_of(given)),
            });
        }
        Some(_) => {}
        None if given < capacity => shares.memory_limit = MemoryLimit::Size(given),
        None => {}
    }
    Ok(shares)
}

/// The weight that stands for so many percents of the GPU's time: in proportion, so that a client's part of all weights is never less
/// than its percents, as long as a GPU's cores are not given away twice. The usual percents get the usual weight, as clients
/// outside Kubernetes have, and less with more than ten shares, so that there is a weight for the whole.
fn weight(cores: u64, terms: &Terms) -> u32 {
    let usual = terms.usual_cores().max(u64::from(100 * DEFAULT_WEIGHT / MAX_WEIGHT));
    let weight = cores.saturating_mul(DEFAULT_WEIGHT.into()) / usual;
    weight.clamp(1, MAX_WEIGHT.into()) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const DRIVER: &str = "gpu.nvshare.com";
    const GIB: u64 = 1 << 30;
    const TERMS: Terms = Terms { shares: 10, memory_overcommit: None };

    fn claim(results: Value, config: Value) -> ResourceClaim {
        serde_json::from_value(json!({
            "metadata": {"name": "c", "namespace": "n", "uid": "u"},
            "spec": {},
            "status": {"allocation": {"devices": {"results": results, "config": config}}},
        }))
        .unwrap()
    }

    fn result(request: &str, consumed: Value) -> Value {
        json!({"request": request, "driver": DRIVER, "pool": "node", "device": "gpu-1", "shareID": "s", "consumedCapacity": consumed})
    }

    fn config(source: &str, requests: &[&str], fields: Value) -> Value {
        let mut parameters = json!({"apiVersion": "nvshare.com/v1", "kind": "ClientConfig"});
        parameters.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!({"source": source, "requests": requests, "opaque": {"driver": DRIVER, "parameters": parameters}})
    }

    fn one(consumed: Value, config: Value) -> Result<Allotment, Refusal> {
        allotments(&claim(json!([result("gpu", consumed)]), config), DRIVER).map(|mut all| all.remove(0))
    }

    fn promised(consumed: Value, config: Value) -> Result<Shares, Refusal> {
        promise(&one(consumed, config)?, "GPU-1", 16 * GIB, &TERMS)
    }

    #[test]
    fn what_was_given_is_read_and_other_drivers_are_left_out() {
        let other = json!({"request": "nic", "driver": "net.example.com", "pool": "node", "device": "eth0"});
        let claim = claim(
            json!([other, result("gpu/big", json!({"memory": "8Gi", "cores": "30", "shares": "1"}))]),
            json!([]),
        );
        let read = allotments(&claim, DRIVER).unwrap();
        let expected = Allotment {
            request: "gpu/big".into(),
            pool: "node".into(),
            device: "gpu-1".into(),
            share_id: Some("s".into()),
            memory: Some(8 * GIB),
            cores: Some(30),
            config: ClientConfig::default(),
        };
        assert_eq!(read, [expected]);
    }

    #[test]
    fn a_claim_without_devices_of_ours_is_refused() {
        for claim in [claim(json!([]), json!([])), ResourceClaim::default()] {
            let refusal = allotments(&claim, DRIVER).unwrap_err().to_string();
            assert!(refusal.contains(DRIVER) && refusal.contains("Delete the pod"), "{refusal}");
        }
    }

    #[test]
    fn who_asks_for_nothing_is_promised_the_usual() {
        assert_eq!(
            promised(json!({"memory": "16Gi", "cores": "10", "shares": "1"}), json!([])),
            Ok(Shares::default())
        );
        // From before the driver counted anything.
        assert_eq!(promised(json!({}), json!([])), Ok(Shares::default()));
    }

    #[test]
    fn memory_becomes_a_limit_and_cores_a_weight() {
        let shares = promised(json!({"memory": "8Gi", "gpu.nvshare.com/cores": "35"}), json!([])).unwrap();
        assert_eq!(shares.memory_limit, MemoryLimit::Size(4096));
        assert_eq!(shares.weight, 350);
        assert_eq!(promised(json!({"cores": "100"}), json!([])).unwrap().weight, 1000);
    }

    #[test]
    fn the_claims_configuration_goes_before_the_classs() {
        let shares = promised(
            json!({"memory": "8Gi", "cores": "35"}),
            json!([
                config("FromClass", &[], json!({"weight": 50, "priority": "low", "computeLimit": "40%"})),
                config("FromClaim", &["gpu"], json!({"priority": "high", "memoryLimit": "4Gi"})),
                config("FromClaim", &["other"], json!({"priority": "low"})),
            ]),
        )
        .unwrap();
        assert_eq!(
            shares,
            Shares {
                weight: 50,
                priority: Priority::High,
                memory_limit: MemoryLimit::Size(2048),
                compute_limit: ComputeLimit::Part(400_000),
            }
        );
    }

    #[test]
    fn a_configuration_for_a_request_holds_for_its_alternatives() {
        let claim = claim(
            json!([result("gpu/big", json!({}))]),
            json!([config("FromClaim", &["gpu"], json!({"weight": 7}))]),
        );
        assert_eq!(allotments(&claim, DRIVER).unwrap()[0].config.weight, Some(7));
    }

    #[test]
    fn what_is_wrong_in_a_configuration_is_said_with_its_place() {
        for (fields, part) in [
            (json!({"wieght": 7}), "unknown field `wieght`"),
            (json!({"weight": 0}), "1 to 1000"),
            (json!({"weight": 1001}), "1 to 1000"),
            (json!({"weight": "heavy"}), "invalid type"),
            (json!({"priority": "highest"}), "low, normal or high"),
            (json!({"memoryLimit": "much"}), "'much' is not a memory limit"),
            (json!({"computeLimit": "30"}), "'30' is not a compute limit"),
            (json!({"kind": "GpuConfig"}), "kind is 'GpuConfig' and must be 'ClientConfig'"),
            (json!({"apiVersion": "nvshare.com/v2"}), "must be 'nvshare.com/v1'"),
        ] {
            let refusal = one(json!({}), json!([config("FromClass", &["gpu"], fields.clone())])).unwrap_err();
            let text = refusal.to_string();
            assert!(text.contains(part) && text.contains("of the DeviceClass for gpu"), "{fields}: {text}");
        }
        // Another driver's is none of ours.
        let mut others = config("FromClaim", &[], json!({"wieght": 7}));
        others["opaque"]["driver"] = json!("net.example.com");
        assert!(one(json!({}), json!([others])).is_ok());
    }

    #[test]
    fn more_memory_than_the_scheduler_knows_of_is_refused() {
        for limit in ["9Gi", "9GiB", "75%"] {
            let refused = promised(
                json!({"memory": "8Gi"}),
                json!([config("FromClaim", &[], json!({"memoryLimit": limit}))]),
            );
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(limit) && text.contains("capacity.requests.memory"), "{text}");
        }
        let fits = promised(
            json!({"memory": "8Gi"}),
            json!([config("FromClaim", &[], json!({"memoryLimit": "50%"}))]),
        );
        assert_eq!(fits.unwrap().memory_limit, MemoryLimit::Part(500_000));
    }

    #[test]
    fn a_pool_that_has_shrunk_is_told_about() {
        let allotment = one(json!({"memory": "16Gi"}), json!([])).unwrap();
        let text = promise(&allotment, "GPU-1", 8 * GIB, &TERMS).unwrap_err().to_string();
        assert!(text.contains("GPU-1") && text.contains("16.00 GiB") && text.contains("8.00 GiB"), "{text}");
    }

    proptest! {
        /// Clients that have a GPU's cores among them get at least their percents of its time.
        #[test]
        fn weights_keep_what_cores_promise(shares in 1u32..=100, asked in prop::collection::vec(1u64..=100, 1..20)) {
            let terms = Terms { shares, memory_overcommit: None };
            let mut left = terms.cores();
            let given: Vec<u64> = asked.into_iter().filter(|cores| {
                let fits = *cores <= left;
                left -= if fits { *cores } else { 0 };
                fits
            }).collect();
            let weights: Vec<u64> = given.iter().map(|cores| weight(*cores, &terms).into()).collect();
            let all: u64 = weights.iter().sum();
            for (cores, weight) in given.iter().zip(&weights) {
                let percents = *weight as f64 * 100.0 / all as f64;
                // What is less than a whole weight is cut off.
                prop_assert!(percents > *cores as f64 - 1.0, "{percents} for {cores}");
            }
        }

        /// Whatever stands in a claim, it is answered.
        #[test]
        fn any_claim_is_answered(memory in "[0-9]{1,4}[MG]i|\\PC{0,12}", cores in "[0-9a-zA-Z.]{0,8}", limit in "[0-9]{1,3}([MG]i|%)|\\PC{0,8}", pool in 0u64..1 << 40) {
            let allotment = one(
                json!({"memory": memory, "cores": cores}),
                json!([config("FromClaim", &[], json!({"memoryLimit": limit}))]),
            );
            if let Ok(allotment) = allotment && let Ok(shares) = promise(&allotment, "GPU-1", pool, &TERMS) {
                prop_assert!((1..=MAX_WEIGHT).contains(&shares.weight));
                if let (Some(limit), Some(given)) = (shares.memory_limit.granules(granules_in(pool)), allotment.memory) {
                    prop_assert!(limit <= granules_in(given));
                }
            }
        }
    }
}
