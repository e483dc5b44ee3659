//! The receipt: one record per request, from which headers, the body's `usage`, reports and exports print.
//!
//! Does: put usage, attribution and prices together; render them.
//! Does not know: accounts, the database, HTTP types.
//! Invariants: its money is a function of its own quantities and its rate alone; the totals are the
//! sums of its lines.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::RequestContext;
use super::price::{Prices, RateCard};
use crate::request::{Finish, Tier};
use crate::units::{BlockNanos, DeviceNanos, Picos, RequestId};
use crate::usage::{Purse, Usage};

/// Whom and what a request is attributed to; what the ledger keeps of a `RequestContext`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribution {
    pub request: RequestId,
    pub client_request_id: Option<String>,
    pub idempotency_key: Option<String>,
    pub key_id: Option<String>,
    pub tenant: String,
    pub user: Option<String>,
    pub metadata: BTreeMap<String, String>,
    pub tags: BTreeMap<String, String>,
    pub model: String,
    pub precision: String,
    pub endpoint: String,
    /// Open requests of earlier builds were written down without it.
    #[serde(default)]
    pub tier: Tier,
}

impl Attribution {
    /// For work that the meter reports under a ticket that was never given out: a bug, booked all the
    /// same. The id is new, since the reported one may stand on another receipt.
    pub(super) fn unknown(usage: &Usage) -> Self {
        Self {
            request: RequestId::new(),
            client_request_id: None,
            idempotency_key: None,
            key_id: None,
            tenant: "unknown".to_owned(),
            user: None,
            metadata: BTreeMap::from([("reported_request".to_owned(), usage.request.0.clone())]),
            tags: BTreeMap::new(),
            model: "unknown".to_owned(),
            precision: "unknown".to_owned(),
            endpoint: "unknown".to_owned(),
            tier: Tier::Default,
        }
    }
}

/// Whose a request is, and who pays for it: `None`, whoever it is attributed to.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) who: Attribution,
    pub(super) purse: Option<Arc<dyn Purse>>,
}

impl From<Attribution> for Claim {
    fn from(who: Attribution) -> Self {
        Self { who, purse: None }
    }
}

impl From<RequestContext> for Attribution {
    fn from(context: RequestContext) -> Self {
        Self {
            request: context.request,
            client_request_id: context.client_request_id,
            idempotency_key: context.idempotency_key,
            key_id: context.key_id,
            tenant: context.tenant,
            user: context.user,
            metadata: context.metadata,
            tags: context.tags,
            model: context.model,
            precision: context.precision,
            endpoint: context.endpoint.to_owned(),
            tier: context.tier,
        }
    }
}

/// What a request used of one device under one rate, and what that costs: each part floored once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub device: String,
    pub rate_version: String,
    pub device_time: DeviceNanos,
    pub kv: BlockNanos,
    pub time: Picos,
    pub memory: Picos,
    /// What of that its tier does not pay, but the house.
    pub discount: Picos,
}

impl Line {
    #[must_use]
    pub fn price(
        device: &str,
        rate: &RateCard,
        prices: &Prices,
        device_time: DeviceNanos,
        kv: BlockNanos,
    ) -> Self {
        Self {
            device: device.to_owned(),
            rate_version: rate.version().to_owned(),
            device_time,
            kv,
            time: prices.time(device_time),
            memory: prices.memory(kv),
            discount: Picos::ZERO,
        }
    }

    /// With the discount that the rate gives the tier; work that ended in an error has none, as nobody pays for it.
    pub(super) fn discounted(mut self, rate: &RateCard, tier: Tier, status: Finish) -> Self {
        if status != Finish::Error {
            self.discount = rate.discount(tier, self.total());
        }
        self
    }

    /// What is left of it to pay.
    pub(super) fn net(&self) -> Picos {
        self.total() - self.discount
    }

    #[must_use]
    pub fn total(&self) -> Picos {
        self.time + self.memory
    }
}

/// What one request used and cost. With status `error` the same figures stand in the account
/// `house:error`, and nobody is charged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    pub attribution: Attribution,
    pub usage: Usage,
    pub device: String,
    /// 0 where the device has no KV pool.
    pub bytes_per_block: u64,
    pub lines: Vec<Line>,
    /// What of its money is over a budget that had to hold, and on the house.
    pub overrun: Picos,
    pub currency: String,
    pub method_id: Option<String>,
}

impl Receipt {
    #[must_use]
    pub fn request(&self) -> &RequestId {
        &self.attribution.request
    }

    #[must_use]
    pub fn time(&self) -> Picos {
        self.lines.iter().map(|line| line.time).sum()
    }

    #[must_use]
    pub fn memory(&self) -> Picos {
        self.lines.iter().map(|line| line.memory).sum()
    }

    /// What the device's time and memory cost, whoever pays.
    #[must_use]
    pub fn gross(&self) -> Picos {
        self.time() + self.memory()
    }

    /// What the house pays of that, since its tier costs less.
    #[must_use]
    pub fn discount(&self) -> Picos {
        self.lines.iter().map(|line| line.discount).sum()
    }

    /// What is charged.
    #[must_use]
    pub fn total(&self) -> Picos {
        self.gross() - self.discount() - self.overrun
    }

    /// The part of the overrun that is of one line: it falls on the first ones.
    pub(super) fn overrun_of(&self, line: usize) -> Picos {
        let before: Picos = self.lines[..line].iter().map(Line::net).sum();
        Picos((self.overrun.0 - before.0).max(0)).min(self.lines[line].net())
    }

    #[must_use]
    pub fn kv_byte_seconds(&self) -> String {
        self.usage.kv.byte_seconds(self.bytes_per_block)
    }

    #[must_use]
    pub fn kv_peak_bytes(&self) -> u64 {
        self.usage.kv_peak_blocks.saturating_mul(self.bytes_per_block)
    }

    /// The receipt as every interface shows it. Nanoseconds and money are decimal strings.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let (who, used) = (&self.attribution, &self.usage);
        json!({
            "request_id": who.request,
            "client_request_id": who.client_request_id,
            "created": used.submitted_at.0 / 1_000_000_000,
            "model": who.model,
            "precision": who.precision,
            "device": self.device,
            "key_id": who.key_id,
            "tenant": who.tenant,
            "user": who.user,
            "tags": who.tags,
            "status": used.status.as_str(),
            "service_tier": who.tier.as_str(),
            "seed": used.seed,
            "tokens": {
                "prompt": used.tokens.prompt,
                "cached": used.tokens.cached,
                "completion": used.tokens.completion,
                "draft_accepted": used.tokens.draft_accepted,
                "draft_rejected": used.tokens.draft_rejected,
            },
            "gpu_seconds": used.device().seconds(),
            "device_ns": {
                "prefill": used.prefill.0.to_string(),
                "decode": used.decode.0.to_string(),
                "total": used.device().0.to_string(),
            },
            "steps": used.steps,
            "kv_byte_seconds": self.kv_byte_seconds(),
            "kv_peak_bytes": self.kv_peak_bytes(),
            "queue_seconds": used.queue.seconds(),
            "ttft_seconds": used.ttft.map(DeviceNanos::seconds),
            "wall_seconds": used.wall.seconds(),
            "cost": {
                "total": self.total().decimal(),
                "time": self.time().decimal(),
                "memory": self.memory().decimal(),
                "discount": self.discount().decimal(),
                "cap_overrun": self.overrun.decimal(),
                "currency": self.currency,
            },
            "lines": self.lines.iter().map(line_json).collect::<Vec<_>>(),
            "method_id": self.method_id,
            "saved": {
                "prefix_cache": used.saved_by_prefix_cache.seconds(),
                "batching": used.saved_by_batching.seconds(),
            },
            "energy_mj": used.energy_mj,
        })
    }

    /// The cost headers of a response that is not streamed, and the trailers of one that is. Names
    /// are lower case.
    #[must_use]
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let used = &self.usage;
        let mut headers = vec![
            ("x-obol-gpu-seconds", used.device().seconds()),
            ("x-obol-kv-byte-seconds", self.kv_byte_seconds()),
            ("x-obol-kv-peak-bytes", self.kv_peak_bytes().to_string()),
            ("x-obol-cached-tokens", used.tokens.cached.to_string()),
            ("x-obol-cost", self.total().decimal()),
            ("server-timing", self.server_timing()),
        ];
        if self.currency == "USD" {
            headers.push(("x-litellm-response-cost", self.total().decimal()));
        }
        headers
    }

    /// Queue, prefill and decode as the client waited for them; `gpu` is the request's share of the device.
    fn server_timing(&self) -> String {
        let used = &self.usage;
        let first = used.ttft.unwrap_or(used.wall);
        let prefill = DeviceNanos(first.0.saturating_sub(used.queue.0));
        let decode = DeviceNanos(used.wall.0.saturating_sub(first.0));
        format!(
            "queue;dur={}, prefill;dur={}, decode;dur={}, gpu;dur={};desc=\"share\"",
            milliseconds(used.queue),
            milliseconds(prefill),
            milliseconds(decode),
            milliseconds(used.device())
        )
    }
}

fn line_json(line: &Line) -> Value {
    json!({
        "device": line.device,
        "rate_version": line.rate_version,
        "device_ns": line.device_time.0.to_string(),
        "block_ns": line.kv.0.to_string(),
        "time": line.time.decimal(),
        "memory": line.memory.decimal(),
        "discount": line.discount.decimal(),
    })
}

/// Decimal milliseconds, nanosecond exact, as `Server-Timing` counts.
fn milliseconds(time: DeviceNanos) -> String {
    format!("{}.{:06}", time.0 / 1_000_000, time.0 % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Ticket, UnixNanos};
    use crate::usage::{PoolInfo, TokenCounts};

    fn receipt(currency: &str) -> Receipt {
        let rate = RateCard::parse("2.5", "0.2", currency, Some("2026-11")).unwrap();
        let pool = PoolInfo { blocks: 1_000, bytes_per_block: 4_096, since: DeviceNanos(0) };
        let usage = Usage {
            request: RequestId("r1".to_owned()),
            ticket: Ticket(1),
            status: Finish::Stop,
            seed: u64::MAX,
            tokens: TokenCounts { prompt: 5, cached: 2, completion: 3, draft_accepted: 0, draft_rejected: 0 },
            prefill: DeviceNanos(1_500_000_000),
            decode: DeviceNanos(1),
            steps: 4,
            kv: BlockNanos(3_000_000_001),
            kv_peak_blocks: 2,
            queue: DeviceNanos(1_000_000),
            ttft: Some(DeviceNanos(3_500_000)),
            wall: DeviceNanos(10_000_001),
            submitted_at: UnixNanos(1_790_000_000_999_999_999),
            finished_at: UnixNanos(1_790_000_001_000_000_000),
            saved_by_prefix_cache: DeviceNanos(7),
            saved_by_batching: DeviceNanos(0),
            energy_mj: Some(1_234),
        };
        let line = Line::price("cpu", &rate, &rate.prices(Some(pool)), usage.device(), usage.kv);
        Receipt {
            attribution: Attribution { tenant: "anonymous".to_owned(), ..Attribution::unknown(&usage) },
            usage,
            device: "cpu".to_owned(),
            bytes_per_block: pool.bytes_per_block,
            lines: vec![line],
            overrun: Picos::ZERO,
            currency: currency.to_owned(),
            method_id: None,
        }
    }

    #[test]
    fn json_has_the_documented_fields_and_formats() {
        let mut receipt = receipt("USD");
        receipt.attribution.request = RequestId("r1".to_owned());
        let want = json!({
            "request_id": "r1", "client_request_id": null, "created": 1_790_000_000_u64, "model": "unknown",
            "precision": "unknown", "device": "cpu", "key_id": null, "tenant": "anonymous", "user": null, "tags": {},
            "status": "stop", "service_tier": "default", "seed": u64::MAX,
            "tokens": {"prompt": 5, "cached": 2, "completion": 3, "draft_accepted": 0, "draft_rejected": 0},
            "gpu_seconds": "1.500000001",
            "device_ns": {"prefill": "1500000000", "decode": "1", "total": "1500000001"},
            "steps": 4, "kv_byte_seconds": "12288.000004096", "kv_peak_bytes": 8192,
            "queue_seconds": "0.001000000", "ttft_seconds": "0.003500000", "wall_seconds": "0.010000001",
            "cost": {"total": "0.000833749999", "time": "0.000833333333", "memory": "0.000000416666",
                     "discount": "0.000000000000", "cap_overrun": "0.000000000000", "currency": "USD"},
            "lines": [{"device": "cpu", "rate_version": "2026-11", "device_ns": "1500000001",
                       "block_ns": "3000000001", "time": "0.000833333333", "memory": "0.000000416666",
                       "discount": "0.000000000000"}],
            "method_id": null, "saved": {"prefix_cache": "0.000000007", "batching": "0.000000000"},
            "energy_mj": 1_234,
        });
        assert_eq!(receipt.to_json(), want);
    }

    #[test]
    fn headers_say_what_the_receipt_says() {
        let receipt = receipt("USD");
        let headers: BTreeMap<_, _> = receipt.headers().into_iter().collect();
        let json = receipt.to_json();
        assert_eq!(headers["x-obol-cost"], json["cost"]["total"]);
        assert_eq!(headers["x-litellm-response-cost"], json["cost"]["total"]);
        assert_eq!(headers["x-obol-gpu-seconds"], json["gpu_seconds"]);
        assert_eq!(headers["x-obol-kv-byte-seconds"], json["kv_byte_seconds"]);
        assert_eq!(headers["x-obol-kv-peak-bytes"], "8192");
        assert_eq!(headers["x-obol-cached-tokens"], "2");
        let timing = "queue;dur=1.000000, prefill;dur=2.500000, decode;dur=6.500001, \
                      gpu;dur=1500.000001;desc=\"share\"";
        assert_eq!(headers["server-timing"], timing);
        let euros = self::receipt("EUR");
        assert!(euros.headers().iter().all(|(name, _)| *name != "x-litellm-response-cost"));
    }
}
