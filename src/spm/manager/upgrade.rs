//! The manager's upgrade of itself, as the loop has it: what is ordered, when it is begun, and what is reported of its end.

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

/// While an upgrade is under way its record is looked at so often.
const LOOK: Duration = Duration::from_secs(1);
/// Otherwise so often: an operator's word and the installer's may be in it.
const IDLE_LOOK: Duration = Duration::from_secs(60);
/// Between two tries to fetch a release.
const RETRY: Backoff = Backoff { base: Duration::from_secs(15), cap: Duration::from_secs(600) };
/// A release that is at fault, and that cannot be skipped by its digest because nobody named one, is tried again after so long.
const AT_FAULT: Duration = Duration::from_secs(3600);

/// The manager's upgrade of itself.
#[derive(Debug, Default)]
pub(super) struct ManagerUpgrade {
    /// As it was last seen.
    record: UpgradeRecord,
    /// `None`: it was read at the start, and not yet looked at together with the rest.
    evidence: Option<Evidence>,
    is_looking: bool,
    next_look: Option<Instant>,
    /// The release that the gateway names, whether or not it wants it put in place now.
    named: Option<Package>,
    /// What it wants to be put in place.
    ordered: Option<Package>,
    wants_current: bool,
    work: Option<PendingUpgrade>,
    /// This release came on trial with another endpoint than the settings say.
    pub(super) endpoint: Option<NewEndpoint>,
    /// The installation was brought up to this release since this manager started.
    is_migrated: bool,
    /// The next manager is to be started.
    gives_way: bool,
    failures: u32,
    not_before: Option<Instant>,
    /// Why the last try failed.
    last_error: Option<String>,
    /// Why the last one that an operator asked for did.
    asked_error: Option<String>,
    /// Ends that were reported, and are still in the record.
    told: Vec<FinishedUpgrade>,
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
    /// What a manager goes by that begins.
    pub(super) fn new(record: UpgradeRecord, endpoint: Option<NewEndpoint>) -> ManagerUpgrade {
        ManagerUpgrade { record, endpoint, ..ManagerUpgrade::default() }
    }

    fn is_under_way(&self) -> bool {
        self.work.is_some() || self.gives_way || self.record.trial().is_some()
    }

    /// When the record is to be looked at.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let begins = self.not_before.filter(|_| self.work.is_none() && self.is_ordered()).filter(|at| *at > now);
        let looks = (!self.is_looking).then(|| self.next_look.unwrap_or(now));
        looks.into_iter().chain(begins).min()
    }

    fn is_ordered(&self) -> bool {
        self.ordered.is_some() || self.wants_current
    }

    /// Why the order is not followed, where it is for good.
    fn skipped(&self) -> Option<(&Version, &str)> {
        let order = self.ordered.as_ref()?;
        let skipped = self.record.skips(&order.version, order.sha256.as_ref())?;
        Some((&skipped.version, &skipped.reason))
    }
}

impl Manager {
    /// What time asks for: a look at the record, or another try.
    pub(super) fn tend_upgrade(&mut self, now: Instant) {
        let upgrading = &mut self.upgrading;
        if !upgrading.is_looking && upgrading.next_look.is_none_or(|at| at <= now) {
            upgrading.is_looking = true;
            job::look(&self.inputs, &self.home, &self.identity.version);
        }
        if upgrading.gives_way && self.peer.may_be_left() {
            self.ending = Some(Goodbye::Yield);
        }
        self.begin_ordered_upgrade(now);
    }

    /// Takes in what the gateway orders. `wants`: it says so now.
    pub(super) fn upgrade_ordered(&mut self, order: Option<Package>, wants: bool, now: Instant) {
        let record = &self.upgrading.record;
        let is_other = |order: &Package| record.is_held() && !record.overrules(&order.version, order.sha256.as_ref());
        if order.as_ref().is_some_and(is_other) {
            tracing::info!("the gateway orders another release of the manager than the operator's change overruled");
            job::change(&self.inputs, &self.home, &self.identity.version, |record| {
                record.release_hold();
            });
        }
        let upgrading = &mut self.upgrading;
        upgrading.named.clone_from(&order);
        let wanted = order.filter(|_| wants);
        upgrading.wants_current = wants && wanted.is_none();
        if upgrading.ordered != wanted {
            (upgrading.ordered, upgrading.failures, upgrading.not_before) = (wanted, 0, None);
            upgrading.last_error = None;
        }
        self.begin_ordered_upgrade(now);
    }

    fn begin_ordered_upgrade(&mut self, now: Instant) {
        let upgrading = &self.upgrading;
        // Nothing is begun before the record was seen.
        if upgrading.evidence.is_none() || upgrading.is_under_way() || self.stop.is_some() {
            return;
        }
        let record = &upgrading.record;
        if !upgrading.is_ordered() || upgrading.not_before.is_some_and(|at| now < at) || self.ending.is_some() {
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
        tracing::info!(source = format!("{source:?}"), "an upgrade of the manager begins");
        self.upgrading.asked_error = None;
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

    /// The operator asks for it.
    pub(super) fn upgrade_by_hand(&mut self, source: UpgradeSource) -> ControlReply {
        let what = "cannot change the manager's release";
        if self.stop.is_some() {
            return ControlReply::failed(format!("{what}: the home is being stopped"));
        }
        if self.upgrading.is_under_way() {
            return ControlReply::failed(format!(
                "{what}: another change is under way; see `status`, or end it with `control upgrade --abort`"
            ));
        }
        if matches!(source, UpgradeSource::Previous) && self.upgrading.record.previous().is_none() {
            return ControlReply::failed(format!("{what}: no release before the current one is on this host"));
        }
        self.begin_upgrade(source, true);
        ControlReply::done()
    }

    /// Follows the gateway's orders now: whatever an operator's change held back, and whatever waits for its next try.
    pub(super) fn follow_orders_now(&mut self, now: Instant) -> ControlReply {
        job::change(&self.inputs, &self.home, &self.identity.version, |record| {
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

    /// Tries again what is skipped.
    pub(super) fn retry_upgrade(&mut self, now: Instant) -> ControlReply {
        job::change(&self.inputs, &self.home, &self.identity.version, |record| {
            record.clear_skips();
            record.release_hold();
        });
        self.upgrading.asked_error = None;
        (self.upgrading.not_before, self.upgrading.failures) = (None, 0);
        self.heartbeat_now(now);
        ControlReply::done()
    }

    /// An upgrade has come as far as this manager takes it.
    pub(super) fn upgraded(&mut self, outcome: UpgradeOutcome, now: Instant) {
        let work = self.upgrading.work.take();
        self.upgrading.next_look = Some(now);
        match outcome {
            UpgradeOutcome::Switched => {
                tracing::info!("the new release is in place; this manager gives way, and the sub-agents stay");
                self.give_way();
            }
            UpgradeOutcome::Nothing => {
                (self.upgrading.failures, self.upgrading.last_error) = (0, None);
                if work.is_some_and(|work| work.by_operator) {
                    let own = self.identity.version.clone();
                    let text = format!("the manager runs {own} already, which an operator asked for");
                    self.report("upgrade", "ok", &own, Some(own.clone()), None, text);
                }
            }
            UpgradeOutcome::NotSwitched(failure) => self.not_switched(failure, work, now),
        }
    }

    /// Ends as soon as somebody is there to start the next manager, and to judge it.
    fn give_way(&mut self) {
        self.upgrading.gives_way = true;
        if self.peer.may_be_left() {
            self.ending = Some(Goodbye::Yield);
        } else {
            tracing::warn!("this manager waits for the watchdog before it gives way");
        }
    }

    fn not_switched(&mut self, failure: NotSwitched, work: Option<PendingUpgrade>, now: Instant) {
        let NotSwitched { version, why, is_final, is_skipped, retry_after } = failure;
        let upgrading = &mut self.upgrading;
        if work.as_ref().is_some_and(|work| work.by_operator) {
            upgrading.asked_error = Some(why.clone());
        } else {
            upgrading.failures = upgrading.failures.saturating_add(1);
        }
        let pause = match is_final {
            true => AT_FAULT,
            false => RETRY.delay(upgrading.failures, fastrand::f64()).max(retry_after.unwrap_or_default()),
        };
        upgrading.not_before = Some(now + pause);
        let is_news = upgrading.last_error.replace(why.clone()).as_ref() != Some(&why);
        if !is_news && upgrading.asked_error.is_none() {
            return;
        }
        let from = self.identity.version.clone();
        let began = work.map(|work| work.began);
        let kind = if is_skipped { "skip" } else { "upgrade" };
        self.report(kind, if is_skipped { "ok" } else { "failed" }, &from, version, began, why);
    }

    /// The record was looked at.
    pub(super) fn upgrade_seen(&mut self, seen: Result<Box<(UpgradeStep, UpgradeObservation)>, String>, now: Instant) {
        self.upgrading.is_looking = false;
        match seen {
            Ok(seen) => {
                let (step, seen) = *seen;
                if step == UpgradeStep::RestartManager && self.stop.is_none() {
                    tracing::info!("another release is in place; this manager gives way, and the sub-agents stay");
                    self.give_way();
                }
                self.problems.remove("upgrade");
                self.report_ends(seen.record.ended());
                if seen.record.trial().is_none() && self.upgrading.endpoint.take().is_some() {
                    // It stands in the settings now.
                    self.housekeeping.next = now;
                }
                if seen.record.trial().is_none() && !std::mem::replace(&mut self.upgrading.is_migrated, true) {
                    job::migrate(&self.inputs, &self.home);
                }
                self.upgrading.record = seen.record;
                self.upgrading.evidence = Some(seen.evidence);
            }
            Err(error) => {
                let text = format!("the record of the manager's upgrades cannot be used: {error}");
                if self.problems.get("upgrade") != Some(&text) {
                    tracing::error!(error = text, "no upgrade of the manager is begun meanwhile");
                }
                self.problems.insert("upgrade", text);
            }
        }
        let pause = if self.upgrading.is_under_way() || !self.upgrading.told.is_empty() { LOOK } else { IDLE_LOOK };
        self.upgrading.next_look = Some(now + pause);
        self.begin_ordered_upgrade(now);
    }

    /// Reports how upgrades ended; when the events are on their way to the disk, the record forgets them.
    fn report_ends(&mut self, ended: &[FinishedUpgrade]) {
        if ended.is_empty() {
            self.upgrading.told.clear();
            return;
        }
        let news: Vec<FinishedUpgrade> =
            ended.iter().filter(|ended| !self.upgrading.told.contains(ended)).cloned().collect();
        if news.is_empty() {
            let told = self.upgrading.told.clone();
            job::change(&self.inputs, &self.home, &self.identity.version, move |record| record.remove_reported(&told));
            return;
        }
        for ended in &news {
            self.report_end(ended);
        }
        self.upgrading.told = ended.to_vec();
        self.journal.flush(&self.inputs);
    }

    fn report_end(&mut self, ended: &FinishedUpgrade) {
        let FinishedUpgrade { from, to, began, end, reason, skipped, .. } = ended;
        let why = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let (kind, outcome, from, to, text) = match end {
            UpgradeEnd::Committed => {
                ("upgrade", "ok", from, to, format!("the manager runs {to}, which took the place of {from}{why}"))
            }
            UpgradeEnd::RolledBack => {
                let text = format!("the manager runs {from} again, and {to} was rolled back{why}");
                ("rollback", "ok", to, from, text)
            }
            UpgradeEnd::GivenUp => {
                let text = format!("the upgrade of the manager from {from} to {to} was given up{why}");
                ("upgrade", "failed", from, to, text)
            }
        };
        // A manager that ended before the record forgot it may have reported it.
        if self.history.has(MANAGER_PACKAGE, kind, to, timestamp_of(*began)) {
            return;
        }
        self.report(kind, outcome, from, Some(to.clone()), Some(*began), text);
        if *skipped {
            let bad = &ended.to;
            let text =
                format!("{bad} is not tried again{why}; order another release, or `control retry {MANAGER_PACKAGE}`");
            self.report("skip", "ok", &ended.from, Some(bad.clone()), Some(*began), text);
        }
    }

    /// An event for the gateway, and a line of the history.
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

    /// What `status` shows of a change of the manager's release.
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
            heartbeat: self.line.has_connected(),
            ..manager
        });
        // What the watchdog finds of the gateway it finds too.
        let probe = if self.line.fails() { Probe::Fails(Duration::ZERO) } else { evidence.probe };
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

    /// That a release of the manager is not what is ordered, and why.
    pub(super) fn upgrade_problem(&self) -> Option<String> {
        if let Some(why) = &self.upgrading.asked_error {
            return Some(format!("the manager's release was not changed as an operator asked: {why}"));
        }
        let ordered = self.upgrading.ordered.as_ref()?;
        if ordered.version == self.identity.version || self.is_manager_held() {
            return None;
        }
        if let Some((version, reason)) = self.upgrading.skipped() {
            return Some(format!(
                "{MANAGER_PACKAGE} {version} failed and is skipped ({reason}); order another release, or `control retry {MANAGER_PACKAGE}`"
            ));
        }
        let why = self.upgrading.last_error.as_ref()?;
        Some(format!("the manager cannot be upgraded to {}: {why}; it is tried again", ordered.version))
    }

    pub(super) fn is_manager_held(&self) -> bool {
        self.upgrading.record.is_held()
    }

    /// What is being fetched for an upgrade is not wanted any more, when the home stops.
    pub(super) fn give_up_upgrade(&self) {
        if let Some(work) = &self.upgrading.work {
            work.progress.give_up();
        }
    }
}
