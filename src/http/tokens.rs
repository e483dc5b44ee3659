//! `POST /tokenize` and `/detokenize`: the model's own tokenizer, as its requests use it; and `GET /tokenizer_info`,
//! what programs ask that tokenise through these two.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, Invalid};
use super::openai::{messages_of, tokens_at};
use super::{Server, body};
use crate::pipeline::{self, Prompt};
use crate::text::dialect::Chat;

/// Answers `{tokens, count, max_model_len}` for a text, or for messages as the template writes them.
pub(super) async fn tokenize(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let (head, body) = request.into_parts();
    let body = body::read(&server.config, &head.headers, body).await?;
    let unknown = server.config.unknown_fields;
    let mut fields = Fields::parse(&body)?;
    let model = fields.string("model")?.unwrap_or_else(|| "default".into());
    let served = app.check_model(&model)?;
    app.check_allowed(caller.key().map(|key| &**key), &model)?;
    let add_special = fields.boolean("add_special_tokens")?;
    let prompt = match (fields.string("prompt")?, fields.array("messages")?) {
        (Some(text), None) => Prompt::Text { text, add_special: add_special.unwrap_or(true) },
        (None, Some(_)) if add_special == Some(true) => {
            let message = "`add_special_tokens` is for `prompt`: chat templates write theirs themselves";
            return Err(Invalid::new("add_special_tokens", message).into());
        }
        (None, Some(messages)) => Prompt::Chat(Chat::of(messages_of(messages, unknown)?)),
        _ => return Err(Invalid::new("prompt", "give either `prompt` or `messages`").into()),
    };
    fields.finish(unknown)?;
    let tokens = pipeline::tokenize(app, &model, prompt).await?;
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": served.context_length,
        "tokens": tokens,
    })))
}

/// Answers `{prompt}`: the text of the tokens, special ones written out.
pub(super) async fn detokenize(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let (head, body) = request.into_parts();
    let body = body::read(&server.config, &head.headers, body).await?;
    let mut fields = Fields::parse(&body)?;
    if let Some(model) = fields.string("model")? {
        app.check_generates(&model)?;
        app.check_allowed(caller.key().map(|key| &**key), &model)?;
    }
    let items = fields.array("tokens")?;
    let items = items.ok_or_else(|| Invalid::new("tokens", "`tokens` is required: an array of token ids"))?;
    fields.finish(server.config.unknown_fields)?;
    let tokens = tokens_at("tokens", &items, app.tokenizer().vocab_size())?;
    Ok(Json(json!({"prompt": app.tokenizer().decode(&tokens, false)})))
}

/// Answers what the tokenizer's special tokens read, and the chat template, as vLLM does.
pub(super) async fn info(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let tokenizer = app.tokenizer();
    let text = |token: Option<u32>| token.map(|token| tokenizer.token_text(token));
    Ok(Json(json!({
        "bos_token": text(tokenizer.bos()),
        "eos_token": text(tokenizer.eos()),
        "pad_token": null,
        "vocab_size": tokenizer.vocab_size(),
        "model_max_length": app.served().context_length,
        "chat_template": app.template().map(|template| template.source()),
    })))
}
