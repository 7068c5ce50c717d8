//! Attacks by downloads: packages, signatures, archives, and the servers that offer them.

use std::fs;
use std::process::Command;

use serde_json::json;

use super::{Scene, arch, comment, file, signed, stranger, wait_for_victim};
use crate::support::command::{self, LIMIT};
use crate::support::gateway::Gateway;
use crate::support::host::SOON;
use crate::support::hostile::{Body, Hostile, HostileReply};
use crate::support::package::Package;
use crate::support::wait::wait_for;

#[test]
fn a_package_not_signed_by_a_trusted_key_is_rejected() {
    let scene = Scene::new();
    let (package, _) = scene.victim();
    scene.hostile.serve(&file(), &package, &signed(&stranger(), &package, &comment(1)));
    scene.order_victim(json!({}));
    scene.assert_refused("stage", &["signed by the key", "not trusted here", "etc/keys"]);

    // Nor one without a signature, or with an invalid one.
    for (signature, words) in [("", "not a minisign signature"), ("trust me", "not a minisign signature")] {
        scene.hostile.serve(&file(), &package, signature);
        scene.order_victim(json!({}));
        scene.assert_refused("stage", &[words]);
    }
    scene.hostile.serve(&file(), &package, &scene.sign(&package, &comment(1)));
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    scene.assert_native_runs();
}

#[test]
fn a_signature_for_another_name_version_os_or_arch_is_rejected() {
    let scene = Scene::new();
    let (package, _) = scene.victim();
    let good = comment(1);
    let other_arch = if arch() == "386" { "amd64" } else { "386" };
    for (from, to, shown) in [
        ("name=victim", "name=other", "signed as other 1.0.0".to_owned()),
        ("version=1.0.0", "version=0.9.0", "signed as victim 0.9.0".to_owned()),
        ("os=linux", "os=windows", format!("victim 1.0.0 for windows/{}", arch())),
        (&format!("arch={}", arch()), &format!("arch={other_arch}"), format!("for linux/{other_arch}")),
    ] {
        let wrong = good.replace(from, to);
        assert_ne!(wrong, good);
        scene.hostile.serve(&file(), &package, &scene.sign(&package, &wrong));
        scene.order_victim(json!({}));
        scene.assert_refused("stage", &[&shown, "was requested"]);
    }
    // The file of another release, under the name of this one.
    let real = format!("native-1.0.0_linux_{}.tar.zst", arch());
    let depot = scene.gateway.path("depot");
    let signature = fs::read_to_string(depot.join(format!("{real}.minisig"))).expect("it was published");
    scene.hostile.serve(&file(), &fs::read(depot.join(&real)).expect("it was published"), &signature);
    scene.order_victim(json!({}));
    scene.assert_refused("stage", &["signed as native 1.0.0", "victim 1.0.0"]);
    scene.order_victim(json!({ "file": real }));
    scene.assert_refused("stage", &["cannot use the file", &real]);
}

#[test]
fn a_replay_of_an_older_epoch_is_rejected() {
    let mut scene = Scene::new();
    let (package, _) = scene.victim();
    scene.hostile.serve(&file(), &package, &scene.sign(&package, &comment(5)));
    scene.order_victim(json!({}));
    let victim = wait_for_victim(&scene);
    scene.before = scene.files();
    let old = file().replace("1.0.0", "0.9.0");
    let older = comment(4).replace("1.0.0", "0.9.0");
    scene.hostile.serve(&old, &package, &scene.sign(&package, &older));
    scene.order_victim(json!({"version": "0.9.0"}));
    scene.assert_refused("stage", &["has epoch 4", "lower than the 5"]);
    assert_eq!(wait_for_victim(&scene), victim);
}

#[test]
fn a_stored_release_of_an_older_epoch_is_not_activated() {
    let mut scene = Scene::new();
    let (package, _) = scene.victim();
    scene.gateway.publish(&Package::sleeper("victim", "2.0.0"));
    let newer = file().replace("1.0.0", "2.0.0");
    let bytes = fs::read(scene.gateway.path("depot").join(&newer)).expect("it was published");
    scene.hostile.serve(&newer, &bytes, &scene.sign(&bytes, &comment(5).replace("1.0.0", "2.0.0")));
    scene.order_victim(json!({}));
    let first = wait_for_victim(&scene);
    scene.order_victim(json!({"version": "2.0.0"}));
    let victim = scene.host.wait_for_new_pid("victim", first);
    // Kept as the backup for a rollback.
    let kept = scene.host.home().join("agents/victim/1.0.0");
    assert!(kept.join(".complete").exists());

    scene.order_victim(json!({}));
    scene.assert_reported("activate", "refused", &["victim-1.0.0", "has epoch 1", "lower than the 5", "--epoch 5"]);
    wait_for("it to be gone", SOON, || (!kept.exists()).then_some(()));
    // Nor is it downloaded again; the running release was not even stopped.
    scene.assert_reported("stage", "refused", &["has epoch 1", "lower than the 5"]);
    assert_eq!(wait_for_victim(&scene), victim);
    scene.before = scene.files();
    scene.assert_unharmed();
    // Published again, it is accepted.
    scene.hostile.serve(&file(), &package, &scene.sign(&package, &comment(5)));
    scene.order_victim(json!({}));
    scene.host.wait_for_new_pid("victim", victim);
    assert_eq!(crate::support::host::agent(&scene.host.status(), "victim").expect("it exists")["version"], "1.0.0");
    scene.assert_native_runs();
}

#[test]
fn swapped_signatures_and_comments_are_rejected() {
    let scene = Scene::new();
    let (package, good) = scene.victim();
    // Another comment over the same signature; the comment signature of another file; one changed byte of the package.
    let relabelled = good.replace("epoch=1", "epoch=9");
    let other: Vec<&str> = good.lines().take(2).collect();
    let foreign = scene.sign(b"another", &comment(9));
    let swapped = [&other[..], &foreign.lines().skip(2).collect::<Vec<_>>()].concat().join("\n");
    let mut changed = package.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    for (package, signature) in [(&package, &relabelled), (&package, &swapped), (&changed, &good)] {
        assert!(signature != &good || package == &changed);
        scene.hostile.serve(&file(), package, signature);
        scene.order_victim(json!({}));
        let seen = scene.hostile.heartbeats().len();
        scene.assert_refused("stage", &["tampered with", "nothing was unpacked"]);
        // A message with the same text is reported once; further failures show in the sub-agent's state.
        scene.hostile.wait_for_heartbeat("the victim to have failed", |heartbeat| {
            heartbeat["agents"][1]["state"] == "failed" && heartbeat["agents"][1]["pid"].is_null()
        });
        assert!(scene.hostile.heartbeats().len() > seen);
        scene.assert_unharmed();
    }
}

#[test]
fn a_legacy_signature_is_rejected() {
    let scene = Scene::new();
    let (package, _) = scene.victim();
    let at = scene.host.beside("legacy.tar.zst");
    fs::write(&at, &package).expect("it is ours");
    let mut sign = Command::new("minisign");
    sign.args(["-S", "-l", "-t", &comment(1)]).arg("-s").arg(scene.gateway.path("keys/aops.key")).arg("-m").arg(&at);
    command::run(&mut sign, LIMIT).expect_code(0);
    let signature = fs::read_to_string(scene.host.beside("legacy.tar.zst.minisig")).expect("minisign wrote it");
    scene.hostile.serve(&file(), &package, &signature);
    scene.order_victim(json!({}));
    scene.assert_refused("stage", &["legacy format", "not accepted"]);
}

#[test]
fn a_signed_archive_with_paths_outside_its_tree_is_rejected() {
    let scene = Scene::new();
    for (path, target) in [("../../../reached", None), ("etc", Some("/etc")), ("/aops-reached-outside", None)] {
        let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).expect("zstd works"));
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        let content = b"#!/bin/sh\n";
        // With a path that no packer writes: the name is copied into the header.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        match target {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name_literal(target).expect("it is short");
                header.set_size(0);
                header.set_cksum();
                tar.append(&header, std::io::empty()).expect("it goes into memory");
            }
            None => {
                header.set_size(content.len() as u64);
                header.set_cksum();
                tar.append(&header, &content[..]).expect("it goes into memory");
            }
        }
        let package = tar.into_inner().and_then(zstd::Encoder::finish).expect("it goes into memory");
        scene.hostile.serve(&file(), &package, &scene.sign(&package, &comment(1)));
        scene.order_victim(json!({}));
        scene.assert_refused("stage", &["the package is rejected", path]);
        assert!(!scene.host.beside("reached").exists() && !std::path::Path::new("/aops-reached-outside").exists());
    }
}

#[test]
fn a_package_host_receives_no_identity() {
    let scene = Scene::new();
    let (package, signature) = scene.victim();
    let other = Hostile::in_place_of(&scene.gateway);
    let asks = HostileReply {
        headers: vec![("www-authenticate", "Basic realm=\"x-agent-id\"".to_owned())],
        ..HostileReply::status(401)
    };
    for name in [file(), format!("{}.minisig", file())] {
        let asks = asks.clone();
        other.on(&format!("/elsewhere/{name}"), move |_| asks.clone());
    }
    // Only there, so that it is not downloaded from elsewhere instead.
    for name in [file(), format!("{}.minisig", file())] {
        scene.hostile.on(&format!("/api/download/{name}"), |_| HostileReply::status(404));
    }
    scene.order_victim(json!({"tarball": format!("{}/elsewhere", other.url())}));
    scene.assert_reported("stage", "failed", &["401", other.url()]);
    scene.assert_unharmed();
    // Also when the package is valid and completely downloaded.
    other.on(&format!("/elsewhere/{}", file()), move |_| HostileReply::ok(package.clone()));
    other.on(&format!("/elsewhere/{}.minisig", file()), move |_| HostileReply::ok(signature.clone()));
    scene.order_victim(json!({"tarball": format!("{}/elsewhere", other.url())}));
    wait_for_victim(&scene);
    let asked = other.requests();
    assert!(asked.len() >= 3, "{asked:?}");
    for asked in asked {
        for told in ["x-agent-id", "authorization", "cookie"] {
            assert!(!asked.headers.contains_key(told), "{asked:?}");
        }
        assert!(!asked.headers.values().any(|value| value.contains("5402")), "{asked:?}");
    }
    assert!(scene.hostile.requests().iter().all(|asked| asked.headers.contains_key("x-agent-id")));
    scene.assert_native_runs();
}

#[test]
fn redirects_to_another_host_or_to_plain_http_are_rejected() {
    let scene = Scene::new();
    let (package, signature) = scene.victim();
    let other = Hostile::in_place_of(&scene.gateway);
    other.serve(&file(), &package, &signature);
    let plain = scene.hostile.url().replace("https", "http");
    for (to, why) in [(other.url().to_owned(), "a different host"), (plain, "plain http")] {
        // Of the signature, and of the package after a valid signature.
        for name in [format!("{}.minisig", file()), file()] {
            let location = format!("{to}/api/download/{name}");
            scene.hostile.on(&format!("/api/download/{name}"), move |_| HostileReply::redirect(location.clone()));
            // The other file is valid; never both are redirected.
            let (right, bytes) = match name == file() {
                true => (format!("{name}.minisig"), signature.clone().into_bytes()),
                false => (file(), package.clone()),
            };
            scene.hostile.on(&format!("/api/download/{right}"), move |_| HostileReply::ok(bytes.clone()));
            scene.order_victim(json!({}));
            scene.assert_refused("stage", &["redirect", &to, why]);
        }
    }
    assert!(other.requests().is_empty(), "{:?}", other.requests());
    // A heartbeat is not redirected either: it contains the identity.
    let location = format!("{}/api/heartbeat", other.url());
    scene.hostile.on("/api/heartbeat", move |_| HostileReply::redirect(location.clone()));
    scene.host.wait_for_status("the heartbeat to fail", crate::support::host::SOON, |status| {
        status["gateway"]["connected"] == false && status["gateway"]["lastError"].to_string().contains("302")
    });
    assert!(other.requests().is_empty(), "{:?}", other.requests());
    scene.assert_unharmed();
}

#[test]
fn endless_downloads_and_answers_are_rejected() {
    let scene = Scene::new();
    let (package, signature) = scene.victim();
    let endless = || HostileReply { body: Body::Endless, ..HostileReply::ok("") };
    scene.hostile.serve(&file(), &package, &signature);
    scene.hostile.on(&format!("/api/download/{}", file()), move |_| endless());
    scene.order_victim(json!({"size": package.len()}));
    scene.hostile.wait_for_event("the end of it", |event| {
        event["kind"] == "stage" && event["outcome"] == "refused" && event["message"].to_string().contains("more than")
    });
    scene.assert_unharmed();
    // A signature has no announced size.
    let endless = || HostileReply { body: Body::Endless, ..HostileReply::ok("") };
    scene.hostile.on(&format!("/api/download/{}.minisig", file()), move |_| endless());
    scene.order_victim(json!({"size": package.len()}));
    scene.hostile.wait_for_event("the end of that, too", |event| {
        event["kind"] == "stage" && event["message"].to_string().contains("more than 4096 bytes")
    });
    scene.assert_unharmed();
    // An endless answer to a heartbeat is rejected; the next answer is used.
    scene.hostile.on("/api/heartbeat", move |_| endless());
    scene.host.wait_for_status("the heartbeat to fail", crate::support::host::SOON, |status| {
        status["gateway"]["lastError"].to_string().contains("more than 4194304 bytes")
    });
    scene.assert_unharmed();
}

#[test]
fn a_wrong_announced_size_is_rejected() {
    let scene = Scene::new();
    let (package, signature) = scene.victim();
    let true_size = package.len() as u64;
    // The size in the answer, or in the header of the download.
    for (announced, length) in [(true_size - 1, true_size), (true_size + 1, true_size), (true_size, true_size * 2)] {
        scene.hostile.serve(&file(), &package, &signature);
        let bytes = package.clone();
        scene.hostile.on(&format!("/api/download/{}", file()), move |_| HostileReply {
            body: Body::Lying { length, bytes: bytes.clone() },
            ..HostileReply::ok("")
        });
        let words = [announced, length].map(|size| size.to_string());
        scene.order_victim(json!({ "size": announced }));
        scene.hostile.wait_for_event("the wrong size to be reported", |event| {
            let message = event["message"].to_string();
            event["kind"] == "stage" && event["outcome"] == "refused" && words.iter().all(|word| message.contains(word))
        });
        scene.assert_unharmed();
    }
}

#[test]
fn an_installation_rejects_a_manager_with_another_key_or_an_older_epoch() {
    let scene = Scene::with(|gateway| {
        gateway.publish_with(&["--self", "--version", "2.0.0", "--epoch", "1"]).expect_success();
    });
    let other = Gateway::stopped();
    other.publish_self("3.0.0");
    let manager = |version: &str| format!("aops-spm-{version}_linux_{}.tar.zst", arch());
    let read = |gateway: &Gateway, name: &str| fs::read(gateway.path("depot").join(name)).expect("it was published");
    let stolen = String::from_utf8(read(&other, &format!("{}.minisig", manager("3.0.0")))).expect("it is text");
    scene.hostile.serve(&manager("3.0.0"), &read(&other, &manager("3.0.0")), &stolen);
    let output = scene.host.install(&["--version", "3.0.0"]).expect_code(1);
    assert!(output.stderr.contains("not trusted here") && output.stderr.contains("nothing was changed"), "{output}");
    scene.assert_unharmed();
    // A heartbeat's order for it changes nothing either.
    scene.hostile.answer(json!({"interval": 1, "cmd": "upgrade", "manager": {"version": "3.0.0"}}), Vec::new());
    scene.assert_reported("upgrade", "failed", &["3.0.0", "not trusted here"]);
    scene.assert_unharmed();

    let low = scene.sign(
        &read(&scene.gateway, &manager("2.0.0")),
        &comment(0).replace("victim", "aops-spm").replace("1.0.0", "2.0.0"),
    );
    scene.hostile.serve(&manager("2.0.0"), &read(&scene.gateway, &manager("2.0.0")), &low);
    let output = scene.host.install(&["--version", "2.0.0"]).expect_code(1);
    assert!(output.stderr.contains("has epoch 0") && output.stderr.contains("nothing was changed"), "{output}");
    scene.assert_unharmed();
}
