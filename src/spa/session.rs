//! The processes of a manager's session, other than sub-agents. For a bad release their number and memory are limited, and they are killed
//! with it.

use crate::core::manifest::StopSignal;
use crate::home::Home;
use crate::platform;

/// Limit on the processes of a session; a manager has a handful, for checks and queries.
const MAX_PROCESSES: usize = 200;
/// Limit on the rounds in which the rest of a session is killed: its processes may start more in between.
const MAX_ROUNDS: usize = 100;

/// The processes of a manager's session, itself among them. Sub-agents have sessions of their own.
fn processes_of_session(home: &Home, pid: u32, start_time: u64) -> Vec<platform::ProcessInfo> {
    let own = platform::process_info(pid, home.root());
    // While a session has processes, its number is not reused as a pid, so a dead manager's pid still identifies its session.
    let session = match &own {
        Some(own) if own.start_time != start_time => return vec![],
        Some(own) => own.session,
        None => pid,
    };
    let ours = platform::process_info(std::process::id(), home.root()).map(|process| process.session);
    if ours == Some(session) {
        return own.into_iter().collect();
    }
    let belongs_to_it = |process: &platform::ProcessInfo| {
        process.session == session && process.marker.is_none() && process.start_time >= start_time
    };
    platform::processes(home.root()).into_iter().filter(belongs_to_it).collect()
}

pub(super) fn exceeds_limits(home: &Home, pid: u32, start_time: u64, memory_limit: u64) -> bool {
    let processes = processes_of_session(home, pid, start_time);
    let bytes =
        processes.iter().filter_map(|process| platform::memory_bytes(process.pid)).fold(0_u64, u64::saturating_add);
    processes.len() > MAX_PROCESSES || bytes > memory_limit
}

/// Kills all processes that a manager started, except sub-agents and the manager itself.
pub(super) fn kill_session(home: &Home, pid: u32, start_time: u64) {
    for _ in 0..MAX_ROUNDS {
        let others: Vec<_> =
            processes_of_session(home, pid, start_time).into_iter().filter(|process| process.pid != pid).collect();
        if others.is_empty() {
            return;
        }
        for process in others {
            let _ = platform::signal(process.pid, process.start_time, StopSignal::Kill);
        }
    }
    tracing::error!(pid, "the manager starts processes faster than they can be killed");
}
