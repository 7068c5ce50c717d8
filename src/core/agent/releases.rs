//! The life of a sub-agent's releases: staged, admitted, recorded, switched to, committed; held when a step fails.

use std::time::Duration;

use super::event::{AgentAction, JournalNote, Ready, ReleaseError};
use super::probation::ProbationProgress;
use super::{Activation, Activity, Agent, HeldRelease, Moment};
use crate::core::guards::{Guard, holds};
use crate::core::ledger::{LedgerEntry, LedgerRelease, SkippedRelease};
use crate::core::model::Version;
use crate::core::order::{Order, Package, Run};
use crate::core::program::Program;
use crate::core::schedule::Backoff;
use crate::core::supervise;

/// Between two tries at a release that cannot be fetched or activated.
const RETRY: Backoff = Backoff { base: Duration::from_secs(5), cap: Duration::from_secs(300) };
/// Between two downloads of a release that is rejected each time. A whole fleet may download it over a shared link.
const COSTLY_RETRY: Backoff = Backoff { cap: Duration::from_secs(6 * 3600), ..RETRY };

impl Agent {
    pub(super) fn stage(&mut self, package: Package, at: Moment) -> Vec<AgentAction> {
        let failures = self.failures_of(&package.version);
        if let Some(skipped) = self.ledger.skipped(&package.version, package.sha256.as_ref()) {
            // The clock may have been set back.
            let left = skipped.until.map(|until| Duration::from_secs(until.saturating_sub(at.unix_seconds)));
            let left = left.unwrap_or(COSTLY_RETRY.cap).min(COSTLY_RETRY.cap);
            if !left.is_zero() {
                self.error = Some(skipped.reason.clone());
                self.activity =
                    Activity::Held(HeldRelease { version: package.version, failures, until: at.now + left });
                return vec![];
            }
        }
        self.last_id += 1;
        let id = self.last_id;
        self.pending_stagings.insert(id);
        self.activity = Activity::Staging { id, version: package.version.clone(), failures };
        vec![AgentAction::Stage { id, package }]
    }

    pub(super) fn staged(
        &mut self,
        id: u64,
        version: Version,
        result: Result<Ready, ReleaseError>,
        at: Moment,
    ) -> Vec<AgentAction> {
        let is_wanted = matches!(self.activity, Activity::Staging { id: wanted, .. } if wanted == id)
            || !holds(Guard::CurrentStagingOnly);
        match result {
            Ok(ready) => {
                self.releases.insert(version.clone());
                if !is_wanted {
                    // The next plan uses or discards it.
                    return vec![];
                }
                self.error = None;
                self.ledger.stage(ready.release.clone());
                self.activity = Activity::Staged(Box::new(ready));
                let message = format!("{} {version} is staged", self.name);
                vec![
                    AgentAction::Record { wait: false },
                    AgentAction::Note(JournalNote::once("stage", "ok", Some(version), message)),
                ]
            }
            Err(refusal) if is_wanted => self.hold(version, "stage", refusal, at),
            Err(_) => vec![],
        }
    }

    pub(super) fn activate(&mut self, order: Order) -> Vec<AgentAction> {
        let mut actions = vec![];
        let version = order.package.version.clone();
        self.order = Some(order.clone());
        let failures = self.failures_of(&version);
        let program = match std::mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Staged(ready) if ready.release.version == version => Some(ready.program),
            Activity::Staging { .. } => {
                actions.push(AgentAction::CancelStaging);
                None
            }
            _ => None,
        };
        actions.push(AgentAction::Admit { version, inspect: program.is_none() });
        self.activity = Activity::Admitting { order: Box::new(order), program, failures };
        actions
    }

    pub(super) fn admitted(
        &mut self,
        result: Result<(LedgerRelease, Option<Program>), ReleaseError>,
        at: Moment,
    ) -> Vec<AgentAction> {
        let Activity::Admitting { order, program, failures } = &mut self.activity else { return vec![] };
        let (order, program, failures) = ((**order).clone(), program.take(), *failures);
        let (release, inspected) = match result {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse_activation(order.package.version, refusal, at),
        };
        let Some(program) = inspected.or(program) else {
            let why = format!("cannot activate {} {}: its manifest was not read", self.name, release.version);
            return self.refuse_activation(release.version, ReleaseError::failed(why), at);
        };
        let ready = Ready { release, program };
        self.activity = Activity::Recording(Box::new(Activation { order, ready, failures, began: at.now }));
        vec![AgentAction::Record { wait: true }]
    }

    pub(super) fn recorded(&mut self, result: Result<(), String>, at: Moment) -> Vec<AgentAction> {
        let activation = match std::mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Recording(activation) => activation,
            Activity::RollingBack(back) => {
                self.activity = Activity::RollingBack(back);
                self.rollback_is_recorded();
                return self.continue_if_down();
            }
            other => {
                self.activity = other;
                return vec![];
            }
        };
        if let Err(why) = result
            && holds(Guard::RecordBeforeStop)
        {
            let version = activation.ready.release.version.clone();
            self.activity = Activity::Recording(activation);
            let why = format!("cannot activate {} {version}: {why}", self.name);
            let mut actions = self.refuse_activation(version, ReleaseError::failed(why), at);
            // The failed write may have reached the disk in part, or a later write may have included the entry.
            actions.push(AgentAction::Record { wait: false });
            return actions;
        }
        self.activity = Activity::Stopping(activation);
        let mut actions = self.notify_supervisor(supervise::SupervisorEvent::Stop, at);
        actions.extend(self.continue_if_down());
        actions
    }

    /// Continues an operation that waited for the processes to exit.
    pub(super) fn continue_if_down(&mut self) -> Vec<AgentAction> {
        if !self.supervisor.is_down() && holds(Guard::DownBeforeSwitch) {
            return vec![];
        }
        match std::mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Stopping(activation) => {
                let (release, before) = (activation.ready.release.clone(), Box::new(self.ledger.clone()));
                put_into_use(&mut self.ledger, release.clone());
                self.progress = ProbationProgress::began(activation.began);
                self.activity = Activity::Switching { activation, before };
                vec![AgentAction::Switch(release.version)]
            }
            Activity::RollingBack(back) => self.switch_back(back),
            Activity::Uninstalling if self.removing.is_empty() && self.pending_stagings.is_empty() => {
                self.activity = Activity::Removing;
                vec![AgentAction::Remove]
            }
            other => {
                self.activity = other;
                vec![]
            }
        }
    }

    pub(super) fn switched(&mut self, result: Result<(), String>, at: Moment) -> Vec<AgentAction> {
        let (activation, before) = match std::mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Switching { activation, before } => (*activation, *before),
            Activity::SwitchingBack(back) => return self.switched_back(back, result, at),
            other => {
                self.activity = other;
                return vec![];
            }
        };
        let Activation { order, ready, failures, .. } = activation;
        let version = ready.release.version.clone();
        let mut actions = vec![];
        match result {
            Ok(()) => {
                self.error = None;
                self.releases.insert(version.clone());
                self.inspected(Ok(ready.program));
                let message = format!("{} {version} is active", self.name);
                actions.push(AgentAction::Note(JournalNote::once("activate", "ok", Some(version), message)));
                if self.ledger.probation().is_none() {
                    actions.push(AgentAction::RaiseEpoch(ready.release));
                }
            }
            Err(why) => {
                self.activity = Activity::Held(HeldRelease { version: version.clone(), failures, until: at.now });
                self.ledger = before;
                actions.push(AgentAction::Record { wait: false });
                actions.extend(self.refuse_activation(version, ReleaseError::failed(why), at));
            }
        }
        self.run = order.run;
        self.spec = Some(order.spec);
        // The home may have been stopped while the old release was stopped.
        if self.run == Run::Start && !self.home_stops && self.ledger.current().is_some() {
            actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Run, at));
        }
        actions
    }

    /// Holds a release that could not be activated; the active one stays. The files of a withdrawn release are removed, so that it is fetched
    /// again as it is published now.
    pub(super) fn refuse_activation(
        &mut self,
        version: Version,
        refusal: ReleaseError,
        at: Moment,
    ) -> Vec<AgentAction> {
        let withdrawn = refusal.withdrawn;
        let mut actions = self.hold(version.clone(), "activate", refusal, at);
        // If its program runs although it is not active (the active release was unknown), its files are kept.
        if withdrawn && self.running.as_ref() != Some(&version) {
            actions.extend(self.discard(version));
        }
        actions
    }

    pub(super) fn discard(&mut self, version: Version) -> Vec<AgentAction> {
        let mut actions = vec![];
        self.releases.remove(&version);
        let before = self.ledger.clone();
        self.ledger.drop_incomplete(|whole| *whole != version);
        if self.ledger != before {
            actions.push(AgentAction::Record { wait: false });
        }
        self.removing.insert(version.clone());
        actions.push(AgentAction::Discard(version));
        actions
    }

    /// Handles a new desired state. A held release is tried again at once; a skip after a failed probation ends only with a different order.
    pub(super) fn order_changed(&mut self, order: Option<Order>) -> Vec<AgentAction> {
        let mut actions = vec![];
        if self.ledger.order_changed(order.as_ref().map(Order::asks_for)) {
            actions.push(AgentAction::Record { wait: false });
        }
        match &self.activity {
            Activity::Held(_) => self.activity = Activity::Idle,
            Activity::Staging { version: staged, .. }
                if order.as_ref().map(|order| &order.package.version) != Some(staged) =>
            {
                actions.extend(self.cancel_staging());
            }
            _ => {}
        }
        self.order = order;
        actions
    }

    pub(super) fn cancel_staging(&mut self) -> Vec<AgentAction> {
        if !matches!(self.activity, Activity::Staging { .. }) {
            return vec![];
        }
        self.activity = Activity::Idle;
        vec![AgentAction::CancelStaging]
    }

    /// Holds a release until it is tried again. Writes an event unless the error is the same as before.
    pub(super) fn hold(
        &mut self,
        version: Version,
        kind: &'static str,
        refusal: ReleaseError,
        at: Moment,
    ) -> Vec<AgentAction> {
        let mut actions = vec![];
        if self.error.as_ref() != Some(&refusal.why) {
            let note = JournalNote::once(kind, refusal.outcome(), Some(version.clone()), refusal.why.clone());
            actions.push(AgentAction::Note(note));
        }
        let failures = self.failures_of(&version).saturating_add(1);
        let backoff = if refusal.costly { COSTLY_RETRY } else { RETRY };
        let delay = backoff.delay(failures, at.jitter).max(refusal.retry_after.unwrap_or_default());
        if refusal.costly {
            // So that a restarted manager does not download it at once.
            self.ledger.skip(SkippedRelease {
                version: version.clone(),
                sha256: None,
                reason: refusal.why.clone(),
                failures,
                until: Some(at.unix_seconds.saturating_add(delay.as_secs())),
                retry: self.order.as_ref().map_or(0, |order| order.retry),
                unknown: Default::default(),
            });
            actions.push(AgentAction::Record { wait: false });
        }
        self.error = Some(refusal.why);
        self.activity = Activity::Held(HeldRelease { version, failures, until: at.now + delay });
        if !holds(Guard::HoldFailed) {
            self.activity = Activity::Idle;
        }
        actions
    }

    /// Failures in a row to fetch or activate this release.
    pub(super) fn failures_of(&self, of: &Version) -> u32 {
        match &self.activity {
            Activity::Held(HeldRelease { version, failures, .. }) | Activity::Staging { version, failures, .. }
                if version == of =>
            {
                *failures
            }
            Activity::Admitting { order, failures, .. } if order.package.version == *of => *failures,
            Activity::Recording(activation) if activation.ready.release.version == *of => activation.failures,
            _ => self.ledger.skipped(of, None).map_or(0, |skipped| skipped.failures),
        }
    }
}

/// Makes a release the current one: on probation if there is a previous release, else active.
pub(super) fn put_into_use(ledger: &mut LedgerEntry, release: LedgerRelease) {
    if ledger.current().is_none() {
        ledger.activate(release);
    } else {
        ledger.begin_probation(release);
    }
}
