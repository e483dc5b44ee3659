//! The outbox: alerts that were raised, and what each webhook has acknowledged of them. Kept in `control.db`.
//!
//! Does not know: HTTP, when to try again. Invariants: an alert of one name is raised once, restarts and crashes
//! included; it is sent to a webhook until that is written down as acknowledged or given up; what is returned from
//! here as written is durable.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::{Value, json};

use super::ControlError;
use super::alerts::Alert;
use super::keys::rfc3339;
use super::store::{SqlResult, Store, parsed};
use crate::units::UnixNanos;

/// Of one webhook. With one more, its oldest is given up.
const UNSENT_MAX: u64 = 10_000;
/// An alert that could not be delivered for so long interests nobody any more.
const SEND_WITHIN: u64 = 7 * 24 * 3_600 * 1_000_000_000;
/// How long alerts are listed, and not raised again.
const KEEP: u64 = 400 * 24 * 3_600 * 1_000_000_000;

/// Whom alerts are sent to, as the database knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// A hash of the address.
    pub id: String,
    pub host: String,
}

/// An alert that a webhook has not acknowledged yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Pending {
    pub alert: String,
    pub event: Value,
    pub attempts: u32,
}

/// What became of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Acknowledged,
    Retry { due: UnixNanos, error: String },
    GivenUp { error: String },
}

/// An alert as it is listed.
#[derive(Debug, Clone, PartialEq)]
pub struct Raised {
    pub at: UnixNanos,
    pub kind: String,
    pub event: Value,
    pub sends: Vec<Send>,
}

/// How far the news of an alert is on the way to one webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Send {
    pub host: String,
    pub attempts: u32,
    pub sent_at: Option<UnixNanos>,
    pub given_up_at: Option<UnixNanos>,
    pub error: Option<String>,
}

impl Raised {
    #[must_use]
    pub fn to_json(&self) -> Value {
        let send = |send: &Send| {
            json!({
                "host": send.host,
                "attempts": send.attempts,
                "sent_at": send.sent_at.map(rfc3339),
                "given_up_at": send.given_up_at.map(rfc3339),
                "error": send.error,
            })
        };
        let mut event = self.event.clone();
        event["sends"] = self.sends.iter().map(send).collect();
        event
    }
}

/// The side of `control.db` that alerts are written to. Each call may wait for the disk.
pub struct Outbox(Store);

impl Outbox {
    /// Opens the outbox of a data directory; makes what is missing.
    ///
    /// # Errors
    /// Says what is wrong with the directory or the file; nothing is overwritten.
    pub fn open(data_dir: &Path) -> Result<Self, ControlError> {
        Store::open(data_dir).map(Self)
    }

    pub(super) fn store(&mut self) -> &mut Store {
        &mut self.0
    }

    /// Forgets what is old and what was foreseen, and gives up what is meant for webhooks that are not among `targets`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn begin(&mut self, targets: &[Target], now: UnixNanos) -> Result<(), ControlError> {
        let known: Value = targets.iter().map(|target| target.id.as_str()).collect();
        let old = instant(UnixNanos(now.0.saturating_sub(KEEP)));
        self.0.write(|transaction| {
            transaction.execute("DELETE FROM alerts WHERE at < ?1", [old])?;
            transaction.execute("DELETE FROM foreseen", [])?;
            transaction.execute(
                "UPDATE alert_sends SET given_up_at = ?1, error = 'the webhook is not configured any more'
                 WHERE sent_at IS NULL AND given_up_at IS NULL
                 AND target NOT IN (SELECT value FROM json_each(?2))",
                params![instant(now), known.to_string()],
            )?;
            Ok(())
        })
    }

    /// Writes an alert down, to be sent to each of `targets`; `false` where one of its name was raised before, and
    /// nothing is written.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&mut self, alert: &Alert, targets: &[Target]) -> Result<bool, ControlError> {
        self.0.write(|transaction| {
            let added = transaction
                .prepare_cached(
                    "INSERT INTO alerts (id, once, at, kind, event) VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT (once) DO NOTHING",
                )?
                .execute(params![
                    alert.id,
                    alert.once,
                    instant(alert.at),
                    alert.kind.name(),
                    alert.event().to_string()
                ])?;
            if added == 0 {
                return Ok(false);
            }
            for target in targets {
                make_room(transaction, &target.id, alert.at)?;
                transaction
                    .prepare_cached(
                        "INSERT INTO alert_sends (alert, target, host, due_at) VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute(params![alert.id, target.id, target.host, instant(alert.at)])?;
            }
            Ok(true)
        })
    }

    /// The oldest alert that is due to a webhook; what is too old is given up first.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn next(&mut self, target: &str, now: UnixNanos) -> Result<Option<Pending>, ControlError> {
        let found = self.0.read(|connection| {
            // Ids ascend with time.
            let mut query = connection.prepare_cached(
                "SELECT alerts.id, alerts.event, alert_sends.attempts, alerts.at FROM alert_sends
                 JOIN alerts ON alerts.id = alert_sends.alert
                 WHERE target = ?1 AND sent_at IS NULL AND given_up_at IS NULL AND due_at <= ?2
                 ORDER BY alert_sends.alert LIMIT 1",
            )?;
            let row = |row: &Row<'_>| {
                let event: String = row.get(1)?;
                let pending =
                    Pending { alert: row.get(0)?, event: parsed(1, &event)?, attempts: row.get(2)? };
                Ok((pending, row.get::<_, u64>(3)?))
            };
            query.query_row(params![target, instant(now)], row).optional()
        })?;
        match found {
            Some((pending, at)) if now.0.saturating_sub(at) > SEND_WITHIN => {
                let error = "it could not be delivered for seven days".to_owned();
                self.finish(&pending, target, Outcome::GivenUp { error }, now)?;
                self.next(target, now)
            }
            found => Ok(found.map(|(pending, _)| pending)),
        }
    }

    /// Writes down how an attempt ended.
    ///
    /// # Errors
    /// When the file cannot be written: then the alert is sent again.
    pub fn finish(
        &mut self,
        pending: &Pending,
        target: &str,
        outcome: Outcome,
        now: UnixNanos,
    ) -> Result<(), ControlError> {
        let now = instant(now);
        let (due, sent, given_up, error) = match outcome {
            Outcome::Acknowledged => (now, Some(now), None, None),
            Outcome::Retry { due, error } => (instant(due), None, None, Some(error)),
            Outcome::GivenUp { error } => (now, None, Some(now), Some(error)),
        };
        self.0.write(|transaction| {
            transaction
                .prepare_cached(
                    "UPDATE alert_sends SET attempts = attempts + 1, due_at = ?3, sent_at = ?4, given_up_at = ?5,
                     error = ?6 WHERE alert = ?1 AND target = ?2",
                )?
                .execute(params![pending.alert, target, due, sent, given_up, error])?;
            Ok(())
        })
    }

    /// Alerts that are still to be sent, over all webhooks.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn unsent(&self) -> Result<u64, ControlError> {
        self.0.read(|connection| {
            let sql = "SELECT count(*) FROM alert_sends WHERE sent_at IS NULL AND given_up_at IS NULL";
            connection.query_row(sql, [], |row| row.get(0))
        })
    }

    /// Alerts that were raised from `since` until before `until`, oldest first. Where there is no file, none were.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn list(
        data_dir: &Path,
        since: Option<UnixNanos>,
        until: Option<UnixNanos>,
    ) -> Result<Vec<Raised>, ControlError> {
        let store = match Store::open_for_reading(data_dir) {
            Err(ControlError::NoKeys { .. }) => return Ok(Vec::new()),
            opened => opened?,
        };
        if store.version()? < 2 {
            return Ok(Vec::new());
        }
        let (since, until) = (instant(since.unwrap_or_default()), until.map_or(i64::MAX, instant));
        store.read(|connection| {
            let mut query = connection.prepare(
                "SELECT at, kind, event, (SELECT json_group_array(json_object('host', host, 'attempts', attempts,
                 'sent_at', sent_at, 'given_up_at', given_up_at, 'error', error) ORDER BY host, target)
                 FROM alert_sends WHERE alert = alerts.id)
                 FROM alerts WHERE at >= ?1 AND at < ?2 ORDER BY id",
            )?;
            let rows = query.query_map(params![since, until], |row| {
                let (event, sends): (String, String) = (row.get(2)?, row.get(3)?);
                let sends: Vec<SendText> = parsed(3, &sends)?;
                Ok(Raised {
                    at: UnixNanos(row.get(0)?),
                    kind: row.get(1)?,
                    event: parsed(2, &event)?,
                    sends: sends.into_iter().map(Into::into).collect(),
                })
            })?;
            rows.collect()
        })
    }
}

#[derive(serde::Deserialize)]
struct SendText {
    host: String,
    attempts: u32,
    sent_at: Option<u64>,
    given_up_at: Option<u64>,
    error: Option<String>,
}

impl From<SendText> for Send {
    fn from(text: SendText) -> Self {
        let SendText { host, attempts, sent_at, given_up_at, error } = text;
        let (sent_at, given_up_at) = (sent_at.map(UnixNanos), given_up_at.map(UnixNanos));
        Self { host, attempts, sent_at, given_up_at, error }
    }
}

fn make_room(connection: &Connection, target: &str, now: UnixNanos) -> SqlResult<()> {
    let open = "FROM alert_sends WHERE target = ?1 AND sent_at IS NULL AND given_up_at IS NULL";
    let count: u64 = connection
        .prepare_cached(&format!("SELECT count(*) {open}"))?
        .query_row([target], |row| row.get(0))?;
    if count >= UNSENT_MAX {
        connection.execute(
            &format!(
                "UPDATE alert_sends SET given_up_at = ?2, error = 'too many alerts waited for the webhook'
                 WHERE target = ?1 AND alert = (SELECT min(alert) {open})"
            ),
            params![target, instant(now)],
        )?;
    }
    Ok(())
}

pub(super) fn instant(at: UnixNanos) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
