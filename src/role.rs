//! What the two resident roles share: one of each, known by its record; and whether they were told to stop.
//!
//! `run/<role>.lock` excludes a second one. `run/<role>.json` says who it is, so that anyone can see it, ask after it or end it.
//! `state/stopped.json` is the recorded intent of a stop: while it is there, no role revives another.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::core::manifest::StopSignal;
use crate::core::role::Role;
use crate::core::status::RoleStatus;
use crate::home::Home;
use crate::installation::{self, permissions};
use crate::lock::{self, LockGuard};
use crate::{platform, process, store};

/// The exit code of a role that was stopped on purpose: the service manager's unit does not restart it for this one.
pub const STOPPED_ON_PURPOSE: u8 = 100;

/// A role ends within this once it was told to; then it is killed.
const ENDS: Duration = Duration::from_secs(15);
/// Between two looks at one that is to end.
const LOOK: Duration = Duration::from_millis(20);

/// Refuses to run a role where nothing is installed: it would fail at the first file that it needs, and not say why.
pub fn demand_home(home: &Home) -> Result<()> {
    if !installation::exists(home) {
        bail!(
            "nothing is installed in {}; install with `aops install`, which also starts the roles",
            home.root().display()
        );
    }
    Ok(())
}

/// What of the caller's environment a role keeps, besides what any program expects: how the gateway is reached, and whom to trust there.
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

/// Starts a role by its name in `bin`, to live on without us: it leaves whoever started it, and of the environment it keeps [`KEPT_VARIABLES`].
/// So who runs `aops` from within a sub-agent, a unit or a login does not make the roles a part of it.
///
/// An executable that somebody else can change is not started.
pub fn spawn(home: &Home, role: Role) -> Result<Child> {
    let program = home.role_link(role.program());
    permissions::executable(home, &program).with_context(|| format!("cannot start {}", program.display()))?;
    let mut command = Command::new(&program);
    command
        .arg("--home")
        .arg(home.known_as())
        .current_dir("/")
        .env_clear()
        .envs(platform::base_environment(None))
        .envs(KEPT_VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    platform::detach_from_caller(&mut command);
    platform::leave_groups(&mut command, &home.agents_unit());
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

/// Takes the role for as long as the value lives; `None`: another process has it and did not give it up within `deadline`.
pub fn take(home: &Home, role: Role, deadline: Duration) -> Result<Option<LockGuard>> {
    lock::take_on_any_disk(&home.role_lock(role.name()), deadline)
}

/// Whether some process has the role now.
pub fn is_taken(home: &Home, role: Role) -> bool {
    lock::is_held(&home.role_lock(role.name()))
}

/// Who has a role, or had it last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleHolder {
    pub pid: u32,
    pub start_time: u64,
    pub boot_id: String,
    /// Times that it ended without being asked to, since it was last started on purpose.
    pub restarts: u64,
    /// It ended in order.
    pub ended: bool,
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

    /// Asks it to end in order: a manager leaves its sub-agents running.
    pub fn ask_to_end(&self) -> Result<()> {
        if self.is_alive() {
            platform::signal(self.pid, self.start_time, StopSignal::Term)
                .with_context(|| format!("cannot end process {}", self.pid))?;
        }
        Ok(())
    }

    /// Waits for it to end, which it was told to, and kills it if it does not; whether it had to be killed.
    pub fn await_end(&self) -> Result<bool> {
        let (mut deadline, mut killed) = (Instant::now() + ENDS, false);
        while self.is_alive() {
            if Instant::now() >= deadline {
                if killed {
                    bail!("cannot end process {}: it is still there {ENDS:?} after it was killed", self.pid);
                }
                self.kill()?;
                (deadline, killed) = (Instant::now() + ENDS, true);
            }
            platform::pause(LOOK);
        }
        Ok(killed)
    }

    /// Kills it, whatever it is doing. Nothing happens to another process that has its number now.
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

/// Who has the role, or had it last. An unreadable record says nothing.
pub fn holder(home: &Home, role: Role) -> Option<RoleHolder> {
    store::load(&record(home, role)).ok().flatten()
}

/// Who has the role and is alive.
pub fn living(home: &Home, role: Role) -> Option<RoleHolder> {
    holder(home, role).filter(RoleHolder::is_alive)
}

/// Who has a role now: as its record says, else by the lock, for one that could not record it, or does not.
pub fn who_has(home: &Home, role: Role) -> Option<RoleHolder> {
    let by_lock = || {
        let pid = platform::lock_holder(&home.role_lock(role.name()))?;
        let start_time = platform::start_time(pid)?;
        Some(RoleHolder { pid, start_time, boot_id: platform::boot_id().to_owned(), restarts: 0, ended: false })
    };
    living(home, role).or_else(|| is_taken(home, role).then(by_lock).flatten())
}

/// Makes the directories of the home that are missing, where nobody else could lead them elsewhere; answers which.
pub fn restore_directories(home: &Home) -> Result<Vec<PathBuf>> {
    permissions::home(home)?;
    let missing = home.directories().into_iter().filter(|(directory, _)| !directory.exists());
    let mut made = Vec::new();
    for (directory, mode) in missing {
        std::fs::create_dir_all(&directory)
            .and_then(|()| platform::set_mode(&directory, mode))
            .with_context(|| format!("cannot make {}", directory.display()))?;
        made.push(directory);
    }
    Ok(made)
}

/// Leaves the group of the sub-agent from within which the role was started, if it was: it is to outlive it.
pub fn leave_sub_agent(home: &Home) {
    match process::groups(home).map_or(Ok(false), |groups| groups.leave()) {
        Ok(false) => {}
        Ok(true) => tracing::info!("the role was started by a sub-agent, and is no part of it"),
        Err(error) => {
            tracing::error!(error = %error, "the role was started by a sub-agent, and ends with it: its group cannot be left")
        }
    }
}

/// Logs what [`restore_directories`] did.
pub fn tell_of_restored(restored: &Result<Vec<PathBuf>>) {
    match restored {
        Ok(made) => {
            for directory in made {
                tracing::error!(directory = %directory.display(), "a directory of the home was missing and is made again");
            }
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "directories of the home that are missing are not made again")
        }
    }
}

/// Says that this very process has the role now; counts a restart if its predecessor ended out of order in this boot.
///
/// Where that cannot be written, as on a full disk, the role is taken all the same: to be without a manager would be worse. It is left to
/// [`announce_again`].
pub fn announce(home: &Home, role: Role) -> Result<RoleHolder> {
    let boot_id = platform::boot_id().to_owned();
    let restarts = match holder(home, role) {
        Some(last) if last.boot_id == boot_id => last.restarts + u64::from(!last.ended),
        _ => 0,
    };
    let pid = std::process::id();
    let start_time = platform::start_time(pid).context("cannot read the own process's start time")?;
    let holder = RoleHolder { pid, start_time, boot_id, restarts, ended: false };
    if let Err(error) = store::save(&record(home, role), &holder) {
        tracing::error!(
            error = format!("{error:#}"),
            "the role cannot be recorded; it is taken, and that is tried again"
        );
    }
    Ok(holder)
}

/// Says it once more where it could not be said at first.
pub fn announce_again(home: &Home, role: Role, own: &RoleHolder) {
    if holder(home, role).as_ref() != Some(own) && store::save(&record(home, role), own).is_ok() {
        tracing::info!("the role is recorded now");
    }
}

/// Says that this process gives its role up in order.
pub fn take_leave(home: &Home, role: Role, holder: &RoleHolder) {
    let last = RoleHolder { ended: true, ..holder.clone() };
    if let Err(error) = store::save(&record(home, role), &last) {
        tracing::warn!(
            error = format!("{error:#}"),
            "the end of the role cannot be recorded; it will count as a restart"
        );
    }
}

/// Begins the count of restarts anew: it is started on purpose.
pub fn forget(home: &Home, role: Role) -> Result<()> {
    store::remove(&record(home, role))
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StopIntent {
    since_unix_seconds: u64,
}

/// Records that the home was told to stop.
pub fn record_stop(home: &Home) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    store::save(&home.stop_intent(), &StopIntent { since_unix_seconds: now.as_secs() })
}

/// Whether the home was told to stop, and not to start since. What cannot be read is taken for a stop that was recorded.
pub fn is_stop_recorded(home: &Home) -> bool {
    home.stop_intent().exists()
}

/// Forgets a recorded stop.
pub fn clear_stop(home: &Home) -> Result<()> {
    store::remove(&home.stop_intent())
}
