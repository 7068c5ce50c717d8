//! Units of systemd that somebody else wrote for the programs in a home.
//!
//! A unit is set aside under another name in its own directory, which systemd ignores: its owner, mode and content stay as they are, and so
//! do its drop-ins and the links that enable it.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use service_manager::systemd_global_dir_path;

use super::units::{self, MAX_UNIT_BYTES, PACKAGE_DIRECTORIES};
use super::{QUERY_TIMEOUT, START_TIMEOUT, STOP_TIMEOUT, state, systemctl};
use crate::home::Home;
use crate::host_service::foreign::ForeignUnit;
use crate::{platform, store};

/// The end of the name of what is set aside.
const SUFFIX: &str = ".before-aops";

/// The units that run a program in the home and were not written by aops. `keeps_control`: those that run its `control` stay, since ours has
/// the same path and starts the home.
pub fn find(home: &Home, keeps_control: bool) -> Result<Vec<ForeignUnit>> {
    let mut found: Vec<ForeignUnit> = Vec::new();
    let own = systemd_global_dir_path();
    let directories = [own.as_path()].into_iter().chain(PACKAGE_DIRECTORIES.iter().map(Path::new));
    for entry in directories.flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten()) {
        let (file, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // A file in the first directory hides one of the same name in another; `/lib` may be a link to `/usr/lib`.
        let is_known = found.iter().any(|unit| unit.name == name);
        if is_known || !name.ends_with(".service") || name.ends_with("@.service") {
            continue;
        }
        let Some(text) = store::read(&file, MAX_UNIT_BYTES).ok().flatten() else { continue };
        let text = String::from_utf8_lossy(&text);
        let Some(program) = program_in(&text, |path| home.is_at(path)).filter(|_| !units::is_ours(&text)) else {
            continue;
        };
        let stays = keeps_control && program.file_name() == home.control_link().file_name();
        let paths = if stays { vec![] } else { paths(&own, &file, &name) };
        let is_active = state(name.trim_end_matches(".service"))?.is_active();
        found.push(ForeignUnit { name, is_active, paths, registration: None });
    }
    Ok(found)
}

/// Checks that they can be set aside.
pub fn can_set_aside(units: &[ForeignUnit]) -> Result<()> {
    if let Some((directory, error)) = units::first_unwritable(directories(units)) {
        bail!(
            "cannot remove a unit of the old installation: {} is not writable ({error}); make it writable",
            directory.display()
        );
    }
    Ok(())
}

/// Stops them; they stay enabled.
pub fn stop(units: &[ForeignUnit]) -> Result<()> {
    if units.is_empty() { Ok(()) } else { systemctl(&["stop"], &names(units), STOP_TIMEOUT) }
}

/// Sets them aside, also if some are already.
pub fn set_aside(units: &[ForeignUnit]) -> Result<()> {
    rename_all(units, |path| (path.to_owned(), aside(path)))?;
    if !units.is_empty() {
        // Removes a failed unit from systemd's list; the error for an unknown unit is ignored.
        let _ = systemctl(&["reset-failed"], &names(units), QUERY_TIMEOUT);
    }
    Ok(())
}

/// Puts them back, also if some are in place already. Starts nothing.
pub fn put_back(units: &[ForeignUnit]) -> Result<()> {
    rename_all(units, |path| (aside(path), path.to_owned()))
}

/// Removes what was set aside.
pub fn remove(units: &[ForeignUnit]) -> Result<()> {
    for path in units.iter().flat_map(|unit| &unit.paths).map(|path| aside(path)) {
        let is_directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        if is_directory { store::remove_tree(&path)? } else { store::remove(&path)? }
    }
    Ok(())
}

/// Starts those that were active.
pub fn start(units: &[ForeignUnit]) -> Result<()> {
    let active: Vec<_> = units.iter().filter(|unit| unit.is_active).cloned().collect();
    if active.is_empty() { Ok(()) } else { systemctl(&["start"], &names(&active), START_TIMEOUT) }
}

/// Renames whatever exists under the first name, and has systemd read its units again.
fn rename_all(units: &[ForeignUnit], names: impl Fn(&Path) -> (PathBuf, PathBuf)) -> Result<()> {
    if units.iter().all(|unit| unit.paths.is_empty()) {
        return Ok(());
    }
    for path in units.iter().flat_map(|unit| &unit.paths) {
        let (from, to) = names(path);
        match fs::rename(&from, &to) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()));
            }
            _ => (),
        }
    }
    for directory in directories(units) {
        platform::sync_directory(&directory).with_context(|| format!("cannot sync {}", directory.display()))?;
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

fn names(units: &[ForeignUnit]) -> Vec<String> {
    units.iter().map(|unit| unit.name.clone()).collect()
}

fn directories(units: &[ForeignUnit]) -> BTreeSet<PathBuf> {
    units.iter().flat_map(|unit| &unit.paths).filter_map(|path| path.parent()).map(Path::to_owned).collect()
}

/// The file of a unit, its drop-ins, and the links to it in `*.wants` and `*.requires`.
fn paths(directory: &Path, file: &Path, name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let wanting = entries.filter(|path| path.extension().is_some_and(|end| end == "wants" || end == "requires"));
    let others = wanting.map(|wanting| wanting.join(name)).chain([directory.join(format!("{name}.d"))]);
    let existing = others.filter(|path| path.symlink_metadata().is_ok());
    std::iter::once(file.to_owned()).chain(existing).collect()
}

/// The unit's main program, or the script that a shell runs as it, if it is below a root. Other units that mention the home are not those of
/// an agent: a back-up of it, for example.
fn program_in(text: &str, is_root: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    const SHELLS: [&str; 3] = ["sh", "bash", "dash"];
    let path = |word: &str| PathBuf::from(word.trim_matches(['"', '\'']));
    let is_inside = |path: &PathBuf| path.is_absolute() && path.ancestors().skip(1).any(&is_root);
    let mut commands = text.lines().map(str::trim).filter_map(|line| line.strip_prefix("ExecStart="));
    commands.find_map(|command| {
        let mut words = command.trim_start_matches(['-', '@', ':', '+', '!']).split_whitespace();
        let program = path(words.next()?);
        if is_inside(&program) {
            return Some(program);
        }
        let is_shell = program.file_name().is_some_and(|name| SHELLS.iter().any(|shell| name == *shell));
        words.next().filter(|_| is_shell).map(path).filter(is_inside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_recognized_by_its_program() {
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
            let found = program_in(&text, |path| path == Path::new("/opt/aops"));
            assert_eq!(found.is_some(), expected, "{line}: {found:?}");
        }
    }
}
