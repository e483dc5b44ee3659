//! Metric names, help and buckets, and the one way they are fed: a request's usage at settlement, the engine's
//! figures at a scrape.
//!
//! The `vllm:` names and buckets are vLLM's, so that dashboards and autoscalers made for it work
//! unchanged. What is a sum over receipts is read from the books, not counted here. No label names a
//! user or a key.

use std::sync::Arc;

use metrics::{Unit, describe_histogram, with_local_recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::units::DeviceNanos;
use crate::usage::Usage;

const TTFT: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN: &str = "vllm:inter_token_latency_seconds";
const E2E: &str = "vllm:e2e_request_latency_seconds";
const QUEUE: &str = "vllm:request_queue_time_seconds";
const PREFILL: &str = "vllm:request_prefill_time_seconds";
const DECODE: &str = "vllm:request_decode_time_seconds";
const REQUEST_PROMPT: &str = "vllm:request_prompt_tokens";
const REQUEST_GENERATION: &str = "vllm:request_generation_tokens";

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const INTER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0,
    100_000.0,
];

/// A recorder of its own: nothing global, so several servers in one process do not mix.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    #[must_use]
    pub fn new() -> Self {
        let mut builder = PrometheusBuilder::new();
        for (name, buckets) in [
            (TTFT, TTFT_BUCKETS),
            (INTER_TOKEN, INTER_TOKEN_BUCKETS),
            (E2E, REQUEST_BUCKETS),
            (QUEUE, REQUEST_BUCKETS),
            (PREFILL, REQUEST_BUCKETS),
            (DECODE, REQUEST_BUCKETS),
            (REQUEST_PROMPT, TOKEN_BUCKETS),
            (REQUEST_GENERATION, TOKEN_BUCKETS),
        ] {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                .expect("the bucket lists are not empty");
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        with_local_recorder(&recorder, describe);
        Self { recorder: Arc::new(recorder), handle }
    }

    /// Takes a settled request in. Called once for each receipt, with the receipt's own usage.
    pub fn settled(&self, model: &str, used: &Usage, choices: u32) {
        let model = model.to_owned();
        let end = used.ttft.unwrap_or(used.wall);
        let decode = minus(used.wall, end);
        with_local_recorder(self.recorder.as_ref(), || {
            let record = |name: &'static str, value: f64| {
                metrics::histogram!(name, "model_name" => model.clone()).record(value);
            };
            record(E2E, used.wall.as_secs_f64());
            record(QUEUE, used.queue.as_secs_f64());
            record(REQUEST_PROMPT, used.tokens.prompt as f64);
            record(REQUEST_GENERATION, used.tokens.completion as f64);
            if let Some(ttft) = used.ttft {
                record(TTFT, ttft.as_secs_f64());
                record(PREFILL, minus(ttft, used.queue).as_secs_f64());
                record(DECODE, decode.as_secs_f64());
            }
            // Choices decode side by side: each has its own gaps between tokens.
            let gaps = used.tokens.completion.saturating_sub(u64::from(choices));
            if gaps > 0 {
                let mean = decode.as_secs_f64() * f64::from(choices) / gaps as f64;
                let count = usize::try_from(gaps).unwrap_or(usize::MAX);
                metrics::histogram!(INTER_TOKEN, "model_name" => model.clone()).record_many(mean, count);
            }
        });
    }

    /// Everything recorded so far, in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.run_upkeep();
        self.handle.render()
    }
}

fn minus(a: DeviceNanos, b: DeviceNanos) -> DeviceNanos {
    DeviceNanos(a.0.saturating_sub(b.0))
}

fn describe() {
    describe_histogram!(TTFT, Unit::Seconds, "Submission to first token.");
    describe_histogram!(
        INTER_TOKEN,
        Unit::Seconds,
        "Time between a choice's tokens: each request's mean, counted once a gap."
    );
    describe_histogram!(E2E, Unit::Seconds, "Submission to the end.");
    describe_histogram!(QUEUE, Unit::Seconds, "Submission to first scheduling.");
    describe_histogram!(PREFILL, Unit::Seconds, "First scheduling to first token.");
    describe_histogram!(DECODE, Unit::Seconds, "First token to the end.");
    describe_histogram!(REQUEST_PROMPT, Unit::Count, "Prompt tokens of a request.");
    describe_histogram!(REQUEST_GENERATION, Unit::Count, "Generated tokens of a request, all choices.");
}

/// Prometheus' text format, for figures that are read at a scrape and not counted here.
#[derive(Default)]
pub struct Exposition {
    text: String,
    last: Option<&'static str>,
}

impl Exposition {
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[(&str, &str)],
        value: impl std::fmt::Display,
    ) {
        self.sample("counter", name, help, labels, &value);
    }

    pub fn gauge(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[(&str, &str)],
        value: impl std::fmt::Display,
    ) {
        self.sample("gauge", name, help, labels, &value);
    }

    #[must_use]
    pub fn into_text(self) -> String {
        self.text
    }

    /// Samples of one name are written one after another: the head is written once.
    fn sample(
        &mut self,
        kind: &str,
        name: &'static str,
        help: &str,
        labels: &[(&str, &str)],
        value: &dyn std::fmt::Display,
    ) {
        if self.last.replace(name) != Some(name) {
            self.text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        }
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        self.text.push_str(&format!("{name}{{{}}} {value}\n", labels.join(",")));
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
