//! What is foreseen as text: table, JSON, CSV. Exact decimals everywhere; nothing is computed here.

use serde_json::{Value, json};

use super::{End, Foresight, Outlook, rfc3339};
use crate::control::short;
use crate::ledger::csv;
use crate::measure::table::aligned;

/// What to do where nothing is foreseen.
const UNKNOWN: &str = "too little history";

const TABLE: [&str; 7] = ["", "of", "until", "spent", "cap", "projected (80 % band)", "cap is met"];
const CSV: [&str; 14] = [
    "budget",
    "scope",
    "value",
    "window",
    "window_start",
    "window_end",
    "currency",
    "spent",
    "cap",
    "projected",
    "projected_low",
    "projected_high",
    "cap_met",
    "cap_met_at",
];

impl Foresight {
    fn of(&self) -> String {
        if self.value.is_empty() {
            self.scope.name().to_owned()
        } else {
            format!("{} {}", self.scope.name(), self.value)
        }
    }

    fn projected(&self) -> String {
        match &self.end {
            End::Projected { projection, .. } => {
                let money = [projection.expected, projection.low, projection.high].map(short);
                format!("{} ({} to {})", money[0], money[1], money[2])
            }
            End::Never => "the window has no end".to_owned(),
            End::Unknown => UNKNOWN.to_owned(),
        }
    }

    fn met(&self) -> String {
        match (self.cap, &self.end) {
            (None, _) => String::new(),
            _ if self.is_met() => "now".to_owned(),
            (_, End::Projected { met: Some(met), .. }) => rfc3339(*met),
            (_, End::Projected { met: None, .. }) => "not in this window".to_owned(),
            (_, End::Never | End::Unknown) => "unknown".to_owned(),
        }
    }

    fn to_json(&self) -> Value {
        let projection = match &self.end {
            End::Projected { projection, .. } => json!({
                "expected": projection.expected.decimal(),
                "low": projection.low.decimal(),
                "high": projection.high.decimal(),
            }),
            End::Never | End::Unknown => Value::Null,
        };
        let note = match &self.end {
            End::Projected { .. } => None,
            End::Never => Some("the window has no end"),
            End::Unknown => Some(UNKNOWN),
        };
        let met = match &self.end {
            End::Projected { met, .. } => met.map(rfc3339),
            End::Never | End::Unknown => None,
        };
        json!({
            "budget": self.budget, "scope": self.scope.name(),
            "value": Some(&self.value).filter(|value| !value.is_empty()),
            "window": self.window, "window_start": rfc3339(self.span.start),
            "window_end": self.span.end.map(rfc3339), "spent": self.spent.decimal(),
            "cap": self.cap.map(|cap| cap.decimal()), "projected": projection, "note": note,
            "cap_met": self.cap.map(|_| self.is_met()), "cap_met_at": met,
        })
    }

    /// As in `CSV`.
    fn cells(&self, currency: &str) -> Vec<String> {
        let (money, met) = match &self.end {
            End::Projected { projection, met } => {
                let money = [projection.expected, projection.low, projection.high];
                (money.map(|money| money.decimal()), met.map(rfc3339))
            }
            End::Never | End::Unknown => (Default::default(), None),
        };
        let named = [
            self.budget.clone().unwrap_or_default(),
            self.scope.name().to_owned(),
            self.value.clone(),
            self.window.to_owned(),
            rfc3339(self.span.start),
            self.span.end.map(rfc3339).unwrap_or_default(),
            currency.to_owned(),
            self.spent.decimal(),
            self.cap.map(|cap| cap.decimal()).unwrap_or_default(),
        ];
        let is_met = self.cap.map(|_| self.is_met().to_string()).unwrap_or_default();
        named.into_iter().chain(money).chain([is_met, met.unwrap_or_default()]).collect()
    }
}

impl Outlook {
    fn currency(&self) -> &str {
        self.currency.as_deref().unwrap_or_default()
    }

    /// Aligned columns for a terminal.
    #[must_use]
    pub fn to_table(&self) -> String {
        let row = |row: &Foresight| {
            let end = row.span.end.map_or_else(|| "no end".to_owned(), rfc3339);
            let budget = row.budget.clone().unwrap_or_else(|| format!("this {}", row.window));
            let cap = row.cap.map(short).unwrap_or_default();
            vec![budget, row.of(), end, short(row.spent), cap, row.projected(), row.met()]
        };
        let mut text = format!("{} as of {}\n\n", self.currency(), rfc3339(self.now)).trim_start().to_owned();
        text += &aligned(&TABLE, self.rows.iter().map(row).collect(), 3);
        text
    }

    /// One JSON document: `budgets` and `totals`. What is not known is null, with a `note` that says why.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let of = |budgets: bool| -> Vec<Value> {
            let rows = self.rows.iter().filter(|row| row.budget.is_some() == budgets);
            rows.map(Foresight::to_json).collect()
        };
        json!({
            "as_of": rfc3339(self.now), "currency": self.currency, "band": 0.8,
            "budgets": of(true), "totals": of(false),
        })
    }

    /// RFC 4180; `budget` is empty for totals.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let header = CSV.map(str::to_owned).to_vec();
        let rows = self.rows.iter().map(|row| row.cells(self.currency()));
        csv(std::iter::once(header).chain(rows))
    }
}
