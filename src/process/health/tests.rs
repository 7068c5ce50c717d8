//! Checks of servers and programs with given answers.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::core::order::Spec;
use crate::endpoint::testing::{CannedResponse, Server, self_signed};
use crate::home::Home;
use crate::process::launch;

const TIMEOUT: Duration = Duration::from_secs(20);
/// For a server that does not answer.
const SHORT: Duration = Duration::from_millis(300);

async fn get(url: &str, timeout: Duration) -> CheckResult {
    run_check(HealthQuery { timeout, kind: QueryKind::Http(url.parse().unwrap()) }).await
}

fn assert_unhealthy(answer: CheckResult, why: &str) {
    assert!(matches!(&answer, CheckResult::Unhealthy(text) if text.contains(why)), "{answer:?}, expected: {why}");
}

#[tokio::test]
async fn a_2xx_or_3xx_status_is_healthy_and_redirects_are_not_followed() {
    let server = Server::plain(|request| {
        assert!(request.headers.contains_key("host"));
        let status = request.path.rsplit('/').next().and_then(|word| word.parse().ok()).unwrap_or(599);
        CannedResponse { headers: vec![("location", "/s/500".to_owned())], ..CannedResponse::status(status) }
    });
    let url = |status: u16| format!("{}/s/{status}", server.endpoint().origin());
    for status in [200, 204, 301, 307, 399] {
        assert_eq!(get(&url(status), TIMEOUT).await, CheckResult::Healthy, "{status}");
    }
    for status in [400, 404, 500, 503] {
        assert_unhealthy(get(&url(status), TIMEOUT).await, &format!("answered {status}"));
    }
}

#[tokio::test]
async fn a_certificate_is_not_verified_and_plain_http_on_a_tls_port_is_unhealthy() {
    let identity = self_signed(&["another.example"], |params| {
        params.not_after = params.not_before;
    });
    let server = Server::tls(&identity, |_| CannedResponse::ok("fine"));
    let origin = server.endpoint().origin();
    assert_eq!(get(&origin, TIMEOUT).await, CheckResult::Healthy);
    assert!(matches!(get(&origin.replace("https", "http"), TIMEOUT).await, CheckResult::Unhealthy(_)));
    let plain = Server::plain(|_| CannedResponse::ok("fine"));
    let wrong = plain.endpoint().origin().replace("http:", "https:");
    assert_unhealthy(get(&wrong, TIMEOUT).await, "cannot complete the TLS handshake");
}

#[tokio::test]
async fn a_server_that_accepts_and_sends_nothing_is_healthy_by_tcp_only() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let tcp =
        |host: &str| HealthQuery { timeout: TIMEOUT, kind: QueryKind::Tcp(Address { host: host.to_owned(), port }) };
    assert_eq!(run_check(tcp("127.0.0.1")).await, CheckResult::Healthy);
    assert_eq!(run_check(tcp("localhost")).await, CheckResult::Healthy);
    assert_unhealthy(get(&format!("http://127.0.0.1:{port}/"), SHORT).await, "no answer within 300ms");
    drop(listener);
    assert_unhealthy(run_check(tcp("127.0.0.1")).await, "cannot connect to 127.0.0.1");
    assert_unhealthy(get(&format!("http://localhost:{port}/"), TIMEOUT).await, "cannot connect to localhost");
}

/// A release with these executable shell scripts.
fn release(manifest: Option<&str>, scripts: &[(&str, &str)]) -> (TempDir, StartSpec) {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    let (name, version) = ("a".parse().unwrap(), "1".parse().unwrap());
    let release = home.release(&name, &version);
    fs::create_dir_all(&release).unwrap();
    fs::create_dir_all(home.agent_logs()).unwrap();
    if let Some(more) = manifest {
        let text = format!("name = \"a\"\nversion = \"1\"\n[run]\ncommand = [\"x\"]\n[env]\nOWN = \"1\"\n{more}");
        fs::write(release.join("agent.toml"), text).unwrap();
    }
    for (file, text) in scripts {
        fs::write(release.join(file), format!("#!/bin/sh\n{text}\n")).unwrap();
        crate::platform::set_mode(&release.join(file), 0o755).unwrap();
    }
    let program = launch::inspect(&home, &name, &version).unwrap();
    let spec = Spec { env: BTreeMap::from([("ORDERED".to_owned(), "2".into())]) };
    let agent_id = "5402204854438".parse().unwrap();
    let start =
        StartSpec { home, name, version, program, spec, agent_id, endpoint: String::new(), restarts: 0, groups: None };
    (directory, start)
}

fn exec(script: &str, timeout: &str) -> (TempDir, StartSpec) {
    let health = format!("[health]\nexec = [\"check\", \"word\"]\ntimeout = {timeout:?}\n");
    release(Some(&health), &[("check", script)])
}

#[tokio::test]
async fn a_check_has_the_environment_of_its_sub_agent_and_writes_to_its_log() {
    let (_directory, start) = exec("echo $1 $OWN $ORDERED $AOPS_AGENT_NAME $(pwd); [ -f agent.toml ]", "20s");
    assert_eq!(run_check(HealthQuery::of(start.clone()).unwrap()).await, CheckResult::Healthy);
    let log = fs::read_to_string(start.home.agent_log(&start.name)).unwrap();
    assert_eq!(log, format!("word 1 2 a {}\n", start.directory().display()));
    let (_directory, start) = exec("exit 3", "20s");
    assert_unhealthy(run_check(HealthQuery::of(start).unwrap()).await, "check exited with 3");
    let (_directory, start) = exec("kill -9 $$", "20s");
    assert_unhealthy(run_check(HealthQuery::of(start).unwrap()).await, "killed by signal 9");
    let (_directory, start) = exec("", "20s");
    fs::remove_file(start.directory().join("check")).unwrap();
    assert_unhealthy(run_check(HealthQuery::of(start).unwrap()).await, "cannot run check");
}

fn of_home(start: &StartSpec) -> usize {
    platform::processes(start.home.root()).iter().filter(|process| process.marker.is_some()).count()
}

#[tokio::test]
async fn a_check_that_times_out_is_killed_with_everything_that_it_started() {
    // In its process group, in a session of its own, ignoring TERM, and without the marker.
    let tree =
        "trap '' TERM; sleep 1000 & setsid sleep 1000 & env -i /bin/sleep 1000 & : >ready; while :; do sleep 1; done";
    let (_directory, start) = exec(tree, "2s");
    assert_unhealthy(run_check(HealthQuery::of(start.clone()).unwrap()).await, "no answer within 2s");
    assert!(start.directory().join("ready").exists());
    assert_eq!(of_home(&start), 0);
    let in_it = |process: &platform::ProcessInfo| platform::working_directory(process.pid) == Some(start.directory());
    assert_eq!(platform::processes(start.home.root()).iter().filter(|process| in_it(process)).count(), 0);
}

#[tokio::test]
async fn the_process_group_of_a_finished_check_is_killed() {
    let (_directory, start) = exec("sleep 1000 &\nexit 0", "20s");
    assert_eq!(run_check(HealthQuery::of(start.clone()).unwrap()).await, CheckResult::Healthy);
    wait_until("its background process is gone", || of_home(&start) == 0).await;
}

#[tokio::test]
async fn a_check_is_not_a_member_of_the_sub_agent_and_is_killed_with_it() {
    use crate::process::stop;
    use crate::process::tree::{self, StopTarget};
    let (_directory, start) = exec(": >ready; exec sleep 1000", "60s");
    let check = tokio::spawn(run_check(HealthQuery::of(start.clone()).unwrap()));
    wait_until("it runs", || start.directory().join("ready").exists()).await;
    let target = StopTarget::of(&start.name, None, None);
    assert_eq!((of_home(&start), tree::members(&start.home, &target).len()), (1, 0));
    let home = start.home.clone();
    tokio::task::spawn_blocking(move || stop::stop_targets(&home, &[target]).unwrap()).await.unwrap();
    assert_unhealthy(check.await.unwrap(), "killed by signal 9");
}

#[tokio::test]
async fn a_dropped_check_is_killed() {
    // One of them is in a session of its own.
    let (_directory, start) = exec("setsid sleep 1000 & sleep 1000 & : >ready; wait", "60s");
    let check = tokio::spawn(run_check(HealthQuery::of(start.clone()).unwrap()));
    wait_until("it runs", || start.directory().join("ready").exists()).await;
    wait_until("all of it runs", || of_home(&start) == 3).await;
    check.abort();
    wait_until("all of its processes are gone", || of_home(&start) == 0).await;
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < deadline, "timed out after {TIMEOUT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_control_script_is_checked_by_its_status() {
    let status = |script: &'static str| async move {
        let (_directory, start) = release(None, &[("control", script)]);
        run_check(HealthQuery { timeout: Duration::from_secs(3), kind: QueryKind::Script(Box::new(start)) }).await
    };
    assert_eq!(status("[ $1 = status ] && echo started").await, CheckResult::Healthy);
    assert_eq!(status("echo what; exit 1").await, CheckResult::Healthy);
    assert_eq!(
        status("sleep 2 & echo started").await,
        CheckResult::Healthy,
        "an output that stays open does not matter"
    );
    assert!(matches!(status("echo stoped").await, CheckResult::Gone(_)));
    assert_unhealthy(status("echo started; exec >&-; sleep 1000").await, "no answer within 3s");
    assert_unhealthy(status("sleep 1000").await, "no answer within 3s");
}
