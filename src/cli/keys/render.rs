//! Keys as a terminal shows them. Computes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::control::forecast::Projection;
use crate::control::foreseen::Foreseen;
use crate::control::{AuditEntry, Key, Secret, SecretHash, rfc3339, short};
use crate::measure::table::aligned;
use crate::units::{Picos, UnixNanos};

/// By currency.
type Spent = BTreeMap<String, Picos>;

pub(super) fn json(key: &Key, token: SecretHash, spent: &Spent, foreseen: Option<&Foreseen>) -> Value {
    let mut json = key.to_json();
    json["token"] = json!(token.to_string());
    json["spend"] =
        spent.iter().map(|(currency, money)| (currency.clone(), json!(money.decimal()))).collect();
    json["projected"] = json!(foreseen.map(Foreseen::to_json));
    json
}

/// For who made the key; the only time that its secret is seen.
pub(super) fn secret(secret: &Secret, key: &Key) -> String {
    let alias = key.settings.alias.as_ref().map(|alias| format!(" ({alias})")).unwrap_or_default();
    format!("{}\n\n{}{alias}: keep the secret above, it is not shown again\n", secret.reveal(), key.id)
}

/// All that is set, a line each.
pub(super) fn card(key: &Key, token: SecretHash, spent: &Spent, foreseen: Option<&Foreseen>) -> String {
    let Value::Object(fields) = key.to_json() else { unreachable!("a key is an object") };
    let mut lines = vec![("token".to_owned(), token.to_string()), ("spend".to_owned(), money(spent))];
    lines.extend(foreseen.map(|foreseen| ("projected_spend".to_owned(), projected(foreseen))));
    for (name, value) in fields {
        let text = match value {
            Value::Null => continue,
            Value::String(text) => text,
            Value::Array(items) if items.is_empty() => continue,
            Value::Array(items) => {
                items.iter().map(|item| item.as_str().unwrap_or_default()).collect::<Vec<_>>().join(", ")
            }
            Value::Object(fields) if fields.is_empty() => continue,
            other => other.to_string(),
        };
        lines.push((name, text));
    }
    lines.sort_by_key(|(name, _)| (name != "key_id", name != "key_alias", name.clone()));
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines.iter().map(|(name, text)| format!("{name:<width$}  {text}\n")).collect()
}

pub(super) fn table(keys: &[(Arc<Key>, SecretHash)], spent: &[Spent], now: UnixNanos) -> String {
    if keys.is_empty() {
        return "no keys".to_owned();
    }
    let row = |((key, _), spent): (&(Arc<Key>, SecretHash), &Spent)| {
        let set = &key.settings;
        let tags: Vec<String> =
            set.tags.iter().map(|(tag, value)| format!("{}={value}", tag.as_str())).collect();
        let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let budget = set.max_budget.map(|budget| match set.budget_duration {
            Some(span) => format!("{}/{span}", short(budget)),
            None => short(budget),
        });
        vec![
            key.id.0.clone(),
            key.name.clone(),
            dash(set.alias.clone()),
            state(key, now).to_owned(),
            dash(set.expires.map(rfc3339)),
            dash((!set.models.is_empty()).then(|| set.models.join(","))),
            dash((!tags.is_empty()).then(|| tags.join(","))),
            dash(budget),
            money(spent),
        ]
    };
    let rows = keys.iter().zip(spent).map(row).collect();
    aligned(&["key", "secret", "alias", "state", "expires", "models", "tags", "budget", "spend"], rows, 7)
}

fn state(key: &Key, now: UnixNanos) -> &'static str {
    if key.deleted.is_some() {
        "revoked"
    } else if key.settings.blocked {
        "blocked"
    } else if key.is_expired(now) {
        "expired"
    } else {
        "active"
    }
}

fn money(spent: &Spent) -> String {
    let parts: Vec<String> =
        spent.iter().map(|(currency, money)| format!("{} {currency}", money.decimal())).collect();
    if parts.is_empty() { "0".to_owned() } else { parts.join(" + ") }
}

/// Of the budget's window, when it ends.
fn projected(foreseen: &Foreseen) -> String {
    let Projection { expected, low, high } = foreseen.projection;
    let [expected, low, high] = [expected, low, high].map(short);
    format!("{expected} ({low} to {high}) until {} as of {}", rfc3339(foreseen.end), rfc3339(foreseen.at))
}

pub(super) fn log(entries: &[AuditEntry]) -> String {
    let row = |entry: &AuditEntry| {
        let changes = entry.changes();
        let changes = changes
            .iter()
            .map(|(name, change)| format!("{name}: {} -> {}", change["before"], change["after"]));
        let alias = entry.after.as_ref().and_then(|after| after["key_alias"].as_str()).unwrap_or("-");
        vec![
            rfc3339(entry.at),
            entry.actor.clone(),
            entry.action.clone(),
            entry.target.clone(),
            alias.to_owned(),
            changes.collect::<Vec<_>>().join(", "),
        ]
    };
    aligned(&["at", "who", "what", "key", "alias", "changes"], entries.iter().map(row).collect(), 6)
}
