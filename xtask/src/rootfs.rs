//! The root file system of the test containers: a minimal Debian 12 with systemd, created once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::command::{run_quietly, say, text};
use crate::{apt, workspace};

/// Debian 12.
pub(crate) const SUITE: &str = "bookworm";
/// In addition to the essential packages: a service manager, and what scenarios use (networks, faults, the old platform's curl).
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,procps,nftables,curl,ca-certificates";

/// Its directory, created if it does not exist. Needs root.
pub(crate) fn get() -> Result<PathBuf> {
    workspace::cached(&format!("rootfs-{SUITE}"), |unfinished| {
        let mirror = apt::mirror()?;
        say("creating the root file system of the test containers (once; 300 MB, about two minutes)");
        run_quietly(
            Command::new("debootstrap")
                .args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
                .args([text(unfinished), mirror]),
        )?;
        for dispensable in ["var/cache/apt", "var/lib/apt/lists"] {
            workspace::remove(&unfinished.join(dispensable))?;
        }
        Ok(())
    })
}
