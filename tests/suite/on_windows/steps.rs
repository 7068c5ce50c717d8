//! Upgrades of the manager on Windows, killed at each of their steps. `cargo xtask test-windows --kill-steps` runs this: it equips the
//! executable with hooks that count the calls which change something, and that end a process before one of them
//! (xtask/src/test_windows/steps.rs).
//!
//! ```text
//! alone       the process is killed; what is left recovers. Windows restarts failed services, and so does this test if both roles are dead
//! together    every process of the program is killed; the roles are started, as Windows does with a failed service
//! power cut   the same, with the sub-agents; Windows boots
//! ```
//!
//! `AOPS_KILLS` is the number of kills, drawn by `AOPS_UPGRADE_SEED`; without it, each step is tried in each way.
#![allow(clippy::print_stderr, reason = "the steps and the results are its output")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::{agents_of, gateway, set_trial, with_services};
use crate::support::gateway::Gateway;
use crate::support::host::{TestHost, pid};
use crate::support::release::{self, NAME};
use crate::support::wait::try_for;
use crate::upgrades::self_upgrades::{ENDED, expect_in_place, order, runs, seed};

/// Upgrades go round, so that each release is downloaded again.
const RELEASES: [&str; 3] = ["1.0.0", "2.0.0", "3.0.0"];
const ROLES: [&str; 3] = ["spm", "spa", "other"];
/// The hosts that are worked on at the same time.
const HOSTS: usize = 3;
/// Replaced executables that may be left until the roles are restarted.
const MAX_MOVED_AWAY: usize = 12;
/// From the end of an upgrade to its last step, where that is not seen.
const AFTERWARDS: Duration = Duration::from_secs(15);

/// After so many polls without either role, no role starts the other.
const DEAD: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Alone,
    Together,
    PowerCut,
}

/// A step of an upgrade: the call of that number in the processes of a role.
#[derive(Debug, Clone)]
struct Kill {
    role: usize,
    number: u32,
    way: Way,
    /// What the call was when nothing was killed.
    call: String,
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}: {}", ROLES[self.role], self.number, self.way, self.call)
    }
}

/// The words that the hooks of a host read and write, see steps.c.
struct Hooks(File);

impl Hooks {
    const RECORDING: u64 = 0;
    const TARGET_ROLE: u64 = 4;
    const TARGET_NUMBER: u64 = 8;
    const TOGETHER: u64 = 12;
    const HAS_FIRED: u64 = 16;
    const HALTED: u64 = 20;
    const COUNTS: u64 = 24;
    const SIZE: u64 = 48;

    /// Processes that start later have the hooks.
    fn of(host: &TestHost) -> Hooks {
        let path = host.beside("steps");
        let file = File::options().read(true).write(true).create_new(true).open(path).expect("the directory is ours");
        file.set_len(Hooks::SIZE).expect("the file is ours");
        Hooks(file)
    }

    fn set(&self, word: u64, value: u32) {
        self.0.write_all_at(&value.to_le_bytes(), word).expect("the file is ours");
    }

    fn has_fired(&self) -> bool {
        let mut word = [0; 4];
        self.0.read_exact_at(&mut word, Hooks::HAS_FIRED).expect("the file is ours");
        u32::from_le_bytes(word) != 0
    }

    /// Counts from the start, and kills at the target.
    fn arm(&self, kill: &Kill) {
        self.disarm();
        self.set(Hooks::TARGET_ROLE, kill.role as u32);
        self.set(Hooks::TOGETHER, u32::from(kill.way != Way::Alone));
        self.set(Hooks::TARGET_NUMBER, kill.number);
    }

    fn disarm(&self) {
        self.set(Hooks::TARGET_NUMBER, 0);
        self.set(Hooks::RECORDING, 0);
        self.set(Hooks::HAS_FIRED, 0);
        self.set(Hooks::HALTED, 0);
        (0..ROLES.len() as u64).for_each(|role| self.set(Hooks::COUNTS + 4 * role, 0));
    }
}

/// A host with services, and its gateway.
struct Slot {
    gateway: Gateway,
    host: TestHost,
    hooks: Hooks,
    /// The index of the release that runs.
    release: usize,
    agents: [u32; 2],
}

impl Slot {
    fn new() -> Slot {
        let packages = RELEASES[1..].iter().map(|version| release::good(version)).collect::<Vec<_>>();
        let gateway = gateway(&packages.iter().collect::<Vec<_>>());
        let host = TestHost::new();
        let hooks = Hooks::of(&host);
        let host = with_services(host, &gateway);
        set_trial(&host, "10s");
        let agents = agents_of(&host);
        Slot { gateway, host, hooks, release: 0, agents }
    }

    /// The steps of an upgrade that nothing disturbs.
    fn steps(&mut self) -> Vec<(usize, u32, String)> {
        self.hooks.disarm();
        self.hooks.set(Hooks::RECORDING, 1);
        let next = (self.release + 1) % RELEASES.len();
        order(&self.gateway, RELEASES[next]);
        self.host.wait_for_status(RELEASES[next], ENDED, |status| runs(status, RELEASES[next]));
        let log = self.host.beside("steps.log");
        let read = || fs::read_to_string(&log).unwrap_or_default();
        // The removal of what was downloaded is the last part of an upgrade; heartbeats and their records never end.
        let is_swept = || {
            let cache = fs::read_dir(self.host.home().join("cache")).expect("a directory");
            let is_empty = cache.flatten().all(|entry| !entry.file_name().to_string_lossy().contains("aops-spm"));
            let swept =
                ["bin/aops.prev", "bin/.aops.next"].map(|name| self.host.program(name).exists()) == [true, false];
            (is_empty && swept).then_some(())
        };
        let _ = try_for(AFTERWARDS, is_swept);
        self.hooks.disarm();
        self.release = next;
        let lines = read();
        fs::remove_file(&log).expect("it was written");
        assert!(!lines.is_empty(), "the executable has no hooks; run `cargo xtask test-windows --kill-steps`");
        let step = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let name = words.next().unwrap_or_default();
            let role = ROLES.iter().position(|role| *role == name).expect("a role");
            let number = words.next().and_then(|number| number.parse().ok()).expect("a number");
            (role, number, words.next().unwrap_or_default().to_owned())
        };
        lines.lines().map(step).collect()
    }

    /// An upgrade that is killed; whether the step came.
    fn kill(&mut self, kill: &Kill) -> bool {
        let (before, next) = (RELEASES[self.release], RELEASES[(self.release + 1) % RELEASES.len()]);
        self.release = (self.release + 1) % RELEASES.len();
        self.hooks.arm(kill);
        order(&self.gateway, next);
        self.host.wait_for_status(&format!("the step or the end of {kill}"), ENDED, |status| {
            self.hooks.has_fired() || runs(status, next)
        });
        let came = self.hooks.has_fired();
        if came && kill.way != Way::Alone {
            let present = ["bin/aops", "bin/aops-spa"].map(|name| self.host.program(name).exists());
            assert!(present.contains(&true), "{kill}: both executables are missing");
            let ended = try_for(ENDED, || {
                let left = ["spm", "spa"].map(|role| self.host.processes_of_role(role).len());
                (left == [0, 0]).then_some(())
            });
            assert!(ended.is_some(), "{kill}: processes are left: {:?}", self.host.processes());
        }
        self.hooks.disarm();
        match kill.way {
            Way::Together if came => drop(self.host.control(&["start"])),
            Way::PowerCut if came => self.host.reboot(),
            _ => (),
        }
        let both_dead = Cell::new(0);
        let status = self.host.wait_for_status(&format!("either release after {kill}"), ENDED, |status| {
            // Windows would restart a failed service; Wine does not. A role whose companion lives is restarted by it.
            let is_dead = ["spm", "spa"].iter().all(|role| pid(&status[role]["pid"]).is_none());
            both_dead.set(if is_dead { both_dead.get() + 1 } else { 0 });
            if both_dead.get() == DEAD {
                self.host.control(&["start"]);
            }
            runs(status, before) || runs(status, next)
        });
        if runs(&status, before) {
            // The next attempt may have begun.
            self.host.control(&["retry", NAME]);
            self.host.wait_for_status(&format!("{next} after {kill}"), ENDED, |status| runs(status, next));
        }
        let agents = agents_of(&self.host);
        if kill.way == Way::PowerCut {
            self.agents = agents;
        }
        assert_eq!(agents, self.agents, "{kill}: sub-agents were restarted");
        let in_place = if next == RELEASES[0] { release::tested() } else { release::executable(next) };
        expect_in_place(&self.host, &in_place);
        let names = fs::read_dir(self.host.home().join("bin")).expect("a directory").flatten();
        let away = names.filter(|entry| entry.file_name().to_string_lossy().ends_with(".old")).count();
        assert!(away <= MAX_MOVED_AWAY, "{kill}: {away} replaced executables are left");
        came
    }
}

#[test]
fn a_self_upgrade_that_is_killed_at_any_step_strands_no_host() {
    let mut first = Slot::new();
    let steps = first.steps();
    let mut by_call: BTreeMap<(usize, String), u32> = BTreeMap::new();
    for (role, _, call) in &steps {
        let function = call.split(' ').next().unwrap_or_default();
        *by_call.entry((*role, function.to_owned())).or_default() += 1;
    }
    eprintln!("{} steps:", steps.len());
    by_call.iter().for_each(|((role, function), count)| eprintln!("  {:<6}{count:>4} {function}", ROLES[*role]));

    let ways = [Way::Alone, Way::Together, Way::PowerCut];
    let mut kills: Vec<Kill> = steps
        .into_iter()
        .flat_map(|(role, number, call)| ways.map(|way| Kill { role, number, way, call: call.clone() }))
        .collect();
    fastrand::Rng::with_seed(seed()).shuffle(&mut kills);
    if let Some(sample) = std::env::var("AOPS_KILLS").ok().and_then(|sample| sample.parse().ok()) {
        kills.truncate(sample);
    }
    let (total, left, came) = (kills.len(), Mutex::new(kills), Mutex::new(0));
    let work = |mut slot: Slot| {
        loop {
            let Some(kill) = left.lock().expect("no holder panics").pop() else { break };
            let is_killed = slot.kill(&kill);
            eprintln!("{kill}: {}", if is_killed { "recovered" } else { "the step was not reached" });
            *came.lock().expect("no holder panics") += u32::from(is_killed);
        }
    };
    thread::scope(|scope| {
        for _ in 1..HOSTS {
            scope.spawn(|| work(Slot::new()));
        }
        work(first);
    });
    let came = *came.lock().expect("no holder panics");
    eprintln!("{came} of {total} steps were reached and killed, 0 hosts stranded");
    assert!(came * 2 >= u32::try_from(total).expect("it is small"), "too few steps were reached");
}
