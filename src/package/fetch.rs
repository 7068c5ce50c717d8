//! Brings a package's archive and its signature onto this host, over networks that break.
//!
//! A download that was cut goes on where it stopped, in this run or in a later one, if the other end still has the very same file: its
//! ETag is kept beside the part and sent as `If-Range`. Another source may know the same file by another ETag: where size and hash were
//! announced, it is asked for the rest all the same. What is no part of that file (a page of somebody in between, another size) does not
//! touch what is there. The bytes are judged by [`super::verify`] as they come; what was put together wrongly costs one more download.

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

/// Tries at a download that breaks without getting further.
const TRIES: u32 = 5;
/// A try that brought as much as this was worth it, and does not count.
const WORTHWHILE_BYTES: u64 = 1 << 20;
/// Tries in all: one who always sends the same megabyte is not listened to for ever.
const TRIES_IN_ALL: u32 = 100;
const FIRST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 250 });
/// A source that asks to be left alone for longer is left to a later fetch.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Why a source did not give what was wanted.
#[derive(Debug)]
pub(super) enum SourceFailure {
    /// Another source may.
    Source { error: anyhow::Error, retry_after: Option<Duration> },
    /// Its time is over; what came is kept.
    Late(anyhow::Error),
    /// What it gave is not what was signed; another source may have it, or the same one the next time.
    Damaged(anyhow::Error),
    /// The reason lies on this host: no other source would help.
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

/// Why a try failed.
enum TryFailure {
    /// Another try may get further: how far this one got, and how long to wait if the other end said so.
    Cut { error: anyhow::Error, brought: u64, pause: Option<Duration> },
    /// Another try would fail as well.
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

/// What is downloaded, and within what.
pub(super) struct Download<'a> {
    pub(super) means: &'a FetchContext<'a>,
    pub(super) source: &'a PackageSource,
    pub(super) file: &'a str,
    pub(super) wanted: &'a PackageRequest,
    /// So long the source has, which is over at `until`.
    pub(super) time: Duration,
    pub(super) until: Instant,
}

impl Download<'_> {
    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }

    /// What is told of a source that took too long.
    fn late(&self) -> String {
        let within = self.means.within;
        // It had all of the time, but for what went by before.
        let share = match self.time + within / 20 >= within {
            true => format!("{} (downloadTimeout)", Span(within)),
            false => format!("{}, its share of {} (downloadTimeout)", Span(to_a_tenth(self.time)), Span(within)),
        };
        format!("it did not come from {} within {share}", self.source)
    }
}

fn to_a_tenth(time: Duration) -> Duration {
    match time < Duration::from_secs(10) {
        true => Duration::from_millis(time.as_millis() as u64 / 100 * 100),
        false => Duration::from_secs(time.as_secs()),
    }
}

/// Downloads a package's signature, which is text at least.
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
                    String::from_utf8(bytes).context("its signature file is not text").map_err(TryFailure::cut)?;
                match text.trim_start().starts_with('<') {
                    true => Err(TryFailure::cut(source.hidden("no signature, but markup"))),
                    false => Ok(text),
                }
            }
            404 | 410 => Err(TryFailure::source(source.lacks(&name))),
            _ => Err(refused(reply)),
        }
    })
}

/// Downloads a package into its part, until it is whole.
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
                anyhow!("it has {size} bytes, more than {most}").context(PackageRejected),
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
                    "{source} knows {file} by another ETag, and is asked for the rest of it anyway"
                )))
            }
            // One who does not even say how much it is has no right to what is there.
            200 if have > 0 && reply.length().is_none() && is_known => {
                Err(TryFailure::cut(anyhow!("{source} answers with something else, of no stated length")))
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
            // All of it was there already.
            416 if have > 0 && reply.header("content-range") == Some(format!("bytes */{have}").as_str()) => Ok(()),
            416 => {
                by = Resume::Never;
                Err(unresumable(part, source, file))
            }
            404 | 410 => Err(TryFailure::source(source.lacks(file))),
            _ => Err(refused(reply)),
        }
    })?;
    // Its size may be known only now.
    fit(part.have(), room, watch)
}

/// How a download is gone on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// If the source has the very file that was begun with, by its ETag.
    IfSame,
    /// Whatever the source calls it: what it must be is known.
    Blindly,
    /// From its first byte.
    Never,
}

/// Whether an answer is of the file that a part is of. Who sent none of it must say so: one who does not know `If-Range` sends the rest of
/// some other file, and that is found out only at its end.
fn is_same(reply: &HttpResponse, part: &PartialDownload<'_>, source: &PackageSource) -> bool {
    let known = part.resumable().map(|(_, etag)| etag);
    match reply.header("etag") {
        Some(etag) => Some(etag) == known,
        None => part.is_from(&source.directory.origin()),
    }
}

fn unresumable(part: &mut PartialDownload<'_>, source: &PackageSource, file: &str) -> TryFailure {
    part.forget();
    TryFailure::cut(anyhow!("{} cannot resume the download of {file}", source.directory.origin()))
}

/// What does not have the announced size is something else.
fn fits(total: Option<u64>, wanted: &PackageRequest) -> Result<(), TryFailure> {
    match (total, wanted.size) {
        (Some(total), Some(announced)) if total != announced => Err(TryFailure::cut(
            anyhow!("it has {total} bytes where {announced} were announced").context(PackageRejected),
        )),
        (Some(total), None) if total > MAX_PACKAGE_BYTES => Err(TryFailure::source(
            anyhow!("it has {total} bytes, more than {MAX_PACKAGE_BYTES}").context(PackageRejected),
        )),
        _ => Ok(()),
    }
}

fn fit(size: u64, room: &mut PackageSpace<'_>, watch: &mut DownloadProgress<'_>) -> Result<(), SourceFailure> {
    room.fit(size, &mut || Ok(watch.still_wanted()?)).map_err(SourceFailure::Host)
}

/// Writes a body behind what is there of it.
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
                let error = anyhow::Error::new(error).context(format!("the download broke off after {done} bytes"));
                return Err(TryFailure::Cut { error, brought: done - at, pause: None });
            }
        };
        if amount == 0 {
            break;
        }
        if done > limit {
            // Whatever else it sends is no part of the package, and nothing of it may be either.
            part.clear().map_err(TryFailure::host)?;
            return Err(TryFailure::source(anyhow!("it has more than {limit} bytes").context(PackageRejected)));
        }
        room.fit_more(done, &mut || Ok(watch.still_wanted()?)).map_err(|error| {
            // What does not fit helps nobody, and takes the space from everybody.
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
    // Who does not want it any more may have ended the connection.
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
        "the next try goes on from there"
    } else {
        "the next try begins anew, as who sent them does not say which file they are of (ETag)"
    };
    anyhow!("{}; {done}{of} bytes are there, and {next}", download.late())
}

/// Tries again what was cut, until it is done, hopeless, cut too often, takes too long, or is not wanted any more.
fn persistently<T>(
    what: &str,
    download: &Download<'_>,
    watch: &mut DownloadProgress<'_>,
    mut attempt: impl FnMut(&mut DownloadProgress<'_>) -> Result<T, TryFailure>,
) -> Result<T, SourceFailure> {
    let (mut tries, mut all) = (0, 0);
    let late = || format!("{}; the next try goes on", download.late());
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
            let error = error.context(format!("it asks to be left alone for {}", Span(asked)));
            return Err(SourceFailure::Source { error, retry_after: Some(asked) });
        }
        if tries >= TRIES || all >= TRIES_IN_ALL {
            let error = error.context(format!("gave up after {all} tries"));
            return Err(SourceFailure::Source { error, retry_after: pause });
        }
        let waits = pause.unwrap_or_else(|| backed_off(tries));
        if Instant::now() + waits >= download.until {
            let error = error.context(late());
            return Err(match pause {
                // It is not asked again before the time that it wished for is over.
                Some(_) => SourceFailure::Source { error, retry_after: pause },
                None => SourceFailure::Late(error),
            });
        }
        tracing::warn!(file = what, error = format!("{error:#}"), tries, "a download was cut and is tried again");
        watch.pause(waits)?;
    }
}

/// Twice as long each time, and half of it at random.
fn backed_off(tries: u32) -> Duration {
    let full = FIRST_PAUSE * 2_u32.saturating_pow(tries.saturating_sub(1).min(7));
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

/// One who cannot be reached at all is left to the next source, where there is one; not so in mid-download.
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

/// A part of a file, as it was sent.
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    from: u64,
    total: Option<u64>,
}

fn range_of(reply: &HttpResponse) -> Option<ContentRange> {
    range(reply.header("content-range")?)
}

/// Reads `bytes 10-99/100`, or `bytes 10-99/*`.
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

/// Says it plainly when the disk is full.
pub(super) fn unwritable(error: std::io::Error, directory: &Path) -> anyhow::Error {
    let directory = directory.display();
    let context = match error.kind() {
        ErrorKind::StorageFull => format!("there is no space left in {directory}; free some there"),
        ErrorKind::QuotaExceeded => format!("the quota is used up in {directory}; free some there, or raise it"),
        _ => format!("cannot write in {directory}"),
    };
    anyhow::Error::new(error).context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_they_are_written_and_nothing_else_is() {
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
