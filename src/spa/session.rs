//! What a manager has started besides sub-agents: the other processes of its session. A bad release's are bounded, and end with it.

use crate::core::manifest::StopSignal;
use crate::home::Home;
use crate::platform;

/// A manager has a handful of processes in its session: what checks and asks.
const MAX_PROCESSES: usize = 200;
/// What is left of its session is killed in so many rounds: it may start more meanwhile.
const ROUNDS: usize = 100;

/// The processes of a manager's session, itself among them; a sub-agent has a session of its own.
fn session_of(home: &Home, pid: u32, start_time: u64) -> Vec<platform::ProcessInfo> {
    let own = platform::process_info(pid, home.root());
    // Of a dead one the session has its number as long as there is a process in it, and then nobody else has that number.
    let session = match &own {
        Some(own) if own.start_time != start_time => return vec![],
        Some(own) => own.session,
        None => pid,
    };
    let ours = platform::process_info(std::process::id(), home.root()).map(|seen| seen.session);
    if ours == Some(session) {
        return own.into_iter().collect();
    }
    let is_its = |seen: &platform::ProcessInfo| {
        seen.session == session && seen.marker.is_none() && seen.start_time >= start_time
    };
    platform::processes(home.root()).into_iter().filter(is_its).collect()
}

pub(super) fn uses_too_much(home: &Home, pid: u32, start_time: u64, most: u64) -> bool {
    let processes = session_of(home, pid, start_time);
    let bytes = processes.iter().filter_map(|seen| platform::memory_bytes(seen.pid)).fold(0_u64, u64::saturating_add);
    processes.len() > MAX_PROCESSES || bytes > most
}

/// Kills all that a manager has started and that is no sub-agent; the manager itself is left to the caller.
pub(super) fn kill_session(home: &Home, pid: u32, start_time: u64) {
    for _ in 0..ROUNDS {
        let others: Vec<_> = session_of(home, pid, start_time).into_iter().filter(|seen| seen.pid != pid).collect();
        if others.is_empty() {
            return;
        }
        for seen in others {
            let _ = platform::signal(seen.pid, seen.start_time, StopSignal::Kill);
        }
    }
    tracing::error!(pid, "the manager starts processes faster than they can be killed");
}
