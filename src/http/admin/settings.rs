//! A key's settings from a body in LiteLLM's field names. A field that is absent leaves its setting as it is, null
//! takes it away; one that is not honoured is refused by name.

use serde_json::{Map, Value, json};

use crate::config::UnknownFields;
use crate::control::{BadSetting, KEY_TAGS, KeySettings, Span};
use crate::http::fields::{Fields, Invalid, string_at, wrong_type};
use crate::request::Tag;
use crate::units::{Picos, UnixNanos};

/// LiteLLM's names for groups of models: one server has one model, and no teams' lists of them.
const ALL_MODELS: &str = "all-proxy-models";
const NO_MODELS: [&str; 2] = ["all-team-models", "no-default-models"];

pub(super) fn apply(
    mut fields: Fields,
    set: &mut KeySettings,
    now: UnixNanos,
    unknown: UnknownFields,
) -> Result<(), BadSetting> {
    read(&mut fields, set, now)?;
    refuse_what_is_not_honoured(&mut fields)?;
    Ok(fields.finish(unknown)?)
}

/// Whether these are settings.
pub(super) fn taken(mut fields: Fields) -> Result<(), Invalid> {
    read(&mut fields, &mut KeySettings::default(), UnixNanos(0))?;
    refuse_what_is_not_honoured(&mut fields)?;
    fields.finish(UnknownFields::Reject)
}

fn read(fields: &mut Fields, set: &mut KeySettings, now: UnixNanos) -> Result<(), Invalid> {
    change(fields, "key_alias", &mut set.alias, Fields::string)?;
    change(fields, "duration", &mut set.expires, |fields, name| expiry(fields, name, now))?;
    if set.expires == Some(NEVER) {
        set.expires = None;
    }
    if fields.is_null("models") {
        set.models.clear();
    }
    if let Some(items) = fields.array("models")? {
        set.models = models(items)?;
    }
    change(fields, "max_tokens", &mut set.max_tokens, |fields, name| fields.count(name, 1))?;
    change(fields, "max_budget", &mut set.max_budget, amount)?;
    change(fields, "soft_budget", &mut set.soft_budget, amount)?;
    change(fields, "budget_duration", &mut set.budget_duration, span)?;
    change(fields, "tpm_limit", &mut set.tpm_limit, limit)?;
    change(fields, "rpm_limit", &mut set.rpm_limit, limit)?;
    let parallel = &mut set.max_parallel_requests;
    change(fields, "max_parallel_requests", parallel, |fields, name| fields.count(name, 1))?;
    set.blocked = fields.boolean("blocked")?.unwrap_or(set.blocked);
    tags(fields, set)?;
    if fields.is_null("require_tags") {
        set.require_tags.clear();
    }
    if let Some(items) = fields.array("require_tags")? {
        let named = items.into_iter().enumerate().map(|(at, item)| {
            let path = format!("require_tags[{at}]");
            string_at(&path, item)?.parse().map_err(|problem: String| Invalid::new(&path, problem))
        });
        set.require_tags = named.collect::<Result<_, _>>()?;
    }
    match fields.take("metadata") {
        Some(Value::Object(metadata)) => set.metadata = metadata,
        Some(other) => return Err(wrong_type("metadata", "an object", &other)),
        None => {}
    }
    Ok(())
}

/// `null` before it is taken means: away with it.
fn change<T>(
    fields: &mut Fields,
    name: &str,
    setting: &mut Option<T>,
    read: impl FnOnce(&mut Fields, &str) -> Result<Option<T>, Invalid>,
) -> Result<(), Invalid> {
    let cleared = fields.is_null(name);
    match read(fields, name)? {
        Some(value) => *setting = Some(value),
        None if cleared => *setting = None,
        None => {}
    }
    Ok(())
}

/// Stands for no expiry until it is taken away.
const NEVER: UnixNanos = UnixNanos(u64::MAX);

/// From now on; `-1` is LiteLLM's way to say never.
fn expiry(fields: &mut Fields, name: &str, now: UnixNanos) -> Result<Option<UnixNanos>, Invalid> {
    match fields.string(name)?.as_deref() {
        None => Ok(None),
        Some("-1") => Ok(Some(NEVER)),
        Some(text) => {
            let span: Span = text.parse().map_err(|problem: String| Invalid::new(name, problem))?;
            Ok(Some(span.after(now)))
        }
    }
}

fn span(fields: &mut Fields, name: &str) -> Result<Option<Span>, Invalid> {
    let text = fields.string(name)?;
    text.map(|text| text.parse().map_err(|problem: String| Invalid::new(name, problem))).transpose()
}

fn limit(fields: &mut Fields, name: &str) -> Result<Option<u64>, Invalid> {
    let found = fields.integer(name, 1..=i64::MAX)?;
    Ok(found.map(|number| u64::try_from(number).expect("checked to be positive")))
}

/// A decimal text, exactly, or a number as its shortest text reads.
fn amount(fields: &mut Fields, name: &str) -> Result<Option<Picos>, Invalid> {
    let text = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => text,
        // Never with an exponent.
        Some(Value::Number(number)) if number.is_f64() => format!("{}", number.as_f64().unwrap_or(f64::NAN)),
        Some(Value::Number(number)) => number.to_string(),
        Some(other) => return Err(wrong_type(name, "a number, or a decimal in a string", &other)),
    };
    Picos::parse(&text).map(Some).map_err(|problem| Invalid::new(name, format!("`{name}`: {problem}")))
}

fn models(items: Vec<Value>) -> Result<Vec<String>, Invalid> {
    let named = items.into_iter().enumerate().map(|(at, item)| string_at(&format!("models[{at}]"), item));
    let models: Vec<String> = named.collect::<Result<_, _>>()?;
    if let Some(group) = models.iter().find(|model| NO_MODELS.contains(&model.as_str())) {
        return Err(Invalid::new(
            "models",
            format!("`{group}` is not known here: name models, or none for all"),
        ));
    }
    let all = models.iter().any(|model| model == ALL_MODELS);
    Ok(if all { Vec::new() } else { models })
}

/// Each by itself: what is not named stays. `team_id` and `user_id` are LiteLLM's names for two of them.
fn tags(fields: &mut Fields, set: &mut KeySettings) -> Result<(), Invalid> {
    if fields.is_null("tags") {
        set.tags.clear();
    }
    let mut given: Map<String, Value> = Map::new();
    match fields.take("tags") {
        None => {}
        Some(Value::Object(tags)) => given = tags,
        Some(other) => return Err(wrong_type("tags", "an object such as {\"team\": \"search\"}", &other)),
    }
    for (alias, tag) in [("team_id", Tag::Team), ("user_id", Tag::User)] {
        let cleared = fields.is_null(alias);
        let value = match fields.string(alias)? {
            Some(value) => Value::from(value),
            None if cleared => Value::Null,
            None => continue,
        };
        if let Some(other) = given.insert(tag.as_str().to_owned(), value.clone())
            && other != value
        {
            let message = format!("`{alias}` and `tags.{}` differ; give one of them", tag.as_str());
            return Err(Invalid::new(alias, message));
        }
    }
    for (name, value) in given {
        let path = format!("tags.{name}");
        let known = KEY_TAGS.into_iter().find(|tag| tag.as_str() == name);
        let tag = known.ok_or_else(|| {
            let names = KEY_TAGS.map(Tag::as_str).join(", ");
            Invalid::new(&path, format!("`{path}` is no tag of a key; there are {names}"))
        })?;
        match value {
            Value::Null => set.tags.remove(&tag),
            value => set.tags.insert(tag, string_at(&path, value)?),
        };
    }
    Ok(())
}

/// What LiteLLM's clients send without meaning anything by it is taken; with a meaning it is refused.
fn refuse_what_is_not_honoured(fields: &mut Fields) -> Result<(), Invalid> {
    let empty = [json!({}), json!([])];
    for name in [
        "aliases",
        "config",
        "permissions",
        "allowed_cache_controls",
        "allowed_routes",
        "guardrails",
        "policies",
        "prompts",
        "model_max_budget",
        "model_rpm_limit",
        "model_tpm_limit",
        "budget_limits",
        "object_permission",
    ] {
        fields.only(name, &empty, "it is not available")?;
    }
    fields.only("spend", &[json!(0), json!(0.0)], "spend is what receipts say, and is not set")?;
    fields.only("send_invite_email", &[json!(false)], "no mail is sent")?;
    fields.only("auto_rotate", &[json!(false)], "use /key/regenerate")?;
    fields.only("key_type", &[json!("default"), json!("llm_api")], "only the admin key administers")?;
    Ok(())
}
