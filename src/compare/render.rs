//! A comparison as a table and as JSON. Figures are computed elsewhere; only ratios to the reference are
//! taken here.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{Comparison, Measured, Speed};
use crate::measure::table::{aligned, counted};

const NONE: &str = "-";

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Comparison {
    /// The variant that the others are held against.
    #[must_use]
    pub fn reference(&self) -> &Measured {
        &self.variants[0]
    }

    /// What the reference is, for people: `reference: f32, dequantised from Q4_1`.
    #[must_use]
    pub fn reference_statement(&self) -> String {
        let reference = self.reference();
        let label = &reference.label;
        if reference.quant == "file" {
            return format!("reference: {label}, {} as the file has it", reference.weights());
        }
        let same_file = |variant: &&Measured| variant.fingerprint == reference.fingerprint;
        match self.variants.iter().filter(same_file).find(|variant| variant.quant == "file") {
            Some(file) if file.weights().contains('Q') => {
                format!("reference: {label}, dequantised from {}", file.weights())
            }
            Some(file) => format!("reference: {label}, converted from {}", file.weights()),
            None => format!("reference: {label}, converted from what the file has"),
        }
    }

    /// The reference's figure at the same number of clients.
    fn speed_of_reference(&self, clients: usize) -> Option<&Speed> {
        self.reference().speeds.iter().find(|speed| speed.clients == clients)
    }

    /// Part of the reference's cost that a variant saves; negative if it costs more.
    pub(super) fn saved(&self, speed: &Speed) -> Option<f64> {
        let reference = self.speed_of_reference(speed.clients)?;
        // Nothing is saved where nothing costs anything.
        (reference.cost_per_million_tokens > 0.0)
            .then(|| 1.0 - speed.cost_per_million_tokens / reference.cost_per_million_tokens)
    }

    /// Aligned columns for a terminal: quality and memory, then speed and cost.
    #[must_use]
    pub fn to_table(&self) -> String {
        let settings = &self.settings;
        let mut text = String::new();
        let mut line = |said: String| {
            text += &said;
            text.push('\n');
        };
        line(format!(
            "{} ({}) on {}, {} threads",
            self.model, self.architecture, settings.machine, settings.threads
        ));
        line(self.reference_statement());
        if settings.stages.quality {
            line(format!(
                "text: {}, {} of {} tokens, {} positions scored",
                self.text.name,
                counted(self.chunks, "chunk"),
                settings.chunk_tokens,
                self.positions
            ));
        }
        text.push('\n');
        text += &self.quality_table();
        if settings.stages.speed {
            text.push('\n');
            text += &self.speed_table();
            let _infallible = writeln!(
                text,
                "\ncost: {}, idle time not charged; medians of {}, {} a client, {} tokens in and {} out.\n\
                 One model is loaded at a time: the order of clients alternates from round to round, that of variants\n\
                 does not, so a machine that slows down shows as a difference.",
                settings.rate,
                counted(settings.rounds, "round"),
                counted(settings.requests, "request"),
                settings.prompt_tokens,
                settings.output_tokens
            );
        }
        text
    }

    fn quality_table(&self) -> String {
        let mut header = vec!["variant", "precision", "weights MiB", "KV B/token", "load s"];
        let stages = self.settings.stages;
        if stages.quality {
            header.extend(["perplexity", "loss %", "KL mean", "KL 99 %", "top-1 same %", "|dp| %"]);
        }
        if stages.answers {
            header.extend(["answers same", "tokens to difference"]);
        }
        let rows = self.variants.iter().map(|variant| {
            let mut row = vec![
                variant.label.clone(),
                variant.precision.clone(),
                format!("{:.1}", mib(variant.weight_bytes)),
                variant.kv_bytes_per_token.to_string(),
                format!("{:.2}", variant.load.as_secs_f64()),
            ];
            if let Some(quality) = &variant.quality {
                row.push(format!("{:.4} ± {:.4}", quality.perplexity.value, quality.perplexity.error));
                row.extend(match &quality.distance {
                    None => vec![NONE.to_owned(); 5],
                    Some(distance) => vec![
                        format!("{:+.2} ± {:.2}", distance.loss * 100.0, distance.loss_error * 100.0),
                        format!("{:.5}", distance.kl_mean),
                        format!("{:.5}", distance.kl_99),
                        format!("{:.2}", distance.same_top * 100.0),
                        format!("{:.2}", distance.probability_shift * 100.0),
                    ],
                });
            }
            if stages.answers {
                row.extend(match &variant.agreement {
                    None => vec![NONE.to_owned(); 2],
                    Some(agreement) => vec![
                        format!("{} of {}", agreement.same, agreement.prompts),
                        format!("{:.1}", agreement.equal_tokens),
                    ],
                });
            }
            row
        });
        aligned(&header, rows.collect(), 2)
    }

    fn speed_table(&self) -> String {
        let currency = self.settings.rate.currency();
        let per_output = format!("{currency}/1M output");
        let per_token = format!("{currency}/1M tokens");
        let header = [
            "variant",
            "clients",
            "output tokens/s",
            "TTFT p50 ms",
            "between p50 ms",
            "device s",
            &per_output,
            &per_token,
            "saved %",
        ];
        let mut rows = Vec::new();
        for &clients in &self.settings.clients {
            for variant in &self.variants {
                let Some(speed) = variant.speeds.iter().find(|speed| speed.clients == clients) else {
                    continue;
                };
                let is_reference = std::ptr::eq(variant, self.reference());
                let saved = self.saved(speed).filter(|_| !is_reference);
                rows.push(vec![
                    variant.label.clone(),
                    clients.to_string(),
                    format!("{:.1}", speed.output_tokens_per_second),
                    format!("{:.0}", speed.ttft_p50.as_secs_f64() * 1e3),
                    format!("{:.1}", speed.between_tokens_p50.as_secs_f64() * 1e3),
                    format!("{:.3}", speed.device_seconds()),
                    format!("{:.4}", speed.cost_per_million_output),
                    format!("{:.4}", speed.cost_per_million_tokens),
                    saved.map_or_else(|| NONE.to_owned(), |saved| format!("{:+.1}", saved * 100.0)),
                ]);
            }
        }
        aligned(&header, rows, 1)
    }

    /// One document with everything; shares are parts of 1, times seconds.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let settings = &self.settings;
        json!({
            "model": self.model,
            "architecture": self.architecture,
            "vocab_size": self.vocab_size,
            "reference": self.reference().label,
            "reference_statement": self.reference_statement(),
            "machine": {
                "device": settings.machine,
                "threads": settings.threads,
                "kv_memory_bytes": settings.kv_memory,
            },
            "version": env!("CARGO_PKG_VERSION"),
            "text": {
                "name": self.text.name,
                "bytes": self.text.content.len(),
                "blake3": self.text.blake3(),
                "tokens": self.text_tokens,
            },
            "settings": {
                "chunks": self.chunks,
                "chunk_tokens": settings.chunk_tokens,
                "positions": self.positions,
                "prompts": if settings.prompts.is_empty() { json!("built-in") } else { json!(settings.prompts) },
                "answer_tokens": settings.answer_tokens,
                "clients": settings.clients,
                "rounds": settings.rounds,
                "requests": settings.requests,
                "prompt_tokens": settings.prompt_tokens,
                "output_tokens": settings.output_tokens,
            },
            "rate": {
                "device_hour": settings.rate.device_hour_decimal(),
                "kv_share": settings.rate.kv_share_decimal(),
                "currency": settings.rate.currency(),
            },
            "variants": self.variants.iter().map(|variant| self.variant_json(variant)).collect::<Vec<_>>(),
        })
    }

    fn variant_json(&self, variant: &Measured) -> Value {
        let quality = variant.quality.as_ref().map(|quality| {
            json!({
                "perplexity": quality.perplexity.value,
                "perplexity_error": quality.perplexity.error,
                "distance": quality.distance.map(|distance| json!({
                    "perplexity_loss": distance.loss,
                    "perplexity_loss_error": distance.loss_error,
                    "kl_mean": distance.kl_mean,
                    "kl_error": distance.kl_error,
                    "kl_median": distance.kl_median,
                    "kl_99": distance.kl_99,
                    "kl_max": distance.kl_max,
                    "same_top": distance.same_top,
                    "probability_shift": distance.probability_shift,
                })),
            })
        });
        let agreement = variant.agreement.map(|agreement| {
            json!({
                "prompts": agreement.prompts,
                "same": agreement.same,
                "equal_tokens": agreement.equal_tokens,
            })
        });
        let speeds = variant.speeds.iter().map(|speed| {
            json!({
                "clients": speed.clients,
                "output_tokens_per_second": speed.output_tokens_per_second,
                "ttft_p50": speed.ttft_p50.as_secs_f64(),
                "between_tokens_p50": speed.between_tokens_p50.as_secs_f64(),
                "requests": speed.requests,
                "prompt_tokens": speed.prompt_tokens,
                "output_tokens": speed.output_tokens,
                "device_seconds": { "prefill": speed.prefill_seconds, "decode": speed.decode_seconds },
                "cost_per_million_output": speed.cost_per_million_output,
                "cost_per_million_tokens": speed.cost_per_million_tokens,
                "cost_saved": self.saved(speed),
            })
        });
        json!({
            "label": variant.label,
            "quant": variant.quant,
            "kv_dtype": variant.kv_dtype,
            "precision": variant.precision,
            "fingerprint": variant.fingerprint,
            "weight_bytes": variant.weight_bytes,
            "kv_bytes_per_token": variant.kv_bytes_per_token,
            "load_seconds": variant.load.as_secs_f64(),
            "quality": quality,
            "answers": agreement,
            "speed": speeds.collect::<Vec<_>>(),
        })
    }
}
