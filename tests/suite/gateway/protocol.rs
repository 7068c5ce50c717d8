//! The protocol's schema and document agree with a real host, with our gateway, and with a third-party gateway.

mod third_party;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use self::third_party::{Reply, ThirdParty};
use crate::support::aops;
use crate::support::command::{LIMIT, run};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent};
use crate::support::https::Https;
use crate::support::package::{Package, arch};
use crate::support::wait::wait_for;

/// A host that has joined the fleet of a third-party gateway, from a package that this gateway serves.
fn joined(gateway: &ThirdParty) -> TestHost {
    let program = fs::read(aops()).expect("the program under test");
    gateway.publish("aops-spm", "c57f6a1d", &[("bin/aops", 0o755, &program)]);
    let host = TestHost::new();
    let key = gateway.public_key(&host.beside("third.pub"));
    let words = ["--agent-id", host.agent_id(), "--endpoint", &gateway.url, "--insecure", "--trusted-key", &key];
    host.install(&words).expect_success();
    host
}

/// Publishes a native sub-agent that writes its arguments and environment to a file and sleeps.
fn publish_sleeper(gateway: &ThirdParty, name: &str, version: &str) {
    let manifest = format!("name = {name:?}\nversion = {version:?}\n[run]\ncommand = [\"./run\"]\n");
    let script = b"#!/bin/sh\necho \"$AOPS_AGENT_ID $AOPS_AGENT_NAME $AOPS_AGENT_VERSION $AOPS_ENDPOINT $GREETING\"\nexec sleep 1000000\n";
    gateway.publish(name, version, &[("agent.toml", 0o644, manifest.as_bytes()), ("run", 0o755, script)]);
}

fn schema() -> Value {
    run(std::process::Command::new(aops()).args(["gateway", "schema"]), LIMIT).json()
}

/// A validator of one kind of message.
fn validator(message: &str) -> jsonschema::Validator {
    let mut schema = schema();
    schema["$ref"] = json!(format!("#/$defs/{message}"));
    jsonschema::validator_for(&schema).expect("the schema is one")
}

#[track_caller]
fn assert_valid(validator: &jsonschema::Validator, message: &Value) {
    let errors: Vec<_> =
        validator.iter_errors(message).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:?} in {message:#}");
}

/// Every key of a message must be in the schema: an undocumented key cannot be relied on.
#[track_caller]
fn assert_described(schema: &Value, message: &str, value: &Value) {
    let properties = schema["$defs"][message]["properties"].as_object().expect("a message has properties");
    for (key, value) in value.as_object().expect("a message is an object") {
        let property = properties.get(key).unwrap_or_else(|| panic!("{message} has an undescribed {key}"));
        let reference = |at: &Value| Some(at["$ref"].as_str()?.trim_start_matches("#/$defs/").to_owned());
        let whole = reference(property).or_else(|| property["anyOf"].as_array()?.iter().find_map(reference));
        match (value, whole, reference(&property["items"])) {
            (Value::Object(_), Some(inner), _) => assert_described(schema, &inner, value),
            (Value::Array(items), _, Some(inner)) => {
                items.iter().for_each(|item| assert_described(schema, &inner, item))
            }
            _ => {}
        }
    }
}

#[test]
fn the_schema_describes_every_field_of_the_design() {
    let schema = schema();
    let fields = |message: &str| -> Vec<String> {
        let properties = schema["$defs"][message]["properties"].as_object();
        let mut names: Vec<_> = properties.unwrap_or_else(|| panic!("no {message}")).keys().cloned().collect();
        names.sort();
        names
    };
    let expected: BTreeMap<&str, &str> = BTreeMap::from([
        (
            "Heartbeat",
            "agentId agents arch clockOffsetSeconds events generation hostname instanceId lineage manager os sequence trust",
        ),
        ("TrustReport", "by certificateEnd pins"),
        ("ManagerReport", "memoryBytes pid uptimeSeconds version"),
        ("AgentReport", "envHash message name pid restarts state version"),
        ("Event", "agent id kind message outcome time version"),
        (
            "Answer",
            "ack agentId agents cmd complete errorMessage generation interval lineage manager pins removalDelay",
        ),
        ("ManagerOrder", "file sha256 size tarball version"),
        ("AgentOrder", "cmd env file name retry sha256 size tarball version"),
        ("Offer", "file sha256 size version"),
    ]);
    for (message, names) in expected {
        assert_eq!(fields(message).join(" "), names, "{message}");
    }
    // The document for authors of gateways has them all.
    let document = include_str!("../../../assets/protocol.md");
    for field in ["Answer", "AgentOrder", "ManagerOrder"].into_iter().flat_map(fields) {
        assert!(document.contains(&format!("`{field}`")) || document.contains(&format!("`{field}:")), "{field}");
    }
    // Each field that a gateway sends has a description.
    for message in ["Answer", "AgentOrder", "ManagerOrder", "Offer", "Event", "AgentReport", "Heartbeat", "TrustReport"]
    {
        for (name, property) in schema["$defs"][message]["properties"].as_object().expect("it was checked") {
            let explains = |at: &Value| at["description"].is_string();
            let inner = property["$ref"].as_str().or_else(|| property["anyOf"][0]["$ref"].as_str());
            let inner = inner.map(|path| &schema["$defs"][path.trim_start_matches("#/$defs/")]);
            assert!(explains(property) || inner.is_some_and(explains), "{message}.{name} is not explained");
        }
    }
}

#[test]
fn the_schema_accepts_the_same_values_as_a_host() {
    let answer = validator("Answer");
    let base = json!({
        "agentId": "5402", "lineage": "l", "generation": 7, "complete": true,
        "agents": [{ "name": "node-exporter", "version": "1.5.0", "cmd": "start", "env": { "A": "b" } }],
    });
    assert_valid(&answer, &base);
    for (path, bad) in [
        ("/agentId", "../5402"),
        ("/agentId", ""),
        ("/agents/0/name", "Node"),
        ("/agents/0/name", "../x"),
        ("/agents/0/name", &"a".repeat(65)),
        ("/agents/0/version", "1_0"),
        ("/agents/0/version", "-1"),
        ("/agents/0/version", "1.0\n"),
        ("/agents/0/sha256", "ABC"),
    ] {
        let mut message = base.clone();
        message["agents"][0]["sha256"] = json!("0".repeat(64));
        *message.pointer_mut(path).expect("it exists") = json!(bad);
        assert!(!answer.is_valid(&message), "{path} = {bad:?} is taken");
    }
}

#[test]
fn our_gateways_answers_match_the_schema() {
    let mut gateway = Gateway::stopped();
    gateway.publish(&Package::sleeper("exporter", "1.5.0"));
    gateway.publish_self("0.1.0");
    gateway.fleet(
        "heartbeatInterval = \"1s\"\n[manager]\nversion = \"0.1.0\"\n\
         [agents.exporter]\nversion = \"1.5.0\"\nenv = { A = \"b\" }\n",
    );
    gateway.run();
    let (schema, answers, offers) = (schema(), validator("Answer"), validator("Offer"));
    let https = Https::to(&gateway);
    let mut heartbeat = json!({
        "agentId": "5402", "instanceId": "i", "hostname": "h", "os": "linux", "arch": arch(), "future": { "unknown": [1] },
        "manager": { "version": "old", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3, "future": true },
        "events": [{ "id": 41, "time": "2026-01-01T00:00:00Z", "kind": "exit", "outcome": "failed", "future": 1 }],
    });
    assert_valid(&validator("Heartbeat"), &heartbeat);
    let response = https.heartbeat(&heartbeat);
    assert_eq!(response.status, 200, "{response:?}");
    let first = response.json();
    assert_valid(&answers, &first);
    assert_described(&schema, "Answer", &first);
    assert_eq!((&first["ack"], &first["interval"], &first["cmd"]), (&json!(41), &json!(1), &json!("upgrade")));
    assert_eq!((&first["complete"], &first["agents"][0]["name"]), (&json!(true), &json!("exporter")));
    // A host that holds the generation gets no list.
    heartbeat["lineage"] = first["lineage"].clone();
    heartbeat["generation"] = first["generation"].clone();
    let second = https.heartbeat(&heartbeat).json();
    assert_valid(&answers, &second);
    assert_eq!((second.get("agents"), &second["generation"]), (None, &first["generation"]));
    let offer = https.get(&format!("/api/releases/exporter?os=linux&arch={}", arch())).json();
    assert_valid(&offers, &offer);
    assert_described(&schema, "Offer", &offer);
    let package = https.get(&format!("/api/download/{}", offer["file"].as_str().expect("a file")));
    assert_eq!(package.body.len() as u64, offer["size"].as_u64().expect("a size"));
    // A rejection has its reason in the field that a host shows its operator.
    let refused = https.send("POST", "/api/heartbeat", &["x-agent-id: 5402"], b"{}");
    assert_eq!(refused.status, 400);
    assert!(refused.json()["errorMessage"].as_str().is_some_and(|why| why.contains("missing field")), "{refused:?}");
}

#[test]
fn a_third_party_gateway_can_run_a_host() {
    let gateway = ThirdParty::start();
    publish_sleeper(&gateway, "hello", "1.0");
    let host = joined(&gateway);
    assert_eq!(host.status()["version"], "c57f6a1d");

    // It always sends the whole list under one number, whatever generation the host reports.
    let hello = json!({ "name": "hello", "version": "1.0", "env": { "GREETING": "hi", "LD_PRELOAD": "" } });
    let agents = json!([{ "name": "hello", "version": "1.0", "env": { "GREETING": "hi there" } }]);
    let desired = json!({ "interval": 1, "generation": 1, "lineage": "mine", "complete": true, "agents": agents });
    gateway.answer(desired.clone());
    let pid = host.wait_for_agent("hello");
    let heartbeat = gateway.wait_for_heartbeat("the sub-agent in a heartbeat", |heartbeat| {
        heartbeat["generation"] == 1 && heartbeat["lineage"] == "mine" && heartbeat["agents"][0]["pid"] == pid
    });
    assert_eq!(heartbeat["agents"][0]["state"], "running");
    assert_eq!(heartbeat["agentId"], host.agent_id());
    let said = || fs::read_to_string(host.home().join("log/agents/hello.log")).unwrap_or_default();
    let expected = format!("{} hello 1.0 {} hi there", host.agent_id(), gateway.url);
    wait_for("the arguments and environment of the sub-agent", SOON, || said().contains(&expected).then_some(()));

    // Every heartbeat so far matches the schema, and the sequence number grows by one.
    let (schema, heartbeats) = (schema(), validator("Heartbeat"));
    let received = gateway.heartbeats();
    assert!(received.len() >= 3);
    for (index, one) in received.iter().enumerate() {
        assert_valid(&heartbeats, &one.body);
        assert_described(&schema, "Heartbeat", &one.body);
        assert_eq!(one.body["sequence"], index as u64 + 1);
        assert_eq!(one.body["instanceId"], received[0].body["instanceId"]);
    }

    // Events are sent until they are acknowledged, and then no more.
    let events = |heartbeat: &Value| -> Vec<u64> {
        let events = heartbeat["events"].as_array().expect("events are a list");
        events.iter().filter_map(|event| event["id"].as_u64()).collect()
    };
    let first = events(&gateway.wait_for_heartbeat("events", |heartbeat| !events(heartbeat).is_empty()));
    let again = events(&gateway.wait_for_heartbeat("the same events again", |_| true));
    assert!(again.starts_with(&first), "{first:?} {again:?}");
    assert!(first.is_sorted());
    let mut acknowledging = desired.clone();
    acknowledging["ack"] = json!(again.last());
    gateway.answer(acknowledging);
    gateway.wait_for_heartbeat("no event that was acknowledged", |heartbeat| {
        events(heartbeat).iter().all(|id| Some(id) > again.last())
    });

    // Unknown orders and commands are reported once and change nothing.
    let mut unknown = desired.clone();
    unknown["generation"] = json!(2);
    unknown["cmd"] = json!("fly");
    unknown["agents"][0]["cmd"] = json!("dance");
    gateway.answer(unknown);
    let heartbeat = gateway.wait_for_heartbeat("both to be unsupported", |heartbeat| {
        let unsupported = |word: &str| {
            let events = heartbeat["events"].as_array().expect("events are a list");
            events.iter().any(|event| {
                event["outcome"] == "unsupported" && event["message"].as_str().is_some_and(|text| text.contains(word))
            })
        };
        unsupported("fly") && unsupported("dance")
    });
    assert_eq!((&heartbeat["agents"][0]["pid"], &heartbeat["generation"]), (&json!(pid), &json!(2)));
    let later = gateway.wait_for_heartbeat("another one", |_| true);
    assert_eq!(events(&later), events(&heartbeat));

    // Uninstalling is an explicit command, in a list that is not complete.
    let mut uninstall = hello;
    uninstall["cmd"] = json!("uninstall");
    gateway.answer(json!({ "interval": 1, "generation": 3, "lineage": "mine", "agents": [uninstall] }));
    gateway.wait_for_heartbeat("the sub-agent to be gone", |heartbeat| {
        let events = heartbeat["events"].as_array().expect("events are a list");
        heartbeat["agents"] == json!([])
            && events
                .iter()
                .any(|event| event["kind"] == "uninstall" && event["outcome"] == "ok" && event["agent"] == "hello")
    });
    assert!(!host.home().join("agents/hello").exists());
    assert!(!crate::support::processes::is_alive(pid));
    host.wait_for_status("nothing to complain of", SOON, |status| status["state"] == "running");
}

#[test]
fn a_third_party_package_can_be_installed_offline() {
    let gateway = ThirdParty::start();
    let program = fs::read(aops()).expect("the program under test");
    let (file, package) = gateway.publish("aops-spm", "2.0", &[("bin/aops", 0o755, &program)]);
    let host = TestHost::new();
    let key = gateway.public_key(&host.beside("third.pub"));
    let path = host.beside(&file);
    fs::write(&path, &package).expect("a temporary directory can be written");
    let path = path.display().to_string();
    // Nothing listens at the endpoint: the local files are enough.
    let words = [
        "--agent-id",
        "5402",
        "--endpoint",
        "http://127.0.0.1:9",
        "--insecure",
        "--trusted-key",
        &key,
        "--package",
        &path,
    ];
    let without_signature = host.install(&words).expect_code(1);
    assert!(without_signature.stderr.contains(".minisig"), "{without_signature}");
    fs::write(format!("{path}.minisig"), gateway.file(&format!("{file}.minisig"))).expect("it can be written");
    host.install(&words).expect_success();
    host.wait_for_status("a home that runs without a gateway", SOON, |status| {
        status["version"] == "2.0" && status["spm"]["pid"].is_u64() && status["gateway"]["connected"] == false
    });
}

#[test]
fn invalid_answers_are_rejected_and_change_nothing() {
    let gateway = ThirdParty::start();
    publish_sleeper(&gateway, "a", "1");
    let host = joined(&gateway);
    let agents = json!([{ "name": "a", "version": "1" }]);
    let good = json!({ "interval": 1, "generation": 5, "lineage": "l", "complete": true, "agents": agents });
    gateway.answer(good.clone());
    let pid = host.wait_for_agent("a");
    let ok = || "200 OK".to_owned();
    let mut foreign = good.clone();
    foreign["agentId"] = json!("somebody-else");
    foreign["generation"] = json!(6);
    foreign["agents"][0]["cmd"] = json!("stop");
    let mut outside = good.clone();
    outside["generation"] = json!(6);
    outside["interval"] = json!("soon");
    let mut huge = br#"{"agentId": ""#.to_vec();
    huge.resize(64 << 20, b'x');
    for (reply, reason) in [
        (Reply::Json(foreign), "it is for agent somebody-else"),
        (Reply::Json(outside), "cannot parse the answer"),
        (Reply::Raw(ok(), vec![0xff; 1000]), "cannot parse the answer"),
        (Reply::Raw(ok(), good.to_string().into_bytes()[..40].to_vec()), "cannot parse the answer"),
        (Reply::Raw(ok(), "[".repeat(40_000).into_bytes()), "cannot parse the answer"),
        (Reply::Raw(ok(), "[".repeat(1 << 20).into_bytes()), "more than 50000 values"),
        (Reply::Raw(ok(), huge), "more than 4194304 bytes"),
        (Reply::Raw("302 Found\r\nlocation: http://127.0.0.1:1/elsewhere".to_owned(), vec![]), "302"),
        (
            Reply::Raw("500 Oops".to_owned(), br#"{"errorMessage": "the roof is on fire"}"#.to_vec()),
            "500: the roof is on fire",
        ),
    ] {
        gateway.reply(reply);
        let status = host.wait_for_status(reason, SOON, |status| {
            status["gateway"]["lastError"].as_str().is_some_and(|error| error.contains(reason))
        });
        assert_eq!(status["gateway"]["connected"], json!(false));
        assert_eq!((&status["generation"], &agent(&status, "a").expect("it exists")["pid"]), (&json!(5), &json!(pid)));
        gateway.answer(good.clone());
        host.wait_for_status("the connection to the gateway", SOON, |status| status["gateway"]["connected"] == true);
    }
    let status = host.wait_for_status("everything to run", SOON, |status| status["state"] == "running");
    assert_eq!(agent(&status, "a").expect("it exists")["pid"], json!(pid));
    assert_eq!(status["spm"]["restarts"], 0);
}

#[test]
fn an_invalid_order_is_rejected_alone_and_reported() {
    let gateway = ThirdParty::start();
    publish_sleeper(&gateway, "a", "1");
    publish_sleeper(&gateway, "b", "1");
    let host = joined(&gateway);
    // The third order has no readable name: it may be for any sub-agent.
    let answer = |generation: u64, greeting: &str, bad: Value| {
        let a = json!({ "name": "a", "version": "1", "env": { "GREETING": greeting } });
        json!({ "interval": 1, "removalDelay": 0, "lineage": "l", "generation": generation, "complete": true, "agents": [a, bad] })
    };
    gateway.answer(answer(1, "0", json!({ "name": "b", "version": "1" })));
    let (mut a, b) = (host.wait_for_agent("a"), host.wait_for_agent("b"));
    let refusals = |heartbeat: &Value, words: &str| {
        let events = heartbeat["events"].as_array().into_iter().flatten();
        let refused = events.filter(|event| {
            event["outcome"] == "refused" && event["message"].as_str().is_some_and(|text| text.contains(words))
        });
        refused.cloned().collect::<Vec<_>>()
    };
    for (generation, bad, named, words) in [
        (
            2,
            json!({ "name": "b", "version": "1", "env": { "X": { "vault": "path" } } }),
            true,
            "the value of a variable",
        ),
        (3, json!({ "name": "B", "version": "1" }), false, "removes nothing"),
        (4, json!({ "name": "b", "version": "Current" }), true, "the version Current is reserved"),
    ] {
        gateway.answer(answer(generation, &generation.to_string(), bad));
        a = host.wait_for_new_pid("a", a);
        let heartbeat = gateway.wait_for_heartbeat(words, |heartbeat| {
            heartbeat["generation"] == generation && !refusals(heartbeat, words).is_empty()
        });
        let told = refusals(&heartbeat, words);
        assert_eq!(
            (told.len(), &told[0]["kind"], &told[0]["agent"]),
            (1, &json!("order"), &if named { json!("b") } else { Value::Null })
        );
        let again = gateway.wait_for_heartbeat("another one", |_| true);
        assert_eq!(refusals(&again, words), told, "it is reported once");
        let status = host.status();
        assert_eq!((&status["state"], &agent(&status, "b").expect("it stays")["pid"]), (&json!("degraded"), &json!(b)));
        assert!(status["problems"].to_string().contains(words), "{status:#}");
    }

    // The next manager requests the list again, since it may understand more.
    host.kill(host.role_pid("spm").expect("it runs"));
    gateway.wait_for_heartbeat("the list to be requested", |heartbeat| {
        heartbeat["sequence"] == 1 && heartbeat["generation"] == 0
    });
    gateway.wait_for_heartbeat("it to be held", |heartbeat| heartbeat["sequence"] == 2 && heartbeat["generation"] == 4);
    assert_eq!((host.wait_for_agent("a"), host.wait_for_agent("b")), (a, b));

    // So is the order for the manager.
    let mut upgrade = answer(5, "5", json!({ "name": "b", "version": "1" }));
    upgrade["cmd"] = json!("upgrade");
    upgrade["manager"] = json!({ "version": { "newest": true } });
    gateway.answer(upgrade);
    let words = "cannot read the order for the manager";
    let heartbeat = gateway.wait_for_heartbeat(words, |heartbeat| !refusals(heartbeat, words).is_empty());
    assert_eq!(
        (&heartbeat["manager"]["version"], &refusals(&heartbeat, words)[0]["kind"]),
        (&json!("c57f6a1d"), &json!("manager"))
    );
    host.wait_for_new_pid("a", a);
    gateway.answer(answer(5, "5", json!({ "name": "b", "version": "1" })));
    host.wait_for_status("everything to run", SOON, |status| status["state"] == "running");
    assert_eq!(host.wait_for_agent("b"), b);

    // An answer that is not valid JSON is reported too, as such.
    gateway.answer(json!({ "interval": "soon" }));
    host.wait_for_status("it to be refused", SOON, |status| status["gateway"]["connected"] == false);
    gateway.answer(answer(5, "5", json!({ "name": "b", "version": "1" })));
    gateway.wait_for_heartbeat("the event", |heartbeat| {
        refusals(heartbeat, "cannot parse the answer").iter().any(|event| event["kind"] == "heartbeat")
    });
}

#[test]
fn a_sub_agent_omitted_from_a_complete_list_is_removed_after_a_delay() {
    let packages = ["a", "b", "c"].map(|name| Package::sleeper(name, "1"));
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    packages.iter().for_each(|package| gateway.publish(package));
    gateway.run();
    let want = |delay: &str, names: &[&str]| {
        let agents = names.iter().map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect::<String>();
        gateway.fleet(&format!("heartbeatInterval = \"1s\"\nremovalDelay = {delay:?}\n{agents}"));
    };
    want("1h", &["a", "b", "c"]);
    let host = TestHost::joined(&gateway);
    let pids = ["a", "b", "c"].map(|name| host.wait_for_agent(name));
    let left = |status: &Value, name: &str| agent(status, name).and_then(|agent| agent["removedInSeconds"].as_u64());

    // Like a file that was truncated at the end of a line.
    want("1h", &["a", "c"]);
    host.wait_for_status("b to wait", SOON, |status| left(status, "b").is_some_and(|left| left < 3_599));
    let status = host.status();
    assert_eq!((&status["state"], left(&status, "a")), (&json!("running"), None));
    let shown = host.control(&["status"]).text();
    assert!(shown.contains("b: the gateway's list omits it; to be removed in 59m"), "{shown}");
    // A restart of the manager does not restart the delay.
    let waited = left(&host.status(), "b").expect("it waits");
    host.control(&["restart"]).expect_success();
    let status = host.wait_for_status("the next manager", SOON, |status| left(status, "b").is_some());
    assert!(left(&status, "b") <= Some(waited), "{waited} {status:#}");

    // It is ordered again, and was never stopped.
    want("1h", &["a", "b", "c"]);
    host.wait_for_status("b to be wanted again", SOON, |status| left(status, "b").is_none());
    assert_eq!(["a", "b", "c"].map(|name| host.wait_for_agent(name)), pids);
    // It is removed after it has been omitted for long enough.
    want("2s", &["a", "c"]);
    host.wait_for_status("b to go", SOON, |status| agent(status, "b").is_none());
    assert_eq!(["a", "c"].map(|name| host.wait_for_agent(name)), [pids[0], pids[2]]);
}

#[test]
fn only_a_newer_desired_state_is_accepted_and_it_removes_only_named_sub_agents() {
    let gateway = ThirdParty::start();
    publish_sleeper(&gateway, "a", "1");
    publish_sleeper(&gateway, "b", "1");
    let host = joined(&gateway);
    let order = |name: &str, cmd: &str| json!({ "name": name, "version": "1", "cmd": cmd });
    let state = |lineage: &str, generation: u64, complete: bool, agents: &[Value]| json!({ "interval": 1, "removalDelay": 0, "lineage": lineage, "generation": generation, "complete": complete, "agents": agents });
    let good = state("l", 5, true, &[order("a", "start"), order("b", "start")]);
    gateway.answer(good.clone());
    let pids = (host.wait_for_agent("a"), host.wait_for_agent("b"));
    let assert_untouched = |status: &Value| {
        let pid = |name: &str| agent(status, name).expect("it exists")["pid"].clone();
        assert_eq!((pid("a"), pid("b")), (json!(pids.0), json!(pids.1)));
    };

    for (wrong, reason) in [
        (state("l", 4, true, &[order("a", "stop")]), "cannot accept generation 4"),
        (
            state("l", 5, true, &[order("a", "stop"), order("b", "stop")]),
            "it was accepted before with different content",
        ),
    ] {
        gateway.answer(wrong);
        let status = host.wait_for_status(reason, SOON, |status| {
            status["problems"]
                .as_array()
                .is_some_and(|all| all.iter().any(|one| one.as_str().is_some_and(|one| one.contains(reason))))
        });
        assert_eq!((&status["state"], &status["generation"]), (&json!("degraded"), &json!(5)));
        assert_untouched(&status);
        gateway.wait_for_heartbeat("the refusal as an event", |heartbeat| {
            let events = heartbeat["events"].as_array().expect("events are a list");
            events.iter().any(|event| {
                event["outcome"] == "refused" && event["message"].as_str().is_some_and(|text| text.contains(reason))
            })
        });
        // When the gateway sends the held state again, the problem is resolved.
        gateway.answer(good.clone());
        host.wait_for_status("the complaint to go", SOON, |status| status["state"] == "running");
    }

    // An empty list, even a complete one, removes nothing; neither does a missing list.
    gateway.answer(state("l", 7, true, &[]));
    let status = host.wait_for_status("generation 7", SOON, |status| status["generation"] == 7);
    assert_untouched(&status);
    gateway.answer(json!({ "interval": 1, "lineage": "l", "generation": 8, "complete": true }));
    for _ in 0..2 {
        gateway.wait_for_heartbeat("another heartbeat", |_| true);
    }
    assert_untouched(&host.status());

    // A new store that counts from the start is accepted; running sub-agents continue.
    gateway.answer(state("m", 1, true, &[order("a", "start"), order("b", "start")]));
    gateway
        .wait_for_heartbeat("the new lineage", |heartbeat| heartbeat["lineage"] == "m" && heartbeat["generation"] == 1);
    let status = host.wait_for_status("everything to run", SOON, |status| status["state"] == "running");
    assert_untouched(&status);

    // Its complete list removes the sub-agents that it does not name.
    gateway.answer(state("m", 2, true, &[order("b", "stop")]));
    let status = host.wait_for_status("a to go and b to be stopped", SOON, |status| {
        agent(status, "a").is_none()
            && agent(status, "b").is_some_and(|b| b["state"] == "stopped" && b["pid"].is_null())
    });
    assert_eq!(status["agents"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_busy_gateway_is_not_contacted_before_its_retry_after() {
    let gateway = ThirdParty::start();
    let host = joined(&gateway);
    gateway.answer(json!({ "interval": 1 }));
    gateway.wait_for_heartbeat("the interval to be known", |heartbeat| heartbeat["sequence"].as_u64() > Some(2));
    gateway.reply(Reply::Raw("503 Busy\r\nretry-after: 5".to_owned(), b"later".to_vec()));
    host.wait_for_status("the refusal", SOON, |status| {
        status["gateway"]["lastError"].as_str().is_some_and(|error| error.contains("503: later"))
    });
    // The time of the last 503, and of the next request.
    gateway.answer(json!({ "interval": 1 }));
    let refused = gateway.heartbeats().len();
    let received =
        wait_for("the next heartbeat", SOON, || Some(gateway.heartbeats()).filter(|received| received.len() > refused));
    let pause = received[refused].at - received[refused - 1].at;
    assert!(pause >= Duration::from_secs(5), "{pause:?}");
    assert!(pause < Duration::from_secs(15), "{pause:?}");
    // Then the interval is the usual one again.
    wait_for("the usual interval", SOON, || Some(()).filter(|()| gateway.heartbeats().len() > refused + 2));
    let received = gateway.heartbeats();
    assert!(received[refused + 2].at - received[refused].at < Duration::from_secs(5));
}
