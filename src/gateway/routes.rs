//! The routes of the gateway. Every error response is JSON `{"errorMessage": …}`, which a host shows its operator.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::http_error::{HttpError, json_response};
use super::shared::RequestContext;
use super::state::GatewayState;
use super::{download, now_millis};
use crate::core::model::{AgentId, AgentName, Arch, MANAGER_PACKAGE, Os, Release};
use crate::core::protocol::{
    self, AGENT_ID_HEADER, DOWNLOAD_PATH, HEARTBEAT_PATH, Heartbeat, MAX_VALUES, RELEASES_PATH,
};

/// The largest heartbeat that is accepted.
const MAX_BODY_BYTES: usize = 4 << 20;
/// Heartbeats larger than this are large ones: of hosts with hundreds of sub-agents, or with many events after a long interruption.
const LARGE_BODY_BYTES: u64 = 128 << 10;
/// Large heartbeats received at once, 256 MiB in all; others are retried later. There can be tens of thousands of connections.
const LARGE_BODIES: usize = 64;
/// The timeout for receiving the body of a heartbeat.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The IP address of the client.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClientAddress(pub(super) IpAddr);

/// The permits for large heartbeats.
pub(super) fn large_bodies() -> Semaphore {
    Semaphore::new(LARGE_BODIES)
}

/// All routes.
pub(super) fn router(shared: Arc<RequestContext>) -> Router {
    Router::new()
        .route(HEARTBEAT_PATH, post(heartbeat))
        .route(&format!("{DOWNLOAD_PATH}/{{file}}"), get(download_file))
        .route(&format!("{RELEASES_PATH}/{{name}}"), get(release))
        .route("/healthz", get(health))
        .fallback(async || HttpError::new(StatusCode::NOT_FOUND, "not found: the gateway has no such path"))
        .method_not_allowed_fallback(async || {
            HttpError::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not support the request method")
        })
        .with_state(shared)
}

async fn heartbeat(State(shared): State<Arc<RequestContext>>, request: Request) -> Result<Response, HttpError> {
    let bad = |message: String| HttpError::new(StatusCode::BAD_REQUEST, message);
    let header_id =
        agent_id(request.headers())?.ok_or_else(|| bad(format!("the header {AGENT_ID_HEADER} is missing")))?;
    let address = request.extensions().get::<ClientAddress>().map(|peer| peer.0.to_string());
    let (body, _permit) = body(request, &shared.large_bodies).await?;
    // Checked before parsing: small values need many times the memory that they have on the wire.
    if protocol::values(&body) > MAX_VALUES {
        return Err(HttpError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the heartbeat has more than {MAX_VALUES} values"),
        ));
    }
    let heartbeat: Heartbeat =
        serde_json::from_slice(&body).map_err(|error| bad(format!("cannot read the heartbeat: {error}")))?;
    if heartbeat.agent_id != header_id {
        return Err(bad(format!(
            "the heartbeat is of agent id {}, but the header {AGENT_ID_HEADER} is {header_id}",
            heartbeat.agent_id
        )));
    }
    let answer = shared.hosts.heartbeat(heartbeat, address, &shared.snapshot(), now_millis());
    shared.touched.notify_one();
    match answer {
        Ok(answer) => Ok(json_response(StatusCode::OK, &answer)),
        Err(super::hosts::HostLimitReached) => {
            tracing::warn!(agent_id = %header_id, "a host is rejected: the gateway already has the maximum number of hosts");
            Err(HttpError::new(StatusCode::SERVICE_UNAVAILABLE, "the gateway already has the maximum number of hosts")
                .retry_after(300))
        }
    }
}

fn agent_id(headers: &HeaderMap) -> Result<Option<AgentId>, HttpError> {
    let Some(value) = headers.get(AGENT_ID_HEADER) else { return Ok(None) };
    let value = value.to_str().unwrap_or("?");
    value.parse().map(Some).map_err(|error| HttpError::new(StatusCode::BAD_REQUEST, format!("{error}")))
}

/// Receives the body; a large one with the permit to hold while it is in memory.
async fn body(request: Request, large: &Semaphore) -> Result<(Bytes, Option<SemaphorePermit<'_>>), HttpError> {
    let too_large =
        || HttpError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the heartbeat has more than {MAX_BODY_BYTES} bytes"));
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > MAX_BODY_BYTES as u64) {
        return Err(too_large());
    }
    let permit = match length {
        Some(length) if length <= LARGE_BODY_BYTES => None,
        // Without a length the body may be large.
        _ => Some(large.try_acquire().map_err(|_| {
            HttpError::new(StatusCode::SERVICE_UNAVAILABLE, "too many large heartbeats at once").retry_after(5)
        })?),
    };
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(request.into_body(), MAX_BODY_BYTES)).await {
        Ok(Ok(bytes)) => Ok((bytes, permit)),
        // A body without length was too large; after any other error the connection is closed anyway.
        Ok(Err(_)) => Err(too_large()),
        Err(_) => Err(HttpError::new(StatusCode::REQUEST_TIMEOUT, "receiving the heartbeat timed out")),
    }
}

async fn download_file(
    State(shared): State<Arc<RequestContext>>,
    Path(file): Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    download::answer(&shared.snapshot().index, &file, &method, &headers).await
}

/// The query of a release.
#[derive(Deserialize)]
struct ReleaseQuery {
    os: Option<String>,
    arch: Option<String>,
}

async fn release(
    State(shared): State<Arc<RequestContext>>,
    Path(name): Path<String>,
    Query(query): Query<ReleaseQuery>,
) -> Result<Response, HttpError> {
    let bad = |message: String| HttpError::new(StatusCode::BAD_REQUEST, message);
    let name: AgentName = name.parse().map_err(|error| bad(format!("{error}")))?;
    let (Some(os), Some(arch)) = (query.os, query.arch) else {
        return Err(bad("the query needs os and arch".to_owned()));
    };
    let os: Os = os.parse().map_err(|error| bad(format!("{error}")))?;
    let arch: Arch = arch.parse().map_err(|error| bad(format!("{error}")))?;
    let snapshot = shared.snapshot();
    let ordered_version = match name.as_str() {
        MANAGER_PACKAGE => snapshot.fleet.as_ref().and_then(|fleet| fleet.manager.clone()),
        _ => None,
    };
    let offer_of = |version| snapshot.index.offer(&Release { name: name.clone(), version, os, arch });
    let offer =
        ordered_version.and_then(offer_of).or_else(|| snapshot.index.newest(&name, os, arch).and_then(offer_of));
    match offer {
        Some(offer) => Ok(json_response(StatusCode::OK, &offer)),
        None => {
            Err(HttpError::new(StatusCode::NOT_FOUND, format!("the depot has no package of {name} for {os}/{arch}")))
        }
    }
}

async fn health(State(shared): State<Arc<RequestContext>>) -> Response<Body> {
    let GatewayState { fleet, parts, .. } = shared.state();
    let snapshot = shared.snapshot();
    json_response(
        StatusCode::OK,
        &json!({
            "ok": parts.are_ok(),
            "hosts": shared.hosts.count(),
            "packages": snapshot.index.packages(),
            "fleet": {
                "generation": fleet.generation,
                "agents": fleet.agents,
                "rules": fleet.rules,
                "lastError": fleet.error,
            },
            "parts": parts,
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(length: Option<usize>) -> Request {
        let request = Request::builder().method("POST").uri(HEARTBEAT_PATH);
        let request = match length {
            Some(length) => request.header(header::CONTENT_LENGTH, length),
            None => request,
        };
        request.body(Body::from(vec![b'x'; length.unwrap_or(1)])).unwrap()
    }

    #[tokio::test]
    async fn large_heartbeats_are_limited_and_small_ones_are_not() {
        let large = Semaphore::new(2);
        let (small, big) = (LARGE_BODY_BYTES as usize, LARGE_BODY_BYTES as usize + 1);
        let held = [body(request(Some(big)), &large).await.unwrap(), body(request(None), &large).await.unwrap()];
        for length in [Some(big), None] {
            let rejected = body(request(length), &large).await.unwrap_err();
            assert_eq!((rejected.status, rejected.retry_after), (StatusCode::SERVICE_UNAVAILABLE, Some(5)));
        }
        assert_eq!(body(request(Some(small)), &large).await.unwrap().0.len(), small);
        drop(held);
        assert_eq!(body(request(Some(big)), &large).await.unwrap().0.len(), big);
        let rejected = body(request(Some(MAX_BODY_BYTES + 1)), &large).await.unwrap_err();
        assert_eq!(rejected.status, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
