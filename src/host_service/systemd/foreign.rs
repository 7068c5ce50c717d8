//! Units that somebody else wrote for the programs in a home: those of the system that aops replaces. They are stopped and removed when its
//! installation is replaced, and put back, active and enabled as before, when that fails. They may have the names of ours.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use service_manager::systemd_global_dir_path;

use super::units::{self, MAX_UNIT_BYTES, PACKAGE_DIRECTORIES};
use super::{QUERY_TIMEOUT, START_TIMEOUT, STOP_TIMEOUT, state, systemctl};
use crate::home::Home;
use crate::platform;
use crate::store::{self, Access};

/// Such a unit, with what is needed to put it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignUnit {
    /// Its name, with `.service`.
    name: String,
    file: PathBuf,
    text: String,
    /// The links that make systemd start it, and where they lead.
    links: Vec<(PathBuf, PathBuf)>,
    is_active: bool,
}

/// The units that run a program in the home and were not written by aops.
pub fn find(home: &Home) -> Result<Vec<ForeignUnit>> {
    let mut found: Vec<ForeignUnit> = Vec::new();
    let own = systemd_global_dir_path();
    let directories = [own.as_path()].into_iter().chain(PACKAGE_DIRECTORIES.iter().map(Path::new));
    for entry in directories.flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten()) {
        let (file, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // A file in the first directory hides one of the same name in another; `/lib` may be a link to `/usr/lib`.
        let is_known = found.iter().any(|unit| unit.name == name);
        let is_unit = name.ends_with(".service") && !name.ends_with("@.service");
        if is_known || !is_unit || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let Some(text) = store::read(&file, MAX_UNIT_BYTES).ok().flatten() else { continue };
        let Ok(text) = String::from_utf8(text) else { continue };
        // The path of the default home may lead through a link.
        let is_of_home = [home.root(), &home.public_path()].into_iter().any(|root| runs_program_in(&text, root));
        if units::is_ours(&text) || !is_of_home {
            continue;
        }
        let is_active = state(name.trim_end_matches(".service"))?.is_active();
        found.push(ForeignUnit { links: links(&own, &name), name, file, text, is_active });
    }
    Ok(found)
}

/// Stops them; they stay enabled.
pub fn stop(units: &[ForeignUnit]) -> Result<()> {
    if units.is_empty() { Ok(()) } else { systemctl(&["stop"], &names(units), STOP_TIMEOUT) }
}

/// Removes them, also if some are already gone.
pub fn remove(units: &[ForeignUnit]) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    for unit in units {
        for (link, _) in &unit.links {
            store::remove(link)?;
        }
        store::remove(&unit.file)?;
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)?;
    // Removes a failed unit from systemd's list; the error for an unknown unit is ignored.
    let _ = systemctl(&["reset-failed"], &names(units), QUERY_TIMEOUT);
    Ok(())
}

/// Puts them back. Starts nothing.
pub fn put_back(units: &[ForeignUnit]) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    for unit in units {
        store::replace(&unit.file, unit.text.as_bytes(), Access::Public)?;
        for (link, target) in &unit.links {
            let attempt = || -> Result<()> {
                fs::create_dir_all(link.parent().context("it has a parent")?)?;
                Ok(platform::replace_link(target, link)?)
            };
            attempt().with_context(|| format!("cannot create {}", link.display()))?;
        }
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)
}

/// Starts those that were active or that start at boot; whether there were any.
pub fn start(units: &[ForeignUnit]) -> Result<bool> {
    let started: Vec<_> = units.iter().filter(|unit| unit.is_active || !unit.links.is_empty()).cloned().collect();
    if !started.is_empty() {
        systemctl(&["start"], &names(&started), START_TIMEOUT)?;
    }
    Ok(!started.is_empty())
}

fn names(units: &[ForeignUnit]) -> Vec<String> {
    units.iter().map(|unit| unit.name.clone()).collect()
}

/// The links to a unit in `*.wants` and `*.requires`.
fn links(directory: &Path, name: &str) -> Vec<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let wanting = entries.filter(|path| path.extension().is_some_and(|end| end == "wants" || end == "requires"));
    let links = wanting.map(|wanting| wanting.join(name));
    links.filter_map(|link| Some((link.clone(), fs::read_link(&link).ok()?))).collect()
}

/// Whether the unit's main program is in `root`, or the script that a shell runs as it. Other units that mention the home are not those of an
/// agent: a back-up of it, for example.
fn runs_program_in(text: &str, root: &Path) -> bool {
    const SHELLS: [&str; 3] = ["sh", "bash", "dash"];
    let commands = text.lines().map(str::trim).filter_map(|line| line.strip_prefix("ExecStart="));
    let is_inside = |word: &str| Path::new(word.trim_matches(['"', '\''])).starts_with(root);
    commands.into_iter().any(|command| {
        let mut words = command.trim_start_matches(['-', '@', ':', '+', '!']).split_whitespace();
        let Some(program) = words.next() else { return false };
        let is_shell = Path::new(program).file_name().is_some_and(|name| SHELLS.iter().any(|shell| name == *shell));
        is_inside(program) || (is_shell && words.next().is_some_and(is_inside))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_recognized_by_the_paths_in_its_commands() {
        for (line, expected) in [
            ("ExecStart=/opt/aops/bin/aops-spm", true),
            ("ExecStart=-/opt/aops/bin/aops-spm --config /opt/aops/etc/conf.yml", true),
            ("ExecStart=\"/opt/aops/bin/aops spm\"", true),
            ("ExecStart=/bin/bash /opt/aops/control start", true),
            ("ExecStart=/usr/bin/env HOME=/opt/aops/ /bin/true", false),
            ("ExecStart=/usr/bin/rsync -a /opt/aops/ /backup", false),
            ("ExecStartPre=/opt/aops/control status", false),
            ("ExecStart=/opt/aops2/bin/aops-spm", false),
            ("ExecStart=/srv/opt/aops/bin/aops-spm", false),
            ("EnvironmentFile=/opt/aops/etc/env", false),
            ("Description=runs /opt/aops/bin/aops-spm", false),
        ] {
            let text = format!("[Unit]\n[Service]\n{line}\n");
            assert_eq!(runs_program_in(&text, Path::new("/opt/aops")), expected, "{line}");
        }
    }
}
