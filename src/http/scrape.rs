//! `GET /metrics`: what the recorder has, then the engine's figures and the books' as of now.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;
use crate::control::budgets::{Scope, Standing};
use crate::engine::EngineStats;
use crate::ledger::{DeviceTotals, ModelTotals, Totals, Used};
use crate::metrics::Exposition;
use crate::nvml::Reading;
use crate::pipeline::App;

pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    let app = server.app()?;
    let mut text = Exposition::default();
    engines(app, &mut text);
    probes(app, &mut text);
    budgets(app, &mut text);
    alerts(app, &mut text);
    books(app, app.ledger().totals(), &mut text);
    let text = app.metrics().render() + &text.into_text();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// A metric: its name, what it is, and how its value is read.
type Figure<Source, Value> = (&'static str, &'static str, fn(&Source) -> Value);

/// The engines' figures: sums, as the model is one to its clients, but for what is a device's own.
fn engines(app: &App, text: &mut Exposition) {
    let each: Vec<(&str, EngineStats)> = app.engines().stats().collect();
    let sum = |of: &dyn Fn(&EngineStats) -> u64| each.iter().map(|(_, stats)| of(stats)).sum::<u64>();
    let model = [("model_name", app.served().id.as_str())];
    let running = sum(&|stats| stats.running as u64);
    text.gauge("vllm:num_requests_running", "Sequences that take part in steps.", &model, running);
    let waiting = sum(&|stats| stats.waiting as u64);
    text.gauge("vllm:num_requests_waiting", "Sequences that wait for a step.", &model, waiting);
    let used = sum(&|stats| stats.blocks.held) as f64 / sum(&|stats| stats.blocks_total).max(1) as f64;
    text.gauge("vllm:kv_cache_usage_perc", "KV blocks that requests hold, 0 to 1.", &model, used);
    let counters: [Figure<EngineStats, u64>; 6] = [
        ("vllm:num_preemptions_total", "Sequences preempted.", |stats| stats.preemptions),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", |stats| {
            stats.prefix_queries
        }),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", |stats| {
            stats.prefix_hits
        }),
        ("vllm:spec_decode_num_drafts_total", "Proposals of following tokens that were verified.", |stats| {
            stats.drafts
        }),
        ("vllm:spec_decode_num_draft_tokens_total", "Tokens of those proposals.", |stats| stats.draft_tokens),
        (
            "vllm:spec_decode_num_accepted_tokens_total",
            "Proposed tokens that were what was drawn.",
            |stats| stats.draft_tokens_accepted,
        ),
    ];
    for (name, help, of) in counters {
        text.counter(name, help, &model, sum(&of));
    }
    for (device, stats) in &each {
        let help = "Steps that the device ran.";
        text.counter("obol_engine_steps_total", help, &[("device", device)], stats.steps);
    }
}

/// What the devices say of themselves; a figure that one does not have is left out.
fn probes(app: &App, text: &mut Exposition) {
    let readings: Vec<(&str, Reading)> =
        app.probes().iter().map(|(device, probe)| (device.as_str(), probe.read())).collect();
    for (device, reading) in &readings {
        if let Some(energy) = reading.energy_mj {
            let help = "Energy since the driver was loaded, all processes' included.";
            let labels = [("device", *device)];
            text.counter("obol_device_energy_joules_total", help, &labels, energy as f64 / 1e3);
        }
    }
    let gauges: [Figure<Reading, Option<f64>>; 5] = [
        ("obol_device_power_watts", "Power drawn now.", |reading| {
            reading.power_mw.map(|power| power as f64 / 1e3)
        }),
        (
            "obol_device_busy_ratio",
            "Share of the last sampling period in which a kernel ran, 0 to 1.",
            |reading| reading.busy_percent.map(|percent| percent as f64 / 100.0),
        ),
        ("obol_device_memory_used_bytes", "Memory in use.", |reading| {
            reading.memory_used.map(|bytes| bytes as f64)
        }),
        ("obol_device_memory_total_bytes", "Memory of the device.", |reading| {
            reading.memory_total.map(|bytes| bytes as f64)
        }),
        ("obol_device_temperature_celsius", "Temperature.", |reading| {
            reading.temperature.map(|degrees| degrees as f64)
        }),
    ];
    for (name, help, of) in gauges {
        for (device, reading) in &readings {
            if let Some(value) = of(reading) {
                text.gauge(name, help, &[("device", *device)], value);
            }
        }
    }
}

/// Values of one budget that are shown, where each value has its own.
const VALUES_MAX: usize = 100;

/// Where budgets stand. Of those that each user or task has there may be any number: they are left out.
fn budgets(app: &App, text: &mut Exposition) {
    let mut shown: Vec<Standing> = Vec::new();
    let mut of_last = 0;
    for standing in app.admission().budgets().standings(app.clock().wall()) {
        if standing.is_each && matches!(standing.scope, Scope::User | Scope::Task) {
            continue;
        }
        let same = shown.last().is_some_and(|last| last.budget == standing.budget);
        of_last = if same { of_last + 1 } else { 1 };
        if of_last <= VALUES_MAX {
            shown.push(standing);
        }
    }
    let gauges: [Figure<Standing, String>; 3] = [
        ("obol_budget_spent", "Charged in the budget's window so far.", |budget| budget.spent.decimal()),
        ("obol_budget_leased", "Set aside for requests that run.", |budget| budget.leased.decimal()),
        ("obol_budget_cap", "Most that may be spent in the budget's window.", |budget| budget.cap.decimal()),
    ];
    for (name, help, of) in gauges {
        for budget in &shown {
            let labels =
                [("budget", &*budget.budget), ("scope", budget.scope.name()), ("value", &*budget.value)];
            text.gauge(name, help, &labels, of(budget));
        }
    }
}

fn alerts(app: &App, text: &mut Exposition) {
    let alerting = app.alerting();
    for (kind, raised) in alerting.raised() {
        let help = "Alerts raised since the start.";
        text.counter("obol_alerts_total", help, &[("kind", kind.name())], raised);
    }
    let help = "Alerts that webhooks have not acknowledged yet.";
    text.gauge("obol_alerts_unsent", help, &[], alerting.unsent());
    let help = "Settled requests and alerts that were left out, as too many came at once.";
    text.counter("obol_alerts_left_out_total", help, &[], alerting.left_out());
}

/// The ledger's own sums since this start, as of its last commit: exact decimals, never counted here.
fn books(app: &App, mut totals: Totals, text: &mut Exposition) {
    // The served model is there from the first scrape.
    let served = &app.served().id;
    totals.models.entry(served.clone()).or_default();
    for device in &mut totals.devices {
        device.used.entry(served.clone()).or_default();
    }
    let each = |write: &mut dyn FnMut(&str, &ModelTotals)| {
        totals.models.iter().for_each(|(model, sums)| write(model, sums));
    };
    let each_used = |write: &mut dyn FnMut(&str, &str, &Used)| {
        for device in &totals.devices {
            device.used.iter().for_each(|(model, used)| write(&device.device, model, used));
        }
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
    each_used(&mut |device, model, used| {
        for (class, time) in [("prefill", used.prefill), ("decode", used.decode)] {
            let labels = [("model", model), ("class", class), ("device", device)];
            let help = "Device time that requests were charged.";
            text.counter("obol_gpu_seconds_total", help, &labels, time.seconds());
        }
    });
    each_used(&mut |device, model, used| {
        let value =
            format!("{}.{:09}", used.kv_byte_nanos / 1_000_000_000, used.kv_byte_nanos % 1_000_000_000);
        let help = "KV memory times time that requests were charged.";
        text.counter("obol_kv_byte_seconds_total", help, &[("model", model), ("device", device)], value);
    });
    each(&mut |model, sums| {
        if let Some(energy) = sums.energy_mj {
            let help = "Settled requests' parts of the devices' energy.";
            let joules = format!("{}.{:03}", energy / 1_000, energy % 1_000);
            text.counter("obol_energy_joules_total", help, &[("model", model)], joules);
        }
    });
    each(&mut |model, sums| {
        let labels = [("model", model), ("currency", totals.currency.as_str())];
        text.counter("obol_cost_total", "What requests were charged.", &labels, sums.cost.decimal());
    });
    let devices = &totals.devices;
    for DeviceTotals { device, house_time, .. } in devices {
        for (account, time) in house_time {
            let labels = [("account", *account), ("device", device)];
            let help = "Device time that no request pays.";
            text.counter("obol_house_seconds_total", help, &labels, time.seconds());
        }
    }
    for DeviceTotals { device, house_kv, .. } in devices {
        for (account, kv) in house_kv {
            let labels = [("account", *account), ("device", device)];
            // Block-seconds: a block's bytes are the pool's affair.
            let help = "KV block time that no request pays.";
            text.counter("obol_house_kv_block_seconds_total", help, &labels, kv.byte_seconds(1));
        }
    }
    for DeviceTotals { device, conservation_error_ns, .. } in devices {
        let help = "Device time elapsed minus device time accounted for: 0.";
        let labels = [("device", device.as_str())];
        text.gauge("obol_ledger_conservation_error_ns", help, &labels, conservation_error_ns);
    }
    for DeviceTotals { device, kv_conservation_error, .. } in devices {
        let help = "KV block time elapsed minus block time accounted for: 0.";
        let labels = [("device", device.as_str())];
        text.gauge("obol_ledger_kv_conservation_error_block_ns", help, &labels, kv_conservation_error);
    }
}
