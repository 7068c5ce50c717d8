//! `cargo xtask power-cut`: cuts the power of virtual machines in mid-upgrade, and checks that no host is ever stranded.
#![allow(clippy::print_stdout, reason = "the report is its output")]
#![allow(dead_code, reason = "the cuts follow")]

mod image;
mod kernel;
mod machine;

use std::time::Duration;

use anyhow::Result;

use self::image::Image;
use self::machine::{Drive, HOST_ADDRESS, Hardware, Machine, NEEDS};
use crate::rootfs::Suite;
use crate::{apt, fleet, rootfs};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Whose kernel and systemd the machines have
    #[arg(long, value_enum, default_value_t = Suite::Bookworm)]
    suite: Suite,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    apt::install(NEEDS)?;
    let (root, kernel) = (rootfs::of(arguments.suite)?, kernel::get(arguments.suite)?);
    let directory = tempfile::Builder::new().prefix("aops-machine-").tempdir()?;
    fleet::clean_up_when_interrupted(directory.path())?;
    let disk = directory.path().join("disk.img");
    Image::new(&root, &kernel).write(&disk)?;
    let drives = [Drive::new("root", &disk)];
    let hardware = Hardware { kernel: &kernel, drives: &drives, clock: None };
    let boot = || Machine::boot(directory.path(), &hardware);
    let mut machine = boot()?;
    println!("up after {:?}, this machine is {HOST_ADDRESS}", machine.booted_in());
    let facts = "uname -r; systemctl --version | head -1; cat /proc/uptime; ip -br address; echo kept >/kept; sync; echo lost >/lost";
    print!("{}", machine.read(facts, Duration::from_secs(30))?);
    machine.cut()?;
    let mut machine = boot()?;
    println!("up again after {:?}", machine.booted_in());
    print!(
        "{}",
        machine
            .read("ls -l /kept /lost || true; systemctl is-system-running; systemd-analyze", Duration::from_secs(30))?
    );
    machine.power_off()
}
