//! Writes settings so that a person finds them as they were left: only the values that differ are changed, every comment stays.

use toml::Value;
use toml::de::DeTable;

use super::keys::{KEYS, certificate_key};
use super::{CertificateCheck, Config, ProxyChoice};

/// What a new installation begins with: every key explained, every default commented out.
const TEMPLATE: &str = include_str!("../../assets/conf.toml");

/// The settings as a new file.
pub fn render(config: &Config) -> String {
    let mut text = TEMPLATE.to_owned();
    for key in KEYS {
        text = put(&text, key, literal(config, key).as_deref());
    }
    text
}

/// `text`, which says `old`, changed to say `new`. What is the same in both stays as the operator wrote it.
pub fn edit(text: &str, old: &Config, new: &Config) -> String {
    let mut edited = text.to_owned();
    for key in KEYS {
        let wanted = literal(new, key);
        if literal(old, key) != wanted {
            edited = put(&edited, key, wanted.as_deref());
        }
    }
    // Whatever odd notation stood there: what is written must say what is meant.
    match Config::parse(&edited) {
        Ok(parsed) if parsed.config == *new => edited,
        _ => render(new),
    }
}

/// A key's value in TOML; `None` where it is the default.
fn literal(config: &Config, key: &str) -> Option<String> {
    let default = Config::default();
    let text = |text: String| Value::String(text).to_string();
    let one_or_many = |mut items: Vec<String>| match items.len() {
        0 => None,
        1 => Some(text(items.remove(0))),
        _ => Some(Value::Array(items.into_iter().map(Value::String).collect()).to_string()),
    };
    match key {
        "heartbeatSrv" => one_or_many(config.heartbeat_srv.iter().map(ToString::to_string).collect()),
        "heartbeatInterval" => (config.heartbeat_interval != default.heartbeat_interval)
            .then(|| text(config.heartbeat_interval.to_string())),
        "downloadTimeout" => {
            (config.download_timeout != default.download_timeout).then(|| text(config.download_timeout.to_string()))
        }
        "downloadStall" => {
            (config.download_stall != default.download_stall).then(|| text(config.download_stall.to_string()))
        }
        "downloadRate" => config.download_rate.map(|rate| text(format!("{rate}/s"))),
        "proxy" => match &config.proxy {
            ProxyChoice::Environment => None,
            ProxyChoice::None => Some(text("none".to_owned())),
            ProxyChoice::Proxy(proxy) => Some(text(proxy.with_secret().to_owned())),
        },
        "noProxy" => config.no_proxy.as_ref().map(|except| {
            Value::Array(except.iter().map(|item| Value::String(item.to_string())).collect()).to_string()
        }),
        "spmMaxMem" => (config.spm_max_mem != default.spm_max_mem).then(|| text(config.spm_max_mem.to_string())),
        "spaMaxMem" => (config.spa_max_mem != default.spa_max_mem).then(|| text(config.spa_max_mem.to_string())),
        "logMaxSize" => (config.log_max_size != default.log_max_size).then(|| text(config.log_max_size.to_string())),
        "upgradeTrial" => {
            (config.upgrade_trial != default.upgrade_trial).then(|| text(config.upgrade_trial.to_string()))
        }
        "product" => config.product.clone().map(text),
        _ if certificate_key(&config.certificate) == Some(key) => match &config.certificate {
            CertificateCheck::Authority(path) => Some(text(path.display().to_string())),
            CertificateCheck::Pinned(pins) => one_or_many(pins.iter().map(ToString::to_string).collect()),
            _ => Some("true".to_owned()),
        },
        _ => None,
    }
}

/// Gives `key` the value `literal`, or takes it out. Text that is no TOML stays as it is.
fn put(text: &str, key: &str, literal: Option<&str>) -> String {
    let Ok(table) = DeTable::parse(text) else { return text.to_owned() };
    let standing = table.get_ref().iter().find(|(name, _)| name.get_ref().as_ref() == key);
    match (standing.map(|(name, value)| (name.span(), value.span())), literal) {
        (Some((_, value)), Some(literal)) => format!("{}{literal}{}", &text[..value.start], &text[value.end..]),
        (Some((name, value)), None) => {
            let start = text[..name.start].rfind('\n').map_or(0, |end| end + 1);
            let end = text[value.end..].find('\n').map_or(text.len(), |end| value.end + end + 1);
            format!("{}{}", &text[..start], &text[end..])
        }
        (None, Some(literal)) => insert(text, key, literal),
        (None, None) => text.to_owned(),
    }
}

/// In place of the key's commented default where there is one, else at the end (before the first table, which would swallow it).
fn insert(text: &str, key: &str, literal: &str) -> String {
    let line = format!("{key} = {literal}\n");
    let mut start = 0;
    let mut table = None;
    for content in text.split_inclusive('\n') {
        let commented = content.trim_start().strip_prefix('#').and_then(|rest| rest.trim_start().strip_prefix(key));
        if commented.is_some_and(|rest| rest.trim_start().starts_with('=')) {
            return format!("{}{line}{}", &text[..start], &text[start + content.len()..]);
        }
        if table.is_none() && content.trim_start().starts_with('[') {
            table = Some(start);
        }
        start += content.len();
    }
    let (before, after) = text.split_at(table.unwrap_or(text.len()));
    let gap = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    format!("{before}{gap}{line}{after}")
}
