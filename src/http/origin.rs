//! Who asked, as key and headers tell it; and, with what the body says, what the request is booked under.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::HeaderMap;

use super::Server;
use super::auth::Caller;
use super::fields::Invalid;
use crate::control::policy::{self, TAG_CHARS_MAX, Tags};
use crate::pipeline::Origin;
use crate::request::{Tag, Tier};
use crate::units::RequestId;

/// As OpenAI bounds `X-Client-Request-Id`.
const HEADER_CHARS_MAX: usize = 512;

const HEADERS: [(Tag, &str); 6] = [
    (Tag::Team, "x-obol-team"),
    (Tag::Feature, "x-obol-feature"),
    (Tag::Environment, "x-obol-environment"),
    (Tag::User, "x-obol-user"),
    (Tag::CostCenter, "x-obol-cost-center"),
    (Tag::Task, "x-obol-task"),
];

/// Tags that the headers say, by the headers' names.
///
/// # Errors
/// As [`asker`].
pub(super) fn tag_headers(headers: &HeaderMap) -> Result<BTreeMap<String, String>, Invalid> {
    let mut found = BTreeMap::new();
    for (_, header) in HEADERS {
        if let Some(value) = printable(headers, header, TAG_CHARS_MAX)? {
            found.insert(header.to_owned(), value);
        }
    }
    Ok(found)
}

/// Who asks, before the body is read.
pub(crate) struct Asker {
    request: RequestId,
    endpoint: &'static str,
    caller: Caller,
    client_request_id: Option<String>,
    idempotency_key: Option<String>,
    depth: Option<u64>,
    parent: Option<String>,
    tags: Tags,
    required: Arc<[Tag]>,
    /// The tenants that may ask for the tier `priority`; `None`: all.
    priority: Option<Arc<[String]>>,
}

/// Reads the headers.
///
/// # Errors
/// When one is empty, too long or not printable ASCII: half an id would be worse than none.
pub(super) fn asker(
    server: &Server,
    caller: Caller,
    headers: &HeaderMap,
    request: RequestId,
    endpoint: &'static str,
) -> Result<Asker, Invalid> {
    let mut tags = Tags::new();
    for (tag, header) in HEADERS {
        if let Some(value) = printable(headers, header, TAG_CHARS_MAX)? {
            tags.insert(tag, value);
        }
    }
    let own_id = match printable(headers, "x-client-request-id", HEADER_CHARS_MAX)? {
        None => printable(headers, "x-request-id", HEADER_CHARS_MAX)?,
        given => given,
    };
    Ok(Asker {
        request,
        endpoint,
        caller,
        client_request_id: own_id,
        idempotency_key: printable(headers, "idempotency-key", HEADER_CHARS_MAX)?,
        depth: depth(headers)?,
        parent: printable(headers, "x-obol-parent-request", HEADER_CHARS_MAX)?,
        tags,
        required: Arc::clone(&server.access.require_tags),
        priority: server.access.priority.clone(),
    })
}

impl Asker {
    /// Nobody, for parsers that are only looked at.
    pub(crate) fn nobody(endpoint: &'static str) -> Self {
        Self {
            request: RequestId::new(),
            endpoint,
            caller: Caller::Anybody,
            client_request_id: None,
            idempotency_key: None,
            depth: None,
            parent: None,
            tags: Tags::new(),
            required: Arc::new([]),
            priority: None,
        }
    }

    /// The tier, if its tenant may ask for it; the lines of batches have their own.
    ///
    /// # Errors
    /// When others may.
    pub(crate) fn tier(&self, asked: Tier) -> Result<Tier, Invalid> {
        if self.caller.batch().is_some() {
            return Ok(Tier::Batch);
        }
        let tenant = self.caller.tenant();
        let may = |tenants: &Arc<[String]>| tenants.iter().any(|name| name == tenant);
        if asked == Tier::Priority && !self.priority.as_ref().is_none_or(may) {
            let problem = format!(
                "`service_tier`: `priority` is not for `{tenant}`; ask the administrator to name it in scheduling.priority"
            );
            return Err(Invalid::new("service_tier", problem));
        }
        Ok(asked)
    }

    /// The whole attribution, with what the body says of it.
    ///
    /// # Errors
    /// When a tag in `metadata` is no name, or one is missing that is required.
    pub(crate) fn origin(
        self,
        user: Option<String>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Origin, Invalid> {
        let key = self.caller.key().cloned();
        let batch = self.caller.batch().cloned();
        let mut tags = policy::attribute(key.as_deref(), self.tags, tags_of_body(user, &metadata)?);
        if let Some(first) = policy::missing(&self.required, key.as_deref(), &tags).first() {
            return Err(missing(*first));
        }
        let user = tags.remove(&Tag::User);
        Ok(Origin {
            request: self.request,
            endpoint: self.endpoint,
            tenant: self.caller.tenant().to_owned(),
            key,
            client_request_id: self.client_request_id,
            idempotency_key: batch.as_ref().map(|line| line.idempotency_key.clone()).or(self.idempotency_key),
            user,
            metadata,
            depth: self.depth,
            parent: self.parent,
            tags: tags.into_iter().map(|(tag, value)| (tag.as_str().to_owned(), value)).collect(),
            batch,
        })
    }
}

fn tags_of_body(user: Option<String>, metadata: &BTreeMap<String, String>) -> Result<Tags, Invalid> {
    let mut tags = Tags::new();
    for tag in Tag::ALL.into_iter().filter(|tag| *tag != Tag::User) {
        if let Some(value) = metadata.get(tag.as_str()) {
            let path = format!("metadata.{}", tag.as_str());
            policy::check_value(value)
                .map_err(|problem| Invalid::new(&path, format!("`{path}`: {problem}")))?;
            tags.insert(tag, value.clone());
        }
    }
    tags.extend(user.map(|user| (Tag::User, user)));
    Ok(tags)
}

fn missing(tag: Tag) -> Invalid {
    let name = tag.as_str();
    let header = HEADERS.into_iter().find(|(of, _)| *of == tag).map_or("", |(_, header)| header);
    let field = if tag == Tag::User { "`user`".to_owned() } else { format!("`metadata.{name}`") };
    let message = format!(
        "requests here must have the tag `{name}`: send it as the header `{header}` or as {field}, or use a key that has it"
    );
    Invalid::new(name, message).coded("missing_tag")
}

/// How deep a task's call says that it is nested.
fn depth(headers: &HeaderMap) -> Result<Option<u64>, Invalid> {
    const NAME: &str = "x-obol-task-depth";
    let Some(text) = printable(headers, NAME, HEADER_CHARS_MAX)? else { return Ok(None) };
    let depth = text.parse().ok().filter(|depth| (1..=1_000_000).contains(depth));
    depth.map(Some).ok_or_else(|| {
        Invalid::new(NAME, format!("the header `{NAME}` must be a whole number from 1, got {text:?}"))
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
