//! The watchdog: supervises the manager.
//!
//! It is tiny: no async runtime, no TLS, no network. It holds the control connection to the manager, whose end is the manager's death, and
//! sends pings over it to detect a hang. A dead manager is restarted by the service manager; without one, or if it does not, by the
//! watchdog. The watchdog honours a stop, whether it is recorded, announced by the manager or made at the unit: it stops the remaining
//! sub-agents and exits.

mod one_shot;
mod session;
mod starting;
mod trial;

use std::io::BufReader;
use std::process::{Command, ExitCode};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::starting::StartedManagers;
use self::trial::{TrialAction, TrialMonitor};
use crate::config::Config;
use crate::control_socket::{self, ControlClient, ControlMessage, Goodbye, Request};
use crate::core::role::Role;
use crate::core::service_manager::{Notification, ServiceManagerKind};
use crate::core::watch::memory::{self, MemoryCheck};
use crate::core::watch::restarter::{Loss, Restarter, RestarterAction, RestarterPolicy, RoleObservation};
use crate::core::watch::silence::{PING, PingAction, Pings};
use crate::home::Home;
use crate::installation::{keyring, permissions, temporaries};
use crate::platform::{self, LocalConnection};
use crate::role::{self, RoleHolder, STOPPED_ON_PURPOSE};
use crate::{host_service, logging, process};

/// Interval for checking the home and reloading the settings; done with a ping.
const HOME_CHECK_INTERVAL: Duration = Duration::from_secs(60);
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(10);

/// How the watchdog is started.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WatchdogOptions {
    /// The service manager that starts it; set by the unit
    #[arg(long, hide = true, value_name = "KIND", default_value = "none")]
    service: ServiceManagerKind,
    /// Passed when a running watchdog replaces itself with another program
    #[arg(long, hide = true)]
    renewed: bool,
    /// Send one heartbeat; succeed if the gateway answers
    #[arg(long, hide = true, group = "one_shot")]
    probe: bool,
    /// Check that this program can run as the watchdog
    #[arg(long, hide = true, group = "one_shot")]
    prove: bool,
    /// Start the watchdog if the role that started this exits and no watchdog runs
    #[arg(long, hide = true, group = "one_shot")]
    sentinel: bool,
}

/// Runs the watchdog until it is stopped.
pub fn main(home: &Home, options: &WatchdogOptions) -> Result<ExitCode> {
    match options {
        WatchdogOptions { probe: true, .. } => return one_shot::probe(home),
        WatchdogOptions { prove: true, .. } => return one_shot::prove(home),
        WatchdogOptions { sentinel: true, .. } => return role::sentinel::main(home),
        _ => {}
    }
    let (role_home, options) = (home.clone(), options.clone());
    host_service::run(options.service, home, Role::Spa, || {}, move || serve(&role_home, &options))
}

fn serve(home: &Home, options: &WatchdogOptions) -> Result<ExitCode> {
    if crate::installation::packaged::is_unenrolled(home) {
        // Nothing to watch: the unit has started and ended.
        platform::notify(Notification::Ready);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    role::require_installation(home)?;
    let restored = role::restore_directories(home);
    logging::to_file(&home.role_log("spa"));
    role::log_restored(&restored);
    role::leave_sub_agent_cgroup(home);
    let supervised = options.service != ServiceManagerKind::None;
    if role::is_stop_recorded(home) && !supervised {
        tracing::info!("the home is stopped; the watchdog does not start until `control start`");
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let _lock = acquire_role(home, supervised)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the watchdog cannot start"))?;
    temporaries::sweep(home);
    let children = StartedManagers::new();
    let now = Instant::now();
    let mut trial = TrialMonitor::new(home, !supervised, options.renewed, now);
    // Before anything can detect this watchdog: a bad release may kill every watchdog that it finds.
    if trial.check(now) == TrialAction::EndManager {
        trial.kill_manager();
    }
    let holder = role::announce(home, Role::Spa)?;
    if role::is_stop_recorded(home) && !supervised {
        // A stop is recorded before the running roles are looked up: either the stop finds this process, or this process finds the record.
        role::record_exit(home, Role::Spa, &holder);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let (sender, events) = mpsc::channel();
    let terminate = sender.clone();
    let requested = sender.clone();
    ctrlc::set_handler(move || drop(terminate.send(WatchdogEvent::Terminate)))
        .context("cannot install the handler of the termination signal")?;
    platform::on_exit_request(move || drop(requested.send(WatchdogEvent::Terminate)))
        .context("cannot wait for a request to exit")?;
    platform::notify(Notification::Ready);
    tracing::info!(pid = std::process::id(), "the watchdog is ready");

    let restarter = Restarter::new(RestarterPolicy::WATCHDOG, supervised, role::is_held(home, Role::Spm), now);
    let mut watchdog = Watchdog {
        home,
        trial,
        holder: &holder,
        service: options.service,
        sender,
        events,
        serial: 0,
        restarter,
        children,
        memory: MemoryCheck::default(),
        memory_limit: u64::MAX,
        next_home_check: now,
    };
    let end = watchdog.run();
    watchdog.trial.stop_sentinel();
    if matches!(end, Ok(WatchdogExit::Replace)) && host_service::can_replace_program(options.service) {
        role::record_exit(home, Role::Spa, &holder);
        return Err(continue_as_another(home, options.service));
    }
    platform::notify(Notification::Stopping);
    match &end {
        Ok(_) => role::record_exit(home, Role::Spa, &holder),
        Err(error) => tracing::error!(error = format!("{error:#}"), "the watchdog exits because of an error"),
    }
    Ok(match end? {
        WatchdogExit::Terminated | WatchdogExit::Replace => ExitCode::SUCCESS,
        WatchdogExit::Stopped => ExitCode::from(STOPPED_ON_PURPOSE),
    })
}

/// Replaces this process with the program that the watchdog's link names now. No other process is needed to start it, and an observer of
/// this process sees no exit. Returns only on failure: then the watchdog exits, and is restarted like any other.
fn continue_as_another(home: &Home, service: ServiceManagerKind) -> anyhow::Error {
    let program = home.role_link(Role::Spa.program());
    tracing::info!(program = %program.display(), "the watchdog replaces its program and keeps its pid");
    if let Err(error) = permissions::executable(home, &program) {
        return error.context("the watchdog cannot replace its program");
    }
    let mut command = Command::new(&program);
    command.arg("--home").arg(home.public_path()).arg("--service").arg(service.to_string()).arg("--renewed");
    let error = anyhow::Error::from(platform::become_program(&mut command));
    error.context(format!("the watchdog cannot replace its program with {}", program.display()))
}

/// Acquires the role's lock. A watchdog started by the service manager first ends one that was started otherwise.
fn acquire_role(home: &Home, supervised: bool) -> Result<crate::lock::LockGuard> {
    if supervised
        && role::is_held(home, Role::Spa)
        && let Some(holder) = role::living(home, Role::Spa)
    {
        holder.request_exit()?;
    }
    match role::acquire(home, Role::Spa, TAKE_OVER_TIMEOUT).context("cannot acquire the watchdog's lock")? {
        Some(lock) => Ok(lock),
        None => bail!(
            "cannot run the watchdog of {}: another watchdog is already running; see `control status`",
            home.root().display()
        ),
    }
}

/// What the watchdog waits for.
#[derive(Debug)]
enum WatchdogEvent {
    /// Received on the connection with this number.
    Received(u64, ControlMessage),
    Terminate,
}

/// Why the watchdog exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WatchdogExit {
    /// This process received a termination signal.
    Terminated,
    /// The home is stopped.
    Stopped,
    /// It continues as another program.
    Replace,
}

/// How the supervision of a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionEnd {
    /// The connection ended.
    Lost,
    /// The manager reported that the home is stopped.
    Stopped,
    Terminate,
    Replace,
}

struct Watchdog<'a> {
    home: &'a Home,
    trial: TrialMonitor,
    /// This watchdog's record.
    holder: &'a RoleHolder,
    /// The service manager that starts the roles.
    service: ServiceManagerKind,
    sender: mpsc::Sender<WatchdogEvent>,
    events: mpsc::Receiver<WatchdogEvent>,
    /// Numbers the connections, so that messages of an earlier one are ignored.
    serial: u64,
    restarter: Restarter,
    children: StartedManagers,
    /// Memory use of the manager.
    memory: MemoryCheck,
    /// The manager's memory limit, bytes.
    memory_limit: u64,
    /// When the home and the settings are checked next.
    next_home_check: Instant,
}

impl Watchdog<'_> {
    fn run(&mut self) -> Result<WatchdogExit> {
        loop {
            let connection = match self.find_manager()? {
                ManagerSearch::Manager(connection) => connection,
                ManagerSearch::Stop => return self.honour_stop(),
                ManagerSearch::Terminate => return Ok(WatchdogExit::Terminated),
                ManagerSearch::Replace => return Ok(WatchdogExit::Replace),
            };
            self.restarter.connected(Instant::now());
            match self.watch(connection)? {
                ConnectionEnd::Lost => {
                    let how = self.restarter.lost(Instant::now());
                    self.trial.disconnected(how == Some(Loss::Died));
                    match how {
                        None | Some(Loss::NeverAnswered) => {}
                        Some(how) => tracing::info!(how = format!("{how:?}"), "the manager disconnected"),
                    }
                }
                ConnectionEnd::Replace => return Ok(WatchdogExit::Replace),
                ConnectionEnd::Stopped => {
                    tracing::info!("the manager has stopped the home and disconnected");
                    return self.honour_stop();
                }
                ConnectionEnd::Terminate => {
                    tracing::info!("received a signal to exit; the manager keeps running");
                    return Ok(WatchdogExit::Terminated);
                }
            }
        }
    }

    /// Waits until it can connect to a manager, and restarts a dead one.
    fn find_manager(&mut self) -> Result<ManagerSearch> {
        loop {
            // First, because it may change which program is started next.
            match with_keepalive(|| self.trial.check(Instant::now())) {
                TrialAction::Nothing | TrialAction::Heartbeat => {}
                TrialAction::EndManager => self.request_manager_exit(),
                TrialAction::Replace => return Ok(ManagerSearch::Replace),
            }
            if self.trial.has_restored() {
                self.restarter.program_replaced(Instant::now());
                self.children.kill_replaced(self.home);
            }
            if let Some(connection) = self.connect() {
                return Ok(ManagerSearch::Manager(connection));
            }
            let action = self.restarter.poll(self.seen(), Instant::now());
            if let Some(found) = self.carry_out(action) {
                return Ok(found);
            }
            let exited_unanswered = self.children.reap(self.home, Instant::now());
            if exited_unanswered && !role::is_held(self.home, Role::Spm) {
                self.trial.exited_unanswered();
            }
            platform::notify(Notification::Alive);
            let due = self.restarter.deadline().min(self.trial.due());
            let pause = due.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(pause) {
                Ok(WatchdogEvent::Terminate) => return Ok(ManagerSearch::Terminate),
                Ok(WatchdogEvent::Received(..)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
            }
        }
    }

    fn seen(&self) -> RoleObservation {
        RoleObservation { taken: role::is_held(self.home, Role::Spm), stop_recorded: role::is_stop_recorded(self.home) }
    }

    fn carry_out(&mut self, action: Option<RestarterAction>) -> Option<ManagerSearch> {
        match action? {
            RestarterAction::QueryUnit => return self.query_unit(),
            RestarterAction::StartUnit => {
                tracing::warn!("the manager is not running; starting its unit");
                if let Err(error) = with_keepalive(|| host_service::start(self.service, self.home, &[Role::Spm])) {
                    tracing::error!(error = format!("{error:#}"), "cannot start the manager's unit");
                }
                self.restarter.unit_start_ended(Instant::now());
            }
            RestarterAction::Start { failures } => {
                tracing::warn!(failures, "the manager is not running; starting it");
                if let Err(error) = self.children.start(self.home) {
                    tracing::error!(error = format!("{error:#}"), "cannot start the manager; the start is retried");
                }
            }
            RestarterAction::KillHung => self.kill_hung(),
            RestarterAction::FollowStop => return Some(ManagerSearch::Stop),
            // Belongs to the manager's policy.
            RestarterAction::LeaveStopped => {}
        }
        None
    }

    /// Queries the service manager for the state of the manager's unit, and acts on it.
    fn query_unit(&mut self) -> Option<ManagerSearch> {
        let answer = host_service::standing(self.service, self.home, Role::Spm).inspect_err(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot query the service manager for the state of the manager's unit"
            );
        });
        let action = self.restarter.unit_answered(answer.ok(), self.seen(), Instant::now());
        if action == Some(RestarterAction::FollowStop) {
            // The stop is recorded by `honour_stop`.
            tracing::info!("the manager's unit was stopped; the sub-agents are stopped too");
        }
        self.carry_out(action)
    }

    fn connect(&mut self) -> Option<LocalConnection> {
        let mut client = match ControlClient::open(self.home, PING) {
            Ok(client) => client?,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "cannot connect to the manager");
                return None;
            }
        };
        client.send(&Request::Hello { role: Role::Spa, pid: std::process::id() }).ok()?;
        let (writer, reader) = client.split().ok()?;
        self.serial += 1;
        let (serial, sender) = (self.serial, self.sender.clone());
        std::thread::Builder::new()
            .name("receive".to_owned())
            .stack_size(256 << 10)
            .spawn(move || listen(serial, reader, &sender))
            .ok()?;
        Some(writer)
    }

    /// Supervises the manager until the connection ends.
    fn watch(&mut self, mut connection: LocalConnection) -> Result<ConnectionEnd> {
        let mut pings = Pings::new(Instant::now());
        if self.trial.is_in_progress() {
            self.trial.connected(Instant::now());
            // An error shows as the end of the connection.
            let _ = control_socket::send(&mut connection, &Request::Status);
        }
        loop {
            let due = pings.due().min(self.trial.due());
            match self.events.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(WatchdogEvent::Terminate) => {
                    platform::shut_down(&connection);
                    return Ok(ConnectionEnd::Terminate);
                }
                Ok(WatchdogEvent::Received(serial, message)) if serial == self.serial => match message {
                    ControlMessage::Reply(reply) => {
                        pings.answered();
                        if let Some(status) = &reply.status {
                            self.trial.status_received(status, Instant::now());
                        }
                        self.children.answered(self.home);
                        if self.restarter.received(Instant::now()) {
                            tracing::info!("the manager answers and is supervised");
                        }
                    }
                    ControlMessage::Goodbye(Goodbye::Stop) => return Ok(ConnectionEnd::Stopped),
                    ControlMessage::Goodbye(Goodbye::Yield) => self.restarter.will_yield(),
                    ControlMessage::Timeout => {}
                    ControlMessage::Closed => return Ok(ConnectionEnd::Lost),
                },
                Ok(WatchdogEvent::Received(..)) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(watched) = self.supervise_upgrade(&mut connection) {
                        return Ok(watched);
                    }
                    let next = pings.poll(Instant::now());
                    if next == PingAction::Wait {
                        continue;
                    }
                    platform::notify(Notification::Alive);
                    self.children.reap(self.home, Instant::now());
                    if Instant::now() >= self.next_home_check {
                        self.next_home_check = Instant::now() + HOME_CHECK_INTERVAL;
                        self.check_home();
                    }
                    process::hold_groups(self.home);
                    self.check_memory(&mut connection);
                    if next == PingAction::Hung {
                        self.kill_hung();
                    }
                    // An error shows as the end of the connection.
                    let _ = control_socket::send(&mut connection, &Request::Ping);
                }
            }
        }
    }

    /// Supervises an upgrade of the connected manager.
    fn supervise_upgrade(&mut self, connection: &mut LocalConnection) -> Option<ConnectionEnd> {
        if Instant::now() < self.trial.due() {
            return None;
        }
        // An error shows as the end of the connection.
        match with_keepalive(|| self.trial.check(Instant::now())) {
            TrialAction::Nothing => {}
            TrialAction::EndManager => drop(control_socket::send(connection, &Request::Yield)),
            TrialAction::Heartbeat => drop(control_socket::send(connection, &Request::Heartbeat)),
            TrialAction::Replace => {
                platform::shut_down(connection);
                return Some(ConnectionEnd::Replace);
            }
        }
        if self.trial.is_in_progress() {
            let _ = control_socket::send(connection, &Request::Status);
        }
        None
    }

    fn request_manager_exit(&self) {
        let Some(holder) = role::current_holder(self.home, Role::Spm) else { return };
        if let Err(error) = holder.request_exit() {
            tracing::error!(error = format!("{error:#}"), "cannot request the manager's exit");
        }
    }

    fn kill_hung(&self) {
        let Some(holder) = role::current_holder(self.home, Role::Spm) else { return };
        tracing::error!(pid = holder.pid, "the manager does not respond and is killed");
        if let Err(error) = holder.kill() {
            tracing::error!(error = format!("{error:#}"), "cannot kill the manager");
        }
    }

    /// Restores missing directories, checks the keys, and reloads the manager's memory limit.
    fn check_home(&mut self) {
        role::log_restored(&role::restore_directories(self.home));
        role::retry_announce(self.home, Role::Spa, self.holder);
        match keyring::trusted(self.home) {
            Ok(keys) if keys.is_empty() => {
                tracing::error!("no trusted key is left; no release can be installed until a key is added to etc/keys")
            }
            Ok(_) => {}
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "cannot read the trusted keys; no release can be installed"
            ),
        }
        if let Ok(loaded) = Config::load(self.home) {
            self.memory_limit = loaded.config.spm_max_mem.0;
        }
    }

    /// Restarts a manager that uses too much memory for too long. During an upgrade, the trial's evaluation covers this.
    fn check_memory(&mut self, connection: &mut LocalConnection) {
        if self.trial.is_in_progress() {
            return;
        }
        let used =
            role::living(self.home, Role::Spm).and_then(|holder| platform::memory_bytes(holder.pid)).unwrap_or(0);
        if self.memory.record(used, self.memory_limit, Instant::now())
            && let Some(why) = memory::excess("the manager", used, self.memory_limit, "spmMaxMem")
        {
            tracing::warn!(why, "the manager uses too much memory and is restarted");
            // An error shows as the end of the connection.
            let _ = control_socket::send(connection, &Request::Renew { why });
        }
    }

    /// Stops the remaining sub-agents, and records the stop if it is not recorded yet.
    fn honour_stop(&mut self) -> Result<WatchdogExit> {
        if let Err(error) = role::record_stop(self.home) {
            tracing::warn!(error = format!("{error:#}"), "cannot record the stop");
        }
        self.stop_sub_agents()?;
        tracing::info!("the home is stopped; the watchdog exits");
        Ok(WatchdogExit::Stopped)
    }

    fn stop_sub_agents(&self) -> Result<()> {
        // Every sub-agent may take its grace period.
        with_keepalive(|| process::stop::stop_all(self.home))
    }
}

/// Runs work that may take longer than the service manager's watchdog timeout, and notifies it meanwhile.
fn with_keepalive<T>(work: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (done, working) = mpsc::channel::<()>();
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = working.recv_timeout(PING) {
                platform::notify(Notification::Alive);
            }
        });
        let outcome = work();
        drop(done);
        outcome
    })
}

enum ManagerSearch {
    Manager(LocalConnection),
    /// The home is stopped.
    Stop,
    Terminate,
    Replace,
}

/// Receives messages until the connection ends.
fn listen(serial: u64, mut reader: BufReader<LocalConnection>, sender: &mpsc::Sender<WatchdogEvent>) {
    loop {
        let message = control_socket::receive(&mut reader).unwrap_or(ControlMessage::Closed);
        let ended = message == ControlMessage::Closed;
        if sender.send(WatchdogEvent::Received(serial, message)).is_err() || ended {
            return;
        }
    }
}
