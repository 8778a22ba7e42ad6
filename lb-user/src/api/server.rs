//! The daemon's side of the API: routes, and nothing but routes. What they do is [`Daemon`]'s.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, RawQuery, State},
    http::{Method, StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};
use tracing::warn;

use super::{
    Attach, Detach, Failure, MORE, ROUTES, Route, Stop, array,
    metrics::{self, Snapshot},
};
use crate::{
    daemon::{Daemon, Instance},
    director::model::{
        Command, LocalAddresses, MarkRule, Outcome, ReasonView, ServiceView, Status, SyncDaemonView, SysctlView, Timeouts, Traffic,
    },
};

/// The largest request: some hundred thousand commands.
const LARGEST_REQUEST: usize = 64 << 20;

/// How long after its request an answer waits until the ways to new real servers are known.
const PATIENCE: Duration = Duration::from_secs(1);

/// The daemon, as requests share it.
pub type Shared<I> = Arc<Mutex<Daemon<I>>>;

/// All routes.
pub fn router<I: Instance>(daemon: Shared<I>) -> Router {
    Router::new()
        .route("/v1", get(routes))
        .route("/v1/commands", post(commands::<I>))
        .route("/v1/services", get(services::<I>))
        .route("/v1/connections", get(connections::<I>))
        .route("/v1/mark-rules", get(mark_rules::<I>))
        .route("/v1/local-addresses", get(local_addresses::<I>))
        .route("/v1/timeouts", get(timeouts::<I>))
        .route("/v1/sysctls", get(sysctls::<I>))
        .route("/v1/traffic", get(traffic::<I>))
        .route("/v1/sync-daemons", get(sync_daemons::<I>))
        .route("/v1/status", get(status::<I>))
        .route("/v1/reasons", get(reasons::<I>))
        .route(METRICS, get(metrics::<I>))
        .route("/v1/attach", post(attach::<I>))
        .route("/v1/detach", post(detach::<I>))
        .route("/v1/stop", post(stop::<I>))
        .fallback(nothing_here)
        .method_not_allowed_fallback(nothing_here)
        .layer(DefaultBodyLimit::max(LARGEST_REQUEST))
        .with_state(daemon)
}

/// The route that reads only, and that may be offered to others: see [`metrics_alone`].
const METRICS: &str = "/metrics";

/// The metrics and nothing else, for a port that others reach.
pub fn metrics_alone<I: Instance>(daemon: Shared<I>) -> Router {
    Router::new().route(METRICS, get(metrics::<I>)).with_state(daemon)
}

/// An answer that is an error.
struct Error(StatusCode, String);

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        // The alternate form has the causes, too.
        Self(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
    }
}

type Answer<T> = Result<Json<T>, Error>;

/// Reads a body. Its `Content-Type` does not matter: `curl -d` sends another one than JSON's.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        Error(StatusCode::BAD_REQUEST, format!("cannot understand the request's body: {error}; see the API's documentation"))
    })
}

async fn routes() -> Json<Vec<Route>> {
    let route = |&(method, path, text): &(&str, &str, &str)| Route {
        method: method.to_owned(),
        path: path.to_owned(),
        text: text.to_owned(),
    };
    Json(ROUTES.iter().map(route).collect())
}

async fn nothing_here(method: Method, uri: Uri) -> Error {
    Error(StatusCode::NOT_FOUND, format!("cannot do {method} {uri}: there is no such route; GET /v1 lists them"))
}

async fn commands<I: Instance>(State(daemon): State<Shared<I>>, RawQuery(query): RawQuery, body: Bytes) -> Answer<Vec<Outcome>> {
    let more = query.as_deref() == Some(MORE);
    let commands: Vec<Command> = parse(&body)?;
    let deadline = Instant::now() + PATIENCE;
    let (outcomes, settled) = {
        let mut daemon = daemon.lock().await;
        (daemon.execute(&commands, more), daemon.settled())
    };
    // Whoever adds a real server may send it packets at once; whoever waits for a sick netlink, or for a hundred thousand new
    // addresses, need not do so for ever.
    if !more && timeout_at(deadline, settled).await.is_err() {
        warn!("the way to some real servers is still looked for");
    }
    Ok(Json(outcomes))
}

async fn services<I: Instance>(State(daemon): State<Shared<I>>) -> Answer<Vec<ServiceView>> {
    Ok(Json(daemon.lock().await.services()?))
}

async fn connections<I: Instance>(State(daemon): State<Shared<I>>) -> Result<Response, Error> {
    let listing = daemon.lock().await.listing()?;
    Ok(array::answer(listing))
}

async fn mark_rules<I: Instance>(State(daemon): State<Shared<I>>) -> Json<Vec<MarkRule>> {
    Json(daemon.lock().await.mark_rules())
}

async fn local_addresses<I: Instance>(State(daemon): State<Shared<I>>) -> Answer<LocalAddresses> {
    // It walks through all connections.
    let usage = daemon.lock().await.local_usage();
    let usage = usage.await?;
    Ok(Json(daemon.lock().await.local_addresses(&usage)?))
}

async fn timeouts<I: Instance>(State(daemon): State<Shared<I>>) -> Json<Timeouts> {
    Json(daemon.lock().await.timeouts())
}

async fn sysctls<I: Instance>(State(daemon): State<Shared<I>>) -> Json<Vec<SysctlView>> {
    Json(daemon.lock().await.sysctls())
}

async fn traffic<I: Instance>(State(daemon): State<Shared<I>>) -> Answer<Traffic> {
    Ok(Json(daemon.lock().await.traffic()?))
}

async fn sync_daemons<I: Instance>(State(daemon): State<Shared<I>>) -> Json<Vec<SyncDaemonView>> {
    Json(daemon.lock().await.synchronisation().views())
}

async fn status<I: Instance>(State(daemon): State<Shared<I>>) -> Json<Status> {
    Json(daemon.lock().await.status())
}

async fn reasons<I: Instance>(State(daemon): State<Shared<I>>) -> Answer<Vec<ReasonView>> {
    Ok(Json(daemon.lock().await.reasons()?))
}

async fn metrics<I: Instance>(State(daemon): State<Shared<I>>) -> Result<impl IntoResponse, Error> {
    let snapshot = {
        let daemon = daemon.lock().await;
        Snapshot { status: daemon.status(), services: daemon.services()?, reasons: daemon.reasons()? }
    };
    let page = snapshot.page().context("the metrics cannot be written")?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], page))
}

async fn attach<I: Instance>(State(daemon): State<Shared<I>>, body: Bytes) -> Answer<()> {
    let Attach { interface, hook } = parse(&body)?;
    Ok(Json(daemon.lock().await.attach(&interface, hook)?))
}

async fn detach<I: Instance>(State(daemon): State<Shared<I>>, body: Bytes) -> Answer<()> {
    let Detach { interface } = parse(&body)?;
    Ok(Json(daemon.lock().await.detach(&interface)?))
}

async fn stop<I: Instance>(State(daemon): State<Shared<I>>, body: Bytes) -> Answer<()> {
    let Stop { detach } = if body.is_empty() { Stop::default() } else { parse(&body)? };
    Ok(Json(daemon.lock().await.stop(detach).await?))
}
