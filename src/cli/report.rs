//! `obol report`: reads the ledger, also beside a running server.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use jiff::tz::TimeZone;

use crate::clock::{Clock as _, SystemClock};
use crate::config::{PlaceFlags, budgets, data_dir};
use crate::control::budgets::Scope;
use crate::control::{Control, ControlError, rules};
use crate::ledger::{self, By, Calendar, LedgerError, ReportQuery};
use crate::pipeline::outlook::{Asked, Outlook};

use super::{Directories, Failure, alerts, print};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
    Csv,
    /// FOCUS 1.2 rows (CSV) for cost tools, by clock hour and all labels but user and task
    Focus,
}

#[derive(Debug, Args)]
pub(super) struct ReportFlags {
    /// What rows are grouped by, several with commas: team, feature, environment, cost_center, key, tenant, user,
    /// task, model, precision, endpoint, status (stop, length, cancelled, budget, error), device, hour, day, month
    /// [default: model,day]
    #[arg(long, value_delimiter = ',', value_parser = by)]
    by: Vec<By>,
    /// From this date or time on (2026-11-01 or 2026-11-01T08:00:00Z): clock hours that begin at or after it
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Up to this date or time, which is not in it any more: clock hours that begin before it
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Time zone of dates, days and months, such as Europe/Berlin
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    timezone: String,
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Foresee where the open windows of budgets will end (those of the configuration file and of keys), and this
    /// month's totals: of all, and by team and key or what --by names of team, key, feature, user, environment. With
    /// the band in which eight of ten end, and when a cap will be met; table, JSON or CSV
    #[arg(long, conflicts_with_all = ["since", "until", "alerts"])]
    forecast: bool,
    /// List the alerts that were raised, and who has heard of them; table or JSON
    #[arg(long, conflicts_with = "by")]
    alerts: bool,
    /// The same as --format json
    #[arg(long)]
    json: bool,
}

fn by(name: &str) -> Result<By, String> {
    By::parse(name).ok_or_else(|| {
        let names: Vec<&str> = By::ALL.iter().map(|by| by.as_str()).collect();
        format!("use one of {}", names.join(", "))
    })
}

impl ReportFlags {
    fn query(&self) -> Result<ReportQuery, Failure> {
        let calendar = Calendar::named(&self.timezone).map_err(Failure::usage)?;
        let instant = |text: &Option<String>| {
            text.as_deref().map(|text| calendar.instant(text)).transpose().map_err(Failure::usage)
        };
        let (since, until) = (instant(&self.since)?, instant(&self.until)?);
        let by = if self.by.is_empty() { vec![By::Model, By::Day] } else { self.by.clone() };
        Ok(ReportQuery { by, since, until, calendar, only: Vec::new() })
    }
}

pub(super) fn report(
    flags: &ReportFlags,
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let dir = data_dir(places, directories.data.clone()).map_err(Failure::usage)?;
    let query = flags.query()?;
    let format = if flags.json { Format::Json } else { flags.format };
    if flags.alerts {
        return alerts::list(&dir, (query.since, query.until), format);
    }
    if flags.forecast {
        return forecast(flags, places, &dir, format);
    }
    if format == Format::Focus {
        if !flags.by.is_empty() {
            return Err(Failure::usage("--format focus has all labels; leave --by out"));
        }
        return focus(&dir, &query);
    }
    let report = ledger::report(&dir, &query).map_err(Failure::failed)?;
    print(&match format {
        Format::Json => report.to_json().to_string(),
        Format::Csv => report.to_csv(),
        Format::Table | Format::Focus => report.to_table(),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn forecast(
    flags: &ReportFlags,
    places: &PlaceFlags,
    dir: &Path,
    format: Format,
) -> Result<ExitCode, Failure> {
    let scope = |by: &By| {
        let scope = Some(*by).filter(|by| *by != By::Task).and_then(|by| Scope::parse(by.as_str()));
        scope.ok_or_else(|| {
            let name = by.as_str();
            Failure::usage(format!(
                "--forecast has no {name}; use --by team, key, feature, user or environment"
            ))
        })
    };
    let mut totals = flags.by.iter().map(scope).collect::<Result<Vec<Scope>, _>>()?;
    if totals.is_empty() {
        totals = vec![Scope::Team, Scope::Key];
    }
    let zone = TimeZone::get(&flags.timezone).map_err(Failure::usage)?;
    let budgets = rules::parse(&budgets(places).map_err(Failure::usage)?).map_err(Failure::usage)?;
    let clock = Arc::new(SystemClock::start());
    let now = clock.wall();
    let keys = match Control::open_existing(dir, clock) {
        Err(ControlError::NoKeys { .. }) => Vec::new(),
        control => control.and_then(|control| control.keys()).map_err(Failure::failed)?,
    };
    let keys: Vec<_> = keys.into_iter().map(|(key, _)| key).collect();
    let asked = Asked { budgets, totals, zone };
    let outlook = Outlook::read(dir, asked, &keys, now).map_err(Failure::failed)?;
    print(&match format {
        Format::Json => outlook.to_json().to_string(),
        Format::Csv => outlook.to_csv(),
        Format::Table => outlook.to_table(),
        Format::Focus => return Err(Failure::usage("--forecast prints a table, JSON or CSV")),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Row by row, as a year of them does not fit into memory. A reader that has seen enough is no failure.
fn focus(dir: &Path, query: &ReportQuery) -> Result<ExitCode, Failure> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let written = ledger::focus(dir, query, |rows| out.write_all(rows.as_bytes()));
    match written.and_then(|()| out.flush().map_err(|source| LedgerError::Output { source })) {
        Err(LedgerError::Output { source }) if source.kind() == std::io::ErrorKind::BrokenPipe => {}
        done => done.map_err(Failure::failed)?,
    }
    Ok(ExitCode::SUCCESS)
}
