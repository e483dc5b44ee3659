//! Budgets: what each scope may spend in a window of time, and the leases that keep it to that.
//!
//! A request that may cost something takes a lease on every budget that it falls under, all or none, renews it as it
//! goes on, and is charged at most what it has leased. So at every moment spent + leased of a budget that blocks is at
//! most its cap, and what was charged is never over it.
//!
//! Does: count, lease, settle, refuse. Does not know: prices of devices, the engine, the database, what a key is.
//! Invariants: each change is one critical section over all budgets that it touches; nothing is spent but by
//! settling, and what a hold has leased is given back when it settles or is dropped; a rule that is set while
//! requests run counts them from then on, each once, by what it has leased and what it is charged in the end.

mod hold;
mod standing;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::tz::TimeZone;

pub use hold::Hold;
use hold::{Lease, Live};
pub use standing::{Crossing, Standing};

use super::window::{Span, Window};
use crate::units::{Picos, RequestId, UnixNanos};

/// By what requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// All requests.
    All,
    Key,
    Team,
    Feature,
    User,
    Environment,
    /// An agent's whole run.
    Task,
}

impl Scope {
    pub const ALL: [Self; 7] =
        [Self::All, Self::Key, Self::Team, Self::Feature, Self::User, Self::Environment, Self::Task];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Key => "key",
            Self::Team => "team",
            Self::Feature => "feature",
            Self::User => "user",
            Self::Environment => "environment",
            Self::Task => "task",
        }
    }

    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// What a budget does once it is spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Counts, and says nothing.
    Observe,
    /// Raises its alerts.
    Warn,
    /// Requests run when nobody else's wait.
    Throttle,
    /// Requests are refused, and running ones end.
    Block,
}

impl Mode {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Warn => "warn",
            Self::Throttle => "throttle",
            Self::Block => "block",
        }
    }

    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Observe, Self::Warn, Self::Throttle, Self::Block].into_iter().find(|mode| mode.name() == name)
    }
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Names it in errors, alerts and reports.
    pub id: String,
    pub scope: Scope,
    /// Whose; `None`: each value of the scope has one of its own.
    pub value: Option<String>,
    pub cap: Picos,
    pub window: Window,
    /// Whose calendar the window follows.
    pub zone: TimeZone,
    /// From then on nothing may be spent any more.
    pub until: Option<UnixNanos>,
    pub mode: Mode,
    /// Per cent of the cap at which an alert is raised, ascending, each once a window.
    pub soft: Vec<u8>,
}

impl Budget {
    /// Whose the budget is, if the request is under it.
    #[must_use]
    pub fn whose<'a>(&self, who: &'a Spender) -> Option<&'a str> {
        let value = who.value(self.scope)?;
        self.value.as_deref().is_none_or(|only| only == value).then_some(value)
    }
}

/// Whom a request's cost is counted for: a value for each scope that it has one in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spender {
    pub key: Option<String>,
    pub team: Option<String>,
    pub feature: Option<String>,
    pub user: Option<String>,
    pub environment: Option<String>,
    pub task: Option<String>,
}

impl Spender {
    /// Whom a request's cost is counted for, from what is on its receipt. Tasks are their tenant's own.
    #[must_use]
    pub fn of(
        key: Option<String>,
        tenant: &str,
        user: Option<String>,
        tags: &BTreeMap<String, String>,
    ) -> Self {
        let tag = |name: &str| tags.get(name).cloned();
        let task = tags.get("task").map(|task| format!("{tenant}/{task}"));
        let (team, feature, environment) = (tag("team"), tag("feature"), tag("environment"));
        Self { key, team, feature, user, environment, task }
    }

    /// Its value in a scope.
    #[must_use]
    pub fn value(&self, scope: Scope) -> Option<&str> {
        match scope {
            Scope::All => Some(""),
            Scope::Key => self.key.as_deref(),
            Scope::Team => self.team.as_deref(),
            Scope::Feature => self.feature.as_deref(),
            Scope::User => self.user.as_deref(),
            Scope::Environment => self.environment.as_deref(),
            Scope::Task => self.task.as_deref(),
        }
    }
}

/// Why a lease was refused: `spent + leased + wanted` is over `cap`, or the budget has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub budget: String,
    pub scope: Scope,
    pub value: String,
    pub cap: Picos,
    pub spent: Picos,
    /// By others.
    pub leased: Picos,
    /// The whole lease that was asked for.
    pub wanted: Picos,
    pub window: Window,
    /// When the budget begins anew.
    pub resets_at: Option<UnixNanos>,
    /// The budget's end date has passed.
    pub ended: bool,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { budget, scope, value, cap, spent, leased, window, ended, .. } = self;
        let whose = if *scope == Scope::All {
            "all requests".to_owned()
        } else {
            format!("{} {value:?}", scope.name())
        };
        if *ended {
            return write!(f, "the budget {budget:?} of {whose} has ended");
        }
        write!(
            f,
            "the budget {budget:?} of {whose} is spent: {} of {} in this {}, and {} is set aside for requests that run",
            spent.decimal(),
            cap.decimal(),
            window.name(),
            leased.decimal()
        )
    }
}

impl Refusal {
    /// With the figures that justify it: unless the budget has ended, `spent + leased + wanted > cap`.
    pub fn log(&self) {
        tracing::info!(
            budget = self.budget,
            scope = self.scope.name(),
            value = self.value,
            spent = self.spent.0,
            leased = self.leased.0,
            wanted = self.wanted.0,
            cap = self.cap.0,
            ended = self.ended,
            "refused by a budget"
        );
    }
}

/// A budget's account: its id, whose, and the beginning of the window.
type AccountKey = (String, String, UnixNanos);

#[derive(Debug)]
struct Account {
    rule: Arc<Budget>,
    value: String,
    span: Span,
    spent: Picos,
    leased: Picos,
    /// Holds that count on it; while there are any it is kept.
    holds: usize,
    /// How many of the rule's soft limits were reached.
    raised: usize,
    /// What is left was too little for a request to begin, whoever else had leased what.
    exhausted: bool,
}

impl Account {
    fn key(&self) -> AccountKey {
        (self.rule.id.clone(), self.value.clone(), self.span.start)
    }

    fn has_ended(&self, now: UnixNanos) -> bool {
        self.rule.until.is_some_and(|until| now >= until)
    }

    fn refusal(&self, mine: Picos, wanted: Picos, ended: bool) -> Box<Refusal> {
        Box::new(Refusal {
            budget: self.rule.id.clone(),
            scope: self.rule.scope,
            value: self.value.clone(),
            cap: self.rule.cap,
            spent: self.spent,
            leased: self.leased - mine,
            wanted,
            window: self.rule.window,
            resets_at: self.span.end,
            ended,
        })
    }

    /// What a hold that has leased `mine` may have in all.
    fn room(&self, mine: Picos) -> Picos {
        Picos((self.rule.cap.0 - self.spent.0 - (self.leased.0 - mine.0)).max(0))
    }
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Arc<Budget>>,
    accounts: HashMap<AccountKey, Account>,
    /// The beginning of the latest window of each rule.
    newest: HashMap<String, UnixNanos>,
    crossings: Vec<Crossing>,
    /// Requests that were admitted, until what they cost is on the books.
    live: HashMap<u64, Live>,
    admitted: u64,
    /// Of each rule whose past is being counted: the requests that count by themselves.
    counting: HashMap<String, HashSet<RequestId>>,
}

/// All budgets of a server; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Budgets(Arc<Mutex<State>>);

impl Budgets {
    #[must_use]
    pub fn new(rules: impl IntoIterator<Item = Budget>) -> Self {
        let rules = rules.into_iter().map(Arc::new).collect();
        Self(Arc::new(Mutex::new(State { rules, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in here is a sum that would be wrong: what was changed before it is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rules that are in force.
    #[must_use]
    pub fn rules(&self) -> Vec<Arc<Budget>> {
        self.state().rules.clone()
    }

    /// Whether there is anything to count for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state().rules.is_empty()
    }

    /// The earliest beginning of the windows that are open now: what was spent since then must be replayed.
    #[must_use]
    pub fn counts_since(&self, now: UnixNanos) -> Option<UnixNanos> {
        self.state().rules.iter().map(|rule| rule.window.around(now, &rule.zone).start).min()
    }

    /// Counts what was charged for a request that was admitted at `admitted`, before this server started. Alerts of
    /// limits that it reaches were raised then.
    pub fn replay(&self, who: &Spender, admitted: UnixNanos, charged: Picos, now: UnixNanos) {
        let mut state = self.state();
        for rule in state.rules.clone() {
            let span = rule.window.around(admitted, &rule.zone);
            let over = span.end.is_some_and(|end| end <= now);
            if let Some(value) = rule.whose(who).filter(|_| !over) {
                let account = state.account(&rule, value, span);
                account.spent += charged;
                account.raised = reached(account);
            }
        }
    }

    /// Sets or replaces a rule while the server runs. From now on the requests that run count under it too. True where
    /// nothing was counted under it yet: then what was charged before is for `recount`, and `counted` ends that. Until
    /// then it is asked for again.
    pub fn set(&self, rule: Budget) -> bool {
        let mut state = self.state();
        let rule = Arc::new(rule);
        let known = state.rules.iter().position(|known| known.id == rule.id);
        let goes_on = known.filter(|at| {
            let old = &state.rules[*at];
            let same = (old.scope, &old.value, old.window) == (rule.scope, &rule.value, rule.window);
            same && old.zone == rule.zone && !state.counting.contains_key(&rule.id)
        });
        if let Some(at) = goes_on {
            state.rules[at] = Arc::clone(&rule);
            state.replace(&rule);
            return false;
        }
        state.remove(&rule.id);
        state.rules.push(Arc::clone(&rule));
        state.attach(&rule);
        true
    }

    /// Counts under a rule that was just set what `request`, admitted at `admitted`, was charged; unless it counts by
    /// itself, as it ran then or was admitted later.
    pub fn recount(
        &self,
        id: &str,
        request: &RequestId,
        admitted: UnixNanos,
        charged: Picos,
        now: UnixNanos,
    ) {
        let mut state = self.state();
        if state.counting.get(id).is_none_or(|running| running.contains(request)) {
            return;
        }
        let Some(rule) = state.rules.iter().find(|rule| rule.id == id).cloned() else { return };
        let span = rule.window.around(admitted, &rule.zone);
        let over = span.end.is_some_and(|end| end <= now);
        if let Some(value) = rule.value.as_deref().filter(|_| !over) {
            state.account(&rule, value, span).spent += charged;
        }
    }

    /// All that was charged before is counted. Limits that are reached by it are news.
    pub fn counted(&self, id: &str) {
        let mut state = self.state();
        if state.counting.remove(id).is_some() {
            let State { accounts, crossings, .. } = &mut *state;
            accounts
                .values_mut()
                .filter(|account| account.rule.id == id)
                .for_each(|account| tell(account, crossings));
        }
    }

    /// From now on nothing is counted under this rule.
    pub fn remove(&self, id: &str) {
        self.state().remove(id);
    }

    /// Admits a request at `now`: from here on it counts in the windows of this moment, whenever it ends.
    ///
    /// # Errors
    /// When a budget that blocks has nothing left at all.
    pub fn admit(&self, request: &RequestId, who: &Spender, now: UnixNanos) -> Result<Hold, Box<Refusal>> {
        let mut state = self.state();
        let rules: Vec<(Arc<Budget>, String)> = state
            .rules
            .iter()
            .filter_map(|rule| Some((Arc::clone(rule), rule.whose(who)?.to_owned())))
            .collect();
        let mut keys = Vec::with_capacity(rules.len());
        let (mut throttled, mut bounded) = (false, false);
        for (rule, value) in rules {
            let span = rule.window.around(now, &rule.zone);
            let account = state.account(&rule, &value, span);
            let ended = account.has_ended(now);
            let spent = ended || account.room(Picos::ZERO) == Picos::ZERO;
            match rule.mode {
                Mode::Block if spent => return Err(account.refusal(Picos::ZERO, Picos(1), ended)),
                Mode::Throttle => throttled |= spent,
                _ => {}
            }
            bounded |= rule.mode == Mode::Block;
            keys.push(account.key());
        }
        for key in &keys {
            state.accounts.get_mut(key).expect("it was just found").holds += 1;
            if let Some(running) = state.counting.get_mut(&key.0) {
                running.insert(request.clone());
            }
        }
        let lease = Lease::default();
        let live = Live::new(request.clone(), who.clone(), now, keys, lease.clone());
        state.admitted += 1;
        let id = state.admitted;
        state.live.insert(id, live);
        drop(state);
        Ok(Hold::new(self.clone(), id, lease, (throttled, bounded)))
    }

    /// Soft limits and caps that were reached since this was asked last.
    #[must_use]
    pub fn take_crossings(&self) -> Vec<Crossing> {
        std::mem::take(&mut self.state().crossings)
    }

    /// Where the windows stand that are open at `now`, in the order of budgets and values.
    #[must_use]
    pub fn standings(&self, now: UnixNanos) -> Vec<Standing> {
        let state = self.state();
        let open = |account: &&Account| account.span.end.is_none_or(|end| now < end);
        let mut standings: Vec<Standing> = state
            .accounts
            .values()
            .filter(open)
            .map(|account| Standing {
                budget: account.rule.id.clone(),
                scope: account.rule.scope,
                value: account.value.clone(),
                mode: account.rule.mode,
                cap: account.rule.cap,
                spent: account.spent,
                leased: account.leased,
                span: account.span,
                is_each: account.rule.value.is_none() && account.rule.scope != Scope::All,
                until: account.rule.until,
                reached: account.rule.soft[..reached(account)].to_vec(),
            })
            .collect();
        standings.sort_by(|a, b| (&a.budget, &a.value, a.span).cmp(&(&b.budget, &b.value, b.span)));
        standings
    }
}

impl State {
    /// The account, which is made where there is none; windows that are over and that nobody counts on are dropped.
    fn account(&mut self, rule: &Arc<Budget>, value: &str, span: Span) -> &mut Account {
        let key = (rule.id.clone(), value.to_owned(), span.start);
        let newest = self.newest.entry(rule.id.clone()).or_insert(span.start);
        if *newest < span.start {
            *newest = span.start;
            self.accounts.retain(|_, account| {
                account.holds > 0
                    || account.rule.id != rule.id
                    || account.span.end.is_none_or(|end| end > span.start)
            });
        }
        self.accounts.entry(key).or_insert_with(|| Account {
            rule: Arc::clone(rule),
            value: value.to_owned(),
            span,
            spent: Picos::ZERO,
            leased: Picos::ZERO,
            holds: 0,
            raised: 0,
            exhausted: false,
        })
    }

    /// Another rule of the same name for the same requests in the same windows.
    fn replace(&mut self, rule: &Arc<Budget>) {
        let Self { accounts, crossings, .. } = self;
        for account in accounts.values_mut().filter(|account| account.rule.id == rule.id) {
            if (account.rule.cap, &account.rule.soft) != (rule.cap, &rule.soft) {
                // What is reached of the new limits is news.
                account.raised = 0;
                account.exhausted = false;
            }
            account.rule = Arc::clone(rule);
            tell(account, crossings);
        }
    }

    fn remove(&mut self, id: &str) {
        let known = self.rules.len();
        self.rules.retain(|rule| rule.id != id);
        if self.rules.len() == known {
            return;
        }
        self.accounts.retain(|key, _| key.0 != id);
        self.live.values_mut().for_each(|live| live.forget(id));
        self.newest.remove(id);
        self.counting.remove(id);
    }

    /// Counts the requests that run under a rule that they were not admitted under.
    fn attach(&mut self, rule: &Arc<Budget>) {
        let mut live = std::mem::take(&mut self.live);
        let mut running = HashSet::new();
        for request in live.values_mut() {
            let Some(value) = rule.whose(&request.who) else { continue };
            let account = self.account(rule, value, rule.window.around(request.admitted, &rule.zone));
            request.join(account);
            running.insert(request.request.clone());
        }
        self.live = live;
        self.counting.insert(rule.id.clone(), running);
    }
}

/// Notes the soft limits that an account has reached and had not before.
fn tell(account: &mut Account, crossings: &mut Vec<Crossing>) {
    let known = account.raised;
    account.raised = reached(account).max(known);
    if account.rule.mode == Mode::Observe {
        return;
    }
    crossings.extend((known..account.raised).map(|limit| Crossing {
        budget: account.rule.id.clone(),
        scope: account.rule.scope,
        value: account.value.clone(),
        percent: account.rule.soft[limit],
        spent: account.spent,
        cap: account.rule.cap,
        span: account.span,
    }));
}

/// How many of the soft limits have been reached. A budget that had to refuse is spent, though not to the last unit.
fn reached(account: &Account) -> usize {
    let Budget { soft, cap, .. } = &*account.rule;
    let over = |percent: u8| account.spent.0 * 100 >= cap.0 * i128::from(percent);
    soft.iter().take_while(|percent| over(**percent) || (account.exhausted && **percent <= 100)).count()
}

#[cfg(test)]
mod tests;
