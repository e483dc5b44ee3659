//! A request that is a line of a batch: who pays for it, and why it comes to the same answer whenever it is run.
//!
//! Does not know: batches, their files, when a line is run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::purse::Budgeted;
use crate::units::Picos;
use crate::usage::Purse;

/// One attempt at a line.
#[derive(Debug)]
pub struct BatchLine {
    /// Of the attempt, and so written that no client can send it.
    pub idempotency_key: String,
    /// What is drawn where the line says no seed: of the line, so that each attempt draws the same.
    pub seed: u64,
    /// Nobody is charged for it.
    on_the_house: AtomicBool,
}

impl BatchLine {
    /// `on_the_house`: the line was charged already.
    #[must_use]
    pub fn new(idempotency_key: String, seed: u64, on_the_house: bool) -> Arc<Self> {
        Arc::new(Self { idempotency_key, seed, on_the_house: AtomicBool::new(on_the_house) })
    }

    /// Its answer will not be delivered: unless it is booked already, nobody is charged for it.
    pub fn give_up(&self) {
        self.on_the_house.store(true, Ordering::Release);
    }

    #[must_use]
    pub fn is_on_the_house(&self) -> bool {
        self.on_the_house.load(Ordering::Acquire)
    }
}

/// What pays for a line: whoever asked, through their budgets where there are any, or the house.
#[derive(Debug)]
pub(super) struct LinePurse {
    pub(super) line: Arc<BatchLine>,
    pub(super) budgeted: Option<Arc<Budgeted>>,
}

impl Purse for LinePurse {
    fn pay(&self, cost: Picos) -> Picos {
        let due = if self.line.is_on_the_house() { Picos::ZERO } else { cost };
        match &self.budgeted {
            Some(budgeted) => budgeted.pay(due),
            None => due,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_paid_unless_it_was_given_up_or_was_charged_before() {
        let pay =
            |line: &Arc<BatchLine>| LinePurse { line: Arc::clone(line), budgeted: None }.pay(Picos(7)).0;
        let first = BatchLine::new("a".into(), 1, false);
        assert_eq!(pay(&first), 7);
        first.give_up();
        assert_eq!(pay(&first), 0);
        assert_eq!(pay(&BatchLine::new("b".into(), 1, true)), 0);
    }
}
