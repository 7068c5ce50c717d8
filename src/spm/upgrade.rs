//! The manager's self-upgrade up to the switch, off the event loop: the release is fetched, verified, checked against this home, and
//! replaces the running one. From then on the watchdog supervises the trial.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::disk;
use super::input::{Input, Inputs, NotSwitched, UpgradeObservation, UpgradeOutcome};
use super::{stage, unix_now};
use crate::config::Config;
use crate::core::model::{AgentId, AgentName, MANAGER_PACKAGE, Packing, Release, Version};
use crate::core::order::Package;
use crate::core::role::Role;
use crate::core::status::DownloadStatus;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::core::upgrade::{
    self, Decider, Evidence, Image, ManagerEvidence, TrialLimits, UpgradeRecord, UpgradeRefusal, UpgradeStep,
    WhichRelease,
};
use crate::endpoint::Timeouts;
use crate::fetching::Fetching;
use crate::home::Home;
use crate::installation::keyring::{self, Keyring};
use crate::installation::release::{self, CheckedRelease};
use crate::installation::upgrade::{self as on_disk, Programs, UpgradeSession, which};
use crate::installation::{Epochs, permissions};
use crate::package::{self, FetchLimits, Keys, PackageRequest, Unavailable, VerifiedTree};
use crate::{migrations, platform, role, store, uplink};

/// Timeout for the record's lock: the other role holds it for one step, which may wait for a disk.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// A switch has fewer steps; more are a bug.
const MAX_STEPS: usize = 32;

/// The source of the new release.
#[derive(Debug, Clone)]
pub(super) enum UpgradeSource {
    Gateway(Package),
    /// The release that the gateway offers now.
    Current,
    /// A package on this host, with its signature file.
    File(PathBuf),
    /// The previous release.
    Previous,
}

/// The inputs of an upgrade.
#[derive(Debug)]
pub(super) struct UpgradeJob {
    pub(super) home: Home,
    pub(super) config: Config,
    pub(super) agent_id: AgentId,
    pub(super) source: UpgradeSource,
    /// Set when an operator at the host requested it, with the gateway's order that the request overrides.
    pub(super) by_operator: Option<Option<Package>>,
    /// The release of this manager.
    pub(super) own: Version,
}

/// The progress of an upgrade, as the event loop sees it.
#[derive(Debug, Default)]
pub(super) struct UpgradeProgress {
    bytes: AtomicU64,
    /// Zero: not known yet.
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl UpgradeProgress {
    pub(super) fn download(&self, version: &Version) -> Option<DownloadStatus> {
        let (bytes, total) = (self.bytes.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let total = Some(total).filter(|total| *total > 0);
        (bytes > 0 || total.is_some()).then(|| DownloadStatus { version: version.clone(), bytes, total_bytes: total })
    }

    /// Cancels the download.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Starts an upgrade; the result is [`Input::Upgraded`].
pub(super) fn start(inputs: &Inputs, job: UpgradeJob) -> Arc<UpgradeProgress> {
    let progress = Arc::new(UpgradeProgress::default());
    let shared = Arc::clone(&progress);
    disk::run(inputs, move || {
        let mut release = None;
        let outcome = match attempt(&job, &shared, &mut release) {
            Ok(outcome) => outcome,
            Err(error) => UpgradeOutcome::NotSwitched(not_switched(&job, release, &error)),
        };
        Input::Upgraded(outcome)
    });
    progress
}

/// Marks an error as the release's fault.
#[derive(Debug)]
struct FaultyRelease;

impl std::fmt::Display for FaultyRelease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the release cannot be installed on this host")
    }
}

/// Marks an error as the release's fault, unless the host lacks disk space or other resources.
fn blame_release(error: anyhow::Error) -> anyhow::Error {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    let is_hosts = causes.any(|cause| {
        let kinds = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::ReadOnlyFilesystem];
        kinds.contains(&cause.kind()) || platform::is_shortage(cause)
    });
    if is_hosts { error } else { error.context(FaultyRelease) }
}

/// `found`: set to the release as soon as it is known.
fn attempt(job: &UpgradeJob, progress: &UpgradeProgress, found: &mut Option<Image>) -> Result<UpgradeOutcome> {
    let home = &job.home;
    permissions::home(home)?;
    ensure!(!home.stop_intent().exists(), "the home is stopped; start it with `control start`");
    let from = release::in_place(home)?;
    if let UpgradeSource::Previous = job.source {
        let (to, staged) = previous(home)?;
        return switch(job, from, found.insert(to).clone(), &staged);
    }
    let (tree, file) = match &job.source {
        UpgradeSource::File(path) => local(home, path)?,
        UpgradeSource::Gateway(package) => fetch(job, request(package)?, progress)?,
        _ => match current(job)? {
            None => bail!("no endpoint has a release of {MANAGER_PACKAGE} for this host; publish one at the gateway"),
            Some(package) if package.version == from.version => return Ok(UpgradeOutcome::Nothing),
            Some(package) => fetch(job, request(&package)?, progress)?,
        },
    };
    let signed = (tree.binding().release.version.clone(), tree.sha256().clone());
    if signed == (from.version.clone(), from.sha256.clone()) {
        return Ok(UpgradeOutcome::Nothing);
    }
    *found = Some(Image { version: signed.0, sha256: signed.1, ..from.clone() });
    let (checked, to) = check(home, tree, file).map_err(blame_release)?;
    *found = Some(to.clone());
    switch(job, from, to, &checked.executable())
}

/// Checks that the release runs on this host with this home, and that its statements about keys are trusted.
fn check(home: &Home, tree: VerifiedTree, file: String) -> Result<(CheckedRelease, Image)> {
    let checked = release::check(tree, file)?;
    Keyring::load(home)?.examine(&checked.offer, &Keys::load(&home.keys())?)?;
    release::preflight(home, &checked.executable())?;
    let image = checked.image()?;
    Ok((checked, image))
}

fn manager_package() -> Result<AgentName> {
    Ok(MANAGER_PACKAGE.parse()?)
}

fn request(package: &Package) -> Result<PackageRequest> {
    Ok(stage::package_request(&manager_package()?, package))
}

fn fetch(job: &UpgradeJob, request: PackageRequest, progress: &UpgradeProgress) -> Result<(VerifiedTree, String)> {
    let fetching = Fetching::of(&job.home, &job.config, &job.agent_id)?;
    let file = request.file_name().unwrap_or_else(|| request.release.file_name(Packing::TarZst));
    let tree = fetching.fetch(request, &FetchLimits::default(), drop, &mut |bytes, total| {
        progress.bytes.store(bytes, Ordering::Relaxed);
        progress.total.store(total.unwrap_or(0), Ordering::Relaxed);
        !progress.cancelled.load(Ordering::Relaxed)
    })?;
    Ok((tree, file))
}

/// The release offered by the first endpoint that offers one.
fn current(job: &UpgradeJob) -> Result<Option<Package>> {
    let config = &job.config;
    let client = config.client(&config.trust(&job.home), &job.agent_id, Timeouts::exchange())?;
    let name = manager_package()?;
    let mut failure = None;
    for endpoint in &config.heartbeat_srv {
        match uplink::current_release(&client, endpoint, &name, platform::OS, platform::ARCH) {
            Ok(Some(offer)) => return Ok(Some(offer.into())),
            Ok(None) => {}
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(None), Err)
}

fn local(home: &Home, path: &Path) -> Result<(VerifiedTree, String)> {
    let claimed: Release = package::claimed(path)?.release;
    ensure!(
        claimed.name.as_str() == MANAGER_PACKAGE && claimed.os == platform::OS && claimed.arch == platform::ARCH,
        "cannot use the package {}: it is {claimed}, not {MANAGER_PACKAGE} for {}/{}",
        path.display(),
        platform::OS,
        platform::ARCH
    );
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let packing = Packing::ALL.iter().find(|packing| name.ends_with(packing.as_str()));
    let file = claimed.file_name(packing.copied().unwrap_or(Packing::TarZst));
    let request =
        PackageRequest { min_epoch: Epochs::load(home)?.least(MANAGER_PACKAGE), ..PackageRequest::new(claimed) };
    Ok((package::open_local(path, &request, &keyring::trusted(home)?, &home.staging())?, file))
}

/// The previous release, and a copy of its executable in the staging directory.
fn previous(home: &Home) -> Result<(Image, PathBuf)> {
    let record = on_disk::load(home)?;
    let to = record.previous().context("no previous release is on this host")?.clone();
    let least = Epochs::load(home)?.least(MANAGER_PACKAGE);
    ensure!(
        to.epoch >= least,
        "the previous release {} was withdrawn: its epoch {} is below {least}",
        to.version,
        to.epoch
    );
    let backup = home.backup_executable();
    let is_previous = Programs::default().at(&backup)?.is_some_and(|digest| digest == to.executable);
    ensure!(is_previous, "{} is not the executable of the previous release {}", backup.display(), to.version);
    let staged = home.staging().join(format!("{MANAGER_PACKAGE}-{}", to.version));
    store::remove(&staged)?;
    let copy = || -> std::io::Result<()> {
        std::fs::copy(&backup, &staged)?;
        platform::set_mode(&staged, 0o755)
    };
    copy().with_context(|| format!("cannot copy {} to {}", backup.display(), staged.display()))?;
    release::preflight(home, &staged).map_err(blame_release)?;
    Ok((to, staged))
}

/// Starts the upgrade in the record, and carries out the steps up to the switch.
fn switch(job: &UpgradeJob, from: Image, to: Image, staged: &Path) -> Result<UpgradeOutcome> {
    let mut session = session(&job.home)?;
    ensure!(
        release::in_place(&job.home)?.is(&from),
        "{} was replaced by another release in the meantime; see `control status`",
        from.version
    );
    if let Some(order) = &job.by_operator {
        session.change(|record| {
            record.overrule(order.as_ref().map(|order| (&order.version, order.sha256.as_ref())));
            // An operator's request overrides a skip.
            record.clear_skips();
        })?;
    }
    match session.begin(from, to, unix_now()) {
        Ok(()) => {}
        Err(UpgradeRefusal::Running) => return Ok(UpgradeOutcome::Nothing),
        Err(UpgradeRefusal::UnderWay) => bail!("another upgrade of the manager is in progress"),
        Err(UpgradeRefusal::Skipped(why)) => bail!(
            "this release failed here before and is skipped ({why}); to try it again, run `control retry {MANAGER_PACKAGE}`"
        ),
    }
    let (last, _) = carry_out_steps(&job.home, &job.own, &mut session, Some(staged))?;
    ensure!(last == UpgradeStep::RestartManager, "the switch to the new release was abandoned ({last:?})");
    Ok(UpgradeOutcome::Switched)
}

fn session(home: &Home) -> Result<UpgradeSession> {
    UpgradeSession::open(home, LOCK_TIMEOUT)?.context("another process is using the record of upgrades; try again")
}

/// Carries out all steps of the manager; returns the first step that is not a disk operation.
fn carry_out_steps(
    home: &Home,
    own: &Version,
    session: &mut UpgradeSession,
    staged: Option<&Path>,
) -> Result<(UpgradeStep, UpgradeObservation)> {
    let mut programs = Programs::default();
    for _ in 0..MAX_STEPS {
        let evidence = evidence(home, own, session, &mut programs, staged.is_some())?;
        let step = upgrade::next(session.record(), &evidence, &TrialLimits::default());
        if !session.carry_out(step, staged)? {
            return Ok((step, UpgradeObservation { record: session.record().clone(), evidence }));
        }
    }
    bail!("an upgrade step had no effect")
}

/// The manager's evidence.
fn evidence(
    home: &Home,
    own: &Version,
    session: &UpgradeSession,
    programs: &mut Programs,
    staged: bool,
) -> Result<Evidence> {
    let evidence = session.evidence(Decider::Manager, programs)?;
    let watchdog = role::current_holder(home, Role::Spa).map(|holder| match session.record().trial() {
        Some(trial) => {
            which(trial, programs.of_process(holder.pid, holder.program.as_ref()).as_ref(), WhichRelease::From)
        }
        None => WhichRelease::Other,
    });
    // The manager determined at start which release it is: by its bytes, and where both have the same bytes, by the record at that time.
    let is_new = session.record().trial().is_some_and(|trial| trial.to.version == *own);
    let image = if is_new { WhichRelease::To } else { WhichRelease::From };
    let manager =
        ManagerEvidence { image, answered: Some(Duration::ZERO), adopted: true, heartbeat: false, over_memory: false };
    Ok(Evidence { staged, manager: Some(manager), watchdog, ..evidence })
}

/// Carries out the manager's steps of an upgrade that another process started, and reads the record; the result is [`Input::UpgradeRecordRead`].
pub(super) fn read_record(inputs: &Inputs, home: &Home, own: &Version) {
    let (home, own) = (home.clone(), own.clone());
    disk::run(inputs, move || {
        let result = session(&home).and_then(|mut session| carry_out_steps(&home, &own, &mut session, None));
        Input::UpgradeRecordRead(result.map(Box::new).map_err(|error| format!("{error:#}")))
    });
}

/// Migrates the installation to this committed release; the result is [`Input::Migrated`].
pub(super) fn migrate(inputs: &Inputs, home: &Home) {
    let home = home.clone();
    disk::run(inputs, move || {
        let done = migrations::run(&home).map_err(|error| {
            format!("cannot migrate the installation to this release: {error:#}; run `aops install` to retry")
        });
        Input::Migrated(done)
    });
}

/// Changes the record off the event loop; the result is [`Input::UpgradeRecordRead`].
pub(super) fn change_record(
    inputs: &Inputs,
    home: &Home,
    own: &Version,
    change: impl FnOnce(&mut UpgradeRecord) + Send + 'static,
) {
    let (home, own) = (home.clone(), own.clone());
    disk::run(inputs, move || {
        let result = session(&home).and_then(|mut session| {
            session.change(change)?;
            carry_out_steps(&home, &own, &mut session, None)
        });
        Input::UpgradeRecordRead(result.map(Box::new).map_err(|error| format!("{error:#}")))
    });
}

/// The reason of a failed switch. A release that is at fault is skipped from now on.
fn not_switched(job: &UpgradeJob, release: Option<Image>, error: &anyhow::Error) -> NotSwitched {
    let why = cut(&format!("{error:#}"), MAX_MESSAGE_BYTES);
    let version = match (&release, &job.source) {
        (Some(release), _) => Some(release.version.clone()),
        (None, UpgradeSource::Gateway(package)) => Some(package.version.clone()),
        _ => None,
    };
    let mut is_skipped = false;
    if let (true, Some(release)) = (error.is::<FaultyRelease>(), &release) {
        let skip = || -> Result<()> {
            let running = release::in_place(&job.home)?;
            session(&job.home)?.change(|record| record.skip(release, why.clone(), &running))
        };
        match skip() {
            Ok(()) => is_skipped = true,
            Err(error) => tracing::warn!(error = format!("{error:#}"), "cannot record that a release is skipped"),
        }
    }
    NotSwitched {
        version,
        why,
        is_final: package::is_refusal(error) || error.is::<FaultyRelease>(),
        is_skipped,
        retry_after: error.downcast_ref::<Unavailable>().and_then(|unavailable| unavailable.retry_after),
    }
}
