//! The unit files of a home: their names and contents; and the stray units of the same home that have another name.
//!
//! A unit is named by the home's identity ([`Home::unit`]). An earlier release named it by the path as it was given: such a stray is
//! recognized by the program that it starts. If it is the only unit of a role, it is the one that is queried and started. It is replaced by
//! a unit with the right name when the home is installed, started or restarted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use service_manager::systemd_global_dir_path;

use crate::core::role::Role;
use crate::home::Home;
use crate::store::{self, Access};

const SPM_UNIT: &str = include_str!("../../../assets/aops-spm.service");
const SPA_UNIT: &str = include_str!("../../../assets/aops-spa.service");
/// Holds the sub-agents' cgroups. The manager's unit wants it, so it is not enabled.
const AGENTS_UNIT: &str = include_str!("../../../assets/aops-agents.service");

/// First words of a unit file that `install` wrote.
const HEADER: &str = "# Written by `aops install`";
/// First line of a unit of our package.
const PACKAGE_HEADER: &str = "# Of the package aops; put changes into a drop-in (systemctl edit).";
/// Maximum size of a unit file that is read; ours have less than 2 KiB.
pub(super) const MAX_UNIT_BYTES: u64 = 64 << 10;
/// Number of hexadecimal digits that distinguish the units of homes.
const DIGITS: usize = 8;

/// A unit file of a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnitFile {
    /// Its name, without `.service`.
    pub(super) unit: String,
    pub(super) program: PathBuf,
    pub(super) contents: String,
}

/// Where packages of the host put their units. Those that `install` writes take precedence.
pub(super) const PACKAGE_DIRECTORIES: &[&str] = &["/usr/lib/systemd/system", "/lib/systemd/system"];

/// The path of a unit file that `install` writes.
pub(super) fn own_path(unit: &str) -> PathBuf {
    systemd_global_dir_path().join(format!("{unit}.service"))
}

/// The unit file of a package of the host.
pub(super) fn package_file(unit: &str) -> Option<PathBuf> {
    let files = PACKAGE_DIRECTORIES.iter().map(|directory| Path::new(directory).join(format!("{unit}.service")));
    files.into_iter().find(|file| file.is_file())
}

/// The unit file that systemd uses.
fn path(unit: &str) -> PathBuf {
    let own = own_path(unit);
    if own.symlink_metadata().is_ok() { own } else { package_file(unit).unwrap_or(own) }
}

/// The link that makes systemd start the unit at boot.
pub(super) fn enabling_link(unit: &str) -> PathBuf {
    systemd_global_dir_path().join("multi-user.target.wants").join(format!("{unit}.service"))
}

/// The directory of an operator's drop-ins (`systemctl edit`).
pub(super) fn drop_ins(unit: &str) -> PathBuf {
    systemd_global_dir_path().join(format!("{unit}.service.d"))
}

/// The first unit directory that is not writable, and why; `None`: all of them are writable.
pub(super) fn unwritable() -> Option<(PathBuf, std::io::Error)> {
    let directory = systemd_global_dir_path();
    let enabled = Some(directory.join("multi-user.target.wants")).filter(|enabled| enabled.is_dir());
    first_unwritable([directory].into_iter().chain(enabled))
}

/// The first of these directories that is not writable, and why.
pub(super) fn first_unwritable(directories: impl IntoIterator<Item = PathBuf>) -> Option<(PathBuf, std::io::Error)> {
    directories.into_iter().find_map(|directory| {
        let tried = tempfile::Builder::new().prefix(crate::platform::TEMPORARY_PREFIX).tempfile_in(&directory);
        tried.err().map(|error| (directory, error))
    })
}

/// The right names of the roles' units.
pub(super) fn of_roles(home: &Home, roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| home.unit(*role)).collect()
}

/// The right names of all units of the home.
pub(super) fn all(home: &Home) -> Vec<String> {
    [of_roles(home, Role::BOTH), vec![home.agents_unit()]].concat()
}

/// The current name of a role's unit: the right one, unless only a stray exists.
pub(super) fn in_use(home: &Home, role: Role) -> String {
    let unit = home.unit(role);
    if exists(&unit) {
        return unit;
    }
    let stray = strays(home).into_iter().find(|stray| of_program(stray, role.program()));
    stray.unwrap_or(unit)
}

/// Whether a unit file exists, or a link in its place.
pub(super) fn exists(unit: &str) -> bool {
    path(unit).symlink_metadata().is_ok()
}

/// Whether a unit file of `install` exists, or one of a package is enabled.
pub(super) fn is_registered(unit: &str) -> bool {
    own_path(unit).symlink_metadata().is_ok() || (exists(unit) && enabling_link(unit).symlink_metadata().is_ok())
}

/// Units of this home with another name, in the order in which they must be stopped: the watchdog first.
pub(super) fn strays(home: &Home) -> Vec<String> {
    let entries = fs::read_dir(systemd_global_dir_path()).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".service")?.to_owned()));
    let order = [Role::Spa.program(), Role::Spm.program(), crate::home::AGENTS];
    let rank = |unit: &str| order.iter().position(|program| of_program(unit, program));
    let right = all(home);
    let mut found: Vec<String> =
        names.filter(|unit| rank(unit).is_some() && !right.contains(unit) && is_of(unit, home)).collect();
    found.sort_by_key(|unit| rank(unit));
    found
}

/// The strays of these roles.
pub(super) fn strays_of(home: &Home, roles: &[Role]) -> Vec<String> {
    let is_of_a_role = |unit: &String| roles.iter().any(|role| of_program(unit, role.program()));
    strays(home).into_iter().filter(is_of_a_role).collect()
}

/// Whether a unit of this program has this name, in any home.
fn of_program(unit: &str, program: &str) -> bool {
    let Some(rest) = unit.strip_prefix(program) else { return false };
    let digits = rest.strip_prefix('-').unwrap_or_default();
    rest.is_empty() || (digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether a unit starts a program of the home.
fn is_of(unit: &str, home: &Home) -> bool {
    let text = store::read(&path(unit), MAX_UNIT_BYTES).ok().flatten().unwrap_or_default();
    program_started_by(&String::from_utf8_lossy(&text)).is_some_and(|program| {
        let bin = program.parent().filter(|bin| bin.file_name() == home.bin().file_name());
        bin.and_then(Path::parent).is_some_and(|root| home.is_at(root))
    })
}

/// The program that a unit starts, as [`quoted`] wrote it.
fn program_started_by(unit: &str) -> Option<PathBuf> {
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart="))?;
    let program = match command.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next()?,
        None => command.split_whitespace().next()?,
    };
    Some(PathBuf::from(program.replace("%%", "%")))
}

/// The content of a stray while it is removed: it stops without stopping the sub-agents, and is not restarted.
pub(super) fn without_hooks(unit: &str) -> Result<Option<String>> {
    let Some(text) = store::read(&path(unit), MAX_UNIT_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&text).into_owned();
    let is_kept = |line: &&str| !line.starts_with("ExecStop=") && !line.starts_with("Restart=");
    Ok(Some(text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect()))
}

/// Moves the drop-ins of strays to the right names; existing ones are kept.
pub(super) fn move_drop_ins(home: &Home, strays: &[String]) -> Result<()> {
    for stray in strays {
        let right = all(home).into_iter().find(|unit| program_of(unit) == program_of(stray));
        let Some((from, to)) = right.map(|right| (drop_ins(stray), drop_ins(&right))) else { continue };
        if from.is_dir() && to.symlink_metadata().is_err() {
            fs::rename(&from, &to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
        }
    }
    Ok(())
}

fn program_of(unit: &str) -> Option<&'static str> {
    let programs = [Role::Spm.program(), Role::Spa.program(), crate::home::AGENTS];
    programs.into_iter().find(|program| of_program(unit, program))
}

/// Whether a unit file is one that `install` wrote, or one of our package.
pub(super) fn is_ours(text: &str) -> bool {
    text.starts_with(HEADER) || text.starts_with(PACKAGE_HEADER)
}

/// The unit files of a home, as this release writes them.
pub(super) fn files(home: &Home) -> Result<[UnitFile; 3]> {
    let file = |unit: String, program: PathBuf, template| -> Result<UnitFile> {
        let contents = contents(home, template, program.clone())?;
        Ok(UnitFile { unit, program, contents })
    };
    let role = |role: Role| home.to_public(&home.role_link(role.program()));
    Ok([
        file(home.agents_unit(), home.to_public(&home.executable()), AGENTS_UNIT)?,
        file(home.unit(Role::Spm), role(Role::Spm), SPM_UNIT)?,
        file(home.unit(Role::Spa), role(Role::Spa), SPA_UNIT)?,
    ])
}

impl UnitFile {
    /// Whether the file has this content already.
    pub(super) fn is_current(&self) -> Result<bool> {
        self.is_current_at(&path(&self.unit))
    }

    /// The content of a package's unit.
    #[cfg(feature = "documents")]
    pub(super) fn of_package(&self) -> String {
        let rest = self.contents.split_once('\n').map_or("", |(_, rest)| rest);
        format!("{PACKAGE_HEADER}\n{rest}")
    }

    /// Comments do not matter: those of a package's unit differ.
    fn is_current_at(&self, path: &Path) -> Result<bool> {
        let Some(current) = store::read(path, MAX_UNIT_BYTES)? else { return Ok(false) };
        Ok(without_comments(&String::from_utf8_lossy(&current)) == without_comments(&self.contents))
    }

    /// Replaces a unit that an earlier release wrote; whether there was one. A unit that is missing, masked or written by an operator is
    /// not changed.
    pub(super) fn refresh(&self) -> Result<bool> {
        let own = own_path(&self.unit);
        let package = package_file(&self.unit);
        let is_package_current = package.as_ref().map(|package| self.is_current_at(package)).transpose()?;
        if own.symlink_metadata().is_err() && is_package_current == Some(false) {
            // The release differs from that of the package. Its unit belongs to the package: this one takes precedence.
            store::replace(&own, self.contents.as_bytes(), Access::Public)?;
            return Ok(true);
        }
        if !own.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Ok(false);
        }
        let current = store::read(&own, MAX_UNIT_BYTES)?.unwrap_or_default();
        if !current.starts_with(HEADER.as_bytes()) {
            return Ok(false);
        }
        if is_package_current == Some(true) {
            store::remove(&own)?;
            return Ok(true);
        }
        if current == self.contents.as_bytes() {
            return Ok(false);
        }
        store::replace(&own, self.contents.as_bytes(), Access::Public)?;
        Ok(true)
    }
}

fn without_comments(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with('#')).collect()
}

/// The content of a unit. Fails for a path that a unit file cannot contain.
fn contents(home: &Home, template: &str, executable: PathBuf) -> Result<String> {
    let program = |path: PathBuf| {
        if path.to_string_lossy().contains(['"', '\'', '\\']) {
            bail!(
                "cannot register {} with systemd: a unit cannot run a program whose path has a quote or a backslash; choose another \
                 --home, or use --service none",
                home.root().display()
            );
        }
        quoted(&path, false)
    };
    let root = home.public_path();
    // A description has specifiers, but no quotes and no variables.
    let shown = root.display().to_string().replace('%', "%%");
    Ok(template
        .replace("@EXECUTABLE@", &program(executable)?)
        .replace("@HOME@", &quoted(&root, true)?)
        .replace("@HOME_SHOWN@", &shown)
        .replace("@AGENTS@", &home.agents_unit())
        .replace("@SPM@", &home.unit(Role::Spm))
        .replace("@SPA@", &home.unit(Role::Spa)))
}

/// A path as one word of a unit's command line: `%` is escaped, since it starts a specifier; `\` and `"` are quoted; and `$` is escaped,
/// since it starts a variable, except in the path of the program itself.
fn quoted(path: &Path, variables: bool) -> Result<String> {
    let Some(text) = path.to_str() else { bail!("cannot write {} to a unit: it is not UTF-8", path.display()) };
    if text.chars().any(char::is_control) {
        bail!("cannot write {text:?} to a unit: it has a control character");
    }
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    let text = if variables { text.replace('$', "$$") } else { text };
    Ok(format!("\"{text}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(home: &Home) -> [String; 3] {
        files(home).unwrap().map(|file| file.contents)
    }

    #[test]
    fn the_units_of_the_default_home_name_its_roles() {
        let [agents, spm, spa] = texts(&Home::new("/opt/aops"));
        for line in [
            "ExecStart=\"/opt/aops/bin/aops-spm\" --home \"/opt/aops\" --service systemd",
            "ExecStop=\"/opt/aops/bin/aops-spm\" --home \"/opt/aops\" --service systemd stop-hook",
            "Type=notify",
            "Restart=always",
            "StartLimitIntervalSec=0",
            "KillMode=process",
            "Wants=aops-agents.service aops-spa.service",
            "WantedBy=multi-user.target",
            "SuccessExitStatus=100",
            "RestartPreventExitStatus=100",
        ] {
            assert!(spm.lines().any(|found| found == line), "{line}\n{spm}");
        }
        for line in
            ["ExecStart=\"/opt/aops/bin/aops-spa\" --home \"/opt/aops\" --service systemd", "After=aops-spm.service"]
        {
            assert!(spa.lines().any(|found| found == line), "{line}\n{spa}");
        }
        assert!(!spa.contains("ExecStop"));
        assert!(agents.lines().any(|found| found == "Before=aops-spm.service aops-spa.service"), "{agents}");
        for unit in [agents, spm, spa] {
            assert!(!unit.contains('@'), "{unit}");
        }
    }

    #[test]
    fn another_home_has_its_own_units_and_a_quoted_path() {
        let home = Home::new("/srv/my home/100%/a$b");
        let [_, spm, _] = texts(&home);
        assert!(spm.contains(
            r#"ExecStart="/srv/my home/100%%/a$b/bin/aops-spm" --home "/srv/my home/100%%/a$$b" --service systemd"#
        ));
        assert!(spm.contains(&format!("Wants={}.service {}.service", home.agents_unit(), home.unit(Role::Spa))));
        for rejected in ["/srv/a\"b", "/srv/a'b", "/srv/a\\b"] {
            assert!(files(&Home::new(rejected)).unwrap_err().to_string().contains("--service none"));
        }
        assert!(files(&Home::new("/srv/a\nb")).is_err());
    }

    #[test]
    fn the_program_of_a_unit_is_parsed() {
        for root in ["/opt/aops", "/srv/my home/100%/a$b"] {
            let home = Home::new(root);
            let [agents, spm, spa] = texts(&home);
            assert_eq!(program_started_by(&agents), Some(home.executable()));
            assert_eq!(program_started_by(&spm), Some(home.role_link("aops-spm")));
            assert_eq!(program_started_by(&spa), Some(home.role_link("aops-spa")));
        }
        assert_eq!(
            program_started_by("ExecStart=/srv/a/bin/aops-spm --home /srv/a\n"),
            Some("/srv/a/bin/aops-spm".into())
        );
        assert_eq!(program_started_by("[Service]\n"), None);
    }

    #[test]
    fn the_program_of_a_unit_is_found_by_its_name() {
        for (unit, program) in
            [("aops-spm", "aops-spm"), ("aops-spa-0123abcd", "aops-spa"), ("aops-agents-0123abcd", "aops-agents")]
        {
            assert_eq!(program_of(unit), Some(program));
        }
        for other in ["aops-spm-0123abc", "aops-spm-backup1", "aops-spms", "aops", "aops-spm-0123abcd-x"] {
            assert_eq!(program_of(other), None, "{other}");
        }
    }
}
