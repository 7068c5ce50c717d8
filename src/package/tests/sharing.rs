//! Tests of what a download shares: disk space with other downloads, time with other sources, cancellation with its caller.

use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::super::cache::{MAX_PART_AGE, beyond_cap};
use super::super::disk_reservation::tests::reserve_everything;
use super::*;

const MIB: u64 = 1 << 20;

/// Serves the package and its ranges, modified by `modify`, and counts the requests.
fn serving(
    bytes: &[u8],
    signature: &str,
    modify: impl Fn(CannedResponse, usize) -> CannedResponse + Send + Sync + 'static,
) -> (Server, Arc<AtomicUsize>) {
    let (bytes, signature, count) = (bytes.to_vec(), signature.to_owned(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&count);
    let server = Server::plain(move |request| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        let from = request.headers.get("range").map_or(0, |range| range[6..range.len() - 1].parse().unwrap());
        if from == bytes.len() {
            return CannedResponse {
                headers: vec![("content-range", format!("bytes */{from}"))],
                ..CannedResponse::status(416)
            };
        }
        let mut headers = vec![("etag", "\"a\"".to_owned())];
        if from > 0 {
            headers.push(("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())));
        }
        let status = if from > 0 { 206 } else { 200 };
        let response = CannedResponse { status, headers, body: bytes[from..].to_vec(), ..CannedResponse::default() };
        modify(response, counted.fetch_add(1, Ordering::SeqCst))
    });
    (server, count)
}

/// Sends `at_once` bytes at once, then single bytes slowly.
fn dripping(at_once: usize) -> impl Fn(CannedResponse, usize) -> CannedResponse {
    move |response, _| CannedResponse {
        drip: Some((at_once.min(response.body.len()), Duration::from_millis(20))),
        ..response
    }
}

fn without_etag(response: CannedResponse) -> CannedResponse {
    let headers = response.headers.into_iter().filter(|(name, _)| *name != "etag").collect();
    CannedResponse { headers, ..response }
}

fn in_cache(fetcher: &Fetcher) -> usize {
    entries(&fetcher.paths.cache).unwrap().len()
}

#[test]
fn a_slow_source_leaves_time_for_the_next_one() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (slow, requests) = serving(&bytes, &signature, dripping(100_000));
    let (good, _) = serving(&bytes, &signature, |response, _| response);
    let (fetcher, endpoints) = (Fetcher::new(), [slow.endpoint(), good.endpoint()]);
    let context = FetchContext { timeout: Duration::from_secs(4), ..fetcher.fetch_context(&endpoints, &keys) };
    fetch(&context, &PackageRequest::new(release()), &mut |_, _| true).unwrap();
    assert_eq!(requests.load(Ordering::SeqCst), 1);

    // The next source lacks the package: the bytes are kept, and the first source gets the rest of the time.
    let without_package = Server::plain(|_| CannedResponse::status(404));
    let endpoints = [slow.endpoint(), without_package.endpoint()];
    let context = FetchContext { timeout: Duration::from_secs(2), ..fetcher.fetch_context(&endpoints, &keys) };
    let start = Instant::now();
    let error = fetch(&context, &PackageRequest::new(release()), &mut |_, _| true).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(error.is::<Unavailable>() && !is_refusal(&error));
    let error = format!("{error:#}");
    for word in ["none of 3 sources", "share of 2s (downloadTimeout)", "package not found"] {
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(requests.load(Ordering::SeqCst), 3);
    assert!(fs::metadata(fetcher.paths.cache.join(format!("{FILE}.part"))).unwrap().len() >= 100_000);
}

#[test]
fn a_package_of_unknown_size_reserves_space_as_it_arrives() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (server, requests) = serving(&bytes, &signature, |response, _| CannedResponse { no_length: true, ..response });
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let mut min_reserved = u64::MAX;
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |done, _| {
        if (1..bytes.len() as u64).contains(&done) {
            min_reserved = min_reserved.min(fetcher.limits.disk.reserved());
        }
        true
    });
    tree.unwrap();
    assert!((16 * MIB - 400_000..u64::MAX).contains(&min_reserved), "{min_reserved}");

    // Others have reserved the rest: nothing is kept, as it would take space from them.
    let others = reserve_everything(&fetcher.limits.disk);
    let context = FetchContext { timeout: Duration::from_secs(1), ..fetcher.fetch_context(&endpoints, &keys) };
    let error = fetch(&context, &PackageRequest::new(release()), &mut |_, _| true).unwrap_err();
    assert!(format!("{error:#}").contains("not enough disk space") && !is_refusal(&error), "{error:#}");
    assert_eq!((in_cache(&fetcher), requests.load(Ordering::SeqCst)), (0, 2));
    drop(others);
}

#[test]
fn a_package_without_space_to_unpack_is_not_rejected_and_not_downloaded_again() {
    // A small archive that unpacks to much more than is reserved for it.
    let bytes = archive_of(&vec![0; 8 << 20]);
    let (keys, signature) = signed(&bytes);
    let (server, requests) = serving(&bytes, &signature, |response, _| response);
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let wanted = PackageRequest { size: Some(bytes.len() as u64), ..PackageRequest::new(release()) };
    let context = FetchContext { timeout: Duration::from_secs(1), ..fetcher.fetch_context(&endpoints, &keys) };
    let mut others = None;
    for _ in 0..2 {
        let error = fetch(&context, &wanted, &mut |done, total| {
            // There was space for the download.
            if Some(done) == total {
                others.get_or_insert_with(|| reserve_everything(&fetcher.limits.disk));
            }
            true
        });
        let error = error.unwrap_err();
        assert!(format!("{error:#}").contains("not enough disk space") && !is_refusal(&error), "{error:#}");
        assert_eq!((in_cache(&fetcher), entries(&fetcher.paths.staging).unwrap().len()), (2, 0));
    }
    drop(others);
    fetcher.fetch(&endpoints, &wanted, &keys).unwrap();
    assert_eq!((in_cache(&fetcher), requests.load(Ordering::SeqCst)), (0, 1));
}

#[test]
fn a_partial_file_is_resumed_from_its_origin_or_from_a_source_with_the_same_etag() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    // The same origin may omit the ETag.
    let (server, requests) = serving(&bytes, &signature, move |response, before| match before {
        0 => CannedResponse { cut_after: Some(150_000), ..response },
        _ => without_etag(response),
    });
    let (fetcher, wanted, endpoints) = (Fetcher::new(), PackageRequest::new(release()), [server.endpoint()]);
    let mut at = Vec::new();
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &wanted, &mut |done, _| {
        at.push(done);
        true
    });
    tree.unwrap();
    assert!(at.is_sorted() && requests.load(Ordering::SeqCst) == 2, "{at:?}");

    // A different origin that ignores `If-Range` could send the rest of another file.
    let cut =
        |response: CannedResponse, _| CannedResponse { cut_after: Some(30_000.min(response.body.len())), ..response };
    let (broken, _) = serving(&bytes, &signature, cut);
    let (other, requests) = serving(&bytes, &signature, move |response, before| match before {
        0 => without_etag(CannedResponse { body: vec![b'x'; response.body.len()], ..response }),
        _ => response,
    });
    let endpoints = [broken.endpoint(), other.endpoint()];
    let mut at = Vec::new();
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &wanted, &mut |done, _| {
        at.push(done);
        true
    });
    tree.unwrap();
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    // The download restarted before it completed: nothing of the other file was used.
    let (restarted, whole) =
        (at.iter().rposition(|done| *done == 0), at.iter().position(|done| *done == bytes.len() as u64));
    assert!(restarted < whole, "{at:?}");
}

/// Serves the package with its own ETag; sends the whole file if `If-Range` differs; records the requested ranges.
fn strict(
    bytes: &[u8],
    signature: &str,
    etag: &'static str,
    cut_after: Option<usize>,
) -> (Server, Arc<Mutex<Vec<String>>>) {
    let (bytes, signature, requests) = (bytes.to_vec(), signature.to_owned(), Arc::new(Mutex::new(Vec::new())));
    let noted = Arc::clone(&requests);
    let server = Server::plain(move |request| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        let header = |name: &str| request.headers.get(name).cloned().unwrap_or_default();
        noted.lock().unwrap().push(format!("{} {}", header("range"), header("if-range")));
        let is_other = request.headers.get("if-range").is_some_and(|known| known != etag);
        let from = match request.headers.get("range") {
            Some(range) if !is_other => range[6..range.len() - 1].parse().unwrap(),
            _ => 0,
        };
        let mut headers = vec![("etag", etag.to_owned())];
        if from > 0 {
            headers.push(("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())));
        }
        CannedResponse {
            status: if from > 0 { 206 } else { 200 },
            headers,
            body: bytes[from..].to_vec(),
            cut_after,
            ..CannedResponse::default()
        }
    });
    (server, requests)
}

#[test]
fn a_source_with_another_etag_resumes_the_partial_file_if_size_and_hash_are_known() {
    let bytes = archive(2_000_000);
    let (keys, signature) = signed(&bytes);
    let (first, _) = strict(&bytes, &signature, "\"a\"", Some(100_000));
    let (second, requests) = strict(&bytes, &signature, "\"b\"", None);
    let endpoints = [first.endpoint(), second.endpoint()];
    let sha256 = crate::core::text::hex(&Sha256::digest(&bytes));
    let known = |sha256: String| PackageRequest {
        size: Some(bytes.len() as u64),
        sha256: Some(sha256.parse().unwrap()),
        ..PackageRequest::new(release())
    };
    let fetcher = Fetcher::new();
    let mut at = Vec::new();
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &known(sha256), &mut |done, _| {
        at.push(done);
        true
    });
    tree.unwrap();
    assert!(at.is_sorted(), "nothing was fetched twice: {at:?}");
    assert_eq!(*requests.lock().unwrap(), ["bytes=500000- \"a\"", "bytes=500000- "]);

    // Without announced size and hash the parts cannot be checked, so the download starts from the beginning.
    requests.lock().unwrap().clear();
    drop(fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |_, _| true).unwrap());
    assert_eq!(*requests.lock().unwrap(), ["bytes=500000- \"a\""]);
}

#[test]
fn cancellation_interrupts_the_pause_before_a_retry() {
    let bytes = archive(1000);
    let (keys, signature) = signed(&bytes);
    let cancelled = Arc::new(AtomicBool::new(false));
    let cancel = Arc::clone(&cancelled);
    let (server, requests) = serving(&bytes, &signature, move |_, _| {
        cancel.store(true, Ordering::SeqCst);
        CannedResponse { headers: vec![("retry-after", "25".to_owned())], ..CannedResponse::status(503) }
    });
    let (fetcher, endpoints, start) = (Fetcher::new(), [server.endpoint()], Instant::now());
    // The fetch is cancelled during the pause.
    let mut since = 0;
    let progress: &mut Progress<'_> = &mut |_, _| {
        since += u32::from(cancelled.load(Ordering::SeqCst));
        since < 4
    };
    let error =
        fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), progress).unwrap_err();
    assert!(format!("{error:#}").contains("no longer wanted"), "{error:#}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[test]
fn cancellation_interrupts_a_blocked_read() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    for no_length in [false, true] {
        let (server, _) = serving(&bytes, &signature, move |response, _| CannedResponse {
            drip: Some((100_000, Duration::from_secs(60))),
            no_length,
            ..response
        });
        let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
        let client = Client::new(&Trust::Insecure, None, Timeouts::download(Duration::from_secs(50))).unwrap();
        let context = FetchContext { client: &client, ..fetcher.fetch_context(&endpoints, &keys) };
        let (cancelled, received) = (AtomicBool::new(false), AtomicBool::new(false));
        let start = Instant::now();
        std::thread::scope(|scope| {
            let fetching = scope.spawn(|| {
                fetch(&context, &PackageRequest::new(release()), &mut |done, _| {
                    received.fetch_or(done >= 100_000, Ordering::SeqCst);
                    !cancelled.load(Ordering::SeqCst)
                })
            });
            while !received.load(Ordering::SeqCst) && !fetching.is_finished() {
                std::thread::yield_now();
            }
            cancelled.store(true, Ordering::SeqCst);
            client.disconnector().now();
            let error = fetching.join().unwrap().unwrap_err();
            assert!(format!("{error:#}").contains("no longer wanted"), "{error:#}");
        });
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        assert_eq!(in_cache(&fetcher), 2);
    }
}

#[test]
fn cancellation_while_unpacking_keeps_the_downloaded_package() {
    let bytes = archive_of(&vec![0; 8 << 20]);
    let (keys, signature) = signed(&bytes);
    let (server, requests) = serving(&bytes, &signature, |response, _| response);
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let mut since_it_is_there = 0;
    let error =
        fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |done, total| {
            since_it_is_there += u32::from(Some(done) == total);
            since_it_is_there < 50
        });
    assert!(format!("{:#}", error.unwrap_err()).contains("no longer wanted"));
    assert_eq!((in_cache(&fetcher), entries(&fetcher.paths.staging).unwrap().len()), (2, 0));
    fetcher.fetch(&endpoints, &PackageRequest::new(release()), &keys).unwrap();
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[test]
fn a_sweep_clears_staging_old_downloads_and_the_oldest_beyond_the_cap() {
    let fetcher = Fetcher::new();
    sweep(&fetcher.paths).unwrap();
    fs::create_dir_all(fetcher.paths.staging.join("tree-x/y")).unwrap();
    fs::create_dir_all(&fetcher.paths.cache).unwrap();
    let (old, new) = (fetcher.paths.cache.join("old.part"), fetcher.paths.cache.join("new.part"));
    fs::write(&new, "x").unwrap();
    // Closed at once: Windows removes an open file only when it is closed.
    File::create(&old).unwrap().set_modified(SystemTime::now() - MAX_PART_AGE - Duration::from_secs(60)).unwrap();
    sweep(&fetcher.paths).unwrap();
    assert_eq!(fetcher.leftovers(), std::slice::from_ref(&new));

    // While a download is in progress: unneeded files are removed, but not those in use.
    let (signer, bytes) = (Signer::new(), archive(10));
    let (keys, signature) = (signer.keys(), signer.sign(&bytes, &binding(1)));
    fetcher.leave_partial(&bytes, Some("\"a\""));
    let examined = verify::examine(&signature, &keys, &PackageRequest::new(release())).unwrap();
    let open = || {
        let progress: &mut Progress<'_> = &mut |_, _| true;
        PartialDownload::open(
            &fetcher.paths.cache,
            FILE,
            u64::MAX,
            &examined,
            &keys,
            &mut DownloadProgress::new(progress),
        )
    };
    let part = open().unwrap();
    trim(&fetcher.paths.cache, |_| false).unwrap();
    assert_eq!(fetcher.leftovers().len(), 2);
    assert!(format!("{:#}", open().map(|_| ()).unwrap_err()).contains("another download"));
    drop(part);
    trim(&fetcher.paths.cache, |file| file == FILE).unwrap();
    assert_eq!(fetcher.leftovers().len(), 2);
    trim(&fetcher.paths.cache, |_| false).unwrap();
    assert_eq!(fetcher.leftovers(), Vec::<PathBuf>::new());

    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let files = vec![(at(3), 5, "c".into()), (at(1), 5, "a".into()), (at(2), 5, "b".into())];
    assert_eq!(beyond_cap(files.clone(), 15), Vec::<PathBuf>::new());
    assert_eq!(beyond_cap(files.clone(), 14), [PathBuf::from("a")]);
    assert_eq!(beyond_cap(files, 5), [PathBuf::from("a"), "b".into()]);
}
