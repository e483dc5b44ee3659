//! The books of devices that one engine drives together: what is a step of one is a step of all, so each report
//! is booked once for each device, at that device's rate.
//!
//! Does: settle a request over all devices that it used, in one receipt with a line for each.
//! Does not know: SQL, waiters, threads.
//! Invariants: a report that breaks a law on one device changes nothing on any; a receipt's usage is the sum of
//! its lines.

use std::collections::HashMap;

use super::books::{Books, Fault, NextTransaction, Record};
use super::entry::{Amounts, Kind, Transaction, receipt_debits};
use super::receipt::{Attribution, Claim, Line, Receipt};
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};
use crate::usage::{MeterReport, PoolInfo, Purse, Snapshot, TokenCounts, Usage};

/// At least one device's books, all at the same instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) books: Vec<Books>,
    /// The way of splitting steps that receipts name.
    pub(super) method: Option<String>,
}

/// What a request used of one device, by the place of its books.
type Share = (usize, DeviceNanos, BlockNanos);

impl Group {
    pub(super) fn new(books: Vec<Books>) -> Self {
        assert!(!books.is_empty(), "an engine without a device: this is a bug");
        Self { books, method: None }
    }

    /// Where the devices stand; the pool is the first one's.
    pub(super) fn last(&self) -> &Snapshot {
        &self.books[0].last
    }

    /// Books one report for each device. `who` gives each finished request's claim, `None` for a ticket
    /// that was never given out.
    pub(super) fn apply(
        &mut self,
        report: MeterReport,
        next: &mut NextTransaction,
        mut who: impl FnMut(&Usage) -> Option<Claim>,
    ) -> Result<Vec<Record>, Fault> {
        let MeterReport { finished, snapshot } = report;
        let devices = self.books.len() as u64;
        let snapshot = of_one_device(snapshot, devices)?;
        for books in &self.books {
            books.check(&finished, &snapshot)?;
        }
        let mut records = Vec::new();
        for books in &mut self.books {
            books.advance(snapshot.clone(), next, &mut records);
        }
        for usage in finished {
            let shares: Vec<Share> =
                (0..self.books.len()).map(|books| (books, usage.device(), usage.kv)).collect();
            let usage = usage.on_devices(devices);
            let who = who(&usage);
            records.push(settle(&mut self.books, &shares, usage, who, self.method.clone(), next));
        }
        Ok(records)
    }

    /// Ends the epochs: what is still open settles with status `error`, all is posted.
    pub(super) fn end(
        &mut self,
        next: &mut NextTransaction,
        who: impl FnMut(&Usage) -> Option<Claim>,
    ) -> Vec<Record> {
        let mut records = self.settle_open(next, who);
        for books in &mut self.books {
            books.finish(true, next, &mut records);
        }
        records
    }

    /// Ends epochs that stopped without a word: they lasted until `restart` on the wall clock, and from the last
    /// snapshot on nobody used them.
    pub(super) fn crash(
        &mut self,
        restart: UnixNanos,
        next: &mut NextTransaction,
        who: impl FnMut(&Usage) -> Option<Claim>,
    ) -> Vec<Record> {
        let mut records = self.settle_open(next, who);
        for books in &mut self.books {
            books.be_down_until(restart, next, &mut records);
            books.finish(false, next, &mut records);
        }
        records
    }

    /// A receipt for each request that is open, over all devices on which it is.
    pub(super) fn settle_open(
        &mut self,
        next: &mut NextTransaction,
        mut who: impl FnMut(&Usage) -> Option<Claim>,
    ) -> Vec<Record> {
        let mut requests: Vec<(Ticket, RequestId, Vec<Share>)> = Vec::new();
        let mut known: HashMap<(Ticket, RequestId), usize> = HashMap::new();
        for (place, books) in self.books.iter_mut().enumerate() {
            for open in books.take_open() {
                let share = (place, open.device, open.kv);
                let at = known.entry((open.ticket, open.request.clone())).or_insert(requests.len());
                match requests.get_mut(*at) {
                    Some((.., shares)) => shares.push(share),
                    None => requests.push((open.ticket, open.request, vec![share])),
                }
            }
        }
        let mut records = Vec::with_capacity(requests.len());
        for (ticket, request, shares) in requests {
            let wall = self.books[shares[0].0].last.wall;
            let usage = broken_off(request, ticket, &shares, wall);
            let who = who(&usage);
            records.push(settle(&mut self.books, &shares, usage, who, self.method.clone(), next));
        }
        records
    }
}

/// A group's snapshot as one of its devices has it: each holds an equal part of every block.
fn of_one_device(mut snapshot: Snapshot, devices: u64) -> Result<Snapshot, Fault> {
    if let Some(PoolInfo { bytes_per_block, .. }) = &mut snapshot.pool {
        if !bytes_per_block.is_multiple_of(devices) {
            return Err(Fault(format!("{devices} devices cannot share a block of {bytes_per_block} bytes")));
        }
        *bytes_per_block /= devices;
    }
    Ok(snapshot)
}

/// The receipt of a request that used `shares`, which are all of `usage`.
fn settle(
    books: &mut [Books],
    shares: &[Share],
    mut usage: Usage,
    who: Option<Claim>,
    method_id: Option<String>,
    next: &mut NextTransaction,
) -> Record {
    let Claim { who: attribution, purse } = who.unwrap_or_else(|| {
        usage.status = Finish::Error;
        Attribution::unknown(&usage).into()
    });
    let (mut lines, mut credits, mut total) = (Vec::new(), Vec::new(), Amounts::default());
    for &(place, time, kv) in shares {
        let (line, account) = books[place].charge(time, kv);
        let line = line.discounted(&books[place].epoch.rate, attribution.tier, usage.status);
        let amounts = Amounts { time, kv, money: line.total() };
        total += amounts;
        credits.push((account, amounts));
        lines.push(line);
    }
    assert_eq!((total.time, total.kv), (usage.device(), usage.kv), "a receipt's usage is that of its lines");
    let overrun = overrun(purse.as_deref(), usage.status, lines.iter().map(Line::net).sum());
    let first = &books[shares[0].0];
    let devices: Vec<&str> = lines.iter().map(|line| line.device.as_str()).collect();
    let receipt = Receipt {
        device: devices.join(","),
        bytes_per_block: first.last.pool.map_or(0, |pool| pool.bytes_per_block),
        currency: first.epoch.rate.currency().to_owned(),
        attribution,
        usage,
        lines,
        overrun,
        method_id,
    };
    let debits = receipt_debits(&receipt, total);
    let transaction = Transaction::of(first.head(Kind::Receipt, next), debits, credits);
    let epochs = shares.iter().map(|&(place, ..)| books[place].epoch.id).collect();
    Record::Receipt { receipt: receipt.into(), transaction, epochs }
}

/// What of a request's money nobody pays, as no budget had set it aside. What ended with an error is the house's.
fn overrun(purse: Option<&dyn Purse>, status: Finish, cost: Picos) -> Picos {
    let Some(purse) = purse else { return Picos::ZERO };
    if status == Finish::Error {
        purse.pay(Picos::ZERO);
        return Picos::ZERO;
    }
    let paid = purse.pay(cost);
    assert!(Picos::ZERO <= paid && paid <= cost, "nobody pays more than a request cost; this is a bug");
    cost - paid
}

/// The usage of a request that never ended: only its quantities are known, the time not by phase.
fn broken_off(request: RequestId, ticket: Ticket, shares: &[Share], wall: UnixNanos) -> Usage {
    Usage {
        request,
        ticket,
        status: Finish::Error,
        seed: 0,
        tokens: TokenCounts::default(),
        prefill: DeviceNanos::ZERO,
        decode: shares.iter().map(|share| share.1).sum(),
        steps: 0,
        kv: shares.iter().map(|share| share.2).sum(),
        kv_peak_blocks: 0,
        queue: DeviceNanos::ZERO,
        ttft: None,
        wall: DeviceNanos::ZERO,
        submitted_at: wall,
        finished_at: wall,
        saved_by_prefix_cache: DeviceNanos::ZERO,
        saved_by_batching: DeviceNanos::ZERO,
        energy_mj: None,
    }
}
