//! The host's service manager: registers the two roles of a home, starts and stops them, and tells what it knows of them.
//!
//! It knows systemd, and the absence of any. Where there is none, the manager is started in a session of its own and keeps the rest.
//! Whether a home is registered is in its `state/install.json`; what is here acts on the service manager that it is told.

use std::fs::OpenOptions;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::home::Home;
use crate::platform;

pub mod product;
pub mod systemd;

pub use systemd::{UnitState, register, restart, start, state, stop, unregister};

/// A service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Systemd,
    None,
}

impl Kind {
    /// The word in `install.json`, and for `--service` of a role.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Systemd => "systemd",
            Kind::None => "none",
        }
    }
}

/// A resident role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Spm,
    Spa,
}

impl Role {
    pub const BOTH: &'static [Role] = &[Role::Spm, Role::Spa];

    /// The role's link in `bin`, and its unit in the default home.
    pub fn program(self) -> &'static str {
        match self {
            Role::Spm => "aops-spm",
            Role::Spa => "aops-spa",
        }
    }
}

/// The service manager that runs on this host.
pub fn detect() -> Kind {
    if systemd::runs() { Kind::Systemd } else { Kind::None }
}

/// The name of a role's unit: that of the program in the default home, with 8 hexadecimal digits of the home's path in any other.
pub fn unit_name(home: &Home, role: Role) -> String {
    if home.root() == product::default_home() {
        return role.program().to_owned();
    }
    let digest = Sha256::digest(home.root().as_os_str().as_encoded_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{digits}", role.program())
}

/// Starts the manager of a home where no service manager does: in a session of its own, which outlives whoever asked for it. What it
/// says before its log is open, or when it panics, goes to that log.
pub fn start_without_manager(home: &Home) -> Result<Child> {
    let program = home.role_link(Role::Spm.program());
    let attempt = || -> Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(home.role_log("spm"))?;
        let mut command = Command::new(&program);
        command.arg("--home").arg(home.root()).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        platform::detach(&mut command);
        Ok(command.spawn()?)
    };
    attempt().with_context(|| format!("cannot start {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_default_home_has_the_plain_unit_names() {
        let home = Home::new(product::default_home());
        assert_eq!(unit_name(&home, Role::Spm), "aops-spm");
        let other = Home::new("/srv/a home");
        let name = unit_name(&other, Role::Spa);
        assert!(name.starts_with("aops-spa-") && name.len() == "aops-spa-".len() + 8, "{name}");
        assert_ne!(name[9..], unit_name(&Home::new("/srv/b"), Role::Spa)[9..]);
        assert_eq!(name[9..], unit_name(&other, Role::Spm)[9..]);
    }
}
