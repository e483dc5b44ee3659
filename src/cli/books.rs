//! `obol report` and `obol audit`: read the ledger, also beside a running server.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::config::{PlaceFlags, data_dir};
use crate::ledger::{self, By};

use super::{Directories, Failure, print};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
    Csv,
}

#[derive(Debug, Args)]
pub(super) struct ReportFlags {
    /// What rows are grouped by: model, day, tenant, user, endpoint, status; several with commas
    #[arg(long, value_delimiter = ',', value_parser = by, default_value = "model,day")]
    by: Vec<By>,
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
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

pub(super) fn report(
    flags: &ReportFlags,
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let dir = data_dir(places, directories.data.clone()).map_err(Failure::usage)?;
    let report = ledger::report(&dir, &flags.by).map_err(Failure::failed)?;
    let text = match if flags.json { Format::Json } else { flags.format } {
        Format::Table => report.to_table(),
        Format::Json => report.to_json().to_string(),
        Format::Csv => report.to_csv(),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn audit(json: bool, places: &PlaceFlags, directories: &Directories) -> Result<ExitCode, Failure> {
    let dir = data_dir(places, directories.data.clone()).map_err(Failure::usage)?;
    let audit = ledger::audit(&dir).map_err(Failure::failed)?;
    print(&if json { audit.to_json().to_string() } else { audit.to_string() })?;
    Ok(if audit.is_reconciled() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
