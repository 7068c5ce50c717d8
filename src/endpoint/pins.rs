//! The pinned public keys of a host's gateways.
//!
//! `state/pins.json` holds the pins of first contacts, by origin. Only an existing file, even an empty one, allows a first contact; the
//! installer creates it. If a home has lost the file, the next server is not trusted: else an attacker would only have to wait for that.
//!
//! `state/gateway-keys.json` holds the keys of gateways that the settings pin (`pin`): the public key of the pinned certificate, and the
//! announced ones. They are valid only for exactly the pins that the settings have now.
//!
//! Both files are written only over connections that passed the previous pins. Older versions read only `certificate` in `pins.json`, so
//! it is always that of the last success.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Fingerprint;
use crate::core::protocol;
use crate::store;

/// More than the endpoints and package servers of any host; a gateway may name any number of them.
pub(super) const MAX_PINS: usize = 100;

/// The identity that a server presented in a successful handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServerIdentity {
    pub(super) certificate: Fingerprint,
    /// The public key; `None` if it cannot be parsed.
    pub(super) key: Option<Fingerprint>,
}

impl ServerIdentity {
    /// The fingerprint to pin.
    pub(super) fn pin(self) -> Fingerprint {
        self.key.unwrap_or(self.certificate)
    }
}

/// The public keys of one gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct GatewayPins {
    /// The key of the last success.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<Fingerprint>,
    /// The keys that the gateway has announced.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    announced: Vec<Fingerprint>,
}

impl GatewayPins {
    fn accepts(&self, identity: ServerIdentity) -> bool {
        identity.key.is_some_and(|key| self.key == Some(key) || self.announced.contains(&key))
    }

    /// The keys after a success. An empty announcement keeps the announced keys; another one replaces them.
    fn after(&self, identity: ServerIdentity, announced: &[Fingerprint]) -> GatewayPins {
        let Some(key) = identity.key else { return self.clone() };
        let announced = if announced.is_empty() { &self.announced } else { announced };
        let announced = announced.iter().copied().filter(|other| *other != key).take(protocol::MAX_PINS).collect();
        GatewayPins { key: Some(key), announced }
    }

    fn all(&self) -> impl Iterator<Item = Fingerprint> {
        self.key.into_iter().chain(self.announced.iter().copied())
    }
}

/// The file `state/pins.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Pins {
    #[serde(default)]
    pins: BTreeMap<String, FirstContactPin>,
    #[serde(flatten)]
    unknown: store::UnknownJson,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FirstContactPin {
    certificate: Fingerprint,
    /// RFC 3339.
    first_seen: String,
    #[serde(flatten)]
    learned: GatewayPins,
    #[serde(flatten)]
    unknown: store::UnknownJson,
}

/// The result of checking an identity against the pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PinMatch {
    Known,
    /// Nothing is pinned for this origin yet.
    First,
    Changed {
        known: Fingerprint,
    },
    /// Nothing is pinned for this origin yet, and the limit of pins is reached.
    Full,
}

impl Pins {
    /// `None`: the file does not exist.
    pub(super) fn load(path: &Path) -> Result<Option<Pins>> {
        store::load(path)
    }

    pub(super) fn check(&self, origin: &str, identity: ServerIdentity) -> PinMatch {
        match self.pins.get(origin) {
            Some(pinned) if pinned.certificate == identity.certificate || pinned.learned.accepts(identity) => {
                PinMatch::Known
            }
            Some(pinned) => PinMatch::Changed { known: pinned.learned.key.unwrap_or(pinned.certificate) },
            None if self.pins.len() >= MAX_PINS => PinMatch::Full,
            None => PinMatch::First,
        }
    }

    /// Pins the identity of a first contact.
    pub(super) fn add(&mut self, origin: &str, identity: ServerIdentity) {
        let (first_seen, learned) = (jiff::Timestamp::now().to_string(), GatewayPins::default().after(identity, &[]));
        let pinned =
            FirstContactPin { certificate: identity.certificate, first_seen, learned, unknown: Default::default() };
        self.pins.insert(origin.to_owned(), pinned);
    }

    /// Records a success and the announced keys; returns whether anything changed.
    fn learn(&mut self, origin: &str, identity: ServerIdentity, announced: &[Fingerprint]) -> bool {
        let Some(pinned) = self.pins.get_mut(origin) else { return false };
        let learned = pinned.learned.after(identity, announced);
        let after = FirstContactPin { certificate: identity.certificate, learned, ..pinned.clone() };
        std::mem::replace(pinned, after) != *pinned
    }

    /// The fingerprints accepted for an origin.
    fn accepted(&self, origin: &str) -> Vec<Fingerprint> {
        let pinned = self.pins.get(origin);
        pinned.into_iter().flat_map(|pinned| pinned.learned.all().chain([pinned.certificate])).collect()
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        store::save(path, self).context("cannot save the gateway's pin")
    }
}

/// The file `state/gateway-keys.json`.
#[derive(Debug, Serialize, Deserialize)]
struct GatewayKeys {
    #[serde(default)]
    version: u32,
    #[serde(default)]
    gateways: BTreeMap<String, SettingsPin>,
    #[serde(flatten)]
    unknown: store::UnknownJson,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct SettingsPin {
    /// The settings' pins, in order, under which the keys were recorded.
    of: Vec<Fingerprint>,
    #[serde(flatten)]
    learned: GatewayPins,
    #[serde(flatten)]
    unknown: store::UnknownJson,
}

impl GatewayKeys {
    fn load(path: &Path) -> Result<GatewayKeys> {
        Ok(store::load(path)?.unwrap_or_else(GatewayKeys::empty))
    }

    /// Like [`GatewayKeys::load`], but an unreadable file counts as empty: each success records the keys again.
    fn load_or_empty(path: &Path) -> GatewayKeys {
        GatewayKeys::load(path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "cannot read the gateway's announced keys; ignoring the file");
            GatewayKeys::empty()
        })
    }

    fn empty() -> GatewayKeys {
        GatewayKeys { version: 1, gateways: BTreeMap::new(), unknown: store::UnknownJson::new() }
    }

    fn of(&self, origin: &str, pins: &[Fingerprint]) -> GatewayPins {
        let known = self.gateways.get(origin).filter(|known| known.of == pins);
        known.map(|known| known.learned.clone()).unwrap_or_default()
    }
}

/// Whether an identity matches the settings' pins of a gateway, or a key recorded under them.
pub(super) fn is_pinned(path: &Path, origin: &str, pins: &[Fingerprint], identity: ServerIdentity) -> bool {
    let is_named = pins.contains(&identity.certificate) || identity.key.is_some_and(|key| pins.contains(&key));
    is_named || GatewayKeys::load_or_empty(path).of(origin, pins).accepts(identity)
}

/// Records a success with a gateway that the settings pin, and its announced keys.
pub(super) fn learn_pinned(
    path: &Path,
    origin: &str,
    pins: &[Fingerprint],
    identity: ServerIdentity,
    announced: &[Fingerprint],
) -> Result<()> {
    let mut known = GatewayKeys::load_or_empty(path);
    let learned = known.of(origin, pins).after(identity, announced);
    let before = known.gateways.get(origin).cloned().unwrap_or_default();
    let after = SettingsPin { of: pins.to_vec(), learned, unknown: before.unknown.clone() };
    if after == before || (!known.gateways.contains_key(origin) && known.gateways.len() >= MAX_PINS) {
        return Ok(());
    }
    known.gateways.insert(origin.to_owned(), after);
    store::save(path, &known).context("cannot save the gateway's announced keys")
}

/// The fingerprints accepted for a gateway that the settings pin.
pub(super) fn accepted_pinned(path: &Path, origin: &str, pins: &[Fingerprint]) -> Vec<Fingerprint> {
    let learned = GatewayKeys::load(path).map(|known| known.of(origin, pins)).unwrap_or_default();
    learned.all().chain(pins.iter().copied()).collect()
}

/// Records a success with a gateway pinned at its first contact, and its announced keys.
pub(super) fn learn_first_contact(
    path: &Path,
    origin: &str,
    identity: ServerIdentity,
    announced: &[Fingerprint],
) -> Result<()> {
    let Some(mut pins) = Pins::load(path)? else { return Ok(()) };
    if pins.learn(origin, identity, announced) { pins.save(path) } else { Ok(()) }
}

/// The fingerprints accepted for a gateway pinned at its first contact.
pub(super) fn accepted_first_contact(path: &Path, origin: &str) -> Vec<Fingerprint> {
    let pins = Pins::load(path).ok().flatten();
    pins.map(|pins| pins.accepted(origin)).unwrap_or_default()
}

/// Creates the file at `path` without pins, which allows first contacts.
pub fn expect_first_contact(path: &Path) -> Result<()> {
    Pins::default().save(path)
}

/// Adds the pins in the file `from` to those in `to`; existing pins are kept.
pub fn add_pins(from: &Path, to: &Path) -> Result<()> {
    let Some(new) = Pins::load(from)? else { return Ok(()) };
    let existing = Pins::load(to)?;
    let exists = existing.is_some();
    let mut pins = existing.unwrap_or_default();
    let before = pins.pins.len();
    for (origin, pinned) in new.pins {
        pins.pins.entry(origin).or_insert(pinned);
    }
    if exists && pins.pins.len() == before { Ok(()) } else { pins.save(to) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(n: u8) -> Fingerprint {
        Fingerprint::of(&[n])
    }

    fn certificate(n: u8) -> ServerIdentity {
        ServerIdentity { certificate: fingerprint(n), key: Some(fingerprint(100 + n)) }
    }

    /// A different certificate with the key of number `n`.
    fn renewed(n: u8) -> ServerIdentity {
        ServerIdentity { certificate: fingerprint(200 + n), ..certificate(n) }
    }

    #[test]
    fn pins_are_limited() {
        let mut pins = Pins::default();
        for n in 0..MAX_PINS {
            assert_eq!(pins.check(&format!("https://{n}:1"), certificate(1)), PinMatch::First);
            pins.add(&format!("https://{n}:1"), certificate(1));
        }
        assert_eq!(pins.check("https://another:1", certificate(1)), PinMatch::Full);
        // Known pins are not affected.
        assert_eq!(pins.check("https://1:1", certificate(1)), PinMatch::Known);
        assert_eq!(pins.check("https://1:1", certificate(2)), PinMatch::Changed { known: fingerprint(101) });
    }

    #[test]
    fn added_pins_do_not_replace_existing_ones() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        let mut new = Pins::default();
        new.add("https://a:1", certificate(1));
        new.add("https://b:1", certificate(1));
        new.save(&from).unwrap();
        expect_first_contact(&to).unwrap();
        let mut existing = Pins::load(&to).unwrap().unwrap();
        existing.add("https://b:1", certificate(2));
        existing.add("https://c:1", certificate(2));
        existing.save(&to).unwrap();
        add_pins(&from, &to).unwrap();
        let pins = Pins::load(&to).unwrap().unwrap();
        let known = |origin: &str, n: u8| pins.check(origin, certificate(n)) == PinMatch::Known;
        assert!(known("https://a:1", 1) && known("https://b:1", 2) && known("https://c:1", 2));
        // As an operator writes it after the file was lost.
        std::fs::write(&to, "{}").unwrap();
        assert_eq!(Pins::load(&to).unwrap().unwrap().check("https://a:1", certificate(1)), PinMatch::First);
    }

    #[test]
    fn a_pin_gains_the_key_and_accepts_announced_keys_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pins");
        // As written by an older version.
        let old = format!(
            r#"{{"pins": {{"https://a:1": {{"certificate": "{}", "firstSeen": "x", "y": 1}}}}}}"#,
            fingerprint(1)
        );
        std::fs::write(&path, old).unwrap();
        let check = |identity| Pins::load(&path).unwrap().unwrap().check("https://a:1", identity);
        let learn = |identity, announced: &[u8]| {
            let announced: Vec<Fingerprint> = announced.iter().map(|n| fingerprint(100 + n)).collect();
            learn_first_contact(&path, "https://a:1", identity, &announced).unwrap();
        };
        assert_eq!(check(renewed(1)), PinMatch::Changed { known: fingerprint(1) });
        learn(certificate(1), &[1, 2]);
        assert_eq!((check(renewed(1)), check(certificate(2))), (PinMatch::Known, PinMatch::Known));
        assert_eq!(check(certificate(3)), PinMatch::Changed { known: fingerprint(101) });
        // An empty announcement removes nothing; the certificate is that of the last success, for older versions.
        learn(renewed(1), &[]);
        assert_eq!(
            (check(certificate(2)), check(certificate(3))),
            (PinMatch::Known, PinMatch::Changed { known: fingerprint(101) })
        );
        learn(certificate(2), &[2, 3]);
        assert_eq!(
            (check(certificate(3)), check(certificate(1))),
            (PinMatch::Known, PinMatch::Changed { known: fingerprint(102) })
        );
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"y\": 1") || text.contains("\"y\":1"), "{text}");
        assert_eq!(accepted_first_contact(&path, "https://a:1"), [fingerprint(102), fingerprint(103), fingerprint(2)]);
        // Nothing is recorded for an origin without a pin.
        learn_first_contact(&path, "https://b:1", certificate(9), &[]).unwrap();
        assert_eq!(Pins::load(&path).unwrap().unwrap().check("https://b:1", certificate(9)), PinMatch::First);
    }

    #[test]
    fn learned_keys_are_valid_only_for_the_pins_in_the_settings() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let (origin, pins, others) = ("https://a:1", [fingerprint(1)], [fingerprint(7)]);
        assert!(is_pinned(&path, origin, &pins, certificate(1)) && !is_pinned(&path, origin, &pins, renewed(1)));
        learn_pinned(&path, origin, &pins, certificate(1), &[fingerprint(101), fingerprint(102)]).unwrap();
        assert!(is_pinned(&path, origin, &pins, renewed(1)) && is_pinned(&path, origin, &pins, certificate(2)));
        assert!(!is_pinned(&path, origin, &pins, certificate(3)));
        assert!(!is_pinned(&path, "https://b:1", &pins, certificate(2)));
        assert!(!is_pinned(&path, origin, &others, renewed(1)), "the pins in the settings changed");
        assert_eq!(accepted_pinned(&path, origin, &pins), [fingerprint(101), fingerprint(102), fingerprint(1)]);
        std::fs::write(&path, "{").unwrap();
        assert!(!is_pinned(&path, origin, &pins, renewed(1)) && is_pinned(&path, origin, &pins, certificate(1)));
        learn_pinned(&path, origin, &pins, certificate(1), &[]).unwrap();
        assert!(is_pinned(&path, origin, &pins, renewed(1)));
    }
}
