//! Responses that are kept: written with the answer, gone on from, read again and deleted, by who made them.

use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

use crate::archive::{Archive, ArchiveError, Conversation, Entry};
use crate::http::Server;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::Invalid;
use crate::http::receipts::{decoded, number};
use crate::units::{RequestId, UnixNanos};

const PAGE: u64 = 20;
const PAGE_MAX: u64 = 100;

/// Keeps one response.
pub(super) struct Keeper {
    pub(super) archive: Archive,
    pub(super) request: RequestId,
    pub(super) owner: String,
    pub(super) previous: Option<String>,
    /// What the client said with it.
    pub(super) items: Vec<Value>,
}

impl Keeper {
    /// Durable when it returns.
    pub(super) fn keep(
        self,
        id: String,
        created: UnixNanos,
        response: &Value,
    ) -> impl Future<Output = Result<(), ApiError>> + Send + use<> {
        let Self { archive, request, owner, previous, items } = self;
        let (input, response) = (Value::Array(items).to_string(), response.to_string());
        let entry = Entry { id, owner, previous, created, input, response };
        async move {
            archive.keep(entry).await.map_err(|error| {
                let disk_full = matches!(error, ArchiveError::DiskFull { .. });
                ApiError::NotKept { request, disk_full }
            })
        }
    }
}

/// All that was said and answered up to a response, oldest first.
pub(super) async fn history(
    server: &Server,
    caller: &Caller,
    previous: Option<&str>,
) -> Result<Vec<Value>, ApiError> {
    let Some(id) = previous.map(str::to_owned) else { return Ok(Vec::new()) };
    let owner = caller.owner();
    let sought = id.clone();
    let found = read(server, move |archive| archive.conversation(&sought, &owner)).await?;
    let lacks = match found {
        Conversation::Whole(entries) => return Ok(entries.into_iter().flat_map(items_of).collect()),
        Conversation::Lacks(lacks) => lacks,
    };
    let message = if lacks == id {
        format!("`previous_response_id`: no response with the id `{id}` is kept here")
    } else {
        format!(
            "`previous_response_id`: `{id}` goes on from `{lacks}`, which is no longer kept here; send the \
             conversation as `input`"
        )
    };
    Err(Invalid::new("previous_response_id", message).coded("previous_response_not_found").into())
}

/// What was said, then what was answered.
fn items_of(entry: Entry) -> Vec<Value> {
    let mut items = items_said(&entry);
    if let Value::Array(output) = parsed(&entry.response)["output"].take() {
        items.extend(output);
    }
    items
}

fn items_said(entry: &Entry) -> Vec<Value> {
    match parsed(&entry.input) {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("what was kept was written as JSON")
}

/// Reads what is kept on a thread that may block.
async fn read<T: Send + 'static>(
    server: &Server,
    read: impl FnOnce(&Archive) -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ApiError> {
    let archive = server.archive.clone();
    match tokio::task::spawn_blocking(move || read(&archive)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(unreadable(&error)),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(ApiError::Loading),
    }
}

fn unreadable(error: &ArchiveError) -> ApiError {
    tracing::error!(%error, "responses cannot be read or removed");
    ApiError::ArchiveUnreadable
}

async fn entry(server: &Server, caller: &Caller, id: String) -> Result<Entry, ApiError> {
    let (sought, owner) = (id.clone(), caller.owner());
    let found = read(server, move |archive| archive.find(&sought, &owner)).await?;
    found.ok_or(ApiError::ResponseNotFound { id })
}

/// The response as it was answered.
pub(in crate::http) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    for (name, value) in pairs(query.as_deref())? {
        match (name.as_str(), value.as_str()) {
            // Everything that there is to include is included.
            ("include" | "include[]", _) | ("stream" | "include_obfuscation", "false") => {}
            ("stream" | "starting_after" | "include_obfuscation", _) => {
                let message = format!("`{name}`: a response is streamed once, while it is made");
                return Err(Invalid::new(name, message).into());
            }
            _ => return Err(unknown(&name).into()),
        }
    }
    let entry = entry(&server, &caller, id).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], entry.response).into_response())
}

/// Removes what was said with it and what was answered. What goes on from it can no longer be gone on from.
pub(in crate::http) async fn delete(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let removed = server.archive.remove(&id, &caller.owner()).await;
    if removed.map_err(|error| unreadable(&error))? {
        return Ok(Json(json!({"id": id, "object": "response", "deleted": true})));
    }
    Err(ApiError::ResponseNotFound { id })
}

/// There is nothing to cancel in what is kept: it is complete.
pub(in crate::http) async fn cancel(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiError {
    match entry(&server, &caller, id).await {
        Ok(_) => Invalid::body(
            "only responses that are made in the background can be cancelled, and this one was not; hang up to \
             cancel a response while it is made",
        )
        .into(),
        Err(error) => error,
    }
}

/// What the client said with a response, by itself: `?limit=20&order=desc&after=ID`.
pub(in crate::http) async fn input_items(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let (mut limit, mut ascending, mut after) = (PAGE, false, None);
    for (name, value) in pairs(query.as_deref())? {
        match (name.as_str(), value.as_str()) {
            ("limit", value) => limit = number("limit", value, 1..=PAGE_MAX)?,
            ("order", "asc" | "desc") => ascending = value == "asc",
            ("order", _) => return Err(Invalid::new("order", "`order` is asc or desc").into()),
            ("after", _) => after = Some(value),
            ("include" | "include[]", _) => {}
            _ => return Err(unknown(&name).into()),
        }
    }
    let entry = entry(&server, &caller, id).await?;
    let mut items = items_said(&entry);
    if !ascending {
        items.reverse();
    }
    if let Some(after) = after {
        let at = items.iter().position(|item| item["id"] == *after);
        let at = at.ok_or_else(|| Invalid::new("after", "`after`: the response has no such item"))?;
        items.drain(..=at);
    }
    let has_more = items.len() as u64 > limit;
    items.truncate(limit as usize);
    let id_of = |item: Option<&Value>| item.map(|item| item["id"].clone());
    Ok(Json(json!({
        "object": "list",
        "first_id": id_of(items.first()),
        "last_id": id_of(items.last()),
        "has_more": has_more,
        "data": items,
    })))
}

fn pairs(query: Option<&str>) -> Result<Vec<(String, String)>, Invalid> {
    let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    let read = pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let both = decoded(name).zip(decoded(value));
        both.ok_or_else(|| Invalid::new(name, format!("`{name}` is not percent-encoded UTF-8")))
    });
    read.collect()
}

fn unknown(name: &str) -> Invalid {
    Invalid::new(name, format!("unknown query parameter `{name}`"))
}
