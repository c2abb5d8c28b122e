//! Connections, requests and answers.
//!
//! A connection serves one request and has a few seconds for all of it; only so many are open at a time, for each place that is
//! listened at. So a client that is slow or says nothing keeps others waiting for seconds at most, and costs next to no memory.

use super::listen::Listener;
use super::metrics;
use super::watch::Watch;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::RefCell;
use std::convert::Infallible;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{LocalSet, spawn_local};
use tokio::time;

/// The page: one file, which needs nothing beside it. `NONCE` stands where the answer's own is put.
const PAGE: &str = include_str!("page.html");

/// How long a connection may take from its beginning to the end of the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// How long its request may take to come.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// The most connections that are open at a time, for each place that is listened at.
const MOST_CONNECTIONS: usize = 32;
/// The most bytes of a request's head.
const MOST_HEAD: usize = 16 << 10;
/// Between two looks at what clients have done.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);
/// After a failed accept: there are no descriptors, and some may be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

type Shared = Rc<RefCell<Watch>>;
type Answer = Response<Full<Bytes>>;

/// Serves until the process ends.
///
/// # Errors
/// The runtime cannot be made, or a listener cannot be used.
pub fn serve(listeners: Vec<Listener>, watch: Watch) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let watch = Rc::new(RefCell::new(watch));
    LocalSet::new().block_on(&runtime, async {
        for listener in listeners {
            spawn_local(accept(Accepting::new(listener)?, watch.clone()));
        }
        let mut ticks = time::interval(FOLLOW_INTERVAL);
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            watch.borrow_mut().follow();
        }
    })
}

/// A listener in the runtime.
enum Accepting {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Accepting {
    fn new(listener: Listener) -> io::Result<Self> {
        match listener {
            Listener::Tcp(listener) => TcpListener::from_std(listener).map(Self::Tcp),
            Listener::Unix(listener) => UnixListener::from_std(listener).map(Self::Unix),
        }
    }
}

async fn accept(listener: Accepting, watch: Shared) {
    let free = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    // It fails only if the semaphore is closed, which nobody does.
    while let Ok(permit) = free.clone().acquire_owned().await {
        let accepted = match &listener {
            Accepting::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                let own = stream.local_addr().ok();
                spawn_local(connection(stream, own, watch.clone(), permit));
            }),
            Accepting::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                spawn_local(connection(stream, None, watch.clone(), permit));
            }),
        };
        if accepted.is_err() {
            time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

/// Serves a connection that was made to the address `own`. It ends in time, whatever the other side does.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    own: Option<SocketAddr>,
    watch: Shared,
    _permit: OwnedSemaphorePermit,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(&request, own, &watch);
        async move { Ok::<_, Infallible>(answer) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME)
        .max_buf_size(MOST_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // An error is the other side's.
    let _ = time::timeout(CONNECTION_TIME, serving).await;
}

fn answer<B>(request: &Request<B>, own: Option<SocketAddr>, watch: &Shared) -> Answer {
    if !host_is_ours(request, own) {
        return plain(
            StatusCode::MISDIRECTED_REQUEST,
            "Ask for localhost or 127.0.0.1. A request with another host name may come from a web page elsewhere, and is refused.\n",
        );
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut refusal =
            plain(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD: nothing can be changed here.\n");
        refusal.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let mut watch = watch.borrow_mut();
    match request.uri().path() {
        "/" => page(),
        "/metrics" => whole(StatusCode::OK, metrics::CONTENT_TYPE, watch.metrics()),
        "/api/node" => json(&watch.node()),
        "/api/timeline" => json(&watch.timeline(since(request.uri().query()))),
        "/api/describe" => json(&nvshare_stats::description::describe()),
        _ => plain(
            StatusCode::NOT_FOUND,
            "There are /, /metrics, /api/node, /api/timeline?since=NS and /api/describe.\n",
        ),
    }
}

/// The time in `since=NS`; 0 if there is none.
fn since(query: Option<&str>) -> u64 {
    let mut values = query.unwrap_or("").split('&').filter_map(|part| part.strip_prefix("since="));
    values.next_back().and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Whether the request names this machine. A page from elsewhere can have a browser on this machine look its own name up as
/// 127.0.0.1, and would then read what is served here (DNS rebinding); such a request names that page's host. On other addresses
/// any name is right, because nobody knows what the machine is called.
fn host_is_ours<B>(request: &Request<B>, own: Option<SocketAddr>) -> bool {
    if !own.is_some_and(|own| own.ip().is_loopback()) {
        return true;
    }
    let host = request.headers().get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    let Some(host) = host.or(request.uri().host()) else { return true };
    let name = match host.parse::<SocketAddr>() {
        Ok(address) => return address.ip().is_loopback(),
        Err(_) => host.split_once(':').filter(|_| !host.starts_with('[')).map_or(host, |(name, _)| name),
    };
    let name = name.trim_matches(['[', ']']);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn page() -> Answer {
    let nonce = nonce();
    let mut answer = whole(StatusCode::OK, "text/html; charset=utf-8", PAGE.replace("NONCE", &nonce));
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    answer
}

/// What only the page that is answered with knows: a script that somebody smuggled in does not have it.
fn nonce() -> String {
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    if read.is_err() {
        // Without it, no script runs at all.
        return "none".into();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(text) => whole(StatusCode::OK, "application/json", text),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn plain(status: StatusCode, text: &str) -> Answer {
    whole(status, "text/plain; charset=utf-8", text.to_owned())
}

fn whole(status: StatusCode, media_type: &'static str, text: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ];
    for (name, value) in headers {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(host: Option<&str>, own: &str) -> bool {
        let mut request = Request::builder().uri("/");
        if let Some(host) = host {
            request = request.header(header::HOST, host);
        }
        host_is_ours(&request.body(()).unwrap(), Some(own.parse().unwrap()))
    }

    #[test]
    fn a_request_to_loopback_names_this_machine() {
        for host in
            ["localhost", "LOCALHOST:9478", "127.0.0.1", "127.0.0.1:9478", "[::1]:9478", "[::1]", "127.1.2.3"]
        {
            assert!(ours(Some(host), "127.0.0.1:9478"), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9478",
            "192.0.2.1:9478",
            "localhost.evil.example",
            "",
            "[2001:db8::1]",
        ] {
            assert!(!ours(Some(host), "127.0.0.1:9478"), "{host}");
        }
        assert!(ours(None, "127.0.0.1:9478") && ours(Some("node7.example:9478"), "192.0.2.1:9478"));
    }

    #[test]
    fn a_time_in_a_query_is_read_and_nonsense_is_the_beginning() {
        for (query, expected) in
            [(None, 0), (Some("since=12"), 12), (Some("a=b&since=7&since=8"), 8), (Some("since=-1"), 0)]
        {
            assert_eq!(since(query), expected, "{query:?}");
        }
    }

    #[test]
    fn every_page_has_a_nonce_of_its_own_and_no_other_place_for_scripts() {
        let policy =
            |answer: &Answer| answer.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
        let (one, other) = (policy(&page()), policy(&page()));
        assert!(one.contains("'nonce-") && one != other, "{one}");
        assert!(
            !PAGE.contains("http://")
                || PAGE.matches("http://").count() == PAGE.matches("http://www.w3.org/").count()
        );
        assert_eq!(PAGE.matches("<script").count(), PAGE.matches("<script nonce=\"NONCE\">").count());
        assert!(!PAGE.contains(" style=\"") && !PAGE.contains(" onclick="), "the policy forbids these");
    }
}
