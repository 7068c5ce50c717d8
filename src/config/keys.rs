//! The keys of the settings and their allowed values, independent of the notation (TOML, or YAML in an old installation).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use toml::de::{DeTable, DeValue};

use super::{CertificateCheck, Config, ParsedSettings, ProxyChoice, UnknownKey};
use crate::core::units::{Size, Span};
use crate::endpoint::Exception;

/// All keys, in the order of the template.
pub(super) const KEYS: &[&str] = &[
    "heartbeatSrv",
    "heartbeatInterval",
    "spmMaxMem",
    "spaMaxMem",
    "downloadTimeout",
    "downloadStall",
    "downloadRate",
    "proxy",
    "noProxy",
    "caCert",
    "pin",
    "pinFirstContact",
    "insecure",
    "product",
    "logMaxSize",
    "upgradeTrial",
];

/// Limit for the endpoints, and for the pins.
const MAX_ITEMS: usize = 16;
const MAX_EXCEPTIONS: usize = 256;

/// A value as written, in any notation.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RawValue {
    Text(String),
    Number(String),
    Bool(bool),
    List(Vec<RawValue>),
    Other,
}

/// The expected value of a key, for an error message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExpectedValue(String);

impl std::fmt::Display for ExpectedValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The known key that differs from `key` only in case, `-` and `_`.
pub(super) fn similar(key: &str) -> Option<&'static str> {
    let plain = |key: &str| key.to_ascii_lowercase().replace(['-', '_'], "");
    KEYS.iter().copied().find(|known| plain(known) == plain(key))
}

/// The line, counted from 1, of a position in a text.
pub(super) fn line_of(text: &str, position: usize) -> usize {
    1 + text.as_bytes()[..position.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// A TOML error with its line number, as a single line for logs, tables and heartbeats.
pub fn wrong_line(text: &str, error: &toml::de::Error) -> String {
    let line = line_of(text, error.span().map_or(0, |span| span.start));
    format!("line {line}: {}", error.message().trim().replace('\n', ", "))
}

pub(super) fn parse(text: &str) -> Result<ParsedSettings> {
    let table = DeTable::parse(text).map_err(|error| anyhow!("{}", wrong_line(text, &error)))?;
    let mut config = Config::default();
    let mut unknown = Vec::new();
    for (key, value) in table.get_ref() {
        let line = line_of(text, key.span().start);
        let name: &str = key.get_ref();
        if !KEYS.contains(&name) {
            unknown.push(UnknownKey { key: name.to_owned(), line });
            continue;
        }
        set(&mut config, name, &raw_value(value.get_ref()))
            .map_err(|expected| anyhow!("line {line}: cannot use the value of {name}: expected {expected}"))?;
    }
    if config.heartbeat_srv.is_empty() {
        bail!(
            "the key heartbeatSrv is missing: expected the gateway's endpoint, such as \"https://gateway.example:8888\""
        );
    }
    unknown.sort_by_key(|unknown| unknown.line);
    Ok(ParsedSettings { config, unknown })
}

fn raw_value(value: &DeValue<'_>) -> RawValue {
    match value {
        DeValue::String(text) => RawValue::Text(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => RawValue::Number(number.as_str().to_owned()),
        DeValue::Boolean(flag) => RawValue::Bool(*flag),
        DeValue::Array(items) => RawValue::List(items.iter().map(|item| raw_value(item.get_ref())).collect()),
        _ => RawValue::Other,
    }
}

/// Sets one key, which must be one of [`KEYS`]. Fails if more than one way to verify certificates is set.
pub(super) fn set(config: &mut Config, key: &str, value: &RawValue) -> Result<(), ExpectedValue> {
    match key {
        "heartbeatSrv" => {
            config.heartbeat_srv =
                list(value, "the gateway's endpoint, such as \"https://gateway.example:8888\", or a list of them")?;
        }
        "heartbeatInterval" => {
            config.heartbeat_interval = span(value, Duration::from_secs(1), Duration::from_secs(3_600))?
        }
        "downloadTimeout" => {
            config.download_timeout = span(value, Duration::from_secs(1), Duration::from_secs(86_400))?
        }
        "downloadStall" => config.download_stall = span(value, Duration::from_secs(1), Duration::from_secs(600))?,
        // At a lower rate, simultaneous downloads would each be so slow that they count as stalled.
        "downloadRate" => config.download_rate = Some(rate(value, 64 << 10, 1 << 40)?),
        "proxy" => {
            let expected = "the address of a proxy, such as \"http://proxy.example:3128\" or \
                            \"http://user:password@proxy.example:3128\", or \"none\"";
            let address = text(value, expected)?;
            config.proxy = match address.as_str() {
                "none" => ProxyChoice::None,
                address => {
                    ProxyChoice::Proxy(address.parse().map_err(|why| ExpectedValue(format!("{expected}; {why}")))?)
                }
            };
        }
        "noProxy" => {
            let expected = "the hosts to reach without the proxy, such as [\"gateway.example\", \".example\", \"10.0.0.0/8\", \
                            \"gateway.example:8888\"], or \"*\"";
            config.no_proxy = Some(exceptions(value, expected)?);
        }
        // The manager needs 3 MiB idle and about 10 MiB while it unpacks, the watchdog 2 MiB. A lower limit would restart them repeatedly.
        "spmMaxMem" => config.spm_max_mem = size(value, 16 << 20, 1 << 40)?,
        "spaMaxMem" => config.spa_max_mem = size(value, 8 << 20, 1 << 40)?,
        "upgradeTrial" => config.upgrade_trial = span(value, Duration::from_secs(5), Duration::from_secs(600))?,
        "logMaxSize" => config.log_max_size = size(value, 64 << 10, 1 << 40)?,
        "product" => config.product = Some(text(value, "the name of a product, such as \"generic\"")?),
        "caCert" => {
            let path = text(value, "the path of a file with certificates, such as \"etc/ca.pem\"")?;
            set_certificate(config, CertificateCheck::Authority(PathBuf::from(path)))?;
        }
        "pin" => {
            let pins = list(value, "a SHA-256 of 64 hexadecimal digits in quotes, or a list of them")?;
            set_certificate(config, CertificateCheck::Pinned(pins))?;
        }
        "pinFirstContact" if boolean(value)? => set_certificate(config, CertificateCheck::FirstContact)?,
        "insecure" if boolean(value)? => set_certificate(config, CertificateCheck::Unchecked)?,
        _ => {}
    }
    Ok(())
}

/// The key that sets this way to verify certificates.
pub(super) fn certificate_key(certificate: &CertificateCheck) -> Option<&'static str> {
    match certificate {
        CertificateCheck::System => None,
        CertificateCheck::Authority(_) => Some("caCert"),
        CertificateCheck::Pinned(_) => Some("pin"),
        CertificateCheck::FirstContact => Some("pinFirstContact"),
        CertificateCheck::Unchecked => Some("insecure"),
    }
}

fn set_certificate(config: &mut Config, value: CertificateCheck) -> Result<(), ExpectedValue> {
    if config.certificate != CertificateCheck::System {
        let other = certificate_key(&config.certificate).unwrap_or("another of them");
        return Err(ExpectedValue(format!(
            "at most one of caCert, pin, pinFirstContact and insecure, but {other} is set too"
        )));
    }
    config.certificate = value;
    Ok(())
}

fn text(value: &RawValue, expected: &str) -> Result<String, ExpectedValue> {
    match value {
        RawValue::Text(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        _ => Err(ExpectedValue(expected.to_owned())),
    }
}

fn boolean(value: &RawValue) -> Result<bool, ExpectedValue> {
    match value {
        RawValue::Bool(flag) => Ok(*flag),
        _ => Err(ExpectedValue("true or false".to_owned())),
    }
}

/// One text, or a list of 1 to [`MAX_ITEMS`] texts.
fn list<T: std::str::FromStr>(value: &RawValue, expected: &str) -> Result<Vec<T>, ExpectedValue> {
    let unexpected = || ExpectedValue(expected.to_owned());
    let one = |item: &RawValue| text(item, expected)?.parse().map_err(|_| unexpected());
    match value {
        RawValue::Text(_) => Ok(vec![one(value)?]),
        RawValue::List(items) if (1..=MAX_ITEMS).contains(&items.len()) => items.iter().map(one).collect(),
        _ => Err(unexpected()),
    }
}

/// One text of items separated by commas, or a list of items; may be empty.
fn exceptions(value: &RawValue, expected: &str) -> Result<Vec<Exception>, ExpectedValue> {
    let unexpected = || ExpectedValue(expected.to_owned());
    let items: Vec<&str> = match value {
        RawValue::Text(text) => text.split([',', ' ']).filter(|item| !item.is_empty()).collect(),
        RawValue::List(items) => items
            .iter()
            .map(|item| match item {
                RawValue::Text(text) => Ok(text.as_str()),
                _ => Err(unexpected()),
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(unexpected()),
    };
    if items.len() > MAX_EXCEPTIONS {
        return Err(unexpected());
    }
    items.into_iter().map(|item| item.parse().map_err(|_| unexpected())).collect()
}

/// A size per second.
fn rate(value: &RawValue, min: u64, max: u64) -> Result<Size, ExpectedValue> {
    let expected = || ExpectedValue(format!("a rate such as \"10MiB/s\", from {}/s to {}/s", Size(min), Size(max)));
    let parsed = match value {
        RawValue::Text(text) => text.trim().strip_suffix("/s").and_then(Size::parse),
        _ => None,
    };
    parsed.filter(|size| (min..=max).contains(&size.0)).ok_or_else(expected)
}

fn span(value: &RawValue, min: Duration, max: Duration) -> Result<Span, ExpectedValue> {
    let parsed = match value {
        RawValue::Text(text) | RawValue::Number(text) => Span::parse(text),
        _ => None,
    };
    parsed.filter(|span| (min..=max).contains(&span.0)).ok_or_else(|| {
        ExpectedValue(format!(
            "a duration such as \"30s\" or a whole number of seconds, from {} to {}",
            Span(min),
            Span(max)
        ))
    })
}

fn size(value: &RawValue, min: u64, max: u64) -> Result<Size, ExpectedValue> {
    let parsed = match value {
        RawValue::Text(text) | RawValue::Number(text) => Size::parse(text),
        _ => None,
    };
    parsed.filter(|size| (min..=max).contains(&size.0)).ok_or_else(|| {
        ExpectedValue(format!("a size such as \"64MiB\" or a whole number of MiB, from {} to {}", Size(min), Size(max)))
    })
}
