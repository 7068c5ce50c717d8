//! The observer of a home under chaos: samples its processes from outside and reports a violated invariant at once.
//!
//! It reads `/proc` only, never the output of the roles. The invariants of every sample:
//!
//! - each role has one lock for the whole run, so that no process can hold a second one, and a process that does not get it exits;
//! - no sub-agent runs twice, counted by the processes that have its environment marker and lead a session;
//! - no process ends unless it was hit: the death of a role ends no sub-agent;
//! - nothing is down for longer than its back-off, computed from the inflicted deaths, plus the time in which no process could restart it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::processes::{environment, words};

/// The time to notice an exit and to restart, on a busy machine.
const SLACK: Duration = Duration::from_secs(8);
/// A manager that has just started does not restart sub-agents yet.
const STARTING: Duration = Duration::from_secs(2);
/// After an uptime of this length, plus a little for late samples, a restart is immediate again.
const HEALTHY_AGENT: Duration = Duration::from_secs(32);
const HEALTHY_ROLE: Duration = Duration::from_secs(62);
/// The longest back-off.
const CAP: Duration = Duration::from_secs(60);
/// A process that does not get a role's lock exits within 10 s.
const LOSER: Duration = Duration::from_secs(18);
/// Three pings of 15 s, and the one before them.
const HANG: Duration = Duration::from_secs(65);
/// A service manager's delay before a restart, its turn of 10 s, and the other role's last resort after a second one.
const SERVICE_MANAGER: Duration = Duration::from_secs(22);

pub const ROLES: [&str; 2] = ["spm", "spa"];

/// Identifies a process permanently: pid and start time.
pub type Body = (u32, u64);

/// The processes found under each name.
type Seen<Name> = BTreeMap<Name, Vec<Body>>;

/// The observed home.
#[derive(Debug)]
pub struct Place {
    /// Its path inside its mount namespace.
    pub home: PathBuf,
    /// Its path outside.
    pub outside: PathBuf,
    /// A process in the pid namespace of its processes.
    pub leader: u32,
    /// Whether a service manager restarts the roles.
    pub supervised: bool,
}

/// The state of a sub-agent or a role.
#[derive(Debug, Default)]
struct Known {
    body: Option<Body>,
    up: Option<Instant>,
    down: Option<Instant>,
    /// The part of its downtime in which no process could restart it.
    excused: Duration,
    /// Consecutive deaths without a healthy uptime in between.
    deaths: u32,
}

impl Known {
    fn see(&mut self, body: Option<Body>, now: Instant, healthy: Duration) -> Option<Body> {
        if body == self.body {
            return None;
        }
        let dead = std::mem::replace(&mut self.body, body);
        if dead.is_some() {
            let lived = self.up.map_or(Duration::ZERO, |up| now - up);
            self.deaths = if lived >= healthy { 1 } else { self.deaths + 1 };
            (self.up, self.down, self.excused) = (None, Some(now), Duration::ZERO);
        }
        if body.is_some() {
            (self.up, self.down) = (Some(now), None);
        }
        dead
    }

    /// None at first, then 1, 2, 4 … s.
    fn delay(&self) -> Duration {
        match self.deaths {
            0 | 1 => Duration::ZERO,
            deaths => CAP.min(Duration::from_secs(1 << (deaths - 2).min(6))),
        }
    }
}

/// Samples the processes and keeps their history.
#[derive(Debug)]
pub struct Observer {
    place: Place,
    namespace: PathBuf,
    agents: BTreeMap<String, Known>,
    roles: BTreeMap<&'static str, Known>,
    locks: BTreeMap<&'static str, (u64, u64)>,
    losers: BTreeMap<Body, (&'static str, Instant)>,
    /// Processes that are expected to end: they were hit, or stopped for so long that they count as hung.
    hit: BTreeSet<Body>,
    frozen: BTreeMap<Body, Instant>,
    hung: BTreeMap<Body, Duration>,
    /// Unrelated processes, which need not be read again.
    strangers: BTreeSet<Body>,
    last: Instant,
    /// The number of deaths: of sub-agents, of roles.
    pub deaths: (u32, u32),
    /// The longest downtime of a sub-agent beyond its back-off and its excused time.
    pub longest: Duration,
}

impl Observer {
    pub fn new(place: Place, agents: &[String]) -> Observer {
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", place.leader)).expect("its leader lives");
        let mut observer = Observer {
            agents: agents.iter().map(|name| (name.clone(), Known::default())).collect(),
            roles: ROLES.iter().map(|role| (*role, Known::default())).collect(),
            locks: BTreeMap::new(),
            losers: BTreeMap::new(),
            hit: BTreeSet::new(),
            frozen: BTreeMap::new(),
            hung: BTreeMap::new(),
            strangers: BTreeSet::new(),
            last: Instant::now(),
            deaths: (0, 0),
            longest: Duration::ZERO,
            place,
            namespace,
        };
        for role in ROLES {
            let lock = observer.lock(role).expect("the roles run");
            observer.locks.insert(role, lock);
        }
        observer
    }

    /// The process is expected to end from now on.
    pub fn expect_death(&mut self, body: Body) {
        self.hit.insert(body);
    }

    pub fn freezes(&mut self, body: Body) {
        self.frozen.insert(body, Instant::now());
    }

    pub fn thaws(&mut self, body: Body) {
        self.frozen.remove(&body);
        self.hung.remove(&body);
    }

    pub fn is_frozen(&self, body: Body) -> bool {
        self.frozen.contains_key(&body)
    }

    pub fn role(&self, role: &str) -> Option<Body> {
        self.roles[role].body
    }

    pub fn agent(&self, name: &str) -> Option<Body> {
        self.agents[name].body
    }

    pub fn all_up(&self) -> bool {
        self.agents.values().all(|agent| agent.body.is_some())
            && self.losers.is_empty()
            && ROLES.iter().all(|role| self.is_well(role, Instant::now()))
    }

    /// Whether a role runs, is not stopped, and has had the time to start.
    pub fn is_well(&self, role: &str, now: Instant) -> bool {
        let known = &self.roles[role];
        known.body.is_some_and(|body| !self.is_frozen(body)) && known.up.is_some_and(|up| now - up >= STARTING)
    }

    /// Takes one sample; `Err` describes a violated invariant.
    pub fn check(&mut self) -> Result<(), String> {
        let now = Instant::now();
        // A late sample is less precise: the missed time excuses every downtime.
        let passed = now - std::mem::replace(&mut self.last, now);
        let late = passed.saturating_sub(Duration::from_secs(1));
        let (agents, roles) = self.seen();
        self.check_roles(roles, now, passed, late)?;
        self.check_agents(&agents, now, passed, late)
    }

    fn check_agents(
        &mut self,
        seen: &Seen<String>,
        now: Instant,
        passed: Duration,
        late: Duration,
    ) -> Result<(), String> {
        let managed = self.is_well("spm", now);
        for (name, known) in &mut self.agents {
            let bodies = seen.get(name).map_or(&[][..], Vec::as_slice);
            // The two were not sampled at the same instant: the first may have ended before the second started.
            let twice =
                bodies.len() > 1 && bodies.iter().filter(|body| is_of(**body, &self.place.home, name)).count() > 1;
            if twice {
                return Err(format!("sub-agent {name} runs twice: {bodies:?}"));
            }
            if let Some(dead) = known.see(bodies.last().copied(), now, HEALTHY_AGENT) {
                self.deaths.0 += 1;
                self.frozen.remove(&dead);
                if !self.hit.remove(&dead) {
                    return Err(format!("sub-agent {name}, process {dead:?}, ended although it was not hit"));
                }
            }
            if let Some(down) = known.down {
                known.excused += if managed { late } else { passed };
                let beyond = (now - down).saturating_sub(known.delay() + known.excused);
                self.longest = self.longest.max(beyond);
                if beyond > SLACK {
                    return Err(format!(
                        "sub-agent {name} is down for {:?}, after {} deaths in a row; {:?} of it there was no manager",
                        now - down,
                        known.deaths,
                        known.excused
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_roles(
        &mut self,
        mut seen: Seen<&'static str>,
        now: Instant,
        passed: Duration,
        late: Duration,
    ) -> Result<(), String> {
        for (role, other) in [("spm", "spa"), ("spa", "spm")] {
            if self.lock(role) != self.locks.get(role).copied() {
                return Err(format!("the lock of {role} was replaced by a different file"));
            }
            let mut bodies = seen.remove(role).unwrap_or_default();
            let holders: Vec<Body> = bodies.iter().copied().filter(|body| self.holds(*body, role)).collect();
            bodies.retain(|body| !holders.contains(body));
            // A child of the holder that has not executed its own program yet holds the lock too, and is younger.
            let holder = holders.into_iter().min_by_key(|(pid, started)| (*started, *pid));
            // A process sampled a moment ago may have executed its own program since.
            self.losers.retain(|loser, (of, _)| *of != role || bodies.contains(loser));
            for loser in bodies {
                if now - self.losers.entry(loser).or_insert((role, now)).1 > LOSER && !self.is_frozen(loser) {
                    return Err(format!("{role} runs beside another for {LOSER:?}: {loser:?} beside {holder:?}"));
                }
            }
            let other_is_well = self.is_well(other, now);
            let supervised = self.place.supervised;
            let Some(known) = self.roles.get_mut(role) else { continue };
            if let Some(dead) = known.see(holder, now, HEALTHY_ROLE) {
                self.deaths.1 += 1;
                self.frozen.remove(&dead);
                self.hung.remove(&dead);
                self.hit.remove(&dead);
            }
            let others = if other_is_well || supervised { late } else { passed };
            if let Some(down) = known.down {
                known.excused += others;
                let delay = if supervised { SERVICE_MANAGER } else { known.delay() };
                if (now - down).saturating_sub(delay + known.excused) > SLACK {
                    return Err(format!("{role} is down for {:?}, after {} deaths in a row", now - down, known.deaths));
                }
            }
            if let Some(body) = known.body.filter(|body| self.frozen.contains_key(body)) {
                let hung = self.hung.entry(body).or_default();
                *hung += if other_is_well { passed - late } else { Duration::ZERO };
                if *hung > HANG + SLACK {
                    return Err(format!("{role} hangs for {hung:?} and is not killed"));
                }
            }
        }
        Ok(())
    }

    /// Native sub-agents by name, and roles.
    fn seen(&mut self) -> (Seen<String>, Seen<&'static str>) {
        let (mut agents, mut roles) = (Seen::<String>::new(), Seen::<&str>::new());
        let mut strangers = BTreeSet::new();
        let age_of = |started: u64| uptime_ticks().saturating_sub(started);
        for pid in pids() {
            let Some(started) = start_time(pid) else { continue };
            let body = (pid, started);
            if self.strangers.contains(&body) {
                strangers.insert(body);
                continue;
            }
            if fs::read_link(format!("/proc/{pid}/ns/pid")).ok().as_deref() != Some(&*self.namespace) {
                continue;
            }
            match self.what(pid) {
                What::Agent(name) => agents.entry(name).or_default().push(body),
                What::Role(role) => roles.entry(role).or_default().push(body),
                // A process of this age does not execute another program.
                What::Other if age_of(started) > 1000 => drop(strangers.insert(body)),
                What::Other => {}
            }
        }
        self.strangers = strangers;
        for bodies in agents.values_mut() {
            bodies.sort_by_key(|(pid, started)| (*started, *pid));
        }
        (agents, roles)
    }

    fn what(&self, pid: u32) -> What {
        let environment = environment(pid);
        let home = self.place.home.to_string_lossy();
        if environment.contains(&format!("AOPS_HOME={home}")) {
            let name = environment.iter().find_map(|variable| variable.strip_prefix("AOPS_AGENT_NAME="));
            if let Some(name) = name.filter(|_| session(pid) == Some(pid)) {
                return What::Agent(name.to_owned());
            }
        }
        let words = words(pid, "cmdline");
        let program = words.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
        let role = ROLES.iter().find(|role| program == format!("aops-{role}").as_str());
        let is_role = words.iter().any(|word| *word == home) && !words.iter().any(|word| word == "stop-hook");
        role.filter(|_| is_role).map_or(What::Other, |role| What::Role(role))
    }

    fn lock(&self, role: &str) -> Option<(u64, u64)> {
        let file = fs::metadata(self.place.outside.join(format!("run/{role}.lock"))).ok()?;
        Some((file.dev(), file.ino()))
    }

    fn holds(&self, (pid, _): Body, role: &str) -> bool {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut locks = open.filter(|fd| {
            let file = fs::metadata(fd.path()).map(|file| (file.dev(), file.ino())).ok();
            file.is_some() && file == self.locks.get(role).copied()
        });
        locks.any(|fd| {
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display()));
            info.unwrap_or_default().lines().any(|line| line.starts_with("lock:"))
        })
    }

    /// The number of live processes with the home's environment marker, by sub-agent.
    pub fn marked(&self) -> BTreeMap<String, usize> {
        let home = format!("AOPS_HOME={}", self.place.home.display());
        let mut marked = BTreeMap::new();
        for pid in pids().filter(|pid| start_time(*pid).is_some()) {
            if fs::read_link(format!("/proc/{pid}/ns/pid")).ok().as_deref() != Some(&*self.namespace) {
                continue;
            }
            let environment = environment(pid);
            let name = environment.iter().find_map(|variable| variable.strip_prefix("AOPS_AGENT_NAME="));
            if let Some(name) = name.filter(|_| environment.contains(&home)) {
                *marked.entry(name.to_owned()).or_insert(0) += 1;
            }
        }
        marked
    }
}

enum What {
    Agent(String),
    Role(&'static str),
    Other,
}

fn is_of((pid, started): Body, home: &Path, name: &str) -> bool {
    let environment = environment(pid);
    start_time(pid) == Some(started)
        && environment.contains(&format!("AOPS_HOME={}", home.display()))
        && environment.contains(&format!("AOPS_AGENT_NAME={name}"))
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The fields of `/proc/PID/stat` after the name, starting with the state; `None` if the process is dead.
fn fields(pid: u32) -> Option<Vec<u64>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let alive = !matches!(fields.next()?, "Z" | "X");
    alive.then(|| fields.map(|field| field.parse().unwrap_or(0)).collect())
}

pub fn start_time(pid: u32) -> Option<u64> {
    fields(pid)?.get(18).copied()
}

fn session(pid: u32) -> Option<u32> {
    u32::try_from(*fields(pid)?.get(2)?).ok()
}

/// In the unit of start times.
fn uptime_ticks() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0);
    (seconds * rustix::param::clock_ticks_per_second() as f64) as u64
}
