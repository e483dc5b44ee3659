//! An OpenAI stream, chunk by chunk, to an answer with its times and its counts. Reads completions and chat
//! alike, usage as OpenAI tells it, and our own servers' receipt inside it.

use std::time::Instant;

use serde::Deserialize;
use serde_json::Value;

use super::drive::Told;
use super::sse::{Events, TooLong};

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    /// What reasoning models say first, by the two names in use.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<PromptDetails>,
    cost: Option<f64>,
    obol: Option<Receipt>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

/// What is read of a receipt.
#[derive(Deserialize)]
struct Receipt {
    gpu_seconds: Option<String>,
    cost: Option<ReceiptCost>,
}

#[derive(Deserialize)]
struct ReceiptCost {
    total: Option<String>,
    currency: Option<String>,
}

/// A stream that is still coming.
#[derive(Default)]
pub(super) struct Stream {
    events: Events,
    seen: Seen,
}

#[derive(Default)]
struct Seen {
    came: Vec<Instant>,
    text: String,
    usage: Option<Usage>,
    finished: bool,
    done: bool,
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Streamed {
    /// When chunks with text came; not empty.
    pub(super) came: Vec<Instant>,
    pub(super) text: String,
    pub(super) output_tokens: u64,
    /// The server told no count: `output_tokens` is that of chunks.
    pub(super) counted_parts: bool,
    pub(super) told: Told,
    pub(super) currency: Option<String>,
}

/// Why a stream is no answer.
struct Broken(String);

impl From<TooLong> for Broken {
    fn from(TooLong: TooLong) -> Self {
        Self("an event of the answer does not end".into())
    }
}

impl Stream {
    /// Takes what came at an instant.
    pub(super) fn push(&mut self, bytes: &[u8], at: Instant) -> Result<(), String> {
        let Self { events, seen } = self;
        events.push(bytes, |data| seen.event(data, at).map_err(Broken)).map_err(|Broken(said)| said)
    }

    /// The answer, once nothing more comes.
    pub(super) fn finish(self) -> Result<Streamed, String> {
        let Seen { came, text, usage, finished, done } = self.seen;
        if !done && !finished {
            return Err(format!("the stream ended before the answer did, after {} parts", came.len()));
        }
        if came.is_empty() {
            return Err("the answer has no text".into());
        }
        let told_tokens = usage.as_ref().and_then(|usage| usage.completion_tokens);
        let usage = usage.as_ref();
        let receipt = usage.and_then(|usage| usage.obol.as_ref());
        let money = receipt.and_then(|receipt| receipt.cost.as_ref());
        let exact = money.and_then(|cost| cost.total.as_ref()?.parse().ok());
        Ok(Streamed {
            output_tokens: told_tokens.unwrap_or(came.len() as u64),
            counted_parts: told_tokens.is_none(),
            told: Told {
                input_tokens: usage.and_then(|usage| usage.prompt_tokens),
                cached_tokens: usage.and_then(|usage| usage.prompt_tokens_details.as_ref()?.cached_tokens),
                cost: exact.or_else(|| usage.and_then(|usage| usage.cost)),
                device_seconds: receipt.and_then(|receipt| receipt.gpu_seconds.as_ref()?.parse().ok()),
            },
            currency: money.and_then(|cost| cost.currency.clone()),
            came,
            text,
        })
    }
}

impl Seen {
    fn event(&mut self, data: &[u8], at: Instant) -> Result<(), String> {
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            let text: String = String::from_utf8_lossy(data).chars().take(200).collect();
            format!("a chunk that is not understood ({error}): {text}")
        })?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            return Err(format!("an error in the stream: {error}"));
        }
        let before = self.text.len();
        for choice in &chunk.choices {
            let delta = choice.delta.as_ref();
            let parts = [
                choice.text.as_ref(),
                delta.and_then(|delta| delta.content.as_ref()),
                delta.and_then(|delta| delta.reasoning_content.as_ref()),
                delta.and_then(|delta| delta.reasoning.as_ref()),
            ];
            parts.into_iter().flatten().for_each(|part| self.text += part);
            self.finished |= choice.finish_reason.is_some();
        }
        if self.text.len() > before {
            self.came.push(at);
        }
        // Some servers tell usage so far with every chunk: the last counts.
        if chunk.usage.is_some() {
            self.usage = chunk.usage;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(parts: &[&str]) -> Result<Streamed, String> {
        let (mut stream, begin) = (Stream::default(), Instant::now());
        for (index, part) in parts.iter().enumerate() {
            stream.push(part.as_bytes(), begin + Duration::from_millis(index as u64))?;
        }
        stream.finish()
    }

    #[test]
    fn our_stream_tells_tokens_cost_and_device_time() {
        let answer = read(&[
            "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}],\"usage\":null}\n\n",
            ": keep-alive\n\n",
            "data: {\"choices\":[{\"text\":\"bc\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\
             \"prompt_tokens_details\":{\"cached_tokens\":8},\"cost\":0.1,\"obol\":{\"gpu_seconds\":\
             \"0.250000000\",\"cost\":{\"total\":\"0.100000000001\",\"currency\":\"EUR\"}}}}\n\n",
            "data: [DONE]\n\n",
        ])
        .unwrap();
        assert_eq!((answer.text.as_str(), answer.output_tokens, answer.counted_parts), ("abc", 4, false));
        assert_eq!(answer.came[1] - answer.came[0], Duration::from_millis(2));
        let told = Told {
            input_tokens: Some(9),
            cached_tokens: Some(8),
            cost: Some(0.100_000_000_001),
            device_seconds: Some(0.25),
        };
        assert_eq!((answer.told, answer.currency.as_deref()), (told, Some("EUR")));
    }

    #[test]
    fn chat_without_usage_is_counted_by_its_chunks() {
        let answer = read(&[
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        ])
        .unwrap();
        assert_eq!((answer.text.as_str(), answer.output_tokens, answer.counted_parts), ("hmx", 2, true));
        assert_eq!((answer.told, answer.currency), (Told::default(), None));
    }

    #[test]
    fn what_is_no_answer_is_said() {
        let chunk = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
        for (parts, says) in [
            (&[chunk][..], "before the answer did, after 1 parts"),
            (&["data: [DONE]\n\n"], "no text"),
            (&["data: {\"error\":{\"message\":\"no room\"}}\n\n"], "no room"),
            (&["data: {\"choices\": 3}\n\n"], "not understood"),
            (&["data: nonsense\n\n"], "nonsense"),
        ] {
            let said = read(parts).unwrap_err();
            assert!(said.contains(says), "{parts:?}: {said}");
        }
    }
}
