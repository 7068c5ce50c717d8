//! The probation of a new release: what rolls it back, what does not, and what the next manager resumes.

use super::*;

fn done(_: &mut Bench) {}

#[test]
fn a_release_that_fails_on_probation_is_rolled_back_and_skipped() {
    let exit: Fail = |bench| done(bench.send(AgentEvent::Exited { success: Some(false), how: "exited with 1".into() }));
    let fails: [(&str, Vec<Fail>); 4] = [
        (
            "it does not start",
            vec![|bench| done(bench.send(AgentEvent::LaunchFailed(refusal("no such file")))), |bench| {
                done(bench.send(AgentEvent::LaunchFailed(refusal("no such file"))))
            }],
        ),
        (
            "its second process does not live longer than the first",
            vec![|bench| done(bench.launched(20, "2")), exit, |bench| done(bench.launched(21, "2")), exit],
        ),
        (
            "it exits three times",
            vec![
                |bench| done(bench.launched(20, "2")),
                exit,
                |bench| {
                    bench.launched(21, "2");
                    bench.now += S(3)
                },
                exit,
                |bench| {
                    bench.now += S(2);
                    bench.send(AgentEvent::Tick);
                    bench.launched(22, "2");
                    bench.now += S(9)
                },
                exit,
            ],
        ),
        (
            "it exits although it should keep running",
            vec![
                |bench| done(bench.launched(20, "2")),
                |bench| done(bench.send(AgentEvent::Exited { success: Some(true), how: "exited with 0".into() })),
                |bench| done(bench.launched(21, "2")),
                |bench| done(bench.send(AgentEvent::Exited { success: Some(true), how: "exited with 0".into() })),
            ],
        ),
    ];
    for (case, failing) in fails {
        let mut bench = Bench::about_to_start("2");
        for (number, fail) in failing.iter().enumerate() {
            assert_ne!(bench.agent.ledger().probation(), None, "{case}: rolled back before step {number}");
            fail(&mut bench);
        }
        assert!(bench.notes().ends_with(&[("upgrade", "failed"), ("skip", "ok")]), "{case}: {:?}", bench.notes());
        assert_eq!((bench.agent.ledger().active(), bench.agent.ledger().probation()), (Some(&release("1")), None));
        assert!(bench.take_actions().contains(&AgentAction::Record { wait: true }), "{case}");
        bench.send(AgentEvent::Recorded(Ok(())));
        bench.send(AgentEvent::Stopped(Ok(())));
        assert_eq!(bench.take_actions(), [AgentAction::Switch(version("1"))], "{case}");
        assert_eq!(bench.agent.state(), AgentState::Updating);
        bench.send(AgentEvent::Switched(Ok(())));
        assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1"))], "{case}");
        bench.send(inspected(Ok(manifest(&[]))));
        assert_eq!(bench.take_actions(), [AgentAction::Start], "{case}");
        bench.launched(30, "1");
        assert_eq!(bench.notes(), [("rollback", "ok")], "{case}");
        assert_eq!(bench.agent.state(), AgentState::Running);
        assert!(bench.agent.last_error().unwrap().starts_with("2 is skipped: "), "{:?}", bench.agent.last_error());
        assert!(!bench.take_actions().iter().any(|action| matches!(action, AgentAction::RaiseEpoch(_))));
        let held_back = |bench: &Bench, order: &Order| bench.agent.actual(Some(order), bench.now).held_back;
        assert_eq!(held_back(&bench, &order("2")), Some(version("2")));
        // The same order in another desired state changes nothing; a higher `retry` does.
        bench.send(AgentEvent::OrderChanged(Some(order("2"))));
        assert_eq!(held_back(&bench, &order("2")), Some(version("2")));
        let again = Order { retry: 1, ..order("2") };
        bench.send(AgentEvent::OrderChanged(Some(again.clone())));
        assert_eq!(held_back(&bench, &again), None);
    }
}

#[test]
fn a_skipped_release_is_tried_again_after_a_retry_or_a_new_order() {
    let ways: [fn(&mut Bench); 2] = [
        |bench| done(bench.send(AgentEvent::Retry)),
        |bench| {
            done(
                bench.send(AgentEvent::OrderChanged(Some(order("3")))).send(AgentEvent::OrderChanged(Some(order("2")))),
            )
        },
    ];
    for way in ways {
        let mut bench = Bench::about_to_start("2");
        bench
            .send(AgentEvent::LaunchFailed(refusal("no such file")))
            .send(AgentEvent::LaunchFailed(refusal("no such file")));
        bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
        bench.send(inspected(Ok(manifest(&[])))).launched(30, "1");
        bench.actions.clear();
        way(&mut bench);
        assert_eq!(bench.take_actions(), [AgentAction::Record { wait: false }]);
        assert_eq!(bench.agent.actual(Some(&order("2")), bench.now).held_back, None);
        assert_eq!(bench.agent.last_error(), None);
    }
}

#[test]
fn a_roll_back_completes_even_if_the_disk_cannot_be_written() {
    let mut bench = Bench::about_to_start("2");
    bench
        .send(AgentEvent::LaunchFailed(refusal("no such file")))
        .send(AgentEvent::LaunchFailed(refusal("no such file")));
    bench.send(AgentEvent::Stopped(Ok(())));
    assert!(!bench.take_actions().contains(&AgentAction::Switch(version("1"))), "the ledger is written first");
    bench.send(AgentEvent::Recorded(Err("no space left".into())));
    assert_eq!(bench.take_actions(), [AgentAction::Switch(version("1"))]);
    bench.send(AgentEvent::Switched(Err("no space left".into())));
    assert_eq!(bench.notes(), [("rollback", "failed")]);
    bench.send(inspected(Ok(manifest(&[]))));
    assert_eq!(bench.take_actions(), [AgentAction::Inspect(version("1")), AgentAction::Start]);
}

#[test]
fn a_slow_start_is_allowed_and_a_release_that_never_becomes_healthy_is_rolled_back() {
    use crate::core::health::HealthSpec;
    let health: HealthSpec =
        serde_json::from_str(r#"{"tcp": "127.0.0.1:1", "interval": 5, "startPeriod": 30}"#).unwrap();
    let slow = || match manifest(&[]) {
        Program::Native(manifest) => Program::Native(Box::new(Manifest { health: Some(health.clone()), ..*manifest })),
        script => script,
    };
    for gets_well in [true, false] {
        let mut bench = Bench::running();
        bench.stage("2");
        bench.send(AgentEvent::Activate(order("2"))).send(AgentEvent::Admitted(Ok((release("2"), Some(slow())))));
        bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
        bench.launched(20, "2");
        let start = bench.now;
        bench.actions.clear();
        // Until it is committed or rolled back.
        while bench.agent.ledger().probation().is_some() && bench.agent.ledger().active() == Some(&release("1")) {
            bench.now = bench.agent.deadline(bench.now).expect("there is always a deadline");
            bench.send(AgentEvent::Tick);
            if bench.take_actions().contains(&AgentAction::Check) {
                let is_well = gets_well && bench.now >= start + S(25);
                let answer = if is_well { CheckResult::Healthy } else { CheckResult::Unhealthy("refused".into()) };
                bench.send(AgentEvent::Checked(answer));
                if bench.take_actions().contains(&AgentAction::Stop) && bench.agent.ledger().probation().is_some() {
                    bench.send(AgentEvent::Stopped(Ok(())));
                    bench.launched(21, "2");
                }
            }
        }
        let expected = if gets_well { "2" } else { "1" };
        assert_eq!(bench.agent.ledger().active(), Some(&release(expected)));
        assert!(!gets_well || bench.now == start + S(30), "committed after {:?}", bench.now - start);
    }
}

#[test]
fn a_release_of_unknown_health_is_rolled_back_in_the_end() {
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2"))).send(AgentEvent::Admitted(Ok((release("2"), Some(Program::Script)))));
    bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
    bench.launched(20, "2");
    let start = bench.now;
    while bench.agent.ledger().probation().is_some() {
        bench.now = bench.agent.deadline(bench.now).unwrap();
        bench.send(AgentEvent::Tick);
        if bench.take_actions().contains(&AgentAction::Check) {
            bench.send(AgentEvent::Checked(CheckResult::Unknown("no answer".into())));
        }
    }
    assert_eq!(bench.now - start, S(130));
    assert_eq!(bench.agent.ledger().active(), Some(&release("1")));
}

#[test]
fn a_requested_stop_and_an_unsafe_home_are_not_failures() {
    let mut bench = Bench::about_to_start("2");
    let unsound = || ReleaseError { refused: true, ..refusal("others can write there") };
    bench.send(AgentEvent::LaunchFailed(unsound())).send(AgentEvent::LaunchFailed(unsound()));
    bench.now += S(60);
    bench.send(AgentEvent::Tick);
    for pid in 20..30 {
        bench.launched(pid, "2");
        bench.send(AgentEvent::Restart);
        bench.send(AgentEvent::Stopped(Ok(())));
    }
    assert_eq!(bench.agent.ledger().probation_failures(), 0);
    bench.send(AgentEvent::Set(Run::Stop));
    bench.launched(30, "2");
    bench.send(AgentEvent::Stopped(Ok(())));
    bench.now += S(10_000);
    bench.send(AgentEvent::Tick);
    assert_eq!((bench.agent.state(), bench.agent.ledger().probation()), (AgentState::Stopped, Some(&release("2"))));
}

#[test]
fn a_start_that_the_host_or_the_home_prevents_never_rolls_back() {
    let reasons = [
        ReleaseError { host_shortage: true, ..refusal("cannot run it: too many open files") },
        ReleaseError { refused: true, ..refusal("others can write there") },
    ];
    for reason in reasons {
        let mut bench = Bench::about_to_start("2");
        let start = bench.now;
        while bench.now < start + S(1_000) {
            bench.send(AgentEvent::LaunchFailed(reason.clone()));
            assert_eq!(bench.agent.last_error().as_ref(), Some(&reason.why));
            if bench.take_actions().contains(&AgentAction::Start) {
                // The first failure is retried at once.
                continue;
            }
            bench.now = bench.agent.deadline(bench.now).expect("there is always a deadline");
            bench.send(AgentEvent::Tick);
            assert_eq!(bench.take_actions(), [AgentAction::Start]);
        }
        assert!(bench.agent.supervisor().failures() > 10, "it is retried");
        let ledger = bench.agent.ledger();
        assert_eq!((ledger.probation(), ledger.probation_failures()), (Some(&release("2")), 0));
        // From its start on, the usual limits apply: the time before does not count.
        bench.launched(20, "2");
        bench.now += S(10);
        bench.send(AgentEvent::Tick);
        assert_eq!(bench.agent.ledger().active(), Some(&release("2")));
        assert_eq!(bench.agent.last_error().as_ref(), Some(&reason.why), "the reason of the last restart");
    }
}

#[test]
fn the_next_manager_resumes_a_probation_with_its_failures() {
    let mut ledger = LedgerEntry::from_disk(Some(release("1")), None);
    ledger.begin_probation(release("2"));
    ledger.fail_probation();
    ledger.fail_probation();
    let found = || Discovery { ledger: ledger.clone(), program: Some(Ok(manifest(&[]))), ..Discovery::default() };
    let now = Instant::now();
    let (mut agent, _) = Agent::restore("a".parse().unwrap(), found());
    assert_eq!(agent.adopt(7, version("2"), now - S(4), None, at(now)), []);
    assert_eq!((agent.state(), agent.deadline(now)), (AgentState::Updating, Some(now + S(6))));
    let committed = agent.step(AgentEvent::Tick, at(now + S(6)));
    assert!(committed.contains(&AgentAction::RaiseEpoch(release("2"))), "{committed:?}");
    let (mut agent, _) = Agent::restore("a".parse().unwrap(), found());
    let end = |was_seen| PriorExit { success: Some(false), how: "exited with 1".to_owned(), was_seen };
    let mut known = agent.clone();
    known.adopt_exited(7, version("2"), end(true), Some(Spec::default()), at(now));
    assert_eq!(known.ledger().probation_failures(), 2, "the previous manager counted it");
    let actions = agent.adopt_exited(7, version("2"), end(false), Some(Spec::default()), at(now));
    assert!(actions.contains(&AgentAction::Record { wait: true }), "{actions:?}");
    assert_eq!(agent.ledger().active(), Some(&release("1")));
}

#[test]
fn a_job_that_exits_successfully_is_committed() {
    let Program::Native(manifest) = manifest(&[]) else { panic!() };
    let mut job = *manifest;
    job.run.restart = crate::core::manifest::Restart::OnFailure;
    let mut bench = Bench::running();
    bench.stage("2");
    bench.send(AgentEvent::Activate(order("2")));
    bench.send(AgentEvent::Admitted(Ok((release("2"), Some(Program::Native(Box::new(job)))))));
    bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
    bench.launched(20, "2");
    bench.send(AgentEvent::Exited { success: Some(true), how: "exited with 0".into() });
    assert_eq!(bench.agent.ledger().active(), Some(&release("2")));
}

#[test]
fn an_operators_roll_back_is_kept_until_another_release_is_ordered() {
    let mut bench = Bench::about_to_start("2");
    bench.launched(20, "2");
    bench.now += S(10);
    bench.send(AgentEvent::Tick);
    assert_eq!(bench.agent.rollback_target(), Some(&version("1")));
    bench.actions.clear();
    bench.send(AgentEvent::RollBack { overruled: Some(order("2")) });
    assert_eq!(bench.take_actions(), [AgentAction::Record { wait: true }, AgentAction::Stop]);
    bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
    bench.send(inspected(Ok(manifest(&[])))).launched(30, "1");
    assert!(bench.notes().contains(&("rollback", "ok")));
    let ledger = bench.agent.ledger();
    assert_eq!((ledger.active(), ledger.backup(), ledger.is_held()), (Some(&release("1")), Some(&release("2")), true));
    assert!(bench.agent.actual(Some(&order("2")), bench.now).stays);
    bench.send(AgentEvent::OrderChanged(Some(order("2"))));
    assert!(bench.agent.actual(Some(&order("2")), bench.now).stays, "the same order again");
    bench.send(AgentEvent::OrderChanged(Some(order("3"))));
    assert!(!bench.agent.actual(Some(&order("3")), bench.now).stays);
}

/// A release that waits for its first check after an adoption or a restart has not failed a check.
#[test]
fn time_without_a_manager_or_while_it_is_stopped_does_not_count_against_a_release() {
    let mut ledger = LedgerEntry::from_disk(Some(release("1")), None);
    ledger.begin_probation(release("2"));
    let found = || Discovery { ledger: ledger.clone(), program: Some(Ok(Program::Script)), ..Discovery::default() };
    let now = Instant::now() + S(10_000);
    let (mut agent, _) = Agent::restore("a".parse().unwrap(), found());
    agent.adopt(7, version("2"), now - S(5_000), None, at(now));
    agent.step(AgentEvent::Tick, at(now));
    assert_eq!(agent.ledger().probation(), Some(&release("2")), "its health was not checked yet");
    for event in [AgentEvent::Set(Run::Stop), AgentEvent::Stopped(Ok(()))] {
        agent.step(event, at(now + S(1)));
    }
    agent.step(AgentEvent::Set(Run::Start), at(now + S(5_000)));
    assert_eq!(agent.ledger().probation(), Some(&release("2")), "it is only starting");
    let deadline = agent.deadline(now + S(5_000)).unwrap();
    assert_eq!(deadline, now + S(5_130));
}

#[test]
fn an_unreadable_release_is_rolled_back_only_if_there_is_a_previous_one() {
    for before in [Some(release("1")), None] {
        let mut ledger = LedgerEntry::from_disk(Some(release("1")), None);
        ledger.begin_probation(release("2"));
        ledger.drop_incomplete(|whole| before.is_some() || whole.as_str() == "2");
        let program = Some(Err("no agent.toml".to_owned()));
        let (agent, _) = Agent::restore("a".parse().unwrap(), Discovery { ledger, program, ..Discovery::default() });
        let mut bench = Bench { agent, ..Bench::new() };
        let start = bench.now;
        bench.send(AgentEvent::Set(Run::Start));
        while bench.now < start + S(1_000) && bench.agent.ledger().probation().is_some() {
            let unreadable = AgentEvent::Inspected { version: version("2"), result: Err("no agent.toml".into()) };
            if bench.take_actions().contains(&AgentAction::Inspect(version("2"))) {
                bench.send(unreadable);
                continue;
            }
            let next = bench.agent.deadline(bench.now).expect("there is always a deadline");
            assert!(next > bench.now, "a passed deadline would be waited for in a busy loop");
            bench.now = next;
            bench.send(AgentEvent::Tick);
        }
        assert_eq!(bench.agent.ledger().probation().is_none(), before.is_some());
    }
}

/// The process of a release can outlive the manager that rolled it back.
#[test]
fn the_next_manager_does_not_treat_a_rolled_back_release_as_active() {
    let ways: [Fail; 3] = [
        |bench| {
            // Its time is up.
            bench.send(AgentEvent::Restart);
            bench.send(AgentEvent::Stopped(Ok(())));
            bench.now += S(200);
            bench.send(AgentEvent::Tick);
        },
        |bench| done(bench.send(AgentEvent::RollBack { overruled: None })),
        |bench| {
            // Another release replaces it.
            bench.stage("3");
            bench.send(AgentEvent::Activate(order("3"))).send(AgentEvent::Admitted(Ok((release("3"), None))));
        },
    ];
    for (number, way) in ways.iter().enumerate() {
        let mut bench = Bench::about_to_start("2");
        way(bench.launched(20, "2"));
        let mut ledger = bench.agent.to_record();
        ledger.resume(&release("2"));
        assert_eq!((ledger.active(), ledger.probation()), (Some(&release("1")), None), "case {number}");
        let found = Discovery { ledger, program: Some(Ok(manifest(&[]))), ..Discovery::default() };
        let (agent, _) = Agent::restore("a".parse().unwrap(), found);
        let mut bench = Bench { agent, ..Bench::new() };
        bench.actions = bench.agent.adopt(7, version("2"), bench.now, None, at(bench.now));
        assert_eq!(bench.take_actions(), [AgentAction::Record { wait: true }, AgentAction::Stop], "case {number}");
        bench.send(AgentEvent::Recorded(Ok(()))).send(AgentEvent::Stopped(Ok(()))).send(AgentEvent::Switched(Ok(())));
        assert_eq!(
            bench.take_actions(),
            [AgentAction::Switch(version("1")), AgentAction::Inspect(version("1"))],
            "case {number}"
        );
    }
}

#[test]
fn a_job_that_exits_successfully_while_another_release_is_admitted_is_committed_afterwards() {
    let Program::Native(manifest) = manifest(&[]) else { panic!() };
    let mut job = *manifest;
    job.run.restart = crate::core::manifest::Restart::OnFailure;
    let mut bench = Bench::about_to_start("2");
    bench.send(AgentEvent::Inspected { version: version("2"), result: Ok(Program::Native(Box::new(job))) });
    bench.launched(20, "2");
    bench.stage("3");
    bench.send(AgentEvent::Activate(order("3")));
    bench.send(AgentEvent::Exited { success: Some(true), how: "exited with 0".into() });
    assert_eq!(bench.agent.ledger().probation(), Some(&release("2")));
    bench.send(AgentEvent::Admitted(Err(refusal("its key was revoked"))));
    assert_eq!((bench.agent.ledger().active(), bench.agent.ledger().probation()), (Some(&release("2")), None));
}

/// A grace period may be ten minutes, and an unsafe home is repaired by an operator.
#[test]
fn a_long_stop_and_a_refused_start_do_not_count_against_a_release() {
    let mut bench = Bench::about_to_start("2");
    bench.launched(20, "2").send(AgentEvent::Restart);
    bench.now += S(600);
    bench.send(AgentEvent::Tick).send(AgentEvent::Stopped(Ok(())));
    for _ in 0..20 {
        bench.send(AgentEvent::LaunchFailed(ReleaseError { refused: true, ..refusal("others can write there") }));
        bench.now += S(60);
        bench.send(AgentEvent::Tick);
    }
    assert_eq!(bench.agent.ledger().probation(), Some(&release("2")));
}

#[test]
fn a_release_that_fails_when_another_is_ordered_is_rolled_back_and_not_skipped() {
    let mut bench = Bench::about_to_start("2");
    bench.send(AgentEvent::OrderChanged(Some(order("3"))));
    bench
        .send(AgentEvent::LaunchFailed(refusal("no such file")))
        .send(AgentEvent::LaunchFailed(refusal("no such file")));
    assert_eq!(bench.notes().last(), Some(&("upgrade", "failed")));
    assert_eq!(bench.agent.ledger().permanently_skipped().count(), 0);
}

#[test]
fn a_restarted_manager_follows_an_order_that_was_only_written() {
    let mut bench = Bench::about_to_start("2");
    bench
        .send(AgentEvent::LaunchFailed(refusal("no such file")))
        .send(AgentEvent::LaunchFailed(refusal("no such file")));
    for (text, skipped) in [("2", 1), ("3", 0)] {
        let found = Discovery { ledger: bench.agent.to_record(), order: Some(order(text)), ..Discovery::default() };
        let (agent, actions) = Agent::restore("a".parse().unwrap(), found);
        assert_eq!(agent.ledger().permanently_skipped().count(), skipped);
        assert_eq!(actions.contains(&AgentAction::Record { wait: false }), skipped == 0);
    }
}

/// Both are due at the same time. The start uses the release that is current when it is carried out.
#[test]
fn a_release_whose_time_is_up_at_its_restart_is_rolled_back_after_the_restart() {
    let mut bench = Bench::about_to_start("2");
    bench.send(AgentEvent::LaunchFailed(ReleaseError { refused: true, ..refusal("others can write there") }));
    bench.launched(20, "2").send(AgentEvent::Exited { success: Some(false), how: "exited with 1".into() });
    assert!(bench.agent.supervisor().starts_at().is_some());
    bench.actions.clear();
    bench.now += S(130);
    bench.send(AgentEvent::Tick);
    assert_eq!((bench.take_actions(), bench.agent.current()), (vec![AgentAction::Start], Some(&version("2"))));
    bench.send(AgentEvent::Tick);
    assert_eq!(bench.agent.current(), Some(&version("1")));
    bench.launched(21, "2");
    assert!(bench.take_actions().contains(&AgentAction::Stop));
}
