//! Requests that cannot be answered as asked: a status code that says whose fault it is, and JSON `{"errorMessage": …}`, which a host shows its
//! operator.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// A request that cannot be answered as asked.
#[derive(Debug)]
pub(super) struct HttpError {
    pub(super) status: StatusCode,
    message: String,
    pub(super) retry_after: Option<u64>,
}

impl HttpError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> HttpError {
        HttpError { status, message: message.into(), retry_after: None }
    }

    /// Seconds after which it is worth another try.
    pub(super) fn retry_after(self, seconds: u64) -> HttpError {
        HttpError { retry_after: Some(seconds), ..self }
    }
}

impl From<axum::http::Error> for HttpError {
    fn from(error: axum::http::Error) -> HttpError {
        tracing::error!(%error, "an answer could not be put together");
        HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, "cannot put the answer together")
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = json(self.status, &serde_json::json!({ "errorMessage": self.message }));
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// An answer in JSON.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => (status, [(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
