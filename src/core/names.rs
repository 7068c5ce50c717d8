//! Names and versions that can be used for the directory of a release, `agents/<name>/<version>`.
//!
//! Any [`AgentName`] or [`Version`] is a safe path component. It could still collide: with a file name that aops itself uses, or with another
//! name on a file system that ignores case. Such names are rejected when a package is published and when it is installed.

use super::model::{AgentName, MANAGER_PACKAGE, Os, Release, Version};

/// In the directory of a sub-agent: the link (on Windows a file) that names the active release.
pub const CURRENT: &str = "current";
/// Limit of NTFS for a file name, UTF-16 code units.
const WINDOWS_NAME_UNITS: usize = 255;

/// Whether a sub-agent's release can be installed on its operating system.
pub fn check(release: &Release) -> Result<(), String> {
    let Release { name, version, os, arch: _ } = release;
    check_name(name)?;
    check_version(version)?;
    for word in [name.as_str(), version.as_str()] {
        if *os == Os::Windows && !is_valid_windows_name(word) {
            return Err(format!("{word:?} cannot be the name of a directory on Windows; choose another"));
        }
    }
    Ok(())
}

/// Whether a sub-agent can have this name, on any system.
pub fn check_name(name: &AgentName) -> Result<(), String> {
    match name.as_str() {
        MANAGER_PACKAGE => Err(format!(
            "the name {MANAGER_PACKAGE} is reserved for the manager, whose version is ordered separately from the sub-agents"
        )),
        _ => Ok(()),
    }
}

/// Whether a sub-agent can have this version, on any system. On a case-insensitive file system, `Current` is the same name.
pub fn check_version(version: &Version) -> Result<(), String> {
    if version.as_str().eq_ignore_ascii_case(CURRENT) {
        return Err(format!(
            "the version {version} is reserved: {CURRENT:?} names the active release on a host; choose another version"
        ));
    }
    Ok(())
}

/// Whether two versions are the same name on a case-insensitive file system.
pub fn differ_only_in_case(one: &Version, other: &Version) -> bool {
    one != other && one.as_str().eq_ignore_ascii_case(other.as_str())
}

/// Whether a name without slashes is a valid file name on Windows: no DOS device, no stream of another file, no wildcard, no trailing
/// characters that Windows drops.
pub fn is_valid_windows_name(name: &str) -> bool {
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
    fn reserved_names_are_rejected_for_every_system() {
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
    fn invalid_windows_file_names_are_rejected_for_windows() {
        for (name, version) in [("con", "1"), ("aux.x", "1"), ("a.", "1"), ("a", "1."), ("a", "NUL"), ("a", "com1")] {
            let why = check(&release(name, version, Os::Windows)).unwrap_err();
            assert!(why.contains("Windows"), "{why}");
            assert_eq!(check(&release(name, version, Os::Linux)), Ok(()), "{name} {version}");
        }
        assert_eq!(check(&release("console", "1.0.con", Os::Windows)), Ok(()));
    }

    #[test]
    fn versions_that_differ_only_in_case_are_recognized() {
        let differ = |one: &str, other: &str| differ_only_in_case(&one.parse().unwrap(), &other.parse().unwrap());
        assert!(differ("1.0A", "1.0a"));
        assert!(!differ("1.0a", "1.0a") && !differ("1.0a", "1.0b"));
    }
}
