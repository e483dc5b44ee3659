//! Log-probabilities in the two shapes of OpenAI's API.

use serde_json::{Map, Value, json};

use crate::pipeline::Scored;
use crate::request::TokenLogprobs;
use obol_models::tokenizer::Tokenizer;

/// Chat: one object per token, alternatives as a list.
pub(crate) fn chat(tokenizer: &Tokenizer, scored: &[Scored]) -> Value {
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
    let tokens = scored.iter().map(|scored| (scored.token, scored.offset, Some(&scored.logprobs)));
    arrays(tokenizer, tokens)
}

/// As [`completion`], of a text that begins with its prompt, which has so many characters. The prompt's first token has
/// no log-probability.
pub(super) fn echoed(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    scores: &[TokenLogprobs],
    begins: usize,
    scored: &[Scored],
) -> Value {
    let mut offset = 0;
    let known = [None].into_iter().chain(scores.iter().map(Some));
    let prompt = prompt.iter().zip(known).map(|(token, score)| {
        let at = offset;
        if !tokenizer.is_special(*token) {
            offset += tokenizer.token_text(*token).chars().count();
        }
        // A character in several tokens counts once in the text.
        (*token, at.min(begins), score)
    });
    let drawn = scored.iter().map(|scored| (scored.token, begins + scored.offset, Some(&scored.logprobs)));
    arrays(tokenizer, prompt.chain(drawn))
}

fn arrays<'a>(
    tokenizer: &Tokenizer,
    scored: impl Iterator<Item = (u32, usize, Option<&'a TokenLogprobs>)>,
) -> Value {
    let (mut tokens, mut chosen, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (token, offset, logprobs) in scored {
        tokens.push(tokenizer.token_text(token));
        offsets.push(offset);
        chosen.push(logprobs.map_or(Value::Null, |logprobs| finite(logprobs.chosen)));
        tops.push(logprobs.map_or(Value::Null, |logprobs| {
            let mut map = Map::new();
            for &(token, logprob) in &logprobs.top {
                // Two tokens may read the same; the likelier one comes first and stays.
                map.entry(tokenizer.token_text(token)).or_insert_with(|| finite(logprob));
            }
            map.entry(tokenizer.token_text(token)).or_insert_with(|| finite(logprobs.chosen));
            Value::Object(map)
        }));
    }
    json!({"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets})
}

/// JSON has no infinity; OpenAI writes -9999 for "practically never".
fn finite(logprob: f32) -> Value {
    if logprob.is_finite() { json!(logprob) } else { json!(-9999.0) }
}
