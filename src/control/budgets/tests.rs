use std::collections::BTreeMap;

use super::*;
use crate::random::Random;

const HOUR: u64 = 3_600_000_000_000;
const NOW: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

fn budget(scope: Scope, value: Option<&str>, cap: i128, window: Window) -> Budget {
    Budget {
        id: format!("{} {}", scope.name(), window.name()),
        scope,
        value: value.map(str::to_owned),
        cap: Picos(cap),
        window,
        zone: TimeZone::UTC,
        until: None,
        mode: Mode::Block,
        soft: vec![50, 100],
    }
}

fn of_team(team: &str) -> Spender {
    Spender { team: Some(team.to_owned()), ..Spender::default() }
}

fn admit(budgets: &Budgets, who: &Spender, at: UnixNanos) -> Result<Hold, Box<Refusal>> {
    budgets.admit(&RequestId::new(), who, at)
}

/// Spent and leased of the only account of a value.
fn stands(budgets: &Budgets, value: &str) -> (i128, i128) {
    let standings = budgets.standings(NOW);
    let found = standings.iter().find(|standing| standing.value == value).expect("an account");
    (found.spent.0, found.leased.0)
}

#[test]
fn a_lease_is_taken_renewed_and_settled() {
    let budgets = Budgets::new([budget(Scope::Team, None, 100, Window::Day)]);
    let hold = admit(&budgets, &of_team("a"), NOW).expect("nothing is spent");
    assert_eq!(hold.extend(Picos(10), Picos(40)), Ok(()));
    assert_eq!(stands(&budgets, "a"), (0, 40));
    assert!(hold.has(Picos(40)) && !hold.has(Picos(41)));
    assert_eq!(hold.extend(Picos(20), Picos(90)), Ok(()), "it has as much");
    assert_eq!(stands(&budgets, "a"), (0, 40));
    let other = admit(&budgets, &of_team("a"), NOW).expect("not all is spent");
    assert_eq!(other.extend(Picos(50), Picos(90)), Ok(()), "as much of 90 as there is");
    assert_eq!(stands(&budgets, "a"), (0, 100));
    let refusal = hold.extend(Picos(41), Picos(60)).expect_err("all is set aside");
    assert_eq!(
        (refusal.spent, refusal.leased, refusal.wanted, refusal.cap),
        (Picos(0), Picos(60), Picos(41), Picos(100))
    );
    assert_eq!(other.settle(Picos(5)), Picos(5));
    assert_eq!(hold.extend(Picos(41), Picos(60)), Ok(()));
    assert_eq!(hold.settle(Picos(63)), Picos(63), "more than was leased, and within the cap");
    assert_eq!(stands(&budgets, "a"), (68, 0));
    drop(admit(&budgets, &of_team("a"), NOW).expect("32 are left"));
    assert_eq!(stands(&budgets, "a"), (68, 0), "it cost nothing");
    let last = admit(&budgets, &of_team("a"), NOW).expect("32 are left");
    last.extend(Picos(30), Picos(30)).expect("there is room");
    assert_eq!(last.settle(Picos(33)), Picos(32), "to the last one");
    // Another team has its own, and what has no team has none.
    assert!(admit(&budgets, &of_team("b"), NOW).expect("its own").extend(Picos(100), Picos(100)).is_ok());
    let free = admit(&budgets, &Spender::default(), NOW).expect("no budget");
    assert_eq!((free.extend(Picos(1_000), Picos(1_000)), free.settle(Picos(777))), (Ok(()), Picos(777)));
}

#[test]
fn all_budgets_or_none() {
    let narrow = Budget { id: "narrow".into(), ..budget(Scope::All, None, 30, Window::Lifetime) };
    let budgets = Budgets::new([budget(Scope::Team, None, 100, Window::Day), narrow]);
    let hold = admit(&budgets, &of_team("a"), NOW).expect("nothing is spent");
    let refusal = hold.extend(Picos(31), Picos(90)).expect_err("over the narrow one");
    assert_eq!(refusal.budget, "narrow");
    assert_eq!((stands(&budgets, "a"), stands(&budgets, "")), ((0, 0), (0, 0)));
    assert_eq!(hold.extend(Picos(20), Picos(90)), Ok(()));
    assert_eq!((stands(&budgets, "a"), stands(&budgets, "")), ((0, 30), (0, 30)));
    assert_eq!(hold.settle(Picos(90)), Picos(30));
    let refusal = admit(&budgets, &of_team("b"), NOW).expect_err("the narrow one is spent");
    assert_eq!((refusal.budget.as_str(), refusal.spent.0, refusal.resets_at), ("narrow", 30, None));
    assert!(
        refusal.to_string().contains("\"narrow\" of all requests is spent: 0.000000000030 of 0.000000000030")
    );
}

#[test]
fn a_request_counts_in_the_window_of_its_admission() {
    let budgets = Budgets::new([budget(Scope::Team, None, 100, Window::Hour)]);
    let hold = admit(&budgets, &of_team("a"), NOW).expect("nothing is spent");
    hold.extend(Picos(80), Picos(80)).expect("there is room");
    let later = UnixNanos(NOW.0 + HOUR);
    let next = admit(&budgets, &of_team("a"), later).expect("a new hour");
    next.extend(Picos(100), Picos(100)).expect("a whole one");
    assert_eq!(hold.settle(Picos(70)), Picos(70));
    let spans: Vec<(i128, i128)> =
        budgets.standings(NOW).iter().map(|standing| (standing.spent.0, standing.leased.0)).collect();
    assert_eq!(spans, [(70, 0), (0, 100)]);
    assert_eq!(budgets.standings(later).len(), 1, "the hour before is over");
    drop(next);
    drop(admit(&budgets, &of_team("b"), UnixNanos(later.0 + HOUR)));
    assert_eq!(budgets.standings(NOW).len(), 1, "old windows are forgotten");
}

#[test]
fn what_was_charged_before_the_start_counts_in_the_open_windows_only() {
    let budgets = Budgets::new([
        budget(Scope::Team, None, 100, Window::Hour),
        budget(Scope::Team, Some("a"), 1_000, Window::Lifetime),
    ]);
    assert_eq!(budgets.counts_since(NOW), Some(UnixNanos(0)));
    budgets.replay(&of_team("a"), UnixNanos(NOW.0 - HOUR), Picos(900), NOW);
    budgets.replay(&of_team("a"), NOW, Picos(60), NOW);
    let spent: Vec<i128> = budgets.standings(NOW).iter().map(|standing| standing.spent.0).collect();
    assert_eq!(spent, [60, 960]);
    let hold = admit(&budgets, &of_team("a"), NOW).expect("40 are left");
    assert!(hold.extend(Picos(41), Picos(41)).is_err());
    hold.extend(Picos(40), Picos(40)).expect("the last ones");
    hold.settle(Picos(40));
    let crossed: Vec<(String, u8)> =
        budgets.take_crossings().into_iter().map(|crossing| (crossing.budget, crossing.percent)).collect();
    let once = [("team hour".to_owned(), 100), ("team lifetime".to_owned(), 100)];
    assert_eq!(crossed, once, "the half was crossed before");
    assert!(budgets.take_crossings().is_empty());
}

#[test]
fn modes_that_do_not_block_count_and_let_pass() {
    for mode in [Mode::Observe, Mode::Warn, Mode::Throttle] {
        let budgets = Budgets::new([Budget { mode, ..budget(Scope::Team, None, 10, Window::Day) }]);
        let hold = admit(&budgets, &of_team("a"), NOW).expect("it never blocks");
        assert_eq!((hold.extend(Picos(50), Picos(60)), hold.settle(Picos(70))), (Ok(()), Picos(70)));
        assert_eq!(stands(&budgets, "a"), (70, 0));
        let next = admit(&budgets, &of_team("a"), NOW).expect("it never blocks");
        assert_eq!(next.is_throttled(), mode == Mode::Throttle);
        assert_eq!(budgets.take_crossings().len(), if mode == Mode::Observe { 0 } else { 2 });
    }
}

#[test]
fn a_budget_that_must_refuse_is_spent() {
    let budgets = Budgets::new([budget(Scope::Team, None, 100, Window::Day)]);
    let percents = || budgets.take_crossings().iter().map(|crossing| crossing.percent).collect::<Vec<_>>();
    let first = admit(&budgets, &of_team("a"), NOW).expect("nothing is spent");
    first.extend(Picos(90), Picos(90)).expect("there is room");
    let other = admit(&budgets, &of_team("a"), NOW).expect("ten are left");
    other.extend(Picos(20), Picos(20)).expect_err("the first one has leased too much");
    assert_eq!(percents(), [0; 0], "that may be given back");
    first.settle(Picos(85));
    assert_eq!(percents(), [50]);
    other.extend(Picos(20), Picos(20)).expect_err("15 are left");
    other.extend(Picos(20), Picos(20)).expect_err("15 are left");
    assert_eq!(percents(), [100], "once");
    other.extend(Picos(15), Picos(15)).expect("15 are left");
    other.settle(Picos(15));
    assert_eq!(percents(), [0; 0]);
}

#[test]
fn nothing_is_spent_after_the_end_date() {
    let experiment = Budget { until: Some(NOW), ..budget(Scope::Feature, Some("x"), 10, Window::Lifetime) };
    let budgets = Budgets::new([experiment]);
    let who = Spender { feature: Some("x".into()), ..Spender::default() };
    assert!(admit(&budgets, &who, UnixNanos(NOW.0 - 1)).is_ok());
    let refusal = admit(&budgets, &who, NOW).expect_err("it has ended");
    assert!(refusal.ended && refusal.to_string().contains("has ended"), "{refusal}");
}

#[test]
fn rules_change_while_requests_run() {
    let rule = |cap| budget(Scope::Key, Some("k"), cap, Window::Month);
    let budgets = Budgets::default();
    assert!(budgets.is_empty());
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    let before = RequestId::new();
    assert!(budgets.set(rule(100)), "nothing is counted yet");
    budgets.recount("key month", &before, NOW, Picos(30), NOW);
    budgets.counted("key month");
    budgets.recount("key month", &before, NOW, Picos(30), NOW);
    assert_eq!(stands(&budgets, "k"), (30, 0), "it is counted once");
    let hold = admit(&budgets, &who, NOW).expect("70 are left");
    hold.extend(Picos(60), Picos(60)).expect("there is room");
    assert!(!budgets.set(rule(50)), "it is counted");
    assert!(hold.extend(Picos(61), Picos(61)).is_err(), "what it has it keeps, and no more");
    assert_eq!(hold.settle(Picos(100)), Picos(60));
    assert_eq!(admit(&budgets, &who, NOW).expect_err("90 of 50").spent, Picos(90));
    assert!(!budgets.set(rule(91)));
    let hold = admit(&budgets, &who, NOW).expect("one is left");
    budgets.remove("key month");
    assert_eq!(hold.settle(Picos(0)), Picos(0));
    assert!(admit(&budgets, &who, NOW).expect("no rule").extend(Picos(1_000), Picos(1_000)).is_ok());
}

#[test]
fn a_new_rule_counts_the_requests_that_run() {
    let budgets = Budgets::default();
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    let ids: Vec<RequestId> = (0..4).map(|_| RequestId::new()).collect();
    let run = |at: usize, when, leased| {
        let hold = budgets.admit(&ids[at], &who, when).expect("there is no rule");
        hold.extend(Picos(leased), Picos(leased)).expect("there is no rule");
        hold
    };
    let (old, runs, settled) = (run(0, UnixNanos(NOW.0 - HOUR), 20), run(1, NOW, 40), run(2, NOW, 10));
    assert_eq!(settled.settle(Picos(7)), Picos(7));
    assert!(budgets.set(budget(Scope::Key, Some("k"), 100, Window::Hour)));
    assert_eq!(stands(&budgets, "k"), (7, 40), "the hour of their admission");
    let later = budgets.admit(&ids[3], &who, NOW).expect("53 are left");
    later.extend(Picos(30), Picos(30)).expect("there is room");
    assert_eq!(later.settle(Picos(30)), Picos(30));
    // What the ledger has: the settled ones are on the books by now, and one from before.
    for (id, charged) in [(&ids[2], 7), (&ids[3], 30), (&RequestId::new(), 5)] {
        budgets.recount("key hour", id, NOW, Picos(charged), NOW);
    }
    budgets.counted("key hour");
    assert_eq!(stands(&budgets, "k"), (42, 40), "each once");
    let refusal = runs.extend(Picos(59), Picos(80)).expect_err("it is under the budget now");
    assert_eq!((refusal.spent, refusal.leased, refusal.wanted), (Picos(42), Picos(0), Picos(59)));
    runs.extend(Picos(58), Picos(80)).expect("to the last one");
    assert_eq!(runs.settle(Picos(60)), Picos(58));
    assert_eq!(stands(&budgets, "k"), (100, 0));
    assert_eq!(old.settle(Picos(20)), Picos(20), "of the hour before");
    assert_eq!(budgets.take_crossings().len(), 2);
    drop((old, runs, settled, later));
    assert!(budgets.state().live.is_empty());
}

#[test]
fn what_runs_beyond_a_new_cap_ends_and_is_charged_at_most_what_it_had() {
    let budgets = Budgets::default();
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    let hold = admit(&budgets, &who, NOW).expect("there is no rule");
    hold.extend(Picos(40), Picos(40)).expect("there is no rule");
    assert!(budgets.set(budget(Scope::Key, Some("k"), 30, Window::Day)));
    budgets.counted("key day");
    assert!(hold.has(Picos(40)) && hold.extend(Picos(41), Picos(90)).is_err());
    assert!(admit(&budgets, &who, NOW).is_err(), "nobody else begins");
    assert_eq!(hold.settle(Picos(45)), Picos(40));
    assert_eq!(stands(&budgets, "k"), (40, 0));
}

#[test]
fn a_count_that_broke_off_begins_anew() {
    let budgets = Budgets::default();
    let rule = budget(Scope::Key, Some("k"), 100, Window::Day);
    for _ in 0..2 {
        assert!(budgets.set(rule.clone()), "not all is counted");
        budgets.recount("key day", &RequestId::new(), NOW, Picos(60), NOW);
    }
    budgets.counted("key day");
    assert_eq!(stands(&budgets, "k"), (60, 0));
    let percents: Vec<u8> = budgets.take_crossings().iter().map(|crossing| crossing.percent).collect();
    assert_eq!(percents, [50], "what is reached by it is news");
}

#[test]
fn a_lower_cap_that_is_reached_is_told() {
    let budgets = Budgets::new([budget(Scope::Key, Some("k"), 100, Window::Day)]);
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    admit(&budgets, &who, NOW).expect("nothing is spent").settle(Picos(60));
    let crossed = || -> Vec<(u8, i128)> {
        budgets.take_crossings().iter().map(|crossing| (crossing.percent, crossing.cap.0)).collect()
    };
    assert_eq!(crossed(), [(50, 100)]);
    assert!(!budgets.set(budget(Scope::Key, Some("k"), 60, Window::Day)));
    assert_eq!(crossed(), [(50, 60), (100, 60)]);
}

fn amount(random: &mut Random, limit: u64) -> Picos {
    Picos(i128::from(random.below(limit)))
}

/// Any history: what is spent is what was charged, what is leased is what holds have, no cap is passed, and each
/// refusal is right.
#[test]
fn random_worlds_keep_the_law() {
    for seed in 0..400 {
        let mut random = Random(seed);
        let rules = [
            budget(Scope::Team, None, 900, Window::Hour),
            budget(Scope::User, Some("u"), 1_500, Window::Day),
            Budget { mode: Mode::Warn, ..budget(Scope::All, None, 2_000, Window::Lifetime) },
        ];
        let budgets = Budgets::new(rules.clone());
        let mut now = NOW;
        let mut open: Vec<(Hold, Spender, UnixNanos, Picos)> = Vec::new();
        // By rule, value and window.
        let mut charged: BTreeMap<(String, String, UnixNanos), i128> = BTreeMap::new();
        for _ in 0..300 {
            match random.below(5) {
                0 => now = UnixNanos(now.0 + random.below(HOUR / 3)),
                1 => {
                    let team = ["a", "b"][random.below(2) as usize];
                    let user = (random.below(2) == 0).then(|| "u".to_owned());
                    let who = Spender { user, ..of_team(team) };
                    match admit(&budgets, &who, now) {
                        Ok(hold) => open.push((hold, who, now, Picos::ZERO)),
                        Err(refusal) => assert!(refusal.spent + refusal.leased >= refusal.cap, "seed {seed}"),
                    }
                }
                2 | 3 if !open.is_empty() => {
                    let at = random.below(open.len() as u64) as usize;
                    let (hold, _, _, leased) = &mut open[at];
                    let need = *leased + amount(&mut random, 200);
                    let want = need + amount(&mut random, 300);
                    match hold.extend(need, want) {
                        Ok(()) => {
                            let mine = hold.leased().expect("it is open");
                            assert!(need <= mine && mine <= want.max(*leased), "seed {seed}");
                            *leased = mine;
                        }
                        Err(refusal) => {
                            let sum = refusal.spent + refusal.leased + refusal.wanted;
                            assert!(refusal.wanted == need && sum > refusal.cap, "seed {seed}: {refusal:?}");
                        }
                    }
                }
                _ if !open.is_empty() => {
                    let (hold, who, at, leased) = open.swap_remove(random.below(open.len() as u64) as usize);
                    let cost = amount(&mut random, 2 * u64::try_from(leased.0).expect("positive") + 2);
                    let paid = hold.settle(cost);
                    assert!(cost.min(leased) <= paid && paid <= cost, "seed {seed}");
                    for rule in &rules {
                        if let Some(value) = rule.whose(&who) {
                            let start = rule.window.around(at, &rule.zone).start;
                            *charged.entry((rule.id.clone(), value.into(), start)).or_default() += paid.0;
                        }
                    }
                }
                _ => {}
            }
            for standing in budgets.standings(now) {
                let rule = rules.iter().find(|rule| rule.id == standing.budget).expect("a rule");
                let leased: Picos = open
                    .iter()
                    .filter(|(_, who, at, _)| {
                        rule.whose(who) == Some(&standing.value)
                            && rule.window.around(*at, &rule.zone) == standing.span
                    })
                    .map(|(.., leased)| *leased)
                    .sum();
                let key = (standing.budget.clone(), standing.value.clone(), standing.span.start);
                let spent = charged.get(&key).copied().unwrap_or(0);
                assert_eq!((standing.spent.0, standing.leased), (spent, leased), "seed {seed}: {standing:?}");
                let within = standing.spent + standing.leased <= standing.cap;
                assert!(within || rule.mode != Mode::Block, "seed {seed}: {standing:?}");
            }
        }
    }
}

/// A crowd on one budget, each renewing as it goes: not one unit is charged over the cap, and all of it is usable.
#[test]
fn a_thousand_at_once_stay_within_one_cap() {
    let cap = 1_000_003;
    let budgets = Budgets::new([budget(Scope::Key, Some("k"), cap, Window::Day)]);
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    let total: i128 = std::thread::scope(|scope| {
        let run = |seed: u64| {
            let (budgets, who) = (&budgets, &who);
            move || {
                let mut random = Random(seed);
                let mut paid = 0;
                for _ in 0..1_000 / 8 {
                    let Ok(hold) = admit(budgets, who, NOW) else { return paid };
                    let mut used = Picos::ZERO;
                    let steps = 1 + random.below(100);
                    for _ in 0..steps {
                        let step = Picos(1 + amount(&mut random, 400).0);
                        if hold.extend(used + step, used + Picos(16 * step.0)).is_err() {
                            break;
                        }
                        used += step;
                    }
                    paid += hold.settle(used).0;
                }
                paid
            }
        };
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(run(seed))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    let (spent, leased) = stands(&budgets, "k");
    assert_eq!((spent, leased), (total, 0));
    assert!(spent <= cap && spent > cap - 401, "{spent} of {cap}");
}
