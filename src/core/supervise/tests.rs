//! The supervisor, event by event, and in a model where events come in any order.

use proptest::prelude::*;

use super::*;

fn running(policy: RestartPolicy, now: Instant) -> Supervisor {
    let mut supervisor = Supervisor::new(policy, 0);
    assert_eq!(supervisor.step(SupervisorEvent::Run, now, 0.0), Some(SupervisorAction::Start));
    assert_eq!(supervisor.step(SupervisorEvent::Started { pid: 7 }, now, 0.0), None);
    supervisor
}

fn exited() -> SupervisorEvent {
    SupervisorEvent::Exited { success: Some(false), how: "exited with 1".into() }
}

#[test]
fn the_first_restart_is_immediate_and_later_ones_back_off() {
    let now = Instant::now();
    let mut supervisor = running(RestartPolicy::default(), now);
    assert_eq!(supervisor.step(exited(), now, 0.0), Some(SupervisorAction::Start));
    let mut delays = vec![];
    for _ in 0..8 {
        supervisor.step(SupervisorEvent::Started { pid: 8 }, now, 0.0);
        assert_eq!(supervisor.step(exited(), now, 0.0), None);
        let until = supervisor.deadline().unwrap();
        delays.push((until - now).as_secs());
        assert_eq!(supervisor.step(SupervisorEvent::Tick, now, 0.0), None);
        assert_eq!(supervisor.step(SupervisorEvent::Tick, until, 0.0), Some(SupervisorAction::Start));
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(supervisor.restarts(), 9);
}

#[test]
fn a_healthy_period_resets_the_failure_count() {
    let now = Instant::now();
    let mut supervisor = running(RestartPolicy::default(), now);
    supervisor.step(exited(), now, 0.0);
    supervisor.step(SupervisorEvent::Started { pid: 8 }, now, 0.0);
    let later = now + Duration::from_secs(31);
    assert_eq!(supervisor.step(exited(), later, 0.0), Some(SupervisorAction::Start));
}

#[test]
fn a_failed_start_is_retried() {
    let now = Instant::now();
    let mut supervisor = Supervisor::new(RestartPolicy::default(), 0);
    supervisor.step(SupervisorEvent::Run, now, 0.0);
    assert_eq!(
        supervisor.step(SupervisorEvent::StartFailed { why: "x".into() }, now, 0.0),
        Some(SupervisorAction::Start)
    );
    assert_eq!(supervisor.step(SupervisorEvent::StartFailed { why: "x".into() }, now, 0.0), None);
    assert_eq!(supervisor.state(), AgentState::Backoff);
}

#[test]
fn a_stop_in_any_phase_ends_down() {
    let now = Instant::now();
    let mut starting = Supervisor::new(RestartPolicy::default(), 0);
    starting.step(SupervisorEvent::Run, now, 0.0);
    assert_eq!(starting.step(SupervisorEvent::Stop, now, 0.0), None);
    assert_eq!(starting.step(SupervisorEvent::Started { pid: 1 }, now, 0.0), Some(SupervisorAction::Stop));
    assert_eq!(starting.step(SupervisorEvent::Stopped, now, 0.0), None);
    assert_eq!(starting.state(), AgentState::Stopped);

    let mut waiting = running(RestartPolicy::default(), now);
    waiting.step(exited(), now, 0.0);
    waiting.step(SupervisorEvent::StartFailed { why: "x".into() }, now, 0.0);
    assert_eq!(waiting.state(), AgentState::Backoff);
    // Its main process exited; its leftover processes are stopped.
    assert_eq!(waiting.step(SupervisorEvent::Stop, now, 0.0), Some(SupervisorAction::Stop));
    assert_eq!(waiting.step(SupervisorEvent::Stopped, now, 0.0), None);
    assert_eq!(waiting.state(), AgentState::Stopped);
    assert_eq!(waiting.step(SupervisorEvent::Stop, now, 0.0), None);
    assert_eq!(waiting.deadline(), None);
}

#[test]
fn a_requested_restart_is_not_counted() {
    let now = Instant::now();
    let mut supervisor = running(RestartPolicy::default(), now);
    assert_eq!(supervisor.step(SupervisorEvent::Restart, now, 0.0), Some(SupervisorAction::Stop));
    assert_eq!(supervisor.step(SupervisorEvent::Stopped, now, 0.0), Some(SupervisorAction::Start));
    assert_eq!(supervisor.restarts(), 0);
}

#[test]
fn a_requested_start_clears_earlier_failures() {
    let now = Instant::now();
    for request in [SupervisorEvent::Stop, SupervisorEvent::Restart] {
        let mut supervisor = running(RestartPolicy::default(), now);
        supervisor.step(exited(), now, 0.0);
        supervisor.step(SupervisorEvent::Started { pid: 8 }, now, 0.0);
        assert_eq!((supervisor.restarts(), supervisor.last_error()), (1, Some("exited with 1")));
        supervisor.step(request, now, 0.0);
        assert_eq!((supervisor.restarts(), supervisor.last_error()), (0, None));
    }
}

#[test]
fn the_restart_policy_is_honoured() {
    let now = Instant::now();
    let with = |restart| RestartPolicy { restart, ..RestartPolicy::default() };
    let clean = SupervisorEvent::Exited { success: Some(true), how: "exited with 0".into() };
    let unknown = SupervisorEvent::Exited { success: None, how: "ended".into() };
    let mut never = running(with(Restart::Never), now);
    assert_eq!(never.step(exited(), now, 0.0), None);
    assert_eq!(never.state(), AgentState::Stopped);
    let mut on_failure = running(with(Restart::OnFailure), now);
    assert_eq!(on_failure.step(clean, now, 0.0), None);
    let mut adopted = running(with(Restart::OnFailure), now);
    assert_eq!(adopted.step(unknown, now, 0.0), Some(SupervisorAction::Start));
}

fn checked() -> RestartPolicy {
    let checks = HealthPolicy { interval: Duration::from_secs(10), failures: 3, start_period: Duration::from_secs(30) };
    RestartPolicy { checks: Some(checks), ..RestartPolicy::default() }
}

/// Runs the next check with this result. Returns the action that follows.
fn answer(supervisor: &mut Supervisor, now: &mut Instant, answer: CheckResult) -> Option<SupervisorAction> {
    *now = supervisor.deadline().expect("a check is due");
    assert_eq!(supervisor.step(SupervisorEvent::Tick, *now, 0.0), Some(SupervisorAction::Check));
    assert_eq!(supervisor.deadline(), None, "one at a time");
    supervisor.step(SupervisorEvent::Checked(answer), *now, 0.0)
}

fn unhealthy() -> CheckResult {
    CheckResult::Unhealthy("no answer".into())
}

#[test]
fn a_process_unhealthy_for_too_long_is_restarted_and_counts_as_a_failure() {
    let mut now = Instant::now();
    let mut supervisor = running(checked(), now);
    assert_eq!(supervisor.state(), AgentState::Starting);
    assert_eq!(answer(&mut supervisor, &mut now, CheckResult::Healthy), None);
    assert_eq!(supervisor.state(), AgentState::Running);
    assert_eq!(answer(&mut supervisor, &mut now, unhealthy()), None);
    assert_eq!((supervisor.state(), supervisor.pid()), (AgentState::Unhealthy, Some(7)));
    assert_eq!(supervisor.last_error(), Some("its health check fails: no answer"));
    assert_eq!(answer(&mut supervisor, &mut now, unhealthy()), None);
    assert_eq!(answer(&mut supervisor, &mut now, unhealthy()), Some(SupervisorAction::Stop));
    // Until it is down it keeps its state.
    assert_eq!((supervisor.state(), supervisor.pid()), (AgentState::Unhealthy, Some(7)));
    assert_eq!(
        supervisor.step(SupervisorEvent::Stopped, now, 0.0),
        Some(SupervisorAction::Start),
        "the first restart is immediate"
    );
    assert_eq!((supervisor.restarts(), supervisor.state()), (1, AgentState::Starting));
    assert_eq!(supervisor.last_error(), Some("restarted: its health check fails: no answer"));

    let mut delays = vec![];
    for _ in 0..8 {
        supervisor.step(SupervisorEvent::Started { pid: 8 }, now, 0.0);
        while answer(&mut supervisor, &mut now, unhealthy()).is_none() {}
        assert_eq!(supervisor.step(SupervisorEvent::Stopped, now, 0.0), None);
        assert_eq!(supervisor.state(), AgentState::Backoff);
        let until = supervisor.starts_at().unwrap();
        delays.push((until - now).as_secs());
        now = until;
        assert_eq!(supervisor.step(SupervisorEvent::Tick, now, 0.0), Some(SupervisorAction::Start));
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60], "running without being healthy does not reset the count");

    supervisor.step(SupervisorEvent::Started { pid: 9 }, now, 0.0);
    for _ in 0..4 {
        answer(&mut supervisor, &mut now, CheckResult::Healthy);
    }
    while answer(&mut supervisor, &mut now, unhealthy()).is_none() {}
    assert_eq!(
        supervisor.step(SupervisorEvent::Stopped, now, 0.0),
        Some(SupervisorAction::Start),
        "a healthy period resets the count"
    );
}

#[test]
fn a_successful_check_clears_the_failures() {
    let mut now = Instant::now();
    let mut supervisor = running(checked(), now);
    answer(&mut supervisor, &mut now, CheckResult::Healthy);
    for _ in 0..9 {
        answer(&mut supervisor, &mut now, unhealthy());
        answer(&mut supervisor, &mut now, unhealthy());
        assert_eq!(supervisor.state(), AgentState::Unhealthy);
        assert_eq!(answer(&mut supervisor, &mut now, CheckResult::Healthy), None);
        assert_eq!((supervisor.state(), supervisor.last_error()), (AgentState::Running, None));
    }
    assert_eq!(supervisor.restarts(), 0);
}

#[test]
fn with_policy_never_an_unhealthy_process_keeps_running() {
    let mut now = Instant::now();
    let mut supervisor = running(RestartPolicy { restart: Restart::Never, ..checked() }, now);
    for _ in 0..20 {
        assert_eq!(answer(&mut supervisor, &mut now, unhealthy()), None);
    }
    assert_eq!((supervisor.state(), supervisor.pid()), (AgentState::Unhealthy, Some(7)));
    let mut on_failure = running(RestartPolicy { restart: Restart::OnFailure, ..checked() }, now);
    while answer(&mut on_failure, &mut now, unhealthy()).is_none() {}
    assert_eq!(on_failure.step(SupervisorEvent::Stopped, now, 0.0), Some(SupervisorAction::Start));
}

#[test]
fn a_request_during_the_stop_of_an_unhealthy_process_takes_precedence() {
    for (request, action) in [(SupervisorEvent::Stop, None), (SupervisorEvent::Restart, Some(SupervisorAction::Start))]
    {
        let mut now = Instant::now();
        let mut supervisor = running(checked(), now);
        while answer(&mut supervisor, &mut now, unhealthy()).is_none() {}
        assert_eq!(supervisor.step(request, now, 0.0), None);
        assert_eq!(supervisor.step(SupervisorEvent::Stopped, now, 0.0), action);
        assert_eq!((supervisor.restarts(), supervisor.failures()), (0, 0));
    }
}

#[test]
fn an_adopted_process_is_checked_and_its_start_period_counts_from_its_start() {
    let now = Instant::now();
    let age = Duration::from_secs(20);
    let mut supervisor = Supervisor::new(checked(), 3);
    supervisor.adopt(7, now - age, now, 1.0);
    supervisor.step(SupervisorEvent::Run, now, 0.0);
    assert_eq!((supervisor.state(), supervisor.deadline()), (AgentState::Starting, Some(now + Duration::from_secs(5))));
    supervisor.adopt(7, now - 2 * age, now, 1.0);
    assert_eq!((supervisor.state(), supervisor.deadline()), (AgentState::Running, Some(now + Duration::from_secs(5))));
}

#[test]
fn a_process_is_not_reported_stopped_before_it_has_exited() {
    let now = Instant::now();
    let mut supervisor = running(RestartPolicy::default(), now);
    assert_eq!(supervisor.step(SupervisorEvent::Stop, now, 0.0), Some(SupervisorAction::Stop));
    assert_eq!((supervisor.state(), supervisor.pid(), supervisor.is_up()), (AgentState::Running, Some(7), false));
    supervisor.step(SupervisorEvent::Stopped, now, 0.0);
    assert_eq!((supervisor.state(), supervisor.pid()), (AgentState::Stopped, None));
}

fn any_answer() -> impl Strategy<Value = CheckResult> {
    prop_oneof![
        3 => Just(unhealthy()),
        2 => Just(CheckResult::Healthy),
        1 => Just(CheckResult::Gone(String::new())),
        1 => Just(CheckResult::Unknown(String::new())),
    ]
}

fn any_policy() -> impl Strategy<Value = RestartPolicy> {
    let restart = prop_oneof![Just(Restart::Always), Just(Restart::OnFailure), Just(Restart::Never)];
    let seconds = |range| proptest::strategy::Strategy::prop_map(range, Duration::from_secs);
    let checks = (seconds(1..60_u64), 1..5_u32, seconds(0..90_u64));
    let checks =
        checks.prop_map(|(interval, failures, start_period)| HealthPolicy { interval, failures, start_period });
    (restart, proptest::option::of(checks)).prop_map(|(restart, checks)| RestartPolicy {
        restart,
        checks,
        ..RestartPolicy::default()
    })
}

fn any_event() -> impl Strategy<Value = SupervisorEvent> {
    prop_oneof![
        Just(SupervisorEvent::Run),
        Just(SupervisorEvent::Stop),
        Just(SupervisorEvent::Restart),
        Just(SupervisorEvent::Started { pid: 1 }),
        Just(SupervisorEvent::StartFailed { why: String::new() }),
        any::<Option<bool>>().prop_map(|success| SupervisorEvent::Exited { success, how: String::new() }),
        any_answer().prop_map(SupervisorEvent::Checked),
        Just(SupervisorEvent::Stopped),
        Just(SupervisorEvent::Tick),
    ]
}

/// The events of a model in which every requested action completes and is reported sooner or later.
#[derive(Debug, Clone)]
enum ModelEvent {
    /// The next deadline passes.
    Later,
    /// Seconds pass.
    Pass(u64),
    /// The start or stop under way completes; a start, with or without success.
    Done(bool),
    /// The check under way completes.
    Answered(CheckResult),
    /// The process exits.
    Ends(Option<bool>),
    Asked(SupervisorEvent),
}

fn any_model_event() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        4 => Just(ModelEvent::Later),
        1 => (0..40_u64).prop_map(ModelEvent::Pass),
        4 => any::<bool>().prop_map(ModelEvent::Done),
        3 => any_answer().prop_map(ModelEvent::Answered),
        1 => any::<Option<bool>>().prop_map(ModelEvent::Ends),
        1 => prop_oneof![Just(SupervisorEvent::Run), Just(SupervisorEvent::Stop), Just(SupervisorEvent::Restart)].prop_map(ModelEvent::Asked),
    ]
}

/// The model of one sub-agent.
struct Model {
    supervisor: Supervisor,
    now: Instant,
    /// Its process runs.
    alive: bool,
    starting: bool,
    stopping: bool,
    checking: bool,
    starts: Vec<Instant>,
}

impl Model {
    fn new(policy: RestartPolicy) -> Model {
        let supervisor = Supervisor::new(policy, 0);
        let now = Instant::now();
        Model { supervisor, now, alive: false, starting: false, stopping: false, checking: false, starts: vec![] }
    }

    fn send(&mut self, event: SupervisorEvent) {
        let wanted = match event {
            SupervisorEvent::Run => true,
            SupervisorEvent::Stop => false,
            _ => self.supervisor.wanted(),
        };
        match self.supervisor.step(event, self.now, 0.5) {
            Some(SupervisorAction::Start) => {
                assert!(wanted, "started although it should be stopped");
                assert!(!self.alive && !self.starting && !self.stopping, "started while a process or an action exists");
                self.starting = true;
                self.starts.push(self.now);
            }
            Some(SupervisorAction::Stop) => {
                assert!(!self.starting && !self.stopping, "stopped while an action is under way");
                self.stopping = true;
            }
            Some(SupervisorAction::Check) => {
                assert!(
                    self.alive && !self.checking && !self.stopping,
                    "two checks at a time, or a check without a process"
                );
                self.checking = true;
            }
            None => {}
        }
        self.check_rules();
    }

    /// The rules that hold at any time.
    fn check_rules(&self) {
        let Supervisor { wanted, policy, .. } = self.supervisor;
        let is_alive_or_due = self.alive || self.starting || self.stopping || self.supervisor.deadline().is_some();
        let done = policy.restart != Restart::Always && self.supervisor.state() == AgentState::Stopped;
        assert!(!wanted || is_alive_or_due || done, "given up: {:?}", self.supervisor);
        assert_eq!(self.supervisor.pid().is_some(), self.alive, "{:?}", self.supervisor);
        assert_eq!(self.supervisor.is_down(), !self.alive && !self.starting && !self.stopping);
        if self.supervisor.is_up() && policy.checks.is_some() {
            assert!(self.checking || self.supervisor.deadline().is_some(), "no check is due");
        }
    }

    fn apply(&mut self, event: ModelEvent) {
        match event {
            ModelEvent::Later => {
                let Some(deadline) = self.supervisor.deadline() else { return };
                self.now = self.now.max(deadline);
                self.send(SupervisorEvent::Tick);
            }
            ModelEvent::Pass(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.send(SupervisorEvent::Tick);
            }
            ModelEvent::Done(well) if self.starting => {
                self.starting = false;
                self.alive = well;
                self.send(if well {
                    SupervisorEvent::Started { pid: 1 }
                } else {
                    SupervisorEvent::StartFailed { why: String::new() }
                });
            }
            ModelEvent::Done(_) if self.stopping => {
                // A check of the stopped process has no result any more.
                (self.stopping, self.alive, self.checking) = (false, false, false);
                self.send(SupervisorEvent::Stopped);
            }
            ModelEvent::Answered(answer) if self.checking => {
                self.checking = false;
                self.send(SupervisorEvent::Checked(answer));
            }
            // The exit of a process that is being stopped is part of the stop.
            ModelEvent::Ends(success) if self.alive && !self.stopping => {
                (self.alive, self.checking) = (false, false);
                self.send(SupervisorEvent::Exited { success, how: String::new() });
            }
            ModelEvent::Asked(event) => self.send(event),
            ModelEvent::Done(_) | ModelEvent::Answered(_) | ModelEvent::Ends(_) => {}
        }
    }
}

proptest! {
    /// After any events, with truthful results from then on: a sub-agent that should run starts, any other stops.
    #[test]
    fn the_desired_state_is_always_reached(
        policy in any_policy(),
        events in proptest::collection::vec(any_event(), 0..40),
        wanted: bool,
    ) {
        let mut now = Instant::now();
        let mut supervisor = Supervisor::new(policy, 0);
        for event in events {
            supervisor.step(event, now, 0.5);
        }
        let mut next = supervisor.step(if wanted { SupervisorEvent::Run } else { SupervisorEvent::Stop }, now, 0.5);
        for _ in 0..5 {
            let event = match (next.take(), &supervisor.phase) {
                (Some(SupervisorAction::Start), _) | (None, SupervisorPhase::Starting) => SupervisorEvent::Started { pid: 2 },
                (Some(SupervisorAction::Stop), _) | (None, SupervisorPhase::Stopping { .. }) => SupervisorEvent::Stopped,
                (None, SupervisorPhase::Waiting { until }) => { now = *until; SupervisorEvent::Tick }
                (Some(SupervisorAction::Check), _) | (None, _) => break,
            };
            next = supervisor.step(event, now, 0.5);
        }
        prop_assert_eq!(supervisor.pid().is_some(), wanted);
    }

    /// Never two processes, never an unwanted one, never given up, and exactly one check at a time.
    #[test]
    fn there_are_never_two_processes_and_a_wanted_one_is_never_given_up(
        policy in any_policy(),
        events in proptest::collection::vec(any_model_event(), 0..200),
    ) {
        let mut model = Model::new(policy);
        for event in events {
            model.apply(event);
        }
    }

    /// However fast and in whatever way it fails, the number of restarts in any window of time is bounded.
    #[test]
    fn restarts_are_bounded_in_any_window(
        policy in any_policy(),
        events in proptest::collection::vec(any_model_event(), 0..400),
        at_once: bool,
    ) {
        let mut model = Model::new(policy);
        model.send(SupervisorEvent::Run);
        for event in events {
            match event {
                ModelEvent::Asked(_) => {}
                // As fast as possible: each start fails at once.
                _ if at_once && model.starting => model.apply(ModelEvent::Done(false)),
                event => model.apply(event),
            }
        }
        // At once, again at once, and after 7/8 of 1, 2, 4, 8 and 16 seconds.
        for (n, start) in model.starts.iter().enumerate() {
            let within = model.starts[n..].iter().take_while(|other| **other - *start < policy.healthy).count();
            prop_assert!(within <= 7, "{within} starts within {:?}", policy.healthy);
        }
    }

    /// The same events at the same times have the same results.
    #[test]
    fn the_same_events_have_the_same_results(policy in any_policy(), events in proptest::collection::vec((any_event(), 0..50_u64), 0..60)) {
        let start = Instant::now();
        let run = || {
            let (mut now, mut supervisor, mut actions) = (start, Supervisor::new(policy, 0), vec![]);
            for (event, seconds) in &events {
                now += Duration::from_secs(*seconds);
                actions.push((supervisor.step(event.clone(), now, 0.3), supervisor.state(), supervisor.deadline()));
            }
            actions
        };
        prop_assert_eq!(run(), run());
    }
}
