//! `obol audit`: reads the ledger, also beside a running server.

use std::process::ExitCode;

use crate::config::{PlaceFlags, data_dir};
use crate::ledger;

use super::{Directories, Failure, print};

pub(super) fn audit(json: bool, places: &PlaceFlags, directories: &Directories) -> Result<ExitCode, Failure> {
    let dir = data_dir(places, directories.data.clone()).map_err(Failure::usage)?;
    let audit = ledger::audit(&dir).map_err(Failure::failed)?;
    print(&if json { audit.to_json().to_string() } else { audit.to_string() })?;
    Ok(if audit.is_reconciled() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
