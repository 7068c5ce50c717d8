//! Overall figures for operators: size, memory, restart latency, installation throughput.
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{build, heading, mebibytes};
use crate::command::{read, say};
use crate::fleet::{Fleet, SOON, pid, quietly};
use crate::package::Package;
use crate::processes;
use crate::wait::try_for;

/// Sub-agents that are killed once each: a second kill would measure the back-off.
pub(super) const SUB_AGENTS: usize = 20;
/// The idle time before the roles' memory is read: about twenty heartbeats.
pub(super) const IDLE: Duration = Duration::from_secs(20);
/// The size of the programs and libraries in the package that measures installation.
const BULK_BYTES: u64 = 100 << 20;

pub(crate) fn run() -> Result<()> {
    let agent = build(&["--no-default-features"], "aops-agent")?;
    let gateway = build(&[], "aops-gateway")?;
    let mut fleet = Fleet::new(&gateway)?;
    let figures = measure(&mut fleet, &agent, &gateway);
    if figures.is_err() {
        println!("Logs:\n{}", fleet.logs());
    }
    println!("\n{}\n", heading("cargo xtask bench")?);
    for (name, value) in figures? {
        println!("{name:<58} {value:>22}");
    }
    Ok(())
}

type Figure = (&'static str, String);

fn measure(fleet: &mut Fleet, agent: &Path, gateway: &Path) -> Result<Vec<Figure>> {
    let mut figures = vec![
        ("executable, as on a host (without the gateway)", mebibytes(fs::metadata(agent)?.len())),
        ("executable, with the gateway", mebibytes(fs::metadata(gateway)?.len())),
    ];
    say("setting up a host with 20 sub-agents");
    quietly(&mut fleet.gateway("init"))?;
    let manager = fleet.path("manager");
    fs::create_dir_all(manager.join("bin"))?;
    fs::copy(agent, manager.join("bin/aops"))?;
    quietly(fleet.gateway("publish").args(["--name", "aops-spm", "--version", "0.1.0"]).arg(&manager))?;
    let names: Vec<_> = (0..SUB_AGENTS).map(|number| format!("sleeper-{number:02}")).collect();
    for name in &names {
        quietly(fleet.gateway("publish").args(Package::sleeper(name, "1").arguments()))?;
    }
    let listed: String = names.iter().map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect();
    let desired = format!("heartbeatInterval = \"1s\"\n{listed}");
    fleet.write_fleet(&desired)?;
    fleet.start_gateway()?;
    quietly(&mut fleet.install(gateway))?;
    let all_run = |status: &Value| {
        let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
        agents.len() == SUB_AGENTS && agents.iter().all(|agent| agent["state"] == "running")
    };
    let status = fleet.wait_for("all sub-agents", all_run)?;

    say("memory of the idle roles");
    try_for(IDLE, || None::<()>);
    for (role, name) in [("spm", "manager, idle, 20 sub-agents: PSS"), ("spa", "watchdog, idle: PSS")] {
        let pid = pid(&status[role]["pid"]).with_context(|| format!("the status has no pid of {role}"))?;
        figures.push((name, proportional_memory(pid)?));
    }

    say("killing sub-agents");
    let mut latencies = Vec::new();
    for name in &names {
        latencies.push(restart_latency(fleet, name)?);
    }
    figures.push(("killed sub-agent until its successor is recorded", spread(latencies)));

    // Once each: a second kill would measure the back-off.
    for (role, name) in
        [("spm", "killed manager until its successor answers"), ("spa", "killed watchdog until its successor is known")]
    {
        say(&format!("killing {role}"));
        let status = fleet.wait_for("all to run", |status| all_run(status) && status["state"] == "running")?;
        let old = pid(&status[role]["pid"]).with_context(|| format!("the status has no pid of {role}"))?;
        let killed = Instant::now();
        processes::signal(old, Signal::KILL);
        fleet.wait_for("a successor", |status| pid(&status[role]["pid"]).is_some_and(|new| new != old))?;
        figures.push((name, spread(vec![killed.elapsed()])));
    }

    say("installing a large package");
    figures.push(("package fetched, verified, unpacked", throughput(fleet, &desired)?));
    Ok(figures)
}

/// The time from the kill to the record of the new process.
fn restart_latency(fleet: &Fleet, name: &str) -> Result<Duration> {
    let record = fleet.home().join("run/agents").join(format!("{name}.json"));
    let recorded = || {
        let value: Value = serde_json::from_slice(&fs::read(&record).ok()?).ok()?;
        pid(&value["pid"])
    };
    let old = recorded().with_context(|| format!("cannot read the record of {name}"))?;
    let killed = Instant::now();
    processes::signal(old, Signal::KILL);
    while recorded().is_none_or(|new| new == old) {
        ensure!(killed.elapsed() < SOON, "{name} is not restarted within {SOON:?}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    Ok(killed.elapsed())
}

/// Publishes a package of this machine's programs, and measures the host from the first byte to `.complete`.
fn throughput(fleet: &Fleet, desired: &str) -> Result<String> {
    let sysroot = PathBuf::from(read(Command::new("rustc").args(["--print", "sysroot"]))?);
    let mut package = Package::sleeper("bulk", "1");
    let mut bytes = 0;
    for directory in [sysroot.join("bin"), sysroot.join("lib"), "/usr/bin".into(), "/usr/lib".into()] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let metadata = entry.metadata()?;
            if metadata.is_file() && (1 << 16..=BULK_BYTES / 2).contains(&metadata.len()) && bytes < BULK_BYTES {
                bytes += metadata.len();
                package =
                    package.with_file(&format!("bulk/{}", entry.file_name().display()), fs::read(entry.path())?, 0o755);
            }
        }
    }
    quietly(fleet.gateway("publish").args(package.arguments()))?;
    let home = fleet.home();
    fleet.write_fleet(&format!("{desired}[agents.bulk]\nversion = \"1\"\n"))?;
    let is_empty = |name: &str| fs::read_dir(home.join(name)).is_ok_and(|mut entries| entries.next().is_none());
    let cached = || fs::read_dir(home.join("cache")).map_or(0, Iterator::count);
    let before = cached();
    let waited = Instant::now();
    while is_empty("staging") && cached() == before {
        ensure!(waited.elapsed() < SOON, "the host does not start to install the package");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    let started = Instant::now();
    try_for(SOON * 2, || home.join("agents/bulk/1/.complete").exists().then_some(()))
        .context("the package is not installed in time")?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(format!("{:.0} MB in {seconds:.1} s, {:.0} MB/s", megabytes(bytes), megabytes(bytes) / seconds))
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The process's proportional share of the memory that it maps.
pub(super) fn proportional_memory(pid: u32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("cannot read a process's memory")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("PSS is missing")?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().context("PSS is a number")?;
    Ok(mebibytes(kibibytes << 10))
}

/// Median and 95th percentile; a single sample is printed alone.
fn spread(mut samples: Vec<Duration>) -> String {
    if let [only] = samples[..] {
        return format!("{:.0} ms", only.as_secs_f64() * 1e3);
    }
    samples.sort_unstable();
    let at = |share: f64| {
        let index = (share * samples.len() as f64).ceil() as usize;
        samples.get(index.saturating_sub(1)).copied().unwrap_or_default()
    };
    format!("{:.0} ms, p95 {:.0} ms", at(0.5).as_secs_f64() * 1e3, at(0.95).as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_p95_are_samples() {
        let samples = (1..=20).map(Duration::from_millis).collect();
        assert_eq!(spread(samples), "10 ms, p95 19 ms");
        assert_eq!(spread(vec![Duration::from_millis(7)]), "7 ms");
        assert_eq!(spread(Vec::new()), "0 ms, p95 0 ms");
    }
}
