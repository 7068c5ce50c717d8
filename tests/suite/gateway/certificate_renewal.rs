//! Renewal of a gateway's certificate: with the same key, with an announced key, and with an unknown key.

use std::fs;

use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::wait::wait_for;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The pin of a public key, as hosts compute it.
fn pin(key: &KeyPair) -> String {
    let der = rustls::pki_types::SubjectPublicKeyInfoDer::from_pem_slice(key.public_key_pem().as_bytes());
    format!("sha256:{}", hex(&Sha256::digest(der.expect("rcgen writes PEM"))))
}

/// A certificate for this gateway.
fn certificate(key: &KeyPair, last_year: i32) -> String {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address can be a name");
    params.not_after = date_time_ymd(last_year, 1, 1);
    params.self_signed(key).expect("a key can sign").pem()
}

/// Replaces a file of the gateway atomically.
fn put(gateway: &Gateway, name: &str, text: &str) {
    let new = gateway.path("new.pem");
    fs::write(&new, text).expect("a temporary directory can be written");
    fs::rename(new, gateway.path(name)).expect("a temporary directory can be written");
}

fn pinned(gateway: &Gateway) -> Value {
    gateway.status()["gateway"]["certificate"].clone()
}

#[test]
fn hosts_accept_a_renewed_certificate_with_the_same_or_an_announced_key_and_no_other() {
    let gateway = Gateway::with(&[], &[]);
    let (cert, trusted) = (gateway.path("tls/cert.pem"), gateway.path("keys/aops.pub").display().to_string());
    let first = KeyPair::from_pem(&fs::read_to_string(gateway.path("tls/key.pem")).expect("init created it"));
    let first = first.expect("init created it");
    // One host pins the certificate itself, as operators used to do; the other one trusts the first contact.
    let digest = hex(&Sha256::digest(CertificateDer::from_pem_file(&cert).expect("init created it")));
    let hosts = [["--pin", &digest], ["--pin-first-contact", "--fresh"]].map(|trust| {
        let host = TestHost::new();
        let id = if trust[0] == "--pin" { "1" } else { "2" };
        let common = ["--agent-id", id, "--endpoint", gateway.url(), "--trusted-key", &trusted];
        host.install(&[&common[..], &trust[..]].concat()).expect_code(0);
        host
    });
    let connected = |what: &str, wanted: &dyn Fn(&Value) -> bool| {
        for host in &hosts {
            host.wait_for_status(what, SOON, |status| status["gateway"]["connected"] == true && wanted(status));
        }
    };
    let has_problem = |status: &Value| status["problems"].to_string().contains("expired on");
    connected("a heartbeat", &|status| !has_problem(status));

    // An expired certificate for the same key: pins refer to the key. A certificate and key that do not match are not served in between.
    let pid = gateway.pid();
    let second = KeyPair::generate().expect("a key");
    put(&gateway, "tls/cert.pem", &certificate(&second, 2090));
    gateway.reload();
    wait_for("the pair to be refused", SOON, || {
        let part = gateway.status()["gateway"]["parts"]["certificate"].clone();
        part["problems"].to_string().contains("the previous certificate is served").then_some(())
    });
    put(&gateway, "tls/cert.pem", &certificate(&first, 2001));
    connected("the renewed certificate", &has_problem);
    let table = gateway.command(&["status"], &[]).expect_success();
    assert!(table.contains("expires on 2001-01-01") && table.contains("the certificate expired on"), "{table}");
    wait_for("the gateway to receive it", SOON, || {
        let hosts = gateway.status()["hosts"].as_array()?.clone();
        let told = |host: &Value| {
            host["events"].as_array().is_some_and(|events| events.iter().any(|event| event["kind"] == "certificate"))
        };
        (hosts.len() == 2 && hosts.iter().all(told)).then_some(())
    });
    // An older version, which knows only certificates, sees the present one.
    let renewed = hex(&Sha256::digest(CertificateDer::from_pem_file(&cert).expect("it was put there")));
    let pins = hosts[1].home().join("state/pins.json");
    assert!(fs::read_to_string(&pins).expect("it is there").contains(&renewed));

    // A new key, announced beforehand.
    put(&gateway, "tls/next.pem", &second.public_key_pem());
    gateway.reload();
    let announced = wait_for("both hosts to have it", SOON, || {
        let now = pinned(&gateway);
        (now["next"] == json!([pin(&second)]) && now["lackingNext"] == 0).then_some(now)
    });
    assert_eq!(
        (&announced["pinned"], &announced["lackingPresent"], &announced["notTold"]),
        (&json!(2), &json!(0), &json!(0))
    );
    put(&gateway, "tls/key.pem", &second.serialize_pem());
    put(&gateway, "tls/cert.pem", &certificate(&second, 2090));
    fs::remove_file(gateway.path("tls/next.pem")).expect("it exists");
    gateway.reload();
    connected("the announced key", &|status| !has_problem(status));
    wait_for("the old key to be given up", SOON, || {
        let is_gone =
            |name| fs::read_to_string(hosts[1].home().join(name)).is_ok_and(|text| !text.contains(&pin(&first)));
        is_gone("state/pins.json").then_some(())
    });

    // A key that was not announced.
    let third = KeyPair::generate().expect("a key");
    put(&gateway, "tls/key.pem", &third.serialize_pem());
    put(&gateway, "tls/cert.pem", &certificate(&third, 2090));
    gateway.reload();
    for (host, words) in hosts.iter().zip(["matches no pin", "the connection is intercepted"]) {
        host.wait_for_status("it to be refused", SOON, |status| {
            status["gateway"]["lastError"].as_str().is_some_and(|error| error.contains(words))
        });
    }
    let now = pinned(&gateway);
    assert_eq!((&now["pin"], &now["lackingPresent"]), (&json!(pin(&third)), &json!(2)), "{now:#}");
    assert_eq!(gateway.pid(), pid, "a reload is no restart");
}
