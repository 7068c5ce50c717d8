//! Properties that hold for any sequence of events.

use proptest::prelude::*;

use super::*;

/// Any event of the manager, including late and repeated ones.
fn event() -> impl Strategy<Value = AgentEvent> {
    let text = prop::sample::select(vec!["1", "2", "3"]);
    let result = |why: &'static str| prop_oneof![Just(Ok(())), Just(Err(why.to_owned()))];
    prop_oneof![
        text.clone().prop_map(|text| AgentEvent::Stage(Package::new(version(text)))),
        text.clone().prop_map(|text| AgentEvent::Activate(order(text))),
        (any::<bool>(), any::<bool>()).prop_map(|(spec_matches, sound)| AgentEvent::Configure {
            spec: Spec::default(),
            spec_matches,
            sound: if sound { Ok(()) } else { Err(refusal("no")) },
        }),
        prop_oneof![Just(Run::Start), Just(Run::Stop)].prop_map(AgentEvent::Set),
        text.clone().prop_map(|text| AgentEvent::OrderChanged(Some(order(text)))),
        Just(AgentEvent::Restart),
        Just(AgentEvent::Retry),
        text.clone().prop_map(|text| AgentEvent::RollBack { overruled: Some(order(text)) }),
        prop_oneof![
            Just(CheckResult::Healthy),
            Just(CheckResult::Unhealthy("refused".into())),
            Just(CheckResult::Gone("stopped".into())),
            Just(CheckResult::Unknown("no answer".into())),
        ]
        .prop_map(AgentEvent::Checked),
        (1..9_u64, text.clone(), any::<bool>(), any::<bool>()).prop_map(|(id, text, good, costly)| {
            AgentEvent::Staged {
                id,
                version: version(text),
                result: if good { Ok(ready(text)) } else { Err(ReleaseError { costly, ..refusal("no") }) },
            }
        }),
        (text.clone(), any::<bool>(), any::<bool>()).prop_map(|(text, good, withdrawn)| {
            let refused = ReleaseError { withdrawn, ..refusal("no") };
            AgentEvent::Admitted(if good { Ok((release(text), Some(Program::Script))) } else { Err(refused) })
        }),
        result("disk full").prop_map(AgentEvent::Recorded),
        result("read-only").prop_map(AgentEvent::Switched),
        text.clone().prop_map(|text| AgentEvent::Discarded(version(text))),
        (text.clone(), any::<bool>()).prop_map(|(text, good)| AgentEvent::Inspected {
            version: version(text),
            result: if good { Ok(Program::Script) } else { Err("bad".into()) },
        }),
        (text, any::<bool>()).prop_map(|(text, spec_matches)| AgentEvent::Launched {
            pid: 9,
            version: version(text),
            spec_matches
        }),
        Just(AgentEvent::LaunchFailed(refusal("no such file"))),
        any::<Option<bool>>().prop_map(|success| AgentEvent::Exited { success, how: "ended".into() }),
        result("it hangs").prop_map(AgentEvent::Stopped),
        Just(AgentEvent::Tick),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_events_loses_a_release_or_runs_two_processes(events in prop::collection::vec((event(), 0..20_u64), 0..60)) {
        let mut bench = Bench::new();
        let mut starting = false;
        for (event, seconds) in events {
            bench.now += S(seconds);
            let (before, recorded) = (bench.agent.ledger().clone(), bench.agent.to_record());
            let ends_start = matches!(event, AgentEvent::Launched { .. } | AgentEvent::LaunchFailed(_));
            bench.send(event.clone());
            starting &= !ends_start;
            let asked = bench.take_actions();
            // One start at a time, and never next to a known process.
            for action in &asked {
                if *action == AgentAction::Start {
                    prop_assert!(!starting, "a second start after {event:?}");
                    prop_assert!(bench.agent.supervisor().pid().is_none());
                    prop_assert!(bench.agent.current().is_some());
                    starting = true;
                }
            }
            // Every change of the ledger entry to write is followed by a write.
            let undone = matches!(event, AgentEvent::Switched(Err(_)));
            if bench.agent.to_record() != recorded {
                let records = asked.iter().any(|action| matches!(action, AgentAction::Record { .. }));
                prop_assert!(records, "{event:?} changed the ledger without a write");
            }
            // Nothing of a new release runs until its link is switched.
            let starts = asked.contains(&AgentAction::Start);
            if starts && matches!(bench.agent.activity, Activity::Admitting { .. } | Activity::Recording(_) | Activity::Stopping(_)) {
                prop_assert_eq!(bench.agent.current(), before.current().map(|release| &release.version));
            }
            // The last committed release is never given up for one that was not committed.
            if let Some(active) = before.active() {
                let kept: Vec<_> = bench.agent.ledger().kept().collect();
                let withdrawn = matches!(event, AgentEvent::Admitted(Err(_)));
                prop_assert!(withdrawn || undone || kept.contains(&&active.version), "{event:?} lost {active:?}");
            }
            // A sub-agent that should run has a process, an action under way, or a deadline.
            let supervisor = bench.agent.supervisor();
            let is_idle = supervisor.is_down() && supervisor.starts_at().is_none();
            let actual = bench.agent.actual(None, bench.now);
            if supervisor.wanted() && is_idle {
                prop_assert!(actual.busy || supervisor.deadline().is_some(), "nothing restarts it after {event:?}");
            }
        }
    }
}
