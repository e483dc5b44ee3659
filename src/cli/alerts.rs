//! `obol report --alerts`: what was raised, and who has heard of it; also beside a running server.

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::report::Format;
use super::{Failure, print};
use crate::control::outbox::{Outbox, Raised, Send};
use crate::units::UnixNanos;

pub(super) fn list(
    data_dir: &Path,
    (since, until): (Option<UnixNanos>, Option<UnixNanos>),
    format: Format,
) -> Result<ExitCode, Failure> {
    let alerts = Outbox::list(data_dir, since, until).map_err(Failure::failed)?;
    match format {
        Format::Json => {
            let alerts: Vec<Value> = alerts.iter().map(Raised::to_json).collect();
            print(&json!({ "alerts": alerts }).to_string())?;
        }
        Format::Table if alerts.is_empty() => print("no alerts")?,
        Format::Table => print(&alerts.iter().map(line).collect::<Vec<_>>().join("\n"))?,
        Format::Csv | Format::Focus => return Err(Failure::usage("--alerts prints a table or JSON")),
    }
    Ok(ExitCode::SUCCESS)
}

/// `2026-11-22T17:00:00.000Z  budget  80 % of ... (hooks.example.org: sent)`.
fn line(alert: &Raised) -> String {
    let text = |member: &str| alert.event[member].as_str().unwrap_or_default();
    let sends: Vec<String> = alert.sends.iter().map(sent).collect();
    let sends = if sends.is_empty() { String::new() } else { format!(" ({})", sends.join(", ")) };
    format!("{}  {:<12}  {}{sends}", text("created_at"), alert.kind, text("event_message"))
}

fn sent(send: &Send) -> String {
    let error = send.error.as_deref().unwrap_or("not tried yet");
    let state = match send {
        Send { sent_at: Some(_), .. } => "sent".to_owned(),
        Send { given_up_at: Some(_), .. } => format!("given up: {error}"),
        Send { attempts, .. } => format!("waits after {attempts} attempts: {error}"),
    };
    format!("{}: {state}", send.host)
}
