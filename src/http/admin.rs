//! The admin API: keys under LiteLLM's names, so that its clients and scripts work, and the trail of what was done
//! under OpenAI's.
//!
//! Money in bodies is a number where LiteLLM has one; the exact decimal stands beside it, under `obol`.

mod settings;
mod shape;
mod trail;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, Request, State};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, Invalid, string_at};
use super::receipts::{decoded, from_ledger, number};
use super::{Server, body};
use crate::control::{
    Actor, BadSetting, Control, ControlError, Key, KeyId, KeySettings, Secret, SecretHash, Span,
};
use crate::pipeline;
use crate::request::Tag;
use shape::Stand;

/// Keys in a page of `/key/list`.
const PAGE_MAX: u64 = 100;
const PAGE: u64 = 10;

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/key/generate", post(generate))
        .route("/key/update", post(update))
        .route("/key/delete", post(delete))
        .route("/key/regenerate", post(regenerate))
        .route("/key/{key}/regenerate", post(regenerate_named))
        .route("/key/block", post(block))
        .route("/key/unblock", post(unblock))
        .route("/key/info", get(info))
        .route("/key/list", get(list))
        .route("/v1/organization/audit_logs", get(trail::list))
}

/// A request of the administrator: who it is, the keys, and the body's fields.
struct Ordered {
    server: Arc<Server>,
    control: Control,
    actor: Actor,
    fields: Fields,
}

impl Ordered {
    async fn read(server: Arc<Server>, caller: Caller, request: Request) -> Result<Self, ApiError> {
        let (control, actor) = server.access.administrator(caller)?;
        let (head, body) = request.into_parts();
        let bytes = body::read(&server.config, &head.headers, body).await?;
        let fields = Fields::parse(if bytes.is_empty() { b"{}" } else { &bytes })?;
        Ok(Self { server, control, actor, fields })
    }

    /// The key that `key` names, as it was written.
    fn key(&mut self) -> Result<String, ApiError> {
        let named = self.fields.string("key")?;
        Ok(named.ok_or_else(|| Invalid::new("key", "`key` is required: a key, its token, or its id"))?)
    }

    fn finish(self) -> Result<(Arc<Server>, Control, Actor), ApiError> {
        self.fields.finish(self.server.config.unknown_fields)?;
        Ok((self.server, self.control, self.actor))
    }
}

/// Work that waits for the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(ApiError::Loading),
    }
}

/// A key that is not deleted.
fn living(control: &Control, reference: &str) -> Result<Arc<Key>, ControlError> {
    let (key, _) = control.resolve(reference)?;
    if key.deleted.is_some() {
        return Err(ControlError::NoSuchKey { reference: key.id.0.clone() });
    }
    Ok(key)
}

/// The living key that is to be changed, and where its spend stands: read first, for after the change nothing may fail.
async fn meant(server: &Server, control: &Control, named: String) -> Result<(KeyId, Stand), ApiError> {
    let looked = control.clone();
    let key = blocking(move || living(&looked, &named)).await?;
    let stand = stand(server, control, &key).await?;
    Ok((key.id.clone(), stand))
}

/// Has a changed key's budget count its requests that run, from now on.
async fn heed(server: &Server, key: &Arc<Key>) {
    // While the model loads nothing runs.
    let Ok(app) = server.app() else { return };
    if pipeline::heed(app, key).await.is_err() {
        tracing::warn!(
            key = key.id.0,
            "the key is changed; its budget counts once what it has spent can be read"
        );
    }
}

/// Keys are drawn here, so that each is as random as it looks. What was sent is not repeated.
fn refuse_secret(fields: &mut Fields, name: &str) -> Result<(), Invalid> {
    match fields.take(name) {
        Some(_) => Err(Invalid::new(name, format!("`{name}` is not supported: keys are drawn here"))),
        None => Ok(()),
    }
}

/// A key with its secret, which is shown this once.
fn revealed(secret: &Secret, key: &Key, stand: &Stand, server: &Server) -> Json<Value> {
    let mut made = shape::info(key, secret.hash(), stand, server);
    made["key"] = json!(secret.reveal());
    Json(made)
}

async fn generate(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let Ordered { server, control, actor, mut fields } = Ordered::read(server, caller, request).await?;
    refuse_secret(&mut fields, "key")?;
    let unknown = server.config.unknown_fields;
    let mut settings = KeySettings::default();
    settings::apply(fields, &mut settings, control.now(), unknown).map_err(ControlError::from)?;
    let (secret, key) = blocking(move || control.create(&actor, settings)).await?;
    Ok(revealed(&secret, &key, &Stand::default(), &server))
}

async fn update(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut order = Ordered::read(server, caller, request).await?;
    let named = order.key()?;
    let Ordered { server, control, actor, fields } = order;
    let unknown = server.config.unknown_fields;
    let (id, stand) = meant(&server, &control, named.clone()).await?;
    let (key, token) = blocking(move || {
        let now = control.now();
        control.update(&actor, &id, |settings| settings::apply(fields, settings, now, unknown))?;
        control.resolve(&id.0)
    })
    .await?;
    heed(&server, &key).await;
    let mut changed = shape::info(&key, token, &stand, &server);
    changed["key"] = json!(named);
    Ok(Json(changed))
}

/// `keys`, by key, token or id, and `key_aliases`: all of them or none.
async fn delete(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut order = Ordered::read(server, caller, request).await?;
    let mut named: Vec<String> = Vec::new();
    for list in ["keys", "key_aliases"] {
        let items = order.fields.array(list)?.unwrap_or_default().into_iter().enumerate();
        for (at, item) in items {
            named.push(string_at(&format!("{list}[{at}]"), item)?);
        }
    }
    if named.is_empty() {
        return Err(Invalid::new("keys", "name keys to delete in `keys` or `key_aliases`").into());
    }
    let (_, control, actor) = order.finish()?;
    let deleted = blocking(move || {
        let mut ids: Vec<KeyId> = Vec::new();
        for reference in &named {
            let id = living(&control, reference)?.id.clone();
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        control.delete(&actor, &ids)?;
        Ok(named)
    })
    .await?;
    Ok(Json(json!({"deleted_keys": deleted})))
}

async fn regenerate(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut order = Ordered::read(server, caller, request).await?;
    let named = order.key()?;
    rotate(order, named).await
}

async fn regenerate_named(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(named): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut order = Ordered::read(server, caller, request).await?;
    if order.fields.string("key")?.is_some_and(|other| other != named) {
        return Err(Invalid::new("key", "the path names another key than the body").into());
    }
    rotate(order, named).await
}

/// A new secret; with a `grace_period`, as `24h`, the one before works until that is over.
async fn rotate(mut order: Ordered, named: String) -> Result<Json<Value>, ApiError> {
    let grace = order.fields.string("grace_period")?;
    let grace = grace
        .map(|text| text.parse::<Span>().map_err(|problem| Invalid::new("grace_period", problem)))
        .transpose()?;
    refuse_secret(&mut order.fields, "new_key")?;
    let (server, control, actor) = order.finish()?;
    let (id, stand) = meant(&server, &control, named).await?;
    let (secret, key) = blocking(move || control.rotate(&actor, &id, grace)).await?;
    Ok(revealed(&secret, &key, &stand, &server))
}

async fn block(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    set_blocked(Ordered::read(server, caller, request).await?, true).await
}

async fn unblock(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    set_blocked(Ordered::read(server, caller, request).await?, false).await
}

async fn set_blocked(mut order: Ordered, blocked: bool) -> Result<Json<Value>, ApiError> {
    let named = order.key()?;
    let (server, control, actor) = order.finish()?;
    let (id, stand) = meant(&server, &control, named).await?;
    let (key, token) = blocking(move || {
        control.set_blocked(&actor, &id, blocked)?;
        control.resolve(&id.0)
    })
    .await?;
    Ok(Json(shape::info(&key, token, &stand, &server)))
}

/// `?key=`: of that key, for the administrator; a key may ask for itself, by name or without one.
async fn info(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let mut query = pairs(query.as_deref())?;
    let named = query.remove("key");
    refuse_rest(&query)?;
    let own = caller.key().cloned();
    let control = match (&own, &server.access.control) {
        (Some(_), Some(control)) => control.clone(),
        _ => server.access.administrator(caller)?.0,
    };
    let reference = match (&named, &own) {
        (Some(named), _) => named.clone(),
        (None, Some(own)) => own.id.0.clone(),
        (None, None) => {
            return Err(Invalid::new("key", "`key` is required: a key, its token, or its id").into());
        }
    };
    let looked = control.clone();
    let (key, token) = blocking(move || looked.resolve(&reference)).await?;
    if own.is_some_and(|own| own.id != key.id) {
        return Err(ApiError::KeyNotFound);
    }
    let stand = stand(&server, &control, &key).await?;
    let info = shape::info(&key, token, &stand, &server);
    Ok(Json(json!({"key": named.unwrap_or_else(|| token.to_string()), "info": info})))
}

/// Pages of keys, newest first; tokens, or with `return_full_object=true` what `/key/info` says.
async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let (control, _) = server.access.administrator(caller)?;
    let mut query = pairs(query.as_deref())?;
    let mut count = |name: &str, usual: u64, most: u64| match query.remove(name) {
        None => Ok(usual),
        Some(text) => number(name, &text, 1..=most),
    };
    let (page, size) = (count("page", 1, u64::from(u32::MAX))?, count("size", PAGE, PAGE_MAX)?);
    let whole = match query.remove("return_full_object").as_deref() {
        None | Some("false" | "False") => false,
        Some("true" | "True") => true,
        Some(_) => return Err(Invalid::new("return_full_object", "use true or false").into()),
    };
    let deleted = match query.remove("status").as_deref() {
        None => false,
        Some("deleted") => true,
        Some(_) => return Err(Invalid::new("status", "`status` may be `deleted`, or is left out").into()),
    };
    let mut wanted = |name: &str| query.remove(name);
    let (user, team) = (wanted("user_id"), wanted("team_id"));
    let (alias, token) = (wanted("key_alias"), wanted("key_hash"));
    refuse_rest(&query)?;
    let looked = control.clone();
    let keys = blocking(move || looked.keys()).await?;
    let is = |wanted: &Option<String>, has: Option<&String>| wanted.is_none() || wanted.as_ref() == has;
    let found: Vec<&(Arc<Key>, SecretHash)> = keys
        .iter()
        .rev()
        .filter(|(key, hash)| {
            let set = &key.settings;
            key.deleted.is_some() == deleted
                && is(&user, set.tags.get(&Tag::User))
                && is(&team, set.tags.get(&Tag::Team))
                && is(&alias, set.alias.as_ref())
                && token.as_ref().is_none_or(|token| *token == hash.to_string())
        })
        .collect();
    let skipped = usize::try_from((page - 1).saturating_mul(size)).unwrap_or(usize::MAX);
    let shown: Vec<_> =
        found.iter().skip(skipped).take(usize::try_from(size).expect("at most 100")).collect();
    let data: Vec<Value> = if whole {
        let stands =
            stands(&server, &control, shown.iter().map(|(key, _)| Arc::clone(key)).collect()).await?;
        shown
            .iter()
            .zip(&stands)
            .map(|((key, token), stand)| shape::info(key, *token, stand, &server))
            .collect()
    } else {
        shown.iter().map(|(_, token)| json!(token.to_string())).collect()
    };
    Ok(Json(json!({
        "keys": data,
        "total_count": found.len(),
        "current_page": page,
        "total_pages": found.len().div_ceil(usize::try_from(size).expect("at most 100")),
    })))
}

/// Where the spend of each of these keys stands, as its receipts say and the server foresees.
async fn stands(server: &Server, control: &Control, keys: Vec<Arc<Key>>) -> Result<Vec<Stand>, ApiError> {
    let (looked, now) = (control.clone(), control.now());
    let all = blocking(move || looked.foreseen()).await?;
    let currency = server.config.currency.clone();
    from_ledger(server, move |ledger| {
        let stand = |key: &Arc<Key>| {
            let spent = ledger.spent_by_key(&key.id.0)?.get(&currency).copied().unwrap_or_default();
            Ok(Stand { spent, foreseen: pipeline::foreseen(&all, key, now).cloned() })
        };
        keys.iter().map(stand).collect()
    })
    .await
}

async fn stand(server: &Server, control: &Control, key: &Arc<Key>) -> Result<Stand, ApiError> {
    let mut stands = stands(server, control, vec![Arc::clone(key)]).await?;
    Ok(stands.remove(0))
}

/// A query's parameters.
fn pairs(query: Option<&str>) -> Result<BTreeMap<String, String>, Invalid> {
    let mut pairs = BTreeMap::new();
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value)
            .ok_or_else(|| Invalid::new(name, format!("`{name}` is not percent-encoded UTF-8")))?;
        if pairs.insert(name.to_owned(), value).is_some() {
            return Err(Invalid::new(name, format!("`{name}` is there twice")));
        }
    }
    Ok(pairs)
}

fn refuse_rest(query: &BTreeMap<String, String>) -> Result<(), Invalid> {
    match query.keys().next() {
        Some(name) => Err(Invalid::new(name, format!("unknown query parameter `{name}`"))),
        None => Ok(()),
    }
}

impl From<Invalid> for BadSetting {
    fn from(invalid: Invalid) -> Self {
        Self::new(invalid.param.unwrap_or_default(), invalid.message)
    }
}

/// Whether a body makes a key, or changes the one that it names.
pub(super) fn takes(body: &[u8], changes: bool) -> Result<(), Invalid> {
    let mut fields = Fields::parse(body)?;
    if changes {
        fields.needed("key")?;
    }
    settings::taken(fields)
}
