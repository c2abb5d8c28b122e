//! What claims have of this node's GPUs, as the API server tells it: the scheduler's own books, a moment later.
//!
//! The driver watches the claims of the whole cluster, because the API server cannot select them by node. It keeps a line for each
//! that has a device of this driver.
//!
//! A watch can stand still without an error: a connection that a proxy has forgotten, for example. Pods would then wait for places
//! that the driver does not publish. What the kubelet asks for shows it: when a claim is prepared, the API server has just told of a
//! device in it, and a watch that has not shown that claim [`SHOWN_WITHIN`] later is begun anew with a list. The claim itself is not
//! taken in from there: it may have been deleted since, and nothing would remove it again.

use super::claims_of;
use super::quantity;
use super::spread::PLACES;
use super::terms::SHARES;
use futures::{Stream, StreamExt};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::runtime::watcher::{self, Event};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// How long the watch may take to show a claim that is prepared.
const SHOWN_WITHIN: Duration = Duration::from_secs(3);

/// How long a list of all claims may be silent before it is begun anew, and how far apart two beginnings are at least: a server that is
/// slow must not be asked for ever more lists.
const BEGIN_AGAIN_AFTER: Duration = Duration::from_secs(30);

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

/// Follows the claims and tells of every change. `None` until all have been listed. `watch` begins a watch; `prepared` are the UIDs of
/// claims that have a device of this pool.
pub async fn follow<S>(
    driver: String,
    pool: String,
    mut watch: impl FnMut() -> S,
    mut prepared: mpsc::Receiver<String>,
    tell: watch::Sender<Option<Allocations>>,
) where
    S: Stream<Item = watcher::Result<Event<ResourceClaim>>>,
{
    let mut follower =
        Follower { driver, pool, tell, listing: Some(Allocations::default()), complaint: None };
    let mut events = Box::pin(watch());
    let mut heard = Instant::now();
    let mut begun_again: Option<Instant> = None;
    // Claims that the watch has not shown, and when they were prepared.
    let mut unseen: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        let silent_since = follower.listing.as_ref().map(|_| heard);
        let not_before = silent_since.max(begun_again).map(|at| at + BEGIN_AGAIN_AFTER);
        let late = unseen.values().min().map(|since| not_before.max(Some(*since + SHOWN_WITHIN)));
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { return };
                heard = Instant::now();
                match &event {
                    // What a whole list does not have is gone.
                    Ok(Event::InitDone) => unseen.clear(),
                    Ok(Event::Apply(claim)) => {
                        claim.metadata.uid.as_ref().and_then(|uid| unseen.remove(uid));
                    }
                    _ => {}
                }
                follower.take(event);
            }
            Some(uid) = prepared.recv() => if !follower.knows(&uid) {
                unseen.entry(uid).or_insert_with(Instant::now);
            },
            () = sleep_until(late.flatten().unwrap_or(heard)), if late.is_some() => {
                tracing::warn!(
                    claims = unseen.keys().map(String::as_str).collect::<Vec<_>>().join(" "),
                    "the watch of ResourceClaims does not show claims that the API server has: it is begun anew"
                );
                events = Box::pin(watch());
                (heard, begun_again) = (Instant::now(), Some(Instant::now()));
                follower.listing = Some(Allocations::default());
            }
        }
    }
}

/// Takes in what a watch tells.
struct Follower {
    driver: String,
    pool: String,
    tell: watch::Sender<Option<Allocations>>,
    /// What a list has told so far, until it is complete.
    listing: Option<Allocations>,
    complaint: Option<String>,
}

impl Follower {
    fn knows(&self, uid: &str) -> bool {
        self.tell.borrow().as_ref().is_some_and(|known| known.has(uid))
    }

    fn take(&mut self, event: watcher::Result<Event<ResourceClaim>>) {
        let Self { driver, pool, tell, listing, complaint } = self;
        match event {
            Ok(Event::Init) => {
                // The begin of a list that may fail again: no reason to complain anew.
                *listing = Some(Allocations::default());
                return;
            }
            Ok(Event::InitApply(claim)) => {
                listing.get_or_insert_default().put(driver, &claim);
            }
            Ok(Event::InitDone) => tell.send_modify(|known| {
                let gained = known.as_ref().and_then(|known| known.gained);
                *known = Some(Allocations { gained, ..listing.take().unwrap_or_default() });
            }),
            Ok(Event::Apply(claim)) => change(tell, |known| {
                if known.gains(driver, pool, &claim) {
                    known.gained = Some(Instant::now());
                }
                known.put(driver, &claim)
            }),
            Ok(Event::Delete(claim)) => change(tell, |known| {
                claim.metadata.uid.as_ref().and_then(|uid| known.claims.remove(uid)).is_some()
            }),
            Err(error) => {
                super::complain(
                    complaint,
                    format!(
                        "ResourceClaims cannot be watched: {}. Until they can, GPUs are published without regard to claims whose pods have \
                         not started yet",
                        super::api_error(&error, "list and watch on resourceclaims")
                    ),
                );
                return;
            }
        }
        *complaint = None;
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
            let mut events = Some(futures::stream::iter(events.into_iter().map(Ok)));
            let watch = || events.take().expect("one watch");
            follow(DRIVER.into(), "node".into(), watch, mpsc::channel(1).1, tell.clone()).await;
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

    /// Follows watches of which each tells its events and then stands still; the last one again and again.
    struct Standing {
        prepared: mpsc::Sender<String>,
        known: watch::Receiver<Option<Allocations>>,
        begun: watch::Receiver<usize>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Standing {
        fn after(watches: Vec<Vec<Event<ResourceClaim>>>) -> Self {
            let (prepared, receive) = mpsc::channel(10);
            let (tell, known) = watch::channel(None);
            let (count, begun) = watch::channel(0);
            let watch = move || {
                let number = (*count.borrow()).min(watches.len() - 1);
                count.send_modify(|count| *count += 1);
                futures::stream::iter(watches[number].clone().into_iter().map(Ok))
                    .chain(futures::stream::pending())
            };
            let task = tokio::spawn(follow(DRIVER.into(), "node".into(), watch, receive, tell));
            Self { prepared, known, begun, task }
        }

        /// How many watches have been begun after so long.
        async fn begun_after(&self, time: Duration) -> usize {
            tokio::time::sleep(time).await;
            *self.begun.borrow()
        }
    }

    impl Drop for Standing {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    fn list(claims: &[ResourceClaim]) -> Vec<Event<ResourceClaim>> {
        let claims = claims.iter().cloned().map(Event::InitApply);
        [Event::Init].into_iter().chain(claims).chain([Event::InitDone]).collect()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_stands_still_is_begun_anew_for_a_claim_that_it_has_not_shown() {
        let here = [("node", "gpu-1")];
        let all = [claim("a", &here), claim("b", &here)];
        let mut standing = Standing::after(vec![list(&all[..1]), list(&all)]);
        for uid in ["a", "b"] {
            standing.prepared.send(uid.into()).await.unwrap();
        }
        let both = |known: &Option<Allocations>| known.as_ref().is_some_and(|known| known.has("b"));
        let known = standing.known.wait_for(both);
        tokio::time::timeout(HOUR, known).await.expect("the watch is begun anew").unwrap();
        assert_eq!(standing.begun_after(HOUR).await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_is_gone_by_then_begins_it_anew_once() {
        let standing = Standing::after(vec![list(&[])]);
        assert_eq!(standing.begun_after(HOUR).await, 1);
        standing.prepared.send("gone".into()).await.unwrap();
        assert_eq!(standing.begun_after(HOUR).await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_the_watch_shows_begins_nothing_anew() {
        let here = [("node", "gpu-1")];
        let mut events = list(&[claim("a", &here)]);
        events.push(Event::Apply(claim("b", &here)));
        let standing = Standing::after(vec![events]);
        // Before the watch tells anything, and afterwards.
        for _ in 0..2 {
            for uid in ["a", "b"] {
                standing.prepared.send(uid.into()).await.unwrap();
            }
            assert_eq!(standing.begun_after(HOUR).await, 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_does_not_come_is_asked_for_again_and_not_too_often() {
        let standing = Standing::after(vec![vec![Event::Init]]);
        standing.prepared.send("a".into()).await.unwrap();
        assert_eq!(standing.begun_after(BEGIN_AGAIN_AFTER / 2).await, 1);
        assert_eq!(standing.begun_after(10 * BEGIN_AGAIN_AFTER).await, 11);
    }
}
