//! Starts a sub-agent's process: suspended, so that it is in its group before it can do anything.
//!
//! The manager may be killed at any point. The state that it leaves behind, and the next manager's reaction:
//!
//! ```text
//! create, suspended   in no group, not recorded, never runs. If it is a program of a release, it is found by its executable
//!                     and killed; a suspended interpreter stays and holds its memory until the next boot
//! add to the group    in the group, not recorded: a leftover, killed with the group before the sub-agent is restarted
//! write the record, under another name
//! resume              running, in the group, not recorded: killed with the group, too. It had no time to do much
//! rename the record   running and recorded: adopted
//! ```
//!
//! So a recorded process has always been resumed. If the record were written first, an adopted process might never have run.

use std::fs;
use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::os::windows::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use windows_sys::Win32::Foundation::{ERROR_NOT_FOUND, INVALID_HANDLE_VALUE};
use windows_sys::Win32::System::Diagnostics::ToolHelp::{
    CreateToolhelp32Snapshot, TH32CS_SNAPTHREAD, THREADENTRY32, Thread32First, Thread32Next,
};
use windows_sys::Win32::System::Threading::{
    CREATE_SUSPENDED, GetExitCodeProcess, OpenThread, ResumeThread, THREAD_SUSPEND_RESUME, TerminateProcess,
};

use super::group::{ENDED_BY_US, Group};
use super::{process, replace, watch};
use crate::platform::Launch;

/// A started process. Dropping it does not kill it.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    pub start_time: u64,
    /// Whether it is in its group: otherwise its children are found by descent only.
    pub grouped: bool,
    process: OwnedHandle,
}

/// Starts a sub-agent's process, in its group if that can be created and entered. `command` specifies program, arguments, directory and the
/// complete environment.
pub async fn launch(command: &Command, launch: &Launch) -> io::Result<Child> {
    // Nothing in it waits for the program.
    start_suspended(command, launch)
}

fn start_suspended(command: &Command, launch: &Launch) -> io::Result<Child> {
    if launch.user.is_some() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "running as another user is not supported on Windows yet",
        ));
    }
    let output = &launch.output;
    let mut suspended = Command::new(command.get_program());
    suspended.args(command.get_args()).env_clear();
    suspended.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    suspended.envs(launch.group.as_ref().map(Group::stop_variable));
    suspended.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
    suspended.creation_flags(CREATE_SUSPENDED | process::DETACHED_FLAGS);
    if let Some(directory) = command.get_current_dir() {
        suspended.current_dir(directory);
    }
    let child = suspended.spawn()?;
    let pid = child.id();
    let suspended_process = SuspendedProcess(Some(OwnedHandle::from(child)));
    let Some(process) = &suspended_process.0 else { return Err(io::ErrorKind::NotFound.into()) };
    let start_time = process::creation_time(process).ok_or_else(io::Error::last_os_error)?;
    let grouped = launch.group.as_ref().is_some_and(|group| group.make().and_then(|()| group.add(process)).is_ok());
    let record = write_record(launch, pid, start_time, launch.group.as_ref().filter(|_| grouped));
    resume(pid)?;
    // If it cannot be recorded (a full disk), it runs anyway and is found by its group.
    if let Ok(record) = record
        && replace::rename(&record, &launch.record).is_err()
    {
        let _ = fs::remove_file(&record);
    }
    Ok(Child { pid, start_time, grouped, process: suspended_process.resumed()? })
}

/// A suspended process, which is killed on drop unless it is resumed.
struct SuspendedProcess(Option<OwnedHandle>);

impl SuspendedProcess {
    fn resumed(mut self) -> io::Result<OwnedHandle> {
        self.0.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for SuspendedProcess {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            // SAFETY: the handle is open.
            unsafe { TerminateProcess(process.as_raw_handle(), ENDED_BY_US) };
        }
    }
}

/// Writes the record to a temporary file next to its path.
fn write_record(launch: &Launch, pid: u32, start_time: u64, group: Option<&Group>) -> io::Result<PathBuf> {
    let mut text = launch.head.clone();
    text.extend_from_slice(format!("{pid},\"startTime\":{start_time}").as_bytes());
    if let Some(group) = group {
        text.extend_from_slice(b",\"group\":");
        text.extend_from_slice(&serde_json::to_vec(&group.name())?);
    }
    text.extend_from_slice(b"}\n");
    let mut temporary = launch.record.clone().into_os_string();
    temporary.push(".old");
    let temporary = PathBuf::from(temporary);
    fs::write(&temporary, text)?;
    Ok(temporary)
}

/// Resumes a suspended process. Its only thread is found in a snapshot of all threads.
fn resume(pid: u32) -> io::Result<()> {
    // SAFETY: takes integers; a valid handle is ours to close.
    let snapshot = unsafe { CreateToolhelp32Snapshot(TH32CS_SNAPTHREAD, 0) };
    if snapshot == INVALID_HANDLE_VALUE {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let snapshot = unsafe { OwnedHandle::from_raw_handle(snapshot) };
    let mut entry = THREADENTRY32 { dwSize: size_of::<THREADENTRY32>() as u32, ..Default::default() };
    let mut resumed = false;
    // SAFETY: the handle is open, and the entry has its own size.
    let mut more = unsafe { Thread32First(snapshot.as_raw_handle(), &mut entry) };
    while more != 0 {
        if entry.th32OwnerProcessID == pid {
            resume_thread(entry.th32ThreadID)?;
            resumed = true;
        }
        // SAFETY: as above.
        more = unsafe { Thread32Next(snapshot.as_raw_handle(), &mut entry) };
    }
    if resumed { Ok(()) } else { Err(io::Error::from_raw_os_error(ERROR_NOT_FOUND as i32)) }
}

fn resume_thread(thread: u32) -> io::Result<()> {
    // SAFETY: takes integers; a handle that is not null is ours to close.
    let thread = unsafe { OpenThread(THREAD_SUSPEND_RESUME, 0, thread) };
    if thread.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let thread = unsafe { OwnedHandle::from_raw_handle(thread) };
    // SAFETY: the handle is open.
    if unsafe { ResumeThread(thread.as_raw_handle()) } == u32::MAX { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Child {
    /// Waits for its exit. Cancel-safe: it can be called again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        watch::signalled(&self.process).await?;
        let mut code = 0;
        // SAFETY: the handle is open, and the result outlives the call.
        if unsafe { GetExitCodeProcess(self.process.as_raw_handle(), &mut code) } == 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(ExitStatus::from_raw(code))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::group::{Groups, hold_groups, is_open};
    use super::super::{ended, signal, start_time};
    use super::*;
    use crate::core::manifest::StopSignal;
    use crate::platform::testing::{self, OtherProcess, PATIENCE, wait_for};

    const TREE: &str = "platform::windows::launch::tests::a_tree_of_two";
    const LEAF: &str = "platform::windows::launch::tests::a_leaf";
    const MANAGER: &str = "platform::windows::launch::tests::a_manager";
    const STARTER: &str = "platform::windows::launch::tests::a_starter_of_a_role";
    const HOLDER: &str = "platform::windows::launch::tests::a_holder_of_its_job";

    /// Blocks until it is killed.
    #[test]
    fn a_leaf() {
        if testing::part(LEAF).is_some() {
            testing::report(std::process::id());
            testing::block();
        }
    }

    /// Starts a leaf. With the argument `leave`, it exits before the leaf.
    #[test]
    #[allow(clippy::zombie_processes, reason = "the leaf must outlive its parent")]
    fn a_tree_of_two() {
        let Some(argument) = testing::part(TREE) else { return };
        testing::part_command(LEAF, "").spawn().unwrap();
        if argument != "leave" {
            testing::block();
        }
    }

    /// Starts a leaf as a role is started, and blocks.
    #[test]
    #[allow(clippy::zombie_processes, reason = "it is killed with the leaf")]
    fn a_starter_of_a_role() {
        if testing::part(STARTER).is_some() {
            let mut leaf = testing::part_command(LEAF, "");
            crate::platform::spawn_outside_groups(&mut leaf, "").unwrap();
            testing::block();
        }
    }

    /// Reports whether it has a handle to its own job.
    #[test]
    fn a_holder_of_its_job() {
        if testing::part(HOLDER).is_some() {
            testing::report(if holds_a_job() { "holds" } else { "does not" });
        }
    }

    fn holds_a_job() -> bool {
        use windows_sys::Win32::System::JobObjects::{
            JOBOBJECT_BASIC_ACCOUNTING_INFORMATION, JobObjectBasicAccountingInformation, QueryInformationJobObject,
        };
        (4..4096_usize).step_by(4).any(|handle| {
            let mut found = JOBOBJECT_BASIC_ACCOUNTING_INFORMATION::default();
            let size = size_of_val(&found) as u32;
            // SAFETY: an invalid handle, or one of another kind, is rejected; the result has the given size.
            unsafe {
                let handle = handle as windows_sys::Win32::Foundation::HANDLE;
                let kind = JobObjectBasicAccountingInformation;
                QueryInformationJobObject(handle, kind, (&raw mut found).cast(), size, std::ptr::null_mut()) != 0
            }
        })
    }

    /// Starts a tree in the group of that name, and blocks.
    #[test]
    fn a_manager() {
        let Some(argument) = testing::part(MANAGER) else { return };
        let directory = PathBuf::from(argument);
        let child = start(&directory, testing::part_command(TREE, ""));
        testing::report(child.pid);
        testing::block();
    }

    /// A group named after the directory.
    fn group(directory: &Path) -> Group {
        groups(directory).group("a")
    }

    fn groups(directory: &Path) -> Groups {
        Groups::find(&key(directory)).unwrap()
    }

    fn key(directory: &Path) -> String {
        directory.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect()
    }

    fn start(directory: &Path, command: Command) -> Child {
        start_suspended(&complete(command), &options(directory, "a.json", Some(group(directory)))).unwrap()
    }

    fn options(directory: &Path, record: &str, group: Option<Group>) -> Launch {
        let output = fs::OpenOptions::new().create(true).append(true).open(directory.join("out")).unwrap();
        Launch { record: directory.join(record), head: b"{\"pid\":".to_vec(), user: None, output, group }
    }

    /// With the complete environment, as a launched command has it.
    fn complete(mut command: Command) -> Command {
        command.envs(crate::platform::base_environment(None));
        command
    }

    fn reported(directory: &Path) -> Option<String> {
        testing::reports(&fs::read(directory.join("out")).unwrap()).into_iter().next()
    }

    async fn end_of(child: &mut Child) -> ExitStatus {
        tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_tree_whose_root_has_exited_is_found_and_killed() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), testing::part_command(TREE, "leave"));
        assert!(child.grouped);
        assert!(end_of(&mut child).await.success());
        let leaf: u32 = wait_for("the leaf", || reported(directory.path())).parse().unwrap();
        let group = group(directory.path());
        // Their console host may be in the group as well.
        wait_for("the root to be gone", || (!group.members().unwrap().contains(&child.pid)).then_some(()));
        assert!(group.members().unwrap().contains(&leaf));
        assert_eq!(group.remove().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        let started = start_time(leaf).unwrap();
        let watched = group.clone();
        let mut emptied = tokio::spawn(async move { watched.emptied().await });
        assert!(tokio::time::timeout(std::time::Duration::from_millis(100), &mut emptied).await.is_err());
        group.kill().unwrap();
        tokio::time::timeout(PATIENCE, ended(leaf, started)).await.unwrap();
        assert_eq!(start_time(leaf), None);
        tokio::time::timeout(PATIENCE, emptied).await.unwrap().unwrap();
        assert!(group.is_empty().unwrap());
        group.remove().unwrap();
        drop(child);
        wait_for("its name to be free", || groups(directory.path()).all().unwrap().is_empty().then_some(()));
    }

    #[tokio::test]
    async fn a_role_that_a_sub_agent_starts_is_not_in_its_job() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), testing::part_command(STARTER, ""));
        let role: u32 = wait_for("the role", || reported(directory.path())).parse().unwrap();
        let group = group(directory.path());
        let members = group.members().unwrap();
        assert!(members.contains(&child.pid) && !members.contains(&role), "{members:?}");
        group.kill().unwrap();
        end_of(&mut child).await;
        let started = start_time(role).expect("it runs without its starter");
        assert!(signal(role, started, StopSignal::Kill).unwrap());
    }

    #[tokio::test]
    async fn a_name_that_another_object_has_does_not_prevent_a_group() {
        let directory = tempfile::tempdir().unwrap();
        let group = group(directory.path());
        let _taken = super::super::event::create(&group.name()).unwrap();
        let mut child = start(directory.path(), testing::part_command(LEAF, ""));
        assert!(child.grouped);
        assert!(group.members().unwrap().contains(&child.pid));
        assert_eq!(groups(directory.path()).all().unwrap(), ["a"]);
        group.kill().unwrap();
        end_of(&mut child).await;
    }

    #[tokio::test]
    async fn jobs_are_held_until_they_are_empty() {
        let directory = tempfile::tempdir().unwrap();
        let key = key(directory.path());
        let argument = directory.path().to_str().unwrap();
        let mut manager = OtherProcess::start(MANAGER, argument);
        let root: u32 = manager.line().parse().unwrap();
        let group = group(directory.path());
        assert!(!is_open(&group));
        hold_groups(&key);
        assert!(is_open(&group));
        manager.kill();
        hold_groups(&key);
        assert!(is_open(&group) && group.members().unwrap().contains(&root));
        group.kill().unwrap();
        wait_for("its name to be free", || {
            hold_groups(&key);
            groups(directory.path()).all().unwrap().is_empty().then_some(())
        });
    }

    #[tokio::test]
    async fn a_killed_group_can_hold_another_tree() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), testing::part_command(LEAF, ""));
        let group = group(directory.path());
        group.kill().unwrap();
        assert!(!end_of(&mut child).await.success());
        let mut child = start(directory.path(), testing::part_command(TREE, "leave"));
        assert!(end_of(&mut child).await.success());
        wait_for("the leaf", || reported(directory.path()));
        group.kill().unwrap();
    }

    #[test]
    fn the_processes_of_a_killed_manager_are_recorded_and_found_in_their_group() {
        let directory = tempfile::tempdir().unwrap();
        let mut manager = OtherProcess::start(MANAGER, directory.path());
        let root: u32 = manager.line().parse().unwrap();
        let leaf: u32 = wait_for("the leaf", || reported(directory.path())).parse().unwrap();
        manager.kill();
        assert_eq!(groups(directory.path()).all().unwrap(), ["a"]);
        let members = group(directory.path()).members().unwrap();
        let both = [root, leaf];
        assert!(both.iter().all(|pid| members.contains(pid)), "{both:?} {members:?}");
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(directory.path().join("a.json")).unwrap()).unwrap();
        assert_eq!((record["pid"].as_u64(), record["startTime"].as_u64()), (Some(root.into()), start_time(root)));
        assert_eq!(record["group"], group(directory.path()).name());
        group(directory.path()).kill().unwrap();
        wait_for("both to end", || both.iter().all(|pid| start_time(*pid).is_none()).then_some(()));
    }

    #[tokio::test]
    async fn a_process_keeps_its_group_open_for_the_next_manager() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), testing::part_command(HOLDER, ""));
        assert!(end_of(&mut child).await.success());
        assert_eq!(reported(directory.path()).unwrap(), "holds");
        assert!(!holds_a_job_of_nobody());
    }

    /// The control case: a process that was started without a group has no handle to a job.
    fn holds_a_job_of_nobody() -> bool {
        OtherProcess::start(HOLDER, "").line() == "holds"
    }

    #[tokio::test]
    async fn a_program_that_cannot_run_is_an_error_and_leaves_no_record() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), "a.json", None);
        let error = start_suspended(&Command::new(r"C:\nowhere\x.exe"), &options).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!options.record.exists());
    }

    #[tokio::test]
    async fn a_program_runs_although_its_record_cannot_be_written() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), "nowhere/a.json", None);
        let mut child = start_suspended(&complete(testing::part_command(HOLDER, "")), &options).unwrap();
        assert!(end_of(&mut child).await.success());
        assert_eq!(reported(directory.path()).unwrap(), "does not");
    }

    #[tokio::test]
    async fn the_exit_of_a_process_that_is_not_our_child_is_detected() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), testing::part_command(TREE, "leave"));
        assert!(end_of(&mut child).await.success());
        let leaf: u32 = wait_for("the leaf", || reported(directory.path())).parse().unwrap();
        let started = start_time(leaf).unwrap();
        let mut watch = tokio::spawn(ended(leaf, started));
        let early = tokio::time::timeout(std::time::Duration::from_millis(200), &mut watch).await;
        assert!(early.is_err(), "it has not exited");
        // A previous process with this pid has exited.
        tokio::time::timeout(PATIENCE, ended(leaf, started - 1)).await.unwrap();
        assert!(!signal(leaf, started - 1, StopSignal::Kill).unwrap());
        assert_eq!(start_time(leaf), Some(started));
        assert!(signal(leaf, started, StopSignal::Kill).unwrap());
        tokio::time::timeout(PATIENCE, watch).await.unwrap().unwrap();
    }
}
