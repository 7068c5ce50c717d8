//! Tests of fetching: download, resumption, verification, rejection.

use std::io::{Cursor, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::cache::entries;
use super::*;
use crate::core::model::{Arch, Os};
use crate::endpoint::testing::{CannedResponse, ReceivedRequest, Server};
use crate::endpoint::{Timeouts, Trust};

mod network;
mod sharing;

struct Signer(minisign::KeyPair);

impl Signer {
    fn new() -> Signer {
        Signer(minisign::KeyPair::generate_unencrypted_keypair().unwrap())
    }

    fn public(&self) -> String {
        self.0.pk.to_box().unwrap().into_string()
    }

    fn keys(&self) -> Keys {
        Keys::parse(&self.public()).unwrap()
    }

    fn sign(&self, bytes: &[u8], comment: &str) -> String {
        minisign::sign(None, &self.0.sk, Cursor::new(bytes), Some(comment), None).unwrap().into_string()
    }
}

fn signed(bytes: &[u8]) -> (Keys, String) {
    let signer = Signer::new();
    let signature = signer.sign(bytes, &binding(1));
    (signer.keys(), signature)
}

fn release() -> Release {
    Release { name: "demo".parse().unwrap(), version: "1.0".parse().unwrap(), os: Os::Linux, arch: Arch::Amd64 }
}

fn binding(epoch: u64) -> String {
    Binding { release: release(), epoch }.to_string()
}

/// A package with one program and this many incompressible bytes.
fn archive(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    archive_of(&std::iter::repeat_with(|| random.u8(..)).take(bytes).collect::<Vec<u8>>())
}

/// A package with one program and this content.
fn archive_of(content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap());
    for (path, mode, content) in [("bin/run", 0o755, &b"#!/bin/sh\n"[..]), ("data", 0o600, content)] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

const FILE: &str = "demo-1.0_linux_amd64.tar.zst";

struct Fetcher {
    directory: tempfile::TempDir,
    paths: PackagePaths,
    client: Client,
    limits: FetchLimits,
}

impl Fetcher {
    fn new() -> Fetcher {
        let directory = tempfile::tempdir().unwrap();
        let paths = PackagePaths { cache: directory.path().join("cache"), staging: directory.path().join("staging") };
        let client =
            Client::new(&Trust::Insecure, Some(&"host-1".parse().unwrap()), Timeouts::download(Duration::from_secs(5)));
        Fetcher { directory, paths, client: client.unwrap(), limits: FetchLimits::default() }
    }

    fn fetch_context<'a>(&'a self, endpoints: &'a [Endpoint], keys: &'a Keys) -> FetchContext<'a> {
        let (paths, limits) = (&self.paths, &self.limits);
        FetchContext { client: &self.client, endpoints, keys, paths, limits, timeout: Duration::from_secs(60) }
    }

    fn fetch(&self, endpoints: &[Endpoint], wanted: &PackageRequest, keys: &Keys) -> Result<VerifiedTree, String> {
        fetch(&self.fetch_context(endpoints, keys), wanted, &mut |_, _| true).map_err(|error| format!("{error:#}"))
    }

    /// Creates a partial download in the cache, as left by an earlier run.
    fn leave_partial(&self, bytes: &[u8], etag: Option<&str>) {
        fs::create_dir_all(&self.paths.cache).unwrap();
        let part = self.paths.cache.join(format!("{FILE}.part"));
        fs::write(&part, bytes).unwrap();
        crate::platform::set_mode(&part, 0o600).unwrap();
        if let Some(etag) = etag {
            fs::write(self.paths.cache.join(format!("{FILE}.part.etag")), etag).unwrap();
        }
    }

    /// The files in the cache and in staging.
    fn leftovers(&self) -> Vec<PathBuf> {
        let all = [&self.paths.cache, &self.paths.staging].map(|directory| entries(directory).unwrap());
        all.into_iter().flatten().map(|entry| entry.path()).collect()
    }
}

/// Serves one package and its signature.
fn depot(bytes: Vec<u8>, signature: String) -> Server {
    Server::plain(move |request| match request.path.strip_prefix("/api/download/") {
        Some("demo-1.0_linux_amd64.tar.zst") => CannedResponse::ok(bytes.clone()),
        Some("demo-1.0_linux_amd64.tar.zst.minisig") => CannedResponse::ok(signature.clone()),
        _ => CannedResponse::status(404),
    })
}

#[test]
fn a_signed_package_becomes_a_release() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(300_000));
    let server = depot(bytes.clone(), signer.sign(&bytes, &binding(3)));
    let mut seen = Vec::new();
    let wanted = PackageRequest { size: Some(bytes.len() as u64), ..PackageRequest::new(release()) };
    let (endpoints, keys) = ([server.endpoint()], signer.keys());
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &wanted, &mut |done, total| {
        seen.push((done, total));
        true
    })
    .unwrap();
    assert_eq!(tree.binding().epoch, 3);
    assert_eq!(seen.last(), Some(&(bytes.len() as u64, Some(bytes.len() as u64))));
    assert!(seen.is_sorted());

    let (staged, to) = (tree.path().to_owned(), fetcher.directory.path().join("agents/demo/1.0"));
    // The leftover of an interrupted move is replaced.
    fs::create_dir_all(to.join("half")).unwrap();
    assert!(load_completed(&to).unwrap_err().is::<WithdrawnRelease>());
    let sha256 = tree.sha256().clone();
    tree.move_to(&to).unwrap();
    assert!(!staged.exists() && !to.join("half").exists());
    assert_eq!(entries(&fetcher.paths.cache).unwrap().len(), 0);
    assert_eq!(fs::read(to.join("bin/run")).unwrap(), b"#!/bin/sh\n");
    let record = load_completed(&to).unwrap();
    assert_eq!((record.file.as_str(), record.sha256, record.epoch), ("demo-1.0_linux_amd64.tar.zst", sha256, 3));
    assert_eq!(record.signer.as_ref(), keys.iter().next());

    let again = fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap();
    assert!(format!("{:#}", again.move_to(&to).unwrap_err()).contains("already exists there"));
    // Staging is empty, and the archive is kept for the next fetch.
    assert_eq!((entries(&fetcher.paths.cache).unwrap().len(), entries(&fetcher.paths.staging).unwrap().len()), (1, 0));
    drop(fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap());
    assert_eq!(fetcher.leftovers(), Vec::<PathBuf>::new());
    assert!(load_completed(&to).is_ok());
    discard(&to).unwrap();
    discard(&to).unwrap();
    assert!(!to.exists());
    sweep(&fetcher.paths).unwrap();
    assert_eq!(fetcher.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_package_that_does_not_match_the_request_is_rejected_with_the_reason() {
    let (signer, stranger, bytes) = (Signer::new(), Signer::new(), archive(1000));
    let good = signer.sign(&bytes, &binding(3));
    let legacy = {
        let mut lines: Vec<String> = good.lines().map(str::to_owned).collect();
        let mut raw = BASE64_STANDARD.decode(&lines[1]).unwrap();
        raw[1] = b'd';
        lines[1] = BASE64_STANDARD.encode(raw);
        lines.join("\n")
    };
    let mut tampered = bytes.clone();
    *tampered.last_mut().unwrap() ^= 1;
    let relabelled = good.replace("epoch=3", "epoch=9");
    let wanted = PackageRequest::new(release());
    let stranger_id = stranger.keys().ids().next().unwrap().to_string();
    let sign = |comment: &str| signer.sign(&bytes, comment);
    let other = binding(3).replace("amd64", "386");
    for (name, served, signature, wanted, keys, words) in [
        ("no keys", &bytes, good.clone(), wanted.clone(), Keys::default(), vec!["no trusted key", "--trusted-key"]),
        (
            "untrusted",
            &bytes,
            stranger.sign(&bytes, &binding(3)),
            wanted.clone(),
            signer.keys(),
            vec!["signed by the key", &stranger_id, "not trusted here"],
        ),
        (
            "tampered",
            &tampered,
            good.clone(),
            wanted.clone(),
            signer.keys(),
            vec!["tampered with", "nothing was unpacked"],
        ),
        ("comment", &bytes, relabelled, wanted.clone(), signer.keys(), vec!["tampered with"]),
        (
            "other binding",
            &bytes,
            sign(&other),
            wanted.clone(),
            signer.keys(),
            vec!["signed as demo 1.0 for linux/386", "but demo 1.0 for linux/amd64 was requested"],
        ),
        ("no binding", &bytes, sign("timestamp:1"), wanted.clone(), signer.keys(), vec!["does not name the package"]),
        ("legacy", &bytes, legacy, wanted.clone(), signer.keys(), vec!["legacy"]),
        (
            "epoch",
            &bytes,
            good.clone(),
            PackageRequest { min_epoch: 4, ..wanted.clone() },
            signer.keys(),
            vec!["epoch 3, lower than the 4", "--epoch 4"],
        ),
        (
            "digest",
            &bytes,
            good.clone(),
            PackageRequest { sha256: Some("0".repeat(64).parse().unwrap()), ..wanted.clone() },
            signer.keys(),
            vec!["SHA-256", "was announced"],
        ),
        (
            "size",
            &bytes,
            good.clone(),
            PackageRequest { size: Some(5), ..wanted.clone() },
            signer.keys(),
            vec!["but 5 were announced"],
        ),
        (
            "file name",
            &bytes,
            good.clone(),
            PackageRequest { file: Some("../demo-1.0_linux_amd64.zip".to_owned()), ..wanted.clone() },
            signer.keys(),
            vec!["as the package of demo 1.0"],
        ),
        ("no signature", &bytes, "hello".to_owned(), wanted.clone(), signer.keys(), vec!["not a minisign signature"]),
        ("huge signature", &bytes, "x".repeat(5000), wanted.clone(), signer.keys(), vec!["more than 4096 bytes"]),
        (
            "missing",
            &bytes,
            good.clone(),
            PackageRequest { file: Some("demo-1.0_linux_amd64.zip".to_owned()), ..wanted.clone() },
            signer.keys(),
            vec!["package not found", "/api/download/demo-1.0_linux_amd64.zip", "aops gateway publish"],
        ),
    ] {
        let fetcher = Fetcher::new();
        let server = depot(served.clone(), signature);
        let error = fetcher.fetch(&[server.endpoint()], &wanted, &keys).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{name}: {word:?} is not in {error:?}");
        }
        assert_eq!(fetcher.leftovers(), Vec::<PathBuf>::new(), "{name}");
    }
}

#[test]
fn the_error_for_an_untrusted_key_names_the_directory_of_trusted_keys() {
    let (fetcher, signer, stranger, bytes) = (Fetcher::new(), Signer::new(), Signer::new(), archive(10));
    let keys_directory = fetcher.directory.path().join("keys");
    signer.keys().save_to(&keys_directory).unwrap();
    let server = depot(bytes.clone(), stranger.sign(&bytes, &binding(1)));
    let keys = Keys::load(&keys_directory).unwrap();
    let error = fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &keys).unwrap_err();
    assert!(error.contains(&keys_directory.display().to_string()), "{error}");
    let none = Keys::load(&fetcher.directory.path().join("none")).unwrap();
    assert!(none.is_empty());
    let error = fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &none).unwrap_err();
    assert!(error.contains("no trusted key in "), "{error}");
}

/// Serves ranges; closes the connection after `step` bytes for the first `cuts` requests of the package.
fn interrupting(
    bytes: Vec<u8>,
    signature: String,
    etag: &'static str,
    step: usize,
    cuts: usize,
) -> (Server, Arc<Mutex<Vec<Option<String>>>>) {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let (ranges, count) = (Arc::clone(&requests), AtomicUsize::new(0));
    let server = Server::plain(move |request: &ReceivedRequest| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        let range = request.headers.get("range").cloned();
        ranges.lock().unwrap().push(range.clone());
        let same = request.headers.get("if-range").is_some_and(|known| known == etag);
        let start = range.filter(|_| same).map_or(0, |range| {
            range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')?.parse().ok()).unwrap()
        });
        let cut_after = (count.fetch_add(1, Ordering::SeqCst) < cuts).then_some(step.min(bytes.len() - start));
        let mut headers = vec![("etag", etag.to_owned())];
        if start > 0 {
            headers.push(("content-range", format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len())));
        }
        let status = if start > 0 { 206 } else { 200 };
        CannedResponse { status, headers, body: bytes[start..].to_vec(), cut_after, ..CannedResponse::default() }
    });
    (server, requests)
}

#[test]
fn an_interrupted_download_is_resumed() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(400_000));
    let (server, ranges) = interrupting(bytes.clone(), signer.sign(&bytes, &binding(1)), "\"a\"", 150_000, 2);
    fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &signer.keys()).unwrap();
    let ranges = ranges.lock().unwrap();
    let expected = [None, Some("bytes=150000-".to_owned()), Some("bytes=300000-".to_owned())];
    assert_eq!(*ranges, expected);
}

#[test]
fn a_later_fetch_resumes_a_partial_download_unless_the_file_changed() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(400_000));
    let signature = signer.sign(&bytes, &binding(1));
    let wanted = PackageRequest::new(release());
    let file = fetcher.paths.cache.join("demo-1.0_linux_amd64.tar.zst.part");
    {
        let (server, ranges) = interrupting(bytes.clone(), signature.clone(), "\"a\"", 50_000, 100);
        let error = fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap_err();
        assert!(error.contains("gave up after 5 attempts") && error.contains("was interrupted"), "{error}");
        assert_eq!(ranges.lock().unwrap().len(), 5);
        assert_eq!(fs::metadata(&file).unwrap().len(), 250_000);
    }
    sweep(&fetcher.paths).unwrap();
    {
        let (server, ranges) = interrupting(bytes.clone(), signature.clone(), "\"a\"", 10_000, 1);
        fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap();
        assert_eq!(ranges.lock().unwrap().first(), Some(&Some("bytes=250000-".to_owned())));
    }
    // A partial download of a different, larger file with the same name.
    fetcher.leave_partial(&[b'x'; 1_000_000], Some("\"old\""));
    let (server, _) = interrupting(bytes.clone(), signature, "\"a\"", 0, 0);
    fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap();
    assert_eq!(entries(&fetcher.paths.cache).unwrap().len(), 0);
}

#[test]
fn a_complete_partial_file_is_not_downloaded_again() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(1000));
    let signature = signer.sign(&bytes, &binding(1));
    fetcher.leave_partial(&bytes, Some("\"a\""));
    let all = format!("bytes */{}", bytes.len());
    let server = Server::plain(move |request| match request.path.ends_with(SIGNATURE_SUFFIX) {
        true => CannedResponse::ok(signature.clone()),
        false => CannedResponse { headers: vec![("content-range", all.clone())], ..CannedResponse::status(416) },
    });
    fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &signer.keys()).unwrap();
}

#[test]
fn a_package_with_an_unacceptable_signature_is_not_downloaded() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(1000));
    let signature = signer.sign(&bytes, &binding(1));
    let server = Server::plain(move |request| match request.path.ends_with(SIGNATURE_SUFFIX) {
        true => CannedResponse::ok(signature.clone()),
        false => panic!("{} was requested", request.path),
    });
    let wanted = PackageRequest { min_epoch: 2, ..PackageRequest::new(release()) };
    assert!(fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap_err().contains("epoch 1"));
    let error =
        fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &Signer::new().keys()).unwrap_err();
    assert!(error.contains("not trusted here"), "{error}");
}

#[test]
fn a_busy_gateway_is_retried_and_the_message_of_an_error_response_is_shown() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(10));
    let signature = signer.sign(&bytes, &binding(1));
    let count = AtomicUsize::new(0);
    let busy = Server::plain(move |request| match count.fetch_add(1, Ordering::SeqCst) {
        0 | 2 => CannedResponse { headers: vec![("retry-after", "0".to_owned())], ..CannedResponse::status(503) },
        _ if request.path.ends_with(SIGNATURE_SUFFIX) => CannedResponse::ok(signature.clone()),
        _ => CannedResponse::ok(bytes.clone()),
    });
    fetcher.fetch(&[busy.endpoint()], &PackageRequest::new(release()), &signer.keys()).unwrap();
    let refusing = Server::plain(|_| CannedResponse { body: b"not you".to_vec(), ..CannedResponse::status(403) });
    let error = fetcher.fetch(&[refusing.endpoint()], &PackageRequest::new(release()), &signer.keys()).unwrap_err();
    assert!(error.contains("answered 403: not you"), "{error}");
}

#[test]
fn endpoints_are_tried_in_order_after_the_tarball_location_which_receives_no_agent_id() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(10));
    let signature = signer.sign(&bytes, &binding(1));
    let empty = Server::plain(|_| CannedResponse::status(404));
    let full = depot(bytes.clone(), signature.clone());
    let wanted = PackageRequest::new(release());
    fetcher.fetch(&[empty.endpoint(), full.endpoint()], &wanted, &signer.keys()).unwrap();
    let other = Server::plain(|_| CannedResponse::status(404));
    let error = fetcher.fetch(&[empty.endpoint(), other.endpoint()], &wanted, &signer.keys()).unwrap_err();
    assert!(error.contains("none of 2 sources"), "{error}");
    assert!(fetcher.fetch(&[], &wanted, &signer.keys()).unwrap_err().contains("no endpoint is configured"));

    let ids = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ids);
    let mirror = Server::plain(move |request| {
        seen.lock().unwrap().push(request.headers.contains_key("x-agent-id"));
        assert!(request.path.starts_with("/mirror/demo-1.0_linux_amd64.tar.zst"), "{}", request.path);
        CannedResponse::ok(if request.path.ends_with(SIGNATURE_SUFFIX) {
            signature.clone().into_bytes()
        } else {
            bytes.clone()
        })
    });
    let wanted = PackageRequest { tarball: Some(mirror.endpoint().url("/mirror/")), ..wanted };
    let before = full.connections();
    fetcher.fetch(&[full.endpoint()], &wanted, &signer.keys()).unwrap();
    assert_eq!(full.connections(), before);
    fetcher.fetch(&[mirror.endpoint()], &wanted, &signer.keys()).unwrap();
    assert_eq!(*ids.lock().unwrap(), [false, false, true, true]);

    // If the tarball location lacks the package, is unreachable or invalid, the endpoints are tried.
    let unused = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    for tarball in [empty.endpoint().url("/x"), format!("http://{unused}/x"), "no address".to_owned()] {
        let wanted = PackageRequest { tarball: Some(tarball.clone()), ..wanted.clone() };
        fetcher.fetch(&[full.endpoint()], &wanted, &signer.keys()).unwrap();
        let error = fetcher.fetch(&[empty.endpoint()], &wanted, &signer.keys()).unwrap_err();
        assert!(error.contains("none of 2 sources"), "{error}");
        assert!(error.contains(&empty.endpoint().url("/api/download/")), "{error}");
        assert!(error.contains(&tarball) || error.contains(&unused.to_string()), "{tarball}: {error}");
    }
}

#[test]
fn a_package_without_enough_disk_space_is_not_downloaded() {
    let (fetcher, signer) = (Fetcher::new(), Signer::new());
    let count = Arc::new(AtomicUsize::new(0));
    let (signature, downloads) = (signer.sign(b"", &binding(1)), Arc::clone(&count));
    let server = Server::plain(move |request| match request.path.ends_with(SIGNATURE_SUFFIX) {
        true => CannedResponse::ok(signature.clone()),
        false => {
            downloads.fetch_add(1, Ordering::SeqCst);
            CannedResponse::status(500)
        }
    });
    let wanted = PackageRequest { size: Some(4 << 30), ..PackageRequest::new(release()) };
    fs::create_dir_all(&fetcher.paths.staging).unwrap();
    let free = crate::platform::free_space(&fetcher.paths.staging).unwrap();
    if free < 16 << 30 {
        let error = fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap_err();
        let staging = fetcher.paths.staging.display().to_string();
        for word in ["not enough disk space", &staging, "free", "needed"] {
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }
    let error = fetch::unwritable(std::io::ErrorKind::StorageFull.into(), Path::new("/x"));
    assert!(error.to_string().contains("no space left in /x"), "{error}");
    let wanted = PackageRequest { size: Some((4 << 30) + 1), ..PackageRequest::new(release()) };
    assert!(fetcher.fetch(&[server.endpoint()], &wanted, &signer.keys()).unwrap_err().contains("more than"));
}

#[test]
fn a_local_package_needs_a_valid_signature() {
    let (fetcher, signer, bytes) = (Fetcher::new(), Signer::new(), archive(10));
    let file = fetcher.directory.path().join("given.tar.zst");
    fs::write(&file, &bytes).unwrap();
    let open = |wanted: &PackageRequest| {
        open_local(&file, wanted, &signer.keys(), &fetcher.paths.staging).map_err(|error| format!("{error:#}"))
    };
    assert!(open(&PackageRequest::new(release())).unwrap_err().contains("given.tar.zst.minisig is missing"));
    fs::write(fetcher.directory.path().join("given.tar.zst.minisig"), signer.sign(&bytes, &binding(9))).unwrap();
    assert_eq!(claimed(&file).unwrap(), Binding { release: release(), epoch: 9 });
    let tree = open(&PackageRequest::new(release())).unwrap();
    assert!(tree.path().join("bin/run").exists() && file.exists());
    assert!(open(&PackageRequest { min_epoch: 10, ..PackageRequest::new(release()) }).unwrap_err().contains("epoch 9"));
    fs::write(&file, archive(11)).unwrap();
    assert!(open(&PackageRequest::new(release())).unwrap_err().contains("tampered with"));
}

#[test]
fn keys_are_stored_without_duplicates_and_shown_by_minisign_id() {
    let published = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    let keys = Keys::parse(&format!("untrusted comment: x\n{published}\n\n{published}")).unwrap();
    assert_eq!(keys.ids().map(|id| id.to_string()).collect::<Vec<_>>(), ["E7620F1842B4E81F"]);
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (Signer::new(), Signer::new());
    let mut both = one.keys();
    both.extend(other.keys()).unwrap();
    both.extend(one.keys()).unwrap();
    both.save_to(&directory.path().join("keys")).unwrap();
    both.save_to(&directory.path().join("keys")).unwrap();
    let loaded = Keys::load(&directory.path().join("keys")).unwrap();
    let sorted = |keys: &Keys| keys.texts().into_iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(sorted(&loaded), sorted(&both));
    assert_eq!(loaded.texts().len(), 2);
    assert_eq!(Keys::parse(&both.texts().concat()).unwrap(), both);
    for bad in ["hello", "untrusted comment: x\nRWQf", &published[1..]] {
        assert!(Keys::parse(bad).is_err(), "{bad}");
    }
    let mut file = File::create(directory.path().join("keys/broken.pub")).unwrap();
    file.write_all(b"hello").unwrap();
    let error = format!("{:#}", Keys::load(&directory.path().join("keys")).unwrap_err());
    assert!(error.contains("broken.pub"), "{error}");
}
