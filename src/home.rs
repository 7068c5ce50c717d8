//! What lies where in an installation: every path of a host comes from here, from one root that is a parameter.
//!
//! ```text
//! <home>/bin/aops                    the one executable, replaced whole, by rename
//!        bin/aops-spm, aops-spa, aops-agent-service -> aops        control -> bin/aops
//!        etc/conf.toml               the operator's settings
//!        etc/agent-id                the identity given at install
//!        etc/keys/*.pub              trusted minisign public keys; those that packages brought are in state/keys.json
//!        agents/<name>/<version>/    an unpacked release; `.complete` is written last and removed first
//!        agents/<name>/current       names the active version
//!        staging/  state/  cache/  run/  log/
//! ```

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::core::model::{AgentName, Version};
use crate::core::role::Role;
use crate::platform;

/// The file inside a release directory that says that it is whole.
pub const COMPLETE: &str = ".complete";

/// The unit of no role: in its cgroup the sub-agents live.
const AGENTS: &str = "aops-agents";

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
    /// `root` should be absolute: it is written into units, links and environments.
    pub fn new(root: impl Into<PathBuf>) -> Home {
        Home { root: root.into() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether it stands where an installation stands by default.
    pub fn is_default(&self) -> bool {
        self.root == default_root()
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
        let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        format!("{program}-{digits}")
    }

    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// The one executable.
    pub fn executable(&self) -> PathBuf {
        self.bin().join(format!("aops{}", std::env::consts::EXE_SUFFIX))
    }

    /// A name in `bin` by which the executable takes a role, such as `aops-spm`.
    pub fn role_link(&self, role: &str) -> PathBuf {
        self.bin().join(format!("{role}{}", std::env::consts::EXE_SUFFIX))
    }

    /// `<home>/control`, where operators of the old system look for it.
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
        self.agent(name).join("current")
    }

    /// What is being unpacked; swept at start.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// A file of machine-written state, such as `desired.json`.
    pub fn state_file(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// A file in `run`: a lock, a process record, a socket.
    pub fn run_file(&self, name: &str) -> PathBuf {
        self.run().join(name)
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
