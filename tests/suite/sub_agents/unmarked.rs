//! Sub-agents without environment marker and cgroup: programs that clear or overwrite their environment, and leave session, parent and
//! cgroup. Their `control` script identifies them to the manager, to the next manager, and to a stop or an uninstallation.

use std::fs;

use crate::sub_agents::adoption::ForeignCgroup;
use crate::sub_agents::process_trees::{NONE, Sleepers, joined_in, sleeping};
use crate::sub_agents::supervision::without_manager;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent};
use crate::support::package::Package;
use crate::support::processes::{groups, is_alive};
use crate::support::wait::wait_for;

/// The script starts the program each time, or checks first (`@GUARD@`). The program has a child that survives it.
const CONTROL: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 1
case $1 in
start)
    @GUARD@
    echo "X=$X" >x
    rm -f app.pid
    @START@
    # Until nothing marks it any more.
    until [ -s app.pid ]; do sleep 0.05; done
    ;;
stop)
    kill "$(cat app.pid)"
    rm -f app.pid
    ;;
status) kill -0 "$(cat app.pid)" 2>/dev/null && echo started || echo stoped ;;
pid) cat app.pid ;;
esac
"#;
const GUARD: &str = r#"kill -0 "$(cat app.pid)" 2>/dev/null && exit 0"#;
/// As a program that shows its state in its title: its environment is overwritten.
const LONE: &str = r#"setsid env -i /bin/sh -c 'echo $$ >app.pid; cd /; /bin/sleep @CHILD@ & exec /bin/sleep @MAIN@' </dev/null >/dev/null 2>&1 &"#;
/// As `su - USER` does with logind: into a cgroup of its own, and into a session whose leader has exited.
const MOVED: &str = r#"setsid env -i "E=$(cat "$AOPS_HOME/../elsewhere")" /bin/sh -c 'echo $$ >"$E/cgroup.procs"
        env -i /bin/sh -c "cd /; /bin/sleep @CHILD@ & exec /bin/sleep @MAIN@" & echo $! >app.pid' </dev/null >/dev/null 2>&1"#;

/// The child sleeps this much longer.
const CHILD: u32 = 50_000;

/// A package, and the sleep times of its program and of the program's child, which identify them.
fn package(name: &str, guard: &str, start: &str, number: u32) -> (Package, u32, u32) {
    let main = number + std::process::id() % 40_000;
    let control = control(start, main).replace("@GUARD@", guard);
    (Package::plain(name, "1.0").with_file("control", control, 0o755), main, main + CHILD)
}

fn control(start: &str, main: u32) -> String {
    let control = CONTROL.replace("@START@", start).replace("@MAIN@", &main.to_string());
    control.replace("@CHILD@", &(main + CHILD).to_string())
}

#[test]
fn an_unmarked_program_is_neither_duplicated_nor_left_running() {
    let (plain, plain_main, plain_child) = package("plain", ":", LONE, 4_000_000);
    let (guarded, guarded_main, guarded_child) = package("guarded", GUARD, LONE, 4_100_000);
    // Its script does not print its pid, which is in a file with another name than usual.
    let (nameless, nameless_main, nameless_child) = package("nameless", ":", LONE, 4_300_000);
    let nameless = nameless.with_file(
        "control",
        control(LONE, nameless_main).replace("@GUARD@", ":").replace("app.pid", "app").replace("pid)", "number)"),
        0o755,
    );
    let all = [("plain", plain_main, plain_child), ("guarded", guarded_main, guarded_child)];
    let numbers = [plain_main, plain_child, guarded_main, guarded_child, nameless_main, nameless_child];
    let _guard = Sleepers(numbers.to_vec());
    let wanted = |env| [("plain", "1.0", env), ("guarded", "1.0", env), ("nameless", "1.0", "")];
    let gateway = Gateway::with(&[&plain, &guarded, &nameless], &wanted(""));
    let host = joined_in(NONE, &gateway);
    let one_each = |pids: [u32; 2]| {
        for ((name, main, child), pid) in all.iter().zip(pids) {
            assert_eq!((sleeping(*main), sleeping(*child).len()), (vec![pid], 1), "{name}");
        }
    };
    let none_left = || {
        for (name, main, child) in all {
            assert_eq!((sleeping(main), sleeping(child)), (vec![], vec![]), "{name}");
        }
        // Its script kills the process that it knows; the children of that one cannot be identified.
        assert_eq!(sleeping(nameless_main), [0; 0]);
    };
    let run = || ["plain", "guarded"].map(|name| host.wait_for_agent(name));
    let first = run();
    one_each(first);

    // The next manager finds it by its record; without a record its script reports it, and its configuration is unknown.
    without_manager(&host, || {});
    assert_eq!(run(), first);
    without_manager(&host, || {
        for (name, ..) in all {
            fs::remove_file(host.home().join(format!("run/agents/{name}.json"))).expect("its record");
        }
    });
    let second = ["plain", "guarded"].map(|name| host.wait_for_new_pid(name, first[usize::from(name == "guarded")]));
    one_each(second);

    // Leftovers of a dead one do not run beside the next.
    let left = sleeping(plain_child);
    host.kill(second[0]);
    let third = [host.wait_for_new_pid("plain", second[0]), second[1]];
    assert!(left.iter().all(|pid| !is_alive(*pid)));
    one_each(third);

    gateway.want(&wanted("env = { X = \"new\" }"));
    let fourth = [host.wait_for_new_pid("plain", third[0]), host.wait_for_new_pid("guarded", third[1])];
    one_each(fourth);
    for (name, ..) in all {
        let seen = fs::read_to_string(host.home().join(format!("agents/{name}/1.0/x"))).expect("it was started");
        assert_eq!(seen, "X=new\n", "{name}");
    }

    // If the process cannot be found, the script's word is accepted that it runs.
    host.wait_for_status("what is wrong with the nameless one", SOON, |status| {
        agent(status, "nameless")
            .is_some_and(|agent| agent["lastError"].to_string().contains("not started a second time"))
    });
    assert_eq!(sleeping(nameless_main).len(), 1);

    host.control(&["stop"]).expect_success();
    none_left();
    host.control(&["status"]).expect_code(3);

    // An uninstallation finds them without manager and record.
    host.control(&["start"]).expect_success();
    run();
    wait_for("the nameless one", SOON, || (sleeping(nameless_main).len() == 1).then_some(()));
    let (spm, spa) = (host.role_pid("spm").expect("a manager"), host.role_pid("spa").expect("a watchdog"));
    host.kill(spa);
    host.kill(spm);
    wait_for("the manager's end", SOON, || (!is_alive(spm)).then_some(()));
    fs::remove_dir_all(host.home().join("run/agents")).expect("the records");
    host.control(&["uninstall", "--yes"]).expect_success();
    none_left();
}

#[test]
fn a_program_that_left_its_cgroup_is_adopted_shown_and_stopped() {
    let (old, main, child) = package("old", ":", MOVED, 4_200_000);
    let _guard = Sleepers(vec![main, child]);
    let one = Package::sleeper("one", "1.0");
    let gateway = Gateway::with(&[&one, &old], &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    host.wait_for_agent("one");
    let elsewhere = ForeignCgroup::beside(&groups(&host.home())[0]);
    fs::write(host.beside("elsewhere"), elsewhere.0.display().to_string()).expect("it is ours");
    gateway.want(&[("one", "1.0", ""), ("old", "1.0", "")]);
    let first = host.wait_for_agent("old");
    assert_eq!((sleeping(main), sleeping(child).len()), (vec![first], 1));
    let status = host.status();
    let outside = |name| agent(&status, name).expect("it exists")["outsideGroup"].clone();
    assert_eq!((outside("old"), outside("one").is_null()), (true.into(), true), "{status:#}");
    let shown = host.control(&["status"]).expect_success();
    assert!(shown.contains(&format!("old: process {first} is outside its cgroup")), "{shown}");

    // It has its own session, although that session's leader has exited.
    let left = sleeping(child);
    host.kill(first);
    let second = host.wait_for_new_pid("old", first);
    assert!(left.iter().all(|pid| !is_alive(*pid)));
    assert_eq!(sleeping(main), [second]);

    host.control(&["stop"]).expect_success();
    assert_eq!((sleeping(main), sleeping(child)), (vec![], vec![]));
}
