//! `cargo xtask bench upgrade`: measures upgrades of the manager and of a sub-agent, without a service manager and under systemd: how long
//! something is down, the CPU time, and the bytes written.
//!
//! The manager goes back and forth between two releases that differ only in their bytes. A client holds a connection to the old manager,
//! which closes it on exit, and then tries every millisecond until the new manager answers. A sub-agent goes round three releases of a
//! program that reports, by its own clock, when it is stopped and when it runs. In the same container, in the same round, systemd restarts
//! the unit of a minimal supervisor in C (the floor) with the same program. systemd runs in a disposable container: nothing is installed on
//! this machine.
//!
//! CPU time and bytes are those of `/proc` (`spent`): own figures of the live processes plus those of the children that they have waited
//! for, so every one-shot and each replaced manager is counted. Under systemd, init and all below it count, so that what systemd does for
//! a start is a part on both sides; the container's files are in memory, so no bytes are counted there.

mod figures;
mod host;
mod location;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use self::figures::Figures;
use self::host::Host;
use self::location::{DEPOT, GATEWAY_LOG, HOME, Location, PROGRAM};
use super::contestant::desired;
use super::reports::Reports;
use super::{build, heading, supervise};
use crate::command::{is_root, read, say};
use crate::container::Container;
use crate::fleet::{Fleet, next_manager, quietly};
use crate::package::{Package, arch};
use crate::{apt, rootfs, test};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The number of upgrades of the manager, and of a sub-agent, under each service manager; one takes about 25 s
    #[arg(long, value_name = "N", default_value_t = 14, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The number of running sub-agents beside the one that is upgraded
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=500))]
    agents: u16,
    /// Which service manager starts the manager
    #[arg(long, value_enum, default_value_t = Services::Both)]
    service: Services,
    /// The executable to use [default: the release is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Services {
    None,
    Systemd,
    Both,
}

/// A service manager, and the limit of the time without a manager, in milliseconds.
struct Service {
    name: &'static str,
    most: f64,
    measure: fn(&Programs, &Arguments, &mut Figures) -> Result<()>,
}

const NONE: Service = Service { name: "without a service manager", most: 100.0, measure: alone };
/// Its units have `RestartSec=1`.
const SYSTEMD: Service = Service { name: "under systemd", most: 1_500.0, measure: under_systemd };

/// The installed release and the other one.
const RELEASES: [&str; 2] = ["0.1.0", "0.1.1"];
/// The sub-agent that is upgraded, and its releases. A host keeps two, so each of three is fetched again in its turn.
const CHANGED: &str = "changed";
const SUB_AGENT_RELEASES: [&str; 3] = ["1", "2", "3"];
/// The size of its content beside the program, which cannot be compressed: a middling agent.
const CONTENT_BYTES: usize = 8 << 20;

const ADDRESS: &str = "127.0.0.1:8888";

struct Programs {
    aops: PathBuf,
    floor: PathBuf,
    sleeper: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let [floor, sleeper] = supervise::compiled()?;
    let aops = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => build(&[], "aops-gateway")?,
    };
    let programs = Programs { aops, floor, sleeper };
    println!("\n{}", heading("cargo xtask bench upgrade")?);
    let services = match arguments.service {
        Services::None => &[NONE][..],
        Services::Systemd => &[SYSTEMD],
        Services::Both => &[NONE, SYSTEMD],
    };
    for service in services {
        let mut figures = Figures::default();
        let measured = (service.measure)(&programs, arguments, &mut figures);
        // Print the figures even if a later step failed.
        print!("{}", figures.shown(service, arguments.agents));
        measured?;
    }
    Ok(())
}

fn alone(programs: &Programs, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
    let mut fleet = Fleet::new(&programs.aops)?;
    let (socket, _) = Location::Alone(&fleet).reports();
    prepare(&fleet, programs, arguments, &socket, figures)?;
    fleet.start_gateway()?;
    let location = Location::Alone(&fleet);
    let reports = Reports::listen(&location.reports().1)?;
    quietly(&mut fleet.install(&programs.aops))?;
    Host::new(location, arguments, reports).measure(figures)
}

fn under_systemd(programs: &Programs, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
    let rootfs = match root_file_system() {
        Ok(rootfs) => rootfs,
        Err(error) => {
            say(&format!("skipping the measurement under systemd: {error:#}"));
            return Ok(());
        }
    };
    say("booting a container");
    let container = Container::systemd_of(rootfs);
    let location = Location::Systemd(&container);
    let (inside, outside) = location.reports();
    let fleet = Fleet::new(&programs.aops)?;
    prepare(&fleet, programs, arguments, &inside, figures)?;
    let reports = Reports::listen(&outside)?;
    container.copy_in(&programs.aops, PROGRAM, 0o755);
    location.install_floor(&programs.floor, &programs.sleeper)?;
    read(Command::new("cp").arg("-a").args([fleet.depot(), container.path(DEPOT)]))?;
    let serve = format!("exec {PROGRAM} gateway run --dir {DEPOT} --listen {ADDRESS} 2>{GATEWAY_LOG}");
    let gateway = container.spawn(&["sh", "-c", &serve]);
    gateway.line();
    let install = format!(
        "{PROGRAM} install --agent-id demo --endpoint https://{ADDRESS} --home {HOME} \
         --trusted-key {DEPOT}/keys/aops.pub --ca-cert {DEPOT}/tls/cert.pem; systemctl is-active aops-spm"
    );
    container.shell(&install).expect_success();
    Host::new(location, arguments, reports).measure(figures)
}

/// The root file system of containers.
fn root_file_system() -> Result<PathBuf> {
    ensure!(is_root(), "cannot boot a container without root");
    apt::install(test::NEEDS)?;
    rootfs::get()
}

/// Fills a gateway that is not started yet with both releases of the manager, the sub-agents, and both releases of the one that is upgraded,
/// which reports its start to `socket`.
fn prepare(
    fleet: &Fleet,
    programs: &Programs,
    arguments: &Arguments,
    socket: &Path,
    figures: &mut Figures,
) -> Result<()> {
    say(&format!("publishing {} packages", usize::from(arguments.agents) + RELEASES.len() + SUB_AGENT_RELEASES.len()));
    quietly(&mut fleet.gateway("init"))?;
    let publish = |package: &Package| quietly(fleet.gateway("publish").args(package.arguments()));
    let package =
        |name: &str, version: &str| fleet.depot().join(format!("depot/{name}-{version}_linux_{}.tar.zst", arch()));
    for version in RELEASES {
        publish(&next_manager(&programs.aops, version)?)?;
    }
    let unpacked = std::fs::metadata(&programs.aops)?.len() + RELEASES[0].len() as u64;
    figures.manager.set_sizes(&package("aops-spm", RELEASES[0]), unpacked)?;
    for name in names(arguments) {
        publish(&Package::sleeper(&name, "1"))?;
    }
    let sleeper = std::fs::read(&programs.sleeper)?;
    for (version, seed) in SUB_AGENT_RELEASES.into_iter().zip(1..) {
        let command = ["bin/sleeper", &socket.display().to_string(), CHANGED];
        let package = Package::native(CHANGED, version, &command, "").with_file("bin/sleeper", &sleeper, 0o755);
        publish(&package.with_file("data", noise(seed), 0o644))?;
    }
    let unpacked = (sleeper.len() + CONTENT_BYTES) as u64;
    figures.sub_agent.set_sizes(&package(CHANGED, SUB_AGENT_RELEASES[0]), unpacked)?;
    fleet.write_fleet(&wanted(arguments, RELEASES[0], SUB_AGENT_RELEASES[0]))
}

/// Bytes that cannot be compressed, by a xorshift generator.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(CONTENT_BYTES / 8).flatten().collect()
}

fn names(arguments: &Arguments) -> Vec<String> {
    (0..arguments.agents).map(|number| format!("sleeper-{number:03}")).collect()
}

fn wanted(arguments: &Arguments, manager: &str, sub_agent: &str) -> String {
    let others = desired(&names(arguments), "1s");
    format!("manager.version = {manager:?}\n{others}[agents.{CHANGED}]\nversion = {sub_agent:?}\n")
}
