//! Asks a process to exit.
//!
//! Windows has no signals. Whatever the name of the stop signal, a process is asked by what it has:
//!
//! ```text
//! a role of ours              its exit event
//! a console                   Ctrl-Break to its process group: to the process that we started, which leads one, and to those of its
//!                             descendants that share its console and started no group of their own
//! windows                     WM_CLOSE to each
//! a program that waits for    the stop event of its sub-agent, whose name is in AOPS_STOP_EVENT (see `Group::request_stop`)
//! ```
//!
//! A program that has none of these runs until it is killed at the end of its grace period.
//!
//! Only a process that is attached to a console can send events to it, and a process can be attached to only one. So that the manager need
//! not leave its own, a short-lived helper is started from this executable, called an errand.

use std::io;
use std::os::windows::io::{AsRawHandle, OwnedHandle};
use std::os::windows::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use windows_sys::Win32::Foundation::{ERROR_ACCESS_DENIED, WAIT_OBJECT_0};
use windows_sys::Win32::System::Console::{
    AttachConsole, CTRL_BREAK_EVENT, GenerateConsoleCtrlEvent, GetConsoleProcessList, SetConsoleCtrlHandler,
};
use windows_sys::Win32::System::Threading::{
    DETACHED_PROCESS, PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_SYNCHRONIZE, PROCESS_TERMINATE, TerminateProcess,
    WaitForSingleObject,
};

use super::exit_event;
use super::group::ENDED_BY_US;
use super::gui;
use super::process::{creation_time, is_running, open, parent, raw, tree_of};
use crate::core::manifest::StopSignal;
use crate::platform::own_executable;

/// Environment variable that makes this process an errand; its value is the pid to ask.
const ERRAND: &str = "AOPS_ERRAND";
/// Timeout of an errand.
const ERRAND_MILLISECONDS: u32 = 5000;
/// Exit codes of an errand: the process has no console, or its console rejects the event.
const NO_CONSOLE: u8 = 3;
const REFUSED: u8 = 4;
/// A console with more processes than this is asked as a whole.
const CONSOLE_MEMBERS: usize = 256;

/// Asks exactly this process to exit, or terminates it with [`StopSignal::Kill`]; never another one that has the same pid now. `false`: it has exited.
pub fn signal(pid: u32, start_time: u64, signal: StopSignal) -> io::Result<bool> {
    let access = PROCESS_TERMINATE | PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_SYNCHRONIZE;
    let Ok(process) = open(pid, access) else { return Ok(false) };
    // The pid is not reused while the handle is open.
    if creation_time(&process) != Some(start_time) || !is_running(&process) {
        return Ok(false);
    }
    if signal == StopSignal::Kill {
        return terminate(&process);
    }
    if !exit_event::request(pid, start_time).unwrap_or(false) {
        match run_errand(pid) {
            Ok(Some(0)) => {}
            Ok(code) => tracing::debug!(pid, code, "a process has neither a console nor windows to be asked by"),
            Err(error) => tracing::warn!(pid, error = %error, "cannot run the helper that asks a process to exit"),
        }
    }
    Ok(true)
}

/// Kills a child that has not been waited for, and its descendants.
pub fn kill_group(child: u32) {
    for (pid, start_time) in tree_of(child) {
        // An error means that it has exited.
        let _ = signal(pid, start_time, StopSignal::Kill);
    }
}

fn terminate(process: &OwnedHandle) -> io::Result<bool> {
    // SAFETY: the handle is open.
    if unsafe { TerminateProcess(raw(process), ENDED_BY_US) } != 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        // It is already exiting.
        error if error.raw_os_error() == Some(ERROR_ACCESS_DENIED as i32) && !is_running(process) => Ok(false),
        error => Err(error),
    }
}

/// Runs an errand that asks a process to exit; returns the errand's exit code.
fn run_errand(pid: u32) -> io::Result<Option<i32>> {
    let executable = own_executable().ok_or(io::ErrorKind::NotFound)?;
    let mut command = Command::new(executable);
    #[cfg(test)]
    command.args(["--exact", "platform::windows::signal::tests::an_errand"]);
    command.env_clear().env(ERRAND, pid.to_string()).creation_flags(DETACHED_PROCESS);
    command.envs(["SystemRoot", "windir"].into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    let mut errand = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // SAFETY: the handle is open.
    if unsafe { WaitForSingleObject(errand.as_raw_handle(), ERRAND_MILLISECONDS) } != WAIT_OBJECT_0 {
        errand.kill()?;
    }
    Ok(errand.wait()?.code())
}

/// Runs the errand if this process was started as one.
pub fn errand() -> Option<ExitCode> {
    let pid = std::env::var(ERRAND).ok()?.parse().ok()?;
    Some(ExitCode::from(ask(pid)))
}

fn ask(pid: u32) -> u8 {
    let has_windows = gui::close(pid);
    match ask_console(pid) {
        NO_CONSOLE if has_windows => 0,
        answer => answer,
    }
}

fn ask_console(pid: u32) -> u8 {
    // SAFETY: the calls take integers and a function with static lifetime.
    unsafe {
        if AttachConsole(pid) == 0 {
            return NO_CONSOLE;
        }
        // If the pid does not lead a group, all processes of the console receive the event, including us.
        SetConsoleCtrlHandler(Some(ignore_event), 1);
    }
    if parent(pid).is_some_and(|parent| console_members().contains(&parent)) {
        // It does not lead its group: it is asked together with its parent.
        return 0;
    }
    // SAFETY: takes integers.
    if unsafe { GenerateConsoleCtrlEvent(CTRL_BREAK_EVENT, pid) } == 0 { REFUSED } else { 0 }
}

unsafe extern "system" fn ignore_event(_event: u32) -> windows_sys::core::BOOL {
    1
}

/// The processes that share the console that we are attached to.
fn console_members() -> Vec<u32> {
    let mut pids = vec![0; CONSOLE_MEMBERS];
    // SAFETY: the buffer has the given length.
    let count = unsafe { GetConsoleProcessList(pids.as_mut_ptr(), CONSOLE_MEMBERS as u32) };
    pids.truncate(count as usize);
    pids
}

#[cfg(test)]
mod tests {
    use std::os::windows::process::CommandExt;

    use windows_sys::Win32::System::Threading::{CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW};

    use super::*;
    use crate::platform::testing;
    use crate::platform::{Termination, start_time};

    const POLITE: &str = "platform::windows::signal::tests::a_polite_program";
    /// Exit code of a program that was asked to exit.
    const ASKED: i32 = 42;

    /// Not a test: the process that [`run_errand`] starts.
    #[test]
    fn an_errand() {
        if let Some(pid) = std::env::var(ERRAND).ok().and_then(|pid| pid.parse().ok()) {
            std::process::exit(ask(pid).into());
        }
    }

    /// Exits with its own code when asked to.
    #[tokio::test]
    async fn a_polite_program() {
        if testing::part(POLITE).is_some() {
            let mut termination = Termination::new().unwrap();
            testing::report("ready");
            termination.recv().await;
            std::process::exit(ASKED);
        }
    }

    /// A polite program that is ready for the event.
    fn polite(flags: u32) -> std::process::Child {
        use std::io::{BufRead, BufReader};
        let mut command = testing::part_command(POLITE, "");
        let mut child = command.creation_flags(flags).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines
            .find(|line| !testing::reports(line.as_ref().unwrap().as_bytes()).is_empty())
            .expect("it reports that it is ready")
            .unwrap();
        child
    }

    fn code(child: &mut std::process::Child) -> Option<i32> {
        testing::wait_for("its end", || child.try_wait().unwrap()).code()
    }

    #[test]
    fn a_program_with_a_console_is_asked_to_end() {
        let mut child = polite(CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW);
        let (pid, started) = (child.id(), start_time(child.id()).unwrap());
        assert!(!signal(pid, started + 1, StopSignal::Term).unwrap());
        assert!(child.try_wait().unwrap().is_none());
        let answer = run_errand(pid).unwrap();
        // Wine 8 has no Ctrl-Break: there only attaching to the console can be tested.
        assert!([Some(0), Some(REFUSED.into())].contains(&answer), "{answer:?}");
        let expected = if answer == Some(0) { ASKED } else { ENDED_BY_US as i32 };
        if expected != ASKED {
            assert!(signal(pid, started, StopSignal::Kill).unwrap());
        }
        assert_eq!(code(&mut child), Some(expected));
        assert!(!signal(pid, started, StopSignal::Term).unwrap());
    }

    #[test]
    fn a_role_of_ours_is_asked_by_its_event_also_without_a_console() {
        let mut child = polite(CREATE_NEW_PROCESS_GROUP | DETACHED_PROCESS);
        let (pid, started) = (child.id(), start_time(child.id()).unwrap());
        assert!(signal(pid, started, StopSignal::Term).unwrap());
        assert_eq!(code(&mut child), Some(ASKED));
    }

    #[test]
    fn a_program_without_a_console_is_left_to_the_end_of_its_grace_period() {
        let mut child = polite(CREATE_NEW_PROCESS_GROUP | DETACHED_PROCESS);
        let (pid, started) = (child.id(), start_time(child.id()).unwrap());
        assert_eq!(run_errand(pid).unwrap(), Some(NO_CONSOLE.into()));
        assert!(signal(pid, started, StopSignal::Kill).unwrap());
        assert_eq!(code(&mut child), Some(ENDED_BY_US as i32));
    }
}
