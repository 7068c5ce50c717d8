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

async fn asked(url: &str, timeout: Duration) -> CheckResult {
    ask(HealthQuery { timeout, of: QueryKind::Http(url.parse().unwrap()) }).await
}

fn because(answer: CheckResult, why: &str) {
    assert!(matches!(&answer, CheckResult::Unhealthy(text) if text.contains(why)), "{answer:?}, expected: {why}");
}

#[tokio::test]
async fn an_answer_of_2xx_or_3xx_is_healthy_and_no_redirect_is_followed() {
    let server = Server::plain(|asked| {
        assert!(asked.headers.contains_key("host"));
        let status = asked.path.rsplit('/').next().and_then(|word| word.parse().ok()).unwrap_or(599);
        CannedResponse { headers: vec![("location", "/s/500".to_owned())], ..CannedResponse::status(status) }
    });
    let url = |status: u16| format!("{}/s/{status}", server.endpoint().origin());
    for status in [200, 204, 301, 307, 399] {
        assert_eq!(asked(&url(status), TIMEOUT).await, CheckResult::Healthy, "{status}");
    }
    for status in [400, 404, 500, 503] {
        because(asked(&url(status), TIMEOUT).await, &format!("answered {status}"));
    }
}

#[tokio::test]
async fn a_certificate_is_not_judged_and_plain_speech_on_a_tls_port_is_a_failure() {
    let identity = self_signed(&["another.example"], |params| {
        params.not_after = params.not_before;
    });
    let server = Server::tls(&identity, |_| CannedResponse::ok("fine"));
    let origin = server.endpoint().origin();
    assert_eq!(asked(&origin, TIMEOUT).await, CheckResult::Healthy);
    assert!(matches!(asked(&origin.replace("https", "http"), TIMEOUT).await, CheckResult::Unhealthy(_)));
    let plain = Server::plain(|_| CannedResponse::ok("fine"));
    let wrong = plain.endpoint().origin().replace("http:", "https:");
    because(asked(&wrong, TIMEOUT).await, "cannot complete the TLS handshake");
}

#[tokio::test]
async fn who_accepts_and_says_nothing_is_well_by_tcp_and_not_by_http() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let tcp =
        |host: &str| HealthQuery { timeout: TIMEOUT, of: QueryKind::Tcp(Address { host: host.to_owned(), port }) };
    assert_eq!(ask(tcp("127.0.0.1")).await, CheckResult::Healthy);
    assert_eq!(ask(tcp("localhost")).await, CheckResult::Healthy);
    because(asked(&format!("http://127.0.0.1:{port}/"), SHORT).await, "no answer within 300ms");
    drop(listener);
    because(ask(tcp("127.0.0.1")).await, "cannot connect to 127.0.0.1");
    because(asked(&format!("http://localhost:{port}/"), TIMEOUT).await, "cannot connect to localhost");
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
    let spec = Spec { env: BTreeMap::from([("TOLD".to_owned(), "2".into())]) };
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
async fn a_program_is_asked_with_the_environment_of_its_sub_agent_and_speaks_to_its_log() {
    let (_directory, start) = exec("echo $1 $OWN $TOLD $AOPS_AGENT_NAME $(pwd); [ -f agent.toml ]", "20s");
    assert_eq!(ask(HealthQuery::of(start.clone()).unwrap()).await, CheckResult::Healthy);
    let log = fs::read_to_string(start.home.agent_log(&start.name)).unwrap();
    assert_eq!(log, format!("word 1 2 a {}\n", start.directory().display()));
    let (_directory, start) = exec("exit 3", "20s");
    because(ask(HealthQuery::of(start).unwrap()).await, "check exited with 3");
    let (_directory, start) = exec("kill -9 $$", "20s");
    because(ask(HealthQuery::of(start).unwrap()).await, "killed by signal 9");
    let (_directory, start) = exec("", "20s");
    fs::remove_file(start.directory().join("check")).unwrap();
    because(ask(HealthQuery::of(start).unwrap()).await, "cannot run check");
}

fn of_home(start: &StartSpec) -> usize {
    platform::processes(start.home.root()).iter().filter(|process| process.marker.is_some()).count()
}

#[tokio::test]
async fn nothing_is_left_of_a_program_that_does_not_answer_in_time() {
    // In its process group, in a session of its own, ignoring TERM, and without the marker.
    let tree =
        "trap '' TERM; sleep 1000 & setsid sleep 1000 & env -i /bin/sleep 1000 & : >ready; while :; do sleep 1; done";
    let (_directory, start) = exec(tree, "2s");
    because(ask(HealthQuery::of(start.clone()).unwrap()).await, "no answer within 2s");
    assert!(start.directory().join("ready").exists());
    assert_eq!(of_home(&start), 0);
    let in_it = |process: &platform::ProcessInfo| platform::working_directory(process.pid) == Some(start.directory());
    assert_eq!(platform::processes(start.home.root()).iter().filter(|process| in_it(process)).count(), 0);
}

#[tokio::test]
async fn nothing_is_left_in_the_group_of_a_program_that_answered() {
    let (_directory, start) = exec("sleep 1000 &\nexit 0", "20s");
    assert_eq!(ask(HealthQuery::of(start.clone()).unwrap()).await, CheckResult::Healthy);
    wait_until("its background process is gone", || of_home(&start) == 0).await;
}

#[tokio::test]
async fn what_asks_is_no_member_of_the_sub_agent_and_is_ended_with_it() {
    use crate::process::stop;
    use crate::process::tree::{self, StopTarget};
    let (_directory, start) = exec(": >ready; exec sleep 1000", "60s");
    let question = tokio::spawn(ask(HealthQuery::of(start.clone()).unwrap()));
    wait_until("it runs", || start.directory().join("ready").exists()).await;
    let target = StopTarget::of(&start.name, None, None);
    assert_eq!((of_home(&start), tree::members(&start.home, &target).len()), (1, 0));
    let home = start.home.clone();
    tokio::task::spawn_blocking(move || stop::end(&home, &[target]).unwrap()).await.unwrap();
    because(question.await.unwrap(), "killed by signal 9");
}

#[tokio::test]
async fn a_question_that_is_dropped_takes_its_program_with_it() {
    // One of them is in a session of its own.
    let (_directory, start) = exec("setsid sleep 1000 & sleep 1000 & : >ready; wait", "60s");
    let question = tokio::spawn(ask(HealthQuery::of(start.clone()).unwrap()));
    wait_until("it runs", || start.directory().join("ready").exists()).await;
    wait_until("all of it runs", || of_home(&start) == 3).await;
    question.abort();
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
async fn a_control_script_is_asked_for_its_status() {
    let status = |script: &'static str| async move {
        let (_directory, start) = release(None, &[("control", script)]);
        ask(HealthQuery { timeout: Duration::from_secs(3), of: QueryKind::Script(Box::new(start)) }).await
    };
    assert_eq!(status("[ $1 = status ] && echo started").await, CheckResult::Healthy);
    assert_eq!(status("echo what; exit 1").await, CheckResult::Healthy);
    assert_eq!(
        status("sleep 2 & echo started").await,
        CheckResult::Healthy,
        "an output that stays open does not matter"
    );
    assert!(matches!(status("echo stoped").await, CheckResult::Gone(_)));
    because(status("echo started; exec >&-; sleep 1000").await, "no answer within 3s");
    because(status("sleep 1000").await, "no answer within 3s");
}
