//! Ledgers of earlier builds: what each version of the schema added to the one before it.
//!
//! Does not know: when a ledger is opened, and who else has it open.
//! Invariants: a step is all or nothing, and changes no row that is there but those of roll-ups, which say nothing
//! that receipts do not.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::store::SqlResult;
use super::{coarse, rollup};

pub(super) const SCHEMA_VERSION: i64 = 1 + STEPS.len() as i64;

type Step = fn(&Transaction<'_>) -> SqlResult<()>;

/// The first one makes version 2 of version 1.
const STEPS: [Step; 5] = [energy, overrun, rollups_by_class, rollups_by_status, coarse_in_parts];

fn energy(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch("ALTER TABLE receipts ADD COLUMN energy_mj INTEGER CHECK (energy_mj >= 0);")
}

fn overrun(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "ALTER TABLE receipts ADD COLUMN overrun_picos INTEGER NOT NULL DEFAULT 0 CHECK (overrun_picos >= 0);",
    )
}

/// Version 4 had roll-ups that knew a request's status only as charged or not. The next version makes all anew, so
/// that they need not be made here.
fn rollups_by_class(_: &Transaction<'_>) -> SqlResult<()> {
    Ok(())
}

fn rollups_by_status(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "DROP TABLE IF EXISTS party_rollups; DROP TABLE IF EXISTS rollups; DROP TABLE IF EXISTS dimension_totals;
         DROP TABLE IF EXISTS parties; DROP TABLE IF EXISTS dimensions;",
    )?;
    rollup::create_and_fill(transaction)
}

/// Version 5 added hours to the coarse roll-ups as a whole. A server makes them again while it runs.
fn coarse_in_parts(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "DROP TABLE IF EXISTS day_rollups; DROP TABLE IF EXISTS party_month_rollups;
         DROP TABLE IF EXISTS coarse_until;",
    )?;
    transaction.execute_batch(coarse::SCHEMA)
}

/// Brings a ledger of version `found`, which is ours alone, to this build's version.
pub(super) fn migrate(connection: &mut Connection, found: i64) -> SqlResult<()> {
    for (version, step) in (2..).zip(STEPS).skip_while(|(version, _)| *version <= found) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        step(&transaction)?;
        transaction.execute_batch(&format!("PRAGMA user_version = {version};"))?;
        transaction.commit()?;
        tracing::info!(version, "the ledger has the next version of its schema");
    }
    Ok(())
}
