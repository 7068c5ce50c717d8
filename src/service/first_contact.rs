//! The first contact with a gateway for whose certificate nobody vouched: when an installation may take whoever answers, and what is kept of it.
//!
//! A home makes it once. One that made it, and has not kept what it saw, has lost a file, and is told so: it does not begin anew by itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::CertificateCheck;
use crate::endpoint::expect_first_contact;
use crate::home::Home;
use crate::installation::Epochs;

/// How an installation stands to the first contact that it trusts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstContact {
    /// It was made; what was seen is in the home.
    Made,
    /// It is to come.
    ToCome,
}

/// `None` where certificates are checked in any other way. `keeps`: of the home that stands, all is kept.
pub(super) fn of(home: &Home, keeps: bool, certificate: &CertificateCheck) -> Result<Option<FirstContact>> {
    if *certificate != CertificateCheck::FirstContact {
        return Ok(None);
    }
    if !keeps {
        return Ok(Some(FirstContact::ToCome));
    }
    let pins = home.pins();
    if pins.is_file() {
        return Ok(Some(FirstContact::Made));
    }
    // A home that has heard from its gateway has seen a certificate; and since pins are expected, every installation has left some.
    if home.desired().exists() || Epochs::load(home)?.expects_pins() {
        bail!(
            "cannot tell the gateway's certificate from that of somebody in between: {} is missing, which says what it was at the first \
             contact; bring it back from a backup, or compare the certificate with the gateway's operator and give it with `--pin SHA256`, \
             or, to accept whoever answers next, write {{}} into that file",
            pins.display()
        );
    }
    Ok(Some(FirstContact::ToCome))
}

/// The pins that this installation goes by and adds to, in its own directory; `None` where it needs none.
pub(super) fn begin(contact: Option<FirstContact>, home: &Home, work: &Path) -> Result<Option<PathBuf>> {
    let path = work.join("pins.json");
    match contact {
        None => return Ok(None),
        Some(FirstContact::ToCome) => expect_first_contact(&path)?,
        Some(FirstContact::Made) => {
            let standing = home.pins();
            fs::copy(&standing, &path).with_context(|| format!("cannot copy {}", standing.display()))?;
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
    fn a_first_contact_is_made_once() {
        let first = CertificateCheck::FirstContact;
        // Of an older version, which an offline installation left without any pins.
        let (_directory, older) = home(r#"{"epochs":{}}"#);
        assert_eq!(of(&older, true, &first).unwrap(), Some(FirstContact::ToCome));
        fs::write(older.desired(), "{}").unwrap();
        let error = of(&older, true, &first).unwrap_err().to_string();
        for words in ["pins.json is missing", "backup", "--pin SHA256", "write {} into that file"] {
            assert!(error.contains(words), "{error}");
        }
        // One that is made anew, or checks certificates in another way, need not have any.
        assert_eq!(of(&older, false, &first).unwrap(), Some(FirstContact::ToCome));
        assert_eq!(of(&older, true, &CertificateCheck::System).unwrap(), None);
        let (_directory, newer) = home(r#"{"epochs":{},"form":1}"#);
        assert!(of(&newer, true, &first).is_err());
        fs::write(newer.pins(), "{}").unwrap();
        assert_eq!(of(&newer, true, &first).unwrap(), Some(FirstContact::Made));
    }
}
