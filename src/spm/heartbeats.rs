//! Sends heartbeats, each on a thread of its own, so that a slow network blocks nothing else.
//!
//! A persistent thread would keep the stack of its deepest call, a TLS handshake: more memory than everything else of an idle manager with
//! ten sub-agents. The sender with its open connection is kept instead.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::input::{Input, Inputs};
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::Heartbeat;
use crate::home::Home;
use crate::uplink::sender::Sender;

/// Enough for a TLS handshake and for parsing the desired state.
const STACK_BYTES: usize = 512 << 10;

/// The connection to the gateway.
#[derive(Debug)]
pub(super) struct Uplink {
    home: Home,
    agent_id: AgentId,
    inputs: Inputs,
    route: Arc<Mutex<Route>>,
}

#[derive(Debug)]
struct Route {
    config: Arc<Config>,
    /// Created for this `config`; `None` while a heartbeat uses it.
    sender: Option<Sender>,
}

impl Uplink {
    pub(super) fn new(home: &Home, agent_id: &AgentId, config: &Config, inputs: &Inputs) -> Uplink {
        let route = Route { config: Arc::new(config.clone()), sender: None };
        let (home, agent_id, inputs) = (home.clone(), agent_id.clone(), inputs.clone());
        Uplink { home, agent_id, inputs, route: Arc::new(Mutex::new(route)) }
    }

    /// Applies changed settings: the next heartbeat opens a new connection.
    pub(super) fn configure(&self, config: &Config) {
        *lock(&self.route) = Route { config: Arc::new(config.clone()), sender: None };
    }

    /// Sends a heartbeat on a new thread; the result is an [`Input`].
    pub(super) fn send(&self, mut heartbeat: Box<Heartbeat>) -> io::Result<()> {
        let (home, agent_id, inputs, route) =
            (self.home.clone(), self.agent_id.clone(), self.inputs.clone(), self.route.clone());
        let thread = std::thread::Builder::new().name("uplink".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(move || {
            let (config, sender) = {
                let mut route = lock(&route);
                (route.config.clone(), route.sender.take())
            };
            let mut sender = sender.unwrap_or_else(|| Sender::new(&home, &agent_id, config));
            let outcome = sender.send(&mut heartbeat);
            {
                let mut route = lock(&route);
                // The settings changed meanwhile: a sender of the old ones is dropped.
                if sender.is_for(&route.config) {
                    route.sender = Some(sender);
                }
            }
            // Fails only while the manager exits.
            let _ = inputs.send(Input::Heartbeat(outcome));
        })?;
        Ok(())
    }
}

/// Locked for short, non-panicking sections only, so a poisoned lock is usable.
fn lock(route: &Mutex<Route>) -> MutexGuard<'_, Route> {
    route.lock().unwrap_or_else(PoisonError::into_inner)
}
