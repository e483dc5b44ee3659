//! What is around every response: its id, the device and currency headers, and the net that turns
//! panics and the framework's own refusals into error objects.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;

use super::Server;
use super::auth;
use super::error::{self, ApiError};
use crate::units::RequestId;

/// The header with the devices' ids.
pub(super) const DEVICE: &str = "x-obol-device";

pub(super) async fn envelope(
    State(server): State<Arc<Server>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = RequestId::new();
    let (method, path) = (request.method().clone(), auth::without_secrets(request.uri().path()));
    request.extensions_mut().insert(id.clone());
    let answered = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = match answered {
        Ok(response) => error::in_our_shape(response, &method, &path),
        Err(panic) => {
            tracing::error!(request = %id, %method, path, "a handler panicked: {}", panic_message(&*panic));
            ApiError::Bug.into_response()
        }
    };
    response = error::in_paths_shape(response, &path, &id);
    let headers = response.headers_mut();
    put(headers, "x-request-id", &id.0);
    // An answer names the device that computes it.
    if !headers.contains_key(DEVICE) {
        put(headers, DEVICE, &server.config.device);
    }
    put(headers, "x-obol-currency", &server.config.currency);
    response
}

pub(super) async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownPath { method: method.to_string(), path: auth::without_secrets(uri.path()) }
}

/// Sets one header. A value that no header can hold comes from the configuration and is left out.
pub(super) fn put(headers: &mut HeaderMap, name: &'static str, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => {
            headers.insert(HeaderName::from_static(name), value);
        }
        Err(_) => tracing::warn!(name, value, "not a header value; left out"),
    }
}

pub(super) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
