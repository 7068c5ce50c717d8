//! Requests from a host to its gateway: the heartbeat, and the query for the current release of a package.
//!
//! Each function makes one exchange with one endpoint; [`sender`] tries several endpoints. The caller decides when to send and how long
//! to wait after a failure.

pub mod sender;

use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::core::model::{AgentName, Arch, Os};
use crate::core::protocol::{self, Answer, HEARTBEAT_PATH, Heartbeat, MAX_VALUES, Offer, RELEASES_PATH};
use crate::endpoint::{Client, Distrust, Endpoint};

/// Limit for an answer: a thousand sub-agents with a screenful of environment each.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
const MAX_OFFER_BYTES: u64 = 64 << 10;

/// The answer to a heartbeat.
#[derive(Debug)]
pub struct HeartbeatAnswer {
    pub answer: Answer,
    /// Seconds by which this host's clock is ahead of the gateway's; `None` without a `Date` header.
    pub clock_offset: Option<i64>,
}

/// Why a heartbeat failed, and the gateway's `Retry-After` if it sent one.
#[derive(Debug)]
pub struct HeartbeatError {
    pub error: anyhow::Error,
    pub retry_after: Option<Duration>,
    /// An answer came, but from a server with an untrusted certificate, or with content for another host or no valid content.
    pub is_distrust: bool,
}

impl fmt::Display for HeartbeatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for HeartbeatError {}

impl From<anyhow::Error> for HeartbeatError {
    fn from(error: anyhow::Error) -> HeartbeatError {
        let is_distrust = error.is::<Distrust>();
        HeartbeatError { error, retry_after: None, is_distrust }
    }
}

/// Sends a heartbeat. An answer for another agent is rejected.
pub fn send(client: &Client, endpoint: &Endpoint, heartbeat: &Heartbeat) -> Result<HeartbeatAnswer, HeartbeatError> {
    let context = || format!("cannot send a heartbeat to {endpoint}");
    let json = serde_json::to_vec(heartbeat).with_context(context)?;
    let sent = SystemTime::now();
    let reply = client.post_json(endpoint, HEARTBEAT_PATH, &json).with_context(context)?;
    let clock_offset = reply.date().and_then(|date| clock_offset(sent, SystemTime::now(), date));
    if reply.status() != 200 {
        let retry_after = reply.retry_after();
        return Err(HeartbeatError { error: reply.into_error().context(context()), retry_after, is_distrust: false });
    }
    let bytes = reply.bytes(MAX_ANSWER_BYTES).with_context(context)?;
    // Check before parsing: parsed values take many times the memory of their JSON.
    if protocol::values(&bytes) > MAX_VALUES {
        let error = anyhow::anyhow!("cannot accept the answer of {endpoint}: it has more than {MAX_VALUES} values");
        return Err(HeartbeatError { error, retry_after: None, is_distrust: true });
    }
    let answer: Answer = serde_json::from_slice(&bytes).map_err(|error| {
        let error = anyhow::Error::from(error).context(format!("cannot parse the answer of {endpoint} to a heartbeat"));
        HeartbeatError { error, retry_after: None, is_distrust: true }
    })?;
    if answer.agent_id != heartbeat.agent_id {
        let error = anyhow::anyhow!(
            "cannot accept the answer of {endpoint}: it is for agent {}, but this host is {}",
            answer.agent_id,
            heartbeat.agent_id
        );
        return Err(HeartbeatError { error, retry_after: None, is_distrust: true });
    }
    Ok(HeartbeatAnswer { answer, clock_offset })
}

/// Seconds by which this host's clock is ahead of the peer's, which read `theirs` (whole seconds) between our `sent` and `received`.
fn clock_offset(sent: SystemTime, received: SystemTime, theirs: SystemTime) -> Option<i64> {
    let ours = sent + received.duration_since(sent).unwrap_or_default() / 2;
    let theirs = theirs.checked_add(Duration::from_millis(500))?;
    let (ahead, apart) = match ours.duration_since(theirs) {
        Ok(apart) => (1, apart),
        Err(behind) => (-1, behind.duration()),
    };
    Some(ahead * i64::try_from((apart + Duration::from_millis(500)).as_secs()).ok()?)
}

/// Returns the release of `name` that the gateway offers now; `None` if it has none for this os and arch.
pub fn current_release(
    client: &Client,
    endpoint: &Endpoint,
    name: &AgentName,
    os: Os,
    arch: Arch,
) -> Result<Option<Offer>> {
    let context = || format!("cannot query {endpoint} for the current release of {name}");
    let path = format!("{RELEASES_PATH}/{name}?os={os}&arch={arch}");
    let reply = client.get(endpoint, &path, &[]).with_context(context)?;
    match reply.status() {
        200 => {
            let bytes = reply.bytes(MAX_OFFER_BYTES).with_context(context)?;
            let offer: Offer = serde_json::from_slice(&bytes)
                .context("the answer is not from a gateway; check the endpoint")
                .with_context(context)?;
            ensure!(!offer.file.contains(['/', '\\']), "{}: {:?} is not a file name", context(), offer.file);
            Ok(Some(offer))
        }
        404 => Ok(None),
        _ => Err(reply.into_error().context(context())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::protocol::ManagerReport;
    use crate::endpoint::testing::{CannedResponse, Server, self_signed};
    use crate::endpoint::{Fingerprint, Timeouts, Trust};

    fn client() -> Client {
        Client::new(&Trust::Insecure, Some(&"host-1".parse().unwrap()), Timeouts::exchange()).unwrap()
    }

    pub(in crate::uplink) fn heartbeat() -> Heartbeat {
        let version = "1.0".parse().unwrap();
        Heartbeat {
            agent_id: "host-1".parse().unwrap(),
            instance_id: "i".to_owned(),
            hostname: "h".to_owned(),
            os: Os::Linux,
            arch: Arch::Amd64,
            manager: ManagerReport { version, pid: 1, uptime_seconds: 2, memory_bytes: 3 },
            lineage: None,
            generation: 0,
            sequence: 1,
            agents: Vec::new(),
            events: Vec::new(),
            clock_offset_seconds: None,
            trust: None,
        }
    }

    #[test]
    fn a_heartbeat_is_answered() {
        let server = Server::plain(|request| {
            assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/api/heartbeat"));
            assert_eq!(request.headers.get("x-agent-id").map(String::as_str), Some("host-1"));
            assert_eq!(serde_json::from_slice::<Heartbeat>(&request.body).unwrap(), heartbeat());
            CannedResponse::ok(r#"{"agentId": "host-1", "generation": 7, "later": {"unknown": true}}"#)
        });
        assert_eq!(send(&client(), &server.endpoint(), &heartbeat()).unwrap().answer.generation, 7);
    }

    #[test]
    fn invalid_answers_are_rejected_with_the_reason() {
        for (body, word) in [
            (br#"{"agentId": "host-2"}"#.to_vec(), "it is for agent host-2, but this host is host-1"),
            (b"<html>".to_vec(), "cannot parse the answer"),
            (vec![b' '; (4 << 20) + 1], "more than 4194304 bytes"),
            (format!(r#"{{"agentId": "host-1", "x": [0{}]}}"#, ",0".repeat(50_000)).into(), "more than 50000 values"),
        ] {
            let server = Server::plain(move |_| CannedResponse::ok(body.clone()));
            let refusal = send(&client(), &server.endpoint(), &heartbeat()).unwrap_err();
            assert!(refusal.to_string().contains(word), "{refusal}");
            assert_eq!(refusal.retry_after, None);
            assert_eq!(refusal.is_distrust, !word.contains("bytes"));
        }
        let server = Server::plain(move |_| CannedResponse {
            headers: vec![("retry-after", "17".to_owned())],
            body: br#"{"errorMessage": "too many of you"}"#.to_vec(),
            ..CannedResponse::status(503)
        });
        let refusal = send(&client(), &server.endpoint(), &heartbeat()).unwrap_err();
        assert!(refusal.to_string().contains("answered 503: too many of you"), "{refusal}");
        assert_eq!(refusal.retry_after, Some(Duration::from_secs(17)));
    }

    #[test]
    fn a_server_with_another_certificate_is_not_trusted() {
        let identity = self_signed(&["127.0.0.1"], |_| {});
        let server = Server::tls(&identity, |_| CannedResponse::ok(r#"{"agentId": "host-1"}"#));
        let trusting = |pin| {
            Client::new(
                &Trust::Pin { pins: vec![pin], learned: "/nonexistent/keys".into() },
                None,
                Timeouts::exchange(),
            )
            .unwrap()
        };
        send(&trusting(Fingerprint::of(&identity.certificate)), &server.endpoint(), &heartbeat()).unwrap();
        let refusal = send(&trusting(Fingerprint::of(b"other")), &server.endpoint(), &heartbeat()).unwrap_err();
        assert!(refusal.is_distrust, "{refusal}");
        drop(server);
        let unused = format!("https://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let refusal = send(&client(), &unused.parse().unwrap(), &heartbeat()).unwrap_err();
        assert!(!refusal.is_distrust, "{refusal}");
    }

    #[test]
    fn the_clock_is_compared_with_the_gateways() {
        let at = |millis: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_000_u64.saturating_add_signed(millis))
        };
        for (sent, received, theirs, expected) in [
            (0, 20, 0, 0),
            // A time of 0 seconds may mean up to one second later.
            (900, 990, 0, 0),
            (0, 4_000, 2_000, 0),
            (3_600_000, 3_600_000, 0, 3_600),
            (0, 0, 3_600_000, -3_600),
            // The clock was set back during the exchange.
            (5_000, 0, 0, 5),
        ] {
            let offset = clock_offset(at(sent), at(received), at(theirs)).unwrap();
            assert!((offset - expected).abs() <= 1, "{sent} {received} {theirs}: {offset}");
        }
        let server = Server::plain(|_| CannedResponse {
            headers: vec![("date", "Sun, 06 Nov 1994 08:49:37 GMT".to_owned())],
            ..CannedResponse::ok(r#"{"agentId": "host-1"}"#)
        });
        let offset = send(&client(), &server.endpoint(), &heartbeat()).unwrap().clock_offset.unwrap();
        assert!(offset > 30 * 365 * 86_400, "{offset}");
        let silent = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1"}"#));
        assert_eq!(send(&client(), &silent.endpoint(), &heartbeat()).unwrap().clock_offset, None);
    }

    #[test]
    fn the_current_release_is_returned_or_none() {
        let digest = "0".repeat(64);
        let body = format!(r#"{{"version": "2", "file": "demo-2_linux_amd64.zip", "sha256": "{digest}", "size": 5}}"#);
        let evil = body.replace("demo-2", "../demo-2");
        let server = Server::plain(move |request| match request.path.as_str() {
            "/api/releases/demo?os=linux&arch=amd64" => CannedResponse::ok(body.clone()),
            "/api/releases/evil?os=linux&arch=amd64" => CannedResponse::ok(evil.clone()),
            "/api/releases/sick?os=linux&arch=amd64" => CannedResponse::status(500),
            _ => CannedResponse::status(404),
        });
        let current =
            |name: &str| current_release(&client(), &server.endpoint(), &name.parse().unwrap(), Os::Linux, Arch::Amd64);
        assert_eq!(current("demo").unwrap().unwrap().version.as_str(), "2");
        assert!(current("none").unwrap().is_none());
        assert!(current("evil").is_err() && current("sick").is_err());
    }
}
