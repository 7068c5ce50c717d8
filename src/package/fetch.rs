//! Brings a package's archive and its signature into the cache, over networks that break.
//!
//! A download that was cut goes on where it stopped, in this run or in a later one, if the other end still has the very same file: its
//! ETag is kept beside the part and sent as `If-Range`. Nothing here judges the bytes; that is [`super::verify`]'s.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{MAX_SIGNATURE_BYTES, Places, Refused, SIGNATURE_SUFFIX, Wanted};
use crate::core::protocol::DOWNLOAD_PATH;
use crate::core::units::Size;
use crate::endpoint::{Client, Endpoint, Reply};
use crate::{platform, store};

/// A package whose size nobody told is given up beyond this.
const MAX_PACKAGE_BYTES: u64 = 4 << 30;
/// Room that a package needs for its archive and its tree, as a multiple of the archive.
pub(super) const SPACE_PER_PACKAGE: u64 = 4;
/// Left free for everybody else on the host, bytes.
const SPACE_RESERVE: u64 = 64 << 20;

const CHUNK_BYTES: usize = 64 << 10;
const MAX_ETAG_BYTES: u64 = 256;

/// Tries at a download that breaks without getting further.
const TRIES: u32 = 5;
/// A try that brought as much as this was worth it, and does not count.
const WORTHWHILE_BYTES: u64 = 1 << 20;
/// Tries in all: one who always sends the same megabyte is not listened to for ever.
const TRIES_IN_ALL: u32 = 100;
const FIRST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 250 });
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// A directory on some host, below which packages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    directory: Endpoint,
    /// Whether it is an endpoint of ours, which is told the agent id.
    ours: bool,
}

impl Source {
    fn get(&self, client: &Client, file: &str, headers: &[(&str, &str)]) -> Result<Reply> {
        let path = format!("/{file}");
        match self.ours {
            true => client.get(&self.directory, &path, headers),
            false => client.get_unnamed(&self.directory, &path, headers),
        }
    }

    fn lacks(&self, file: &str) -> anyhow::Error {
        let url = self.directory.url(&format!("/{file}"));
        anyhow!("there is no such package: {url} is not there; publish it with `aops gateway publish`")
    }
}

/// Where to look, in this order.
pub(super) fn sources(endpoints: &[Endpoint], tarball: Option<&str>) -> Result<Vec<Source>> {
    let Some(tarball) = tarball else {
        ensure!(!endpoints.is_empty(), "no endpoint is configured");
        let of = |endpoint: &Endpoint| Source { directory: endpoint.below(DOWNLOAD_PATH), ours: true };
        return Ok(endpoints.iter().map(of).collect());
    };
    let directory: Endpoint = tarball.parse().context("cannot use the tarball's address")?;
    let ours = endpoints.iter().any(|endpoint| endpoint.origin() == directory.origin());
    Ok(vec![Source { directory, ours }])
}

/// One error out of what each source failed with.
pub(super) fn all_failed(mut failures: Vec<anyhow::Error>) -> anyhow::Error {
    match failures.len() {
        1 => failures.remove(0),
        _ => {
            let all: Vec<String> = failures.iter().map(|failure| format!("{failure:#}")).collect();
            let error = anyhow!("none of {} endpoints could serve it: {}", all.len(), all.join("; "));
            if failures.iter().any(|failure| failure.is::<Refused>()) { error.context(Refused) } else { error }
        }
    }
}

/// Refuses to begin what cannot be finished for want of space.
pub(super) fn ensure_space(directory: &Path, bytes: u64) -> Result<()> {
    let free = platform::free_space(directory)
        .with_context(|| format!("cannot see how much space is free in {}", directory.display()))?;
    let needed = bytes.saturating_add(SPACE_RESERVE);
    ensure!(
        free >= needed,
        "there is not enough space in {}: {} free, {} needed; free some there",
        directory.display(),
        rounded(free),
        rounded(needed)
    );
    Ok(())
}

fn rounded(bytes: u64) -> Size {
    Size(if bytes < 1 << 20 { bytes } else { bytes.div_ceil(1 << 20) << 20 })
}

/// What is on the disk of a download, besides its finished file.
struct Part {
    path: PathBuf,
    etag: PathBuf,
}

impl Part {
    /// How much is there, and of which file, where it can be resumed.
    fn resumable(&self) -> Option<(u64, String)> {
        let have = fs::metadata(&self.path).ok()?.len();
        let etag = String::from_utf8(store::read(&self.etag, MAX_ETAG_BYTES).ok()??).ok()?;
        (have > 0 && !etag.is_empty()).then_some((have, etag))
    }

    fn begin(&self, etag: Option<&str>) -> std::io::Result<File> {
        // In this order: an ETag must never stand beside another file's bytes.
        let _ = fs::remove_file(&self.etag);
        let file = File::create(&self.path)?;
        if let Some(etag) = etag.filter(|etag| !etag.starts_with("W/") && etag.len() as u64 <= MAX_ETAG_BYTES) {
            fs::write(&self.etag, etag)?;
        }
        Ok(file)
    }

    fn resume(&self, at: u64) -> std::io::Result<File> {
        let mut file = OpenOptions::new().write(true).open(&self.path)?;
        file.set_len(at)?;
        file.seek(SeekFrom::End(0))?;
        Ok(file)
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.etag);
        let _ = fs::remove_file(&self.path);
    }
}

/// Why a try failed.
enum Failure {
    /// Another try may get further: how far this one got, and how long to wait if the other end said so.
    Cut { error: anyhow::Error, brought: u64, pause: Option<Duration> },
    /// Another try would fail as well.
    Final(anyhow::Error),
}

/// Downloads a package's signature.
pub(super) fn signature(client: &Client, source: &Source, file: &str) -> Result<String> {
    let name = format!("{file}{SIGNATURE_SUFFIX}");
    let bytes = persistently(|| {
        let reply = answered(source.get(client, &name, &[]), 0)?;
        match reply.status() {
            200 => reply.bytes(MAX_SIGNATURE_BYTES).map_err(|error| Failure::Cut { error, brought: 0, pause: None }),
            404 | 410 => Err(Failure::Final(source.lacks(&name))),
            _ => Err(refused(reply)),
        }
    })?;
    String::from_utf8(bytes).context("its signature file is not text")
}

/// Downloads a package into the cache, where it lies under its own name afterwards.
pub(super) fn archive(
    client: &Client,
    source: &Source,
    file: &str,
    wanted: &Wanted,
    places: &Places,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<PathBuf> {
    if let Some(size) = wanted.size {
        ensure!(size <= MAX_PACKAGE_BYTES, "it has {size} bytes, more than {MAX_PACKAGE_BYTES}");
        ensure_space(&places.staging, size.saturating_mul(SPACE_PER_PACKAGE))?;
    }
    let part =
        Part { path: places.cache.join(format!("{file}.part")), etag: places.cache.join(format!("{file}.part.etag")) };
    persistently(|| {
        let resumable = part.resumable();
        let range = resumable.as_ref().map(|(have, etag)| (format!("bytes={have}-"), etag.as_str()));
        let headers = range.as_ref().map(|(range, etag)| [("range", range.as_str()), ("if-range", *etag)]);
        let have = resumable.as_ref().map_or(0, |(have, _)| *have);
        let reply = answered(source.get(client, file, headers.as_ref().map_or(&[], |both| both.as_slice())), have)?;
        match reply.status() {
            200 => receive(reply, 0, &part, wanted, places, progress),
            206 if have > 0 && range_starts_at(&reply, have) => receive(reply, have, &part, wanted, places, progress),
            // All of it was there already.
            416 if have > 0 && reply.header("content-range") == Some(format!("bytes */{have}").as_str()) => Ok(()),
            206 | 416 => {
                part.remove();
                let error = anyhow!("{} cannot resume the download of {file}", source.directory.origin());
                Err(Failure::Cut { error, brought: 0, pause: None })
            }
            404 | 410 => Err(Failure::Final(source.lacks(file))),
            _ => Err(refused(reply)),
        }
    })?;
    let archive = places.cache.join(file);
    fs::rename(&part.path, &archive).with_context(|| format!("cannot rename {}", part.path.display()))?;
    part.remove();
    Ok(archive)
}

/// Tries again what was cut, until it is done, hopeless, or cut too often.
fn persistently<T>(mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut tries = 0;
    for all in 1.. {
        let (error, pause) = match attempt() {
            Ok(done) => return Ok(done),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Cut { error, brought, pause }) => {
                tries = if brought >= WORTHWHILE_BYTES { 1 } else { tries + 1 };
                (error, pause)
            }
        };
        if tries >= TRIES || all >= TRIES_IN_ALL {
            return Err(error.context(format!("gave up after {all} tries")));
        }
        tracing::warn!(error = format!("{error:#}"), tries, "a download was cut and is tried again");
        platform::pause(pause.unwrap_or_else(|| backed_off(tries)).min(MAX_PAUSE));
    }
    bail!("gave up")
}

/// Twice as long each time, and half of it at random.
fn backed_off(tries: u32) -> Duration {
    let full = FIRST_PAUSE * 2_u32.saturating_pow(tries.saturating_sub(1).min(7));
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

/// One who cannot be reached at all is left to the next endpoint, or to the caller's own back-off; not so in mid-download.
fn answered(reply: Result<Reply>, have: u64) -> Result<Reply, Failure> {
    reply.map_err(|error| match have {
        0 => Failure::Final(error),
        _ => Failure::Cut { error, brought: 0, pause: None },
    })
}

fn refused(reply: Reply) -> Failure {
    let (status, pause) = (reply.status(), reply.retry_after());
    let error = reply.refused();
    if matches!(status, 408 | 425 | 429 | 500..=599) {
        Failure::Cut { error, brought: 0, pause }
    } else {
        Failure::Final(error)
    }
}

/// `content-range: bytes 10-99/100`
fn range_starts_at(reply: &Reply, at: u64) -> bool {
    let start = reply.header("content-range").and_then(|range| range.trim().strip_prefix("bytes ")?.split_once('-'));
    start.is_some_and(|(start, _)| start.parse() == Ok(at))
}

/// Writes a body behind the `at` bytes that are there.
fn receive(
    reply: Reply,
    at: u64,
    part: &Part,
    wanted: &Wanted,
    places: &Places,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<(), Failure> {
    let total = reply.length().map(|rest| at.saturating_add(rest));
    let limit = wanted.size.unwrap_or(MAX_PACKAGE_BYTES);
    let checked = || -> Result<File> {
        if let (Some(total), Some(announced)) = (total, wanted.size)
            && total != announced
        {
            part.remove();
            bail!("it has {total} bytes where {announced} were announced");
        }
        if let Some(total) = total {
            ensure!(total <= limit, "it has {total} bytes, more than {limit}");
            ensure_space(&places.cache, total - at)?;
            ensure_space(&places.staging, total.saturating_mul(SPACE_PER_PACKAGE))?;
        }
        let file = if at == 0 { part.begin(reply.header("etag")) } else { part.resume(at) };
        file.with_context(|| format!("cannot write {}", part.path.display()))
    };
    let mut file = checked().map_err(Failure::Final)?;
    let mut reader = reply.reader();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut done = at;
    progress(done, total.or(wanted.size));
    loop {
        let amount = match reader.read(&mut chunk) {
            Ok(amount) => amount,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                let error = anyhow::Error::new(error).context(format!("the download broke off after {done} bytes"));
                return Err(Failure::Cut { error, brought: done - at, pause: None });
            }
        };
        if amount == 0 {
            break;
        }
        done += amount as u64;
        if done > limit {
            part.remove();
            return Err(Failure::Final(anyhow!("it has more than {limit} bytes")));
        }
        if let Err(error) = file.write_all(&chunk[..amount]) {
            // What does not fit helps nobody, and takes the space from everybody.
            part.remove();
            return Err(Failure::Final(unwritable(error, &places.cache)));
        }
        progress(done, total.or(wanted.size));
    }
    match total.or(wanted.size) {
        Some(total) if done != total => {
            let error = anyhow!("the download ended after {done} of {total} bytes");
            Err(Failure::Cut { error, brought: done - at, pause: None })
        }
        _ => Ok(()),
    }
}

/// Says it plainly when the disk is full.
pub(super) fn unwritable(error: std::io::Error, directory: &Path) -> anyhow::Error {
    let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let context = match full {
        true => format!("there is no space left in {}; free some there", directory.display()),
        false => format!("cannot write in {}", directory.display()),
    };
    anyhow::Error::new(error).context(context)
}
