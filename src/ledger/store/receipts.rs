//! A receipt's rows.

use std::collections::BTreeMap;

use rusqlite::params;

use super::{SqlResult, Writer, picos};
use crate::ledger::entry::Transaction;
use crate::ledger::receipt::Receipt;
use crate::ledger::rows::split;

impl Writer<'_> {
    pub(super) fn receipt(&self, transaction: &Transaction, receipt: &Receipt) -> SqlResult<()> {
        let (who, used) = (&receipt.attribution, &receipt.usage);
        let (hi, lo) = split(used.kv.0)?;
        self.insert(
            "INSERT INTO receipts (tx, request_id, ticket, client_request_id, idempotency_key, key_id, tenant,
             user, metadata, tags, model, precision, endpoint, status, seed, prompt_tokens, cached_tokens,
             completion_tokens, draft_accepted, draft_rejected, prefill_ns, decode_ns, steps, block_ns_hi,
             block_ns_lo, bytes_per_block, kv_peak_blocks, queue_ns, ttft_ns, wall_ns, submitted_at,
             finished_at, saved_prefix_cache_ns, saved_batching_ns, device, currency, method_id, energy_mj,
             overrun_picos, service_tier)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19,
             ?20, ?21, ?22, ?23, ?24, ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35, ?36, ?37, ?38,
             ?39, ?40)",
            params![
                transaction.id,
                who.request.0,
                used.ticket.0,
                who.client_request_id,
                who.idempotency_key,
                who.key_id,
                who.tenant,
                who.user,
                json(&who.metadata)?,
                json(&who.tags)?,
                who.model,
                who.precision,
                who.endpoint,
                used.status.as_str(),
                used.seed.cast_signed(),
                used.tokens.prompt,
                used.tokens.cached,
                used.tokens.completion,
                used.tokens.draft_accepted,
                used.tokens.draft_rejected,
                used.prefill.0,
                used.decode.0,
                used.steps,
                hi,
                lo,
                receipt.bytes_per_block,
                used.kv_peak_blocks,
                used.queue.0,
                used.ttft.map(|time| time.0),
                used.wall.0,
                used.submitted_at.0,
                used.finished_at.0,
                used.saved_by_prefix_cache.0,
                used.saved_by_batching.0,
                receipt.device,
                receipt.currency,
                receipt.method_id,
                used.energy_mj,
                picos(receipt.overrun.0)?,
                who.tier.as_str()
            ],
        )?;
        for (number, line) in (0_i64..).zip(&receipt.lines) {
            let (hi, lo) = split(line.kv.0)?;
            self.insert(
                "INSERT INTO receipt_lines (tx, line, device, rate_version, device_ns, block_ns_hi,
                 block_ns_lo, time_picos, memory_picos, discount_picos)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
                params![
                    transaction.id,
                    number,
                    line.device,
                    line.rate_version,
                    line.device_time.0,
                    hi,
                    lo,
                    picos(line.time.0)?,
                    picos(line.memory.0)?,
                    picos(line.discount.0)?
                ],
            )?;
        }
        Ok(())
    }
}

fn json(pairs: &BTreeMap<String, String>) -> SqlResult<String> {
    serde_json::to_string(pairs).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}
