//! The health of one process: when the next check is due, and whether the results so far require a restart.
//!
//! Checks do not overlap; the interval counts from the end of a check. In the start period failures do not count, and the first success ends
//! it. Without a success, a check at its end decides. Without checks, a process is healthy while it runs.

use std::time::{Duration, Instant};

use crate::core::protocol::AgentState;

/// The first check after a start, or after a restart of the manager, comes at a random time within this, to spread the load.
const FIRST_CHECK: Duration = Duration::from_secs(5);

/// The parameters of the health checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthPolicy {
    /// From the end of a check to the start of the next.
    pub interval: Duration,
    /// Failures in a row until a restart.
    pub failures: u32,
    pub start_period: Duration,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckResult {
    Healthy,
    Unhealthy(String),
    /// The check reports that the sub-agent does not run.
    Gone(String),
    /// The check could not run, so the health is unknown.
    Unknown(String),
}

/// What the results so far require.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HealthVerdict {
    Continue,
    /// The process is to be restarted.
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CheckSchedule {
    At(Instant),
    UnderWay { began: Instant },
}

/// The health of one process.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ProcessHealth {
    checks: Option<(HealthPolicy, CheckSchedule)>,
    /// The end of the start period, while it lasts.
    starting_until: Option<Instant>,
    /// Failures in a row, outside the start period.
    failures: u32,
    /// The problem that the last check found.
    problem: Option<String>,
    /// Since when it has been healthy.
    healthy_since: Option<Instant>,
}

impl ProcessHealth {
    /// Of a process that started at `since`. `jitter` is from 0 to 1.
    pub(super) fn new(checks: Option<HealthPolicy>, since: Instant, now: Instant, jitter: f64) -> ProcessHealth {
        let jitter = jitter.clamp(0.0, 1.0);
        let starting_until = checks.map(|checks| since + checks.start_period).filter(|end| *end > now);
        let first = |checks: HealthPolicy| {
            let age = now.saturating_duration_since(since);
            match starting_until {
                Some(end) => now + checks.interval.min(FIRST_CHECK).min(end - now).mul_f64(jitter),
                None if age >= checks.interval => now + checks.interval.min(FIRST_CHECK).mul_f64(jitter),
                // Its failures count from the start, so it first gets some time.
                None => now + checks.interval.mul_f64(0.5 + 0.5 * jitter),
            }
        };
        ProcessHealth {
            checks: checks.map(|checks| (checks, CheckSchedule::At(first(checks)))),
            starting_until,
            failures: 0,
            problem: None,
            // With checks, a running process is not healthy until one succeeds.
            healthy_since: checks.is_none().then_some(since),
        }
    }

    pub(super) fn state(&self) -> AgentState {
        match (self.starting_until, self.failures) {
            (Some(_), _) => AgentState::Starting,
            (None, 0) => AgentState::Running,
            (None, _) => AgentState::Unhealthy,
        }
    }

    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// For how long it has been healthy without a break.
    pub(super) fn healthy_for(&self, now: Instant) -> Duration {
        self.healthy_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Whether it is healthy: by its last check, where there are checks.
    pub(super) fn is_healthy(&self) -> bool {
        self.healthy_since.is_some() && self.starting_until.is_none()
    }

    /// When the next check is due. `None`: a check is under way, or there are no checks.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.checks {
            Some((_, CheckSchedule::At(at))) => Some(at),
            _ => None,
        }
    }

    /// Starts a check if one is due. Returns whether it did.
    pub(super) fn begin_check(&mut self, now: Instant) -> bool {
        let is_due = self.due().is_some_and(|due| due <= now);
        if is_due && let Some((_, schedule)) = &mut self.checks {
            *schedule = CheckSchedule::UnderWay { began: now };
        }
        is_due
    }

    /// Records the result of the check under way. Without one, the result belongs to an earlier process and is ignored.
    pub(super) fn record(&mut self, answer: CheckResult, now: Instant) -> HealthVerdict {
        let Some((checks, schedule)) = &mut self.checks else { return HealthVerdict::Continue };
        let max_failures = checks.failures;
        let CheckSchedule::UnderWay { began } = *schedule else { return HealthVerdict::Continue };
        let next = now + checks.interval;
        let start_period_end = self.starting_until.filter(|end| began < *end);
        *schedule = CheckSchedule::At(start_period_end.map_or(next, |end| next.min(end.max(now))));
        match answer {
            CheckResult::Healthy => {
                *schedule = CheckSchedule::At(next);
                self.starting_until = None;
                self.failures = 0;
                self.problem = None;
                self.healthy_since.get_or_insert(now);
                HealthVerdict::Continue
            }
            CheckResult::Unknown(why) => {
                self.problem = Some(format!("its health is unknown: {why}"));
                HealthVerdict::Continue
            }
            CheckResult::Unhealthy(why) | CheckResult::Gone(why) if start_period_end.is_some() => {
                self.problem = Some(format!("not healthy yet: {why}"));
                HealthVerdict::Continue
            }
            CheckResult::Unhealthy(why) => {
                self.count_failure(format!("its health check fails: {why}"));
                if self.failures >= max_failures { HealthVerdict::Restart } else { HealthVerdict::Continue }
            }
            CheckResult::Gone(why) => {
                self.count_failure(why);
                HealthVerdict::Restart
            }
        }
    }

    /// A digest of all state that future steps depend on, relative to `now`. Periods longer than `healthy` are equal.
    #[cfg(test)]
    pub(super) fn outline(&self, now: Instant, healthy: Duration) -> [i64; 5] {
        let left = |until: Instant| millis(until.saturating_duration_since(now));
        let schedule = match self.checks {
            None => -1,
            Some((_, CheckSchedule::At(at))) => left(at),
            Some((_, CheckSchedule::UnderWay { began })) => {
                -2 - i64::from(self.starting_until.is_some_and(|end| began < end))
            }
        };
        let well = self.healthy_since.map_or(-1, |_| millis(self.healthy_for(now).min(healthy)));
        [
            schedule,
            self.starting_until.map_or(-1, left),
            i64::from(self.failures),
            i64::from(self.problem.is_some()),
            well,
        ]
    }

    fn count_failure(&mut self, why: String) {
        self.starting_until = None;
        self.healthy_since = None;
        self.failures = self.failures.saturating_add(1);
        self.problem = Some(why);
    }
}

#[cfg(test)]
pub(super) fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;
    const CHECKS: HealthPolicy =
        HealthPolicy { interval: Duration::from_secs(10), failures: 3, start_period: Duration::from_secs(30) };

    fn unhealthy() -> CheckResult {
        CheckResult::Unhealthy("x".into())
    }

    #[test]
    fn without_checks_a_running_process_is_healthy() {
        let now = Instant::now();
        let mut health = ProcessHealth::new(None, now, now, 0.5);
        assert_eq!((health.state(), health.due()), (AgentState::Running, None));
        assert!(!health.begin_check(now + S(100)));
        assert_eq!(health.record(unhealthy(), now), HealthVerdict::Continue);
        assert_eq!(health.healthy_for(now + S(7)), S(7));
    }

    #[test]
    fn first_checks_are_spread_over_time() {
        let now = Instant::now();
        let first =
            |checks, age, jitter| ProcessHealth::new(Some(checks), now - S(age), now, jitter).due().unwrap() - now;
        assert_eq!([first(CHECKS, 0, 0.0), first(CHECKS, 0, 1.0)], [S(0), S(5)]);
        // After a restart of the manager: the start period is over.
        assert_eq!([first(CHECKS, 100, 0.0), first(CHECKS, 100, 1.0)], [S(0), S(5)]);
        // Without a start period a failure counts from the start.
        let strict = HealthPolicy { start_period: S(0), ..CHECKS };
        assert_eq!([first(strict, 0, 0.0), first(strict, 0, 1.0)], [S(5), S(10)]);
        assert_eq!(first(HealthPolicy { start_period: S(2), ..CHECKS }, 0, 1.0), S(2));
    }

    #[test]
    fn failures_in_the_start_period_do_not_count_and_a_check_at_its_end_does() {
        let start = Instant::now();
        let mut health =
            ProcessHealth::new(Some(HealthPolicy { interval: S(20), failures: 1, ..CHECKS }), start, start, 0.0);
        assert!(health.begin_check(start));
        assert_eq!(health.record(unhealthy(), start + S(1)), HealthVerdict::Continue);
        assert_eq!((health.state(), health.due()), (AgentState::Starting, Some(start + S(21))));
        assert!(health.begin_check(start + S(21)));
        assert_eq!(health.record(unhealthy(), start + S(22)), HealthVerdict::Continue);
        assert_eq!(health.due(), Some(start + S(30)));
        assert!(health.begin_check(start + S(30)));
        assert_eq!(health.record(unhealthy(), start + S(31)), HealthVerdict::Restart);
    }

    #[test]
    fn a_check_that_started_in_the_start_period_does_not_count_even_if_it_ends_later() {
        let start = Instant::now();
        let mut health = ProcessHealth::new(Some(HealthPolicy { failures: 1, ..CHECKS }), start, start, 0.0);
        health.begin_check(start + S(29));
        assert_eq!(health.record(unhealthy(), start + S(34)), HealthVerdict::Continue);
        assert_eq!(health.due(), Some(start + S(34)));
    }

    #[test]
    fn the_first_success_ends_the_start_period() {
        let start = Instant::now();
        let mut health = ProcessHealth::new(Some(CHECKS), start, start, 0.0);
        health.begin_check(start);
        assert_eq!(health.record(CheckResult::Healthy, start), HealthVerdict::Continue);
        assert_eq!((health.state(), health.due()), (AgentState::Running, Some(start + S(10))));
        health.begin_check(start + S(10));
        health.record(unhealthy(), start + S(10));
        assert_eq!((health.state(), health.problem()), (AgentState::Unhealthy, Some("its health check fails: x")));
    }

    #[test]
    fn only_failures_in_a_row_require_a_restart_and_a_success_resets_the_count() {
        let start = Instant::now();
        let mut health = ProcessHealth::new(Some(CHECKS), start, start, 0.0);
        let mut now = start + S(40);
        let mut ask = |answer| {
            now += S(10);
            assert!(health.begin_check(now));
            assert!(!health.begin_check(now), "one at a time");
            (health.record(answer, now), health.state(), health.healthy_for(now + S(1)))
        };
        assert_eq!(ask(unhealthy()), (HealthVerdict::Continue, AgentState::Unhealthy, S(0)));
        assert_eq!(ask(unhealthy()).0, HealthVerdict::Continue);
        assert_eq!(ask(CheckResult::Healthy), (HealthVerdict::Continue, AgentState::Running, S(1)));
        assert_eq!(ask(unhealthy()).0, HealthVerdict::Continue);
        // An unknown result changes nothing.
        assert_eq!(ask(CheckResult::Unknown("y".into())), (HealthVerdict::Continue, AgentState::Unhealthy, S(0)));
        assert_eq!(ask(unhealthy()).0, HealthVerdict::Continue);
        assert_eq!(ask(unhealthy()).0, HealthVerdict::Restart);
        assert_eq!(ask(unhealthy()).0, HealthVerdict::Restart, "and stays so");
    }

    #[test]
    fn a_process_that_reports_it_does_not_run_is_restarted_at_once() {
        let start = Instant::now();
        let mut health = ProcessHealth::new(Some(HealthPolicy { start_period: S(0), ..CHECKS }), start, start, 0.0);
        health.begin_check(start + S(10));
        assert_eq!(health.record(CheckResult::Gone("stoped".into()), start + S(10)), HealthVerdict::Restart);
        assert_eq!(health.problem(), Some("stoped"));
    }
}
