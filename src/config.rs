//! The operator's settings: `etc/conf.toml`.
//!
//! An unknown key is reported by name and line. `install` fails on it; a start and a hot reload only warn, because the previous release
//! must be able to start after a roll back. If the file is invalid, the last good copy, `state/conf.good.toml`, is used and the reason is
//! reported. Every error names the line, the key, and the expected value.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::core::model::AgentId;
use crate::core::units::{Size, Span};
use crate::endpoint::{Client, Endpoint, Exception, Fingerprint, Proxies, ProxyUrl, Timeouts, Trust};
use crate::home::Home;
use crate::{platform, store};

mod edit;
pub mod import;
mod keys;
pub mod new_endpoint;

pub use edit::{TEMPLATE, edit, render};
pub use keys::wrong_line;

/// Limit for a settings file, bytes; the template with all its comments has 2 KiB.
const MAX_BYTES: u64 = 256 << 10;

/// A file whose last change is older than this counts as completely written.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// The settings, with defaults for absent keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The endpoints, tried in order. Never empty in a parsed file.
    pub heartbeat_srv: Vec<Endpoint>,
    pub heartbeat_interval: Span,
    /// Resident memory of the manager above which the watchdog restarts it.
    pub spm_max_mem: Size,
    /// Resident memory of the watchdog above which the manager restarts it.
    pub spa_max_mem: Size,
    /// Timeout of the download of one package, all attempts together.
    pub download_timeout: Span,
    /// A download fails if it receives no data for this time.
    pub download_stall: Span,
    /// Limit for all downloads together, bytes per second; `None`: unlimited.
    pub download_rate: Option<Size>,
    pub proxy: ProxyChoice,
    /// Hosts that are reached without a proxy; `None`: those of the environment.
    pub no_proxy: Option<Vec<Exception>>,
    pub certificate: CertificateCheck,
    /// The product set by the operator; `None`: detected by its markers.
    pub product: Option<String>,
    /// The size at which a log file is rotated.
    pub log_max_size: Size,
    /// Time that a new release of the manager must run before it is committed.
    pub upgrade_trial: Span,
}

/// How the gateway's certificate is verified. Each way has a key of its own, and at most one may be set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CertificateCheck {
    /// By the system's roots.
    #[default]
    System,
    /// `caCert`: by the roots in this file, whose path is relative to the home.
    Authority(PathBuf),
    /// `pin`: by these fingerprints.
    Pinned(Vec<Fingerprint>),
    /// `pinFirstContact`: by the certificate of the first connection.
    FirstContact,
    /// `insecure`: not at all.
    Unchecked,
}

/// The proxy for the gateway and other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxyChoice {
    /// The proxy of the environment variables.
    #[default]
    Environment,
    /// `none`: no proxy, whatever the environment variables are.
    None,
    Proxy(ProxyUrl),
}

impl Default for Config {
    fn default() -> Config {
        Config {
            heartbeat_srv: Vec::new(),
            heartbeat_interval: Span(Duration::from_secs(30)),
            spm_max_mem: Size(64 << 20),
            spa_max_mem: Size(32 << 20),
            download_timeout: Span(Duration::from_secs(600)),
            download_stall: Span(Duration::from_secs(30)),
            download_rate: None,
            proxy: ProxyChoice::Environment,
            no_proxy: None,
            certificate: CertificateCheck::System,
            product: None,
            log_max_size: Size(8 << 20),
            upgrade_trial: Span(Duration::from_secs(30)),
        }
    }
}

/// A key that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKey {
    pub key: String,
    /// Counted from 1.
    pub line: usize,
}

impl fmt::Display for UnknownKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: unknown key {:?}", self.line, self.key)?;
        match keys::similar(&self.key) {
            Some(known) => write!(f, " (did you mean {known}?)"),
            None => Ok(()),
        }
    }
}

/// A parsed settings file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedSettings {
    pub config: Config,
    pub unknown: Vec<UnknownKey>,
}

/// The settings in effect at a start.
#[derive(Debug)]
pub struct LoadedSettings {
    pub config: Config,
    /// Unknown keys, to warn about.
    pub unknown: Vec<UnknownKey>,
    /// Why `etc/conf.toml` cannot be used; `config` is the last good copy then.
    pub problem: Option<anyhow::Error>,
}

impl Config {
    /// Parses the text of a settings file.
    pub fn parse(text: &str) -> Result<ParsedSettings> {
        keys::parse(text)
    }

    /// Reads `etc/conf.toml` for `install`: an unknown key is an error too. `None`: the file does not exist.
    pub fn read_strictly(home: &Home) -> Result<Option<Config>> {
        let path = home.config();
        let Some(text) = read_text(&path)? else { return Ok(None) };
        let context = || format!("cannot use the settings in {}", path.display());
        let parsed = Config::parse(&text).with_context(context)?;
        if !parsed.unknown.is_empty() {
            let listed: Vec<String> = parsed.unknown.iter().map(UnknownKey::to_string).collect();
            return Err(anyhow::anyhow!("{}", listed.join("; "))).with_context(context);
        }
        Ok(Some(parsed.config))
    }

    /// The settings for a start. Fails only if neither the file nor the last good copy can be used.
    pub fn load(home: &Home) -> Result<LoadedSettings> {
        let last_good = home.last_good_config();
        match read_when_settled(&home.config()) {
            Ok((text, ParsedSettings { config, unknown })) => {
                // A copy that cannot be saved does not prevent a start.
                let problem = save_last_good(&last_good, &text).err();
                if let Some(error) = problem {
                    tracing::warn!(error = format!("{error:#}"), "cannot save the copy of the last good settings");
                }
                Ok(LoadedSettings { config, unknown, problem: None })
            }
            Err(problem) => match load_last_good(&last_good) {
                Some((_, ParsedSettings { config, unknown })) => {
                    Ok(LoadedSettings { config, unknown, problem: Some(problem) })
                }
                None => Err(problem),
            },
        }
    }

    /// Saves `text` as the last good settings, so that the next start need not wait until the file is completely written.
    pub fn remember_good(home: &Home, text: &str) -> Result<()> {
        save_last_good(&home.last_good_config(), text)
    }

    /// The last good settings and their text, if there is a valid copy.
    pub fn last_good(home: &Home) -> Option<(String, Config)> {
        load_last_good(&home.last_good_config()).map(|(text, parsed)| (text, parsed.config))
    }

    /// The path of the `caCert` file, if it is set.
    pub fn certificates(&self, home: &Home) -> Option<PathBuf> {
        match &self.certificate {
            CertificateCheck::Authority(path) => Some(home.root().join(path)),
            _ => None,
        }
    }

    /// How the gateway's certificate is verified, with the paths of this home.
    pub fn trust(&self, home: &Home) -> Trust {
        match &self.certificate {
            CertificateCheck::System => Trust::System,
            CertificateCheck::Authority(path) => Trust::CaFile(home.root().join(path)),
            CertificateCheck::Pinned(pins) => Trust::Pin { pins: pins.clone(), learned: home.gateway_keys() },
            CertificateCheck::FirstContact => Trust::FirstContact { pins: home.pins() },
            CertificateCheck::Unchecked => Trust::Insecure,
        }
    }
}

impl Config {
    /// The proxies to use; `variable` reads an environment variable.
    pub fn proxies(&self, variable: impl Fn(&str) -> Option<String>) -> Proxies {
        let proxies = match &self.proxy {
            ProxyChoice::Environment => Proxies::from_environment(variable),
            ProxyChoice::None => Proxies::default(),
            ProxyChoice::Proxy(proxy) => {
                let listed = Proxies::from_environment(variable);
                Proxies::from_settings(proxy, listed.exceptions())
            }
        };
        match &self.no_proxy {
            Some(except) => proxies.with_exceptions(except),
            None => proxies,
        }
    }

    /// A client for connections out of this host; all use the same proxies.
    pub fn client(&self, trust: &Trust, agent_id: &AgentId, timeouts: Timeouts) -> Result<Client> {
        Client::with_proxies(&self.proxies(|name| std::env::var(name).ok()), trust, Some(agent_id), timeouts)
    }

    /// The timeouts of a download.
    pub fn download_timeouts(&self) -> Timeouts {
        Timeouts::download(self.download_stall.0)
    }

    /// The access to the settings file: for its owner only if it contains a password.
    pub fn access(&self) -> store::Access {
        match &self.proxy {
            ProxyChoice::Proxy(proxy) if proxy.has_secret() => store::Access::Private,
            _ => store::Access::Public,
        }
    }
}

fn load_last_good(path: &Path) -> Option<(String, ParsedSettings)> {
    let text = read_text(path).ok().flatten()?;
    let parsed = Config::parse(&text).ok()?;
    Some((text, parsed))
}

fn save_last_good(last_good: &Path, text: &str) -> Result<()> {
    if store::read(last_good, MAX_BYTES).ok().flatten().as_deref() == Some(text.as_bytes()) {
        return Ok(());
    }
    store::replace(last_good, text.as_bytes(), store::Access::Private)
}

/// The text of `etc/conf.toml`; `None`: the file does not exist.
pub fn text(home: &Home) -> Result<Option<String>> {
    read_text(&home.config())
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = store::read(path, MAX_BYTES)? else { return Ok(None) };
    let text = String::from_utf8(bytes).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))?;
    Ok(Some(text))
}

/// Reads a file that operators edit in place. If it was changed a moment ago, it is read again until it no longer changes.
fn read_when_settled(path: &Path) -> Result<(String, ParsedSettings)> {
    let read = || read_text(path)?.with_context(|| format!("cannot read {}: no such file", path.display()));
    let mut text = read()?;
    for _ in 0..10 {
        if !changed_recently(path) {
            break;
        }
        platform::pause(SETTLE_TIME / 4);
        let again = read()?;
        if again == text && Config::parse(&text).is_ok() {
            break;
        }
        text = again;
    }
    let parsed = Config::parse(&text).with_context(|| format!("cannot use the settings in {}", path.display()))?;
    Ok((text, parsed))
}

fn changed_recently(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    // A time in the future, after a change of the clock, does not count as recent.
    changed.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < SETTLE_TIME))
}

#[cfg(test)]
mod tests;
