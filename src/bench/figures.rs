//! From requests to figures, under the names of `vllm bench serve` where it has one. A figure that is not
//! known is absent: a server that tells no cost has none.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::drive::{Driven, Record, Reply};
use super::engine::Charged;
use crate::measure::statistics::{mean_and_deviation, median, percentile};

pub(super) const OUTPUT_THROUGHPUT: &str = "output_throughput";
pub(super) const TOTAL_THROUGHPUT: &str = "total_token_throughput";
pub(super) const MEDIAN_TTFT: &str = "median_ttft_ms";
pub(super) const P99_TTFT: &str = "p99_ttft_ms";
pub(super) const MEDIAN_TPOT: &str = "median_tpot_ms";
pub(super) const MEDIAN_ITL: &str = "median_itl_ms";
pub(super) const MEDIAN_E2EL: &str = "median_e2el_ms";
pub(super) const P99_SEND_DELAY: &str = "p99_send_delay_ms";
pub(super) const COST_OUTPUT: &str = "cost_per_million_output_tokens";
pub(super) const COST_TOKENS: &str = "cost_per_million_tokens";
pub(super) const COMPLETED: &str = "completed";
pub(super) const FAILED: &str = "failed";
pub(super) const INPUT_TOKENS: &str = "total_input_tokens";
pub(super) const CACHED_TOKENS: &str = "prefix_cache_hit_tokens";
pub(super) const LOAD_CORE: &str = "load_cpu_of_one_core";
pub(super) const LOAD_MACHINE: &str = "load_cpu_of_machine";
const OUTPUT_TOKENS: &str = "total_output_tokens";

/// Of several rounds these are sums; all others are medians.
const SUMS: [&str; 8] =
    ["duration", COMPLETED, FAILED, INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, "device_seconds", "cost"];

/// Figures by their names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Figures(BTreeMap<&'static str, f64>);

impl Figures {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// Of several rounds: sums of what is counted, medians of everything else.
    #[must_use]
    pub fn middle(rounds: &[Self]) -> Self {
        let names = rounds.iter().flat_map(|round| round.0.keys().copied());
        let figure = |name: &'static str| {
            let values: Vec<f64> = rounds.iter().filter_map(|round| round.get(name)).collect();
            (name, if SUMS.contains(&name) { values.iter().sum() } else { median(values) })
        };
        Self(names.map(figure).collect())
    }

    /// With so many failed requests.
    pub(super) fn with_failed(mut self, failed: usize) -> Self {
        self.0.entry(COMPLETED).or_insert(0.0);
        self.set(FAILED, failed as f64);
        self
    }

    /// Figures of a test.
    #[cfg(test)]
    pub(super) fn of(figures: &[(&'static str, f64)]) -> Self {
        Self(figures.iter().copied().collect())
    }

    /// Counts as integers.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let member = |(name, value): (&&str, &f64)| {
            let whole = value.fract() == 0.0 && value.abs() < 1e15;
            ((*name).to_owned(), if whole { json!(*value as i64) } else { json!(value) })
        };
        Value::Object(self.0.iter().map(member).collect::<Map<String, Value>>())
    }

    fn set(&mut self, name: &'static str, value: f64) {
        if value.is_finite() {
            self.0.insert(name, value);
        }
    }

    fn spread(&mut self, names: [&'static str; 4], mut milliseconds: Vec<f64>) {
        milliseconds.sort_by(f64::total_cmp);
        let (mean, deviation) = mean_and_deviation(&milliseconds);
        let [mean_name, median_name, deviation_name, high_name] = names;
        self.set(mean_name, mean);
        self.set(median_name, percentile(&milliseconds, 0.5));
        self.set(deviation_name, deviation);
        self.set(high_name, percentile(&milliseconds, 0.99));
    }
}

/// One round: its requests, what the engine's meter charged if there is one, and the processor time that
/// making the load took.
pub(super) struct Round<'a> {
    pub(super) driven: &'a Driven,
    pub(super) charged: Option<Charged>,
    pub(super) load_cpu: Duration,
    pub(super) cores: usize,
}

/// The sum, if every reply tells.
fn all(replies: &[(&Record, &Reply)], of: fn(&Reply) -> Option<f64>) -> Option<f64> {
    replies.iter().map(|(_, reply)| of(reply)).sum::<Option<f64>>().filter(|_| !replies.is_empty())
}

impl Round<'_> {
    pub(super) fn figures(&self) -> Figures {
        let Driven { records, duration, in_flight_max } = self.driven;
        let replies: Vec<(&Record, &Reply)> =
            records.iter().filter_map(|record| Some((record, record.outcome.as_ref().ok()?))).collect();
        let seconds = duration.as_secs_f64();
        let mut figures = Figures::default();
        figures.set("duration", seconds);
        figures.set(COMPLETED, replies.len() as f64);
        figures.set(FAILED, (records.len() - replies.len()) as f64);
        figures.set("max_concurrent_requests", *in_flight_max as f64);
        figures.set("request_throughput", replies.len() as f64 / seconds);
        figures.set(LOAD_CORE, self.load_cpu.as_secs_f64() / seconds);
        figures.set(LOAD_MACHINE, self.load_cpu.as_secs_f64() / seconds / self.cores as f64);
        self.tokens(&mut figures, &replies, seconds);
        latencies(&mut figures, &replies);
        figures
    }

    fn tokens(&self, figures: &mut Figures, replies: &[(&Record, &Reply)], seconds: f64) {
        let told = |of: fn(&Reply) -> Option<f64>| all(replies, of);
        let charged = |of: fn(&Charged) -> f64| self.charged.as_ref().map(of);
        let count = |number: Option<u64>| number.map(|number| number as f64);
        let output: f64 = replies.iter().map(|(_, reply)| reply.output_tokens as f64).sum();
        let input = match &self.charged {
            Some(charged) => Some(charged.input_tokens as f64),
            None => replies.iter().map(|(_, reply)| count(reply.told.input_tokens)).sum(),
        };
        let cost = charged(|charged| charged.cost).or_else(|| told(|reply| reply.told.cost));
        let device =
            charged(|charged| charged.device_seconds).or_else(|| told(|reply| reply.told.device_seconds));
        let cached = charged(|charged| charged.cached_tokens as f64)
            .or_else(|| told(|reply| reply.told.cached_tokens.map(|tokens| tokens as f64)));
        figures.set(OUTPUT_TOKENS, output);
        figures.set(OUTPUT_THROUGHPUT, output / seconds);
        for (name, value) in [("cost", cost), ("device_seconds", device), (CACHED_TOKENS, cached)] {
            figures.set(name, value.unwrap_or(f64::NAN));
        }
        if let Some(input) = input {
            figures.set(INPUT_TOKENS, input);
            figures.set(TOTAL_THROUGHPUT, (input + output) / seconds);
        }
        if let Some(cost) = cost.filter(|_| output > 0.0) {
            figures.set(COST_OUTPUT, cost * 1e6 / output);
            figures.set(COST_TOKENS, cost * 1e6 / (input.unwrap_or(f64::NAN) + output));
        }
    }
}

/// Latencies from when a request was due. Between tokens: the gaps between parts of an answer as they came.
/// Per output token: the time after the first part over the tokens after the first one.
fn latencies(figures: &mut Figures, replies: &[(&Record, &Reply)]) {
    let since = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
    let of = |figure: &dyn Fn(&Record, &Reply) -> Option<f64>| -> Vec<f64> {
        replies.iter().filter_map(|(record, reply)| figure(record, reply)).collect()
    };
    let ttft = of(&|record, reply| Some(since(record.due, *reply.came.first()?)));
    let e2el = of(&|record, reply| Some(since(record.due, *reply.came.last()?)));
    let wait = of(&|record, reply| Some(since(record.due, reply.sent)));
    let tpot = of(&|_, reply| {
        let after_first = reply.output_tokens.checked_sub(1).filter(|&tokens| tokens > 0)?;
        Some(since(*reply.came.first()?, *reply.came.last()?) / after_first as f64)
    });
    let gaps =
        |reply: &Reply| reply.came.windows(2).map(|pair| since(pair[0], pair[1])).collect::<Vec<f64>>();
    let itl = replies.iter().flat_map(|(_, reply)| gaps(reply)).collect();
    figures.spread(["mean_ttft_ms", MEDIAN_TTFT, "std_ttft_ms", P99_TTFT], ttft);
    figures.spread(["mean_tpot_ms", MEDIAN_TPOT, "std_tpot_ms", "p99_tpot_ms"], tpot);
    figures.spread(["mean_itl_ms", MEDIAN_ITL, "std_itl_ms", "p99_itl_ms"], itl);
    figures.spread(["mean_e2el_ms", MEDIAN_E2EL, "std_e2el_ms", "p99_e2el_ms"], e2el);
    let delay = ["mean_send_delay_ms", "median_send_delay_ms", "std_send_delay_ms", P99_SEND_DELAY];
    figures.spread(delay, wait);
}

#[cfg(test)]
mod tests {
    use super::super::drive::Told;
    use super::*;

    fn record(begin: Instant, due: u64, sent: u64, came: &[u64], tokens: u64) -> Record {
        let at = |milliseconds: u64| begin + Duration::from_millis(milliseconds);
        let told = Told { input_tokens: Some(100), cost: Some(0.001), ..Told::default() };
        let reply = Reply {
            sent: at(sent),
            came: came.iter().copied().map(at).collect(),
            text: String::new(),
            output_tokens: tokens,
            told,
        };
        Record { due: at(due), outcome: Ok(reply) }
    }

    fn round(records: Vec<Record>, charged: Option<Charged>) -> Figures {
        let driven = Driven { records, duration: Duration::from_secs(2), in_flight_max: 3 };
        let load_cpu = Duration::from_millis(200);
        Round { driven: &driven, charged, load_cpu, cores: 2 }.figures()
    }

    #[test]
    fn latency_counts_from_when_a_request_was_due() {
        let begin = Instant::now();
        let mut records = vec![record(begin, 0, 10, &[50, 60, 100], 5), record(begin, 20, 20, &[40], 1)];
        records.push(Record { due: begin, outcome: Err("refused".into()) });
        let figures = round(records, None);
        let check = |name: &str, expected: Option<f64>| match (figures.get(name), expected) {
            (Some(found), Some(expected)) => assert!((found - expected).abs() < 1e-9, "{name}: {found}"),
            (found, expected) => assert_eq!(found, expected, "{name}"),
        };
        check(COMPLETED, Some(2.0));
        check(FAILED, Some(1.0));
        check(OUTPUT_THROUGHPUT, Some(3.0));
        check(TOTAL_THROUGHPUT, Some(103.0));
        check("request_throughput", Some(1.0));
        check("mean_ttft_ms", Some(35.0));
        check(MEDIAN_E2EL, Some(60.0));
        // Of the first alone: the other has a single token.
        check(MEDIAN_TPOT, Some(12.5));
        check(MEDIAN_ITL, Some(25.0));
        check("mean_send_delay_ms", Some(5.0));
        check(COST_OUTPUT, Some(0.002 * 1e6 / 6.0));
        check(COST_TOKENS, Some(0.002 * 1e6 / 206.0));
        check(LOAD_CORE, Some(0.1));
        check(LOAD_MACHINE, Some(0.05));
        check("device_seconds", None);
        check(CACHED_TOKENS, None);
    }

    #[test]
    fn what_the_meter_charged_counts_in_process() {
        let begin = Instant::now();
        let charged = Charged { input_tokens: 7, cached_tokens: 3, device_seconds: 0.5, cost: 0.25 };
        let figures = round(vec![record(begin, 0, 0, &[1], 1)], Some(charged));
        assert_eq!(figures.get(INPUT_TOKENS), Some(7.0));
        assert_eq!(figures.get("cost"), Some(0.25));
        assert_eq!(figures.get(CACHED_TOKENS), Some(3.0));
        assert_eq!(figures.get("device_seconds"), Some(0.5));
    }

    #[test]
    fn a_round_without_answers_has_counts_and_no_latency() {
        let due = Instant::now();
        let figures = round(vec![Record { due, outcome: Err("refused".into()) }], None);
        assert_eq!((figures.get(COMPLETED), figures.get(FAILED)), (Some(0.0), Some(1.0)));
        assert_eq!(figures.get(OUTPUT_THROUGHPUT), Some(0.0));
        for name in [MEDIAN_TTFT, P99_TTFT, MEDIAN_ITL, COST_OUTPUT, "cost"] {
            assert_eq!(figures.get(name), None, "{name}");
        }
    }

    #[test]
    fn rounds_are_summed_where_they_count_and_else_their_median_is_taken() {
        let of =
            |completed, throughput| Figures::of(&[(COMPLETED, completed), (OUTPUT_THROUGHPUT, throughput)]);
        let middle = Figures::middle(&[of(4.0, 10.0), of(4.0, 90.0), of(3.0, 20.0), Figures::default()]);
        assert_eq!(middle, of(11.0, 20.0));
        assert_eq!(middle.to_json().to_string(), r#"{"completed":11,"output_throughput":20}"#);
    }
}
