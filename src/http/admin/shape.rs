//! A key as LiteLLM's clients read it.

use serde_json::{Value, json};

use crate::control::foreseen::Foreseen;
use crate::control::{Control, Key, SecretHash, rfc3339, short};
use crate::http::Server;
use crate::pipeline::budget_resets_at;
use crate::request::Tag;
use crate::units::Picos;

/// Where a key's spend stands.
#[derive(Debug, Clone, Default)]
pub(super) struct Stand {
    /// All that it was charged, in the server's currency.
    pub(super) spent: Picos,
    /// Where its budget's window will end, where enough is known of it.
    pub(super) foreseen: Option<Foreseen>,
}

/// Everything but the secret. `token` is the secret's hash, by which requests may name the key.
pub(super) fn info(key: &Key, token: SecretHash, stand: &Stand, server: &Server) -> Value {
    let set = &key.settings;
    let Stand { spent, foreseen } = stand;
    let projected = foreseen.as_ref().map(|foreseen| foreseen.projection.expected.as_f64());
    let token = token.to_string();
    let now = server.access.control.as_ref().map(Control::now);
    let resets = now.and_then(|now| budget_resets_at(key, now));
    let mut info = key.to_json();
    let exact = json!({
        "spend": spent.decimal(),
        "max_budget": set.max_budget.map(short),
        "soft_budget": set.soft_budget.map(short),
        "projected": foreseen.as_ref().map(Foreseen::to_json),
        "currency": server.config.currency,
    });
    for (name, value) in [
        ("token", json!(token)),
        ("token_id", json!(token)),
        ("spend", json!(spent.as_f64())),
        ("max_budget", json!(set.max_budget.map(Picos::as_f64))),
        ("soft_budget", json!(set.soft_budget.map(Picos::as_f64))),
        ("projected_spend", json!(projected)),
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
