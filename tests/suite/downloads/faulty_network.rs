//! Downloads of packages over a faulty network. Whatever the network does, a download ends complete and correct, fetches little twice, and
//! leaves no files behind; anything that is not a valid package is rejected and reported, and no other sub-agent is affected.
//!
//! `AOPS_DOWNLOADS` sets the number of downloads of the first scenario, `AOPS_DOWNLOADS_SEED` the faults: the same seed gives the same
//! faults.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::support::fault_proxy::{Fault, FaultProxy, Request, random};
use crate::support::files::snapshot;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::{Package, host_platform};
use crate::support::wait::{try_for, wait_for};

/// The size of each of the downloads in the first scenario.
const SIZE: usize = 20 << 20;
/// The number of packages ordered at the same time, and the limit of concurrent downloads.
const ORDERED: usize = 5;
const AT_ONCE: usize = 3;
/// The deadline of one round of downloads, each of which may stall several times and be retried.
const ROUND: Duration = Duration::from_secs(180);
/// The minimum delay after a rejected package: half of the first back-off.
const HELD_BACK: Duration = Duration::from_millis(2500);

/// An incompressible archive that any release may be published from; and the SHA-256 of its content.
fn archive(at: &Path, bytes: usize) -> (PathBuf, Vec<u8>) {
    let mut random = fastrand::Rng::with_seed(1);
    let mut noise = vec![0; bytes];
    random.fill(&mut noise);
    let encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("there is memory");
    let mut tar = tar::Builder::new(encoder);
    let script = match host_platform() {
        ("windows", _) => ("control.bat", &b"@echo stoped\r\n"[..]),
        _ => ("control", &b"#!/bin/sh\necho stoped\n"[..]),
    };
    for (path, mode, content) in [(script.0, 0o755, script.1), ("noise", 0o644, &noise)] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).expect("it goes into memory");
    }
    let packed = tar.into_inner().and_then(zstd::stream::write::Encoder::finish).expect("it goes into memory");
    let file = at.join("noise.tar.zst");
    fs::write(&file, packed).expect("a temporary directory can be written");
    (file, Sha256::digest(&noise).to_vec())
}

/// A host that uses this endpoint, with further settings.
fn joined_by(url: &str, gateway: &Gateway, settings: &str) -> TestHost {
    let host = TestHost::new();
    let trust = gateway.trust();
    let mut arguments = vec!["--agent-id", host.agent_id(), "--endpoint", url];
    arguments.extend(trust.iter().map(String::as_str));
    host.install(&arguments).expect_code(0);
    let config = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&config).expect("it exists");
    fs::write(&config, format!("{text}\n{settings}\n")).expect("it is ours");
    host.control(&["restart"]).expect_code(0);
    host
}

fn publish_archive(gateway: &Gateway, archive: &Path, name: &str, version: &str) {
    let archive = archive.display().to_string();
    let (os, arch) = host_platform();
    let arguments = ["--name", name, "--version", version, "--os", os, "--arch", &arch, &archive];
    gateway.publish_with(&arguments).expect_code(0);
}

fn in_cache(host: &TestHost) -> Vec<String> {
    snapshot(&host.home().join("cache"), &[])
        .keys()
        .map(|path| format!("{path:?}"))
        .filter(|path| path.len() > 4)
        .collect()
}

/// Waits until the cache is empty: a retry of a rejected package may have started, and ends.
#[track_caller]
fn wait_until_cache_is_empty(host: &TestHost) {
    let mut left = Vec::new();
    let empty = try_for(SOON, || {
        left = in_cache(host);
        left.is_empty().then_some(())
    });
    assert!(empty.is_some(), "left in the cache: {left:?}");
}

/// The requests of the first attempt for a rejected package; those of the next attempt, which may have started, must come after a delay.
#[track_caller]
fn first_try(proxy: &FaultProxy, part: &str, requests: usize) -> Vec<Request> {
    let mut asked = proxy.tally(part).requests;
    asked.retain(Request::is_for_package);
    assert!(asked.len() >= requests, "{asked:?}");
    if let Some(next) = asked.get(requests) {
        let pause = next.at - asked[requests - 1].at;
        assert!(pause >= HELD_BACK, "requested again after {pause:?}: {asked:?}");
    }
    asked.truncate(requests);
    asked
}

fn has_version(status: &Value, name: &str, version: &str) -> bool {
    agent(status, name).is_some_and(|agent| agent["version"] == version)
}

/// A number that an environment variable may override.
fn chosen(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().expect("a number"))
}

#[test]
#[allow(clippy::print_stderr, reason = "the seed is shown with a failure, the figures by --nocapture")]
fn downloads_over_a_faulty_network_are_complete_and_correct() {
    let count = chosen("AOPS_DOWNLOADS", 20) as usize;
    let seed = chosen("AOPS_DOWNLOADS_SEED", fastrand::u64(1..1_000_000));
    anstream::eprintln!("{count} downloads with the seed AOPS_DOWNLOADS_SEED={seed}");
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.want(&[]);
    gateway.run();
    let (archive, content) = archive(gateway.path("").as_path(), SIZE);
    let size = fs::metadata(&archive).expect("it exists").len();
    let proxy = FaultProxy::before(&gateway, random(seed, size));
    let host = joined_by(&proxy.url(), &gateway, "downloadStall = \"1s\"");

    let (mut worst, mut damaged, mut faults) = (0.0_f64, 0, BTreeMap::<String, u32>::new());
    for round in 0..count.div_ceil(ORDERED) {
        let names: Vec<String> =
            (0..ORDERED.min(count - round * ORDERED)).map(|number| format!("noise-{number}")).collect();
        let version = format!("1.0.{round}");
        let (os, arch) = host_platform();
        names.iter().for_each(|name| publish_archive(&gateway, &archive, name, &version));
        // Downloaded, unpacked and activated, but not run.
        let wanted: Vec<_> = names.iter().map(|name| (name.as_str(), version.as_str(), "cmd = \"stop\"")).collect();
        gateway.want(&wanted);
        host.wait_for_status(&format!("{version} of {names:?}, seed {seed}"), ROUND, |status| {
            names.iter().all(|name| has_version(status, name, &version))
        });
        for name in &names {
            let got = fs::read(host.home().join(format!("agents/{name}/{version}/noise"))).expect("it is unpacked");
            assert_eq!(Sha256::digest(got).to_vec(), content, "{name} {version}, seed {seed}");
            let file = format!("{name}-{version}_{os}_{arch}.tar.zst");
            let tally = proxy.tally(&file);
            let share = tally.bytes as f64 / size as f64;
            let most = 1.3 + f64::from(tally.damaged);
            assert!(tally.damaged <= 1 && share <= most, "{file} came {share} times, seed {seed}: {:?}", tally.faults);
            worst = worst.max(share - f64::from(tally.damaged));
            damaged += tally.damaged;
            for fault in tally.faults {
                let kind = format!("{fault:?}").split([' ', '{']).next().unwrap_or_default().to_owned();
                *faults.entry(kind).or_default() += 1;
            }
            for suffix in ["", ".minisig"] {
                fs::remove_file(gateway.path("depot").join(format!("{file}{suffix}"))).expect("it was published");
            }
        }
        wait_until_cache_is_empty(&host);
    }
    assert!(proxy.most_at_once() <= AT_ONCE, "{} packages at the same time, seed {seed}", proxy.most_at_once());
    anstream::eprintln!(
        "each byte at most {worst:.3} times, beside {damaged} of {count} that came damaged and were refetched; {faults:?}"
    );
}

#[test]
fn at_most_three_packages_are_downloaded_at_the_same_time() {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    let (archive, _) = archive(gateway.path("").as_path(), 4 << 20);
    let names: Vec<String> = (0..ORDERED).map(|number| format!("noise-{number}")).collect();
    names.iter().for_each(|name| publish_archive(&gateway, &archive, name, "1.0.0"));
    gateway.want(&names.iter().map(|name| (name.as_str(), "1.0.0", "cmd = \"stop\"")).collect::<Vec<_>>());
    gateway.run();
    // Each takes two seconds, so all concurrent downloads overlap.
    let proxy = FaultProxy::before(&gateway, |request, _| match request.path.contains("/noise-") {
        true => Fault::Throttle { per_second: 2 << 20, up_to: u64::MAX },
        false => Fault::None,
    });
    let host = joined_by(&proxy.url(), &gateway, "");
    host.wait_for_status("all of them", ROUND, |status| names.iter().all(|name| has_version(status, name, "1.0.0")));
    assert_eq!(proxy.most_at_once(), AT_ONCE);
}

#[test]
fn downloads_that_are_no_longer_ordered_are_cancelled_at_once() {
    let gateway = Gateway::with(&[], &[]);
    let (archive, _) = archive(gateway.path("").as_path(), 1 << 20);
    let names: Vec<String> = (0..ORDERED).map(|number| format!("noise-{number}")).collect();
    let order = |version: &str| {
        names.iter().for_each(|name| publish_archive(&gateway, &archive, name, version));
        gateway.want(&names.iter().map(|name| (name.as_str(), version, "cmd = \"stop\"")).collect::<Vec<_>>());
    };
    order("1.0.0");
    // Every download that may wait at the same time: for the head of the response, or for the rest.
    let proxy = FaultProxy::before(&gateway, |request, _| match request.is_for_package() {
        true if request.path.contains("/noise-0-1.0.0") => Fault::Mute,
        true if request.path.contains("-1.0.0") && request.path.contains("/noise-") => Fault::Stall { after: 1 << 19 },
        _ => Fault::None,
    });
    let host = joined_by(&proxy.url(), &gateway, "downloadStall = \"10m\"");
    wait_for("downloads that wait", SOON, || (proxy.most_at_once() == AT_ONCE).then_some(()));
    order("2.0.0");
    host.wait_for_status("the other version", SOON, |status| {
        names.iter().all(|name| has_version(status, name, "2.0.0"))
    });
}

#[test]
fn a_download_is_resumed_with_its_progress_after_the_manager_is_killed() {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.want(&[]);
    gateway.run();
    let (archive, _) = archive(gateway.path("").as_path(), SIZE);
    let size = fs::metadata(&archive).expect("it exists").len();
    let proxy = FaultProxy::before(&gateway, |request, before| match request.is_for_package() && before == 0 {
        true if request.path.contains("noise") => Fault::Throttle { per_second: 1 << 20, up_to: u64::MAX },
        _ => Fault::None,
    });
    let host = joined_by(&proxy.url(), &gateway, "");
    publish_archive(&gateway, &archive, "noise", "1.0.0");
    gateway.want(&[("noise", "1.0.0", "cmd = \"stop\"")]);
    let status = host.wait_for_status("a good part of the download", ROUND, |status| {
        agent(status, "noise").is_some_and(|agent| agent["download"]["bytes"].as_u64() > Some(size / 4))
    });
    let download = &agent(&status, "noise").expect("it exists")["download"];
    assert_eq!((&download["version"], download["totalBytes"].as_u64()), (&"1.0.0".into(), Some(size)), "{status:#}");
    assert_eq!(agent(&status, "noise").expect("it exists")["state"], "updating");
    assert!(host.control(&["status"]).stdout.contains("downloading 1.0.0: "));

    let manager = pid(&status["spm"]["pid"]).expect("it runs");
    host.kill(manager);
    let status = host.wait_for_status("the whole of it", ROUND, |status| has_version(status, "noise", "1.0.0"));
    assert_ne!(pid(&status["spm"]["pid"]), Some(manager));
    let tally = proxy.tally("tar.zst");
    let asked: Vec<_> =
        tally.requests.iter().filter(|request| request.path.contains("noise") && request.is_for_package()).collect();
    assert_eq!(asked.len(), 2, "{asked:?}");
    let from = asked[1].header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    assert!(from > Some(size / 4) && asked[1].header("if-range").is_some(), "{asked:?}");
    let fetched = proxy.tally("noise-1.0.0").bytes;
    assert!(fetched <= size + size / 50 + 4096, "{fetched} of {size}");
    wait_until_cache_is_empty(&host);
}

/// What happens to the responses for a sub-agent's packages; replaced for each attack.
type Plan = Box<dyn Fn(&Request, usize) -> Fault + Send>;

/// A running sub-agent, and releases of it whose downloads are manipulated.
struct ManipulatedDownloads {
    gateway: Gateway,
    proxy: FaultProxy,
    host: TestHost,
    pid: u32,
    /// What happens to the next package.
    plan: Arc<Mutex<Plan>>,
}

impl ManipulatedDownloads {
    fn start(settings: &str) -> ManipulatedDownloads {
        let gateway = Gateway::with(&[&Package::sleeper("native", "1.0.0")], &[("native", "1.0.0", "")]);
        let plan: Arc<Mutex<Plan>> = Arc::new(Mutex::new(Box::new(|_, _| Fault::None)));
        let of_next = Arc::clone(&plan);
        let proxy = FaultProxy::before(&gateway, move |request, before| {
            let plan = of_next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if request.path.contains("/native-") { plan(request, before) } else { Fault::None }
        });
        let host = joined_by(&proxy.url(), &gateway, settings);
        let pid = host.wait_for_agent("native");
        ManipulatedDownloads { gateway, proxy, host, pid, plan }
    }

    /// Orders that version and manipulates its download; it is rejected with these words, and the running release continues.
    #[track_caller]
    fn is_refused(&self, version: &str, words: &[&str], plan: impl Fn(&Request, usize) -> Fault + Send + 'static) {
        *self.plan.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Box::new(plan);
        let mut noise = vec![0; 3 << 20];
        fastrand::fill(&mut noise);
        self.gateway.publish(&Package::sleeper("native", version).with_file("noise", noise, 0o644));
        self.gateway.want(&[("native", version, "")]);
        let status = self.host.wait_for_status(&format!("{version} to be refused with {words:?}"), ROUND, |status| {
            let error = agent(status, "native").map(|agent| agent["lastError"].to_string()).unwrap_or_default();
            error.contains(version) && words.iter().all(|word| error.contains(word))
        });
        let native = agent(&status, "native").expect("it exists");
        assert_eq!((&native["version"], pid(&native["pid"])), (&"1.0.0".into(), Some(self.pid)), "{status:#}");
        wait_for("the gateway to receive it", SOON, || {
            let status = self.gateway.status();
            let events = status["hosts"][0]["events"].as_array()?.clone();
            let said = |event: &Value| event["message"].as_str().is_some_and(|said| said.contains(words[0]));
            events
                .iter()
                .any(|event| event["version"] == version && event["outcome"] != "ok" && said(event))
                .then_some(())
        });
    }
}

#[test]
fn manipulated_downloads_are_rejected_and_reported_and_running_sub_agents_continue() {
    let attacked = ManipulatedDownloads::start("downloadStall = \"1s\"\ndownloadTimeout = \"6s\"");
    let instead = |head: &str, body: &[u8], endless| Fault::Instead {
        head: format!("HTTP/1.1 {head}\r\n\r\n"),
        body: body.to_vec(),
        endless,
    };
    let packages = |fault: Fault| {
        move |request: &Request, _: usize| if request.is_for_package() { fault.clone() } else { Fault::None }
    };

    // Endless data, without a length or with a wrong one.
    let endless = instead("200 OK\r\nconnection: close", &[0; 65536], true);
    attacked.is_refused("2.0.0", &["the package has more than"], packages(endless));
    let endless = attacked.proxy.tally("native-2.0.0");
    let tries = endless.requests.iter().filter(|request| request.is_for_package()).count() as u64;
    assert!(endless.bytes < tries * (16 << 20), "{} bytes in {tries} tries", endless.bytes);
    wait_until_cache_is_empty(&attacked.host);

    // A wrong announced size.
    attacked.is_refused("2.0.1", &["were announced"], packages(Fault::WrongLength { by: 1 }));
    attacked.is_refused("2.0.2", &["were announced"], packages(Fault::WrongLength { by: -1 }));

    // A slow drip, of the body and of the head.
    attacked.is_refused("2.0.3", &["downloadTimeout"], packages(Fault::Throttle { per_second: 100, up_to: u64::MAX }));
    let drip = |request: &Request, _: usize| match request.is_for_package() {
        true => Fault::Mute,
        false => Fault::None,
    };
    attacked.is_refused("2.0.4", &["nothing was received for 1s"], drip);

    // A page of a captive portal instead of the package or its signature.
    attacked.is_refused("2.0.5", &["answered with its own page", "noProxy"], packages(Fault::Portal));
    attacked.is_refused("2.0.6", &["answered with its own page"], |_, _| Fault::Portal);

    // Redirects: to another host, to plain http, and in a loop. The other host gets no identity and no request.
    let elsewhere = TcpListener::bind("127.0.0.1:0").expect("a free port");
    elsewhere.set_nonblocking(true).expect("it is ours");
    let away = format!(
        "302 Found\r\ncontent-length: 0\r\nlocation: https://{}/x",
        elsewhere.local_addr().expect("it is bound")
    );
    attacked.is_refused("2.0.7", &["redirect", "a different host"], packages(instead(&away, b"", false)));
    let own = attacked.proxy.url().replace("https://", "http://");
    let plain = format!("302 Found\r\ncontent-length: 0\r\nlocation: {own}/x");
    attacked.is_refused("2.0.8", &["redirect", "plain http"], packages(instead(&plain, b"", false)));
    let (os, arch) = host_platform();
    let round = format!("302 Found\r\ncontent-length: 0\r\nlocation: /api/download/native-2.0.9_{os}_{arch}.tar.zst");
    attacked.is_refused("2.0.9", &["redirects"], packages(instead(&round, b"", false)));
    assert!(elsewhere.accept().is_err(), "the redirect target got a request");

    // Cut, and continued with other bytes under the same name and tag: fetched again once only.
    let depot = attacked.gateway.path("depot");
    attacked.is_refused("2.1.0", &["tampered with"], move |request, _| match request.header("range") {
        _ if !request.is_for_package() => Fault::None,
        None => Fault::Cut { after: 2 << 20 },
        Some(range) => {
            let file = depot.join(request.path.trim_start_matches("/api/download/"));
            let size = fs::metadata(file).expect("it is published").len();
            let from: u64 = range.trim_start_matches("bytes=").trim_end_matches('-').parse().expect("a number");
            let tag = request.header("if-range").expect("the field names a file");
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\netag: {tag}\r\ncontent-length: {}\r\n\
                 content-range: bytes {from}-{}/{size}\r\n\r\n",
                size - from,
                size - 1
            );
            Fault::Instead { head, body: vec![7; (size - from) as usize], endless: false }
        }
    });
    let asked = first_try(&attacked.proxy, "native-2.1.0", 4);
    let wholes = asked.iter().filter(|request| request.header("range").is_none()).count();
    assert_eq!(wholes, 2, "{asked:?}");

    // When the network works again, the release is installed.
    *attacked.plan.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Box::new(|_, _| Fault::None);
    attacked.host.wait_for_status("the release", ROUND, |status| has_version(status, "native", "2.1.0"));
    // Nothing of the rejected releases is left.
    wait_until_cache_is_empty(&attacked.host);
}

#[test]
fn a_damaged_package_is_fetched_again_once_and_then_delayed() {
    let attacked = ManipulatedDownloads::start("");
    let damaged = Arc::new(AtomicBool::new(true));
    let is_damaged = Arc::clone(&damaged);
    attacked.is_refused("2.0.0", &["tampered with"], move |request, _| {
        match request.is_for_package() && is_damaged.load(Ordering::SeqCst) {
            true => Fault::Corrupt { at: 1 << 20 },
            false => Fault::None,
        }
    });
    first_try(&attacked.proxy, "native-2.0.0", 2);
    wait_until_cache_is_empty(&attacked.host);
    damaged.store(false, Ordering::SeqCst);
    attacked.host.wait_for_status("the release", ROUND, |status| has_version(status, "native", "2.0.0"));
    wait_until_cache_is_empty(&attacked.host);
}
