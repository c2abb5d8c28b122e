//! Makes claims ready for their containers: reads what the scheduler has chosen, and writes a CDI specification for each claim.
//!
//! Nothing is kept but these files. A file is made of the claim and the driver's options alone, so it comes out the same however
//! often it is made, by whichever process. The kubelet asks again for what it does not remember.
//!
//! The container runtime applies a CDI device's variables after those of the pod, so a pod's own `NVSHARE_WEIGHT` does not
//! outdo what its claim says. A program that changes its variables before it starts CUDA can: shares are for clients that cooperate
//! (docs/operations/shares.md).

use super::claim::{self, Allotment};
use super::slices::device_name;
use super::terms::Terms;
use crate::cdi::{self, Device, Edits, Spec};
use crate::grant::Grant;
use crate::inventory::{Gpu, Health};
use crate::options::Common;
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::{Api, Client};
use nvshare::shares::{MemoryLimit, Shares};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The kind of the CDI devices of claims.
pub const CLAIM_KIND: &str = "nvshare.com/claim";

/// How long the API server may take to answer. The kubelet waits for 45 seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How the kubelet names a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimName {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// Its UID: another claim of the same name has another.
    pub uid: String,
}

/// A device that is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The request that got it, without the alternative that was chosen: so containers name it.
    pub request: String,
    /// The pool.
    pub pool: String,
    /// The device.
    pub device: String,
    /// Which of the device's allocations it is.
    pub share_id: Option<String>,
    /// What the container runtime shall put into the container.
    pub cdi_devices: Vec<String>,
}

/// Makes claims ready, and takes that back.
#[derive(Clone)]
pub struct Preparer {
    /// To read claims.
    pub client: Client,
    /// This driver's name.
    pub driver: String,
    /// The pool of this node.
    pub pool: String,
    /// How GPUs are offered.
    pub terms: Terms,
    /// Where files go, and what is in them.
    pub options: Arc<Common>,
    /// The GPUs of this node.
    pub gpus: watch::Receiver<Vec<Gpu>>,
    /// Whoever follows the claims is told the UIDs of those that have a device of this pool.
    pub seen: mpsc::Sender<String>,
}

impl Preparer {
    /// Makes a claim ready, or finds it so.
    ///
    /// # Errors
    /// A sentence that the kubelet shows in an event of the pod: why not, and what to do.
    pub async fn prepare(&self, name: &ClaimName) -> Result<Vec<Ready>, String> {
        let claim = self.read(name).await?;
        if super::claims_of(&claim, &self.driver).any(|result| result.pool == self.pool) {
            // When there is no room, those that are there are reason enough to look.
            let _ = self.seen.try_send(name.uid.clone());
        }
        let allotments = claim::allotments(&claim, &self.driver).map_err(|refusal| refusal.to_string())?;
        let gpus = self.gpus.borrow().clone();
        let mut devices = Vec::with_capacity(allotments.len());
        let mut ready = Vec::with_capacity(allotments.len());
        for (number, allotment) in allotments.iter().enumerate() {
            let gpu = self.gpu(&gpus, allotment)?;
            let shares = claim::promise(allotment, &gpu.uuid, gpu.memory, &self.terms)
                .map_err(|refusal| refusal.to_string())?;
            let device = format!("{}-{number}", name.uid);
            let own = format!("{CLAIM_KIND}={device}");
            let vendor = self.options.gpu_cdi_kind().map(|kind| format!("{kind}={}", gpu.uuid));
            devices.push(Device { name: device, container_edits: self.edits(&shares) });
            ready.push(Ready {
                request: allotment
                    .request
                    .split_once('/')
                    .map_or(&*allotment.request, |(main, _)| main)
                    .into(),
                pool: allotment.pool.clone(),
                device: allotment.device.clone(),
                share_id: allotment.share_id.clone(),
                cdi_devices: vendor.into_iter().chain([own]).collect(),
            });
        }
        self.write(&name.uid, devices).await?;
        Ok(ready)
    }

    /// Takes back what was made for a claim. It may be gone already.
    ///
    /// # Errors
    /// A sentence: the file cannot be removed.
    pub async fn unprepare(&self, uid: &str) -> Result<(), String> {
        let file = file(&self.options.cdi_dir, uid)?;
        blocking(move || cdi::remove(&file)).await
    }

    /// Removes the files of claims that `known` does not know and that `before` lists: a kubelet that has lost its memory never asks
    /// for that.
    pub async fn tidy(&self, before: BTreeMap<String, PathBuf>, known: impl Fn(&str) -> bool) {
        for (uid, file) in before.into_iter().filter(|(uid, _)| !known(uid)) {
            match blocking(move || cdi::remove(&file)).await {
                Ok(()) => {
                    tracing::info!(claim = uid, "CDI specification removed: its claim has no device any more")
                }
                Err(why) => tracing::warn!(claim = uid, "{why}"),
            }
        }
    }

    async fn read(&self, name: &ClaimName) -> Result<ResourceClaim, String> {
        let claims: Api<ResourceClaim> = Api::namespaced(self.client.clone(), &name.namespace);
        let answer = match tokio::time::timeout(ANSWER_WITHIN, claims.get(&name.name)).await {
            Ok(answer) => answer,
            Err(_) => {
                let seconds = ANSWER_WITHIN.as_secs();
                return Err(unavailable(&format!("no answer within {seconds} s")));
            }
        };
        let claim = match answer {
            Ok(claim) => claim,
            Err(kube::Error::Api(status)) if status.code == 404 => {
                return Err("it has been deleted meanwhile: delete the pod too".into());
            }
            Err(kube::Error::Api(status)) if status.code == 403 => {
                return Err(super::api_error(&kube::Error::Api(status), "get on resourceclaims"));
            }
            Err(error) => return Err(unavailable(&super::chain(&error))),
        };
        let found = claim.metadata.uid.as_deref().unwrap_or_default();
        if found != name.uid {
            return Err(format!(
                "the claim of this name is another one by now (UID {found}; the pod was scheduled for {}): delete the pod, so that it is \
                 scheduled anew",
                name.uid
            ));
        }
        Ok(claim)
    }

    fn gpu<'a>(&self, gpus: &'a [Gpu], allotment: &Allotment) -> Result<&'a Gpu, String> {
        let Allotment { pool, device, .. } = allotment;
        if *pool != self.pool {
            return Err(format!(
                "it was allocated in pool {pool}, and this node's pool is {}: the pod is on the wrong node. Delete it, so that it is \
                 scheduled anew, and look whether it has a nodeName",
                self.pool
            ));
        }
        let found = gpus.iter().find(|gpu| device_name(&gpu.uuid) == *device);
        let gpu = found.ok_or_else(|| {
            format!(
                "{device} is no GPU of node {pool} any more: it was taken away or has got another UUID since the pod was scheduled. \
                 Delete the pod and its claim, so that they are scheduled anew"
            )
        })?;
        match &gpu.health {
            Health::Healthy => Ok(gpu),
            Health::Unhealthy(why) => Err(format!("the GPU takes no new clients now: {why}")),
        }
    }

    fn edits(&self, shares: &Shares) -> Edits {
        let mut edits = cdi::client_edits(&self.options);
        let Shares { weight, priority, memory_limit, compute_limit } = *shares;
        let grant = Grant { memory: memory_limit, weight, priority, compute: compute_limit };
        let mut variables: BTreeMap<&str, String> = grant.environment().into_iter().collect();
        // Also the usual ones: other claims' weights are worth what they promise only beside this one.
        variables.entry("NVSHARE_WEIGHT").or_insert_with(|| weight.to_string());
        variables.entry("NVSHARE_PRIORITY").or_insert_with(|| priority.to_string());
        if memory_limit == MemoryLimit::None {
            // Left to the pod: it can only take less.
            variables.remove("NVSHARE_MEMORY_LIMIT");
        }
        edits.env.extend(variables.into_iter().map(|(name, value)| format!("{name}={value}")));
        edits
    }

    async fn write(&self, uid: &str, devices: Vec<Device>) -> Result<(), String> {
        let file = file(&self.options.cdi_dir, uid)?;
        let spec = Spec::new(CLAIM_KIND, devices);
        blocking(move || cdi::write(&file, &spec).map(drop)).await
    }
}

/// Runs what waits for a disk.
async fn blocking(work: impl FnOnce() -> Result<(), crate::Error> + Send + 'static) -> Result<(), String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn unavailable(why: &str) -> String {
    format!(
        "Unavailable: the API server cannot be asked for the claim ({why}). The kubelet tries again; if it goes on, look whether the \
         driver's pod reaches the API server (network policy, proxy, service account)"
    )
}

/// What the names of claims' files begin with.
fn prefix() -> String {
    format!("{}_", CLAIM_KIND.replace('/', "-"))
}

/// The file of a claim.
fn file(folder: &Path, uid: &str) -> Result<PathBuf, String> {
    // It comes from whoever has the kubelet's socket, and becomes a name in a folder.
    let fits = !uid.is_empty()
        && uid.len() <= 128
        && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !fits {
        return Err(format!("'{uid}' is no UID of a claim"));
    }
    Ok(folder.join(format!("{}{uid}.json", prefix())))
}

/// The files of claims in a folder, by UID.
pub fn files(folder: &Path) -> BTreeMap<String, PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let prefix = prefix();
    let claims = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let uid = name.strip_prefix(&prefix)?.strip_suffix(".json")?;
        Some((uid.to_owned(), entry.path()))
    });
    claims.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_becomes_a_file_of_its_own_and_nothing_else() {
        let folder = Path::new("/cdi");
        let uid = "2f1e9b0c-1111-2222-3333-444455556666";
        assert_eq!(file(folder, uid).unwrap(), Path::new(&format!("/cdi/nvshare.com-claim_{uid}.json")));
        for bad in ["", "../../etc/passwd", "a/b", "a.b", &"a".repeat(129)] {
            assert!(file(folder, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_files_of_claims_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "nvshare.com-claim_u-1.json",
            "nvshare.com-client.json",
            "nvidia.com-gpu.json",
            "nvshare.com-claim_u-2.json.tmp",
        ] {
            std::fs::write(folder.path().join(name), "{}").unwrap();
        }
        assert_eq!(files(folder.path()).into_keys().collect::<Vec<_>>(), ["u-1"]);
        assert!(files(&folder.path().join("none")).is_empty());
    }
}
