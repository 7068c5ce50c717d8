//! The watchdog: keeps the manager alive and honest.
//!
//! It is tiny: no async runtime, no TLS, no network. It holds the control connection to the manager, whose end is the manager's death, and
//! pings over it, so that a hang shows. A dead manager is revived by the service manager where there is one; where there is none, or where
//! it does not, by the watchdog itself. A stop that was recorded, told or done to the unit is honoured: then it ends what the manager
//! left, and itself.

use std::io::BufReader;
use std::process::{Child, ExitCode};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::core::watch::{Lasting, Next, PING, Pings, Revival};
use crate::door::{self, Door, Farewell, Heard, Request};
use crate::home::Home;
use crate::host_service::Unanswered;
use crate::installation::keyring;
use crate::platform::{self, LocalConnection};
use crate::role::{self, Holder, Role, STOPPED_ON_PURPOSE};
use crate::{host_service, logging, process};

/// While there is no connection, it is tried for at least and at most so often, and more seldom the longer it takes.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(500);
/// A manager that has its role for so long and cannot be reached hangs. It opens its door when it has adopted its sub-agents.
const UNREACHABLE: Duration = Duration::from_secs(60);
/// The service manager gets so long to revive the manager before it is asked, and again before we do it.
const SERVICE_MANAGERS_TURN: Duration = Duration::from_secs(10);
/// It is asked for its view of the unit so often at first, and at last.
const ASK_UNIT: Duration = Duration::from_secs(1);
const ASK_UNIT_AT_LAST: Duration = Duration::from_secs(10);
/// Above its limit of memory at so many looks in a row, a role is renewed.
const TOO_LARGE: u32 = 3;
/// The home and the memory of both roles are looked at so often, with a ping.
const LOOKS_AROUND: Duration = Duration::from_secs(60);
const TAKE_OVER: Duration = Duration::from_secs(10);

/// How the watchdog is started.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Who starts it: a unit of the service manager says so here
    #[arg(long, hide = true, value_name = "KIND", default_value = "none")]
    service: host_service::Kind,
}

/// Runs the watchdog until it is stopped.
pub fn main(home: &Home, options: &Options) -> Result<ExitCode> {
    role::demand_home(home)?;
    let restored = role::restore_directories(home);
    logging::to_file(&home.role_log("spa"))?;
    role::tell_of_restored(&restored);
    role::leave_sub_agent(home);
    let supervised = options.service != host_service::Kind::None;
    if role::is_stop_recorded(home) && !supervised {
        tracing::info!("the home was told to stop; the watchdog does not start");
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let _lock = take_role(home, supervised)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the watchdog cannot start"))?;
    let holder = role::announce(home, Role::Spa)?;
    if role::is_stop_recorded(home) && !supervised {
        // Who stops the home records it first and then looks who is there; either it sees us, or we see the record.
        role::take_leave(home, Role::Spa, &holder);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let (sender, words) = mpsc::channel();
    let terminate = sender.clone();
    ctrlc::set_handler(move || drop(terminate.send(Word::Terminate))).context("cannot hear the signal to end")?;
    platform::notify("READY=1");
    tracing::info!(pid = std::process::id(), "the watchdog is ready");

    let now = Instant::now();
    let revival = Revival::new(now);
    let mut watchdog = Watchdog {
        home,
        holder: &holder,
        supervised,
        sender,
        words,
        serial: 0,
        revival,
        unanswered: Unanswered::default(),
        children: vec![],
        large: 0,
        looks_around: now,
    };
    let end = watchdog.run();
    platform::notify("STOPPING=1");
    match &end {
        Ok(_) => role::take_leave(home, Role::Spa, &holder),
        Err(error) => tracing::error!(error = format!("{error:#}"), "the watchdog ended"),
    }
    Ok(match end? {
        End::Asked => ExitCode::SUCCESS,
        End::Stopped => ExitCode::from(STOPPED_ON_PURPOSE),
    })
}

/// Takes the role; one that the service manager started ends a predecessor that somebody else started.
fn take_role(home: &Home, supervised: bool) -> Result<crate::lock::Held> {
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
enum Word {
    /// From the connection of that number.
    Heard(u64, Heard),
    Terminate,
}

/// Why it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Somebody asked this process to.
    Asked,
    /// The home is stopped.
    Stopped,
}

/// How a connection to the manager came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// It died, or hung and was killed.
    Died,
    /// It never answered. The socket of one that is dying can be connected to after its last connection has ended.
    Unheard,
    /// It gave way to another.
    Yielded,
    Stopped,
    Terminate,
}

struct Watchdog<'a> {
    home: &'a Home,
    /// Its own record.
    holder: &'a Holder,
    supervised: bool,
    sender: mpsc::Sender<Word>,
    words: mpsc::Receiver<Word>,
    /// Counts connections, so that word of an earlier one is not taken for this one's.
    serial: u64,
    revival: Revival,
    unanswered: Unanswered,
    children: Vec<Child>,
    large: u32,
    /// When the home and the memory of both roles are looked at next.
    looks_around: Instant,
}

/// A time without a manager.
struct Absence {
    /// The unit was last asked after then.
    asked: Instant,
    /// The service manager was asked to start it; since then it has its turn once more.
    turn: Instant,
    told: bool,
    /// Somebody has the manager's role, and cannot be reached.
    mute: Lasting,
}

impl Watchdog<'_> {
    fn run(&mut self) -> Result<End> {
        loop {
            let Some(connection) = self.find_manager()? else { return self.honour_stop() };
            let connection = match connection {
                Found::Manager(connection) => connection,
                Found::Terminate => return Ok(End::Asked),
            };
            let since = Instant::now();
            let lost = self.watch(connection)?;
            let lived = since.elapsed();
            if lost != Lost::Unheard {
                tracing::info!(how = format!("{lost:?}"), "the manager is gone");
            }
            match lost {
                Lost::Terminate => return Ok(End::Asked),
                Lost::Stopped => return self.honour_stop(),
                Lost::Yielded => self.revival.left(Instant::now()),
                Lost::Died => self.revival.died(lived, Instant::now()),
                Lost::Unheard => {}
            }
        }
    }

    /// Waits for a manager to connect to, and revives one that does not come. `None`: the home is to be stopped.
    fn find_manager(&mut self) -> Result<Option<Found>> {
        let began = Instant::now();
        let mut absence = Absence { asked: began, turn: began, told: false, mute: Lasting::default() };
        loop {
            let (stopped, taken) = (role::is_stop_recorded(self.home), role::is_taken(self.home, Role::Spm));
            if stopped && !taken {
                return Ok(None);
            }
            if let Some(connection) = self.connect() {
                return Ok(Some(Found::Manager(connection)));
            }
            let now = Instant::now();
            let ask_pause = ((now - began) / 8).clamp(ASK_UNIT, ASK_UNIT_AT_LAST);
            if absence.mute.look(taken && !stopped, now) >= UNREACHABLE {
                absence.mute = Lasting::default();
                self.kill_hung();
            } else if self.supervised && now - absence.asked >= ask_pause {
                absence.asked = now;
                if let Some(end) = self.ask_unit(&mut absence, taken)? {
                    return Ok(end);
                }
            } else if !self.supervised && now >= self.revival.due() && !taken {
                self.revive();
            }
            self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
            platform::notify("WATCHDOG=1");
            match self.words.recv_timeout(self.pause(began)) {
                Ok(Word::Terminate) => return Ok(Some(Found::Terminate)),
                Ok(Word::Heard(..)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
            }
        }
    }

    /// Until the next look for a manager: soon after the last one went or the next was started, and when one is to be started.
    fn pause(&self, began: Instant) -> Duration {
        let now = Instant::now();
        let quiet = now.saturating_duration_since(self.revival.since().max(began));
        let pause = (quiet / 16).clamp(FIRST_LOOK, LAST_LOOK);
        match self.revival.due().checked_duration_since(now) {
            Some(left) if !self.supervised => pause.min(left).max(FIRST_LOOK),
            _ => pause,
        }
    }

    /// What the service manager says of the manager's unit, and what follows. `Some(None)`: a stop.
    fn ask_unit(&mut self, absence: &mut Absence, taken: bool) -> Result<Option<Option<Found>>> {
        let verdict = self.unanswered.judge(host_service::verdict(self.home, Role::Spm));
        match verdict {
            host_service::Verdict::Stopped => {
                // It is recorded with what follows.
                tracing::info!("the manager's unit was stopped; the sub-agents are stopped with it");
                return Ok(Some(None));
            }
            host_service::Verdict::Coming | host_service::Verdict::Forbidden => {}
            host_service::Verdict::Dead | host_service::Verdict::Missing => {
                let now = Instant::now();
                if taken || now < absence.turn + SERVICE_MANAGERS_TURN {
                    return Ok(None);
                }
                if verdict == host_service::Verdict::Dead && !absence.told {
                    tracing::warn!("the manager is dead and its unit is asked to start it");
                    absence.told = true;
                    if let Err(error) = while_noticed(|| host_service::start(self.home, &[Role::Spm])) {
                        tracing::error!(error = format!("{error:#}"), "the unit cannot be started");
                    }
                    absence.turn = Instant::now();
                } else if now >= self.revival.due() {
                    self.revive();
                }
            }
        }
        Ok(None)
    }

    fn revive(&mut self) {
        tracing::warn!(failures = self.revival.failures(), "the manager is dead and is started");
        self.revival.tried(Instant::now());
        match role::spawn(self.home, Role::Spm) {
            Ok(child) => self.children.push(child),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the manager cannot be started; it is tried again")
            }
        }
    }

    fn connect(&mut self) -> Option<LocalConnection> {
        let mut door = match Door::open(self.home, PING) {
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
    fn watch(&mut self, mut connection: LocalConnection) -> Result<Lost> {
        let (mut pings, mut heard_of, mut yielded) = (Pings::new(Instant::now()), false, false);
        loop {
            match self.words.recv_timeout(pings.due().saturating_duration_since(Instant::now())) {
                Ok(Word::Terminate) => {
                    platform::hang_up(&connection);
                    return Ok(Lost::Terminate);
                }
                Ok(Word::Heard(serial, heard)) if serial == self.serial => match heard {
                    Heard::Reply(_) => {
                        pings.answered();
                        if !std::mem::replace(&mut heard_of, true) {
                            tracing::info!("the manager is watched");
                            self.revival.came();
                        }
                    }
                    Heard::Farewell(Farewell::Stop) => return Ok(Lost::Stopped),
                    Heard::Farewell(Farewell::Yield) => yielded = true,
                    Heard::Silence => {}
                    Heard::End if yielded => return Ok(Lost::Yielded),
                    Heard::End => return Ok(if heard_of { Lost::Died } else { Lost::Unheard }),
                },
                Ok(Word::Heard(..)) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the signal handler has ended"),
                Err(RecvTimeoutError::Timeout) => {
                    let next = pings.look(Instant::now());
                    if next == Next::Wait {
                        continue;
                    }
                    platform::notify("WATCHDOG=1");
                    if Instant::now() >= self.looks_around {
                        self.looks_around = Instant::now() + LOOKS_AROUND;
                        self.look_around(&mut connection)?;
                    }
                    if next == Next::Hung {
                        self.kill_hung();
                    }
                    // A failure shows as the connection's end.
                    let _ = door::send(&mut connection, &Request::Ping);
                }
            }
        }
    }

    fn kill_hung(&self) {
        let Some(holder) = role::living(self.home, Role::Spm) else { return };
        tracing::error!(pid = holder.pid, "the manager hangs and is killed");
        if let Err(error) = holder.kill() {
            tracing::error!(error = format!("{error:#}"), "the manager cannot be killed");
        }
    }

    /// Memory within limits, directories and keys in place.
    fn look_around(&mut self, connection: &mut LocalConnection) -> Result<()> {
        role::tell_of_restored(&role::restore_directories(self.home));
        role::announce_again(self.home, Role::Spa, self.holder);
        match keyring::trusted(self.home) {
            Ok(keys) if keys.is_empty() => {
                tracing::error!("no trusted key is left; no release can be installed until one is put into etc/keys")
            }
            Ok(_) => {}
            Err(error) => tracing::error!(error = format!("{error:#}"), "no release can be installed"),
        }
        let Ok(loaded) = Config::load(self.home) else { return Ok(()) };
        let own = platform::memory_bytes(std::process::id()).unwrap_or(0);
        if own > loaded.config.spa_max_mem.0 {
            bail!("the watchdog uses {own} bytes, more than spaMaxMem; it is started anew");
        }
        let managers =
            role::living(self.home, Role::Spm).and_then(|holder| platform::memory_bytes(holder.pid)).unwrap_or(0);
        self.large = if managers > loaded.config.spm_max_mem.0 { self.large + 1 } else { 0 };
        if self.large >= TOO_LARGE {
            self.large = 0;
            tracing::warn!(bytes = managers, "the manager uses more than spmMaxMem and is renewed");
            door::send(connection, &Request::Yield)?;
        }
        Ok(())
    }

    /// Ends what the manager left, and records the stop where it was only told.
    fn honour_stop(&mut self) -> Result<End> {
        if let Err(error) = role::record_stop(self.home) {
            tracing::warn!(error = format!("{error:#}"), "the stop cannot be recorded");
        }
        self.end_sub_agents()?;
        tracing::info!("the home is stopped, and with it the watchdog");
        Ok(End::Stopped)
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
                platform::notify("WATCHDOG=1");
            }
        });
        let outcome = work();
        drop(done);
        outcome
    })
}

enum Found {
    Manager(LocalConnection),
    Terminate,
}

/// Hears a connection to its end.
fn listen(serial: u64, mut reader: BufReader<LocalConnection>, sender: &mpsc::Sender<Word>) {
    loop {
        let heard = door::hear(&mut reader).unwrap_or(Heard::End);
        let ended = heard == Heard::End;
        if sender.send(Word::Heard(serial, heard)).is_err() || ended {
            return;
        }
    }
}
