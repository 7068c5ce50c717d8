//! The manager's self-upgrade in the event loop: which release is ordered, when the upgrade starts, and what is reported about its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Manager;
use crate::control_socket::{ControlReply, Goodbye};
use crate::core::model::{AgentName, MANAGER_PACKAGE, Version};
use crate::core::order::Package;
use crate::core::schedule::Backoff;
use crate::core::status::{HistoryEntry, UpgradeStatus};
use crate::core::upgrade::{
    self, Evidence, FinishedUpgrade, NewEndpoint, Probe, TrialLimits, UpgradeEnd, UpgradeRecord, UpgradeStep,
};
use crate::spm::input::{NotSwitched, UpgradeObservation, UpgradeOutcome};
use crate::spm::journal::EventSubject;
use crate::spm::upgrade::{self as job, UpgradeJob, UpgradeProgress, UpgradeSource};
use crate::spm::{timestamp, timestamp_of, unix_now};

/// Interval for reading the record while an upgrade is in progress.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Interval otherwise: an operator or the installer may have changed the record.
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(60);
/// Delay between attempts to fetch a release.
const RETRY_DELAY: Backoff = Backoff { base: Duration::from_secs(15), cap: Duration::from_secs(600) };
/// Delay after a release that is at fault, but cannot be skipped, because its digest is unknown.
const FAULTY_RETRY_DELAY: Duration = Duration::from_secs(3600);

/// The manager's self-upgrade.
#[derive(Debug, Default)]
pub(super) struct ManagerUpgrade {
    /// As last read.
    record: UpgradeRecord,
    /// `None`: the record was read at the start, and the evidence not yet.
    evidence: Option<Evidence>,
    is_reading: bool,
    next_read: Option<Instant>,
    /// The release that the gateway names, whether or not it orders an upgrade now.
    named: Option<Package>,
    /// The release that the gateway orders an upgrade to.
    ordered: Option<Package>,
    is_current_ordered: bool,
    work: Option<PendingUpgrade>,
    /// The endpoint of this release on trial, if it differs from the settings.
    pub(super) endpoint: Option<NewEndpoint>,
    /// The installation was migrated to this release since this manager started.
    is_migrated: bool,
    /// Exits as soon as the next manager is certain to be started.
    is_yielding: bool,
    failures: u32,
    not_before: Option<Instant>,
    /// Why the last attempt failed.
    last_error: Option<String>,
    /// Why the last attempt on an operator's request failed.
    operator_error: Option<String>,
    /// Finished upgrades that were reported, and are still in the record.
    reported: Vec<FinishedUpgrade>,
}

/// An upgrade before the switch.
#[derive(Debug)]
struct PendingUpgrade {
    to: Option<Version>,
    by_operator: bool,
    /// Seconds since 1970.
    began: u64,
    progress: Arc<UpgradeProgress>,
}

impl ManagerUpgrade {
    /// The state at the manager's start.
    pub(super) fn new(record: UpgradeRecord, endpoint: Option<NewEndpoint>) -> ManagerUpgrade {
        ManagerUpgrade { record, endpoint, ..ManagerUpgrade::default() }
    }

    fn is_under_way(&self) -> bool {
        self.work.is_some() || self.is_yielding || self.record.trial().is_some()
    }

    /// When the record must be read or an attempt is due.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let retries = self.not_before.filter(|_| self.work.is_none() && self.is_ordered()).filter(|at| *at > now);
        let reads = (!self.is_reading).then(|| self.next_read.unwrap_or(now));
        reads.into_iter().chain(retries).min()
    }

    fn is_ordered(&self) -> bool {
        self.ordered.is_some() || self.is_current_ordered
    }

    /// Why the ordered release is skipped.
    fn skipped(&self) -> Option<(&Version, &str)> {
        let order = self.ordered.as_ref()?;
        let skipped = self.record.skips(&order.version, order.sha256.as_ref())?;
        Some((&skipped.version, &skipped.reason))
    }
}

impl Manager {
    /// Reads the record or starts an attempt, when due.
    pub(super) fn tick_upgrade(&mut self, now: Instant) {
        let upgrading = &mut self.upgrading;
        if !upgrading.is_reading && upgrading.next_read.is_none_or(|at| at <= now) {
            upgrading.is_reading = true;
            job::read_record(&self.inputs, &self.home, &self.identity.version);
        }
        if upgrading.is_yielding && self.watchdog.next_manager_will_start() {
            self.exit = Some(Goodbye::Yield);
        }
        self.begin_ordered_upgrade(now);
    }

    /// Handles the gateway's order. `upgrade_now`: the answer orders an upgrade now.
    pub(super) fn upgrade_ordered(&mut self, order: Option<Package>, upgrade_now: bool, now: Instant) {
        let record = &self.upgrading.record;
        let is_other = |order: &Package| record.is_held() && !record.overrules(&order.version, order.sha256.as_ref());
        if order.as_ref().is_some_and(is_other) {
            tracing::info!(
                "the gateway orders another release of the manager; it replaces the one that an operator chose"
            );
            job::change_record(&self.inputs, &self.home, &self.identity.version, |record| {
                record.release_hold();
            });
        }
        let upgrading = &mut self.upgrading;
        upgrading.named.clone_from(&order);
        let ordered = order.filter(|_| upgrade_now);
        upgrading.is_current_ordered = upgrade_now && ordered.is_none();
        if upgrading.ordered != ordered {
            (upgrading.ordered, upgrading.failures, upgrading.not_before) = (ordered, 0, None);
            upgrading.last_error = None;
        }
        self.begin_ordered_upgrade(now);
    }

    fn begin_ordered_upgrade(&mut self, now: Instant) {
        let upgrading = &self.upgrading;
        // No upgrade starts before the record was read.
        if upgrading.evidence.is_none() || upgrading.is_under_way() || self.stop.is_some() {
            return;
        }
        let record = &upgrading.record;
        if !upgrading.is_ordered() || upgrading.not_before.is_some_and(|at| now < at) || self.exit.is_some() {
            return;
        }
        let source = match &upgrading.ordered {
            Some(order) if order.version == self.identity.version => return,
            Some(order) if record.overrules(&order.version, order.sha256.as_ref()) => return,
            Some(_) if upgrading.skipped().is_some() => return,
            Some(order) => UpgradeSource::Gateway(order.clone()),
            None if record.is_held() => return,
            None => UpgradeSource::Current,
        };
        self.begin_upgrade(source, false);
    }

    fn begin_upgrade(&mut self, source: UpgradeSource, by_operator: bool) {
        let to = match &source {
            UpgradeSource::Gateway(order) => Some(order.version.clone()),
            UpgradeSource::Previous => self.upgrading.record.previous().map(|image| image.version.clone()),
            UpgradeSource::Current | UpgradeSource::File(_) => None,
        };
        tracing::info!(source = format!("{source:?}"), "an upgrade of the manager starts");
        self.upgrading.operator_error = None;
        let job = UpgradeJob {
            home: self.home.clone(),
            config: self.config.clone(),
            agent_id: self.identity.agent_id.clone(),
            source,
            by_operator: by_operator.then(|| self.upgrading.named.clone()),
            own: self.identity.version.clone(),
        };
        let progress = job::start(&self.inputs, job);
        self.upgrading.work = Some(PendingUpgrade { to, by_operator, began: unix_now(), progress });
    }

    /// Starts an upgrade on an operator's request.
    pub(super) fn upgrade_by_operator(&mut self, source: UpgradeSource) -> ControlReply {
        let what = "cannot change the manager's release";
        if self.stop.is_some() {
            return ControlReply::failed(format!("{what}: the home is being stopped"));
        }
        if self.upgrading.is_under_way() {
            return ControlReply::failed(format!(
                "{what}: another change is in progress; see `control status`, or abort it with `control upgrade --abort`"
            ));
        }
        if matches!(source, UpgradeSource::Previous) && self.upgrading.record.previous().is_none() {
            return ControlReply::failed(format!("{what}: no previous release is on this host"));
        }
        self.begin_upgrade(source, true);
        ControlReply::done()
    }

    /// Follows the gateway's orders now: ends the holds of operators' changes, and retries what waits.
    pub(super) fn follow_orders_now(&mut self, now: Instant) -> ControlReply {
        job::change_record(&self.inputs, &self.home, &self.identity.version, |record| {
            record.release_hold();
        });
        (self.upgrading.not_before, self.upgrading.failures) = (None, 0);
        let held = self.agents.values().filter(|agent| agent.state.ledger().is_held());
        for name in held.map(|agent| agent.state.name().clone()).collect::<Vec<_>>() {
            self.step(&name, crate::core::agent::AgentEvent::Retry, now);
        }
        self.replan = true;
        self.heartbeat_now(now);
        ControlReply::done()
    }

    /// Permits skipped releases of the manager again.
    pub(super) fn retry_upgrade(&mut self, now: Instant) -> ControlReply {
        job::change_record(&self.inputs, &self.home, &self.identity.version, |record| {
            record.clear_skips();
            record.release_hold();
        });
        self.upgrading.operator_error = None;
        (self.upgrading.not_before, self.upgrading.failures) = (None, 0);
        self.heartbeat_now(now);
        ControlReply::done()
    }

    /// Handles the result of an upgrade up to the switch.
    pub(super) fn upgraded(&mut self, outcome: UpgradeOutcome, now: Instant) {
        let work = self.upgrading.work.take();
        self.upgrading.next_read = Some(now);
        match outcome {
            UpgradeOutcome::Switched => {
                tracing::info!(
                    "the new release is in place; this manager exits so that it can start, and the sub-agents keep running"
                );
                self.yield_to_next();
            }
            UpgradeOutcome::Nothing => {
                (self.upgrading.failures, self.upgrading.last_error) = (0, None);
                if work.is_some_and(|work| work.by_operator) {
                    let own = self.identity.version.clone();
                    let text = format!("the manager runs {own} already, as requested by an operator");
                    self.report("upgrade", "ok", &own, Some(own.clone()), None, text);
                }
            }
            UpgradeOutcome::NotSwitched(failure) => self.not_switched(failure, work, now),
        }
    }

    /// Exits as soon as the watchdog or the service manager can start the next manager, and supervise its trial.
    fn yield_to_next(&mut self) {
        self.upgrading.is_yielding = true;
        if self.watchdog.next_manager_will_start() {
            self.exit = Some(Goodbye::Yield);
        } else {
            tracing::warn!("this manager exits when the watchdog runs, because the watchdog starts the new release");
        }
    }

    fn not_switched(&mut self, failure: NotSwitched, work: Option<PendingUpgrade>, now: Instant) {
        let NotSwitched { version, why, is_final, is_skipped, retry_after } = failure;
        let upgrading = &mut self.upgrading;
        if work.as_ref().is_some_and(|work| work.by_operator) {
            upgrading.operator_error = Some(why.clone());
        } else {
            upgrading.failures = upgrading.failures.saturating_add(1);
        }
        let pause = match is_final {
            true => FAULTY_RETRY_DELAY,
            false => RETRY_DELAY.delay(upgrading.failures, fastrand::f64()).max(retry_after.unwrap_or_default()),
        };
        upgrading.not_before = Some(now + pause);
        let is_news = upgrading.last_error.replace(why.clone()).as_ref() != Some(&why);
        if !is_news && upgrading.operator_error.is_none() {
            return;
        }
        let from = self.identity.version.clone();
        let began = work.map(|work| work.began);
        let kind = if is_skipped { "skip" } else { "upgrade" };
        self.report(kind, if is_skipped { "ok" } else { "failed" }, &from, version, began, why);
    }

    /// Handles the record of upgrades as it was read.
    pub(super) fn upgrade_record_read(
        &mut self,
        result: Result<Box<(UpgradeStep, UpgradeObservation)>, String>,
        now: Instant,
    ) {
        self.upgrading.is_reading = false;
        match result {
            Ok(read) => {
                let (step, observed) = *read;
                if step == UpgradeStep::RestartManager && self.stop.is_none() {
                    tracing::info!(
                        "another release is in place; this manager exits so that it can start, and the sub-agents keep running"
                    );
                    self.yield_to_next();
                }
                self.problems.remove("upgrade");
                self.report_finished(observed.record.ended());
                if observed.record.trial().is_none() && self.upgrading.endpoint.take().is_some() {
                    // The settings have the new endpoint now; reload them.
                    self.housekeeping.next = now;
                }
                if observed.record.trial().is_none() && !std::mem::replace(&mut self.upgrading.is_migrated, true) {
                    job::migrate(&self.inputs, &self.home);
                }
                self.upgrading.record = observed.record;
                self.upgrading.evidence = Some(observed.evidence);
            }
            Err(error) => {
                let text = format!("cannot read or change the record of the manager's upgrades: {error}");
                if self.problems.get("upgrade") != Some(&text) {
                    tracing::error!(
                        error = text,
                        "the record of upgrades is not usable; no upgrade of the manager is started"
                    );
                }
                self.problems.insert("upgrade", text);
            }
        }
        let pause = if self.upgrading.is_under_way() || !self.upgrading.reported.is_empty() {
            POLL_INTERVAL
        } else {
            IDLE_POLL_INTERVAL
        };
        self.upgrading.next_read = Some(now + pause);
        self.begin_ordered_upgrade(now);
    }

    /// Reports finished upgrades. When the events are being written, they are removed from the record.
    fn report_finished(&mut self, ended: &[FinishedUpgrade]) {
        if ended.is_empty() {
            self.upgrading.reported.clear();
            return;
        }
        let news: Vec<FinishedUpgrade> =
            ended.iter().filter(|ended| !self.upgrading.reported.contains(ended)).cloned().collect();
        if news.is_empty() {
            let reported = self.upgrading.reported.clone();
            job::change_record(&self.inputs, &self.home, &self.identity.version, move |record| {
                record.remove_reported(&reported)
            });
            return;
        }
        for ended in &news {
            self.report_finished_upgrade(ended);
        }
        self.upgrading.reported = ended.to_vec();
        self.journal.flush(&self.inputs);
    }

    fn report_finished_upgrade(&mut self, ended: &FinishedUpgrade) {
        let FinishedUpgrade { from, to, began, end, reason, skipped, .. } = ended;
        let why = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let (kind, outcome, from, to, text) = match end {
            UpgradeEnd::Committed => {
                ("upgrade", "ok", from, to, format!("the manager was upgraded from {from} to {to}{why}"))
            }
            UpgradeEnd::RolledBack => {
                let text = format!("the manager was rolled back from {to} to {from}{why}");
                ("rollback", "ok", to, from, text)
            }
            UpgradeEnd::GivenUp => {
                let text = format!("the upgrade of the manager from {from} to {to} was abandoned{why}");
                ("upgrade", "failed", from, to, text)
            }
        };
        // An earlier manager may have reported it and exited before the record was changed.
        if self.history.has(MANAGER_PACKAGE, kind, to, timestamp_of(*began)) {
            return;
        }
        self.report(kind, outcome, from, Some(to.clone()), Some(*began), text);
        if *skipped {
            let bad = &ended.to;
            let text = format!(
                "{bad} is skipped from now on{why}; order another release, or run `control retry {MANAGER_PACKAGE}`"
            );
            self.report("skip", "ok", &ended.from, Some(bad.clone()), Some(*began), text);
        }
    }

    /// Adds an event for the gateway, and an entry of the history.
    fn report(
        &mut self,
        kind: &str,
        outcome: &str,
        from: &Version,
        to: Option<Version>,
        began: Option<u64>,
        message: String,
    ) {
        let Ok(agent) = MANAGER_PACKAGE.parse::<AgentName>() else { return };
        let now = unix_now();
        let about = EventSubject { agent: Some(&agent), version: to.as_ref() };
        self.journal.note(kind, outcome, about, message.as_str());
        let Some(to) = to else { return };
        let changed = HistoryEntry {
            time: timestamp(),
            began: timestamp_of(began.unwrap_or(now)),
            kind: kind.to_owned(),
            agent,
            from: Some(from.clone()),
            to,
            outcome: outcome.to_owned(),
            seconds: now.saturating_sub(began.unwrap_or(now)),
            message,
            unknown: Default::default(),
        };
        self.history.add(changed, &self.inputs);
    }

    /// The change of the manager's release that `status` shows.
    pub(super) fn upgrade_status(&self) -> Option<UpgradeStatus> {
        if let Some(work) = &self.upgrading.work {
            let to = work.to.clone()?;
            return Some(UpgradeStatus {
                from: Some(self.identity.version.clone()),
                download: work.progress.download(&to),
                to,
                phase: "staging".to_owned(),
                deadline: None,
                tries_left: None,
                reason: self.upgrading.last_error.clone(),
            });
        }
        let record = &self.upgrading.record;
        let evidence = self.upgrading.evidence.or_else(|| record.trial().map(Evidence::of))?;
        let lived = self.identity.started.elapsed();
        let own = evidence.manager.map(|manager| upgrade::ManagerEvidence {
            answered: Some(lived),
            adopted: true,
            heartbeat: self.gateway.has_connected(),
            ..manager
        });
        // The watchdog's probe would fail like this manager's heartbeats.
        let probe = if self.gateway.is_failing() { Probe::Fails(Duration::ZERO) } else { evidence.probe };
        let limits = TrialLimits::of(self.config.upgrade_trial.0);
        let view = upgrade::status(record, &Evidence { manager: own, probe, ..evidence }, &limits)?;
        let left = view.seconds_left.map(Duration::from_secs);
        let deadline = left.and_then(|left| jiff::Timestamp::now().checked_add(left).ok());
        let deadline = deadline.map(|at| at.round(jiff::Unit::Second).unwrap_or(at).to_string());
        Some(UpgradeStatus {
            from: Some(view.from),
            to: view.to,
            phase: view.phase.as_str().to_owned(),
            deadline,
            tries_left: Some(view.tries_left.into()),
            reason: view.reason,
            download: None,
        })
    }

    /// Why the manager's release is not the ordered one.
    pub(super) fn upgrade_problem(&self) -> Option<String> {
        if let Some(why) = &self.upgrading.operator_error {
            return Some(format!("the change of the manager's release that an operator requested failed: {why}"));
        }
        let ordered = self.upgrading.ordered.as_ref()?;
        if ordered.version == self.identity.version || self.is_manager_held() {
            return None;
        }
        if let Some((version, reason)) = self.upgrading.skipped() {
            return Some(format!(
                "{MANAGER_PACKAGE} {version} failed and is skipped ({reason}); order another release, or run `control retry {MANAGER_PACKAGE}`"
            ));
        }
        let why = self.upgrading.last_error.as_ref()?;
        Some(format!("cannot upgrade the manager to {}: {why}; the upgrade is retried", ordered.version))
    }

    pub(super) fn is_manager_held(&self) -> bool {
        self.upgrading.record.is_held()
    }

    /// Cancels the download of an upgrade when the home stops.
    pub(super) fn cancel_upgrade(&self) {
        if let Some(work) = &self.upgrading.work {
            work.progress.cancel();
        }
    }
}
