//! `POST /v1/embeddings`: inputs to vectors of length 1, in OpenAI's shape.
//!
//! All inputs of a request have one receipt. `dimensions` cuts the vectors to their first values and makes them of
//! length 1 again.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, Invalid};
use super::generate::{answer_vectors, received, refused};
use super::openai::{Rules, metadata, prompts_of, usage_of_inputs, user};
use super::origin::{Asker, asker};
use crate::ledger::Receipt;
use crate::pipeline::{Ask, Prompt};
use crate::units::RequestId;

/// Most inputs of one request, as OpenAI takes.
pub(super) const INPUTS_MAX: usize = 2048;

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    /// 32-bit floats, the lowest byte first.
    Base64,
}

/// A request's own words, apart from its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    encoding: Encoding,
    dimensions: Option<usize>,
}

/// The model that a body names.
#[derive(Deserialize)]
struct Named {
    model: Option<String>,
}

/// Answers a vector for each input.
pub(super) async fn embeddings(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = answered(&server, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

async fn answered(
    server: &Server,
    id: RequestId,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, bytes) = received(server, request).await?;
    let app = server.app()?;
    let asker = asker(server, caller, &head.headers, id, "/v1/embeddings")?;
    // Token ids are those of the model that is asked for. What cannot be read is the parser's to say.
    let named = serde_json::from_slice::<Named>(&bytes).ok().and_then(|named| named.model);
    let vocab_size = app.vocab_size(named.as_deref().unwrap_or_default());
    let (ask, wanted) = parse(&bytes, &Rules { vocab_size, ..server.rules(app) }, asker)?;
    let model = app.check_model(&ask.model)?.id.clone();
    if let Some(dimensions) = wanted.dimensions {
        let size = app.vector_size(&ask.model)?;
        if dimensions > size {
            let message = format!("`dimensions` is {dimensions}, but the model's vectors have {size}");
            return Err(Invalid::new("dimensions", message).into());
        }
    }
    answer_vectors(app, ask, |vectors, receipt| body(&model, vectors, wanted, receipt)).await
}

pub(super) fn parse(body: &[u8], rules: &Rules, asker: Asker) -> Result<(Ask, Wanted), Invalid> {
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields)?;
    let input = fields.take("input").ok_or_else(|| Invalid::new("input", "`input` is required"))?;
    let inputs = prompts_of("input", input, INPUTS_MAX, rules.vocab_size)?;
    check_texts("input", &inputs)?;
    let encoding = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            let message = format!("`encoding_format` = {other:?}: use float or base64");
            return Err(Invalid::new("encoding_format", message));
        }
    };
    let dimensions = fields.count("dimensions", 1)?.map(|dimensions| dimensions as usize);
    let origin = asker.origin(user(&mut fields)?, metadata(&mut fields)?)?;
    fields.finish(rules.unknown)?;
    Ok((Ask::vectors(model, inputs, "input", origin), Wanted { encoding, dimensions }))
}

/// The model that is asked for.
pub(super) fn model(fields: &mut Fields) -> Result<String, Invalid> {
    let model = fields.string("model")?;
    model.ok_or_else(|| Invalid::new("model", "`model` is required: name a model that /v1/models lists"))
}

/// Whether each text says something: of an empty one there is nothing to compute, whatever the tokenizer puts before it.
pub(super) fn check_texts(name: &str, inputs: &[Prompt]) -> Result<(), Invalid> {
    let empty = |input: &Prompt| matches!(input, Prompt::Text { text, .. } if text.is_empty());
    match inputs.iter().position(empty) {
        None => Ok(()),
        Some(at) => Err(Invalid::new(name, format!("`{name}`: number {at} (from 0) is an empty text"))),
    }
}

fn body(model: &str, vectors: Vec<Vec<f32>>, wanted: Wanted, receipt: &Receipt) -> Value {
    let data = vectors.into_iter().enumerate().map(|(index, vector)| {
        let vector = cut(vector, wanted.dimensions);
        let embedding = match wanted.encoding {
            // Each is exactly what the other form says: no decimal is shortened.
            Encoding::Float => json!(vector.into_iter().map(f64::from).collect::<Vec<_>>()),
            Encoding::Base64 => {
                json!(base64(&vector.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>()))
            }
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    });
    json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": model,
        "usage": usage_of_inputs(receipt),
    })
}

/// The first `dimensions` values, of length 1 again unless they are all zero.
fn cut(mut vector: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
    let Some(dimensions) = dimensions.filter(|dimensions| *dimensions < vector.len()) else { return vector };
    vector.truncate(dimensions);
    let length = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    vector
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().enumerate().fold(0u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for digit in 0..4 {
            let known = digit <= group.len();
            let value = (bits >> (18 - 6 * digit) & 63) as usize;
            text.push(if known { char::from(DIGITS[value]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    #[test]
    fn a_cut_vector_has_length_1() {
        assert_eq!(cut(vec![0.6, 0.0, 0.8], Some(3)), [0.6, 0.0, 0.8]);
        assert_eq!(cut(vec![0.6, 0.0, 0.8], None), [0.6, 0.0, 0.8]);
        assert_eq!(cut(vec![0.6, 0.0, 0.8], Some(2)), [1.0, 0.0]);
        assert_eq!(cut(vec![0.0, 1.0], Some(1)), [0.0]);
        let cut = cut(vec![0.5; 4], Some(2));
        assert!((cut[0] - 0.5f32.sqrt()).abs() < 1e-7 && cut[0] == cut[1]);
    }
}
