//! What one request has set aside in the budgets that it is under.
//!
//! Invariant: a lease is changed only under the lock of all budgets, and read under its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Account, AccountKey, Budgets, Mode, Refusal, Spender, State, tell};
use crate::units::{Picos, RequestId, UnixNanos};

/// How much is leased, the same in every budget; `None` once it is settled.
#[derive(Debug, Clone)]
pub(super) struct Lease(Arc<Mutex<Option<Picos>>>);

impl Default for Lease {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(Picos::ZERO))))
    }
}

impl Lease {
    fn get(&self) -> MutexGuard<'_, Option<Picos>> {
        // It is set in one go.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that was admitted, until what it cost is on the books.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) request: RequestId,
    pub(super) who: Spender,
    pub(super) admitted: UnixNanos,
    /// The accounts that it counts in, until it is settled.
    keys: Vec<AccountKey>,
    lease: Lease,
    /// Once it is settled.
    charged: Picos,
}

impl Live {
    pub(super) fn new(
        request: RequestId,
        who: Spender,
        admitted: UnixNanos,
        keys: Vec<AccountKey>,
        lease: Lease,
    ) -> Self {
        Self { request, who, admitted, keys, lease, charged: Picos::ZERO }
    }

    /// Counts in one more account.
    pub(super) fn join(&mut self, account: &mut Account) {
        match *self.lease.get() {
            Some(leased) => {
                account.leased += leased;
                account.holds += 1;
                self.keys.push(account.key());
            }
            None => account.spent += self.charged,
        }
    }

    /// Counts no more under a rule, whose accounts are gone.
    pub(super) fn forget(&mut self, rule: &str) {
        self.keys.retain(|key| key.0 != rule);
    }
}

/// A request's claim on the budgets that it is under, from its admission on. It is settled once; dropped before that,
/// it has cost nothing. Kept until what it cost is on the books, so that a budget that is set meanwhile counts it.
#[derive(Debug)]
pub struct Hold {
    budgets: Budgets,
    id: u64,
    lease: Lease,
    throttled: bool,
    bounded: bool,
}

impl Hold {
    pub(super) fn new(budgets: Budgets, id: u64, lease: Lease, (throttled, bounded): (bool, bool)) -> Self {
        Self { budgets, id, lease, throttled, bounded }
    }

    /// Whether it was admitted under a budget that blocks: it may still be refused before it begins.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        self.bounded
    }

    /// Whether a budget is spent that lets requests run only when nobody else's wait.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        self.throttled
    }

    /// In each budget; `None` once it is settled.
    #[cfg(test)]
    pub(super) fn leased(&self) -> Option<Picos> {
        *self.lease.get()
    }

    /// Whether so much is leased.
    #[must_use]
    pub fn has(&self, cost: Picos) -> bool {
        self.lease.get().is_none_or(|leased| cost <= leased)
    }

    /// Makes the lease cover `need`: with as much of `want`, which is more, as there is room for. What it has is
    /// never made less.
    ///
    /// # Errors
    /// When a budget that blocks has no room for `need`. The lease is as it was.
    pub fn extend(&self, need: Picos, want: Picos) -> Result<(), Box<Refusal>> {
        if self.has(need) {
            return Ok(());
        }
        let mut state = self.budgets.state();
        let State { live, accounts, crossings, .. } = &mut *state;
        let mut leased = self.lease.get();
        let Some(mine) = *leased else { return Ok(()) };
        let keys = &live[&self.id].keys;
        let mut target = want.max(need);
        for key in keys {
            let account = accounts.get_mut(key).expect("an account is kept while a hold counts on it");
            if account.rule.mode != Mode::Block {
                continue;
            }
            let room = account.room(mine);
            if room < need {
                let refusal = account.refusal(mine, need, false);
                // One that runs ends now, and may leave enough for another.
                account.exhausted |= mine == Picos::ZERO && account.spent + need > account.rule.cap;
                tell(account, crossings);
                return Err(refusal);
            }
            target = target.min(room);
        }
        for key in keys {
            let account = accounts.get_mut(key).expect("an account is kept while a hold counts on it");
            account.leased += target - mine;
            assert!(
                account.rule.mode != Mode::Block || account.spent + account.leased <= account.rule.cap,
                "a lease is within the cap"
            );
        }
        *leased = Some(target);
        Ok(())
    }

    /// The request has ended and cost `cost`: what of it is charged, which is all that there is room for in the
    /// budgets that block, and never less than what was leased for it. A second time nothing more is counted.
    pub fn settle(&self, cost: Picos) -> Picos {
        let mut state = self.budgets.state();
        let State { live, accounts, crossings, .. } = &mut *state;
        let Some(mine) = self.lease.get().take() else { return cost };
        let live = live.get_mut(&self.id).expect("a request is known while its hold is");
        let keys = std::mem::take(&mut live.keys);
        let mut charged = cost;
        for key in &keys {
            let account = &accounts[key];
            if account.rule.mode == Mode::Block {
                charged = charged.min(account.room(mine).max(mine));
            }
        }
        for key in &keys {
            let account = accounts.get_mut(key).expect("an account is kept while a hold counts on it");
            account.leased = account.leased - mine;
            account.spent += charged;
            account.holds -= 1;
            tell(account, crossings);
        }
        live.charged = charged;
        charged
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.settle(Picos::ZERO);
        self.budgets.state().live.remove(&self.id);
    }
}
