//! `POST /v1/rerank` and `/v1/score`: how near texts are to each other, as the cosine of their embeddings.
//!
//! A request's texts are computed together and have one receipt. Shapes: Cohere's and Jina's for rerank, vLLM's for
//! score. Scores are between -1 and 1; a text that is compared several times is computed once.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::embeddings::{INPUTS_MAX, check_texts, model};
use super::error::ApiError;
use super::fields::{Fields, Invalid, string_at, wrong_type};
use super::generate::{answer_vectors, received, refused};
use super::openai::{metadata, usage_of_inputs, user};
use super::origin::asker;
use crate::config::UnknownFields;
use crate::pipeline::{Ask, Prompt};
use crate::units::RequestId;

/// Answers the documents, nearest to the query first.
pub(super) async fn rerank(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = reranked(&server, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

/// Answers how near each pair is.
pub(super) async fn score(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = scored(&server, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

async fn reranked(
    server: &Server,
    id: RequestId,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, bytes) = received(server, request).await?;
    let app = server.app()?;
    let (fields, parsed) = Rerank::parse(&bytes)?;
    let Rerank { query, documents, top, returns } = parsed;
    let texts = std::iter::once(&query).chain(&documents).cloned();
    let ask =
        ask_for(server, (id.clone(), caller, &head), "/v1/rerank", fields, texts.collect(), "documents")?;
    let model = app.check_model(&ask.model)?.id.clone();
    answer_vectors(app, ask, |vectors, receipt| {
        let (query, vectors) = vectors.split_first().expect("the query's comes first");
        let mut results: Vec<(usize, f64)> =
            vectors.iter().map(|vector| cosine(query, vector)).enumerate().collect();
        // Equal ones stay in order.
        results.sort_by(|a, b| b.1.total_cmp(&a.1));
        results.truncate(top);
        let results = results.into_iter().map(|(index, score)| {
            let mut result = json!({"index": index, "relevance_score": score});
            if returns {
                result["document"] = json!({"text": documents[index]});
            }
            result
        });
        json!({
            "id": format!("rerank-{id}"),
            "model": model,
            "results": results.collect::<Vec<_>>(),
            "usage": usage_of_inputs(receipt),
        })
    })
    .await
}

async fn scored(
    server: &Server,
    id: RequestId,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, bytes) = received(server, request).await?;
    let app = server.app()?;
    let mut fields = Fields::parse(&bytes)?;
    let first = texts_at(&mut fields, "text_1")?;
    let second = texts_at(&mut fields, "text_2")?;
    let pairs = pairs(first.len(), second.len())?;
    let texts = [first, second].concat();
    let ask = ask_for(server, (id.clone(), caller, &head), "/v1/score", fields, texts, "text_1 and text_2")?;
    let (model, created) = (app.check_model(&ask.model)?.id.clone(), app.clock().wall().0 / 1_000_000_000);
    answer_vectors(app, ask, |vectors, receipt| {
        let data = pairs.iter().enumerate().map(|(index, (a, b))| {
            json!({"index": index, "object": "score", "score": cosine(&vectors[*a], &vectors[*b])})
        });
        json!({
            "id": format!("score-{id}"),
            "object": "list",
            "created": created,
            "model": model,
            "data": data.collect::<Vec<_>>(),
            "usage": usage_of_inputs(receipt),
        })
    })
    .await
}

/// The request for the vectors of `texts`, with what is left of the fields.
fn ask_for(
    server: &Server,
    (id, caller, head): (RequestId, Caller, &Parts),
    endpoint: &'static str,
    mut fields: Fields,
    texts: Vec<String>,
    param: &'static str,
) -> Result<Ask, ApiError> {
    let asker = asker(server, caller, &head.headers, id, endpoint)?;
    let model = model(&mut fields)?;
    let origin = asker.origin(user(&mut fields)?, metadata(&mut fields)?)?;
    fields.finish(server.config.unknown_fields)?;
    if texts.len() > INPUTS_MAX {
        let message = format!("{} texts; at most {INPUTS_MAX} are taken in one request", texts.len());
        return Err(Invalid::new(param, message).into());
    }
    let inputs: Vec<Prompt> =
        texts.into_iter().map(|text| Prompt::Text { text, add_special: true }).collect();
    check_texts(param, &inputs)?;
    Ok(Ask::vectors(model, inputs, param, origin))
}

/// What only rerank has.
struct Rerank {
    query: String,
    documents: Vec<String>,
    /// So many of the results are told.
    top: usize,
    /// Each with its document.
    returns: bool,
}

impl Rerank {
    fn parse(body: &Bytes) -> Result<(Fields, Self), Invalid> {
        let mut fields = Fields::parse(body)?;
        let query = fields.string("query")?;
        let query = query.ok_or_else(|| Invalid::new("query", "`query` is required"))?;
        let documents = fields.array("documents")?;
        let documents = documents.ok_or_else(|| Invalid::new("documents", "`documents` is required"))?;
        if documents.is_empty() {
            return Err(Invalid::new("documents", "`documents` is empty"));
        }
        let documents = documents.into_iter().enumerate();
        let documents: Vec<String> =
            documents.map(|(at, value)| document_at(at, value)).collect::<Result<_, _>>()?;
        let top = fields.count("top_n", 1)?.map_or(documents.len(), |top| top as usize);
        let returns = fields.boolean("return_documents")?.unwrap_or(true);
        Ok((fields, Self { query, documents, top, returns }))
    }
}

/// A text, or an object with one.
fn document_at(at: usize, value: Value) -> Result<String, Invalid> {
    let path = format!("documents[{at}]");
    match value {
        Value::String(text) => Ok(text),
        Value::Object(_) => {
            let mut fields = Fields::of(&path, value)?;
            let text = fields.string("text")?;
            let text = text.ok_or_else(|| Invalid::new(&path, format!("`{path}` has no `text`")))?;
            fields.finish(UnknownFields::Reject)?;
            Ok(text)
        }
        other => Err(wrong_type(&path, "a string or an object with a `text`", &other)),
    }
}

/// One text or several.
fn texts_at(fields: &mut Fields, name: &str) -> Result<Vec<String>, Invalid> {
    match fields.take(name) {
        None => Err(Invalid::new(name, format!("`{name}` is required"))),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(items)) if items.is_empty() => {
            Err(Invalid::new(name, format!("`{name}` is empty")))
        }
        Some(Value::Array(items)) => {
            let numbered = items.into_iter().enumerate();
            numbered.map(|(at, item)| string_at(&format!("{name}[{at}]"), item)).collect()
        }
        Some(other) => Err(wrong_type(name, "a string or an array of strings", &other)),
    }
}

/// Which texts are compared, the second ones counted on from the first: one with each, or each with its own.
fn pairs(first: usize, second: usize) -> Result<Vec<(usize, usize)>, Invalid> {
    if first != 1 && first != second {
        let message = format!(
            "`text_1` has {first} texts and `text_2` {second}: give one of `text_1`, or as many of both"
        );
        return Err(Invalid::new("text_2", message));
    }
    Ok((0..second).map(|at| (if first == 1 { 0 } else { at }, first + at)).collect())
}

/// Of vectors of length 1.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sum.clamp(-1.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_is_compared_with_each_and_several_with_their_own() {
        assert_eq!(pairs(1, 3), Ok(vec![(0, 1), (0, 2), (0, 3)]));
        assert_eq!(pairs(2, 2), Ok(vec![(0, 2), (1, 3)]));
        assert_eq!(pairs(1, 1), Ok(vec![(0, 1)]));
        for (first, second) in [(2, 1), (2, 3), (3, 2)] {
            let refused = pairs(first, second).expect_err("not as many").message;
            assert!(refused.contains(&first.to_string()) && refused.contains("as many of both"), "{refused}");
        }
    }
}
