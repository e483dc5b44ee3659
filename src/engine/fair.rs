//! What each tenant was given of the device, by its weight: who was given least goes first ("virtual token counter"
//! of "Fairness in Serving Large Language Models", OSDI 2024, counting charged device time in place of tokens).
//! Knows no request, queue or step.
//!
//! Invariants: a counter only grows; a tenant that comes back is at least where the others are, so nobody saves up.

use std::collections::HashMap;
use std::sync::Arc;

use crate::config::{Weight, Weights};
use crate::units::DeviceNanos;

/// A tenant inside the engine, from its first request on until it is forgotten.
pub(super) type Account = usize;

/// Device time by weight, so finely that weights lose nothing to rounding.
pub(super) type Service = u128;

/// As much as a nanosecond of a tenant of weight 1 counts.
const NANOSECOND: u128 = 1_000_000_000_000;

/// So many tenants are kept before idle ones are forgotten.
const KEPT: usize = 64;

struct Tenant {
    name: Arc<str>,
    /// What a nanosecond counts.
    rate: Service,
    service: Service,
    /// Requests that the engine has.
    requests: usize,
}

pub(super) struct Fair {
    /// `None`: all are one.
    weights: Option<Weights>,
    tenants: Vec<Tenant>,
    by_name: HashMap<Arc<str>, Account>,
    /// Accounts that nobody has.
    vacant: Vec<Account>,
    forget_at: usize,
    /// Tenants with requests that the engine has.
    present: usize,
}

impl Fair {
    pub(super) fn new(weights: Option<Weights>) -> Self {
        let (tenants, by_name, vacant) = (Vec::new(), HashMap::new(), Vec::new());
        Self { weights, tenants, by_name, vacant, forget_at: KEPT, present: 0 }
    }

    /// Accounts are below this.
    pub(super) fn len(&self) -> usize {
        self.tenants.len()
    }

    /// A request comes: its tenant's account. `level` is where those are who wait.
    pub(super) fn join(&mut self, name: &Arc<str>, level: Service) -> Account {
        let weight = self.weights.as_ref().map(|weights| weights.of(name));
        let name = if weight.is_some() { name.clone() } else { "".into() };
        if let Some(account) = self.by_name.get(&name).copied() {
            let requests = &mut self.tenants[account].requests;
            self.present += usize::from(*requests == 0);
            *requests += 1;
            return account;
        }
        if self.by_name.len() >= self.forget_at {
            self.forget(level);
        }
        let millionths = u128::from(weight.unwrap_or(Weight::ONE).millionths());
        let tenant =
            Tenant { name: name.clone(), rate: NANOSECOND * 1_000_000 / millionths, service: 0, requests: 1 };
        let account = match self.vacant.pop() {
            Some(account) => {
                self.tenants[account] = tenant;
                account
            }
            None => {
                self.tenants.push(tenant);
                self.tenants.len() - 1
            }
        };
        self.by_name.insert(name, account);
        self.present += 1;
        account
    }

    /// Whether the engine has one request of the tenant.
    pub(super) fn has_one(&self, account: Account) -> bool {
        self.tenants[account].requests == 1
    }

    /// A request is gone.
    pub(super) fn leave(&mut self, account: Account) {
        let requests = &mut self.tenants[account].requests;
        *requests -= 1;
        self.present -= usize::from(*requests == 0);
    }

    /// How many tenants the engine has requests of.
    pub(super) fn present(&self) -> usize {
        self.present
    }

    /// Idle tenants who would be lifted to `level` anyway are as good as new.
    fn forget(&mut self, level: Service) {
        for (account, tenant) in self.tenants.iter().enumerate() {
            let idle = tenant.requests == 0 && tenant.service <= level;
            if idle && self.by_name.get(&tenant.name) == Some(&account) {
                self.by_name.remove(&tenant.name);
                self.vacant.push(account);
            }
        }
        self.forget_at = KEPT.max(2 * self.by_name.len());
    }

    /// The tenant was away.
    pub(super) fn lift(&mut self, account: Account, level: Service) {
        let service = &mut self.tenants[account].service;
        *service = level.max(*service);
    }

    pub(super) fn charge(&mut self, account: Account, time: DeviceNanos) {
        self.tenants[account].service += self.worth(account, time);
    }

    /// What `time` counts for the tenant.
    pub(super) fn worth(&self, account: Account, time: DeviceNanos) -> Service {
        u128::from(time.0) * self.tenants[account].rate
    }

    /// What the tenant was given; nothing where there is none.
    pub(super) fn service(&self, account: Account) -> Service {
        self.tenants.get(account).map_or(0, |tenant| tenant.service)
    }

    /// As many sequences by the tenant's weight.
    pub(super) fn weighed(&self, account: Account, sequences: usize) -> u128 {
        sequences as u128 * self.tenants[account].rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fair(weights: &[(&str, &str)]) -> Fair {
        let weights = weights.iter().map(|(name, weight)| ((*name).to_owned(), weight.parse().unwrap()));
        Fair::new(Some(Weights::new(weights)))
    }

    #[test]
    fn time_counts_by_weight_and_who_was_away_is_lifted() {
        let mut fair = fair(&[("big", "4")]);
        let [big, small] = ["big", "small"].map(|name| fair.join(&name.into(), 0));
        fair.charge(big, DeviceNanos(400));
        fair.charge(small, DeviceNanos(100));
        assert_eq!(fair.service(big), fair.service(small));
        assert_eq!(fair.service(small), 100 * NANOSECOND);
        let back = fair.join(&"back".into(), 0);
        fair.lift(back, fair.service(small));
        assert_eq!(fair.service(back), fair.service(small));
        fair.lift(back, 5);
        assert_eq!(fair.service(back), fair.service(small), "what was given stays given");
        assert!(fair.weighed(big, 4) == fair.weighed(small, 1));
    }

    #[test]
    fn without_weights_all_are_one() {
        let mut fair = Fair::new(None);
        assert_eq!(fair.join(&"a".into(), 0), fair.join(&"b".into(), 0));
    }

    #[test]
    fn idle_tenants_are_forgotten_but_for_what_they_owe() {
        let mut fair = fair(&[]);
        for index in 0..10_000 {
            let account = fair.join(&format!("t{index}").into(), 1_000 * NANOSECOND);
            fair.charge(account, DeviceNanos(if index == 3 { 2_000 } else { 10 }));
            fair.leave(account);
        }
        assert!(fair.len() <= 2 * KEPT, "{} accounts", fair.len());
        let debtor = fair.join(&"t3".into(), 0);
        assert_eq!(fair.service(debtor), 2_000 * NANOSECOND);
    }

    #[test]
    fn who_was_away_has_no_credit_for_it() {
        let mut fair = fair(&[("away", "2")]);
        let [away, busy] = ["away", "busy"].map(|name| fair.join(&name.into(), 0));
        fair.charge(away, DeviceNanos(10));
        fair.leave(away);
        assert_eq!(fair.present(), 1);
        for _ in 0..100 {
            fair.charge(busy, DeviceNanos(1_000));
        }
        let level = fair.service(busy);
        let back = fair.join(&"away".into(), level);
        fair.lift(back, level);
        assert_eq!((back, fair.present()), (away, 2));
        assert_eq!(fair.service(back), level, "as if it had been here all the time");
        // From here on each has its weight's part: twice the time for the same count.
        fair.charge(back, DeviceNanos(200));
        fair.charge(busy, DeviceNanos(100));
        assert_eq!(fair.service(back), fair.service(busy));
    }

    #[test]
    fn thousands_of_tenants_are_forgotten_when_they_are_gone() {
        let mut fair = fair(&[]);
        let accounts: Vec<Account> = (0..5_000).map(|n| fair.join(&format!("crowd{n}").into(), 0)).collect();
        assert_eq!((fair.len(), fair.present()), (5_000, 5_000), "nobody who is here is forgotten");
        accounts.iter().for_each(|account| fair.leave(*account));
        for n in 0..20_000 {
            let account = fair.join(&format!("later{n}").into(), NANOSECOND);
            assert!(fair.has_one(account) && fair.present() == 1);
            fair.leave(account);
        }
        assert!(fair.by_name.len() <= 2 * KEPT, "{} names", fair.by_name.len());
        assert!(fair.len() <= 10_000, "{} accounts", fair.len());
    }
}
