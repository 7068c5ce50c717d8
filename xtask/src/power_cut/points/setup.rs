//! What both machines have, that of the recording and those of the checks: a root file system, a gateway's directory, the releases.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::super::host::Parts;
use super::super::image::Image;
use super::super::kernel::Kernel;
use super::super::releases::sub_agent;
use super::{FileSystem, Upgrade};
use crate::command::{read, say};
use crate::dist::sha256;
use crate::fleet::{Fleet, next_manager, quietly};
use crate::package::Package;
use crate::{processes, workspace};

/// The installed release and the next one, of the manager and of the sub-agent that is upgraded.
pub(super) const MANAGERS: [&str; 2] = ["0.1.0", "0.1.1"];
pub(super) const RELEASES: [&str; 2] = ["7.1.0", "7.1.1"];
pub(super) const CHANGED: &str = "changed";
/// A sub-agent that stays as it is.
pub(super) const BYSTANDER: &str = "bystander";

/// What the gateway orders before any upgrade: a file of the drive `tools`.
pub(super) const INSTALLED: &str = "installed.toml";

/// Where the image has `guest.sh`.
pub(super) const PROGRAM: &str = "/usr/local/sbin/hosts";
const GUEST: &str = include_str!("guest.sh");

/// How the name of the installer begins that a gateway serves beside the packages.
const INSTALLER: &str = "aops-agent-service";

/// The machine's id: a home detects by it that it was copied to another machine.
const MACHINE_ID: &str = "6f2c3b0d9a4e4d0f8a51c7e2b8d46913\n";

/// Mebibytes; what is not written takes no space.
const TOOLS_SIZE: u64 = 400;

pub(super) struct Setup<'a> {
    pub(super) directory: PathBuf,
    pub(super) kernel: &'a Kernel,
    pub(super) root: PathBuf,
    pub(super) tools: PathBuf,
    /// By its version, the SHA-256 of each executable, and of each release's list of checksums.
    pub(super) managers: BTreeMap<&'static str, String>,
    pub(super) releases: BTreeMap<&'static str, String>,
}

impl<'a> Setup<'a> {
    pub(super) fn new(directory: &Path, parts: &Parts<'a>, file_system: FileSystem) -> Result<Setup<'a>> {
        let tools = directory.join("tools");
        fs::create_dir_all(&tools).with_context(|| format!("cannot create {}", tools.display()))?;
        // An emulated machine reads them again and again: without symbols, a debug build is a third.
        let stripped = |name: &str, file: &Path| -> Result<PathBuf> {
            let stripped = tools.join(name);
            read(Command::new("strip").arg("-o").args([&stripped, file])).map(|_| stripped)
        };
        let executable = stripped("aops", parts.executable)?;
        let gateway = stripped("aops-gateway", parts.gateway)?;
        let mut setup = Setup {
            directory: directory.to_owned(),
            kernel: parts.kernel,
            root: directory.join("root.img"),
            tools: directory.join("tools.img"),
            managers: BTreeMap::new(),
            releases: BTreeMap::new(),
        };
        setup.make_gateway(&executable, &gateway, &tools)?;
        for upgrade in [None, Some(Upgrade::Manager), Some(Upgrade::SubAgent)] {
            fs::write(tools.join(order_file(upgrade)), order(upgrade))?;
        }
        FileSystem::Ext4.create(&setup.tools, TOOLS_SIZE, Some(&tools))?;
        workspace::remove(&tools)?;
        let modules = file_system.modules().join("\n");
        let mut image = Image::new(parts.root, parts.kernel);
        image.file(PROGRAM, GUEST, 0o755);
        image.file("/etc/machine-id", MACHINE_ID, 0o444);
        image.file("/etc/modules-load.d/drives.conf", &modules, 0o644);
        image.write(&setup.root)?;
        Ok(setup)
    }

    /// A gateway's directory with every release; it has run once, so that its lineage is the same wherever it runs.
    fn make_gateway(&mut self, executable: &Path, gateway: &Path, tools: &Path) -> Result<()> {
        say("publishing the releases");
        let mut fleet = Fleet::new(gateway)?;
        quietly(&mut fleet.gateway("init"))?;
        let publish = |package: &Package, file: &str| -> Result<String> {
            quietly(fleet.gateway("publish").args(package.arguments()))?;
            let file = package.path().join(file);
            Ok(sha256(&fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?))
        };
        for version in MANAGERS {
            self.managers.insert(version, publish(&next_manager(executable, version)?, "bin/aops")?);
        }
        for version in RELEASES {
            self.releases.insert(version, publish(&sub_agent(version), "SUMS")?);
        }
        publish(&Package::sleeper(BYSTANDER, "1"), "bin/run")?;
        fleet.write_fleet(&order(None))?;
        let gateway = fleet.start_gateway()?;
        processes::signal(gateway, Signal::KILL);
        // Each host's gateway would read the installer that it serves.
        for served in fs::read_dir(fleet.depot().join("depot")).context("cannot list the depot")? {
            let path = served.context("cannot list the depot")?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(INSTALLER)) {
                workspace::remove(&path)?;
            }
        }
        read(Command::new("cp").arg("-a").args([fleet.depot(), tools.join("gateway")])).map(drop)
    }
}

/// The file that has what the gateway orders to begin an upgrade.
pub(super) fn order_file(upgrade: Option<Upgrade>) -> &'static str {
    match upgrade {
        None => INSTALLED,
        Some(Upgrade::Manager) => "manager.toml",
        Some(Upgrade::SubAgent) => "sub-agent.toml",
    }
}

fn order(upgrade: Option<Upgrade>) -> String {
    let wanted = Upgrade::wanted(upgrade);
    format!(
        "heartbeatInterval = \"3s\"\nmanager.version = {:?}\n[agents.{BYSTANDER}]\nversion = \"1\"\n[agents.{CHANGED}]\nversion = {:?}\n",
        wanted.manager, wanted.release
    )
}

impl FileSystem {
    /// The modules that a machine needs for its logged drive.
    fn modules(self) -> &'static [&'static str] {
        match self {
            FileSystem::Ext4 => &["virtio_blk"],
            FileSystem::Xfs => &["virtio_blk", "xfs"],
        }
    }

    /// Creates an image of so many mebibytes with this file system, and in it a copy of what a directory has.
    pub(super) fn create(self, image: &Path, size: u64, content: Option<&Path>) -> Result<()> {
        workspace::remove(image)?;
        File::create(image)
            .and_then(|file| file.set_len(size << 20))
            .with_context(|| format!("cannot create {}", image.display()))?;
        let mut make = match self {
            FileSystem::Ext4 => {
                let mut make = Command::new("mke2fs");
                // A small journal wraps within an upgrade.
                make.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-J", "size=4"]);
                make.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
                if let Some(content) = content {
                    make.arg("-d").arg(content);
                }
                make
            }
            FileSystem::Xfs => {
                let mut make = Command::new("mkfs.xfs");
                make.args(["-q", "-f"]);
                make
            }
        };
        read(make.arg(image)).map(drop)
    }
}
