use super::*;
use crate::control::traffic::{Spell, Traffic, What};

const HOUR: f64 = 3_600.0;

/// How spikes of one kind fared.
#[derive(Debug, Default)]
struct Score {
    injected: u32,
    detected: u32,
    /// Seconds until they were, summed.
    delay: f64,
    false_alarms: u32,
    days: f64,
}

impl Score {
    fn rate(&self) -> f64 {
        f64::from(self.detected) / f64::from(self.injected)
    }

    fn mean_delay(&self) -> f64 {
        self.delay / f64::from(self.detected)
    }

    fn false_a_day(&self) -> f64 {
        f64::from(self.false_alarms) / self.days
    }

    fn line(&self, name: &str) -> String {
        format!(
            "{name:<34} {:>4} of {:>4} detected ({:.1} %), {:.0} s on average, {:.2} false alarms a day in {:.0} days",
            self.detected,
            self.injected,
            100.0 * self.rate(),
            self.mean_delay(),
            self.false_a_day(),
            self.days
        )
    }

    fn add(&mut self, other: &Self) {
        self.injected += other.injected;
        self.detected += other.detected;
        self.delay += other.delay;
        self.false_alarms += other.false_alarms;
        self.days += other.days;
    }
}

/// A day of traffic with a spike of `what` every two hours or so, and what the detector says of it.
fn day(seed: u64, requests_a_second: f64, what: What) -> Score {
    let mut traffic = Traffic::new(seed, requests_a_second);
    let mut spells: Vec<Spell> = Vec::new();
    for slot in 0..11 {
        let begin = (f64::from(slot) * 2.0 + 1.5 + traffic.unit()) * HOUR;
        let spell = Spell { begin, end: begin + 300.0, what };
        spells.push(spell);
    }
    let mut detector = Detector::new(UnixNanos(0));
    let mut heard: Vec<Option<f64>> = vec![None; spells.len()];
    let mut score = Score { injected: 11, days: 1.0, ..Score::default() };
    let buckets = (24.0 * HOUR / 10.0) as u64;
    for bucket in 0..buckets {
        let begin = bucket as f64 * 10.0;
        let now = begin + 10.0;
        for (at, cost) in traffic.bucket(begin, 10.0, &spells) {
            assert!((begin..now).contains(&at));
            detector.count(&Spender { key: Some("k".into()), ..Spender::default() }, cost);
        }
        for spike in detector.close(UnixNanos((bucket + 1) * BUCKET)) {
            assert_eq!(spike.at, UnixNanos((bucket + 1) * BUCKET));
            // What is noticed within a minute after its end is still it.
            let of = spells.iter().position(|spell| (spell.begin..spell.end + 60.0).contains(&now));
            match of {
                Some(of) => {
                    heard[of].get_or_insert(now - spells[of].begin);
                }
                None => score.false_alarms += 1,
            }
        }
    }
    for delay in heard.into_iter().flatten() {
        score.detected += 1;
        score.delay += delay;
    }
    score
}

fn days(seeds: std::ops::Range<u64>, requests_a_second: f64, what: What) -> Score {
    let mut score = Score::default();
    seeds.for_each(|seed| score.add(&day(seed, requests_a_second, what)));
    score
}

/// Seeded traffic: arrivals in bursts, costs with a heavy tail, busy days and quiet nights.
#[test]
fn injected_spikes_are_found_soon_and_little_else() {
    let mut all = Score::default();
    for (name, rate, what) in [
        ("5 x the requests, 10 a second", 10.0, What::Requests(5.0)),
        ("5 x the requests, 1 a second", 1.0, What::Requests(5.0)),
        ("5 x the costs, 10 a second", 10.0, What::Costs(5.0)),
        ("5 x the costs, 1 a second", 1.0, What::Costs(5.0)),
        ("an agent's loop beside 1 a second", 1.0, What::Loop(8.0)),
        ("an agent's loop beside 0.1 a second", 0.1, What::Loop(3.0)),
    ] {
        let score = days(0..if rate > 1.0 { 2 } else { 5 }, rate, what);
        println!("{}", score.line(name));
        assert!(score.rate() >= 0.8 && score.mean_delay() <= 100.0, "{}", score.line(name));
        all.add(&score);
    }
    println!("{}", all.line("all"));
    assert!(all.rate() >= 0.93, "{}", all.line("all"));
    assert!(all.mean_delay() <= 55.0, "{}", all.line("all"));
    assert!(all.false_a_day() <= 0.5, "{}", all.line("all"));
}

#[test]
fn a_steady_series_hears_of_what_is_far_above_it_once() {
    let mut detector = Detector::new(UnixNanos(0));
    let who = Spender { feature: Some("chat".into()), ..Spender::default() };
    let mut run = |buckets: std::ops::Range<u64>, requests: u32, cost: i128| {
        let mut spikes = Vec::new();
        for bucket in buckets {
            (0..requests).for_each(|_| detector.count(&who, Picos(cost)));
            spikes.extend(detector.close(UnixNanos((bucket + 1) * BUCKET)));
        }
        spikes
    };
    assert_eq!(run(0..100, 10, 1_000_000), []);
    assert_eq!(run(100..102, 30, 1_000_000), [], "two buckets are no spike");
    assert_eq!(run(102..110, 10, 1_000_000), []);
    let spikes = run(110..130, 30, 1_000_000);
    let names: Vec<(Scope, &str, Measure, u64)> = spikes
        .iter()
        .map(|spike| (spike.scope, spike.value.as_str(), spike.measure, spike.at.0 / BUCKET))
        .collect();
    assert_eq!(
        names,
        [
            (Scope::Key, "anonymous", Measure::SpendRate, 113),
            (Scope::Feature, "chat", Measure::SpendRate, 113)
        ]
    );
    assert!((spikes[0].seen / spikes[0].usual - 3.0).abs() < 1e-9);
    assert!((spikes[0].usual - 1e-6 * 10.0 * 360.0).abs() < 1e-12, "units an hour");
    assert_eq!(spikes[0].spent, Picos(30_000_000));
    assert_eq!(run(130..200, 10, 1_000_000), []);
    // Again, after the cool-down: dearer requests, as many as ever.
    let spikes = run(200..210, 10, 4_000_000);
    assert!(
        spikes.iter().any(|spike| spike.measure == Measure::CostPerRequest && spike.scope == Scope::Feature)
    );
    assert_eq!(run(210..280, 10, 1_000_000), []);
    // What stays is the new usual: it is told of once, and its end is nothing.
    assert_eq!(run(280..700, 30, 1_000_000).len(), 2);
    assert_eq!(run(700..1_100, 30, 1_000_000), []);
}

#[test]
fn a_night_without_requests_does_not_make_the_morning_unusual() {
    let mut detector = Detector::new(UnixNanos(0));
    let who = Spender { key: Some("k".into()), ..Spender::default() };
    for bucket in 0..4_000 {
        if !(500..3_500).contains(&bucket) {
            (0..5).for_each(|_| detector.count(&who, Picos(1_000)));
        }
        assert_eq!(detector.close(UnixNanos((bucket + 1) * BUCKET)), [], "{bucket}");
    }
}

#[test]
fn series_are_few_and_forgotten_and_a_clock_may_jump() {
    let mut detector = Detector::new(UnixNanos(0));
    for key in 0..SERIES_MAX + 7 {
        detector.count(&Spender { key: Some(key.to_string()), ..Spender::default() }, Picos(1));
    }
    assert_eq!(detector.series.len(), SERIES_MAX);
    detector.close(UnixNanos(BUCKET));
    detector.close(UnixNanos(1_000_000 * BUCKET));
    assert_eq!(detector.bucket, 1_000_000);
    detector.close(UnixNanos(5 * BUCKET));
    assert_eq!(detector.bucket, 5, "it was set back");
    for bucket in 6..6 + u64::from(FORGOTTEN) {
        detector.close(UnixNanos(bucket * BUCKET));
    }
    assert!(detector.series.is_empty());
}
