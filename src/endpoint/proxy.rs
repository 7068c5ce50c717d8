//! Selects the proxy for a host: from the operator's settings, else from the environment.
//!
//! Proxies are used with HTTP CONNECT and cannot read the TLS content. User and password are part of the proxy's address; all output
//! omits them, and only the settings file holds them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Result, bail};
use ureq::{Proxy, ProxyProtocol};

use super::Endpoint;

/// Longer addresses and longer lists of exceptions are rejected.
const MAX_ADDRESS_BYTES: usize = 2048;
const MAX_EXCEPTIONS: usize = 256;

/// The address of a proxy: `http://user:password@host:port`, or with `https`; user and password are optional.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    text: String,
    proxy: Proxy,
}

impl ProxyUrl {
    /// The address with user and password, for the settings file only.
    pub fn with_secret(&self) -> &str {
        &self.text
    }

    pub fn has_secret(&self) -> bool {
        self.proxy.username().is_some()
    }

    pub(super) fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// Host and port as in the address, if the proxy is reached over TLS.
    pub(super) fn tls_authority(&self) -> Option<String> {
        let is_tls = self.proxy.protocol() == ProxyProtocol::Https;
        self.proxy.uri().authority().filter(|_| is_tls).map(ToString::to_string)
    }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.proxy.protocol() == ProxyProtocol::Https { "https" } else { "http" };
        write!(f, "{scheme}://{}:{}", self.proxy.host(), self.proxy.port())
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProxyUrl({self})")
    }
}

/// Why a text is not a [`ProxyUrl`]. It omits the text, which may contain a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadProxy(&'static str);

impl fmt::Display for BadProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; expected an address such as http://proxy.example:3128, or http://user:password@proxy.example:3128",
            self.0
        )
    }
}

impl std::error::Error for BadProxy {}

impl FromStr for ProxyUrl {
    type Err = BadProxy;

    fn from_str(text: &str) -> Result<ProxyUrl, BadProxy> {
        let text = text.trim();
        let text = text.strip_suffix('/').filter(|text| !text.ends_with('/')).unwrap_or(text);
        if text.is_empty()
            || text.len() > MAX_ADDRESS_BYTES
            || text.chars().any(|c| c.is_control() || c.is_whitespace())
        {
            return Err(BadProxy("it is not a valid address"));
        }
        let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let scheme = with_scheme.split("://").next().unwrap_or_default();
        if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
            return Err(BadProxy("only http:// and https:// proxies are supported"));
        }
        let proxy = Proxy::new(&with_scheme).map_err(|_| BadProxy("it is not a valid address"))?;
        if proxy.host().is_empty() {
            return Err(BadProxy("the host is missing"));
        }
        Ok(ProxyUrl { text: with_scheme, proxy })
    }
}

/// A host that is reached without a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exception {
    /// `*`
    All,
    /// `gateway.example`: the host and its subdomains; with a port, that port alone.
    Host { name: String, port: Option<u16> },
    /// `.example` or `*.example`: the subdomains only.
    Below { name: String, port: Option<u16> },
    /// `10.0.0.0/8`, `10.1.2.3`, `fd00::/8`: literal IP addresses; names are not resolved.
    Network { address: IpAddr, bits: u32, port: Option<u16> },
}

impl Exception {
    fn covers(&self, endpoint: &Endpoint) -> bool {
        let host = without_brackets(endpoint.host());
        let same_port = |port: &Option<u16>| port.is_none_or(|port| port == endpoint.port());
        match self {
            Exception::All => true,
            Exception::Host { name, port } => same_port(port) && (host == name || is_below(host, name)),
            Exception::Below { name, port } => same_port(port) && is_below(host, name),
            Exception::Network { address, bits, port } => {
                same_port(port) && host.parse().is_ok_and(|host| same_bits(host, *address, *bits))
            }
        }
    }
}

fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn is_below(host: &str, name: &str) -> bool {
    host.strip_suffix(name).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

fn same_bits(one: IpAddr, other: IpAddr, bits: u32) -> bool {
    let (one, other, width) = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (u128::from(one.to_bits()), u128::from(other.to_bits()), 32),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits(), other.to_bits(), 128),
        _ => return false,
    };
    bits == 0 || (one ^ other) >> (width - bits.min(width)) == 0
}

/// Why a text is not an [`Exception`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadException;

impl FromStr for Exception {
    type Err = BadException;

    fn from_str(text: &str) -> Result<Exception, BadException> {
        let text = text.trim().to_ascii_lowercase();
        if text == "*" {
            return Ok(Exception::All);
        }
        if let Ok(address) = without_brackets(&text).parse::<IpAddr>() {
            return Ok(Exception::Network { address, bits: width(address), port: None });
        }
        if let Some((address, bits)) = text.split_once('/') {
            let address: IpAddr = without_brackets(address).parse().map_err(|_| BadException)?;
            let bits = bits.parse().ok().filter(|bits| *bits <= width(address)).ok_or(BadException)?;
            return Ok(Exception::Network { address, bits, port: None });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().map_err(|_| BadException)?)),
            None => (text.as_str(), None),
        };
        if let Ok(address) = without_brackets(host).parse::<IpAddr>() {
            return Ok(Exception::Network { address, bits: width(address), port });
        }
        let below = host.strip_prefix('*').unwrap_or(host);
        let name = below.trim_matches('.');
        let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') || !c.is_ascii();
        if name.is_empty() || !name.chars().all(fit) || (below.len() < host.len() && !below.starts_with('.')) {
            return Err(BadException);
        }
        let name = name.to_owned();
        Ok(if below.starts_with('.') { Exception::Below { name, port } } else { Exception::Host { name, port } })
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = match self {
            Exception::All => return f.write_str("*"),
            Exception::Host { name, port } => {
                f.write_str(name)?;
                port
            }
            Exception::Below { name, port } => {
                write!(f, ".{name}")?;
                port
            }
            Exception::Network { address, bits, port } => {
                match (address, port) {
                    (IpAddr::V6(address), Some(_)) => write!(f, "[{address}]")?,
                    _ => write!(f, "{address}")?,
                }
                if *bits != width(*address) {
                    write!(f, "/{bits}")?;
                }
                port
            }
        };
        port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// The proxies for each scheme, and the exceptions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    https: Option<ConfiguredProxy>,
    http: Option<ConfiguredProxy>,
    except: Vec<Exception>,
}

/// A proxy, and where it was configured.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ConfiguredProxy {
    source: String,
    proxy: Result<ProxyUrl, BadProxy>,
}

impl Proxies {
    /// One proxy for both schemes, from the settings.
    pub fn from_settings(proxy: &ProxyUrl, except: &[Exception]) -> Proxies {
        let named = ConfiguredProxy { source: "the settings (proxy)".to_owned(), proxy: Ok(proxy.clone()) };
        Proxies { https: Some(named.clone()), http: Some(named), except: except.to_vec() }
    }

    /// From the environment, in lower or upper case: `https_proxy`, `http_proxy`, `all_proxy`, with the exceptions in `no_proxy`.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Proxies {
        let value = |name: &str| {
            let names = [name.to_owned(), name.to_ascii_uppercase()];
            names.into_iter().find_map(|name| Some((variable(&name).filter(|text| !text.trim().is_empty())?, name)))
        };
        let named = |name: &str| {
            let (text, source) = value(name).or_else(|| value("all_proxy"))?;
            Some(ConfiguredProxy { source, proxy: text.parse() })
        };
        let listed = value("no_proxy").map(|(text, _)| text).unwrap_or_default();
        let except = listed.split([',', ' ']).filter_map(|item| item.parse().ok()).take(MAX_EXCEPTIONS).collect();
        Proxies { https: named("https_proxy"), http: named("http_proxy"), except }
    }

    /// The same proxies with different exceptions.
    pub fn with_exceptions(self, except: &[Exception]) -> Proxies {
        Proxies { except: except.to_vec(), ..self }
    }

    pub fn exceptions(&self) -> &[Exception] {
        &self.except
    }

    /// The proxy for an endpoint; none for this host itself.
    pub fn of(&self, endpoint: &Endpoint) -> Result<Option<&ProxyUrl>> {
        if endpoint.is_loopback() || self.except.iter().any(|exception| exception.covers(endpoint)) {
            return Ok(None);
        }
        let named = if endpoint.is_https() { &self.https } else { &self.http };
        match named {
            None => Ok(None),
            Some(ConfiguredProxy { proxy: Ok(proxy), .. }) => Ok(Some(proxy)),
            Some(ConfiguredProxy { proxy: Err(why), source }) => bail!(
                "cannot use the proxy in {source}: {why}; fix the address, or list {} in noProxy (in the environment NO_PROXY)",
                endpoint.host()
            ),
        }
    }

    /// Host and port of the proxies that are reached over TLS.
    pub(super) fn tls_authorities(&self) -> Vec<String> {
        let proxies = [&self.https, &self.http].into_iter().flatten().filter_map(|named| named.proxy.as_ref().ok());
        proxies.filter_map(ProxyUrl::tls_authority).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Proxies {
        Proxies::from_environment(|name| {
            pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn through(proxies: &Proxies, url: &str) -> Option<String> {
        proxies.of(&url.parse().unwrap()).unwrap().map(ToString::to_string)
    }

    #[test]
    fn a_proxy_is_shown_without_its_password() {
        for (text, shown) in [
            ("http://user:secret@proxy.example:3128", "http://proxy.example:3128"),
            ("https://user:secret@proxy.example/", "https://proxy.example:443"),
            ("user:secret@proxy.example:80", "http://proxy.example:80"),
        ] {
            let proxy: ProxyUrl = text.parse().unwrap();
            assert!(proxy.with_secret().contains("user:secret@") && proxy.has_secret(), "{text}");
            assert_eq!(proxy.to_string(), shown);
            let debugged = format!("{proxy:?} {:?}", Proxies::from_settings(&proxy, &[]));
            assert!(!debugged.contains("secret"), "{debugged}");
        }
        assert!(!"http://proxy.example:3128".parse::<ProxyUrl>().unwrap().has_secret());
        for bad in ["", "socks5://u:secret@h:1", "http://", "http://a b", "ftp://secret@h"] {
            let error = bad.parse::<ProxyUrl>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn exceptions_are_parsed_in_their_usual_spellings_and_shown_in_the_same_form() {
        for (text, covered, others) in [
            ("*", &["https://a.example", "https://10.1.2.3"][..], &[][..]),
            (
                "Gateway.example",
                &["https://gateway.example:8888", "https://a.gateway.example"],
                &["https://mygateway.example", "https://example"],
            ),
            (".example", &["https://a.example", "https://a.b.example"], &["https://example", "https://aexample"]),
            ("*.example", &["https://a.example"], &["https://example"]),
            ("gateway.example:8888", &["https://gateway.example:8888"], &["https://gateway.example"]),
            ("10.0.0.0/8", &["https://10.255.0.1:1"], &["https://11.0.0.1", "https://ten.example"]),
            ("10.1.2.3", &["https://10.1.2.3:9"], &["https://10.1.2.4"]),
            ("10.1.2.3:9", &["https://10.1.2.3:9"], &["https://10.1.2.3:8"]),
            ("0.0.0.0/0", &["https://10.1.2.3"], &["https://[fd00::1]"]),
            ("fd00::/8", &["https://[fdff::1]"], &["https://[fe00::1]", "https://10.1.2.3"]),
            ("[fd00::1]:5", &["https://[fd00::1]:5"], &["https://[fd00::1]"]),
        ] {
            let exception: Exception = text.parse().unwrap();
            assert_eq!(exception.to_string().parse(), Ok(exception.clone()), "{text}");
            for url in covered {
                assert!(exception.covers(&url.parse().unwrap()), "{text} {url}");
            }
            for url in others {
                assert!(!exception.covers(&url.parse().unwrap()), "{text} {url}");
            }
        }
        for bad in ["", ".", "10.0.0.0/33", "a/8", "a:b", "*x", "a b", "http://a"] {
            assert_eq!(bad.parse::<Exception>(), Err(BadException), "{bad}");
        }
    }

    #[test]
    fn the_environment_names_a_proxy_for_each_scheme() {
        let both =
            environment(&[("https_proxy", "http://a:1"), ("HTTP_PROXY", "b:2"), ("NO_PROXY", "c.example, .d ,bad/")]);
        assert_eq!(through(&both, "https://x").as_deref(), Some("http://a:1"));
        assert_eq!(through(&both, "http://x").as_deref(), Some("http://b:2"));
        for without in ["https://c.example", "https://e.d", "https://127.0.0.1:1", "https://localhost", "https://[::1]"]
        {
            assert_eq!(through(&both, without), None, "{without}");
        }
        assert_eq!(through(&environment(&[("ALL_PROXY", "http://a:1")]), "https://x").as_deref(), Some("http://a:1"));
        // A proxy for one scheme is not used for the other, and an empty variable counts as unset.
        assert_eq!(through(&environment(&[("http_proxy", "http://a:1"), ("https_proxy", "")]), "https://x"), None);
        let socks = environment(&[("all_proxy", "socks5://u:secret@h:1")]);
        let error = socks.of(&"https://x".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("all_proxy") && error.contains("only http://") && !error.contains("secret"), "{error}");
    }
}
