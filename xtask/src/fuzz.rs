//! `cargo xtask fuzz`: builds the fuzz targets (tests/fuzz) with libFuzzer and runs each from its seeds and the inputs that earlier runs
//! found. The stable toolchain is enough: coverage is a pass of the compiler's LLVM.
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, cargo, read, say, text};
use crate::{apt, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only this target; may be given several times [default: all]
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// How many times each target is run
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    executions: Option<u64>,
    /// How many seconds each target is run
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
}

/// A C++ compiler, for libFuzzer.
pub(crate) const NEEDS: &[apt::Need] = &[("c++", "g++")];

/// Counters at every edge, and the operands of comparisons.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// The targets with the maximum input length of each: longer inputs are slow, and tests cover the limits.
const TARGETS: &[(&str, u32)] = &[
    ("agent-toml", 1 << 10),
    ("answer", 1 << 10),
    ("conf-toml", 512),
    ("conf-yml", 512),
    ("fleet-toml", 1 << 10),
    ("range", 64),
    ("signature", 1 << 10),
    ("state", 1 << 10),
    ("tar", 8 << 10),
    ("tar-gz", 2 << 10),
    ("tar-zst", 1 << 10),
    ("zip", 4 << 10),
];

/// The time limit of one input, in seconds.
const TIMEOUT: u32 = 10;
/// The memory limits in MiB, in total and for one allocation: hosts are small.
const MEMORY: u32 = 512;
const ALLOCATION: u32 = 96;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let unknown = arguments.target.iter().find(|name| !TARGETS.iter().any(|(known, _)| known == name));
    if let Some(name) = unknown {
        let known: Vec<&str> = TARGETS.iter().map(|(known, _)| *known).collect();
        bail!("unknown target {name}; known targets: {}", known.join(", "));
    }
    let program = build()?;
    let wanted = |name: &str| arguments.target.is_empty() || arguments.target.iter().any(|wanted| wanted == name);
    println!(
        "{:<12} {:>12} {:>10} {:>10} {:>10} {:>9}",
        "target", "executions", "per second", "edges", "features", "corpus"
    );
    for (name, longest) in TARGETS.iter().filter(|(name, _)| wanted(name)) {
        fuzz(&program, name, *longest, arguments)?;
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    apt::install(NEEDS)?;
    let facts = read(Command::new("rustc").arg("-vV"))?;
    let host = facts.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV prints no host")?;
    let directory = workspace::cache_path("fuzz");
    let mut build = cargo();
    build.current_dir(workspace::root()).env("CARGO_TARGET_DIR", &directory);
    // A target is given, so they do not apply to build scripts.
    build.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    build.args([
        "build",
        "--locked",
        "--profile",
        "fuzz",
        "--features",
        "fuzz",
        "--bin",
        "aops-fuzz",
        "--target",
        host,
    ]);
    command::run(&mut build)?;
    Ok(directory.join(host).join("fuzz/aops-fuzz"))
}

fn fuzz(program: &Path, name: &str, longest: u32, arguments: &Arguments) -> Result<()> {
    let place = workspace::cache_path("fuzz-corpus").join(name);
    let temporary =
        if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm").to_owned() } else { std::env::temp_dir() };
    let temporary = tempfile::Builder::new().prefix("aops-fuzz-").tempdir_in(temporary)?;
    fs::create_dir_all(&place).with_context(|| format!("cannot create {}", place.display()))?;
    let findings = format!("{}/finding-{name}-", text(&workspace::cache_path("")));
    let mut command = Command::new(program);
    command.env("AOPS_FUZZ_TARGET", name).env("AOPS_FUZZ_SEEDS", &place).env("TMPDIR", temporary.path());
    // Capturing a backtrace for each rejected input would take most of the time.
    command.env("RUST_BACKTRACE", "0");
    command.arg(format!("-max_len={longest}")).arg(format!("-timeout={TIMEOUT}"));
    command.arg(format!("-rss_limit_mb={MEMORY}")).arg(format!("-malloc_limit_mb={ALLOCATION}"));
    command.arg(format!("-artifact_prefix={findings}")).args(["-print_final_stats=1", "-verbosity=1"]);
    command.arg(match arguments.executions {
        Some(executions) => format!("-runs={executions}"),
        None => format!("-max_total_time={}", arguments.seconds),
    });
    command.arg(&place);
    let seeds = workspace::root().join("tests/fuzz/corpus").join(name);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    let log = workspace::cache_path(&format!("fuzz-{name}.log"));
    let started = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?).status();
    let status = status.with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    if !status.success() {
        let lines: Vec<&str> = said.lines().collect();
        say(&lines[lines.len().saturating_sub(60)..].join("\n"));
        bail!(
            "{name} failed ({status}) on an input, saved as {findings}*; reproduce it with `AOPS_FUZZ_TARGET={name} {} FILE`, fix \
             it, and keep the input in tests/fuzz/corpus/{name}",
            program.display()
        );
    }
    let figures = Figures::of(&said);
    ensure!(figures.executions > 0, "{name} was not executed: see {}", log.display());
    let speed = figures.executions as f64 / started.elapsed().as_secs_f64().max(0.001);
    let Figures { executions, edges, features, corpus } = figures;
    println!("{name:<12} {executions:>12} {speed:>10.0} {edges:>10} {features:>10} {corpus:>9}");
    Ok(())
}

/// The statistics that libFuzzer prints for a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    edges: u64,
    features: u64,
    corpus: u64,
}

impl Figures {
    fn of(said: &str) -> Figures {
        let behind = |text: &str, word: &str| {
            let value = text.split(word).nth(1)?.trim_start();
            value.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let last = said.lines().rev().find(|line| line.contains(" cov: ")).unwrap_or_default();
        Figures {
            executions: behind(said, "stat::number_of_executed_units:").unwrap_or_default(),
            edges: behind(last, " cov: ").unwrap_or_default(),
            features: behind(last, " ft: ").unwrap_or_default(),
            corpus: behind(last, " corp: ").unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_figures_of_a_run_are_used() {
        let said = "#2 INITED cov: 9 ft: 9 corp: 1/1b exec/s: 0 rss: 40Mb\n#100\tDONE   cov: 312 ft: 650 corp: 41/2Kb lim: 80\n\
                    Done 100 runs in 1 second(s)\nstat::number_of_executed_units: 100\nstat::peak_rss_mb: 50\n";
        assert_eq!(Figures::of(said), Figures { executions: 100, edges: 312, features: 650, corpus: 41 });
        assert_eq!(Figures::of(""), Figures::default());
    }
}
