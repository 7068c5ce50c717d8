//! Identifies the program of a file or a process by the SHA-256 of its bytes. Digests of unchanged files are cached.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::Digest;
use crate::core::upgrade::{Trial, WhichRelease};
use crate::package;
use crate::platform::{self, ContentStamp};

/// The size of the cache: more than the files of an upgrade.
const MAX_CACHED: usize = 8;

/// A cache of the digests of executables.
#[derive(Debug, Default)]
pub struct Programs {
    cached: HashMap<ContentStamp, Digest>,
}

impl Programs {
    /// The digest of the file at a path; `None`: it does not exist.
    pub fn at(&mut self, path: &Path) -> Result<Option<Digest>> {
        let attempt = || match File::open(path) {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
            Ok(_) => Err(std::io::Error::new(ErrorKind::InvalidInput, "it is not a regular file")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let file = attempt().with_context(|| format!("cannot read {}", path.display()))?;
        file.map(|file| self.of(file)).transpose().with_context(|| format!("cannot read {}", path.display()))
    }

    /// The digest of the program that a process runs; `None`: it cannot be read. `recorded`: what the process has recorded itself.
    pub fn of_process(&mut self, pid: u32, recorded: Option<&Digest>) -> Option<Digest> {
        recorded.cloned().or_else(|| self.of(platform::program_of(pid).ok()?).ok())
    }

    fn of(&mut self, mut file: File) -> Result<Digest> {
        let stamp = ContentStamp::of(&file)?;
        if let Some(digest) = self.cached.get(&stamp) {
            return Ok(digest.clone());
        }
        let digest = package::sha256_of(&mut file)?;
        if self.cached.len() >= MAX_CACHED {
            self.cached.clear();
        }
        self.cached.insert(stamp, digest.clone());
        Ok(digest)
    }
}

/// The release of a trial that a program belongs to. `same`: the result if both releases have the same bytes.
pub fn which(trial: &Trial, program: Option<&Digest>, same: WhichRelease) -> WhichRelease {
    let Some(program) = program else { return WhichRelease::Other };
    match (*program == trial.from.executable, *program == trial.to.executable) {
        (true, true) => same,
        (true, false) => WhichRelease::From,
        (false, true) => WhichRelease::To,
        (false, false) => WhichRelease::Other,
    }
}
