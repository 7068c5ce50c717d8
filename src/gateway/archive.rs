//! A look into an archive that is about to be published: what kind of package it is, and the few files of it that publishing needs.
//!
//! The archive is the operator's own, yet read by the rules of the hosts that are to unpack it: one that they would refuse is refused here,
//! where somebody can do something about it.

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

/// A manifest beyond this is none.
const MAX_MANIFEST_BYTES: u64 = 256 << 10;

/// Where a package of the manager has keys that are to be trusted no more.
const REVOKED: &str = "keys/revoked/";
/// A public key's file has two short lines; more files than this are a mistake.
const MAX_KEY_BYTES: u64 = 64 << 10;
const MAX_KEYS: usize = 256;

/// What publishing wants to know of a package.
#[derive(Debug, Default)]
pub(super) struct PackageContents {
    /// Of a native sub-agent.
    pub(super) manifest: Option<Manifest>,
    /// There is an executable `control` at the root.
    control: bool,
    /// There is one that Windows can run.
    control_for_windows: bool,
    /// There is a `control` that cannot be run.
    control_not_executable: bool,
    /// Where the manager's executable lies, in a package of the manager.
    pub(super) manager: Option<String>,
    /// Every file, and whether it can be run.
    files: BTreeMap<String, bool>,
    /// What a manager's package says about keys, by the files' paths; `None`: a link.
    keys: Vec<(String, Option<Vec<u8>>)>,
}

impl PackageContents {
    /// Refuses what no host could run as a sub-agent.
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

    /// Refuses a package of the manager that hosts would refuse for what it says about keys.
    pub(super) fn check_keys(&self, version: &Version) -> Result<()> {
        let (mut brought, mut revoked) = (Keys::default(), Keys::default());
        ensure!(self.keys.len() <= MAX_KEYS, "it has more than {MAX_KEYS} files of keys");
        for (path, text) in &self.keys {
            let attempt = || -> Result<Keys> {
                let text = text.as_ref().context("it is a link")?;
                let keys = Keys::parse(std::str::from_utf8(text).context("it is not text")?)?;
                ensure!(!keys.is_empty(), "it is empty");
                Ok(keys)
            };
            let keys = attempt().with_context(|| format!("cannot take its {path} as a trusted key"))?;
            if path.starts_with(REVOKED) { &mut revoked } else { &mut brought }.extend(keys)?;
        }
        KeyOffer::new(version, brought, revoked).map(drop)
    }

    fn check_command(&self, command: &[String], os: Os) -> Result<()> {
        let Some(program) = command.first() else { return Ok(()) };
        let parts = program.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".");
        let path = parts.collect::<Vec<_>>().join("/");
        match (self.files.get(&path), os) {
            // Windows adds an extension by itself, and knows no mode.
            (None, Os::Windows) if self.files.keys().any(|file| file.starts_with(&format!("{path}."))) => Ok(()),
            (Some(_), Os::Windows) | (Some(true), Os::Linux) => Ok(()),
            (Some(false), Os::Linux) => {
                bail!("its {MANIFEST} runs {program}, which is not executable (`chmod +x {path}`)")
            }
            (None, _) => bail!("its {MANIFEST} runs {program}, which is not in it"),
        }
    }
}

fn is_key(path: &str) -> bool {
    let name = path.strip_prefix(REVOKED).or_else(|| path.strip_prefix("keys/"));
    name.is_some_and(|name| name.ends_with(".pub") && !name.contains('/'))
}

/// Reads through the whole archive.
pub(super) fn contents(archive: &mut File, packing: Packing) -> Result<PackageContents> {
    let mut contents = PackageContents::default();
    // What it is for is known only after this; see `check_for`.
    package::inspect(archive, packing, Os::Linux, &mut |seen| {
        contents.files.insert(seen.path.to_owned(), seen.executable);
        match seen.path {
            MANIFEST => {
                let content = seen.content.with_context(|| format!("its {MANIFEST} is a link"))?;
                contents.manifest = Some(manifest(content)?);
            }
            // Windows goes by the end of the name.
            "control.exe" | "control.cmd" | "control.bat" => contents.control_for_windows = true,
            CONTROL_SCRIPT => {
                contents.control |= seen.executable;
                contents.control_not_executable |= !seen.executable;
            }
            "bin/aops" | "bin/aops.exe" => contents.manager = Some(seen.path.to_owned()),
            path if is_key(path) && contents.keys.len() <= MAX_KEYS => {
                let text = seen.content.map(|content| -> io::Result<Vec<u8>> {
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

/// Refuses what hosts of that system alone refuse.
pub(super) fn check_for(os: Os, archive: &mut File, packing: Packing) -> Result<()> {
    match os {
        Os::Linux => Ok(()),
        Os::Windows => package::inspect(archive, packing, os, &mut |_| Ok(())),
    }
}

/// Copies one file of the archive.
pub(super) fn extract(archive: &mut File, packing: Packing, path: &str, to: &mut impl io::Write) -> Result<()> {
    let mut found = false;
    package::inspect(archive, packing, Os::Linux, &mut |seen| {
        if seen.path == path {
            io::copy(seen.content.with_context(|| format!("its {path} is a link"))?, to)?;
            found = true;
        }
        Ok(())
    })?;
    if found { Ok(()) } else { bail!("it has no {path}") }
}

/// The name of the manager's executable in a package for `os`.
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
    launch::parse(&text).with_context(|| format!("cannot take its {MANIFEST}"))
}
