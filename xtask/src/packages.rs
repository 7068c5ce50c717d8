//! `cargo xtask rpm`: packages of the hosts' package managers, from what `cargo xtask dist` has built: an RPM and a Debian package for
//! 64-bit and 32-bit x86.
//!
//! ```text
//! target/dist/aops-linux-amd64, completions, man, units ──▶ a tree of files ──▶ rpmbuild    rpm/aops.spec
//!                                                                         └──▶ dpkg-deb     xtask/src/packages/deb.rs
//! ```
//!
//! Both have the same files and the same scripts, which call `aops service packaged`.

mod deb;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::command::{read, run_quietly, say, text};
use crate::dist::{self, Target};
use crate::{apt, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The profile that `dist` was run with
    #[arg(long, value_name = "NAME", default_value = dist::RELEASE)]
    profile: String,
    /// The platforms; may be repeated [default: linux/amd64 and linux/386]
    #[arg(long, value_enum)]
    target: Vec<Target>,
    /// Check the Debian packages with lintian, too
    #[arg(long)]
    lint: bool,
    /// The key to sign SHA256SUMS with [default: the throw-away key of `dist`]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The gateway executable for that throw-away key [default: it is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

pub(crate) const NEEDS: &[apt::Need] = &[("rpmbuild", "rpm"), ("dpkg-deb", "dpkg"), ("gzip", "gzip")];

/// What is packaged.
struct Content<'a> {
    target: Target,
    version: &'a str,
    executable: PathBuf,
    /// The package of the manager with the same executable, if there is one: hosts recognize the release by its digest.
    archive: PathBuf,
    /// The directory of `dist`.
    built: &'a Path,
}

/// The hosts that have these packages.
const TARGETS: [Target; 2] = [Target::LinuxAmd64, Target::Linux386];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let output = dist::directory(&arguments.profile);
    let targets = if arguments.target.is_empty() { &TARGETS[..] } else { &arguments.target };
    for target in targets.iter().copied() {
        ensure!(TARGETS.contains(&target), "only hosts with Linux have these packages");
        build(target, &arguments.profile, dist::VERSION, &output.join(target.executable()), &output)?;
        if arguments.lint {
            lint(&output.join(file_name(target, dist::VERSION, false)))?;
        }
    }
    let gateway = arguments.executable.clone().map_or_else(dist::gateway, Ok)?;
    dist::sign_sums(&output, arguments.key.as_deref(), &gateway)
}

/// Fails for an error or a warning that the package does not override with a reason.
fn lint(package: &Path) -> Result<()> {
    apt::install(&[("lintian", "lintian")])?;
    run_quietly(Command::new("lintian").args(["--allow-root", "--fail-on", "error,warning"]).arg(package))
}

/// Packages an executable as this version, with the documents that `dist` has created with `profile`.
pub(crate) fn build(target: Target, profile: &str, version: &str, executable: &Path, output: &Path) -> Result<()> {
    apt::install(NEEDS)?;
    let built = dist::directory(profile);
    let (os, arch) = target.words();
    let content = Content {
        target,
        version,
        executable: executable.to_owned(),
        archive: built.join(format!("aops-spm-{version}_{os}_{arch}.tar.zst")),
        built: &built,
    };
    let shown = content.executable.display();
    ensure!(content.executable.is_file(), "{shown} is missing: run `cargo xtask dist` first");
    let manual = built.join("man");
    ensure!(manual.is_dir(), "{} is missing: run `cargo xtask dist` first", manual.display());
    for package in [content.rpm(output)?, deb::build(&content, output)?] {
        say(&format!("{}: {} bytes", package.display(), package.metadata()?.len()));
    }
    Ok(())
}

/// The file name of an RPM or of a Debian package.
pub(crate) fn file_name(target: Target, version: &str, is_rpm: bool) -> String {
    let (of_rpm, of_debian) = architectures(target);
    if is_rpm { format!("aops-{version}-1.{of_rpm}.rpm") } else { format!("aops_{version}_{of_debian}.deb") }
}

/// As rpm and Debian spell the architecture.
fn architectures(target: Target) -> (&'static str, &'static str) {
    if target == Target::LinuxAmd64 { ("x86_64", "amd64") } else { ("i686", "i386") }
}

impl Content<'_> {
    fn rpm(&self, output: &Path) -> Result<PathBuf> {
        let scratch = tempfile::tempdir().context("cannot create a temporary directory")?;
        let stage = scratch.path().join("stage");
        self.lay_out(&stage, "rpm", "usr/lib/systemd/system", "usr/share/zsh/site-functions")?;
        let doc = stage.join("usr/share/doc/aops");
        for file in ["README.md", "LICENSE", "CHANGELOG.md"] {
            put(&workspace::root().join(file), &doc.join(file), 0o644)?;
        }
        let (arch, _) = architectures(self.target);
        let define = |name: &str, value: &str| format!("--define={name} {value}");
        let mut build = Command::new("rpmbuild");
        build.args(["-bb", "--target", arch]).args([
            define("_topdir", &text(&scratch.path().join("rpmbuild"))),
            define("_rpmdir", &text(&scratch.path().join("out"))),
            define("stage", &text(&stage)),
            define("aops_version", self.version),
        ]);
        run_quietly(build.arg(workspace::root().join("rpm/aops.spec")))?;
        let name = file_name(self.target, self.version, true);
        let package = output.join(&name);
        put(&scratch.path().join("out").join(arch).join(&name), &package, 0o644)?;
        Ok(package)
    }

    /// Creates the files of a package below `stage`.
    fn lay_out(&self, stage: &Path, manager: &str, units: &str, zsh: &str) -> Result<()> {
        let home = stage.join("opt/aops");
        put(&self.executable, &home.join("bin/aops"), 0o755)?;
        for (link, to) in dist::LINKS {
            symlink(to, home.join(link)).context("cannot create a link")?;
        }
        let record = stage.join("opt/aops/package.json");
        fs::write(&record, self.record(manager)?).context("cannot write the record of a package")?;
        mode(&record, 0o644)?;
        directory(&stage.join("usr/bin"))?;
        symlink("/opt/aops/bin/aops", stage.join("usr/bin/aops")).context("cannot create a link")?;
        if manager == "rpm" {
            put(&workspace::root().join("assets/conf.toml"), &home.join("etc/conf.toml"), 0o644)?;
        }
        for unit in ["aops-agents.service", "aops-spa.service", "aops-spm.service"] {
            put(&self.built.join("units").join(unit), &stage.join(units).join(unit), 0o644)?;
        }
        let completions = self.built.join("completions");
        for (from, to) in [
            ("aops.bash", "usr/share/bash-completion/completions/aops".to_owned()),
            ("_aops", format!("{zsh}/_aops")),
            ("aops.fish", "usr/share/fish/vendor_completions.d/aops.fish".to_owned()),
        ] {
            put(&completions.join(from), &stage.join(to), 0o644)?;
        }
        let mut pages = Vec::new();
        for page in fs::read_dir(self.built.join("man")).context("cannot list the manual pages")? {
            let page = page?.path();
            let name = page.file_name().context("a manual page has a name")?;
            // Hosts have no gateway.
            if name.to_string_lossy().starts_with("aops-gateway") {
                continue;
            }
            let to = stage.join("usr/share/man/man1").join(name);
            put(&page, &to, 0o644)?;
            pages.push(to);
        }
        compress(&pages)
    }

    /// `package.json`, by which the installer recognizes the home of a package.
    fn record(&self, manager: &str) -> Result<String> {
        let digest = |path: &Path| -> Result<String> {
            Ok(dist::sha256(&fs::read(path).with_context(|| format!("cannot read {}", path.display()))?))
        };
        let executable = digest(&self.executable)?;
        // Without the manager's own package, the executable identifies the release.
        let sha256 = if self.archive.is_file() { digest(&self.archive)? } else { executable.clone() };
        let file = self.archive.file_name().context("an archive has a name")?.to_string_lossy();
        let release = json!({"version": self.version, "sha256": sha256, "epoch": 0, "file": file});
        let record = json!({"packageManager": manager, "release": release, "executable": executable});
        Ok(serde_json::to_string_pretty(&record)? + "\n")
    }
}

/// Copies a file, with its directories.
fn put(from: &Path, to: &Path, with: u32) -> Result<()> {
    directory(to.parent().context("a file is in a directory")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    mode(to, with)
}

fn directory(path: &Path) -> Result<()> {
    for missing in path.ancestors().filter(|path| !path.exists()).collect::<Vec<_>>().into_iter().rev() {
        fs::create_dir(missing).with_context(|| format!("cannot create {}", missing.display()))?;
        mode(missing, 0o755)?;
    }
    Ok(())
}

/// Whatever the umask is.
fn mode(path: &Path, mode: u32) -> Result<()> {
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// Without name and time: the same file gives the same bytes.
fn compress(paths: &[PathBuf]) -> Result<()> {
    read(Command::new("gzip").arg("-9n").args(paths)).map(drop)
}
