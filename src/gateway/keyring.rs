//! `keys/`: the depot's public keys. Each file is read separately: an invalid one is reported, and the others are used.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::GatewayDirectory;
use crate::package::Keys;
use crate::{platform, store};

/// A public key file has two short lines.
const MAX_KEY_BYTES: u64 = 4 << 10;
/// More keys than this are a mistake.
const MAX_KEYS: usize = 64;

/// The public keys of a depot.
#[derive(Debug, Default)]
pub(super) struct DepotKeys {
    /// The content of the key files, for the bootstrap.
    texts: Vec<String>,
    keys: Keys,
    problems: Vec<String>,
}

impl DepotKeys {
    /// Reads every `keys/*.pub`. An invalid file is a problem; only an unreadable directory is an error.
    pub(super) fn read(directory: &GatewayDirectory) -> Result<DepotKeys> {
        let mut names = public_key_files(&directory.keys())?;
        let mut loaded = DepotKeys::default();
        if names.len() > MAX_KEYS {
            let surplus = names.split_off(MAX_KEYS).len();
            loaded.problems.push(format!("keys/ has more than {MAX_KEYS} public keys; {surplus} of them are not used"));
        }
        for name in names {
            if let Err(error) = loaded.add(&directory.keys().join(&name)) {
                loaded.problems.push(format!(
                    "keys/{name} is not used: {error:#}; replace it with a minisign public key, or remove it"
                ));
            }
        }
        Ok(loaded)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let bytes = store::read(path, MAX_KEY_BYTES)?.context("the file does not exist")?;
        let text = String::from_utf8(bytes).context("it is not text")?;
        let read = Keys::parse(&text)?;
        ensure!(!read.is_empty(), "it contains no key");
        self.keys.extend(read)?;
        self.texts.push(text);
        Ok(())
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(super) fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The files that are not used, with the reason.
    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }
}

/// The names of the `*.pub` files of a directory, sorted.
pub(super) fn public_key_files(directory: &Path) -> Result<Vec<String>> {
    let attempt = || -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".pub") && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    };
    attempt().with_context(|| format!("cannot read the public keys in {}", directory.display()))
}

/// Problems with permissions: those of `private` files, and of their directory, that not only the owner can read.
pub(super) fn exposed(directory: &Path, private: &[&Path]) -> Vec<String> {
    let is_open = |path: &Path| fs::metadata(path).is_ok_and(|metadata| platform::is_readable_by_others(&metadata));
    let problem = |path: &Path, what: &str, mode: &str| {
        let shown = path.display();
        is_open(path).then(|| format!("{what} {shown} can be read by others; run `chmod {mode} {shown}`"))
    };
    let files = private.iter().filter_map(|path| problem(path, "the private key", "600"));
    files.chain(problem(directory, "the directory of private keys", "700")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::sign::Signer;

    #[test]
    fn an_invalid_key_file_is_reported_and_the_others_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let directory = GatewayDirectory::new(dir.path());
        fs::create_dir(directory.keys()).unwrap();
        let key = Signer::generate().unwrap().public_text().unwrap();
        fs::write(directory.keys().join("b.pub"), &key).unwrap();
        for (name, text) in [
            ("a.pub", "ssh-rsa AAAA someone@example\n"),
            ("c.pub", ""),
            ("d.pub", &format!("\u{feff}{key}")),
            ("e.pub", &key[..key.len() - 9]),
        ] {
            fs::write(directory.keys().join(name), text).unwrap();
        }
        fs::write(directory.keys().join("f.pub"), [0xff, 0xfe]).unwrap();
        fs::create_dir(directory.keys().join("g.pub")).unwrap();
        let loaded = DepotKeys::read(&directory).unwrap();
        assert_eq!((loaded.keys().ids().count(), loaded.texts()), (1, &[key][..]));
        let named: Vec<&str> = loaded.problems().iter().filter_map(|problem| problem.split(' ').next()).collect();
        assert_eq!(named, ["keys/a.pub", "keys/c.pub", "keys/d.pub", "keys/e.pub", "keys/f.pub", "keys/g.pub"]);
        fs::remove_dir_all(directory.keys()).unwrap();
        assert!(DepotKeys::read(&directory).is_err());
    }
}
