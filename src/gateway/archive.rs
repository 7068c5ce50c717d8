//! Reads an archive before it is published: the kind of package, and the few files that publishing needs.
//!
//! The archive is read by the same rules as on the hosts that unpack it. An archive that hosts would reject is rejected here, where the
//! operator can fix it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use anyhow::{Context, Result, bail, ensure};

use crate::core::health::CheckTarget;
use crate::core::manifest::{CONTROL_SCRIPT, MANIFEST, Manifest};
use crate::core::model::{Os, Packing, Version};
use crate::installation::keyring::KeyOffer;
use crate::package::{self, Keys};
use crate::process::launch;

/// The largest manifest that is read.
const MAX_MANIFEST_BYTES: u64 = 256 << 10;

/// The directory of revoked keys in a package of the manager.
const REVOKED: &str = "keys/revoked/";
/// A public key file has two short lines.
const MAX_KEY_BYTES: u64 = 64 << 10;
/// More key files than this are a mistake.
const MAX_KEYS: usize = 256;

/// The content of a package, as far as publishing needs it.
#[derive(Debug, Default)]
pub(super) struct PackageContents {
    /// The manifest of a native sub-agent.
    pub(super) manifest: Option<Manifest>,
    /// Whether an executable `control` is at the root.
    control: bool,
    /// Whether a `control` that Windows can run is at the root.
    control_for_windows: bool,
    /// Whether a `control` without the executable bit is at the root.
    control_not_executable: bool,
    /// The path of the manager's executable, in a package of the manager.
    pub(super) manager: Option<String>,
    /// Every file, and whether it is executable.
    files: BTreeMap<String, bool>,
    /// The key files of a manager's package: path and content; `None` for a link.
    keys: Vec<(String, Option<Vec<u8>>)>,
}

impl PackageContents {
    /// Rejects a package that no host could run as a sub-agent.
    pub(super) fn check_runnable(&self, os: Os) -> Result<()> {
        if let Some(manifest) = &self.manifest {
            self.check_command(&manifest.run.command, os)?;
            return match manifest.health.as_ref().map(|health| &health.check) {
                Some(CheckTarget::Exec(command)) => self.check_command(command, os),
                _ => Ok(()),
            };
        }
        if self.control || (self.control_for_windows && os == Os::Windows) {
            return Ok(());
        }
        if self.control_not_executable {
            bail!("its {CONTROL_SCRIPT} is not executable (`chmod +x {CONTROL_SCRIPT}`)");
        }
        bail!("it has neither {MANIFEST} nor an executable {CONTROL_SCRIPT} at its root");
    }

    /// Rejects a package of the manager whose key files hosts would reject.
    pub(super) fn check_keys(&self, version: &Version) -> Result<()> {
        let (mut trusted, mut revoked) = (Keys::default(), Keys::default());
        ensure!(self.keys.len() <= MAX_KEYS, "it has more than {MAX_KEYS} key files");
        for (path, text) in &self.keys {
            let attempt = || -> Result<Keys> {
                let text = text.as_ref().context("it is a link")?;
                let keys = Keys::parse(std::str::from_utf8(text).context("it is not text")?)?;
                ensure!(!keys.is_empty(), "it is empty");
                Ok(keys)
            };
            let keys = attempt().with_context(|| format!("cannot use its {path} as a trusted key"))?;
            if path.starts_with(REVOKED) { &mut revoked } else { &mut trusted }.extend(keys)?;
        }
        KeyOffer::new(version, trusted, revoked).map(drop)
    }

    fn check_command(&self, command: &[String], os: Os) -> Result<()> {
        let Some(program) = command.first() else { return Ok(()) };
        let parts = program.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".");
        let path = parts.collect::<Vec<_>>().join("/");
        match (self.files.get(&path), os) {
            // Windows completes the extension and has no executable bit.
            (None, Os::Windows) if self.files.keys().any(|file| file.starts_with(&format!("{path}."))) => Ok(()),
            (Some(_), Os::Windows) | (Some(true), Os::Linux) => Ok(()),
            (Some(false), Os::Linux) => {
                bail!("its {MANIFEST} runs {program}, which is not executable (`chmod +x {path}`)")
            }
            (None, _) => bail!("its {MANIFEST} runs {program}, which is not in the package"),
        }
    }
}

fn is_key(path: &str) -> bool {
    let name = path.strip_prefix(REVOKED).or_else(|| path.strip_prefix("keys/"));
    name.is_some_and(|name| name.ends_with(".pub") && !name.contains('/'))
}

/// Reads the whole archive.
pub(super) fn contents(archive: &mut File, packing: Packing) -> Result<PackageContents> {
    let mut contents = PackageContents::default();
    // The operating system that it is for is known only after this; see `check_for`.
    package::inspect(archive, packing, Os::Linux, &mut |entry| {
        contents.files.insert(entry.path.to_owned(), entry.executable);
        match entry.path {
            MANIFEST => {
                let content = entry.content.with_context(|| format!("its {MANIFEST} is a link"))?;
                contents.manifest = Some(manifest(content)?);
            }
            // Windows recognizes programs by their extension.
            "control.exe" | "control.cmd" | "control.bat" => contents.control_for_windows = true,
            CONTROL_SCRIPT => {
                contents.control |= entry.executable;
                contents.control_not_executable |= !entry.executable;
            }
            "bin/aops" | "bin/aops.exe" => contents.manager = Some(entry.path.to_owned()),
            path if is_key(path) && contents.keys.len() <= MAX_KEYS => {
                let text = entry.content.map(|content| -> io::Result<Vec<u8>> {
                    let mut text = Vec::new();
                    content.take(MAX_KEY_BYTES).read_to_end(&mut text)?;
                    Ok(text)
                });
                contents.keys.push((path.to_owned(), text.transpose()?));
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(contents)
}

/// Rejects an archive that only hosts of this operating system would reject.
pub(super) fn check_for(os: Os, archive: &mut File, packing: Packing) -> Result<()> {
    match os {
        Os::Linux => Ok(()),
        Os::Windows => package::inspect(archive, packing, os, &mut |_| Ok(())),
    }
}

/// Copies one file of the archive; a missing file or a link is an error.
pub(super) fn extract(archive: &mut File, packing: Packing, path: &str, to: &mut impl io::Write) -> Result<()> {
    let mut found = false;
    package::inspect(archive, packing, Os::Linux, &mut |entry| {
        if entry.path == path {
            io::copy(entry.content.with_context(|| format!("its {path} is a link"))?, to)?;
            found = true;
        }
        Ok(())
    })?;
    if found { Ok(()) } else { bail!("it has no {path}") }
}

/// The path of the manager's executable in a package for `os`.
pub(super) fn manager_path(os: Os) -> &'static str {
    match os {
        Os::Linux => "bin/aops",
        Os::Windows => "bin/aops.exe",
    }
}

fn manifest(content: &mut dyn Read) -> Result<Manifest> {
    let mut text = String::new();
    content
        .take(MAX_MANIFEST_BYTES)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read its {MANIFEST}"))?;
    launch::parse(&text).with_context(|| format!("cannot use its {MANIFEST}"))
}
