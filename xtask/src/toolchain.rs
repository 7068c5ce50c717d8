//! A toolchain that can build for a target: the installed one if it has the target, else a copy of it with the source of the standard
//! library, which is then built too.
//!
//! The source comes from Debian. Its `rust-src` is used only in exactly the compiler's version, since library and compiler belong together.
//! Suites move on, so several are searched.

mod musl32;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::Private;
use crate::command::{cargo, read, run_quietly, say, text};
use crate::workspace;

/// Suites that may have the source for a compiler newer than Debian 12's, most likely first.
const SUITES: &[&str] = &["trixie-backports", "testing", "unstable"];

/// How to build for one target.
pub(crate) struct Toolchain {
    /// The root of the toolchain to use instead of the running one.
    copy: Option<PathBuf>,
    build_std: bool,
    /// More options for the compiler.
    flags: Vec<String>,
    /// The target's linker and compiler, where the machine's default is not used.
    linker: Option<String>,
    c_compiler: Option<String>,
}

/// The dependencies that process every byte of a package: without optimization, scenarios are slow.
const PROCESSING: [&str; 4] = ["minisign-verify", "ring", "sha2", "zstd-sys"];
/// The parts of the standard library in what is handed out.
const RELEASED_LIBRARIES: &str = "std,panic_abort";

/// Compiles and links C for musl on x86-64.
const MUSL_GCC: &str = "musl-gcc";

impl Toolchain {
    /// For a musl target executables are static, at a fixed address: a position-independent one relocates itself at each start, and every
    /// process then has its own copy of pages that would be shared. Needs `musl-gcc`; for Windows, gcc of MinGW.
    pub(crate) fn for_target(target: &str) -> Result<Toolchain> {
        let mut toolchain = Toolchain::with_library(target)?;
        if target.ends_with("-linux-musl") {
            let compiler = if target.starts_with("i686-") { musl32::compiler()? } else { MUSL_GCC.to_owned() };
            toolchain.flags = paths_left_out();
            toolchain.c_compiler = Some(compiler.clone());
            toolchain.flags.extend(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"].map(str::to_owned));
            if toolchain.build_std {
                // The machine's musl replaces the parts of musl that rustup's target includes.
                toolchain.flags.push("-Clink-self-contained=no".to_owned());
                toolchain.flags.push(format!("-Lnative={}", text(&unwinder(target, &compiler)?)));
                toolchain.linker = Some(compiler);
            }
        } else if let Some((arch, _)) = target.split_once("-win7-windows-gnu") {
            // The standard library for Windows 7 has a vendor of its own, by which no compiler is found.
            toolchain.flags = paths_left_out();
            // Otherwise errors of the crate `windows` use COM functions that Windows 7 lacks.
            toolchain.flags.push("--cfg=windows_slim_errors".to_owned());
            toolchain.c_compiler = Some(format!("{arch}-w64-mingw32-gcc"));
        }
        Ok(toolchain)
    }

    /// A toolchain that has the target's standard library, or its source.
    fn with_library(target: &str) -> Result<Toolchain> {
        let plain = |copy, build_std| Toolchain { copy, build_std, flags: vec![], linker: None, c_compiler: None };
        let sysroot = PathBuf::from(read(rustc().args(["--print", "sysroot"]))?);
        let libraries = PathBuf::from(read(rustc().args(["--print", "target-libdir", "--target", target]))?);
        let is_installed = fs::read_dir(libraries).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-")))
        });
        if is_installed {
            return Ok(plain(None, false));
        }
        if sysroot.join(SOURCE).join("library/Cargo.toml").is_file() {
            return Ok(plain(None, true));
        }
        Ok(plain(Some(copy_with_source(&sysroot, target)?), true))
    }

    /// `cargo test` for `target`, with the library that tests need.
    pub(crate) fn cargo_for_scenarios(&self, target: &str) -> Command {
        self.cargo_with("test", target, "std,panic_abort,test", &[])
    }

    /// `cargo <subcommand>` for `target`, to check or test: with the library that tests need, and almost without optimization. Build scripts
    /// compile C for the target too.
    pub(crate) fn cargo_for_tests(&self, subcommand: &str, target: &str) -> Command {
        let mut command = self.cargo_with(subcommand, target, "std,panic_abort,test", &[]);
        command.args(["--config", r#"profile.dev.package."*".opt-level=0"#]);
        for package in PROCESSING {
            command.args(["--config", &format!("profile.dev.package.{package}.opt-level=3")]);
        }
        command
    }

    /// `cargo <subcommand>` for `target`, with a target directory of its own. A panic ends the process: without tables for unwinding, a
    /// tenth of an executable, where the platform allows it.
    pub(crate) fn cargo(&self, subcommand: &str, target: &str) -> Command {
        if !target.contains("-linux-") {
            return self.cargo_with(subcommand, target, RELEASED_LIBRARIES, &[]);
        }
        let mut command = self.cargo_with(subcommand, target, RELEASED_LIBRARIES, &["-Cforce-unwind-tables=no"]);
        let variable = format!("CFLAGS_{}", target.replace('-', "_"));
        command.env(variable, "-fno-asynchronous-unwind-tables -fno-unwind-tables");
        command
    }

    fn cargo_with(&self, subcommand: &str, target: &str, libraries: &str, more_flags: &[&str]) -> Command {
        let mut command = match &self.copy {
            None => cargo(),
            Some(copy) => {
                let bin = copy.join("bin");
                let mut command = Command::new(bin.join("cargo"));
                let path = std::env::var_os("PATH").unwrap_or_default();
                let paths = std::iter::once(bin.clone()).chain(std::env::split_paths(&path));
                command.env("PATH", std::env::join_paths(paths).unwrap_or(path.clone()));
                command.env("RUSTC", bin.join("rustc"));
                // Cargo and rustup point child processes to the libraries of their own toolchain; the copied toolchain finds its own
                // sysroot.
                for name in ["CARGO", "LD_LIBRARY_PATH", "RUSTUP_TOOLCHAIN", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER"]
                {
                    command.env_remove(name);
                }
                command
            }
        };
        command.current_dir(workspace::root()).env("CARGO_TARGET_DIR", workspace::cache_path("build"));
        command.args([subcommand, "--locked", "--target", target]);
        if self.build_std {
            command.env("RUSTC_BOOTSTRAP", "1").arg(format!("-Zbuild-std={libraries}"));
            if libraries == RELEASED_LIBRARIES {
                // Without the code for backtraces, which show nothing in an executable without symbols.
                command.arg("-Zbuild-std-features=optimize_for_size");
            }
        }
        let underscored = target.replace('-', "_");
        let prefix = format!("CARGO_TARGET_{}", underscored.to_uppercase());
        let flags: Vec<_> = self.flags.iter().map(String::as_str).chain(more_flags.iter().copied()).collect();
        if !flags.is_empty() {
            // This variable allows spaces. A target is given, so it does not apply to build scripts.
            command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        }
        if let Some(linker) = &self.linker {
            command.env(format!("{prefix}_LINKER"), linker);
        }
        if let Some(compiler) = &self.c_compiler {
            command.env(format!("CC_{underscored}"), compiler);
        }
        command
    }
}

/// Options that keep build paths out of the executable, so that it is the same wherever it is built.
fn paths_left_out() -> Vec<String> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let places = [(cargo_home, "/cargo"), (workspace::root(), "/aops")];
    places.iter().map(|(place, name)| format!("--remap-path-prefix={}={name}", text(place))).collect()
}

/// A directory with the unwinder of the machine's gcc, under the name that the standard library links for musl, and with the function that
/// it needs and musl lacks.
fn unwinder(target: &str, compiler: &str) -> Result<PathBuf> {
    workspace::cached(&format!("unwinder-{target}"), |unfinished| {
        let library = unfinished.join("libunwind.a");
        let object = unfinished.join("find_object.o");
        fs::create_dir_all(unfinished)?;
        let found = read(Command::new(compiler).arg("-print-file-name=libgcc_eh.a"))?;
        fs::copy(&found, &library).with_context(|| format!("cannot copy gcc's unwinder {found}"))?;
        let source = workspace::root().join("xtask/src/toolchain/find_object.c");
        run_quietly(Command::new(compiler).args(["-O2", "-Wall", "-Wextra", "-c", "-o"]).arg(&object).arg(source))?;
        run_quietly(Command::new("ar").arg("rs").arg(&library).arg(&object))
    })
}

/// The path of the standard library's source in a toolchain.
const SOURCE: &str = "lib/rustlib/src/rust";

fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// A copy of the running toolchain with the source in it.
fn copy_with_source(sysroot: &Path, target: &str) -> Result<PathBuf> {
    let facts = read(rustc().arg("-vV"))?;
    let fact = |name: &str| facts.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let release = fact("release:").context("rustc -vV prints no release")?;
    let commit = fact("commit-hash:").and_then(|hash| hash.get(..9)).unwrap_or("unknown");
    let name = format!("toolchain-{release}-{commit}");
    if workspace::cache_path(&name).exists() {
        return Ok(workspace::cache_path(&name));
    }
    say(&format!(
        "the standard library is built from source: searching Debian for the source of Rust {release} (once)"
    ));
    let Some((private, version)) = find_source(release) else {
        bail!(
            "cannot find rust-src {release} in Debian's {}; with rustup, run: rustup target add {target}, or \
             rustup component add rust-src",
            SUITES.join(", ")
        )
    };
    workspace::cached(&name, |unfinished| {
        fs::create_dir_all(unfinished)?;
        for part in ["bin", "lib", "libexec"] {
            if sysroot.join(part).is_dir() {
                copy_tree(&sysroot.join(part), &unfinished.join(part))?;
            }
        }
        private.unpack(&format!("rust-src={version}"), &unfinished.join("rust-src"))?;
        link_source(&unfinished.join("rust-src"), unfinished)
    })
}

/// The suite that has the source of that release, and the package's version in it.
fn find_source(release: &str) -> Option<(Private, String)> {
    SUITES.iter().find_map(|suite| {
        let found = Private::of(suite).and_then(|private| {
            let versions = private.versions("rust-src")?;
            Ok(versions.into_iter().find(|version| is_version_of(version, release)).map(|version| (private, version)))
        });
        found.unwrap_or_else(|error| {
            say(&format!("not found in {suite}: {error:#}"));
            None
        })
    })
}

/// Whether a Debian version packages an upstream release: `1.95.0+dfsg1-2~bpo13+1` packages `1.95.0`.
fn is_version_of(version: &str, release: &str) -> bool {
    version.strip_prefix(release).is_some_and(|rest| rest.starts_with(['+', '-', '~']))
}

/// Links the source of an unpacked package (`usr/src/rustc-<version>`) to where cargo looks for it.
fn link_source(unpacked: &Path, toolchain: &Path) -> Result<()> {
    let sources = fs::read_dir(unpacked.join("usr/src")).context("the package has no usr/src")?;
    let Some(source) =
        sources.flatten().map(|entry| entry.path()).find(|path| path.join("library/Cargo.toml").is_file())
    else {
        bail!("the package has no source of the standard library")
    };
    let link = toolchain.join(SOURCE);
    fs::create_dir_all(link.parent().context("it has a parent")?)?;
    // Relative, so that the whole tree can be renamed.
    let up = Path::new("../../..");
    let below = source.strip_prefix(toolchain).context("it was unpacked there")?;
    workspace::remove(&link)?;
    std::os::unix::fs::symlink(up.join(below), &link).context("cannot link the source")
}

/// Copies with hard links where possible.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let copy = |options: &str| run_quietly(Command::new("cp").arg(options).arg(from).arg(to));
    copy("-al").or_else(|_| {
        workspace::remove(to)?;
        copy("-a")
    })
}

#[cfg(test)]
mod tests {
    use super::is_version_of;

    #[test]
    fn only_the_source_of_the_compilers_release_is_accepted() {
        assert!(is_version_of("1.95.0+dfsg1-2~bpo13+1", "1.95.0"));
        assert!(is_version_of("1.95.0-1", "1.95.0"));
        assert!(!is_version_of("1.95.01-1", "1.95.0"));
        assert!(!is_version_of("1.96.1+dfsg1-2~bpo13+1", "1.95.0"));
    }
}
