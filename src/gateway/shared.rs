//! The data that all requests of a running gateway share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, Semaphore};

use super::depot::Index;
use super::hosts::{Hosts, Snapshot};
use super::state::GatewayState;
use crate::core::fleet::Fleet;

/// The shared data of all requests.
pub(super) struct RequestContext {
    pub(super) hosts: Hosts,
    world: RwLock<Arc<Snapshot>>,
    standing: Mutex<GatewayState>,
    /// Problems with the gateway's own state files, by topic.
    troubles: Mutex<BTreeMap<&'static str, String>>,
    /// Notified when records of hosts have to be saved.
    pub(super) touched: Notify,
    pub(super) large_bodies: Semaphore,
}

impl RequestContext {
    /// With an empty snapshot: no fleet and no packages.
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

    /// Replaces the data that requests are answered from.
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

    /// Sets the problem of a topic, or clears it.
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
