//! The operator's settings: `etc/conf.toml`.
//!
//! A key that nobody knows is told by name and line: `install` and `reload` fail on it, a start only warns, because the version rolled
//! back to must start. A file that cannot be read at all costs nothing at a start: the last good copy, `state/conf.good.toml`, is used
//! and the reason reported. Every error names the line, the key, and what is expected there.

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
pub mod moved;

pub use edit::{edit, render};
pub use keys::wrong_line;

/// A settings file is refused beyond this; the template with all its comments has 2 KiB.
const MAX_BYTES: u64 = 256 << 10;

/// How old a file's last change is when nobody is taken to be still writing it.
const SETTLED: Duration = Duration::from_secs(1);

/// What an operator can set, with the defaults where nothing is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The endpoints, tried in order. Never empty in a parsed file.
    pub heartbeat_srv: Vec<Endpoint>,
    pub heartbeat_interval: Span,
    /// Resident memory of the manager above which the watchdog restarts it.
    pub spm_max_mem: Size,
    /// Resident memory of the watchdog above which the manager restarts it.
    pub spa_max_mem: Size,
    /// The time that the download of one package may take, all its tries together.
    pub download_timeout: Span,
    /// For so long nothing may come of a download.
    pub download_stall: Span,
    /// What all downloads together may bring in a second; `None`: as much as they can.
    pub download_rate: Option<Size>,
    pub proxy: ProxyChoice,
    /// What is reached without a proxy; `None`: what the environment lists.
    pub no_proxy: Option<Vec<Exception>>,
    pub certificate: CertificateCheck,
    /// The product named by the operator; `None`: found by its markers.
    pub product: Option<String>,
    /// The size at which a log file is rotated.
    pub log_max_size: Size,
    /// A new release of the manager lives for so long before it is committed.
    pub upgrade_trial: Span,
}

/// How the gateway's certificate is checked; the file has a key for each, of which at most one may be there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CertificateCheck {
    /// By the system's roots.
    #[default]
    System,
    /// `caCert`: by the roots in this file, relative to the home.
    Authority(PathBuf),
    /// `pin`: by being one of these.
    Pinned(Vec<Fingerprint>),
    /// `pinFirstContact`: by being the one seen first.
    FirstContact,
    /// `insecure`: not at all.
    Unchecked,
}

/// Through which proxy the gateway and other hosts are reached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxyChoice {
    /// As the environment says.
    #[default]
    Environment,
    /// `none`: through no proxy, whatever the environment says.
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
            Some(known) => write!(f, " (is {known} meant?)"),
            None => Ok(()),
        }
    }
}

/// What a settings file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedSettings {
    pub config: Config,
    pub unknown: Vec<UnknownKey>,
}

/// What holds at a start.
#[derive(Debug)]
pub struct LoadedSettings {
    pub config: Config,
    /// To be warned of.
    pub unknown: Vec<UnknownKey>,
    /// Why `etc/conf.toml` could not be used, where it could not: `config` is then the last good copy.
    pub problem: Option<anyhow::Error>,
}

impl Config {
    /// Reads the text of a settings file.
    pub fn parse(text: &str) -> Result<ParsedSettings> {
        keys::parse(text)
    }

    /// Reads `etc/conf.toml` as `install` and `reload` do: an unknown key is an error too. `None` where there is no file.
    pub fn read_strictly(home: &Home) -> Result<Option<Config>> {
        let path = home.config();
        let Some(text) = read_text(&path)? else { return Ok(None) };
        let advice = || format!("cannot use the settings in {}", path.display());
        let parsed = Config::parse(&text).with_context(advice)?;
        if !parsed.unknown.is_empty() {
            let listed: Vec<String> = parsed.unknown.iter().map(UnknownKey::to_string).collect();
            return Err(anyhow::anyhow!("{}", listed.join("; "))).with_context(advice);
        }
        Ok(Some(parsed.config))
    }

    /// The settings for a start. Fails only where neither the file nor the last good copy can be used.
    pub fn load(home: &Home) -> Result<LoadedSettings> {
        let last_good = home.last_good_config();
        match read_settled(&home.config()) {
            Ok((text, ParsedSettings { config, unknown })) => {
                // A copy that cannot be kept is no reason not to start.
                let problem = remember(&last_good, &text).err();
                if let Some(error) = problem {
                    tracing::warn!(error = format!("{error:#}"), "the last good settings could not be kept");
                }
                Ok(LoadedSettings { config, unknown, problem: None })
            }
            Err(problem) => match last_good_of(&last_good) {
                Some((_, ParsedSettings { config, unknown })) => {
                    Ok(LoadedSettings { config, unknown, problem: Some(problem) })
                }
                None => Err(problem),
            },
        }
    }

    /// Keeps `text` as the last good settings, so that the next start need not wait whether somebody is still writing them.
    pub fn remember_good(home: &Home, text: &str) -> Result<()> {
        remember(&home.last_good_config(), text)
    }

    /// The last good settings, and their text, where there is a copy that can be used.
    pub fn last_good(home: &Home) -> Option<(String, Config)> {
        last_good_of(&home.last_good_config()).map(|(text, parsed)| (text, parsed.config))
    }

    /// The file of certificates that the settings name.
    pub fn certificates(&self, home: &Home) -> Option<PathBuf> {
        match &self.certificate {
            CertificateCheck::Authority(path) => Some(home.root().join(path)),
            _ => None,
        }
    }

    /// How the gateway's certificate is checked, with the paths of this home.
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
    /// Which proxies are used; `variable` is the environment's.
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

    /// A client for one of the ways out of this host, which all go by the same trust and the same proxies.
    pub fn client(&self, trust: &Trust, agent_id: &AgentId, timeouts: Timeouts) -> Result<Client> {
        Client::with_proxies(&self.proxies(|name| std::env::var(name).ok()), trust, Some(agent_id), timeouts)
    }

    /// How long is waited for what in a download.
    pub fn download_timeouts(&self) -> Timeouts {
        Timeouts::download(self.download_stall.0)
    }

    /// Who may read the settings file: nobody else where there is a password in it.
    pub fn access(&self) -> store::Access {
        match &self.proxy {
            ProxyChoice::Proxy(proxy) if proxy.has_secret() => store::Access::Private,
            _ => store::Access::Public,
        }
    }
}

fn last_good_of(path: &Path) -> Option<(String, ParsedSettings)> {
    let text = read_text(path).ok().flatten()?;
    let parsed = Config::parse(&text).ok()?;
    Some((text, parsed))
}

fn remember(last_good: &Path, text: &str) -> Result<()> {
    if store::read(last_good, MAX_BYTES).ok().flatten().as_deref() == Some(text.as_bytes()) {
        return Ok(());
    }
    store::replace(last_good, text.as_bytes(), store::Access::Private)
}

/// The whole text of `etc/conf.toml`; `None` where there is no file.
pub fn text(home: &Home) -> Result<Option<String>> {
    read_text(&home.config())
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = store::read(path, MAX_BYTES)? else { return Ok(None) };
    let text = String::from_utf8(bytes).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))?;
    Ok(Some(text))
}

/// Reads a file that people edit in place: one that was changed a moment ago is read again until it stays as it is.
fn read_settled(path: &Path) -> Result<(String, ParsedSettings)> {
    let read = || read_text(path)?.with_context(|| format!("cannot read {}: there is no such file", path.display()));
    let mut text = read()?;
    for _ in 0..10 {
        if !changed_just_now(path) {
            break;
        }
        platform::pause(SETTLED / 4);
        let again = read()?;
        if again == text && Config::parse(&text).is_ok() {
            break;
        }
        text = again;
    }
    let parsed = Config::parse(&text).with_context(|| format!("cannot use the settings in {}", path.display()))?;
    Ok((text, parsed))
}

fn changed_just_now(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    // A time in the future says nothing about writers.
    changed.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < SETTLED))
}

#[cfg(test)]
mod tests;
