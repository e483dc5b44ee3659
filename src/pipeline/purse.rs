//! A request's budgets, asked in the engine's terms and paid from in the ledger's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::control::budgets::{Hold, Refusal};
use crate::ledger::Prices;
use crate::request::{Allowance, Use};
use crate::units::Picos;
use crate::usage::Purse;

/// What a request's budgets have set aside for it, and what its engine's devices cost.
#[derive(Debug)]
pub(super) struct Budgeted {
    hold: Hold,
    /// Of the devices that run each step together.
    prices: Vec<Prices>,
    /// Whether the engine may run it, and why not.
    verdict: Mutex<Verdict>,
}

#[derive(Debug, Default)]
enum Verdict {
    #[default]
    Open,
    Begun,
    Refused(Box<Refusal>),
}

impl Budgeted {
    pub(super) fn new(hold: Hold, prices: &[Prices]) -> Self {
        Self { hold, prices: prices.to_vec(), verdict: Mutex::default() }
    }

    /// Whether it is to run when nobody else waits only.
    pub(super) fn is_throttled(&self) -> bool {
        self.hold.is_throttled()
    }

    /// Whether a budget may still refuse it before it begins.
    pub(super) fn may_refuse(&self) -> bool {
        self.hold.is_bounded()
    }

    /// Why it never began, where a budget is the reason.
    pub(super) fn refusal(&self) -> Option<Box<Refusal>> {
        match &*self.verdict() {
            Verdict::Refused(refusal) => Some(refusal.clone()),
            Verdict::Open | Verdict::Begun => None,
        }
    }

    fn verdict(&self) -> MutexGuard<'_, Verdict> {
        // It is set in one go.
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As a receipt over so much would say.
    fn cost(&self, used: Use) -> Picos {
        self.prices.iter().map(|prices| prices.time(used.device) + prices.memory(used.kv)).sum()
    }
}

impl Allowance for Budgeted {
    fn has(&self, used: Use) -> bool {
        self.hold.has(self.cost(used))
    }

    fn covers(&self, need: Use, want: Use) -> bool {
        let mut verdict = self.verdict();
        match self.hold.extend(self.cost(need), self.cost(want)) {
            Ok(()) => {
                *verdict = Verdict::Begun;
                true
            }
            Err(refusal) => {
                refusal.log();
                if matches!(*verdict, Verdict::Open) {
                    *verdict = Verdict::Refused(refusal);
                }
                false
            }
        }
    }
}

impl Purse for Budgeted {
    fn pay(&self, cost: Picos) -> Picos {
        self.hold.settle(cost)
    }
}
