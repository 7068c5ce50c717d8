//! Chaos: roles and sub-agents are killed, signalled and stopped at random, while an observer checks the invariants.
//!
//! `AOPS_CHAOS_SECONDS` sets the duration of each of the two scenarios, `AOPS_CHAOS_SEED` the random faults: the same seed gives the same
//! sequence, although its effect depends on the machine's speed. Both are printed at the start and with a failure.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::process::Signal;

use crate::support::chaos::{Body, Observer, Place, ROLES, start_time};
use crate::support::container::Container;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::inside::{Inside, VERBATIM, processes_of_aops, status};
use crate::support::package::Package;
use crate::support::processes::signal;
use crate::support::wait::{try_for, wait_for};

const AGENTS: usize = 30;
/// The number of sub-agents with a child process.
const WITH_CHILD: usize = 5;
/// The number of sub-agents that are never killed, and must keep their process.
const SPARED: usize = 5;
const POLL_INTERVAL: Duration = Duration::from_millis(80);
/// A stopped role stays stopped, so that the other treats it as hung, if this much time is left.
const FOR_A_HANG: Duration = Duration::from_secs(100);
/// The deadline for everything to run again after the chaos: the longest back-off, of a role and then of a sub-agent.
const CALM: Duration = Duration::from_secs(150);

#[test]
fn chaos_without_a_service_manager() {
    let mut gateway = gateway();
    gateway.run();
    let host = TestHost::joined(&gateway);
    let place = Place { home: host.home(), outside: host.home(), leader: std::process::id(), supervised: false };
    wait_for("the fleet", SOON, || (host.status()["agents"].as_array()?.len() == AGENTS).then_some(()));
    Chaos::new(place, Duration::from_secs(35)).run();
    host.wait_for_status("everything to run", SOON, |status| status["state"] == "running");
    host.control(&["stop"]).expect_success();
    assert_eq!(host.processes(), []);
    assert_eq!(groups_left(&host.home()), Vec::<String>::new());
}

#[test]
fn chaos_under_systemd() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, gateway());
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    wait_for("the fleet", SOON, || (status(&container)["agents"].as_array()?.len() == AGENTS).then_some(()));
    let home = Path::new("/opt/aops").to_owned();
    let place = Place { outside: container.path(&home), home, leader: container.leader(), supervised: true };
    Chaos::new(place, Duration::from_secs(25)).run();
    let well = try_for(SOON, || (status(&container)["state"] == "running").then_some(()));
    assert!(well.is_some(), "{:#}", status(&container));
    container.run(&["aops", "control", "stop"]).expect_code(0);
    assert_eq!(processes_of_aops(&container), []);
    let groups = container.shell("find /sys/fs/cgroup -name 'agent-*'").expect_success();
    assert_eq!(groups, "");
}

/// A gateway that does not run yet and orders all sub-agents.
fn gateway() -> Gateway {
    let gateway = Gateway::stopped();
    gateway.publish_self("c57f6a1d");
    let names = names();
    for (at, name) in names.iter().enumerate() {
        let package = match at < WITH_CHILD {
            true => Package::script(name, "1.0", "sleep 1000000 &\nexec sleep 1000000", ""),
            false => Package::sleeper(name, "1.0"),
        };
        gateway.publish(&package);
    }
    let wanted: Vec<_> = names.iter().map(|name| (name.as_str(), "1.0", "")).collect();
    gateway.want(&wanted);
    gateway
}

fn names() -> Vec<String> {
    (0..AGENTS).map(|n| format!("chaos-{n:02}")).collect()
}

/// The cgroups of a home's sub-agents that still exist.
fn groups_left(home: &Path) -> Vec<String> {
    use sha2::{Digest as _, Sha256};
    let digest = Sha256::digest(home.as_os_str().as_encoded_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let entries =
        hierarchies.chain([root.to_owned()]).flat_map(|at| std::fs::read_dir(at).into_iter().flatten().flatten());
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("aops-agents-{digits}"))).collect()
}

struct Chaos {
    observer: Observer,
    rng: Rng,
    seed: u64,
    lasts: Duration,
    supervised: bool,
    /// The log of the faults, to diagnose a failure.
    done: Vec<String>,
    began: Instant,
    /// The stopped processes, and what is done to each at its time.
    stopped: Vec<(Body, Instant, Signal)>,
    /// A role that stays stopped until the other one finds it hung.
    left_hung: Option<Body>,
}

impl Chaos {
    fn new(place: Place, usual: Duration) -> Chaos {
        let given = |name| {
            std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: {text}")))
        };
        let seed = given("AOPS_CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..));
        let lasts = given("AOPS_CHAOS_SECONDS").map_or(usual, Duration::from_secs);
        let supervised = place.supervised;
        print(&format!("AOPS_CHAOS_SEED={seed} AOPS_CHAOS_SECONDS={}", lasts.as_secs()));
        let mut chaos = Chaos {
            observer: Observer::new(place, &names()),
            rng: Rng::with_seed(seed),
            seed,
            lasts,
            supervised,
            done: vec![],
            began: Instant::now(),
            stopped: vec![],
            left_hung: None,
        };
        chaos.check_until("everything to be up before the chaos begins", SOON, |observer| observer.all_up());
        chaos
    }

    fn run(&mut self) {
        let spared: BTreeMap<_, _> = self.spared().map(|name| (name.clone(), self.observer.agent(&name))).collect();
        self.began = Instant::now();
        let (mut next, mut next_role) = (self.began, self.began + self.within(1000..3000));
        while self.began.elapsed() < self.lasts {
            self.check();
            let now = Instant::now();
            self.end_stops(now);
            if now >= next {
                self.hit_an_agent(now);
                next = now + self.within(50..900);
            }
            if now >= next_role {
                self.hit_a_role(now);
                next_role = now + self.within(500..8000);
            }
            std::thread::park_timeout(POLL_INTERVAL);
        }
        for (body, ..) in std::mem::take(&mut self.stopped) {
            self.send(body, Signal::CONT, "calm");
        }
        if let Some(body) = self.left_hung.take() {
            self.send(body, Signal::CONT, "calm");
        }
        self.check_until("everything to be up when the chaos is over", CALM, Observer::all_up);
        for (name, body) in spared {
            assert_eq!(self.observer.agent(&name), body, "{name} was not hit");
        }
        let expected = |at| if at < WITH_CHILD { 2 } else { 1 };
        let expected: BTreeMap<_, _> = names().into_iter().enumerate().map(|(at, name)| (name, expected(at))).collect();
        // The child of a sub-agent that has just started may not exist yet; a surplus one does not go away.
        let right = try_for(SOON, || (self.observer.marked() == expected).then_some(()));
        assert!(right.is_some(), "not these processes: {:?}\n{}", self.observer.marked(), self.story());
        let (agents, roles) = self.observer.deaths;
        print(&format!(
            "deaths: {agents} of sub-agents, {roles} of roles; longest beyond its due: {:?}",
            self.observer.longest
        ));
        assert!(agents as u64 > self.lasts.as_secs() / 3 && roles > 0, "that was no chaos");
    }

    fn spared(&self) -> impl Iterator<Item = String> + use<> {
        // Both native and `control` sub-agents.
        names().into_iter().step_by(AGENTS / SPARED)
    }

    fn within(&mut self, milliseconds: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(milliseconds))
    }

    fn hit_an_agent(&mut self, now: Instant) {
        let spared: Vec<String> = self.spared().collect();
        let mut names: Vec<String> = names().into_iter().filter(|name| !spared.contains(name)).collect();
        self.rng.shuffle(&mut names);
        let (count, kind) = match self.rng.u32(0..100) {
            0..50 => (1, Signal::KILL),
            50..75 => (1, Signal::TERM),
            75..95 => (1, Signal::STOP),
            95..98 => (8, Signal::KILL),
            _ => (names.len(), Signal::TERM),
        };
        for name in &names[..count] {
            let Some(body) = self.observer.agent(name) else { continue };
            if kind == Signal::STOP {
                let end = if self.rng.bool() { Signal::CONT } else { Signal::KILL };
                let until = now + self.within(200..6000);
                self.stopped.push((body, until, end));
            }
            self.send(body, kind, name);
        }
    }

    fn hit_a_role(&mut self, now: Instant) {
        let at = self.rng.usize(0..ROLES.len());
        let (role, other) = (ROLES[at], ROLES[1 - at]);
        let (blow, hang, pause) = (self.rng.u32(0..100), self.rng.u32(0..3) == 0, self.within(500..9000));
        let Some(body) = self.observer.role(role) else { return };
        // Without a service manager, at least one role must be left to restart the other.
        if !self.supervised && !self.observer.is_well(other, now) {
            return;
        }
        match blow {
            0..50 => self.send(body, Signal::KILL, role),
            50..75 => self.send(body, Signal::TERM, role),
            _ => {
                if hang && self.left_hung.is_none() && self.lasts.saturating_sub(self.began.elapsed()) > FOR_A_HANG {
                    self.left_hung = Some(body);
                } else {
                    self.stopped.push((body, now + pause, Signal::CONT));
                }
                self.send(body, Signal::STOP, role);
            }
        }
    }

    /// Continues or kills the processes whose stop has lasted long enough.
    fn end_stops(&mut self, now: Instant) {
        let (over, stopped) = std::mem::take(&mut self.stopped).into_iter().partition(|(_, until, _)| now >= *until);
        self.stopped = stopped;
        let over: Vec<(Body, Instant, Signal)> = over;
        for (body, _, end) in over {
            self.send(body, end, "stopped");
        }
        self.left_hung = self.left_hung.filter(|(pid, started)| start_time(*pid) == Some(*started));
    }

    fn send(&mut self, body: Body, kind: Signal, whom: &str) {
        let (pid, started) = body;
        if start_time(pid) != Some(started) {
            return;
        }
        match kind {
            Signal::STOP => self.observer.freezes(body),
            Signal::CONT => self.observer.thaws(body),
            _ => self.observer.expect_death(body),
        }
        self.done.push(format!("{:8.3} {kind:?} {whom} {pid}", self.began.elapsed().as_secs_f64()));
        signal(pid, kind);
    }

    fn check(&mut self) {
        if let Err(why) = self.observer.check() {
            panic!("{why}\n{}", self.story());
        }
    }

    fn check_until(&mut self, what: &str, deadline: Duration, is_so: impl Fn(&Observer) -> bool) {
        let began = Instant::now();
        loop {
            self.check();
            if is_so(&self.observer) {
                return;
            }
            assert!(began.elapsed() < deadline, "timed out after {deadline:?} waiting for {what}\n{}", self.story());
            std::thread::park_timeout(POLL_INTERVAL);
        }
    }

    /// The faults up to now.
    fn story(&self) -> String {
        const LAST: usize = 40;
        let last = self.done[self.done.len().saturating_sub(LAST)..].join("\n");
        format!(
            "after {:.3} s with AOPS_CHAOS_SEED={} AOPS_CHAOS_SECONDS={}, the last blows:\n{last}\n{:?}",
            self.began.elapsed().as_secs_f64(),
            self.seed,
            self.lasts.as_secs(),
            self.observer
        )
    }
}

#[allow(clippy::print_stderr, reason = "the test program shows it with a failure, or when asked to")]
fn print(text: &str) {
    anstream::eprintln!("{text}");
}
