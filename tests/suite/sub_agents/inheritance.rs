//! A sub-agent inherits nothing from the caller of the manager, however it was started.

use std::fs;
use std::process::{Command, Stdio};

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::package::Package;
use crate::support::processes::is_alive;
use crate::support::wait::wait_for;

/// As users start agents from a terminal or with ansible, and worse: `$0` is the manager.
const CALLER: &str =
    "trap '' HUP QUIT USR1; umask 077; ulimit -S -n 100; ulimit -S -c unlimited; echo 700 >/proc/self/oom_score_adj
exec 9</dev/null; exec nice -n 5 taskset -c 0 setarch -R \"$0\" --home \"$1\"";

#[test]
fn a_sub_agent_inherits_nothing_from_the_managers_caller() {
    let waits = "trap 'echo GOT-QUIT; exit 0' QUIT; while :; do sleep 0.2 & wait $!; done";
    let packages = [
        Package::script("native", "1.0", waits, "stopSignal = \"QUIT\"\ngracePeriod = \"20s\""),
        Package::control_sleeper("classic", "1.0"),
    ];
    let gateway = Gateway::with(&packages.each_ref(), &[("native", "1.0", ""), ("classic", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    host.control(&["stop"]).expect_success();
    fs::remove_file(host.home().join("state/stopped.json")).expect("the recorded stop");
    let mut manager = Command::new("bash")
        .args(["-c", CALLER])
        .arg(host.home().join("bin/aops-spm"))
        .arg(host.home())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cannot run bash");
    let pids = ["native", "classic"].map(|name| host.wait_for_agent(name));
    let read = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it runs");
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let of_manager = read(manager.id(), "status");
    assert!(field(&of_manager, "SigIgn:")[0].ends_with('5'), "the manager has it of its caller: {of_manager}");
    assert_eq!(field(&of_manager, "Cpus_allowed_list:"), ["0"]);
    let of_first = read(1, "status");
    let privileged =
        |bit: u64| u64::from_str_radix(&field(&of_manager, "CapEff:")[0], 16).expect("hex") & 1 << bit != 0;
    // The shell of that `control` script runs its program with nohup in the background: without HUP, INT and QUIT.
    for (pid, own) in pids.into_iter().zip([0, 0b111]) {
        let (status, limits) = (read(pid, "status"), read(pid, "limits"));
        for name in ["SigIgn:", "SigBlk:"] {
            let ignored = u64::from_str_radix(&field(&status, name)[0], 16).expect("hex");
            assert_eq!(ignored & !own, 0, "{name} of {pid}: {status}");
        }
        assert_eq!(field(&status, "Umask:"), ["0022"]);
        assert_eq!(field(&status, "Cpus_allowed_list:"), field(&of_first, "Cpus_allowed_list:"));
        assert_eq!((read(pid, "oom_score_adj").trim(), read(pid, "personality").trim()), ("0", "00000000"));
        assert_eq!(field(&limits, "Max core file size")[0], "0");
        assert_ne!(field(&limits, "Max open files")[0], "100");
        assert!(
            fs::symlink_metadata(format!("/proc/{pid}/fd/9")).is_err(),
            "a descriptor of the caller is open in {pid}"
        );
        let stat = read(pid, "stat");
        let nice = stat.rsplit_once(") ").and_then(|(_, fields)| fields.split(' ').nth(16)).expect("it has one");
        assert!(nice == "0" || !privileged(23), "{stat}");
    }
    // A signal that the caller ignored is delivered.
    host.control(&["stop"]).expect_success();
    let log = fs::read_to_string(host.home().join("log/agents/native.log")).expect("its log");
    assert!(log.contains("GOT-QUIT"), "{log}");
    wait_for("the manager's end", SOON, || manager.try_wait().expect("it is ours").map(drop));
    assert!(pids.iter().all(|pid| !is_alive(*pid)));
}
