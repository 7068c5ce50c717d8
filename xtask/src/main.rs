//! The project's tasks: `cargo xtask <task>`. Each one installs what it needs, prints what it does, and can be run again after an
//! interruption.

mod apt;
mod bench;
mod check_windows;
mod ci;
mod command;
mod demo;
mod deny;
mod dist;
mod durability;
mod endurance;
mod fleet;
mod full;
mod fuzz;
mod packages;
mod power_cut;
mod rootfs;
mod stranded;
mod test;
mod test_packages;
mod test_windows;
mod tidy;
mod toolchain;
mod trace;
mod wine;
mod workspace;

// The demo and the benchmarks use parts of the scenarios' support modules.
#[path = "../../tests/support"]
#[allow(dead_code, unreachable_pub, reason = "xtask uses only a part")]
mod support {
    mod command;
    pub(crate) mod container;
    pub(crate) mod files;
    pub(crate) mod package;
    pub(crate) mod processes;
    pub(crate) mod wait;
    mod windows;
}

use std::process::ExitCode;

use clap::Parser;

use self::support::{container, files, package, processes, wait};

/// The project's tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Task {
    /// Set up a gateway and one host on loopback and show each operation step by step; needs no root
    Demo(demo::Arguments),
    /// Build and run every test, including those in containers; installs what they need
    Test(test::Arguments),
    /// Run every check that a change must pass before it is merged, or the named checks
    Ci(ci::Arguments),
    /// Install what the checks need on this machine: Debian packages, root file systems
    SetUp,
    /// Check the project rules that the compiler does not check: layering, import cycles, file layout, terms
    Tidy,
    /// Type-check and lint the whole program for 64-bit and 32-bit Windows
    CheckWindows,
    /// Build the unit tests for 64-bit Windows and run them under Wine; installs what they need
    TestWindows(test_windows::Arguments),
    /// Install and upgrade what `dist` and `rpm` have built, in containers: archive, installer, RPM, Debian package
    TestPackages(test_packages::Arguments),
    /// Check the licences and the sources of the dependencies
    Deny,
    /// Build what is handed out, for every platform, into target/dist: executables, packages of the manager, installers
    Dist(dist::Arguments),
    /// Package what `dist` has built for the hosts' package managers: RPM and Debian packages
    Rpm(packages::Arguments),
    /// Fuzz every parser of external input with libFuzzer; installs what it needs
    Fuzz(fuzz::Arguments),
    /// Measure size, memory, latency and throughput of a release build
    Bench(bench::Arguments),
    /// Run whole what CI samples or leaves out, and print a report; takes hours
    Full(full::Arguments),
    /// Cut the power of virtual machines in mid-upgrade, and check that none is stranded
    PowerCut(power_cut::Arguments),
    /// Kill upgrades at each of their steps, and check that no host is stranded
    Stranded(stranded::Arguments),
    /// Check in a traced home that everything is on the disk before what depends on it, and that no sync is useless
    Durability(durability::Arguments),
    /// Upgrade the manager many times in a row on several homes, and check that nothing is stranded, restarted or leaked
    Endurance(endurance::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Ci(arguments) => ci::run(&arguments),
        Task::SetUp => ci::set_up(),
        Task::Tidy => tidy::run(),
        Task::CheckWindows => check_windows::run(),
        Task::TestWindows(arguments) => test_windows::run(&arguments),
        Task::Deny => deny::run(),
        Task::Dist(arguments) => dist::run(&arguments),
        Task::Rpm(arguments) => packages::run(&arguments),
        Task::TestPackages(arguments) => test_packages::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Full(arguments) => full::run(&arguments),
        Task::PowerCut(arguments) => power_cut::run(&arguments),
        Task::Stranded(arguments) => stranded::run(&arguments),
        Task::Durability(arguments) => durability::run(&arguments),
        Task::Endurance(arguments) => endurance::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
