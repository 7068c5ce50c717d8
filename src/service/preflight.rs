//! Everything about an installation that can be known before anything is touched: what stands there, who the host is, which settings,
//! keys and service manager are to be. What comes out, a [`InstallPlan`], only has to be carried out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::first_contact::{self, FirstContact};
use super::{InstallOptions, ProcessContext, ServiceChoice, install_root, legacy, progress};
use crate::config::{self, CertificateCheck, Config, ProxyChoice};
use crate::core::model::{AgentId, Version};
use crate::core::service_manager::ServiceManagerKind;
use crate::endpoint::Proxies;
use crate::home::{CA_FILE, Home};
use crate::host_service;
use crate::host_service::product::{Product, ServiceRegistration};
use crate::installation::keyring::Keyring;
use crate::installation::{self, Epochs, InstallRecord, permissions};
use crate::package::{Keys, trailer};
use crate::{lifecycle, platform, store};

/// A file of certificates: one has 2 kB, the list of a whole system 300.
const MAX_CA_BYTES: u64 = 4 << 20;

/// Wrong usage: what the command line lacks.
#[derive(Debug)]
pub(super) struct UsageError(pub(super) String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// What stands in the home.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ExistingInstallation {
    Nothing,
    /// An installation of aops.
    Aops(InstallRecord),
    /// One of the system that it replaces.
    Old,
}

/// What is to be done.
#[derive(Debug)]
pub(super) struct InstallPlan {
    pub(super) home: Home,
    /// The running executable, which may lie in the home.
    pub(super) executable: PathBuf,
    pub(super) standing: ExistingInstallation,
    pub(super) fresh: bool,
    pub(super) product: String,
    pub(super) kind: ServiceManagerKind,
    /// What a person is to do so that the home is started at boot, where nothing does that.
    pub(super) boot_advice: Option<String>,
    pub(super) agent_id: AgentId,
    pub(super) config: Config,
    /// The whole of `etc/conf.toml`.
    pub(super) config_text: String,
    /// The content of `etc/ca.pem`, where a new one is given.
    pub(super) ca_file: Option<Vec<u8>>,
    /// Where a first contact is trusted: whether it was made.
    pub(super) contact: Option<FirstContact>,
    pub(super) trusted: InstallTrust,
    /// By which a package may be refused as withdrawn.
    pub(super) epochs: Epochs,
    pub(super) version: Option<Version>,
    pub(super) package: Option<PathBuf>,
}

impl InstallPlan {
    /// Whether what stands there is stopped as a whole and taken away, as opposed to renewed.
    pub(super) fn replaces_all(&self) -> bool {
        match self.standing {
            ExistingInstallation::Nothing => false,
            ExistingInstallation::Aops(_) => self.fresh,
            ExistingInstallation::Old => true,
        }
    }

    /// Whose things are taken away then.
    pub(super) fn whose(&self) -> legacy::BackupOwner {
        if self.standing == ExistingInstallation::Old { legacy::BackupOwner::Old } else { legacy::BackupOwner::Ours }
    }

    /// Whether an installation of aops is renewed, with all that it knows.
    pub(super) fn keeps(&self) -> bool {
        matches!(self.standing, ExistingInstallation::Aops(_)) && !self.fresh
    }
}

/// Looks at everything and decides.
pub(super) fn plan(
    options: &InstallOptions,
    surroundings: &ProcessContext,
    home: &Home,
    product: &Product,
) -> Result<InstallPlan> {
    permissions::home(home)?;
    let standing = standing(home)?;
    let keeps = !options.fresh && matches!(standing, ExistingInstallation::Aops(_));

    let (standing_text, standing_config) = if keeps { standing_config(home)? } else { (None, None) };
    let looked = if keeps {
        let certificates = standing_config.as_ref().and_then(|config: &Config| config.certificates(home));
        permissions::files(home, certificates.as_deref())
    } else {
        permissions::way(home)
    };
    if let Err(error) = looked {
        progress::warn(format_args!("{error:#}"));
    }
    let imported = match &options.import {
        Some(directory) => {
            let imported = config::import::read(directory)?;
            if imported == config::import::Imported::default() {
                bail!("cannot import {}: there is neither etc/conf.yml nor an agentId file", directory.display());
            }
            imported
        }
        None if standing == ExistingInstallation::Old && !options.fresh => config::import::read(home.root())?,
        None => config::import::Imported::default(),
    };
    for warning in &imported.warnings {
        progress::warn(warning);
    }

    let given_id = options.agent_id.clone().or(imported.agent_id);
    let standing_id = match installation::agent_id(home) {
        Err(error) if keeps && given_id.is_some() => {
            progress::warn(format_args!("{error:#}; it is written anew"));
            None
        }
        standing if keeps => standing.context("give the host's id with --agent-id")?,
        _ => None,
    };
    let agent_id = given_id.or_else(|| standing_id.clone());
    let Some(agent_id) = agent_id else {
        let missing = match options.endpoint.is_empty() {
            true => "--agent-id and --endpoint are missing, and no installation stands there whose own could be kept",
            false => "--agent-id is missing, and no installation stands there whose id could be kept",
        };
        return Err(UsageError(missing.to_owned()).into());
    };
    if let Some(standing_id) = standing_id.filter(|standing_id| *standing_id != agent_id) {
        progress::say(format_args!("the agent id changes from {standing_id} to {agent_id}"));
    }

    let config = settle(standing_config.as_ref(), imported.config.as_ref(), options);
    let config = with_proxy(config, &Proxies::from_environment(|name| std::env::var(name).ok()));
    if config.heartbeat_srv.is_empty() {
        return Err(UsageError(
            "--endpoint is missing, and no installation stands there whose endpoint could be kept".to_owned(),
        )
        .into());
    }
    if let Some(plain) = config.heartbeat_srv.iter().find(|endpoint| !endpoint.is_https())
        && config.certificate != CertificateCheck::Unchecked
    {
        bail!(
            "cannot use the endpoint {plain}: anybody in between can read and change what goes over http://; use https://, or say --insecure"
        );
    }
    let config_text = match (standing_text, &standing_config) {
        (Some(text), Some(old)) => config::edit(&text, old, &config),
        _ => config::render(&config),
    };

    let ca_file = options.ca_cert.as_deref().map(certificates).transpose()?;
    let contact = first_contact::of(home, keeps, &config.certificate)?;
    let trusted = trusted(options, home, &surroundings.executable, keeps)?;
    let epochs = if keeps { Epochs::load(home)? } else { Epochs::default() };
    let (kind, why) = registration(options.service, product.service, host_service::detect(), platform::is_root());
    if let Some(why) = why {
        progress::say(why);
    }
    let plan = InstallPlan {
        home: home.clone(),
        executable: surroundings.executable.clone(),
        standing,
        fresh: options.fresh,
        product: product.name.clone(),
        kind,
        boot_advice: (kind == ServiceManagerKind::None).then(|| product.boot_advice(&home.control_link())),
        agent_id,
        config,
        config_text,
        ca_file,
        contact,
        trusted,
        epochs,
        version: options.version.clone(),
        package: options.package.clone(),
    };
    feasible(&plan)?;
    Ok(plan)
}

/// Tries what can be tried while nothing is touched: what is bound to fail fails here, before anything is stopped.
fn feasible(plan: &InstallPlan) -> Result<()> {
    let before = host_service::registered_with(&plan.home);
    if before != plan.kind {
        host_service::can_unregister(before, &plan.home)?;
    }
    host_service::can_register(plan.kind, &plan.home)?;
    if plan.replaces_all() {
        legacy::can_set_aside(&plan.home, plan.whose(), &plan.executable)?;
    }
    Ok(())
}

fn standing(home: &Home) -> Result<ExistingInstallation> {
    if install_root::is_half_made(home) {
        return Ok(ExistingInstallation::Nothing);
    }
    if installation::exists(home) {
        // A record that can't be read is none that can be kept; what it says is needed only to take things back.
        let installed = InstallRecord::load(home).unwrap_or_else(|error| {
            progress::warn(format_args!("{error:#}"));
            None
        });
        return Ok(ExistingInstallation::Aops(
            installed.unwrap_or_else(|| InstallRecord::by(lifecycle::service(home))),
        ));
    }
    Ok(if legacy::is_old(home) { ExistingInstallation::Old } else { ExistingInstallation::Nothing })
}

fn standing_config(home: &Home) -> Result<(Option<String>, Option<Config>)> {
    let config = Config::read_strictly(home)
        .context("the settings that stand there are to be kept; correct them, or say --fresh")?;
    if config.is_some() {
        return Ok((config::text(home)?, config));
    }
    // The manager goes by this copy too, as long as there is nothing else.
    let Some((text, config)) = Config::last_good(home) else { return Ok((None, None)) };
    progress::warn(format_args!("{} is missing; the last good copy of it is taken", home.config().display()));
    Ok((Some(text), Some(config)))
}

/// The settings to be: those that stand or were imported, with what the command line says on top. How a home that stands checks the
/// gateway's certificate stays, unless another way is asked for: a first contact is for a home that has no way yet.
fn settle(standing: Option<&Config>, imported: Option<&Config>, options: &InstallOptions) -> Config {
    let mut config = imported.or(standing).cloned().unwrap_or_default();
    if let Some(standing) = standing {
        config.certificate.clone_from(&standing.certificate);
    }
    if !options.endpoint.is_empty() {
        config.heartbeat_srv.clone_from(&options.endpoint);
    }
    if options.ca_cert.is_some() {
        config.certificate = CertificateCheck::Authority(CA_FILE.into());
    } else if !options.pin.is_empty() {
        config.certificate = CertificateCheck::Pinned(options.pin.clone());
    } else if options.insecure {
        config.certificate = CertificateCheck::Unchecked;
    } else if options.pin_first_contact && standing.is_none() && config.certificate == CertificateCheck::System {
        config.certificate = CertificateCheck::FirstContact;
    }
    if let Some(product) = options.product.as_deref() {
        config.product = (product != "auto").then(|| product.to_owned());
    }
    config
}

/// Whoever needs a proxy to install needs it afterwards too, and a service manager gives the manager another environment: the proxy that
/// the environment names for an endpoint is kept, unless the settings say something themselves.
fn with_proxy(config: Config, environment: &Proxies) -> Config {
    let needed = config.heartbeat_srv.iter().find_map(|endpoint| environment.of(endpoint).ok().flatten());
    match needed {
        Some(proxy) if config.proxy == ProxyChoice::Environment => {
            progress::say(format_args!("the environment's proxy {proxy} is kept in the settings (proxy)"));
            let listed = Some(environment.exceptions().to_vec()).filter(|listed| !listed.is_empty());
            Config { proxy: ProxyChoice::Proxy(proxy.clone()), no_proxy: config.no_proxy.clone().or(listed), ..config }
        }
        _ => config,
    }
}

fn certificates(path: &Path) -> Result<Vec<u8>> {
    let bytes = store::read(path, MAX_CA_BYTES)?
        .with_context(|| format!("cannot read the certificates in {}: there is no such file", path.display()))?;
    if !String::from_utf8_lossy(&bytes).contains("-----BEGIN CERTIFICATE-----") {
        bail!("cannot use {} as --ca-cert: expected certificates in PEM", path.display());
    }
    Ok(bytes)
}

/// Whom an installation trusts, and what of that it keeps.
#[derive(Debug, Clone)]
pub(super) struct InstallTrust {
    /// What packages are verified by.
    pub(super) keys: Keys,
    /// Given by the operator.
    pub(super) given: Keys,
    /// Carried by the executable that is run.
    pub(super) carried: Keys,
    /// What `etc/keys` will hold.
    pub(super) etc: Keys,
    /// What is known of the keys that were brought and revoked.
    pub(super) ring: Keyring,
}

fn trusted(options: &InstallOptions, home: &Home, executable: &Path, keeps: bool) -> Result<InstallTrust> {
    let (mut given, mut carried) = (Keys::default(), Keys::default());
    for path in &options.trusted_key {
        given.extend(Keys::read(path)?)?;
    }
    for text in trailer::read(executable)?.unwrap_or_default() {
        carried.extend(Keys::parse(&text)?)?;
    }
    let standing = match keeps {
        true => {
            permissions::keys(home)?;
            (Keyring::load(home)?, Keys::load(&home.keys())?)
        }
        false => Default::default(),
    };
    let (ring, accepted) = standing.0.installed(&given, &carried, &standing.1);
    for key in carried.iter().filter(|key| !accepted.contains(key)) {
        progress::warn(format_args!(
            "the key {} that this executable carries was revoked, and is not trusted",
            key.id()
        ));
    }
    let mut etc = standing.1;
    etc.extend(given.clone())?;
    etc.extend(accepted)?;
    let keys = ring.trusted(&etc, &Keys::baked_in()?)?;
    if keys.is_empty() {
        bail!(
            "there is no key by which packages could be verified; give the gateway's public key with --trusted-key, or install with \
             the executable that the gateway serves for this, which brings it"
        );
    }
    Ok(InstallTrust { keys, given, carried, etc, ring })
}

/// Which service manager the roles are registered with, and why it is none although there is one.
fn registration(
    choice: ServiceChoice,
    product: ServiceRegistration,
    detected: ServiceManagerKind,
    root: bool,
) -> (ServiceManagerKind, Option<String>) {
    match (choice, product, detected) {
        (ServiceChoice::None, _, _) | (_, ServiceRegistration::None, _) | (_, _, ServiceManagerKind::None) => {
            (ServiceManagerKind::None, None)
        }
        (ServiceChoice::Auto, ServiceRegistration::Auto, kind) if root => (kind, None),
        (ServiceChoice::Auto, ServiceRegistration::Auto, kind) => (
            ServiceManagerKind::None,
            Some(format!("not registered with {kind}: that takes root; the roles are started without it")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_service::product;

    fn options() -> InstallOptions {
        InstallOptions { endpoint: vec!["https://new:1".parse().unwrap()], ..InstallOptions::default() }
    }

    #[test]
    fn the_command_line_wins_over_what_stands_and_changes_nothing_else() {
        let standing = Config {
            heartbeat_srv: vec!["https://old:1".parse().unwrap()],
            spm_max_mem: crate::core::units::Size(99 << 20),
            product: Some("hci".to_owned()),
            certificate: CertificateCheck::Authority("etc/mine.pem".into()),
            ..Config::default()
        };
        let settled = settle(Some(&standing), None, &options());
        assert_eq!(settled, Config { heartbeat_srv: options().endpoint, ..standing.clone() });
        assert_eq!(settle(Some(&standing), None, &InstallOptions::default()), standing);

        let told = InstallOptions { product: Some("auto".to_owned()), insecure: true, ..options() };
        let settled = settle(Some(&standing), None, &told);
        assert_eq!((settled.product, settled.certificate), (None, CertificateCheck::Unchecked));
    }

    #[test]
    fn the_first_contact_is_pinned_only_where_nothing_else_was_said() {
        let first = InstallOptions { pin_first_contact: true, ..options() };
        assert_eq!(settle(None, None, &first).certificate, CertificateCheck::FirstContact);
        assert_eq!(settle(None, None, &options()).certificate, CertificateCheck::System);
        // Of the system that is replaced nothing is known but that it took anything.
        assert_eq!(settle(None, Some(&Config::default()), &first).certificate, CertificateCheck::FirstContact);
        // A home that goes by the system's roots goes on doing so, also with the settings of another.
        for imported in [None, Some(&Config { certificate: CertificateCheck::Unchecked, ..Config::default() })] {
            assert_eq!(settle(Some(&Config::default()), imported, &first).certificate, CertificateCheck::System);
        }
        let pinned = CertificateCheck::Pinned(vec!["00".repeat(32).parse().unwrap()]);
        let standing = Config { certificate: pinned.clone(), ..Config::default() };
        assert_eq!(settle(Some(&standing), None, &first).certificate, pinned);
        let ca = InstallOptions { ca_cert: Some("x".into()), ..first };
        assert_eq!(settle(Some(&standing), None, &ca).certificate, CertificateCheck::Authority(CA_FILE.into()));
    }

    #[test]
    fn the_environments_proxy_is_kept_where_an_endpoint_needs_it() {
        let environment = Proxies::from_environment(|name| match name {
            "https_proxy" => Some("http://u:secret@proxy:1".to_owned()),
            "no_proxy" => Some(".inside".to_owned()),
            _ => None,
        });
        let with = |endpoint: &str, proxy| {
            let config = Config { heartbeat_srv: vec![endpoint.parse().unwrap()], proxy, ..Config::default() };
            with_proxy(config, &environment)
        };
        let kept = with("https://gateway.outside", ProxyChoice::Environment);
        assert_eq!(kept.proxy, ProxyChoice::Proxy("http://u:secret@proxy:1".parse().unwrap()));
        assert_eq!(kept.no_proxy, Some(vec![".inside".parse().unwrap()]));
        assert_eq!(with("https://gateway.inside", ProxyChoice::Environment).proxy, ProxyChoice::Environment);
        assert_eq!(with("https://127.0.0.1", ProxyChoice::Environment).proxy, ProxyChoice::Environment);
        assert_eq!(with("https://gateway.outside", ProxyChoice::None).proxy, ProxyChoice::None);
    }

    #[test]
    fn registration_takes_a_service_manager_root_and_a_product_that_wants_it() {
        use ServiceChoice as Choice;
        let decided = |choice, product, detected, root| registration(choice, product, detected, root).0;
        for kind in ServiceManagerKind::ALL.iter().copied() {
            assert_eq!(decided(Choice::Auto, ServiceRegistration::Auto, kind, true), kind);
            assert_eq!(decided(Choice::Auto, ServiceRegistration::Auto, kind, false), ServiceManagerKind::None);
            assert_eq!(decided(Choice::Auto, ServiceRegistration::None, kind, true), ServiceManagerKind::None);
            assert_eq!(decided(Choice::None, ServiceRegistration::Auto, kind, true), ServiceManagerKind::None);
        }
    }

    #[test]
    fn missing_identity_and_endpoint_are_wrong_usage() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let product = product::choose(None).unwrap();
        let surroundings = ProcessContext { home: None, product: None, executable: "/nowhere".into() };
        let refused = |options: &InstallOptions| {
            let error = plan(options, &surroundings, &home, &product).unwrap_err();
            error.downcast_ref::<UsageError>().map(|usage| usage.0.clone())
        };
        assert!(refused(&options()).unwrap().contains("--agent-id"));
        let without_endpoint = InstallOptions { agent_id: Some("1".parse().unwrap()), ..InstallOptions::default() };
        assert!(refused(&without_endpoint).unwrap().contains("--endpoint"));
    }

    #[test]
    fn plain_http_needs_insecure() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let surroundings = ProcessContext { home: None, product: None, executable: "/nowhere".into() };
        let options = InstallOptions {
            agent_id: Some("1".parse().unwrap()),
            endpoint: vec!["http://a:1".parse().unwrap()],
            ..InstallOptions::default()
        };
        let error = plan(&options, &surroundings, &home, &product::choose(None).unwrap()).unwrap_err().to_string();
        assert!(error.contains("--insecure"), "{error}");
    }
}
