//! `cargo xtask full`: everything that CI samples, whole, and what takes too long for CI, with a report at the end. Takes hours on two
//! cores.
//!
//! ```text
//! part          CI                                  here
//! scenarios     a few bad releases, short chaos     every bad release, every shortage of space, minutes of chaos
//! unit tests    256 cases for each property         20,000
//! fuzz          seconds for each parser             minutes
//! stranded      24 kills at steps drawn by a seed    each step of an upgrade, alone and together
//! durability    -                                   whole, with a release build
//! power-cut     3 cuts, 10 points                   100 cuts, 20 jumps of the clock, 300 points; other kernels and file systems
//! dist, rpm     profile ci, 64-bit installed       as handed out; installed and upgraded in both widths and in virtual machines
//! scenarios     of Linux in 64 bit                   in 32 bit, too; and as on Linux 3.10, in both widths
//! for Windows   most scenarios                       every scenario; upgrades killed at each step
//! endurance     -                                   1,000 upgrades of the manager, and 200 under load
//! ```
//!
//! A part that fails does not stop the others.
#![allow(clippy::print_stdout, reason = "the report is its output")]

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::ci;
use crate::command::cargo;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The parts to run [default: all]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(PARTS.iter().map(|part| part.name)))]
    names: Vec<String>,
}

/// Something that CI runs in part only.
struct Part {
    name: &'static str,
    words: &'static [&'static str],
    /// Variables that make tests run whole.
    environment: &'static [(&'static str, &'static str)],
    is_cargo: bool,
}

const PARTS: &[Part] = &[
    Part {
        environment: &[("AOPS_UPGRADES", "all"), ("AOPS_DOWNLOADS", "200"), ("AOPS_CHAOS_SECONDS", "600")],
        ..task("scenarios", &["test", "--test", "suite"])
    },
    Part {
        environment: &[("PROPTEST_CASES", "20000")],
        is_cargo: true,
        ..task("unit-tests", &["test", "--locked", "--workspace", "--bins"])
    },
    task("fuzz", &["fuzz", "--seconds", "120"]),
    task("stranded", &["stranded", "--homes", "12"]),
    task("durability", &["durability"]),
    task("power-cut", &["power-cut", "--cuts", "100", "--clock-jumps", "20", "--points", "300"]),
    task("power-cut-xfs", &["power-cut", "--cuts", "0", "--points", "60", "--filesystem", "xfs"]),
    task(
        "power-cut-bullseye",
        &["power-cut", "--cuts", "10", "--clock-jumps", "4", "--points", "0", "--suite", "bullseye"],
    ),
    task(
        "power-cut-trixie",
        &["power-cut", "--cuts", "10", "--clock-jumps", "4", "--points", "0", "--suite", "trixie"],
    ),
    task("dist", &["dist"]),
    task("rpm", &["rpm", "--lint"]),
    task("test-packages", &["test-packages"]),
    task("power-cut-deb-bullseye", &["power-cut", "--cuts", "6", "--clock-jumps", "2", "--deb", "--suite", "bullseye"]),
    task("power-cut-deb-trixie", &["power-cut", "--cuts", "6", "--clock-jumps", "2", "--deb", "--suite", "trixie"]),
    task("test-packages-386", &["test-packages", "--target", "linux/386"]),
    task("scenarios-386", &["test", "--target", "linux/386", "--test", "suite"]),
    task("old-kernel", &["test", "--target", "linux/amd64", "--old-kernel"]),
    task("old-kernel-386", &["test", "--target", "linux/386", "--old-kernel"]),
    task("scenarios-for-windows", &["test-windows", "--scenarios", "--whole", "--profile", "release"]),
    task("kill-steps-for-windows", &["test-windows", "--kill-steps", "--profile", "release"]),
    task(
        "scenarios-for-windows-386",
        &["test-windows", "--scenarios", "--profile", "release", "--target", "windows/386"],
    ),
    task("endurance", &["endurance", "--upgrades", "1000", "--homes", "16"]),
    task("endurance-under-load", &["endurance", "--upgrades", "200", "--homes", "4", "--agents", "30", "--load"]),
];

const fn task(name: &'static str, words: &'static [&'static str]) -> Part {
    Part { name, words, environment: &[], is_cargo: false }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let is_chosen = |part: &&Part| arguments.names.is_empty() || arguments.names.iter().any(|name| name == part.name);
    let mut report = Vec::new();
    let mut failed = Vec::new();
    for part in PARTS.iter().filter(is_chosen) {
        let began = Instant::now();
        let mut seen = ci::Seen::default();
        let outcome = ci::in_foreground(part.name, &mut part.command(), &mut seen);
        let verdict = if outcome.is_ok() { "passed" } else { "FAILED" };
        report.push(format!("{:<22} {verdict} in {} s\n{}", part.name, began.elapsed().as_secs(), seen.summary()));
        failed.extend(outcome.err().map(|error| format!("{error:#}")));
    }
    println!("\nReport of cargo xtask full, {} s:\n\n{}", started.elapsed().as_secs(), report.join("\n"));
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

impl Part {
    fn command(&self) -> Command {
        let mut command = if self.is_cargo { cargo() } else { ci::task(&[]) };
        command.args(self.words).envs(self.environment.iter().copied());
        command
    }
}
