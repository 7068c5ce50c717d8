//! Addresses of gateways, verification of their certificates, and a blocking HTTP client.
//!
//! An [`Endpoint`] is the base address of a gateway, or of a directory that holds packages. It never has a user, a query or a fragment, so
//! joining a path to it cannot lead elsewhere. A [`Fingerprint`] identifies a certificate or a public key. [`Trust`] selects the accepted
//! certificates, and [`Client`] is this program's only HTTP client.

mod certificate;
mod client;
mod pins;
mod proxy;
mod stall;
mod tls;
mod trust;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use ureq::http::Uri;

use crate::core::text::hex;

pub use certificate::{end_of, key_of};
pub use client::{Client, Disconnector, ForeignRedirect, HttpResponse, Requester, Timeouts, is_transient};
pub use pins::{add_pins, expect_first_contact};
pub use proxy::{Exception, Proxies, ProxyUrl};
pub use tls::unverified_tls;
pub use trust::{Distrust, Trust};

/// Longer addresses are rejected.
const MAX_ADDRESS_BYTES: usize = 2048;

/// Whether the connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Scheme::Http => 80,
            Scheme::Https => 443,
        }
    }
}

/// A base address: `http` or `https`, a host, a port, and an optional path prefix (without a slash at its end).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    scheme: Scheme,
    /// Lower case; an IPv6 address in brackets.
    host: String,
    port: u16,
    /// Empty, or starts with a slash.
    prefix: String,
}

/// Why a text is not an [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadEndpoint {
    got: String,
    why: String,
}

impl fmt::Display for BadEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = without_user(&self.got).chars().take(120).collect();
        write!(
            f,
            "cannot use {shown:?} as an endpoint: {}; expected an address such as https://gateway.example:8888",
            self.why
        )
    }
}

impl std::error::Error for BadEndpoint {}

/// Removes the user and the password from an address.
fn without_user(address: &str) -> String {
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) => format!("{scheme}{}...{}", if scheme.is_empty() { "" } else { "://" }, &rest[at..]),
        None => address.to_owned(),
    }
}

impl Endpoint {
    /// `https://host:port`, always with the port. Pins and the agent id belong to an origin.
    pub fn origin(&self) -> String {
        format!("{}://{}:{}", self.scheme.as_str(), self.host, self.port)
    }

    pub fn is_https(&self) -> bool {
        self.scheme == Scheme::Https
    }

    /// The host as in the address: lower case, an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the address is this host; such addresses are never reached through a proxy.
    pub fn is_loopback(&self) -> bool {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse::<std::net::IpAddr>() {
            Ok(std::net::IpAddr::V6(address)) => {
                address.is_loopback() || address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback())
            }
            Ok(address) => address.is_loopback(),
            Err(_) => bare == "localhost" || bare.ends_with(".localhost"),
        }
    }

    /// The full URL of `path`, which starts with a slash, below this endpoint.
    pub fn url(&self, path: &str) -> String {
        format!("{self}{path}")
    }

    /// The endpoint below this one at `path`, which starts with a slash.
    pub fn below(&self, path: &str) -> Endpoint {
        Endpoint { prefix: format!("{}{}", self.prefix, path.trim_end_matches('/')), ..self.clone() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.host)?;
        if self.port != self.scheme.default_port() {
            write!(f, ":{}", self.port)?;
        }
        f.write_str(&self.prefix)
    }
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        let refuse = |why: &str| BadEndpoint { got: text.to_owned(), why: why.to_owned() };
        if text.len() > MAX_ADDRESS_BYTES {
            return Err(refuse("the address is too long"));
        }
        let trimmed = text.trim();
        if !trimmed.contains("://") {
            return Err(refuse("it does not start with https:// or http://"));
        }
        let uri: Uri = trimmed.parse().map_err(|error| refuse(&format!("{error}")))?;
        let scheme = match uri.scheme_str() {
            Some("https") => Scheme::Https,
            Some("http") => Scheme::Http,
            _ => return Err(refuse("the scheme is neither http nor https")),
        };
        let authority = uri.authority().ok_or_else(|| refuse("the host is missing"))?;
        if authority.as_str().contains('@') {
            return Err(refuse("a user name or password is not allowed"));
        }
        if uri.query().is_some() || trimmed.contains('#') {
            return Err(refuse("a query (?) or fragment (#) is not allowed"));
        }
        if authority.host().is_empty() {
            return Err(refuse("the host is missing"));
        }
        // The grammar of an authority allows more characters, which occur in no resolvable name and are special in many formats.
        let host = authority.host();
        let is_address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let is_address = is_address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
        let is_name = host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
        if !authority.as_str().starts_with(host) || !(is_address || is_name) {
            return Err(refuse("the host is not a valid name or IP address"));
        }
        let port = match authority.as_str().strip_prefix(authority.host()) {
            None | Some("" | ":") => scheme.default_port(),
            Some(_) => match authority.port_u16() {
                Some(port) if port != 0 => port,
                _ => return Err(refuse("the port is not a number from 1 to 65535")),
            },
        };
        let prefix = uri.path().trim_end_matches('/');
        if prefix.split('/').any(|part| part == "." || part == "..") {
            return Err(refuse("the path contains . or .."));
        }
        Ok(Endpoint { scheme, host: authority.host().to_ascii_lowercase(), port, prefix: prefix.to_owned() })
    }
}

impl TryFrom<String> for Endpoint {
    type Error = BadEndpoint;

    fn try_from(text: String) -> Result<Self, BadEndpoint> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> String {
        endpoint.to_string()
    }
}

/// The SHA-256 of a certificate (its DER) or of its public key (the DER of its SubjectPublicKeyInfo). Shown as `sha256:` and 64
/// hexadecimal digits; read in that form, bare, in upper case, or with the colons that `openssl x509 -fingerprint -sha256` prints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

/// Why a text is not a [`Fingerprint`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadFingerprint(String);

impl fmt::Display for BadFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = self.0.chars().take(120).collect();
        write!(
            f,
            "cannot use {shown:?} as a certificate's SHA-256: expected 64 hexadecimal digits, as \
             `openssl x509 -noout -fingerprint -sha256 -in CERT` prints them"
        )
    }
}

impl std::error::Error for BadFingerprint {}

impl Fingerprint {
    /// The fingerprint of `der`: a whole certificate, or a SubjectPublicKeyInfo.
    pub fn of(der: &[u8]) -> Fingerprint {
        Fingerprint(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = BadFingerprint;

    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let bad = || BadFingerprint(text.to_owned());
        let lower = text.trim().to_ascii_lowercase();
        let bare = lower.strip_prefix("sha256").unwrap_or(&lower);
        let bare = bare.trim_start().strip_prefix("fingerprint").unwrap_or(bare);
        let digits: Vec<u8> = bare.trim_start_matches([':', '=', '/', ' ']).bytes().filter(|b| *b != b':').collect();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Fingerprint(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = BadFingerprint;

    fn try_from(text: String) -> Result<Self, BadFingerprint> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
