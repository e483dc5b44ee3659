//! An engine in this process as something that answers: no HTTP, no ledger, the same engine and meter as the
//! server's. Prompts are made into tokens before their time begins.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use obol_models::chat_template::{ChatTemplate, TemplateOptions};
use obol_models::tokenizer::Tokenizer;

use super::drive::{Reply, Told};
use super::plan::Endpoint;
use super::workload::Dialogue;
use crate::ledger::RateCard;
use crate::measure::asking::{Answer, NoAnswer, Running, answer, request, reserve, settled};
use crate::request::CacheSalt;
use crate::text::prompt;
use crate::units::{DeviceNanos, Picos};
use crate::usage::Usage;

/// A running engine over a model.
pub struct Started {
    pub running: Running,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    pub facts: Facts,
}

/// What a model is, once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub model: String,
    pub architecture: String,
    /// As receipts call it.
    pub precision: String,
    pub fingerprint: String,
    pub weight_bytes: u64,
    pub load: Duration,
}

/// How requests of one round are asked.
pub(super) struct Asking<'a> {
    started: &'a Started,
    endpoint: Endpoint,
    ignore_eos: bool,
    output_tokens: usize,
    /// The round's own: its requests find each other's prefixes, and no other round's.
    salt: CacheSalt,
    /// Requests that the engine has taken; each is settled.
    submitted: Cell<usize>,
}

/// What the meter charged for a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Charged {
    pub(super) input_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) device_seconds: f64,
    pub(super) cost: f64,
}

impl<'a> Asking<'a> {
    pub(super) fn new(
        started: &'a Started,
        endpoint: Endpoint,
        ignore_eos: bool,
        output_tokens: usize,
        salt: &str,
    ) -> Self {
        let salt = CacheSalt(*blake3::hash(salt.as_bytes()).as_bytes());
        Self { started, endpoint, ignore_eos, output_tokens, salt, submitted: Cell::new(0) }
    }

    pub(super) async fn ask(&self, dialogue: &Dialogue) -> Result<Reply, String> {
        let prompt = self.tokens(dialogue)?;
        let Started { running, tokenizer, .. } = self.started;
        let context = running.engine.config().max_model_len;
        let (length, output) = (prompt.len(), self.output_tokens);
        if length == 0 || length + output > context {
            return Err(format!(
                "a prompt of {length} tokens and an answer of {output} do not fit the context of {context}"
            ));
        }
        let request = request(prompt.into(), output, self.ignore_eos, Some(self.salt));
        let said = |NoAnswer(said)| said;
        let seat = reserve(&running.engine).map_err(said)?;
        self.submitted.set(self.submitted.get() + 1);
        let Answer { tokens, sent, came } = answer(seat, request).await.map_err(said)?;
        if came.is_empty() {
            return Err("the answer has no tokens".into());
        }
        let text = tokenizer.decode(&tokens, true);
        Ok(Reply { sent, came, text, output_tokens: tokens.len() as u64, told: Told::default() })
    }

    fn tokens(&self, dialogue: &Dialogue) -> Result<Vec<u32>, String> {
        let Started { tokenizer, template, .. } = self.started;
        match self.endpoint {
            Endpoint::Completions => {
                let mut tokens = prompt::encode(tokenizer, &dialogue.text(), true);
                if let Some((prefix, more)) = dialogue.exact() {
                    tokens.truncate(prompt::encode(tokenizer, prefix.trim_end(), false).len() + more);
                }
                Ok(tokens)
            }
            Endpoint::Chat => {
                let template = template.as_ref().ok_or("the model has no chat template")?;
                let options = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
                prompt::render_and_encode(template, tokenizer, &dialogue.messages(), options)
                    .map_err(|error| error.to_string())
            }
        }
    }

    /// What all the round's requests were charged; none may run any more.
    pub(super) fn charged(&self, rate: &RateCard) -> Result<Charged, NoAnswer> {
        let running = &self.started.running;
        let usages = settled(&running.reports, self.submitted.get())?;
        // As on a receipt: priced by the request, each part rounded down once.
        let prices = rate.prices(Some(running.engine.config().pool(DeviceNanos::ZERO)));
        let price = |usage: &Usage| prices.time(usage.device()) + prices.memory(usage.kv);
        Ok(Charged {
            input_tokens: usages.iter().map(|usage| usage.tokens.prompt).sum(),
            cached_tokens: usages.iter().map(|usage| usage.tokens.cached).sum(),
            device_seconds: usages.iter().map(Usage::device).sum::<DeviceNanos>().as_secs_f64(),
            cost: usages.iter().map(price).sum::<Picos>().as_f64(),
        })
    }
}
