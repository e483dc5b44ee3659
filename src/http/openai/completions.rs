//! `POST /v1/completions`: from the body's bytes to an `Ask`.

use serde_json::{Value, json};

use super::params::{Common, Delivery, MaxTokens, Rules};
use crate::http::fields::{Fields, Invalid, string_at, token_at, wrong_type};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Prompt};

/// Most alternatives a position may report: over OpenAI's 5, as the chat endpoint gives.
const LOGPROBS_MAX: i64 = 20;
/// Most prompts of one request.
const PROMPTS_MAX: usize = 128;

pub(crate) fn parse(body: &[u8], rules: &Rules, asker: Asker) -> Result<(Ask, Delivery), Invalid> {
    let mut fields = Fields::parse(body)?;
    let mut common = Common::read(&mut fields, rules)?;
    let logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?;
    common.sampling.logprobs = logprobs.map(|top| u32::try_from(top).expect("checked against its range"));
    let limit = MaxTokens::read(&mut fields)?;
    let prompt = fields.take("prompt").ok_or_else(|| Invalid::new("prompt", "`prompt` is required"))?;
    let prompts = prompts_of("prompt", prompt, PROMPTS_MAX, rules.vocab_size)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let score = echo && logprobs.is_some();
    if score && common.delivery.stream {
        let message = "`echo` with `logprobs` does not go together with `stream`";
        return Err(Invalid::new("echo", message));
    }
    let best = best_of(&mut fields, &mut common, rules)?;
    fields.only("suffix", &[json!("")], "insertion is not available")?;
    fields.finish(rules.unknown)?;
    let delivery = Delivery { echo, best, scored: logprobs.is_some(), ..common.delivery };
    let ask = common.ask(prompts, limit, asker)?;
    Ok((Ask { score_prompts: score, ..ask }, delivery))
}

/// How many of `best_of` choices are shown, where those are more than `n`.
fn best_of(fields: &mut Fields, common: &mut Common, rules: &Rules) -> Result<Option<u32>, Invalid> {
    let Some(best_of) = fields.integer("best_of", 1..=i64::from(rules.choices_max))? else { return Ok(None) };
    let (shown, all) = (common.choices, u32::try_from(best_of).expect("checked against choices_max"));
    if all < shown {
        return Err(Invalid::new("best_of", format!("`best_of` ({all}) is under `n` ({shown})")));
    }
    if all == shown {
        return Ok(None);
    }
    if common.delivery.stream {
        let message =
            "`best_of` does not go together with `stream`: which answers are best is known at their end";
        return Err(Invalid::new("best_of", message));
    }
    common.choices = all;
    common.sampling.logprobs.get_or_insert(0);
    Ok(Some(shown))
}

/// A string, token ids, or a list of either, of which at most `most`. Several are one request, with one receipt.
pub(crate) fn prompts_of(
    name: &str,
    value: Value,
    most: usize,
    vocab_size: usize,
) -> Result<Vec<Prompt>, Invalid> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text { text, add_special: true }]),
        Value::Array(items) => items,
        other => return Err(wrong_type(name, "a string or an array", &other)),
    };
    match items.first() {
        None => return Err(Invalid::new(name, format!("`{name}` is empty"))),
        Some(first) if first.is_number() => {
            return Ok(vec![Prompt::Tokens(tokens_at(name, &items, vocab_size)?)]);
        }
        Some(_) => {}
    }
    if items.len() > most {
        let message = format!("`{name}` has {} entries; at most {most} are taken", items.len());
        return Err(Invalid::new(name, message));
    }
    let numbered = items.into_iter().enumerate();
    numbered.map(|(at, item)| prompt_at(&format!("{name}[{at}]"), item, vocab_size)).collect()
}

fn prompt_at(path: &str, item: Value, vocab_size: usize) -> Result<Prompt, Invalid> {
    match item {
        Value::Array(ids) if ids.is_empty() => Err(Invalid::new(path, format!("`{path}` is empty"))),
        Value::Array(ids) => Ok(Prompt::Tokens(tokens_at(path, &ids, vocab_size)?)),
        text => Ok(Prompt::Text { text: string_at(path, text)?, add_special: true }),
    }
}

/// Token ids at `path`, all within the vocabulary.
pub(crate) fn tokens_at(path: &str, items: &[Value], vocab_size: usize) -> Result<Vec<u32>, Invalid> {
    items.iter().enumerate().map(|(i, item)| token_at(&format!("{path}[{i}]"), item, vocab_size)).collect()
}
