//! The identity of a package (name, version, os, arch), from the command line, the package's content, its signature and its file name.
//!
//! Sources must not contradict each other, except for the file name, which only fills gaps. Only the os and arch of a directory have a
//! default, which is reported.

use anyhow::{Context, Result, bail};

use crate::core::model::{AgentName, Arch, Os, Packing, Release, Version};
use crate::platform;

/// The parts of an identity that one source gives, such as the command line.
pub(super) struct RequestedIdentity {
    pub(super) name: Option<AgentName>,
    pub(super) version: Option<Version>,
    pub(super) os: Option<Os>,
    pub(super) arch: Option<Arch>,
}

/// The other sources of an identity.
pub(super) struct IdentityHints {
    /// Name and version of its agent.toml.
    pub(super) manifest: Option<(AgentName, Version)>,
    /// The release in the signature beside an archive.
    pub(super) signed: Option<Release>,
    /// The file name of an archive; `None` for a directory, whose name is not used.
    pub(super) file_name: Option<String>,
}

/// Returns the release, and a note on the defaults that were used.
pub(super) fn resolve(requested: RequestedIdentity, hints: IdentityHints) -> Result<(Release, Option<String>)> {
    let (mut name, mut version, mut os, mut arch) = (requested.name, requested.version, requested.os, requested.arch);
    if let Some(signed) = &hints.signed {
        merge(&mut name, &signed.name, "name", "its signature")?;
        merge(&mut version, &signed.version, "version", "its signature")?;
        merge(&mut os, &signed.os, "os", "its signature")?;
        merge(&mut arch, &signed.arch, "arch", "its signature")?;
    }
    if let Some((manifest_name, manifest_version)) = &hints.manifest {
        merge(&mut name, manifest_name, "name", "its agent.toml")?;
        merge(&mut version, manifest_version, "version", "its agent.toml")?;
    }
    let is_directory = hints.file_name.is_none();
    if let Some(file_name) = hints.file_name {
        // The weakest source: it fills gaps and may contradict the others.
        let found = read_file_name(&file_name, name.as_ref(), version.as_ref());
        name = name.or(found.name);
        version = version.or(found.version);
        os = os.or(found.os);
        arch = arch.or(found.arch);
    }
    let name = name.context("its name is unknown; give it with --name")?;
    let version = version.context("its version is unknown; give it with --version")?;
    if !is_directory && (os.is_none() || arch.is_none()) {
        bail!("its file name does not contain os and arch; give them with --os and --arch");
    }
    let (own_os, own_arch) = own_system();
    let assumed = (os.is_none() || arch.is_none()).then(|| {
        let (os, arch) = (os.unwrap_or(own_os), arch.unwrap_or(own_arch));
        format!("assuming {os}/{arch}, the system of this executable; --os and --arch change it")
    });
    let release = Release { name, version, os: os.unwrap_or(own_os), arch: arch.unwrap_or(own_arch) };
    Ok((release, assumed))
}

fn merge<T: Clone + PartialEq + std::fmt::Display>(
    known: &mut Option<T>,
    found: &T,
    field: &str,
    source: &str,
) -> Result<()> {
    match known {
        Some(known) if known != found => bail!("{source} has {field} {found}, not {known}"),
        Some(_) => {}
        None => *known = Some(found.clone()),
    }
    Ok(())
}

/// The kind of archive by its file name.
pub(super) fn packing_of(file_name: &str) -> Option<Packing> {
    let fits = |packing: &&Packing| file_name.strip_suffix(packing.as_str()).is_some_and(|stem| stem.ends_with('.'));
    Packing::ALL.iter().find(fits).copied()
}

/// Parses `{name}-{version}_{os}_{arch}.{packing}`; parts that are missing or invalid are `None`.
///
/// Names and versions may both contain dashes. If one of them is known, it determines the other one. Otherwise the version begins at the
/// first dash before a digit or, without such a dash, after the last dash (a commit hash).
fn read_file_name(file_name: &str, name: Option<&AgentName>, version: Option<&Version>) -> RequestedIdentity {
    let stem =
        packing_of(file_name).map_or(file_name, |packing| &file_name[..file_name.len() - packing.as_str().len() - 1]);
    let (stem, os, arch) = match stem.rsplitn(3, '_').collect::<Vec<_>>()[..] {
        [arch, os, rest] => match (os.parse().ok(), arch.parse().ok()) {
            (Some(os), Some(arch)) => (rest, Some(os), Some(arch)),
            _ => (stem, None, None),
        },
        _ => (stem, None, None),
    };
    let by_name = name.and_then(|name| Some((name.as_str(), stem.strip_prefix(name.as_str())?.strip_prefix('-')?)));
    let by_version = || {
        version.and_then(|version| Some((stem.strip_suffix(version.as_str())?.strip_suffix('-')?, version.as_str())))
    };
    let before_digit = || {
        let dash = stem.match_indices('-').find(|(at, _)| stem[at + 1..].starts_with(|c: char| c.is_ascii_digit()))?;
        Some((&stem[..dash.0], &stem[dash.0 + 1..]))
    };
    let split = by_name.or_else(by_version).or_else(before_digit).or_else(|| stem.rsplit_once('-'));
    RequestedIdentity {
        name: split.and_then(|(n, _)| n.parse().ok()),
        version: split.and_then(|(_, v)| v.parse().ok()),
        os,
        arch,
    }
}

/// The system that this executable was built for.
pub(super) fn own_system() -> (Os, Arch) {
    (platform::OS, platform::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> RequestedIdentity {
        RequestedIdentity { name: None, version: None, os: None, arch: None }
    }

    fn of_file(file_name: &str, requested: RequestedIdentity) -> Result<String> {
        let hints = IdentityHints { manifest: None, signed: None, file_name: Some(file_name.to_owned()) };
        resolve(requested, hints).map(|(release, _)| release.to_string())
    }

    #[test]
    fn a_file_name_is_parsed_as_far_as_it_is_valid() {
        for (file, expected) in [
            ("node-exporter-1.5.0_linux_amd64.tar.gz", Some("node-exporter 1.5.0 for linux/amd64")),
            ("aops-spm-0.1.0-rc.1_windows_386.zip", Some("aops-spm 0.1.0-rc.1 for windows/386")),
            ("aops-spm-c57f6a1d_linux_386.tar.zst", Some("aops-spm c57f6a1d for linux/386")),
            ("node-exporter-1.5.0.tar.gz", None),
            ("thing_linux_amd64.tar.gz", None),
            ("Thing-1_linux_amd64.tar.gz", None),
            ("a-1_plan9_amd64.tar.gz", None),
        ] {
            assert_eq!(of_file(file, nothing()).ok().as_deref(), expected, "{file}");
        }
    }

    #[test]
    fn a_given_name_or_version_determines_the_other_one() {
        let requested = RequestedIdentity { name: Some("a-1".parse().unwrap()), ..nothing() };
        assert_eq!(of_file("a-1-2_linux_amd64.zip", requested).unwrap(), "a-1 2 for linux/amd64");
        let requested = RequestedIdentity { version: Some("2-3".parse().unwrap()), ..nothing() };
        assert_eq!(of_file("a-1-2-3_linux_amd64.zip", requested).unwrap(), "a-1 2-3 for linux/amd64");
        let requested = RequestedIdentity { os: Some(Os::Linux), arch: Some(Arch::I386), ..nothing() };
        assert_eq!(of_file("a-1.tar.gz", requested).unwrap(), "a 1 for linux/386");
    }

    #[test]
    fn sources_must_not_contradict_each_other() {
        let manifest = Some(("a".parse().unwrap(), "1".parse().unwrap()));
        let requested = RequestedIdentity { version: Some("2".parse().unwrap()), ..nothing() };
        let error = resolve(requested, IdentityHints { manifest, signed: None, file_name: None }).unwrap_err();
        assert_eq!(error.to_string(), "its agent.toml has version 1, not 2");
    }

    #[test]
    fn only_the_system_of_a_directory_has_a_default_and_it_is_reported() {
        let manifest = Some(("a".parse().unwrap(), "1".parse().unwrap()));
        let (release, assumed) = resolve(nothing(), IdentityHints { manifest, signed: None, file_name: None }).unwrap();
        assert_eq!((release.os, release.arch), own_system());
        assert!(assumed.unwrap().contains("assuming"));
        let error = resolve(nothing(), IdentityHints { manifest: None, signed: None, file_name: None }).unwrap_err();
        assert!(error.to_string().contains("--name"));
    }
}
