//! Where a host under measurement runs: in a temporary directory without a service manager, or in a container under systemd. Its processes,
//! and what they have spent, as seen from this process.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use super::super::probe::family;
use super::super::spent::Spent;
use crate::command::read;
use crate::container::Container;
use crate::fleet::Fleet;
use crate::processes;

/// Where the container has the executable, the gateway and the home.
pub(super) const PROGRAM: &str = "/tmp/aops";
pub(super) const DEPOT: &str = "/tmp/gateway";
pub(super) const GATEWAY_LOG: &str = "/tmp/gateway.log";
pub(super) const HOME: &str = "/opt/aops";

#[derive(Clone, Copy)]
pub(super) enum Location<'a> {
    Alone(&'a Fleet),
    Systemd(&'a Container),
}

impl Location<'_> {
    pub(super) fn home(&self) -> PathBuf {
        match self {
            Location::Alone(fleet) => fleet.home(),
            Location::Systemd(container) => container.path(HOME),
        }
    }

    pub(super) fn depot(&self) -> PathBuf {
        match self {
            Location::Alone(fleet) => fleet.depot(),
            Location::Systemd(container) => container.path(DEPOT),
        }
    }

    pub(super) fn gateway_log(&self) -> PathBuf {
        match self {
            Location::Alone(fleet) => fleet.path("gateway.log"),
            Location::Systemd(container) => container.path(GATEWAY_LOG),
        }
    }

    /// Where sub-agents report their starts, seen from them and seen from here.
    pub(super) fn reports(&self) -> (PathBuf, PathBuf) {
        match self {
            Location::Alone(fleet) => (fleet.path("reports"), fleet.path("reports")),
            Location::Systemd(container) => ("/tmp/reports".into(), container.path("/tmp/reports")),
        }
    }

    /// What everything on the host has spent, without sub-agents and the gateway. Without a service manager these are the roles and what they
    /// started, once the watchdog has started the manager; under systemd the container's init and all that it started.
    pub(super) fn spent(&self, watchdog: u32) -> Spent {
        let root = match self {
            Location::Alone(_) => watchdog,
            Location::Systemd(container) => container.leader(),
        };
        let is_counted = |pid: &u32| {
            !processes::environment(*pid).iter().any(|variable| variable.starts_with("AOPS_AGENT_NAME="))
                && processes::words(*pid, "cmdline").get(1).is_none_or(|word| word != "gateway")
        };
        Spent::of(&family(root).into_iter().filter(is_counted).collect::<Vec<_>>())
    }

    /// Installs the floor as a unit, which runs one program that reports its start.
    pub(super) fn install_floor(&self, floor: &std::path::Path, sleeper: &std::path::Path) -> Result<()> {
        let Location::Systemd(container) = self else { return Ok(()) };
        container.copy_in(floor, FLOOR, 0o755);
        container.copy_in(sleeper, SLEEPER, 0o755);
        let (socket, _) = self.reports();
        let unit = format!("[Service]\nExecStart={FLOOR} 1 {SLEEPER} {}\n", socket.display());
        container.write("/etc/systemd/system/floor.service", unit, 0o644);
        container.shell("systemctl daemon-reload; systemctl start floor").expect_success();
        Ok(())
    }

    /// A command that runs `systemctl` in the container, without a unit for it.
    pub(super) fn systemctl(&self, arguments: &[&str]) -> Result<()> {
        let Location::Systemd(container) = self else { return Ok(()) };
        let mut command = Command::new("nsenter");
        let leader = container.leader().to_string();
        command.args(["-t", &leader, "-m", "-u", "-i", "-n", "-p", "-C", "--", "env", "-i"]);
        command.args(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "systemctl"]).args(arguments);
        let said = read(&mut command)?;
        ensure!(said.is_empty(), "systemctl {} printed: {said}", arguments.join(" "));
        Ok(())
    }
}

/// The floor and its program in the container.
const FLOOR: &str = "/tmp/floor";
const SLEEPER: &str = "/tmp/sleeper";
/// The name by which the floor's only program reports.
pub(super) const FLOOR_PROGRAM: &str = "0";
