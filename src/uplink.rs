//! Placeholder: the real one is written elsewhere; only the signatures count here.
#![allow(dead_code, unused)]
use crate::core::model::{AgentName, Arch, Os};
use crate::core::protocol::Offer;
use crate::endpoint::{Client, Endpoint};

pub fn current_release(
    client: &Client,
    endpoint: &Endpoint,
    name: &AgentName,
    os: Os,
    arch: Arch,
) -> anyhow::Result<Option<Offer>> {
    unreachable!()
}
