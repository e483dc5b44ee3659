//! The ledger from outside: random worlds, crashes, failing disks, tampering.

pub(crate) mod world;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use obol::ledger::{
    AdoptError, By, Ledger, LedgerError, LedgerUnavailable, MethodRecord, Page, ReceiptFilter, ReportQuery,
    audit, report,
};
use obol::request::Finish;
use obol::units::{Picos, RequestId, UnixNanos};
use rusqlite::Connection;
use world::{Meter, Random, START, World, context, eager, open, options, rate, wait};

pub(crate) fn reconciled(dir: &Path, what: &str) {
    let audit = audit(dir).unwrap();
    assert!(audit.is_reconciled(), "{what}: {audit}");
    let report = report(dir, &ReportQuery::by(&[By::Model, By::Day])).unwrap();
    for (currency, sum) in &report.balances {
        assert_eq!(sum.bill, sum.usage + sum.house + sum.open, "{what}: the report's {currency}");
        let loaded: Picos = report.rows.iter().map(|row| row.spend.loaded_cost).sum();
        assert_eq!(loaded + sum.unallocated + sum.open, sum.bill, "{what}: fully loaded {currency}");
    }
}

/// Copies the database as a crash would leave it.
pub(crate) fn copy(from: &Path, to: &Path) {
    for name in ["ledger.db", "ledger.db-wal"] {
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

fn raw(dir: &Path) -> Connection {
    Connection::open(dir.join("ledger.db")).unwrap()
}

/// Quantities debited to an account, by us.
fn debited(dir: &Path, account: &str) -> (u64, u128) {
    let connection = raw(dir);
    let mut query = connection
        .prepare(
            "SELECT device_ns, block_ns_hi, block_ns_lo FROM entries JOIN accounts ON accounts.id = account
             WHERE name = ?1 AND side = 'debit'",
        )
        .unwrap();
    let rows = query.query_map([account], |row| {
        Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?, row.get::<_, u64>(2)?))
    });
    rows.unwrap().map(Result::unwrap).fold((0, 0), |sum, (time, hi, lo)| {
        (sum.0 + time, sum.1 + u128::from(hi) * 1_000_000_000_000_000_000 + u128::from(lo))
    })
}

#[test]
fn random_worlds_reconcile_and_equal_the_dumb_ledger() {
    for seed in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, sender) = open(dir.path(), &options("boot", rate("0.07"), START));
        let mut world = World::new(seed, START, "");
        for _ in 0..25 {
            world.step(&ledger, &sender);
        }
        world.drain(&sender);
        let receipts: Vec<_> = world.waiting.drain(..).map(wait).collect();
        reconciled(dir.path(), &format!("seed {seed}, running"));
        assert_eq!(ledger.totals().devices[0].conservation_error_ns, 0);
        assert_eq!(ledger.totals().devices[0].kv_conservation_error, 0);
        assert_eq!(receipts.len(), world.dumb.receipts, "seed {seed}");
        for receipt in receipts {
            let read = ledger.receipt(receipt.request()).unwrap().unwrap();
            assert_eq!(read, receipt, "seed {seed}");
            assert_eq!(read.to_json().to_string(), receipt.to_json().to_string(), "seed {seed}");
        }
        ledger.close().unwrap();
        reconciled(dir.path(), &format!("seed {seed}, closed"));
        for (account, sum) in &world.dumb.paid {
            assert_eq!(debited(dir.path(), account), *sum, "seed {seed}: {account}");
        }
        assert_eq!(debited(dir.path(), "house:idle").0, world.meter.at.house_time[1].0, "seed {seed}");
        assert_eq!(debited(dir.path(), "house:kv_free").1, world.meter.at.house_kv[1].0, "seed {seed}");
    }
}

#[test]
fn a_crash_at_any_moment_loses_no_acknowledged_receipt() {
    for seed in 100..125 {
        let dir = tempfile::tempdir().unwrap();
        let crashed = tempfile::tempdir().unwrap();
        let (ledger, sender) = open(dir.path(), &options("one", rate("0.07"), START));
        let mut world = World::new(seed, START, "");
        for _ in 0..Random(seed).below(20) {
            world.step(&ledger, &sender);
        }
        // Those that ended are acknowledged; those that run are not.
        let running = world.meter.open.len();
        let ended = world.dumb.receipts;
        std::thread::sleep(Duration::from_millis(Random(seed).below(30)));
        let acknowledged: Vec<_> =
            world.waiting.drain(..).filter_map(|waiter| waiter.now_or_never()).map(Result::unwrap).collect();
        copy(dir.path(), crashed.path());
        let restart = world.meter.at.wall.0 + Random(seed).below(20_000_000_000_000);
        let (second, sender) = open(crashed.path(), &options("two", rate("0.11"), restart));
        reconciled(crashed.path(), &format!("seed {seed}, after the crash"));
        for receipt in &acknowledged {
            assert_eq!(
                second.receipt(receipt.request()).unwrap().as_ref(),
                Some(receipt.as_ref()),
                "seed {seed}"
            );
        }
        let page = second.receipts(&ReceiptFilter::default(), &Page { limit: 1000, after: None }).unwrap();
        assert!(page.receipts.len() <= ended + running, "seed {seed}: a receipt is doubled");
        let mut world = World::new(seed + 1, restart, "b");
        for _ in 0..5 {
            world.step(&second, &sender);
        }
        second.close().unwrap();
        reconciled(crashed.path(), &format!("seed {seed}, closed after the crash"));
    }
}

#[test]
fn a_wall_clock_that_went_back_charges_no_time_to_the_crash() {
    let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (ledger, sender) = open(dir.path(), &options("one", rate("1"), START));
    let mut world = World::new(1, START, "");
    for _ in 0..6 {
        world.step(&ledger, &sender);
    }
    ledger.record_method(0, MethodRecord { id: "m".into(), json: "{}".into() });
    std::thread::sleep(Duration::from_millis(200));
    copy(dir.path(), crashed.path());
    drop(open(crashed.path(), &options("two", rate("1"), START - 1)));
    assert_eq!(debited(crashed.path(), "house:crash"), (0, 0));
    reconciled(crashed.path(), "clock went back");
}

/// A board without a clock starts in 1970. The rate would overflow one entry over that time.
#[test]
fn a_crash_in_1970_is_closed_in_few_transactions() {
    let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (ledger, sender) = open(dir.path(), &options("one", rate("30"), 1_000));
    let mut meter = Meter::new(1, 1_000);
    let report = meter.load();
    sender.send(report).unwrap();
    let loaded = |ledger: &Ledger| {
        ledger.totals().devices[0].house_time.get("house:load") == Some(&meter.at.house_time[2])
    };
    until(|| loaded(&ledger));
    copy(dir.path(), crashed.path());
    drop(open(crashed.path(), &options("two", rate("30"), START)));
    assert_eq!(debited(crashed.path(), "house:crash").0, START - meter.at.wall.0);
    let count = "SELECT count(*) FROM transactions";
    let transactions: u64 = raw(crashed.path()).query_row(count, [], |row| row.get(0)).unwrap();
    assert!(transactions < 1_500, "{transactions}");
    reconciled(crashed.path(), "a crash in 1970");
}

#[test]
fn an_idempotency_key_charges_once() {
    let dir = tempfile::tempdir().unwrap();
    let with_key = |id: &str, scope: Option<&str>| {
        let mut context = context(id);
        context.idempotency_key = Some("again".into());
        context.key_id = scope.map(str::to_owned);
        context
    };
    let reused = |result: Result<_, AdoptError>, by: &str| match result {
        Err(AdoptError::IdempotencyKeyReused { request }) => assert_eq!(request, RequestId(by.into())),
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("adopted twice"),
    };
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let (ticket, waiter) = ledger.adopt(with_key("first", None)).unwrap();
    reused(ledger.adopt(with_key("second", None)).map(drop), "first");
    ledger.release(ledger.adopt(with_key("other scope", Some("key"))).unwrap().0);
    ledger.release(ledger.adopt(with_key("released, so free again", Some("key"))).unwrap().0);
    let mut meter = Meter::new(1, START);
    sender.send(meter.load()).unwrap();
    meter.start(RequestId("first".into()), ticket);
    meter.pass();
    let usage = meter.finish(0, Finish::Stop);
    sender.send(meter.report(vec![usage])).unwrap();
    wait(waiter);
    reused(ledger.adopt(with_key("third", None)).map(drop), "first");
    ledger.close().unwrap();
    drop((ledger, sender));
    let (ledger, _sender) = open(dir.path(), &options("next boot", rate("1"), START));
    reused(ledger.adopt(with_key("fourth", None)).map(drop), "first");
}

#[test]
fn unknown_and_doubled_tickets_are_booked_to_the_house() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let (ticket, waiter) = ledger.adopt(context("known")).unwrap();
    let mut meter = Meter::new(1, START);
    sender.send(meter.load()).unwrap();
    meter.start(RequestId("known".into()), ticket);
    meter.start(RequestId("known".into()), ticket);
    meter.start(RequestId("never seen".into()), obol::units::Ticket(77));
    meter.pass();
    let usages = (0..3).map(|_| meter.finish(0, Finish::Stop)).collect();
    sender.send(meter.report(usages)).unwrap();
    wait(waiter);
    ledger.close().unwrap();
    let page = ledger
        .receipts(&ReceiptFilter { status: Some(Finish::Error), ..Default::default() }, &Page::default());
    assert_eq!(page.unwrap().receipts.len(), 2);
    reconciled(dir.path(), "unknown tickets");
}

#[test]
fn a_report_that_breaks_the_law_is_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let (_, waiter) = ledger.adopt(context("a")).unwrap();
    let mut meter = Meter::new(1, START);
    let mut bad = meter.load();
    bad.snapshot.now.0 += 1;
    sender.send(bad).unwrap();
    assert_eq!(waiter.wait(), Err(LedgerUnavailable));
    assert!(!ledger.is_available());
    assert!(matches!(ledger.adopt(context("b")), Err(AdoptError::Unavailable)));
    assert!(matches!(ledger.close(), Err(LedgerError::NotClosed)));
    reconciled(dir.path(), "after a broken report");
    let printed = audit(dir.path()).unwrap().to_string();
    assert!(printed.contains("1 epoch, 0 transactions, 0 receipts\n"), "{printed}");
}

#[test]
fn a_disk_that_refuses_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let mut world = World::new(3, START, "");
    for _ in 0..4 {
        world.step(&ledger, &sender);
    }
    while world.meter.open.is_empty() {
        world.step(&ledger, &sender);
    }
    let foreign = raw(dir.path());
    until(|| foreign.execute_batch("BEGIN IMMEDIATE").is_ok());
    world.drain(&sender);
    let last = world.waiting.pop().unwrap();
    assert_eq!(last.wait(), Err(LedgerUnavailable));
    until(|| !ledger.is_available());
    assert!(matches!(ledger.adopt(context("refused")), Err(AdoptError::Unavailable)));
    foreign.execute_batch("ROLLBACK").unwrap();
    until(|| ledger.is_available());
    let page = ledger.receipts(&ReceiptFilter::default(), &Page { limit: 1000, after: None }).unwrap();
    assert_eq!(page.receipts.len(), world.dumb.receipts, "nothing lost, nothing doubled");
    ledger.close().unwrap();
    reconciled(dir.path(), "after the lock");
}

fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "did not come true in 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_same_trace_gives_the_same_ledger() {
    let dump = |rate_hour: &str| {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, sender) = open(dir.path(), &options("boot", rate(rate_hour), START));
        let mut world = World::new(9, START, "");
        for _ in 0..25 {
            world.step(&ledger, &sender);
        }
        world.drain(&sender);
        ledger.close().unwrap();
        let connection = raw(dir.path());
        let mut query = connection
            .prepare("SELECT tx, name, side, device_ns, block_ns_hi, block_ns_lo, picos FROM entries JOIN accounts ON accounts.id = account ORDER BY tx, name")
            .unwrap();
        let rows = query.query_map([], |row| {
            let head: (i64, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let tail: (i64, i64, i64, i64) = (row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?);
            Ok((head, tail))
        });
        let rows: Vec<_> = rows.unwrap().map(Result::unwrap).collect();
        rows
    };
    let once = dump("0.07");
    assert_eq!(once, dump("0.07"));
    let doubled = dump("0.14");
    for (single, double) in once
        .iter()
        .filter(|row| row.0.1.starts_with("tenant"))
        .zip(doubled.iter().filter(|row| row.0.1.starts_with("tenant")))
    {
        // Two floors a receipt.
        assert!((0..=2).contains(&(double.1.3 - 2 * single.1.3)), "{single:?} {double:?}");
    }
}

#[test]
fn what_is_written_cannot_be_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let mut world = World::new(5, START, "");
    for _ in 0..8 {
        world.step(&ledger, &sender);
    }
    world.drain(&sender);
    ledger.close().unwrap();
    let connection = raw(dir.path());
    for table in [
        "rates",
        "epochs",
        "pools",
        "epoch_ends",
        "accounts",
        "transactions",
        "entries",
        "bills",
        "receipts",
        "receipt_lines",
    ] {
        let column: String = connection
            .query_row(&format!("SELECT name FROM pragma_table_info('{table}') LIMIT 1"), [], |row| {
                row.get(0)
            })
            .unwrap();
        for sql in [format!("DELETE FROM {table}"), format!("UPDATE {table} SET {column} = {column}")] {
            let error = connection.execute_batch(&sql).unwrap_err();
            assert!(error.to_string().contains("only appends"), "{sql}: {error}");
        }
    }
}

#[test]
fn tampering_is_found() {
    let dir = tempfile::tempdir().unwrap();
    // So long before the end of a clock hour that one closes.
    let start = START + 2_000_000_000_000;
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), start));
    let mut world = World::new(7, start, "");
    for _ in 0..40 {
        world.step(&ledger, &sender);
    }
    while world.meter.open.is_empty() {
        world.step(&ledger, &sender);
    }
    drop(sender);
    until(|| ledger.totals().devices[0].house_time.get("house:idle") == Some(&world.meter.at.house_time[1]));
    reconciled(dir.path(), "before");
    for (sql, names) in [
        ("UPDATE entries SET picos = picos + 1 WHERE tx = (SELECT max(tx) FROM receipts)", "receipt"),
        (
            "UPDATE entries SET device_ns = device_ns + 1 WHERE side = 'debit' AND tx = (SELECT max(tx) FROM receipts)",
            "debits against credits",
        ),
        ("UPDATE entries SET device_ns = device_ns + 1 WHERE tx = (SELECT max(tx) FROM bills)", "bill"),
        (
            "UPDATE receipts SET decode_ns = decode_ns + 1 WHERE tx = (SELECT max(tx) FROM receipts)",
            "device time of its lines",
        ),
        (
            "UPDATE receipt_lines SET time_picos = time_picos + 1 WHERE tx = (SELECT max(tx) FROM receipts)",
            "money for time",
        ),
        ("UPDATE receipts SET status = CASE status WHEN 'error' THEN 'stop' ELSE 'error' END", "its entries"),
        ("UPDATE receipts SET tenant = 'somebody'", "its entries"),
        ("DELETE FROM receipts WHERE tx = (SELECT max(tx) FROM receipts)", "lost its receipt"),
        ("DELETE FROM entries WHERE tx = (SELECT max(tx) FROM receipts)", "does not touch"),
        ("DELETE FROM bills", "interval"),
        ("UPDATE rates SET device_hour_picos = device_hour_picos + 1000000", "money"),
        ("UPDATE pools SET blocks = blocks + 1", "block-time"),
        ("UPDATE checkpoint SET idle_ns = idle_ns + 1, now_ns = now_ns", "checkpoint"),
        ("UPDATE checkpoint SET settled_ns = settled_ns + 1, now_ns = now_ns + 1", "settled time"),
        ("UPDATE checkpoint SET money_lo = money_lo + 1", "settled money"),
        ("DELETE FROM checkpoint", "neither an end nor a checkpoint"),
        ("DELETE FROM open_accruals", "checkpoint"),
        ("UPDATE transactions SET epoch = 2 WHERE id = 3", "missing row"),
        ("SELECT 1", "append-only"),
    ] {
        let copied = tempfile::tempdir().unwrap();
        copy(dir.path(), copied.path());
        let connection = raw(copied.path());
        connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
        let triggers: Vec<String> = connection
            .prepare("SELECT name FROM sqlite_schema WHERE type = 'trigger'")
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        for trigger in triggers {
            connection.execute_batch(&format!("DROP TRIGGER {trigger}")).unwrap();
        }
        connection.execute_batch(sql).unwrap();
        drop(connection);
        let audit = audit(copied.path()).unwrap();
        let text = audit.to_string();
        assert!(!audit.is_reconciled() && text.contains(names), "{sql}: {text}");
    }
}

#[test]
fn one_server_a_directory_and_clear_errors() {
    let dir = tempfile::tempdir().unwrap();
    let check = |result: Result<Ledger, LedgerError>, says: &str| match result {
        Err(error) => assert!(error.to_string().contains(says), "{error}"),
        Ok(_) => panic!("opened: expected {says:?}"),
    };
    let (ledger, _sender) = open(dir.path(), &options("one", rate("1"), START));
    let start = |dir: &Path, boot, rate| {
        Ledger::open_tuned(dir, &options(boot, rate, START), eager()).map(|(ledger, _senders)| ledger)
    };
    let second = || start(dir.path(), "two", rate("1"));
    check(second(), &format!("in use by process {}", std::process::id()));
    ledger.close().unwrap();
    second().unwrap().close().unwrap();
    let other = obol::ledger::RateCard::parse("2", "0.2", "USD", Some(rate("1").version())).unwrap();
    check(start(dir.path(), "three", other), "needs a new version");

    let file = dir.path().join("a file");
    fs::write(&file, "text").unwrap();
    check(start(&file, "x", rate("1")), "--data-dir");

    let foreign = tempfile::tempdir().unwrap();
    raw(foreign.path()).execute_batch("CREATE TABLE notes (text)").unwrap();
    check(start(foreign.path(), "x", rate("1")), "not a ledger of ours");
    let garbage = tempfile::tempdir().unwrap();
    fs::write(garbage.path().join("ledger.db"), vec![7_u8; 9000]).unwrap();
    check(start(garbage.path(), "x", rate("1")), "not a ledger of ours");
    assert_eq!(fs::read(garbage.path().join("ledger.db")).unwrap(), vec![7_u8; 9000]);

    let version: i64 = raw(dir.path()).query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    raw(dir.path()).execute_batch("PRAGMA user_version = 99").unwrap();
    check(second(), "schema version 99");
    raw(dir.path()).execute_batch(&format!("PRAGMA user_version = {version}")).unwrap();
    let mut bytes = fs::read(dir.path().join("ledger.db")).unwrap();
    bytes[4096..12000].fill(0x5A);
    fs::write(dir.path().join("ledger.db"), &bytes).unwrap();
    check(second(), "damaged");
    assert_eq!(fs::read(dir.path().join("ledger.db")).unwrap(), bytes);
    assert!(matches!(audit(&dir.path().join("nothing here")), Err(LedgerError::NoLedger { .. })));
}

#[test]
fn pages_and_filters() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, sender) = open(dir.path(), &options("boot", rate("1"), START));
    let mut world = World::new(11, START, "");
    for _ in 0..30 {
        world.step(&ledger, &sender);
    }
    world.drain(&sender);
    ledger.close().unwrap();
    let mut seen = Vec::new();
    let mut page = Page { limit: 3, after: None };
    loop {
        let got = ledger.receipts(&ReceiptFilter::default(), &page).unwrap();
        seen.extend(got.receipts.iter().map(|receipt| receipt.request().clone()));
        page.after = seen.last().cloned();
        if !got.has_more {
            break;
        }
    }
    assert_eq!(seen.len(), world.dumb.receipts);
    let none = ReceiptFilter { until: Some(UnixNanos(START)), ..Default::default() };
    assert!(ledger.receipts(&none, &Page::default()).unwrap().receipts.is_empty());
    let whole = Page { limit: 1000, after: None };
    let all = ledger.receipts(&ReceiptFilter::default(), &whole).unwrap().receipts;
    let middle = all[all.len() / 2].usage.finished_at;
    for (since, until) in
        [(Some(middle), None), (None, Some(middle)), (Some(middle), Some(UnixNanos(u64::MAX)))]
    {
        let filter = ReceiptFilter { since, until, tenant: Some("anonymous".into()), ..Default::default() };
        let mut right = all.clone();
        right.retain(|receipt| {
            let at = receipt.usage.finished_at;
            since.is_none_or(|since| at >= since) && until.is_none_or(|until| at < until)
        });
        assert_eq!(ledger.receipts(&filter, &whole).unwrap().receipts, right, "{since:?} {until:?}");
    }
    let unknown = Page { after: Some(RequestId("no such".into())), ..Page::default() };
    assert!(ledger.receipts(&ReceiptFilter::default(), &unknown).unwrap().receipts.is_empty());
    let printed = report(dir.path(), &ReportQuery::by(&[By::User, By::Status])).unwrap();
    assert!(printed.to_csv().contains("\"ann, \"\"the\"\" tester\",stop,USD,"), "{}", printed.to_csv());
    assert!(printed.to_table().contains("house:rounding"), "{}", printed.to_table());
    assert_eq!(printed.to_json()["rows"].as_array().unwrap().len(), printed.rows.len());
}
