//! What a host says to its gateway: the heartbeat, and the question which release is the current one.
//!
//! One exchange with one endpoint each. When to send, to whom next and how long to wait after a failure is the caller's to decide.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::core::model::{AgentName, Arch, Os};
use crate::core::protocol::{Answer, HEARTBEAT_PATH, Heartbeat, Offer, RELEASES_PATH};
use crate::endpoint::{Client, Endpoint};

/// A desired state is refused beyond this: a thousand sub-agents with a screenful of environment each.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
const MAX_OFFER_BYTES: u64 = 64 << 10;

/// Why a heartbeat failed, and when the gateway wants to hear of this host again if it said so.
#[derive(Debug)]
pub struct Refusal {
    pub error: anyhow::Error,
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for Refusal {}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Refusal {
        Refusal { error, retry_after: None }
    }
}

/// Reports the actual state; the answer is for this host, or it is refused.
pub fn send(client: &Client, endpoint: &Endpoint, heartbeat: &Heartbeat) -> Result<Answer, Refusal> {
    let what = || format!("cannot send a heartbeat to {endpoint}");
    let json = serde_json::to_vec(heartbeat).with_context(what)?;
    let reply = client.post_json(endpoint, HEARTBEAT_PATH, &json).with_context(what)?;
    if reply.status() != 200 {
        let retry_after = reply.retry_after();
        return Err(Refusal { error: reply.refused().context(what()), retry_after });
    }
    let answer: Answer = serde_json::from_slice(&reply.bytes(MAX_ANSWER_BYTES).with_context(what)?)
        .with_context(|| format!("cannot understand the answer of {endpoint} to a heartbeat"))?;
    if answer.agent_id != heartbeat.agent_id {
        let error = anyhow::anyhow!(
            "cannot take the answer of {endpoint}: it is for agent {}, this is {}",
            answer.agent_id,
            heartbeat.agent_id
        );
        return Err(error.into());
    }
    Ok(answer)
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
