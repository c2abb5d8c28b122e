//! What claims have of this node's GPUs, as the API server tells it: the scheduler's own books, a moment later.
//!
//! The driver watches the claims of the whole cluster, because the API server cannot select them by node. It keeps a line for each
//! that has a device of this driver.

use super::claims_of;
use super::quantity;
use super::spread::PLACES;
use super::terms::SHARES;
use futures::{Stream, StreamExt};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::runtime::watcher::{self, Event};
use std::collections::BTreeMap;
use tokio::sync::watch;
use tokio::time::Instant;

/// What a claim has of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    pool: String,
    device: String,
    shares: u64,
    places: u64,
}

/// What claims have of one device together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// How many there are; one that has the device twice counts twice.
    pub claims: u32,
    /// The shares that they take.
    pub shares: u64,
    /// The places that they take.
    pub places: u64,
}

/// All claims that have devices of this driver, on any node.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Allocations {
    claims: BTreeMap<String, Vec<Part>>,
    /// When the last one of this node's came.
    gained: Option<Instant>,
}

impl Allocations {
    /// What they have of this device.
    pub fn of(&self, pool: &str, device: &str) -> Taken {
        let parts = self.claims.values().flatten().filter(|part| part.pool == pool && part.device == device);
        parts.fold(Taken::default(), |sum, part| Taken {
            claims: sum.claims + 1,
            shares: sum.shares.saturating_add(part.shares),
            places: sum.places.saturating_add(part.places),
        })
    }

    /// When a claim last got a device of this node, as far as it was seen while it happened.
    pub fn gained(&self) -> Option<Instant> {
        self.gained
    }

    /// Whether the claim with this UID has a device of this driver.
    pub fn has(&self, uid: &str) -> bool {
        self.claims.contains_key(uid)
    }

    /// The number of claims.
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Takes a claim in as it is now. Whether that has changed anything.
    fn put(&mut self, driver: &str, claim: &ResourceClaim) -> bool {
        let Some(uid) = &claim.metadata.uid else { return false };
        let parts: Vec<_> = claims_of(claim, driver)
            .map(|result| {
                let consumed = |name: &str| {
                    let consumed = result.consumed_capacity.as_ref()?;
                    quantity::whole(consumed.get(name).or_else(|| consumed.get(&format!("{driver}/{name}")))?)
                };
                Part {
                    pool: result.pool.clone(),
                    device: result.device.clone(),
                    shares: consumed(SHARES).unwrap_or(1),
                    // From before there were places, or from a driver without them.
                    places: consumed(PLACES).unwrap_or(0),
                }
            })
            .collect();
        if parts.is_empty() {
            return self.claims.remove(uid).is_some();
        }
        self.claims.insert(uid.clone(), parts.clone()).is_none_or(|before| before != parts)
    }

    /// Whether this claim has something of this pool that it had not.
    fn gains(&self, driver: &str, pool: &str, claim: &ResourceClaim) -> bool {
        let known = claim.metadata.uid.as_ref().and_then(|uid| self.claims.get(uid));
        known.is_none() && claims_of(claim, driver).any(|result| result.pool == pool)
    }
}

/// Follows the claims and tells of every change. `None` until all have been listed.
pub async fn follow(
    driver: String,
    pool: String,
    events: impl Stream<Item = watcher::Result<Event<ResourceClaim>>>,
    tell: watch::Sender<Option<Allocations>>,
) {
    let mut events = std::pin::pin!(events);
    let mut listing = Allocations::default();
    let mut complaint = None;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => {
                // The begin of a list that may fail again: no reason to complain anew.
                listing = Allocations::default();
                continue;
            }
            Ok(Event::InitApply(claim)) => {
                listing.put(&driver, &claim);
            }
            Ok(Event::InitDone) => tell.send_modify(|known| {
                let gained = known.as_ref().and_then(|known| known.gained);
                *known = Some(Allocations { gained, ..std::mem::take(&mut listing) });
            }),
            Ok(Event::Apply(claim)) => change(&tell, |known| {
                if known.gains(&driver, &pool, &claim) {
                    known.gained = Some(Instant::now());
                }
                known.put(&driver, &claim)
            }),
            Ok(Event::Delete(claim)) => change(&tell, |known| {
                claim.metadata.uid.as_ref().and_then(|uid| known.claims.remove(uid)).is_some()
            }),
            Err(error) => {
                super::complain(
                    &mut complaint,
                    format!(
                        "ResourceClaims cannot be watched: {}. Until they can, GPUs are published without regard to claims whose pods have \
                         not started yet",
                        super::api_error(&error, "list and watch on resourceclaims")
                    ),
                );
                continue;
            }
        }
        complaint = None;
    }
}

/// Changes what is known, if all have been listed, and tells of it if `how` says that there is a difference.
fn change(tell: &watch::Sender<Option<Allocations>>, how: impl FnOnce(&mut Allocations) -> bool) {
    tell.send_if_modified(|known| known.as_mut().is_some_and(how));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DRIVER: &str = "gpu.nvshare.com";

    fn claim(uid: &str, devices: &[(&str, &str)]) -> ResourceClaim {
        let results: Vec<_> = devices
            .iter()
            .map(|(pool, device)| {
                json!({"request": "gpu", "driver": DRIVER, "pool": pool, "device": device,
                       "consumedCapacity": {"shares": "2", "places": "1"}})
            })
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": uid, "namespace": "n", "uid": uid}, "spec": {},
            "status": {"allocation": {"devices": {"results": results}}},
        }))
        .unwrap()
    }

    /// The states that are told of after each event.
    async fn told(events: Vec<Event<ResourceClaim>>) -> Vec<Option<Allocations>> {
        let tell = watch::Sender::new(None);
        let mut seen = Vec::new();
        for event in events {
            // One stream for each event shows what each one does, but for a list, which is one piece.
            let events = match event {
                Event::InitApply(claim) => vec![Event::Init, Event::InitApply(claim), Event::InitDone],
                event => vec![event],
            };
            let events = futures::stream::iter(events.into_iter().map(Ok));
            follow(DRIVER.into(), "node".into(), events, tell.clone()).await;
            seen.push(tell.borrow().clone());
        }
        seen
    }

    #[tokio::test]
    async fn claims_come_and_go() {
        let here = [("node", "gpu-1")];
        let seen = told(vec![
            Event::Apply(claim("early", &here)),
            Event::InitApply(claim("a", &here)),
            Event::Apply(claim("b", &[("node", "gpu-1"), ("node", "gpu-2")])),
            Event::Apply(claim("elsewhere", &[("other", "gpu-1")])),
            Event::Apply(claim("b", &[])),
            Event::Delete(claim("a", &here)),
        ])
        .await;
        assert_eq!(seen[0], None, "nothing is known before all have been listed");
        let taken = |claims: u32| Taken { claims, shares: 2 * u64::from(claims), places: claims.into() };
        let seen: Vec<_> = seen[1..].iter().flatten().collect();
        let on = |device| seen.iter().map(|known| known.of("node", device)).collect::<Vec<_>>();
        assert_eq!(on("gpu-1"), [1, 2, 2, 1, 0].map(taken));
        assert_eq!(on("gpu-2"), [0, 1, 1, 0, 0].map(taken));
        assert!(seen[3].has("elsewhere") && !seen[3].has("b"));
    }

    #[tokio::test]
    async fn only_what_comes_to_this_node_while_it_is_watched_is_a_gain() {
        let seen = told(vec![
            Event::InitApply(claim("a", &[("node", "gpu-1")])),
            Event::Apply(claim("elsewhere", &[("other", "gpu-1")])),
            Event::Apply(claim("a", &[("node", "gpu-1")])),
            Event::Delete(claim("a", &[])),
            Event::Apply(claim("b", &[("node", "gpu-1")])),
        ])
        .await;
        let gained: Vec<_> = seen.iter().map(|known| known.as_ref().unwrap().gained().is_some()).collect();
        assert_eq!(gained, [false, false, false, false, true]);
    }
}
