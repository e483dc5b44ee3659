//! `GET /metrics`: what the recorder has, then the engine's figures and the books' as of now.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;
use crate::ledger::{ModelTotals, Totals};
use crate::metrics::Exposition;
use crate::nvml::Reading;
use crate::pipeline::App;

pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    let app = server.app()?;
    let mut text = Exposition::default();
    engine(app, &mut text);
    probe(app, &mut text);
    books(app, app.ledger().totals(), &mut text);
    let text = app.metrics().render() + &text.into_text();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

fn engine(app: &App, text: &mut Exposition) {
    let stats = app.engine().stats();
    let model = [("model_name", app.served().id.as_str())];
    text.gauge("vllm:num_requests_running", "Sequences that take part in steps.", &model, stats.running);
    text.gauge("vllm:num_requests_waiting", "Sequences that wait for a step.", &model, stats.waiting);
    let used = stats.blocks.held as f64 / (stats.blocks_total.max(1)) as f64;
    text.gauge("vllm:kv_cache_usage_perc", "KV blocks that requests hold, 0 to 1.", &model, used);
    text.counter("vllm:num_preemptions_total", "Sequences preempted.", &model, stats.preemptions);
    let help = "Prompt tokens looked up in the prefix cache.";
    text.counter("vllm:prefix_cache_queries_total", help, &model, stats.prefix_queries);
    let help = "Prompt tokens found in the prefix cache.";
    text.counter("vllm:prefix_cache_hits_total", help, &model, stats.prefix_hits);
    for (name, help, value) in [
        (
            "vllm:spec_decode_num_drafts_total",
            "Proposals of following tokens that were verified.",
            stats.drafts,
        ),
        ("vllm:spec_decode_num_draft_tokens_total", "Tokens of those proposals.", stats.draft_tokens),
        (
            "vllm:spec_decode_num_accepted_tokens_total",
            "Proposed tokens that were what was drawn.",
            stats.draft_tokens_accepted,
        ),
    ] {
        text.counter(name, help, &model, value);
    }
    let help = "Steps that the device ran.";
    text.counter("obol_engine_steps_total", help, &[("device", &app.served().device)], stats.steps);
}

/// What the device says of itself; a figure that it does not have is left out.
fn probe(app: &App, text: &mut Exposition) {
    let Some(probe) = app.probe() else { return };
    let Reading { energy_mj, power_mw, busy_percent, memory_used, memory_total, temperature } = probe.read();
    let device = [("device", app.served().device.as_str())];
    if let Some(energy) = energy_mj {
        let help = "Energy since the driver was loaded, all processes' included.";
        text.counter("obol_device_energy_joules_total", help, &device, energy as f64 / 1e3);
    }
    for (name, help, value) in [
        ("obol_device_power_watts", "Power drawn now.", power_mw.map(|power| power as f64 / 1e3)),
        (
            "obol_device_busy_ratio",
            "Share of the last sampling period in which a kernel ran, 0 to 1.",
            busy_percent.map(|percent| percent as f64 / 100.0),
        ),
        ("obol_device_memory_used_bytes", "Memory in use.", memory_used.map(|bytes| bytes as f64)),
        ("obol_device_memory_total_bytes", "Memory of the device.", memory_total.map(|bytes| bytes as f64)),
        ("obol_device_temperature_celsius", "Temperature.", temperature.map(|degrees| degrees as f64)),
    ] {
        if let Some(value) = value {
            text.gauge(name, help, &device, value);
        }
    }
}

/// The ledger's own sums since this start, as of its last commit: exact decimals, never counted here.
fn books(app: &App, mut totals: Totals, text: &mut Exposition) {
    let device = app.served().device.as_str();
    // The served model is there from the first scrape.
    totals.models.entry(app.served().id.clone()).or_default();
    let each = |write: &mut dyn FnMut(&str, &ModelTotals)| {
        totals.models.iter().for_each(|(model, sums)| write(model, sums));
    };
    each(&mut |model, sums| {
        let help = "Prompt tokens of settled requests.";
        text.counter("vllm:prompt_tokens_total", help, &[("model_name", model)], sums.tokens.prompt);
    });
    each(&mut |model, sums| {
        let help = "Generated tokens of settled requests.";
        text.counter("vllm:generation_tokens_total", help, &[("model_name", model)], sums.tokens.completion);
    });
    each(&mut |model, sums| {
        for reason in ["stop", "length", "cancelled", "budget", "error"] {
            let labels = [("model_name", model), ("finished_reason", reason)];
            let count = sums.requests.get(reason).copied().unwrap_or(0);
            text.counter("vllm:request_success_total", "Settled requests by how they ended.", &labels, count);
        }
    });
    each(&mut |model, sums| {
        for (class, time) in [("prefill", sums.prefill), ("decode", sums.decode)] {
            let labels = [("model", model), ("class", class), ("device", device)];
            let help = "Device time that requests were charged.";
            text.counter("obol_gpu_seconds_total", help, &labels, time.seconds());
        }
    });
    each(&mut |model, sums| {
        let value =
            format!("{}.{:09}", sums.kv_byte_nanos / 1_000_000_000, sums.kv_byte_nanos % 1_000_000_000);
        let help = "KV memory times time that requests were charged.";
        text.counter("obol_kv_byte_seconds_total", help, &[("model", model), ("device", device)], value);
    });
    each(&mut |model, sums| {
        let labels = [("model", model), ("currency", totals.currency.as_str())];
        text.counter("obol_cost_total", "What requests were charged.", &labels, sums.cost.decimal());
    });
    for (account, time) in &totals.house_time {
        let labels = [("account", *account), ("device", device)];
        text.counter(
            "obol_house_seconds_total",
            "Device time that no request pays.",
            &labels,
            time.seconds(),
        );
    }
    for (account, kv) in &totals.house_kv {
        let labels = [("account", *account), ("device", device)];
        // Block-seconds: a block's bytes are the pool's affair.
        let help = "KV block time that no request pays.";
        text.counter("obol_house_kv_block_seconds_total", help, &labels, kv.byte_seconds(1));
    }
    let labels = [("device", device)];
    let help = "Device time elapsed minus device time accounted for: 0.";
    text.gauge("obol_ledger_conservation_error_ns", help, &labels, totals.conservation_error_ns);
    let help = "KV block time elapsed minus block time accounted for: 0.";
    text.gauge("obol_ledger_kv_conservation_error_block_ns", help, &labels, totals.kv_conservation_error);
}
