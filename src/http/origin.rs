//! Who asked, as the request's headers tell it.

use std::collections::BTreeMap;

use axum::http::HeaderMap;

use super::fields::Invalid;
use crate::pipeline::Origin;
use crate::units::RequestId;

/// As OpenAI bounds `X-Client-Request-Id`.
const HEADER_CHARS_MAX: usize = 512;
const TAG_CHARS_MAX: usize = 128;

const TAGS: [(&str, &str); 4] = [
    ("team", "x-obol-team"),
    ("feature", "x-obol-feature"),
    ("environment", "x-obol-environment"),
    ("task", "x-obol-task"),
];

/// Reads the attribution headers.
///
/// # Errors
/// When one is empty, too long or not printable ASCII: half an id would be worse than none.
pub(super) fn origin(
    headers: &HeaderMap,
    request: RequestId,
    endpoint: &'static str,
) -> Result<Origin, Invalid> {
    let mut tags = BTreeMap::new();
    for (tag, header) in TAGS {
        if let Some(value) = printable(headers, header, TAG_CHARS_MAX)? {
            tags.insert(tag.to_owned(), value);
        }
    }
    let own_id = match printable(headers, "x-client-request-id", HEADER_CHARS_MAX)? {
        None => printable(headers, "x-request-id", HEADER_CHARS_MAX)?,
        given => given,
    };
    Ok(Origin {
        request,
        endpoint,
        client_request_id: own_id,
        idempotency_key: printable(headers, "idempotency-key", HEADER_CHARS_MAX)?,
        user: None,
        metadata: BTreeMap::new(),
        tags,
    })
}

fn printable(headers: &HeaderMap, name: &str, chars_max: usize) -> Result<Option<String>, Invalid> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    match value.to_str() {
        Ok(text) if (1..=chars_max).contains(&text.len()) && !text.contains('\t') => {
            Ok(Some(text.to_owned()))
        }
        _ => Err(Invalid::new(
            name,
            format!("the header `{name}` must be 1 to {chars_max} printable ASCII characters"),
        )),
    }
}
