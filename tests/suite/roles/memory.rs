//! A role above its memory limit is restarted without harm to sub-agents, and the reason is reported.

use std::fs;
use std::time::Duration;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, pid};
use crate::support::package::Package;
use crate::support::wait::wait_for;

/// Three consecutive checks, one with each ping of 15 s.
const RESTARTED: Duration = Duration::from_secs(120);

#[test]
fn a_role_above_its_memory_limit_is_restarted_and_the_reason_is_reported() {
    let gateway = Gateway::with(&[&Package::sleeper("native", "1.0")], &[("native", "1.0", "")]);
    let begin = |id: &str, setting: &str| {
        let host = TestHost::new();
        let trust = gateway.trust();
        let mut arguments = vec!["--agent-id", id, "--endpoint", gateway.url()];
        arguments.extend(trust.iter().map(String::as_str));
        host.install(&arguments).expect_success();
        let native = host.wait_for_agent("native");
        let config = host.home().join("etc/conf.toml");
        let text = fs::read_to_string(&config).expect("it exists");
        fs::write(&config, format!("{text}\n{setting}\n")).expect("it is ours");
        host.control(&["restart"]).expect_success();
        let status = host.wait_for_status("both roles", SOON, |status| {
            status["spm"]["pid"].is_u64() && status["spa"]["pid"].is_u64() && status["gateway"]["connected"] == true
        });
        let roles = ["spm", "spa"].map(|role| pid(&status[role]["pid"]).expect("it was waited for"));
        (host, native, roles)
    };
    // Less than what they use in a debug build.
    let hosts = [
        ("5401", "spmMaxMem = \"16MiB\"", "spm", "the manager uses"),
        ("5402", "spaMaxMem = \"8MiB\"", "spa", "the watchdog uses"),
    ];
    let hosts = hosts.map(|(id, setting, role, words)| (begin(id, setting), id, role, words));
    for ((host, native, [spm, spa]), id, role, words) in &hosts {
        let status =
            host.wait_for_status("the excess to show", SOON, |status| status["problems"].to_string().contains(words));
        assert_eq!(status["state"], "degraded", "{status:#}");
        host.wait_for_status(&format!("another {role}"), RESTARTED, |status| {
            pid(&status[role]["pid"]).is_some_and(|pid| pid != if *role == "spm" { *spm } else { *spa })
        });
        let status = host.wait_for_status("both roles", SOON, |status| {
            status["spm"]["pid"].is_u64() && status["spa"]["pid"].is_u64()
        });
        let other = if *role == "spm" { ("spa", spa) } else { ("spm", spm) };
        assert_eq!(pid(&status[other.0]["pid"]), Some(*other.1), "the other role stays: {status:#}");
        assert_eq!(status[role]["restarts"], 0, "it was no death: {status:#}");
        assert_eq!(host.wait_for_agent("native"), *native);
        wait_for("the gateway to receive it", SOON, || {
            let status = gateway.status();
            let hosts = status["hosts"].as_array()?;
            let events = hosts.iter().find(|host| host["agentId"] == *id)?["events"].as_array()?.clone();
            let is_reported = |event: &serde_json::Value| {
                event["kind"] == "memory" && event["message"].as_str().is_some_and(|text| text.contains(words))
            };
            events.iter().any(is_reported).then_some(())
        });
    }
}
