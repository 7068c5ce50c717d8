//! What the requests of a running gateway share: what they are answered from, and what bounds them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, Semaphore};

use super::depot::Index;
use super::hosts::{Hosts, Snapshot};
use super::state::GatewayState;
use crate::core::fleet::Fleet;

/// What every request may use.
pub(super) struct RequestContext {
    pub(super) hosts: Hosts,
    world: RwLock<Arc<Snapshot>>,
    standing: Mutex<GatewayState>,
    /// What the gateway cannot keep of its own state, by what it is about.
    troubles: Mutex<BTreeMap<&'static str, String>>,
    /// Something is to be saved.
    pub(super) touched: Notify,
    pub(super) large_bodies: Semaphore,
}

impl RequestContext {
    /// With an empty world: no fleet, and nothing on offer.
    pub(super) fn new(hosts: Hosts, large_bodies: Semaphore) -> RequestContext {
        RequestContext {
            hosts,
            world: RwLock::new(Arc::new(Snapshot {
                revision: 0,
                fleet: None,
                index: Arc::new(Index::default()),
                pins: Vec::new(),
            })),
            standing: Mutex::default(),
            troubles: Mutex::default(),
            touched: Notify::new(),
            large_bodies,
        }
    }

    pub(super) fn world(&self) -> Arc<Snapshot> {
        self.world.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers are made from these from now on.
    pub(super) fn replace_world(&self, fleet: Option<Arc<Fleet>>, index: Arc<Index>, pins: Vec<String>) {
        let mut world = self.world.write().unwrap_or_else(PoisonError::into_inner);
        *world = Arc::new(Snapshot { revision: world.revision + 1, fleet, index, pins });
    }

    pub(super) fn standing(&self) -> GatewayState {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_standing(&self, standing: GatewayState) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    /// Notes what is wrong with a piece of the gateway's own state, or that nothing is.
    pub(super) fn trouble(&self, about: &'static str, why: Option<String>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(troubles.insert(about, why)),
            None => drop(troubles.remove(about)),
        }
    }

    pub(super) fn troubles(&self) -> Vec<String> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
