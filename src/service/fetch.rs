//! The manager's package: which one, from where, fetched into the installation's own directory, and checked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::first_contact;
use super::install_root::InstallRoot;
use super::preflight::InstallPlan;
use super::progress::{self, DownloadDisplay};
use crate::config::CertificateCheck;
use crate::core::model::{AgentName, MANAGER_PACKAGE, Packing, Release};
use crate::core::protocol::{self, DOWNLOAD_PATH};
use crate::endpoint::{Client, Endpoint, Fingerprint, Timeouts, Trust};
use crate::fetching::Fetching;
use crate::installation::release::{self, CheckedRelease};
use crate::package::{self, FetchLimits, PackagePaths, PackageRequest, SIGNATURE_SUFFIX, VerifiedTree};
use crate::platform;
use crate::uplink;

/// A release of the manager that can be put into place.
#[derive(Debug)]
pub(super) struct FetchedManager {
    pub(super) release: CheckedRelease,
    /// The certificates of first contacts, with that of this one.
    pub(super) pins: Option<PathBuf>,
}

/// Downloads, verifies, unpacks, and tries the release that the plan names.
pub(super) fn fetch(plan: &InstallPlan, site: &InstallRoot) -> Result<FetchedManager> {
    let places = PackagePaths { cache: site.work().join("cache"), staging: site.work().join("staging") };
    let pins = first_contact::begin(plan.contact, &plan.home, &site.work())?;
    let (tree, file) = match &plan.package {
        Some(package) => local(plan, package, &places.staging)?,
        None => remote(plan, places, &site.work(), pins.as_deref())?,
    };
    let release = release::check(tree, file)?;
    plan.trusted.ring.examine(&release.offer, &plan.trusted.etc)?;
    Ok(FetchedManager { release, pins })
}

fn local(plan: &InstallPlan, path: &Path, staging: &Path) -> Result<(VerifiedTree, String)> {
    let claimed = package::claimed(path)?.release;
    let (os, arch) = (platform::OS, platform::ARCH);
    let version = plan.version.clone().unwrap_or_else(|| claimed.version.clone());
    let release = Release { name: manager_package()?, version, os, arch };
    if release != claimed {
        bail!("cannot use the package {}: it is {claimed}, and {release} is wanted", path.display());
    }
    progress::say(format_args!("unpacking {release} from {}", path.display()));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let packing = Packing::ALL.iter().find(|packing| name.ends_with(packing.as_str()));
    let file = release.file_name(packing.copied().unwrap_or(Packing::TarZst));
    let wanted = PackageRequest { least_epoch: plan.epochs.least(MANAGER_PACKAGE), ..PackageRequest::new(release) };
    Ok((package::open_local(path, &wanted, &plan.trusted.keys, staging)?, file))
}

fn remote(
    plan: &InstallPlan,
    places: PackagePaths,
    work: &Path,
    pins: Option<&Path>,
) -> Result<(VerifiedTree, String)> {
    let trust = trust(plan, work, pins)?;
    if trust == Trust::Insecure {
        progress::warn("the gateway's certificate is not checked (--insecure)");
    }
    let endpoints = &plan.config.heartbeat_srv;
    let client = plan.config.client(&trust, &plan.agent_id, Timeouts::exchange())?;
    let (endpoint, wanted) = first_of(endpoints, |endpoint| choose(plan, &client, endpoint))?;
    if let Some(fingerprint) = client.first_contact() {
        first_contact(endpoint, &fingerprint);
    }

    progress::say(format_args!("downloading {} from {endpoint}", wanted.release));
    // The one that answered first; the others stand in for it.
    let mut ordered = vec![endpoint.clone()];
    ordered.extend(endpoints.iter().filter(|other| *other != endpoint).cloned());
    let mut download = DownloadDisplay::begin();
    let file = wanted.file.clone().unwrap_or_else(|| wanted.release.file_name(Packing::TarZst));
    let fetching = Fetching {
        config: &plan.config,
        agent_id: &plan.agent_id,
        trust,
        endpoints: ordered,
        keys: plan.trusted.keys.clone(),
        epochs: plan.epochs.clone(),
        paths: places,
    };
    let tree = fetching.fetch(wanted, &FetchLimits::default(), drop, &mut |done, total| {
        download.at(done, total);
        true
    })?;
    Ok((tree, file))
}

/// How the certificate is checked now, when nothing of the home is in place yet.
fn trust(plan: &InstallPlan, work: &Path, pins: Option<&Path>) -> Result<Trust> {
    if let Some(pins) = pins {
        return Ok(Trust::FirstContact { pins: pins.to_owned() });
    }
    match (&plan.config.certificate, &plan.ca_file) {
        (CertificateCheck::Authority(_), Some(bytes)) => {
            let path = work.join("ca.pem");
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(Trust::CaFile(path))
        }
        _ => Ok(plan.config.trust(&plan.home)),
    }
}

fn first_contact(endpoint: &Endpoint, fingerprint: &Fingerprint) {
    progress::warn(format_args!(
        "the certificate of {endpoint} is {fingerprint}. Nobody vouched for it: it is accepted because it is the first one seen, and any \
         other will be refused from now on. Compare it with the gateway's own"
    ));
}

/// Which package is wanted of this endpoint: the version asked for, or its current one.
fn choose(plan: &InstallPlan, client: &Client, endpoint: &Endpoint) -> Result<PackageRequest> {
    let (os, arch) = (platform::OS, platform::ARCH);
    let name = manager_package()?;
    let offer = uplink::current_release(client, endpoint, &name, os, arch)?;
    let offered = |offer: protocol::Offer| {
        let release = Release { name: name.clone(), version: offer.version, os, arch };
        let wanted = PackageRequest::new(release);
        PackageRequest { file: Some(offer.file), sha256: Some(offer.sha256), size: Some(offer.size), ..wanted }
    };
    let version = match (&plan.version, offer) {
        (None, Some(offer)) => return Ok(offered(offer)),
        (Some(version), Some(offer)) if offer.version == *version => return Ok(offered(offer)),
        (Some(version), _) => version.clone(),
        (None, None) => {
            bail!("{endpoint} names no current version of {name} for {os}/{arch}; publish one there, or say --version")
        }
    };
    let release = Release { name, version, os, arch };
    // An older version, or a gateway that names none: the package may be packed in any way.
    for packing in Packing::ALL {
        let file = release.file_name(*packing);
        let reply = client.get(endpoint, &format!("{DOWNLOAD_PATH}/{file}{SIGNATURE_SUFFIX}"), &[])?;
        match reply.status() {
            200 => return Ok(PackageRequest { file: Some(file), ..PackageRequest::new(release) }),
            404 => {}
            _ => return Err(reply.into_error().context(format!("cannot ask {endpoint} for {file}"))),
        }
    }
    bail!(
        "{endpoint} has no package of {release}; publish it there, or choose another --version (without it: the current one)"
    )
}

/// The first endpoint with an answer, or what was wrong with each.
fn first_of(
    endpoints: &[Endpoint],
    ask: impl Fn(&Endpoint) -> Result<PackageRequest>,
) -> Result<(&Endpoint, PackageRequest)> {
    let mut failures = Vec::new();
    for endpoint in endpoints {
        match ask(endpoint) {
            Ok(wanted) => return Ok((endpoint, wanted)),
            Err(error) => failures.push(error),
        }
    }
    if failures.len() == 1
        && let Some(failure) = failures.pop()
    {
        return Err(failure);
    }
    let told: Vec<String> = failures.iter().map(|failure| format!("{failure:#}")).collect();
    bail!("no endpoint has it: {}", told.join("; "))
}

fn manager_package() -> Result<AgentName> {
    Ok(MANAGER_PACKAGE.parse()?)
}
