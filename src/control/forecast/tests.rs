use super::*;
use crate::control::traffic::Traffic;

/// 2026-11-02T00:00:00Z, in seconds.
const START: u64 = 1_793_577_600;

fn at(seconds: f64) -> UnixNanos {
    UnixNanos(START * SECOND + (seconds * 1e9) as u64)
}

/// Of how many windows the end lay in the band that was said at `part` of them, and how far it was from the forecast.
fn coverage(days: u64, window_hours: f64, part: f64, requests_a_second: f64, seeds: u64) -> (u32, u32, f64) {
    let (mut inside, mut all, mut error) = (0, 0, 0.0);
    for seed in 0..seeds {
        let mut traffic = Traffic::new(seed, requests_a_second);
        let mut series = Series::for_window(Some((window_hours * 3_600.0) as u64 * SECOND));
        let step = 300.0;
        let window = window_hours * 3_600.0;
        let (mut spent, mut said) = (Picos::ZERO, None);
        for bucket in 0..(days as f64 * 86_400.0 / step) as u64 {
            let begin = bucket as f64 * step;
            let start = (begin / window).floor() * window;
            let span = Span { start: at(start), end: Some(at(start + window)) };
            if begin == start {
                if let Some(Projection { expected, low, high }) = said.take() {
                    all += 1;
                    inside += u32::from((low..=high).contains(&spent));
                    error += (expected.as_f64() / spent.as_f64() - 1.0).abs();
                }
                spent = Picos::ZERO;
            }
            // The first three days are there to learn from.
            if begin >= start + part * window && said.is_none() && begin >= 3.0 * 86_400.0 {
                series.close(at(begin));
                said = series.project(spent, at(begin), span);
            }
            for (second, cost) in traffic.bucket(begin, step, &[]) {
                series.count(at(second), cost);
                spent += cost;
            }
        }
    }
    (inside, all, error / f64::from(all))
}

/// Seeded traffic with bursts, a heavy tail and a day's pattern.
#[test]
fn most_windows_end_within_their_band() {
    let (mut inside, mut all) = (0, 0);
    for (name, days, hours, part, seeds) in [
        ("an hour, from its half", 7, 1.0, 0.5, 3),
        ("a day, from its third", 14, 24.0, 0.33, 5),
        ("a day, from its half", 14, 24.0, 0.5, 5),
    ] {
        let (within, of, error) = coverage(days, hours, part, 0.3, seeds);
        let share = f64::from(within) / f64::from(of);
        println!(
            "{name}: {within} of {of} within the band of 80 % ({:.0} %), {:.1} % off on average",
            100.0 * share,
            100.0 * error
        );
        assert!((0.6..=0.97).contains(&share) && error < 0.2, "{name}: {share} {error}");
        (inside, all) = (inside + within, all + of);
    }
    let share = f64::from(inside) / f64::from(all);
    println!("all: {inside} of {all} ({:.0} %)", 100.0 * share);
    assert!((0.65..=0.93).contains(&share), "{share}");
}

#[test]
fn what_goes_on_evenly_is_known_exactly() {
    let mut series = Series::for_window(Some(HOUR));
    let span = Span { start: at(0.0), end: Some(at(3_600.0)) };
    for minute in 0..30 {
        series.close(at(f64::from(minute) * 60.0));
        if minute < 6 {
            assert_eq!(series.project(Picos(1), at(f64::from(minute) * 60.0), span), None, "too early");
        }
        series.count(at(f64::from(minute) * 60.0 + 30.0), Picos(2_000_000_000_000));
    }
    series.close(at(1_800.0));
    let spent = Picos(60_000_000_000_000);
    let projection = series.project(spent, at(1_800.0), span).expect("enough is known");
    assert_eq!(projection.expected, Picos(120_000_000_000_000));
    let width = (projection.high.as_f64() - projection.low.as_f64()) / 2.0;
    assert!((width - 60.0 * DRIFT * BAND).abs() < 0.3, "only the drift is unsure: {width}");
    let cap = Picos(90_000_000_000_000);
    assert_eq!(reaches(cap, spent, &projection, at(1_800.0), span), Some(at(2_700.0)));
    assert_eq!(reaches(Picos(120_000_000_000_000), spent, &projection, at(1_800.0), span), None);
    assert_eq!(series.project(spent, at(1_800.0), Span { start: UnixNanos(0), end: None }), None);
    let ended = series.project(spent, at(3_600.0), span).expect("enough is known");
    assert_eq!((ended.expected, ended.low, ended.high), (spent, spent, spent), "nothing is to come");
}

#[test]
fn an_hour_of_the_day_is_like_the_same_hour_of_other_days() {
    let mut series = Series::for_window(None);
    for hour in 0..72 {
        // Only in the afternoon.
        if hour % 24 >= 12 {
            series.count(at(f64::from(hour) * 3_600.0 + 1.0), Picos(1_000_000_000_000));
        }
        series.close(at(f64::from(hour + 1) * 3_600.0));
    }
    let day = Span { start: at(259_200.0), end: Some(at(345_600.0)) };
    let at_six = at(259_200.0 + 6.0 * 3_600.0);
    series.close(at_six);
    let projection = series.project(Picos::ZERO, at_six, day).expect("days are known");
    assert!((projection.expected.as_f64() - 11.6).abs() < 1.0, "{projection:?}");
    assert!(projection.low.as_f64() > 9.0);
}

#[test]
fn a_long_silence_is_nothing_spent() {
    let mut series = Series::for_window(Some(HOUR));
    for minute in 0..20 {
        series.count(at(f64::from(minute) * 60.0), Picos(1_000_000_000_000));
    }
    let later = at(90.0 * 86_400.0);
    series.close(later);
    let span = Span { start: later, end: Some(UnixNanos(later.0 + HOUR)) };
    let projection = series.project(Picos(7), later, span).expect("silence is known");
    assert_eq!((projection.expected, projection.high), (Picos(7), Picos(7)));
}
