//! Downloads: a file of the index or one byte range of it, streamed from disk.
//!
//! The entity tag is the SHA-256 of the content, so an interrupted download resumes only with bytes of the same content (RFC 9110, sections 13
//! and 14). A request for several ranges gets the whole file.

use std::io::SeekFrom;
use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::response::Response;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::depot::{DepotFile, FileStamp, Index};
use super::http_error::HttpError;
use crate::core::range::{RequestedRange, part};
use crate::core::text::hex;
use crate::package::SIGNATURE_SUFFIX;

/// Bytes read from a file at a time.
const CHUNK: usize = 128 << 10;

/// Answers a GET or HEAD request for the file `name`.
pub(super) async fn answer(
    index: &Index,
    name: &str,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, HttpError> {
    if let Some(item) = index.file(name) {
        let found = LocatedFile {
            tag: format!("\"{}\"", item.sha256),
            size: item.stamp.size,
            content: DownloadContent::File(item.clone()),
        };
        return found.answer(method, headers).await;
    }
    let signature = name.strip_suffix(SIGNATURE_SUFFIX).and_then(|name| index.file(name)?.signature.clone());
    if let Some(text) = signature {
        // The tag is of the signature itself, which changes if the package is signed again.
        let tag = format!("\"{}\"", hex(&Sha256::digest(text.as_bytes())));
        return LocatedFile { tag, size: text.len() as u64, content: DownloadContent::Text(text) }
            .answer(method, headers)
            .await;
    }
    Err(HttpError::new(StatusCode::NOT_FOUND, format!("the depot has no file {}", shown(name))))
}

fn shown(name: &str) -> String {
    name.chars().take(150).collect::<String>().escape_debug().to_string()
}

struct LocatedFile {
    tag: String,
    size: u64,
    content: DownloadContent,
}

enum DownloadContent {
    File(Arc<DepotFile>),
    Text(Arc<str>),
}

impl LocatedFile {
    async fn answer(self, method: &Method, headers: &HeaderMap) -> Result<Response, HttpError> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let response = Response::builder().header(header::ETAG, &self.tag).header(header::ACCEPT_RANGES, "bytes");
        if text(header::IF_NONE_MATCH)
            .is_some_and(|tags| tags.split(',').any(|tag| matches!(tag.trim(), "*") || tag.trim() == self.tag))
        {
            return Ok(response.status(StatusCode::NOT_MODIFIED).body(Body::empty())?);
        }
        let same = text(header::IF_RANGE).is_none_or(|tag| tag.trim() == self.tag);
        let asked = match text(header::RANGE) {
            Some(range) if *method == Method::GET && same => part(range, self.size),
            _ => RequestedRange::Whole,
        };
        let (status, range) = match asked {
            RequestedRange::Whole => (StatusCode::OK, 0..self.size),
            RequestedRange::Range(range) => (StatusCode::PARTIAL_CONTENT, range),
            RequestedRange::Unsatisfiable => {
                return Ok(response
                    .status(StatusCode::RANGE_NOT_SATISFIABLE)
                    .header(header::CONTENT_RANGE, format!("bytes */{}", self.size))
                    .body(Body::empty())?);
            }
        };
        let kind = match self.content {
            DownloadContent::File(_) => "application/octet-stream",
            DownloadContent::Text(_) => "text/plain; charset=utf-8",
        };
        let mut response = response
            .status(status)
            .header(header::CONTENT_TYPE, kind)
            .header(header::CONTENT_LENGTH, range.end - range.start);
        if status == StatusCode::PARTIAL_CONTENT {
            let value = format!("bytes {}-{}/{}", range.start, range.end - 1, self.size);
            response = response.header(header::CONTENT_RANGE, value);
        }
        let body = match method {
            &Method::HEAD => Body::empty(),
            _ => self.content.body(range).await?,
        };
        Ok(response.body(body)?)
    }
}

impl DownloadContent {
    async fn body(self, range: Range<u64>) -> Result<Body, HttpError> {
        match self {
            DownloadContent::Text(text) => {
                let part = text.as_bytes().get(range.start as usize..range.end as usize).unwrap_or_default();
                Ok(Body::from(part.to_vec()))
            }
            DownloadContent::File(item) => {
                let changed = || {
                    let message = format!("{} is being replaced; try again", item.name);
                    HttpError::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(2)
                };
                let mut file = tokio::fs::File::open(&item.path).await.map_err(|_| changed())?;
                // The tag is of the indexed content.
                if FileStamp::of(&file.metadata().await.map_err(|_| changed())?) != item.stamp {
                    return Err(changed());
                }
                file.seek(SeekFrom::Start(range.start)).await.map_err(|_| changed())?;
                Ok(Body::from_stream(ReaderStream::with_capacity(file.take(range.end - range.start), CHUNK)))
            }
        }
    }
}
