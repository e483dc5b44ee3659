//! What the calls about spend share: their query strings, who looks, and money in JSON.
//!
//! Knows no SQL and no price. Whoever is not the administrator sees what was charged to its own key.

use serde_json::{Value, json};

use super::fields::Invalid;
use super::receipts::decoded;
use crate::ledger::{By, Calendar, ReportQuery, Row};
use crate::units::{Picos, UnixNanos};

pub(super) const DAY_SECONDS: u64 = 86_400;

/// Who looks; without keys everybody is the administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Viewer {
    Admin,
    /// The key's id.
    Key(String),
}

impl Viewer {
    /// The key whose receipts may be seen: the viewer's own, or for the administrator the one asked for. One that
    /// asks for another's sees nothing, as if that did not exist.
    pub(super) fn key(&self, asked: Option<String>) -> Option<String> {
        match (self, asked) {
            (Self::Admin, asked) => asked,
            (Self::Key(own), Some(asked)) if asked != *own => Some(String::from("\u{0}")),
            (Self::Key(own), _) => Some(own.clone()),
        }
    }

    /// Leaves out of a report what the viewer may not see.
    pub(super) fn narrow(&self, query: &mut ReportQuery) {
        if let Self::Key(own) = self {
            query.only.push((By::Key, vec![own.clone()]));
        }
    }
}

/// The pairs of a query string. Taking one removes it; what is left at the end was not understood.
pub(super) struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// `name[]` is the same as `name`; a parameter without a value is as one that is not there.
    pub(super) fn parse(query: &str) -> Result<Self, Invalid> {
        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let text = |text: &str| {
                decoded(text)
                    .ok_or_else(|| Invalid::new(name, format!("`{name}` is not percent-encoded UTF-8")))
            };
            let (name, value) = (text(name)?, text(value)?);
            if !value.is_empty() {
                pairs.push((name.strip_suffix("[]").unwrap_or(&name).to_owned(), value));
            }
        }
        Ok(Self(pairs))
    }

    pub(super) fn all(&mut self, name: &str) -> Vec<String> {
        let (taken, left) = std::mem::take(&mut self.0).into_iter().partition(|(other, _)| other == name);
        self.0 = left;
        taken.into_iter().map(|(_, value): (String, String)| value).collect()
    }

    pub(super) fn one(&mut self, name: &str) -> Result<Option<String>, Invalid> {
        let mut values = self.all(name);
        let value = values.pop();
        if !values.is_empty() {
            return Err(Invalid::new(name, format!("`{name}` is given more than once")));
        }
        Ok(value)
    }

    /// A date (or a time) in UTC.
    pub(super) fn date(&mut self, name: &str) -> Result<Option<UnixNanos>, Invalid> {
        let instant = |text: String| Calendar::utc().instant(&text);
        self.one(name)?
            .map(instant)
            .transpose()
            .map_err(|error| Invalid::new(name, format!("`{name}`: {error}")))
    }

    /// From the first date on, up to and with the second one.
    pub(super) fn dates(&mut self) -> Result<(Option<UnixNanos>, Option<UnixNanos>), Invalid> {
        let (since, until) = (self.date("start_date")?, self.date("end_date")?);
        let day = DAY_SECONDS * 1_000_000_000;
        Ok((since, until.map(|until| UnixNanos(until.0.saturating_add(day)))))
    }

    pub(super) fn finish(self) -> Result<(), Invalid> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(Invalid::new(&name, format!("unknown query parameter `{name}`"))),
        }
    }
}

/// A number where the shape of an answer wants one. The exact amount stands beside it.
pub(super) fn number(money: Picos) -> Value {
    json!(money.as_f64())
}

/// The exact figures of a row.
pub(super) fn exact(row: &Row) -> Value {
    let spend = &row.spend;
    json!({
        "currency": row.currency,
        "cost": spend.usage_cost.decimal(),
        "loaded_cost": spend.loaded_cost.decimal(),
        "device_ns": spend.device_time.0.to_string(),
        "kv_byte_ns": spend.kv_byte_nanos.to_string(),
        "requests": spend.requests,
        "energy_mj": spend.energy_mj,
    })
}

/// A label as JSON: null where requests have none.
pub(super) fn label(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { json!(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_sees_its_own_and_nothing_else() {
        let own = Viewer::Key("key_1".into());
        assert_eq!(own.key(None), Some("key_1".into()));
        assert_eq!(own.key(Some("key_1".into())), Some("key_1".into()));
        assert_ne!(own.key(Some("key_2".into())), Some("key_2".into()));
        assert_eq!(Viewer::Admin.key(Some("key_2".into())), Some("key_2".into()));
        assert_eq!(Viewer::Admin.key(None), None);
        let mut query = ReportQuery::by(&[By::Team]);
        query.only.push((By::Key, vec!["key_2".into()]));
        own.narrow(&mut query);
        assert_eq!(query.only.last(), Some(&(By::Key, vec!["key_1".into()])), "both have to hold");
        let mut query = ReportQuery::by(&[]);
        Viewer::Admin.narrow(&mut query);
        assert!(query.only.is_empty());
    }

    #[test]
    fn query_strings_are_read_whole_or_refused() {
        let mut pairs = Pairs::parse("a=1&b[]=x&b%5B%5D=y+z&empty=&c=%2B").unwrap();
        assert_eq!(pairs.one("a"), Ok(Some("1".into())));
        assert_eq!(pairs.all("b"), ["x", "y z"]);
        assert_eq!(pairs.one("empty"), Ok(None));
        let left = pairs.finish().unwrap_err();
        assert_eq!(left.param.as_deref(), Some("c"));
        assert!(Pairs::parse("a=1&a=2").unwrap().one("a").is_err());
        assert!(Pairs::parse("a=%zz").is_err());
        let mut pairs = Pairs::parse("start_date=2026-11-01&end_date=2026-11-01").unwrap();
        let day = 1_793_491_200_000_000_000;
        let next = UnixNanos(day + 86_400_000_000_000);
        assert_eq!(pairs.dates(), Ok((Some(UnixNanos(day)), Some(next))));
        assert!(Pairs::parse("start_date=today").unwrap().dates().is_err());
    }
}
