//! Staging a release beside what runs: fetched, verified, unpacked, looked at; then it may be activated.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::sync::{Semaphore, oneshot};

use super::Input;
use super::journal::MAX_MESSAGE_BYTES;
use super::run::Inputs;
use crate::config::Config;
use crate::core::desired::Order;
use crate::core::model::{AgentId, AgentName, Release, Version};
use crate::core::status::DownloadStatus;
use crate::core::text::cut;
use crate::endpoint::End;
use crate::fetching::Fetching;
use crate::home::Home;
use crate::installation::guard::{self, Unsound};
use crate::installation::{Epochs, keyring};
use crate::package::{self, Commons, Completed, Unavailable, Wanted};
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
pub(super) struct Desk {
    turns: Arc<Semaphore>,
    commons: Arc<Commons>,
}

impl Desk {
    pub(super) fn new() -> Desk {
        Desk { turns: Arc::new(Semaphore::new(AT_ONCE)), commons: Arc::default() }
    }
}

/// A release that is being staged, as who ordered it sees it. Dropped, the release is not wanted any more: its download ends, and what
/// came of it stays for another time.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) version: Version,
    seen: Arc<Seen>,
    /// Closed with it: who still waits for his turn then leaves.
    _wanted: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    /// Zero: not known yet.
    total: AtomicU64,
    unwanted: AtomicBool,
    /// Of the download: it may wait long for what does not come.
    end: Mutex<Option<End>>,
}

impl Seen {
    /// Notes how the download is ended. It is looked at afterwards whether it is still wanted: who gave it up in between found nothing here.
    fn ends_by(&self, end: End) {
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
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) why: String,
    /// Somebody, or something, was looked at and not trusted, as opposed to not to be had.
    pub(super) refused: bool,
    /// Who has it asked to be left alone for so long.
    pub(super) retry_after: Option<Duration>,
    /// It was downloaded to be refused, and will be again.
    pub(super) costly: bool,
}

impl Refusal {
    pub(super) fn of(error: &anyhow::Error) -> Refusal {
        let refused = package::is_refusal(error) || error.is::<Unsound>();
        let retry_after = error.downcast_ref::<Unavailable>().and_then(|unavailable| unavailable.retry_after);
        Refusal { why: cut(&format!("{error:#}"), MAX_MESSAGE_BYTES), refused, retry_after, costly: false }
    }

    /// Of a release of which so many bytes were downloaded.
    fn after(error: &anyhow::Error, bytes: u64) -> Refusal {
        let is_final = package::is_refusal(error) || error.is::<Unusable>();
        Refusal { costly: is_final && bytes >= COSTLY, ..Refusal::of(error) }
    }

    /// As an event has it.
    pub(super) fn outcome(&self) -> &'static str {
        if self.refused { "refused" } else { "failed" }
    }
}

/// All that staging one release needs to know.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub home: Home,
    pub config: Config,
    pub agent_id: AgentId,
    pub name: AgentName,
    pub order: Order,
}

/// Stages a release and reports with [`Input::Staged`].
pub(super) fn start(inputs: &Inputs, desk: &Desk, job: Job) -> Staging {
    let (inputs, desk, seen) = (inputs.clone(), desk.clone(), Arc::new(Seen::default()));
    let (wanted, unwanted) = oneshot::channel();
    let staging = Staging { version: job.order.version.clone(), seen: Arc::clone(&seen), _wanted: wanted };
    tokio::spawn(async move {
        let _turn = tokio::select! {
            // A turn that comes and is dropped is the next one's.
            turn = desk.turns.acquire_owned() => turn,
            _ = unwanted => return,
        };
        let (name, version, come) = (job.name.clone(), job.order.version.clone(), Arc::clone(&seen));
        let result = match tokio::task::spawn_blocking(move || stage(&job, &desk.commons, &seen)).await {
            Ok(result) => result.map_err(|error| Refusal::after(&error, come.bytes.load(Ordering::Relaxed))),
            Err(error) => Err(Refusal::of(&anyhow::anyhow!("cannot stage it: {error}"))),
        };
        let _ = inputs.send(Input::Staged { name, version, result });
    });
    staging
}

fn stage(job: &Job, commons: &Commons, seen: &Seen) -> Result<()> {
    let Job { home, config, agent_id, name, order } = job;
    if seen.unwanted.load(Ordering::SeqCst) {
        bail!("it is not wanted any more");
    }
    guard::agent(home, name)?;
    let fetching = Fetching::of(home, config, agent_id)?;
    let mut told = Instant::now();
    let tree = fetching.fetch(wanted(name, order), commons, |end| seen.ends_by(end), &mut |bytes, total| {
        seen.bytes.store(bytes, Ordering::Relaxed);
        seen.total.store(total.unwrap_or(0), Ordering::Relaxed);
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tracing::info!(agent = %name, version = %order.version, bytes, total, "a download is under way");
        }
        !seen.unwanted.load(Ordering::SeqCst)
    })?;
    let release = home.release(name, &order.version);
    tree.move_to(&release)?;
    // A release that cannot be run is not kept as one that could.
    launch::inspect(home, name, &order.version)
        .inspect_err(|_| {
            let _ = package::discard(&release);
        })
        .context(Unusable)?;
    Ok(())
}

/// The package that an order asks for.
pub(super) fn wanted(name: &AgentName, order: &Order) -> Wanted {
    Wanted {
        tarball: order.tarball.clone(),
        file: order.file.clone(),
        sha256: order.sha256.clone(),
        size: order.size,
        ..Wanted::new(Release {
            name: name.clone(),
            version: order.version.clone(),
            os: platform::OS,
            arch: platform::ARCH,
        })
    }
}

/// Whether a release that lies on disk may be activated: the home can be relied on, and nothing that the release was accepted by when it was
/// staged was withdrawn since.
pub(super) fn admit(home: &Home, name: &AgentName, version: &Version) -> Result<Completed> {
    guard::agent(home, name)?;
    guard::release(home, name, version)?;
    let completed = package::whole(&home.release(name, version))?;
    completed.admit(Epochs::load(home)?.least(name.as_str()), &keyring::trusted(home)?)?;
    Ok(completed)
}

/// As [`admit`], and commits the release's epoch: no older one is accepted from then on.
pub(super) fn commit_epoch(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    let completed = admit(home, name, version)?;
    Epochs::commit(home, name.as_str(), completed.epoch)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::core::desired::Run;
    use crate::core::env::Env;

    fn job(name: &str) -> Job {
        let version: Version = "1".parse().unwrap();
        let order =
            Order { version, tarball: None, file: None, sha256: None, size: None, run: Run::Start, env: Env::new() };
        Job {
            home: Home::new(std::path::Path::new("/nowhere")),
            config: Config::default(),
            agent_id: "1".parse().unwrap(),
            name: name.parse().unwrap(),
            order,
        }
    }

    #[tokio::test]
    async fn who_is_not_wanted_any_more_does_not_wait_for_his_turn() {
        let (inputs, _words) = mpsc::unbounded_channel();
        let desk = Desk::new();
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
