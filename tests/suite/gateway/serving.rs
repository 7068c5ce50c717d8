//! The gateway for operators and hosts: what it serves and to whom, and which operator errors it must survive.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::https::Https;
use crate::support::package::{Package, arch};
use crate::support::wait::wait_for;

/// A heartbeat of a host that holds the desired state of `held`.
fn heartbeat(id: &str, hostname: &str, (os, arch): (&str, &str), held: &Value) -> Value {
    json!({
        "agentId": id, "instanceId": format!("instance-of-{id}"), "hostname": hostname, "os": os, "arch": arch,
        "manager": { "version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3 },
        "lineage": held["lineage"], "generation": held["generation"].as_u64().unwrap_or(0),
    })
}

/// The answer to a host without a desired state.
fn first_answer(https: &Https) -> Value {
    let response = https.heartbeat(&heartbeat("5402", "web-1", ("linux", arch()), &Value::Null));
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

/// The sub-agents of an answer, each with its version.
fn agents(answer: &Value) -> Vec<String> {
    let orders = answer["agents"].as_array().expect("the answer has a list");
    orders
        .iter()
        .map(|order| format!("{} {}", order["name"].as_str().unwrap_or("?"), order["version"].as_str().unwrap_or("?")))
        .collect()
}

#[test]
fn an_invalid_fleet_file_changes_nothing_and_is_reported_until_it_is_fixed() {
    let mut gateway = Gateway::stopped();
    for (name, version) in [("a", "1"), ("b", "1"), ("c", "1"), ("c", "2")] {
        gateway.publish(&Package::sleeper(name, version));
    }
    let fleet =
        |c: &str| format!("[agents.a]\nversion = \"1\"\n[agents.b]\nversion = \"1\"\n[agents.c]\nversion = \"{c}\"\n");
    gateway.fleet(&fleet("1"));
    gateway.run();
    let https = Https::to(&gateway);
    let good = first_answer(&https);
    assert_eq!(agents(&good), ["a 1", "b 1", "c 1"]);

    for (bad, reason) in [
        ("[agents.a]\nversion = \"1\"\n[agents.b\n", "line 3"),
        ("[agents.a]\nverzion = \"1\"\n", "verzion"),
        ("[agents.a]\nversion = \"1_0\"\n", "1_0"),
        ("", "it no longer names any sub-agent"),
        (
            "[agents.a]\nversion = \"1\"\n",
            "it removes 2 of 3 sub-agents (b, c); to allow that, set allowRemoval = true",
        ),
        (&fleet("3"), "the depot has no package of c 3; publish it, or choose another version"),
        ("[[rules]]\nmatch = {}\nagents.a.version = \"1\"\n", "the match of rule 1"),
    ] {
        gateway.fleet(bad);
        wait_for(reason, SOON, || {
            let standing = https.get("/healthz").json();
            standing["fleet"]["lastError"].as_str().is_some_and(|error| error.contains(reason)).then_some(())
        });
        assert_eq!(first_answer(&https), good, "{bad}");
        let status = gateway.status();
        assert!(
            status["gateway"]["fleet"]["lastError"].as_str().is_some_and(|error| error.contains(reason)),
            "{status:#}"
        );
        let table = gateway.command(&["status"], &[]).expect_success();
        assert!(table.contains("fleet.toml is rejected") && table.contains(reason), "{table}");
        let log = fs::read_to_string(gateway.log()).expect("the gateway logs");
        assert!(log.contains(reason), "{log}");
    }
    fs::remove_file(gateway.path("fleet.toml")).expect("it exists");
    wait_for("its absence to be noticed", SOON, || {
        let error = https.get("/healthz").json()["fleet"]["lastError"].clone();
        error.as_str().is_some_and(|error| error.contains("does not exist")).then_some(())
    });
    assert_eq!(first_answer(&https), good);

    // Restarted with an invalid file, it keeps its previous answers.
    gateway.fleet("[[");
    assert_eq!(gateway.terminate(), 0);
    gateway.run();
    assert_eq!(first_answer(&https), good);

    gateway.fleet(&fleet("2"));
    let new = wait_for("the fixed file", SOON, || Some(first_answer(&https)).filter(|answer| answer != &good));
    assert_eq!(agents(&new), ["a 1", "b 1", "c 2"]);
    assert!(new["generation"].as_u64() > good["generation"].as_u64());
    assert_eq!(new["lineage"], good["lineage"]);
    wait_for("no error any more", SOON, || https.get("/healthz").json()["fleet"]["lastError"].is_null().then_some(()));

    // The intended change can be made explicitly.
    gateway.fleet("allowRemoval = true\n[agents.c]\nversion = \"2\"\n");
    let fewer = wait_for("the smaller fleet", SOON, || Some(first_answer(&https)).filter(|answer| answer != &new));
    assert_eq!((agents(&fewer), &fewer["complete"]), (vec!["c 2".to_owned()], &json!(true)));
}

#[test]
fn a_fleet_file_is_not_read_while_it_is_written() {
    let mut gateway = Gateway::stopped();
    let names = ["a", "b", "c", "d", "e", "f"];
    names.iter().for_each(|name| gateway.publish(&Package::sleeper(name, "1")));
    let fleet =
        |names: &[&str]| names.iter().map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect::<String>();
    gateway.fleet(&fleet(&names[..1]));
    gateway.run();
    let https = Https::to(&gateway);
    let before = first_answer(&https);
    assert_eq!(agents(&before), ["a 1"]);
    // An editor that writes in place, and slowly: at every moment the file is well-formed and valid.
    let path = gateway.path("fleet.toml");
    let writer = thread::spawn(move || {
        let mut file = OpenOptions::new().write(true).truncate(true).open(path).expect("fleet.toml can be written");
        for name in names {
            for part in [format!("[agents.{name}]\n"), "version = \"1\"\n".to_owned()] {
                file.write_all(part.as_bytes()).expect("fleet.toml can be written");
                thread::park_timeout(Duration::from_millis(150));
            }
        }
    });
    let mut seen = BTreeSet::new();
    let after = wait_for("the whole file", SOON, || {
        let answer = first_answer(&https);
        seen.insert(agents(&answer).len());
        (agents(&answer).len() == names.len()).then_some(answer)
    });
    writer.join().expect("it writes");
    assert_eq!(seen, BTreeSet::from([1, names.len()]));
    assert_eq!(agents(&after).len(), names.len());
}

#[test]
fn hosts_follow_a_restarted_and_a_rebuilt_gateway() {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("0.1.0");
    gateway.publish(&Package::sleeper("a", "1"));
    gateway.fleet("heartbeatInterval = \"1s\"\n[agents.a]\nversion = \"1\"\n");
    gateway.run();
    let host = TestHost::joined(&gateway);
    let pid = host.wait_for_agent("a");
    let generation = host.status()["generation"].clone();
    // The operator's view: the hosts, and the generation that each holds.
    let shown = |gateway: &Gateway| {
        wait_for("the host to be shown", SOON, || {
            let host = gateway.status()["hosts"][0].clone();
            (host["running"] == 1 && host["heldGeneration"] == host["generation"]).then_some(host)
        })
    };
    assert_eq!((&shown(&gateway)["generation"], &shown(&gateway)["agentId"]), (&generation, &json!(host.agent_id())));
    assert_eq!(gateway.terminate(), 0);
    host.wait_for_status("the gateway to be missed", SOON, |status| status["gateway"]["connected"] == false);
    gateway.run();
    let back = host.wait_for_status("the gateway to be back", SOON, |status| status["gateway"]["connected"] == true);
    assert_eq!(back["generation"], generation);

    // Rebuilt from its keys, depot and fleet.toml: the store has a new lineage, and nothing else changes on the host.
    gateway.stop();
    fs::remove_dir_all(gateway.path("state")).expect("it exists");
    gateway.command(&["init"], &[]).expect_success();
    gateway.run();
    let status = host.wait_for_status("the new lineage", SOON, |status| {
        status["gateway"]["connected"] == true && status["generation"].as_u64() > generation.as_u64()
    });
    assert_eq!((&status["state"], &status["problems"]), (&json!("running"), &json!([])));
    assert_eq!(host.wait_for_agent("a"), pid);
    let held = shown(&gateway)["heldGeneration"].clone();
    assert_eq!(held, host.status()["generation"]);
}

#[test]
fn each_host_receives_the_orders_of_its_matching_rules() {
    let mut gateway = Gateway::stopped();
    for version in ["1", "2", "3", "4"] {
        gateway.publish(&Package::sleeper("a", version));
    }
    gateway.publish(&Package::sleeper("extra", "1"));
    gateway.fleet(
        r#"
        [agents.a]
        version = "1"
        env = { BASE = "yes", LEVEL = "low" }
        [[rules]]
        match = { hostname = ["web-*", "www?"] }
        agents.a.version = "2"
        [[rules]]
        match = { agentId = ["54*"], os = ["linux"] }
        agents.a.version = "3"
        agents.a.env = { LEVEL = "high" }
        agents.extra.version = "1"
        [[rules]]
        match = { agentId = ["5499"] }
        agents.a = { version = "4", cmd = "stop" }
        "#,
    );
    gateway.run();
    let https = Https::to(&gateway);
    for (id, hostname, expected) in [
        ("1", "db-1", "a 1 start low"),
        ("1", "web-1", "a 2 start low"),
        ("1", "wwwx", "a 2 start low"),
        ("1", "wwwxy", "a 1 start low"),
        ("5401", "web-1", "a 3 start high, extra 1 start"),
        ("5499", "db-1", "a 4 stop high, extra 1 start"),
    ] {
        let answer = https.heartbeat(&heartbeat(id, hostname, ("linux", arch()), &Value::Null)).json();
        let orders: Vec<_> = answer["agents"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|order| {
                let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let level = word(&order["env"]["LEVEL"]);
                format!("{} {} {} {level}", word(&order["name"]), word(&order["version"]), word(&order["cmd"]))
                    .trim_end()
                    .to_owned()
            })
            .collect();
        assert_eq!(orders.join(", "), expected, "{id} {hostname}");
        assert_eq!(answer["agents"][0]["env"]["BASE"], "yes");
    }
    // A host without packages for its platform gets an error message, and its list is not complete.
    let windows = https.heartbeat(&heartbeat("5402", "w", ("windows", "386"), &Value::Null)).json();
    assert_eq!((&windows["complete"], &windows["agents"]), (&json!(false), &json!([])));
    assert!(windows["errorMessage"].as_str().is_some_and(|text| text.contains("windows/386")), "{windows:#}");
}

#[test]
fn downloads_support_http_ranges_and_only_published_files_are_served() {
    let mut gateway = Gateway::stopped();
    let noise: Vec<u8> = (0..200_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    gateway.publish(&Package::sleeper("a", "1").with_file("noise", &noise, 0o644));
    let unsigned = format!("unsigned-1_linux_{}.tar.gz", arch());
    fs::write(gateway.path(&format!("depot/{unsigned}")), "x").expect("the depot can be written");
    gateway.run();
    let https = Https::to(&gateway);
    let name = format!("a-1_linux_{}.tar.zst", arch());
    let path = &format!("/api/download/{name}");
    let file = fs::read(gateway.path(&format!("depot/{name}"))).expect("it is published");
    let (whole, size) = (https.get(path), file.len());
    assert_eq!((whole.status, &whole.body), (200, &file));
    assert_eq!(
        (whole.header("accept-ranges"), whole.header("content-length")),
        (Some("bytes"), Some(&*size.to_string()))
    );
    let tag = whole.header("etag").expect("a tag").to_owned();

    let head = https.ask("HEAD", path, &[]);
    assert_eq!((head.status, head.body.len(), head.header("etag")), (200, 0, Some(&*tag)));
    assert_eq!(head.header("content-length"), Some(&*size.to_string()));

    let last = size - 1;
    for (range, expected) in [
        ("bytes=0-9".to_owned(), 0..10),
        (format!("bytes=100-{last}"), 100..size),
        ("bytes=100-".to_owned(), 100..size),
        ("bytes=-7".to_owned(), size - 7..size),
        (format!("bytes={last}-{}", size + 1000), last..size),
    ] {
        let part = https.ask("GET", path, &[&format!("range: {range}"), &format!("if-range: {tag}")]);
        assert_eq!((part.status, &part.body[..]), (206, &file[expected.clone()]), "{range}");
        let shown = format!("bytes {}-{}/{size}", expected.start, expected.end - 1);
        assert_eq!(part.header("content-range"), Some(&*shown), "{range}");
    }
    // An invalid range, or one with another tag, gets the whole file; a range beyond the end is rejected.
    for headers in [&["range: lines=1-2"][..], &["range: bytes=9-1"], &["range: bytes=0-1", "if-range: \"of another\""]]
    {
        let answer = https.ask("GET", path, headers);
        assert_eq!((answer.status, answer.body.len()), (200, size), "{headers:?}");
    }
    let beyond = https.ask("GET", path, &[&format!("range: bytes={size}-")]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some(&*format!("bytes */{size}"))));
    assert_eq!(https.ask("GET", path, &[&format!("if-none-match: {tag}")]).status, 304);
    assert_eq!(https.ask("GET", path, &["if-none-match: \"of another\""]).status, 200);

    for name in [
        &unsigned,
        "../fleet.toml",
        "..%2Ffleet.toml",
        "..%2fkeys%2faops.key",
        "%2e%2e/keys/aops.key",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        ".",
        "..",
        "",
        &format!("{name}/"),
        "%00",
        "%ff",
        &format!("{name}%00.minisig"),
        ".new-x",
        &name.replace("a-1", "A-1"),
    ] {
        let answer = https.get(&format!("/api/download/{name}"));
        assert!(matches!(answer.status, 400 | 404), "{name}: {answer:?}");
        assert!(answer.body.len() < 1000, "{name}: {answer:?}");
    }
    for path in [
        "/keys/aops.key",
        "/fleet.toml",
        "/../fleet.toml",
        "/api/../keys/aops.key",
        "/state/hosts.json",
        "/api/download",
    ] {
        assert_eq!(https.get(path).status, 404, "{path}");
    }
    assert_eq!(https.ask("DELETE", path, &[]).status, 405);
}

#[test]
fn two_hundred_concurrent_hosts_are_answered_and_listed() {
    const HOSTS: usize = 200;
    const AT_ONCE: usize = 40;
    let mut gateway = Gateway::stopped();
    gateway.publish(&Package::sleeper("a", "1"));
    gateway.fleet("[agents.a]\nversion = \"1\"\n");
    gateway.run();
    let https = Https::to(&gateway);
    let workers: Vec<_> = (0..AT_ONCE)
        .map(|worker| {
            let https = https.clone();
            thread::spawn(move || {
                for number in (worker..HOSTS).step_by(AT_ONCE) {
                    let (id, name) = (format!("id-{number}"), format!("host-{number}"));
                    let first = https.heartbeat(&heartbeat(&id, &name, ("linux", arch()), &Value::Null)).json();
                    assert_eq!((&first["agentId"], agents(&first).join("")), (&json!(id), "a 1".to_owned()));
                    // A host that holds the generation gets no list again.
                    let second = https.heartbeat(&heartbeat(&id, &name, ("linux", arch()), &first)).json();
                    assert_eq!((&second["generation"], second.get("agents")), (&first["generation"], None));
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().expect("every host is answered"));
    assert_eq!(https.get("/healthz").json()["hosts"], HOSTS);
    let status = wait_for("all of them to be shown", SOON, || {
        let status = gateway.status();
        let hosts = status["hosts"].as_array().expect("a list");
        (hosts.len() == HOSTS && hosts.iter().all(|host| host["heldGeneration"] == host["generation"]))
            .then_some(status)
    });
    let ids: BTreeSet<_> =
        status["hosts"].as_array().expect("a list").iter().map(|host| host["agentId"].clone().to_string()).collect();
    assert_eq!(ids.len(), HOSTS);
    // The gateway still has its hosts after a restart, and in `status` after its exit.
    assert_eq!(gateway.terminate(), 0);
    let after = gateway.status();
    assert_eq!((after["running"].as_bool(), after["hosts"].as_array().map(Vec::len)), (Some(false), Some(HOSTS)));
}

#[test]
fn init_keeps_existing_files_and_published_packages_are_immutable() {
    let gateway = Gateway::stopped();
    gateway.fleet("heartbeatInterval = \"7s\"\n");
    let kept = ["keys/aops.pub", "keys/aops.key", "tls/cert.pem", "tls/key.pem", "fleet.toml"];
    let contents = || kept.map(|name| fs::read(gateway.path(name)).expect("init created it"));
    let before = contents();
    let again = gateway.command(&["init"], &["--name", "other.example"]).expect_success();
    assert_eq!(contents(), before);
    assert!(again.contains("kept") && !again.contains("created") && again.contains("--name has no effect"), "{again}");
    // The next steps can be copied: each command is on one line.
    for words in
        ["aops gateway publish --dir", "aops gateway run --dir", "--trusted-key aops.pub --pin sha256:", "curl -k"]
    {
        assert!(again.contains(words), "no {words:?} in {again}");
    }

    gateway.publish(&Package::sleeper("a", "1"));
    let file = &format!("depot/a-1_linux_{}.tar.zst", arch());
    let published = fs::read(gateway.path(file)).expect("it is published");
    let other = Package::script("a", "1", "exit 1", "");
    let refused = gateway.publish_with(&[&other.path().display().to_string()]).expect_code(1);
    assert!(
        refused.stderr.contains("is published already with different content; choose another version"),
        "{refused}"
    );
    assert_eq!(fs::read(gateway.path(file)).expect("it still exists"), published);
    let unrunnable = Package::native("a", "2", &["bin/gone"], "");
    let refused = gateway.publish_with(&[&unrunnable.path().display().to_string()]).expect_code(1);
    assert!(refused.stderr.contains("bin/gone, which is not in the package"), "{refused}");

    // A package that was signed elsewhere is served with its own signature.
    let elsewhere = Gateway::stopped();
    elsewhere.publish(&Package::sleeper("b", "1"));
    let file = format!("depot/b-1_linux_{}.tar.zst", arch());
    let (archive, signature) = (elsewhere.path(&file), elsewhere.path(&format!("{file}.minisig")));
    let output = gateway.publish_with(&[&archive.display().to_string()]);
    assert!(
        output.success() && output.stderr.contains("warning: the signature is by a key that is not in"),
        "{output}"
    );
    let kept = fs::read(gateway.path(&format!("{file}.minisig"))).expect("it is published");
    assert_eq!(kept, fs::read(signature).expect("it is published there"));
}

#[test]
fn a_gateway_exits_on_a_signal_and_a_second_one_is_rejected() {
    let mut gateway = Gateway::start();
    let second = gateway.command(&["run"], &["--listen", "127.0.0.1:0"]).expect_code(1);
    assert!(second.stderr.contains("another gateway is already running"), "{second}");
    // An idle connection does not delay the exit.
    let idle = std::net::TcpStream::connect(gateway.url().trim_start_matches("https://")).expect("it listens");
    assert_eq!(gateway.terminate(), 0);
    drop(idle);
    assert_eq!(gateway.status()["running"], false);
    gateway.run();
    assert_eq!(Https::to(&gateway).get("/healthz").status, 200);
}
