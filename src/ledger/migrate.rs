//! Ledgers of earlier builds: what each version of the schema added to the one before it.
//!
//! Does not know: when a ledger is opened, and who else has it open.
//! Invariants: a step is all or nothing, and changes no row that is there.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::rollup;
use super::store::SqlResult;

pub(super) const SCHEMA_VERSION: i64 = 1 + STEPS.len() as i64;

type Step = fn(&Transaction<'_>) -> SqlResult<()>;

/// The first one makes version 2 of version 1.
const STEPS: [Step; 3] = [energy, overrun, rollup::create_and_fill];

fn energy(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch("ALTER TABLE receipts ADD COLUMN energy_mj INTEGER CHECK (energy_mj >= 0);")
}

fn overrun(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "ALTER TABLE receipts ADD COLUMN overrun_picos INTEGER NOT NULL DEFAULT 0 CHECK (overrun_picos >= 0);",
    )
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
