//! Enrolment: the files of a package (rpm, deb) become an installation, by `aops install` or, unattended, by a file that an image or a
//! configuration management has put there. The manager reads it when its unit starts.
//!
//! ```text
//! /etc/aops/enrol.toml    agentId = "5402"
//!                         endpoint = "https://gateway.example:8888"      or a list
//!                         trustedKeys = ["/etc/aops/aops.pub"]
//!                         caCert = "/etc/aops/ca.pem"                    or pin, pinFirstContact, insecure
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use super::packaged;
use crate::config;
use crate::core::model::AgentId;
use crate::core::role::Role;
use crate::endpoint::{Endpoint, Fingerprint};
use crate::home::Home;
use crate::platform::{self, ExpectedPath};
use crate::store;

/// The settings of an unattended enrolment.
const FILE: &str = "/etc/aops/enrol.toml";
const MAX_BYTES: u64 = 64 << 10;

/// What the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Enrolment {
    pub agent_id: AgentId,
    pub endpoints: Vec<Endpoint>,
    pub trusted_keys: Vec<PathBuf>,
    pub ca_cert: Option<PathBuf>,
    pub pins: Vec<Fingerprint>,
    pub pin_first_contact: bool,
    pub insecure: bool,
    pub product: Option<String>,
}

/// `enrol.toml`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EnrolmentFile {
    agent_id: String,
    endpoint: OneOrMany,
    #[serde(default)]
    trusted_keys: OneOrMany,
    ca_cert: Option<PathBuf>,
    #[serde(default)]
    pin: OneOrMany,
    #[serde(default)]
    pin_first_contact: bool,
    #[serde(default)]
    insecure: bool,
    product: Option<String>,
}

/// A text or a list of texts.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(from = "TextOrList")]
struct OneOrMany(Vec<String>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum TextOrList {
    Text(String),
    List(Vec<String>),
}

impl From<TextOrList> for OneOrMany {
    fn from(value: TextOrList) -> OneOrMany {
        match value {
            TextOrList::Text(text) => OneOrMany(vec![text]),
            TextOrList::List(list) => OneOrMany(list),
        }
    }
}

/// What to do about a home that is not enrolled; `None`: it is, or it does not belong to a package.
pub fn advice(home: &Home) -> Option<String> {
    if !packaged::is_unenrolled(home) {
        return None;
    }
    let unit = home.unit(Role::Spm);
    Some(match read() {
        Ok(None) => format!(
            "this host is not enrolled: the package aops is installed in {}, but has no agent id and no gateway; run `aops install \
             --agent-id ID --endpoint https://GATEWAY:8888 --trusted-key aops.pub`, or create {FILE} and run `systemctl start {unit}`",
            home.public_path().display()
        ),
        Ok(Some(_)) => {
            format!(
                "this host is not enrolled: run `systemctl restart {unit}`, which enrols it with {FILE}; if it stays so, \
                 `journalctl -u {unit}` shows why"
            )
        }
        Err(error) => {
            format!("this host is not enrolled: {error:#}; correct the file and run `systemctl start {unit}`")
        }
    })
}

/// Reads the file; `None`: it does not exist.
pub fn read() -> Result<Option<Enrolment>> {
    let path = Path::new(FILE);
    let Some(bytes) = store::read(path, MAX_BYTES)? else { return Ok(None) };
    let attempt = || -> Result<Enrolment> {
        if let Some(weakness) = platform::weakness(path, ExpectedPath::File, path)? {
            bail!("{weakness}");
        }
        parse(std::str::from_utf8(&bytes)?)
    };
    attempt().map(Some).with_context(|| format!("cannot enrol this host with {FILE}"))
}

fn parse(text: &str) -> Result<Enrolment> {
    let file: EnrolmentFile = toml::from_str(text).map_err(|error| anyhow!("{}", config::wrong_line(text, &error)))?;
    let endpoints: Vec<Endpoint> =
        file.endpoint.0.iter().map(|text| text.parse()).collect::<Result<_, _>>().context("cannot use endpoint")?;
    if endpoints.is_empty() {
        bail!("endpoint is empty: expected the gateway, such as \"https://gateway.example:8888\"");
    }
    let pins: Vec<Fingerprint> =
        file.pin.0.iter().map(|text| text.parse()).collect::<Result<_, _>>().context("cannot use pin")?;
    let ways = [file.ca_cert.is_some(), !pins.is_empty(), file.pin_first_contact, file.insecure];
    if ways.into_iter().filter(|way| *way).count() > 1 {
        bail!("expected at most one of caCert, pin, pinFirstContact and insecure");
    }
    Ok(Enrolment {
        agent_id: file.agent_id.parse().context("cannot use agentId")?,
        endpoints,
        trusted_keys: file.trusted_keys.0.into_iter().map(PathBuf::from).collect(),
        ca_cert: file.ca_cert,
        pins,
        pin_first_contact: file.pin_first_contact,
        insecure: file.insecure,
        product: file.product,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_what_an_installation_needs() {
        let enrolment = parse(
            "agentId = \"5402\"\nendpoint = [\"https://a:1\", \"https://b:1\"]\ntrustedKeys = \"/etc/aops/aops.pub\"\n\
             caCert = \"/etc/aops/ca.pem\"\n",
        )
        .unwrap();
        assert_eq!(enrolment.agent_id.as_str(), "5402");
        assert_eq!(enrolment.endpoints.len(), 2);
        assert_eq!(enrolment.trusted_keys, [PathBuf::from("/etc/aops/aops.pub")]);
        assert_eq!(enrolment.ca_cert, Some("/etc/aops/ca.pem".into()));
    }

    #[test]
    fn a_wrong_file_is_rejected_with_the_field() {
        let good = "agentId = \"1\"\nendpoint = \"https://a:1\"\n";
        parse(good).unwrap();
        for (text, word) in [
            ("endpoint = \"https://a:1\"\n".to_owned(), "agentId"),
            ("agentId = \"1\"\n".to_owned(), "endpoint"),
            ("agentId = \"1\"\nendpoint = []\n".to_owned(), "endpoint"),
            ("agentId = \"a b\"\nendpoint = \"https://a:1\"\n".to_owned(), "agentId"),
            ("agentId = \"1\"\nendpoint = \"gopher:\"\n".to_owned(), "endpoint"),
            (format!("{good}pin = \"x\"\n"), "pin"),
            (format!("{good}agentid = \"1\"\n"), "agentid"),
            (format!("{good}insecure = true\npinFirstContact = true\n"), "at most one"),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
