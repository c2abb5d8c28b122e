//! Keeps the node's ResourceSlices in the API server as they should be.
//!
//! What there should be follows from the GPUs, the claims and the time; what there is, a watch tells. Whenever either changes they are
//! compared, so it does not matter who has changed or deleted a slice: a kubelet that starts deletes all slices of its node.
//!
//! What changes is written at once, but for a change of nothing but the order, which live load alone brings about. Such changes
//! are at least [`Timing::reorder`] apart, and twice as far each time up to [`Timing::reorder_longest`], until something else
//! changes: the API server must not pay for load that wavers.
//!
//! Slices that have not been written since claims came are written once more [`Timing::recount`] later, with nothing new but the
//! generation. The scheduler of Kubernetes 1.37 counts what a claim consumes twice while it binds the claim's pod: the claim is among the
//! allocations in flight, and already among those that the API server has told of. A pod that it looks at in this moment finds no room
//! where there is some, and it looks again only when something changes, or after five minutes. A slice that is written is such a change.

use super::allocations::{Allocations, Taken};
use super::slices::{self, Owner, Plan, comparable, device_name};
use super::spread::{Pace, Seat, Spread, turns};
use super::terms::Terms;
use super::{api_error, complain, watched};
use crate::inventory::Gpu;
use crate::placement::Candidate;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::resource::v1::{Device, ResourceSlice};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

/// How long the API server may take for one request.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// After a failure it is tried again after so long, then after twice as long, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// When what is done.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// The least time between two changes of nothing but the order.
    pub reorder: Duration,
    /// The longest that it grows to.
    pub reorder_longest: Duration,
    /// When no claim has come for so long, none comes ([`Pace::Quiet`]).
    pub quiet_after: Duration,
    /// How long after the last claim the scheduler is made to count again; the second time is for one that is slow.
    pub recount: [Duration; 2],
    /// How long publishing waits for a list of the claims after the start.
    pub claims_within: Duration,
}

impl Timing {
    /// As it is, but for the first figure.
    pub fn new(reorder: Duration) -> Self {
        Self {
            reorder,
            reorder_longest: reorder.max(Duration::from_secs(60)),
            quiet_after: Duration::from_secs(2),
            recount: [2, 10].map(Duration::from_secs),
            claims_within: Duration::from_secs(10),
        }
    }
}

/// What is published.
#[derive(Debug, Clone)]
pub struct Offer {
    /// The driver's name.
    pub driver: String,
    /// The node's.
    pub node: String,
    /// How GPUs are offered.
    pub terms: Terms,
    /// How claims are spread over them.
    pub spread: Spread,
    /// When what is done.
    pub timing: Timing,
}

/// Publishes.
pub struct Publisher {
    offer: Offer,
    client: Client,
    gpus: watch::Receiver<Vec<Gpu>>,
    claims: watch::Receiver<Option<Allocations>>,
    slices: Slices,
    complaint: Option<String>,
}

/// The slices that are in the API server, as far as it is known here, and when they may be changed.
#[derive(Default)]
struct Slices {
    /// By name; `None` before they have been listed.
    present: Option<BTreeMap<String, ResourceSlice>>,
    listing: BTreeMap<String, ResourceSlice>,
    /// The newest generation that was written.
    generation: i64,
    /// When this process last wrote all that was due.
    written: Option<Instant>,
    /// The next change of nothing but the order is not before this, and how far it is from the last one.
    reorder: Option<(Instant, Duration)>,
    /// After a failure: nothing is written before this, and how long that was.
    retry: Option<(Instant, Duration)>,
}

impl Publisher {
    /// Publishes these GPUs, with regard to these claims.
    pub fn new(
        offer: Offer,
        client: Client,
        gpus: watch::Receiver<Vec<Gpu>>,
        claims: watch::Receiver<Option<Allocations>>,
    ) -> Self {
        Self { offer, client, gpus, claims, slices: Slices::default(), complaint: None }
    }

    fn api(&self) -> Api<ResourceSlice> {
        Api::all(self.client.clone())
    }

    fn selector(&self) -> String {
        format!("spec.driver={},spec.nodeName={}", self.offer.driver, self.offer.node)
    }

    /// Publishes for as long as it is polled.
    pub async fn run(mut self) {
        let owner = self.owner().await;
        let config = watched().fields(&self.selector());
        let events = watcher(self.api(), config).default_backoff();
        self.follow(&owner, events).await;
    }

    /// Who the slices belong to. It is asked until it is known: without an owner they would outlive their node.
    async fn owner(&mut self) -> Owner {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut pause = RETRY.0;
        loop {
            let name = &self.offer.node;
            let why = match timeout(ANSWER_WITHIN, nodes.get(name)).await {
                Ok(Ok(node)) => match node.metadata.uid {
                    Some(node_uid) => {
                        let Offer { driver, node, .. } = &self.offer;
                        return Owner { driver: driver.clone(), node: node.clone(), node_uid };
                    }
                    None => "it has no UID".into(),
                },
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
                    "the API server has no node of this name: give it by --node-name (in a DaemonSet, from spec.nodeName)".into()
                }
                Ok(Err(error)) => api_error(&error, "get on nodes"),
                Err(_) => "the API server does not answer".into(),
            };
            let what = format!("node {name} cannot be read, and nothing is published: {why}");
            complain(&mut self.complaint, what);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    async fn follow(
        mut self,
        owner: &Owner,
        events: impl Stream<Item = watcher::Result<Event<ResourceSlice>>>,
    ) {
        let started = Instant::now();
        let mut events = std::pin::pin!(events);
        loop {
            let due = self.step(owner, started).await;
            let never = Instant::now() + Duration::from_secs(86_400);
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                changed = self.gpus.changed() => if changed.is_err() { return },
                changed = self.claims.changed() => if changed.is_err() { return },
                () = sleep_until(due.unwrap_or(never)) => {}
            }
        }
    }

    fn take(&mut self, event: watcher::Result<Event<ResourceSlice>>) {
        match event {
            Ok(event) => {
                if self.slices.present.is_none() && matches!(event, Event::InitDone) {
                    self.complaint = None;
                }
                self.slices.take(event);
            }
            Err(error) => {
                let why = api_error(&error, "list and watch on resourceslices");
                complain(&mut self.complaint, format!("ResourceSlices cannot be watched: {why}"));
            }
        }
    }

    /// The devices as they should be, when that may change by itself, and when the scheduler is to count again.
    fn wanted(&mut self, now: Instant) -> (Vec<Device>, Option<Instant>, Vec<Instant>) {
        let gpus = self.gpus.borrow_and_update().clone();
        let claims = self.claims.borrow_and_update();
        let Offer { driver, node, terms, spread, timing } = &self.offer;
        let taken = |gpu: &Gpu| match &*claims {
            Some(claims) => claims.of(node, &device_name(&gpu.uuid)),
            None => Taken::default(),
        };
        let seat = |gpu| {
            let Taken { claims, shares, places } = taken(gpu);
            Seat { candidate: Candidate { gpu, given: claims }, shares, places }
        };
        let seats: Vec<_> = gpus.iter().map(seat).collect();
        let gained = claims.as_ref().and_then(Allocations::gained);
        let quiet_at = gained.map(|gained| gained + timing.quiet_after).filter(|at| *at > now);
        let recounts = gained.into_iter().flat_map(|gained| timing.recount.map(|after| gained + after));
        let pace = if quiet_at.is_some() { Pace::Busy } else { Pace::Quiet };
        // Without the scheduler's books there is no number of places that would be right.
        let spread = if claims.is_some() { *spread } else { Spread::Order };
        let turns = turns(&seats, terms.shares, spread, pace);
        (slices::devices(driver, &gpus, &turns, terms), quiet_at, recounts.collect())
    }

    /// Compares and writes. When it is to be called again at the latest, if nothing happens before.
    async fn step(&mut self, owner: &Owner, started: Instant) -> Option<Instant> {
        let now = Instant::now();
        self.slices.present.as_ref()?;
        let listed_by = started + self.offer.timing.claims_within;
        if self.claims.borrow().is_none() && now < listed_by {
            return Some(listed_by);
        }
        let (devices, quiet_at, recounts) = self.wanted(now);
        let recount = self.slices.is_before_any(&recounts, now);
        let later = recounts.into_iter().filter(|at| *at > now).chain(quiet_at);
        let plan = match self.slices.due(owner, &devices, recount, now) {
            Due::Nothing => return later.min(),
            Due::At(at) => return later.chain([at]).min(),
            Due::Now(plan) => plan,
        };
        let order_alone = !recount && self.slices.is_only_order(&devices);
        let order: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        match self.write(plan).await {
            Ok(()) => {
                self.slices.written(&self.offer.timing, order_alone, now);
                self.complaint = None;
                let generation = self.slices.generation;
                tracing::info!(
                    node = owner.node,
                    generation,
                    order = order.join(" "),
                    "ResourceSlices published"
                );
            }
            Err(why) => {
                complain(&mut self.complaint, format!("ResourceSlices cannot be published: {why}"));
                let at = self.slices.failed(now);
                // Somebody else may have changed them; the watch tells that later.
                if let Ok(Ok(list)) =
                    timeout(ANSWER_WITHIN, self.api().list(&ListParams::default().fields(&self.selector())))
                        .await
                {
                    self.slices.present = Some(named(list.items));
                }
                return Some(at);
            }
        }
        Some(now)
    }

    async fn write(&mut self, plan: Plan) -> Result<(), String> {
        let api = self.api();
        let params = PostParams::default();
        let rights = "create, update and delete on resourceslices";
        let late = |_| format!("the API server has not answered within {} s", ANSWER_WITHIN.as_secs());
        let wrong = |error: kube::Error| api_error(&error, rights);
        for slice in &plan.replace {
            let name = slice.metadata.name.as_deref().unwrap_or_default();
            let written = timeout(ANSWER_WITHIN, api.replace(name, &params, slice)).await;
            self.slices.put(written.map_err(late)?.map_err(wrong)?);
        }
        for slice in &plan.create {
            let written = timeout(ANSWER_WITHIN, api.create(&params, slice)).await;
            self.slices.put(written.map_err(late)?.map_err(wrong)?);
        }
        for name in &plan.delete {
            match timeout(ANSWER_WITHIN, api.delete(name, &DeleteParams::default())).await.map_err(late)? {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                deleted => drop(deleted.map_err(wrong)?),
            }
            self.slices.present.iter_mut().for_each(|present| drop(present.remove(name)));
        }
        Ok(())
    }
}

/// Deletes the slices of a node.
///
/// # Errors
/// A sentence.
pub async fn withdraw(client: Client, driver: &str, node: &str) -> Result<(), String> {
    let slices: Api<ResourceSlice> = Api::all(client);
    let which = ListParams::default().fields(&format!("spec.driver={driver},spec.nodeName={node}"));
    let rights = "list and delete on resourceslices";
    let list =
        timeout(ANSWER_WITHIN, slices.list(&which)).await.map_err(|_| "the API server does not answer")?;
    for slice in list.map_err(|error| api_error(&error, rights))? {
        let name = slice.metadata.name.unwrap_or_default();
        let deleted = timeout(ANSWER_WITHIN, slices.delete(&name, &DeleteParams::default())).await;
        deleted.map_err(|_| "the API server does not answer")?.map_err(|error| api_error(&error, rights))?;
    }
    Ok(())
}

fn named(slices: Vec<ResourceSlice>) -> BTreeMap<String, ResourceSlice> {
    slices.into_iter().map(|slice| (slice.metadata.name.clone().unwrap_or_default(), slice)).collect()
}

/// Resource versions grow; Kubernetes lets clients compare them as numbers.
fn version(slice: &ResourceSlice) -> u64 {
    slice.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// What is to be written, and when.
#[derive(Debug, PartialEq)]
enum Due {
    Nothing,
    At(Instant),
    Now(Plan),
}

impl Slices {
    fn take(&mut self, event: Event<ResourceSlice>) {
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(slice) => {
                self.listing.insert(slice.metadata.name.clone().unwrap_or_default(), slice);
            }
            Event::InitDone => {
                let mut listed = std::mem::take(&mut self.listing);
                for (name, ours) in self.present.take().unwrap_or_default() {
                    if listed.get(&name).is_some_and(|listed| version(listed) < version(&ours)) {
                        listed.insert(name, ours);
                    }
                }
                self.present = Some(listed);
            }
            Event::Apply(slice) => self.put(slice),
            Event::Delete(slice) => {
                let name = slice.metadata.name.as_deref().unwrap_or_default();
                let Some(present) = &mut self.present else { return };
                if present.get(name).is_some_and(|ours| version(ours) <= version(&slice)) {
                    tracing::warn!(
                        name,
                        "ResourceSlice deleted by somebody else, as by a kubelet that starts: it is made anew"
                    );
                    present.remove(name);
                }
            }
        }
    }

    /// Takes a slice in that the API server has told of, unless a newer one is known.
    fn put(&mut self, slice: ResourceSlice) {
        self.generation = self.generation.max(slice.spec.pool.generation);
        let Some(present) = &mut self.present else { return };
        let name = slice.metadata.name.clone().unwrap_or_default();
        if present.get(&name).is_none_or(|ours| version(ours) <= version(&slice)) {
            present.insert(name, slice);
        }
    }

    /// Whether the last write was before one of these moments that have passed.
    fn is_before_any(&self, moments: &[Instant], now: Instant) -> bool {
        moments.iter().any(|at| *at <= now && self.written.is_none_or(|written| written < *at))
    }

    /// What is to be written so that these devices are published; with `recount` it is written even if they are.
    fn due(&self, owner: &Owner, devices: &[Device], recount: bool, now: Instant) -> Due {
        let present: Vec<_> = self.present.iter().flat_map(BTreeMap::values).cloned().collect();
        let plan = if recount { slices::anew } else { slices::plan };
        let plan = plan(owner, devices, &present, self.generation);
        if plan.is_empty() {
            return Due::Nothing;
        }
        if let Some((at, _)) = self.retry.filter(|(at, _)| now < *at) {
            return Due::At(at);
        }
        match self.reorder {
            Some((at, _)) if now < at && !recount && self.is_only_order(devices) => Due::At(at),
            _ => Due::Now(plan),
        }
    }

    /// Whether devices differ from the published ones in nothing but their order.
    fn is_only_order(&self, devices: &[Device]) -> bool {
        let present: Vec<_> = self.present.iter().flat_map(BTreeMap::values).collect();
        let complete = present.windows(2).all(|two| two[0].spec.pool == two[1].spec.pool)
            && present.iter().all(|slice| slice.spec.pool.resource_slice_count == present.len() as i64);
        let published =
            present.iter().flat_map(|slice| slice.spec.devices.iter().flatten()).cloned().collect();
        let sorted = |devices: Vec<Device>| {
            let mut devices = comparable(Some(&devices));
            devices.sort_by(|one, other| one.name.cmp(&other.name));
            devices
        };
        complete && sorted(devices.to_vec()) == sorted(published)
    }

    /// All has been written that was due.
    fn written(&mut self, timing: &Timing, order_alone: bool, now: Instant) {
        self.retry = None;
        self.written = Some(now);
        let pause = match self.reorder {
            Some((_, pause)) if order_alone => (pause * 2).min(timing.reorder_longest),
            _ => timing.reorder,
        };
        self.reorder = Some((now + pause, pause));
    }

    /// Something could not be written. When to try again.
    fn failed(&mut self, now: Instant) -> Instant {
        let pause = self.retry.map_or(RETRY.0, |(_, pause)| (pause * 2).min(RETRY.1));
        self.retry = Some((now + pause, pause));
        now + pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SECOND: Duration = Duration::from_secs(1);

    fn owner() -> Owner {
        Owner { driver: "gpu.nvshare.com".into(), node: "node-1".into(), node_uid: "u".into() }
    }

    /// Devices of these names, with so many places each.
    fn devices(names: &[&str], places: u32) -> Vec<Device> {
        let device =
            |name: &&str| json!({"name": name, "capacity": {"places": {"value": places.to_string()}}});
        names.iter().map(|name| serde_json::from_value(device(name)).unwrap()).collect()
    }

    /// Carries out what is due now, as the API server would. Whether anything was.
    fn carry_out(slices: &mut Slices, devices: &[Device], timing: &Timing, now: Instant) -> bool {
        let Due::Now(plan) = slices.due(&owner(), devices, false, now) else { return false };
        let order_alone = slices.is_only_order(devices);
        for mut slice in plan.create.into_iter().chain(plan.replace) {
            slice.metadata.resource_version = Some(slice.spec.pool.generation.to_string());
            slices.put(slice);
        }
        slices.written(timing, order_alone, now);
        true
    }

    fn listed() -> Slices {
        Slices { present: Some(BTreeMap::new()), ..Slices::default() }
    }

    #[test]
    fn changes_of_the_order_alone_come_ever_more_seldom() {
        let timing = Timing { reorder_longest: 4 * SECOND, ..Timing::new(SECOND) };
        let (mut slices, mut now) = (listed(), Instant::now());
        let orders = [devices(&["a", "b"], 1), devices(&["b", "a"], 1)];
        assert!(carry_out(&mut slices, &orders[0], &timing, now));
        for (number, pause) in [1, 2, 4, 4].into_iter().enumerate() {
            let other = &orders[1 - number % 2];
            let at = now + pause * SECOND;
            assert_eq!(slices.due(&owner(), other, false, at - SECOND / 10), Due::At(at), "change {number}");
            assert!(carry_out(&mut slices, other, &timing, at));
            assert_eq!(slices.due(&owner(), other, false, at), Due::Nothing);
            now = at;
        }
        // Anything else is written at once, and afterwards the order may change as soon as at the beginning.
        assert!(carry_out(&mut slices, &devices(&["a", "b"], 2), &timing, now));
        assert_eq!(slices.due(&owner(), &devices(&["b", "a"], 2), false, now), Due::At(now + SECOND));
    }

    #[test]
    fn what_fails_is_tried_again_later_and_later() {
        let (mut slices, now) = (listed(), Instant::now());
        let wanted = devices(&["a"], 1);
        let first = slices.failed(now);
        assert_eq!(slices.due(&owner(), &wanted, false, now), Due::At(first));
        assert!(matches!(slices.due(&owner(), &wanted, false, first), Due::Now(_)));
        let pauses: Vec<_> = (0..10).map(|_| slices.failed(now) - now).collect();
        assert_eq!(pauses[0], 2 * (first - now));
        assert_eq!(*pauses.last().unwrap(), RETRY.1);
    }

    #[test]
    fn what_is_told_late_does_not_undo_what_is_known() {
        let timing = Timing::new(SECOND);
        let (mut slices, now) = (listed(), Instant::now());
        carry_out(&mut slices, &devices(&["a"], 1), &timing, now);
        let old: Vec<_> = slices.present.iter().flat_map(BTreeMap::values).cloned().collect();
        carry_out(&mut slices, &devices(&["a"], 2), &timing, now);
        let is_current =
            |slices: &Slices| slices.due(&owner(), &devices(&["a"], 2), false, now) == Due::Nothing;
        // An event of before the last write, a list of before it, and that the old one was deleted.
        slices.take(Event::Apply(old[0].clone()));
        assert!(is_current(&slices));
        slices.take(Event::Init);
        slices.take(Event::InitApply(old[0].clone()));
        slices.take(Event::InitDone);
        assert!(is_current(&slices));
        slices.take(Event::Delete(old[0].clone()));
        assert!(is_current(&slices));
        // A list without it: it is gone.
        slices.take(Event::Init);
        slices.take(Event::InitDone);
        assert!(!is_current(&slices));
    }

    #[test]
    fn the_scheduler_counts_again_twice_after_the_last_claim() {
        let timing = Timing::new(SECOND);
        let (mut slices, start) = (listed(), Instant::now());
        let wanted = devices(&["a"], 1);
        // Published when the claim comes, as the scheduler counts wrong.
        assert!(carry_out(&mut slices, &wanted, &timing, start));
        let recounts = timing.recount.map(|after| start + after);
        let mut written = Vec::new();
        for second in 0..60 {
            let now = start + second * SECOND;
            let recount = slices.is_before_any(&recounts, now);
            if let Due::Now(plan) = slices.due(&owner(), &wanted, recount, now) {
                assert_eq!((plan.replace.len(), plan.create.len(), plan.delete.len()), (1, 0, 0));
                written.push(now);
                plan.replace.into_iter().for_each(|slice| slices.put(slice));
                slices.written(&timing, false, now);
            }
        }
        assert_eq!(written, recounts);
        // A write for another reason will do.
        let after = start + 60 * SECOND;
        assert!(carry_out(&mut slices, &devices(&["a"], 2), &timing, after));
        assert!(!slices.is_before_any(&[after], after + SECOND));
    }
}
