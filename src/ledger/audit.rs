//! The audit: rebuilds every balance and partition from the entries, and compares.
//!
//! Does: read one snapshot, beside a running server too; check each transaction, receipt, bill and close
//! again from the quantities and the rate; then the law: bill = posted + open + house.
//! Does not know: how the books came to be; it shares only prices and the pricing of a close with them.
//! Invariant: it changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use rusqlite::Connection;
use serde_json::{Value, json};

use super::books::{Posted, elapsed_kv, house_debits};
use super::entry::{Amounts, CRASH, ERROR, ROUNDING, device_account, payer, receipt_debits, vendor_account};
use super::receipt::{Line, Receipt};
use super::rollup_check::RollupCheck;
use super::rows::{self, EpochRow, add_house, wide};
use super::store::SqlResult;
use super::{LedgerError, coarse};
use crate::units::{BlockNanos, DeviceNanos, Picos};

/// Differences listed; more are only counted.
const LISTED_MAX: usize = 100;

/// Money and quantities of one currency, all epochs of one or of all devices together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AuditTotals {
    pub bill: Picos,
    /// On receipts that somebody pays.
    pub posted: Picos,
    pub open: Picos,
    pub house: Picos,
    pub device_time: DeviceNanos,
    pub block_time: BlockNanos,
}

/// What the audit found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Audit {
    pub epochs: u64,
    pub transactions: u64,
    pub receipts: u64,
    /// By currency.
    pub totals: BTreeMap<String, AuditTotals>,
    /// By currency and device.
    pub devices: BTreeMap<(String, String), AuditTotals>,
    pub differences: Vec<String>,
    /// Differences beyond those listed.
    pub unlisted: u64,
}

impl Audit {
    /// Nothing differs.
    #[must_use]
    pub fn is_reconciled(&self) -> bool {
        self.differences.is_empty()
    }

    #[must_use]
    pub fn to_json(&self) -> Value {
        let json = |currency: &str, sum: &AuditTotals| {
            json!({
                "currency": currency, "bill": sum.bill.decimal(), "posted": sum.posted.decimal(),
                "open": sum.open.decimal(), "house": sum.house.decimal(),
                "device_ns": sum.device_time.0.to_string(), "block_ns": sum.block_time.0.to_string(),
            })
        };
        let totals = self.totals.iter().map(|(currency, sum)| json(currency, sum));
        let devices = self.devices.iter().map(|((currency, device), sum)| {
            let mut json = json(currency, sum);
            json["device"] = json!(device);
            json
        });
        json!({
            "reconciled": self.is_reconciled(), "epochs": self.epochs, "transactions": self.transactions,
            "receipts": self.receipts, "totals": totals.collect::<Vec<_>>(),
            "devices": devices.collect::<Vec<_>>(), "differences": self.differences, "differences_unlisted": self.unlisted,
        })
    }

    fn differs(&mut self, what: String) {
        if self.differences.len() < LISTED_MAX {
            self.differences.push(what);
        } else {
            self.unlisted += 1;
        }
    }

    fn same<T: PartialEq + fmt::Debug>(&mut self, what: &str, is: T, want: T) {
        if is != want {
            self.differs(format!("{what}: {is:?} is written, {want:?} is right"));
        }
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_reconciled() {
            writeln!(f, "reconciled: difference 0")?;
        } else {
            let count = self.differences.len() as u64 + self.unlisted;
            writeln!(f, "NOT reconciled: {}", counted(count, "difference"))?;
            for difference in &self.differences {
                writeln!(f, "  {difference}")?;
            }
        }
        let Self { epochs, transactions, receipts, .. } = *self;
        let (epochs, transactions) = (counted(epochs, "epoch"), counted(transactions, "transaction"));
        writeln!(f, "{epochs}, {transactions}, {}", counted(receipts, "receipt"))?;
        if self.devices.len() > self.totals.len() {
            for ((currency, device), sum) in &self.devices {
                writeln!(f, "{device}:")?;
                sum.write(f, currency)?;
            }
            writeln!(f, "together:")?;
        }
        self.totals.iter().try_for_each(|(currency, sum)| sum.write(f, currency))
    }
}

impl AuditTotals {
    fn write(&self, f: &mut fmt::Formatter<'_>, currency: &str) -> fmt::Result {
        writeln!(
            f,
            "bill {} {currency} = requests {} + open {} + house {}",
            self.bill.decimal(),
            self.posted.decimal(),
            self.open.decimal(),
            self.house.decimal()
        )?;
        let (time, kv) = (self.device_time.seconds(), self.block_time.byte_seconds(1));
        writeln!(f, "device time {time} s, KV block time {kv} block-s, each charged once")
    }
}

fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// Audits the ledger in a data directory; a server may be running.
///
/// # Errors
/// When there is no ledger or it cannot be read.
pub fn audit(data_dir: &Path) -> Result<Audit, LedgerError> {
    let (mut connection, path) = rows::open_for_reading(data_dir)?;
    rows::in_snapshot(&mut connection, &path, read)
}

/// What the entries of one epoch add up to.
#[derive(Default)]
struct Sums {
    /// Debits of everybody but the device.
    receipts: Amounts,
    /// Of them, what nobody pays.
    on_the_house: Picos,
    posted: Posted,
    billed: Amounts,
    /// How often money was floored.
    floors: i128,
    bill_from: DeviceNanos,
}

/// Epochs by id, and by the start and the device that they are of.
struct Epochs {
    by_id: BTreeMap<i64, EpochRow>,
    by_device: BTreeMap<(String, String), i64>,
}

struct TransactionRow {
    id: i64,
    kind: String,
    epoch: i64,
    hour: u64,
}

struct EntryRow {
    account: String,
    debit: bool,
    amounts: Amounts,
}

fn read(connection: &Connection) -> SqlResult<Audit> {
    let mut audit = Audit::default();
    structure(connection, &mut audit)?;
    let rows = rows::epochs(connection)?;
    let key = |row: &EpochRow| (row.boot.clone(), row.epoch.device.clone());
    let epochs = Epochs {
        by_device: rows.iter().map(|row| (key(row), row.epoch.id)).collect(),
        by_id: rows.into_iter().map(|row| (row.epoch.id, row)).collect(),
    };
    audit.epochs = epochs.by_id.len() as u64;
    let mut sums: BTreeMap<i64, Sums> = epochs.by_id.keys().map(|id| (*id, Sums::default())).collect();
    let mut rollups = RollupCheck::new(connection)?;
    let mut query = connection.prepare("SELECT id, kind, epoch, hour FROM transactions ORDER BY id")?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let head =
            TransactionRow { id: row.get(0)?, kind: row.get(1)?, epoch: row.get(2)?, hour: row.get(3)? };
        audit.transactions += 1;
        let Some(epoch) = epochs.by_id.get(&head.epoch) else {
            audit.differs(format!("transaction {} belongs to no epoch", head.id));
            continue;
        };
        let entries = entries(connection, head.id)?;
        check_balance(&mut audit, &head, &entries, &device_account(&epoch.epoch.device));
        if head.kind == "receipt" {
            if let Some(receipt) = check_receipt(connection, &mut audit, &head, &epochs, &entries, &mut sums)?
            {
                rollups.add(head.hour, &receipt);
            }
            for difference in rollups.pass(connection, head.hour, head.id)? {
                audit.differs(difference);
            }
            continue;
        }
        let sums = sums.get_mut(&head.epoch).expect("every epoch has sums");
        match head.kind.as_str() {
            "bill" => check_bill(connection, &mut audit, &head, epoch, &entries, sums)?,
            _ => check_house(&mut audit, &head, epoch, &entries, sums),
        }
    }
    for difference in rollups.finish(connection)?.into_iter().chain(coarse::check(connection)?) {
        audit.differs(difference);
    }
    for (id, epoch) in &epochs.by_id {
        check_epoch(connection, &mut audit, epoch, &sums[id])?;
    }
    Ok(audit)
}

/// Rows that hang in the air, and guards that are gone.
fn structure(connection: &Connection, audit: &mut Audit) -> SqlResult<()> {
    let mut query = connection.prepare("PRAGMA foreign_key_check")?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
        audit.differs(format!("a row of {table} refers to a missing row of {parent}"));
    }
    let count = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let guards = count("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger'")?;
    audit.same("triggers that keep the ledger append-only", guards, 29);
    let receipts = count("SELECT count(*) FROM receipts")?;
    audit.receipts = u64::try_from(receipts).unwrap_or(0);
    let posted = count("SELECT count(*) FROM transactions WHERE kind = 'receipt'")?;
    audit.same("receipts, by transactions", receipts, posted);
    let stray = "SELECT count(*) FROM checkpoint JOIN epoch_ends USING (epoch)";
    audit.same("checkpoints of ended epochs", count(stray)?, 0);
    let stray = "SELECT count(*) FROM open_accruals WHERE epoch NOT IN (SELECT epoch FROM checkpoint)";
    audit.same("open requests of ended epochs", count(stray)?, 0);
    Ok(())
}

fn entries(connection: &Connection, tx: i64) -> SqlResult<Vec<EntryRow>> {
    let mut query = connection.prepare_cached(
        "SELECT accounts.name, entries.side, entries.device_ns, entries.block_ns_hi, entries.block_ns_lo,
         entries.picos FROM entries JOIN accounts ON accounts.id = entries.account WHERE entries.tx = ?1",
    )?;
    let rows = query.query_map([tx], |row| {
        Ok(EntryRow {
            account: row.get(0)?,
            debit: row.get::<_, String>(1)? == "debit",
            amounts: Amounts {
                time: DeviceNanos(row.get(2)?),
                kv: BlockNanos(wide(row, 3)?),
                money: Picos(i128::from(row.get::<_, i64>(5)?)),
            },
        })
    })?;
    rows.collect()
}

fn check_balance(audit: &mut Audit, head: &TransactionRow, entries: &[EntryRow], device: &str) {
    let side = |debit: bool| {
        let mut sum = Amounts::default();
        entries.iter().filter(|entry| entry.debit == debit).for_each(|entry| sum += entry.amounts);
        sum
    };
    let what = format!("{} transaction {}", head.kind, head.id);
    audit.same(&format!("{what}, debits against credits"), side(true), side(false));
    if !entries.iter().any(|entry| entry.account == device) {
        audit.differs(format!("{what} does not touch {device}"));
    }
}

fn check_receipt(
    connection: &Connection,
    audit: &mut Audit,
    head: &TransactionRow,
    epochs: &Epochs,
    entries: &[EntryRow],
    sums: &mut BTreeMap<i64, Sums>,
) -> SqlResult<Option<Receipt>> {
    let Some((_, receipt)) = rows::receipts(connection, "WHERE tx = ?1", &[&head.id])?.pop() else {
        audit.differs(format!("transaction {} has lost its receipt", head.id));
        return Ok(None);
    };
    let what = format!("receipt {}", receipt.request());
    let payer = payer(receipt.usage.status, &receipt.attribution.tenant);
    let total = Amounts { time: receipt.usage.device(), kv: receipt.usage.kv, money: receipt.gross() };
    let house = receipt.overrun + receipt.discount();
    if house > total.money || (payer == ERROR && house != Picos::ZERO) {
        audit.differs(format!(
            "{what} is {} over a cap and has a discount of {}, and cost {}",
            receipt.overrun.0,
            receipt.discount().0,
            total.money.0
        ));
        return Ok(None);
    }
    let debits = receipt_debits(&receipt, total);
    let of_side = |debit: bool| -> BTreeMap<&str, Amounts> {
        let entries = entries.iter().filter(|entry| entry.debit == debit);
        entries.map(|entry| (entry.account.as_str(), entry.amounts)).collect()
    };
    audit.same(
        &format!("{what}, its entries, debits"),
        of_side(true),
        debits.iter().map(|(account, amounts)| (account.as_str(), *amounts)).collect(),
    );
    let (mut used, mut credits) = (Amounts::default(), BTreeMap::new());
    let boot = &epochs.by_id[&head.epoch].boot;
    for (number, line) in receipt.lines.iter().enumerate() {
        let Some(id) = epochs.by_device.get(&(boot.clone(), line.device.clone())) else {
            audit.differs(format!("{what} has a line of {}, which did not run then", line.device));
            continue;
        };
        check_line(audit, &what, &receipt, line, &epochs.by_id[id]);
        let amounts = Amounts { time: line.device_time, kv: line.kv, money: line.total() };
        used += amounts;
        credits.insert(device_account(&line.device), amounts);
        let sums = sums.get_mut(id).expect("every epoch has sums");
        sums.receipts += amounts;
        if payer == ERROR {
            sums.on_the_house += amounts.money;
        }
        sums.on_the_house += receipt.overrun_of(number) + line.discount;
        sums.floors += 2;
    }
    audit.same(&format!("{what}, device time of its lines"), used.time, total.time);
    audit.same(&format!("{what}, block-time of its lines"), used.kv, total.kv);
    let credits: BTreeMap<&str, Amounts> = credits.iter().map(|(name, sum)| (name.as_str(), *sum)).collect();
    audit.same(&format!("{what}, its entries, credits"), of_side(false), credits);
    Ok(Some(receipt))
}

fn check_line(audit: &mut Audit, what: &str, receipt: &Receipt, line: &Line, row: &EpochRow) {
    let (epoch, prices) = (&row.epoch, row.epoch.rate.prices(row.pool));
    audit.same(&format!("{what}, rate"), line.rate_version.as_str(), epoch.rate.version());
    audit.same(&format!("{what}, money for time"), line.time, prices.time(line.device_time));
    audit.same(&format!("{what}, money for memory"), line.memory, prices.memory(line.kv));
    audit.same(&format!("{what}, currency"), receipt.currency.as_str(), epoch.rate.currency());
    let bytes_per_block = row.pool.map_or(0, |pool| pool.bytes_per_block);
    audit.same(&format!("{what}, bytes per block"), receipt.bytes_per_block, bytes_per_block);
}

fn check_bill(
    connection: &Connection,
    audit: &mut Audit,
    head: &TransactionRow,
    epoch: &EpochRow,
    entries: &[EntryRow],
    sums: &mut Sums,
) -> SqlResult<()> {
    let what = format!("bill {}", head.id);
    let interval = connection
        .prepare_cached("SELECT from_ns, to_ns FROM bills WHERE tx = ?1")?
        .query_row([head.id], |row| Ok((DeviceNanos(row.get(0)?), DeviceNanos(row.get(1)?))));
    let (from, to) = match interval {
        Ok(interval) => interval,
        Err(rusqlite::Error::QueryReturnedNoRows) => {
            audit.differs(format!("{what} has lost its interval"));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    audit.same(&format!("{what}, begin of its interval"), from, sums.posted.at);
    let before_pool = epoch.pool.is_some_and(|pool| pool.since >= to);
    let pool = epoch.pool.filter(|_| !before_pool);
    let want = Amounts {
        time: DeviceNanos(to.0.saturating_sub(from.0)),
        kv: BlockNanos(elapsed_kv(pool, to).0.saturating_sub(elapsed_kv(pool, from).0)),
        money: epoch.epoch.rate.bill(from.min(to), to),
    };
    let vendor = vendor_account(&epoch.epoch.device);
    let credits: Vec<_> =
        entries.iter().filter(|entry| !entry.debit).map(|e| (e.account.as_str(), e.amounts)).collect();
    audit.same(&format!("{what}, its entries"), credits, vec![(vendor.as_str(), want)]);
    sums.billed += want;
    sums.bill_from = sums.posted.at;
    sums.posted.at = to;
    Ok(())
}

/// The money of a close again from its quantities. Its interval is that of the bill before it.
fn check_house(
    audit: &mut Audit,
    head: &TransactionRow,
    epoch: &EpochRow,
    entries: &[EntryRow],
    sums: &mut Sums,
) {
    let what = format!("close {}", head.id);
    let mut house = sums.posted.house;
    let mut written: BTreeMap<&str, Picos> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.debit) {
        if entry.account == ROUNDING {
            sums.posted.rounding += entry.amounts.money;
            audit.same(
                &format!("{what}, quantities of rounding"),
                (entry.amounts.time.0, entry.amounts.kv.0),
                (0, 0),
            );
            continue;
        }
        let unknown = house;
        add_house(&mut house, &entry.account, entry.amounts.time.0, entry.amounts.kv.0);
        if house == unknown && !entry.amounts.is_zero() {
            audit.differs(format!("{what} posts to {}, which is no account of the house", entry.account));
        }
        written.insert(&entry.account, entry.amounts.money);
        sums.posted.money += entry.amounts.money;
        sums.floors += if entry.account == CRASH { 3 } else { 2 };
    }
    let now = sums.posted.at;
    let before = Posted { at: sums.bill_from, ..sums.posted };
    let pool = epoch.pool.filter(|pool| pool.since < now);
    let right = house_debits(&before, &house, pool, now, &epoch.epoch.rate.prices(pool), true);
    let right: BTreeMap<&str, Picos> =
        right.iter().map(|(account, amounts)| (account.as_str(), amounts.money)).collect();
    audit.same(&format!("{what}, its money"), written, right);
    sums.posted.house = house;
    sums.bill_from = now;
}

fn check_epoch(connection: &Connection, audit: &mut Audit, row: &EpochRow, sums: &Sums) -> SqlResult<()> {
    let (id, rate) = (row.epoch.id, &row.epoch.rate);
    let what = format!("epoch {id}");
    let house_time = sums.posted.house.time.iter().sum::<u64>() + sums.posted.house.crash_time;
    let house_kv = sums.posted.house.kv.iter().sum::<u128>() + sums.posted.house.crash_kv;
    let mut time = sums.receipts.time.0 + house_time;
    let mut kv = sums.receipts.kv.0 + house_kv;
    let mut money = sums.receipts.money + sums.posted.money + sums.posted.rounding;
    let mut house = sums.on_the_house + sums.posted.money + sums.posted.rounding;
    let mut floors = sums.floors;
    let mut open = Picos::ZERO;
    let mut rounding = sums.posted.rounding;
    let now = if let Some(end) = row.end {
        audit.same(&format!("{what}, billed until"), sums.posted.at, end);
        end
    } else {
        let Some(checkpoint) = rows::checkpoint(connection, row)? else {
            audit.differs(format!("{what} has neither an end nor a checkpoint"));
            return Ok(());
        };
        let stand = &checkpoint.snapshot;
        if let Err(difference) = stand.check() {
            audit.differs(format!("{what}, checkpoint: {difference}"));
        }
        audit.same(&format!("{what}, checkpoint, settled time"), stand.settled_device, sums.receipts.time);
        audit.same(&format!("{what}, checkpoint, settled block-time"), stand.settled_kv, sums.receipts.kv);
        audit.same(
            &format!("{what}, checkpoint, settled money"),
            checkpoint.settled_money,
            sums.receipts.money,
        );
        let behind = sums.posted.at > stand.now
            || sums.posted.house.time.iter().zip(&stand.house_time).any(|(posted, now)| *posted > now.0)
            || sums.posted.house.kv.iter().zip(&stand.house_kv).any(|(posted, now)| *posted > now.0);
        if behind {
            audit.differs(format!("{what}: the closes posted more than the checkpoint has"));
            return Ok(());
        }
        let (until, standing) = (stand.now, checkpoint.books(row.epoch.clone(), sums.posted).standing());
        for (_, amounts) in &standing.unposted {
            time += amounts.time.0;
            kv += amounts.kv.0;
            money += amounts.money;
            house += amounts.money;
            floors += 3;
        }
        time += standing.open.time.0;
        kv += standing.open.kv.0;
        floors += 2 * checkpoint.open.len() as i128;
        open = standing.open.money;
        rounding += standing.rounding;
        house += standing.rounding;
        money += open + standing.rounding;
        until
    };
    let bill = rate.bill(DeviceNanos::ZERO, now);
    audit.same(&format!("{what}, device time"), time, now.0);
    audit.same(&format!("{what}, block-time"), kv, elapsed_kv(row.pool, now).0);
    audit.same(&format!("{what}, money against the bill"), money, bill);
    let billed = rate.bill(DeviceNanos::ZERO, sums.posted.at);
    audit.same(&format!("{what}, bills written"), sums.billed.money, billed);
    // Each floor loses less than one pico.
    if rounding < Picos::ZERO || rounding.0 > floors {
        audit.differs(format!("{what}: rounding is {} picos after {floors} floors", rounding.0));
    }
    let currency = rate.currency().to_owned();
    let of_device = audit.devices.entry((currency.clone(), row.epoch.device.clone())).or_default();
    for total in [of_device, audit.totals.entry(currency).or_default()] {
        total.bill += bill;
        total.posted += sums.receipts.money - sums.on_the_house;
        total.open += open;
        total.house += house;
        total.device_time += now;
        total.block_time += elapsed_kv(row.pool, now);
    }
    Ok(())
}
