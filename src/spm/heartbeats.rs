//! The heartbeats' own thread: it may block on the network without holding up anything else.

use std::sync::mpsc;
use std::time::Duration;

use anyhow::Result;

use super::Input;
use super::run::Inputs;
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::{Answer, Heartbeat};
use crate::endpoint::{Client, Endpoint, Timeouts};
use crate::home::Home;
use crate::uplink;

/// What came of one heartbeat.
#[derive(Debug)]
pub(super) enum Outcome {
    Answered { endpoint: Endpoint, answer: Box<Answer> },
    Failed { why: String, retry_after: Option<Duration> },
}

/// What the thread is asked to do.
#[derive(Debug)]
pub(super) enum Order {
    Send(Box<Heartbeat>),
    /// The way to the gateway may have changed.
    Configure(Box<Config>),
}

/// Starts the thread; it ends when the sender is dropped.
pub(super) fn start(home: &Home, agent_id: &AgentId, config: &Config, inputs: &Inputs) -> Result<mpsc::Sender<Order>> {
    let (sender, orders) = mpsc::channel();
    let (home, agent_id, mut config, inputs) = (home.clone(), agent_id.clone(), config.clone(), inputs.clone());
    std::thread::Builder::new().name("uplink".to_owned()).stack_size(512 << 10).spawn(move || {
        let mut client = None;
        for order in orders {
            match order {
                Order::Configure(new) => {
                    config = *new;
                    client = None;
                }
                Order::Send(heartbeat) => {
                    let outcome = send(&home, &agent_id, &config, &mut client, &heartbeat);
                    if inputs.send(Input::Heartbeat(outcome)).is_err() {
                        return;
                    }
                }
            }
        }
    })?;
    Ok(sender)
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
        None => match Client::new(&config.trust(home), Some(agent_id), Timeouts::exchange()) {
            Ok(new) => client.insert(new),
            Err(error) => return Outcome::Failed { why: format!("{error:#}"), retry_after: None },
        },
    };
    let (mut reasons, mut retry_after) = (vec![], None);
    for endpoint in &config.heartbeat_srv {
        match uplink::send(connected, endpoint, heartbeat) {
            Ok(answer) => return Outcome::Answered { endpoint: endpoint.clone(), answer: Box::new(answer) },
            Err(refusal) => {
                retry_after = retry_after.max(refusal.retry_after);
                reasons.push(refusal.to_string());
            }
        }
    }
    Outcome::Failed { why: reasons.join("; "), retry_after }
}
