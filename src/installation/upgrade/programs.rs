//! Which program a file or a process is: by the SHA-256 of its bytes, read once for as long as they are the same.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::Digest;
use crate::core::upgrade::{Trial, WhichRelease};
use crate::package;
use crate::platform::{self, ContentStamp};

/// More files than an upgrade knows are not remembered.
const MAX_KNOWN: usize = 8;

/// The digests of executables.
#[derive(Debug, Default)]
pub struct Programs {
    known: HashMap<ContentStamp, Digest>,
}

impl Programs {
    /// Of the file at a path; `None`: there is none.
    pub fn at(&mut self, path: &Path) -> Result<Option<Digest>> {
        let attempt = || match File::open(path) {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
            Ok(_) => Err(std::io::Error::new(ErrorKind::InvalidInput, "it is no file")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let file = attempt().with_context(|| format!("cannot read {}", path.display()))?;
        file.map(|file| self.of(file)).transpose().with_context(|| format!("cannot read {}", path.display()))
    }

    /// Of the program that a process runs; `None`: that cannot be seen.
    pub fn of_process(&mut self, pid: u32) -> Option<Digest> {
        self.of(platform::program_of(pid).ok()?).ok()
    }

    fn of(&mut self, mut file: File) -> Result<Digest> {
        let stamp = ContentStamp::of(&file)?;
        if let Some(digest) = self.known.get(&stamp) {
            return Ok(digest.clone());
        }
        let digest = package::sha256_of(&mut file)?;
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(stamp, digest.clone());
        Ok(digest)
    }
}

/// Which of the two releases of a trial a program is. `same`: where both have the same bytes.
pub fn which(trial: &Trial, program: Option<&Digest>, same: WhichRelease) -> WhichRelease {
    let Some(program) = program else { return WhichRelease::Other };
    match (*program == trial.from.executable, *program == trial.to.executable) {
        (true, true) => same,
        (true, false) => WhichRelease::From,
        (false, true) => WhichRelease::To,
        (false, false) => WhichRelease::Other,
    }
}
