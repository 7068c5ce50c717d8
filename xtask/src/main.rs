//! The project's own tasks: `cargo xtask <task>`. Each sets up what it needs, says what it does while it does it, and can be run again
//! after it was interrupted.

mod apt;
mod bench;
mod check_windows;
mod ci;
mod command;
mod demo;
mod deny;
mod dist;
mod fleet;
mod fuzz;
mod rootfs;
mod test;
mod test_windows;
mod tidy;
mod toolchain;
mod wine;
mod workspace;

// What the scenarios of the test suite are built of serves here too.
#[path = "../../tests/support"]
#[allow(dead_code, unreachable_pub, reason = "the suite uses more of it")]
mod support {
    mod command;
    pub(crate) mod container;
    mod files;
    pub(crate) mod package;
    pub(crate) mod processes;
    pub(crate) mod wait;
}

use std::process::ExitCode;

use clap::Parser;

use self::support::{container, package, processes, wait};

/// The project's own tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Task {
    /// From nothing to a running fleet of one, on loopback, step by step; needs no root
    Demo(demo::Arguments),
    /// Build and run every test, those in containers included; sets up all that they need
    Test(test::Arguments),
    /// Run everything that must hold before a change is merged, or some of it by name
    Ci(ci::Arguments),
    /// Set up what the checks need of the machine: Debian packages, root file systems
    SetUp,
    /// Check the house rules that the compiler does not: layering, import cycles, what stands where
    Tidy,
    /// Type-check and lint the whole program for 64-bit and 32-bit Windows
    CheckWindows,
    /// Build the unit tests for 64-bit Windows and run them under Wine; sets up all that they need
    TestWindows(test_windows::Arguments),
    /// Check the licences and the sources of the dependencies
    Deny,
    /// Build what is put on hosts, into target/dist: the static executable and its package
    Dist(dist::Arguments),
    /// Throw mutated input at every parser of what comes from outside, with libFuzzer; sets up all that it needs
    Fuzz(fuzz::Arguments),
    /// Measure size, memory, latency and throughput of a release build
    Bench(bench::Arguments),
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
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
