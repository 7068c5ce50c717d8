//! Staging a release beside what runs: fetched, verified, unpacked, looked at; then it may be activated.

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

/// So many are fetched at the same time.
const AT_ONCE: usize = 3;
/// To download so much for nothing is not to be done again soon.
const COSTLY: u64 = 1 << 20;
/// The log tells so often how far a download is.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What those that are staged at the same time share.
#[derive(Debug, Clone)]
pub(super) struct StagingContext {
    turns: Arc<Semaphore>,
    commons: Arc<FetchLimits>,
}

impl StagingContext {
    pub(super) fn new() -> StagingContext {
        StagingContext { turns: Arc::new(Semaphore::new(AT_ONCE)), commons: Arc::default() }
    }
}

/// A release that is being staged, as who ordered it sees it. Dropped, the release is not wanted any more: its download ends, and what
/// came of it stays for another time.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) version: Version,
    seen: Arc<StagingResult>,
    /// Closed with it: who still waits for his turn then leaves.
    _wanted: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct StagingResult {
    bytes: AtomicU64,
    /// Zero: not known yet.
    total: AtomicU64,
    unwanted: AtomicBool,
    /// Of the download: it may wait long for what does not come.
    end: Mutex<Option<Disconnector>>,
}

impl StagingResult {
    /// Notes how the download is ended. It is looked at afterwards whether it is still wanted: who gave it up in between found nothing here.
    fn ends_by(&self, end: Disconnector) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }

    fn give_up(&self) {
        self.unwanted.store(true, Ordering::SeqCst);
        if let Some(end) = self.end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            end.now();
        }
    }
}

impl Staging {
    /// How far its download is; `None` before it has begun.
    pub(super) fn status(&self) -> Option<DownloadStatus> {
        let (bytes, total) = (self.seen.bytes.load(Ordering::Relaxed), self.seen.total.load(Ordering::Relaxed));
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
        self.seen.give_up();
    }
}

/// A release that was unpacked, and is none that this manager can run.
#[derive(Debug)]
struct Unusable;

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the release is not kept")
    }
}

/// Why a release could not be staged, activated or started.
pub(super) fn refusal(error: &anyhow::Error) -> ReleaseError {
    ReleaseError {
        why: cut(&format!("{error:#}"), MAX_MESSAGE_BYTES),
        refused: package::is_refusal(error) || error.is::<UnsafeHome>(),
        retry_after: error.downcast_ref::<Unavailable>().and_then(|unavailable| unavailable.retry_after),
        costly: false,
        withdrawn: error.is::<WithdrawnRelease>(),
        of_host: error.chain().filter_map(|cause| cause.downcast_ref()).any(platform::is_shortage),
    }
}

/// As [`refusal`], of a release of which so many bytes were downloaded.
fn refusal_after(error: &anyhow::Error, bytes: u64) -> ReleaseError {
    let is_final = package::is_refusal(error) || error.is::<Unusable>();
    ReleaseError { costly: is_final && bytes >= COSTLY, ..refusal(error) }
}

/// All that staging one release needs to know.
#[derive(Debug, Clone)]
pub(super) struct StagingJob {
    pub home: Home,
    pub config: Config,
    pub agent_id: AgentId,
    pub name: AgentName,
    pub package: Package,
    /// Of [`Action::Stage`](crate::core::agent::AgentAction::Stage).
    pub id: u64,
    /// The epoch of the release that was committed last, which may not be in the epochs' file yet.
    pub committed_epoch: u64,
}

/// Stages a release and reports with [`Input::Staged`].
pub(super) fn start(inputs: &Inputs, desk: &StagingContext, job: StagingJob) -> Staging {
    let (inputs, desk, seen) = (inputs.clone(), desk.clone(), Arc::new(StagingResult::default()));
    let (wanted, unwanted) = oneshot::channel();
    let staging = Staging { version: job.package.version.clone(), seen: Arc::clone(&seen), _wanted: wanted };
    tokio::spawn(async move {
        let (id, name, version) = (job.id, job.name.clone(), job.package.version.clone());
        let turn = tokio::select! {
            // A turn that comes and is dropped is the next one's.
            turn = desk.turns.acquire_owned() => Some(turn),
            _ = unwanted => None,
        };
        let come = Arc::clone(&seen);
        let result = match turn {
            None => Err(ReleaseError::failed("it is not wanted any more")),
            Some(_turn) => match tokio::task::spawn_blocking(move || stage(&job, &desk.commons, &seen)).await {
                Ok(result) => result.map_err(|error| refusal_after(&error, come.bytes.load(Ordering::Relaxed))),
                Err(error) => Err(ReleaseError::failed(format!("cannot stage it: {error}"))),
            },
        };
        let _ = inputs.send(Input::Staged { id, name, version, result });
    });
    staging
}

fn stage(job: &StagingJob, commons: &FetchLimits, seen: &StagingResult) -> Result<Ready> {
    let StagingJob { home, config, agent_id, name, package, committed_epoch, .. } = job;
    let version = &package.version;
    if seen.unwanted.load(Ordering::SeqCst) {
        bail!("it is not wanted any more");
    }
    permissions::agent(home, name)?;
    let wanted = wanted(name, package);
    has_place(home, &wanted.release).map_err(anyhow::Error::msg).context(PackageRejected)?;
    let fetching = Fetching::of(home, config, agent_id)?;
    let wanted = PackageRequest { least_epoch: *committed_epoch, ..wanted };
    let mut told = Instant::now();
    let tree = fetching.fetch(wanted, commons, |end| seen.ends_by(end), &mut |bytes, total| {
        seen.bytes.store(bytes, Ordering::Relaxed);
        seen.total.store(total.unwrap_or(0), Ordering::Relaxed);
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tracing::info!(agent = %name, version = %version, bytes, total, "a download is under way");
        }
        !seen.unwanted.load(Ordering::SeqCst)
    })?;
    let directory = home.release(name, version);
    let release = ledger::LedgerRelease {
        version: version.clone(),
        sha256: Some(tree.sha256().clone()),
        epoch: tree.binding().epoch,
        unknown: Default::default(),
    };
    tree.move_to(&directory)?;
    // A release that cannot be run is not kept as one that could.
    let program = launch::inspect(home, name, version)
        .inspect_err(|_| {
            let _ = package::discard(&directory);
        })
        .context(Unusable)?;
    Ok(Ready { release, program })
}

/// Whether a release can have a directory of its own: it takes no name of ours, nor that of another release as the file system sees it.
fn has_place(home: &Home, release: &Release) -> Result<(), String> {
    let Release { name, version, .. } = release;
    names::check(release).map_err(|why| format!("cannot install {name} {version}: {why}"))?;
    // Where it is there already and nothing of just that name is listed, another one is meant.
    if !home.release(name, version).exists() {
        return Ok(());
    }
    let entries = std::fs::read_dir(home.agent(name)).into_iter().flatten().flatten();
    let installed: Vec<Version> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    match installed.iter().find(|other| names::differ_only_in_case(other, version)) {
        Some(other) if !installed.contains(version) => Err(format!(
            "cannot install {name} {version}: this host's file system sees it as {other}, which is installed; choose another version"
        )),
        _ => Ok(()),
    }
}

/// The package that an order asks for.
pub(super) fn wanted(name: &AgentName, package: &Package) -> PackageRequest {
    PackageRequest::of(package, name, platform::OS, platform::ARCH)
}

/// The release that a directory holds. `completed`: what that says of its package, where it can be read.
pub(super) fn release(version: Version, completed: Option<&Completed>) -> ledger::LedgerRelease {
    let sha256 = completed.map(|completed| completed.sha256.clone());
    let epoch = completed.map_or(0, |completed| completed.epoch);
    ledger::LedgerRelease { version, sha256, epoch, unknown: Default::default() }
}

/// Whether a release that lies on disk may be activated: the home can be relied on, and nothing that the release was accepted by when it was
/// staged was withdrawn since. `committed_epoch`: as in [`StagingJob`]; `inspect`: also how it is run.
pub(super) fn admit(
    home: &Home,
    name: &AgentName,
    version: &Version,
    committed_epoch: u64,
    inspect: bool,
) -> Result<(ledger::LedgerRelease, Option<Program>)> {
    permissions::agent(home, name)?;
    permissions::release(home, name, version)?;
    let completed = package::whole(&home.release(name, version))?;
    let least = Epochs::load(home)?.least(name.as_str()).max(committed_epoch);
    completed.admit(least, &keyring::trusted(home)?)?;
    let program = inspect.then(|| launch::inspect(home, name, version)).transpose()?;
    Ok((release(version.clone(), Some(&completed)), program))
}

/// Whether a release that was active before lies on disk and can be run. Its epoch is not asked for: an operator may return to it.
pub(super) fn usable(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    permissions::release(home, name, version)?;
    package::whole(&home.release(name, version))?;
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
    fn a_shortage_is_of_the_host_however_deep_it_lies() {
        use std::io;
        let told = |error: io::Error| refusal(&anyhow::Error::from(error).context("cannot run it").context("again"));
        let shortage = (1..200).find(|code| platform::is_shortage(&io::Error::from_raw_os_error(*code))).unwrap();
        assert!(told(io::Error::from_raw_os_error(shortage)).of_host);
        assert!(!told(io::ErrorKind::NotFound.into()).of_host);
    }

    #[tokio::test]
    async fn who_is_not_wanted_any_more_does_not_wait_for_his_turn() {
        let (inputs, _words) = mpsc::unbounded_channel();
        let desk = StagingContext::new();
        let turns = desk.turns.acquire_many(AT_ONCE as u32).await.unwrap();
        let waiting: Vec<Staging> = (0..10).map(|number| start(&inputs, &desk, job(&format!("a{number}")))).collect();
        let waits = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(waits(), 10);
        drop(waiting);
        while waits() > 0 {
            tokio::task::yield_now().await;
        }
        drop(turns);
    }
}
