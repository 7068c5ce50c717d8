//! Debian packages: installed where a program is missing, or only fetched and unpacked. Uses the mirrors of the machine's apt.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use anyhow::{Context, Result, bail};

use crate::command::{is_installed, is_root, read, run, run_quietly, say, text};
use crate::workspace;

/// A program that a task needs, and the Debian package that contains it.
pub(crate) type Need = (&'static str, &'static str);

/// Installs the packages whose programs are missing.
pub(crate) fn install(needs: &[Need]) -> Result<()> {
    let missing = || {
        let missing = needs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, package)| *package);
        missing.collect::<BTreeSet<_>>()
    };
    if missing().is_empty() {
        return Ok(());
    }
    // Another task may be installing them.
    let _lock = workspace::lock("apt")?;
    let missing: Vec<_> = missing().into_iter().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !is_installed("apt-get") {
        bail!(
            "cannot install the Debian packages {packages}: apt-get not found; install their programs with this machine's package manager"
        );
    }
    let command = format!("apt-get install -y --no-install-recommends {packages}");
    if !is_root() {
        bail!("cannot install missing programs without root; run: sudo {command}");
    }
    say(&format!("installing the Debian packages {packages}"));
    static UPDATED: Once = Once::new();
    UPDATED.call_once(|| {
        // Slightly old lists may be good enough; if not, the installation reports it.
        if let Err(error) = run(&mut apt_get(None, &["update"])) {
            say(&format!("{error:#}; continuing with the existing package lists"));
        }
    });
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(&missing);
    run(&mut apt_get(None, &arguments))
}

/// The Debian mirror that the machine's apt uses.
pub(crate) fn mirror() -> Result<String> {
    let ask = |filters: &[&str]| {
        read(
            Command::new("apt-get")
                .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
                .args(filters),
        )
    };
    // Only fetched lists name their origin; without any, the first source is used.
    for filters in [&["Origin: Debian", "Label: Debian"][..], &[]] {
        if let Some(mirror) = ask(filters)?.lines().next() {
            return Ok(mirror.trim_end_matches('/').to_owned());
        }
    }
    bail!("cannot find a Debian mirror: apt has no package sources on this machine")
}

/// An apt with its own package lists: it needs no root and does not change the machine's lists.
pub(crate) struct Private {
    config: PathBuf,
    directory: PathBuf,
}

impl Private {
    /// Fetches the lists of `suite` from the machine's mirror.
    pub(crate) fn of(suite: &str) -> Result<Private> {
        Private::with(suite, &format!("apt-{suite}"), &[])
    }

    /// As [`Private::of`], with the packages for 32-bit x86 beside those for 64-bit.
    pub(crate) fn with_i386(suite: &str) -> Result<Private> {
        Private::with(suite, &format!("apt-{suite}-i386"), &["APT::Architectures { \"amd64\"; \"i386\"; };".to_owned()])
    }

    fn with(suite: &str, name: &str, options: &[String]) -> Result<Private> {
        let directory = workspace::cache_path(name);
        for part in ["state/lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(directory.join(part)).context("cannot create a directory for apt")?;
        }
        let sources = directory.join("sources.list");
        fs::write(&sources, format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror()?))?;
        let lines = [
            format!("Dir::State \"{}\";", text(&directory.join("state"))),
            format!("Dir::Cache \"{}\";", text(&directory.join("cache"))),
            format!("Dir::Etc::sourcelist \"{}\";", text(&sources)),
            format!("Dir::Etc::sourceparts \"{}\";", text(&directory.join("parts"))),
            "Dir::State::status \"/dev/null\";".to_owned(),
            "Acquire::Languages \"none\";".to_owned(),
            "APT::Sandbox::User \"root\";".to_owned(),
        ];
        let config = directory.join("apt.conf");
        fs::write(&config, [&lines, options].concat().join("\n") + "\n")?;
        let private = Private { config, directory };
        run_quietly(&mut apt_get(Some(&private.config), &["update", "-q"]))?;
        Ok(private)
    }

    /// The available versions of a package.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let table = read(Command::new("apt-cache").env("APT_CONFIG", &self.config).args(["madison", package]))?;
        let versions = table.lines().filter_map(|line| line.split('|').nth(1)).map(|version| version.trim().to_owned());
        Ok(versions.collect())
    }

    /// The first package on which `package` depends and whose name begins with `prefix`.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let table = read(Command::new("apt-cache").env("APT_CONFIG", &self.config).args(["depends", package]))?;
        let mut names = table.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let name = names.find(|name| name.starts_with(prefix));
        name.map(str::to_owned).with_context(|| format!("{package} depends on no package {prefix}*"))
    }

    /// Fetches a package (`name` or `name=version`) and unpacks it below `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
        let fetched = tempfile::tempdir_in(&self.directory).context("cannot create a temporary directory")?;
        run_quietly(apt_get(Some(&self.config), &["download", "-q", package]).current_dir(fetched.path()))?;
        for file in fs::read_dir(fetched.path())? {
            run_quietly(Command::new("dpkg-deb").arg("-x").arg(file?.path()).arg(into))?;
        }
        Ok(())
    }
}

/// The keys of Debian's archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

fn apt_get(config: Option<&Path>, arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=300"]).args(arguments);
    if let Some(config) = config {
        command.env("APT_CONFIG", config);
    }
    command
}
