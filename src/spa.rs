//! The watchdog: keeps the manager alive and honest.
//!
//! It is tiny: no async runtime, no TLS, no network. It holds the control connection to the manager, whose end is the manager's death, and
//! pings over it, so that a hang shows. A dead manager is revived by the service manager where there is one; where there is none, or where
//! it does not, by the watchdog itself. A stop that was recorded, told or done to the unit is honoured: then it ends what the manager
//! left, and itself.

mod one_shot;
mod sentinel;
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
use crate::installation::{keyring, permissions};
use crate::platform::{self, LocalConnection};
use crate::role::{self, RoleHolder, STOPPED_ON_PURPOSE};
use crate::{host_service, logging, process};

/// The home and the settings are looked at so often, with a ping.
const LOOKS_AROUND: Duration = Duration::from_secs(60);
const TAKE_OVER: Duration = Duration::from_secs(10);

/// How the watchdog is started.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WatchdogOptions {
    /// Who starts it: a unit of the service manager says so here
    #[arg(long, hide = true, value_name = "KIND", default_value = "none")]
    service: ServiceManagerKind,
    /// It goes on for another program of the same watchdog
    #[arg(long, hide = true)]
    renewed: bool,
    /// Send one heartbeat, and say whether it is answered
    #[arg(long, hide = true, group = "one_shot")]
    probe: bool,
    /// Show that this program can be the watchdog
    #[arg(long, hide = true, group = "one_shot")]
    prove: bool,
    /// Start the watchdog again if the one that started this ends without a word
    #[arg(long, hide = true, group = "one_shot")]
    sentinel: bool,
}

/// Runs the watchdog until it is stopped.
pub fn main(home: &Home, options: &WatchdogOptions) -> Result<ExitCode> {
    match options {
        WatchdogOptions { probe: true, .. } => return one_shot::probe(home),
        WatchdogOptions { prove: true, .. } => return one_shot::prove(home),
        WatchdogOptions { sentinel: true, .. } => return sentinel::main(home),
        _ => {}
    }
    role::demand_home(home)?;
    let restored = role::restore_directories(home);
    logging::to_file(&home.role_log("spa"));
    role::tell_of_restored(&restored);
    role::leave_sub_agent(home);
    let supervised = options.service != ServiceManagerKind::None;
    if role::is_stop_recorded(home) && !supervised {
        tracing::info!("the home was told to stop; the watchdog does not start");
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let _lock = take_role(home, supervised)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the watchdog cannot start"))?;
    let now = Instant::now();
    let mut judge = TrialMonitor::new(home, !supervised, options.renewed, now);
    // Before anybody can know that there is a watchdog: a bad release may end each one that it sees.
    if judge.look(now) == TrialAction::EndManager {
        judge.kill_manager();
    }
    let holder = role::announce(home, Role::Spa)?;
    if role::is_stop_recorded(home) && !supervised {
        // Who stops the home records it first and then looks who is there; either it sees us, or we see the record.
        role::take_leave(home, Role::Spa, &holder);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let (sender, words) = mpsc::channel();
    let terminate = sender.clone();
    ctrlc::set_handler(move || drop(terminate.send(WatchdogEvent::Terminate)))
        .context("cannot hear the signal to end")?;
    platform::notify(Notification::Ready);
    tracing::info!(pid = std::process::id(), "the watchdog is ready");

    let restarter = Restarter::new(RestarterPolicy::WATCHDOG, supervised, role::is_taken(home, Role::Spm), now);
    let mut watchdog = Watchdog {
        home,
        judge,
        holder: &holder,
        service: options.service,
        sender,
        words,
        serial: 0,
        restarter,
        children: StartedManagers::default(),
        memory: MemoryCheck::default(),
        most_memory: u64::MAX,
        looks_around: now,
    };
    let end = watchdog.run();
    watchdog.judge.relieve_sentinel();
    if matches!(end, Ok(WatchdogExit::Become)) {
        role::take_leave(home, Role::Spa, &holder);
        return Err(become_another(home, options.service));
    }
    platform::notify(Notification::Stopping);
    match &end {
        Ok(_) => role::take_leave(home, Role::Spa, &holder),
        Err(error) => tracing::error!(error = format!("{error:#}"), "the watchdog ended"),
    }
    Ok(match end? {
        WatchdogExit::Asked | WatchdogExit::Become => ExitCode::SUCCESS,
        WatchdogExit::Stopped => ExitCode::from(STOPPED_ON_PURPOSE),
    })
}

/// Goes on as the program that the watchdog's link leads to now: what may be started is up to nobody else then, and whoever watches this
/// process sees no end. Returns only where that fails: then it ends, and is started again like any watchdog.
fn become_another(home: &Home, service: ServiceManagerKind) -> anyhow::Error {
    let program = home.role_link(Role::Spa.program());
    tracing::info!(program = %program.display(), "the watchdog goes on as another program");
    if let Err(error) = permissions::executable(home, &program) {
        return error.context("the watchdog cannot go on as another program");
    }
    let mut command = Command::new(&program);
    command.arg("--home").arg(home.known_as()).arg("--service").arg(service.to_string()).arg("--renewed");
    let error = anyhow::Error::from(platform::become_program(&mut command));
    error.context(format!("the watchdog cannot go on as {}", program.display()))
}

/// Takes the role; one that the service manager started ends a predecessor that somebody else started.
fn take_role(home: &Home, supervised: bool) -> Result<crate::lock::LockGuard> {
    if supervised
        && role::is_taken(home, Role::Spa)
        && let Some(holder) = role::living(home, Role::Spa)
    {
        holder.ask_to_end()?;
    }
    match role::take(home, Role::Spa, TAKE_OVER).context("cannot become the watchdog")? {
        Some(lock) => Ok(lock),
        None => bail!("cannot become the watchdog of {}: another process is", home.root().display()),
    }
}

/// What wakes the watchdog.
#[derive(Debug)]
enum WatchdogEvent {
    /// From the connection of that number.
    Heard(u64, ControlMessage),
    Terminate,
}

/// Why it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WatchdogExit {
    /// Somebody asked this process to.
    Asked,
    /// The home is stopped.
    Stopped,
    /// It goes on as another program.
    Become,
}

/// How a watch over a connection came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionEnd {
    /// The connection ended.
    Lost,
    /// The manager said that the home is stopped.
    Stopped,
    Terminate,
    Become,
}

struct Watchdog<'a> {
    home: &'a Home,
    judge: TrialMonitor,
    /// Its own record.
    holder: &'a RoleHolder,
    /// Who starts the roles.
    service: ServiceManagerKind,
    sender: mpsc::Sender<WatchdogEvent>,
    words: mpsc::Receiver<WatchdogEvent>,
    /// Counts connections, so that word of an earlier one is not taken for this one's.
    serial: u64,
    restarter: Restarter,
    children: StartedManagers,
    /// The manager's.
    memory: MemoryCheck,
    /// So much the manager may use, bytes.
    most_memory: u64,
    /// When the home and the settings are looked at next.
    looks_around: Instant,
}

impl Watchdog<'_> {
    fn run(&mut self) -> Result<WatchdogExit> {
        loop {
            let connection = match self.find_manager()? {
                ManagerSearch::Manager(connection) => connection,
                ManagerSearch::Stop => return self.honour_stop(),
                ManagerSearch::Terminate => return Ok(WatchdogExit::Asked),
                ManagerSearch::Become => return Ok(WatchdogExit::Become),
            };
            self.restarter.connected(Instant::now());
            match self.watch(connection)? {
                ConnectionEnd::Lost => {
                    let how = self.restarter.lost(Instant::now());
                    self.judge.lost(how == Some(Loss::Died));
                    match how {
                        None | Some(Loss::NeverAnswered) => {}
                        Some(how) => tracing::info!(how = format!("{how:?}"), "the manager is gone"),
                    }
                }
                ConnectionEnd::Become => return Ok(WatchdogExit::Become),
                how @ (ConnectionEnd::Stopped | ConnectionEnd::Terminate) => {
                    tracing::info!(how = format!("{how:?}"), "the manager is gone");
                    return if how == ConnectionEnd::Stopped { self.honour_stop() } else { Ok(WatchdogExit::Asked) };
                }
            }
        }
    }

    /// Waits for a manager to connect to, and revives one that does not come.
    fn find_manager(&mut self) -> Result<ManagerSearch> {
        loop {
            // First: who is started next may depend on it.
            match while_noticed(|| self.judge.look(Instant::now())) {
                TrialAction::Nothing | TrialAction::Heartbeat => {}
                TrialAction::EndManager => self.ask_manager_to_end(),
                TrialAction::Become => return Ok(ManagerSearch::Become),
            }
            if self.judge.has_restored() {
                self.restarter.program_replaced(Instant::now());
                self.children.replaced(self.home);
            }
            if let Some(connection) = self.connect() {
                return Ok(ManagerSearch::Manager(connection));
            }
            let action = self.restarter.poll(self.seen(), Instant::now());
            if let Some(found) = self.carry_out(action) {
                return Ok(found);
            }
            let ended_unseen = self.children.look(self.home, Instant::now());
            if ended_unseen && !role::is_taken(self.home, Role::Spm) {
                self.judge.ended_unseen();
            }
            platform::notify(Notification::Alive);
            let due = self.restarter.deadline().min(self.judge.due());
            let pause = due.saturating_duration_since(Instant::now());
            match self.words.recv_timeout(pause) {
                Ok(WatchdogEvent::Terminate) => return Ok(ManagerSearch::Terminate),
                Ok(WatchdogEvent::Heard(..)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
            }
        }
    }

    fn seen(&self) -> RoleObservation {
        RoleObservation {
            taken: role::is_taken(self.home, Role::Spm),
            stop_recorded: role::is_stop_recorded(self.home),
        }
    }

    fn carry_out(&mut self, action: Option<RestarterAction>) -> Option<ManagerSearch> {
        match action? {
            RestarterAction::QueryUnit => return self.ask_unit(),
            RestarterAction::StartUnit => {
                tracing::warn!("the manager is dead and its unit is asked to start it");
                if let Err(error) = while_noticed(|| host_service::start(self.service, self.home, &[Role::Spm])) {
                    tracing::error!(error = format!("{error:#}"), "the unit cannot be started");
                }
                self.restarter.unit_start_ended(Instant::now());
            }
            RestarterAction::Start { failures } => {
                tracing::warn!(failures, "the manager is dead and is started");
                if let Err(error) = self.children.start(self.home) {
                    tracing::error!(error = format!("{error:#}"), "the manager cannot be started; it is tried again");
                }
            }
            RestarterAction::KillHung => self.kill_hung(),
            RestarterAction::FollowStop => return Some(ManagerSearch::Stop),
            // Of the other policy.
            RestarterAction::LeaveStopped => {}
        }
        None
    }

    /// Asks what the service manager knows of the manager's unit, and does what follows.
    fn ask_unit(&mut self) -> Option<ManagerSearch> {
        let answer = host_service::standing(self.service, self.home, Role::Spm).inspect_err(|error| {
            tracing::warn!(error = format!("{error:#}"), "the service manager cannot be asked after a role");
        });
        let action = self.restarter.unit_answered(answer.ok(), self.seen(), Instant::now());
        if action == Some(RestarterAction::FollowStop) {
            // It is recorded with what follows.
            tracing::info!("the manager's unit was stopped; the sub-agents are stopped with it");
        }
        self.carry_out(action)
    }

    fn connect(&mut self) -> Option<LocalConnection> {
        let mut door = match ControlClient::open(self.home, PING) {
            Ok(door) => door?,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the manager's door cannot be opened");
                return None;
            }
        };
        door.send(&Request::Hello { role: Role::Spa, pid: std::process::id() }).ok()?;
        let (writer, reader) = door.split().ok()?;
        self.serial += 1;
        let (serial, sender) = (self.serial, self.sender.clone());
        std::thread::Builder::new()
            .name("hear".to_owned())
            .stack_size(256 << 10)
            .spawn(move || listen(serial, reader, &sender))
            .ok()?;
        Some(writer)
    }

    /// Holds the connection until it ends.
    fn watch(&mut self, mut connection: LocalConnection) -> Result<ConnectionEnd> {
        let mut pings = Pings::new(Instant::now());
        loop {
            let due = pings.due().min(self.judge.due());
            match self.words.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(WatchdogEvent::Terminate) => {
                    platform::hang_up(&connection);
                    return Ok(ConnectionEnd::Terminate);
                }
                Ok(WatchdogEvent::Heard(serial, heard)) if serial == self.serial => match heard {
                    ControlMessage::Reply(reply) => {
                        pings.answered();
                        if let Some(status) = &reply.status {
                            self.judge.answered(status, Instant::now());
                        }
                        self.children.answered(self.home);
                        if self.restarter.received(Instant::now()) {
                            tracing::info!("the manager is watched");
                        }
                    }
                    ControlMessage::Farewell(Goodbye::Stop) => return Ok(ConnectionEnd::Stopped),
                    ControlMessage::Farewell(Goodbye::Yield) => self.restarter.will_yield(),
                    ControlMessage::Silence => {}
                    ControlMessage::End => return Ok(ConnectionEnd::Lost),
                },
                Ok(WatchdogEvent::Heard(..)) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(watched) = self.judge_manager(&mut connection) {
                        return Ok(watched);
                    }
                    let next = pings.poll(Instant::now());
                    if next == PingAction::Wait {
                        continue;
                    }
                    platform::notify(Notification::Alive);
                    self.children.look(self.home, Instant::now());
                    if Instant::now() >= self.looks_around {
                        self.looks_around = Instant::now() + LOOKS_AROUND;
                        self.look_around();
                    }
                    self.look_at_memory(&mut connection);
                    if next == PingAction::Hung {
                        self.kill_hung();
                    }
                    // A failure shows as the connection's end.
                    let _ = control_socket::send(&mut connection, &Request::Ping);
                }
            }
        }
    }

    /// Looks after an upgrade of the manager that is connected.
    fn judge_manager(&mut self, connection: &mut LocalConnection) -> Option<ConnectionEnd> {
        if Instant::now() < self.judge.due() {
            return None;
        }
        // A failure shows as the connection's end.
        match while_noticed(|| self.judge.look(Instant::now())) {
            TrialAction::Nothing => {}
            TrialAction::EndManager => drop(control_socket::send(connection, &Request::Yield)),
            TrialAction::Heartbeat => drop(control_socket::send(connection, &Request::Heartbeat)),
            TrialAction::Become => {
                platform::hang_up(connection);
                return Some(ConnectionEnd::Become);
            }
        }
        if self.judge.is_judging() {
            let _ = control_socket::send(connection, &Request::Status);
        }
        None
    }

    fn ask_manager_to_end(&self) {
        let Some(holder) = role::who_has(self.home, Role::Spm) else { return };
        if let Err(error) = holder.ask_to_end() {
            tracing::error!(error = format!("{error:#}"), "the manager cannot be asked to end");
        }
    }

    fn kill_hung(&self) {
        let Some(holder) = role::who_has(self.home, Role::Spm) else { return };
        tracing::error!(pid = holder.pid, "the manager hangs and is killed");
        if let Err(error) = holder.kill() {
            tracing::error!(error = format!("{error:#}"), "the manager cannot be killed");
        }
    }

    /// Directories and keys in place, and what the manager may use.
    fn look_around(&mut self) {
        role::tell_of_restored(&role::restore_directories(self.home));
        role::announce_again(self.home, Role::Spa, self.holder);
        match keyring::trusted(self.home) {
            Ok(keys) if keys.is_empty() => {
                tracing::error!("no trusted key is left; no release can be installed until one is put into etc/keys")
            }
            Ok(_) => {}
            Err(error) => tracing::error!(error = format!("{error:#}"), "no release can be installed"),
        }
        if let Ok(loaded) = Config::load(self.home) {
            self.most_memory = loaded.config.spm_max_mem.0;
        }
    }

    /// Has the manager restarted that uses too much memory for too long. In an upgrade the judge sees to that.
    fn look_at_memory(&mut self, connection: &mut LocalConnection) {
        if self.judge.is_judging() {
            return;
        }
        let used =
            role::living(self.home, Role::Spm).and_then(|holder| platform::memory_bytes(holder.pid)).unwrap_or(0);
        if self.memory.record(used, self.most_memory, Instant::now())
            && let Some(why) = memory::excess("the manager", used, self.most_memory, "spmMaxMem")
        {
            tracing::warn!(why, "the manager is restarted");
            // A failure shows as the connection's end.
            let _ = control_socket::send(connection, &Request::Renew { why });
        }
    }

    /// Ends what the manager left, and records the stop where it was only told.
    fn honour_stop(&mut self) -> Result<WatchdogExit> {
        if let Err(error) = role::record_stop(self.home) {
            tracing::warn!(error = format!("{error:#}"), "the stop cannot be recorded");
        }
        self.end_sub_agents()?;
        tracing::info!("the home is stopped, and with it the watchdog");
        Ok(WatchdogExit::Stopped)
    }

    fn end_sub_agents(&self) -> Result<()> {
        // Every one of them may take its grace period.
        while_noticed(|| process::stop::end_all(self.home))
    }
}

/// Does what may take longer than the service manager waits for a sign of life, and gives it one meanwhile.
fn while_noticed<T>(work: impl FnOnce() -> T) -> T {
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
    Become,
}

/// Hears a connection to its end.
fn listen(serial: u64, mut reader: BufReader<LocalConnection>, sender: &mpsc::Sender<WatchdogEvent>) {
    loop {
        let heard = control_socket::hear(&mut reader).unwrap_or(ControlMessage::End);
        let ended = heard == ControlMessage::End;
        if sender.send(WatchdogEvent::Heard(serial, heard)).is_err() || ended {
            return;
        }
    }
}
