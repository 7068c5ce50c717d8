//! What the requests of a running gateway share: what they are answered from, and what bounds them.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, Semaphore};

use super::depot::Index;
use super::fleet_file::Standing;
use super::hosts::{Hosts, World};
use crate::core::fleet::Fleet;

/// What every request may use.
pub(super) struct Shared {
    pub(super) hosts: Hosts,
    world: RwLock<Arc<World>>,
    standing: Mutex<Standing>,
    /// Something is to be saved.
    pub(super) touched: Notify,
    pub(super) large_bodies: Semaphore,
}

impl Shared {
    /// With an empty world: no fleet, and nothing on offer.
    pub(super) fn new(hosts: Hosts, large_bodies: Semaphore) -> Shared {
        Shared {
            hosts,
            world: RwLock::new(Arc::new(World { revision: 0, fleet: None, index: Arc::new(Index::default()) })),
            standing: Mutex::new(Standing::default()),
            touched: Notify::new(),
            large_bodies,
        }
    }

    pub(super) fn world(&self) -> Arc<World> {
        self.world.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers are made from these from now on.
    pub(super) fn replace_world(&self, fleet: Option<Arc<Fleet>>, index: Arc<Index>) {
        let mut world = self.world.write().unwrap_or_else(PoisonError::into_inner);
        *world = Arc::new(World { revision: world.revision + 1, fleet, index });
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_standing(&self, standing: Standing) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }
}
