//! The observer of a home under chaos: looks at its processes from outside and says at once what must never be.
//!
//! It goes by `/proc` alone, never by what the roles say. What it looks for, at every look:
//!
//! - one lock a role, for the whole run, so that nobody can hold a second one; and who lost against its holder gives up;
//! - no sub-agent twice, by the processes that bear its mark and lead a session;
//! - nobody ends who was not hit: a role's death ends no sub-agent;
//! - nobody is down for longer than its back-off, which is reckoned from the deaths that were inflicted, and the time for which there was
//!   nobody to start it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::processes::{environment, words};

/// To see an end and to start anew, on a busy machine.
const SLACK: Duration = Duration::from_secs(8);
/// A manager that was just started has no time yet for a sub-agent.
const STARTING: Duration = Duration::from_secs(2);
/// Up for so long, and a little more for what is seen late, a sub-agent's and a role's next death is a first one.
const HEALTHY_AGENT: Duration = Duration::from_secs(32);
const HEALTHY_ROLE: Duration = Duration::from_secs(62);
/// The longest delay.
const CAP: Duration = Duration::from_secs(60);
/// A loser of a role's lock gives up within 10 s.
const LOSER: Duration = Duration::from_secs(18);
/// Three pings of 15 s, and the one before them.
const HANG: Duration = Duration::from_secs(65);
/// A service manager's pause before a restart, its turn of 10 s, and the other role's last resort after a second one.
const SERVICE_MANAGER: Duration = Duration::from_secs(22);

pub const ROLES: [&str; 2] = ["spm", "spa"];

/// A process for good: number and start time.
pub type Body = (u32, u64);

/// What was seen under each name.
type Seen<Name> = BTreeMap<Name, Vec<Body>>;

/// A home that is looked at.
#[derive(Debug)]
pub struct Place {
    /// As its processes know it.
    pub home: PathBuf,
    /// As it is reached from here.
    pub outside: PathBuf,
    /// A process of the pid namespace that its processes live in.
    pub leader: u32,
    /// Whether a service manager revives the roles.
    pub supervised: bool,
}

/// What is known of a sub-agent or a role.
#[derive(Debug, Default)]
struct Known {
    body: Option<Body>,
    up: Option<Instant>,
    down: Option<Instant>,
    /// Of the time that it is down, for so long nobody could start it.
    excused: Duration,
    /// Deaths in a row, without a healthy time between.
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

    /// First at once, then 1, 2, 4 … s.
    fn delay(&self) -> Duration {
        match self.deaths {
            0 | 1 => Duration::ZERO,
            deaths => CAP.min(Duration::from_secs(1 << (deaths - 2).min(6))),
        }
    }
}

/// Looks, and remembers.
#[derive(Debug)]
pub struct Observer {
    place: Place,
    namespace: PathBuf,
    agents: BTreeMap<String, Known>,
    roles: BTreeMap<&'static str, Known>,
    locks: BTreeMap<&'static str, (u64, u64)>,
    losers: BTreeMap<Body, (&'static str, Instant)>,
    /// Whose end is expected: they were hit, or were stopped for so long that they count as hung.
    hit: BTreeSet<Body>,
    frozen: BTreeMap<Body, Instant>,
    hung: BTreeMap<Body, Duration>,
    /// Others, that need not be looked at again.
    strangers: BTreeSet<Body>,
    last: Instant,
    /// Deaths seen: of sub-agents, of roles.
    pub deaths: (u32, u32),
    /// The longest that a sub-agent was down beyond its delay and what excused it.
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

    /// That this one ends is to be expected from now on.
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

    /// Whether a role lives, is not stopped, and has had the time to begin.
    pub fn is_well(&self, role: &str, now: Instant) -> bool {
        let known = &self.roles[role];
        known.body.is_some_and(|body| !self.is_frozen(body)) && known.up.is_some_and(|up| now - up >= STARTING)
    }

    /// One look; `Err` says what must not be.
    pub fn check(&mut self) -> Result<(), String> {
        let now = Instant::now();
        // A look that comes late says less: what it missed excuses everybody.
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
            // They were not seen at the same instant: the first may have ended before the second began.
            let twice =
                bodies.len() > 1 && bodies.iter().filter(|body| is_of(**body, &self.place.home, name)).count() > 1;
            if twice {
                return Err(format!("sub-agent {name} runs twice: {bodies:?}"));
            }
            if let Some(dead) = known.see(bodies.last().copied(), now, HEALTHY_AGENT) {
                self.deaths.0 += 1;
                self.frozen.remove(&dead);
                if !self.hit.remove(&dead) {
                    return Err(format!("sub-agent {name}, process {dead:?}, ended although nobody hit it"));
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
                return Err(format!("the lock of {role} is another file than it was"));
            }
            let mut bodies = seen.remove(role).unwrap_or_default();
            let holders: Vec<Body> = bodies.iter().copied().filter(|body| self.holds(*body, role)).collect();
            bodies.retain(|body| !holders.contains(body));
            // A child of the holder's that has not come to its own program yet holds the lock too, and is the younger.
            let holder = holders.into_iter().min_by_key(|(pid, started)| (*started, *pid));
            // What was one a moment ago may have come to its own program meanwhile.
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
                // One so old will not become another program's.
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

    /// Every living process that bears the home's mark, by sub-agent.
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

/// The fields of `/proc/PID/stat` behind the name, from the state on, of a process that is not dead.
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

/// As start times are counted.
fn uptime_ticks() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0);
    (seconds * rustix::param::clock_ticks_per_second() as f64) as u64
}
