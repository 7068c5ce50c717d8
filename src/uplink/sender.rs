//! Sends a heartbeat to the first endpoint that answers, over a persistent connection.
//!
//! It blocks on the network and starts no threads.

use std::sync::Arc;
use std::time::Duration;

use super::HeartbeatAnswer;
use crate::config::Config;
use crate::core::model::AgentId;
use crate::core::protocol::{Answer, Heartbeat};
use crate::endpoint::{Client, Endpoint, Timeouts};
use crate::home::Home;

/// The result of one heartbeat.
#[derive(Debug)]
pub enum SendOutcome {
    /// `passed_over`: why earlier endpoints failed; `refused`: why answers among them were rejected.
    Answered {
        passed_over: Option<String>,
        refused: Option<String>,
        endpoint: Endpoint,
        answer: Box<Answer>,
        clock_offset: Option<i64>,
        /// The earliest expiry in the gateway's certificate chain, seconds since 1970.
        certificate_end: Option<u64>,
    },
    /// `refused`: why answers were rejected, if any came.
    Failed { why: String, refused: Option<String>, retry_after: Option<Duration> },
}

impl SendOutcome {
    fn is_any_refused(&self) -> bool {
        matches!(self, SendOutcome::Answered { refused: Some(_), .. } | SendOutcome::Failed { refused: Some(_), .. })
    }
}

/// The connection to the gateway for one configuration.
#[derive(Debug)]
pub struct Sender {
    home: Home,
    agent_id: AgentId,
    config: Arc<Config>,
    /// `None`: created with the next heartbeat.
    client: Option<Client>,
}

impl Sender {
    /// Does not connect yet.
    pub fn new(home: &Home, agent_id: &AgentId, config: Arc<Config>) -> Sender {
        Sender { home: home.clone(), agent_id: agent_id.clone(), config, client: None }
    }

    /// Whether it was created for this very configuration.
    pub fn is_for(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }

    /// Tries the endpoints in order until one answers. The heartbeat reports how each one's certificate is verified.
    pub fn send(&mut self, heartbeat: &mut Heartbeat) -> SendOutcome {
        let outcome = self.try_each(heartbeat);
        if outcome.is_any_refused() {
            // The client loads its trust files when it is created; load them again, as they may have changed since.
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
                        // The previous pins stay valid, and the next answer announces the keys again.
                        tracing::warn!(error = format!("{error:#}"), "cannot save the gateway's announced keys");
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
    fn the_first_answer_is_used_and_the_connection_kept() {
        let busy = Server::plain(|_| CannedResponse::status(503));
        let good = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1", "generation": 7}"#));
        let unasked = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1", "generation": 8}"#));
        let mut sender = sender(&[&busy, &good, &unasked]);
        let SendOutcome::Answered { passed_over, refused, endpoint, answer, .. } = sender.send(&mut heartbeat()) else {
            panic!("no endpoint answered")
        };
        assert!(passed_over.unwrap().contains("503"));
        assert_eq!((refused, endpoint, answer.generation), (None, good.endpoint(), 7));
        assert!(sender.client.is_some());
    }

    #[test]
    fn an_untrusted_endpoint_is_skipped_and_the_trust_files_are_reloaded() {
        let wrong = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-2"}"#));
        let good = Server::plain(|_| CannedResponse::ok(r#"{"agentId": "host-1"}"#));
        let mut both = sender(&[&wrong, &good]);
        let SendOutcome::Answered { passed_over, refused, .. } = both.send(&mut heartbeat()) else {
            panic!("no endpoint answered")
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
    fn the_longest_retry_after_is_reported() {
        let busy = |seconds: &'static str| {
            Server::plain(move |_| CannedResponse {
                headers: vec![("retry-after", seconds.to_owned())],
                ..CannedResponse::status(503)
            })
        };
        let servers = ["5", "17", "3"].map(busy);
        let mut sender = sender(&servers.each_ref());
        let SendOutcome::Failed { why, refused: None, retry_after } = sender.send(&mut heartbeat()) else {
            panic!("an endpoint answered")
        };
        assert_eq!(retry_after, Some(Duration::from_secs(17)));
        assert_eq!(why.matches("503").count(), 3, "{why}");
    }
}
