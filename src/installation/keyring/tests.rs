//! The trusted keys after keys were brought, revoked, given at an installation or added by the operator.

use std::fs;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::*;

fn key() -> Keys {
    let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    Keys::parse(&pair.pk.to_box().unwrap().into_string()).unwrap()
}

fn all(keys: &[&Keys]) -> Keys {
    let mut all = Keys::default();
    keys.iter().for_each(|keys| all.extend((*keys).clone()).unwrap());
    all
}

fn offer(brought: &[&Keys], revoked: &[&Keys]) -> KeyOffer {
    KeyOffer { by: "aops-spm 2".to_owned(), brought: all(brought), revoked: all(revoked) }
}

fn none() -> Keys {
    Keys::default()
}

fn after(ring: &Keyring, offer: &KeyOffer, etc: &Keys, baked: &Keys) -> (Keyring, String) {
    let (ring, remarks) = ring.after(offer, etc, baked).unwrap();
    (ring, remarks.join("\n"))
}

#[track_caller]
fn trusts(ring: &Keyring, etc: &Keys, baked: &Keys, expected: &[&Keys]) {
    let trusted = ring.trusted(etc, baked).unwrap();
    assert_eq!(trusted.iter().count(), expected.len());
    assert!(expected.iter().all(|keys| keys.iter().all(|key| trusted.contains(key))));
}

#[test]
fn a_package_brings_keys_and_a_later_one_revokes_the_old() {
    let (old, new) = (key(), key());
    let (ring, carried) = Keyring::default().installed(&none(), &old, &none());
    trusts(&ring, &carried, &none(), &[&old]);
    let (ring, remarks) = after(&ring, &offer(&[&new], &[]), &carried, &none());
    assert!(remarks.contains("brings the key") && remarks.contains("trusted from now on"), "{remarks}");
    trusts(&ring, &carried, &none(), &[&old, &new]);
    // The same offer changes nothing.
    assert_eq!(after(&ring, &offer(&[&new], &[]), &carried, &none()), (ring.clone(), String::new()));
    let (ring, remarks) = after(&ring, &offer(&[&new], &[&old]), &carried, &none());
    assert!(remarks.contains("revokes the key"), "{remarks}");
    trusts(&ring, &carried, &none(), &[&new]);
}

#[test]
fn a_revoked_key_is_rejected_from_every_source() {
    let (old, new) = (key(), key());
    let (ring, _) = after(&Keyring::default(), &offer(&[&new], &[&old]), &none(), &old);
    trusts(&ring, &none(), &old, &[&new]);
    // From an older bootstrap.
    let (again, carried) = ring.installed(&none(), &all(&[&old, &new]), &none());
    assert_eq!(carried, new);
    trusts(&again, &carried, &old, &[&new]);
    // From an older package.
    let (again, remarks) = after(&again, &offer(&[&old], &[]), &carried, &old);
    assert!(remarks.contains("stays revoked"), "{remarks}");
    trusts(&again, &carried, &old, &[&new]);
    // Under a different id.
    let mut bytes = BASE64_STANDARD.decode(old.iter().next().unwrap().base64()).unwrap();
    bytes[5] ^= 1;
    let renamed = Keys::parse(&BASE64_STANDARD.encode(bytes)).unwrap();
    trusts(&ring, &none(), &renamed, &[&new]);
}

#[test]
fn an_operators_own_key_file_overrides_a_revocation_with_a_warning() {
    let (own, new) = (key(), key());
    let (ring, remarks) = after(&Keyring::default(), &offer(&[&new], &[&own]), &own, &none());
    trusts(&ring, &own, &none(), &[&own, &new]);
    assert!(remarks.contains("still trusted") && remarks.contains("remove its file"), "{remarks}");
    assert_eq!(ring.overruled(&own).len(), 1);
    trusts(&ring, &none(), &none(), &[&new]);
    assert!(ring.overruled(&none()).is_empty());
    // A key given after it was revoked is the operator's, even if a bootstrap brought it before; one that is given before is not.
    let (ring, carried) = Keyring::default().installed(&none(), &all(&[&own, &new]), &none());
    let (ring, _) = ring.installed(&own, &none(), &carried);
    let (ring, _) = after(&ring, &offer(&[], &[&own]), &carried, &none());
    trusts(&ring, &carried, &none(), &[&new]);
    let (ring, _) = ring.installed(&own, &none(), &carried);
    trusts(&ring, &carried, &none(), &[&own, &new]);
}

#[test]
fn a_package_that_revokes_every_trusted_key_is_rejected() {
    let old = key();
    let (ring, carried) = Keyring::default().installed(&none(), &old, &none());
    let error = ring.after(&offer(&[], &[&old]), &carried, &none()).unwrap_err().to_string();
    assert!(error.contains("revokes every key"), "{error}");
    // The operator's key remains.
    ring.after(&offer(&[], &[&old]), &all(&[&carried, &key()]), &none()).unwrap();
}

#[test]
fn a_lost_keyring_is_an_error_and_one_that_never_existed_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path().join("home"));
    for (path, mode) in home.directories() {
        fs::create_dir(&path).unwrap();
        crate::platform::set_mode(&path, mode).unwrap();
    }
    let (old, new) = (key(), key());
    old.save_to(&home.keys()).unwrap();
    let error = format!("{:#}", trusted(&home).unwrap_err());
    assert!(error.contains("epochs.json") && error.contains("missing"), "{error}");
    fs::write(home.epochs(), r#"{"epochs":{"aops-spm":2}}"#).unwrap();
    assert_eq!(trusted(&home).unwrap().iter().collect::<Vec<_>>(), old.iter().collect::<Vec<_>>());
    // Committing an epoch without a keyring does not change that.
    Epochs::commit(&home, "a", 1).unwrap();
    assert!(trusted(&home).is_ok());

    let remarks = install(&home, true, &none(), &none(), &offer(&[&new], &[&old])).unwrap().join("\n");
    assert!(remarks.contains("revokes the key") && !remarks.contains("still trusted"), "{remarks}");
    Epochs::commit(&home, "aops-spm", 2).unwrap();
    assert_eq!(trusted(&home).unwrap().iter().collect::<Vec<_>>(), new.iter().collect::<Vec<_>>());
    fs::remove_file(home.keyring()).unwrap();
    let error = format!("{:#}", trusted(&home).unwrap_err());
    assert!(error.contains("keys.json") && error.contains("missing") && error.contains("--fresh"), "{error}");
}

#[test]
fn a_revocation_by_a_failed_installation_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path().join("home"));
    for (path, mode) in home.directories() {
        fs::create_dir(&path).unwrap();
        crate::platform::set_mode(&path, mode).unwrap();
    }
    let (old, new, given) = (key(), key(), key());
    install(&home, false, &none(), &old, &KeyOffer::default()).unwrap();
    let before = Keyring::load(&home).unwrap();
    let file = Keys::files(&home.keys()).unwrap().remove(0);
    let text = fs::read(&file).unwrap();

    install(&home, true, &given, &none(), &offer(&[&new], &[&old])).unwrap();
    assert!(!file.exists());
    keep_after_failure(&home, &before).unwrap();
    fs::remove_dir_all(home.keys()).unwrap();
    fs::create_dir(home.keys()).unwrap();
    fs::write(&file, text).unwrap();
    let trusted = trusted(&home).unwrap();
    assert_eq!(trusted.iter().collect::<Vec<_>>(), new.iter().collect::<Vec<_>>());
    // The operator gave a brought key to an installation that failed.
    let before = Keyring::load(&home).unwrap();
    install(&home, true, &new, &none(), &KeyOffer::default()).unwrap();
    keep_after_failure(&home, &before).unwrap();
    fs::remove_dir_all(home.keys()).unwrap();
    assert!(super::trusted(&home).unwrap().contains(new.iter().next().unwrap()));
}

#[test]
fn revocations_are_limited() {
    let (own, new) = (key(), key());
    let mut ring = Keyring::default();
    for entry in 0..MAX_REVOKED {
        let mut bytes = BASE64_STANDARD.decode(new.iter().next().unwrap().base64()).unwrap();
        bytes[10..12].copy_from_slice(&(entry as u16).to_le_bytes());
        let key = Keys::parse(&BASE64_STANDARD.encode(bytes)).unwrap().iter().next().unwrap().clone();
        ring.revoked.push(KeyEntry { key, by: String::new(), unknown: UnknownJson::default() });
    }
    let error = ring.after(&offer(&[], &[&key()]), &own, &none()).unwrap_err().to_string();
    assert!(error.contains("more than 256"), "{error}");
}

#[test]
fn keys_of_a_killed_installation_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path().join("home"));
    for (path, mode) in home.directories() {
        fs::create_dir(&path).unwrap();
        crate::platform::set_mode(&path, mode).unwrap();
    }
    let (carried, mistaken, new) = (key(), key(), key());
    all(&[&carried, &mistaken]).save_to(&home.keys()).unwrap();
    install(&home, false, &none(), &carried, &KeyOffer::default()).unwrap();
    let trusts = |key: &Keys| trusted(&home).unwrap().contains(key.iter().next().unwrap());
    assert!(trusts(&carried) && !trusts(&mistaken));
    // The key of the bootstrap is not the operator's: a package can revoke it.
    commit(&home, &offer(&[&new], &[&carried])).unwrap();
    assert!(trusts(&new) && !trusts(&carried));
    // A key that an operator adds to an existing home is the operator's.
    mistaken.save_to(&home.keys()).unwrap();
    crate::installation::Epochs::create(&home, []).unwrap();
    install(&home, true, &none(), &none(), &KeyOffer::default()).unwrap();
    assert!(trusts(&mistaken));
}

#[test]
fn a_commit_removes_revoked_key_files_of_the_bootstrap_but_not_of_the_operator() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path().join("home"));
    for (path, mode) in home.directories() {
        fs::create_dir(&path).unwrap();
        crate::platform::set_mode(&path, mode).unwrap();
    }
    let (old, own, new) = (key(), key(), key());
    let (ring, carried) = Keyring::default().installed(&own, &old, &none());
    all(&[&own, &carried]).save_to(&home.keys()).unwrap();
    ring.save(&home).unwrap();
    assert_eq!(commit(&home, &KeyOffer::default()).unwrap(), Vec::<String>::new());
    assert_eq!(trusted(&home).unwrap().iter().count(), 2);

    let tree = directory.path().join("tree");
    let version = "2".parse().unwrap();
    let nothing = KeyOffer::read(&tree, &version).unwrap();
    assert!(nothing.brought.is_empty() && nothing.revoked.is_empty());
    new.save_to(&tree.join("keys")).unwrap();
    all(&[&old, &own]).save_to(&tree.join("keys/revoked")).unwrap();
    let offer = KeyOffer::read(&tree, &version).unwrap();
    for _ in 0..2 {
        commit(&home, &offer).unwrap();
        let keys = trusted(&home).unwrap();
        assert!(keys.contains(own.iter().next().unwrap()) && keys.contains(new.iter().next().unwrap()));
        assert!(!keys.contains(old.iter().next().unwrap()));
        assert_eq!(
            Keys::files(&home.keys()).unwrap().len(),
            1,
            "the bootstrap's file is removed, the operator's is kept"
        );
    }
    // An operator may add it again.
    old.save_to(&home.keys()).unwrap();
    assert!(trusted(&home).unwrap().contains(old.iter().next().unwrap()));
    assert_eq!(Keyring::load(&home).unwrap().overruled(&Keys::load(&home.keys()).unwrap()).len(), 2);

    old.save_to(&tree.join("keys")).unwrap();
    let error = format!("{:#}", KeyOffer::read(&tree, &version).unwrap_err());
    assert!(error.contains("both brings and revokes"), "{error}");
}
