//! `status` and `status --history`, as text and as one JSON document.

use anyhow::Result;
use comfy_table::{Cell, Color, ContentArrangement, Table, presets};

use crate::core::protocol::AgentState;
use crate::core::status::{AgentStatus, DownloadStatus, History, HomeState, RoleStatus, Status, UpgradeStatus};
use crate::output::result;

pub(super) fn print(status: &Status, json: bool) -> Result<()> {
    if json {
        result!("{}", serde_json::to_string_pretty(status)?);
        return Ok(());
    }
    let version = status.version.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string);
    result!("aops {version} in {}: {}", status.home, status.state.as_str());
    if status.state == HomeState::NotInstalled {
        return Ok(());
    }
    result!("  manager   {}", role(&status.spm));
    result!("  watchdog  {}", role(&status.spa));
    let gateway = &status.gateway;
    if let Some(endpoint) = &gateway.endpoint {
        let last = gateway.last_heartbeat.as_ref().map(|at| format!(", last heartbeat {at}")).unwrap_or_default();
        let connection = match (&gateway.connected, &gateway.last_error) {
            (true, _) => format!("connected{last}"),
            (false, Some(_)) => format!("not connected{last}"),
            (false, None) => "no heartbeat yet".to_owned(),
        };
        result!("  gateway   {endpoint}, {connection}; generation {}", status.generation);
        if let (false, Some(error)) = (gateway.connected, &gateway.last_error) {
            result!("            {error}");
        }
    }
    if let Some(upgrade) = &status.upgrade {
        result!("  upgrade   {}", upgrade_text(upgrade));
        if let Some(download) = &upgrade.download {
            result!("            {}", progress(download));
        }
    }
    if status.held_by_operator {
        result!("  note      an operator holds the manager at this release; `control retry aops-spm` ends the hold");
    }
    for problem in &status.problems {
        result!("  problem   {problem}");
    }
    for note in &status.notes {
        result!("  note      {note}");
    }
    if !status.agents.is_empty() {
        result!("\n{}", table(&status.agents));
        // Below the table: a narrow column would break the paths in a message.
        for agent in &status.agents {
            if let (Some(version), Some(active)) = (&agent.version, &agent.active_version) {
                result!(" {}: {version} is running; {active} is the active release", agent.name);
            }
            if let Some(upgrade) = &agent.upgrade {
                result!(" {}: {}", agent.name, upgrade_text(upgrade));
            }
            if agent.held_by_operator {
                result!(
                    " {}: an operator holds it at this release; `control retry {}` ends the hold",
                    agent.name,
                    agent.name
                );
            }
            if let Some(seconds) = agent.removed_in_seconds {
                result!(
                    " {}: the gateway's list omits it; to be removed in {} unless listed again",
                    agent.name,
                    span(seconds)
                );
            }
            if let Some(download) = &agent.download {
                result!(" {}: {}", agent.name, progress(download));
            }
            if let (true, Some(pid)) = (agent.outside_group, agent.pid) {
                result!(
                    " {}: process {pid} is outside its cgroup: it is supervised by its pid, and a stop kills its session and descendants",
                    agent.name
                );
            }
            if let Some(error) = &agent.last_error {
                result!(" {}: {error}", agent.name);
            }
        }
    }
    Ok(())
}

/// Prints the result of each change of release, one a line.
pub(super) fn print_history(history: &History, json: bool) -> Result<()> {
    if json {
        result!("{}", serde_json::to_string_pretty(history)?);
        return Ok(());
    }
    if history.history.is_empty() {
        result!("no upgrade or rollback yet");
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["TIME", "WHAT CHANGED", "KIND", "FROM", "TO", "OUTCOME", "TOOK"]);
    for changed in &history.history {
        let from = changed.from.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        let (to, took) = (changed.to.to_string(), span(changed.seconds));
        table.add_row([&changed.time, changed.agent.as_str(), &changed.kind, &from, &to, &changed.outcome, &took]);
    }
    result!("{table}");
    for changed in history.history.iter().filter(|changed| changed.outcome != "ok") {
        result!(" {}: {}", changed.time, changed.message);
    }
    Ok(())
}

/// Describes a change of release that is under way.
fn upgrade_text(upgrade: &UpgradeStatus) -> String {
    let from = upgrade.from.as_ref().map(|from| format!(" from {from}")).unwrap_or_default();
    let phase = match upgrade.phase.as_str() {
        "staging" => "being staged",
        "activating" => "being activated",
        "switching" => "being installed",
        "probation" => "on probation",
        "trial" => "on trial",
        "unproven" => "on trial until the gateway is reachable",
        "paused" => "on trial, paused until the home is started",
        "committing" => "being committed",
        _ => "being rolled back",
    };
    let mut text = format!("the upgrade{from} to {} is {phase}", upgrade.to);
    if let Some(tries) = upgrade.tries_left {
        text += &format!(", {tries} attempts left");
    }
    if let Some(deadline) = &upgrade.deadline {
        text += &format!(", until {deadline} at the latest");
    }
    if let Some(reason) = &upgrade.reason {
        text += &format!(": {reason}");
    }
    text
}

/// Describes the process of a role.
fn role(role: &RoleStatus) -> String {
    let Some(pid) = role.pid else { return "not running".to_owned() };
    let mut text = format!("pid {pid}");
    if let Some(seconds) = role.uptime_seconds {
        text += &format!(", up {}", span(seconds));
    }
    if let Some(bytes) = role.memory_bytes {
        text += &format!(", {}", size(bytes));
    }
    if role.restarts > 0 {
        text += &format!(", restarted {} times", role.restarts);
    }
    text
}

fn table(agents: &[AgentStatus]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["SUB-AGENT", "VERSION", "STATE", "PID", "UP", "RESTARTS", "MEMORY"]);
    for agent in agents {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let state = Cell::new(agent.state.as_str()).fg(colour(agent.state));
        table.add_row(vec![
            Cell::new(&agent.name),
            Cell::new(or_dash(agent.version.as_ref().map(ToString::to_string))),
            state,
            Cell::new(or_dash(agent.pid.map(|pid| pid.to_string()))),
            Cell::new(or_dash(agent.uptime_seconds.map(span))),
            Cell::new(agent.restarts),
            Cell::new(or_dash(agent.memory_bytes.map(size))),
        ]);
    }
    table
}

/// Describes the progress of a download.
fn progress(download: &DownloadStatus) -> String {
    let so_far = size(download.bytes);
    match download.total_bytes.filter(|total| *total > 0) {
        Some(total) => {
            let hundredths = download.bytes.min(total).saturating_mul(100) / total;
            format!("downloading {}: {hundredths}% ({so_far} of {})", download.version, size(total))
        }
        None => format!("downloading {}: {so_far}", download.version),
    }
}

fn colour(state: AgentState) -> Color {
    match state {
        AgentState::Running => Color::Green,
        AgentState::Starting | AgentState::Updating | AgentState::Backoff => Color::Yellow,
        AgentState::Unhealthy | AgentState::Failed => Color::Red,
        AgentState::Stopped | AgentState::Unknown => Color::Reset,
    }
}

/// A duration in its two largest units.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A number of bytes in KiB or MiB.
fn size(bytes: u64) -> String {
    const MIB: f64 = 1_048_576.0;
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes / 1024),
        _ => format!("{:.1} MiB", bytes as f64 / MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_short() {
        assert_eq!([span(7), span(95), span(3700), span(90_000)], ["7s", "1m 35s", "1h 1m", "1d 1h"]);
        assert_eq!([size(2048), size(3 << 19)], ["2 KiB", "1.5 MiB"]);
    }

    #[test]
    fn a_download_is_shown_with_its_total_if_known() {
        let shown =
            |bytes, total_bytes| progress(&DownloadStatus { version: "2.0".parse().unwrap(), bytes, total_bytes });
        assert_eq!(shown(3 << 19, Some(3 << 20)), "downloading 2.0: 50% (1.5 MiB of 3.0 MiB)");
        assert_eq!(shown(2048, None), "downloading 2.0: 2 KiB");
    }
}
