//! Counts the steps of a home's roles, and kills a process at one of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::step::{Naming, Step};
use crate::trace::{Call, Observer, Trace};

/// Longer than the interval of heartbeats, whose answers make the host act.
const QUIET: Duration = Duration::from_secs(2);

/// The tracers of one home, and what they count.
pub(super) struct Watch {
    trace: Trace,
    steps: Arc<Steps>,
}

struct Steps(Mutex<State>);

struct State {
    home: PathBuf,
    naming: Naming,
    /// Steps are counted, and one may be a process's last.
    is_armed: bool,
    target: Option<Target>,
    /// The steps since the watch was armed, in their order.
    steps: Vec<Step>,
    counts: BTreeMap<Step, u32>,
    /// When the last step came.
    last: Instant,
    killed: Option<Step>,
}

/// Which process is killed where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) step: Step,
    /// With every other process of the home but the sub-agents.
    pub(super) together: bool,
}

impl Watch {
    pub(super) fn new(home: &Path, naming: Naming) -> Watch {
        let steps = Arc::new(Steps(Mutex::new(State {
            home: home.to_owned(),
            naming,
            is_armed: false,
            target: None,
            steps: Vec::new(),
            counts: BTreeMap::new(),
            last: Instant::now(),
            killed: None,
        })));
        Watch { trace: Trace::new(Arc::clone(&steps) as Arc<dyn Observer>), steps }
    }

    /// From now on steps are counted from the first, and the target's process is killed.
    pub(super) fn arm(&self, naming: Naming, target: Option<Target>) {
        let mut state = self.steps.state();
        state.naming = naming;
        state.is_armed = true;
        state.target = target;
        state.steps.clear();
        state.counts.clear();
        state.last = Instant::now();
        state.killed = None;
    }

    /// Nothing is counted or killed any more; returns the steps that were seen.
    pub(super) fn disarm(&self) -> Vec<Step> {
        let mut state = self.steps.state();
        state.is_armed = false;
        state.target = None;
        std::mem::take(&mut state.steps)
    }

    /// The step before which a process was killed.
    pub(super) fn killed(&self) -> Option<Step> {
        self.steps.state().killed.clone()
    }

    /// Whether no step came for a while: an upgrade ends with steps that no status shows.
    pub(super) fn is_quiet(&self) -> bool {
        self.steps.state().last.elapsed() > QUIET
    }

    pub(super) fn live(&self) -> usize {
        self.trace.live().len()
    }

    /// Fails if a system call is in no list, so that it is unknown whether it is a step.
    pub(super) fn check(&self) -> Result<()> {
        self.trace.check()
    }

    /// Runs a command traced, with all its children; returns its exit code. The tracer keeps tracing the children.
    pub(super) fn run(&self, command: &[String], environment: &[(String, String)]) -> Result<i32> {
        self.trace.run(command, environment)
    }
}

impl Steps {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Steps {
    fn before(&self, call: &Call, trace: &Trace) {
        let Some(what) = call.subject() else { return };
        let mut state = self.state();
        if !state.is_armed {
            return;
        }
        let Some(step) = state.naming.step(&state.home, &call.role, call.name, &what) else { return };
        let count = state.counts.entry(step.clone()).or_default();
        *count += 1;
        let step = step.numbered(*count);
        if step.is_repetition() {
            return;
        }
        state.steps.push(step.clone());
        state.last = Instant::now();
        let Some(target) = state.target.clone().filter(|target| target.step == step) else { return };
        state.target = None;
        let victims = if target.together { trace.live() } else { [call.process].into() };
        for victim in victims {
            let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
        }
        state.killed = Some(step);
    }

    fn after(&self, _call: &Call, _succeeded: bool, _trace: &Trace) {}
}
