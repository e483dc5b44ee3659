//! Log-probabilities in the two shapes of OpenAI's API.

use serde_json::{Map, Value, json};

use crate::pipeline::Scored;
use obol_models::tokenizer::Tokenizer;

/// Chat: one object per token, alternatives as a list.
pub(super) fn chat(tokenizer: &Tokenizer, scored: &[Scored]) -> Value {
    let entry = |token: u32, logprob: f32| {
        json!({
            "token": tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": tokenizer.token_bytes(token),
        })
    };
    let content: Vec<Value> = scored
        .iter()
        .map(|scored| {
            let mut value = entry(scored.token, scored.logprobs.chosen);
            value["top_logprobs"] =
                scored.logprobs.top.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
            value
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// Completions: parallel arrays, alternatives as maps from text. The chosen token is always in its map.
pub(super) fn completion(tokenizer: &Tokenizer, scored: &[Scored]) -> Value {
    let tokens: Vec<String> = scored.iter().map(|scored| tokenizer.token_text(scored.token)).collect();
    let top: Vec<Map<String, Value>> = scored
        .iter()
        .map(|scored| {
            let mut map = Map::new();
            for &(token, logprob) in &scored.logprobs.top {
                // Two tokens may read the same; the likelier one comes first and stays.
                map.entry(tokenizer.token_text(token)).or_insert_with(|| finite(logprob));
            }
            map.entry(tokenizer.token_text(scored.token)).or_insert_with(|| finite(scored.logprobs.chosen));
            map
        })
        .collect();
    json!({
        "tokens": tokens,
        "token_logprobs": scored.iter().map(|scored| finite(scored.logprobs.chosen)).collect::<Vec<_>>(),
        "top_logprobs": top,
        "text_offset": scored.iter().map(|scored| scored.offset).collect::<Vec<_>>(),
    })
}

/// JSON has no infinity; OpenAI writes -9999 for "practically never".
fn finite(logprob: f32) -> Value {
    if logprob.is_finite() { json!(logprob) } else { json!(-9999.0) }
}
