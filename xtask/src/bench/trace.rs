//! The activity of an idle supervisor, by strace(1): system calls, wake-ups, and the part of both that is periodic by design.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::processes;
use crate::wait::try_for;

/// A call that took longer than this has waited: its return is a wake-up.
const WAITED_SECONDS: f64 = 0.000_5;
/// Calls this close to a periodic activity belong to it.
const AROUND_SECONDS: f64 = 0.05;
/// Texts that identify a periodic activity: the roles' pings, and the check of log sizes.
const MARKS: &[&str] = &["\\\"ping\\\"", "/log/agents"];
/// The deadline for strace to attach or to exit.
const SOON: Duration = Duration::from_secs(20);

/// A running strace of some processes.
pub(super) struct Trace {
    strace: Child,
    output: PathBuf,
}

/// The observed calls and wake-ups.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    pub(super) calls: u32,
    pub(super) wake_ups: u32,
    /// The part of them that is periodic.
    pub(super) interval_calls: u32,
    pub(super) interval_wake_ups: u32,
}

impl Trace {
    /// Attaches strace. Its output stays in `output` for diagnosis.
    pub(super) fn begin(pids: &[u32], output: PathBuf) -> Result<Trace> {
        let mut command = Command::new("strace");
        command.args(["-f", "-ttt", "-T", "-s", "200", "-o"]).arg(&output);
        command.args(pids.iter().map(|pid| format!("--attach={pid}")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let strace = command.spawn().context("cannot run strace")?;
        let attached = || {
            let traced = |pid: &u32| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                status.lines().any(|line| line == format!("TracerPid:\t{}", strace.id()))
            };
            pids.iter().all(traced).then_some(())
        };
        try_for(SOON, attached)
            .context("strace does not attach: the process has another tracer, or ptrace is not allowed")?;
        Ok(Trace { strace, output })
    }

    /// Detaches strace, and returns what it observed.
    pub(super) fn end(mut self) -> Result<Seen> {
        processes::signal(self.strace.id(), Signal::INT);
        try_for(SOON, || self.strace.try_wait().ok().flatten()).context("strace does not exit")?;
        let text = fs::read(&self.output).context("cannot read the output of strace")?;
        Ok(read(&String::from_utf8_lossy(&text)))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        processes::signal(self.strace.id(), Signal::KILL);
        let _ = self.strace.wait();
    }
}

/// One completed call.
struct Call {
    ended: f64,
    waited: bool,
}

/// Lines are `TID SECONDS call(...) = result <SECONDS>`. A call that was interleaved with another thread's has an extra line for its start,
/// which is not counted.
fn read(text: &str) -> Seen {
    let mut calls = vec![];
    let mut marks = vec![];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (_thread, Some(began)) = (words.next(), words.next().and_then(|word| word.parse::<f64>().ok())) else {
            continue;
        };
        if MARKS.iter().any(|mark| line.contains(mark)) {
            marks.push(began);
        }
        let Some(took) = line.strip_suffix('>').and_then(|line| line.rsplit_once('<')) else { continue };
        let Ok(took) = took.1.parse::<f64>() else { continue };
        let began = if line.contains(" resumed>") { began - took } else { began };
        calls.push(Call { ended: began + took, waited: took > WAITED_SECONDS });
    }
    let mut seen = Seen::default();
    for call in calls {
        let is_due = marks.iter().any(|mark| (call.ended - mark).abs() < AROUND_SECONDS);
        seen.calls += 1;
        seen.wake_ups += u32::from(call.waited);
        seen.interval_calls += u32::from(is_due);
        seen.interval_wake_ups += u32::from(is_due && call.waited);
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periodic_activity_is_counted_separately() {
        let text = r#"
10 100.000000 epoll_wait(3, [], 1024, 10000) = 0 <10.000000>
10 110.000100 statx(AT_FDCWD, "/home/log/agents/a.log", 0) = 0 <0.000010>
10 110.000200 epoll_wait(3,  <unfinished ...>
11 111.000000 futex(0x1, FUTEX_WAIT, 0, NULL <unfinished ...>
10 113.000000 <... epoll_wait resumed>[], 1024, 10000) = 1 <2.999800>
10 113.000100 read(5, "\1", 8) = 8 <0.000005>
11 113.500000 +++ exited with 0 +++
"#;
        assert_eq!(read(text), Seen { calls: 4, wake_ups: 2, interval_calls: 2, interval_wake_ups: 1 });
    }
}
