//! The part of the audit that adds the receipts up again by hour, and compares that with the roll-ups.
//!
//! Does not know: whether the receipts are right.
//! Invariant: only hours that still have receipts to come are in memory, and the sums over all hours.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use rusqlite::Connection;

use super::calendar::utc_hour;
use super::parties::Parties;
use super::receipt::Receipt;
use super::rollup::{self, Batch, Dimension, Dimensions, Party};
use super::store::SqlResult;
use super::sums::Sums;

pub(super) struct RollupCheck {
    /// The last transaction of each hour that has receipts.
    last: HashMap<u64, i64>,
    running: HashMap<u64, Batch>,
    compared: HashSet<u64>,
    totals: BTreeMap<Dimension, Sums>,
    dimensions: Dimensions,
}

impl RollupCheck {
    pub(super) fn new(connection: &Connection) -> SqlResult<Self> {
        let mut query = connection
            .prepare("SELECT hour, max(id) FROM transactions WHERE kind = 'receipt' GROUP BY hour")?;
        let last = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<SqlResult<_>>()?;
        let dimensions = Dimensions::read(connection)?;
        let (running, compared, totals) = (HashMap::new(), HashSet::new(), BTreeMap::new());
        Ok(Self { last, running, compared, totals, dimensions })
    }

    pub(super) fn add(&mut self, hour: u64, receipt: &Receipt) {
        self.running.entry(hour).or_default().add(hour, receipt);
    }

    /// What differs in the hour of a transaction, if that was the hour's last one.
    pub(super) fn pass(&mut self, connection: &Connection, hour: u64, tx: i64) -> SqlResult<Vec<String>> {
        if self.last.get(&hour) != Some(&tx) {
            return Ok(Vec::new());
        }
        let right = self.running.remove(&hour).unwrap_or_default();
        self.compared.insert(hour);
        for ((_, dimension), sums) in &right.rows {
            *self.totals.entry(dimension.clone()).or_default() += *sums;
        }
        self.compare(connection, hour, &right)
    }

    /// What differs in hours that have roll-ups but no receipts, and over all hours.
    pub(super) fn finish(self, connection: &Connection) -> SqlResult<Vec<String>> {
        let mut hours = HashSet::new();
        for sql in ["SELECT DISTINCT hour FROM rollups", "SELECT DISTINCT hour FROM party_rollups"] {
            let mut query = connection.prepare(sql)?;
            for hour in query.query_map([], |row| row.get(0))? {
                hours.insert(hour?);
            }
        }
        let mut stray: Vec<u64> = hours.difference(&self.compared).copied().collect();
        stray.sort_unstable();
        let mut differences = Vec::new();
        for hour in stray {
            differences.extend(self.compare(connection, hour, &Batch::default())?);
        }
        let totals = rollup::totals(connection, &self.dimensions)?;
        let named = |dimension: &Dimension| format!("all hours, {dimension}");
        differ(&totals, &self.totals, named, &mut differences);
        Ok(differences)
    }

    fn compare(&self, connection: &Connection, hour: u64, right: &Batch) -> SqlResult<Vec<String>> {
        let mut rows: BTreeMap<(u64, Dimension), Sums> = BTreeMap::new();
        rollup::each_hour(connection, &self.dimensions, hour..hour + 1, |hour, of_hour| {
            for (place, sums) in of_hour {
                rows.insert((hour, self.dimensions.sorted[*place].clone()), *sums);
            }
            Ok(())
        })?;
        let mut parties: BTreeMap<(u64, Dimension, Party), Sums> = BTreeMap::new();
        let written = rollup::parties_of_hour(connection, &self.dimensions, hour)?;
        let mut names = Parties::default();
        names.learn(connection, written.iter().map(|row| row.1))?;
        for (dimension, id, sums) in written {
            let place = usize::try_from(id).expect("it was learnt");
            let dimension = self.dimensions.sorted[dimension].clone();
            parties.insert((hour, dimension, names.at(place).clone()), sums);
        }
        let mut differences = Vec::new();
        differ(
            &rows,
            &right.rows,
            |(_, dimension)| format!("{}, {dimension}", utc_hour(hour)),
            &mut differences,
        );
        let named = |(_, dimension, party): &(u64, Dimension, Party)| {
            format!("{}, {dimension}, user {:?}, task {:?}", utc_hour(hour), party.user, party.task)
        };
        differ(&parties, &right.parties, named, &mut differences);
        Ok(differences)
    }
}

fn differ<K: Ord>(
    written: &BTreeMap<K, Sums>,
    right: &BTreeMap<K, Sums>,
    name: impl Fn(&K) -> String,
    differences: &mut Vec<String>,
) {
    for (key, sums) in right {
        match written.get(key) {
            Some(is) if is == sums => {}
            Some(is) => {
                differences.push(format!("roll-up of {}: {is:?} is written, {sums:?} is right", name(key)))
            }
            None => differences.push(format!("roll-up of {} is missing: {sums:?} is right", name(key))),
        }
    }
    for (key, sums) in written.iter().filter(|(key, _)| !right.contains_key(key)) {
        differences.push(format!("roll-up of {} has no receipts: {sums:?} is written", name(key)));
    }
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<&str> = self.labels().filter(|label| !label.is_empty()).collect();
        f.write_str(&labels.join(" "))
    }
}
