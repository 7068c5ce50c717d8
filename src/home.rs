//! What lies where in an installation: every path of a host comes from here, from one root that is a parameter.
//!
//! ```text
//! <home>/bin/aops                    the one executable, replaced whole, by rename
//!        bin/aops.prev               the one before
//!        bin/aops-spm, aops-spa, aops-agent-service -> aops        control -> bin/aops
//!        etc/conf.toml               the operator's settings
//!        etc/agent-id                the identity given at install
//!        etc/keys/*.pub              trusted minisign public keys; those that packages brought are in state/keys.json
//!        agents/<name>/<version>/    an unpacked release; `.complete` is written last and removed first
//!        agents/<name>/current       names the active version
//!        staging/  state/  cache/  run/  log/
//!        .install/                   what an installation needs while it runs
//! ```
//!
//! A file has one method here; its name is written nowhere else.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::core::model::{AgentName, Version};
use crate::core::names::CURRENT;
use crate::core::role::Role;
use crate::core::text::hex;
use crate::platform;

/// The file inside a release directory that says that it is whole.
pub const COMPLETE: &str = ".complete";

/// The gateway's certificates as `install` keeps them, relative to the home, as the settings name them.
pub const CA_FILE: &str = "etc/ca.pem";

/// The unit of no role: in its cgroup the sub-agents live.
pub const AGENTS: &str = "aops-agents";

/// Where an installation stands unless another place is given.
pub fn default_root() -> PathBuf {
    platform::default_home()
}

/// One installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// The home that `root` leads to, over links or not, whatever the spelling: it is one home, with one path.
    pub fn new(root: impl Into<PathBuf>) -> Home {
        Home { root: platform::identity(&root.into()) }
    }

    /// Its one path, without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path by which others know it: programs that are started for it, units, and operators. That of the default home is the same on
    /// every host, also where a link leads there.
    pub fn known_as(&self) -> PathBuf {
        if self.is_default() { default_root() } else { self.root.clone() }
    }

    /// A path of the home, as others know it.
    pub fn as_known(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).map_or_else(|_| path.to_owned(), |below| self.known_as().join(below))
    }

    /// Whether it stands where an installation stands by default.
    pub fn is_default(&self) -> bool {
        self.is_at(&default_root())
    }

    /// Whether a path leads to it.
    pub fn is_at(&self, path: &Path) -> bool {
        platform::identity(path) == self.root || platform::is_same_directory(path, &self.root)
    }

    /// The name of a role's unit: that of the program in the default home, with 8 hexadecimal digits of the home's path in any other.
    pub fn unit(&self, role: Role) -> String {
        self.unit_named(role.program())
    }

    /// The name of the unit in whose cgroup the sub-agents live: neither role's end touches them there.
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

    /// The executable before the last upgrade, and the one that runs the watchdog during one.
    pub fn backup_executable(&self) -> PathBuf {
        self.bin().join(format!("aops.prev{}", std::env::consts::EXE_SUFFIX))
    }

    /// An executable of the manager that is about to be put in place, beside it.
    pub fn next_executable(&self) -> PathBuf {
        self.bin().join(format!(".aops.next{}", std::env::consts::EXE_SUFFIX))
    }

    /// A name in `bin` by which the executable takes a role, such as `aops-spm`.
    pub fn role_link(&self, role: &str) -> PathBuf {
        self.bin().join(format!("{role}{}", std::env::consts::EXE_SUFFIX))
    }

    /// `<home>/control`, where operators of the old system look for it.
    pub fn control_link(&self) -> PathBuf {
        self.root.join(format!("control{}", std::env::consts::EXE_SUFFIX))
    }

    /// The script of the old system; it has the same name on every system.
    pub fn old_control(&self) -> PathBuf {
        self.root.join("control")
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

    /// What is being unpacked; swept at start.
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

    /// What came of each change of release.
    pub fn history(&self) -> PathBuf {
        self.state_file("history.json")
    }

    /// The intent of a stop; absent: the home is to run.
    pub fn stop_intent(&self) -> PathBuf {
        self.state_file("stopped.json")
    }

    /// The highest committed epoch of each package.
    pub fn epochs(&self) -> PathBuf {
        self.state_file("epochs.json")
    }

    /// The keys that packages brought and revoked.
    pub fn keyring(&self) -> PathBuf {
        self.state_file("keys.json")
    }

    /// The certificates of first contacts.
    pub fn pins(&self) -> PathBuf {
        self.state_file("pins.json")
    }

    /// The public keys of gateways whose certificates the settings pin, as they were learned and announced.
    pub fn gateway_keys(&self) -> PathBuf {
        self.state_file("gateway-keys.json")
    }

    /// How the home is tied into the host.
    pub fn install_record(&self) -> PathBuf {
        self.state_file("install.json")
    }

    /// The release of the manager that is in place.
    pub fn manager_record(&self) -> PathBuf {
        self.state_file("manager.json")
    }

    /// The manager's upgrade of itself.
    pub fn upgrade_record(&self) -> PathBuf {
        self.state_file("upgrade.json")
    }

    /// The certificates of a gateway that a release on trial brings.
    pub fn endpoint_ca_file(&self) -> PathBuf {
        self.state_file("endpoint-ca.pem")
    }

    /// Space that is given up when the disk is full in the middle of the manager's upgrade.
    pub fn upgrade_reserve(&self) -> PathBuf {
        self.state_file("upgrade.reserve")
    }

    /// The id of this machine, as opposed to a clone of it.
    pub fn instance(&self) -> PathBuf {
        self.state_file("instance.json")
    }

    /// The copy of the last settings that were good.
    pub fn last_good_config(&self) -> PathBuf {
        self.state_file("conf.good.toml")
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

    /// The process that has a role, or had it last.
    pub fn role_record(&self, role: &str) -> PathBuf {
        self.run_file(&format!("{role}.json"))
    }

    /// Held by an installation or its removal.
    pub fn install_lock(&self) -> PathBuf {
        self.run_file("install.lock")
    }

    /// Held while one step of the manager's upgrade of itself is decided and carried out.
    pub fn upgrade_lock(&self) -> PathBuf {
        self.run_file("upgrade.lock")
    }

    /// Held while the trust of the host is changed: its epochs and its keyring.
    pub fn trust_lock(&self) -> PathBuf {
        self.run_file("trust.lock")
    }

    /// The local door of the manager.
    pub fn control_socket(&self) -> PathBuf {
        self.run_file("spm.sock")
    }

    /// Where the record of a sub-agent's process lies.
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

    /// What a sub-agent prints.
    pub fn agent_log(&self, name: &AgentName) -> PathBuf {
        self.agent_logs().join(format!("{name}.log"))
    }

    pub fn agent_logs(&self) -> PathBuf {
        self.log().join("agents")
    }

    /// What an installation needs while it runs, on the home's own file system; absent otherwise.
    pub fn install_work(&self) -> PathBuf {
        self.root.join(".install")
    }

    /// What an installation made, and was about to make, where nothing stood. While it is there, what lies in the home is ours.
    pub fn install_made(&self) -> PathBuf {
        self.install_work().join("made.json")
    }

    /// Whether what lies at a path of the home belongs to an installation; whatever else lies there is somebody else's.
    pub fn owns(&self, path: &Path) -> bool {
        let Ok(below) = path.strip_prefix(&self.root) else { return false };
        let Some(first) = below.components().next() else { return false };
        let first = Path::new(first.as_os_str());
        let ours = self.directories().into_iter().map(|(directory, _)| directory);
        let mut ours = ours.chain([self.install_work(), self.control_link()]);
        let is_on_its_way = first.to_str().is_some_and(|name| name.starts_with(platform::TEMPORARY_PREFIX));
        is_on_its_way || ours.any(|path| path == self.root.join(first))
    }

    /// Every directory of an installation, parents first, with the Unix mode that each is to have.
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
            // What a sub-agent prints may be anything that it was told.
            (self.log(), 0o700),
            (self.agent_logs(), 0o700),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_one_whatever_its_path_is_spelled_like() {
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
    fn what_an_installation_did_not_make_is_not_its_own() {
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
