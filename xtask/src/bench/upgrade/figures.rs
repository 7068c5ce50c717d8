//! The figures of one service manager, as tables and verdicts.

use std::fmt::Write as _;

use super::super::statistics::{Samples, short};
use super::super::verdicts::Verdicts;
use super::Service;

/// A sample for each upgrade: times in milliseconds.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) gap: Samples,
    pub(super) trial: Samples,
    pub(super) commit: Samples,
    /// From the stop of a sub-agent until its new release runs, in an upgrade.
    pub(super) down: Samples,
    pub(super) sub_agent_commit: Samples,
    /// The same for `systemctl restart` of the floor's unit.
    pub(super) floor: Samples,
    pub(super) manager: Cost,
    pub(super) sub_agent: Cost,
    pub(super) floor_cpu: Samples,
    /// Ten seconds at rest.
    pub(super) idle_cpu: Samples,
    pub(super) rounds: u32,
    /// A sub-agent has a new process, or was restarted.
    pub(super) touched: bool,
    /// The restarts of both roles, as the last status counts them.
    pub(super) role_restarts: u64,
}

/// What the upgrades of one kind cost.
#[derive(Default)]
pub(super) struct Cost {
    pub(super) cpu: Samples,
    /// KiB; none where the home is in memory.
    pub(super) written: Samples,
    /// Bytes of the package and of its unpacked content: what has to be written at least.
    pub(super) package: u64,
    pub(super) unpacked: u64,
}

impl Cost {
    fn least_kib(&self) -> f64 {
        (self.package + self.unpacked) as f64 / 1024.0
    }
}

impl Figures {
    pub(super) fn shown(&self, service: &Service, agents: u16) -> String {
        let name = service.name;
        let mut text = format!(
            "\n{name}: {} upgrades of the manager and of a sub-agent, beside {agents} other sub-agents\n",
            self.rounds
        );
        table(
            &mut text,
            "milliseconds",
            &[
                ("exit of the old manager until the new one answers", &self.gap),
                ("order until the release is on trial", &self.trial),
                ("order until it is committed", &self.commit),
                ("stop of a sub-agent until its new release runs", &self.down),
                ("order until the sub-agent's release is committed", &self.sub_agent_commit),
                ("systemctl restart of the floor: stop until its program runs", &self.floor),
            ],
        );
        table(
            &mut text,
            "milliseconds of CPU, of everything but sub-agents and the gateway",
            &[
                ("an upgrade of the manager, order until commit", &self.manager.cpu),
                ("ten seconds at rest, a heartbeat each second", &self.idle_cpu),
                ("an upgrade of a sub-agent, order until commit", &self.sub_agent.cpu),
                ("systemctl restart of the floor", &self.floor_cpu),
            ],
        );
        let written = [
            ("an upgrade of the manager", &self.manager.written),
            ("an upgrade of a sub-agent", &self.sub_agent.written),
        ];
        table(&mut text, "KiB written to disk", &written);
        for (what, cost) in [("manager", &self.manager), ("sub-agent", &self.sub_agent)] {
            let [package, unpacked] = [cost.package, cost.unpacked].map(|bytes| short(bytes as f64 / 1024.0));
            let _ = writeln!(text, "  the {what}'s package has {package} KiB, unpacked {unpacked} KiB");
        }
        text + "\n" + self.verdicts(service).text()
    }

    fn verdicts(&self, service: &Service) -> Verdicts {
        let name = service.name;
        let mut verdicts = Verdicts::default();
        verdicts.at_most(&format!("{name}: without a manager, median"), self.gap.median(), service.most, "ms");
        if self.rounds == 0 {
            return verdicts;
        }
        verdicts.at_most(&format!("{name}: sub-agent down in its upgrade, median"), self.down.median(), DOWN, "ms");
        let cpu = self.manager.cpu.median();
        verdicts.at_most(&format!("{name}: CPU of an upgrade of the manager, median"), cpu, MANAGER_CPU, "ms");
        let cpu = self.sub_agent.cpu.median();
        verdicts.at_most(&format!("{name}: CPU of an upgrade of a sub-agent, median"), cpu, SUB_AGENT_CPU, "ms");
        for (what, cost) in [("the manager", &self.manager), ("a sub-agent", &self.sub_agent)] {
            if let Some(written) = cost.written.median() {
                let beyond = Some(written - cost.least_kib());
                let what = format!("{name}: written beyond package and content in an upgrade of {what}, median");
                verdicts.at_most(&what, beyond, BEYOND_KIB, "KiB");
            }
        }
        verdicts.is(&format!("{name}: every other sub-agent kept its process without a restart"), !self.touched);
        let counted = format!("{name}: no restart of the manager or the watchdog was counted: {}", self.role_restarts);
        verdicts.is(&counted, self.role_restarts == 0);
        verdicts
    }
}

/// A stop and a start, with the records of both on disk.
const DOWN: f64 = 100.0;
/// The limits of CPU time.
const MANAGER_CPU: f64 = 1_000.0;
const SUB_AGENT_CPU: f64 = 500.0;
/// Records, ledgers and logs.
const BEYOND_KIB: f64 = 1_024.0;

fn table(text: &mut String, unit: &str, rows: &[(&str, &Samples)]) {
    let _ = writeln!(text, "{unit:<64} {:>8} {:>8} {:>8}", "median", "p95", "largest");
    for (what, samples) in rows {
        let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
        let [median, p95, largest] = [samples.median(), samples.p95(), samples.slowest()].map(shown);
        let _ = writeln!(text, "  {what:<62} {median:>8} {p95:>8} {largest:>8}");
    }
}
