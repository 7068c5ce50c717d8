//! Placeholder: the real one is written elsewhere; only the signatures count here.
#![allow(dead_code, unused)]
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::core::model::AgentId;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(String);
impl FromStr for Endpoint {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> anyhow::Result<Self> {
        anyhow::ensure!(s.starts_with("http://") || s.starts_with("https://"), "cannot take {s:?} as an endpoint");
        Ok(Endpoint(s.trim_end_matches('/').to_owned()))
    }
}
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(String);
impl FromStr for Fingerprint {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> anyhow::Result<Self> {
        let hex: String =
            s.trim_start_matches("sha256:").chars().filter(|c| *c != ':').collect::<String>().to_lowercase();
        anyhow::ensure!(
            hex.len() == 64 && hex.chars().all(|c| c.is_ascii_hexdigit()),
            "cannot take {s:?} as a fingerprint"
        );
        Ok(Fingerprint(hex))
    }
}
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    System,
    CaFile(PathBuf),
    Pin(Vec<Fingerprint>),
    FirstContact { pins: PathBuf },
    Insecure,
}

impl Endpoint {
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https:")
    }
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub stall: Duration,
    pub total: Option<Duration>,
}
impl Timeouts {
    pub fn exchange() -> Timeouts {
        unreachable!()
    }
    pub fn download(stall: Duration) -> Timeouts {
        unreachable!()
    }
}
#[derive(Debug)]
pub struct Client {}
pub struct Reply {}
impl Reply {
    pub fn status(&self) -> u16 {
        unreachable!()
    }
    pub fn refused(self) -> anyhow::Error {
        unreachable!()
    }
}
impl Client {
    pub fn new(trust: &Trust, agent_id: Option<&AgentId>, timeouts: Timeouts) -> anyhow::Result<Client> {
        anyhow::bail!("placeholder")
    }
    pub fn first_contact(&self) -> Option<Fingerprint> {
        None
    }
    pub fn get(&self, endpoint: &Endpoint, path: &str, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        unreachable!()
    }
}
