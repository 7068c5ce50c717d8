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
const MAX_FRUITLESS_ATTEMPTS: u32 = 5;
/// An attempt that received at least this much counts as progress.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Total attempts, against a server that always sends the same megabyte.
const MAX_ATTEMPTS: u32 = 100;
const FIRST_DELAY: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 250 });
/// A source with a longer `Retry-After` is left to a later fetch.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Why a source failed to deliver.
#[derive(Debug)]
pub(super) enum SourceFailure {
    /// Another source may succeed.
    Source { error: anyhow::Error, retry_after: Option<Duration> },
    /// The time limit of the source is over; the bytes received are kept.
    TimedOut(anyhow::Error),
    /// The data does not match the signature; another source, or another download, may be good.
    Damaged(anyhow::Error),
    /// The cause is on this host: another source would not help.
    Host(anyhow::Error),
}

impl From<DownloadCancelled> for SourceFailure {
    fn from(cancelled: DownloadCancelled) -> SourceFailure {
        SourceFailure::Host(cancelled.into())
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
    Retryable { error: anyhow::Error, received: u64, retry_after: Option<Duration> },
    /// Another attempt would fail as well.
    Final(SourceFailure),
}

impl TryFailure {
    fn retryable(error: anyhow::Error) -> TryFailure {
        TryFailure::Retryable { error, received: 0, retry_after: None }
    }

    fn source(error: anyhow::Error) -> TryFailure {
        TryFailure::Final(SourceFailure::source(error))
    }

    fn host(error: anyhow::Error) -> TryFailure {
        TryFailure::Final(SourceFailure::Host(error))
    }
}

impl From<DownloadCancelled> for TryFailure {
    fn from(cancelled: DownloadCancelled) -> TryFailure {
        TryFailure::Final(cancelled.into())
    }
}

/// What to download, from where, and the time limit.
pub(super) struct Download<'a> {
    pub(super) context: &'a FetchContext<'a>,
    pub(super) source: &'a PackageSource,
    pub(super) file: &'a str,
    pub(super) request: &'a PackageRequest,
    /// The time limit of the source, which ends at `until`.
    pub(super) time: Duration,
    pub(super) until: Instant,
}

impl Download<'_> {
    fn is_timed_out(&self) -> bool {
        Instant::now() >= self.until
    }

    /// The error text after the time limit.
    fn timeout_text(&self) -> String {
        let timeout = self.context.timeout;
        // The source had nearly all of the time.
        let share = match self.time + timeout / 20 >= timeout {
            true => format!("{} (downloadTimeout)", Span(timeout)),
            false => {
                format!("{}, this source's share of {} (downloadTimeout)", Span(rounded(self.time)), Span(timeout))
            }
        };
        format!("the download from {} did not complete within {share}", self.source)
    }
}

fn rounded(time: Duration) -> Duration {
    match time < Duration::from_secs(10) {
        true => Duration::from_millis(time.as_millis() as u64 / 100 * 100),
        false => Duration::from_secs(time.as_secs()),
    }
}

/// Downloads a package's signature file, which must be text.
pub(super) fn signature(download: &Download<'_>, progress: &mut DownloadProgress<'_>) -> Result<String, SourceFailure> {
    let Download { context, source, until, .. } = *download;
    let name = format!("{}{SIGNATURE_SUFFIX}", download.file);
    with_retries(&name, download, progress, |_| {
        let reply = retryable_if(source.get(context, &name, &[], until), source.last)?;
        match reply.status() {
            200 if reply.is_html() => Err(TryFailure::retryable(source.intercepted("HTML"))),
            200 => {
                let bytes = reply.bytes(MAX_SIGNATURE_BYTES).map_err(TryFailure::retryable)?;
                let text = String::from_utf8(bytes)
                    .context("the signature file is not text")
                    .map_err(TryFailure::retryable)?;
                match text.trim_start().starts_with('<') {
                    true => Err(TryFailure::retryable(source.intercepted("markup instead of a signature"))),
                    false => Ok(text),
                }
            }
            404 | 410 => Err(TryFailure::source(source.not_found(&name))),
            _ => Err(status_error(reply)),
        }
    })
}

/// Downloads the rest of a package into its partial file.
pub(super) fn archive(
    download: &Download<'_>,
    part: &mut PartialDownload<'_>,
    space: &mut PackageSpace<'_>,
    progress: &mut DownloadProgress<'_>,
) -> Result<(), SourceFailure> {
    let Download { context, source, file, request, until, .. } = *download;
    space.set_archive(part.size());
    if let Some(size) = request.size {
        let limit = MAX_PACKAGE_BYTES;
        if size > limit {
            return Err(SourceFailure::source(
                anyhow!("the package has {size} bytes, more than the limit of {limit}").context(PackageRejected),
            ));
        }
        reserve(size, space, progress)?;
    }
    let is_announced = request.size.is_some() && request.sha256.is_some();
    let mut mode = ResumeMode::SameEtag;
    with_retries(file, download, progress, |progress| {
        if request.size.is_some_and(|size| size == part.size()) {
            return Ok(());
        }
        if mode == ResumeMode::SameEtag && part.size() > 0 && part.resumable().is_none() && is_announced {
            mode = ResumeMode::AnyEtag;
        }
        let etag = part.resumable().map(|(_, etag)| etag).filter(|_| mode == ResumeMode::SameEtag);
        let offset = if etag.is_some() || mode == ResumeMode::AnyEtag { part.size() } else { 0 };
        let range = format!("bytes={offset}-");
        let headers = [("range", range.as_str()), ("if-range", etag.unwrap_or_default())];
        let headers = &headers[..usize::from(offset > 0) + usize::from(etag.is_some())];
        let reply = retryable_if(source.get(context, file, headers, until), source.last || offset > 0)?;
        match reply.status() {
            200 | 206 if reply.is_html() => Err(TryFailure::retryable(source.intercepted("HTML"))),
            200 if etag.is_some() && is_announced => {
                mode = ResumeMode::AnyEtag;
                Err(TryFailure::retryable(anyhow!(
                    "{source} has a different ETag for {file}; requesting the rest without If-Range"
                )))
            }
            // A response without even a length must not replace the bytes received so far.
            200 if offset > 0 && reply.length().is_none() && is_announced => Err(TryFailure::retryable(anyhow!(
                "{source} answered a range request with a whole file of unknown length"
            ))),
            200 => {
                let total = reply.length();
                ensure_announced_size(total, request)?;
                part.restart(reply.header("etag"), &source.directory.origin()).map_err(TryFailure::host)?;
                space.set_archive(0);
                receive(download, reply, total, part, space, progress)
            }
            206 => {
                let is_rest = |range: &ContentRange| match mode {
                    ResumeMode::SameEtag => is_same_file(&reply, part, source),
                    ResumeMode::AnyEtag => range.total == request.size,
                    ResumeMode::FromStart => false,
                };
                match content_range(&reply).filter(|range| offset > 0 && range.from == offset && is_rest(range)) {
                    Some(ContentRange { total, .. }) => {
                        ensure_announced_size(total, request)?;
                        part.continue_from(&source.directory.origin());
                        receive(download, reply, total, part, space, progress)
                    }
                    None => {
                        mode = ResumeMode::FromStart;
                        Err(cannot_resume(part, source, file))
                    }
                }
            }
            // All bytes were received already.
            416 if offset > 0 && reply.header("content-range") == Some(format!("bytes */{offset}").as_str()) => Ok(()),
            416 => {
                mode = ResumeMode::FromStart;
                Err(cannot_resume(part, source, file))
            }
            404 | 410 => Err(TryFailure::source(source.not_found(file))),
            _ => Err(status_error(reply)),
        }
    })?;
    // The size may be known only now.
    reserve(part.size(), space, progress)
}

/// How an interrupted download continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResumeMode {
    /// If the source's ETag is that of the partial file.
    SameEtag,
    /// Whatever ETag the source has: size and hash are known.
    AnyEtag,
    /// From the first byte.
    FromStart,
}

/// Whether a range response belongs to the same file as the partial one. Another origin must confirm the ETag: a server that ignores
/// `If-Range` could send the rest of a different file, which would be noticed only at the end.
fn is_same_file(reply: &HttpResponse, part: &PartialDownload<'_>, source: &PackageSource) -> bool {
    let known = part.resumable().map(|(_, etag)| etag);
    match reply.header("etag") {
        Some(etag) => Some(etag) == known,
        None => part.is_from(&source.directory.origin()),
    }
}

fn cannot_resume(part: &mut PartialDownload<'_>, source: &PackageSource, file: &str) -> TryFailure {
    part.forget_etag();
    TryFailure::retryable(anyhow!(
        "{} cannot resume the download of {file}; downloading it from the start",
        source.directory.origin()
    ))
}

/// Rejects a response whose size differs from the announced one, or exceeds the limit.
fn ensure_announced_size(total: Option<u64>, request: &PackageRequest) -> Result<(), TryFailure> {
    match (total, request.size) {
        (Some(total), Some(announced)) if total != announced => Err(TryFailure::retryable(
            anyhow!("the size is {total} bytes, but {announced} were announced").context(PackageRejected),
        )),
        (Some(total), None) if total > MAX_PACKAGE_BYTES => Err(TryFailure::source(
            anyhow!("the package has {total} bytes, more than the limit of {MAX_PACKAGE_BYTES}")
                .context(PackageRejected),
        )),
        _ => Ok(()),
    }
}

fn reserve(size: u64, space: &mut PackageSpace<'_>, progress: &mut DownloadProgress<'_>) -> Result<(), SourceFailure> {
    space.reserve(size, &mut || Ok(progress.still_wanted()?)).map_err(SourceFailure::Host)
}

/// Appends a response body to the partial file.
fn receive(
    download: &Download<'_>,
    reply: HttpResponse,
    total: Option<u64>,
    part: &mut PartialDownload<'_>,
    space: &mut PackageSpace<'_>,
    progress: &mut DownloadProgress<'_>,
) -> Result<(), TryFailure> {
    let Download { context, request, .. } = *download;
    let total = total.or(request.size);
    let limit = total.unwrap_or(MAX_PACKAGE_BYTES);
    let start = part.size();
    if let Some(total) = total {
        reserve(total, space, progress).map_err(TryFailure::Final)?;
    }
    let mut reader = reply.reader();
    let mut chunk = vec![0; CHUNK_BYTES];
    progress.report(start, total)?;
    loop {
        let (amount, done) = match reader.read(&mut chunk) {
            Ok(amount) => (amount, part.size() + amount as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                let done = part.size();
                let error =
                    anyhow::Error::new(error).context(format!("the download was interrupted after {done} bytes"));
                return Err(TryFailure::Retryable { error, received: done - start, retry_after: None });
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
        space.reserve_more(done, &mut || Ok(progress.still_wanted()?)).map_err(|error| {
            // A partial file that cannot be completed only takes space from others.
            if error.is::<InsufficientSpace>() {
                let _ = part.clear();
            }
            TryFailure::host(error)
        })?;
        part.append(&chunk[..amount]).map_err(|error| {
            let _ = part.clear();
            TryFailure::host(unwritable(error, &context.paths.cache))
        })?;
        space.set_archive(done);
        progress.report(done, total)?;
        progress
            .pause(context.limits.take(amount as u64).min(download.until.saturating_duration_since(Instant::now())))?;
        if download.is_timed_out() && Some(done) != total {
            let is_kept = part.resumable().is_some();
            return Err(TryFailure::Final(SourceFailure::TimedOut(timeout_failure(download, done, total, is_kept))));
        }
    }
    // A cancellation may have closed the connection.
    progress.still_wanted()?;
    let done = part.size();
    match total {
        Some(total) if done != total => {
            let error = anyhow!("the download ended after {done} of {total} bytes");
            Err(TryFailure::Retryable { error, received: done - start, retry_after: None })
        }
        _ => Ok(()),
    }
}

fn timeout_failure(download: &Download<'_>, done: u64, total: Option<u64>, is_kept: bool) -> anyhow::Error {
    let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
    let next = if is_kept {
        "the next attempt resumes there"
    } else {
        "the next attempt starts from the beginning, because the server sent no ETag"
    };
    anyhow!("{}; {done}{of} bytes were received; {next}", download.timeout_text())
}

/// Retries until success, a final error, the limit of attempts, the time limit, or cancellation.
fn with_retries<T>(
    file: &str,
    download: &Download<'_>,
    progress: &mut DownloadProgress<'_>,
    mut attempt: impl FnMut(&mut DownloadProgress<'_>) -> Result<T, TryFailure>,
) -> Result<T, SourceFailure> {
    let (mut fruitless_attempts, mut attempts) = (0, 0);
    let timed_out = || format!("{}; the next attempt resumes", download.timeout_text());
    loop {
        attempts += 1;
        progress.still_wanted()?;
        if download.is_timed_out() {
            return Err(SourceFailure::TimedOut(anyhow!(timed_out())));
        }
        let (error, retry_after) = match attempt(progress) {
            Ok(done) => return Ok(done),
            Err(TryFailure::Final(failure)) => return Err(failure),
            Err(TryFailure::Retryable { error, received, retry_after }) => {
                fruitless_attempts = if received >= PROGRESS_BYTES { 1 } else { fruitless_attempts + 1 };
                (error, retry_after)
            }
        };
        progress.still_wanted()?;
        if let Some(wait) = retry_after.filter(|wait| *wait > MAX_RETRY_AFTER) {
            let error = error.context(format!("the server asks for a retry after {} (Retry-After)", Span(wait)));
            return Err(SourceFailure::Source { error, retry_after: Some(wait) });
        }
        if fruitless_attempts >= MAX_FRUITLESS_ATTEMPTS || attempts >= MAX_ATTEMPTS {
            let error = error.context(format!("gave up after {attempts} attempts"));
            return Err(SourceFailure::Source { error, retry_after });
        }
        let delay = retry_after.unwrap_or_else(|| retry_delay(fruitless_attempts));
        if Instant::now() + delay >= download.until {
            let error = error.context(timed_out());
            return Err(match retry_after {
                // A later fetch respects the Retry-After.
                Some(_) => SourceFailure::Source { error, retry_after },
                None => SourceFailure::TimedOut(error),
            });
        }
        tracing::warn!(file, error = format!("{error:#}"), fruitless_attempts, "a download attempt failed; retrying");
        progress.pause(delay)?;
    }
}

/// Exponential back-off; half of the delay is random.
fn retry_delay(fruitless_attempts: u32) -> Duration {
    let full = FIRST_DELAY * 2_u32.saturating_pow(fruitless_attempts.saturating_sub(1).min(7));
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

/// An unreachable source is retried only if it is the last, or in mid-download; else the next source is tried.
fn retryable_if(reply: Result<HttpResponse>, may_retry: bool) -> Result<HttpResponse, TryFailure> {
    reply.map_err(|error| match may_retry && endpoint::is_transient(&error) {
        true => TryFailure::retryable(error),
        false => TryFailure::source(error),
    })
}

fn status_error(reply: HttpResponse) -> TryFailure {
    let (status, retry_after) = (reply.status(), reply.retry_after());
    let error = reply.into_error();
    if matches!(status, 408 | 425 | 429 | 500..=599) {
        TryFailure::Retryable { error, received: 0, retry_after }
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

fn content_range(reply: &HttpResponse) -> Option<ContentRange> {
    parse_content_range(reply.header("content-range")?)
}

/// Parses `bytes 10-99/100`, or `bytes 10-99/*`.
fn parse_content_range(text: &str) -> Option<ContentRange> {
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
            assert_eq!(parse_content_range(text), Some(ContentRange { from, total }), "{text}");
        }
        for bad in
            ["", "bytes", "bytes 1-2", "bytes */5", "bytes 9-1/10", "bytes 0-10/10", "items 0-1/2", "bytes -1-2/3"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
        for huge in ["bytes 99999999999999999999-1/2", "bytes 0-1/99999999999999999999"] {
            assert_eq!(parse_content_range(huge), None);
        }
    }
}
