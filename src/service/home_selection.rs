//! Selects the home of an installation and checks that it can be one: a system directory, or one with foreign files, is rejected.

use std::fs;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};

use super::preflight::UsageError;
use super::{InstallOptions, ProcessContext, legacy};
use crate::config::Config;
use crate::home::Home;
use crate::host_service::product::{self, Product};
use crate::installation::{self, InstallRecord};

/// In the root directory of a file system, which may be the home.
const LOST_AND_FOUND: &str = "lost+found";

/// Directories of the system. They cannot be a home, because an uninstallation removes its home.
const SYSTEM_DIRECTORIES: &[&str] = &[
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/local",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/share",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/tmp",
];

/// Selects the home and the product; fails if the directory cannot be a home.
pub(super) fn home(options: &InstallOptions, context: &ProcessContext) -> Result<(Home, Product)> {
    let given = options.product.as_deref().or(context.product.as_deref());
    let product = product::choose(given).map_err(|error| UsageError(format!("{error:#}")))?;
    let home = match (&options.home, &context.home) {
        (Some(path), _) => {
            let path = std::path::absolute(path).with_context(|| format!("cannot use {} as a home", path.display()))?;
            check_path(&path)?;
            Home::new(path)
        }
        (None, Some(home)) => home.clone(),
        (None, None) => Home::new(product.home()),
    };
    check_path(home.root())?;
    check_contents(&home, &context.executable)?;
    match given {
        None if !options.fresh => {
            let product = existing_product(&home)?.unwrap_or(product);
            Ok((home, product))
        }
        _ => Ok((home, product)),
    }
}

/// The product of the existing installation: of its settings, else of its record. `None`: it has none.
fn existing_product(home: &Home) -> Result<Option<Product>> {
    // Errors of either file are reported by the preflight checks.
    let set = Config::read_strictly(home).ok().flatten().and_then(|config| config.product);
    if let Some(name) = set {
        let path = home.config();
        return product::choose(Some(&name))
            .map(Some)
            .with_context(|| format!("cannot use the product in {}", path.display()));
    }
    let recorded = InstallRecord::load(home).ok().flatten().map(|installed| installed.product);
    Ok(recorded.filter(|name| !name.is_empty()).and_then(|name| product::choose(Some(&name)).ok()))
}

fn check_path(root: &Path) -> Result<()> {
    let shown = root.display();
    let Some(text) = root.to_str() else { bail!("cannot use {shown} as a home: the path is not UTF-8") };
    if text.chars().any(char::is_control) {
        bail!("cannot use {text:?} as a home: the path has a control character");
    }
    if !root.is_absolute() || root.components().any(|component| component == Component::ParentDir) {
        bail!("cannot use {shown} as a home: expected an absolute path without ..");
    }
    if root.parent().is_none() || SYSTEM_DIRECTORIES.iter().any(|taken| Path::new(taken) == root) {
        bail!("cannot use {shown} as a home: it belongs to the system; choose a directory of its own");
    }
    Ok(())
}

/// Rejects a directory with files that are not of an installation.
fn check_contents(home: &Home, executable: &Path) -> Result<()> {
    // A killed installation had passed this check: the files are its own.
    if installation::exists(home)
        || installation::packaged::is_unenrolled(home)
        || legacy::is_old(home)
        || home.install_work().symlink_metadata().is_ok_and(|found| found.is_dir())
    {
        return Ok(());
    }
    let entries = match fs::read_dir(home.root()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            bail!(
                "cannot install into {}: a file of this name exists; remove it, or choose another --home",
                home.root().display()
            )
        }
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", home.root().display())),
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", home.root().display()))?;
        let path = entry.path();
        if path != executable && path != home.install_work() && !is_leftover(home, &path) {
            let root = home.root().display();
            let old = format!(
                "; an old installation, which would be replaced completely, has at least two of these: {}. To take over only its \
                 settings and agent id, give another --home and --import {root}",
                legacy::MARKERS
            );
            bail!(
                "cannot install into {root}: it contains {} and no installation; choose another --home, or empty it{}",
                entry.file_name().display(),
                if legacy::is_perhaps_old(home) { &old } else { "" }
            );
        }
    }
    Ok(())
}

/// Whether a path is `run/` with nothing but the lock in it, of an installation that was killed early or is in progress, or an empty
/// `lost+found`.
fn is_leftover(home: &Home, path: &Path) -> bool {
    let is_lock = |entry: std::io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.path() == home.install_lock());
    let only_lock = |mut entries: fs::ReadDir| entries.all(is_lock);
    let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    (path == home.run() && fs::read_dir(path).is_ok_and(only_lock))
        || (path == home.root().join(LOST_AND_FOUND) && is_empty(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_a_directory_of_its_own() {
        for bad in ["/", "/opt", "/usr/local", "/srv/../etc", "relative", "/srv/a\nb"] {
            assert!(check_path(Path::new(bad)).is_err(), "{bad:?}");
        }
        for good in ["/opt/aops", "/srv/my home", "/home/somebody/aops"] {
            assert!(check_path(Path::new(good)).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_directory_with_foreign_files_is_rejected() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let bootstrap = directory.path().join("aops-agent-service");
        fs::write(&bootstrap, "").unwrap();
        fs::create_dir(home.run()).unwrap();
        fs::write(home.install_lock(), "").unwrap();
        check_contents(&home, &bootstrap).unwrap();
        // The root directory of a file system has an empty one.
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        check_contents(&home, &bootstrap).unwrap();
        fs::write(home.run().join("x"), "").unwrap();
        assert!(check_contents(&home, &bootstrap).is_err());
        fs::remove_file(home.run().join("x")).unwrap();
        fs::write(directory.path().join("photo"), "").unwrap();
        let error = check_contents(&home, &bootstrap).unwrap_err().to_string();
        assert!(error.contains("contains photo"), "{error}");
        // One marker, which other products have too, does not make it an old installation, which would be removed.
        fs::write(directory.path().join("agentId"), "1").unwrap();
        let error = check_contents(&home, &bootstrap).unwrap_err().to_string();
        assert!(error.contains("at least two of these") && error.contains("--import"), "{error}");
        fs::create_dir(home.etc()).unwrap();
        fs::write(home.etc().join("conf.yml"), "heartbeatSrv: https://old:1\n").unwrap();
        check_contents(&home, &bootstrap).unwrap();
    }
}
