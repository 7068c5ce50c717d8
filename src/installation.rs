//! What an installation knows of itself: who it is, which release of the manager is in place, and what `install` did on the host
//! outside the home, so that `uninstall` can take exactly that back.

pub mod guard;
pub mod keyring;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::core::model::{AgentId, Digest, Version};
use crate::core::service_manager::Kind;
use crate::home::Home;
use crate::lock::{self, Held};
use crate::store;

/// An id with its line end; what is longer is something else.
const MAX_AGENT_ID_BYTES: u64 = 4 << 10;

/// Below `run/`: held while what the host trusts (its epochs, its keyring) is read and written back, as an installation does it beside a
/// manager that runs.
const TRUST_LOCK: &str = "trust.lock";
/// Who holds it writes two or three files.
const TRUST_LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// The form of state that has `keys.json`, and `pins.json` where a first contact is trusted; homes that were made before have [`Epochs::form`] zero.
const WITH_KEYRING: u32 = 1;

/// Fields that a newer version wrote; kept for it.
type Unknown = serde_json::Map<String, serde_json::Value>;

/// `state/manager.json`: the release of the manager that is in place, as its signed comment said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manager {
    pub version: Version,
    /// Of the package.
    pub sha256: Digest,
    pub epoch: u64,
    /// The package's file name.
    pub file: String,
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Manager {
    pub fn load(home: &Home) -> Result<Option<Manager>> {
        store::load(&Manager::path(home))
    }

    pub fn save(&self, home: &Home) -> Result<()> {
        store::save(&Manager::path(home), self)
    }

    pub fn path(home: &Home) -> PathBuf {
        home.state_file("manager.json")
    }
}

/// `state/install.json`: how the home is tied into the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Installed {
    /// The service manager that the roles are registered with.
    pub service: Kind,
    pub product: String,
    /// Directories that were made for the home, the home itself among them, parents first.
    #[serde(default)]
    pub created_directories: Vec<PathBuf>,
    /// Links that were made outside the home.
    #[serde(default)]
    pub linked: Vec<PathBuf>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Installed {
    /// Nothing is known but who starts the roles.
    pub fn by(service: Kind) -> Installed {
        let unknown = Unknown::default();
        Installed { service, product: String::new(), created_directories: Vec::new(), linked: Vec::new(), unknown }
    }

    pub fn load(home: &Home) -> Result<Option<Installed>> {
        store::load(&Installed::path(home))
    }

    pub fn save(&self, home: &Home) -> Result<()> {
        store::save(&Installed::path(home), self)
    }

    pub fn path(home: &Home) -> PathBuf {
        home.state_file("install.json")
    }
}

/// `state/epochs.json`: the highest epoch that this host has committed, for each package's name. It only grows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Epochs {
    #[serde(default)]
    epochs: BTreeMap<String, u64>,
    /// The form of the state that says whom the host trusts, so that a file that is lost is told from one that a home never had. Absent:
    /// the first one.
    #[serde(default)]
    form: u32,
    #[serde(flatten)]
    unknown: Unknown,
}

impl Epochs {
    /// The epochs of a standing home. That they are missing is an error: zero would let every old release in again.
    pub fn load(home: &Home) -> Result<Epochs> {
        let path = Epochs::path(home);
        match store::load(&path)? {
            Some(epochs) => Ok(epochs),
            None => bail!(
                "cannot read {}: it is missing, and without it releases that were withdrawn would be accepted again; \
                 bring it back from a backup, or install again with --fresh",
                path.display()
            ),
        }
    }

    /// Those of a new home.
    pub fn begin(home: &Home) -> Result<()> {
        Epochs::default().save(home)
    }

    /// Commits the epoch of a release of this name on disk, beside whoever else commits another.
    pub fn commit(home: &Home, name: &str, epoch: u64) -> Result<()> {
        let _lock = changing_trust(home)?;
        let mut epochs = Epochs::load(home)?;
        let is_old = !epochs.has_keyring() && keyring::Keyring::path(home).exists();
        if is_old {
            epochs.form = WITH_KEYRING;
        }
        if epochs.raise(name, epoch) || is_old { epochs.save(home) } else { Ok(()) }
    }

    /// Whether the home was made, or renewed, by a version that keeps a keyring.
    fn has_keyring(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    /// Whether it was by one that leaves a file of pins wherever a first contact is trusted, be it an empty one.
    pub fn expects_pins(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    fn save(&self, home: &Home) -> Result<()> {
        store::save(&Epochs::path(home), self)
    }

    pub fn path(home: &Home) -> PathBuf {
        home.state_file("epochs.json")
    }

    /// The lowest epoch that is accepted of a package.
    pub fn least(&self, name: &str) -> u64 {
        self.epochs.get(name).copied().unwrap_or(0)
    }

    /// A release of this epoch was committed; whether that is news.
    fn raise(&mut self, name: &str, epoch: u64) -> bool {
        let least = self.least(name);
        if epoch > least || !self.epochs.contains_key(name) {
            self.epochs.insert(name.to_owned(), epoch.max(least));
            return true;
        }
        false
    }
}

/// Nobody else changes what the host trusts while this is held.
fn changing_trust(home: &Home) -> Result<Held> {
    let path = home.run_file(TRUST_LOCK);
    lock::take(&path, TRUST_LOCK_DEADLINE)?.with_context(|| {
        format!(
            "cannot change what this host trusts: another process has held {} for too long; try again",
            path.display()
        )
    })
}

/// `state/instance.json`: which machine this is, so that a clone of it shows.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Instance {
    instance_id: String,
    /// The machine that it was made for, as the system names it; empty where it does not.
    machine_id: String,
    #[serde(flatten)]
    unknown: Unknown,
}

/// A UUID made at the first start on this machine, and made anew on a clone of it.
pub fn instance_id(home: &Home) -> String {
    let path = home.state_file("instance.json");
    let machine_id = machine_uid::get().unwrap_or_default();
    // What cannot be read is no reason not to start: the host only looks like a new one.
    let known = store::load::<Instance>(&path).ok().flatten().filter(|known| known.machine_id == machine_id);
    if let Some(known) = known {
        return known.instance_id;
    }
    let new = Instance { instance_id: uuid::Uuid::new_v4().to_string(), machine_id, unknown: Unknown::new() };
    if let Err(error) = store::save(&path, &new) {
        tracing::warn!(error = format!("{error:#}"), "the instance id cannot be kept; the next start makes another");
    }
    new.instance_id
}

/// The identity given at install; `None` where there is none.
pub fn agent_id(home: &Home) -> Result<Option<AgentId>> {
    let path = home.agent_id();
    let Some(bytes) = store::read(&path, MAX_AGENT_ID_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    text.trim().parse().map(Some).with_context(|| format!("cannot use {}", path.display()))
}

/// Whether an installation of aops stands in this home, however broken.
pub fn exists(home: &Home) -> bool {
    let has = |path: PathBuf| path.symlink_metadata().is_ok();
    has(Installed::path(home))
        || has(Manager::path(home))
        || (has(home.executable()) && has(home.role_link("aops-spm")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir_all(home.state()).unwrap();
        std::fs::create_dir_all(home.etc()).unwrap();
        std::fs::create_dir_all(home.run()).unwrap();
        (directory, home)
    }

    #[test]
    fn of_those_who_commit_at_the_same_time_nobody_loses_anothers() {
        let (_directory, home) = home();
        Epochs::begin(&home).unwrap();
        let names: Vec<Vec<String>> = (0..4).map(|one| (0..8).map(|n| format!("agent-{one}-{n}")).collect()).collect();
        std::thread::scope(|scope| {
            for names in &names {
                scope.spawn(|| names.iter().for_each(|name| Epochs::commit(&home, name, 7).unwrap()));
            }
        });
        let epochs = Epochs::load(&home).unwrap();
        let lost: Vec<&String> = names.iter().flatten().filter(|name| epochs.least(name) != 7).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }

    #[test]
    fn what_a_later_version_wrote_is_kept_to_the_last_digit() {
        let text = r#"{"epochs":{"a":3},"later":{"rate":1444444444444444444444444444444444444444444444,"share":0.1,"is":[null]}}"#;
        let epochs: Epochs = serde_json::from_str(text).unwrap();
        let again: Epochs = serde_json::from_str(&serde_json::to_string(&epochs).unwrap()).unwrap();
        assert_eq!(again, epochs);
        assert_eq!(again.unknown["later"]["share"], 0.1);
    }

    #[test]
    fn epochs_only_grow_and_a_missing_store_is_an_error() {
        let (_directory, home) = home();
        assert!(Epochs::load(&home).is_err());
        let mut epochs = Epochs::default();
        assert!(epochs.raise("aops-spm", 0));
        assert!(epochs.raise("aops-spm", 3));
        assert!(!epochs.raise("aops-spm", 2));
        epochs.save(&home).unwrap();
        assert_eq!(Epochs::load(&home).unwrap().least("aops-spm"), 3);
        assert_eq!(Epochs::load(&home).unwrap().least("other"), 0);
    }

    #[test]
    fn fields_of_a_newer_version_are_written_back() {
        let (_directory, home) = home();
        let text = r#"{"service":"none","product":"generic","later":[1]}"#;
        std::fs::write(Installed::path(&home), text).unwrap();
        let installed = Installed::load(&home).unwrap().unwrap();
        assert_eq!(installed.service, Kind::None);
        installed.save(&home).unwrap();
        assert!(std::fs::read_to_string(Installed::path(&home)).unwrap().contains("later"));
        assert!(exists(&home));
    }

    #[test]
    fn an_agent_id_that_is_none_is_told_from_a_missing_one() {
        let (_directory, home) = home();
        assert_eq!(agent_id(&home).unwrap(), None);
        std::fs::write(home.agent_id(), "540\n").unwrap();
        assert_eq!(agent_id(&home).unwrap(), Some("540".parse().unwrap()));
        std::fs::write(home.agent_id(), "a b").unwrap();
        assert!(agent_id(&home).is_err());
    }
}
