//! Where an installation may be: which directory is the home, and whether it can be one. Nothing of somebody else's is taken for ours.

use std::fs;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};

use super::preflight::UsageError;
use super::{InstallOptions, ProcessContext, legacy};
use crate::config::Config;
use crate::home::Home;
use crate::host_service::product::{self, Product};
use crate::installation::{self, InstallRecord};

/// In the root of a file system that a home may have to itself.
const LOST_AND_FOUND: &str = "lost+found";

/// Directories that belong to the system: an installation removes what it replaces, and at last its home.
const NO_HOMES: &[&str] = &[
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

/// The product and the home, which must be a place that can be one.
pub(super) fn home(options: &InstallOptions, surroundings: &ProcessContext) -> Result<(Home, Product)> {
    let told = options.product.as_deref().or(surroundings.product.as_deref());
    let product = product::choose(told).map_err(|error| UsageError(format!("{error:#}")))?;
    let home = match (&options.home, &surroundings.home) {
        (Some(path), _) => {
            let path =
                std::path::absolute(path).with_context(|| format!("cannot take {} as a home", path.display()))?;
            fit_for_a_home(&path)?;
            Home::new(path)
        }
        (None, Some(home)) => home.clone(),
        (None, None) => Home::new(product.home()),
    };
    fit_for_a_home(home.root())?;
    foreign(&home, &surroundings.executable)?;
    match told {
        None if !options.fresh => {
            let product = standing_product(&home)?.unwrap_or(product);
            Ok((home, product))
        }
        _ => Ok((home, product)),
    }
}

/// Of the product that an installation was told that stands there, its settings say more than its records. `None`: it was told none.
fn standing_product(home: &Home) -> Result<Option<Product>> {
    // What is wrong with either is told where it is looked at as a whole.
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

fn fit_for_a_home(root: &Path) -> Result<()> {
    let shown = root.display();
    let Some(text) = root.to_str() else { bail!("cannot take {shown} as a home: the path is not UTF-8") };
    if text.chars().any(char::is_control) {
        bail!("cannot take {text:?} as a home: the path has a control character");
    }
    if !root.is_absolute() || root.components().any(|component| component == Component::ParentDir) {
        bail!("cannot take {shown} as a home: expected an absolute path without ..");
    }
    if root.parent().is_none() || NO_HOMES.iter().any(|taken| Path::new(taken) == root) {
        bail!("cannot take {shown} as a home: it belongs to the system; choose a directory of its own");
    }
    Ok(())
}

/// Refuses a directory that holds something else.
fn foreign(home: &Home, executable: &Path) -> Result<()> {
    // One that was killed at work there had looked before it began: what lies there is its own.
    if installation::exists(home)
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
                "cannot install into {}: a file is in the way; remove it, or choose another --home",
                home.root().display()
            )
        }
        Err(error) => return Err(error).with_context(|| format!("cannot look into {}", home.root().display())),
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot look into {}", home.root().display()))?;
        let path = entry.path();
        if path != executable && path != home.install_work() && !is_left_by_us(home, &path) {
            let root = home.root().display();
            let old = format!(
                "; an old installation, which would be replaced as a whole, has at least two of these: {}. To take over settings and \
                 agent id alone, give another --home and --import {root}",
                legacy::MARKS
            );
            bail!(
                "cannot install into {root}: it holds {}, and no installation; choose another --home, or empty it{}",
                entry.file_name().display(),
                if legacy::is_perhaps_old(home) { &old } else { "" }
            );
        }
    }
    Ok(())
}

/// `run/` with nothing but the lock in it: an installation was killed at its beginning, or is there. Or what a file system has of its own.
fn is_left_by_us(home: &Home, path: &Path) -> bool {
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
            assert!(fit_for_a_home(Path::new(bad)).is_err(), "{bad:?}");
        }
        for good in ["/opt/aops", "/srv/my home", "/home/somebody/aops"] {
            assert!(fit_for_a_home(Path::new(good)).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_directory_with_something_else_in_it_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let bootstrap = directory.path().join("aops-agent-service");
        fs::write(&bootstrap, "").unwrap();
        fs::create_dir(home.run()).unwrap();
        fs::write(home.install_lock(), "").unwrap();
        foreign(&home, &bootstrap).unwrap();
        // What a file system of its own has in it, as long as nothing was found.
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        foreign(&home, &bootstrap).unwrap();
        fs::write(home.run().join("x"), "").unwrap();
        assert!(foreign(&home, &bootstrap).is_err());
        fs::remove_file(home.run().join("x")).unwrap();
        fs::write(directory.path().join("photo"), "").unwrap();
        let error = foreign(&home, &bootstrap).unwrap_err().to_string();
        assert!(error.contains("holds photo"), "{error}");
        // What others have too does not make it an old installation, which would be removed.
        fs::write(directory.path().join("agentId"), "1").unwrap();
        let error = foreign(&home, &bootstrap).unwrap_err().to_string();
        assert!(error.contains("at least two of these") && error.contains("--import"), "{error}");
        fs::create_dir(home.etc()).unwrap();
        fs::write(home.etc().join("conf.yml"), "heartbeatSrv: https://old:1\n").unwrap();
        foreign(&home, &bootstrap).unwrap();
    }
}
