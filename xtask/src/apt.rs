//! Debian packages: installed where a program is missing, or only fetched and unpacked. Mirrors are those of the machine's own apt.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use anyhow::{Context, Result, bail};

use crate::command::{is_root, is_there, read, run, run_quietly, say, text};
use crate::workspace;

/// A program that a task needs, and the Debian package that brings it.
pub(crate) type Need = (&'static str, &'static str);

/// Installs the packages whose programs are missing.
pub(crate) fn install(needs: &[Need]) -> Result<()> {
    let missing = || {
        let missing = needs.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package);
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
    if !is_there("apt-get") {
        bail!(
            "programs of the Debian packages {packages} are missing, and this machine has no apt-get: install them by its own means"
        );
    }
    let command = format!("apt-get install -y --no-install-recommends {packages}");
    if !is_root() {
        bail!("programs are missing; install them with: sudo {command}");
    }
    say(&format!("installing the Debian packages {packages}"));
    static UPDATED: Once = Once::new();
    UPDATED.call_once(|| {
        // Lists that are a little old may well do; if not, the installation says so.
        if let Err(error) = run(&mut apt_get(None, &["update"])) {
            say(&format!("{error:#}; going on with the package lists that are there"));
        }
    });
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(&missing);
    run(&mut apt_get(None, &arguments))
}

/// The Debian mirror that the machine's own apt uses.
pub(crate) fn mirror() -> Result<String> {
    let ask = |filters: &[&str]| {
        read(
            Command::new("apt-get")
                .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
                .args(filters),
        )
    };
    // Only lists that were fetched say whose they are; without any, the first source is taken.
    for filters in [&["Origin: Debian", "Label: Debian"][..], &[]] {
        if let Some(mirror) = ask(filters)?.lines().next() {
            return Ok(mirror.trim_end_matches('/').to_owned());
        }
    }
    bail!("cannot tell a Debian mirror: apt has no package sources on this machine")
}

/// An apt with lists of its own: it needs no root and leaves the machine's lists alone.
pub(crate) struct Private {
    config: PathBuf,
    directory: PathBuf,
}

impl Private {
    /// One that sees `suite` of the machine's mirror; its lists are fetched.
    pub(crate) fn of(suite: &str) -> Result<Private> {
        let directory = workspace::kept(&format!("apt-{suite}"));
        for part in ["state/lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(directory.join(part)).context("cannot make a directory for apt")?;
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
        fs::write(&config, lines.join("\n") + "\n")?;
        let private = Private { config, directory };
        run_quietly(&mut apt_get(Some(&private.config), &["update", "-q"]))?;
        Ok(private)
    }

    /// The versions of a package on offer.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let table = read(Command::new("apt-cache").env("APT_CONFIG", &self.config).args(["madison", package]))?;
        let versions = table.lines().filter_map(|line| line.split('|').nth(1)).map(|version| version.trim().to_owned());
        Ok(versions.collect())
    }

    /// Fetches a package (`name` or `name=version`) and unpacks it below `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
        let fetched = tempfile::tempdir_in(&self.directory).context("cannot make a temporary directory")?;
        run_quietly(apt_get(Some(&self.config), &["download", "-q", package]).current_dir(fetched.path()))?;
        for file in fs::read_dir(fetched.path())? {
            run_quietly(Command::new("dpkg-deb").arg("-x").arg(file?.path()).arg(into))?;
        }
        Ok(())
    }
}

/// Where Debian keeps the keys of its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

fn apt_get(config: Option<&Path>, arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=300"]).args(arguments);
    if let Some(config) = config {
        command.env("APT_CONFIG", config);
    }
    command
}
