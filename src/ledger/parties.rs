//! Users and tasks: their names, and an hour's rows split over them.
//!
//! Does not know: groups, the calendar.
//! Invariant: the parts of a row, that of nobody included, add up to the row and to what it carries of the house.

use rusqlite::{Connection, params};

use super::rollup::{self, Party};
use super::rows;
use super::showback::{Hour, HourRow, Showback, Split};
use super::store::SqlResult;
use super::sums::Sums;
use crate::units::Picos;

/// Where so many of the ids in a range are asked for, all of the range is read at once.
const SCAN_SHARE: u64 = 16;

/// Names by id, as far as they were asked for.
#[derive(Default)]
pub(super) struct Parties {
    /// Ids count from 1, so that there are no more places than parties.
    known: Vec<Option<Party>>,
}

impl Parties {
    /// Looks up those of these ids that are not known yet; gives their places.
    pub(super) fn learn(
        &mut self,
        connection: &Connection,
        ids: impl Iterator<Item = i64>,
    ) -> SqlResult<Vec<usize>> {
        let mut new = Vec::new();
        for id in ids {
            let place = usize::try_from(id).map_err(|error| rows::invalid(1, error))?;
            if self.known.get(place).is_none_or(Option::is_none) {
                new.push(place);
            }
        }
        new.sort_unstable();
        new.dedup();
        let (Some(&first), Some(&last)) = (new.first(), new.last()) else { return Ok(new) };
        let ids = |place: usize| i64::try_from(place).expect("it was one");
        let by_range = (last - first) as u64 / new.len() as u64 <= SCAN_SHARE;
        let named = |row: &rusqlite::Row<'_>| {
            Ok((row.get::<_, i64>(0)?, Party { user: row.get(1)?, task: row.get(2)? }))
        };
        if by_range {
            let mut query =
                connection.prepare_cached("SELECT id, user, task FROM parties WHERE id BETWEEN ?1 AND ?2")?;
            for row in query.query_map(params![ids(first), ids(last)], named)? {
                // The others would be known without that anybody had heard of them.
                let (id, party) = row?;
                if new.binary_search_by_key(&id, |place| ids(*place)).is_ok() {
                    self.put((id, party))?;
                }
            }
        } else {
            let mut query = connection.prepare_cached("SELECT id, user, task FROM parties WHERE id = ?1")?;
            for &place in &new {
                self.put(query.query_row([ids(place)], named)?)?;
            }
        }
        if new.iter().any(|place| self.known.get(*place).is_none_or(Option::is_none)) {
            return Err(rows::invalid(1, "a roll-up's user or task is missing"));
        }
        Ok(new)
    }

    fn put(&mut self, (id, party): (i64, Party)) -> SqlResult<()> {
        let place = usize::try_from(id).map_err(|error| rows::invalid(0, error))?;
        self.known.resize(self.known.len().max(place + 1), None);
        self.known[place] = Some(party);
        Ok(())
    }

    /// One that was learnt.
    pub(super) fn at(&self, place: usize) -> &Party {
        self.known[place].as_ref().expect("it was learnt before; this is a bug")
    }
}

/// Parts of rows in the order of rows, dimension's place and party's id.
type Parts = Vec<(usize, i64, Sums)>;

/// Hands out each row of an hour in parts: first what has no party, then by party in the order of their names.
/// `learnt` hears of the places of parties that come for the first time, before their parts.
pub(super) fn split(
    connection: &Connection,
    showback: &Showback,
    hour: &Hour<'_>,
    parties: &mut Parties,
    mut learnt: impl FnMut(&Parties, &[usize]),
    mut take: impl FnMut(&HourRow, Option<usize>, &Sums, Picos),
) -> SqlResult<()> {
    let parts: Parts = rollup::parties_of_hour(connection, &showback.dimensions, hour.hour)?;
    let new = parties.learn(connection, parts.iter().map(|part| part.1))?;
    learnt(parties, &new);
    let place = |part: usize| usize::try_from(parts[part].1).expect("it was learnt");
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_unstable_by(|&a, &b| {
        let name = |part| parties.at(place(part));
        parts[a].0.cmp(&parts[b].0).then_with(|| name(a).cmp(name(b)))
    });
    let mut of_rows = order.chunk_by(|&a, &b| parts[a].0 == parts[b].0).peekable();
    for row in hour.rows {
        while of_rows.next_if(|of_row| parts[of_row[0]].0 < row.dimension).is_some() {}
        let of_row = of_rows.next_if(|of_row| parts[of_row[0]].0 == row.dimension).unwrap_or_default();
        let mut rest = row.sums;
        for &part in of_row {
            rest = without(&rest, &parts[part].2)?;
        }
        let mut split = Split::new(row.share, row.sums.money());
        take(row, None, &rest, split.next(rest.money()));
        for &part in of_row {
            let sums = &parts[part].2;
            take(row, Some(place(part)), sums, split.next(sums.money()));
        }
    }
    Ok(())
}

/// What is left of a row.
pub(super) fn without(rest: &Sums, part: &Sums) -> SqlResult<Sums> {
    let more = || rows::invalid(0, "users and tasks have more than all requests; run `obol audit`");
    rest.without(part).ok_or_else(more)
}
