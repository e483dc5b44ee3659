//! What stands between a request and the engine once its prompt is known: its task's ceilings, its key's limits, its
//! budgets, in this order, so that what is refused takes as little as it can from what comes after.
//!
//! Does: keep the budgets of keys as their keys say; count again at a start what the ledger says was used.
//! Does not know: HTTP, how a budget holds while the request runs (`purse`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::tz::TimeZone;

use super::purse::Budgeted;
use super::{App, Failure, Origin};
use crate::config::{LimitSet, LimitSets, TaskCeilings};
use crate::control::budgets::{Budget, Budgets, Mode, Refusal, Scope, Spender};
use crate::control::foreseen::Foreseen;
use crate::control::limits::{Left, Limiter, Limits, Pass};
use crate::control::tasks::{Call, Called, Ceilings, Progress, Tasks};
use crate::control::window::Window;
use crate::control::{Control, Key, SpanUnit};
use crate::ledger::{Ledger, LedgerError, Prices};
use crate::units::{Picos, UnixNanos};

/// The tier of a key that has no limits of its own stands in its metadata under this name.
const TIER: &str = "tier";
/// How often is looked for keys that another process has changed.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);

/// What an administrator has said about what may be used.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub budgets: Vec<Budget>,
    pub limits: LimitSets,
    pub tasks: Ceilings,
}

impl Policy {
    /// # Errors
    /// When a ceiling is no amount.
    pub fn new(mut budgets: Vec<Budget>, limits: LimitSets, tasks: &TaskCeilings) -> Result<Self, String> {
        if let Some(cost) = &tasks.cost {
            let cap = Picos::parse(cost).map_err(|problem| format!("tasks.max_cost: {problem}"))?;
            budgets.push(Budget {
                id: "task ceiling".to_owned(),
                scope: Scope::Task,
                value: None,
                cap,
                window: Window::Lifetime,
                zone: TimeZone::UTC,
                until: None,
                mode: Mode::Block,
                soft: vec![100],
            });
        }
        let tasks = Ceilings { calls: tasks.calls, depth: tasks.depth, repeats: tasks.repeats };
        Ok(Self { budgets, limits, tasks })
    }
}

/// Shared by all requests.
#[derive(Debug)]
pub struct Admission {
    budgets: Budgets,
    limiter: Limiter,
    limits: LimitSets,
    tasks: Tasks,
    ceilings: Ceilings,
    /// The keys whose budgets are set, as they stood then.
    keys: Mutex<HashMap<String, Arc<Key>>>,
    /// Held while a key's budget is set.
    changing: Mutex<()>,
}

/// A request that may run.
pub(super) struct Admitted {
    pub(super) called: Option<Called>,
    pub(super) budgeted: Option<Arc<Budgeted>>,
    pub(super) pass: Option<Pass>,
    pub(super) left: Left,
}

impl Admission {
    /// With what the ledger says was charged in the budgets' windows so far, and how often tasks have called.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn new(
        policy: Policy,
        keys: impl IntoIterator<Item = Arc<Key>>,
        ledger: &Ledger,
        now: UnixNanos,
    ) -> Result<Self, LedgerError> {
        let keys: HashMap<String, Arc<Key>> = keys.into_iter().map(|key| (key.id.0.clone(), key)).collect();
        let of_keys = keys.values().filter_map(|key| budget_of(key));
        let budgets = Budgets::new(policy.budgets.into_iter().chain(of_keys));
        let tasks = Tasks::default();
        let counts = policy.tasks.calls.is_some().then_some(UnixNanos(0));
        if let Some(since) = budgets.counts_since(now).into_iter().chain(counts).min() {
            ledger.charges(since, |charge| {
                let who = Spender::of(charge.key_id, &charge.tenant, charge.user, &charge.tags);
                budgets.replay(&who, charge.at, charge.amount, now);
                if let Some(task) = charge.tags.get("task").filter(|_| charge.first) {
                    tasks.replay(&charge.tenant, task, charge.at);
                }
            })?;
        }
        let (limiter, limits, ceilings) = (Limiter::default(), policy.limits, policy.tasks);
        let (keys, changing) = (Mutex::new(keys), Mutex::default());
        Ok(Self { budgets, limiter, limits, tasks, ceilings, keys, changing })
    }

    #[must_use]
    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// What a tenant's task has done since this server knows of it.
    #[must_use]
    pub fn progress(&self, tenant: &str, task: &str) -> Option<Progress> {
        self.tasks.progress(tenant, task)
    }

    /// Admits a request, or says why not.
    pub(super) fn admit(
        &self,
        app: &App,
        origin: &Origin,
        prompts: &[Vec<u32>],
        prices: &[Prices],
    ) -> Result<Admitted, Failure> {
        let now = app.clock().wall();
        let mut called = None;
        if let Some(task) = origin.tags.get("task") {
            let call = Call {
                request: &origin.request,
                depth: origin.depth,
                parent: origin.parent.as_deref(),
                hash: hash(prompts),
            };
            let counted = self.tasks.call(&origin.tenant, task, &call, &self.ceilings, now);
            called = Some(counted.map_err(Failure::TaskHalted)?);
        }
        let (pass, left) = self.pass(app, origin, prompts.iter().map(|prompt| prompt.len() as u64).sum())?;
        let budgeted = self.budgeted(app, origin, prices, now)?;
        Ok(Admitted { called, budgeted, pass, left })
    }

    /// What is left of the key's limits.
    #[must_use]
    pub fn left(&self, app: &App, key: &Key) -> Left {
        let limits = limits_of(key, &self.limits);
        if limits.is_none() {
            Left::default()
        } else {
            self.limiter.left(&key.id.0, &limits, app.clock().now())
        }
    }

    fn pass(&self, app: &App, origin: &Origin, prompt: u64) -> Result<(Option<Pass>, Left), Failure> {
        let Some(key) = &origin.key else { return Ok((None, Left::default())) };
        let limits = limits_of(key, &self.limits);
        if limits.is_none() {
            return Ok((None, Left::default()));
        }
        let admitted = self.limiter.admit(&key.id.0, &limits, prompt, app.clock().now());
        admitted.map(|(pass, left)| (Some(pass), left)).map_err(Failure::RateLimited)
    }

    /// What a request's budgets set aside for it. With a key it has that even where it is under no budget yet: one
    /// may come while it runs.
    fn budgeted(
        &self,
        app: &App,
        origin: &Origin,
        prices: &[Prices],
        now: UnixNanos,
    ) -> Result<Option<Arc<Budgeted>>, Failure> {
        // What was charged before may not be refused for want of money.
        let paid = origin.batch.as_ref().is_some_and(|line| line.is_on_the_house());
        if paid || (self.budgets.is_empty() && origin.key.is_none()) {
            return Ok(None);
        }
        let key = origin.key.as_ref().map(|key| key.id.0.clone());
        let who = Spender::of(key, &origin.tenant, origin.user.clone(), &origin.tags);
        match self.budgets.admit(&origin.request, &who, now) {
            Ok(hold) => Ok(Some(Arc::new(Budgeted::new(hold, prices)))),
            Err(refusal) => {
                refusal.log();
                Err(refused(app, refusal))
            }
        }
    }

    /// Whether a request of the key was seen, or its budget was set.
    fn is_known(&self, key: &Key) -> bool {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&key.id.0)
    }

    /// Whether the key's budget is as it says. A state that is older than the one that is known changes nothing.
    fn is_heeded(&self, key: &Arc<Key>) -> bool {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&key.id.0).is_some_and(|known| Arc::ptr_eq(known, key) || known.updated > key.updated)
    }

    /// Sets the key's budget where the key has changed since it was set: from then on the key's requests that run
    /// count in it too. May read all receipts of the key.
    ///
    /// # Errors
    /// When the ledger cannot be read; then the budget counts what it knows of, and the next one who asks tries again.
    pub(super) fn heed(&self, ledger: &Ledger, key: &Arc<Key>, now: UnixNanos) -> Result<(), LedgerError> {
        // One change at a time. Requests of other keys are admitted meanwhile.
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_heeded(key) {
            return Ok(());
        }
        match budget_of(key) {
            None => self.budgets.remove(&name_of_budget(key)),
            Some(rule) => {
                let (id, since) = (rule.id.clone(), rule.window.around(now, &rule.zone).start);
                if self.budgets.set(rule) {
                    ledger.charges_of_key(&key.id.0, since, |charge| {
                        self.budgets.recount(&id, &charge.request, charge.at, charge.amount, now);
                    })?;
                    self.budgets.counted(&id);
                }
            }
        }
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.insert(key.id.0.clone(), Arc::clone(key));
        Ok(())
    }
}

/// Sets the key's budget where the key has changed, on a thread that may wait for the disk.
///
/// # Errors
/// `LedgerUnavailable` when what the key has spent cannot be read.
pub async fn heed(app: &Arc<App>, key: &Arc<Key>) -> Result<(), Failure> {
    if app.admission().is_heeded(key) {
        return Ok(());
    }
    let (app, key) = (Arc::clone(app), Arc::clone(key));
    let work = tokio::task::spawn_blocking(move || {
        app.admission().heed(app.ledger(), &key, app.clock().wall()).map_err(|error| {
            tracing::error!(%error, "cannot read what a key has spent");
            Failure::LedgerUnavailable
        })
    });
    match work.await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(Failure::Draining),
    }
}

/// Sets the budgets of keys that another process changes while requests run; without end. Who asks with a changed key
/// is never admitted before its budget is set, with this or without.
pub async fn follow(app: Arc<App>, control: Control) {
    let mut seen = None;
    let mut tick = tokio::time::interval(FOLLOW_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let keys = control.clone();
        let look = move || keys.changed_since(seen);
        let (now, changed) = match tokio::task::spawn_blocking(look).await {
            Ok(Ok(looked)) => looked,
            Ok(Err(error)) => {
                // Requests with a key hear of it too, and the next look tries again.
                tracing::warn!(%error, "cannot see whether keys have changed");
                continue;
            }
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => return,
        };
        let mut behind = false;
        for key in changed {
            // Those that nobody has used yet are set when they are.
            if app.admission().is_known(&key) {
                behind |= heed(&app, &key).await.is_err();
            }
        }
        // What could not be set is looked at again.
        seen = if behind { seen } else { Some(now) };
    }
}

/// The refusal as clients hear it.
pub(super) fn refused(app: &App, refusal: Box<Refusal>) -> Failure {
    let now = app.clock().wall();
    let wait = refusal.resets_at.map(|at| at.0.saturating_sub(now.0).div_ceil(1_000_000_000));
    Failure::Budget(refusal, wait)
}

fn name_of_budget(key: &Key) -> String {
    format!("key {}", key.id.0)
}

/// The budget that a key has in its settings.
pub(super) fn budget_of(key: &Key) -> Option<Budget> {
    let settings = &key.settings;
    let window = settings.budget_duration.map_or(Window::Lifetime, |span| {
        let (count, since) = (u64::from(span.count()), key.created.0 / 1_000_000_000);
        let every = |seconds: u64| Window::Every { seconds: count * seconds, since };
        match (span.unit(), span.count()) {
            (SpanUnit::Hour, 1) => Window::Hour,
            (SpanUnit::Day, 1) => Window::Day,
            (SpanUnit::Day, 7) | (SpanUnit::Week, 1) => Window::Week,
            (SpanUnit::Month, 1) => Window::Month,
            (SpanUnit::Month, months) => Window::Months { count: months, since },
            (SpanUnit::Second, _) => every(1),
            (SpanUnit::Minute, _) => every(60),
            (SpanUnit::Hour, _) => every(3_600),
            (SpanUnit::Day, _) => every(86_400),
            (SpanUnit::Week, _) => every(7 * 86_400),
        }
    });
    let (cap, mode) = match (settings.max_budget, settings.soft_budget) {
        (Some(cap), _) => (cap, Mode::Block),
        (None, Some(soft)) => (soft, Mode::Warn),
        (None, None) => return None,
    };
    // The soft budget is an alert below the cap, in whole per cent, which is as exact as alerts are.
    let soft = settings.soft_budget.filter(|_| cap.0 > 0).map(|soft| (soft.0 * 100 / cap.0).clamp(1, 100));
    let mut alerts: Vec<u8> =
        soft.into_iter().chain([100]).map(|percent| u8::try_from(percent).expect("at most 100")).collect();
    alerts.dedup();
    Some(Budget {
        id: name_of_budget(key),
        scope: Scope::Key,
        value: Some(key.id.0.clone()),
        cap,
        window,
        zone: TimeZone::UTC,
        until: None,
        mode,
        soft: alerts,
    })
}

/// When the window of a key's budget ends that is open now.
#[must_use]
pub fn budget_resets_at(key: &Key, now: UnixNanos) -> Option<UnixNanos> {
    let rule = budget_of(key)?;
    rule.window.around(now, &rule.zone).end
}

/// What of all that is foreseen is where the window of a key's budget will end that is open now.
#[must_use]
pub fn foreseen<'a>(all: &'a [Foreseen], key: &Key, now: UnixNanos) -> Option<&'a Foreseen> {
    // A window that was changed since is another one.
    let end = budget_resets_at(key, now)?;
    let name = name_of_budget(key);
    all.iter().find(|foreseen| foreseen.budget == name && foreseen.end == end)
}

/// A key's own limits, or those of its tier.
fn limits_of(key: &Key, sets: &LimitSets) -> Limits {
    let settings = &key.settings;
    let tier = settings.metadata.get(TIER).and_then(|tier| tier.as_str());
    let LimitSet { rpm, tpm, parallel } = tier.and_then(|tier| sets.tiers.get(tier)).unwrap_or(&sets.default);
    Limits {
        requests: settings.rpm_limit.or(*rpm),
        tokens: settings.tpm_limit.or(*tpm),
        parallel: settings.max_parallel_requests.or(*parallel),
    }
}

fn hash(prompts: &[Vec<u32>]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for prompt in prompts {
        // Where one ends and the next begins.
        hasher.update(&(prompt.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(prompt));
    }
    let hash = hasher.finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::control::{KeyId, KeySettings};

    /// 2026-11-22T16:40:00Z
    const NOW: UnixNanos = UnixNanos(1_795_365_600_000_000_000);

    fn key(settings: KeySettings) -> Key {
        let created = UnixNanos(NOW.0 - 100 * 86_400_000_000_000);
        Key {
            id: KeyId::new(),
            name: "sk-...abcd".into(),
            settings,
            created,
            created_by: "cli".into(),
            updated: created,
            updated_by: "cli".into(),
            deleted: None,
        }
    }

    fn of(span: Option<&str>, cap: Option<i128>, soft: Option<i128>) -> Key {
        key(KeySettings {
            budget_duration: span.map(|span| span.parse().expect("a span")),
            max_budget: cap.map(Picos),
            soft_budget: soft.map(Picos),
            ..KeySettings::default()
        })
    }

    #[test]
    fn a_keys_budget_has_the_window_that_its_duration_means() {
        let window = |span| budget_of(&of(span, Some(10), None)).expect("a budget").window;
        assert_eq!(window(None), Window::Lifetime);
        assert_eq!((window(Some("1h")), window(Some("1d"))), (Window::Hour, Window::Day));
        assert_eq!((window(Some("7d")), window(Some("1mo"))), (Window::Week, Window::Month));
        let since = (NOW.0 / 1_000_000_000) - 100 * 86_400;
        assert_eq!(window(Some("30d")), Window::Every { seconds: 30 * 86_400, since });
        assert_eq!(window(Some("3mo")), Window::Months { count: 3, since });
        let resets = budget_resets_at(&of(Some("30d"), Some(10), None), NOW).expect("it begins anew");
        assert_eq!(resets, UnixNanos(NOW.0 + 20 * 86_400_000_000_000));
        assert_eq!(budget_resets_at(&of(None, Some(10), None), NOW), None);
        assert_eq!(budget_resets_at(&of(Some("1d"), None, None), NOW), None, "there is no budget");
    }

    #[test]
    fn a_soft_budget_alone_warns_and_beside_a_cap_it_is_an_alert() {
        let both = budget_of(&of(None, Some(200), Some(150))).expect("a budget");
        assert_eq!((both.mode, both.cap.0, both.soft), (Mode::Block, 200, vec![75, 100]));
        let alone = budget_of(&of(None, None, Some(150))).expect("a budget");
        assert_eq!((alone.mode, alone.cap.0, alone.soft), (Mode::Warn, 150, vec![100]));
    }

    #[test]
    fn limits_are_the_keys_own_or_its_tiers_or_everybodys() {
        let set = |rpm| LimitSet { rpm: Some(rpm), ..LimitSet::default() };
        let sets = LimitSets { default: set(1), tiers: BTreeMap::from([("gold".to_owned(), set(2))]) };
        let mut settings = KeySettings::default();
        assert_eq!(limits_of(&key(settings.clone()), &sets).requests, Some(1));
        settings.metadata.insert(TIER.into(), "gold".into());
        assert_eq!(limits_of(&key(settings.clone()), &sets).requests, Some(2));
        settings.rpm_limit = Some(3);
        assert_eq!(limits_of(&key(settings), &sets).requests, Some(3));
    }
}
