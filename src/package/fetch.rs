//! Brings a package's archive and its signature onto this host, over networks that break.
//!
//! A download that was cut goes on where it stopped, in this run or in a later one, if the other end still has the very same file: its
//! ETag is kept beside the part and sent as `If-Range`. What is no part of that file (a page of somebody in between, another size) does not
//! touch what is there. The bytes are judged by [`super::verify`] as they come.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::part::Part;
use super::space::Claim;
use super::{MAX_PACKAGE_BYTES, MAX_SIGNATURE_BYTES, Means, Refused, SIGNATURE_SUFFIX, Wanted};
use crate::core::protocol::DOWNLOAD_PATH;
use crate::core::units::Span;
use crate::endpoint::{self, Asker, Endpoint, Reply};
use crate::platform;

/// Room that a package needs for its archive and its tree, as a multiple of the archive.
pub(super) const SPACE_PER_PACKAGE: u64 = 4;

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

/// A directory on some host, below which packages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    directory: Endpoint,
    /// An endpoint of ours is told the agent id, and nobody else.
    asker: Asker,
    /// There is no other one to turn to: it is tried again even where it cannot be reached at all.
    last: bool,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.directory, f)
    }
}

impl Source {
    fn get(&self, means: &Means<'_>, file: &str, headers: &[(&str, &str)], until: Instant) -> Result<Reply> {
        let left = until.saturating_duration_since(Instant::now());
        means.client.download(&self.directory, &format!("/{file}"), headers, self.asker, left)
    }

    fn lacks(&self, file: &str) -> anyhow::Error {
        let url = self.directory.url(&format!("/{file}"));
        anyhow!("there is no such package: {url} is not there; publish it with `aops gateway publish`")
    }

    /// Somebody in between answers in the source's place.
    fn hidden(&self, sent: &str) -> anyhow::Error {
        let origin = self.directory.origin();
        anyhow!(
            "something between this host and {origin} answers with a page of its own ({sent}): a portal where one has to log in, or a \
             proxy that does not let it through; ask who runs this network, or set proxy or noProxy"
        )
    }
}

/// Where to look, in this order: where the release is said to lie, then below the endpoints. With what cannot be looked at, and why.
pub(super) fn sources(endpoints: &[Endpoint], tarball: Option<&str>) -> Result<(Vec<Source>, Vec<anyhow::Error>)> {
    let (mut sources, mut unusable) = (Vec::new(), Vec::new());
    match tarball.map(|tarball| tarball.parse::<Endpoint>().context("cannot use the tarball's address")) {
        Some(Ok(directory)) => {
            let ours = endpoints.iter().any(|endpoint| endpoint.origin() == directory.origin());
            let asker = if ours { Asker::Host } else { Asker::Nobody };
            sources.push(Source { directory, asker, last: false });
        }
        Some(Err(error)) => unusable.push(error),
        None => ensure!(!endpoints.is_empty(), "no endpoint is configured"),
    }
    for endpoint in endpoints {
        let source = Source { directory: endpoint.below(DOWNLOAD_PATH), asker: Asker::Host, last: false };
        if sources.iter().all(|known| known.directory != source.directory) {
            sources.push(source);
        }
    }
    if let Some(last) = sources.last_mut() {
        last.last = true;
    }
    Ok((sources, unusable))
}

/// Why a source did not give what was wanted.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another source may.
    Source { error: anyhow::Error, retry_after: Option<Duration> },
    /// What it gave is not what was signed; another source may have it, or the same one the next time.
    Damaged(anyhow::Error),
    /// The reason lies on this host, or the time is over: no other source would help.
    Host(anyhow::Error),
}

impl Failure {
    pub(super) fn source(error: anyhow::Error) -> Failure {
        Failure::Source { error, retry_after: None }
    }
}

/// Why a try failed.
enum Broken {
    /// Another try may get further: how far this one got, and how long to wait if the other end said so.
    Cut { error: anyhow::Error, brought: u64, pause: Option<Duration> },
    /// Another try would fail as well.
    Final(Failure),
}

impl Broken {
    fn cut(error: anyhow::Error) -> Broken {
        Broken::Cut { error, brought: 0, pause: None }
    }

    fn source(error: anyhow::Error) -> Broken {
        Broken::Final(Failure::source(error))
    }

    fn host(error: anyhow::Error) -> Broken {
        Broken::Final(Failure::Host(error))
    }
}

/// Downloads a package's signature, which is text at least.
pub(super) fn signature(means: &Means<'_>, source: &Source, file: &str, until: Instant) -> Result<String, Failure> {
    let name = format!("{file}{SIGNATURE_SUFFIX}");
    persistently(&name, means, until, || {
        let reply = answered(source.get(means, &name, &[], until), source.last)?;
        match reply.status() {
            200 if reply.is_page() => Err(Broken::cut(source.hidden("HTML"))),
            200 => {
                let bytes = reply.bytes(MAX_SIGNATURE_BYTES).map_err(Broken::cut)?;
                let text = String::from_utf8(bytes).context("its signature file is not text").map_err(Broken::cut)?;
                match text.trim_start().starts_with('<') {
                    true => Err(Broken::cut(source.hidden("no signature, but markup"))),
                    false => Ok(text),
                }
            }
            404 | 410 => Err(Broken::source(source.lacks(&name))),
            _ => Err(refused(reply)),
        }
    })
}

/// What is downloaded, and within what.
pub(super) struct Download<'a> {
    pub(super) means: &'a Means<'a>,
    pub(super) source: &'a Source,
    pub(super) file: &'a str,
    pub(super) wanted: &'a Wanted,
    pub(super) until: Instant,
}

/// Downloads a package into its part, until it is whole.
pub(super) fn archive<'a>(
    download: &Download<'a>,
    part: &mut Part<'_>,
    claim: &mut Option<Claim<'a>>,
    progress: &mut super::Progress<'_>,
) -> Result<(), Failure> {
    let Download { means, source, file, wanted, until } = *download;
    if let Some(size) = wanted.size {
        let most = MAX_PACKAGE_BYTES;
        if size > most {
            return Err(Failure::source(anyhow!("it has {size} bytes, more than {most}").context(Refused)));
        }
        room(download, claim, size, part.have())?;
    }
    persistently(file, means, until, || {
        if wanted.size.is_some_and(|size| size == part.have()) {
            return Ok(());
        }
        let resumable = part.resumable();
        let have = resumable.map_or(0, |(have, _)| have);
        let range = format!("bytes={have}-");
        let headers = resumable.map(|(_, etag)| [("range", range.as_str()), ("if-range", etag)]);
        let headers = headers.as_ref().map_or(&[][..], |both| both.as_slice());
        let reply = answered(source.get(means, file, headers, until), source.last || have > 0)?;
        match reply.status() {
            200 | 206 if reply.is_page() => Err(Broken::cut(source.hidden("HTML"))),
            200 => {
                let total = reply.length();
                fits(total, wanted)?;
                part.begin(reply.header("etag")).map_err(Broken::host)?;
                receive(download, reply, total, part, claim, progress)
            }
            206 => match range_of(&reply).filter(|range| have > 0 && range.from == have && is_same(&reply, part)) {
                Some(Range { total, .. }) => {
                    fits(total, wanted)?;
                    receive(download, reply, total, part, claim, progress)
                }
                None => Err(unresumable(part, source, file)),
            },
            // All of it was there already.
            416 if have > 0 && reply.header("content-range") == Some(format!("bytes */{have}").as_str()) => Ok(()),
            416 => Err(unresumable(part, source, file)),
            404 | 410 => Err(Broken::source(source.lacks(file))),
            _ => Err(refused(reply)),
        }
    })?;
    // Its size may be known only now.
    room(download, claim, part.have(), part.have())
}

/// Whether an answer is of the file that a part is of, as far as it says.
fn is_same(reply: &Reply, part: &Part<'_>) -> bool {
    let known = part.resumable().map(|(_, etag)| etag);
    reply.header("etag").is_none_or(|etag| Some(etag) == known)
}

fn unresumable(part: &mut Part<'_>, source: &Source, file: &str) -> Broken {
    part.forget();
    Broken::cut(anyhow!("{} cannot resume the download of {file}", source.directory.origin()))
}

/// What does not have the announced size is something else.
fn fits(total: Option<u64>, wanted: &Wanted) -> Result<(), Broken> {
    match (total, wanted.size) {
        (Some(total), Some(announced)) if total != announced => {
            Err(Broken::cut(anyhow!("it has {total} bytes where {announced} were announced").context(Refused)))
        }
        (Some(total), None) if total > MAX_PACKAGE_BYTES => {
            Err(Broken::source(anyhow!("it has {total} bytes, more than {MAX_PACKAGE_BYTES}").context(Refused)))
        }
        _ => Ok(()),
    }
}

/// Claims the room for a package of that size, of which `have` bytes are there.
fn room<'a>(download: &Download<'a>, claim: &mut Option<Claim<'a>>, size: u64, have: u64) -> Result<(), Failure> {
    if claim.is_none() {
        let bytes = size.saturating_mul(SPACE_PER_PACKAGE).saturating_sub(have);
        let means = download.means;
        let promised = means.commons.space.claim(&means.places.staging, bytes, download.until);
        *claim = Some(promised.map_err(Failure::Host)?);
    }
    Ok(())
}

/// Writes a body behind what is there of it.
fn receive<'a>(
    download: &Download<'a>,
    reply: Reply,
    total: Option<u64>,
    part: &mut Part<'_>,
    claim: &mut Option<Claim<'a>>,
    progress: &mut super::Progress<'_>,
) -> Result<(), Broken> {
    let Download { means, wanted, until, .. } = *download;
    let total = total.or(wanted.size);
    let limit = total.unwrap_or(MAX_PACKAGE_BYTES);
    let at = part.have();
    if let Some(total) = total {
        room(download, claim, total, at).map_err(Broken::Final)?;
    }
    let mut reader = reply.reader();
    let mut chunk = vec![0; CHUNK_BYTES];
    tell(progress, at, total)?;
    loop {
        let (amount, done) = match reader.read(&mut chunk) {
            Ok(amount) => (amount, part.have() + amount as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                let done = part.have();
                let error = anyhow::Error::new(error).context(format!("the download broke off after {done} bytes"));
                return Err(Broken::Cut { error, brought: done - at, pause: None });
            }
        };
        if amount == 0 {
            break;
        }
        if done > limit {
            // Whatever else it sends is no part of the package, and nothing of it may be either.
            part.begin(None).map_err(Broken::host)?;
            return Err(Broken::source(anyhow!("it has more than {limit} bytes").context(Refused)));
        }
        part.append(&chunk[..amount]).map_err(|error| {
            // What does not fit helps nobody, and takes the space from everybody.
            let _ = part.begin(None);
            Broken::host(unwritable(error, &means.places.cache))
        })?;
        claim.iter().for_each(|claim| claim.written(amount as u64));
        tell(progress, done, total)?;
        let wait = means.commons.take(amount as u64);
        if !wait.is_zero() {
            platform::pause(wait.min(until.saturating_duration_since(Instant::now())));
        }
        if Instant::now() >= until && Some(done) != total {
            return Err(Broken::host(too_late(means, done, total)));
        }
    }
    let done = part.have();
    match total {
        Some(total) if done != total => {
            let error = anyhow!("the download ended after {done} of {total} bytes");
            Err(Broken::Cut { error, brought: done - at, pause: None })
        }
        _ => Ok(()),
    }
}

fn tell(progress: &mut super::Progress<'_>, done: u64, total: Option<u64>) -> Result<(), Broken> {
    match progress(done, total) {
        true => Ok(()),
        false => Err(Broken::host(anyhow!("it is not wanted any more"))),
    }
}

fn too_late(means: &Means<'_>, done: u64, total: Option<u64>) -> anyhow::Error {
    let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
    anyhow!(
        "it did not come within {} (downloadTimeout); {done}{of} bytes are there, and the next try goes on from there",
        Span(means.within)
    )
}

/// Tries again what was cut, until it is done, hopeless, cut too often, or takes too long.
fn persistently<T>(
    what: &str,
    means: &Means<'_>,
    until: Instant,
    mut attempt: impl FnMut() -> Result<T, Broken>,
) -> Result<T, Failure> {
    let (mut tries, mut all) = (0, 0);
    let late = || format!("it did not come within {} (downloadTimeout); the next try goes on", Span(means.within));
    loop {
        all += 1;
        if Instant::now() >= until {
            return Err(Failure::Host(anyhow!(late())));
        }
        let (error, pause) = match attempt() {
            Ok(done) => return Ok(done),
            Err(Broken::Final(failure)) => return Err(failure),
            Err(Broken::Cut { error, brought, pause }) => {
                tries = if brought >= WORTHWHILE_BYTES { 1 } else { tries + 1 };
                (error, pause)
            }
        };
        if let Some(asked) = pause.filter(|pause| *pause > MAX_PAUSE) {
            let error = error.context(format!("it asks to be left alone for {}", Span(asked)));
            return Err(Failure::Source { error, retry_after: Some(asked) });
        }
        if tries >= TRIES || all >= TRIES_IN_ALL {
            let error = error.context(format!("gave up after {all} tries"));
            return Err(Failure::Source { error, retry_after: pause });
        }
        let pause = pause.unwrap_or_else(|| backed_off(tries));
        if Instant::now() + pause >= until {
            return Err(Failure::Host(error.context(late())));
        }
        tracing::warn!(file = what, error = format!("{error:#}"), tries, "a download was cut and is tried again");
        platform::pause(pause);
    }
}

/// Twice as long each time, and half of it at random.
fn backed_off(tries: u32) -> Duration {
    let full = FIRST_PAUSE * 2_u32.saturating_pow(tries.saturating_sub(1).min(7));
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

/// One who cannot be reached at all is left to the next source, where there is one; not so in mid-download.
fn answered(reply: Result<Reply>, is_patient: bool) -> Result<Reply, Broken> {
    reply.map_err(|error| match is_patient && endpoint::may_pass(&error) {
        true => Broken::cut(error),
        false => Broken::source(error),
    })
}

fn refused(reply: Reply) -> Broken {
    let (status, pause) = (reply.status(), reply.retry_after());
    let error = reply.refused();
    if matches!(status, 408 | 425 | 429 | 500..=599) {
        Broken::Cut { error, brought: 0, pause }
    } else {
        Broken::source(error)
    }
}

/// A part of a file, as it was sent.
#[derive(Debug, PartialEq, Eq)]
struct Range {
    from: u64,
    total: Option<u64>,
}

fn range_of(reply: &Reply) -> Option<Range> {
    range(reply.header("content-range")?)
}

/// Reads `bytes 10-99/100`, or `bytes 10-99/*`.
fn range(text: &str) -> Option<Range> {
    let (part, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (from, last) = part.split_once('-')?;
    let (from, last) = (from.parse().ok()?, last.parse::<u64>().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (from <= last && total.is_none_or(|total| last < total)).then_some(Range { from, total })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_they_are_written_and_nothing_else_is() {
        for (text, from, total) in
            [("bytes 10-99/100", 10, Some(100)), (" bytes 0-0/1 ", 0, Some(1)), ("bytes 5-9/*", 5, None)]
        {
            assert_eq!(range(text), Some(Range { from, total }), "{text}");
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
