//! `cargo xtask bench install`: the cost of installing a package on a host, compared with a shell pipeline.
//!
//! ```text
//! aops      the manager: download over TLS, SHA-256 and signature, unpack, sync, move into place, `.complete`
//! pipeline  curl over TLS | zstd -d | tar -x, and b2sum of the package
//! ```
//!
//! Both install the same packages from the same gateway in turn, and nothing is removed before the end: ext4 searches the inodes freed
//! within the last minute for each new file, which would slow down the second one more than anything else. CPU time is user and system
//! together, of the manager's process and of the pipeline's children. The manager's includes its heartbeats; the pipeline neither syncs nor
//! verifies a signature.
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::heading;
use super::statistics::Samples;
use crate::command::{is_installed, read, say};
use crate::dist::{self, Target};
use crate::fleet::{Fleet, SOON, pid, quietly};
use crate::package::Package;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// How many times each of the two installs each package
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: u32,
    /// Measure this executable instead of building the one for hosts
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

/// The size of the package of this machine's programs and libraries.
const BINARIES_BYTES: u64 = 120_000_000;
const SMALL_FILES: usize = 20_000;
/// In the tree of small files.
const FILES_PER_DIRECTORY: usize = 50;

/// The CPU limit of aops, as a factor of the pipeline's CPU time.
const CPU_TARGET: f64 = 1.15;
const MEMORY_TARGET_KIB: u64 = 12 << 10;

/// The deadline for a package to be fetched and unpacked, or published by a debug build of the gateway.
const PATIENCE: Duration = Duration::from_secs(180);

/// One package, published for every round under a different name.
struct Load {
    name: &'static str,
    title: String,
    archive: PathBuf,
    aops: Figures,
    pipeline: Figures,
    /// Peak resident memory in KiB.
    peak: Vec<u64>,
}

/// Milliseconds.
#[derive(Default)]
struct Figures {
    cpu: Samples,
    wall: Samples,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    for (program, package) in [("curl", "curl"), ("zstd", "zstd"), ("tar", "tar"), ("b2sum", "coreutils")] {
        ensure!(
            is_installed(program),
            "cannot measure the pipeline: {program} not found; run: apt-get install {package}"
        );
    }
    let agent = match &arguments.executable {
        Some(executable) => executable.clone(),
        None => dist::build(Target::LinuxAmd64, dist::RELEASE)?,
    };
    let mut fleet = Fleet::new(&dist::gateway()?)?;
    let measured = measure(&mut fleet, &agent, arguments.rounds);
    if measured.is_err() {
        println!("Logs:\n{}", fleet.logs());
    }
    let (loads, [before, after]) = measured?;
    println!("\n{}\n", heading("cargo xtask bench install")?);
    println!("{:<46} {:>15} {:>15} {:>7}", "medians of each, CPU ms / wall ms", "aops", "pipeline", "CPU");
    for load in &loads {
        let shown = |figures: &Figures| {
            let median = |samples: &Samples| samples.median().unwrap_or_default();
            format!("{:.0} / {:.0}", median(&figures.cpu), median(&figures.wall))
        };
        let ratio = ratio(load);
        let verdict = if ratio <= CPU_TARGET { "met" } else { "MISSED" };
        println!("{:<46} {:>15} {:>15} {ratio:>6.2}x", load.title, shown(&load.aops), shown(&load.pipeline));
        println!("  target: at most {CPU_TARGET} times the CPU time: {verdict}");
        let peak = load.peak.iter().copied().max().unwrap_or_default();
        let verdict = if peak <= MEMORY_TARGET_KIB { "met" } else { "MISSED" };
        println!("  manager's peak resident memory: {peak} KiB; target: at most {MEMORY_TARGET_KIB} KiB: {verdict}");
    }
    println!("manager's resident memory: {before} KiB before the first package, {after} KiB after the last");
    Ok(())
}

fn ratio(load: &Load) -> f64 {
    match (load.aops.cpu.median(), load.pipeline.cpu.median()) {
        (Some(aops), Some(pipeline)) if pipeline > 0.0 => aops / pipeline,
        _ => f64::NAN,
    }
}

fn measure(fleet: &mut Fleet, agent: &Path, rounds: u32) -> Result<(Vec<Load>, [u64; 2])> {
    quietly(&mut fleet.gateway("init"))?;
    let manager = fleet.path("manager");
    fs::create_dir_all(manager.join("bin"))?;
    fs::copy(agent, manager.join("bin/aops")).with_context(|| format!("cannot copy {}", agent.display()))?;
    quietly(fleet.gateway("publish").args(["--name", "aops-spm", "--version", "0.1.0"]).arg(&manager))?;
    let (binaries, bytes) = binaries()?;
    let title = format!("{:.0} MB of binaries", bytes as f64 / 1e6);
    let mut loads = vec![
        publish(fleet, "binaries", title, &binaries, rounds)?,
        publish(fleet, "small", format!("{SMALL_FILES} small files"), &small_files()?, rounds)?,
    ];
    drop(binaries);
    fleet.write_fleet("heartbeatInterval = \"1s\"\n")?;
    fleet.start_gateway()?;
    quietly(&mut fleet.install(agent))?;
    let status = fleet.wait_for("the host to report", |status| status["gateway"]["connected"] == true)?;
    let manager = pid(&status["spm"]["pid"]).context("the status has no pid of the manager")?;
    let before = memory(manager, "VmRSS:")?;
    let mut wanted = "heartbeatInterval = \"1s\"\n".to_owned();
    for round in 1..=rounds {
        say(&format!("round {round} of {rounds}"));
        for load in &mut loads {
            pipeline(fleet, load, round)?;
            let name = format!("{}-{round}", load.name);
            wanted.push_str(&format!("[agents.{name}]\nversion = \"r0\"\n"));
            aops(fleet, load, &name, manager, &wanted)?;
        }
    }
    let status = fleet.status()?;
    ensure!(pid(&status["spm"]["pid"]) == Some(manager), "the manager was restarted during the measurement");
    Ok((loads, [before, memory(manager, "VmRSS:")?]))
}

/// Packs the package once, and publishes the same archive for each round.
fn publish(fleet: &Fleet, name: &'static str, title: String, package: &Package, rounds: u32) -> Result<Load> {
    say(&format!("packing {title}"));
    quietly(fleet.gateway("publish").args(package.arguments()))?;
    let arch = if cfg!(target_arch = "x86") { "386" } else { "amd64" };
    let archive = fleet.depot().join(format!("depot/{name}-r0_linux_{arch}.tar.zst"));
    ensure!(archive.is_file(), "the gateway did not create {}", archive.display());
    for round in 1..=rounds {
        let copy = fleet.path(&format!("{name}.tar.zst"));
        fs::copy(&archive, &copy)?;
        let mut publish = fleet.gateway("publish");
        publish.args(["--name", &format!("{name}-{round}"), "--version", "r0"]);
        quietly(publish.args(["--os", "linux", "--arch", arch]).arg(&copy))?;
    }
    Ok(Load { name, title, archive, aops: Figures::default(), pipeline: Figures::default(), peak: vec![] })
}

/// curl, zstd and tar in a pipe, then b2sum.
fn pipeline(fleet: &Fleet, load: &mut Load, round: u32) -> Result<()> {
    let directory = fleet.path(&format!("pipeline-{}-{round}", load.name));
    fs::create_dir_all(&directory)?;
    rustix::fs::sync();
    let file = load.archive.file_name().context("it has a name")?.to_string_lossy().into_owned();
    let (spent, started) = (spent_by_children()?, Instant::now());
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--cacert"]).arg(fleet.depot().join("tls/cert.pem"));
    curl.arg(format!("{}/api/download/{file}", fleet.url())).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut curl = curl.spawn().context("cannot run curl")?;
    let mut zstd = Command::new("zstd");
    zstd.args(["-d", "-c", "-q"]).stdin(curl.stdout.take().context("it is piped")?).stdout(Stdio::piped());
    let mut zstd = zstd.spawn().context("cannot run zstd")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "-C"]).arg(&directory).stdin(zstd.stdout.take().context("it is piped")?);
    let mut tar = tar.spawn().context("cannot run tar")?;
    for (name, child) in [("curl", &mut curl), ("zstd", &mut zstd), ("tar", &mut tar)] {
        let status = child.wait()?;
        ensure!(status.success(), "{name} failed: {status}");
    }
    read(Command::new("b2sum").arg(&load.archive))?;
    load.pipeline.wall.add(milliseconds(started));
    load.pipeline.cpu.add(spent_by_children()? - spent);
    Ok(())
}

/// The manager, from the first byte of the package until it is installed.
fn aops(fleet: &Fleet, load: &mut Load, name: &str, manager: u32, wanted: &str) -> Result<()> {
    rustix::fs::sync();
    at_rest(manager)?;
    fs::write(format!("/proc/{manager}/clear_refs"), "5").context("cannot reset the memory peak")?;
    fleet.write_fleet(wanted)?;
    let home = fleet.home();
    let is_empty = |name: &str| fs::read_dir(home.join(name)).is_ok_and(|mut entries| entries.next().is_none());
    let asked = Instant::now();
    let mut spent = spent_by(manager)?;
    while is_empty("staging") && is_empty("cache") {
        ensure!(asked.elapsed() < SOON, "the host does not start to install {name}");
        spent = spent_by(manager)?;
        std::thread::park_timeout(Duration::from_millis(1));
    }
    let started = Instant::now();
    let complete = home.join(format!("agents/{name}/r0/.complete"));
    while !complete.exists() {
        ensure!(started.elapsed() < PATIENCE, "{name} is not installed within {PATIENCE:?}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    let wall = milliseconds(started);
    load.aops.cpu.add(spent_by(manager)? - spent);
    load.aops.wall.add(wall);
    load.peak.push(memory(manager, "VmHWM:")?);
    fleet.wait_for_pid(name, None)?;
    Ok(())
}

/// Waits until the manager has used CPU only for heartbeats for a while.
fn at_rest(manager: u32) -> Result<()> {
    const STILL: Duration = Duration::from_millis(1500);
    const HEARTBEATS: f64 = 20.0;
    let asked = Instant::now();
    loop {
        let before = spent_by(manager)?;
        super::contestant::pass(STILL);
        if spent_by(manager)? - before <= HEARTBEATS {
            return Ok(());
        }
        ensure!(asked.elapsed() < SOON, "the manager does not become idle");
    }
}

/// User and system time of a process in milliseconds, including its ended threads.
fn spent_by(pid: u32) -> Result<f64> {
    ticks(&format!("/proc/{pid}/stat"), [11, 12])
}

/// The same of all child processes that were waited for.
fn spent_by_children() -> Result<f64> {
    ticks("/proc/self/stat", [13, 14])
}

/// The sum of two fields of a `stat` file (proc(5)), counted after the name.
fn ticks(file: &str, fields: [usize; 2]) -> Result<f64> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    let words: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let value = |field: usize| words.get(field)?.parse::<f64>().ok();
    match fields.map(value) {
        [Some(one), Some(other)] => Ok((one + other) * 1e3 / rustix::param::clock_ticks_per_second() as f64),
        _ => bail!("cannot parse {file}: {text:?}"),
    }
}

/// A memory field of a process's status, in KiB.
fn memory(pid: u32, line: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).context("cannot read a process's memory")?;
    let value = text.lines().find_map(|text| text.strip_prefix(line)).context("the field is missing")?;
    value.trim().trim_end_matches("kB").trim().parse().context("it is a number")
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Programs and libraries of this machine: always the same ones, by path.
fn binaries() -> Result<(Package, u64)> {
    const SIZES: std::ops::RangeInclusive<u64> = 1 << 16..=20 << 20;
    let sysroot = PathBuf::from(read(Command::new("rustc").args(["--print", "sysroot"]))?);
    let mut rest = vec![sysroot.join("lib"), "/usr/lib".into(), "/usr/bin".into()];
    let mut paths = Vec::new();
    while let Some(directory) = rest.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                rest.push(entry.path());
            } else if metadata.is_file() && SIZES.contains(&metadata.len()) {
                paths.push(entry.path());
            }
        }
    }
    paths.sort();
    let mut package = Package::control_sleeper("binaries", "r0");
    let mut bytes = 0;
    for (number, path) in paths.iter().enumerate() {
        let mut magic = [0; 4];
        let is_elf = fs::File::open(path)?.read_exact(&mut magic).is_ok() && &magic == b"\x7fELF";
        if is_elf && bytes < BINARIES_BYTES {
            let content = fs::read(path)?;
            bytes += content.len() as u64;
            package = package.with_file(&format!("lib/{number:05}"), content, 0o755);
        }
    }
    ensure!(bytes >= BINARIES_BYTES, "this machine has only {bytes} bytes of programs and libraries");
    Ok((package, bytes))
}

/// A tree of text files between 100 bytes and 4 KiB, the same on every machine.
fn small_files() -> Result<Package> {
    let mut package = Package::control_sleeper("small", "r0");
    let mut random = 1_u64;
    // Knuth's MMIX generator: its upper bits are random enough for text.
    let mut next = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for number in 0..SMALL_FILES {
        let mut text = String::new();
        let length = 100 + next(3_996) as usize;
        while text.len() < length {
            text.push_str(["lorem", "ipsum", "dolor", "value", "name", "key"][next(6) as usize]);
            text.push_str(&format!("-{}{}", next(10_000), [" ", "\n", " = "][next(3) as usize]));
        }
        let directory = number / FILES_PER_DIRECTORY;
        let path = format!("share/{:02}/{directory:03}/file-{number:05}.conf", directory / 20);
        package = package.with_file(&path, text, 0o644);
    }
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_grows() {
        let before = spent_by(std::process::id()).unwrap();
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(60) {
            std::hint::black_box(fs::metadata("/").unwrap());
        }
        assert!(spent_by(std::process::id()).unwrap() > before);
        assert!(memory(std::process::id(), "VmHWM:").unwrap() > 500);
    }
}
