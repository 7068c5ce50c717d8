//! `cargo xtask dist --target linux/amd64`: builds what is installed on hosts, the static executable without the gateway and its package.
//!
//! Everything is checked first: the ELF file (no interpreter, no shared library, a fixed address, no symbols), a run of the executable, and
//! the package, which a gateway publishes like any other.

mod elf;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command::{self, cargo, read, run_quietly, say, text};
use crate::toolchain::Toolchain;
use crate::{apt, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The platform to build for
    #[arg(long, value_enum)]
    target: Target,
    /// The profile to build with; what is installed on hosts is built with `release`
    #[arg(long, value_name = "NAME", default_value = RELEASE)]
    profile: String,
    /// The gateway executable to publish the package with
    /// [default: it is built]
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    executable: Option<PathBuf>,
}

/// The profile of what is installed on hosts.
pub(crate) const RELEASE: &str = "release";

/// The platforms that can be built and tested here.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Target {
    #[value(name = "linux/amd64")]
    LinuxAmd64,
}

impl Target {
    fn triple(self) -> &'static str {
        match self {
            Target::LinuxAmd64 => "x86_64-unknown-linux-musl",
        }
    }

    /// The operating system and the architecture, as package names spell them.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Target::LinuxAmd64 => ("linux", "amd64"),
        }
    }
}

/// A C compiler for musl, and the library itself.
pub(crate) const NEEDS: &[apt::Need] = &[("cc", "gcc"), ("musl-gcc", "musl-tools")];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let (os, arch) = arguments.target.words();
    let built = build(arguments.target, &arguments.profile)?;
    let version = version(&built)?;
    let directory = workspace::target().join(match arguments.profile.as_str() {
        RELEASE => "dist".to_owned(),
        other => format!("dist-{other}"),
    });
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let executable = directory.join(format!("aops-{os}-{arch}"));
    put(&built, &executable)?;
    let archive = directory.join(format!("aops-spm-{version}_{os}_{arch}.tar.zst"));
    let gateway = arguments.executable.clone().map_or_else(gateway, Ok)?;
    package(&gateway, &executable, &version, arguments.target, &archive)?;
    for file in [&executable, &archive] {
        say(&format!("{}: {} bytes", file.display(), fs::metadata(file)?.len()));
    }
    Ok(())
}

/// Builds the executable and checks that it runs on old hosts.
pub(crate) fn build(target: Target, profile: &str) -> Result<PathBuf> {
    apt::install(NEEDS)?;
    let triple = target.triple();
    let mut build = Toolchain::for_target(triple)?.cargo("build", triple);
    command::run(build.args(["--profile", profile, "-p", "aops", "--no-default-features"]))?;
    let built = workspace::cache_path("build").join(triple).join(profile).join("aops");
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    elf::check(&bytes).with_context(|| format!("{} does not run on old hosts", built.display()))?;
    fails_in_order(&built)?;
    Ok(built)
}

/// With a backtrace, an error uses the unwinder, which was assembled by hand.
fn fails_in_order(executable: &Path) -> Result<()> {
    let mut command = Command::new(executable);
    command.args(["spm", "--home", "/nonexistent"]).env_clear().env("RUST_BACKTRACE", "full");
    let output = command.output().with_context(|| format!("cannot run {}", executable.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("nothing is installed in /nonexistent"),
        "{} does not report an error as expected: {}: {said}",
        executable.display(),
        output.status
    );
    Ok(())
}

/// The version that the executable reports, run as on a minimal host: no environment, no other program.
fn version(executable: &Path) -> Result<String> {
    let said = read(Command::new(executable).arg("--version").env_clear().current_dir("/"))?;
    let version = said.strip_prefix("aops ").with_context(|| format!("--version prints {said:?}"))?;
    Ok(version.to_owned())
}

/// Creates the package by publishing it into a temporary depot: the product packs it and verifies that it accepts it.
fn package(gateway: &Path, executable: &Path, version: &str, target: Target, archive: &Path) -> Result<()> {
    let (os, arch) = target.words();
    let scratch = tempfile::tempdir().context("cannot create a temporary directory")?;
    let (depot, content) = (scratch.path().join("gateway"), scratch.path().join("content"));
    fs::create_dir_all(content.join("bin"))?;
    put(executable, &content.join("bin/aops"))?;
    run_quietly(Command::new(gateway).args(["gateway", "init", "--name", "localhost", "--dir"]).arg(&depot))?;
    let mut publish = Command::new(gateway);
    publish.args(["gateway", "publish", "--dir"]).arg(&depot);
    publish.args(["--name", "aops-spm", "--version", version, "--os", os, "--arch", arch]).arg(&content);
    run_quietly(&mut publish)?;
    let name = archive.file_name().context("it has a name")?;
    put(&depot.join("depot").join(name), archive)
}

/// A gateway executable for this task: the one of `cargo build`, which the tests use too.
pub(crate) fn gateway() -> Result<PathBuf> {
    let mut build = cargo();
    build.current_dir(workspace::root()).args(["build", "--locked", "-p", "aops", "--message-format", "json"]);
    say("$ cargo build --locked -p aops");
    let messages = read(&mut build)?;
    let built = messages.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    });
    built.context("cargo reported no executable")
}

/// Copies a file under a temporary name and renames it: no reader finds a part of it.
fn put(from: &Path, to: &Path) -> Result<()> {
    let what = || format!("cannot copy {} to {}", text(from), text(to));
    let unfinished = to.with_extension("unfinished");
    fs::copy(from, &unfinished).with_context(what)?;
    fs::rename(&unfinished, to).with_context(what)
}
