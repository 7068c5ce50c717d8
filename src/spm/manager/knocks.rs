//! What is asked at the local door: status, restart of a sub-agent, and the end, with or without the sub-agents.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::exchange::{clock_words, is_clock_off};
use super::{Manager, Stop};
use crate::core::agent::Event;
use crate::core::role::Role;
use crate::core::status::{self, HomeState, Status};
use crate::door::{Farewell, Knock, Reply, Request};
use crate::role;
use crate::spm::disk;
use crate::spm::input::Input;
use crate::spm::journal::About;

/// A stop is recorded before anything is stopped, unless the disk takes longer.
const STOP_IS_RECORDED: Duration = Duration::from_secs(10);

impl Manager {
    pub(super) fn answer_knock(&mut self, knock: Knock) {
        let now = Instant::now();
        let (request, reply) = match knock {
            Knock::PeerGone { role: Role::Spa, pid } => return self.peer.gone(pid, now),
            Knock::PeerGone { .. } => return,
            Knock::Stranger { why } => return self.note_stranger(&why, now),
            Knock::Asked(request, reply) => (request, reply),
        };
        let answer = match request {
            Request::Hello { role: Role::Spa, pid } => {
                self.peer.hello(pid, now);
                Reply::done()
            }
            Request::Hello { .. } => Reply::failed("there is one manager, and it is this one"),
            Request::Ping => {
                self.peer.ping(now);
                Reply::done()
            }
            Request::Status => Reply { error: None, status: Some(Box::new(self.status(now))) },
            Request::Stop => return self.begin_stop(reply, now),
            Request::Yield if self.stop.is_some() => Reply::failed("cannot give way: the home is being stopped"),
            Request::Yield => {
                tracing::info!("the manager was asked to give way; the sub-agents stay");
                self.ending = Some(Farewell::Yield);
                Reply::done()
            }
            Request::Restart { agent: name } => match self.agents.get(&name) {
                None => {
                    Reply::failed(format!("cannot restart {name}: there is no such sub-agent; `status` lists them"))
                }
                Some(agent) if !agent.state.supervisor().wanted() => {
                    Reply::failed(format!("cannot restart {name}: it is stopped, as the gateway wants it"))
                }
                Some(_) => match self.may_restart(&name) {
                    Ok(()) => {
                        self.step(&name, Event::Restart, now);
                        Reply::done()
                    }
                    Err(error) => Reply::failed(format!("cannot restart {name}: {error:#}; it goes on running")),
                },
            },
        };
        let _ = reply.send(answer);
    }

    /// Tells of somebody who may not command this home and tried to, once in a while: he may try again and again.
    fn note_stranger(&mut self, why: &str, now: Instant) {
        if self.strangers.take(now).is_some() {
            self.journal.note("door", "refused", About::default(), why);
        }
    }

    /// Stops every sub-agent; who asked is answered, and the manager ends, when the last one is down.
    pub(super) fn begin_stop(&mut self, reply: oneshot::Sender<Reply>, now: Instant) {
        if let Some(stop) = &mut self.stop {
            stop.waiting.push(reply);
            return;
        }
        tracing::info!("the home is stopped");
        let recorded_by = now + STOP_IS_RECORDED;
        self.stop = Some(Stop { waiting: vec![reply], errors: vec![], is_recorded: false, recorded_by });
        let home = self.home.clone();
        disk::run(&self.inputs, move || {
            if let Err(error) = role::record_stop(&home) {
                // A stop is honoured even where its record cannot be kept; the farewell tells the watchdog.
                tracing::warn!(error = format!("{error:#}"), "the stop cannot be recorded");
            }
            Input::StopRecorded
        });
    }

    /// The record of a stop is written, or is not waited for any longer: what runs is stopped.
    pub(super) fn stop_recorded(&mut self, now: Instant) {
        match &mut self.stop {
            Some(stop) if !stop.is_recorded => stop.is_recorded = true,
            _ => return,
        }
        for name in self.agents.keys().cloned().collect::<Vec<_>>() {
            self.step(&name, Event::HomeStops, now);
        }
        self.finish_stop_if_down();
    }

    pub(super) fn finish_stop_if_down(&mut self) {
        let Some(stop) = &mut self.stop else { return };
        if !stop.is_recorded || !self.agents.values().all(|agent| agent.state.supervisor().is_down()) {
            return;
        }
        let errors = std::mem::take(&mut stop.errors);
        let answer = if errors.is_empty() { Reply::done() } else { Reply::failed(errors.join("; ")) };
        for waiting in stop.waiting.drain(..) {
            let _ = waiting.send(answer.clone());
        }
        self.ending = Some(Farewell::Stop);
    }

    /// What an operator should know and need not mend here.
    fn notes(&self) -> Vec<String> {
        let offset = self.line.gateway.clock_offset_seconds.filter(|offset| is_clock_off(Some(*offset)));
        offset.map(clock_words).into_iter().collect()
    }

    pub(super) fn status(&self, now: Instant) -> Status {
        let agents: Vec<_> = self.agents.values().map(|agent| agent.status(now)).collect();
        let mut problems: Vec<String> = self.problems.values().cloned().collect();
        if self.peer.stopped_by_operator {
            problems.push("the watchdog's unit was stopped by an operator; `control start` starts it again".to_owned());
        }
        let state = if self.stop.is_some() {
            HomeState::Degraded
        } else {
            status::judge(self.peer.is_connected(), &agents, &problems)
        };
        Status {
            version: Some(self.identity.version.clone()),
            home: self.home.root().display().to_string(),
            state,
            spm: self.identity.own.status(),
            spa: self.peer.status(&self.home),
            gateway: self.line.gateway.clone(),
            generation: self.orders.held.generation,
            agents,
            problems,
            notes: self.notes(),
        }
    }
}
