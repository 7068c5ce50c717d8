//! `cargo xtask dist`: builds everything that is handed out, for each platform, into `target/dist`.
//!
//! ```text
//! aops-<os>-<arch>[.exe]                              the executable for hosts, without the gateway
//! aops-spm-<version>_<os>_<arch>.tar.zst .tar.gz .zip   its package, which a gateway publishes as it is; each with .minisig
//! aops-agent-service-<os>-<arch>[.exe]                the installer: the executable with the public key
//! aops-gateway-linux-amd64                            the executable for servers
//! *.cdx.json                                          the libraries in each executable (CycloneDX)
//! completions/ man/ units/                            for shells, manual pages, and the units of a package
//! aops.pub SHA256SUMS SHA256SUMS.minisig
//! ```
//!
//! Each executable is checked first: a static ELF file at a fixed address, without symbols, that runs without anything of a host; or a
//! Windows program that imports nothing that Windows 7 lacks.

mod elf;
mod pack;
mod pe;
mod sbom;
mod sign;
mod target;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use self::sign::Signing;
pub(crate) use self::target::Target;
use crate::command::{self, cargo, is_root, read, run_quietly, say};
use crate::toolchain::Toolchain;
use crate::{apt, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The platforms to build for; may be repeated [default: all]
    #[arg(long, value_enum)]
    target: Vec<Target>,
    /// The profile to build with; what is handed out is built with `release`
    #[arg(long, value_name = "NAME", default_value = RELEASE)]
    profile: String,
    /// Build the executables and check them, without packing them
    #[arg(long, conflicts_with_all = ["key", "executable"])]
    no_pack: bool,
    /// The minisign key to sign with; its password is read from MINISIGN_PASSWORD
    /// [default: a throw-away key below target/xtask]
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    key: Option<PathBuf>,
    /// The gateway executable to publish the packages with
    /// [default: it is built]
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    executable: Option<PathBuf>,
}

/// The profile of what is handed out.
pub(crate) const RELEASE: &str = "release";
/// The version of this workspace.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// C compilers for musl and for Windows, and the libraries.
pub(crate) const NEEDS: &[apt::Need] = &[
    ("cc", "gcc"),
    ("musl-gcc", "musl-tools"),
    ("x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64-posix"),
    ("i686-w64-mingw32-gcc", "gcc-mingw-w64-i686-posix"),
];

/// The directory of what a profile gives.
pub(crate) fn directory(profile: &str) -> PathBuf {
    let name = if profile == RELEASE { "dist".to_owned() } else { format!("dist-{profile}") };
    workspace::target().join(name)
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let targets = if arguments.target.is_empty() { Target::ALL.to_vec() } else { arguments.target.clone() };
    if arguments.no_pack {
        return targets.into_iter().try_for_each(|target| build(target, &arguments.profile).map(drop));
    }
    let directory = directory(&arguments.profile);
    if arguments.target.is_empty() {
        // What an earlier version left would be signed, too.
        workspace::remove(&directory)?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let gateway = arguments.executable.clone().map_or_else(gateway, Ok)?;
    let signing = Signing::begin(arguments.key.as_deref(), &gateway)?;
    signing.write_public_key(&directory.join("aops.pub"))?;
    for target in targets {
        let began = Instant::now();
        let built = build(target, &arguments.profile)?;
        let executable = directory.join(target.executable());
        put(&built, &executable)?;
        let bill = directory.join(format!("{}.cdx.json", target.executable().trim_end_matches(".exe")));
        fs::write(&bill, sbom::document(target)?).with_context(|| format!("cannot write {}", bill.display()))?;
        if target.is_agent() {
            packages(target, &executable, &directory, &gateway, &signing)?;
        }
        say(&format!("{}: built and packed in {} s", target.executable(), began.elapsed().as_secs()));
    }
    documents(&directory)?;
    signing.sign_sums(&directory)?;
    for (name, size) in files(&directory)? {
        say(&format!("{size:>9} {name}"));
    }
    if arguments.key.is_none() {
        say("signed with a throw-away key; for what is handed out, give --key FILE");
    }
    Ok(())
}

/// Builds an executable and checks that it runs on old hosts.
pub(crate) fn build(target: Target, profile: &str) -> Result<PathBuf> {
    apt::install(NEEDS)?;
    let triple = target.triple();
    let mut build = Toolchain::for_target(triple)?.cargo("build", triple);
    build.args(["--profile", profile, "-p", "aops"]);
    if target.is_agent() {
        build.arg("--no-default-features");
    }
    if target.is_agent() && profile == RELEASE {
        // Hosts are many and small; a server works for all of them.
        build.args(["--config", r#"profile.release.opt-level="z""#]);
    }
    command::run(&mut build)?;
    let name = format!("aops{}", target.suffix());
    let built = workspace::cache_path("build").join(triple).join(profile).join(name);
    let (_, arch) = target.words();
    let checked = if target.is_windows() {
        pe::check(&built, arch)
    } else {
        let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        elf::check(&bytes, arch).and_then(|()| runs(&built))
    };
    checked.with_context(|| format!("{} does not run on old hosts", built.display()))?;
    Ok(built)
}

/// Runs it as on a minimal host: no environment but a search path, and for root, no other file. With a backtrace, an error uses the unwinder, which was
/// assembled by hand.
fn runs(executable: &Path) -> Result<()> {
    let root = tempfile::tempdir().context("cannot create a temporary directory")?;
    put(executable, &root.path().join("aops"))?;
    let alone = || {
        let mut command = if is_root() {
            let mut command = Command::new("chroot");
            command.arg(root.path()).arg("/aops");
            command
        } else {
            Command::new(executable)
        };
        // Where `chroot` is found.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
        command
    };
    let said = read(alone().arg("--version"))?;
    ensure!(said == format!("aops {VERSION}"), "--version prints {said:?}");
    let mut command = alone();
    command.args(["spm", "--home", "/nonexistent"]).env("RUST_BACKTRACE", "full");
    let output = command.output().with_context(|| format!("cannot run {}", executable.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("nothing is installed in /nonexistent"),
        "it does not report an error as expected: {}: {said}",
        output.status
    );
    Ok(())
}

/// Packs the executable in each format, and has a gateway accept and sign each.
fn packages(target: Target, executable: &Path, directory: &Path, gateway: &Path, signing: &Signing) -> Result<()> {
    let (os, arch) = target.words();
    let scratch = tempfile::tempdir().context("cannot create a temporary directory")?;
    let content = scratch.path().join("content");
    lay_out(target, executable, &content)?;
    for packing in target.packings() {
        let name = format!("aops-spm-{VERSION}_{os}_{arch}.{packing}");
        let archive = scratch.path().join(&name);
        pack::pack(&content, &archive)?;
        // A depot holds one archive of a release.
        let published = signing.depot(&scratch.path().join(format!("depot-{packing}")))?;
        let mut publish = Command::new(gateway);
        publish.args(["gateway", "publish", "--dir"]).arg(&published).arg(&archive);
        run_quietly(&mut publish)?;
        for file in [name.clone(), format!("{name}.minisig")] {
            put(&published.join("depot").join(&file), &directory.join(&file))?;
        }
        put(&published.join("depot").join(target.bootstrap()), &directory.join(target.bootstrap()))?;
    }
    Ok(())
}

/// The names of the executable in a home, and where they lead. On Windows, `install` makes copies under these names.
pub(crate) const LINKS: [(&str, &str); 4] =
    [("control", "bin/aops"), ("bin/aops-spm", "aops"), ("bin/aops-spa", "aops"), ("bin/aops-agent-service", "aops")];

/// The content of a package, as it lies in a home.
fn lay_out(target: Target, executable: &Path, content: &Path) -> Result<()> {
    for part in ["bin", "etc"] {
        fs::create_dir_all(content.join(part)).context("cannot create the content of a package")?;
    }
    put(executable, &content.join(format!("bin/aops{}", target.suffix())))?;
    put(&workspace::root().join("assets/conf.toml"), &content.join("etc/conf.toml"))?;
    for (link, to) in LINKS.iter().filter(|_| !target.is_windows()) {
        std::os::unix::fs::symlink(to, content.join(link)).context("cannot create a link")?;
    }
    Ok(())
}

/// Signs the checksums of all files again, after some were added.
pub(crate) fn sign_sums(directory: &Path, key: Option<&Path>, gateway: &Path) -> Result<()> {
    Signing::begin(key, gateway)?.sign_sums(directory)
}

/// Completions for shells, manual pages of every command and the units of a package, written by the program itself.
fn documents(directory: &Path) -> Result<()> {
    for part in ["completions", "man", "units"] {
        workspace::remove(&directory.join(part))?;
    }
    let mut command = cargo();
    command.current_dir(workspace::root()).args(["run", "--locked", "-p", "aops", "--bin", "aops"]);
    command.args(["--features", "documents", "--", "documents"]).arg(directory);
    command::run(&mut command)
}

/// The files that are handed out, below `directory`, with their sizes.
fn files(directory: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("cannot list {}", next.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(directory)?.to_string_lossy().into_owned();
                found.insert(name, path.metadata()?.len());
            }
        }
    }
    Ok(found)
}

/// As `sha256sum` prints them.
fn sums(directory: &Path) -> Result<String> {
    let mut sums = String::new();
    for name in files(directory)?.keys().filter(|name| !name.starts_with("SHA256SUMS")) {
        let bytes = fs::read(directory.join(name)).with_context(|| format!("cannot read {name}"))?;
        sums += &format!("{}  {name}\n", sha256(&bytes));
    }
    Ok(sums)
}

/// In hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
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
    let what = || format!("cannot copy {} to {}", from.display(), to.display());
    let mut unfinished = to.as_os_str().to_owned();
    unfinished.push(".unfinished");
    fs::copy(from, &unfinished).with_context(what)?;
    fs::rename(&unfinished, to).with_context(what)
}
