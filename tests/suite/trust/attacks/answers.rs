//! Attacks by a gateway's answers to heartbeats, and by the environment in them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Scene, native, wait_for_victim};
use crate::support::files::{Entry, Kind};
use crate::support::host::{SOON, agent};
use crate::support::hostile::{Hostile, HostileReply};
use crate::support::processes;
use crate::support::wait::wait_for;

#[test]
fn an_empty_answer_removes_nothing() {
    let scene = Scene::new();
    for answer in [
        json!({"interval": 1}),
        json!({"interval": 1, "lineage": "hostile", "generation": 1000, "complete": true}),
        json!({"interval": 1, "lineage": "hostile", "generation": 1000, "complete": true, "agents": null}),
        json!({"interval": 1, "lineage": "another", "generation": 1, "complete": true, "agents": null}),
    ] {
        scene.hostile.answer(answer, Vec::new());
        scene.hostile.wait_for_heartbeat("two more heartbeats", |_| true);
        scene.hostile.wait_for_heartbeat("two more heartbeats", |_| true);
        scene.assert_unharmed();
    }
    let empty = json!({"interval": 1, "lineage": "hostile", "generation": 2000, "complete": true, "agents": []});
    scene.hostile.answer(empty, Vec::new());
    scene.assert_refused("desired", &["empty list", "removes nothing", "1 ordered sub-agents are kept"]);
    let status = scene.host.wait_for_status("it to show", SOON, |status| status["generation"] == 2000);
    assert_eq!(agent(&status, "native").expect("it exists")["state"], "running");
    assert!(status["problems"].to_string().contains("empty list"), "{status:#}");
    // The same answer from another store is treated alike.
    let other = json!({"interval": 1, "lineage": "another", "generation": 1, "complete": true, "agents": []});
    scene.hostile.answer(other, Vec::new());
    scene.host.wait_for_status("the other store", SOON, |status| status["generation"] == 1);
    scene.assert_unharmed();
}

/// The first endpoint is busy for a moment, and the second has a different fleet.
#[test]
fn the_list_of_a_fallback_endpoint_removes_no_omitted_sub_agent() {
    let scene = Scene::new();
    scene.victim();
    let second = Hostile::in_place_of(&scene.gateway);
    let list = |generation: u64| {
        json!({"interval": 1, "lineage": "second", "generation": generation, "complete": true, "removalDelay": 0,
            "agents": [{"name": "victim", "version": "1.0.0"}]})
    };
    second.answer(list(1), Vec::new());
    let conf = scene.host.home().join("etc/conf.toml");
    let (first, both) =
        (format!("\"{}\"", scene.hostile.url()), format!("[\"{}\", \"{}\"]", scene.hostile.url(), second.url()));
    let settings = fs::read_to_string(&conf).expect("the settings");
    let changed =
        settings.replacen(&format!("[{first}]"), &both, 1).replacen(&format!("= {first}"), &format!("= {both}"), 1);
    assert_ne!(changed, settings);
    fs::write(&conf, changed).expect("it is ours");
    scene.host.control(&["restart"]).expect_code(0);
    scene.host.wait_for_status("the first to be asked", SOON, |status| status["gateway"]["connected"] == true);
    scene.hostile.on("/api/heartbeat", |_| HostileReply::status(503));
    wait_for_victim(&scene);
    scene.assert_native_runs();
    second.wait_for_heartbeat("two more heartbeats", |_| true);
    second.wait_for_heartbeat("two more heartbeats", |heartbeat| heartbeat["generation"] == 1);
    let problems = scene.host.status()["problems"].to_string();
    assert!(!problems.contains("generation"), "the same list again is no contradiction: {problems}");
    // A later change by the second endpoint counts.
    second.answer(list(2), Vec::new());
    scene.host.wait_for_status("the other to be removed", SOON, |status| agent(status, "native").is_none());
}

#[test]
fn an_answer_for_another_agent_id_is_rejected() {
    let scene = Scene::new();
    let foreign = json!({
        "agentId": "6666", "interval": 1, "lineage": "hostile", "generation": 1000, "complete": false,
        "agents": [{"name": "native", "version": "1.0.0", "cmd": "uninstall"}],
    });
    scene.hostile.answer(foreign, Vec::new());
    let status = scene.host.wait_for_status("it to be refused", SOON, |status| {
        status["gateway"]["lastError"].to_string().contains("it is for agent 6666, but this host is 5402")
    });
    assert_eq!((&status["gateway"]["connected"], &status["generation"]), (&json!(false), &json!(1)));
    scene.hostile.want(json!([native()]), true);
    scene.assert_refused("heartbeat", &["for agent 6666", "this host is 5402"]);
}

/// No newer generation could ever follow.
#[test]
fn the_maximum_generation_is_rejected() {
    let scene = Scene::new();
    for (lineage, generation) in [("hostile", u64::MAX), ("another", 1 << 53), ("hostile", 4_000_000_000_000)] {
        let agents = json!([{"name": "native", "version": "1.0.0", "cmd": "stop"}]);
        let last =
            json!({"interval": 1, "lineage": lineage, "generation": generation, "complete": true, "agents": agents});
        scene.hostile.answer(last, Vec::new());
        let said = format!("cannot accept generation {generation}");
        scene.assert_refused("desired", &[&said, "ahead of the clocks"]);
        let status =
            scene.host.wait_for_status("it to show", SOON, |status| status["problems"].to_string().contains(&said));
        assert_eq!((&status["generation"], &status["state"]), (&json!(1), &json!("degraded")));
    }
    scene.hostile.want(json!([native()]), true);
    scene.host.wait_for_status("the next one", SOON, |status| {
        status["generation"] == 2 && !status["problems"].to_string().contains("generation")
    });
    scene.assert_unharmed();

    // A generation that an older version accepted is abandoned.
    scene.host.crash();
    let path = scene.host.home().join("state/desired.json");
    let mut held: Value = serde_json::from_slice(&fs::read(&path).expect("it exists")).expect("it is JSON");
    held["generation"] = json!(u64::MAX);
    fs::write(&path, held.to_string()).expect("it can be written");
    scene.hostile.want(json!([native()]), true);
    scene.host.control(&["start"]).expect_code(0);
    scene.host.wait_for_status("the true one", SOON, |status| status["generation"] == 3);
    scene.assert_reported("desired", "ok", &["generation 3 replaces generation 18446744073709551615"]);
}

#[test]
fn over_long_texts_are_cut_or_rejected() {
    let scene = Scene::new();
    let long = format!("\x1b[2J{}", "x".repeat(1 << 20));
    let agents = json!([{"name": "native", "version": "1.0.0", "cmd": long}]);
    let answer = json!({"interval": 1, "lineage": "hostile", "generation": 2, "complete": true, "agents": agents});
    for (field, told) in [
        ("errorMessage", None),
        ("cmd", Some("cannot run the command  [2Jxxx")),
        ("lineage", Some("a lineage of 1048580")),
    ] {
        let mut answer = answer.clone();
        answer[field] = json!(long);
        scene.hostile.answer(answer, Vec::new());
        match told {
            Some(told) => drop(scene.hostile.wait_for_event(told, |event| event["message"].to_string().contains(told))),
            None => drop(scene.host.wait_for_status("it to show", SOON, |status| {
                status["problems"].to_string().contains("the gateway reports:  [2Jxxx")
            })),
        }
    }
    scene.hostile.answer(answer, Vec::new());
    scene.assert_refused("order", &["the order for native", "a command of 1048580 bytes: at most 64"]);
    // An unreachable gateway's text is cut too.
    scene.hostile.on("/api/heartbeat", move |_| HostileReply {
        headers: vec![("content-type", long.clone())],
        ..HostileReply::status(503)
    });
    scene.host.wait_for_status("the failure", SOON, |status| status["gateway"]["connected"] == false);
    assert!(scene.host.control(&["status", "--json"]).text().len() < 16 << 10);
    let longest = scene.hostile.requests().iter().map(|asked| asked.body.len()).max();
    assert!(longest.is_some_and(|longest| longest < 16 << 10), "{longest:?}");
    let state = scene.host.home().join("state");
    for file in ["desired.json", "events.json"] {
        let length = fs::metadata(state.join(file)).expect("it exists").len();
        assert!(length < 16 << 10, "{file}: {length}");
    }
    assert!(!fs::read(scene.host.home().join("log/spm.log")).expect("a log").contains(&0x1b));
    scene.assert_native_runs();
}

#[test]
fn too_many_orders_are_rejected() {
    let scene = Scene::new();
    let orders = |count: usize| {
        let orders = (0..count).map(|number| json!({"name": format!("a{number}"), "version": "1"}));
        json!({
            "interval": 1, "lineage": "hostile", "generation": count, "complete": true, "agents": orders.collect::<Vec<_>>(),
        })
    };
    scene.hostile.answer(orders(1_001), Vec::new());
    scene.assert_refused("desired", &["1001 orders: at most 1000"]);
    scene.hostile.answer(orders(30_000), Vec::new());
    scene.assert_refused("heartbeat", &["more than 50000 values"]);
    // Each is a few bytes on the wire, and many times that in memory.
    let variables = (0..1_001).map(|number| (format!("V{number}"), json!(""))).collect::<serde_json::Map<_, _>>();
    scene.order_victim(json!({ "env": variables }));
    scene.assert_refused("order", &["the order for victim", "its environment: it has 1001 variables"]);
    assert!(agent(&scene.host.status(), "victim").is_none());
    scene.victim();
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    scene.assert_native_runs();
}

/// With a different text each time.
#[test]
fn repeated_rejections_are_reported_within_limits() {
    let scene = Scene::new();
    let count = std::sync::atomic::AtomicU64::new(1);
    scene.hostile.on("/api/heartbeat", move |_| {
        let lineage = "x".repeat(1_000 + count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as usize);
        HostileReply::ok(
            json!({"agentId": "5402", "interval": 1, "lineage": lineage, "generation": 2, "agents": []}).to_string(),
        )
    });
    let refusals = |heartbeat: &Value| {
        let events = heartbeat["events"].as_array().into_iter().flatten();
        events.filter(|event| event["kind"] == "desired" && event["outcome"] == "refused").count()
    };
    // Nothing is acknowledged, and each answer is rejected with a different text.
    wait_for("twenty refusals", SOON * 2, || {
        scene.hostile.heartbeats().last().is_some_and(|heartbeat| refusals(heartbeat) >= 20).then_some(())
    });
    let seen = scene.hostile.heartbeats().len();
    wait_for("some more answers", SOON, || (scene.hostile.heartbeats().len() > seen + 4).then_some(()));
    assert!(scene.hostile.heartbeats().iter().all(|heartbeat| refusals(heartbeat) <= 20));
    scene.assert_native_runs();
}

#[test]
fn a_loader_variable_in_the_environment_is_rejected() {
    let scene = Scene::new();
    scene.victim();
    let evil = scene.host.beside("evil.so");
    let env = json!({
        "LD_PRELOAD": evil, "PATH": "/evil", "BASH_ENV": evil, "PYTHONPATH": "/evil", "ld_library_path": "/evil", "AOPS_HOME": "/evil",
        "A=B": "x", "": "x", "ZERO": "a\u{0}b", "TOKEN": {"secret": "LD_PRELOAD=/evil"}, "GOGC": "50",
    });
    scene.order_victim(json!({ "env": env }));
    let victim = wait_for_victim(&scene);
    scene.assert_reported(
        "env",
        "refused",
        &["LD_PRELOAD", "PATH", "BASH_ENV", "PYTHONPATH", "ld_library_path", "AOPS_HOME", "A=B", "ZERO"],
    );
    let environment = processes::environment(victim);
    assert!(environment.contains(&"GOGC=50".to_owned()), "{environment:?}");
    let named = |name: &str| environment.iter().any(|variable| variable.starts_with(&format!("{name}=")));
    for name in ["LD_PRELOAD", "BASH_ENV", "PYTHONPATH", "ld_library_path", "A"] {
        assert!(!named(name), "{name} in {environment:?}");
    }
    let evil = environment.iter().filter(|variable| variable.contains("/evil")).collect::<Vec<_>>();
    assert_eq!(evil, ["TOKEN=LD_PRELOAD=/evil"]);
    // Names that are reserved for us are shown.
    assert!(environment.contains(&format!("AOPS_HOME={}", scene.host.home().display())), "{environment:?}");
    let status = scene.host.status();
    assert!(
        agent(&status, "victim").expect("it is there")["lastError"].to_string().contains("LD_PRELOAD"),
        "{status:#}"
    );
    scene.assert_native_runs();
}

/// Only the sub-agent receives a secret.
#[test]
fn a_secret_is_never_shown() {
    const SECRET: &str = "correct-horse-battery-staple";
    let scene = Scene::new();
    scene.victim();
    // A rejected name must not show its value.
    let env = json!({"TOKEN": {"secret": SECRET}, "LD_AUDIT": {"secret": SECRET}});
    scene.order_victim(json!({ "env": env }));
    let victim = wait_for_victim(&scene);
    assert!(processes::environment(victim).contains(&format!("TOKEN={SECRET}")));
    scene.assert_reported("env", "refused", &["LD_AUDIT"]);
    // One that is invalid, and quoted nowhere.
    let mut bad = json!([native(), {"name": "victim", "version": "1.0.0", "env": {"TOKEN": {"secret": [SECRET]}}}]);
    scene.hostile.want(bad.clone(), true);
    scene.host.wait_for_status("it to be refused", SOON, |status| {
        status["problems"].to_string().contains("the order for victim is rejected")
    });
    bad[1]["env"] = json!({"TOKEN": {"secret": SECRET}, "B": "1"});
    scene.hostile.want(bad, true);
    let renewed = scene.host.wait_for_new_pid("victim", victim);
    assert!(processes::environment(renewed).contains(&"B=1".to_owned()));

    let shown = [
        scene.host.control(&["status", "--json"]).text(),
        scene.host.control(&["status"]).text(),
        scene.host.control(&["logs"]).text(),
        scene.host.control(&["logs", "victim"]).text(),
        scene.hostile.heartbeats().iter().map(Value::to_string).collect(),
        processes::of_home(&scene.host.home())
            .iter()
            .flat_map(|process| processes::words(process.pid, "cmdline"))
            .collect(),
    ];
    for text in &shown {
        assert!(!text.contains(SECRET), "{text}");
    }
    assert!(shown[4].contains("envHash"));
    let (holders, others) = holders(&scene.host.home(), SECRET);
    assert_eq!(holders, [PathBuf::from("state/desired.json")]);
    assert!(others > 20, "{others} files were searched");
    for (path, Entry { kind, mode, .. }) in crate::support::files::snapshot(&scene.host.home().join("state"), &[]) {
        assert!(!matches!(kind, Kind::File(..)) || mode == 0o600, "{}: {mode:o}", path.display());
    }
    // Also of a manager that has exited.
    scene.host.crash();
    scene.host.control(&["start"]).expect_code(0);
    wait_for("the victim to run again", SOON, || {
        let pid = wait_for_victim(&scene);
        processes::environment(pid).contains(&format!("TOKEN={SECRET}")).then_some(())
    });
}

/// The files below a directory that contain a text, and the number of other files.
fn holders(root: &Path, text: &str) -> (Vec<PathBuf>, usize) {
    let (mut found, mut others) = (Vec::new(), 0);
    for (path, entry) in crate::support::files::snapshot(root, &["/bin"]) {
        let path = path.strip_prefix("/").expect("it is absolute");
        if !matches!(entry.kind, Kind::File(..)) {
            continue;
        }
        let bytes = fs::read(root.join(path)).unwrap_or_default();
        match bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
            true => found.push(path.to_owned()),
            false => others += 1,
        }
    }
    (found, others)
}

#[test]
fn a_wrong_clock_is_reported() {
    let scene = Scene::new();
    let unknown = scene.host.status();
    assert_eq!(unknown["gateway"]["clockOffsetSeconds"], Value::Null);
    let said = |seconds: i64| {
        let now = std::time::SystemTime::now();
        let at = std::time::Duration::from_secs(seconds.unsigned_abs());
        let then = if seconds < 0 { now - at } else { now + at };
        vec![("date", httpdate::fmt_http_date(then))]
    };
    let answer = || json!({"interval": 1});
    let close = |value: &Value, to: i64| value.as_i64().is_some_and(|offset| (offset - to).abs() <= 30);

    scene.hostile.answer(answer(), said(-3600));
    let status =
        scene.host.wait_for_status("the offset", SOON, |status| close(&status["gateway"]["clockOffsetSeconds"], 3600));
    assert!(status["notes"].to_string().contains("seconds ahead of the gateway's"), "{status:#}");
    scene.assert_reported("clock", "failed", &["ahead of the gateway's", "correct the wrong one"]);
    scene.hostile.wait_for_heartbeat("the offset", |heartbeat| close(&heartbeat["clockOffsetSeconds"], 3600));

    scene.hostile.answer(answer(), said(7200));
    let status =
        scene.host.wait_for_status("the offset", SOON, |status| close(&status["gateway"]["clockOffsetSeconds"], -7200));
    assert!(status["notes"].to_string().contains("seconds behind the gateway's"), "{status:#}");
    scene.hostile.answer(answer(), said(0));
    scene.assert_reported("clock", "ok", &["agrees"]);
    let status =
        scene.host.wait_for_status("the offset", SOON, |status| close(&status["gateway"]["clockOffsetSeconds"], 0));
    assert!(!status["notes"].to_string().contains("clock"), "{status:#}");
    scene.assert_unharmed();
}
