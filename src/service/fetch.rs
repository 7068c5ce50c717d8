//! Chooses the manager's package, downloads it into the work directory of the installation, and verifies it.

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

/// A release of the manager that can be installed.
#[derive(Debug)]
pub(super) struct FetchedManager {
    pub(super) release: CheckedRelease,
    /// The pins of first contacts, including that of this installation.
    pub(super) pins: Option<PathBuf>,
}

/// Downloads, verifies and unpacks the release of the plan, and checks that it runs on this host.
pub(super) fn fetch(plan: &InstallPlan, install_root: &InstallRoot) -> Result<FetchedManager> {
    let places =
        PackagePaths { cache: install_root.work().join("cache"), staging: install_root.work().join("staging") };
    let pins = first_contact::begin(plan.contact, &plan.home, &install_root.work())?;
    if let Some(record) = plan.packaged.clone().filter(|_| plan.uses_packaged) {
        progress::say(format_args!("using version {} of the installed package", record.release.version));
        let release = release::of_package(&plan.home, record, &install_root.work().join("aops"))?;
        return Ok(FetchedManager { release, pins });
    }
    let (tree, file) = match &plan.package {
        Some(package) => local(plan, package, &places.staging)?,
        None => remote(plan, places, &install_root.work(), pins.as_deref())?,
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
        bail!("cannot use the package {}: it is {claimed}, expected {release}", path.display());
    }
    progress::say(format_args!("unpacking {release} from {}", path.display()));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let packing = Packing::ALL.iter().find(|packing| name.ends_with(packing.as_str()));
    let file = release.file_name(packing.copied().unwrap_or(Packing::TarZst));
    let request = PackageRequest { min_epoch: plan.epochs.least(MANAGER_PACKAGE), ..PackageRequest::new(release) };
    Ok((package::open_local(path, &request, &plan.trusted.keys, staging)?, file))
}

fn remote(
    plan: &InstallPlan,
    places: PackagePaths,
    work: &Path,
    pins: Option<&Path>,
) -> Result<(VerifiedTree, String)> {
    let trust = trust(plan, work, pins)?;
    if trust == Trust::Insecure {
        progress::warn("the gateway's certificate is not verified (--insecure)");
    }
    let endpoints = &plan.config.heartbeat_srv;
    let client = plan.config.client(&trust, &plan.agent_id, Timeouts::exchange())?;
    let (endpoint, request) = first_of(endpoints, |endpoint| choose(plan, &client, endpoint))?;
    if let Some(fingerprint) = client.first_contact() {
        first_contact(endpoint, &fingerprint);
    }

    progress::say(format_args!("downloading {} from {endpoint}", request.release));
    // The endpoint that answered first; the others are fallbacks.
    let mut ordered = vec![endpoint.clone()];
    ordered.extend(endpoints.iter().filter(|other| *other != endpoint).cloned());
    let mut download = DownloadDisplay::begin();
    let file = request.file.clone().unwrap_or_else(|| request.release.file_name(Packing::TarZst));
    let fetching = Fetching {
        config: &plan.config,
        agent_id: &plan.agent_id,
        trust,
        endpoints: ordered,
        keys: plan.trusted.keys.clone(),
        epochs: plan.epochs.clone(),
        paths: places,
    };
    let tree = fetching.fetch(request, &FetchLimits::default(), drop, &mut |done, total| {
        download.at(done, total);
        true
    })?;
    Ok((tree, file))
}

/// How the gateway's certificate is verified during the installation, before the home has its files.
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
        "the certificate of {endpoint} ({fingerprint}) is pinned without verification, because this is the first contact; any other \
         certificate is rejected from now on. Compare the fingerprint with that of the gateway"
    ));
}

/// The package to request from this endpoint: the requested version, or the current one.
fn choose(plan: &InstallPlan, client: &Client, endpoint: &Endpoint) -> Result<PackageRequest> {
    let (os, arch) = (platform::OS, platform::ARCH);
    let name = manager_package()?;
    let offer = uplink::current_release(client, endpoint, &name, os, arch)?;
    let offered = |offer: protocol::Offer| {
        let release = Release { name: name.clone(), version: offer.version, os, arch };
        let request = PackageRequest::new(release);
        PackageRequest { file: Some(offer.file), sha256: Some(offer.sha256), size: Some(offer.size), ..request }
    };
    let version = match (&plan.version, offer) {
        (None, Some(offer)) => return Ok(offered(offer)),
        (Some(version), Some(offer)) if offer.version == *version => return Ok(offered(offer)),
        (Some(version), _) => version.clone(),
        (None, None) => {
            bail!("{endpoint} has no current version of {name} for {os}/{arch}; publish one there, or give --version")
        }
    };
    let release = Release { name, version, os, arch };
    // A version that is not the current one: its packing is unknown.
    for packing in Packing::ALL {
        let file = release.file_name(*packing);
        let reply = client.get(endpoint, &format!("{DOWNLOAD_PATH}/{file}{SIGNATURE_SUFFIX}"), &[])?;
        match reply.status() {
            200 => return Ok(PackageRequest { file: Some(file), ..PackageRequest::new(release) }),
            404 => {}
            _ => return Err(reply.into_error().context(format!("cannot request {file} from {endpoint}"))),
        }
    }
    bail!(
        "{endpoint} has no package of {release}; publish it there, or choose another --version (without it: the current one)"
    )
}

/// The first endpoint with an answer; the error lists the error of each endpoint.
fn first_of(
    endpoints: &[Endpoint],
    query: impl Fn(&Endpoint) -> Result<PackageRequest>,
) -> Result<(&Endpoint, PackageRequest)> {
    let mut failures = Vec::new();
    for endpoint in endpoints {
        match query(endpoint) {
            Ok(request) => return Ok((endpoint, request)),
            Err(error) => failures.push(error),
        }
    }
    if failures.len() == 1
        && let Some(failure) = failures.pop()
    {
        return Err(failure);
    }
    let failures: Vec<String> = failures.iter().map(|failure| format!("{failure:#}")).collect();
    bail!("no endpoint has the package: {}", failures.join("; "))
}

fn manager_package() -> Result<AgentName> {
    Ok(MANAGER_PACKAGE.parse()?)
}
