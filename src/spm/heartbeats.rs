//! Heartbeats, each in a thread of its own: it may block on the network without holding up anything else.
//!
//! A thread that stayed would keep the stack that its deepest call once needed, which is a TLS handshake's: more than all else that an idle
//! manager of ten sub-agents holds. What is kept is the client, with its open connection.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::input::{Input, Inputs};
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::{Answer, Heartbeat};
use crate::endpoint::{Client, Endpoint, Timeouts};
use crate::home::Home;
use crate::uplink::{self, Answered};

/// For a TLS handshake and the answer's desired state.
const STACK_BYTES: usize = 512 << 10;

/// What came of one heartbeat.
#[derive(Debug)]
pub(super) enum Outcome {
    /// `passed_over`: why the endpoints before it did not; `refused`: of those that answered and were not believed.
    Answered {
        passed_over: Option<String>,
        refused: Option<String>,
        endpoint: Endpoint,
        answer: Box<Answer>,
        clock_offset: Option<i64>,
    },
    /// `refused`: of whoever answered and was not believed, why not.
    Failed { why: String, refused: Option<String>, retry_after: Option<Duration> },
}

/// The way to the gateway.
#[derive(Debug)]
pub(super) struct Uplink {
    home: Home,
    agent_id: AgentId,
    inputs: Inputs,
    way: Arc<Mutex<Way>>,
}

#[derive(Debug)]
struct Way {
    config: Arc<Config>,
    /// Made for this `config`; away while a heartbeat is on it.
    client: Option<Client>,
}

impl Uplink {
    pub(super) fn new(home: &Home, agent_id: &AgentId, config: &Config, inputs: &Inputs) -> Uplink {
        let way = Way { config: Arc::new(config.clone()), client: None };
        let (home, agent_id, inputs) = (home.clone(), agent_id.clone(), inputs.clone());
        Uplink { home, agent_id, inputs, way: Arc::new(Mutex::new(way)) }
    }

    /// The way to the gateway may have changed.
    pub(super) fn configure(&self, config: &Config) {
        *lock(&self.way) = Way { config: Arc::new(config.clone()), client: None };
    }

    /// Sends a heartbeat; what comes of it is an [`Input`].
    pub(super) fn send(&self, heartbeat: Box<Heartbeat>) -> io::Result<()> {
        let (home, agent_id, inputs, way) =
            (self.home.clone(), self.agent_id.clone(), self.inputs.clone(), self.way.clone());
        let thread = std::thread::Builder::new().name("uplink".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(move || {
            let (config, mut client) = {
                let mut way = lock(&way);
                (way.config.clone(), way.client.take())
            };
            let outcome = send(&home, &agent_id, &config, &mut client, &heartbeat);
            if matches!(outcome, Outcome::Failed { refused: Some(_), .. } | Outcome::Answered { refused: Some(_), .. })
            {
                // What it trusts was read when it was made, and may have been renewed since.
                client = None;
            }
            {
                let mut way = lock(&way);
                // Another configuration came meanwhile: this client is not for it.
                if Arc::ptr_eq(&way.config, &config) {
                    way.client = client;
                }
            }
            // Nobody hears it where the manager is ending.
            let _ = inputs.send(Input::Heartbeat(outcome));
        })?;
        Ok(())
    }
}

/// It is held for a moment only; nothing that could panic is done under it.
fn lock(way: &Mutex<Way>) -> MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries the endpoints in order until one answers.
fn send(
    home: &Home,
    agent_id: &AgentId,
    config: &Config,
    client: &mut Option<Client>,
    heartbeat: &Heartbeat,
) -> Outcome {
    let connected = match client {
        Some(client) => client,
        None => match config.client(&config.trust(home), agent_id, Timeouts::exchange()) {
            Ok(new) => client.insert(new),
            Err(error) => return Outcome::Failed { why: format!("{error:#}"), refused: None, retry_after: None },
        },
    };
    let (mut reasons, mut refused, mut retry_after) = (vec![], vec![], None);
    let joined = |texts: &[String]| (!texts.is_empty()).then(|| texts.join("; "));
    for endpoint in &config.heartbeat_srv {
        match uplink::send(connected, endpoint, heartbeat) {
            Ok(Answered { answer, clock_offset }) => {
                let (passed_over, refused) = (joined(&reasons), joined(&refused));
                let (endpoint, answer) = (endpoint.clone(), Box::new(answer));
                return Outcome::Answered { passed_over, refused, endpoint, answer, clock_offset };
            }
            Err(refusal) => {
                retry_after = retry_after.max(refusal.retry_after);
                if refusal.is_distrust {
                    refused.push(refusal.to_string());
                }
                reasons.push(refusal.to_string());
            }
        }
    }
    Outcome::Failed { why: reasons.join("; "), refused: joined(&refused), retry_after }
}
