//! The epochs that this host has committed: a release of a lower epoch was withdrawn, and is rejected.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::trust;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// The form of state with `keys.json` and, if a first contact is trusted, `pins.json`. Older homes have [`Epochs::form`] zero.
const WITH_KEYRING: u32 = 1;
/// The form that also has `releases.json`.
const WITH_LEDGER: u32 = 2;

/// `state/epochs.json`: for each package name, the highest epoch that this host has committed. It only grows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Epochs {
    #[serde(default)]
    epochs: BTreeMap<String, u64>,
    /// The form of the state: which files must exist. It distinguishes a lost file from one that an older version did not create. Absent:
    /// zero.
    #[serde(default)]
    form: u32,
    #[serde(flatten)]
    unknown: UnknownJson,
}

impl Epochs {
    /// The epochs of an existing home. A missing file is an error: zero would accept every withdrawn release again.
    pub fn load(home: &Home) -> Result<Epochs> {
        let path = home.epochs();
        match store::load(&path)? {
            Some(epochs) => Ok(epochs),
            None => bail!(
                "cannot read {}: it is missing, and without it withdrawn releases would be accepted again; restore it from a backup, or \
                 install again with --fresh",
                path.display()
            ),
        }
    }

    /// Creates the file of a new home, with the epochs of the first releases.
    pub fn create<'a>(home: &Home, releases: impl IntoIterator<Item = (&'a str, u64)>) -> Result<()> {
        let _lock = trust::lock(home)?;
        Epochs::default().after(home, releases, false).save(home)
    }

    /// Commits the epoch of a release of this name on disk. Several processes may commit at the same time.
    pub fn commit(home: &Home, name: &str, epoch: u64) -> Result<()> {
        Epochs::commit_all(home, [(name, epoch)], false)
    }

    /// Like [`Epochs::commit`], for several releases. `has_ledger`: the ledger of releases is on disk, and must exist from now on.
    pub fn commit_all<'a>(
        home: &Home,
        releases: impl IntoIterator<Item = (&'a str, u64)>,
        has_ledger: bool,
    ) -> Result<()> {
        let _lock = trust::lock(home)?;
        let before = Epochs::load(home)?;
        let epochs = before.clone().after(home, releases, has_ledger);
        if epochs == before { Ok(()) } else { epochs.save(home) }
    }

    fn after<'a>(
        mut self,
        home: &Home,
        releases: impl IntoIterator<Item = (&'a str, u64)>,
        has_ledger: bool,
    ) -> Epochs {
        if !self.has_keyring() && home.keyring().exists() {
            self.form = WITH_KEYRING;
        }
        // Each form includes the files of the previous ones.
        if has_ledger && self.has_keyring() {
            self.form = self.form.max(WITH_LEDGER);
        }
        for (name, epoch) in releases {
            self.raise(name, epoch);
        }
        self
    }

    /// Whether the ledger of releases must exist.
    pub fn expects_ledger(&self) -> bool {
        self.form >= WITH_LEDGER
    }

    /// Whether the keyring must exist: the home was installed by a version that has one.
    pub(super) fn has_keyring(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    /// Whether the file of pins must exist if a first contact is trusted; it may be empty.
    pub fn expects_pins(&self) -> bool {
        self.form >= WITH_KEYRING
    }

    fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.epochs(), self)
    }

    /// The lowest accepted epoch of a package.
    pub fn least(&self, name: &str) -> u64 {
        self.epochs.get(name).copied().unwrap_or(0)
    }

    /// Records the epoch of a committed release.
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
    fn concurrent_commits_are_not_lost() {
        let (_directory, home) = home();
        Epochs::create(&home, []).unwrap();
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
    fn unknown_fields_of_a_later_version_are_preserved_exactly() {
        let text = r#"{"epochs":{"a":3},"later":{"rate":1444444444444444444444444444444444444444444444,"share":0.1,"is":[null]}}"#;
        let epochs: Epochs = serde_json::from_str(text).unwrap();
        let again: Epochs = serde_json::from_str(&serde_json::to_string(&epochs).unwrap()).unwrap();
        assert_eq!(again, epochs);
        assert_eq!(again.unknown["later"]["share"], 0.1);
    }

    #[test]
    fn a_ledger_is_expected_after_one_was_on_disk_with_a_keyring() {
        let (_directory, home) = home();
        Epochs::create(&home, []).unwrap();
        Epochs::commit_all(&home, [("a", 1)], true).unwrap();
        assert!(!Epochs::load(&home).unwrap().expects_ledger(), "the later form would imply a keyring");
        std::fs::write(home.keyring(), "{}").unwrap();
        Epochs::commit_all(&home, [("a", 1)], true).unwrap();
        Epochs::commit(&home, "b", 1).unwrap();
        assert!(Epochs::load(&home).unwrap().expects_ledger());
    }

    #[test]
    fn epochs_only_grow_and_a_missing_file_is_an_error() {
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
