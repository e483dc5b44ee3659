//! Keys: who may ask for what, and what their requests are booked under.
//!
//! Knows no database and no HTTP; a key's secret is nowhere but with its owner.

mod secret;
mod span;

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::policy;
use crate::request::Tag;
use crate::units::{Picos, UnixNanos};

pub use secret::{ConfiguredKey, SECRET_PREFIX, Secret, SecretHash};
pub use span::{Span, SpanUnit, rfc3339};

const ALIAS_CHARS_MAX: usize = 256;
const MODELS_MAX: usize = 256;
const METADATA_BYTES_MAX: usize = 16 << 10;
/// Tags that a key may carry: a task is one run, and not a key's.
pub const KEY_TAGS: [Tag; 5] = [Tag::Team, Tag::Feature, Tag::Environment, Tag::User, Tag::CostCenter];

/// A key's id, on receipts as `key_id`: `key_` and a UUIDv7 without dashes, so ids sort by time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub String);

impl KeyId {
    #[must_use]
    pub fn new() -> Self {
        Self(format!("key_{}", uuid::Uuid::now_v7().simple()))
    }
}

impl Default for KeyId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {problem}")]
pub struct BadSetting {
    /// As the admin API names it.
    pub param: String,
    pub problem: String,
}

impl BadSetting {
    #[must_use]
    pub fn new(param: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { param: param.into(), problem: problem.into() }
    }
}

/// What an administrator says about a key. `None` and empty: no limit.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KeySettings {
    /// Of the living keys no two have the same.
    pub alias: Option<String>,
    /// The key is refused from then on.
    pub expires: Option<UnixNanos>,
    pub blocked: bool,
    /// The models that it may ask for; empty: all.
    pub models: Vec<String>,
    /// Most tokens that one request may have generated, all its choices together.
    pub max_tokens: Option<u32>,
    /// Most that may be spent in a `budget_duration`; without one, ever.
    pub max_budget: Option<Picos>,
    /// From there on somebody is told.
    pub soft_budget: Option<Picos>,
    pub budget_duration: Option<Span>,
    /// Tokens a minute.
    pub tpm_limit: Option<u64>,
    /// Requests a minute.
    pub rpm_limit: Option<u64>,
    pub max_parallel_requests: Option<u32>,
    /// What its requests are booked under, whatever they say themselves. Of `KEY_TAGS`.
    pub tags: BTreeMap<Tag, String>,
    /// Tags without which its requests are refused, beside those that the configuration requires.
    pub require_tags: Vec<Tag>,
    /// The administrator's own notes.
    pub metadata: Map<String, Value>,
}

impl KeySettings {
    /// # Errors
    /// Names the first setting that cannot be.
    pub fn check(&self) -> Result<(), BadSetting> {
        let printable = |text: &str, most: usize| {
            (1..=most).contains(&text.chars().count()) && !text.chars().any(char::is_control)
        };
        if self.alias.as_ref().is_some_and(|alias| !printable(alias, ALIAS_CHARS_MAX)) {
            let problem = format!("an alias is 1 to {ALIAS_CHARS_MAX} characters, none of them control");
            return Err(BadSetting::new("key_alias", problem));
        }
        if self.models.len() > MODELS_MAX {
            return Err(BadSetting::new("models", format!("at most {MODELS_MAX} models")));
        }
        if let Some(wrong) = self.models.iter().find(|model| !printable(model, ALIAS_CHARS_MAX)) {
            return Err(BadSetting::new("models", format!("{wrong:?} is no model's name")));
        }
        if self.max_tokens == Some(0) {
            return Err(BadSetting::new("max_tokens", "must be at least 1"));
        }
        let limits = [
            ("tpm_limit", self.tpm_limit),
            ("rpm_limit", self.rpm_limit),
            ("max_parallel_requests", self.max_parallel_requests.map(u64::from)),
        ];
        for (name, limit) in limits {
            if limit.is_some_and(|limit| limit == 0 || i64::try_from(limit).is_err()) {
                return Err(BadSetting::new(
                    name,
                    "must be at least 1 and fit 63 bits; to stop a key, block it",
                ));
            }
        }
        for (name, amount) in [("max_budget", self.max_budget), ("soft_budget", self.soft_budget)] {
            if amount.is_some_and(|amount| amount < Picos::ZERO || amount > Picos::SETTING_MAX) {
                return Err(BadSetting::new(name, "must be from 0 to 10^15"));
            }
        }
        if let (Some(soft), Some(max)) = (self.soft_budget, self.max_budget)
            && soft > max
        {
            return Err(BadSetting::new("soft_budget", "is over max_budget"));
        }
        for (tag, value) in &self.tags {
            if !KEY_TAGS.contains(tag) {
                let names = KEY_TAGS.map(Tag::as_str).join(", ");
                return Err(BadSetting::new("tags", format!("a key has no tag {}; {names}", tag.as_str())));
            }
            policy::check_value(value)
                .map_err(|problem| BadSetting::new(format!("tags.{}", tag.as_str()), problem))?;
        }
        let bytes = Value::Object(self.metadata.clone()).to_string().len();
        if bytes > METADATA_BYTES_MAX {
            return Err(BadSetting::new("metadata", format!("{bytes} bytes; at most {METADATA_BYTES_MAX}")));
        }
        Ok(())
    }
}

/// A key as it stands. What is given out is never changed: a change makes another value.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    pub id: KeyId,
    /// `sk-...7sFA`, of its secret as of now.
    pub name: String,
    pub settings: KeySettings,
    pub created: UnixNanos,
    /// `cli`, or the id of an admin key, as in the trail.
    pub created_by: String,
    pub updated: UnixNanos,
    /// Who made the last change.
    pub updated_by: String,
    pub deleted: Option<UnixNanos>,
}

impl Key {
    /// Whose cache and whose spend it is: the team's, else the key's own.
    #[must_use]
    pub fn tenant(&self) -> &str {
        self.settings.tags.get(&Tag::Team).unwrap_or(&self.id.0)
    }

    #[must_use]
    pub fn is_expired(&self, now: UnixNanos) -> bool {
        self.settings.expires.is_some_and(|expires| expires <= now)
    }

    /// Everything but secrets, in LiteLLM's names where it has them: what `obol keys --json`, the admin API and
    /// the audit trail print. Money is decimal text.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let set = &self.settings;
        let tags: Map<String, Value> =
            set.tags.iter().map(|(tag, value)| (tag.as_str().to_owned(), json!(value))).collect();
        json!({
            "key_id": self.id.0,
            "key_name": self.name,
            "key_alias": set.alias,
            "expires": set.expires.map(rfc3339),
            "blocked": set.blocked,
            "models": set.models,
            "max_tokens": set.max_tokens,
            "max_budget": set.max_budget.map(short),
            "soft_budget": set.soft_budget.map(short),
            "budget_duration": set.budget_duration.map(|span| span.to_string()),
            "tpm_limit": set.tpm_limit,
            "rpm_limit": set.rpm_limit,
            "max_parallel_requests": set.max_parallel_requests,
            "tags": tags,
            "require_tags": set.require_tags,
            "metadata": set.metadata,
            "created_at": rfc3339(self.created),
            "created_by": self.created_by,
            "updated_at": rfc3339(self.updated),
            "updated_by": self.updated_by,
            "deleted_at": self.deleted.map(rfc3339),
        })
    }
}

/// An amount without the zeros at its end: `25`, `2.5`.
#[must_use]
pub fn short(amount: Picos) -> String {
    let text = amount.decimal();
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_are_named() {
        let refused = |change: fn(&mut KeySettings)| {
            let mut settings = KeySettings::default();
            settings.check().unwrap();
            change(&mut settings);
            settings.check().unwrap_err().param
        };
        assert_eq!(refused(|set| set.alias = Some(String::new())), "key_alias");
        assert_eq!(refused(|set| set.alias = Some("a\nb".into())), "key_alias");
        assert_eq!(refused(|set| set.models = vec!["m".into(), String::new()]), "models");
        assert_eq!(refused(|set| set.max_tokens = Some(0)), "max_tokens");
        assert_eq!(refused(|set| set.rpm_limit = Some(0)), "rpm_limit");
        assert_eq!(refused(|set| set.tpm_limit = Some(u64::MAX)), "tpm_limit");
        assert_eq!(refused(|set| set.max_budget = Some(Picos(-1))), "max_budget");
        assert_eq!(refused(|set| drop(set.tags.insert(Tag::Task, "t".into()))), "tags");
        assert_eq!(refused(|set| drop(set.tags.insert(Tag::Team, "x".repeat(129)))), "tags.team");
        assert_eq!(
            refused(|set| (set.max_budget, set.soft_budget) = (Some(Picos(1)), Some(Picos(2)))),
            "soft_budget"
        );
        assert_eq!(
            refused(|set| drop(set.metadata.insert("a".into(), json!("b".repeat(20_000))))),
            "metadata"
        );
    }

    #[test]
    fn amounts_are_printed_short_and_read_back() {
        for (picos, text) in
            [(0, "0"), (25_000_000_000_000, "25"), (2_500_000_000_000, "2.5"), (1, "0.000000000001")]
        {
            assert_eq!(short(Picos(picos)), text);
            assert_eq!(Picos::parse(text), Ok(Picos(picos)));
        }
    }
}
