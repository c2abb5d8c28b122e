//! An API server that the tests play, over HTTP: nodes, ResourceSlices and ResourceClaims with versions, conflicts and watches, as far
//! as the driver uses them. And a scheduler, which takes the first device that fits, as the real one does.

use super::within;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub const DRIVER: &str = "gpu.nvshare.com";
pub const NODE: &str = "node-1";

/// Which kind of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Slices,
    Claims,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Slices => "ResourceSlice",
            Self::Claims => "ResourceClaim",
        }
    }
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<(Kind, String), Value>,
    events: Vec<(u64, Kind, &'static str, Value)>,
    /// Requests are cut off without an answer.
    away: bool,
    /// So many of the first watches of claims tell nothing more, and do not end.
    standing: usize,
    /// Watches of claims that have been begun.
    watches: usize,
    /// Verbs and kinds that are forbidden, such as `list ResourceClaim`.
    forbidden: BTreeSet<String>,
    /// Writes of slices that were carried out.
    writes: usize,
}

impl State {
    fn put(&mut self, kind: Kind, key: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", self.version));
        }
        for device in object["spec"]["devices"].as_array_mut().into_iter().flatten() {
            for taint in device["taints"].as_array_mut().into_iter().flatten() {
                taint["timeAdded"] = json!("2026-11-30T04:00:00Z");
            }
        }
        let old = self.objects.insert((kind, key.to_owned()), object.clone());
        let what = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.events.push((self.version, kind, what, object.clone()));
        object
    }

    fn delete(&mut self, kind: Kind, key: &str) -> Option<Value> {
        let mut object = self.objects.remove(&(kind, key.to_owned()))?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.events.push((self.version, kind, "DELETED", object.clone()));
        Some(object)
    }

    fn all(&self, kind: Kind) -> Vec<Value> {
        self.objects.iter().filter(|((of, _), _)| *of == kind).map(|(_, object)| object.clone()).collect()
    }
}

#[derive(Clone)]
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

/// Ends the server when it goes.
pub struct Listening(JoinHandle<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl ApiServer {
    pub fn new() -> Self {
        Self { state: Arc::default(), changed: watch::Sender::new(0) }
    }

    /// Listens. The client is one for it.
    pub async fn listen(&self) -> (kube::Client, Listening) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = self.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = server.clone();
                tokio::spawn(async move {
                    let answer = service_fn(|request| server.answer(request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        let config = kube::Config::new(address.parse().unwrap());
        (kube::Client::try_from(config).unwrap(), Listening(task))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, how: impl FnOnce(&mut State) -> T) -> T {
        let result = how(&mut self.lock());
        self.changed.send_modify(|count| *count += 1);
        result
    }

    /// From now on it does not answer, or answers again.
    pub fn away(&self, away: bool) {
        self.change(|state| state.away = away);
    }

    /// Waits until claims are watched. From then on these watches stand still.
    pub async fn stand_still(&self) {
        self.until("claims are watched", |api| (api.lock().watches > 0).then_some(())).await;
        self.change(|state| state.standing = state.watches);
    }

    pub fn forbid(&self, what: &str) {
        self.change(|state| state.forbidden.insert(what.to_owned()));
    }

    /// How many writes of slices it has carried out.
    pub fn writes(&self) -> usize {
        self.lock().writes
    }

    pub fn slices(&self) -> Vec<Value> {
        self.lock().all(Kind::Slices)
    }

    /// Deletes all slices, as a kubelet does when it starts.
    pub fn delete_slices(&self) {
        self.change(|state| {
            for slice in state.all(Kind::Slices) {
                state.delete(Kind::Slices, slice["metadata"]["name"].as_str().unwrap());
            }
        });
    }

    /// Puts a claim there, as the scheduler leaves it.
    pub fn put_claim(&self, claim: &Value) {
        self.change(|state| state.put(Kind::Claims, &key(claim), claim.clone()));
    }

    pub fn delete_claim(&self, name: &str) {
        self.change(|state| state.delete(Kind::Claims, &format!("pods/{name}")).expect("it is there"));
    }

    /// Waits until something holds, of what changes here.
    pub async fn until<T>(&self, what: &str, mut found: impl FnMut(&Self) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        let search = async {
            loop {
                if let Some(found) = found(self) {
                    return found;
                }
                changed.changed().await.unwrap();
            }
        };
        within(what, search).await
    }

    /// The devices that are published, in their order.
    pub fn devices(&self) -> Vec<Value> {
        let devices = |slice: &Value| slice["spec"]["devices"].as_array().cloned().unwrap_or_default();
        self.slices().iter().flat_map(devices).collect()
    }

    /// Waits until the devices are published in this order, by the last letters of their names.
    pub async fn until_order(&self, order: &[usize]) -> Vec<Value> {
        self.until(&format!("the order {order:?}"), |api| {
            let devices = api.devices();
            (devices.iter().map(number).collect::<Vec<_>>() == order).then_some(devices)
        })
        .await
    }

    /// What a scheduler does for a claim that asks for nothing in particular: the first device that has room. Its number.
    pub fn schedule(&self, name: &str) -> Option<usize> {
        let mut state = self.lock();
        let found = (|| {
            let claims = state.all(Kind::Claims);
            let slices = state.all(Kind::Slices);
            let mut devices =
                slices.iter().flat_map(|slice| slice["spec"]["devices"].as_array().into_iter().flatten());
            let fits = devices.find(|device| {
                let room = |one: &&str| used(&claims, device, one) < capacity(device, one);
                device["taints"].is_null() && ["shares", "places"].iter().all(room)
            })?;
            let device = fits["name"].as_str().unwrap().to_owned();
            let usual: serde_json::Map<_, _> = fits["capacity"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, capacity)| (name.clone(), capacity["requestPolicy"]["default"].clone()))
                .collect();
            let claim = allocated(name, &[(&device, Value::Object(usual))], json!([]));
            state.put(Kind::Claims, &key(&claim), claim);
            Some(number(fits))
        })();
        drop(state);
        // What did not fit changes nothing, and wakes nobody.
        found.inspect(|_| self.changed.send_modify(|count| *count += 1))
    }

    /// The newest generation that is published.
    pub fn generation(&self) -> i64 {
        let generations = self.slices();
        generations.iter().filter_map(|slice| slice["spec"]["pool"]["generation"].as_i64()).max().unwrap_or(0)
    }

    /// Whether a device has a place and a share left.
    pub fn has_room(&self, device: &Value) -> bool {
        let state = self.lock();
        ["shares", "places"]
            .iter()
            .all(|one| used(&state.all(Kind::Claims), device, one) < capacity(device, one))
    }

    /// How many places of a device no claim has taken.
    pub fn places_left(&self, device: &Value) -> u64 {
        let claims = self.lock().all(Kind::Claims);
        capacity(device, "places").saturating_sub(used(&claims, device, "places"))
    }

    /// The numbers of the devices that claims have, one for each claim.
    pub fn claimed(&self) -> Vec<usize> {
        self.claims_with_devices().into_iter().map(|(_, device)| device).collect()
    }

    /// The claims `c-NUMBER`, and the numbers of their first devices.
    pub fn claims_with_devices(&self) -> Vec<(usize, usize)> {
        let last = |text: &Value| text.as_str()?.rsplit('-').next()?.parse().ok();
        let both = |claim: &Value| {
            let device = &claim["status"]["allocation"]["devices"]["results"][0]["device"];
            Some((last(&claim["metadata"]["name"])?, last(device)?))
        };
        self.lock().all(Kind::Claims).iter().filter_map(both).collect()
    }

    /// Changes what is published, as somebody with the right to do so may.
    pub fn spoil_slices(&self) {
        self.change(|state| {
            for mut slice in state.all(Kind::Slices) {
                slice["spec"]["devices"][0]["capacity"]["shares"]["value"] = json!("99");
                let name = slice["metadata"]["name"].as_str().unwrap().to_owned();
                state.put(Kind::Slices, &name, slice);
            }
        });
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, io::Error> {
        if self.lock().away {
            return Err(io::Error::other("the server is away"));
        }
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        let path: Vec<_> = head.uri.path().trim_matches('/').split('/').collect();
        let query: BTreeMap<_, _> =
            head.uri.query().unwrap_or_default().split('&').filter_map(|part| part.split_once('=')).collect();
        if let ["api", "v1", "nodes", name] = path[..] {
            return Ok(match name {
                NODE => reply(
                    StatusCode::OK,
                    &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "uid": "node-uid"}}),
                ),
                _ => failure(StatusCode::NOT_FOUND, "nodes not found"),
            });
        }
        let (kind, key) = match path[..] {
            ["apis", "resource.k8s.io", "v1", "resourceslices"] => (Kind::Slices, None),
            ["apis", "resource.k8s.io", "v1", "resourceslices", name] => {
                (Kind::Slices, Some(name.to_owned()))
            }
            ["apis", "resource.k8s.io", "v1", "resourceclaims"] => (Kind::Claims, None),
            ["apis", "resource.k8s.io", "v1", "namespaces", namespace, "resourceclaims", name] => {
                (Kind::Claims, Some(format!("{namespace}/{name}")))
            }
            _ => return Ok(failure(StatusCode::NOT_FOUND, "no such resource")),
        };
        let verb = match (&head.method, &key) {
            (&Method::GET, Some(_)) => "get",
            (&Method::GET, None) => "list",
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            _ => "delete",
        };
        let what = format!("{verb} {}", kind.name());
        if self.lock().forbidden.contains(&what) {
            return Ok(failure(StatusCode::FORBIDDEN, &format!("forbidden: cannot {what}")));
        }
        if verb == "list" && query.get("watch") == Some(&"true") {
            // One without an end of its own could stand still unnoticed for as long as the client likes.
            if query
                .get("timeoutSeconds")
                .and_then(|seconds| seconds.parse().ok())
                .is_none_or(|seconds: u32| seconds > 60)
            {
                return Ok(failure(StatusCode::BAD_REQUEST, "a watch for more than a minute"));
            }
            let since =
                query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
            return Ok(self.watch(kind, since));
        }
        let object: Value = serde_json::from_slice(&body).unwrap_or_default();
        Ok(self.change(|state| state.carry_out(kind, verb, key, object)))
    }

    /// All that happens from this version on. It ends when the server is away.
    fn watch(&self, kind: Kind, since: u64) -> Response<Body> {
        let number = self.change(|state| {
            state.watches += usize::from(kind == Kind::Claims);
            state.watches
        });
        let start = (self.clone(), self.changed.subscribe(), since);
        let events = futures::stream::unfold(start, move |(server, mut changed, since)| async move {
            loop {
                {
                    let state = server.lock();
                    if state.away {
                        return None;
                    }
                    let stands = kind == Kind::Claims && number <= state.standing;
                    let next = state.events.iter().find(|(version, of, ..)| *version > since && *of == kind);
                    if let Some((version, _, what, object)) = next.filter(|_| !stands) {
                        let mut object = object.clone();
                        object["apiVersion"] = json!("resource.k8s.io/v1");
                        object["kind"] = json!(kind.name());
                        let line = format!("{}\n", json!({"type": what, "object": object}));
                        let version = *version;
                        drop(state);
                        return Some((Ok(Frame::data(Bytes::from(line))), (server, changed, version)));
                    }
                }
                changed.changed().await.ok()?;
            }
        });
        Response::new(StreamBody::new(events).boxed_unsync())
    }
}

impl State {
    fn carry_out(&mut self, kind: Kind, verb: &str, key: Option<String>, object: Value) -> Response<Body> {
        let name = key.or_else(|| object["metadata"]["name"].as_str().map(str::to_owned)).unwrap_or_default();
        let present = self.objects.get(&(kind, name.clone())).cloned();
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        match (verb, present) {
            ("list", _) => reply(
                StatusCode::OK,
                &json!({"apiVersion": "resource.k8s.io/v1", "kind": format!("{}List", kind.name()),
                        "metadata": {"resourceVersion": self.version.to_string()}, "items": self.all(kind)}),
            ),
            ("get", Some(present)) => reply(StatusCode::OK, &present),
            ("create", None) => {
                self.writes += 1;
                reply(StatusCode::CREATED, &self.put(kind, &name, object))
            }
            ("create", Some(_)) => failure(StatusCode::CONFLICT, "it exists already"),
            ("update", Some(present)) if version(&present) != version(&object) => {
                failure(StatusCode::CONFLICT, "the object has been modified")
            }
            ("update", Some(_)) => {
                self.writes += 1;
                reply(StatusCode::OK, &self.put(kind, &name, object))
            }
            ("delete", Some(_)) => {
                self.writes += 1;
                reply(StatusCode::OK, &self.delete(kind, &name).unwrap())
            }
            _ => failure(StatusCode::NOT_FOUND, "not found"),
        }
    }
}

/// The number at the end of a device's name.
fn number(device: &Value) -> usize {
    device["name"].as_str().unwrap().rsplit('-').next().unwrap().parse().unwrap()
}

fn capacity(device: &Value, name: &str) -> u64 {
    device["capacity"][name]["value"].as_str().unwrap().parse().unwrap()
}

/// What claims consume of a device's capacity.
fn used(claims: &[Value], device: &Value, capacity: &str) -> u64 {
    let results = claims.iter().flat_map(|claim| {
        claim["status"]["allocation"]["devices"]["results"].as_array().into_iter().flatten()
    });
    let here = results.filter(|result| result["device"] == device["name"]);
    here.filter_map(|result| result["consumedCapacity"][capacity].as_str()?.parse::<u64>().ok()).sum()
}

fn key(claim: &Value) -> String {
    let part = |field: &str| claim["metadata"][field].as_str().unwrap();
    format!("{}/{}", part("namespace"), part("name"))
}

/// A claim that was given these devices, with what it consumes of each.
pub fn allocated(name: &str, devices: &[(&str, Value)], config: Value) -> Value {
    let result = |(number, (device, consumed)): (usize, &(&str, Value))| {
        json!({"request": if number == 0 { "gpu".into() } else { format!("gpu-{number}") }, "driver": DRIVER, "pool": NODE, "device": device,
               "shareID": format!("share-{name}-{number}"), "consumedCapacity": consumed})
    };
    let results: Vec<_> = devices.iter().enumerate().map(result).collect();
    json!({
        "apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
        "metadata": {"namespace": "pods", "name": name, "uid": format!("uid-of-{name}")},
        "spec": {},
        "status": {"allocation": {"devices": {"results": results, "config": config}}},
    })
}

fn reply(status: StatusCode, object: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(object.to_string())).boxed_unsync();
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

fn failure(status: StatusCode, message: &str) -> Response<Body> {
    let object = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": message,
                        "reason": status.canonical_reason(), "code": status.as_u16()});
    reply(status, &object)
}
