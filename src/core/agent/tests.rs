//! Tables of events and the actions that follow.

use std::time::Duration;

use super::*;
use crate::core::env::Env;
use crate::core::ledger::LedgerRelease;
use crate::core::manifest::Manifest;
use crate::core::order::Package;
use crate::core::supervise::CheckResult;
use crate::core::unknown::UnknownFields;

mod probation;
mod properties;
mod search;

const S: fn(u64) -> Duration = Duration::from_secs;

fn at(now: Instant) -> Moment {
    Moment { now, unix_seconds: 1_800_000_000, jitter: 1.0 }
}

fn version(text: &str) -> Version {
    text.parse().unwrap()
}

fn release(text: &str) -> LedgerRelease {
    LedgerRelease { version: version(text), sha256: None, epoch: 1, unknown: UnknownFields::new() }
}

fn order(text: &str) -> Order {
    Order {
        package: Package::new(version(text)),
        run: Run::Start,
        spec: Spec::default(),
        retry: 0,
        unknown: UnknownFields::new(),
    }
}

fn manifest(env_allow: &[&str]) -> Program {
    use crate::core::manifest::{KillMode, Restart, RunSection, StopSignal};
    Program::Native(Box::new(Manifest {
        name: "a".parse().unwrap(),
        version: version("1"),
        run: RunSection {
            command: vec!["run".into()],
            user: None,
            workdir: None,
            stop_signal: StopSignal::Term,
            grace_period: None,
            restart: Restart::Always,
            kill_mode: KillMode::Tree,
            probation: None,
            env_allow: env_allow.iter().map(|name| (*name).to_owned()).collect(),
        },
        health: None,
        env: Default::default(),
    }))
}

fn ready(text: &str) -> Ready {
    Ready { release: release(text), program: manifest(&[]) }
}

fn refusal(why: &str) -> ReleaseError {
    ReleaseError::failed(why)
}

fn inspected(result: Result<Program, String>) -> AgentEvent {
    AgentEvent::Inspected { version: version("1"), result }
}

/// A sub-agent under test, the actions that it returned, and the time.
struct Bench {
    agent: Agent,
    now: Instant,
    actions: Vec<AgentAction>,
}

impl Bench {
    fn new() -> Bench {
        Bench { agent: Agent::new("a".parse().unwrap()), now: Instant::now(), actions: vec![] }
    }

    /// Release 1 is active and runs.
    fn running() -> Bench {
        let mut bench = Bench::new();
        bench.install("1");
        bench.send(AgentEvent::Launched { pid: 10, version: version("1"), spec_matches: true });
        assert_eq!(bench.agent.state(), AgentState::Running);
        bench.actions.clear();
        bench
    }

    /// Release 1 is stopped, and the given release is about to be started for the first time.
    fn about_to_start(text: &str) -> Bench {
        let mut bench = Bench::running();
        bench.install_over(text);
        bench.actions.clear();
        bench
    }

    fn install_over(&mut self, text: &str) {
        self.stage(text);
        self.send(AgentEvent::Activate(order(text)));
        self.send(AgentEvent::Admitted(Ok((release(text), None))));
        self.send(AgentEvent::Recorded(Ok(())));
        self.send(AgentEvent::Stopped(Ok(())));
        self.send(AgentEvent::Switched(Ok(())));
    }

    fn launched(&mut self, pid: u32, text: &str) -> &mut Bench {
        self.send(AgentEvent::Launched { pid, version: version(text), spec_matches: true })
    }

    fn send(&mut self, event: AgentEvent) -> &mut Bench {
        self.actions.extend(self.agent.step(event, at(self.now)));
        self
    }

    /// The events that lead to the start of a release while nothing runs.
    fn install(&mut self, text: &str) {
        self.stage(text);
        self.send(AgentEvent::Activate(order(text)));
        self.send(AgentEvent::Admitted(Ok((release(text), None))));
        self.send(AgentEvent::Recorded(Ok(())));
        self.send(AgentEvent::Switched(Ok(())));
    }

    fn stage(&mut self, text: &str) {
        self.send(AgentEvent::Stage(Package::new(version(text))));
        self.answer(text, Ok(ready(text)));
    }

    /// Answers the last staging.
    fn answer(&mut self, text: &str, result: Result<Ready, ReleaseError>) {
        let id = self.agent.last_id;
        self.send(AgentEvent::Staged { id, version: version(text), result });
    }

    /// The actions since the last call, without notes.
    fn take_actions(&mut self) -> Vec<AgentAction> {
        std::mem::take(&mut self.actions)
            .into_iter()
            .filter(|action| !matches!(action, AgentAction::Note(_) | AgentAction::CancelCheck))
            .collect()
    }

    fn notes(&self) -> Vec<(&str, &str)> {
        let note = |action: &'_ AgentAction| match action {
            AgentAction::Note(note) => Some((note.kind, note.outcome)),
            _ => None,
        };
        self.actions.iter().filter_map(note).collect()
    }
}

#[test]
fn a_first_release_is_staged_recorded_and_started_and_raises_the_epoch() {
    let mut bench = Bench::new();
    bench.send(AgentEvent::Stage(Package::new(version("1"))));
    assert_eq!(bench.agent.state(), AgentState::Updating);
    assert_eq!(bench.take_actions(), [AgentAction::Stage { id: 1, package: Package::new(version("1")) }]);
    bench.answer("1", Ok(ready("1")));
    assert_eq!(bench.notes(), [("stage", "ok")]);
    assert_eq!(bench.take_actions(), [AgentAction::Record { wait: false }]);
    bench.send(AgentEvent::Activate(order("1")));
    assert_eq!(bench.take_actions(), [AgentAction::Admit { version: version("1"), inspect: false }]);
    bench.send(AgentEvent::Admitted(Ok((release("1"), None))));
    assert_eq!(bench.take_actions(), [AgentAction::Record { wait: true }]);
    bench.send(AgentEvent::Recorded(Ok(())));
    assert_eq!(bench.take_actions(), [AgentAction::Switch(version("1"))]);
    bench.send(AgentEvent::Switched(Ok(())));
    assert_eq!(bench.take_actions(), [AgentAction::RaiseEpoch(release("1")), AgentAction::Start]);
    assert_eq!(bench.agent.ledger().active(), Some(&release("1")));
}

#[test]
fn the_running_release_is_stopped_only_after_the_new_one_is_admitted_and_recorded() {
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Ok((release("2"), None))));
    assert!(!bench.take_actions().contains(&AgentAction::Stop));
    assert_eq!(bench.agent.to_record().probation(), Some(&release("2")));
    bench.send(AgentEvent::Recorded(Ok(())));
    assert_eq!(bench.take_actions(), [AgentAction::Stop]);
    bench.send(AgentEvent::Stopped(Ok(())));
    assert_eq!(bench.take_actions(), [AgentAction::Switch(version("2"))]);
    bench.send(AgentEvent::Switched(Ok(())));
    assert_eq!(bench.take_actions(), [AgentAction::Start]);
    assert_eq!(bench.agent.ledger().active(), Some(&release("1")), "not committed before it has started");
    bench.launched(11, "2");
    assert_eq!((bench.take_actions(), bench.agent.state()), (vec![], AgentState::Updating), "on probation");
    bench.now += S(9);
    bench.send(AgentEvent::Tick);
    assert_eq!(bench.take_actions(), []);
    bench.now = bench.agent.deadline(bench.now).unwrap();
    bench.send(AgentEvent::Tick);
    assert_eq!(bench.notes(), [("upgrade", "ok")]);
    assert_eq!(bench.take_actions(), [AgentAction::Record { wait: false }, AgentAction::RaiseEpoch(release("2"))]);
    assert_eq!((bench.agent.ledger().active(), bench.agent.ledger().probation()), (Some(&release("2")), None));
    assert_eq!(bench.agent.state(), AgentState::Running);
}

/// An event of the table.
type Fail = fn(&mut Bench);

#[test]
fn a_failed_step_keeps_the_running_release_and_is_retried_with_back_off() {
    let ways: [(&str, Fail); 3] = [
        ("stage", |bench| {
            bench.send(AgentEvent::Stage(Package::new(version("2"))));
            bench.answer("2", Err(refusal("no route")));
        }),
        ("activate", |bench| {
            bench.send(AgentEvent::Activate(order("2")));
            bench.send(AgentEvent::Admitted(Err(refusal("the home can be changed by others"))));
        }),
        ("activate", |bench| {
            bench.send(AgentEvent::Activate(order("2")));
            bench.send(AgentEvent::Admitted(Ok((release("2"), Some(Program::Script)))));
            bench.send(AgentEvent::Recorded(Err("no space left".into())));
        }),
    ];
    for (kind, fail) in ways {
        let mut bench = Bench::running();
        let mut pauses = vec![];
        for _ in 0..8 {
            fail(&mut bench);
            let until = bench.agent.deadline(bench.now).unwrap();
            pauses.push((until - bench.now).as_secs());
            assert_eq!(bench.agent.actual(None, bench.now).held_back, Some(version("2")));
            bench.now = until;
            assert!(bench.agent.hold_is_over(bench.now) && bench.agent.actual(None, bench.now).held_back.is_none());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300], "{kind}");
        assert_eq!(bench.notes().iter().filter(|(of, _)| *of == kind).count(), 1, "a repeated error is reported once");
        assert!(!bench.take_actions().contains(&AgentAction::Stop));
        assert_eq!((bench.agent.state(), bench.agent.current()), (AgentState::Running, Some(&version("1"))));
        bench.send(AgentEvent::OrderChanged(Some(order("2"))));
        assert_eq!(bench.agent.actual(None, bench.now).held_back, None, "a new desired state is tried at once");
    }
}

#[test]
fn a_failed_switch_of_the_link_keeps_the_previous_release() {
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Ok((release("2"), None))));
    bench.send(AgentEvent::Recorded(Ok(())));
    bench.send(AgentEvent::Stopped(Ok(())));
    bench.actions.clear();
    bench.send(AgentEvent::Switched(Err("read-only file system".into())));
    assert_eq!(bench.take_actions(), [AgentAction::Record { wait: false }, AgentAction::Start]);
    assert_eq!((bench.agent.current(), bench.agent.ledger().probation()), (Some(&version("1")), None));
}

#[test]
fn a_withdrawn_release_is_removed_unless_it_runs() {
    let withdrawn = || ReleaseError { refused: true, withdrawn: true, ..refusal("its key was revoked") };
    let mut bench = Bench::running();
    bench.stage("2");
    bench.actions.clear();
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Err(withdrawn())));
    assert!(bench.notes().contains(&("activate", "refused")));
    assert!(bench.take_actions().contains(&AgentAction::Discard(version("2"))));
    let actual = bench.agent.actual(None, bench.now);
    assert!(!actual.releases.contains(&version("2")) && actual.leaving.contains(&version("2")));
    bench.send(AgentEvent::Discarded(version("2")));
    assert!(bench.agent.actual(None, bench.now).leaving.is_empty());
    bench.send(AgentEvent::Activate(order("1")));
    bench.send(AgentEvent::Admitted(Err(withdrawn())));
    assert!(!bench.take_actions().contains(&AgentAction::Discard(version("1"))), "it runs");
}

#[test]
fn a_rejection_after_a_download_is_remembered_until_the_package_or_the_desired_state_changes() {
    let mut bench = Bench::running();
    let package =
        |digit: &str| Package { sha256: Some(digit.repeat(64).parse().unwrap()), ..Package::new(version("2")) };
    bench.send(AgentEvent::Stage(package("a")));
    let costly = ReleaseError { costly: true, refused: true, ..refusal("it holds a device") };
    bench.answer("2", Err(costly));
    assert!(bench.take_actions().contains(&AgentAction::Record { wait: false }));
    let ledger = bench.agent.ledger().clone();
    let found = || Discovery { ledger: ledger.clone(), releases: [version("1")].into(), ..Discovery::default() };
    let (mut next, _) = Agent::restore("a".parse().unwrap(), found());
    assert_eq!(next.step(AgentEvent::Stage(package("a")), at(bench.now)), []);
    assert_eq!(next.last_error().as_deref(), Some("it holds a device"));
    assert_eq!(next.actual(None, bench.now).held_back, Some(version("2")));
    let later = Moment { unix_seconds: at(bench.now).unix_seconds + 5, ..at(bench.now + S(5)) };
    assert_eq!(
        next.step(AgentEvent::Stage(package("a")), later),
        [AgentAction::Stage { id: 1, package: package("a") }]
    );
    let (mut next, _) = Agent::restore("a".parse().unwrap(), found());
    next.step(AgentEvent::OrderChanged(Some(order("2"))), at(bench.now));
    assert_eq!(
        next.step(AgentEvent::Stage(package("a")), at(bench.now)),
        [AgentAction::Stage { id: 1, package: package("a") }]
    );
}

#[test]
fn a_new_order_cancels_the_staging_of_the_previous_one() {
    let mut bench = Bench::running();
    bench.send(AgentEvent::Stage(Package::new(version("2"))));
    bench.actions.clear();
    bench.send(AgentEvent::OrderChanged(Some(order("2"))));
    assert_eq!(bench.take_actions(), []);
    bench.send(AgentEvent::OrderChanged(Some(order("3"))));
    assert_eq!(bench.take_actions(), [AgentAction::CancelStaging]);
    bench.answer("2", Ok(ready("2")));
    assert_eq!(bench.take_actions(), []);
    assert!(bench.agent.actual(None, bench.now).releases.contains(&version("2")), "the plan discards it");
}

#[test]
fn a_changed_environment_restarts_the_process() {
    let spec = Spec { env: Env::from([("A".to_owned(), "b".into())]) };
    for (spec_matches, expected) in [(true, vec![]), (false, vec![AgentAction::Stop])] {
        let mut bench = Bench::running();
        bench.send(AgentEvent::Configure { spec: spec.clone(), spec_matches, sound: Ok(()) });
        assert_eq!(bench.take_actions(), expected);
        assert_eq!(bench.agent.spec(), Some(&spec));
    }
    let mut bench = Bench::running();
    bench.send(AgentEvent::Configure {
        spec: spec.clone(),
        spec_matches: false,
        sound: Err(refusal("open to others")),
    });
    assert_eq!((bench.take_actions(), bench.agent.spec()), (vec![], Some(&Spec::default())));
    // A held change is not tried again by each plan.
    bench.send(AgentEvent::Configure { spec: spec.clone(), spec_matches: false, sound: Ok(()) });
    assert_eq!(bench.take_actions(), []);
    bench.now += S(5);
    bench.send(AgentEvent::Configure { spec, spec_matches: false, sound: Ok(()) });
    assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1")), AgentAction::Stop]);
}

#[test]
fn a_variable_that_the_package_does_not_allow_is_reported_once() {
    let mut bench = Bench::running();
    let (spec, spec_matches) = (Spec { env: Env::from([("LD_PRELOAD".to_owned(), "x".into())]) }, false);
    bench.send(inspected(Ok(manifest(&[]))));
    bench.send(AgentEvent::Configure { spec, spec_matches, sound: Ok(()) });
    for pid in 11..14 {
        bench.send(AgentEvent::Stopped(Ok(())));
        bench.send(AgentEvent::Launched { pid, version: version("1"), spec_matches: true });
        bench.send(AgentEvent::Restart);
    }
    assert_eq!(bench.notes(), [("env", "refused")]);
    assert!(bench.agent.last_error().unwrap().contains("LD_PRELOAD"));
}

#[test]
fn an_unreadable_manifest_is_read_again_at_each_start() {
    let found = Discovery {
        ledger: LedgerEntry::from_disk(Some(release("1")), None),
        releases: [version("1")].into(),
        unfinished: [version("half")].into(),
        program: Some(Err("no agent.toml".into())),
        restarts: 3,
        order: None,
    };
    let (agent, actions) = Agent::restore("a".parse().unwrap(), found);
    assert_eq!(actions, [AgentAction::Discard(version("half"))]);
    let mut bench = Bench { agent, ..Bench::new() };
    bench.send(AgentEvent::Set(Run::Start));
    assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1"))]);
    bench.send(inspected(Err("no agent.toml".into())));
    // The first failure is retried at once.
    assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1"))]);
    bench.send(inspected(Err("no agent.toml".into())));
    assert_eq!((bench.take_actions(), bench.agent.state()), (vec![], AgentState::Failed));
    bench.now = bench.agent.deadline(bench.now).unwrap();
    bench.send(AgentEvent::Tick);
    bench.send(inspected(Ok(Program::Script)));
    assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1")), AgentAction::Start]);
    assert_eq!(bench.agent.last_error().as_deref(), Some("no agent.toml"));
}

#[test]
fn while_an_activation_is_recorded_the_old_release_is_restarted() {
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Ok((release("2"), None))));
    bench.actions.clear();
    bench.send(AgentEvent::Exited { success: Some(false), how: "crashed".into() });
    assert_eq!((bench.take_actions(), bench.agent.current()), (vec![AgentAction::Start], Some(&version("1"))));
    bench.send(AgentEvent::Launched { pid: 11, version: version("1"), spec_matches: true });
    assert_eq!(bench.take_actions(), [], "no commit");
    bench.send(AgentEvent::Recorded(Err("no space left".into())));
    assert_eq!(
        bench.take_actions(),
        [AgentAction::Record { wait: false }],
        "the file may include the failed activation"
    );
    assert_eq!(bench.agent.to_record(), *bench.agent.ledger());
}

#[test]
fn a_removal_waits_for_operations_on_its_files() {
    let mut bench = Bench::new();
    bench.stage("1");
    bench.send(AgentEvent::Stage(Package::new(version("2"))));
    bench.send(AgentEvent::Discard(version("1")));
    bench.actions.clear();
    bench.send(AgentEvent::Uninstall);
    assert_eq!(bench.take_actions(), [AgentAction::CancelStaging]);
    bench.send(AgentEvent::Discarded(version("1")));
    assert_eq!(bench.take_actions(), []);
    bench.answer("2", Ok(ready("2")));
    assert_eq!(bench.take_actions(), [AgentAction::Remove]);
}

#[test]
fn a_release_staged_during_the_removal_of_its_files_is_removed_too() {
    let mut bench = Bench::running();
    bench.send(AgentEvent::Stage(Package::new(version("2"))));
    bench.send(AgentEvent::OrderChanged(Some(order("1")))).send(AgentEvent::Discard(version("2")));
    bench.answer("2", Ok(ready("2")));
    bench.send(AgentEvent::Discarded(version("2")));
    assert!(!bench.agent.actual(None, bench.now).releases.contains(&version("2")));
}

#[test]
fn the_inspection_of_another_release_is_ignored() {
    let mut bench = Bench::running();
    bench.send(AgentEvent::Inspected { version: version("9"), result: Err("no agent.toml".into()) });
    assert!(bench.agent.program().is_some() && bench.agent.last_error().is_none());
}

#[test]
fn an_uninstalled_sub_agent_is_stopped_then_removed() {
    let mut bench = Bench::running();
    bench.send(AgentEvent::Uninstall);
    assert_eq!(bench.take_actions(), [AgentAction::Stop]);
    assert!(bench.agent.actual(None, bench.now).busy);
    bench.send(AgentEvent::Stopped(Err("it hangs in the kernel".into())));
    assert!(bench.notes().contains(&("stop", "failed")));
    assert_eq!(bench.take_actions(), [AgentAction::Remove]);
    let mut bench = Bench::new();
    bench.send(AgentEvent::Uninstall);
    assert_eq!(bench.take_actions(), [AgentAction::Remove]);
}

#[test]
fn nothing_is_started_after_a_stop_of_the_home() {
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Ok((release("2"), None))));
    bench.send(AgentEvent::Recorded(Ok(())));
    bench.send(AgentEvent::HomeStopping);
    bench.send(AgentEvent::Stopped(Ok(())));
    bench.actions.clear();
    bench.send(AgentEvent::Switched(Ok(())));
    assert_eq!(bench.take_actions(), []);
    assert!(bench.agent.supervisor().is_down());
}

#[test]
fn the_release_of_the_process_is_shown_even_if_another_is_active() {
    let found = Discovery {
        ledger: LedgerEntry::from_disk(Some(release("2")), None),
        releases: [version("2")].into(),
        ..Discovery::default()
    };
    let (mut agent, _) = Agent::restore("a".parse().unwrap(), found);
    let now = Instant::now();
    assert_eq!(agent.shown(), Some(&version("2")));
    agent.adopt(7, version("1"), now, None, at(now));
    assert_eq!((agent.shown(), agent.differing_current()), (Some(&version("1")), Some(&version("2"))));
}

#[test]
fn changes_of_health_and_crashes_are_reported() {
    let mut bench = Bench::running();
    let exit = || AgentEvent::Exited { success: Some(false), how: "exited with 1".into() };
    bench.send(exit());
    bench.send(AgentEvent::Launched { pid: 11, version: version("1"), spec_matches: true });
    bench.send(exit());
    assert_eq!(bench.notes(), [("exit", "failed"), ("exit", "failed"), ("backoff", "failed")]);
    bench.actions.clear();
    bench.now += S(60);
    bench.send(AgentEvent::Tick);
    bench.send(AgentEvent::Launched { pid: 12, version: version("1"), spec_matches: true });
    bench.send(exit());
    assert_eq!(bench.notes(), [("exit", "failed")], "later ones differ only in the delay");
}
