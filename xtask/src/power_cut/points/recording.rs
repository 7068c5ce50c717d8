//! The recording: a home is installed on a drive whose writes are logged, then the manager upgrades itself, then a sub-agent gets another
//! release.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::super::block_log::BlockLog;
use super::super::machine::{Drive, Hardware};
use super::hosts::{Hosts, Wanted};
use super::setup::{INSTALLED, MANAGERS, Setup, order_file};
use super::{FileSystem, UPGRADES, Upgrade};
use crate::command::{read, say};
use crate::workspace;

/// For an installation and for an upgrade, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(900);
/// The interval of the queries of the status.
const POLL_INTERVAL: Duration = Duration::from_millis(1500);
/// With the shortest trial, the manager of a busy machine would not answer in time.
const TRIAL: &str = "echo upgradeTrial = \\\"15s\\\" >>/srv/aops/etc/conf.toml";
/// The only host of the machine.
const HOST: usize = 1;

/// What the kernel keeps is written back early, so that it lies between other writes.
const WRITE_BACK: &str =
    "echo 200 >/proc/sys/vm/dirty_expire_centisecs; echo 100 >/proc/sys/vm/dirty_writeback_centisecs";

pub(super) struct Recording {
    pub(super) log: BlockLog,
    /// The drive at the begin of the first window.
    pub(super) base: PathBuf,
    /// The number of entries that `base` has.
    pub(super) done: usize,
    /// The entries of each of [`UPGRADES`].
    pub(super) windows: Vec<Range<usize>>,
}

pub(super) fn record(setup: &Setup<'_>, file_system: FileSystem) -> Result<Recording> {
    let [base, drive, log] = ["base.img", "recorded.img", "writes.log"].map(|name| setup.directory.join(name));
    file_system.create(&base, file_system.size(), None)?;
    copy(&base, &drive)?;
    let mut logged = Drive::new(&format!("host-{HOST}"), &drive);
    logged.log = Some(log.clone());
    let drives = [Drive::new("root", &setup.root), Drive::new("tools", &setup.tools), logged];
    say("booting a virtual machine to record the writes of a self-upgrade and of a sub-agent upgrade");
    let hardware = Hardware { kernel: setup.kernel, drives: &drives, memory: 512, clock: None };
    let mut hosts = Hosts::boot(&setup.directory.join("machine"), &hardware)?;
    let mut windows = Vec::new();
    let recorded = upgrade_all(&mut hosts, &log, &mut windows);
    if recorded.is_err() {
        say(&hosts.logs(HOST));
    }
    recorded?;
    hosts.verb(&format!("close {HOST}"))?;
    hosts.shell("sync")?;
    hosts.cut()?;

    let log = BlockLog::open(&log)?;
    let done = windows.first().map_or(0, |window| window.start);
    let image = fs::OpenOptions::new().write(true).open(&base).context("cannot open the first image")?;
    log.apply(0..done, &image)?;
    check(&log, done, &base, &drive)?;
    Ok(Recording { log, base, done, windows })
}

/// Installs the home and upgrades it; notes which entries of the log are those of each upgrade.
fn upgrade_all(hosts: &mut Hosts, log: &Path, windows: &mut Vec<Range<usize>>) -> Result<()> {
    hosts.shell(WRITE_BACK)?;
    hosts.verb(&format!("open {HOST} {INSTALLED}"))?;
    hosts.verb(&format!(
        "enter {HOST} /tools/aops install --service none --agent-id demo --endpoint https://127.0.0.1:8888 --home /srv/aops \
         --version {} --trusted-key /tools/gateway/keys/aops.pub --ca-cert /tools/gateway/tls/cert.pem",
        MANAGERS[0]
    ))?;
    hosts.verb(&format!("enter {HOST} sh -c '{TRIAL}'"))?;
    let mut at = reached(hosts, log, Upgrade::wanted(None))?;
    for upgrade in UPGRADES {
        hosts.verb(&format!("order {HOST} {}", order_file(Some(upgrade))))?;
        let end = reached(hosts, log, Upgrade::wanted(Some(upgrade)))?;
        windows.push(at..end);
        at = end;
    }
    Ok(())
}

/// Waits until the host has the releases that are wanted and all is on its drive; returns the number of entries of the log.
fn reached(hosts: &mut Hosts, log: &Path, wanted: Wanted) -> Result<usize> {
    let started = Instant::now();
    let mut last = Value::Null;
    while !wanted.is_reached(&last) {
        if started.elapsed() > PATIENCE {
            bail!("the host did not come to {wanted:?} in {PATIENCE:?}; its last status: {last:#}");
        }
        std::thread::park_timeout(POLL_INTERVAL);
        last = hosts.statuses(&[HOST])?.remove(&HOST).unwrap_or(last);
    }
    hosts.shell("sync")?;
    Ok(BlockLog::open(log)?.entries().len())
}

/// The disk that is rebuilt from the whole log must be the recorded one: otherwise the log lacks something.
fn check(log: &BlockLog, done: usize, base: &Path, drive: &Path) -> Result<()> {
    let rebuilt = drive.with_extension("rebuilt");
    copy(base, &rebuilt)?;
    log.apply(done..log.entries().len(), &fs::OpenOptions::new().write(true).open(&rebuilt)?)?;
    let differs = Command::new("cmp").args([&rebuilt, drive]).output().context("cannot compare two images")?;
    ensure!(
        differs.status.success(),
        "the disk that is rebuilt from the log is not the recorded one: {}{}",
        String::from_utf8_lossy(&differs.stdout),
        String::from_utf8_lossy(&differs.stderr)
    );
    workspace::remove(&rebuilt)?;
    workspace::remove(drive)
}

/// Copies an image; what has only zeros takes no space.
pub(super) fn copy(image: &Path, to: &Path) -> Result<()> {
    read(Command::new("cp").args(["--sparse=always", "--"]).args([image, to])).map(drop)
}

impl Recording {
    /// Writes the drive as a power cut left it.
    pub(super) fn rebuild(&self, cut: &super::super::block_log::Cut, image: &Path) -> Result<()> {
        copy(&self.base, image)?;
        let file: File = fs::OpenOptions::new().write(true).open(image)?;
        self.log.apply_cut(self.done, cut, &file).with_context(|| format!("cannot rebuild {}", image.display()))
    }
}
