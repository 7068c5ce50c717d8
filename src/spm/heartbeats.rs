//! Heartbeats, each in a thread of its own: it may block on the network without holding up anything else.
//!
//! A thread that stayed would keep the stack that its deepest call once needed, which is a TLS handshake's: more than all else that an idle
//! manager of ten sub-agents holds. What is kept is the sender, with its open connection.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::input::{Input, Inputs};
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::Heartbeat;
use crate::home::Home;
use crate::uplink::sender::Sender;

/// For a TLS handshake and the answer's desired state.
const STACK_BYTES: usize = 512 << 10;

/// The way to the gateway.
#[derive(Debug)]
pub(super) struct Uplink {
    home: Home,
    agent_id: AgentId,
    inputs: Inputs,
    way: Arc<Mutex<Route>>,
}

#[derive(Debug)]
struct Route {
    config: Arc<Config>,
    /// Made for this `config`; away while a heartbeat is on it.
    sender: Option<Sender>,
}

impl Uplink {
    pub(super) fn new(home: &Home, agent_id: &AgentId, config: &Config, inputs: &Inputs) -> Uplink {
        let way = Route { config: Arc::new(config.clone()), sender: None };
        let (home, agent_id, inputs) = (home.clone(), agent_id.clone(), inputs.clone());
        Uplink { home, agent_id, inputs, way: Arc::new(Mutex::new(way)) }
    }

    /// The way to the gateway may have changed.
    pub(super) fn configure(&self, config: &Config) {
        *lock(&self.way) = Route { config: Arc::new(config.clone()), sender: None };
    }

    /// Sends a heartbeat; what comes of it is an [`Input`].
    pub(super) fn send(&self, mut heartbeat: Box<Heartbeat>) -> io::Result<()> {
        let (home, agent_id, inputs, way) =
            (self.home.clone(), self.agent_id.clone(), self.inputs.clone(), self.way.clone());
        let thread = std::thread::Builder::new().name("uplink".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(move || {
            let (config, kept) = {
                let mut way = lock(&way);
                (way.config.clone(), way.sender.take())
            };
            let mut sender = kept.unwrap_or_else(|| Sender::new(&home, &agent_id, config));
            let outcome = sender.send(&mut heartbeat);
            {
                let mut way = lock(&way);
                // Another configuration came meanwhile: this sender is not for it.
                if sender.is_for(&way.config) {
                    way.sender = Some(sender);
                }
            }
            // Nobody hears it where the manager is ending.
            let _ = inputs.send(Input::Heartbeat(outcome));
        })?;
        Ok(())
    }
}

/// It is held for a moment only; nothing that could panic is done under it.
fn lock(way: &Mutex<Route>) -> MutexGuard<'_, Route> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}
