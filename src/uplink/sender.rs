//! Sends a heartbeat to the first endpoint that answers, over a connection that is kept for the next one.
//!
//! It blocks on the network and belongs to no thread.

use std::sync::Arc;
use std::time::Duration;

use super::HeartbeatAnswer;
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::{Answer, Heartbeat};
use crate::endpoint::{Client, Endpoint, Timeouts};
use crate::home::Home;

/// What came of one heartbeat.
#[derive(Debug)]
pub enum SendOutcome {
    /// `passed_over`: why the endpoints before it did not; `refused`: of those that answered and were not believed.
    Answered {
        passed_over: Option<String>,
        refused: Option<String>,
        endpoint: Endpoint,
        answer: Box<Answer>,
        clock_offset: Option<i64>,
        /// When the gateway's certificate ends, or one of those that vouch for it, seconds since 1970.
        certificate_end: Option<u64>,
    },
    /// `refused`: of whoever answered and was not believed, why not.
    Failed { why: String, refused: Option<String>, retry_after: Option<Duration> },
}

impl SendOutcome {
    fn is_any_refused(&self) -> bool {
        matches!(self, SendOutcome::Answered { refused: Some(_), .. } | SendOutcome::Failed { refused: Some(_), .. })
    }
}

/// The way to the gateway that one configuration describes.
#[derive(Debug)]
pub struct Sender {
    home: Home,
    agent_id: AgentId,
    config: Arc<Config>,
    /// `None`: made with the next heartbeat.
    client: Option<Client>,
}

impl Sender {
    /// Nothing is connected yet.
    pub fn new(home: &Home, agent_id: &AgentId, config: Arc<Config>) -> Sender {
        Sender { home: home.clone(), agent_id: agent_id.clone(), config, client: None }
    }

    /// Whether it was made for this very configuration.
    pub fn is_for(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }

    /// Tries the endpoints in order until one answers; says in the heartbeat how each one's certificate is checked.
    pub fn send(&mut self, heartbeat: &mut Heartbeat) -> SendOutcome {
        let outcome = self.try_each(heartbeat);
        if outcome.is_any_refused() {
            // The client read what it trusts when it was made; that may have been renewed since.
            self.client = None;
        }
        outcome
    }

    fn try_each(&mut self, heartbeat: &mut Heartbeat) -> SendOutcome {
        let config = &self.config;
        let client = match &mut self.client {
            Some(client) => client,
            None => match config.client(&config.trust(&self.home), &self.agent_id, Timeouts::exchange()) {
                Ok(new) => self.client.insert(new),
                Err(error) => {
                    return SendOutcome::Failed { why: format!("{error:#}"), refused: None, retry_after: None };
                }
            },
        };
        let (mut reasons, mut refused, mut retry_after) = (vec![], vec![], None);
        let joined = |texts: &[String]| (!texts.is_empty()).then(|| texts.join("; "));
        for endpoint in &config.heartbeat_srv {
            heartbeat.trust = Some(client.trust_report(endpoint));
            match super::send(client, endpoint, heartbeat) {
                Ok(HeartbeatAnswer { answer, clock_offset }) => {
                    if let Err(error) = client.learn(endpoint, &answer.pins) {
                        // What was pinned before holds; the next answer says it again.
                        tracing::warn!(error = format!("{error:#}"), "the gateway's keys are not kept");
                    }
                    let certificate_end = client.certificate_end(endpoint);
                    let (passed_over, refused) = (joined(&reasons), joined(&refused));
                    let (endpoint, answer) = (endpoint.clone(), Box::new(answer));
                    return SendOutcome::Answered {
                        passed_over,
                        refused,
                        endpoint,
                        answer,
                        clock_offset,
                        certificate_end,
                    };
                }
                Err(refusal) => {
                    retry_after = retry_after.max(refusal.retry_after);
                    if refusal.is_distrust {
                        refused.push(refusal.to_string());
                    }
                    reasons.push(refusal.to_string());
                }
            }
        }
        SendOutcome::Failed { why: reasons.join("; "), refused: joined(&refused), retry_after }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CertificateCheck, ProxyChoice};
    use crate::endpoint::testing::{CannedResponse, Server};
    use crate::uplink::tests::heartbeat;

    fn sender(servers: &[&Server]) -> Sender {
        let config = Config {
            heartbeat_srv: servers.iter().map(|server| server.endpoint()).collect(),
            certificate: CertificateCheck::Unchecked,
            proxy: ProxyChoice::None,
            ..Config::default()
        };
        Sender::new(&Home::new("/nowhere"), &"host-1".parse().unwrap(), Arc::new(config))
    }

    #[test]
    fn the_first_endpoint_that_answers_is_heard_and_the_connection_kept() {
        let busy = Server::plain(|_| CannedResponse::status(503));
        let good = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1", "generation": 7}"#));
        let unasked = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1", "generation": 8}"#));
        let mut sender = sender(&[&busy, &good, &unasked]);
        let SendOutcome::Answered { passed_over, refused, endpoint, answer, .. } = sender.send(&mut heartbeat()) else {
            panic!("nobody answered")
        };
        assert!(passed_over.unwrap().contains("503"));
        assert_eq!((refused, endpoint, answer.generation), (None, good.endpoint(), 7));
        assert!(sender.client.is_some());
    }

    #[test]
    fn an_endpoint_that_is_not_believed_is_passed_over_and_trust_is_read_again() {
        let wrong = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-2"}"#));
        let good = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1"}"#));
        let mut both = sender(&[&wrong, &good]);
        let SendOutcome::Answered { passed_over, refused, .. } = both.send(&mut heartbeat()) else {
            panic!("nobody answered")
        };
        assert!(refused.is_some() && refused == passed_over);
        assert!(both.client.is_none());
        let mut alone = sender(&[&wrong]);
        assert!(matches!(
            alone.send(&mut heartbeat()),
            SendOutcome::Failed { refused: Some(_), retry_after: None, .. }
        ));
        assert!(alone.client.is_none());
    }

    #[test]
    fn the_longest_wait_that_an_endpoint_asks_for_is_told() {
        let busy = |seconds: &'static str| {
            Server::plain(move |_| CannedResponse {
                headers: vec![("retry-after", seconds.to_owned())],
                ..CannedResponse::status(503)
            })
        };
        let servers = ["5", "17", "3"].map(busy);
        let mut sender = sender(&servers.each_ref());
        let SendOutcome::Failed { why, refused: None, retry_after } = sender.send(&mut heartbeat()) else {
            panic!("somebody answered")
        };
        assert_eq!(retry_after, Some(Duration::from_secs(17)));
        assert_eq!(why.matches("503").count(), 3, "{why}");
    }
}
