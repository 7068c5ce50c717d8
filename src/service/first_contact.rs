//! Trust on first contact: when an installation may accept an unverified certificate of the gateway, and the pin that it keeps of it.
//!
//! A home does this once. If its pins are missing later, a file was lost, which is an error: the next certificate is not accepted
//! automatically.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::CertificateCheck;
use crate::endpoint::expect_first_contact;
use crate::home::Home;
use crate::installation::Epochs;

/// Whether the first contact has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstContact {
    /// Yes; its pins are in the home.
    Made,
    /// Not yet.
    Pending,
}

/// `None` if certificates are verified in any other way. `keeps`: whether the state of an existing installation is kept.
pub(super) fn of(home: &Home, keeps: bool, certificate: &CertificateCheck) -> Result<Option<FirstContact>> {
    if *certificate != CertificateCheck::FirstContact {
        return Ok(None);
    }
    if !keeps {
        return Ok(Some(FirstContact::Pending));
    }
    let pins = home.pins();
    if pins.is_file() {
        return Ok(Some(FirstContact::Made));
    }
    // A home with a desired state has been in contact with its gateway. Newer versions create the file with every installation.
    if home.desired().exists() || Epochs::load(home)?.expects_pins() {
        bail!(
            "cannot verify the gateway's certificate: {} is missing, which holds the pin of the first contact; restore the file \
             from a backup, or get the certificate's fingerprint from the gateway's operator and give it with `--pin SHA256`, or, to accept \
             the next certificate unverified, write {{}} into that file",
            pins.display()
        );
    }
    Ok(Some(FirstContact::Pending))
}

/// The file of pins that this installation verifies by and adds to, in its work directory; `None`: it needs none.
pub(super) fn begin(contact: Option<FirstContact>, home: &Home, work: &Path) -> Result<Option<PathBuf>> {
    let path = work.join("pins.json");
    match contact {
        None => return Ok(None),
        Some(FirstContact::Pending) => expect_first_contact(&path)?,
        Some(FirstContact::Made) => {
            let pins = home.pins();
            fs::copy(&pins, &path).with_context(|| format!("cannot copy {}", pins.display()))?;
        }
    }
    Ok(Some(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(epochs: &str) -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::create_dir(home.state()).unwrap();
        fs::write(home.epochs(), epochs).unwrap();
        (directory, home)
    }

    #[test]
    fn a_first_contact_is_trusted_once() {
        let first = CertificateCheck::FirstContact;
        // An offline installation of an older version, which creates no pins.
        let (_directory, older) = home(r#"{"epochs":{}}"#);
        assert_eq!(of(&older, true, &first).unwrap(), Some(FirstContact::Pending));
        fs::write(older.desired(), "{}").unwrap();
        let error = of(&older, true, &first).unwrap_err().to_string();
        for words in ["pins.json is missing", "backup", "--pin SHA256", "write {} into that file"] {
            assert!(error.contains(words), "{error}");
        }
        // A new installation, or one that verifies certificates in a different way, needs no pins.
        assert_eq!(of(&older, false, &first).unwrap(), Some(FirstContact::Pending));
        assert_eq!(of(&older, true, &CertificateCheck::System).unwrap(), None);
        let (_directory, newer) = home(r#"{"epochs":{},"form":1}"#);
        assert!(of(&newer, true, &first).is_err());
        fs::write(newer.pins(), "{}").unwrap();
        assert_eq!(of(&newer, true, &first).unwrap(), Some(FirstContact::Made));
    }
}
