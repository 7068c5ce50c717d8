//! The epochs that this host has committed: a release of a lower one was withdrawn, and is refused.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::trust;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// The form of state that has `keys.json`, and `pins.json` where a first contact is trusted; homes that were made before have [`Epochs::form`] zero.
const WITH_KEYRING: u32 = 1;
/// The form that also has `releases.json`.
const WITH_LEDGER: u32 = 2;

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
    unknown: UnknownJson,
}

impl Epochs {
    /// The epochs of a standing home. That they are missing is an error: zero would let every old release in again.
    pub fn load(home: &Home) -> Result<Epochs> {
        let path = home.epochs();
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
        Epochs::commit_all(home, [(name, epoch)], false)
    }

    /// As [`Epochs::commit`], of several at once. `has_ledger`: the ledger of releases is on disk, and its absence is a loss from then on.
    pub fn commit_all<'a>(
        home: &Home,
        releases: impl IntoIterator<Item = (&'a str, u64)>,
        has_ledger: bool,
    ) -> Result<()> {
        let _lock = trust::lock(home)?;
        let mut epochs = Epochs::load(home)?;
        let before = epochs.clone();
        if !epochs.has_keyring() && home.keyring().exists() {
            epochs.form = WITH_KEYRING;
        }
        // Each form has what the ones before have.
        if has_ledger && epochs.has_keyring() {
            epochs.form = epochs.form.max(WITH_LEDGER);
        }
        for (name, epoch) in releases {
            epochs.raise(name, epoch);
        }
        if epochs == before { Ok(()) } else { epochs.save(home) }
    }

    /// Whether a ledger of releases was on disk once.
    pub fn expects_ledger(&self) -> bool {
        self.form >= WITH_LEDGER
    }

    /// Whether the home was made, or renewed, by a version that keeps a keyring.
    pub(super) fn has_keyring(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    /// Whether it was by one that leaves a file of pins wherever a first contact is trusted, be it an empty one.
    pub fn expects_pins(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.epochs(), self)
    }

    /// The lowest epoch that is accepted of a package.
    pub fn least(&self, name: &str) -> u64 {
        self.epochs.get(name).copied().unwrap_or(0)
    }

    /// A release of this epoch was committed.
    fn raise(&mut self, name: &str, epoch: u64) {
        let least = self.least(name);
        self.epochs.insert(name.to_owned(), epoch.max(least));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir_all(home.state()).unwrap();
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
    fn a_ledger_is_expected_once_one_was_on_disk_beside_a_keyring() {
        let (_directory, home) = home();
        Epochs::begin(&home).unwrap();
        Epochs::commit_all(&home, [("a", 1)], true).unwrap();
        assert!(!Epochs::load(&home).unwrap().expects_ledger(), "a later form would also say that there is a keyring");
        std::fs::write(home.keyring(), "{}").unwrap();
        Epochs::commit_all(&home, [("a", 1)], true).unwrap();
        Epochs::commit(&home, "b", 1).unwrap();
        assert!(Epochs::load(&home).unwrap().expects_ledger());
    }

    #[test]
    fn epochs_only_grow_and_a_missing_store_is_an_error() {
        let (_directory, home) = home();
        assert!(Epochs::load(&home).is_err());
        let mut epochs = Epochs::default();
        for epoch in [0, 3, 2] {
            epochs.raise("aops-spm", epoch);
        }
        epochs.save(&home).unwrap();
        assert_eq!(Epochs::load(&home).unwrap().least("aops-spm"), 3);
        assert_eq!(Epochs::load(&home).unwrap().least("other"), 0);
    }
}
