//! Aborts connections that transfer too slowly, and counts new connections, to tell them from reused ones.
//!
//! The rate is measured below TLS, where each byte is seen on arrival: a peer that sends a TLS record byte by byte shows no data above it
//! for hours.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use crate::core::throughput::MinimumRate;
use crate::core::units::Span;

/// The minimum rate in bytes per second: at a lower one 20 MB would take five hours.
pub(super) const LEAST_PER_SECOND: u64 = 1 << 10;

/// Wraps every connection in a [`StallTransport`].
#[derive(Debug)]
pub(super) struct StallConnector {
    pub(super) window: Duration,
    /// Number of connections started.
    pub(super) connections: Arc<AtomicU64>,
}

impl<In: Transport> Connector<In> for StallConnector {
    type Out = StallTransport<In>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        self.connections.fetch_add(1, Ordering::SeqCst);
        let paced = |inner| StallTransport {
            inner,
            pace: MinimumRate::new(self.window, LEAST_PER_SECOND),
            window: self.window,
        };
        Ok(chained.map(paced))
    }
}

#[derive(Debug)]
pub(super) struct StallTransport<In> {
    inner: In,
    pace: MinimumRate,
    window: Duration,
}

impl<In: Transport> Transport for StallTransport<In> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.pace.begin(Instant::now());
        self.inner.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let before = self.inner.buffers().input().len();
        let progress = self.inner.await_input(timeout)?;
        let received = self.inner.buffers().input().len().saturating_sub(before) as u64;
        // The end of the stream is not a stall.
        if progress && !self.pace.is_fast_enough(received, Instant::now()) {
            return Err(ureq::Error::Other(Box::new(TooSlow { window: self.window })));
        }
        Ok(progress)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

/// The minimum rate was not reached for the whole window.
#[derive(Debug)]
pub(super) struct TooSlow {
    pub(super) window: Duration,
}

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "less than 1 KiB/s was received for {}", Span(self.window))
    }
}

impl std::error::Error for TooSlow {}
