//! A key as LiteLLM's clients read it.

use serde_json::{Value, json};

use crate::control::{Control, Key, SecretHash, rfc3339, short};
use crate::http::Server;
use crate::pipeline::budget_resets_at;
use crate::request::Tag;
use crate::units::Picos;

/// Everything but the secret. `token` is the secret's hash, by which requests may name the key.
pub(super) fn info(key: &Key, token: SecretHash, spent: Picos, server: &Server) -> Value {
    let set = &key.settings;
    let token = token.to_string();
    let now = server.access.control.as_ref().map(Control::now);
    let resets = now.and_then(|now| budget_resets_at(key, now));
    let mut info = key.to_json();
    let exact = json!({
        "spend": spent.decimal(),
        "max_budget": set.max_budget.map(short),
        "soft_budget": set.soft_budget.map(short),
        "currency": server.config.currency,
    });
    for (name, value) in [
        ("token", json!(token)),
        ("token_id", json!(token)),
        ("spend", json!(spent.as_f64())),
        ("max_budget", json!(set.max_budget.map(Picos::as_f64))),
        ("soft_budget", json!(set.soft_budget.map(Picos::as_f64))),
        ("budget_reset_at", json!(resets.map(rfc3339))),
        ("user_id", json!(set.tags.get(&Tag::User))),
        ("team_id", json!(set.tags.get(&Tag::Team))),
        ("aliases", json!({})),
        ("config", json!({})),
        ("permissions", json!({})),
        ("obol", exact),
    ] {
        info[name] = value;
    }
    info
}
