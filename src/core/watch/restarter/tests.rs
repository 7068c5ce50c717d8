//! The decisions, answer by answer, and in a model where events come in any order.

use proptest::prelude::*;

use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;
const POLICIES: [RestarterPolicy; 2] = [RestarterPolicy::WATCHDOG, RestarterPolicy::MANAGER];
const FREE: RoleObservation = RoleObservation { taken: false, stop_recorded: false };
const TAKEN: RoleObservation = RoleObservation { taken: true, stop_recorded: false };
const STOPPED: RoleObservation = RoleObservation { taken: false, stop_recorded: true };

/// A restarter whose role was just lost for the first time, after a healthy period.
fn lost(policy: RestarterPolicy, supervised: bool, now: Instant) -> Restarter {
    let since = now - S(3600);
    let mut restarter = Restarter::new(policy, supervised, true, since);
    restarter.connected(since);
    restarter.received(since);
    assert_eq!(restarter.lost(now), Some(Loss::Died));
    restarter
}

/// Checks whenever a check is due, with this observation, until an action comes. Returns the action and advances `now` to it.
fn next(restarter: &mut Restarter, observation: RoleObservation, now: &mut Instant) -> RestarterAction {
    for _ in 0..100_000 {
        *now = (*now).max(restarter.deadline());
        if let Some(action) = restarter.poll(observation, *now) {
            return action;
        }
    }
    panic!("no action: {restarter:?}");
}

#[test]
fn without_a_service_manager_the_role_is_started_with_back_off() {
    for (policy, min_delay) in [(RestarterPolicy::WATCHDOG, 0), (RestarterPolicy::MANAGER, 500)] {
        let start = Instant::now();
        let (mut restarter, mut now) = (lost(policy, false, start), start);
        assert_eq!(next(&mut restarter, FREE, &mut now), RestarterAction::Start { failures: 1 });
        assert_eq!((now - start).as_millis(), min_delay);
        let mut pauses = vec![];
        for failures in 2..12 {
            let before = now;
            assert_eq!(next(&mut restarter, FREE, &mut now), RestarterAction::Start { failures });
            pauses.push((now - before).as_secs());
        }
        assert_eq!(pauses, [2, 2, 4, 8, 16, 32, 60, 60, 60, 60]);
    }
}

#[test]
fn a_start_that_responds_is_no_failure_but_an_early_death_is() {
    let start = Instant::now();
    let (mut restarter, mut now) = (lost(RestarterPolicy::WATCHDOG, false, start), start);
    for (failures, pause) in [(1, 0), (2, 1), (3, 2), (4, 4)] {
        let before = now;
        assert_eq!(next(&mut restarter, FREE, &mut now), RestarterAction::Start { failures });
        assert_eq!((now - before).as_secs(), pause);
        restarter.connected(now);
        restarter.received(now);
        assert_eq!(restarter.lost(now), Some(Loss::Died));
    }
}

#[test]
fn a_process_that_already_holds_the_role_has_time_to_connect() {
    let start = Instant::now();
    for (policy, seconds) in [(RestarterPolicy::WATCHDOG, 0), (RestarterPolicy::MANAGER, 2)] {
        let (mut restarter, mut now) = (Restarter::new(policy, false, true, start), start);
        assert_eq!(next(&mut restarter, FREE, &mut now), RestarterAction::Start { failures: 0 });
        assert_eq!(now - start, S(seconds));
    }
}

#[test]
fn the_watchdog_queries_the_unit_early_and_the_manager_after_the_timeout() {
    let asked = |policy, observation, times| -> Vec<u64> {
        let start = Instant::now();
        let (mut restarter, mut now) = (lost(policy, true, start), start);
        let at = |_| {
            assert_eq!(next(&mut restarter, observation, &mut now), RestarterAction::QueryUnit);
            assert_eq!(restarter.unit_answered(Some(UnitCondition::Active), observation, now), None);
            (now - start).as_secs()
        };
        (0..times).map(at).collect()
    };
    assert_eq!(asked(RestarterPolicy::MANAGER, FREE, 4), [10, 20, 30, 40]);
    assert_eq!(asked(RestarterPolicy::WATCHDOG, TAKEN, 7), [1, 2, 3, 4, 5, 6, 7]);
    let of_watchdog = asked(RestarterPolicy::WATCHDOG, FREE, 30);
    assert_eq!(of_watchdog[..7], [1, 2, 3, 4, 5, 6, 7]);
    assert!(of_watchdog.windows(2).all(|pair| (1..=11).contains(&(pair[1] - pair[0]))), "{of_watchdog:?}");
    assert!((10..=11).contains(&(of_watchdog[29] - of_watchdog[28])), "{of_watchdog:?}");
}

#[test]
fn each_state_of_the_unit_has_its_action_after_the_timeout() {
    use UnitCondition::*;
    let follows = |policy, standing, observation, seconds| {
        let start = Instant::now();
        lost(policy, true, start).unit_answered(Some(standing), observation, start + S(seconds))
    };
    for policy in POLICIES {
        let follows = |standing, observation, seconds| follows(policy, standing, observation, seconds);
        assert_eq!(follows(Dead, FREE, 10), Some(RestarterAction::StartUnit));
        assert_eq!(follows(Missing, FREE, 10), Some(RestarterAction::Start { failures: 1 }));
        for standing in [Dead, Missing] {
            assert_eq!(follows(standing, FREE, 9), None, "the timeout is not over");
            assert_eq!(follows(standing, TAKEN, 100), None, "a process holds the role");
        }
        for standing in [Active, Forbidden] {
            assert_eq!(follows(standing, FREE, 10_000), None);
        }
        let stop = if policy.follows_stop { RestarterAction::FollowStop } else { RestarterAction::LeaveStopped };
        for (observation, seconds) in [(FREE, 0), (TAKEN, 0), (FREE, 100)] {
            assert_eq!(follows(Stopped, observation, seconds), Some(stop));
        }
    }
    for standing in [Dead, Missing] {
        assert_eq!(follows(RestarterPolicy::WATCHDOG, standing, STOPPED, 100), None);
        assert!(follows(RestarterPolicy::MANAGER, standing, STOPPED, 100).is_some(), "a stop reaches it as a request");
    }
}

#[test]
fn a_dead_unit_is_started_once_then_the_role_without_the_unit() {
    for policy in POLICIES {
        let start = Instant::now();
        let mut restarter = lost(policy, true, start);
        let mut dead = |at| restarter.unit_answered(Some(UnitCondition::Dead), FREE, start + S(at));
        assert_eq!([dead(10), dead(19)], [Some(RestarterAction::StartUnit), None]);
        assert_eq!(dead(20), Some(RestarterAction::Start { failures: 1 }));
        assert_eq!([dead(21), dead(22)], [None, Some(RestarterAction::Start { failures: 2 })]);
        assert_eq!(restarter.unit_answered(Some(UnitCondition::Forbidden), FREE, start + S(600)), None);

        // If the start of the unit is waited for, the timeout counts from its end; and the next absence starts from scratch.
        let mut restarter = lost(policy, true, start);
        assert_eq!(
            restarter.unit_answered(Some(UnitCondition::Dead), FREE, start + S(10)),
            Some(RestarterAction::StartUnit)
        );
        restarter.unit_start_ended(start + S(90));
        assert_eq!(restarter.unit_answered(Some(UnitCondition::Dead), FREE, start + S(99)), None);
        restarter.connected(start + S(99));
        restarter.received(start + S(99));
        restarter.lost(start + S(100));
        assert_eq!(restarter.unit_answered(Some(UnitCondition::Dead), FREE, start + S(100)), None);
        assert_eq!(
            restarter.unit_answered(Some(UnitCondition::Dead), FREE, start + S(110)),
            Some(RestarterAction::StartUnit)
        );
    }
}

#[test]
fn a_service_manager_that_does_not_answer_counts_as_absent_after_six_queries() {
    for policy in POLICIES {
        let start = Instant::now();
        let mut restarter = lost(policy, true, start);
        let ask = |restarter: &mut Restarter, answer| restarter.unit_answered(answer, FREE, start + S(3600));
        for _ in 0..3 {
            for _ in 0..5 {
                assert_eq!(ask(&mut restarter, None), None);
            }
            assert_eq!(ask(&mut restarter, Some(UnitCondition::Active)), None);
        }
        for _ in 0..5 {
            assert_eq!(ask(&mut restarter, None), None);
        }
        assert_eq!(ask(&mut restarter, None), Some(RestarterAction::Start { failures: 1 }));
    }
}

#[test]
fn a_recorded_stop_is_followed_by_the_watchdog_once_the_role_is_free() {
    let start = Instant::now();
    for supervised in [false, true] {
        let mut watchdog = lost(RestarterPolicy::WATCHDOG, supervised, start);
        let ending = RoleObservation { taken: true, stop_recorded: true };
        for at in 0..200 {
            let action = watchdog.poll(ending, start + S(at));
            assert!(
                matches!(action, None | Some(RestarterAction::QueryUnit)),
                "a stopping process is not killed: {action:?}"
            );
        }
        assert_eq!(watchdog.poll(STOPPED, start + S(200)), Some(RestarterAction::FollowStop));
    }
    let mut manager = lost(RestarterPolicy::MANAGER, false, start);
    assert_eq!(manager.poll(STOPPED, start + S(1)), Some(RestarterAction::Start { failures: 1 }));
}

#[test]
fn an_unreachable_holder_is_killed_if_the_checks_had_no_gap() {
    for policy in POLICIES {
        let start = Instant::now();
        let (mut restarter, mut now) = (lost(policy, false, start), start);
        assert_eq!(next(&mut restarter, TAKEN, &mut now), RestarterAction::KillHung);
        assert!((60..64).contains(&(now - start).as_secs()), "{:?}", now - start);
        let before = now;
        assert_eq!(next(&mut restarter, TAKEN, &mut now), RestarterAction::KillHung);
        assert!((60..68).contains(&(now - before).as_secs()), "{:?}", now - before);
        // Without timely checks, the observation does not count as continuous.
        for minutes in 1..10 {
            assert_eq!(restarter.poll(TAKEN, now + S(60 * minutes)), None);
        }
    }
}

#[test]
fn a_silent_connected_role_is_killed_and_a_message_resets_the_timeout() {
    let start = Instant::now();
    let mut restarter = Restarter::new(RestarterPolicy::MANAGER, false, true, start);
    restarter.connected(start);
    assert!(restarter.received(start) && !restarter.received(start + S(30)));
    assert_eq!(restarter.deadline(), start + S(90));
    let mut poll = |at| restarter.poll(FREE, start + S(at));
    assert_eq!([poll(60), poll(89), poll(90), poll(91)], [None, None, Some(RestarterAction::KillHung), None]);
    assert_eq!([poll(149), poll(150)], [None, Some(RestarterAction::KillHung)]);
}

#[test]
fn the_loss_of_a_connection_counts_by_its_kind() {
    let start = Instant::now();
    let next_start = |restarter: &Restarter| {
        restarter.may_start_at(match &restarter.state {
            RestarterState::Absent(absence) => absence,
            RestarterState::Present { .. } => panic!("connected"),
        })
    };
    let mut restarter = Restarter::new(RestarterPolicy::WATCHDOG, false, false, start);
    assert_eq!(restarter.lost(start), None);
    for pause in [0, 1, 2, 4] {
        restarter.connected(start);
        restarter.received(start);
        assert_eq!(restarter.lost(start + S(1)), Some(Loss::Died));
        assert_eq!(next_start(&restarter), start + S(1 + pause));
    }
    restarter.connected(start + S(1));
    assert_eq!(restarter.lost(start + S(1)), Some(Loss::NeverAnswered));
    assert_eq!(next_start(&restarter), start + S(5), "it never answered, so the count stays");
    restarter.connected(start + S(1));
    restarter.will_yield();
    assert_eq!(restarter.lost(start + S(2)), Some(Loss::Yielded));
    assert_eq!(next_start(&restarter), start + S(2));
}

/// An event of the model.
#[derive(Debug, Clone)]
enum ModelEvent {
    /// The next check is due.
    Poll,
    /// Milliseconds pass, and a check follows.
    Pass(u64),
    /// The service manager answers a query after some seconds.
    Answers(u64),
    /// A process takes the role.
    Taken,
    /// The holder connects; with `true` it also sends something.
    Connects(bool),
    Received,
    /// The holder exits; with `true` it yielded before.
    Ends(bool),
    StopRecorded(bool),
    Unit(Option<UnitCondition>),
}

fn any_standing() -> impl Strategy<Value = Option<UnitCondition>> {
    use UnitCondition::*;
    prop_oneof![
        3 => Just(Some(Dead)),
        2 => Just(Some(Missing)),
        1 => Just(Some(Active)),
        1 => Just(Some(Stopped)),
        1 => Just(Some(Forbidden)),
        2 => Just(None),
    ]
}

fn any_event() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        12 => Just(ModelEvent::Poll),
        2 => (0..40_000_u64).prop_map(ModelEvent::Pass),
        6 => (0..4_u64).prop_map(ModelEvent::Answers),
        1 => Just(ModelEvent::Taken),
        1 => any::<bool>().prop_map(ModelEvent::Connects),
        1 => Just(ModelEvent::Received),
        1 => any::<bool>().prop_map(ModelEvent::Ends),
        1 => prop::bool::weighted(0.2).prop_map(ModelEvent::StopRecorded),
        1 => any_standing().prop_map(ModelEvent::Unit),
    ]
}

/// The model of one role that is watched.
struct Model {
    restarter: Restarter,
    now: Instant,
    taken: bool,
    /// When it connected or was last received from.
    connected: Option<Instant>,
    stop_recorded: bool,
    unit: Option<UnitCondition>,
    /// Unanswered queries in a row.
    unanswered: u32,
    /// A query is under way.
    asked: bool,
    absent_since: Instant,
    /// Since when every check in this absence found the role held.
    unreachable_since: Option<Instant>,
    /// When the unit was started in this absence.
    unit_started: Option<Instant>,
    started: Option<Instant>,
}

impl Model {
    fn new(policy: RestarterPolicy, supervised: bool) -> Model {
        let now = Instant::now();
        Model {
            restarter: Restarter::new(policy, supervised, false, now),
            now,
            taken: false,
            connected: None,
            stop_recorded: false,
            unit: Some(UnitCondition::Dead),
            unanswered: 0,
            asked: false,
            absent_since: now,
            unreachable_since: None,
            unit_started: None,
            started: None,
        }
    }

    fn observation(&self) -> RoleObservation {
        RoleObservation { taken: self.taken, stop_recorded: self.stop_recorded }
    }

    fn poll(&mut self) -> Option<RestarterAction> {
        let is_unreachable = self.taken && self.connected.is_none();
        self.unreachable_since = is_unreachable.then(|| self.unreachable_since.unwrap_or(self.now));
        let action = self.restarter.poll(self.observation(), self.now);
        assert!(self.restarter.deadline() > self.now, "checks without a pause: {:?}", self.restarter);
        self.check(action);
        action
    }

    fn answer(&mut self) -> Option<RestarterAction> {
        self.asked = false;
        self.unanswered = if self.unit.is_none() { self.unanswered + 1 } else { 0 };
        let action = self.restarter.unit_answered(self.unit, self.observation(), self.now);
        assert_ne!(action, Some(RestarterAction::QueryUnit));
        self.check(action);
        action
    }

    /// The actions that are allowed now.
    fn check(&mut self, action: Option<RestarterAction>) {
        let Restarter { policy, supervised, .. } = self.restarter;
        let is_stopped = policy.follows_stop && self.stop_recorded;
        let timeout_began = self.unit_started.unwrap_or(self.absent_since);
        let timeout_is_over = self.now >= timeout_began + SERVICE_MANAGER_TIMEOUT;
        match action {
            None => {}
            Some(RestarterAction::QueryUnit) => {
                assert!(supervised && self.connected.is_none());
                assert!(policy.follows_stop || (!self.taken && timeout_is_over), "queried without need");
                self.asked = true;
            }
            Some(RestarterAction::StartUnit) => {
                assert!(supervised && self.connected.is_none() && !self.taken && !is_stopped);
                assert_eq!(self.unit, Some(UnitCondition::Dead));
                assert!(self.unit_started.is_none(), "the unit is started twice");
                assert!(timeout_is_over, "before the service manager's timeout");
                self.unit_started = Some(self.now);
            }
            Some(RestarterAction::Start { .. }) => {
                assert!(self.connected.is_none() && !self.taken, "started while a process holds the role");
                assert!(!is_stopped, "started although the home is stopped");
                if supervised {
                    assert!(timeout_is_over, "before the service manager's timeout");
                    match self.unit {
                        Some(UnitCondition::Dead) => assert!(self.unit_started.is_some(), "started before its unit"),
                        Some(UnitCondition::Missing) => {}
                        None => assert!(self.unanswered >= MAX_UNANSWERED, "started without an answer"),
                        other => panic!("started while its unit is {other:?}"),
                    }
                }
                let pause = self.started.map(|before| self.now - before);
                assert!(pause.is_none_or(|pause| pause >= S(2)), "restarted after {pause:?}");
                self.started = Some(self.now);
            }
            Some(RestarterAction::KillHung) => {
                let since = self.connected.or(self.unreachable_since).expect("a silent process");
                assert!(self.taken && self.now >= since + HANG_TIMEOUT, "killed after {:?}", self.now - since);
                assert!(!is_stopped || self.connected.is_some(), "killed while it stops");
            }
            Some(RestarterAction::FollowStop) => {
                assert!(policy.follows_stop);
                assert!((is_stopped && !self.taken) || self.unit == Some(UnitCondition::Stopped));
            }
            Some(RestarterAction::LeaveStopped) => {
                assert!(!policy.follows_stop && self.unit == Some(UnitCondition::Stopped))
            }
        }
    }

    fn apply(&mut self, event: ModelEvent) {
        match event {
            ModelEvent::Poll => {
                self.now = self.now.max(self.restarter.deadline());
                self.poll();
            }
            ModelEvent::Pass(milliseconds) => {
                self.now += Duration::from_millis(milliseconds);
                self.poll();
            }
            ModelEvent::Answers(seconds) if self.asked => {
                self.now += S(seconds);
                self.answer();
            }
            ModelEvent::Taken => self.taken = true,
            ModelEvent::Connects(received) if self.taken && self.connected.is_none() => {
                self.connected = Some(self.now);
                self.restarter.connected(self.now);
                if received {
                    self.apply(ModelEvent::Received);
                }
            }
            ModelEvent::Received if self.connected.is_some() => {
                self.connected = Some(self.now);
                self.restarter.received(self.now);
                self.started = None;
            }
            ModelEvent::Ends(yields) if self.taken => {
                self.taken = false;
                if self.connected.take().is_some() {
                    if yields {
                        self.restarter.will_yield();
                        self.started = None;
                    }
                    assert!(self.restarter.lost(self.now).is_some());
                    (self.absent_since, self.unit_started, self.unreachable_since) = (self.now, None, None);
                }
            }
            ModelEvent::StopRecorded(recorded) => self.stop_recorded = recorded,
            ModelEvent::Unit(unit) => self.unit = unit,
            ModelEvent::Answers(_) | ModelEvent::Connects(_) | ModelEvent::Received | ModelEvent::Ends(_) => {}
        }
    }
}

proptest! {
    /// In any sequence of events: no action breaks [`Model::check`], and there is a pause between any two checks.
    #[test]
    fn no_action_breaks_a_rule(
        policy in 0..2_usize,
        supervised: bool,
        events in proptest::collection::vec(any_event(), 0..300),
    ) {
        let mut model = Model::new(POLICIES[policy], supervised);
        for event in events {
            model.apply(event);
        }
    }

    /// After any events: a role that no process holds, that was not stopped and that no service manager restarts is started in time.
    #[test]
    fn a_missing_role_is_always_restarted(
        policy in 0..2_usize,
        supervised: bool,
        events in proptest::collection::vec(any_event(), 0..100),
        unit in prop_oneof![Just(Some(UnitCondition::Dead)), Just(Some(UnitCondition::Missing)), Just(None)],
    ) {
        let mut model = Model::new(POLICIES[policy], supervised);
        for event in events {
            model.apply(event);
        }
        model.apply(ModelEvent::Ends(false));
        (model.stop_recorded, model.unit) = (false, unit);
        let began = model.now;
        // The longest delay between two starts, the timeouts of the service manager, and six queries.
        let longest = S(60) + 3 * SERVICE_MANAGER_TIMEOUT + S(60);
        let is_started = loop {
            model.now = model.now.max(model.restarter.deadline());
            let action = match model.poll() {
                Some(RestarterAction::QueryUnit) => model.answer(),
                action => action,
            };
            if matches!(action, Some(RestarterAction::Start { .. })) {
                break true;
            }
            if model.now - began > longest {
                break false;
            }
        };
        prop_assert!(is_started, "{:?}", model.restarter);
    }
}
