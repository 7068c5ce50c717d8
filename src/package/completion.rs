//! `.complete`: which package was unpacked into a release directory, and which key signed it.
//!
//! A release may be activated long after it was unpacked: it waits for another one, or is the target of a rollback. Its key or epoch may
//! have been withdrawn meanwhile, so each activation checks it again, against the committed epoch and the keys trusted now.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::keys::{Key, Keys};
use crate::core::model::Digest;
use crate::home::COMPLETE;
use crate::{platform, store};

/// The content of `.complete` in a release directory: the package that was unpacked there completely.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    pub file: String,
    pub sha256: Digest,
    pub epoch: u64,
    /// The key that signed it; absent if an older version unpacked it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<Key>,
    #[serde(flatten)]
    pub(super) unknown: serde_json::Map<String, serde_json::Value>,
}

/// Why a release that was accepted earlier is now rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WithdrawnRelease(String);

impl fmt::Display for WithdrawnRelease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WithdrawnRelease {}

impl Completed {
    /// Whether a host with the committed epoch `least` and these `keys` still accepts the release. Without a recorded signer only the epoch
    /// is checked.
    pub fn admit(&self, least: u64, keys: &Keys) -> Result<(), WithdrawnRelease> {
        let Completed { file, epoch, .. } = self;
        if *epoch < least {
            return Err(WithdrawnRelease(format!(
                "cannot activate {file}: it has epoch {epoch}, lower than the {least} that this host has committed since it was unpacked: \
                 packages of lower epochs were withdrawn; publish it again with `--epoch {least}`"
            )));
        }
        let Some(signer) = self.signer.as_ref().filter(|signer| !keys.contains(signer)) else { return Ok(()) };
        let id = signer.id();
        let why = match keys.revoked_by(id) {
            Some(by) => format!("which was revoked by {by}"),
            None => format!("which is no longer trusted here{}", keys.location_suffix()),
        };
        Err(WithdrawnRelease(format!(
            "cannot activate {file}: it was signed by the key {id}, {why}; sign it with a key that is trusted here"
        )))
    }
}

/// Reads which package was unpacked in `release_dir`. A missing or unreadable record is a [`WithdrawnRelease`]: fetch the release again.
pub fn load_completed(release_dir: &Path) -> Result<Completed> {
    let fetch_again = |why: String| {
        WithdrawnRelease(format!("cannot activate {}: {why}; it will be fetched again", release_dir.display()))
    };
    match store::load::<Completed>(&release_dir.join(COMPLETE)) {
        Ok(Some(completed)) => Ok(completed),
        Ok(None) => Err(fetch_again("it is incomplete".to_owned()).into()),
        Err(error) if error.chain().any(|cause| cause.is::<std::io::Error>()) => Err(error),
        Err(error) => Err(fetch_again(format!("{error:#}")).into()),
    }
}

/// Removes a release, if it exists: first its `.complete`, so that it no longer counts, then the rest. After a power cut in between,
/// `.complete` does not return to a damaged release.
pub fn discard(release_dir: &Path) -> Result<()> {
    store::ensure_nothing_mounted(release_dir)?;
    store::remove(&release_dir.join(COMPLETE))?;
    match platform::sync_directory(release_dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot sync {}", release_dir.display()))
        }
        _ => store::remove_tree(release_dir),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Keys {
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        Keys::parse(&pair.pk.to_box().unwrap().into_string()).unwrap()
    }

    fn first(keys: &Keys) -> Key {
        keys.iter().next().unwrap().clone()
    }

    fn release(epoch: u64, signer: Option<Key>) -> Completed {
        let sha256 = "ab".repeat(32).parse().unwrap();
        Completed { file: "a-1_linux_amd64.zip".to_owned(), sha256, epoch, signer, unknown: Default::default() }
    }

    #[test]
    fn a_higher_epoch_or_a_removed_key_withdraws_a_release() {
        let (key, other) = (key(), key());
        let signed = release(3, Some(first(&key)));
        assert_eq!(signed.admit(3, &key), Ok(()));
        let error = signed.admit(4, &key).unwrap_err().to_string();
        assert!(error.contains("epoch 3, lower than the 4") && error.contains("--epoch 4"), "{error}");
        let error = signed.admit(0, &other).unwrap_err().to_string();
        assert!(error.contains(&first(&key).id().to_string()) && error.contains("no longer trusted here"), "{error}");
        let revoked = other.with_revoked(vec![(first(&key).id(), "aops-spm 2".to_owned())]);
        let error = signed.admit(0, &revoked).unwrap_err().to_string();
        assert!(error.contains("was revoked by aops-spm 2"), "{error}");
    }

    #[test]
    fn keys_with_the_same_id_are_distinguished() {
        use base64::Engine as _;
        use base64::prelude::BASE64_STANDARD;
        let (one, other) = (key(), key());
        let bytes = |keys: &Keys| BASE64_STANDARD.decode(first(keys).base64()).unwrap();
        let disguised = [&bytes(&one)[..10], &bytes(&other)[10..]].concat();
        let disguised = Keys::parse(&BASE64_STANDARD.encode(disguised)).unwrap();
        assert_eq!(first(&disguised).id(), first(&one).id());
        assert!(release(1, Some(first(&one))).admit(0, &disguised).is_err());
    }

    #[test]
    fn a_release_unpacked_by_an_older_version_stays_usable() {
        let text = format!(r#"{{"file":"a-1_linux_amd64.zip","sha256":"{}","epoch":3}}"#, "ab".repeat(32));
        let old: Completed = serde_json::from_str(&text).unwrap();
        assert_eq!(old, release(3, None));
        assert_eq!(old.admit(3, &Keys::default()), Ok(()));
        assert!(old.admit(4, &Keys::default()).is_err());
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
    }

    #[test]
    fn a_signer_is_written_as_minisign_writes_keys() {
        let key = key();
        let text = serde_json::to_string(&release(1, Some(first(&key)))).unwrap();
        assert!(text.contains(first(&key).base64()), "{text}");
        assert_eq!(serde_json::from_str::<Completed>(&text).unwrap().signer, Some(first(&key)));
    }
}
