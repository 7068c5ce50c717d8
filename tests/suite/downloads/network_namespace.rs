//! Downloads in a network namespace with partitions, packet loss and a failing name server: running sub-agents continue, and downloads
//! complete when the network works again.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::connect_proxy::ConnectProxy;
use crate::support::container::Container;
use crate::support::gateway::Gateway;
use crate::support::host::agent;
use crate::support::inside::{DIRECTORY, Inside, PROGRAM, done, status, wait_for_agents, wait_for_status};
use crate::support::name_server::NameServer;
use crate::support::package::Package;
use crate::support::wait::try_for;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// The deadline of a download with ten percent packet loss.
const LONG: Duration = Duration::from_secs(180);
const SIZE: usize = 8 << 20;

/// A host, and a gateway in another network namespace, reached over one link and by a name.
const NETWORK: &str = "
    ip netns add far
    ip link add near type veth peer name far0 netns far
    ip addr add 10.9.0.2/24 dev near
    ip link set near up
    ip -n far addr add 10.9.0.1/24 dev far0
    ip -n far link set far0 up
    ip -n far link set lo up
    echo 'nameserver 10.9.0.1' >/etc/resolv.conf
";

fn noise(version: &str) -> Package {
    let mut noise = vec![0; SIZE];
    fastrand::fill(&mut noise);
    Package::sleeper("noise", version).with_file("noise", noise, 0o644)
}

fn fleet(version: &str) -> String {
    format!("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\nagents.noise.version = {version:?}\n")
}

fn bytes_received(container: &Container) -> u64 {
    let read = done(container, "cat /sys/class/net/near/statistics/rx_bytes").stdout;
    read.trim().parse().expect("a number")
}

#[track_caller]
fn wait_long(container: &Container, what: &str, wanted: impl Fn(&Value) -> bool) {
    let mut last = Value::Null;
    let found = try_for(LONG, || {
        last = status(container);
        wanted(&last).then_some(())
    });
    assert!(found.is_some(), "timed out after {LONG:?} waiting for {what}; the last status: {last:#}");
}

fn runs(version: &'static str) -> impl Fn(&Value) -> bool {
    move |status| agent(status, "noise").is_some_and(|agent| agent["version"] == version && agent["state"] == "running")
}

#[test]
fn partitions_packet_loss_and_slow_name_servers_only_delay_a_download() {
    let container = Container::bare();
    container.shell(NETWORK).expect_code(0);
    let names = NameServer::start(&container.path("/run/netns/far"), GATEWAY);
    let outside = Gateway::stopped();
    outside.publish_self("1.0.0");
    outside.publish(&Package::sleeper("native", "1.0.0"));
    outside.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    let gateway = Inside::start_at(&container, outside, "10.9.0.1:8888", Some("far"));
    let key = Path::new(DIRECTORY).join("keys/aops.pub").display().to_string();
    let install = ["install", "--service", "none", "--agent-id", "1", "--endpoint", "https://gateway.test:8888"];
    let words = [&[PROGRAM][..], &install, &["--trusted-key", &key, "--pin-first-contact"]].concat();
    container.run(&words).expect_code(0);
    done(&container, "printf 'downloadStall = \"2s\"\\ndownloadRate = \"2MiB/s\"\\n' >>/opt/aops/etc/conf.toml");
    container.run(&["/opt/aops/control", "restart"]).expect_code(0);
    let native = wait_for_agents(&container, &["native"]);

    // A partition during the download.
    gateway.publish(|gateway| gateway.publish(&noise("1.0.0")));
    let before = bytes_received(&container);
    gateway.fleet(&fleet("1.0.0"));
    // So much that a second download of it would show.
    wait_for_status(&container, "a part of the download", |status| {
        agent(status, "noise").is_some_and(|agent| agent["download"]["bytes"].as_u64() > Some(3 << 20))
    });
    done(&container, "ip link set near down");
    // The download notices it too: its connection would survive a shorter partition.
    let cut = wait_for_status(&container, "the partition to be noticed", |status| {
        let gave_up = agent(status, "noise").is_some_and(|agent| agent["lastError"].is_string());
        status["gateway"]["connected"] == false && gave_up
    });
    let arrived = agent(&cut, "noise").and_then(|agent| agent["download"]["bytes"].as_u64());
    assert!(arrived.is_none_or(|bytes| bytes < SIZE as u64), "{cut:#}");
    assert_eq!(wait_for_agents(&container, &["native"]), native);
    done(&container, "ip link set near up");
    wait_long(&container, "the rest after the partition", runs("1.0.0"));
    let received = bytes_received(&container) - before;
    // Including the frames' overhead and the heartbeats meanwhile.
    assert!(received < SIZE as u64 * 13 / 10, "{received} bytes came for {SIZE}");

    // Ten percent packet loss in both directions, and a name server that takes three seconds.
    let loss = "table inet fault {
        chain in { type filter hook input priority 0; iifname near numgen random mod 100 < 10 drop; }
        chain out { type filter hook output priority 0; oifname near numgen random mod 100 < 10 drop; }
    }";
    container.write("/root/fault.nft", loss, 0o644);
    done(&container, "nft -f /root/fault.nft");
    names.take(Duration::from_secs(3));
    gateway.publish(|gateway| gateway.publish(&noise("2.0.0")));
    gateway.fleet(&fleet("2.0.0"));
    wait_long(&container, "a release over losses", runs("2.0.0"));
    assert_eq!(wait_for_agents(&container, &["native"]), native);
    done(&container, "nft delete table inet fault");

    // The name server does not respond: running sub-agents continue, and the failure is reported.
    names.take(Duration::from_secs(3600));
    gateway.publish(|gateway| gateway.publish(&noise("3.0.0")));
    gateway.fleet(&fleet("3.0.0"));
    wait_long(&container, "the missing name server to be reported", |status| {
        let gateway = &status["gateway"];
        gateway["connected"] == false && gateway["lastError"].to_string().contains("no name server answered")
    });
    assert_eq!(wait_for_agents(&container, &["native"]), native);
    // The third release may already have been ordered, and its download started.
    let status = status(&container);
    let noise = agent(&status, "noise").expect("it exists");
    assert!(noise["version"] == "2.0.0" && noise["pid"].is_u64(), "{status:#}");
    names.take(Duration::ZERO);
    wait_long(&container, "the release when names are there again", runs("3.0.0"));
    assert_eq!(wait_for_agents(&container, &["native"]), native);
    assert_eq!(done(&container, "ls -A /opt/aops/cache").stdout, "");
}

/// The gateway can only be reached through the proxy, with its password.
const ONLY_BY_PROXY: &str = "table inet fault {
    chain out { type filter hook output priority 0; oifname near tcp dport 8888 reject; }
}";

#[test]
fn the_installers_proxy_is_used_for_every_connection_and_its_password_is_never_shown() {
    let container = Container::bare();
    container.shell(NETWORK).expect_code(0);
    let proxy = ConnectProxy::start(&container.path("/run/netns/far"), (GATEWAY, 3128), "user:sesame");
    let outside = Gateway::stopped();
    outside.publish_self("1.0.0");
    outside.publish(&Package::sleeper("native", "1.0.0"));
    outside.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    let _gateway = Inside::start_at(&container, outside, "10.9.0.1:8888", Some("far"));
    container.write("/root/fault.nft", ONLY_BY_PROXY, 0o644);
    done(&container, "nft -f /root/fault.nft");
    let key = Path::new(DIRECTORY).join("keys/aops.pub").display().to_string();
    let install = |environment: &[&str]| {
        let arguments = ["install", "--service", "none", "--agent-id", "1", "--endpoint", "https://10.9.0.1:8888"];
        let trust = ["--trusted-key", &key, "--pin-first-contact"];
        container.run(&[&["env"], environment, &[PROGRAM], &arguments, &trust].concat())
    };
    let refused = install(&[]);
    assert!(refused.code == 1 && refused.stderr.contains("refused"), "{refused}");
    let refused = install(&["HTTPS_PROXY=http://user:wrong-sesame@10.9.0.1:3128"]);
    let words = ["through the proxy http://10.9.0.1:3128", "407", "http://user:password@host:port", "noProxy"];
    assert!(refused.code == 1 && words.iter().all(|word| refused.stderr.contains(word)), "{refused}");
    assert!(!refused.text().contains("sesame"), "{refused}");

    let installed = install(&["HTTPS_PROXY=http://user:sesame@10.9.0.1:3128"]).expect_code(0);
    assert!(installed.stderr.contains("saving the environment's proxy http://10.9.0.1:3128"), "{installed}");
    // Restarted without any of the environment.
    container.run(&["/opt/aops/control", "stop"]).expect_code(0);
    container.run(&["/opt/aops/control", "start"]).expect_code(0);
    wait_for_agents(&container, &["native"]);
    assert_eq!(status(&container)["gateway"]["connected"], true);
    let asked = proxy.requests();
    assert!(asked.iter().all(|asked| asked == "10.9.0.1:8888" || asked == "407"), "{asked:?}");

    assert_eq!(done(&container, "stat -c %a /opt/aops/etc/conf.toml").stdout, "600\n");
    let shown = [installed.text(), status(&container).to_string()].concat();
    assert!(!shown.contains("sesame"), "{shown}");
    let kept = done(&container, "grep -rl sesame /opt/aops").stdout;
    let mut kept: Vec<&str> = kept.lines().collect();
    kept.sort_unstable();
    assert_eq!(kept, ["/opt/aops/etc/conf.toml", "/opt/aops/state/conf.good.toml"]);
}
