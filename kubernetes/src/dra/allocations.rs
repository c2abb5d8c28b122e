//! What claims have of this node's GPUs, as the API server tells it: the scheduler's own books, a moment later.
//!
//! The driver watches the claims of the whole cluster, because the API server cannot select them by node. It keeps a line for each
//! that has a device of this driver.
//!
//! A watch can stand still without an error: a connection that a proxy has forgotten, for example. Pods would then wait for places
//! that the driver does not publish. What the kubelet asks for shows it: when a claim is prepared, the API server has just told of a
//! device in it, and a watch that has not shown that claim three seconds later is begun anew with a list. The claim itself is not
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
    let mut follower = Follower { driver, pool, tell, listing: Allocations::default(), complaint: None };
    let mut events = Box::pin(watch());
    let mut doubts = Doubts::new(Instant::now());
    loop {
        let due = doubts.due();
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { return };
                doubts.told(&event, Instant::now());
                follower.take(event);
            }
            Some(uid) = prepared.recv() => if !follower.knows(&uid) {
                doubts.prepared(uid, Instant::now());
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                tracing::warn!(
                    claims = doubts.unseen.keys().map(String::as_str).collect::<Vec<_>>().join(" "),
                    "the watch of ResourceClaims does not show claims that the API server has: it is begun anew"
                );
                events = Box::pin(watch());
                doubts.begun_again(Instant::now());
            }
        }
    }
}

/// Whether a watch stands still. Pure.
struct Doubts {
    /// Claims that the watch has not shown, and when they were prepared.
    unseen: BTreeMap<String, Instant>,
    /// Since when the list has been silent that is not complete yet.
    listing: Option<Instant>,
    begun_again: Option<Instant>,
}

impl Doubts {
    fn new(now: Instant) -> Self {
        Self { unseen: BTreeMap::new(), listing: Some(now), begun_again: None }
    }

    /// A claim is prepared that is not known.
    fn prepared(&mut self, uid: String, now: Instant) {
        self.unseen.entry(uid).or_insert(now);
    }

    /// The watch tells something.
    fn told(&mut self, event: &watcher::Result<Event<ResourceClaim>>, now: Instant) {
        match event {
            Ok(Event::Init) => self.listing = Some(now),
            Ok(Event::InitApply(_)) => self.listing = self.listing.map(|_| now),
            Ok(Event::InitDone) => {
                self.listing = None;
                // What a whole list does not have is gone.
                self.unseen.clear();
            }
            Ok(Event::Apply(claim)) => {
                claim.metadata.uid.as_ref().and_then(|uid| self.unseen.remove(uid));
            }
            Ok(Event::Delete(_)) | Err(_) => {}
        }
    }

    /// When the watch is to be begun anew, unless it tells something before.
    fn due(&self) -> Option<Instant> {
        let since = *self.unseen.values().min()?;
        let not_before = self.listing.max(self.begun_again).map(|at| at + BEGIN_AGAIN_AFTER);
        not_before.max(Some(since + SHOWN_WITHIN))
    }

    fn begun_again(&mut self, now: Instant) {
        (self.listing, self.begun_again) = (Some(now), Some(now));
    }
}

/// Takes in what a watch tells.
struct Follower {
    driver: String,
    pool: String,
    tell: watch::Sender<Option<Allocations>>,
    /// What a list that is not complete has told so far.
    listing: Allocations,
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
                *listing = Allocations::default();
                return;
            }
            Ok(Event::InitApply(claim)) => {
                listing.put(driver, &claim);
            }
            Ok(Event::InitDone) => tell.send_modify(|known| {
                let gained = known.as_ref().and_then(|known| known.gained);
                *known = Some(Allocations { gained, ..std::mem::take(listing) });
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

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// A watch that has listed everything, and now.
    fn listed() -> (Doubts, Instant) {
        let now = Instant::now();
        let mut doubts = Doubts::new(now);
        doubts.told(&Ok(Event::InitDone), now);
        (doubts, now)
    }

    #[test]
    fn a_watch_that_does_not_show_a_claim_is_begun_anew() {
        let (mut doubts, now) = listed();
        assert_eq!(doubts.due(), None);
        doubts.prepared("a".into(), now);
        doubts.prepared("b".into(), now + MILLISECOND);
        // The first time counts, also when the kubelet asks again.
        doubts.prepared("a".into(), now + 2 * MILLISECOND);
        assert_eq!(doubts.due(), Some(now + SHOWN_WITHIN));
        doubts.told(&Ok(Event::Apply(claim("a", &[]))), now);
        assert_eq!(doubts.due(), Some(now + MILLISECOND + SHOWN_WITHIN));
        doubts.told(&Ok(Event::Apply(claim("b", &[]))), now);
        assert_eq!(doubts.due(), None);
    }

    #[test]
    fn a_claim_that_is_gone_begins_a_watch_anew_once() {
        let (mut doubts, now) = listed();
        doubts.prepared("gone".into(), now);
        let at = doubts.due().unwrap();
        doubts.begun_again(at);
        for event in [Event::Init, Event::InitApply(claim("another", &[])), Event::InitDone] {
            assert!(doubts.due().is_some());
            doubts.told(&Ok(event), at);
        }
        assert_eq!(doubts.due(), None);
    }

    #[test]
    fn a_list_that_is_slow_is_left_alone_while_it_tells_something() {
        let now = Instant::now();
        let mut doubts = Doubts::new(now);
        doubts.prepared("a".into(), now);
        assert_eq!(doubts.due(), Some(now + BEGIN_AGAIN_AFTER));
        let later = now + BEGIN_AGAIN_AFTER - MILLISECOND;
        doubts.told(&Ok(Event::InitApply(claim("b", &[]))), later);
        assert_eq!(doubts.due(), Some(later + BEGIN_AGAIN_AFTER));
    }

    #[test]
    fn a_server_that_is_slow_is_not_asked_for_ever_more_lists() {
        let (mut doubts, mut now) = listed();
        for pause in [SHOWN_WITHIN, BEGIN_AGAIN_AFTER, BEGIN_AGAIN_AFTER] {
            doubts.prepared("a".into(), now);
            assert_eq!(doubts.due(), Some(now + pause));
            now += pause;
            doubts.begun_again(now);
            doubts.told(&Ok(Event::InitDone), now);
        }
    }
}
