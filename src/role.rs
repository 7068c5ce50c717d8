//! The common base of the two resident roles: at most one process each, known by its record; and the recorded stop of a home.
//!
//! `run/<role>.lock` excludes a second process. `run/<role>.json` identifies the process, so that it can be shown, queried or stopped.
//! `state/stopped.json` is the recorded intent of a stop: while it exists, neither role restarts the other.

pub mod sentinel;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::core::manifest::StopSignal;
use crate::core::model::Digest;
use crate::core::role::Role;
use crate::core::status::RoleStatus;
use crate::home::Home;
use crate::installation::upgrade::Programs;
use crate::installation::{self, executable, permissions};
use crate::lock::{self, LockGuard};
use crate::{platform, process, store};

/// Exit code of a role that was stopped on purpose; the service manager's unit does not restart the role after it.
pub const STOPPED_ON_PURPOSE: u8 = 100;

/// A role that does not exit within this time after a request is killed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(15);
/// Interval for polling a role that is exiting.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Fails if nothing is installed, with a clear message instead of the first missing file.
pub fn require_installation(home: &Home) -> Result<()> {
    if !installation::exists(home) {
        bail!(
            "nothing is installed in {}; install with `aops install`, which also starts the roles",
            home.root().display()
        );
    }
    Ok(())
}

/// Variables of the caller's environment that a role keeps in addition to the base environment: how to reach the gateway, and which
/// certificates to trust.
const KEPT_VARIABLES: &[&str] = &[
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// Starts a role by its name in `bin`, detached from the caller: a role started from within a sub-agent, a unit or a login session is not
/// part of it. Of the environment only [`KEPT_VARIABLES`] are kept.
///
/// An executable that other users can change is not started.
pub fn spawn(home: &Home, role: Role) -> Result<Child> {
    let (program, subcommand) = home.role_program(role);
    executable::complete_replacements(home);
    permissions::executable(home, &program).with_context(|| format!("cannot start {}", program.display()))?;
    let mut command = Command::new(&program);
    command
        .args(subcommand)
        .arg("--home")
        .arg(home.public_path())
        .current_dir("/")
        .env_clear()
        .envs(platform::base_environment(None))
        .envs(KEPT_VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    platform::detach_from_caller(&mut command);
    platform::spawn_outside_groups(&mut command, &home.agents_unit())
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Acquires the role until the value is dropped; `None`: another process holds it and did not release it within `deadline`.
pub fn acquire(home: &Home, role: Role, deadline: Duration) -> Result<Option<LockGuard>> {
    lock::take_on_read_only_disk(&home.role_lock(role.name()), deadline)
}

/// Whether a process holds the role now.
pub fn is_held(home: &Home, role: Role) -> bool {
    lock::is_held(&home.role_lock(role.name()))
}

/// The process that holds a role, or held it last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleHolder {
    pub pid: u32,
    pub start_time: u64,
    pub boot_id: String,
    /// Number of unrequested exits since the last start on purpose.
    pub restarts: u64,
    /// It exited orderly.
    pub ended: bool,
    /// The program that it runs, where the system does not tell it reliably.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<Digest>,
}

impl RoleHolder {
    pub fn is_alive(&self) -> bool {
        self.boot_id == platform::boot_id() && platform::is_alive(self.pid, self.start_time)
    }

    pub fn status(&self) -> RoleStatus {
        RoleStatus {
            pid: Some(self.pid),
            uptime_seconds: platform::age(self.start_time).map(|age| age.as_secs()),
            memory_bytes: platform::memory_bytes(self.pid),
            restarts: self.restarts,
        }
    }

    /// Asks the process to exit orderly: a manager leaves its sub-agents running.
    pub fn request_exit(&self) -> Result<()> {
        if self.is_alive() {
            platform::signal(self.pid, self.start_time, StopSignal::Term)
                .with_context(|| format!("cannot send a termination signal to process {}", self.pid))?;
        }
        Ok(())
    }

    /// Waits for the process to exit after a request, and kills it after a timeout; returns whether it was killed.
    pub fn wait_for_exit(&self) -> Result<bool> {
        let (mut deadline, mut killed) = (Instant::now() + EXIT_TIMEOUT, false);
        while self.is_alive() {
            if Instant::now() >= deadline {
                if killed {
                    bail!("cannot stop process {}: it is still running {EXIT_TIMEOUT:?} after it was killed", self.pid);
                }
                self.kill()?;
                (deadline, killed) = (Instant::now() + EXIT_TIMEOUT, true);
            }
            platform::pause(POLL_INTERVAL);
        }
        Ok(killed)
    }

    /// Kills the process, but never a different process that reuses its pid.
    pub fn kill(&self) -> Result<()> {
        if self.is_alive() {
            platform::signal(self.pid, self.start_time, StopSignal::Kill)
                .with_context(|| format!("cannot kill process {}", self.pid))?;
        }
        Ok(())
    }
}

fn record(home: &Home, role: Role) -> std::path::PathBuf {
    home.role_record(role.name())
}

/// The process that holds the role, or held it last; `None` if the record cannot be read.
pub fn recorded_holder(home: &Home, role: Role) -> Option<RoleHolder> {
    store::load(&record(home, role)).ok().flatten()
}

/// The process that holds the role, if it is alive.
pub fn living(home: &Home, role: Role) -> Option<RoleHolder> {
    recorded_holder(home, role).filter(RoleHolder::is_alive)
}

/// The process that holds a role now: from its record, or else from the lock, if it could not write its record.
pub fn current_holder(home: &Home, role: Role) -> Option<RoleHolder> {
    let by_lock = || {
        let pid = platform::lock_holder(&home.role_lock(role.name()))?;
        let start_time = platform::start_time(pid)?;
        Some(RoleHolder {
            pid,
            start_time,
            boot_id: platform::boot_id().to_owned(),
            restarts: 0,
            ended: false,
            program: None,
        })
    };
    living(home, role).or_else(|| is_held(home, role).then(by_lock).flatten())
}

/// Creates the missing directories of a safe home; returns them.
pub fn restore_directories(home: &Home) -> Result<Vec<PathBuf>> {
    permissions::home(home)?;
    executable::complete_replacements(home);
    let missing = home.directories().into_iter().filter(|(directory, _)| !directory.exists());
    let mut created = Vec::new();
    for (directory, mode) in missing {
        std::fs::create_dir_all(&directory)
            .and_then(|()| platform::set_mode(&directory, mode))
            .with_context(|| format!("cannot create {}", directory.display()))?;
        created.push(directory);
    }
    if !created.is_empty() {
        platform::sync_directory(home.root()).with_context(|| format!("cannot sync {}", home.root().display()))?;
    }
    Ok(created)
}

/// Leaves the cgroup of the sub-agent from which the role was started, if any: the role must survive the sub-agent.
pub fn leave_sub_agent_cgroup(home: &Home) {
    match process::groups(home).map_or(Ok(false), |groups| groups.leave()) {
        Ok(false) => {}
        Ok(true) => {
            tracing::info!("this process was started from within a sub-agent and has left that sub-agent's cgroup")
        }
        Err(error) => {
            tracing::error!(error = %error, "cannot leave the cgroup of the sub-agent from which this process was started; it is killed when the sub-agent stops")
        }
    }
}

/// Logs the result of [`restore_directories`].
pub fn log_restored(restored: &Result<Vec<PathBuf>>) {
    match restored {
        Ok(created) => {
            for directory in created {
                tracing::error!(directory = %directory.display(), "a directory of the home was missing and was created");
            }
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "cannot create missing directories of the home")
        }
    }
}

/// Records that this process has the role; counts a restart if its predecessor in this boot did not exit orderly.
///
/// The record is of this boot, so it is not synced. If it cannot be written, as on a full disk, the role starts nevertheless: no manager
/// would be worse. [`retry_announce`] retries it.
pub fn announce(home: &Home, role: Role) -> Result<RoleHolder> {
    let boot_id = platform::boot_id().to_owned();
    let restarts = match recorded_holder(home, role) {
        Some(last) if last.boot_id == boot_id => last.restarts + u64::from(!last.ended),
        _ => 0,
    };
    let pid = std::process::id();
    let start_time = platform::start_time(pid).context("cannot read the start time of this process")?;
    let program = if platform::LINKS_FOLLOW { None } else { Programs::default().of_process(pid, None) };
    let holder = RoleHolder { pid, start_time, boot_id, restarts, ended: false, program };
    if let Err(error) = store::save_unsynced(&record(home, role), &holder) {
        tracing::error!(
            error = format!("{error:#}"),
            "cannot record that this process has the role; the role starts, and the write is retried"
        );
    }
    Ok(holder)
}

/// Retries a failed [`announce`].
pub fn retry_announce(home: &Home, role: Role, own: &RoleHolder) {
    if recorded_holder(home, role).as_ref() != Some(own) && store::save_unsynced(&record(home, role), own).is_ok() {
        tracing::info!("the record of this process, which could not be written before, is written now");
    }
}

/// Records that this process gives up its role orderly.
pub fn record_exit(home: &Home, role: Role, holder: &RoleHolder) {
    let last = RoleHolder { ended: true, ..holder.clone() };
    if let Err(error) = store::save_unsynced(&record(home, role), &last) {
        tracing::warn!(
            error = format!("{error:#}"),
            "cannot record that the role exits as intended; its next start will count as a restart after a failure"
        );
    }
}

/// Resets the count of restarts, for a start on purpose.
pub fn reset_restarts(home: &Home, role: Role) -> Result<()> {
    store::remove(&record(home, role))
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StopIntent {
    since_unix_seconds: u64,
}

/// Records that the home is stopped.
pub fn record_stop(home: &Home) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    store::save(&home.stop_intent(), &StopIntent { since_unix_seconds: now.as_secs() })
}

/// Whether the home was stopped and not started since. A record that cannot be read counts as a stop.
pub fn is_stop_recorded(home: &Home) -> bool {
    home.stop_intent().exists()
}

/// Removes the record of a stop.
pub fn clear_stop(home: &Home) -> Result<()> {
    store::remove(&home.stop_intent())
}
