//! `etc/endpoint.toml` of a package of the manager: moves hosts to another gateway. The endpoint is on trial together with the release, and
//! becomes part of the settings when the release is committed.
//!
//! ```toml
//! heartbeatSrv = ["https://new.example:8888", "https://old.example:8888"]
//! caCert = "etc/ca.pem"       # a file of the package; or pin = "…"; without either, certificates are verified as before
//! ```

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use toml::de::DeTable;

use super::{CertificateCheck, Config, LoadedSettings, edit, text};
use crate::core::upgrade::NewEndpoint;
use crate::home::{CA_FILE, Home};
use crate::store::{self, Access};

/// Path in the package.
const FILE: &str = "etc/endpoint.toml";
/// The allowed keys.
const KEYS: [&str; 3] = ["heartbeatSrv", "caCert", "pin"];
const MAX_BYTES: u64 = 64 << 10;
const MAX_CA_BYTES: u64 = 1 << 20;

/// Reads the file of an unpacked package; `None`: it has none.
pub fn read(tree: &Path) -> Result<Option<NewEndpoint>> {
    let Some(bytes) = store::read(&tree.join(FILE), MAX_BYTES)? else { return Ok(None) };
    let attempt = || -> Result<NewEndpoint> {
        let settings = String::from_utf8(bytes).context("it is not UTF-8")?;
        let config = parse(&settings)?;
        let ca_cert = match &config.certificate {
            CertificateCheck::Authority(path) => Some(certificates(tree, path)?),
            _ => None,
        };
        Ok(NewEndpoint { settings, ca_cert })
    };
    attempt().with_context(|| format!("cannot use {FILE} of the package")).map(Some)
}

fn parse(settings: &str) -> Result<Config> {
    let config = Config::parse(settings)?.config;
    let table = DeTable::parse(settings)?;
    for key in table.get_ref().keys() {
        let key: &str = key.get_ref();
        ensure!(KEYS.contains(&key), "the key {key} is not allowed; expected {}", KEYS.join(", "));
    }
    if let Some(plain) = config.heartbeat_srv.iter().find(|endpoint| !endpoint.is_https()) {
        bail!("the endpoint {plain} must begin with https://");
    }
    Ok(config)
}

fn certificates(tree: &Path, path: &Path) -> Result<String> {
    let is_inside = path.components().all(|component| matches!(component, Component::Normal(_)));
    ensure!(is_inside, "caCert {} is not a path inside the package", path.display());
    let bytes = store::read(&tree.join(path), MAX_CA_BYTES)?
        .with_context(|| format!("caCert {} is missing in the package", path.display()))?;
    let text = String::from_utf8(bytes).context("caCert is not UTF-8")?;
    ensure!(text.contains("-----BEGIN CERTIFICATE-----"), "caCert {} contains no PEM certificate", path.display());
    Ok(text)
}

/// The settings with the new endpoint; `ca_file` is the path of its certificates, relative to the home.
fn with_endpoint(config: &Config, new: &NewEndpoint, ca_file: &str) -> Result<Config> {
    let parsed = parse(&new.settings)?;
    let certificate = match parsed.certificate {
        CertificateCheck::System => config.certificate.clone(),
        CertificateCheck::Authority(_) => CertificateCheck::Authority(PathBuf::from(ca_file)),
        other => other,
    };
    Ok(Config { heartbeat_srv: parsed.heartbeat_srv, certificate, ..config.clone() })
}

/// The settings for the trial of a release with a new endpoint. Saves its certificates in `state/`.
pub fn on_trial(home: &Home, config: &Config, new: &NewEndpoint) -> Result<Config> {
    let path = home.endpoint_ca_file();
    if let Some(ca_cert) = &new.ca_cert
        && store::read(&path, MAX_CA_BYTES)?.as_deref() != Some(ca_cert.as_bytes())
    {
        store::replace(&path, ca_cert.as_bytes(), Access::Public)?;
    }
    let relative = path.strip_prefix(home.root()).unwrap_or(&path).display().to_string();
    with_endpoint(config, new, &relative)
}

/// Writes the endpoint of a committed release into the settings. Idempotent.
pub fn commit(home: &Home, new: &NewEndpoint) -> Result<()> {
    let LoadedSettings { config, problem: None, .. } = Config::load(home)? else {
        bail!("cannot change the endpoint in {}: fix the settings first", home.config().display());
    };
    let changed = with_endpoint(&config, new, CA_FILE)?;
    if let Some(ca_cert) = &new.ca_cert {
        store::replace(&home.ca_file(), ca_cert.as_bytes(), Access::Public)?;
    }
    if changed != config {
        let existing = text(home)?.unwrap_or_default();
        let edited = edit(&existing, &config, &changed);
        // If the file is a link, its target is replaced and the link is kept.
        let path = std::fs::canonicalize(home.config()).unwrap_or_else(|_| home.config());
        store::replace(&path, edited.as_bytes(), changed.access())?;
        Config::remember_good(home, &edited)?;
    }
    store::remove(&home.endpoint_ca_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEM: &str = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";

    fn package(settings: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir(tree.path().join("etc")).unwrap();
        std::fs::write(tree.path().join(FILE), settings).unwrap();
        std::fs::write(tree.path().join("etc/ca.pem"), PEM).unwrap();
        tree
    }

    #[test]
    fn a_package_can_set_the_endpoint_and_no_other_key() {
        assert_eq!(read(tempfile::tempdir().unwrap().path()).unwrap(), None);
        for (settings, word) in [
            ("heartbeatSrv = \"http://g:1\"", "must begin with https"),
            ("heartbeatSrv = \"https://g:1\"\nproxy = \"none\"", "proxy is not allowed"),
            ("heartbeatSrv = \"https://g:1\"\ncaCert = \"../ca.pem\"", "not a path inside the package"),
            ("heartbeatSrv = \"https://g:1\"\ncaCert = \"etc/no.pem\"", "is missing in the package"),
            ("caCert = \"etc/ca.pem\"", "heartbeatSrv is missing"),
        ] {
            let error = format!("{:#}", read(package(settings).path()).unwrap_err());
            assert!(error.contains(word), "{settings}: {error}");
        }
    }

    #[test]
    fn a_new_endpoint_is_on_trial_first_and_then_edited_into_the_operators_settings() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for path in [home.etc(), home.state()] {
            std::fs::create_dir(path).unwrap();
        }
        let before = "# mine\nheartbeatSrv = \"https://old:1\"\npinFirstContact = true\nlogMaxSize = \"3MiB\"\n";
        std::fs::write(home.config(), before).unwrap();
        let new = read(package("heartbeatSrv = \"https://new:1\"\ncaCert = \"etc/ca.pem\"").path()).unwrap().unwrap();
        let config = Config::load(&home).unwrap().config;
        let tried = on_trial(&home, &config, &new).unwrap();
        assert_eq!(tried.heartbeat_srv[0].to_string(), "https://new:1");
        assert_eq!(std::fs::read_to_string(tried.certificates(&home).unwrap()).unwrap(), PEM);
        assert_eq!(std::fs::read_to_string(home.config()).unwrap(), before, "a trial changes nothing");
        for _ in 0..2 {
            commit(&home, &new).unwrap();
            let after = std::fs::read_to_string(home.config()).unwrap();
            assert!(after.starts_with("# mine\n") && after.contains("logMaxSize = \"3MiB\""), "{after}");
            let config = Config::load(&home).unwrap().config;
            assert_eq!(config.heartbeat_srv, tried.heartbeat_srv);
            assert_eq!(std::fs::read_to_string(config.certificates(&home).unwrap()).unwrap(), PEM);
        }
        assert!(!home.endpoint_ca_file().exists());
    }
}
