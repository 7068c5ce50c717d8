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
    snapshot: RwLock<Arc<Snapshot>>,
    state: Mutex<GatewayState>,
    /// Problems with the gateway's own state files, by topic.
    problems: Mutex<BTreeMap<&'static str, String>>,
    /// Notified when records of hosts have to be saved.
    pub(super) touched: Notify,
    pub(super) large_bodies: Semaphore,
}

impl RequestContext {
    /// With an empty snapshot: no fleet and no packages.
    pub(super) fn new(hosts: Hosts, large_bodies: Semaphore) -> RequestContext {
        RequestContext {
            hosts,
            snapshot: RwLock::new(Arc::new(Snapshot {
                revision: 0,
                fleet: None,
                index: Arc::new(Index::default()),
                pins: Vec::new(),
            })),
            state: Mutex::default(),
            problems: Mutex::default(),
            touched: Notify::new(),
            large_bodies,
        }
    }

    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the data that requests are answered from.
    pub(super) fn replace_snapshot(&self, fleet: Option<Arc<Fleet>>, index: Arc<Index>, pins: Vec<String>) {
        let mut snapshot = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        *snapshot = Arc::new(Snapshot { revision: snapshot.revision + 1, fleet, index, pins });
    }

    pub(super) fn state(&self) -> GatewayState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_state(&self, state: GatewayState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Sets the problem of a topic, or clears it.
    pub(super) fn set_problem(&self, about: &'static str, why: Option<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(problems.insert(about, why)),
            None => drop(problems.remove(about)),
        }
    }

    pub(super) fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
