//! Downloads a package's archive and signature over unreliable networks.
//!
//! An interrupted download is resumed, in this run or a later one, if the server still has the same file: its ETag is kept beside the
//! partial file and sent as `If-Range`. Another source may have a different ETag for the same file; if size and hash were announced, the
//! rest is requested without `If-Range`. A response that is not part of the file (an HTML page of a proxy, a wrong size) leaves the partial
//! file unchanged. [`super::verify`] verifies the bytes as they arrive, so a wrongly combined file costs one more download.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::disk_reservation::{InsufficientSpace, PackageSpace};
use super::partial::PartialDownload;
use super::progress::{DownloadCancelled, DownloadProgress};
use super::sources::PackageSource;
use super::{FetchContext, MAX_PACKAGE_BYTES, MAX_SIGNATURE_BYTES, PackageRejected, PackageRequest, SIGNATURE_SUFFIX};
use crate::core::units::Span;
use crate::endpoint::{self, HttpResponse};

const CHUNK_BYTES: usize = 64 << 10;

/// Consecutive attempts without progress.
const TRIES: u32 = 5;
/// An attempt that received at least this much counts as progress.
const WORTHWHILE_BYTES: u64 = 1 << 20;
/// Total attempts, against a server that always sends the same megabyte.
const TRIES_IN_ALL: u32 = 100;
const FIRST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 250 });
/// A source with a longer `Retry-After` is left to a later fetch.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Why a source failed to deliver.
#[derive(Debug)]
pub(super) enum SourceFailure {
    /// Another source may succeed.
    Source { error: anyhow::Error, retry_after: Option<Duration> },
    /// The time limit of the source is over; the bytes received are kept.
    Late(anyhow::Error),
    /// The data does not match the signature; another source, or another download, may be good.
    Damaged(anyhow::Error),
    /// The cause is on this host: another source would not help.
    Host(anyhow::Error),
}

impl From<DownloadCancelled> for SourceFailure {
    fn from(unwanted: DownloadCancelled) -> SourceFailure {
        SourceFailure::Host(unwanted.into())
    }
}

impl SourceFailure {
    pub(super) fn source(error: anyhow::Error) -> SourceFailure {
        SourceFailure::Source { error, retry_after: None }
    }
}

/// Why an attempt failed.
enum TryFailure {
    /// Another attempt may get further: bytes received by this one, and the server's `Retry-After`.
    Cut { error: anyhow::Error, brought: u64, pause: Option<Duration> },
    /// Another attempt would fail as well.
    Final(SourceFailure),
}

impl TryFailure {
    fn cut(error: anyhow::Error) -> TryFailure {
        TryFailure::Cut { error, brought: 0, pause: None }
    }

    fn source(error: anyhow::Error) -> TryFailure {
        TryFailure::Final(SourceFailure::source(error))
    }

    fn host(error: anyhow::Error) -> TryFailure {
        TryFailure::Final(SourceFailure::Host(error))
    }
}

impl From<DownloadCancelled> for TryFailure {
    fn from(unwanted: DownloadCancelled) -> TryFailure {
        TryFailure::Final(unwanted.into())
    }
}

/// What to download, from where, and the time limit.
pub(super) struct Download<'a> {
    pub(super) means: &'a FetchContext<'a>,
    pub(super) source: &'a PackageSource,
    pub(super) file: &'a str,
    pub(super) wanted: &'a PackageRequest,
    /// The time limit of the source, which ends at `until`.
    pub(super) time: Duration,
    pub(super) until: Instant,
}

impl Download<'_> {
    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }

    /// The error text after the time limit.
    fn late(&self) -> String {
        let within = self.means.within;
        // The source had nearly all of the time.
        let share = match self.time + within / 20 >= within {
            true => format!("{} (downloadTimeout)", Span(within)),
            false => format!("{}, its share of {} (downloadTimeout)", Span(to_a_tenth(self.time)), Span(within)),
        };
        format!("the download from {} did not complete within {share}", self.source)
    }
}

fn to_a_tenth(time: Duration) -> Duration {
    match time < Duration::from_secs(10) {
        true => Duration::from_millis(time.as_millis() as u64 / 100 * 100),
        false => Duration::from_secs(time.as_secs()),
    }
}

/// Downloads a package's signature file, which must be text.
pub(super) fn signature(download: &Download<'_>, watch: &mut DownloadProgress<'_>) -> Result<String, SourceFailure> {
    let Download { means, source, until, .. } = *download;
    let name = format!("{}{SIGNATURE_SUFFIX}", download.file);
    persistently(&name, download, watch, |_| {
        let reply = answered(source.get(means, &name, &[], until), source.last)?;
        match reply.status() {
            200 if reply.is_page() => Err(TryFailure::cut(source.hidden("HTML"))),
            200 => {
                let bytes = reply.bytes(MAX_SIGNATURE_BYTES).map_err(TryFailure::cut)?;
                let text =
                    String::from_utf8(bytes).context("the signature file is not text").map_err(TryFailure::cut)?;
                match text.trim_start().starts_with('<') {
                    true => Err(TryFailure::cut(source.hidden("markup instead of a signature"))),
                    false => Ok(text),
                }
            }
            404 | 410 => Err(TryFailure::source(source.lacks(&name))),
            _ => Err(refused(reply)),
        }
    })
}

/// Downloads the rest of a package into its partial file.
pub(super) fn archive(
    download: &Download<'_>,
    part: &mut PartialDownload<'_>,
    room: &mut PackageSpace<'_>,
    watch: &mut DownloadProgress<'_>,
) -> Result<(), SourceFailure> {
    let Download { means, source, file, wanted, until, .. } = *download;
    room.has_archive(part.have());
    if let Some(size) = wanted.size {
        let most = MAX_PACKAGE_BYTES;
        if size > most {
            return Err(SourceFailure::source(
                anyhow!("the package has {size} bytes, more than the limit of {most}").context(PackageRejected),
            ));
        }
        fit(size, room, watch)?;
    }
    let is_known = wanted.size.is_some() && wanted.sha256.is_some();
    let mut by = Resume::IfSame;
    persistently(file, download, watch, |watch| {
        if wanted.size.is_some_and(|size| size == part.have()) {
            return Ok(());
        }
        if by == Resume::IfSame && part.have() > 0 && part.resumable().is_none() && is_known {
            by = Resume::Blindly;
        }
        let etag = part.resumable().map(|(_, etag)| etag).filter(|_| by == Resume::IfSame);
        let have = if etag.is_some() || by == Resume::Blindly { part.have() } else { 0 };
        let range = format!("bytes={have}-");
        let headers = [("range", range.as_str()), ("if-range", etag.unwrap_or_default())];
        let headers = &headers[..usize::from(have > 0) + usize::from(etag.is_some())];
        let reply = answered(source.get(means, file, headers, until), source.last || have > 0)?;
        match reply.status() {
            200 | 206 if reply.is_page() => Err(TryFailure::cut(source.hidden("HTML"))),
            200 if etag.is_some() && is_known => {
                by = Resume::Blindly;
                Err(TryFailure::cut(anyhow!(
                    "{source} has a different ETag for {file}; requesting the rest without If-Range"
                )))
            }
            // A response without even a length must not replace the bytes received so far.
            200 if have > 0 && reply.length().is_none() && is_known => {
                Err(TryFailure::cut(anyhow!("{source} answered a range request with a whole file of unknown length")))
            }
            200 => {
                let total = reply.length();
                fits(total, wanted)?;
                part.begin(reply.header("etag"), &source.directory.origin()).map_err(TryFailure::host)?;
                room.has_archive(0);
                receive(download, reply, total, part, room, watch)
            }
            206 => {
                let is_rest = |range: &ContentRange| match by {
                    Resume::IfSame => is_same(&reply, part, source),
                    Resume::Blindly => range.total == wanted.size,
                    Resume::Never => false,
                };
                match range_of(&reply).filter(|range| have > 0 && range.from == have && is_rest(range)) {
                    Some(ContentRange { total, .. }) => {
                        fits(total, wanted)?;
                        part.go_on(&source.directory.origin());
                        receive(download, reply, total, part, room, watch)
                    }
                    None => {
                        by = Resume::Never;
                        Err(unresumable(part, source, file))
                    }
                }
            }
            // All bytes were received already.
            416 if have > 0 && reply.header("content-range") == Some(format!("bytes */{have}").as_str()) => Ok(()),
            416 => {
                by = Resume::Never;
                Err(unresumable(part, source, file))
            }
            404 | 410 => Err(TryFailure::source(source.lacks(file))),
            _ => Err(refused(reply)),
        }
    })?;
    // The size may be known only now.
    fit(part.have(), room, watch)
}

/// How an interrupted download continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// If the source's ETag is that of the partial file.
    IfSame,
    /// Whatever ETag the source has: size and hash are known.
    Blindly,
    /// From the first byte.
    Never,
}

/// Whether a range response belongs to the same file as the partial one. Another origin must confirm the ETag: a server that ignores
/// `If-Range` could send the rest of a different file, which would be noticed only at the end.
fn is_same(reply: &HttpResponse, part: &PartialDownload<'_>, source: &PackageSource) -> bool {
    let known = part.resumable().map(|(_, etag)| etag);
    match reply.header("etag") {
        Some(etag) => Some(etag) == known,
        None => part.is_from(&source.directory.origin()),
    }
}

fn unresumable(part: &mut PartialDownload<'_>, source: &PackageSource, file: &str) -> TryFailure {
    part.forget();
    TryFailure::cut(anyhow!(
        "{} cannot resume the download of {file}; downloading it from the start",
        source.directory.origin()
    ))
}

/// Rejects a response whose size differs from the announced one, or exceeds the limit.
fn fits(total: Option<u64>, wanted: &PackageRequest) -> Result<(), TryFailure> {
    match (total, wanted.size) {
        (Some(total), Some(announced)) if total != announced => Err(TryFailure::cut(
            anyhow!("the size is {total} bytes, but {announced} were announced").context(PackageRejected),
        )),
        (Some(total), None) if total > MAX_PACKAGE_BYTES => Err(TryFailure::source(
            anyhow!("the package has {total} bytes, more than the limit of {MAX_PACKAGE_BYTES}")
                .context(PackageRejected),
        )),
        _ => Ok(()),
    }
}

fn fit(size: u64, room: &mut PackageSpace<'_>, watch: &mut DownloadProgress<'_>) -> Result<(), SourceFailure> {
    room.fit(size, &mut || Ok(watch.still_wanted()?)).map_err(SourceFailure::Host)
}

/// Appends a response body to the partial file.
fn receive(
    download: &Download<'_>,
    reply: HttpResponse,
    total: Option<u64>,
    part: &mut PartialDownload<'_>,
    room: &mut PackageSpace<'_>,
    watch: &mut DownloadProgress<'_>,
) -> Result<(), TryFailure> {
    let Download { means, wanted, .. } = *download;
    let total = total.or(wanted.size);
    let limit = total.unwrap_or(MAX_PACKAGE_BYTES);
    let at = part.have();
    if let Some(total) = total {
        fit(total, room, watch).map_err(TryFailure::Final)?;
    }
    let mut reader = reply.reader();
    let mut chunk = vec![0; CHUNK_BYTES];
    watch.at(at, total)?;
    loop {
        let (amount, done) = match reader.read(&mut chunk) {
            Ok(amount) => (amount, part.have() + amount as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                let done = part.have();
                let error =
                    anyhow::Error::new(error).context(format!("the download was interrupted after {done} bytes"));
                return Err(TryFailure::Cut { error, brought: done - at, pause: None });
            }
        };
        if amount == 0 {
            break;
        }
        if done > limit {
            // The excess shows that this is a different file, so discard all of it.
            part.clear().map_err(TryFailure::host)?;
            return Err(TryFailure::source(
                anyhow!("the package has more than {limit} bytes").context(PackageRejected),
            ));
        }
        room.fit_more(done, &mut || Ok(watch.still_wanted()?)).map_err(|error| {
            // A partial file that cannot be completed only takes space from others.
            if error.is::<InsufficientSpace>() {
                let _ = part.clear();
            }
            TryFailure::host(error)
        })?;
        part.append(&chunk[..amount]).map_err(|error| {
            let _ = part.clear();
            TryFailure::host(unwritable(error, &means.places.cache))
        })?;
        room.has_archive(done);
        watch.at(done, total)?;
        watch.pause(means.commons.take(amount as u64).min(download.until.saturating_duration_since(Instant::now())))?;
        if download.is_late() && Some(done) != total {
            let is_kept = part.resumable().is_some();
            return Err(TryFailure::Final(SourceFailure::Late(too_late(download, done, total, is_kept))));
        }
    }
    // A cancellation may have closed the connection.
    watch.still_wanted()?;
    let done = part.have();
    match total {
        Some(total) if done != total => {
            let error = anyhow!("the download ended after {done} of {total} bytes");
            Err(TryFailure::Cut { error, brought: done - at, pause: None })
        }
        _ => Ok(()),
    }
}

fn too_late(download: &Download<'_>, done: u64, total: Option<u64>, is_kept: bool) -> anyhow::Error {
    let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
    let next = if is_kept {
        "the next attempt resumes there"
    } else {
        "the next attempt starts from the beginning, because the server sent no ETag"
    };
    anyhow!("{}; {done}{of} bytes were received; {next}", download.late())
}

/// Retries until success, a final error, the limit of attempts, the time limit, or cancellation.
fn persistently<T>(
    what: &str,
    download: &Download<'_>,
    watch: &mut DownloadProgress<'_>,
    mut attempt: impl FnMut(&mut DownloadProgress<'_>) -> Result<T, TryFailure>,
) -> Result<T, SourceFailure> {
    let (mut tries, mut all) = (0, 0);
    let late = || format!("{}; the next attempt resumes", download.late());
    loop {
        all += 1;
        watch.still_wanted()?;
        if download.is_late() {
            return Err(SourceFailure::Late(anyhow!(late())));
        }
        let (error, pause) = match attempt(watch) {
            Ok(done) => return Ok(done),
            Err(TryFailure::Final(failure)) => return Err(failure),
            Err(TryFailure::Cut { error, brought, pause }) => {
                tries = if brought >= WORTHWHILE_BYTES { 1 } else { tries + 1 };
                (error, pause)
            }
        };
        watch.still_wanted()?;
        if let Some(asked) = pause.filter(|pause| *pause > MAX_PAUSE) {
            let error = error.context(format!("the server asks for a retry after {} (Retry-After)", Span(asked)));
            return Err(SourceFailure::Source { error, retry_after: Some(asked) });
        }
        if tries >= TRIES || all >= TRIES_IN_ALL {
            let error = error.context(format!("gave up after {all} attempts"));
            return Err(SourceFailure::Source { error, retry_after: pause });
        }
        let waits = pause.unwrap_or_else(|| backed_off(tries));
        if Instant::now() + waits >= download.until {
            let error = error.context(late());
            return Err(match pause {
                // A later fetch respects the Retry-After.
                Some(_) => SourceFailure::Source { error, retry_after: pause },
                None => SourceFailure::Late(error),
            });
        }
        tracing::warn!(file = what, error = format!("{error:#}"), tries, "a download attempt failed; retrying");
        watch.pause(waits)?;
    }
}

/// Exponential back-off; half of the delay is random.
fn backed_off(tries: u32) -> Duration {
    let full = FIRST_PAUSE * 2_u32.saturating_pow(tries.saturating_sub(1).min(7));
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

/// An unreachable source is retried only if it is the last, or in mid-download; else the next source is tried.
fn answered(reply: Result<HttpResponse>, is_patient: bool) -> Result<HttpResponse, TryFailure> {
    reply.map_err(|error| match is_patient && endpoint::may_pass(&error) {
        true => TryFailure::cut(error),
        false => TryFailure::source(error),
    })
}

fn refused(reply: HttpResponse) -> TryFailure {
    let (status, pause) = (reply.status(), reply.retry_after());
    let error = reply.refused();
    if matches!(status, 408 | 425 | 429 | 500..=599) {
        TryFailure::Cut { error, brought: 0, pause }
    } else {
        TryFailure::source(error)
    }
}

/// A `Content-Range`.
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    from: u64,
    total: Option<u64>,
}

fn range_of(reply: &HttpResponse) -> Option<ContentRange> {
    range(reply.header("content-range")?)
}

/// Parses `bytes 10-99/100`, or `bytes 10-99/*`.
fn range(text: &str) -> Option<ContentRange> {
    let (part, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (from, last) = part.split_once('-')?;
    let (from, last) = (from.parse().ok()?, last.parse::<u64>().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (from <= last && total.is_none_or(|total| last < total)).then_some(ContentRange { from, total })
}

/// Adds the remedy if the disk or quota is full.
pub(super) fn unwritable(error: std::io::Error, directory: &Path) -> anyhow::Error {
    let directory = directory.display();
    let context = match error.kind() {
        ErrorKind::StorageFull => format!("no space left in {directory}; free some space there"),
        ErrorKind::QuotaExceeded => {
            format!("the disk quota is exhausted in {directory}; free some space there, or raise the quota")
        }
        _ => format!("cannot write to {directory}"),
    };
    anyhow::Error::new(error).context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_content_ranges_are_parsed() {
        for (text, from, total) in
            [("bytes 10-99/100", 10, Some(100)), (" bytes 0-0/1 ", 0, Some(1)), ("bytes 5-9/*", 5, None)]
        {
            assert_eq!(range(text), Some(ContentRange { from, total }), "{text}");
        }
        for bad in
            ["", "bytes", "bytes 1-2", "bytes */5", "bytes 9-1/10", "bytes 0-10/10", "items 0-1/2", "bytes -1-2/3"]
        {
            assert_eq!(range(bad), None, "{bad}");
        }
        for huge in ["bytes 99999999999999999999-1/2", "bytes 0-1/99999999999999999999"] {
            assert_eq!(range(huge), None);
        }
    }
}
