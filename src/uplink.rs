//! What a host says to its gateway: the heartbeat, and the question which release is the current one.
//!
//! One exchange with one endpoint each; [`sender`] tries several endpoints with a heartbeat. When to send and how long to wait after a
//! failure is the caller's to decide.

pub mod sender;

use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::core::model::{AgentName, Arch, Os};
use crate::core::protocol::{self, Answer, HEARTBEAT_PATH, Heartbeat, MAX_VALUES, Offer, RELEASES_PATH};
use crate::endpoint::{Client, Distrust, Endpoint};

/// A desired state is refused beyond this: a thousand sub-agents with a screenful of environment each.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
const MAX_OFFER_BYTES: u64 = 64 << 10;

/// What came of a heartbeat.
#[derive(Debug)]
pub struct HeartbeatAnswer {
    pub answer: Answer,
    /// Seconds by which this host's clock is ahead of the gateway's, where that said what it is.
    pub clock_offset: Option<i64>,
}

/// Why a heartbeat failed, and when the gateway wants to hear of this host again if it said so.
#[derive(Debug)]
pub struct HeartbeatError {
    pub error: anyhow::Error,
    pub retry_after: Option<Duration>,
    /// Somebody answered who is not believed: by his certificate, or by what he says.
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

/// Reports the actual state; the answer is for this host, or it is refused.
pub fn send(client: &Client, endpoint: &Endpoint, heartbeat: &Heartbeat) -> Result<HeartbeatAnswer, HeartbeatError> {
    let what = || format!("cannot send a heartbeat to {endpoint}");
    let json = serde_json::to_vec(heartbeat).with_context(what)?;
    let asked = SystemTime::now();
    let reply = client.post_json(endpoint, HEARTBEAT_PATH, &json).with_context(what)?;
    let clock_offset = reply.date().and_then(|date| clock_offset(asked, SystemTime::now(), date));
    if reply.status() != 200 {
        let retry_after = reply.retry_after();
        return Err(HeartbeatError { error: reply.refused().context(what()), retry_after, is_distrust: false });
    }
    let bytes = reply.bytes(MAX_ANSWER_BYTES).with_context(what)?;
    // Before it is taken apart: small values take many times the memory that they take on the wire.
    if protocol::values(&bytes) > MAX_VALUES {
        let error = anyhow::anyhow!("cannot take the answer of {endpoint}: it has more than {MAX_VALUES} values");
        return Err(HeartbeatError { error, retry_after: None, is_distrust: true });
    }
    let answer: Answer = serde_json::from_slice(&bytes).map_err(|error| {
        let error = anyhow::Error::from(error).context(format!("cannot read the answer of {endpoint} to a heartbeat"));
        HeartbeatError { error, retry_after: None, is_distrust: true }
    })?;
    if answer.agent_id != heartbeat.agent_id {
        let error = anyhow::anyhow!(
            "cannot take the answer of {endpoint}: it is for agent {}, this is {}",
            answer.agent_id,
            heartbeat.agent_id
        );
        return Err(HeartbeatError { error, retry_after: None, is_distrust: true });
    }
    Ok(HeartbeatAnswer { answer, clock_offset })
}

/// Seconds by which our clock is ahead of one that said `theirs`, in whole seconds, at some moment between our `asked` and `heard`.
fn clock_offset(asked: SystemTime, heard: SystemTime, theirs: SystemTime) -> Option<i64> {
    let ours = asked + heard.duration_since(asked).unwrap_or_default() / 2;
    let theirs = theirs.checked_add(Duration::from_millis(500))?;
    let (ahead, apart) = match ours.duration_since(theirs) {
        Ok(apart) => (1, apart),
        Err(behind) => (-1, behind.duration()),
    };
    Some(ahead * i64::try_from((apart + Duration::from_millis(500)).as_secs()).ok()?)
}

/// The release of `name` that the gateway offers now; `None` where it has none for this os and arch.
pub fn current_release(
    client: &Client,
    endpoint: &Endpoint,
    name: &AgentName,
    os: Os,
    arch: Arch,
) -> Result<Option<Offer>> {
    let what = || format!("cannot ask {endpoint} for the current release of {name}");
    let path = format!("{RELEASES_PATH}/{name}?os={os}&arch={arch}");
    let reply = client.get(endpoint, &path, &[]).with_context(what)?;
    match reply.status() {
        200 => {
            let bytes = reply.bytes(MAX_OFFER_BYTES).with_context(what)?;
            let offer: Offer =
                serde_json::from_slice(&bytes).context("the answer is not that of a gateway").with_context(what)?;
            ensure!(!offer.file.contains(['/', '\\']), "{}: {:?} is not the name of a file", what(), offer.file);
            Ok(Some(offer))
        }
        404 => Ok(None),
        _ => Err(reply.refused().context(what())),
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
        let server = Server::plain(|asked| {
            assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/api/heartbeat"));
            assert_eq!(asked.headers.get("x-agent-id").map(String::as_str), Some("host-1"));
            assert_eq!(serde_json::from_slice::<Heartbeat>(&asked.body).unwrap(), heartbeat());
            CannedResponse::ok(r#"{"agentId": "host-1", "generation": 7, "later": {"unknown": true}}"#)
        });
        assert_eq!(send(&client(), &server.endpoint(), &heartbeat()).unwrap().answer.generation, 7);
    }

    #[test]
    fn answers_that_cannot_be_for_this_host_are_refused_with_the_reason() {
        for (body, word) in [
            (br#"{"agentId": "host-2"}"#.to_vec(), "it is for agent host-2, this is host-1"),
            (b"<html>".to_vec(), "cannot read the answer"),
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
    fn one_who_shows_another_certificate_is_not_believed() {
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
        let nobody = format!("https://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let refusal = send(&client(), &nobody.parse().unwrap(), &heartbeat()).unwrap_err();
        assert!(!refusal.is_distrust, "{refusal}");
    }

    #[test]
    fn the_clock_is_compared_with_the_gateways() {
        let at = |millis: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_000_u64.saturating_add_signed(millis))
        };
        for (asked, heard, theirs, expected) in [
            (0, 20, 0, 0),
            // Who says 0 may mean anything up to a second later.
            (900, 990, 0, 0),
            (0, 4_000, 2_000, 0),
            (3_600_000, 3_600_000, 0, 3_600),
            (0, 0, 3_600_000, -3_600),
            // A clock that was set back in between.
            (5_000, 0, 0, 5),
        ] {
            let offset = clock_offset(at(asked), at(heard), at(theirs)).unwrap();
            assert!((offset - expected).abs() <= 1, "{asked} {heard} {theirs}: {offset}");
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
    fn the_current_release_is_told_or_there_is_none() {
        let digest = "0".repeat(64);
        let body = format!(r#"{{"version": "2", "file": "demo-2_linux_amd64.zip", "sha256": "{digest}", "size": 5}}"#);
        let evil = body.replace("demo-2", "../demo-2");
        let server = Server::plain(move |asked| match asked.path.as_str() {
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
