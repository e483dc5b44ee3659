//! Ledgers of earlier builds: what each version of the schema added to the one before it.
//!
//! Does not know: when a ledger is opened, and who else has it open.
//! Invariants: a step is all or nothing, and changes no row that is there but those of roll-ups, which say nothing
//! that receipts do not.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::store::SqlResult;
use super::{coarse, rollup};
use crate::request::Tier;

pub(super) const SCHEMA_VERSION: i64 = 1 + STEPS.len() as i64;

type Step = fn(&Transaction<'_>) -> SqlResult<()>;

/// The first one makes version 2 of version 1.
const STEPS: [Step; 7] =
    [energy, overrun, rollups_made_later, rollups_made_later, rollups_made_later, tiers, rollups_by_tier];

fn energy(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch("ALTER TABLE receipts ADD COLUMN energy_mj INTEGER CHECK (energy_mj >= 0);")
}

fn overrun(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "ALTER TABLE receipts ADD COLUMN overrun_picos INTEGER NOT NULL DEFAULT 0 CHECK (overrun_picos >= 0);",
    )
}

/// Versions 4, 5 and 6 had roll-ups that said less. The last step makes all of them, so that they need not be made here.
fn rollups_made_later(_: &Transaction<'_>) -> SqlResult<()> {
    Ok(())
}

/// Prices of tiers, and what they cost less.
fn tiers(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(
        "ALTER TABLE receipts ADD COLUMN service_tier TEXT NOT NULL DEFAULT 'default'
             CHECK (service_tier IN ('priority', 'default', 'flex', 'batch'));
         ALTER TABLE receipt_lines ADD COLUMN discount_picos INTEGER NOT NULL DEFAULT 0 CHECK (discount_picos >= 0);",
    )?;
    for tier in Tier::ALL {
        transaction.execute_batch(&format!(
            "ALTER TABLE rates ADD COLUMN {0}_parts INTEGER NOT NULL DEFAULT 1000000000000
                 CHECK ({0}_parts BETWEEN 0 AND 1000000000000);",
            tier.as_str()
        ))?;
    }
    Ok(())
}

/// Coarse ones are made again by a server while it runs.
fn rollups_by_tier(transaction: &Transaction<'_>) -> SqlResult<()> {
    for table in [
        "day_rollups",
        "party_month_rollups",
        "coarse_until",
        "party_rollups",
        "rollups",
        "dimension_totals",
        "parties",
        "dimensions",
    ] {
        transaction.execute_batch(&format!("DROP TABLE IF EXISTS {table};"))?;
    }
    rollup::create_and_fill(transaction)?;
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
