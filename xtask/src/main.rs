//! The project's own tasks: `cargo xtask <task>`. Each sets up what it needs, says what it does while it does it, and can be run again
//! after it was interrupted.

mod apt;
mod check_windows;
mod command;
mod rootfs;
mod test;
mod tidy;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// The project's own tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Task {
    /// Build and run every test, those in containers included; sets up all that they need
    Test(test::Arguments),
    /// Check the house rules that the compiler does not: layering, what stands where, what is not said
    Tidy,
    /// Type-check and lint the whole program for 64-bit and 32-bit Windows
    CheckWindows,
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Test(arguments) => test::run(&arguments),
        Task::Tidy => tidy::run(),
        Task::CheckWindows => check_windows::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
