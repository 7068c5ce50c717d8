//! Stages a release while the active one runs: fetched, verified, unpacked, inspected; then it may be activated.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::sync::{Semaphore, oneshot};

use super::input::{Input, Inputs};
use crate::config::Config;
use crate::core::agent::{Ready, ReleaseError};
use crate::core::ledger;
use crate::core::model::{AgentId, AgentName, Release, Version};
use crate::core::names;
use crate::core::order::Package;
use crate::core::program::Program;
use crate::core::status::DownloadStatus;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::endpoint::Disconnector;
use crate::fetching::Fetching;
use crate::home::Home;
use crate::installation::permissions::{self, UnsafeHome};
use crate::installation::{Epochs, keyring};
use crate::package::{self, Completed, FetchLimits, PackageRejected, PackageRequest, Unavailable, WithdrawnRelease};
use crate::platform;
use crate::process::launch;

/// Number of releases staged at the same time.
const MAX_CONCURRENT: usize = 3;
/// A failure after downloading this many bytes counts as costly: it is not retried soon.
const COSTLY_BYTES: u64 = 1 << 20;
/// Interval at which the progress of a download is logged.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(60);

/// Shared by all staging tasks.
#[derive(Debug, Clone)]
pub(super) struct StagingContext {
    permits: Arc<Semaphore>,
    fetch_limits: Arc<FetchLimits>,
}

impl StagingContext {
    pub(super) fn new() -> StagingContext {
        StagingContext { permits: Arc::new(Semaphore::new(MAX_CONCURRENT)), fetch_limits: Arc::default() }
    }
}

/// The handle of a release that is being staged. Dropping it cancels the download; the partial file is kept for a later attempt.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) version: Version,
    progress: Arc<StagingProgress>,
    /// Closed on drop: a task that still waits for its permit then returns.
    _alive: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct StagingProgress {
    bytes: AtomicU64,
    /// Zero: not known yet.
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Disconnects the download, which may block for long on the network.
    disconnector: Mutex<Option<Disconnector>>,
}

impl StagingProgress {
    /// Stores how to disconnect the download. Afterwards the caller checks `cancelled` again: a cancellation before this call found no
    /// handle.
    fn set_disconnector(&self, disconnector: Disconnector) {
        *self.disconnector.lock().unwrap_or_else(PoisonError::into_inner) = Some(disconnector);
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(disconnector) = self.disconnector.lock().unwrap_or_else(PoisonError::into_inner).take() {
            disconnector.now();
        }
    }
}

impl Staging {
    /// The progress of the download; `None` before it has started.
    pub(super) fn status(&self) -> Option<DownloadStatus> {
        let (bytes, total) = (self.progress.bytes.load(Ordering::Relaxed), self.progress.total.load(Ordering::Relaxed));
        let total = Some(total).filter(|total| *total > 0);
        (bytes > 0 || total.is_some()).then(|| DownloadStatus {
            version: self.version.clone(),
            bytes,
            total_bytes: total,
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.progress.cancel();
    }
}

/// A release that was unpacked, but cannot be run by this manager.
#[derive(Debug)]
struct Unusable;

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the unpacked release was discarded")
    }
}

/// Why a release could not be staged, activated or started.
pub(super) fn release_error(error: &anyhow::Error) -> ReleaseError {
    ReleaseError {
        why: cut(&format!("{error:#}"), MAX_MESSAGE_BYTES),
        refused: package::is_refusal(error) || error.is::<UnsafeHome>(),
        retry_after: error.downcast_ref::<Unavailable>().and_then(|unavailable| unavailable.retry_after),
        costly: false,
        withdrawn: error.is::<WithdrawnRelease>(),
        host_shortage: error.chain().filter_map(|cause| cause.downcast_ref()).any(platform::is_shortage),
    }
}

/// As [`release_error`], for a release of which `bytes` were downloaded.
fn release_error_after(error: &anyhow::Error, bytes: u64) -> ReleaseError {
    let is_final = package::is_refusal(error) || error.is::<Unusable>();
    ReleaseError { costly: is_final && bytes >= COSTLY_BYTES, ..release_error(error) }
}

/// The inputs of staging one release.
#[derive(Debug, Clone)]
pub(super) struct StagingJob {
    pub home: Home,
    pub config: Config,
    pub agent_id: AgentId,
    pub name: AgentName,
    pub package: Package,
    /// Of [`Action::Stage`](crate::core::agent::AgentAction::Stage).
    pub id: u64,
    /// The epoch of the last committed release, which may not be in the epochs' file yet.
    pub committed_epoch: u64,
}

/// Stages a release and reports with [`Input::Staged`].
pub(super) fn start(inputs: &Inputs, context: &StagingContext, job: StagingJob) -> Staging {
    let (inputs, context, progress) = (inputs.clone(), context.clone(), Arc::new(StagingProgress::default()));
    let (alive, dropped) = oneshot::channel();
    let staging = Staging { version: job.package.version.clone(), progress: Arc::clone(&progress), _alive: alive };
    tokio::spawn(async move {
        let (id, name, version) = (job.id, job.name.clone(), job.package.version.clone());
        let permit = tokio::select! {
            // A permit acquired by the losing arm is released to the next task.
            permit = context.permits.acquire_owned() => Some(permit),
            _ = dropped => None,
        };
        let shared = Arc::clone(&progress);
        let result = match permit {
            None => Err(ReleaseError::failed("it is not ordered any more")),
            Some(_permit) => match tokio::task::spawn_blocking(move || stage(&job, &context.fetch_limits, &progress))
                .await
            {
                Ok(result) => result.map_err(|error| release_error_after(&error, shared.bytes.load(Ordering::Relaxed))),
                Err(error) => Err(ReleaseError::failed(format!("cannot stage it: {error}"))),
            },
        };
        let _ = inputs.send(Input::Staged { id, name, version, result });
    });
    staging
}

fn stage(job: &StagingJob, fetch_limits: &FetchLimits, progress: &StagingProgress) -> Result<Ready> {
    let StagingJob { home, config, agent_id, name, package, committed_epoch, .. } = job;
    let version = &package.version;
    if progress.cancelled.load(Ordering::SeqCst) {
        bail!("it is not ordered any more");
    }
    permissions::agent(home, name)?;
    let request = package_request(name, package);
    check_name(home, &request.release).map_err(anyhow::Error::msg).context(PackageRejected)?;
    let fetching = Fetching::of(home, config, agent_id)?;
    let request = PackageRequest { min_epoch: *committed_epoch, ..request };
    let mut last_logged = Instant::now();
    let tree = fetching.fetch(request, fetch_limits, |end| progress.set_disconnector(end), &mut |bytes, total| {
        progress.bytes.store(bytes, Ordering::Relaxed);
        progress.total.store(total.unwrap_or(0), Ordering::Relaxed);
        if last_logged.elapsed() >= PROGRESS_INTERVAL {
            last_logged = Instant::now();
            tracing::info!(agent = %name, version = %version, bytes, total, "a download is in progress");
        }
        !progress.cancelled.load(Ordering::SeqCst)
    })?;
    let directory = home.release(name, version);
    let release = ledger::LedgerRelease {
        version: version.clone(),
        sha256: Some(tree.sha256().clone()),
        epoch: tree.binding().epoch,
        unknown: Default::default(),
    };
    tree.move_to(&directory)?;
    // A release that cannot be run is discarded.
    let program = launch::inspect(home, name, version)
        .inspect_err(|_| {
            let _ = package::discard(&directory);
        })
        .context(Unusable)?;
    Ok(Ready { release, program })
}

/// Checks that a release can have its own directory: not a reserved name, and not another release's name on a case-insensitive file system.
fn check_name(home: &Home, release: &Release) -> Result<(), String> {
    let Release { name, version, .. } = release;
    names::check(release).map_err(|why| format!("cannot install {name} {version}: {why}"))?;
    // If the directory exists but is not listed under exactly this name, it belongs to a release whose name the file system treats as equal.
    if !home.release(name, version).exists() {
        return Ok(());
    }
    let entries = std::fs::read_dir(home.agent(name)).into_iter().flatten().flatten();
    let installed: Vec<Version> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    match installed.iter().find(|other| names::differ_only_in_case(other, version)) {
        Some(other) if !installed.contains(version) => Err(format!(
            "cannot install {name} {version}: this host's file system does not distinguish it from {other}, which is installed; choose another version"
        )),
        _ => Ok(()),
    }
}

/// The package that an order names.
pub(super) fn package_request(name: &AgentName, package: &Package) -> PackageRequest {
    PackageRequest::of(package, name, platform::OS, platform::ARCH)
}

/// The ledger entry for the release in a directory. `completed`: the package data stored there, where it can be read.
pub(super) fn release(version: Version, completed: Option<&Completed>) -> ledger::LedgerRelease {
    let sha256 = completed.map(|completed| completed.sha256.clone());
    let epoch = completed.map_or(0, |completed| completed.epoch);
    ledger::LedgerRelease { version, sha256, epoch, unknown: Default::default() }
}

/// Checks whether a release on disk may be activated: the home is safe, and the release was not withdrawn since it was staged.
/// `committed_epoch`: as in [`StagingJob`]; `inspect`: also read how it is run.
pub(super) fn admit(
    home: &Home,
    name: &AgentName,
    version: &Version,
    committed_epoch: u64,
    inspect: bool,
) -> Result<(ledger::LedgerRelease, Option<Program>)> {
    permissions::agent(home, name)?;
    permissions::release(home, name, version)?;
    let completed = package::load_completed(&home.release(name, version))?;
    let least = Epochs::load(home)?.least(name.as_str()).max(committed_epoch);
    completed.admit(least, &keyring::trusted(home)?)?;
    let program = inspect.then(|| launch::inspect(home, name, version)).transpose()?;
    Ok((release(version.clone(), Some(&completed)), program))
}

/// Checks whether a release that was active before is on disk and can be run. Its epoch is not checked: an operator may roll back to it.
pub(super) fn check_usable(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    permissions::release(home, name, version)?;
    package::load_completed(&home.release(name, version))?;
    launch::inspect(home, name, version).map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn job(name: &str) -> StagingJob {
        StagingJob {
            home: Home::new(std::path::Path::new("/nowhere")),
            config: Config::default(),
            agent_id: "1".parse().unwrap(),
            name: name.parse().unwrap(),
            package: Package::new("1".parse().unwrap()),
            id: 1,
            committed_epoch: 0,
        }
    }

    #[test]
    fn a_shortage_of_host_resources_is_recognized_anywhere_in_the_error_chain() {
        use std::io;
        let reported =
            |error: io::Error| release_error(&anyhow::Error::from(error).context("cannot run it").context("again"));
        let shortage = (1..200).find(|code| platform::is_shortage(&io::Error::from_raw_os_error(*code))).unwrap();
        assert!(reported(io::Error::from_raw_os_error(shortage)).host_shortage);
        assert!(!reported(io::ErrorKind::NotFound.into()).host_shortage);
    }

    #[tokio::test]
    async fn a_cancelled_staging_does_not_wait_for_its_turn() {
        let (inputs, _receiver) = mpsc::unbounded_channel();
        let context = StagingContext::new();
        let permits = context.permits.acquire_many(MAX_CONCURRENT as u32).await.unwrap();
        let waiting: Vec<Staging> =
            (0..10).map(|number| start(&inputs, &context, job(&format!("a{number}")))).collect();
        let waits = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(waits(), 10);
        drop(waiting);
        while waits() > 0 {
            tokio::task::yield_now().await;
        }
        drop(permits);
    }
}
