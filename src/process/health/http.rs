//! A GET that reads only the status line. Besides [`crate::endpoint`], the only code that uses HTTP: a hundred checks may run at a time,
//! each a socket and a few hundred bytes, where a full client would need a thread and its buffers.

use std::io;
use std::sync::{Arc, OnceLock};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use super::{CheckPermit, CheckResult, connect, failed};
use crate::core::health::Url;
use crate::endpoint;

/// Maximum size of a status line with the interim responses before it.
const MAX_HEAD: u64 = 8 << 10;

/// Succeeds if the status is 2xx or 3xx.
pub(super) async fn get(url: &Url, permit: CheckPermit) -> Result<(), CheckResult> {
    let stream = connect(&url.address, permit).await?;
    let status_of_response = if url.tls {
        match handshake(stream, &url.address.host).await {
            Ok(stream) => status(stream, url).await,
            Err(error) => {
                return Err(failed(&format!("cannot complete the TLS handshake with {}", url.address), &error));
            }
        }
    } else {
        status(stream, url).await
    };
    match status_of_response {
        Ok(200..=399) => Ok(()),
        Ok(status) => Err(CheckResult::Unhealthy(format!("{url} answered {status}"))),
        Err(error) => Err(failed(&format!("cannot get {url}"), &error)),
    }
}

async fn handshake(
    stream: tokio::net::TcpStream,
    host: &str,
) -> io::Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = match CONFIG.get() {
        Some(config) => Arc::clone(config),
        None => {
            let new = Arc::new(endpoint::unverified_tls().map_err(io::Error::other)?);
            Arc::clone(CONFIG.get_or_init(|| new))
        }
    };
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(config).connect(name, stream).await
}

/// Sends the request and reads the status of the response (RFC 9112).
async fn status(mut stream: impl AsyncRead + AsyncWrite + Unpin, url: &Url) -> io::Result<u16> {
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: aops/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        url.path,
        url.address,
        env!("CARGO_PKG_VERSION")
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut stream = stream.take(MAX_HEAD);
    let mut head = Vec::with_capacity(256);
    loop {
        match parse(&head) {
            StatusLine::Status(status) => return Ok(status),
            StatusLine::Other => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the response is not HTTP"));
            }
            StatusLine::Partial => {}
        }
        head.reserve(256);
        if stream.read_buf(&mut head).await? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection without a response",
            ));
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum StatusLine {
    Status(u16),
    Partial,
    Other,
}

/// Parses the first status in `head` that is not interim (1xx); an interim response ends with an empty line.
fn parse(head: &[u8]) -> StatusLine {
    let mut rest = head;
    loop {
        let Some(status) = rest.get(..12) else {
            let is_prefix = rest.iter().zip(b"HTTP/1.").all(|(a, b)| a == b);
            return if is_prefix { StatusLine::Partial } else { StatusLine::Other };
        };
        let (version, digits) = (&status[..7], &status[9..]);
        if version != b"HTTP/1." || status[8] != b' ' || !digits.iter().all(u8::is_ascii_digit) {
            return StatusLine::Other;
        }
        let status = digits.iter().fold(0, |value, digit| value * 10 + u16::from(digit - b'0'));
        if !(100..200).contains(&status) {
            return StatusLine::Status(status);
        }
        match rest.windows(4).position(|window| window == b"\r\n\r\n") {
            Some(end) => rest = &rest[end + 4..],
            None => return StatusLine::Partial,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_read_after_interim_responses() {
        for (head, parsed) in [
            ("", StatusLine::Partial),
            ("HTTP/1.1 2", StatusLine::Partial),
            ("HTTP/1.1 200", StatusLine::Status(200)),
            ("HTTP/1.0 503 No\r\n\r\n", StatusLine::Status(503)),
            ("HTTP/1.1 103 Early\r\nLink: x\r\n", StatusLine::Partial),
            ("HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 204", StatusLine::Status(204)),
            ("SSH-2.0-x", StatusLine::Other),
            ("HTTP/2 200 OK\r\n", StatusLine::Other),
            ("HTTP/1.1 2x0 OK", StatusLine::Other),
        ] {
            assert_eq!(parse(head.as_bytes()), parsed, "{head:?}");
        }
    }
}
