//! The trail of what administrators did: who changed what and when, never changed itself. No secret is in it.

use serde_json::{Map, Value, json};

use super::keys::{ConfiguredKey, rfc3339};
use crate::units::UnixNanos;

/// Who acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor(String);

impl Actor {
    /// Somebody at the machine, with `obol keys`.
    #[must_use]
    pub fn cli() -> Self {
        Self("cli".to_owned())
    }

    /// Who has the admin key.
    #[must_use]
    pub fn admin(key: &ConfiguredKey) -> Self {
        Self(key.id())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What was done, in the manner of OpenAI's audit logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Created,
    Updated,
    Blocked,
    Unblocked,
    Rotated,
    Deleted,
}

impl Action {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "api_key.created",
            Self::Updated => "api_key.updated",
            Self::Blocked => "api_key.blocked",
            Self::Unblocked => "api_key.unblocked",
            Self::Rotated => "api_key.rotated",
            Self::Deleted => "api_key.deleted",
        }
    }
}

/// One row of the trail.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditEntry {
    /// Ascending from 1, in the order of the changes.
    pub id: i64,
    pub at: UnixNanos,
    /// `cli`, or the id of an admin key.
    pub actor: String,
    pub action: String,
    /// The id of what was changed.
    pub target: String,
    /// `None` before a creation.
    pub before: Option<Value>,
    pub after: Option<Value>,
}

impl AuditEntry {
    /// What the change made different: names, each with what was and what is.
    #[must_use]
    pub fn changes(&self) -> Map<String, Value> {
        let (Some(before), Some(after)) = (&self.before, &self.after) else { return Map::new() };
        let mut changes = Map::new();
        for (name, now) in after.as_object().into_iter().flatten() {
            let was = &before[name];
            // When it was done is the row's to say.
            if was != now && !matches!(name.as_str(), "updated_at" | "deleted_at") {
                changes.insert(name.clone(), json!({"before": was, "after": now}));
            }
        }
        changes
    }

    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "id": format!("audit_{}", self.id),
            "object": "organization.audit_log",
            "type": self.action,
            "effective_at": self.at.0 / 1_000_000_000,
            "at": rfc3339(self.at),
            "actor": {
                "type": if self.actor == "cli" { "command_line" } else { "admin_key" },
                "id": self.actor,
            },
            "target": self.target,
            "changes": self.changes(),
            "before": self.before,
            "after": self.after,
        })
    }
}

/// Which part of the trail, newest first.
#[derive(Debug, Clone, Default)]
pub struct AuditPage {
    /// Only what was done to this.
    pub target: Option<String>,
    /// Only rows before this one.
    pub before: Option<i64>,
    /// At most this many.
    pub limit: u32,
}
