//! `state/pins.json`: the certificates of first contacts, by origin.
//!
//! That a certificate may be taken as it comes is said by this file being there, if only an empty one: the installer makes it. A home
//! without it has lost it, and does not trust whoever answers next; that would be all that somebody in between has to wait for.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Fingerprint;
use crate::store;

/// More endpoints and hosts of packages than anybody has: a gateway may name any number of them.
pub(super) const MAX_PINS: usize = 100;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Pins {
    #[serde(default)]
    pins: BTreeMap<String, Pinned>,
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pinned {
    certificate: Fingerprint,
    /// RFC 3339.
    first_seen: String,
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// What the pins say about a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Known,
    /// None was seen of this origin yet.
    First,
    Changed {
        first: Fingerprint,
    },
    /// None was seen of this origin yet, and there are too many others.
    Full,
}

impl Pins {
    /// `None`: the file is lost.
    pub(super) fn load(path: &Path) -> Result<Option<Pins>> {
        store::load(path)
    }

    pub(super) fn say(&self, origin: &str, seen: Fingerprint) -> Said {
        match self.pins.get(origin).map(|pinned| pinned.certificate) {
            Some(first) if first == seen => Said::Known,
            Some(first) => Said::Changed { first },
            None if self.pins.len() >= MAX_PINS => Said::Full,
            None => Said::First,
        }
    }

    /// Notes the certificate of a first contact.
    pub(super) fn add(&mut self, origin: &str, seen: Fingerprint) {
        let first_seen = jiff::Timestamp::now().to_string();
        self.pins.insert(origin.to_owned(), Pinned { certificate: seen, first_seen, unknown: Default::default() });
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        store::save(path, self).context("cannot remember the gateway's certificate")
    }
}

/// Makes the file at `path`, without any pins: the next contact is a first one.
pub fn expect_first_contact(path: &Path) -> Result<()> {
    Pins::default().save(path)
}

/// Adds the pins of the file at `from` to those at `to`; what these say stays.
pub fn add_pins(from: &Path, to: &Path) -> Result<()> {
    let Some(new) = Pins::load(from)? else { return Ok(()) };
    let standing = Pins::load(to)?;
    let is_there = standing.is_some();
    let mut pins = standing.unwrap_or_default();
    let before = pins.pins.len();
    for (origin, pinned) in new.pins {
        pins.pins.entry(origin).or_insert(pinned);
    }
    if is_there && pins.pins.len() == before { Ok(()) } else { pins.save(to) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(n: u8) -> Fingerprint {
        Fingerprint::of(&[n])
    }

    #[test]
    fn pins_are_limited() {
        let mut pins = Pins::default();
        for n in 0..MAX_PINS {
            assert_eq!(pins.say(&format!("https://{n}:1"), certificate(1)), Said::First);
            pins.add(&format!("https://{n}:1"), certificate(1));
        }
        assert_eq!(pins.say("https://another:1", certificate(1)), Said::Full);
        // Those that are known go on as they were.
        assert_eq!(pins.say("https://1:1", certificate(1)), Said::Known);
        assert_eq!(pins.say("https://1:1", certificate(2)), Said::Changed { first: certificate(1) });
    }

    #[test]
    fn pins_are_added_to_others_and_change_none() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        let mut new = Pins::default();
        new.add("https://a:1", certificate(1));
        new.add("https://b:1", certificate(1));
        new.save(&from).unwrap();
        expect_first_contact(&to).unwrap();
        let mut standing = Pins::load(&to).unwrap().unwrap();
        standing.add("https://b:1", certificate(2));
        standing.add("https://c:1", certificate(2));
        standing.save(&to).unwrap();
        add_pins(&from, &to).unwrap();
        let pins = Pins::load(&to).unwrap().unwrap();
        let known = |origin: &str, n: u8| pins.say(origin, certificate(n)) == Said::Known;
        assert!(known("https://a:1", 1) && known("https://b:1", 2) && known("https://c:1", 2));
        // What an operator writes where the file is lost.
        std::fs::write(&to, "{}").unwrap();
        assert_eq!(Pins::load(&to).unwrap().unwrap().say("https://a:1", certificate(1)), Said::First);
    }
}
