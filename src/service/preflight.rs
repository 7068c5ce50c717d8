//! The checks and decisions of an installation before anything is changed: the existing installation, the agent id, the settings, the keys
//! and the service manager. The result is an [`InstallPlan`].

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
use crate::installation::packaged::{self, PackageRecord};
use crate::installation::{self, Epochs, InstallRecord, permissions};
use crate::package::{Keys, trailer};
use crate::{lifecycle, platform, store};

/// Size limit of a file of certificates. One certificate has 2 kB, the list of a whole system 300 kB.
const MAX_CA_BYTES: u64 = 4 << 20;

/// Wrong usage: what is missing on the command line.
#[derive(Debug)]
pub(super) struct UsageError(pub(super) String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// The installation that is in the home already.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ExistingInstallation {
    Nothing,
    /// An installation of aops.
    Aops(InstallRecord),
    /// An installation of the system that aops replaces.
    Old,
}

/// The decisions of an installation.
#[derive(Debug)]
pub(super) struct InstallPlan {
    pub(super) home: Home,
    /// The running executable, which may be in the home.
    pub(super) executable: PathBuf,
    pub(super) existing: ExistingInstallation,
    pub(super) fresh: bool,
    pub(super) product: String,
    /// The service manager to register with.
    pub(super) kind: ServiceManagerKind,
    /// How a person can have the home started at boot, if no service manager does.
    pub(super) boot_advice: Option<String>,
    pub(super) agent_id: AgentId,
    pub(super) config: Config,
    /// The content of `etc/conf.toml`.
    pub(super) config_text: String,
    /// The content of `etc/ca.pem`, if a new one is given.
    pub(super) ca_file: Option<Vec<u8>>,
    /// If the first contact is trusted: whether it has happened.
    pub(super) contact: Option<FirstContact>,
    pub(super) trusted: InstallTrust,
    /// Packages of a lower epoch are rejected.
    pub(super) epochs: Epochs,
    pub(super) version: Option<Version>,
    pub(super) package: Option<PathBuf>,
    /// The package of the host that owns the executable.
    pub(super) packaged: Option<PackageRecord>,
    /// Whether the release of that package is installed, without a download.
    pub(super) uses_packaged: bool,
}

impl InstallPlan {
    /// Whether the existing installation is stopped and set aside completely.
    pub(super) fn replaces_all(&self) -> bool {
        match self.existing {
            ExistingInstallation::Nothing => false,
            ExistingInstallation::Aops(_) => self.fresh,
            ExistingInstallation::Old => true,
        }
    }

    /// Which files are set aside then.
    pub(super) fn backup_owner(&self) -> legacy::BackupOwner {
        if self.existing == ExistingInstallation::Old { legacy::BackupOwner::Old } else { legacy::BackupOwner::Aops }
    }

    /// Whether an existing installation of aops keeps its state, settings and keys.
    pub(super) fn keeps(&self) -> bool {
        matches!(self.existing, ExistingInstallation::Aops(_)) && !self.fresh
    }
}

/// Checks the host and the home, and decides.
pub(super) fn plan(
    options: &InstallOptions,
    context: &ProcessContext,
    home: &Home,
    product: &Product,
) -> Result<InstallPlan> {
    permissions::home(home)?;
    let existing = existing_installation(home)?;
    let keeps = !options.fresh && matches!(existing, ExistingInstallation::Aops(_));

    let (existing_text, existing_config) = if keeps { existing_config_of(home)? } else { (None, None) };
    let checked = if keeps {
        let certificates = existing_config.as_ref().and_then(|config: &Config| config.certificates(home));
        permissions::files(home, certificates.as_deref())
    } else {
        permissions::parents(home)
    };
    if let Err(error) = checked {
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
        None if existing == ExistingInstallation::Old && !options.fresh => config::import::read(home.root())?,
        None => config::import::Imported::default(),
    };
    for warning in &imported.warnings {
        progress::warn(warning);
    }

    let given_id = options.agent_id.clone().or(imported.agent_id);
    let existing_id = match installation::agent_id(home) {
        Err(error) if keeps && given_id.is_some() => {
            progress::warn(format_args!("{error:#}; the file is replaced"));
            None
        }
        existing_id if keeps => existing_id.context("give the host's id with --agent-id")?,
        _ => None,
    };
    let agent_id = given_id.or_else(|| existing_id.clone());
    let Some(agent_id) = agent_id else {
        let missing = match options.endpoint.is_empty() {
            true => "--agent-id and --endpoint are missing, and there is no existing installation to take them from",
            false => "--agent-id is missing, and there is no existing installation to take it from",
        };
        return Err(UsageError(missing.to_owned()).into());
    };
    if let Some(existing_id) = existing_id.filter(|existing_id| *existing_id != agent_id) {
        progress::say(format_args!("the agent id changes from {existing_id} to {agent_id}"));
    }

    // Settings that were put there before the enrolment are kept.
    let (packaged_text, packaged_config) =
        if packaged::is_unenrolled(home) { packaged_config_of(home)? } else { (None, None) };
    let others = imported.config.as_ref().or(packaged_config.as_ref());
    let config = merge(existing_config.as_ref(), others, options);
    let config = with_proxy(config, &Proxies::from_environment(|name| std::env::var(name).ok()));
    if config.heartbeat_srv.is_empty() {
        return Err(UsageError(
            "--endpoint is missing, and there is no existing installation to take it from".to_owned(),
        )
        .into());
    }
    if let Some(plain) = config.heartbeat_srv.iter().find(|endpoint| !endpoint.is_https())
        && config.certificate != CertificateCheck::Unchecked
    {
        bail!(
            "cannot use the endpoint {plain}: http:// is neither encrypted nor authenticated; use https://, or give --insecure"
        );
    }
    let config_text = match (existing_text.or(packaged_text), existing_config.as_ref().or(packaged_config.as_ref())) {
        (Some(text), Some(old)) => config::edit(&text, old, &config),
        _ => config::render(&config),
    };

    let ca_file = options.ca_cert.as_deref().map(read_certificates).transpose()?;
    let contact = first_contact::of(home, keeps, &config.certificate)?;
    let trusted = trusted(options, home, &context.executable, keeps)?;
    let epochs = if keeps { Epochs::load(home)? } else { Epochs::default() };
    let (kind, note) = registration(options.service, product.service, host_service::detect(), platform::is_root());
    if let Some(note) = note {
        progress::say(note);
    }
    let packaged = PackageRecord::load(home)?;
    if let Some(record) = &packaged {
        check_packaged(home, record, &existing, options.fresh)?;
    }
    // A later self-upgrade has replaced the executable; an enrolled host updates like any other.
    let is_first = existing == ExistingInstallation::Nothing && options.version.is_none() && options.package.is_none();
    let uses_packaged = match &packaged {
        Some(record) if is_first => record.is_in_place(home)?,
        _ => false,
    };
    let plan = InstallPlan {
        home: home.clone(),
        executable: context.executable.clone(),
        existing,
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
        packaged,
        uses_packaged,
    };
    check_feasible(&plan)?;
    Ok(plan)
}

/// Rejects what would move the files of a package aside.
fn check_packaged(home: &Home, record: &PackageRecord, existing: &ExistingInstallation, fresh: bool) -> Result<()> {
    let (shown, removal) = (home.root().display(), record.package_manager.removal());
    match existing {
        ExistingInstallation::Old => bail!(
            "cannot take over the old installation in {shown}: the package aops is installed there, too; remove it with `{removal}`, \
             take over the old installation with the installer, aops-agent-service, and install the package again"
        ),
        ExistingInstallation::Aops(_) if fresh => bail!(
            "cannot use --fresh: {shown} belongs to the package aops; run `aops control uninstall`, which keeps the package's files, and \
             repeat the command without --fresh"
        ),
        _ => Ok(()),
    }
}

/// Checks that registering and setting aside will succeed, before anything is stopped.
fn check_feasible(plan: &InstallPlan) -> Result<()> {
    let before = host_service::registered_with(&plan.home);
    if before != plan.kind {
        host_service::can_unregister(before, &plan.home)?;
    }
    let replaced = match plan.existing {
        ExistingInstallation::Old => host_service::foreign_units(plan.kind, &plan.home)?,
        _ => vec![],
    };
    host_service::can_register(plan.kind, &plan.home, &replaced)?;
    host_service::can_set_foreign_aside(&replaced)?;
    if plan.replaces_all() {
        legacy::can_set_aside(&plan.home, plan.backup_owner(), &plan.executable)?;
    }
    Ok(())
}

fn existing_installation(home: &Home) -> Result<ExistingInstallation> {
    if install_root::is_incomplete(home) {
        return Ok(ExistingInstallation::Nothing);
    }
    if installation::exists(home) {
        // An unreadable record does not prevent the installation: it is needed for a rollback only.
        let installed = InstallRecord::load(home).unwrap_or_else(|error| {
            progress::warn(format_args!("{error:#}"));
            None
        });
        return Ok(ExistingInstallation::Aops(
            installed.unwrap_or_else(|| InstallRecord::new(lifecycle::service(home))),
        ));
    }
    Ok(if legacy::is_old(home) { ExistingInstallation::Old } else { ExistingInstallation::Nothing })
}

fn existing_config_of(home: &Home) -> Result<(Option<String>, Option<Config>)> {
    let config = Config::read_strictly(home)
        .context("cannot keep the existing settings; correct them, or give --fresh to discard them")?;
    if config.is_some() {
        return Ok((config::text(home)?, config));
    }
    // The manager uses this copy, too, if the file is missing.
    let Some((text, config)) = Config::last_good(home) else { return Ok((None, None)) };
    progress::warn(format_args!("{} is missing; using its last good copy", home.config().display()));
    Ok((Some(text), Some(config)))
}

/// The settings of a home that is not enrolled: they have no endpoint yet, but may have others.
fn packaged_config_of(home: &Home) -> Result<(Option<String>, Option<Config>)> {
    let Some(text) = config::text(home)? else { return Ok((None, None)) };
    let parsed = Config::parse(&text).or_else(|error| {
        let mut completed =
            Config::parse(&format!("heartbeatSrv = \"https://unknown.invalid\"\n{text}")).map_err(|_| error)?;
        completed.config.heartbeat_srv.clear();
        Ok::<_, anyhow::Error>(completed)
    });
    let parsed =
        parsed.with_context(|| format!("cannot keep the settings in {}; correct them", home.config().display()))?;
    Ok((Some(text), Some(parsed.config)))
}

/// The new settings: the imported or else the existing ones, changed by the options. An existing home keeps the way in which it verifies
/// the gateway's certificate unless the options change it; `--pin-first-contact` applies to a new home only.
fn merge(existing: Option<&Config>, imported: Option<&Config>, options: &InstallOptions) -> Config {
    let mut config = imported.or(existing).cloned().unwrap_or_default();
    if let Some(existing) = existing {
        config.certificate.clone_from(&existing.certificate);
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
    } else if options.pin_first_contact && existing.is_none() && config.certificate == CertificateCheck::System {
        config.certificate = CertificateCheck::FirstContact;
    }
    if let Some(product) = options.product.as_deref() {
        config.product = (product != "auto").then(|| product.to_owned());
    }
    config
}

/// Saves the environment's proxy for the endpoint in the settings, unless they have one: a service manager starts the manager with a
/// different environment.
fn with_proxy(config: Config, environment: &Proxies) -> Config {
    let needed = config.heartbeat_srv.iter().find_map(|endpoint| environment.of(endpoint).ok().flatten());
    match needed {
        Some(proxy) if config.proxy == ProxyChoice::Environment => {
            progress::say(format_args!("saving the environment's proxy {proxy} in the settings (proxy)"));
            let listed = Some(environment.exceptions().to_vec()).filter(|listed| !listed.is_empty());
            Config { proxy: ProxyChoice::Proxy(proxy.clone()), no_proxy: config.no_proxy.clone().or(listed), ..config }
        }
        _ => config,
    }
}

fn read_certificates(path: &Path) -> Result<Vec<u8>> {
    let bytes = store::read(path, MAX_CA_BYTES)?
        .with_context(|| format!("cannot read the certificates in {}: there is no such file", path.display()))?;
    if !String::from_utf8_lossy(&bytes).contains("-----BEGIN CERTIFICATE-----") {
        bail!("cannot use {} as --ca-cert: expected certificates in PEM", path.display());
    }
    Ok(bytes)
}

/// The keys that an installation trusts, and their sources.
#[derive(Debug, Clone)]
pub(super) struct InstallTrust {
    /// All keys that packages are verified with.
    pub(super) keys: Keys,
    /// Given by the operator.
    pub(super) given: Keys,
    /// In the trailer of the running executable; for a new home, those that were given, too.
    pub(super) carried: Keys,
    /// The future content of `etc/keys`.
    pub(super) etc: Keys,
    /// The keys that packages brought and revoked.
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
    if !keeps {
        // So that a revocation by a package takes effect on every host of a fleet, however it was installed.
        carried.extend(std::mem::take(&mut given))?;
    }
    let (ring, mut etc) = match keeps {
        true => {
            permissions::keys(home)?;
            (Keyring::load(home)?, Keys::load(&home.keys())?)
        }
        false => Default::default(),
    };
    for key in given.iter().filter(|key| ring.is_revoked(key)) {
        progress::warn(format_args!(
            "the key {} was revoked, and is trusted again because it is given with --trusted-key",
            key.id()
        ));
    }
    let (ring, accepted) = ring.installed(&given, &carried, &etc);
    for key in carried.iter().filter(|key| !accepted.contains(key)) {
        progress::warn(format_args!("the key {} in this executable was revoked, and is not trusted", key.id()));
    }
    etc.extend(given.clone())?;
    etc.extend(accepted)?;
    let keys = ring.trusted(&etc, &Keys::baked_in()?)?;
    if keys.is_empty() {
        bail!(
            "no key to verify packages with; give the gateway's public key with --trusted-key, or use the installer that the gateway \
             serves, which contains the key"
        );
    }
    Ok(InstallTrust { keys, given, carried, etc, ring })
}

/// The service manager to register the roles with, and a note if it is none although the host has one.
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
            Some(format!(
                "not registering with {kind}, which requires {}; the roles are started without it",
                platform::ADMINISTRATOR
            )),
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
    fn options_override_existing_settings_and_change_nothing_else() {
        let existing = Config {
            heartbeat_srv: vec!["https://old:1".parse().unwrap()],
            spm_max_mem: crate::core::units::Size(99 << 20),
            product: Some("hci".to_owned()),
            certificate: CertificateCheck::Authority("etc/mine.pem".into()),
            ..Config::default()
        };
        let merged = merge(Some(&existing), None, &options());
        assert_eq!(merged, Config { heartbeat_srv: options().endpoint, ..existing.clone() });
        assert_eq!(merge(Some(&existing), None, &InstallOptions::default()), existing);

        let changed = InstallOptions { product: Some("auto".to_owned()), insecure: true, ..options() };
        let merged = merge(Some(&existing), None, &changed);
        assert_eq!((merged.product, merged.certificate), (None, CertificateCheck::Unchecked));
    }

    #[test]
    fn the_first_contact_is_pinned_only_without_any_other_certificate_check() {
        let first = InstallOptions { pin_first_contact: true, ..options() };
        assert_eq!(merge(None, None, &first).certificate, CertificateCheck::FirstContact);
        assert_eq!(merge(None, None, &options()).certificate, CertificateCheck::System);
        // The replaced system accepted any certificate.
        assert_eq!(merge(None, Some(&Config::default()), &first).certificate, CertificateCheck::FirstContact);
        // A home that uses the system's roots continues to do so, also with imported settings.
        for imported in [None, Some(&Config { certificate: CertificateCheck::Unchecked, ..Config::default() })] {
            assert_eq!(merge(Some(&Config::default()), imported, &first).certificate, CertificateCheck::System);
        }
        let pinned = CertificateCheck::Pinned(vec!["00".repeat(32).parse().unwrap()]);
        let existing = Config { certificate: pinned.clone(), ..Config::default() };
        assert_eq!(merge(Some(&existing), None, &first).certificate, pinned);
        let ca = InstallOptions { ca_cert: Some("x".into()), ..first };
        assert_eq!(merge(Some(&existing), None, &ca).certificate, CertificateCheck::Authority(CA_FILE.into()));
    }

    #[test]
    fn the_environments_proxy_is_saved_if_an_endpoint_needs_it() {
        let environment = Proxies::from_environment(|name| match name {
            "https_proxy" => Some("http://u:secret@proxy:1".to_owned()),
            "no_proxy" => Some(".inside".to_owned()),
            _ => None,
        });
        let with = |endpoint: &str, proxy| {
            let config = Config { heartbeat_srv: vec![endpoint.parse().unwrap()], proxy, ..Config::default() };
            with_proxy(config, &environment)
        };
        let saved = with("https://gateway.outside", ProxyChoice::Environment);
        assert_eq!(saved.proxy, ProxyChoice::Proxy("http://u:secret@proxy:1".parse().unwrap()));
        assert_eq!(saved.no_proxy, Some(vec![".inside".parse().unwrap()]));
        assert_eq!(with("https://gateway.inside", ProxyChoice::Environment).proxy, ProxyChoice::Environment);
        assert_eq!(with("https://127.0.0.1", ProxyChoice::Environment).proxy, ProxyChoice::Environment);
        assert_eq!(with("https://gateway.outside", ProxyChoice::None).proxy, ProxyChoice::None);
    }

    #[test]
    fn registration_requires_a_service_manager_root_and_a_product_with_registration() {
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
        let context = ProcessContext { home: None, product: None, executable: "/nowhere".into() };
        let refused = |options: &InstallOptions| {
            let error = plan(options, &context, &home, &product).unwrap_err();
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
        let context = ProcessContext { home: None, product: None, executable: "/nowhere".into() };
        let options = InstallOptions {
            agent_id: Some("1".parse().unwrap()),
            endpoint: vec!["http://a:1".parse().unwrap()],
            ..InstallOptions::default()
        };
        let error = plan(&options, &context, &home, &product::choose(None).unwrap()).unwrap_err().to_string();
        assert!(error.contains("--insecure"), "{error}");
    }
}
