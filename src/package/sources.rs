//! Where a package may be had: the place that its release names, and then each endpoint.

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::FetchContext;
use crate::core::protocol::DOWNLOAD_PATH;
use crate::endpoint::{Endpoint, HttpResponse, Requester};

/// A directory on some host, below which packages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackageSource {
    pub(super) directory: Endpoint,
    /// An endpoint of ours is told the agent id, and nobody else.
    asker: Requester,
    /// There is no other one to turn to: it is tried again even where it cannot be reached at all.
    pub(super) last: bool,
}

impl fmt::Display for PackageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.directory, f)
    }
}

impl PackageSource {
    pub(super) fn get(
        &self,
        means: &FetchContext<'_>,
        file: &str,
        headers: &[(&str, &str)],
        until: Instant,
    ) -> Result<HttpResponse> {
        let left = until.saturating_duration_since(Instant::now());
        means.client.download(&self.directory, &format!("/{file}"), headers, self.asker, left)
    }

    pub(super) fn lacks(&self, file: &str) -> anyhow::Error {
        let url = self.directory.url(&format!("/{file}"));
        anyhow!("there is no such package: {url} is not there; publish it with `aops gateway publish`")
    }

    /// Somebody in between answers in the source's place.
    pub(super) fn hidden(&self, sent: &str) -> anyhow::Error {
        let origin = self.directory.origin();
        anyhow!(
            "something between this host and {origin} answers with a page of its own ({sent}): a portal where one has to log in, or a \
             proxy that does not let it through; ask who runs this network, or set proxy or noProxy"
        )
    }
}

/// Where to look, in this order: where the release is said to lie, then below the endpoints. With what cannot be looked at, and why.
pub(super) fn sources(
    endpoints: &[Endpoint],
    tarball: Option<&str>,
) -> Result<(Vec<PackageSource>, Vec<anyhow::Error>)> {
    let (mut sources, mut unusable) = (Vec::new(), Vec::new());
    match tarball.map(|tarball| tarball.parse::<Endpoint>().context("cannot use the tarball's address")) {
        Some(Ok(directory)) => {
            let ours = endpoints.iter().any(|endpoint| endpoint.origin() == directory.origin());
            let asker = if ours { Requester::Host } else { Requester::Nobody };
            sources.push(PackageSource { directory, asker, last: false });
        }
        Some(Err(error)) => unusable.push(error),
        None => ensure!(!endpoints.is_empty(), "no endpoint is configured"),
    }
    for endpoint in endpoints {
        let source = PackageSource { directory: endpoint.below(DOWNLOAD_PATH), asker: Requester::Host, last: false };
        if sources.iter().all(|known| known.directory != source.directory) {
            sources.push(source);
        }
    }
    if let Some(last) = sources.last_mut() {
        last.last = true;
    }
    Ok((sources, unusable))
}
