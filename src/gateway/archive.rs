//! A look into an archive that is about to be published: what kind of package it is, and the few files of it that publishing needs.
//!
//! The archive is the operator's own, yet read with limits; and with the window that hosts allow, so that one that they could not unpack is
//! refused here, where somebody can do something about it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};

use crate::core::health::Check;
use crate::core::manifest::{CONTROL_SCRIPT, MANIFEST, Manifest};
use crate::core::model::{Os, Packing};
use crate::process::launch;

/// Base 2 logarithm of the largest zstd window that hosts take: 8 MiB.
const WINDOW_LOG_MAX: u32 = 23;
/// More entries than this are a mistake.
const MAX_ENTRIES: usize = 100_000;
/// A manifest beyond this is none.
const MAX_MANIFEST_BYTES: u64 = 256 << 10;

/// A file in an archive.
struct Entry<'a> {
    /// Relative to the archive's root, with `/`.
    path: &'a str,
    /// Unix mode, where the archive says one and it counts: of a link, what it leads to would.
    mode: Option<u32>,
    content: &'a mut dyn Read,
}

/// What publishing wants to know of a package.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Of a native sub-agent.
    pub(super) manifest: Option<Manifest>,
    /// There is an executable `control` at the root.
    control: bool,
    /// There is a `control` that cannot be run.
    control_not_executable: bool,
    /// Where the manager's executable lies, in a package of the manager.
    pub(super) manager: Option<String>,
    /// Every file, and whether it can be run.
    files: BTreeMap<String, bool>,
}

impl Contents {
    /// Refuses what no host could run as a sub-agent.
    pub(super) fn check_runnable(&self, os: Os) -> Result<()> {
        if let Some(manifest) = &self.manifest {
            self.check_command(&manifest.run.command, os)?;
            return match manifest.health.as_ref().map(|health| &health.check) {
                Some(Check::Exec(command)) => self.check_command(command, os),
                _ => Ok(()),
            };
        }
        if self.control {
            return Ok(());
        }
        if self.control_not_executable {
            bail!("its {CONTROL_SCRIPT} is not executable (`chmod +x {CONTROL_SCRIPT}`)");
        }
        bail!("it has neither {MANIFEST} nor an executable {CONTROL_SCRIPT} at its root");
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

/// Reads through the whole archive.
pub(super) fn contents(archive: &mut File, packing: Packing) -> Result<Contents> {
    let mut contents = Contents::default();
    visit(archive, packing, |entry| {
        // An archive that says no modes was made where there are none.
        let runs = entry.mode.is_none_or(|mode| mode & 0o111 != 0);
        contents.files.insert(entry.path.to_owned(), runs);
        match entry.path {
            MANIFEST => contents.manifest = Some(manifest(entry.content)?),
            CONTROL_SCRIPT | "control.exe" | "control.cmd" | "control.bat" => {
                contents.control |= runs;
                contents.control_not_executable |= !runs;
            }
            "bin/aops" | "bin/aops.exe" => contents.manager = Some(entry.path.to_owned()),
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(contents)
}

/// Copies one file of the archive.
pub(super) fn extract(archive: &mut File, packing: Packing, path: &str, to: &mut impl io::Write) -> Result<()> {
    let mut found = false;
    visit(archive, packing, |entry| {
        if entry.path != path {
            return Ok(ControlFlow::Continue(()));
        }
        io::copy(entry.content, to)?;
        found = true;
        Ok(ControlFlow::Break(()))
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

fn visit(
    archive: &mut File,
    packing: Packing,
    mut each: impl FnMut(Entry<'_>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    archive.seek(SeekFrom::Start(0))?;
    match packing {
        Packing::TarZst => {
            let mut decoder = zstd::Decoder::new(archive)?;
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            visit_tar(decoder, each)
        }
        Packing::TarGz => visit_tar(flate2::read::MultiGzDecoder::new(archive), each),
        Packing::Zip => {
            let mut zip = zip::ZipArchive::new(archive).context("it is no zip archive")?;
            if zip.len() > MAX_ENTRIES {
                bail!("it has more than {MAX_ENTRIES} entries");
            }
            for index in 0..zip.len() {
                let mut file = zip.by_index(index)?;
                if !file.is_file() {
                    continue;
                }
                let (path, mode) = (relative(&file.name()?).to_owned(), file.unix_mode());
                if each(Entry { path: &path, mode, content: &mut file })?.is_break() {
                    break;
                }
            }
            Ok(())
        }
    }
}

fn visit_tar(packed: impl Read, mut each: impl FnMut(Entry<'_>) -> Result<ControlFlow<()>>) -> Result<()> {
    let mut archive = tar::Archive::new(packed);
    let entries = archive.entries().context("it is no tar archive")?;
    for (index, entry) in entries.enumerate() {
        let mut entry = entry.context("it is damaged, or not the kind of archive that its name says")?;
        if index >= MAX_ENTRIES {
            bail!("it has more than {MAX_ENTRIES} entries");
        }
        let kind = entry.header().entry_type();
        if !kind.is_file() && !kind.is_symlink() && !kind.is_hard_link() {
            continue;
        }
        let path = entry.path()?.to_string_lossy().into_owned();
        let mode = if kind.is_file() { Some(entry.header().mode()?) } else { None };
        if each(Entry { path: relative(&path), mode, content: &mut entry })?.is_break() {
            break;
        }
    }
    Ok(())
}

fn relative(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}
