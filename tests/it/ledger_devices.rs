//! The books of several devices: some that run each step together, some by themselves.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::Duration;

use obol::ledger::{
    By, DeviceInfo, Ledger, LedgerError, MeteredDevice, OpenOptions, RateCard, ReportQuery, audit, report,
};
use obol::request::Finish;
use obol::units::{DeviceNanos, Picos, UnixNanos};
use obol::usage::{HouseKv, HouseTime, MeterReport};
use rusqlite::Connection;

use crate::ledger::world::{START, World, eager, rate, wait};
use crate::ledger::{copy, reconciled};

fn device(id: &str, rate: RateCard) -> MeteredDevice {
    let info = DeviceInfo { id: id.into(), kind: "cpu".into(), name: "a processor".into() };
    MeteredDevice { info, rate }
}

/// Two devices that run each step together, and one by itself, at three prices.
fn options(boot: &str, wall: u64) -> OpenOptions {
    let together = vec![device("cpu:0", rate("0.07")), device("cpu:1", rate("31.9"))];
    let alone = vec![device("cpu:2", rate("1"))];
    OpenOptions { engines: vec![together, alone], wall: UnixNanos(wall), boot_id: boot.into() }
}

fn open(dir: &Path, boot: &str, wall: u64) -> (Ledger, Vec<Sender<MeterReport>>) {
    Ledger::open_tuned(dir, &options(boot, wall), eager()).expect("a ledger")
}

/// Runs both engines in any order.
fn run(seed: u64, steps: usize, ledger: &Ledger, senders: &[Sender<MeterReport>]) -> [World; 2] {
    let mut worlds = [World::new(seed, START, "a"), World::new(seed + 1000, START, "b")];
    for step in 0..steps {
        let engine = (seed as usize + step * step) % 2;
        worlds[engine].step(ledger, &senders[engine]);
    }
    worlds
}

/// The device time that the audit finds for each device.
fn audited(dir: &Path) -> BTreeMap<String, DeviceNanos> {
    let audit = audit(dir).expect("a ledger");
    audit.devices.iter().map(|((_, device), sum)| (device.clone(), sum.device_time)).collect()
}

#[test]
fn each_device_of_random_worlds_adds_up_and_so_do_all() {
    for seed in 0..30 {
        let dir = tempfile::tempdir().expect("a directory");
        let (ledger, senders) = open(dir.path(), "boot", START);
        let mut worlds = run(seed, 50, &ledger, &senders);
        let what = format!("seed {seed}");
        for (engine, world) in worlds.iter_mut().enumerate() {
            // One that never came to run is still in its first moment.
            if world.meter.at.pool.is_some() {
                world.drain(&senders[engine]);
            }
        }
        let mut charged: BTreeMap<String, DeviceNanos> = BTreeMap::new();
        for (engine, world) in worlds.iter_mut().enumerate() {
            for waiter in world.waiting.drain(..) {
                let receipt = wait(waiter);
                assert_eq!(receipt.lines.len(), 2 - engine, "{what}");
                assert_eq!(receipt.device, ["cpu:0,cpu:1", "cpu:2"][engine], "{what}");
                let (mut time, mut money) = (DeviceNanos(0), Picos(0));
                for line in &receipt.lines {
                    // Each device was there for the whole of each step, and held its part of each block.
                    assert_eq!(line.device_time, receipt.lines[0].device_time, "{what}");
                    assert_eq!(line.kv, receipt.lines[0].kv, "{what}");
                    time += line.device_time;
                    money += line.total();
                    *charged.entry(line.device.clone()).or_default() += line.device_time;
                }
                assert_eq!((time, money), (receipt.usage.device(), receipt.gross()), "{what}");
                assert_eq!(receipt.bytes_per_block, [2048, 4096][engine], "{what}: its part of a block");
                let read = ledger.receipt(receipt.request()).expect("readable").expect("durable");
                assert_eq!(read, receipt, "{what}");
            }
        }
        reconciled(dir.path(), &format!("{what}, running"));
        let totals = ledger.totals();
        for (device, engine) in totals.devices.iter().zip([0, 0, 1]) {
            assert_eq!((device.conservation_error_ns, device.kv_conservation_error), (0, 0), "{what}");
            let at = &worlds[engine].meter.at;
            let house: DeviceNanos = at.house_time.iter().copied().sum();
            let charged = charged.get(&device.device).copied().unwrap_or_default();
            assert_eq!(house + charged, at.now, "{what}: {}", device.device);
            assert_eq!(audited(dir.path())[&device.device], at.now, "{what}: {}", device.device);
        }
        ledger.close().expect("closes");
        reconciled(dir.path(), &format!("{what}, closed"));
        let audit = audit(dir.path()).expect("a ledger");
        let bills: Picos = audit.devices.values().map(|sum| sum.bill).sum();
        assert_eq!(bills, audit.totals["USD"].bill, "{what}");
        assert!(audit.to_string().contains("cpu:1:\nbill "), "{audit}");
    }
}

#[test]
fn a_crash_settles_a_request_over_all_its_devices_in_one_receipt() {
    let mut seen = 0;
    for seed in 0..12 {
        let (dir, crashed) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("another"));
        let (ledger, senders) = open(dir.path(), "one", START);
        let worlds = run(seed, 40, &ledger, &senders);
        // What is written is what was reported last.
        let stands = |device: usize, world: &World| {
            let (totals, at) = (ledger.totals(), &world.meter.at);
            let device = &totals.devices[device];
            HouseTime::ALL
                .iter()
                .zip(at.house_time)
                .all(|(class, time)| device.house_time.get(class.account()) == Some(&time))
                && HouseKv::ALL
                    .iter()
                    .zip(at.house_kv)
                    .all(|(class, kv)| device.house_kv.get(class.account()) == Some(&kv))
        };
        while !(stands(0, &worlds[0]) && stands(1, &worlds[0]) && stands(2, &worlds[1])) {
            std::thread::sleep(Duration::from_millis(5));
        }
        copy(dir.path(), crashed.path());
        let restart = worlds.iter().map(|world| world.meter.at.wall.0).max().expect("two") + 7_000_000_000;
        // The server that follows has other devices.
        let next = OpenOptions {
            engines: vec![vec![device("cpu:1", rate("2"))]],
            wall: UnixNanos(restart),
            boot_id: "two".into(),
        };
        let (after, _senders) = Ledger::open_tuned(crashed.path(), &next, eager()).expect("a ledger");
        let what = format!("seed {seed}");
        reconciled(crashed.path(), &what);
        for (engine, world) in worlds.iter().enumerate() {
            for open in &world.meter.open {
                let receipt = after.receipt(&open.request).expect("readable").expect("settled");
                assert_eq!(receipt.usage.status, Finish::Error, "{what}");
                let devices: Vec<&str> = receipt.lines.iter().map(|line| line.device.as_str()).collect();
                assert_eq!(devices, [&["cpu:0", "cpu:1"][..], &["cpu:2"]][engine], "{what}");
                for line in &receipt.lines {
                    assert_eq!((line.device_time, line.kv), (open.device, open.kv), "{what}");
                }
                seen += 1;
            }
        }
        let lasted = UnixNanos(restart).0 - START;
        for (device, time) in audited(crashed.path()) {
            assert!(time.0 >= lasted, "{what}: {device} ran for {} ns of {lasted}", time.0);
        }
    }
    assert!(seen > 10, "{seen} requests were open");
}

#[test]
fn a_device_whose_money_was_moved_to_another_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ledger, senders) = open(dir.path(), "boot", START);
    let mut worlds = run(3, 60, &ledger, &senders);
    worlds[0].drain(&senders[0]);
    worlds[1].drain(&senders[1]);
    ledger.close().expect("closes");
    reconciled(dir.path(), "before");
    // Between the two devices of a receipt: its total, and its transaction's balance, stay.
    let connection = Connection::open(dir.path().join("ledger.db")).expect("the ledger");
    let receipt = "(SELECT max(tx) FROM receipt_lines WHERE device = 'cpu:1')";
    let account = |device: &str| format!("(SELECT id FROM accounts WHERE name = 'device:{device}')");
    connection
        .execute_batch("DROP TRIGGER entries_no_update; DROP TRIGGER receipt_lines_no_update")
        .expect("drops");
    for (device, sign) in [("cpu:0", "-"), ("cpu:1", "+")] {
        connection
            .execute_batch(&format!(
                "UPDATE entries SET device_ns = device_ns {sign} 1 WHERE tx = {receipt} AND account = {};
                 UPDATE receipt_lines SET device_ns = device_ns {sign} 1 WHERE tx = {receipt} AND device = '{device}'",
                account(device)
            ))
            .expect("updates");
    }
    let found = audit(dir.path()).expect("a ledger").to_string();
    for epoch in ["epoch 1, device time", "epoch 2, device time"] {
        assert!(found.contains(epoch), "{found}");
    }
}

#[test]
fn one_server_has_one_currency() {
    let dir = tempfile::tempdir().expect("a directory");
    let euros = RateCard::parse("1", "0.2", "EUR", None).expect("a rate card");
    let mut options = options("boot", START);
    options.engines.push(vec![device("cpu:3", euros)]);
    let error = Ledger::open_tuned(dir.path(), &options, eager()).map(drop).expect_err("two currencies");
    assert!(matches!(error, LedgerError::Currencies { .. }), "{error}");
    options.engines.clear();
    let error = Ledger::open_tuned(dir.path(), &options, eager()).map(drop).expect_err("no device");
    assert!(matches!(error, LedgerError::NoDevice), "{error}");
}

/// A ledger as the first release wrote it, of a server that was killed while a request ran.
fn first_release() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ledger_v1.sql");
    let text = fs::read_to_string(golden).expect("the committed ledger");
    let connection = Connection::open(dir.path().join("ledger.db")).expect("a database");
    // Its tables come in the order of their names.
    connection.execute_batch("PRAGMA foreign_keys = OFF").expect("a pragma");
    connection.execute_batch(&text).expect("the committed ledger is SQL");
    // "OBOL", and the schema's version.
    connection.execute_batch("PRAGMA application_id = 1329745740; PRAGMA user_version = 1").expect("pragmas");
    dir
}

/// The columns of each table, in the order of their names.
fn columns(dir: &Path) -> Vec<(String, String)> {
    let connection = Connection::open(dir.join("ledger.db")).expect("a database");
    let sql = "SELECT tables.name, columns.name || ' ' || columns.type || ' ' || columns.\"notnull\"
               FROM sqlite_schema AS tables, pragma_table_info(tables.name) AS columns
               WHERE tables.type = 'table' ORDER BY tables.name, columns.cid";
    let mut query = connection.prepare(sql).expect("a query");
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
    rows.map(|row| row.expect("a row")).collect()
}

#[test]
fn a_ledger_of_an_earlier_build_is_brought_up_to_date_while_nobody_has_it() {
    let (old, new) = (first_release(), tempfile::tempdir().expect("a directory"));
    let (ledger, _senders) = open(new.path(), "new", START);
    ledger.close().expect("closes");
    let before = columns(old.path());
    let holder = File::create(old.path().join("ledger.lock")).expect("a file");
    holder.lock().expect("a lock");
    let error = report(old.path(), &ReportQuery::by(&[By::Status])).expect_err("a server has it");
    assert!(matches!(error, LedgerError::InUse { .. }), "{error}");
    assert_eq!(columns(old.path()), before);
    drop(holder);
    let spent = report(old.path(), &ReportQuery::by(&[By::Status])).expect("a report");
    assert_eq!(spent.rows.len(), 1);
    assert_eq!(columns(old.path()), columns(new.path()));
}

#[test]
fn a_ledger_of_one_device_is_opened_by_a_server_with_several() {
    let dir = first_release();
    reconciled(dir.path(), "as it was left");
    let killed = 1_795_355_500_209_467_220;
    let (ledger, _senders) = open(dir.path(), "new", killed + 1_000_000_000);
    reconciled(dir.path(), "opened");
    let receipts = ledger.receipts(&Default::default(), &Default::default()).expect("receipts").receipts;
    let ended: Vec<(Finish, &str, usize)> = receipts
        .iter()
        .map(|receipt| (receipt.usage.status, receipt.device.as_str(), receipt.lines.len()))
        .collect();
    assert_eq!(ended, [(Finish::Error, "cpu", 1), (Finish::Length, "cpu", 1)]);
    assert_eq!(receipts[0].usage.device(), DeviceNanos(2_916_537_618), "what the checkpoint says");
    ledger.close().expect("closes");
    reconciled(dir.path(), "closed");
    let spent = report(dir.path(), &ReportQuery::by(&[By::Status])).expect("a report");
    assert_eq!(spent.rows.len(), 2);
}
