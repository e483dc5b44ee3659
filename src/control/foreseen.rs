//! What budgets' windows will probably have spent when they end, for everybody who has `control.db`.
//!
//! Does not know: how that is found out. Invariant: what stands there was said at one moment.

use rusqlite::{Connection, Row, params};
use serde_json::{Value, json};

use super::forecast::Projection;
use super::keys::rfc3339;
use super::outbox::{Outbox, instant};
use super::store::{SqlResult, malformed};
use super::{Control, ControlError, lock};
use crate::units::{Picos, UnixNanos};

/// Where one budget's window will end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreseen {
    pub budget: String,
    /// Whose: a value of the budget's scope.
    pub value: String,
    /// When the window ends.
    pub end: UnixNanos,
    /// When this was said.
    pub at: UnixNanos,
    pub projection: Projection,
}

impl Foreseen {
    /// Money as exact decimals.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Projection { expected, low, high } = self.projection;
        json!({
            "expected": expected.decimal(),
            "low": low.decimal(),
            "high": high.decimal(),
            "window_end": rfc3339(self.end),
            "at": rfc3339(self.at),
        })
    }
}

impl Outbox {
    /// Writes down what is foreseen now, in place of what was before.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn foresee(&mut self, all: &[Foreseen]) -> Result<(), ControlError> {
        self.store().write(|transaction| {
            transaction.execute("DELETE FROM foreseen", [])?;
            let mut insert = transaction.prepare_cached(
                "INSERT INTO foreseen (budget, value, window_end, at, expected, low, high)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?;
            for Foreseen { budget, value, end, at, projection } in all {
                let money = [projection.expected, projection.low, projection.high].map(Picos::decimal);
                let (end, at) = (instant(*end), instant(*at));
                insert.execute(params![budget, value, end, at, money[0], money[1], money[2]])?;
            }
            Ok(())
        })
    }
}

impl Control {
    /// What is foreseen of windows that are open now: by the server that runs, at most about a minute ago.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn foreseen(&self) -> Result<Vec<Foreseen>, ControlError> {
        let now = self.now();
        lock(&self.0.watch).reader.read(|connection| read(connection, now))
    }
}

fn read(connection: &Connection, now: UnixNanos) -> SqlResult<Vec<Foreseen>> {
    let mut query = connection.prepare_cached(
        "SELECT budget, value, window_end, at, expected, low, high FROM foreseen WHERE window_end > ?1",
    )?;
    query.query_map([instant(now)], foreseen)?.collect()
}

fn foreseen(row: &Row<'_>) -> SqlResult<Foreseen> {
    let money = |column: usize| {
        Picos::parse(&row.get::<_, String>(column)?).map_err(|problem| malformed(column, problem))
    };
    Ok(Foreseen {
        budget: row.get(0)?,
        value: row.get(1)?,
        end: UnixNanos(row.get(2)?),
        at: UnixNanos(row.get(3)?),
        projection: Projection { expected: money(4)?, low: money(5)?, high: money(6)? },
    })
}
