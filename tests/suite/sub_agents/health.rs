//! Health checks: a sub-agent that is unhealthy for too long is restarted under its restart policy, and the status and events show it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::sub_agents::supervision::without_manager;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::{is_alive, marked};
use crate::support::wait::wait_for;

/// The deadline for a `control` script to be run.
const SCRIPT_ASKED: Duration = Duration::from_secs(60);
/// The deadline for a `control` script to fail often enough: every 30 s, with a timeout of 10 s.
const SCRIPT_GIVEN_UP: Duration = Duration::from_secs(240);

/// A server that sends the same status to every request; the status can be changed.
struct Web {
    port: u16,
    status: Arc<AtomicU16>,
}

impl Web {
    fn answering(status: u16) -> Web {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
        let port = listener.local_addr().expect("it is bound").port();
        let web = Web { port, status: Arc::new(AtomicU16::new(status)) };
        let status = Arc::clone(&web.status);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = serve(stream, status.load(Ordering::Relaxed));
            }
        });
        web
    }

    fn answer(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }
}

fn serve(mut stream: TcpStream, status: u16) -> std::io::Result<()> {
    let request = BufReader::new(stream.try_clone()?);
    let _ = request.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).count();
    write!(stream, "HTTP/1.1 {status} Told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

/// A sleeping sub-agent with these lines in `[health]`.
fn sleeper(name: &str, health: &str) -> Package {
    Package::script(name, "1.0", "exec sleep 1000000", &format!("[health]\n{health}"))
}

/// A sub-agent checked by `check`, a shell script that finds the test's files three directories up.
fn checked(name: &str, check: &str, health: &str) -> Package {
    let health = format!("exec = [\"bin/check\"]\ninterval = \"1s\"\n{health}");
    sleeper(name, &health).with_file("bin/check", format!("#!/bin/sh\ncd ../../../..\n{check}\n"), 0o755)
}

#[track_caller]
fn joined(packages: &[&Package]) -> (Gateway, TestHost) {
    let wanted: Vec<_> = packages.iter().map(|package| (package.name(), package.version(), "")).collect();
    let gateway = Gateway::with(packages, &wanted);
    let host = TestHost::new();
    // A temporary directory is not accessible to other users; some checks run as another user.
    fs::set_permissions(host.beside("."), fs::Permissions::from_mode(0o711)).expect("it is ours");
    host.join(&gateway, &[]).expect_success();
    (gateway, host)
}

/// Waits until a sub-agent is in that state, with a last error that contains `error`, and returns its status.
#[track_caller]
fn wait_for_state(host: &TestHost, name: &str, state: &str, error: &str, deadline: Duration) -> Value {
    let status = host.wait_for_status(&format!("{name} to be {state}"), deadline, |status| {
        agent(status, name)
            .is_some_and(|agent| agent["state"] == state && agent["lastError"].to_string().contains(error))
    });
    agent(&status, name).expect("it was waited for").clone()
}

fn events(gateway: &Gateway, name: &str) -> Vec<(String, String)> {
    let hosts = gateway.status()["hosts"][0]["events"].as_array().cloned().unwrap_or_default();
    let of_it = hosts.into_iter().filter(|event| event["agent"] == name);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    of_it
        .map(|event| (format!("{} {}", text(&event["kind"]), text(&event["outcome"])), text(&event["message"])))
        .collect()
}

#[track_caller]
fn wait_for_event(gateway: &Gateway, name: &str, deadline: Duration, what: &str, message: &str) {
    wait_for(&format!("the gateway to receive an event of {name}: {what}"), deadline, || {
        events(gateway, name).iter().any(|(kind, text)| kind == what && text.contains(message)).then_some(())
    });
}

/// The number of times that a check has written to a file beside the home.
fn count(host: &TestHost, file: &str) -> usize {
    fs::read_to_string(host.beside(file)).map_or(0, |text| text.lines().count())
}

#[track_caller]
fn wait_for_count(host: &TestHost, file: &str, least: usize) {
    wait_for(&format!("{least} lines in {file}"), SOON, || (count(host, file) >= least).then_some(()));
}

fn touch(host: &TestHost, file: &str) {
    fs::write(host.beside(file), "").expect("a temporary directory can be written");
}

#[test]
fn an_unhealthy_http_sub_agent_is_shown_and_restarted_under_its_policy() {
    let web = Web::answering(200);
    let http = format!("http = \"http://127.0.0.1:{}/healthz\"\ninterval = \"1s\"\ntimeout = \"5s\"", web.port);
    let packages = [
        sleeper("patient", &format!("{http}\nfailures = 100")),
        sleeper("strict", &format!("{http}\nfailures = 2\nstartPeriod = 0")),
        sleeper("unasked", "tcp = \"127.0.0.1:1\"\ninterval = \"1h\"\nstartPeriod = 0"),
    ];
    let (gateway, host) = joined(&packages.each_ref());
    let [patient, strict, unasked] = ["patient", "strict", "unasked"].map(|name| host.wait_for_agent(name));
    assert_eq!(host.status()["state"], "running");

    web.answer(503);
    let seen = wait_for_state(&host, "patient", "unhealthy", "/healthz answered 503", SOON);
    assert_eq!(pid(&seen["pid"]), Some(patient));
    assert_eq!(host.status()["state"], "degraded");
    wait_for("the gateway to see it", SOON, || {
        let status = gateway.status();
        let agents = status["hosts"][0]["agents"].as_array().cloned().unwrap_or_default();
        agents.iter().any(|agent| agent["name"] == "patient" && agent["state"] == "unhealthy").then_some(())
    });
    wait_for_event(&gateway, "patient", SOON, "health failed", "answered 503");
    wait_for_event(&gateway, "strict", SOON, "restart failed", "answered 503");
    // At once the first time, with a delay the next.
    let waiting = wait_for_state(&host, "strict", "backoff", "answered 503", SOON);
    assert!(waiting["restarts"].as_u64() >= Some(2) && waiting["pid"].is_null(), "{waiting:#}");
    wait_for_event(&gateway, "strict", SOON, "backoff failed", "restarting in");
    assert!(!is_alive(strict));
    assert!(is_alive(patient), "fewer failures than it may have");

    web.answer(302);
    let well = wait_for_state(&host, "patient", "running", "null", SOON);
    assert_eq!((pid(&well["pid"]), &well["restarts"]), (Some(patient), &0.into()));
    wait_for_event(&gateway, "patient", SOON, "health ok", "");
    let strict = host.wait_for_new_pid("strict", strict);
    let status = host.wait_for_status("everything to run", SOON, |status| status["state"] == "running");
    assert_eq!(pid(&agent(&status, "strict").expect("it exists")["pid"]), Some(strict));
    let left = agent(&status, "unasked").expect("it exists");
    assert_eq!((pid(&left["pid"]), &left["restarts"]), (Some(unasked), &0.into()), "it has not been checked yet");
}

#[test]
fn a_silent_server_fails_an_http_check_and_passes_a_tcp_check_while_it_listens() {
    // The kernel accepts the connection; no program ever responds.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
    let address = silent.local_addr().expect("it is bound");
    let each = "interval = \"1s\"\ntimeout = \"1s\"\nfailures = 2\nstartPeriod = 0";
    let packages = [
        sleeper("by-http", &format!("http = \"http://{address}/\"\n{each}")),
        sleeper("by-tcp", &format!("tcp = \"{address}\"\n{each}")),
    ];
    let (_gateway, host) = joined(&packages.each_ref());
    let tcp = host.wait_for_agent("by-tcp");
    wait_for_state(&host, "by-http", "backoff", "no answer within 1s", SOON);
    let status = host.status();
    let by_tcp = agent(&status, "by-tcp").expect("it exists");
    assert_eq!((&by_tcp["state"], pid(&by_tcp["pid"])), (&"running".into(), Some(tcp)), "{status:#}");

    drop(silent);
    wait_for_state(&host, "by-tcp", "backoff", "cannot connect to", SOON);
    assert!(!is_alive(tcp));
}

#[test]
fn only_consecutive_failures_count_and_a_hung_check_is_killed_and_counts() {
    // Two failures, a success, and so on.
    let flaps = "date +%s%3N >>flaps; [ -f sick ] && exit 4; [ $(($(wc -l <flaps) % 3)) -eq 0 ]";
    let hangs = "echo x >>hangs; [ -f hang ] || exit 0; trap '' TERM; setsid sleep 1000000 & sleep 1000000";
    let user = "[ \"$(id -un)\" = nobody ] && echo \"$AOPS_AGENT_NAME is well\"";
    let packages = [
        checked("flapping", flaps, "failures = 3\nstartPeriod = 0"),
        checked("hanging", hangs, "failures = 2\ntimeout = \"1s\"\nstartPeriod = 0"),
        Package::script(
            "nobodys",
            "1.0",
            "exec sleep 1000000",
            "user = \"nobody\"\n[health]\nexec = [\"bin/check\"]\ninterval = \"1s\"",
        )
        .with_file("bin/check", format!("#!/bin/sh\n{user}\n"), 0o755),
    ];
    let (_gateway, host) = joined(&packages.each_ref());
    let [flapping, hanging, _] = ["flapping", "hanging", "nobodys"].map(|name| host.wait_for_agent(name));
    wait_for_count(&host, "flaps", 9);
    let asked = fs::read_to_string(host.beside("flaps")).expect("it was counted");
    let asked: Vec<u64> = asked.lines().map_while(|line| line.parse().ok()).collect();
    assert!(asked.windows(2).all(|two| two[1] - two[0] >= 900), "not asked once a second: {asked:?}");
    let status = host.status();
    let seen = agent(&status, "flapping").expect("it exists");
    assert_eq!((pid(&seen["pid"]), &seen["restarts"]), (Some(flapping), &0.into()), "{status:#}");
    touch(&host, "sick");
    wait_for_state(&host, "flapping", "backoff", "bin/check exited with 4", SOON);
    assert!(!is_alive(flapping));

    touch(&host, "hang");
    let waiting = wait_for_state(&host, "hanging", "backoff", "no answer within 1s", SOON);
    assert!(waiting["restarts"].as_u64() >= Some(2));
    assert!(!is_alive(hanging));
    assert_eq!(marked(&host.home(), "hanging"), Vec::<u32>::new(), "nothing is left of it, nor of what asked after it");
    wait_for("what a check says to be in the log", SOON, || {
        host.control(&["logs", "nobodys"]).expect_success().contains("nobodys is well\n").then_some(())
    });
}

#[test]
fn a_start_period_ends_with_the_first_success() {
    let packages = [
        checked("slow", "echo x >>slow; [ -f ready ]", "failures = 1\nstartPeriod = \"10m\""),
        Package::script(
            "never-well",
            "1.0",
            "echo \"$(date +%s%3N)\" >>../../../../runs; exec sleep 1000000",
            "[health]\nexec = [\"bin/check\"]\ninterval = \"1s\"\nfailures = 1\nstartPeriod = \"5s\"",
        )
        .with_file("bin/check", "#!/bin/sh\nexit 1\n", 0o755),
    ];
    let (_gateway, host) = joined(&packages.each_ref());
    wait_for_count(&host, "slow", 4);
    let starting = wait_for_state(&host, "slow", "starting", "not healthy yet: bin/check exited with 1", SOON);
    let slow = pid(&starting["pid"]).expect("it runs");
    assert_eq!(starting["restarts"], 0);
    touch(&host, "ready");
    assert_eq!(host.wait_for_agent("slow"), slow);

    wait_for_count(&host, "runs", 2);
    let runs = fs::read_to_string(host.beside("runs")).expect("it was read before");
    let runs: Vec<u64> = runs.lines().map(|line| line.parse().expect("a time")).collect();
    assert!(runs[1] - runs[0] >= 4_500, "its start period was not waited for: {runs:?}");

    fs::remove_file(host.beside("ready")).expect("it exists");
    wait_for("one failure to be enough now", SOON, || (!is_alive(slow)).then_some(()));
}

#[test]
fn the_next_manager_continues_the_health_checks() {
    let package = checked("asked", "echo x >>asked; [ ! -f sick ]", "failures = 2\nstartPeriod = \"3s\"");
    let (_gateway, host) = joined(&[&package]);
    let running = host.wait_for_agent("asked");
    host.kill(host.role_pid("spm").expect("it runs"));
    host.wait_for_status("the next manager", SOON, |status| status["spm"]["restarts"] == 1);
    assert_eq!(host.wait_for_agent("asked"), running);
    let before = count(&host, "asked");
    wait_for_count(&host, "asked", before + 3);
    touch(&host, "sick");
    wait_for("it to be ended", SOON, || (!is_alive(running)).then_some(()));
    fs::remove_file(host.beside("sick")).expect("it exists");
    let next = host.wait_for_new_pid("asked", running);

    // An event without a manager is not lost either.
    without_manager(&host, || touch(&host, "sick"));
    wait_for("it to be ended", SOON, || (!is_alive(next)).then_some(()));
}

#[test]
fn a_hung_control_script_is_unhealthy_and_one_that_prints_stoped_is_restarted() {
    let script = |name: &str| {
        let control = "#!/bin/sh
case $1 in
start) setsid sleep 1000000 & ;;
status)
    up=../../../..
    [ -f $up/hang ] && [ $AOPS_AGENT_NAME = hanging ] && sleep 1000000
    if [ -f $up/gone ] && [ $AOPS_AGENT_NAME = gone ]; then echo stoped; else echo started; fi
    ;;
esac
";
        Package::control_sleeper(name, "1.0").with_file("control", control, 0o755)
    };
    let packages = [script("hanging"), script("gone")];
    let (gateway, host) = joined(&packages.each_ref());
    let [hanging, gone] = ["hanging", "gone"].map(|name| host.wait_for_agent(name));
    touch(&host, "hang");
    touch(&host, "gone");
    wait_for_event(&gateway, "gone", SCRIPT_ASKED, "restart failed", "`control status` reports that it is stopped");
    wait_for("its end", SOON, || (!is_alive(gone)).then_some(()));
    fs::remove_file(host.beside("gone")).expect("it exists");
    host.wait_for_new_pid("gone", gone);

    let seen = wait_for_state(&host, "hanging", "unhealthy", "no answer within 10s", SCRIPT_GIVEN_UP);
    assert_eq!((pid(&seen["pid"]), &seen["restarts"]), (Some(hanging), &0.into()));
    wait_for("it to be given up", SCRIPT_GIVEN_UP, || (!is_alive(hanging)).then_some(()));
    host.wait_for_new_pid("hanging", hanging);
    assert_eq!(agent(&host.status(), "hanging").expect("it exists")["restarts"], 1);
}

#[test]
fn an_impossible_health_check_is_rejected_at_publication() {
    let gateway = Gateway::stopped();
    for (health, error) in [
        ("", "set one of http, tcp, exec"),
        ("tcp = \"127.0.0.1:80\"\nhttp = \"http://127.0.0.1/\"", "more than one of http, tcp, exec"),
        ("http = \"127.0.0.1:80\"", "[health] http \"127.0.0.1:80\" is not an http:// or https:// URL"),
        ("tcp = \"127.0.0.1\"", "[health] tcp \"127.0.0.1\" is not host:port"),
        ("exec = [\"/bin/true\"]", "[health] exec \"/bin/true\" is not a path inside the package"),
        ("exec = [\"bin/none\"]", "runs bin/none, which is not in the package"),
        ("tcp = \"a:1\"\ninterval = \"100ms\"", "[health] interval must be from 1s to 1h"),
        ("tcp = \"a:1\"\ntimeout = 0", "[health] timeout must be from 100ms to 5m"),
        ("tcp = \"a:1\"\nfailures = 0", "[health] failures must be from 1 to 100"),
        ("tcp = \"a:1\"\nstartPeriod = \"2h\"", "[health] startPeriod must be from 0s to 1h"),
        ("tcp = \"a:1\"\nretries = 3", "unknown field `retries`"),
        ("tcp = \"a:1\"\n[limits]\nmemory = \"1MiB\"", "unknown field `limits`"),
    ] {
        let package = sleeper("bad", health);
        let output = gateway.publish_with(&[&package.path().display().to_string()]);
        assert_eq!(output.code, 1, "{health}: {output}");
        assert!(output.stderr.contains(error), "{health}: {output}");
    }
    gateway.publish_with(&[&sleeper("good", "tcp = \"a:1\"").path().display().to_string()]).expect_success();
}
