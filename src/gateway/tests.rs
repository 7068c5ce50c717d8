//! Tests of the whole gateway: a real server on loopback, queried over TLS by a client that trusts only its certificate.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};

use super::*;
use crate::store::{self, Access};

/// Long enough for a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: GatewayCommand,
}

/// A gateway's directory that is removed after the test.
pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    pub(super) directory: GatewayDirectory,
}

impl Bench {
    pub(super) fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench { directory: GatewayDirectory::new(dir.path()), dir };
        bench.command("init", &[]);
        bench
    }

    fn command(&self, verb: &str, words: &[&str]) {
        let dir = self.dir.path().display().to_string();
        let words = ["gateway", verb, "--dir", &dir].into_iter().chain(words.iter().copied());
        main(Line::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).command).unwrap();
    }

    fn publish(&self, name: &str, version: &str) {
        let tree = native(&self.dir.path().join(format!("tree-{name}-{version}")), name, version);
        self.command("publish", &["--os", "linux", "--arch", "amd64", &tree.display().to_string()]);
    }

    fn fleet(&self, text: &str) {
        store::replace(&self.directory.fleet(), text.as_bytes(), Access::Public).unwrap();
    }

    fn serve(&self) -> Served {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let (ready_sender, ready_receiver) = std::sync::mpsc::channel::<SocketAddr>();
        let directory = self.directory.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
                let ready = move |address| ready_sender.send(address).unwrap();
                let settle = Duration::from_millis(40);
                let intervals = watch::WatchIntervals { poll: Duration::from_millis(20), settle };
                let reload = Arc::new(tokio::sync::Notify::new());
                serve::serve(directory, listener, intervals, stopped, reload, ready).await
            })
        });
        let address = ready_receiver.recv_timeout(DEADLINE).unwrap();
        Served {
            url: format!("https://localhost:{}", address.port()),
            client: self.client(),
            stop,
            thread: Some(thread),
        }
    }

    fn client(&self) -> ureq::Agent {
        let certificate = fs::read(self.directory.certificate()).unwrap();
        let root = ureq::tls::Certificate::from_pem(&certificate).unwrap();
        let tls = ureq::tls::TlsConfig::builder()
            .root_certs(ureq::tls::RootCerts::new_with_certs(&[root]))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = ureq::Agent::config_builder().tls_config(tls).proxy(None).http_status_as_error(false);
        config.timeout_global(Some(DEADLINE)).build().new_agent()
    }
}

/// The directory of a package with `agent.toml`.
pub(super) fn native(tree: &Path, name: &str, version: &str) -> PathBuf {
    fs::create_dir_all(tree).unwrap();
    let manifest = format!("name = \"{name}\"\nversion = \"{version}\"\n[run]\ncommand = [\"run\"]\n");
    fs::write(tree.join("agent.toml"), manifest).unwrap();
    fs::write(tree.join("run"), format!("{name} {version}\n").repeat(1_000)).unwrap();
    crate::platform::set_mode(&tree.join("run"), 0o755).unwrap();
    tree.to_owned()
}

/// A gateway that runs until it is dropped.
struct Served {
    url: String,
    client: ureq::Agent,
    stop: tokio::sync::watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap().unwrap();
        }
    }
}

struct Got {
    status: u16,
    headers: std::collections::HashMap<String, String>,
    body: Vec<u8>,
}

impl Got {
    fn of(response: ureq::http::Response<ureq::Body>) -> Got {
        let (parts, mut body) = response.into_parts();
        let headers = parts.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
        Got { status: parts.status.as_u16(), headers: headers.collect(), body: body.read_to_vec().unwrap() }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Served {
    fn get(&self, path: &str, headers: &[(&str, &str)]) -> Got {
        let request = self.client.get(format!("{}{path}", self.url));
        Got::of(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).call().unwrap())
    }

    fn head(&self, path: &str) -> Got {
        Got::of(self.client.head(format!("{}{path}", self.url)).call().unwrap())
    }

    fn post(&self, agent_id: Option<&str>, body: &str) -> Got {
        let request = self.client.post(format!("{}/api/heartbeat", self.url));
        let request = agent_id.into_iter().fold(request, |request, id| request.header("x-agent-id", id));
        Got::of(request.send(body).unwrap())
    }

    /// A heartbeat of a host that has the desired state of the answer `held`.
    fn heartbeat(&self, hostname: &str, held: Option<&Value>) -> Value {
        let mut heartbeat = json!({
            "agentId": "5402", "instanceId": "i", "hostname": hostname, "os": "linux", "arch": "amd64",
            "manager": {"version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3},
        });
        if let Some(held) = held {
            heartbeat["lineage"] = held["lineage"].clone();
            heartbeat["generation"] = held["generation"].clone();
        }
        let got = self.post(Some("5402"), &heartbeat.to_string());
        assert_eq!(got.status, 200, "{}", String::from_utf8_lossy(&got.body));
        got.json()
    }

    /// Repeats a request until the answer is as expected.
    fn until<T>(&self, request: impl Fn() -> T, expected: impl Fn(&T) -> bool) -> T
    where
        T: std::fmt::Debug,
    {
        let started = Instant::now();
        loop {
            let got = request();
            if expected(&got) {
                return got;
            }
            assert!(started.elapsed() < DEADLINE, "{got:?}");
            std::thread::yield_now();
        }
    }

    fn last_error(&self) -> Value {
        self.get("/healthz", &[]).json()["fleet"]["lastError"].clone()
    }
}

#[test]
fn a_change_of_the_fleet_reaches_the_host_as_a_new_generation() {
    let bench = Bench::new();
    bench.publish("exporter", "1.0.0");
    bench.publish("exporter", "1.1.0");
    let served = bench.serve();
    let nothing = served.heartbeat("web-1", None);
    assert_eq!(
        (&nothing["agents"], &nothing["complete"], &nothing["interval"]),
        (&json!([]), &json!(false), &json!(30))
    );

    bench.fleet("[agents.exporter]\nversion = \"1.0.0\"\nenv = { A = \"b\" }\n");
    let first = served.until(|| served.heartbeat("web-1", Some(&nothing)), |answer| answer["agents"].is_array());
    let order = &first["agents"][0];
    assert_eq!(
        (&order["name"], &order["version"], &order["cmd"]),
        (&json!("exporter"), &json!("1.0.0"), &json!("start"))
    );
    assert_eq!((&order["env"], &first["complete"]), (&json!({"A": "b"}), &json!(true)));
    assert!(first["generation"].as_u64() > nothing["generation"].as_u64());
    assert_eq!(first["lineage"], nothing["lineage"]);
    let package = served.get(&format!("/api/download/{}", order["file"].as_str().unwrap()), &[]);
    assert_eq!(package.body.len() as u64, order["size"].as_u64().unwrap());
    assert_eq!(package.headers["etag"], format!("\"{}\"", order["sha256"].as_str().unwrap()));

    // The host has it: no list, the same generation. A rule for other hosts changes nothing for it.
    let held = served.heartbeat("web-1", Some(&first));
    assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &first["generation"]));
    bench.fleet(
        "heartbeatInterval = 7\n[agents.exporter]\nversion = \"1.0.0\"\nenv = { A = \"b\" }\n\
         [[rules]]\nmatch = { hostname = [\"db-*\"] }\nagents.exporter.version = \"1.1.0\"\n",
    );
    let held = served.until(|| served.heartbeat("web-1", Some(&first)), |answer| answer["interval"] == json!(7));
    assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &first["generation"]));
    let other = served.heartbeat("db-1", Some(&first));
    assert_eq!(other["agents"][0]["version"], json!("1.1.0"));
    assert!(other["generation"].as_u64() > first["generation"].as_u64());

    // A restarted gateway has the same state.
    drop(served);
    let served = bench.serve();
    let held = served.heartbeat("db-1", Some(&other));
    assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &other["generation"]));
}

#[test]
fn an_invalid_fleet_file_keeps_the_last_good_one_also_after_a_restart() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.publish(name, "1");
    }
    let good = "[agents.a]\nversion = \"1\"\n[agents.b]\nversion = \"1\"\n[agents.c]\nversion = \"1\"\n";
    bench.fleet(good);
    let served = bench.serve();
    let before = served.heartbeat("h", None);
    assert_eq!(before["agents"].as_array().unwrap().len(), 3);
    for (bad, reason) in [
        ("[agents.a]\nverzion = \"1\"\n", "line 2"),
        ("", "no longer names any sub-agent"),
        ("[agents.a]\nversion = \"1\"\n", "removes 2 of 3"),
        ("[agents.a]\nversion = \"1\"\n[agents.b]\nversion = \"2\"\n", "no package of b 2"),
    ] {
        bench.fleet(bad);
        served.until(|| served.last_error(), |error| error.as_str().is_some_and(|error| error.contains(reason)));
        let held = served.heartbeat("h", Some(&before));
        assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &before["generation"]));
    }
    drop(served);
    let served = bench.serve();
    assert!(served.last_error().as_str().unwrap().contains("no package of b 2"));
    let held = served.heartbeat("h", Some(&before));
    assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &before["generation"]));

    // When the package is published, the file is validated again automatically.
    bench.publish("b", "2");
    let changed = served.until(|| served.heartbeat("h", Some(&before)), |answer| answer["agents"].is_array());
    served.until(|| served.last_error(), Value::is_null);
    assert_eq!(changed["agents"].as_array().unwrap().len(), 2);
    assert_eq!(changed["complete"], json!(true));
}

#[test]
fn a_list_with_a_missing_package_is_not_complete() {
    let bench = Bench::new();
    bench.publish("a", "1");
    bench.fleet("[agents.a]\nversion = \"1\"\n");
    let served = bench.serve();
    let body = json!({
        "agentId": "w", "instanceId": "i", "hostname": "h", "os": "windows", "arch": "386",
        "manager": {"version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3},
    });
    let answer = served.post(Some("w"), &body.to_string()).json();
    assert_eq!((&answer["agents"], &answer["complete"]), (&json!([]), &json!(false)));
    assert!(answer["errorMessage"].as_str().unwrap().contains("windows/386 of a 1"));
}

#[test]
fn a_download_resumes_only_with_the_same_content() {
    let bench = Bench::new();
    bench.publish("a", "1");
    let served = bench.serve();
    let path = "/api/download/a-1_linux_amd64.tar.zst";
    let whole = served.get(path, &[]);
    assert_eq!((whole.status, whole.headers["accept-ranges"].as_str()), (200, "bytes"));
    let size = whole.body.len();
    assert_eq!(fs::read(bench.directory.depot().join("a-1_linux_amd64.tar.zst")).unwrap(), whole.body);

    let head = served.head(path);
    assert_eq!((head.status, head.body.len(), &head.headers["content-length"]), (200, 0, &size.to_string()));
    assert_eq!(head.headers["etag"], whole.headers["etag"]);

    let tag = whole.headers["etag"].as_str();
    let rest = served.get(path, &[("range", "bytes=10-"), ("if-range", tag)]);
    assert_eq!((rest.status, &rest.body[..]), (206, &whole.body[10..]));
    assert_eq!(rest.headers["content-range"], format!("bytes 10-{}/{size}", size - 1));
    let other = served.get(path, &[("range", "bytes=10-"), ("if-range", "\"other\"")]);
    assert_eq!((other.status, other.body.len()), (200, size));
    let beyond = served.get(path, &[("range", &format!("bytes={size}-"))]);
    assert_eq!((beyond.status, &beyond.headers["content-range"]), (416, &format!("bytes */{size}")));
    assert_eq!(served.get(path, &[("if-none-match", tag)]).status, 304);

    let signature = served.get(&format!("{path}.minisig"), &[]);
    assert!(String::from_utf8(signature.body).unwrap().contains("name=a version=1 os=linux arch=amd64 epoch=1"));
}

#[test]
fn only_files_of_the_depot_can_be_downloaded() {
    let bench = Bench::new();
    fs::write(bench.directory.depot().join("unsigned-1_linux_amd64.tar.gz"), "x").unwrap();
    let served = bench.serve();
    for name in
        ["..%2Ftls%2Fkey.pem", "%2Fetc%2Fpasswd", "unsigned-1_linux_amd64.tar.gz", ".", "keys%2Faops.pub", "%00", "%ff"]
    {
        let got = served.get(&format!("/api/download/{name}"), &[]);
        assert!(matches!(got.status, 400 | 404), "{name} {}", got.status);
    }
}

#[test]
fn the_current_release_is_the_ordered_one_or_the_newest() {
    let bench = Bench::new();
    bench.publish("a", "1.9.0");
    bench.publish("a", "1.10.0");
    bench.publish("a", "1.2.0");
    let served = bench.serve();
    let offer = served.get("/api/releases/a?os=linux&arch=amd64", &[]);
    assert_eq!((offer.status, &offer.json()["version"]), (200, &json!("1.10.0")));
    assert_eq!(served.get("/api/releases/a?os=linux&arch=386", &[]).status, 404);
    for bad in ["/api/releases/a?os=linux", "/api/releases/a?os=plan9&arch=386", "/api/releases/A?os=linux&arch=386"] {
        let got = served.get(bad, &[]);
        assert_eq!(got.status, 400, "{bad}");
        assert!(got.json()["errorMessage"].is_string());
    }
}

#[test]
fn the_manager_is_ordered_by_version_and_upgraded_if_it_differs() {
    let bench = Bench::new();
    for version in ["1", "2", "3"] {
        let tree = bench.dir.path().join(format!("spm-{version}"));
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::write(tree.join("bin/aops"), version).unwrap();
        let words = ["--name", "aops-spm", "--version", version, "--os", "linux", "--arch", "amd64"];
        let path = tree.display().to_string();
        bench.command("publish", &words.into_iter().chain([path.as_str()]).collect::<Vec<_>>());
    }
    bench.fleet("[manager]\nversion = \"2\"\n[[rules]]\nmatch = { hostname = [\"old\"] }\nmanager.version = \"1\"\n");
    let served = bench.serve();
    let current = served.get("/api/releases/aops-spm?os=linux&arch=amd64", &[]).json();
    assert_eq!((&current["version"], &current["file"]), (&json!("2"), &json!("aops-spm-2_linux_amd64.tar.zst")));
    // The host reports that it runs version 1.
    let new = served.heartbeat("new", None);
    assert_eq!((&new["cmd"], &new["manager"]["version"]), (&json!("upgrade"), &json!("2")));
    assert_eq!(new["manager"]["sha256"], current["sha256"]);
    let old = served.heartbeat("old", None);
    assert_eq!((&old["cmd"], &old["manager"]["version"]), (&Value::Null, &json!("1")));
    assert!(old["generation"].as_u64() > new["generation"].as_u64());
    let bootstrap = served.get("/api/download/aops-agent-service-linux-amd64", &[]);
    assert!(bootstrap.status == 200 && bootstrap.body.starts_with(b"3{"));
}

#[test]
fn status_works_after_the_gateway_has_stopped() {
    let bench = Bench::new();
    let served = bench.serve();
    served.heartbeat("web-1", None);
    drop(served);
    let status = status::gather(&bench.directory).unwrap();
    let status = serde_json::to_value(&status).unwrap();
    assert_eq!(status["running"], json!(false));
    assert_eq!(status["hosts"][0]["hostname"], json!("web-1"));
    assert_eq!(status["hosts"][0]["address"], json!("127.0.0.1"));
    assert!(status["gateway"]["fleet"]["generation"].is_u64());
    bench.command("status", &[]);
}

#[test]
fn invalid_requests_are_rejected_with_a_reason() {
    let bench = Bench::new();
    let served = bench.serve();
    let assert_rejected = |got: Got, status: u16| {
        assert_eq!(got.status, status);
        assert!(got.json()["errorMessage"].is_string());
    };
    let good = json!({
        "agentId": "1", "instanceId": "i", "hostname": "h", "os": "linux", "arch": "amd64",
        "manager": {"version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3}, "newer": {"field": 1},
    });
    assert_rejected(served.post(None, &good.to_string()), 400);
    assert_rejected(served.post(Some("2"), &good.to_string()), 400);
    assert_rejected(served.post(Some("../2"), &good.to_string()), 400);
    assert_rejected(served.post(Some("1"), "{"), 400);
    assert_rejected(served.post(Some("1"), "{}"), 400);
    // The answer is sent before the body is read, so the client may see only a closed connection.
    let large = served.client.post(format!("{}/api/heartbeat", served.url)).header("x-agent-id", "1");
    if let Ok(response) = large.send(&" ".repeat((4 << 20) + 1)) {
        assert_rejected(Got::of(response), 413);
    }
    assert_rejected(served.get("/api/heartbeat", &[]), 405);
    assert_rejected(served.get("/elsewhere", &[]), 404);
    assert_eq!(served.post(Some("1"), &good.to_string()).status, 200);
    assert_eq!(served.get("/healthz", &[]).json()["hosts"], json!(1));
}
