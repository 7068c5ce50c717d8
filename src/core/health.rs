//! `[health]` of an `agent.toml`: how to check the health of a sub-agent.
//!
//! Exactly one of `http`, `tcp` and `exec`. All limits are defined here. A value outside of its limits is rejected with its name, when the
//! package is published and again when it is staged.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::paths::stays_inside;
use super::units::Span;

const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_FAILURES: u32 = 3;
const DEFAULT_START_PERIOD: Duration = Duration::from_secs(30);

/// Limits of `interval`: more frequent checks would cost more than they are worth.
const INTERVALS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
const TIMEOUTS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(300));
const MAX_FAILURES: u32 = 100;
const MAX_START_PERIOD: Duration = Duration::from_secs(3600);
/// Limit for a URL, bytes.
const MAX_URL_BYTES: usize = 2048;
const MAX_ARGUMENTS: usize = 256;

/// How a sub-agent's health is checked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawHealth")]
pub struct HealthSpec {
    pub check: CheckTarget,
    /// From the end of one check to the start of the next.
    pub interval: Duration,
    /// A check that takes longer fails.
    pub timeout: Duration,
    /// Number of consecutive failures that trigger a restart.
    pub failures: u32,
    /// Time after the start during which failures do not count; it ends with the first successful check.
    pub start_period: Duration,
}

/// The target of the check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckTarget {
    /// Healthy: a GET returns 2xx or 3xx.
    Http(Url),
    /// Healthy: a connection is accepted.
    Tcp(Address),
    /// A program, relative to the package, and its arguments. Healthy: exit code 0.
    Exec(Vec<String>),
}

/// A host, as name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// An IPv6 address is without brackets.
    pub host: String,
    pub port: u16,
}

/// An `http` or `https` URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    pub tls: bool,
    pub address: Address,
    /// Path and query, with the leading slash.
    pub path: String,
}

/// The section as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawHealth {
    http: Option<String>,
    tcp: Option<String>,
    exec: Option<Vec<String>>,
    interval: Option<Span>,
    timeout: Option<Span>,
    failures: Option<u32>,
    start_period: Option<Span>,
}

impl TryFrom<RawHealth> for HealthSpec {
    type Error = String;

    fn try_from(written: RawHealth) -> Result<HealthSpec, String> {
        let RawHealth { http, tcp, exec, interval, timeout, failures, start_period } = written;
        let check = match (http, tcp, exec) {
            (Some(url), None, None) => {
                CheckTarget::Http(url.parse().map_err(|why| format!("[health] http {url:?} {why}"))?)
            }
            (None, Some(address), None) => {
                CheckTarget::Tcp(address.parse().map_err(|why| format!("[health] tcp {address:?} {why}"))?)
            }
            (None, None, Some(words)) => CheckTarget::Exec(program(words)?),
            (None, None, None) => return Err("[health] has no check: set one of http, tcp, exec".into()),
            _ => return Err("[health] has more than one of http, tcp, exec: set only one".into()),
        };
        let failures = failures.unwrap_or(DEFAULT_FAILURES);
        if !(1..=MAX_FAILURES).contains(&failures) {
            return Err(format!("[health] failures must be from 1 to {MAX_FAILURES}"));
        }
        Ok(HealthSpec {
            check,
            interval: within("interval", interval, DEFAULT_INTERVAL, INTERVALS)?,
            timeout: within("timeout", timeout, DEFAULT_TIMEOUT, TIMEOUTS)?,
            failures,
            start_period: within(
                "startPeriod",
                start_period,
                DEFAULT_START_PERIOD,
                (Duration::ZERO, MAX_START_PERIOD),
            )?,
        })
    }
}

fn within(
    key: &str,
    written: Option<Span>,
    default: Duration,
    (least, most): (Duration, Duration),
) -> Result<Duration, String> {
    let span = written.map_or(default, |span| span.0);
    if (least..=most).contains(&span) {
        return Ok(span);
    }
    let least = if least.is_zero() { "0s".to_owned() } else { Span(least).to_string() };
    Err(format!("[health] {key} must be from {least} to {}", Span(most)))
}

fn program(words: Vec<String>) -> Result<Vec<String>, String> {
    match words.first() {
        None => Err("[health] exec is empty: set the program, relative to the package, and its arguments".into()),
        Some(program) if !stays_inside(program) => {
            Err(format!("[health] exec {program:?} is not a path inside the package"))
        }
        _ if words.len() > MAX_ARGUMENTS => Err(format!("[health] exec has more than {MAX_ARGUMENTS} words")),
        _ if words.iter().any(|word| word.contains('\0')) => {
            Err("[health] exec has a word that contains a zero byte".into())
        }
        _ => Ok(words),
    }
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Address, &'static str> {
        const WRONG: &str = "is not host:port, such as \"127.0.0.1:9100\"";
        let (host, port) = text.rsplit_once(':').ok_or(WRONG)?;
        Ok(Address { host: host_of(host).ok_or(WRONG)?, port: port_of(port).ok_or(WRONG)? })
    }
}

impl FromStr for Url {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Url, &'static str> {
        const WRONG: &str = "is not an http:// or https:// URL, such as \"http://127.0.0.1:9100/healthz\"";
        let visible = text.len() <= MAX_URL_BYTES && text.chars().all(|c| c.is_ascii_graphic()) && !text.contains('#');
        let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) if visible => (false, rest),
            (_, Some(rest)) if visible => (true, rest),
            _ => return Err(WRONG),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        // In a bracketed address without a port, the last colon does not begin a port.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port_of(port).ok_or(WRONG)?),
            _ => (authority, if tls { 443 } else { 80 }),
        };
        Ok(Url { tls, address: Address { host: host_of(host).ok_or(WRONG)?, port }, path })
    }
}

fn port_of(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0 && text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn host_of(text: &str) -> Option<String> {
    if let Some(inner) = text.strip_prefix('[') {
        let inner = inner.strip_suffix(']')?;
        return inner.parse::<::core::net::Ipv6Addr>().is_ok().then(|| inner.to_owned());
    }
    let named = !text.is_empty()
        && text.len() <= 253
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    named.then(|| text.to_owned())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.address, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<HealthSpec, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn keys_that_are_absent_have_defaults() {
        let health = read(r#"tcp = "localhost:80""#).unwrap();
        assert_eq!(health.check, CheckTarget::Tcp(Address { host: "localhost".into(), port: 80 }));
        let seconds = [health.interval, health.timeout, health.start_period].map(|span| span.as_secs());
        assert_eq!((seconds, health.failures), ([10, 5, 30], 3));
        let health =
            read("exec = [\"bin/check\", \"-v\"]\ninterval = 1\ntimeout = \"250ms\"\nfailures = 1\nstartPeriod = 0")
                .unwrap();
        assert_eq!(health.check, CheckTarget::Exec(vec!["bin/check".into(), "-v".into()]));
        assert_eq!((health.timeout.as_millis(), health.start_period), (250, Duration::ZERO));
    }

    #[test]
    fn exactly_one_check_is_required() {
        for (text, why) in [
            ("", "set one of http, tcp, exec"),
            ("interval = 5", "set one of http, tcp, exec"),
            ("tcp = \"a:1\"\nhttp = \"http://a\"", "more than one"),
            ("tcp = \"a:1\"\nexec = [\"x\"]", "more than one"),
        ] {
            assert!(read(text).unwrap_err().contains(why), "{text}");
        }
    }

    #[test]
    fn a_value_outside_of_its_limits_is_rejected_by_its_name() {
        for (line, name) in [
            ("interval = \"900ms\"", "interval must be from 1s to 1h"),
            ("interval = \"2h\"", "interval"),
            ("timeout = 0", "timeout must be from 100ms to 5m"),
            ("timeout = \"301s\"", "timeout"),
            ("failures = 0", "failures must be from 1 to 100"),
            ("failures = 101", "failures"),
            ("startPeriod = \"3601s\"", "startPeriod must be from 0s to 1h"),
            ("retries = 3", "unknown field `retries`"),
        ] {
            let error = read(&format!("tcp = \"a:1\"\n{line}")).unwrap_err();
            assert!(error.contains(name), "{line}: {error}");
        }
    }

    #[test]
    fn addresses_and_urls_are_parsed_or_rejected() {
        for (text, host, port) in
            [("a-b.c:1", "a-b.c", 1), ("[::1]:65535", "::1", 65535), ("10.0.0.1:80", "10.0.0.1", 80)]
        {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port, address.to_string()), (host, port, text.to_owned()));
        }
        for bad in
            ["", "a", ":80", "a:", "a:0", "a:65536", "a:+1", "::1:80", "[::1]", "[zz]:1", "[::1:1", "a b:1", "u@a:1"]
        {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        for (text, shown) in [
            ("http://a", "http://a:80/"),
            ("https://a/x?y=/z", "https://a:443/x?y=/z"),
            ("http://[::1]?q", "http://[::1]:80/?q"),
            ("http://[::1]:81/", "http://[::1]:81/"),
        ] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), shown);
        }
        let long = format!("http://a/{}", "x".repeat(MAX_URL_BYTES));
        for bad in [
            "",
            "a",
            "ftp://a",
            "http://",
            "http:///x",
            "http://u@a/",
            "http://a/ b",
            "http://a/\r\nX: y",
            "http://a#f",
            "http://a:x",
            &long,
        ] {
            assert!(bad.parse::<Url>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        /// No text panics, and an accepted one parses back to the same value.
        #[test]
        fn an_accepted_url_or_address_parses_back(text in "(https?://)?[\\[\\]a-z0-9.:/?#@ é-]{0,24}") {
            if let Ok(url) = text.parse::<Url>() {
                assert_eq!(url.to_string().parse(), Ok(url));
            }
            if let Ok(address) = text.parse::<Address>() {
                assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }

    #[test]
    fn the_program_of_a_check_is_inside_the_package() {
        for bad in [r#"exec = []"#, r#"exec = ["/bin/true"]"#, r#"exec = ["../x"]"#, r#"exec = ["x", "\u0000"]"#] {
            assert!(read(bad).unwrap_err().contains("[health] exec"), "{bad}");
        }
    }
}
