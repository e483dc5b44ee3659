//! What was spent, by whom and on what: groups of roll-up rows, with the house accounts apart.
//!
//! Does: read one snapshot beside a running server; usage cost and fully loaded cost of each group.
//! Does not know: how to print (`render.rs`), who may see it, how the house is split (`showback.rs`).
//! Invariants: sums are ours, in integers; whatever rows are grouped by, those without the label included, they
//! add up to the same total, and with the house and what is open to the bill.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use rusqlite::Connection;

use super::LedgerError;
use super::calendar::{self, Calendar, Part, month_of};
use super::coarse;
use super::entry::Amounts;
use super::parties::{self, Parties};
use super::rollup::{Dimension, Label, Party};
use super::rows;
use super::showback::{Hour, HourRow, Showback, Unit};
use super::store::SqlResult;
use super::sums::Sums;
use crate::units::{BlockNanos, DeviceNanos, Picos, UnixNanos};

/// What rows are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Team,
    Feature,
    Environment,
    CostCenter,
    Key,
    Tenant,
    User,
    /// The run of an agent that the request is part of.
    Task,
    Model,
    Precision,
    Endpoint,
    /// Why it ended: `stop`, `length`, `cancelled`, `budget`, or `error` where the house pays.
    Status,
    /// Its service tier.
    Tier,
    Device,
    /// Clock hour in which the request was settled, and the day and the month in which that begins, in the
    /// calendar's zone.
    Hour,
    Day,
    Month,
}

/// Where a label comes from.
enum Source {
    Dimension(Label),
    Party,
    Calendar(Part),
}

impl By {
    pub const ALL: [Self; 17] = [
        Self::Team,
        Self::Feature,
        Self::Environment,
        Self::CostCenter,
        Self::Key,
        Self::Tenant,
        Self::User,
        Self::Task,
        Self::Model,
        Self::Precision,
        Self::Endpoint,
        Self::Status,
        Self::Tier,
        Self::Device,
        Self::Hour,
        Self::Day,
        Self::Month,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Team => "team",
            Self::Feature => "feature",
            Self::Environment => "environment",
            Self::CostCenter => "cost_center",
            Self::Key => "key",
            Self::Tenant => "tenant",
            Self::User => "user",
            Self::Task => "task",
            Self::Model => "model",
            Self::Precision => "precision",
            Self::Endpoint => "endpoint",
            Self::Status => "status",
            Self::Tier => "service_tier",
            Self::Device => "device",
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    /// By its name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|by| by.as_str() == name)
    }

    fn source(self) -> Source {
        Source::Dimension(match self {
            Self::Team => Label::Team,
            Self::Feature => Label::Feature,
            Self::Environment => Label::Environment,
            Self::CostCenter => Label::CostCenter,
            Self::Key => Label::Key,
            Self::Tenant => Label::Tenant,
            Self::Model => Label::Model,
            Self::Precision => Label::Precision,
            Self::Endpoint => Label::Endpoint,
            Self::Status => Label::Status,
            Self::Tier => Label::Tier,
            Self::Device => Label::Device,
            Self::User | Self::Task => return Source::Party,
            Self::Hour => return Source::Calendar(Part::Hour),
            Self::Day => return Source::Calendar(Part::Day),
            Self::Month => return Source::Calendar(Part::Month),
        })
    }
}

/// What a report is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportQuery {
    pub by: Vec<By>,
    /// Clock hours that begin at or after this.
    pub since: Option<UnixNanos>,
    /// Clock hours that begin before this.
    pub until: Option<UnixNanos>,
    /// Of `Hour`, `Day` and `Month`.
    pub calendar: Calendar,
    /// Rows only of requests that have one of these labels, for each; an empty label is a missing one. The house
    /// and the balances stay those of all requests. `Hour`, `Day` and `Month` have no effect here.
    pub only: Vec<(By, Vec<String>)>,
}

impl ReportQuery {
    /// Over all time, in UTC.
    #[must_use]
    pub fn by(by: &[By]) -> Self {
        Self { by: by.to_vec(), since: None, until: None, calendar: Calendar::utc(), only: Vec::new() }
    }

    /// The labels of a clock hour.
    fn times(&self, hour: u64) -> Vec<String> {
        let label = |by: &By| match by.source() {
            Source::Calendar(part) => Some(self.calendar.label(part, hour)),
            Source::Dimension(_) | Source::Party => None,
        };
        self.by.iter().filter_map(label).collect()
    }

    pub(super) fn open(&self, connection: &Connection) -> SqlResult<Showback> {
        let whole = self.since.is_none() && self.until.is_none();
        Showback::read(connection, calendar::hours(self.since, self.until), whole)
    }
}

/// Sums over the receipts of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spend {
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// Millijoules of those requests whose energy is known; `None` where it is of none.
    pub energy_mj: Option<u64>,
    pub device_time: DeviceNanos,
    pub kv_byte_nanos: u128,
    /// What receipts say: for time and for memory.
    pub usage_cost: Picos,
    pub time_cost: Picos,
    pub memory_cost: Picos,
    /// What the house paid of both, as tiers cost less.
    pub discount: Picos,
    /// With the house's share of each hour.
    pub loaded_cost: Picos,
}

/// One row: the group's values in the order asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub currency: String,
    /// Empty where the requests have no such label.
    pub group: Vec<String>,
    pub spend: Spend,
}

/// One house account, of all devices under one currency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HouseRow {
    pub currency: String,
    pub account: String,
    pub time: DeviceNanos,
    pub kv: BlockNanos,
    pub money: Picos,
}

/// Money of one currency: `bill = usage + house + open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balance {
    pub bill: Picos,
    pub usage: Picos,
    pub house: Picos,
    /// Of requests that have not ended. For a part of time: the work done in it for requests that were settled
    /// after it, less the work done before it for those that were settled in it; so it may be negative.
    pub open: Picos,
    /// The part of `house` that no hour's requests carry.
    pub unallocated: Picos,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub query: ReportQuery,
    pub rows: Vec<Row>,
    pub house: Vec<HouseRow>,
    /// By currency.
    pub balances: BTreeMap<String, Balance>,
}

/// Reads the ledger in a data directory; a server may be running.
///
/// # Errors
/// When there is no ledger or it cannot be read.
pub fn report(data_dir: &Path, query: &ReportQuery) -> Result<Report, LedgerError> {
    let (mut connection, path) = rows::open_for_reading(data_dir)?;
    rows::in_snapshot(&mut connection, &path, |connection| read(connection, query, false))
}

/// `hourly`: without the coarse roll-ups.
pub(super) fn read(connection: &Connection, query: &ReportQuery, hourly: bool) -> SqlResult<Report> {
    let mut showback = query.open(connection)?;
    let mut groups = Groups::new(query, &showback);
    let unit = match groups.with_parties {
        _ if hourly => Unit::Hour,
        true => Unit::Month,
        false => Unit::Day,
    };
    // The labels of a calendar only go up.
    let alike = |hours: Range<u64>| query.times(hours.start) == query.times(hours.end - 1);
    showback.walk(connection, unit, alike, |showback, hour| groups.add(connection, showback, hour))?;
    let house = std::mem::take(&mut groups.house);
    let house = house.into_iter().map(|((currency, account), amounts)| HouseRow {
        currency,
        account,
        time: amounts.time,
        kv: amounts.kv,
        money: amounts.money,
    });
    Ok(Report {
        query: query.clone(),
        house: house.collect(),
        rows: groups.rows(),
        balances: showback.balances,
    })
}

/// Texts by number, each once.
#[derive(Default)]
struct Interned {
    numbers: HashMap<Vec<String>, u32>,
    texts: Vec<Vec<String>>,
}

impl Interned {
    fn number(&mut self, text: Vec<String>) -> u32 {
        if let Some(&number) = self.numbers.get(&text) {
            return number;
        }
        let number = u32::try_from(self.texts.len()).expect("fewer than 2^32 groups");
        self.texts.push(text.clone());
        self.numbers.insert(text, number);
        number
    }
}

/// Rows by group: the labels of the calendar, of the dimension (with the currency first) and of the party.
struct Groups<'a> {
    query: &'a ReportQuery,
    with_parties: bool,
    sums: HashMap<[u32; 3], Spend>,
    /// Without parties: the groups of one time, as neighbouring hours mostly are of one day or month.
    current: (u32, Vec<Option<Spend>>),
    times: Interned,
    dimensions: Interned,
    parties: Interned,
    /// Of each dimension; `None` where the query leaves it out.
    group_of: Vec<Option<u32>>,
    names: Parties,
    /// Of parties met so far, at their places; `None` where the query leaves them out.
    group_of_party: Vec<Option<u32>>,
    house: BTreeMap<(String, String), Amounts>,
}

impl<'a> Groups<'a> {
    fn new(query: &'a ReportQuery, showback: &Showback) -> Self {
        let asked = query.by.iter().chain(query.only.iter().map(|(by, _)| by));
        let mut groups = Self {
            query,
            with_parties: asked.into_iter().any(|by| matches!(by.source(), Source::Party)),
            sums: HashMap::new(),
            current: (0, Vec::new()),
            times: Interned::default(),
            dimensions: Interned::default(),
            parties: Interned::default(),
            group_of: Vec::new(),
            names: Parties::default(),
            group_of_party: Vec::new(),
            house: BTreeMap::new(),
        };
        groups.group_of =
            showback.dimensions.sorted.iter().map(|dimension| groups.dimension_group(dimension)).collect();
        groups
    }

    fn dimension_group(&mut self, dimension: &Dimension) -> Option<u32> {
        let label = |by: &By| match by.source() {
            Source::Dimension(label) => Some(dimension.label(label)),
            Source::Party | Source::Calendar(_) => None,
        };
        let taken = |(by, labels): &(By, Vec<String>)| {
            label(by).is_none_or(|label| labels.iter().any(|only| only == label))
        };
        if !self.query.only.iter().all(taken) {
            return None;
        }
        let labels = self.query.by.iter().filter_map(|by| label(by).map(str::to_owned));
        let currency = dimension.label(Label::Currency).to_owned();
        Some(self.dimensions.number(std::iter::once(currency).chain(labels).collect()))
    }

    fn party_group(&mut self, party: &Party) -> Option<u32> {
        let label = |by: &By| match by {
            By::User => Some(&party.user),
            By::Task => Some(&party.task),
            _ => None,
        };
        let taken = |(by, labels): &(By, Vec<String>)| label(by).is_none_or(|label| labels.contains(label));
        if !self.query.only.iter().all(taken) {
            return None;
        }
        let labels = self.query.by.iter().filter_map(|by| label(by).cloned()).collect();
        Some(self.parties.number(labels))
    }

    fn add(&mut self, connection: &Connection, showback: &Showback, hour: &Hour<'_>) -> SqlResult<()> {
        for ((device, account), amounts) in hour.house {
            let currency = showback.devices[*device].0.clone();
            *self.house.entry((currency, account.clone())).or_default() += *amounts;
        }
        if hour.rows.is_empty() {
            return Ok(());
        }
        let time = self.times.number(self.query.times(hour.hour));
        match self.with_parties {
            true if hour.is_coarse => return self.add_month(connection, showback, hour, time),
            true => return self.add_parties(connection, showback, hour, time),
            false => {}
        }
        if self.current.0 != time {
            self.flush();
            self.current.0 = time;
        }
        self.current.1.resize(self.dimensions.texts.len(), None);
        for row in hour.rows {
            if let Some(group) = self.group_of[row.dimension] {
                let spend = self.current.1[group as usize].get_or_insert_default();
                spend.add(&row.sums, row.share, showback, row);
            }
        }
        Ok(())
    }

    fn flush(&mut self) {
        let party = self.parties.number(Vec::new());
        for (group, spend) in (0..).zip(&mut self.current.1) {
            if let Some(spend) = spend.take() {
                let known = self.sums.insert([self.current.0, group, party], spend);
                assert!(known.is_none(), "hours come in order, so each time comes once");
            }
        }
    }

    /// An hour's rows, each over its parties; what is left has none.
    fn add_parties(
        &mut self,
        connection: &Connection,
        showback: &Showback,
        hour: &Hour<'_>,
        time: u32,
    ) -> SqlResult<()> {
        let mut names = std::mem::take(&mut self.names);
        let nobody = self.party_group(&Party::default());
        let groups = RefCell::new(&mut *self);
        let learnt = |names: &Parties, new: &[usize]| groups.borrow_mut().learn(names, new);
        parties::split(connection, showback, hour, &mut names, learnt, |row, party, sums, share| {
            let mut groups = groups.borrow_mut();
            let party = party.map_or(nobody, |place| groups.group_of_party[place]);
            groups.add_part(time, party, sums, share, showback, row);
        })?;
        self.names = names;
        Ok(())
    }

    /// The same of a month, whose parties' shares are known.
    fn add_month(
        &mut self,
        connection: &Connection,
        showback: &Showback,
        hour: &Hour<'_>,
        time: u32,
    ) -> SqlResult<()> {
        let parts = coarse::parties_of_month(connection, &showback.dimensions, month_of(hour.hour))?;
        let mut names = std::mem::take(&mut self.names);
        let new = names.learn(connection, parts.iter().map(|part| part.1))?;
        self.learn(&names, &new);
        self.names = names;
        let mut rests: Vec<Option<HourRow>> = vec![None; self.group_of.len()];
        hour.rows.iter().for_each(|row| rests[row.dimension] = Some(*row));
        for (dimension, party, loaded) in &parts {
            let row = rests[*dimension].as_mut();
            let row = row.ok_or_else(|| rows::invalid(0, "a month is without its days; run `obol audit`"))?;
            row.sums = parties::without(&row.sums, &loaded.sums)?;
            row.share = row.share - loaded.share;
            let party = self.group_of_party[usize::try_from(*party).expect("it was learnt")];
            self.add_part(time, party, &loaded.sums, loaded.share, showback, row);
        }
        let nobody = self.party_group(&Party::default());
        for row in rests.iter().flatten() {
            self.add_part(time, nobody, &row.sums, row.share, showback, row);
        }
        Ok(())
    }

    /// Finds the groups of parties that are new.
    fn learn(&mut self, names: &Parties, new: &[usize]) {
        for &place in new {
            let group = self.party_group(names.at(place));
            self.group_of_party.resize(self.group_of_party.len().max(place + 1), None);
            self.group_of_party[place] = group;
        }
    }

    fn add_part(
        &mut self,
        time: u32,
        party: Option<u32>,
        sums: &Sums,
        share: Picos,
        showback: &Showback,
        row: &HourRow,
    ) {
        if let (Some(group), Some(party)) = (self.group_of[row.dimension], party)
            && *sums != Sums::default()
        {
            let spend = self.sums.entry([time, group, party]).or_default();
            spend.add(sums, share, showback, row);
        }
    }

    fn rows(mut self) -> Vec<Row> {
        self.flush();
        let mut rows: Vec<Row> = Vec::with_capacity(self.sums.len());
        for ([time, dimension, party], spend) in self.sums {
            let mut times = self.times.texts[time as usize].iter();
            let mut dimensions = self.dimensions.texts[dimension as usize].iter();
            let mut parties = self.parties.texts[party as usize].iter();
            let next = |labels: &mut std::slice::Iter<'_, String>| {
                labels.next().expect("as many labels as are asked for").clone()
            };
            let currency = next(&mut dimensions);
            let group = self.query.by.iter().map(|by| match by.source() {
                Source::Dimension(_) => next(&mut dimensions),
                Source::Party => next(&mut parties),
                Source::Calendar(_) => next(&mut times),
            });
            rows.push(Row { group: group.collect(), currency, spend });
        }
        rows.sort_by(|a, b| (&a.currency, &a.group).cmp(&(&b.currency, &b.group)));
        rows
    }
}

impl Spend {
    /// Adds a row of an hour or a part of it. A request with status `error` is counted, but costs nothing here.
    fn add(&mut self, sums: &Sums, share: Picos, showback: &Showback, row: &HourRow) {
        self.requests += sums.requests;
        self.prompt_tokens += sums.prompt_tokens;
        self.cached_tokens += sums.cached_tokens;
        self.completion_tokens += sums.completion_tokens;
        if sums.metered > 0 {
            *self.energy_mj.get_or_insert(0) += sums.energy_mj;
        }
        if showback.is_error(row) {
            return;
        }
        let bytes_per_block = showback.dimensions.sorted[row.dimension].bytes_per_block;
        self.device_time += sums.device;
        self.kv_byte_nanos += sums.kv.0.saturating_mul(u128::from(bytes_per_block));
        self.time_cost += sums.time;
        self.memory_cost += sums.memory;
        self.discount += sums.discount;
        self.usage_cost += sums.money();
        self.loaded_cost += sums.money() + share;
    }
}
