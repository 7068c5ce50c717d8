//! Asking after the health of sub-agents, and making each of their transitions seen: in the log at once, with the next heartbeat as an event.
//!
//! When to ask and what follows from an answer is the supervisor's; here the question is put beside the loop, one for each process at a
//! time, and its answer comes back as an [`Input`] that counts only for that very process. A process that goes takes its question with it.

use std::time::Instant;

use super::Manager;
use crate::core::model::AgentName;
use crate::core::protocol::AgentState;
use crate::core::supervise::{Action, Answer};
use crate::process::health::{self, Question};
use crate::spm::Input;
use crate::spm::journal::About;

impl Manager {
    /// Asks after a sub-agent's health.
    pub(super) fn ask_health(&mut self, name: &AgentName) {
        let Some(agent) = self.agents.get(name) else { return };
        let question = self.start_of(agent).and_then(Question::of);
        let (inputs, of, serial) = (self.inputs.clone(), name.clone(), agent.serial);
        let task = tokio::spawn(async move {
            let answer = match question {
                Some(question) => health::ask(question).await,
                None => Answer::Unknown("what its package says about it cannot be read any more".to_owned()),
            };
            let _ = inputs.send(Input::Checked { name: of, serial, answer });
        });
        if let Some(agent) = self.agents.get_mut(name) {
            agent.question = Some(task.abort_handle());
        }
    }

    /// Tells of what a step of a sub-agent's supervisor changed. `of_health`: what its health made necessary.
    pub(super) fn note_transition(
        &mut self,
        name: &AgentName,
        before: AgentState,
        of_health: Option<Action>,
        now: Instant,
    ) {
        let Some(agent) = self.agents.get(name) else { return };
        let supervisor = &agent.supervisor;
        let (after, failures) = (supervisor.state(), supervisor.failures());
        let why = supervisor.last_error().unwrap_or_default().to_owned();
        let delay = supervisor.starts_at().map(|at| format!("{:.1?}", at.saturating_duration_since(now)));
        if before != after {
            tracing::info!(
                agent = %name,
                from = before.as_str(),
                to = after.as_str(),
                why,
                failures,
                delay,
                "a sub-agent's state changed"
            );
        }
        match (before, after) {
            (AgentState::Unhealthy, AgentState::Unhealthy) => {}
            (_, AgentState::Unhealthy) => self.tell(name, "health", "failed", &why, now),
            (AgentState::Unhealthy, AgentState::Running) => self.tell(name, "health", "ok", "it is well again", now),
            // The later ones differ in nothing but the delay.
            (AgentState::Starting | AgentState::Running | AgentState::Unhealthy, AgentState::Backoff)
                if failures == 2 =>
            {
                let text = format!("{why}; it is started again in {}", delay.unwrap_or_default());
                self.tell(name, "backoff", "failed", &text, now);
            }
            _ => {}
        }
        if of_health == Some(Action::Stop) {
            self.tell(name, "restart", "failed", &why, now);
        }
    }

    /// Notes an event of a sub-agent's that may come again and again, as often as that may be told.
    pub(super) fn tell(&mut self, name: &AgentName, kind: &str, outcome: &str, message: &str, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        let version = agent.active.clone();
        match agent.told.take(now) {
            None => {
                tracing::warn!(agent = %name, kind, outcome, message, "an event is not told to the gateway, after many")
            }
            Some(untold) => {
                let message = match untold {
                    0 => message.to_owned(),
                    _ => format!("{message} (before that, {untold} events of it were not told)"),
                };
                self.journal.note(kind, outcome, About { agent: Some(name), version: version.as_ref() }, message);
            }
        }
    }
}
