//! Where a release lies on a host, `agents/<name>/<version>`: which names and versions can have a place of their own there.
//!
//! A name or a version alone is harmless wherever it is joined to a path ([`model`](super::model)). Beside names of ours, or on a file
//! system that sees two names as one, it is not: it would take the place of something else. The same is refused where a package is
//! published and where it is to be installed.

use super::model::{AgentName, MANAGER_PACKAGE, Os, Release, Version};

/// Beside a sub-agent's releases: the link, or on Windows the file, that names the active one.
pub const CURRENT: &str = "current";
/// What NTFS counts names in, at most so many.
const WINDOWS_NAME_UNITS: usize = 255;

/// Whether a sub-agent's release can be installed on the system that it is for.
pub fn check(release: &Release) -> Result<(), String> {
    let Release { name, version, os, arch: _ } = release;
    check_name(name)?;
    check_version(version)?;
    for word in [name.as_str(), version.as_str()] {
        if *os == Os::Windows && !windows_can_hold(word) {
            return Err(format!("{word:?} cannot be the name of a directory on Windows; choose another"));
        }
    }
    Ok(())
}

/// Whether a sub-agent can have this name, whatever the system.
pub fn check_name(name: &AgentName) -> Result<(), String> {
    match name.as_str() {
        MANAGER_PACKAGE => Err(format!(
            "the name {MANAGER_PACKAGE} is reserved for the manager, whose version is ordered apart from the sub-agents"
        )),
        _ => Ok(()),
    }
}

/// Whether a sub-agent can have this version, whatever the system. On file systems without case `Current` is the same name.
pub fn check_version(version: &Version) -> Result<(), String> {
    if version.as_str().eq_ignore_ascii_case(CURRENT) {
        return Err(format!(
            "the version {version} is reserved: {CURRENT:?} names the active release on a host; choose another version"
        ));
    }
    Ok(())
}

/// Whether two versions differ in a way that a file system without case does not see.
pub fn differ_in_case_alone(one: &Version, other: &Version) -> bool {
    one != other && one.as_str().eq_ignore_ascii_case(other.as_str())
}

/// Whether a name without slashes can be that of a file on Windows: not one of DOS's devices, no stream of another file, no wildcard,
/// nothing at its end that Windows drops.
pub fn windows_can_hold(name: &str) -> bool {
    const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"];
    let stem = name.split('.').next().unwrap_or_default().trim_end().to_ascii_uppercase();
    let is_port = ["COM", "LPT"].iter().any(|port| {
        let number = stem.strip_prefix(port).unwrap_or_default();
        number.chars().count() == 1 && number.chars().all(|c| c.is_ascii_digit() || matches!(c, '¹' | '²' | '³'))
    });
    !name.ends_with(['.', ' '])
        && !name.contains(['<', '>', ':', '"', '|', '?', '*'])
        && name.encode_utf16().count() <= WINDOWS_NAME_UNITS
        && !DEVICES.contains(&stem.as_str())
        && !is_port
}

#[cfg(test)]
mod tests {
    use super::super::model::Arch;
    use super::*;

    fn release(name: &str, version: &str, os: Os) -> Release {
        Release { name: name.parse().unwrap(), version: version.parse().unwrap(), os, arch: Arch::Amd64 }
    }

    #[test]
    fn what_would_take_the_place_of_something_of_ours_is_refused_for_every_system() {
        for os in [Os::Linux, Os::Windows] {
            for (name, version) in [("a", "current"), ("a", "Current"), ("a", "CURRENT"), ("aops-spm", "1")] {
                let why = check(&release(name, version, os)).unwrap_err();
                assert!(why.contains("reserved"), "{why}");
            }
            for (name, version) in
                [("current", "1"), ("a", "current-1"), ("spm", "1"), ("aops-spa", "1"), ("control", "1")]
            {
                assert_eq!(check(&release(name, version, os)), Ok(()), "{name} {version}");
            }
        }
    }

    #[test]
    fn what_windows_cannot_hold_is_refused_for_windows() {
        for (name, version) in [("con", "1"), ("aux.x", "1"), ("a.", "1"), ("a", "1."), ("a", "NUL"), ("a", "com1")] {
            let why = check(&release(name, version, Os::Windows)).unwrap_err();
            assert!(why.contains("Windows"), "{why}");
            assert_eq!(check(&release(name, version, Os::Linux)), Ok(()), "{name} {version}");
        }
        assert_eq!(check(&release("console", "1.0.con", Os::Windows)), Ok(()));
    }

    #[test]
    fn versions_may_differ_in_more_than_case() {
        let differ = |one: &str, other: &str| differ_in_case_alone(&one.parse().unwrap(), &other.parse().unwrap());
        assert!(differ("1.0A", "1.0a"));
        assert!(!differ("1.0a", "1.0a") && !differ("1.0a", "1.0b"));
    }
}
