//! Writes settings without disturbing the operator's file: only changed values are replaced, and every comment stays.

use toml::Value;
use toml::de::DeTable;

use super::keys::{KEYS, certificate_key};
use super::{CertificateCheck, Config, ProxyChoice};

/// The settings file of a new installation: every key explained, every default commented out.
pub const TEMPLATE: &str = include_str!("../../assets/conf.toml");

/// The text of a new settings file.
pub fn render(config: &Config) -> String {
    let mut text = TEMPLATE.to_owned();
    for key in KEYS {
        text = put(&text, key, literal(config, key).as_deref());
    }
    text
}

/// Changes `text` from the settings `old` to `new`. Values that are the same in both stay as the operator wrote them.
pub fn edit(text: &str, old: &Config, new: &Config) -> String {
    let mut edited = text.to_owned();
    for key in KEYS {
        let wanted = literal(new, key);
        if literal(old, key) != wanted {
            edited = put(&edited, key, wanted.as_deref());
        }
    }
    // In case an unusual notation was edited wrongly, the result must parse as `new`.
    match Config::parse(&edited) {
        Ok(parsed) if parsed.config == *new => edited,
        _ => render(new),
    }
}

/// The value of a key in TOML; `None`: it is the default.
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

/// Sets `key` to `literal`, or removes it. Text that is not TOML stays unchanged.
fn put(text: &str, key: &str, literal: Option<&str>) -> String {
    let Ok(table) = DeTable::parse(text) else { return text.to_owned() };
    let existing = table.get_ref().iter().find(|(name, _)| name.get_ref().as_ref() == key);
    match (existing.map(|(name, value)| (name.span(), value.span())), literal) {
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

/// Replaces the key's commented default if there is one, else inserts at the end, but before the first table, which would contain the key.
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
