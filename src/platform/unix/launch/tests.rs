//! Starting children: recorded, grouped, in a frozen or removed group, without a message.

use std::path::PathBuf;

use super::super::{Groups, User};
use super::*;
use crate::platform::testing::PATIENCE;

/// What these tests need.
const NEEDED: &str = "cgroup v2 is mounted and may be written: run the tests as root";

/// A group in a v2 cgroup, where this host allows it. Drop restores the location.
struct TestGroup(Group, PathBuf);

impl TestGroup {
    fn find(test: &str) -> Option<TestGroup> {
        let group = Groups::find(&format!("aops-test-{}-{test}", std::process::id()))?.group("a");
        group.make().ok()?;
        let base = PathBuf::from(group.name()).parent()?.to_owned();
        let group = TestGroup(group, base);
        group.at("cgroup.kill").exists().then_some(group)
    }

    fn at(&self, file: &str) -> PathBuf {
        Path::new(&self.0.name()).join(file)
    }
}

impl Drop for TestGroup {
    fn drop(&mut self) {
        let _ = std::fs::write(self.1.join("cgroup.freeze"), "0");
        let _ = self.0.kill();
        let _ = self.0.remove();
    }
}

fn true_into(directory: &Path, group: Option<Group>, user: Option<User>) -> (Command, Launch) {
    let output = std::fs::File::create(directory.join("out")).unwrap();
    let mut command = Command::new("/bin/true");
    command.current_dir("/");
    (command, Launch { record: directory.join("a.json"), head: b"{\"pid\":".to_vec(), user, output, group })
}

async fn start(command: &mut Command, record: PathBuf, output: &Path, group: Option<Group>) -> io::Result<Child> {
    let output = std::fs::File::create(output).unwrap();
    launch(command, &Launch { record, head: b"{\"pid\":".to_vec(), user: None, output, group }).await
}

#[tokio::test]
async fn a_launched_child_wrote_its_own_record() {
    let directory = tempfile::tempdir().unwrap();
    let (record, output) = (directory.path().join("a.json"), directory.path().join("out"));
    let mut command = Command::new("/bin/cat");
    command.arg(&record).env_clear();
    let mut child = start(&mut command, record, &output, None).await.unwrap();
    assert!(child.wait().await.unwrap().success());
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(output).unwrap()).unwrap();
    assert_eq!(
        (record["pid"].as_u64(), record["startTime"].as_u64()),
        (Some(child.pid.into()), Some(child.start_time))
    );
    assert_eq!(record.get("group"), None);
}

#[tokio::test]
async fn a_program_runs_although_its_record_cannot_be_written() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("/bin/true");
    let mut child =
        start(&mut command, "/proc/nowhere/a.json".into(), &directory.path().join("out"), None).await.unwrap();
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn a_program_runs_without_its_group() {
    let directory = tempfile::tempdir().unwrap();
    let record = directory.path().join("a.json");
    let group = Some(Group::named("/proc/nowhere/x"));
    let mut command = Command::new("/bin/true");
    let mut child = start(&mut command, record.clone(), &directory.path().join("out"), group).await.unwrap();
    assert!(!child.grouped);
    assert!(child.wait().await.unwrap().success());
    assert!(!std::fs::read_to_string(record).unwrap().contains("group"));
}

#[tokio::test]
async fn a_program_that_cannot_run_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = start(&mut Command::new("/nowhere/x"), directory.path().join("a"), &directory.path().join("out"), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_script_without_an_interpreter_line_is_run_by_the_shell() {
    let directory = tempfile::tempdir().unwrap();
    let (script, output) = (directory.path().join("script"), directory.path().join("out"));
    std::fs::write(&script, "echo \"$1 $A $PWD\"; exit 3\n").unwrap();
    super::super::set_mode(&script, 0o755).unwrap();
    let mut command = Command::new(&script);
    command.arg("one").env_clear().env("A", "two").current_dir("/");
    let mut child = start(&mut command, directory.path().join("a"), &output, None).await.unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(3));
    assert_eq!(std::fs::read_to_string(output).unwrap(), "one two /\n");
}

#[tokio::test]
async fn a_child_that_sends_no_message_is_killed_and_reaped() {
    let directory = tempfile::tempdir().unwrap();
    let (command, launch) = true_into(directory.path(), None, None);
    let plan = ChildSetup::new(&command, &launch).unwrap();
    let mut made = None;
    let outcome = start_child(&plan, Duration::from_millis(50), |_| {
        let child = || loop {
            // SAFETY: a system call.
            unsafe { libc::pause() };
        };
        // SAFETY: the child makes system calls alone.
        let pid = unsafe { clone::fork(&child) }?;
        made = Some(pid);
        Ok((pid, None))
    });
    let LaunchOutcome::Failed(error) = outcome.await else { panic!("it runs") };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(waitpid(made, WaitOptions::NOHANG).unwrap_err(), Errno::CHILD);
}

#[tokio::test]
async fn a_frozen_group_is_thawed_and_a_frozen_parent_causes_a_timeout() {
    let group = TestGroup::find("freeze").expect(NEEDED);
    let directory = tempfile::tempdir().unwrap();
    let (command, mut launch) = true_into(directory.path(), Some(group.0.clone()), None);
    std::fs::write(group.at("cgroup.freeze"), "1").unwrap();
    let mut child = super::launch(&command, &launch).await.unwrap();
    assert!(child.grouped && child.wait().await.unwrap().success());

    std::fs::write(group.1.join("cgroup.freeze"), "1").unwrap();
    let (base, (done, waits)) = (group.1.clone(), std::sync::mpsc::channel::<()>());
    // If the launch blocks, the test still ends.
    let rescue = std::thread::spawn(move || {
        let late = waits.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        std::fs::write(base.join("cgroup.freeze"), "0").unwrap();
        late
    });
    tokio::time::sleep(CROWD_INTERVAL * 2).await;
    launch.group = None;
    let plan = ChildSetup::new(&command, &launch).unwrap();
    let outcome = start_in(&group.0, &plan, Duration::from_millis(200)).await;
    drop(done);
    assert!(!rescue.join().unwrap());
    assert_eq!(outcome.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert!(group.0.is_empty().unwrap());
}

#[tokio::test]
async fn a_program_of_another_user_does_not_start_in_our_memory() {
    let group = TestGroup::find("user").filter(|_| super::super::is_root()).expect(NEEDED);
    let directory = tempfile::tempdir().unwrap();
    let (uid, gid) = (65534, 65534);
    let nobody = User { uid, gid, groups: vec![gid], home: "/".to_owned(), name: "nobody".to_owned() };
    let (command, launch) = true_into(directory.path(), Some(group.0.clone()), Some(nobody));
    let before = rustix::process::dumpable_behavior().unwrap();
    let mut child = super::launch(&command, &launch).await.unwrap();
    assert!(child.grouped && child.wait().await.unwrap().success());
    assert_eq!(rustix::process::dumpable_behavior().unwrap(), before);
}

#[tokio::test]
async fn a_removed_group_is_created_again() {
    let group = TestGroup::find("gone").expect(NEEDED);
    let directory = tempfile::tempdir().unwrap();
    let (command, launch) = true_into(directory.path(), Some(group.0.clone()), None);
    let plan = ChildSetup::new(&command, &launch).unwrap();
    let open = group.0.open().unwrap();
    group.0.remove().unwrap();
    for share_memory in [true, false] {
        let outcome = start_child(&plan, PATIENCE, |pipe| clone_into(open.as_fd(), share_memory, &plan, pipe)).await;
        assert!(matches!(outcome, LaunchOutcome::NotCreated(error) if is_gone(&error)));
    }
    let mut child = super::launch(&command, &launch).await.unwrap();
    assert!(child.grouped && child.wait().await.unwrap().success());
}
