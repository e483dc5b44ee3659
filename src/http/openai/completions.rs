//! `POST /v1/completions`: from the body's bytes to an `Ask`.

use serde_json::{Value, json};

use super::params::{Common, Delivery, MaxTokens, Rules};
use crate::http::fields::{Fields, Invalid, string_at, token_at, wrong_type};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Prompt};

/// Most alternatives a position may report: over OpenAI's 5, as the chat endpoint gives.
const LOGPROBS_MAX: i64 = 20;

pub(crate) fn parse(body: &[u8], rules: &Rules, asker: Asker) -> Result<(Ask, Delivery), Invalid> {
    let mut fields = Fields::parse(body)?;
    let mut common = Common::read(&mut fields, rules)?;
    let logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?;
    common.sampling.logprobs = logprobs.map(|top| u32::try_from(top).expect("checked against its range"));
    let limit = MaxTokens::read(&mut fields)?;
    let prompt = fields.take("prompt").ok_or_else(|| Invalid::new("prompt", "`prompt` is required"))?;
    let prompt = prompt_of(prompt, rules)?;
    fields.only("echo", &[json!(false)], "the prompt is not repeated in the answer")?;
    fields.only("suffix", &[json!("")], "insertion is not available")?;
    fields.only("best_of", &[json!(common.choices)], "use `n` and choose among the answers")?;
    fields.finish(rules.unknown)?;
    let delivery = common.delivery;
    Ok((common.ask(prompt, limit, asker)?, delivery))
}

/// A string, token ids, or a list with one of these. A request is one prompt: its receipt is for
/// one prefix, so several prompts are several requests.
fn prompt_of(value: Value, rules: &Rules) -> Result<Prompt, Invalid> {
    let items = match value {
        Value::String(text) => return Ok(Prompt::Text { text, add_special: true }),
        Value::Array(items) => items,
        other => return Err(wrong_type("prompt", "a string or an array", &other)),
    };
    let Some(first) = items.first() else {
        return Err(Invalid::new("prompt", "`prompt` is empty"));
    };
    if first.is_number() {
        return Ok(Prompt::Tokens(tokens_at("prompt", &items, rules.vocab_size)?));
    }
    let mut items = items;
    if items.len() > 1 {
        return Err(Invalid::new(
            "prompt",
            format!(
                "`prompt` has {} prompts: send one prompt a request, each gets its own receipt",
                items.len()
            ),
        ));
    }
    match items.remove(0) {
        Value::Array(ids) if ids.is_empty() => Err(Invalid::new("prompt[0]", "`prompt[0]` is empty")),
        Value::Array(ids) => Ok(Prompt::Tokens(tokens_at("prompt[0]", &ids, rules.vocab_size)?)),
        text => Ok(Prompt::Text { text: string_at("prompt[0]", text)?, add_special: true }),
    }
}

/// Token ids at `path`, all within the vocabulary.
pub(crate) fn tokens_at(path: &str, items: &[Value], vocab_size: usize) -> Result<Vec<u32>, Invalid> {
    items.iter().enumerate().map(|(i, item)| token_at(&format!("{path}[{i}]"), item, vocab_size)).collect()
}
