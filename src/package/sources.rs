//! The sources of a package: the location that its release names, then each endpoint.

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::FetchContext;
use crate::core::protocol::DOWNLOAD_PATH;
use crate::endpoint::{Endpoint, HttpResponse, Requester};

/// A directory on a server that holds packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackageSource {
    pub(super) directory: Endpoint,
    /// Our endpoints receive the agent id; other servers do not.
    requester: Requester,
    /// No other source follows, so it is retried even if it is unreachable.
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
        context: &FetchContext<'_>,
        file: &str,
        headers: &[(&str, &str)],
        until: Instant,
    ) -> Result<HttpResponse> {
        let left = until.saturating_duration_since(Instant::now());
        context.client.download(&self.directory, &format!("/{file}"), headers, self.requester, left)
    }

    pub(super) fn not_found(&self, file: &str) -> anyhow::Error {
        let url = self.directory.url(&format!("/{file}"));
        anyhow!("package not found: {url} does not exist; publish it with `aops gateway publish`")
    }

    /// A portal or proxy answered instead of the source.
    pub(super) fn intercepted(&self, received: &str) -> anyhow::Error {
        let origin = self.directory.origin();
        anyhow!(
            "a device between this host and {origin} answered with its own page ({received}): a captive portal, or a proxy that blocks the \
             request; ask the operator of this network, or set proxy or noProxy"
        )
    }
}

/// The sources in order: the location that the release names, then the endpoints. Also the errors of unusable locations.
pub(super) fn sources(
    endpoints: &[Endpoint],
    tarball: Option<&str>,
) -> Result<(Vec<PackageSource>, Vec<anyhow::Error>)> {
    let (mut sources, mut unusable) = (Vec::new(), Vec::new());
    match tarball.map(|tarball| tarball.parse::<Endpoint>().context("cannot use the tarball address")) {
        Some(Ok(directory)) => {
            let ours = endpoints.iter().any(|endpoint| endpoint.origin() == directory.origin());
            let requester = if ours { Requester::Host } else { Requester::Anonymous };
            sources.push(PackageSource { directory, requester, last: false });
        }
        Some(Err(error)) => unusable.push(error),
        None => ensure!(!endpoints.is_empty(), "no endpoint is configured"),
    }
    for endpoint in endpoints {
        let source =
            PackageSource { directory: endpoint.below(DOWNLOAD_PATH), requester: Requester::Host, last: false };
        if sources.iter().all(|known| known.directory != source.directory) {
            sources.push(source);
        }
    }
    if let Some(last) = sources.last_mut() {
        last.last = true;
    }
    Ok((sources, unusable))
}
