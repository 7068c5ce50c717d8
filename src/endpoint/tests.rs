//! Tests of certificate verification, proxies, redirects and timeouts, against local servers.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;

use super::client::{is_unanswered_lookup, redirected};
use super::testing::{CannedResponse, ReceivedRequest, Server, TestIdentity, issued, self_signed, self_signed_by};
use super::*;

fn client(trust: &Trust) -> Client {
    Client::new(trust, Some(&"host-1".parse().unwrap()), Timeouts::exchange()).unwrap()
}

#[test]
fn a_lookup_without_an_answer_is_recognized_with_each_c_library() {
    let error = |text: &str| std::io::Error::other(format!("failed to lookup address information: {text}"));
    assert!(is_unanswered_lookup(&error("Try again")));
    assert!(is_unanswered_lookup(&error("Temporary failure in name resolution")));
    assert!(!is_unanswered_lookup(&error("Name does not resolve")));
    assert!(!is_unanswered_lookup(&std::io::Error::other("Try again")));
}

fn server_with(identity: &TestIdentity) -> Server {
    Server::tls(identity, |_| CannedResponse::ok("hello"))
}

fn got(trust: &Trust, endpoint: &Endpoint) -> Result<String, String> {
    let reply = client(trust).get(endpoint, "/x", &[]).map_err(|error| format!("{error:#}"))?;
    Ok(String::from_utf8(reply.bytes(100).unwrap()).unwrap())
}

/// Pins without recorded keys.
fn pinned(pins: Vec<Fingerprint>) -> Trust {
    Trust::Pin { pins, learned: PathBuf::from("/nonexistent/gateway-keys.json") }
}

fn ca_file(pem: &str) -> (tempfile::TempDir, Trust) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.pem");
    std::fs::write(&path, pem).unwrap();
    (directory, Trust::CaFile(path))
}

fn assert_rejected(trust: &Trust, endpoint: &Endpoint, parts: &[&str]) {
    let error = got(trust, endpoint).unwrap_err();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

#[test]
fn endpoints_are_parsed_in_their_usual_spellings() {
    for (text, shown, origin) in [
        ("https://127.0.0.1:8888", "https://127.0.0.1:8888", "https://127.0.0.1:8888"),
        ("https://Gateway.Example/", "https://gateway.example", "https://gateway.example:443"),
        ("http://gw:80/a/b//", "http://gw/a/b", "http://gw:80"),
        (" https://[::1]:8/x ", "https://[::1]:8/x", "https://[::1]:8"),
    ] {
        let endpoint: Endpoint = text.parse().unwrap();
        assert_eq!((endpoint.to_string().as_str(), endpoint.origin().as_str()), (shown, origin), "{text}");
        assert_eq!(shown.parse::<Endpoint>().unwrap(), endpoint);
    }
    for bad in [
        "",
        "gw",
        "gw:8888",
        "ftp://gw",
        "https://",
        "https://:1",
        "https://u:p@gw",
        "https://gw?x=1",
        "https://gw/#x",
        "https://gw:0",
        "https://gw:99999",
        "https://gw/a/../b",
        "https://a b",
        "https://a'b",
        "https://a\"b",
        "https://a$(b)",
        "https://a[::1]:8888",
        "https://[::1]b",
        "https://[a]",
        &format!("https://{}", "a".repeat(3000)),
    ] {
        assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
    }
}

#[test]
fn loopback_addresses_are_recognized() {
    for (text, loopback) in [
        ("http://localhost", true),
        ("http://127.3.2.1:1", true),
        ("http://[::1]", true),
        ("http://[::ffff:127.0.0.1]", true),
        ("http://10.0.0.1", false),
        ("http://localhost.example", false),
    ] {
        assert_eq!(text.parse::<Endpoint>().unwrap().is_loopback(), loopback, "{text}");
    }
}

#[test]
fn fingerprints_are_parsed_as_openssl_prints_them() {
    let fingerprint = Fingerprint::of(b"x");
    let hex = fingerprint.to_string().strip_prefix("sha256:").unwrap().to_owned();
    let upper = hex.to_uppercase();
    let colons = upper.as_bytes().chunks(2).map(|pair| String::from_utf8(pair.to_vec()).unwrap());
    let colons = colons.collect::<Vec<_>>().join(":");
    for text in [hex.clone(), fingerprint.to_string(), colons.clone(), format!("sha256 Fingerprint={colons}")] {
        assert_eq!(text.parse::<Fingerprint>(), Ok(fingerprint), "{text}");
    }
    for bad in ["", "sha256:", &hex[1..], &format!("{hex}0"), &hex.replace(&hex[..1], "g")] {
        assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
    }
}

#[test]
fn a_pin_of_a_certificate_or_its_key_ignores_names_and_dates() {
    let identity = self_signed(&["elsewhere.example"], |params| params.not_after = date_time_ymd(2001, 1, 1));
    let server = server_with(&identity);
    let certificate = Fingerprint::of(&identity.certificate);
    let key = KeyPair::try_from(identity.key.as_slice()).unwrap();
    let key = Fingerprint::of(&SubjectPublicKeyInfoDer::from_pem_slice(key.public_key_pem().as_bytes()).unwrap());
    for pin in [certificate, key] {
        assert_eq!(got(&pinned(vec![Fingerprint::of(b"other"), pin]), &server.endpoint()).as_deref(), Ok("hello"));
    }
    let advice = format!("--pin {key}");
    assert_rejected(&pinned(vec![Fingerprint::of(b"other")]), &server.endpoint(), &["matches no pin", &advice]);
}

#[test]
fn the_key_of_the_first_contact_is_pinned_and_another_key_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let pins = directory.path().join("pins.json");
    expect_first_contact(&pins).unwrap();
    let trust = Trust::FirstContact { pins: pins.clone() };
    let (one, other) = (self_signed(&["localhost"], |_| {}), self_signed(&["localhost"], |_| {}));

    let server = server_with(&one);
    let (address, endpoint) = (server.address(), server.endpoint());
    let first = client(&trust);
    assert_eq!(first.get(&endpoint, "/", &[]).unwrap().status(), 200);
    assert_eq!(first.first_contact(), key_of(&one.certificate));
    let recorded = std::fs::read_to_string(&pins).unwrap();
    assert!(recorded.contains(&endpoint.origin()) && recorded.contains("firstSeen"), "{recorded}");

    let second = client(&trust);
    assert_eq!(second.get(&endpoint, "/", &[]).unwrap().status(), 200);
    assert_eq!(second.first_contact(), None);
    drop((server, first, second));

    let _changed = Server::tls_at(address, &other, |_| CannedResponse::ok("hello"));
    let new = format!("--pin {}", key_of(&other.certificate).unwrap());
    let old = key_of(&one.certificate).unwrap().to_string();
    assert_rejected(&trust, &endpoint, &["since the first contact", &old, &new, "--fresh", "operator"]);
    assert_eq!(std::fs::read_to_string(&pins).unwrap(), recorded);
}

#[test]
fn a_renewed_certificate_and_an_announced_key_are_accepted_but_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let (pins, learned) = (directory.path().join("pins.json"), directory.path().join("keys.json"));
    expect_first_contact(&pins).unwrap();
    let keys = [(); 3].map(|()| KeyPair::generate().unwrap());
    let identity_with = |key: &KeyPair| self_signed_by(key, &["localhost"], |_| {});
    let first = identity_with(&keys[0]);
    let by_certificate = Trust::Pin { pins: vec![Fingerprint::of(&first.certificate)], learned };
    for trust in [Trust::FirstContact { pins }, by_certificate] {
        let server = server_with(&first);
        let (address, endpoint) = (server.address(), server.endpoint());
        let connected = client(&trust);
        assert_eq!(connected.get(&endpoint, "/", &[]).unwrap().status(), 200);
        let announced = [&keys[0], &keys[1]].map(|key| key_of(&identity_with(key).certificate).unwrap().to_string());
        connected.learn(&endpoint, &[announced[1].clone(), "what".to_owned()]).unwrap();
        let report = connected.trust_report(&endpoint);
        assert!(report.is_pinned() && announced.iter().all(|pin| report.accepts(pin)), "{report:?}");
        drop((server, connected));
        // The certificate is renewed with the same key; then with an unannounced key, the announced one, and the old one.
        for (key, is_accepted) in [(&keys[0], true), (&keys[2], false), (&keys[1], true), (&keys[0], false)] {
            let _server = Server::tls_at(address, &identity_with(key), |_| CannedResponse::ok("hello"));
            let connected = client(&trust);
            let got = connected.get(&endpoint, "/", &[]);
            assert_eq!(got.is_ok(), is_accepted, "{trust:?} {got:?}");
            if got.is_ok() && std::ptr::eq(key, &keys[1]) {
                // The old key is no longer announced.
                connected.learn(&endpoint, &[announced[1].clone()]).unwrap();
            }
        }
    }
}

#[test]
fn a_lost_pin_file_allows_no_first_contact() {
    let identity = self_signed(&["localhost"], |_| {});
    let server = server_with(&identity);
    let directory = tempfile::tempdir().unwrap();
    let pins = directory.path().join("pins.json");
    let trust = Trust::FirstContact { pins: pins.clone() };
    let pin = format!("--pin {}", key_of(&identity.certificate).unwrap());
    assert_rejected(&trust, &server.endpoint(), &["pins.json is missing", "backup", &pin, "write {} into that file"]);
    assert!(!pins.exists());
    std::fs::write(&pins, "{}").unwrap();
    assert_eq!(got(&trust, &server.endpoint()).as_deref(), Ok("hello"));
}

#[test]
fn a_certificate_issued_by_an_authority_in_the_file_is_accepted() {
    let (pem, identity) = issued(&["localhost", "127.0.0.1"]);
    let (_directory, trust) = ca_file(&pem);
    let server = server_with(&identity);
    assert_eq!(got(&trust, &server.endpoint()).as_deref(), Ok("hello"));
    assert_eq!(got(&trust, &server.endpoint_by("localhost")).as_deref(), Ok("hello"));
    let (_directory, other) = ca_file(&self_signed(&["127.0.0.1"], |_| {}).pem);
    assert_rejected(
        &other,
        &server.endpoint(),
        &["not issued by an authority that this host trusts", "--ca-cert FILE", "--pin sha256:"],
    );
}

#[test]
fn a_self_signed_certificate_in_the_file_is_accepted_even_when_marked_as_an_authority() {
    type Change = fn(&mut rcgen::CertificateParams);
    let authority: Change = |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let changes: [Change; 3] = [|_| {}, |params| params.is_ca = IsCa::ExplicitNoCa, authority];
    for change in changes {
        let identity = self_signed(&["127.0.0.1", "gw.example"], change);
        let (_directory, trust) = ca_file(&identity.pem);
        let server = server_with(&identity);
        assert_eq!(got(&trust, &server.endpoint()).as_deref(), Ok("hello"));
        assert_rejected(&trust, &server.endpoint_by("localhost"), &["it is only valid for 127.0.0.1, gw.example;"]);
    }
    // The same key marked as an authority, in a different certificate.
    let key = KeyPair::generate().unwrap();
    let (given, shown) = (
        self_signed_by(&key, &["127.0.0.1"], authority),
        self_signed_by(&key, &["127.0.0.1"], |params| {
            authority(params);
            params.serial_number = Some(vec![7].into());
        }),
    );
    let (_directory, trust) = ca_file(&given.pem);
    assert_rejected(&trust, &server_with(&shown).endpoint(), &["not issued by an authority that this host trusts"]);
}

#[test]
fn dates_and_names_of_a_certificate_in_the_file_are_checked() {
    let authority = |params: &mut rcgen::CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let expired = self_signed(&["127.0.0.1"], |params| {
        authority(params);
        params.not_after = date_time_ymd(2001, 1, 1);
    });
    let future = self_signed(&["127.0.0.1"], |params| {
        authority(params);
        params.not_before = date_time_ymd(4000, 1, 1);
    });
    let nameless = self_signed(&[], authority);
    // The year is exact enough.
    let clock = format!("this host's clock says {}", &jiff::Timestamp::now().to_string()[..4]);
    for (identity, parts) in [
        (&expired, vec!["it expired on 2001-01-01T00:00:00Z", &clock, "renew the gateway's certificate"]),
        (&future, vec!["not valid yet, only from 4000-01-01T00:00:00Z on", &clock, "set the clock"]),
        (&nameless, vec!["contains no host name", "subjectAltName"]),
    ] {
        let (_directory, trust) = ca_file(&identity.pem);
        assert_rejected(&trust, &server_with(identity).endpoint(), &parts);
    }
}

#[test]
fn system_trust_rejects_a_private_certificate_with_a_remedy() {
    for ca in [IsCa::NoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let identity = self_signed(&["127.0.0.1"], |params| params.is_ca = ca);
        let pin = format!("--pin {}", key_of(&identity.certificate).unwrap());
        assert_rejected(
            &Trust::System,
            &server_with(&identity).endpoint(),
            &["not issued by an authority that this host trusts", "--ca-cert FILE", &pin],
        );
    }
}

#[test]
fn the_error_for_a_file_without_certificates_names_it() {
    for content in ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let (_directory, trust) = ca_file(content);
        let error = format!("{:#}", Client::new(&trust, None, Timeouts::exchange()).unwrap_err());
        assert!(error.contains("ca.pem") && error.contains("--ca-cert"), "{error}");
    }
    let missing = Trust::CaFile(PathBuf::from("/nonexistent/ca.pem"));
    assert!(Client::new(&missing, None, Timeouts::exchange()).is_err());
}

#[test]
fn a_server_without_the_certificates_key_is_rejected() {
    let (honest, thief) = (self_signed(&["127.0.0.1"], |_| {}), self_signed(&["127.0.0.1"], |_| {}));
    let stolen = TestIdentity { certificate: honest.certificate.clone(), key: thief.key, pem: honest.pem.clone() };
    let directory = tempfile::tempdir().unwrap();
    let pins = directory.path().join("pins.json");
    expect_first_contact(&pins).unwrap();
    let before = std::fs::read(&pins).unwrap();
    for trust in [pinned(vec![Fingerprint::of(&honest.certificate)]), Trust::FirstContact { pins: pins.clone() }] {
        let server = Server::tls_with_resolver(&stolen, |_| CannedResponse::ok("hello"));
        assert!(got(&trust, &server.endpoint()).is_err());
    }
    assert_eq!(std::fs::read(&pins).unwrap(), before);
}

#[test]
fn plain_http_needs_insecure_and_insecure_accepts_any_certificate() {
    let plain = Server::plain(|_| CannedResponse::ok("plain"));
    assert_rejected(&Trust::System, &plain.endpoint(), &["plain http", "--insecure"]);
    assert_eq!(got(&Trust::Insecure, &plain.endpoint()).as_deref(), Ok("plain"));
    let server = server_with(&self_signed(&["elsewhere"], |params| params.not_after = date_time_ymd(2001, 1, 1)));
    assert_eq!(got(&Trust::Insecure, &server.endpoint()).as_deref(), Ok("hello"));
}

#[test]
fn the_error_for_a_server_without_tls_says_so() {
    for answer in ["HTTP/1.1 400 Bad Request\r\n\r\n", ""] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap()).parse().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 64]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        assert_rejected(&Trust::Insecure, &endpoint, &["is it an http:// endpoint?"]);
        server.join().unwrap();
    }
    let unused = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    assert_rejected(
        &Trust::Insecure,
        &format!("https://{unused}").parse().unwrap(),
        &["refused", "is the gateway running"],
    );
}

#[test]
fn the_agent_id_is_sent_to_endpoints_only_and_a_connection_is_reused() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let recorder = Arc::clone(&seen);
    let identity = self_signed(&["127.0.0.1"], |_| {});
    let server = Server::tls(&identity, move |request: &ReceivedRequest| {
        recorder.lock().unwrap().push((
            request.method.clone(),
            request.path.clone(),
            request.headers.get("x-agent-id").cloned(),
        ));
        CannedResponse::ok(request.body.clone())
    });
    let client = client(&pinned(vec![Fingerprint::of(&identity.certificate)]));
    let endpoint: Endpoint = format!("{}/base", server.endpoint()).parse().unwrap();
    client.get(&endpoint, "/a?b=c", &[]).unwrap().bytes(10).unwrap();
    client
        .download(&endpoint, "/d", &[], Requester::Anonymous, std::time::Duration::from_secs(60))
        .unwrap()
        .bytes(10)
        .unwrap();
    assert_eq!(client.post_json(&endpoint, "/e", b"{}").unwrap().bytes(10).unwrap(), b"{}");
    let id = Some("host-1".to_owned());
    let expected = [("GET", "/base/a?b=c", id.clone()), ("GET", "/base/d", None), ("POST", "/base/e", id)];
    let expected: Vec<_> = expected.map(|(method, path, id)| (method.to_owned(), path.to_owned(), id)).into();
    assert_eq!(*seen.lock().unwrap(), expected);
    assert_eq!(server.connections(), 1);
}

#[test]
fn a_proxy_is_used_with_connect_but_never_for_this_host() {
    let identity = self_signed(&["gateway.example"], |_| {});
    let server = server_with(&identity);
    let (listener, target) = (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), server.address());
    let address = listener.local_addr().unwrap();
    let proxy = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        while !received.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            received.push(byte[0]);
        }
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        let server = std::net::TcpStream::connect(target).unwrap();
        let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let upward = std::thread::spawn(move || {
            let _ = std::io::copy(&mut up, &mut down);
            let _ = down.shutdown(std::net::Shutdown::Both);
        });
        let _ = std::io::copy(&mut &server, &mut client);
        let _ = client.shutdown(std::net::Shutdown::Both);
        upward.join().unwrap();
        String::from_utf8(received).unwrap()
    });
    let (_directory, trust) = ca_file(&identity.pem);
    let through = |url: &str| {
        Client::with_proxies(
            &Proxies::from_environment(|name| (name == "ALL_PROXY").then(|| url.to_owned())),
            &trust,
            None,
            Timeouts::exchange(),
        )
    };
    let url = format!("http://user:secret@{address}");
    let client = through(&url).unwrap();
    let endpoint = format!("https://gateway.example:{}", target.port()).parse().unwrap();
    assert_eq!(client.get(&endpoint, "/", &[]).unwrap().bytes(10).unwrap(), b"hello");
    drop(client);
    let received = proxy.join().unwrap();
    assert!(received.starts_with(&format!("CONNECT gateway.example:{} HTTP/1.1\r\n", target.port())), "{received}");
    assert!(received.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ="), "{received}");

    // The proxy is gone: the error names it, without its password.
    let client = through(&url).unwrap();
    let error = format!("{:#}", client.get(&endpoint, "/", &[]).unwrap_err());
    assert!(error.contains(&format!("through the proxy http://{address}")) && !error.contains("secret"), "{error}");
    assert!(!format!("{client:?}").contains("secret"), "{client:?}");
    let client = through(&url).unwrap();
    let error = format!("{:#}", client.get(&server.endpoint(), "/", &[]).unwrap_err());
    assert!(error.contains("it is only valid for gateway.example"), "{error}");
    let client = through("socks5://127.0.0.1:1").unwrap();
    let error = format!("{:#}", client.get(&endpoint, "/", &[]).unwrap_err());
    assert!(error.contains("only http:// and https:// proxies"), "{error}");
}

#[test]
fn a_password_in_an_address_is_rejected_and_not_shown() {
    for text in ["https://user:secret@host:1/x", "ftp://user:secret@host", "user:secret@host"] {
        let error = text.parse::<Endpoint>().unwrap_err().to_string();
        assert!(!error.contains("secret") && error.contains("@host"), "{error}");
    }
}

#[test]
fn redirects_stay_within_the_origin() {
    let other = Server::plain(|_| CannedResponse::ok("stolen"));
    let elsewhere = other.endpoint().url("/x");
    let server = Server::plain(move |request| match request.path.as_str() {
        "/here" => {
            CannedResponse { headers: vec![("location", "/there?x=1".to_owned())], ..CannedResponse::status(302) }
        }
        "/there?x=1" => CannedResponse::ok("there"),
        "/away" => CannedResponse { headers: vec![("location", elsewhere.clone())], ..CannedResponse::status(302) },
        _ => CannedResponse { headers: vec![("location", "/loop".to_owned())], ..CannedResponse::status(302) },
    });
    let client = client(&Trust::Insecure);
    assert_eq!(client.get(&server.endpoint(), "/here", &[]).unwrap().bytes(10).unwrap(), b"there");
    let error = |path| format!("{:#}", client.get(&server.endpoint(), path, &[]).unwrap_err());
    assert!(error("/away").contains("a different host"));
    assert_eq!(
        format!("{:#}", redirected(&"https://a:1".parse().unwrap(), "http://a:1/x").unwrap_err()),
        "cannot follow the redirect from https://a:1 to http://a:1: the target is plain http"
    );
    assert!(error("/loop").contains("more than 5 redirects"));
    assert_eq!(other.connections(), 0);
}

#[test]
fn answers_are_limited() {
    let server = Server::plain(|_| CannedResponse::ok(vec![b'x'; 1000]));
    let client = client(&Trust::Insecure);
    let get = || client.get(&server.endpoint(), "/", &[]).unwrap();
    assert_eq!(get().bytes(1000).unwrap().len(), 1000);
    assert!(format!("{:#}", get().bytes(999).unwrap_err()).contains("more than 999 bytes"));
}

#[test]
fn a_silent_server_times_out() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint: Endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let short = std::time::Duration::from_millis(200);
    for (timeouts, word) in [
        (Timeouts { connect: short, stall: short, total: None }, "nothing was received for 200ms"),
        (Timeouts { connect: short, stall: short * 100, total: Some(short) }, "within 200ms"),
    ] {
        let client = Client::new(&Trust::Insecure, None, timeouts).unwrap();
        let error = format!("{:#}", client.get(&endpoint, "/", &[]).unwrap_err());
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_slow_server_is_aborted() {
    let stall = std::time::Duration::from_millis(250);
    let drip = Some((0, std::time::Duration::from_millis(20)));
    let identity = self_signed(&["127.0.0.1"], |_| {});
    let answer = move |_: &ReceivedRequest| CannedResponse { drip, ..CannedResponse::ok(vec![b'x'; 4096]) };
    for server in [Server::plain(answer), Server::tls(&identity, answer)] {
        let client = Client::new(&Trust::Insecure, None, Timeouts::download(stall)).unwrap();
        let reply = client.get(&server.endpoint(), "/", &[]).unwrap();
        let error = reply.reader().read_to_end(&mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("less than 1 KiB/s was received for 1s"), "{error}");
    }
}

/// Answers a number of requests on each connection and resets it at the next one, as a server or firewall that has dropped the
/// connection does; the client notices only on sending.
fn forgets_after(answers: usize) -> (Endpoint, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            count.fetch_add(1, Ordering::SeqCst);
            for _ in 0..answers {
                let mut received = Vec::new();
                while !received.ends_with(b"body") {
                    let mut byte = [0];
                    if stream.read(&mut byte).is_ok_and(|amount| amount == 0) {
                        break;
                    }
                    received.push(byte[0]);
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
            }
            // Unread input turns the close into a reset.
            let _ = stream.peek(&mut [0]);
        }
    });
    (endpoint, connections)
}

#[test]
fn a_request_on_a_reset_idle_connection_is_retried() {
    let client = client(&Trust::Insecure);
    let (endpoint, connections) = forgets_after(1);
    for number in 1..=4 {
        let reply = client.post_json(&endpoint, "/x", b"body").unwrap();
        assert_eq!(reply.bytes(10).unwrap(), b"ok");
        assert_eq!(connections.load(Ordering::SeqCst), number);
    }
    // A request on a new connection is not retried.
    let (endpoint, connections) = forgets_after(0);
    assert!(client.post_json(&endpoint, "/x", b"body").is_err());
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}
