//! The root file systems of the test containers and virtual machines: a minimal Debian with systemd, each created once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::command::{run_quietly, say, text};
use crate::{apt, workspace};

/// The suite of the test containers.
pub(crate) const SUITE: &str = Suite::Bookworm.name();
/// In addition to the essential packages: a service manager, and what scenarios use (networks, faults, the old platform's curl).
const PACKAGES: &str = "systemd,systemd-sysv,dbus,libkmod2,iproute2,procps,nftables,curl,ca-certificates";

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// Debian 11: Linux 5.10, systemd 247
    Bullseye,
    /// Debian 12: Linux 6.1, systemd 252
    Bookworm,
    /// Debian 13: Linux 6.12, systemd 257
    Trixie,
}

impl Suite {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Suite::Bullseye => "bullseye",
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
        }
    }
}

/// The directory of the containers' root file system, created if it does not exist. Needs root.
pub(crate) fn get() -> Result<PathBuf> {
    of(Suite::Bookworm)
}

/// The directory of the root file system of a suite, created if it does not exist. Needs root.
pub(crate) fn of(suite: Suite) -> Result<PathBuf> {
    let suite = suite.name();
    workspace::cached(&format!("rootfs-{suite}"), |unfinished| {
        let mirror = apt::mirror()?;
        say(&format!("creating a root file system of the suite {suite} (once; 300 MB, about two minutes)"));
        run_quietly(
            Command::new("debootstrap")
                .args(["--variant=minbase", &format!("--include={PACKAGES}"), suite])
                .args([text(unfinished), mirror]),
        )?;
        for dispensable in ["var/cache/apt", "var/lib/apt/lists"] {
            workspace::remove(&unfinished.join(dispensable))?;
        }
        Ok(())
    })
}
