//! Tests of downloads over slow and unreliable networks, and with faulty servers.

use std::sync::atomic::AtomicBool;

use super::*;

#[test]
fn a_damaged_package_is_fetched_again_from_the_next_source_or_the_same_one() {
    let bytes = archive(1000);
    let (keys, signature) = signed(&bytes);
    let count = Arc::new(AtomicUsize::new(0));
    let damaging = |times: usize| {
        let (bytes, signature, count) = (bytes.clone(), signature.clone(), Arc::clone(&count));
        Server::plain(move |request| {
            if request.path.ends_with(SIGNATURE_SUFFIX) {
                return CannedResponse::ok(signature.clone());
            }
            let mut sent = bytes.clone();
            sent[500] ^= u8::from(count.fetch_add(1, Ordering::SeqCst) < times);
            CannedResponse { headers: vec![("etag", "\"a\"".to_owned())], ..CannedResponse::ok(sent) }
        })
    };
    let requests = || count.swap(0, Ordering::SeqCst);
    let wanted = PackageRequest::new(release());

    let (fetcher, once) = (Fetcher::new(), damaging(1));
    fetcher.fetch(&[once.endpoint()], &wanted, &keys).unwrap();
    assert_eq!(requests(), 2);

    let (always, good, without_package) =
        (damaging(100), depot(bytes.clone(), signature.clone()), Server::plain(|_| CannedResponse::status(404)));
    fetcher.fetch(&[always.endpoint(), good.endpoint()], &wanted, &keys).unwrap();
    assert_eq!(requests(), 1);
    for endpoints in [vec![always.endpoint()], vec![always.endpoint(), without_package.endpoint()]] {
        let error = fetcher.fetch(&endpoints, &wanted, &keys).unwrap_err();
        assert!(error.contains("tampered with") && error.contains(&always.endpoint().to_string()), "{error}");
        assert_eq!(requests(), 2);
        assert_eq!(entries(&fetcher.paths.cache).unwrap().len(), 0);
    }
    // Damaged data from two sources does not use up the attempt at the third; the number of damaged downloads is limited.
    let (other, third) = (damaging(100), damaging(100));
    fetcher.fetch(&[always.endpoint(), other.endpoint(), good.endpoint()], &wanted, &keys).unwrap();
    assert_eq!(requests(), 2);
    fetcher.fetch(&[always.endpoint(), other.endpoint(), third.endpoint()], &wanted, &keys).unwrap_err();
    assert_eq!(requests(), 4);

    // The second source's data is damaged in transit, once.
    let (spoilt, bytes, signature) = (AtomicBool::new(false), bytes.clone(), signature.clone());
    let once = Server::plain(move |request| {
        let mut sent = bytes.clone();
        match request.path.ends_with(SIGNATURE_SUFFIX) {
            true => return CannedResponse::ok(signature.clone()),
            false => sent[500] ^= u8::from(!spoilt.swap(true, Ordering::SeqCst)),
        }
        CannedResponse::ok(sent)
    });
    fetcher.fetch(&[always.endpoint(), once.endpoint()], &wanted, &keys).unwrap();
    assert_eq!(requests(), 2);
}

#[test]
fn a_response_that_is_not_part_of_the_file_leaves_the_partial_file_unchanged() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (count, whole) = (AtomicUsize::new(0), bytes.clone());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ranges);
    let server = Server::plain(move |request| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        seen.lock().unwrap().push(request.headers.get("range").cloned());
        let part = |from: usize, etag: &str, said: String| CannedResponse {
            status: 206,
            headers: vec![("etag", etag.to_owned()), ("content-range", said)],
            ..CannedResponse::ok(whole[from..].to_vec())
        };
        let right = format!("bytes 300000-{}/{}", whole.len() - 1, whole.len());
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => CannedResponse {
                headers: vec![("etag", "\"a\"".to_owned())],
                cut_after: Some(300_000),
                ..CannedResponse::ok(whole.clone())
            },
            // An HTML page, and a body of the wrong size, both with status 200.
            1 => CannedResponse {
                headers: vec![("content-type", "Text/HTML; charset=x".to_owned())],
                ..CannedResponse::ok("<html>")
            },
            2 => CannedResponse::ok(vec![0; 1000]),
            3 => CannedResponse::status(503),
            _ => part(300_000, "\"a\"", right),
        }
    });
    let (fetcher, wanted) =
        (Fetcher::new(), PackageRequest { size: Some(bytes.len() as u64), ..PackageRequest::new(release()) });
    fetcher.fetch(&[server.endpoint()], &wanted, &keys).unwrap();
    let ranges = ranges.lock().unwrap();
    assert_eq!(ranges.len(), 5);
    assert!(ranges[1..].iter().all(|range| range.as_deref() == Some("bytes=300000-")), "{ranges:?}");
}

#[test]
fn a_range_of_another_file_is_not_appended() {
    let bytes = archive(1000);
    let (keys, signature) = signed(&bytes);
    let size = bytes.len();
    for said in [
        (Some("\"b\""), format!("bytes 500-{}/{size}", size - 1)),
        // The origin of the partial file is unknown, so the server must confirm the ETag.
        (None, format!("bytes 500-{}/{size}", size - 1)),
        (Some("\"a\""), format!("bytes 400-{}/{size}", size - 1)),
        (Some("\"a\""), format!("bytes 500-{size}/{size}")),
        (Some("\"a\""), "nonsense".to_owned()),
    ] {
        let (fetcher, whole, signature, sent) = (Fetcher::new(), bytes.clone(), signature.clone(), said.clone());
        fetcher.leave_partial(&bytes[..500], Some("\"a\""));
        let server = Server::plain(move |request| {
            if request.path.ends_with(SIGNATURE_SUFFIX) {
                return CannedResponse::ok(signature.clone());
            }
            if !request.headers.contains_key("range") {
                return CannedResponse::status(404);
            }
            let mut headers = vec![("content-range", sent.1.clone())];
            headers.extend(sent.0.map(|etag| ("etag", etag.to_owned())));
            CannedResponse { status: 206, headers, ..CannedResponse::ok(vec![b'x'; whole.len() - 500]) }
        });
        // The whole file is requested; the bytes of the range were not used.
        let error = fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &keys).unwrap_err();
        assert!(error.contains("package not found") && !error.contains("tampered"), "{said:?}: {error}");
    }
}

#[test]
fn an_html_page_leaves_the_partial_file_of_a_package_of_unknown_size_unchanged() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (count, rest) = (AtomicUsize::new(0), bytes[300_000..].to_vec());
    let said = format!("bytes 300000-{}/{}", bytes.len() - 1, bytes.len());
    let server = Server::plain(move |request| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        assert_eq!(request.headers.get("range").map(String::as_str), Some("bytes=300000-"));
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            return CannedResponse {
                headers: vec![("content-type", "text/html".to_owned())],
                ..CannedResponse::ok("<html>")
            };
        }
        let headers = vec![("etag", "\"a\"".to_owned()), ("content-range", said.clone())];
        CannedResponse { status: 206, headers, ..CannedResponse::ok(rest.clone()) }
    });
    let fetcher = Fetcher::new();
    fetcher.leave_partial(&bytes[..300_000], Some("\"a\""));
    fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &keys).unwrap();
}

#[test]
fn a_long_retry_after_ends_the_fetch() {
    let bytes = archive(10);
    let (keys, signature) = signed(&bytes);
    let count = Arc::new(AtomicUsize::new(0));
    let requests = Arc::clone(&count);
    let server = Server::plain(move |request| match request.path.ends_with(SIGNATURE_SUFFIX) {
        true => CannedResponse::ok(signature.clone()),
        false => {
            requests.fetch_add(1, Ordering::SeqCst);
            CannedResponse { headers: vec![("retry-after", "120".to_owned())], ..CannedResponse::status(429) }
        }
    });
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let error = fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |_, _| true)
        .unwrap_err();
    let unavailable = error.downcast_ref::<Unavailable>().expect("it is the source that failed");
    assert_eq!(unavailable.retry_after, Some(Duration::from_secs(120)));
    assert!(format!("{error:#}").contains("retry after 2m"), "{error:#}");
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[test]
fn a_download_that_timed_out_is_resumed_by_the_next_one() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (count, whole, tag) = (AtomicUsize::new(0), bytes.clone(), vec![("etag", "\"a\"".to_owned())]);
    let server = Server::plain(move |request| {
        if request.path.ends_with(SIGNATURE_SUFFIX) {
            return CannedResponse::ok(signature.clone());
        }
        let from: usize = request.headers.get("range").map_or(0, |range| range[6..range.len() - 1].parse().unwrap());
        let mut headers = tag.clone();
        headers.push(("content-range", format!("bytes {from}-{}/{}", whole.len() - 1, whole.len())));
        let drip = (count.fetch_add(1, Ordering::SeqCst) == 0).then_some((100_000, Duration::from_millis(20)));
        CannedResponse {
            status: if from > 0 { 206 } else { 200 },
            headers,
            body: whole[from..].to_vec(),
            drip,
            ..CannedResponse::default()
        }
    });
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let context = FetchContext { timeout: Duration::from_secs(1), ..fetcher.fetch_context(&endpoints, &keys) };
    let start = Instant::now();
    let error = fetch(&context, &PackageRequest::new(release()), &mut |_, _| true).unwrap_err();
    assert!(format!("{error:#}").contains("within 1s (downloadTimeout)"), "{error:#}");
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(fs::metadata(fetcher.paths.cache.join(format!("{FILE}.part"))).unwrap().len() >= 100_000);
    let mut first = None;
    let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |done, _| {
        if done > 0 {
            first.get_or_insert(done);
        }
        true
    });
    tree.unwrap();
    assert!(first >= Some(100_000), "{first:?}");
}

#[test]
fn a_cancelled_download_keeps_the_partial_file() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (server, _) = interrupting(bytes, signature, "\"a\"", 0, 0);
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    let error = fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |done, _| {
        done < 100_000
    });
    assert!(format!("{:#}", error.unwrap_err()).contains("no longer wanted"));
    assert_eq!(entries(&fetcher.paths.cache).unwrap().len(), 2);
}

#[test]
fn downloads_share_the_rate_limit() {
    let bytes = archive(150_000);
    let (keys, signature) = signed(&bytes);
    let server = depot(bytes.clone(), signature);
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    fetcher.limits.limit(Some(200_000));
    let start = Instant::now();
    for _ in 0..2 {
        fetch(&fetcher.fetch_context(&endpoints, &keys), &PackageRequest::new(release()), &mut |_, _| true).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(1400), "{:?}", start.elapsed());
    fetcher.limits.limit(None);
    assert_eq!(fetcher.limits.take(1 << 30), Duration::ZERO);
}

#[test]
fn a_download_reserves_disk_space_until_it_is_unpacked() {
    let bytes = archive(400_000);
    let (keys, signature) = signed(&bytes);
    let (server, size) = (depot(bytes.clone(), signature), bytes.len() as u64);
    let (fetcher, endpoints) = (Fetcher::new(), [server.endpoint()]);
    for announced in [Some(size), None] {
        let mut seen = Vec::new();
        let wanted = PackageRequest { size: announced, ..PackageRequest::new(release()) };
        let tree = fetch(&fetcher.fetch_context(&endpoints, &keys), &wanted, &mut |done, _| {
            seen.push((done, fetcher.limits.disk.reserved()));
            true
        });
        tree.unwrap();
        assert_eq!(seen.iter().find(|(_, reserved)| *reserved > 0), Some(&(0, 4 * size)));
        assert_eq!(seen.iter().find(|(done, _)| *done == size), Some(&(size, 3 * size)));
        // Unpacked bytes are no longer reserved.
        assert!(seen.last().is_some_and(|(done, reserved)| *done == size && *reserved < 3 * size), "{seen:?}");
        assert_eq!(fetcher.limits.disk.reserved(), 0);
    }
    // Space reserved by others is not available; the fetch waits until its time limit.
    fs::create_dir_all(&fetcher.paths.staging).unwrap();
    let free = crate::platform::free_space(&fetcher.paths.staging).unwrap();
    // It needs four times its size, and twice its size is left.
    let size = (free / 16).min(1 << 30);
    let soon = Instant::now() + Duration::from_secs(5);
    let mut others = PackageSpace::new(&fetcher.limits.disk, &fetcher.paths.staging, soon);
    others.reserve((free - (64 << 20) - 2 * size) / 4, &mut || Ok(())).unwrap();
    let wanted = PackageRequest { size: Some(size), ..PackageRequest::new(release()) };
    let context = FetchContext { timeout: Duration::from_millis(200), ..fetcher.fetch_context(&endpoints, &keys) };
    let error = format!("{:#}", fetch(&context, &wanted, &mut |_, _| true).unwrap_err());
    assert!(error.contains("for other downloads"), "{error}");
    drop(others);
}

#[test]
fn a_download_follows_no_redirect_to_another_host_and_sends_it_no_agent_id() {
    let bytes = archive(10);
    let (keys, signature) = signed(&bytes);
    let stolen = Server::plain(|_| CannedResponse::ok("stolen"));
    let elsewhere = stolen.endpoint().url("/x");
    let ids = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ids);
    let server = Server::plain(move |request| {
        seen.lock().unwrap().push((request.path.clone(), request.headers.contains_key("x-agent-id")));
        let to = |directory: String| CannedResponse {
            headers: vec![("location", directory)],
            ..CannedResponse::status(302)
        };
        match request.path.strip_prefix("/api/download/") {
            Some(file) => to(format!("/moved/{file}")),
            None if request.path.starts_with("/away") => to(elsewhere.clone()),
            None if request.path.ends_with(SIGNATURE_SUFFIX) => CannedResponse::ok(signature.clone()),
            None => CannedResponse::ok(bytes.clone()),
        }
    });
    let fetcher = Fetcher::new();
    fetcher.fetch(&[server.endpoint()], &PackageRequest::new(release()), &keys).unwrap();
    assert!(ids.lock().unwrap().iter().all(|(_, response)| *response), "{ids:?}");
    ids.lock().unwrap().clear();

    // The tarball's server is not one of the endpoints.
    let tarball = Some(server.endpoint().url("/away"));
    let unused = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let ours = format!("http://{unused}").parse().unwrap();
    let error =
        fetcher.fetch(&[ours], &PackageRequest { tarball, ..PackageRequest::new(release()) }, &keys).unwrap_err();
    assert!(error.contains("a different host"), "{error}");
    assert!(ids.lock().unwrap().iter().all(|(_, response)| !response), "{ids:?}");
    assert_eq!(stolen.connections(), 0);
}
