//! Error responses: a status code, and JSON `{"errorMessage": …}`, which a host shows its operator.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// An error response.
#[derive(Debug)]
pub(super) struct HttpError {
    pub(super) status: StatusCode,
    message: String,
    /// Seconds, for the header `Retry-After`.
    pub(super) retry_after: Option<u64>,
}

impl HttpError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> HttpError {
        HttpError { status, message: message.into(), retry_after: None }
    }

    /// Adds the header `Retry-After`, in seconds.
    pub(super) fn retry_after(self, seconds: u64) -> HttpError {
        HttpError { retry_after: Some(seconds), ..self }
    }
}

impl From<axum::http::Error> for HttpError {
    fn from(error: axum::http::Error) -> HttpError {
        tracing::error!(%error, "cannot create a response");
        HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, "cannot create the response")
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &serde_json::json!({ "errorMessage": self.message }));
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A response in JSON.
pub(super) fn json_response(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => (status, [(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot serialize a response");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
