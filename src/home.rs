//! The layout of an installation: every path of a host is defined here, below one root that is a parameter.
//!
//! ```text
//! <home>/bin/aops                    the one executable, replaced by rename
//!        bin/aops.prev               the previous one
//!        bin/aops-spm, aops-spa, aops-agent-service -> aops        control -> bin/aops
//!        etc/conf.toml               the operator's settings
//!        etc/agent-id                the id given to the host at install
//!        etc/keys/*.pub              trusted minisign public keys; those from packages are in state/keys.json
//!        agents/<name>/<version>/    an unpacked release; `.complete` is written last and removed first
//!        agents/<name>/current       names the active version
//!        staging/  state/  cache/  run/  log/
//!        .install/                   temporary files of a running installation
//!        package.json                only where a package of the host (rpm, deb) owns the executable
//! ```
//!
//! Each file has one method here, and its name is not repeated anywhere else.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::core::model::{AgentName, Version};
use crate::core::names::CURRENT;
use crate::core::role::Role;
use crate::core::text::hex;
use crate::platform;

/// The file in the directory of a release that marks it as complete.
pub const COMPLETE: &str = ".complete";

/// The `caCert` file that `install` creates, relative to the home.
pub const CA_FILE: &str = "etc/ca.pem";

/// The unit whose cgroup contains the sub-agents.
pub const AGENTS: &str = "aops-agents";

/// The default home.
pub fn default_root() -> PathBuf {
    platform::default_home()
}

/// One installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// The home at `root`. Links and different spellings of a path lead to the same home.
    pub fn new(root: impl Into<PathBuf>) -> Home {
        Home { root: platform::identity(&root.into()) }
    }

    /// Its canonical path, without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path that is passed to programs and units, and shown to operators. For the default home it is the same on every host, even if it
    /// leads through a link.
    pub fn public_path(&self) -> PathBuf {
        if self.is_default() { default_root() } else { self.root.clone() }
    }

    /// A path inside the home, below [`Home::public_path`].
    pub fn to_public(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).map_or_else(|_| path.to_owned(), |below| self.public_path().join(below))
    }

    /// Whether it is the default home.
    pub fn is_default(&self) -> bool {
        self.is_at(&default_root())
    }

    /// Whether a path leads to this home.
    pub fn is_at(&self, path: &Path) -> bool {
        platform::identity(path) == self.root || platform::is_same_directory(path, &self.root)
    }

    /// The name of a role's unit: that of the program, followed by 8 hexadecimal digits from the home's path unless it is the default home.
    pub fn unit(&self, role: Role) -> String {
        self.unit_named(role.program())
    }

    /// The name of the unit whose cgroup contains the sub-agents, so that they survive the stop of a role.
    pub fn agents_unit(&self) -> String {
        self.unit_named(AGENTS)
    }

    fn unit_named(&self, program: &str) -> String {
        if self.is_default() {
            return program.to_owned();
        }
        let digest = Sha256::digest(self.root.as_os_str().as_encoded_bytes());
        let digits = hex(&digest[..4]);
        format!("{program}-{digits}")
    }

    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// The one executable.
    pub fn executable(&self) -> PathBuf {
        self.bin().join(format!("aops{}", std::env::consts::EXE_SUFFIX))
    }

    /// The executable before the last upgrade; during an upgrade it runs the watchdog.
    pub fn backup_executable(&self) -> PathBuf {
        self.bin().join(format!("aops.prev{}", std::env::consts::EXE_SUFFIX))
    }

    /// A new executable before it replaces [`Home::executable`].
    pub fn next_executable(&self) -> PathBuf {
        self.bin().join(format!(".aops.next{}", std::env::consts::EXE_SUFFIX))
    }

    /// A link in `bin` whose name selects a role, such as `aops-spm`.
    pub fn role_link(&self, role: &str) -> PathBuf {
        self.bin().join(format!("{role}{}", std::env::consts::EXE_SUFFIX))
    }

    /// The program that a role runs, and the subcommand for it. Where a link does not follow a replaced file, the manager runs the executable
    /// itself, so that one replacement switches it to another release.
    pub fn role_program(&self, role: Role) -> (PathBuf, Option<&'static str>) {
        if role == Role::Spm && !platform::LINKS_FOLLOW {
            (self.executable(), Some(role.name()))
        } else {
            (self.role_link(role.program()), None)
        }
    }

    /// `<home>/control`, the path that operators know from the old system.
    pub fn control_link(&self) -> PathBuf {
        self.root.join(format!("control{}", std::env::consts::EXE_SUFFIX))
    }

    pub fn etc(&self) -> PathBuf {
        self.root.join("etc")
    }

    pub fn config(&self) -> PathBuf {
        self.etc().join("conf.toml")
    }

    pub fn agent_id(&self) -> PathBuf {
        self.etc().join("agent-id")
    }

    pub fn keys(&self) -> PathBuf {
        self.etc().join("keys")
    }

    /// See [`CA_FILE`].
    pub fn ca_file(&self) -> PathBuf {
        self.root.join(CA_FILE)
    }

    pub fn agents(&self) -> PathBuf {
        self.root.join("agents")
    }

    pub fn agent(&self, name: &AgentName) -> PathBuf {
        self.agents().join(name.as_str())
    }

    pub fn release(&self, name: &AgentName, version: &Version) -> PathBuf {
        self.agent(name).join(version.as_str())
    }

    /// Names the active version of a sub-agent.
    pub fn current(&self, name: &AgentName) -> PathBuf {
        self.agent(name).join(CURRENT)
    }

    /// Releases that are being unpacked; emptied at start.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The ledger of the sub-agents' releases.
    pub fn releases(&self) -> PathBuf {
        self.state_file("releases.json")
    }

    /// A file of machine-written state.
    fn state_file(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    /// The last desired state that was accepted.
    pub fn desired(&self) -> PathBuf {
        self.state_file("desired.json")
    }

    /// Events that the gateway has not acknowledged.
    pub fn events(&self) -> PathBuf {
        self.state_file("events.json")
    }

    /// The result of each change of release.
    pub fn history(&self) -> PathBuf {
        self.state_file("history.json")
    }

    /// Records that the home was stopped on purpose; absent: it should run.
    pub fn stop_intent(&self) -> PathBuf {
        self.state_file("stopped.json")
    }

    /// The highest committed epoch of each package.
    pub fn epochs(&self) -> PathBuf {
        self.state_file("epochs.json")
    }

    /// The keys that packages added and revoked.
    pub fn keyring(&self) -> PathBuf {
        self.state_file("keys.json")
    }

    /// The certificates of first contacts.
    pub fn pins(&self) -> PathBuf {
        self.state_file("pins.json")
    }

    /// The public keys of pinned gateway certificates, learned from connections and announcements.
    pub fn gateway_keys(&self) -> PathBuf {
        self.state_file("gateway-keys.json")
    }

    /// How the home is installed: its service manager, its units and its links.
    pub fn install_record(&self) -> PathBuf {
        self.state_file("install.json")
    }

    /// The installed release of the manager.
    pub fn manager_record(&self) -> PathBuf {
        self.state_file("manager.json")
    }

    /// The state of a self-upgrade of the manager.
    pub fn upgrade_record(&self) -> PathBuf {
        self.state_file("upgrade.json")
    }

    /// The certificates of the gateway that a release on trial adds.
    pub fn endpoint_ca_file(&self) -> PathBuf {
        self.state_file("endpoint-ca.pem")
    }

    /// Reserved space, released if the disk is full during a self-upgrade.
    pub fn upgrade_reserve(&self) -> PathBuf {
        self.state_file("upgrade.reserve")
    }

    /// The id of this machine, which a clone does not share.
    pub fn instance(&self) -> PathBuf {
        self.state_file("instance.json")
    }

    /// The copy of the last valid settings.
    pub fn last_good_config(&self) -> PathBuf {
        self.state_file("conf.good.toml")
    }

    /// Written by a package of the host: the executable, its links and the units belong to it.
    pub fn package_record(&self) -> PathBuf {
        self.root.join("package.json")
    }

    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// A file in `run`: a lock, a process record, a socket.
    fn run_file(&self, name: &str) -> PathBuf {
        self.run().join(name)
    }

    /// Held by the one process that has a role: `spm` or `spa`.
    pub fn role_lock(&self, role: &str) -> PathBuf {
        self.run_file(&format!("{role}.lock"))
    }

    /// The record of the process that has a role, or had it last.
    pub fn role_record(&self, role: &str) -> PathBuf {
        self.run_file(&format!("{role}.json"))
    }

    /// Held during an installation or removal.
    pub fn install_lock(&self) -> PathBuf {
        self.run_file("install.lock")
    }

    /// Held while one step of a self-upgrade is decided and carried out.
    pub fn upgrade_lock(&self) -> PathBuf {
        self.run_file("upgrade.lock")
    }

    /// Held while the epochs or the keyring of the host are changed.
    pub fn trust_lock(&self) -> PathBuf {
        self.run_file("trust.lock")
    }

    /// The control socket of the manager.
    pub fn control_socket(&self) -> PathBuf {
        self.run_file("spm.sock")
    }

    /// The record of a sub-agent's process.
    pub fn process_record(&self, name: &AgentName) -> PathBuf {
        self.process_records().join(format!("{name}.json"))
    }

    pub fn process_records(&self) -> PathBuf {
        self.run().join("agents")
    }

    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// The log of a role: `spm` or `spa`.
    pub fn role_log(&self, role: &str) -> PathBuf {
        self.log().join(format!("{role}.log"))
    }

    /// The output of a sub-agent.
    pub fn agent_log(&self, name: &AgentName) -> PathBuf {
        self.agent_logs().join(format!("{name}.log"))
    }

    pub fn agent_logs(&self) -> PathBuf {
        self.log().join("agents")
    }

    /// Temporary files of a running installation, on the file system of the home; absent otherwise.
    pub fn install_work(&self) -> PathBuf {
        self.root.join(".install")
    }

    /// The paths that a running installation has created, or is about to create, in a new home. While it exists, the files in the home are
    /// ours.
    pub fn install_journal(&self) -> PathBuf {
        self.install_work().join("made.json")
    }

    /// Whether a path in the home belongs to the installation. Other files there must not be touched.
    pub fn owns(&self, path: &Path) -> bool {
        let Ok(below) = path.strip_prefix(&self.root) else { return false };
        let Some(first) = below.components().next() else { return false };
        let first = Path::new(first.as_os_str());
        let ours = self.directories().into_iter().map(|(directory, _)| directory);
        let mut ours = ours.chain([self.install_work(), self.control_link()]);
        let is_temporary = first.to_str().is_some_and(|name| name.starts_with(platform::TEMPORARY_PREFIX));
        is_temporary || ours.any(|path| path == self.root.join(first))
    }

    /// Every directory of an installation, parents first, with its Unix mode.
    pub fn directories(&self) -> Vec<(PathBuf, u32)> {
        vec![
            (self.root.clone(), 0o755),
            (self.bin(), 0o755),
            (self.etc(), 0o755),
            (self.keys(), 0o755),
            (self.agents(), 0o755),
            (self.staging(), 0o700),
            (self.state(), 0o700),
            (self.cache(), 0o700),
            (self.run(), 0o700),
            (self.process_records(), 0o700),
            // The output of a sub-agent may contain secrets.
            (self.log(), 0o700),
            (self.agent_logs(), 0o700),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_spellings_of_a_path_are_one_home() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        std::fs::create_dir_all(at("data/aops")).unwrap();
        let home = Home::new(at("data/aops"));
        for spelling in ["data/aops/", "data/./aops//", "data/../data/aops"] {
            let other = Home::new(at(spelling));
            assert_eq!((&other, other.unit(Role::Spm)), (&home, home.unit(Role::Spm)), "{spelling}");
            assert_eq!((other.control_socket(), other.agents_unit()), (home.control_socket(), home.agents_unit()));
            assert!(home.is_at(&at(spelling)) && !home.is_at(&at("data")));
        }
    }

    #[test]
    fn files_of_others_in_the_home_are_not_owned() {
        let home = Home::new("/srv/a");
        for ours in ["bin", "etc/conf.toml", "state", "run/spm.sock", ".install", ".new-1-2"] {
            assert!(home.owns(&home.root().join(ours)), "{ours}");
        }
        assert!(home.owns(&home.control_link()));
        for theirs in ["", "data", "etcetera", "binary/aops", "control.sh"] {
            assert!(!home.owns(&home.root().join(theirs)), "{theirs}");
        }
        assert!(!home.owns(Path::new("/srv/bin")));
    }

    #[test]
    fn only_the_default_home_has_the_plain_unit_names() {
        let home = Home::new(default_root());
        assert_eq!(home.unit(Role::Spm), "aops-spm");
        let other = Home::new("/srv/a home");
        let name = other.unit(Role::Spa);
        assert!(name.starts_with("aops-spa-") && name.len() == "aops-spa-".len() + 8, "{name}");
        assert_ne!(name[9..], Home::new("/srv/b").unit(Role::Spa)[9..]);
        assert_eq!(name[9..], other.unit(Role::Spm)[9..]);
    }
}
