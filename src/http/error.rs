//! Errors as OpenAI's clients know them, and on their paths Anthropic's: the only place where status codes, `type` and `code` are made.

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::fields::Invalid;
use crate::batches::BatchesError;
use crate::control::limits::Exceeded;
use crate::control::{ControlError, Denied};
use crate::pipeline::Failure;
use crate::units::RequestId;

/// Everything a request can be refused with.
#[derive(Debug)]
pub(crate) enum ApiError {
    Invalid(Invalid),
    Failed(Failure),
    /// The model is still being loaded.
    Loading,
    UnknownPath {
        method: String,
        path: String,
    },
    MethodNotAllowed {
        method: String,
        path: String,
    },
    ReceiptNotFound {
        id: String,
    },
    /// A key is needed, and none was sent.
    KeyMissing,
    Denied(Denied),
    /// A key was sent that may not do this.
    AdminOnly,
    /// Nobody may do this: there is no admin key.
    NoAdminKey,
    /// There is no such key, or it is not the asker's.
    KeyNotFound,
    Control(ControlError),
    TaskNotFound {
        id: String,
    },
    /// A budget was spent before all vectors were made.
    VectorsOverBudget,
    FileNotFound {
        id: String,
    },
    BatchNotFound {
        id: String,
    },
    /// Files or batches could not be read or changed.
    Batches(BatchesError),
    /// This server keeps no files.
    NoBatches,
    BodyTooLarge {
        bytes_max: usize,
    },
    BodyTooSlow {
        seconds_max: u64,
    },
    BodyUnreadable,
    /// The engine's thread does not answer.
    EngineSilent,
    /// The ledger's database cannot be read.
    LedgerUnreadable,
    /// There is no such response, or it is not the asker's.
    ResponseNotFound {
        id: String,
    },
    /// The answer is there and charged, but could not be kept, as was asked for.
    NotKept {
        request: RequestId,
        disk_full: bool,
    },
    /// What is kept cannot be read or removed.
    ArchiveUnreadable,
    /// A handler panicked: a bug, already logged.
    Bug,
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::Invalid(invalid)
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

impl From<BatchesError> for ApiError {
    fn from(error: BatchesError) -> Self {
        Self::Batches(error)
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

/// What goes over the wire for one error.
#[derive(Debug, Clone)]
struct Wire {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after: Option<u64>,
    /// Clients that would try again by themselves are told not to.
    is_final: bool,
}

impl Wire {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, kind, code, param: None, message, retry_after: None, is_final: false }
    }

    fn invalid(status: StatusCode, code: Option<&'static str>, message: String) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    fn unauthorized(message: String) -> Self {
        Self::invalid(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    fn forbidden(code: &'static str, message: String) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some(code), message)
    }

    fn unavailable(code: &'static str, message: String, retry_after: u64) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", Some(code), message)
        }
    }

    fn about(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }
}

impl ApiError {
    fn wire(self) -> Wire {
        match self {
            Self::Invalid(Invalid { param, message, code }) => {
                Wire { param, ..Wire::invalid(StatusCode::BAD_REQUEST, code, message) }
            }
            Self::Failed(failure) => failed(failure),
            Self::Loading => Wire::unavailable("loading", "the model is still loading; retry soon".into(), 1),
            Self::UnknownPath { method, path } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("unknown URL: {method} {path}"))
            }
            Self::MethodNotAllowed { method, path } => Wire::invalid(
                StatusCode::METHOD_NOT_ALLOWED,
                None,
                format!("{method} is not allowed on {path}; see the `allow` header"),
            ),
            Self::ReceiptNotFound { id } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("no receipt with the id `{id}`"))
                    .about("id")
            }
            Self::KeyMissing => Wire::unauthorized(
                "no API key was sent; send one as `Authorization: Bearer sk-obol-...`, or as `x-api-key`"
                    .into(),
            ),
            Self::Denied(Denied::Unreadable(error)) => control(error),
            Self::Denied(denied) => Wire::unauthorized(denied.to_string()),
            Self::AdminOnly => {
                Wire::forbidden("admin_only", "this takes the admin key; the API key given is not it".into())
            }
            Self::NoAdminKey => Wire::forbidden(
                "no_admin_key",
                "this server has no admin key: start it with --admin-key-file or OBOL_ADMIN_KEY, or use \
                 `obol keys` beside it"
                    .into(),
            ),
            Self::KeyNotFound => {
                Wire::invalid(StatusCode::NOT_FOUND, Some("key_not_found"), "no such key".into()).about("key")
            }
            Self::Control(error) => control(error),
            Self::TaskNotFound { id } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("no task with the id `{id}`")).about("id")
            }
            Self::VectorsOverBudget => Wire {
                is_final: true,
                ..Wire::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "insufficient_quota",
                    Some("budget_exceeded"),
                    "the budget was spent before all inputs were computed; what was computed is charged"
                        .into(),
                )
            },
            Self::FileNotFound { id } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("no file with the id `{id}`")).about("id")
            }
            Self::BatchNotFound { id } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("no batch with the id `{id}`")).about("id")
            }
            Self::Batches(error) => batches(error),
            Self::NoBatches => {
                Wire::invalid(StatusCode::NOT_FOUND, None, "this server keeps no files and no batches".into())
            }
            Self::BodyTooLarge { bytes_max } => Wire::invalid(
                StatusCode::PAYLOAD_TOO_LARGE,
                Some("request_too_large"),
                format!("the body is over {bytes_max} bytes, the most this server reads"),
            ),
            Self::BodyTooSlow { seconds_max } => Wire::invalid(
                StatusCode::REQUEST_TIMEOUT,
                None,
                format!("the body did not arrive within {seconds_max} s"),
            ),
            Self::BodyUnreadable => {
                Wire::invalid(StatusCode::BAD_REQUEST, None, "the body could not be read to its end".into())
            }
            Self::EngineSilent => Wire::unavailable("engine_down", "the engine does not answer".into(), 5),
            Self::LedgerUnreadable => {
                Wire::unavailable("ledger_unavailable", "the ledger cannot be read".into(), 5)
            }
            Self::ResponseNotFound { id } => {
                Wire::invalid(StatusCode::NOT_FOUND, None, format!("no response with the id `{id}`"))
                    .about("id")
            }
            Self::NotKept { request, disk_full } => {
                let why = if disk_full { "the disk is full" } else { "they cannot be written" };
                let message = format!(
                    "the response is complete and charged (its receipt is at /v1/requests/{request}), but \
                     responses cannot be kept at the moment: {why}. Ask with `store: false`"
                );
                let (status, code) = (StatusCode::INTERNAL_SERVER_ERROR, Some("response_not_stored"));
                Wire { is_final: true, ..Wire::new(status, "server_error", code, message) }
            }
            Self::ArchiveUnreadable => {
                let message = "responses cannot be read or changed at the moment; nothing was changed";
                Wire::unavailable("responses_unavailable", message.into(), 5)
            }
            Self::Bug => {
                Wire::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, "internal error".into())
            }
        }
    }

    /// The error object alone, as it is sent in the middle of a stream.
    pub(crate) fn into_object(self) -> Value {
        object(&self.wire())
    }

    /// The same in Anthropic's shape.
    pub(crate) fn into_anthropic(self) -> Value {
        anthropic(&self.wire()).1
    }
}

fn batches(error: BatchesError) -> Wire {
    let message = error.to_string();
    match error {
        BatchesError::TooLarge { .. } => {
            Wire::invalid(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message).about("file")
        }
        BatchesError::Full { .. } => Wire {
            is_final: true,
            ..Wire::new(StatusCode::INSUFFICIENT_STORAGE, "unavailable_error", Some("storage_full"), message)
        },
        BatchesError::TooMany { .. } => Wire {
            retry_after: Some(60),
            ..Wire::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("too_many_batches"), message)
        },
        BatchesError::InUse { .. } => {
            Wire::invalid(StatusCode::CONFLICT, Some("file_in_use"), message).about("id")
        }
        BatchesError::Ended { .. } => {
            Wire::invalid(StatusCode::CONFLICT, Some("batch_ended"), message).about("id")
        }
        BatchesError::NoSuchFile { .. } => {
            Wire::invalid(StatusCode::NOT_FOUND, None, message).about("input_file_id")
        }
        BatchesError::Disk { .. }
        | BatchesError::NotOurs { .. }
        | BatchesError::SchemaVersion { .. }
        | BatchesError::Database { .. } => {
            // Where the file is and what ails it is for the log.
            tracing::error!(%error, "files and batches cannot be read or changed");
            let message = "files and batches cannot be read or changed at the moment; nothing was changed";
            Wire::unavailable("files_unavailable", message.into(), 5)
        }
    }
}

fn control(error: ControlError) -> Wire {
    match error {
        ControlError::BadSetting(bad) => {
            Wire::invalid(StatusCode::BAD_REQUEST, None, bad.problem).about(bad.param)
        }
        ControlError::AliasTaken { .. } => {
            Wire::invalid(StatusCode::BAD_REQUEST, None, error.to_string()).about("key_alias")
        }
        ControlError::NoSuchKey { .. } => ApiError::KeyNotFound.wire(),
        // Where the file is and what ails it is for the log.
        _ => {
            tracing::error!(%error, "keys cannot be read or changed");
            let message = "keys cannot be read or changed at the moment; nothing was changed";
            Wire::unavailable("keys_unavailable", message.into(), 5)
        }
    }
}

fn failed(failure: Failure) -> Wire {
    let message = failure.to_string();
    match failure {
        Failure::ModelNotAllowed { .. } => Wire::forbidden("model_not_allowed", message).about("model"),
        Failure::OverKeyTokens { param, .. } => {
            Wire::invalid(StatusCode::BAD_REQUEST, Some("max_tokens_exceeded"), message).about(param)
        }
        Failure::ModelNotFound { .. } => {
            Wire::invalid(StatusCode::NOT_FOUND, Some("model_not_found"), message).about("model")
        }
        Failure::Invalid { param, .. } => Wire::invalid(StatusCode::BAD_REQUEST, None, message).about(param),
        Failure::PromptTooLong { param, .. }
        | Failure::AnswerTooLong { param, .. }
        | Failure::InputTooLong { param, .. } => {
            Wire::invalid(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), message).about(param)
        }
        Failure::IdempotencyKeyReused { .. } => {
            Wire::invalid(StatusCode::CONFLICT, Some("idempotency_key_reused"), message)
        }
        Failure::QueueFull { .. } => Wire {
            retry_after: Some(1),
            ..Wire::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
        },
        Failure::RateLimited(exceeded) => {
            let retry_after = match exceeded {
                Exceeded::Requests { retry_after, .. } | Exceeded::Tokens { retry_after, .. } => {
                    Some(retry_after.0.div_ceil(1_000_000_000))
                }
                Exceeded::Parallel { .. } => Some(1),
                Exceeded::TooLarge { .. } => None,
            };
            Wire {
                retry_after,
                is_final: retry_after.is_none(),
                ..Wire::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    Some("rate_limit_exceeded"),
                    message,
                )
            }
        }
        Failure::TaskHalted(_) => Wire {
            is_final: true,
            ..Wire::new(
                StatusCode::TOO_MANY_REQUESTS,
                "insufficient_quota",
                Some("task_limit_exceeded"),
                message,
            )
        },
        Failure::Budget(_, retry_after) => Wire {
            retry_after,
            is_final: true,
            ..Wire::new(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", Some("budget_exceeded"), message)
        },
        Failure::Draining | Failure::Cancelled => Wire::unavailable("draining", message, 5),
        Failure::LedgerUnavailable => Wire::unavailable("ledger_unavailable", message, 5),
        Failure::Engine => Wire::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message),
    }
}

/// Turns what the framework refused by itself (wrong method, undecodable path) into our error object;
/// headers such as `allow` stay.
pub(crate) fn in_our_shape(response: Response, method: &Method, path: &str) -> Response {
    let status = response.status();
    let ours = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (method, path) = (method.to_string(), path.to_owned());
    let error = match status {
        StatusCode::METHOD_NOT_ALLOWED => ApiError::MethodNotAllowed { method, path },
        StatusCode::BAD_REQUEST => ApiError::UnknownPath { method, path },
        _ => ApiError::Bug,
    };
    let mut shaped = error.into_response();
    if let Some(allow) = response.headers().get(header::ALLOW) {
        shaped.headers_mut().insert(header::ALLOW, allow.clone());
    }
    shaped
}

/// Whether errors on this path are Anthropic's.
fn is_anthropic(path: &str) -> bool {
    path == "/v1/messages" || path.starts_with("/v1/messages/")
}

/// An error of ours as Anthropic's clients know them, on the paths that are theirs; other answers as they are.
pub(crate) fn in_paths_shape(mut response: Response, path: &str, request: &RequestId) -> Response {
    if !is_anthropic(path) {
        return response;
    }
    let id = HeaderValue::from_str(&request.0).expect("a request's id is ASCII");
    response.headers_mut().insert("request-id", id);
    let Some(wire) = response.extensions_mut().remove::<Wire>() else { return response };
    let (status, mut object) = anthropic(&wire);
    object["request_id"] = json!(request.0);
    *response.status_mut() = status;
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(object.to_string());
    response
}

/// Status and body of an error in Anthropic's words.
fn anthropic(wire: &Wire) -> (StatusCode, Value) {
    // Their status for a server that cannot answer now.
    let overloaded = || StatusCode::from_u16(529).expect("a status of three digits");
    let status = if wire.status == StatusCode::SERVICE_UNAVAILABLE { overloaded() } else { wire.status };
    let kind = match wire.status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::REQUEST_TIMEOUT => "timeout_error",
        StatusCode::CONFLICT => "conflict_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    let mut error = json!({"type": kind, "message": wire.message});
    if let Some(code) = wire.code {
        error["details"] = json!({"error_code": code});
    }
    (status, json!({"type": "error", "error": error}))
}

fn object(wire: &Wire) -> Value {
    json!({"error": {"message": wire.message, "type": wire.kind, "param": wire.param, "code": wire.code}})
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let wire = self.wire();
        let mut response = (wire.status, Json(object(&wire))).into_response();
        if let Some(seconds) = wire.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if wire.is_final {
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if wire.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if wire.status == StatusCode::REQUEST_TIMEOUT {
            // The rest of the body is not wanted: the connection cannot be used again.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        // For paths that have another shape.
        response.extensions_mut().insert(wire);
        response
    }
}
