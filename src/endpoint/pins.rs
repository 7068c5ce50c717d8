//! What a host has pinned of its gateways: by which public keys their certificates are accepted.
//!
//! `state/pins.json` holds what was seen at first contacts, by origin. That a certificate may be taken as it comes is said by this file being
//! there, if only an empty one: the installer makes it. A home without it has lost it, and does not trust whoever answers next; that would be
//! all that somebody in between has to wait for.
//!
//! `state/gateway-keys.json` holds what was learned of gateways that the settings pin (`pin`): the public key of the pinned certificate, and
//! those that the gateway has announced. It counts for the very pins that the settings have now, and for no others.
//!
//! Both are written over connections that passed what was pinned before. An older version reads `certificate` in `pins.json` alone, which
//! is therefore kept true: that of the last success.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Fingerprint;
use crate::core::protocol;
use crate::store;

/// More endpoints and hosts of packages than anybody has: a gateway may name any number of them.
pub(super) const MAX_PINS: usize = 100;

/// What a server has shown in a handshake that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServerIdentity {
    pub(super) certificate: Fingerprint,
    /// The public key; `None` where it cannot be read.
    pub(super) key: Option<Fingerprint>,
}

impl ServerIdentity {
    /// By which it is to be pinned.
    pub(super) fn pin(self) -> Fingerprint {
        self.key.unwrap_or(self.certificate)
    }
}

/// The public keys of one gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct GatewayPins {
    /// That of the last success.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<Fingerprint>,
    /// Those that it has announced.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    announced: Vec<Fingerprint>,
}

impl GatewayPins {
    fn accepts(&self, shown: ServerIdentity) -> bool {
        shown.key.is_some_and(|key| self.key == Some(key) || self.announced.contains(&key))
    }

    /// What is known after a success. Without an announcement those of before stay; with one, the others are not to come any more.
    fn after(&self, shown: ServerIdentity, announced: &[Fingerprint]) -> GatewayPins {
        let Some(key) = shown.key else { return self.clone() };
        let announced = if announced.is_empty() { &self.announced } else { announced };
        let announced = announced.iter().copied().filter(|other| *other != key).take(protocol::MAX_PINS).collect();
        GatewayPins { key: Some(key), announced }
    }

    fn all(&self) -> impl Iterator<Item = Fingerprint> {
        self.key.into_iter().chain(self.announced.iter().copied())
    }
}

/// `state/pins.json`.
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

/// What the pins say about a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PinMatch {
    Known,
    /// None was seen of this origin yet.
    First,
    Changed {
        known: Fingerprint,
    },
    /// None was seen of this origin yet, and there are too many others.
    Full,
}

impl Pins {
    /// `None`: the file is lost.
    pub(super) fn load(path: &Path) -> Result<Option<Pins>> {
        store::load(path)
    }

    pub(super) fn say(&self, origin: &str, shown: ServerIdentity) -> PinMatch {
        match self.pins.get(origin) {
            Some(pinned) if pinned.certificate == shown.certificate || pinned.learned.accepts(shown) => PinMatch::Known,
            Some(pinned) => PinMatch::Changed { known: pinned.learned.key.unwrap_or(pinned.certificate) },
            None if self.pins.len() >= MAX_PINS => PinMatch::Full,
            None => PinMatch::First,
        }
    }

    /// Notes the certificate of a first contact.
    pub(super) fn add(&mut self, origin: &str, shown: ServerIdentity) {
        let (first_seen, learned) = (jiff::Timestamp::now().to_string(), GatewayPins::default().after(shown, &[]));
        let pinned =
            FirstContactPin { certificate: shown.certificate, first_seen, learned, unknown: Default::default() };
        self.pins.insert(origin.to_owned(), pinned);
    }

    /// Notes a success, and what the gateway has announced over it; answers whether that is news.
    fn learn(&mut self, origin: &str, shown: ServerIdentity, announced: &[Fingerprint]) -> bool {
        let Some(pinned) = self.pins.get_mut(origin) else { return false };
        let learned = pinned.learned.after(shown, announced);
        let after = FirstContactPin { certificate: shown.certificate, learned, ..pinned.clone() };
        std::mem::replace(pinned, after) != *pinned
    }

    /// What is accepted of an origin.
    fn accepted(&self, origin: &str) -> Vec<Fingerprint> {
        let pinned = self.pins.get(origin);
        pinned.into_iter().flat_map(|pinned| pinned.learned.all().chain([pinned.certificate])).collect()
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        store::save(path, self).context("cannot remember the gateway's certificate")
    }
}

/// `state/gateway-keys.json`.
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
    /// The pins of the settings, in their order, under which it was learned.
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

    /// As [`GatewayKeys::load`]; a damaged file is begun anew: each success says it all again.
    fn load_or_empty(path: &Path) -> GatewayKeys {
        GatewayKeys::load(path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the keys that the gateway has announced cannot be read");
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

/// Whether a gateway that the settings pin has shown one of these pins, or a key that was learned under them.
pub(super) fn is_pinned(path: &Path, origin: &str, pins: &[Fingerprint], shown: ServerIdentity) -> bool {
    let is_named = pins.contains(&shown.certificate) || shown.key.is_some_and(|key| pins.contains(&key));
    is_named || GatewayKeys::load_or_empty(path).of(origin, pins).accepts(shown)
}

/// Notes a success with a gateway that the settings pin, and what it has announced over it.
pub(super) fn learn_pinned(
    path: &Path,
    origin: &str,
    pins: &[Fingerprint],
    shown: ServerIdentity,
    announced: &[Fingerprint],
) -> Result<()> {
    let mut known = GatewayKeys::load_or_empty(path);
    let learned = known.of(origin, pins).after(shown, announced);
    let before = known.gateways.get(origin).cloned().unwrap_or_default();
    let after = SettingsPin { of: pins.to_vec(), learned, unknown: before.unknown.clone() };
    if after == before || (!known.gateways.contains_key(origin) && known.gateways.len() >= MAX_PINS) {
        return Ok(());
    }
    known.gateways.insert(origin.to_owned(), after);
    store::save(path, &known).context("cannot remember the keys that the gateway has announced")
}

/// What is accepted of a gateway that the settings pin.
pub(super) fn accepted_pinned(path: &Path, origin: &str, pins: &[Fingerprint]) -> Vec<Fingerprint> {
    let learned = GatewayKeys::load(path).map(|known| known.of(origin, pins)).unwrap_or_default();
    learned.all().chain(pins.iter().copied()).collect()
}

/// Notes a success with a gateway that is pinned since its first contact, and what it has announced over it.
pub(super) fn learn_first_contact(
    path: &Path,
    origin: &str,
    shown: ServerIdentity,
    announced: &[Fingerprint],
) -> Result<()> {
    let Some(mut pins) = Pins::load(path)? else { return Ok(()) };
    if pins.learn(origin, shown, announced) { pins.save(path) } else { Ok(()) }
}

/// What is accepted of a gateway that is pinned since its first contact.
pub(super) fn accepted_first_contact(path: &Path, origin: &str) -> Vec<Fingerprint> {
    let pins = Pins::load(path).ok().flatten();
    pins.map(|pins| pins.accepted(origin)).unwrap_or_default()
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

    fn print(n: u8) -> Fingerprint {
        Fingerprint::of(&[n])
    }

    fn certificate(n: u8) -> ServerIdentity {
        ServerIdentity { certificate: print(n), key: Some(print(100 + n)) }
    }

    /// Another certificate for the key of number `n`.
    fn renewed(n: u8) -> ServerIdentity {
        ServerIdentity { certificate: print(200 + n), ..certificate(n) }
    }

    #[test]
    fn pins_are_limited() {
        let mut pins = Pins::default();
        for n in 0..MAX_PINS {
            assert_eq!(pins.say(&format!("https://{n}:1"), certificate(1)), PinMatch::First);
            pins.add(&format!("https://{n}:1"), certificate(1));
        }
        assert_eq!(pins.say("https://another:1", certificate(1)), PinMatch::Full);
        // Those that are known go on as they were.
        assert_eq!(pins.say("https://1:1", certificate(1)), PinMatch::Known);
        assert_eq!(pins.say("https://1:1", certificate(2)), PinMatch::Changed { known: print(101) });
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
        let known = |origin: &str, n: u8| pins.say(origin, certificate(n)) == PinMatch::Known;
        assert!(known("https://a:1", 1) && known("https://b:1", 2) && known("https://c:1", 2));
        // What an operator writes where the file is lost.
        std::fs::write(&to, "{}").unwrap();
        assert_eq!(Pins::load(&to).unwrap().unwrap().say("https://a:1", certificate(1)), PinMatch::First);
    }

    #[test]
    fn a_pin_gains_the_key_and_follows_what_is_announced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pins");
        // As an older version wrote it.
        let old =
            format!(r#"{{"pins": {{"https://a:1": {{"certificate": "{}", "firstSeen": "x", "y": 1}}}}}}"#, print(1));
        std::fs::write(&path, old).unwrap();
        let say = |shown| Pins::load(&path).unwrap().unwrap().say("https://a:1", shown);
        let learn = |shown, announced: &[u8]| {
            let announced: Vec<Fingerprint> = announced.iter().map(|n| print(100 + n)).collect();
            learn_first_contact(&path, "https://a:1", shown, &announced).unwrap();
        };
        assert_eq!(say(renewed(1)), PinMatch::Changed { known: print(1) });
        learn(certificate(1), &[1, 2]);
        assert_eq!((say(renewed(1)), say(certificate(2))), (PinMatch::Known, PinMatch::Known));
        assert_eq!(say(certificate(3)), PinMatch::Changed { known: print(101) });
        // An answer that announces nothing takes nothing back; the certificate is that of the last success, for older versions.
        learn(renewed(1), &[]);
        assert_eq!(
            (say(certificate(2)), say(certificate(3))),
            (PinMatch::Known, PinMatch::Changed { known: print(101) })
        );
        learn(certificate(2), &[2, 3]);
        assert_eq!(
            (say(certificate(3)), say(certificate(1))),
            (PinMatch::Known, PinMatch::Changed { known: print(102) })
        );
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"y\": 1") || text.contains("\"y\":1"), "{text}");
        assert_eq!(accepted_first_contact(&path, "https://a:1"), [print(102), print(103), print(2)]);
        // Who was never seen there learns nothing.
        learn_first_contact(&path, "https://b:1", certificate(9), &[]).unwrap();
        assert_eq!(Pins::load(&path).unwrap().unwrap().say("https://b:1", certificate(9)), PinMatch::First);
    }

    #[test]
    fn what_is_learned_of_a_pinned_gateway_counts_for_these_pins_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let (origin, pins, others) = ("https://a:1", [print(1)], [print(7)]);
        assert!(is_pinned(&path, origin, &pins, certificate(1)) && !is_pinned(&path, origin, &pins, renewed(1)));
        learn_pinned(&path, origin, &pins, certificate(1), &[print(101), print(102)]).unwrap();
        assert!(is_pinned(&path, origin, &pins, renewed(1)) && is_pinned(&path, origin, &pins, certificate(2)));
        assert!(!is_pinned(&path, origin, &pins, certificate(3)));
        assert!(!is_pinned(&path, "https://b:1", &pins, certificate(2)));
        assert!(!is_pinned(&path, origin, &others, renewed(1)), "the operator has changed his mind");
        assert_eq!(accepted_pinned(&path, origin, &pins), [print(101), print(102), print(1)]);
        std::fs::write(&path, "{").unwrap();
        assert!(!is_pinned(&path, origin, &pins, renewed(1)) && is_pinned(&path, origin, &pins, certificate(1)));
        learn_pinned(&path, origin, &pins, certificate(1), &[]).unwrap();
        assert!(is_pinned(&path, origin, &pins, renewed(1)));
    }
}
