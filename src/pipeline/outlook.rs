//! Where budgets' windows, and the months of teams and keys, will probably end: what a server's alerts go by, from
//! the ledger alone.
//!
//! Does not know: how to print (`outlook/render.rs`). Invariant: what was spent is what receipts charged; only what is
//! to come is estimated.

mod render;

use std::path::Path;
use std::sync::Arc;

use jiff::tz::TimeZone;

use super::admission::budget_of;
use crate::control::alerts::Watch;
use crate::control::alerts::rules::Rules;
use crate::control::budgets::{Budget, Budgets, Mode, Scope, Spender, Standing};
use crate::control::forecast::{Projection, reaches};
use crate::control::window::{Span, Window};
use crate::control::{Key, rfc3339};
use crate::ledger::{self, LedgerError};
use crate::units::{Picos, UnixNanos};

/// What is foreseen.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Those of the configuration.
    pub budgets: Vec<Budget>,
    /// By what a calendar month's spending is added up, beside all of it.
    pub totals: Vec<Scope>,
    /// Whose months.
    pub zone: TimeZone,
}

/// What is foreseen at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlook {
    pub now: UnixNanos,
    /// That of the last server that wrote the ledger; what was charged in others is left out.
    pub currency: Option<String>,
    /// Budgets first, by name and value, then the totals, by scope and value.
    pub rows: Vec<Foresight>,
}

/// One window that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foresight {
    /// `None`: a total, which has no cap.
    pub budget: Option<String>,
    pub scope: Scope,
    /// Whose; empty for all.
    pub value: String,
    pub window: &'static str,
    /// Up to the budget's end if that comes first.
    pub span: Span,
    pub spent: Picos,
    pub cap: Option<Picos>,
    pub end: End,
}

/// Where a window will end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Projected {
        projection: Projection,
        /// When the cap will be met if all goes on as expected, where that is before the end.
        met: Option<UnixNanos>,
    },
    /// It has none.
    Never,
    /// Too little was charged, or for too short a time, to say anything.
    Unknown,
}

impl Foresight {
    /// Whether as much is spent as may be.
    #[must_use]
    pub fn is_met(&self) -> bool {
        self.cap.is_some_and(|cap| self.spent >= cap)
    }
}

impl Outlook {
    /// Reads the ledger in a data directory; a server may be running. Keys that are deleted have no budgets.
    ///
    /// # Errors
    /// When there is no ledger or it cannot be read.
    pub fn read(
        data_dir: &Path,
        asked: Asked,
        keys: &[Arc<Key>],
        now: UnixNanos,
    ) -> Result<Self, LedgerError> {
        let totals: Vec<Budget> = asked.totals.iter().map(|scope| total(*scope, &asked.zone)).collect();
        let all = total(Scope::All, &asked.zone);
        let living = keys.iter().filter(|key| key.deleted.is_none());
        let of_keys = living.filter_map(|key| budget_of(key));
        let known = asked.budgets.into_iter().chain(of_keys);
        let budgets = Budgets::new(known.chain([all]).chain(totals));
        let rules = budgets.rules();
        let mut watch = Watch::new(Rules { forecasts: true, ..Rules::default() }, "");
        let since = budgets.counts_since(now).into_iter().chain(watch.counts_since(&rules, now)).min();
        let currency = ledger::charges(data_dir, since.unwrap_or(now), |charge| {
            let who = Spender::of(charge.key_id, &charge.tenant, charge.user, &charge.tags);
            budgets.replay(&who, charge.at, charge.amount, now);
            watch.replay(&rules, &who, charge.at, charge.amount);
        })?;
        let mut standings = budgets.standings(now);
        let untouched: Vec<Standing> =
            rules.iter().filter_map(|rule| untouched(rule, &standings, now)).collect();
        standings.extend(untouched);
        let mut rows: Vec<Foresight> = standings
            .iter()
            // A request that was begun in a window to come, by a clock that was set back since.
            .filter(|standing| standing.span.start <= now)
            .map(|standing| {
                let rule = rules.iter().find(|rule| rule.id == standing.budget);
                let window = rule.expect("accounts are of rules").window;
                foresee(standing, window, watch.projection(standing, now), now)
            })
            .collect();
        rows.sort_by(|a, b| {
            let place = |row: &Foresight| (row.budget.is_none(), row.budget.clone(), row.scope);
            place(a).cmp(&place(b)).then_with(|| a.value.cmp(&b.value))
        });
        Ok(Self { now, currency, rows })
    }
}

/// Ids of totals begin with what no name of a budget has.
const TOTAL: &str = "\0";

/// Counts, and has no cap that could be met.
fn total(scope: Scope, zone: &TimeZone) -> Budget {
    Budget {
        id: format!("{TOTAL}{}", scope.name()),
        scope,
        value: None,
        cap: Picos(i128::MAX),
        window: Window::Month,
        zone: zone.clone(),
        until: None,
        mode: Mode::Observe,
        soft: Vec::new(),
    }
}

/// Where a budget of one value stands that nobody has spent of in this window.
fn untouched(rule: &Budget, standings: &[Standing], now: UnixNanos) -> Option<Standing> {
    let value = if rule.scope == Scope::All { String::new() } else { rule.value.clone()? };
    if standings.iter().any(|standing| standing.budget == rule.id) {
        return None;
    }
    Some(Standing {
        budget: rule.id.clone(),
        scope: rule.scope,
        value,
        mode: rule.mode,
        cap: rule.cap,
        spent: Picos::ZERO,
        leased: Picos::ZERO,
        span: rule.window.around(now, &rule.zone),
        is_each: false,
        until: rule.until,
        reached: Vec::new(),
    })
}

fn foresee(standing: &Standing, window: Window, projection: Option<Projection>, now: UnixNanos) -> Foresight {
    let span = standing.until_end();
    let is_total = standing.budget.starts_with(TOTAL);
    let cap = Some(standing.cap).filter(|_| !is_total);
    let end = match projection {
        _ if span.end.is_none() => End::Never,
        None => End::Unknown,
        Some(projection) => {
            let met = cap.and_then(|cap| reaches(cap, standing.spent, &projection, now, span));
            End::Projected { projection, met }
        }
    };
    Foresight {
        budget: (!is_total).then(|| standing.budget.clone()),
        scope: standing.scope,
        value: standing.value.clone(),
        window: window.name(),
        span,
        spent: standing.spent,
        cap,
        end,
    }
}
