//! `POST /v1/chat/completions`: from the body's bytes to an `Ask`.

use serde_json::{Map, Value, json};

use super::params::{Common, Delivery, MaxTokens, Rules, TOP_LOGPROBS_MAX};
use super::tools::{self, Tools};
use crate::config::UnknownFields;
use crate::http::fields::{Fields, Invalid, string_at, wrong_type};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Prompt};
use crate::text::dialect::Chat;

pub(crate) fn parse(body: &[u8], rules: &Rules, asker: Asker) -> Result<(Ask, Delivery), Invalid> {
    let mut fields = Fields::parse(body)?;
    let mut common = Common::read(&mut fields, rules)?;
    common.sampling.logprobs = logprobs(&mut fields)?;
    let limit = MaxTokens::read_both(&mut fields)?;
    let messages = fields
        .array("messages")?
        .ok_or_else(|| Invalid::new("messages", "`messages` is required: an array of messages"))?;
    let messages = messages_of(messages, rules.unknown)?;
    let Tools { tools, single, form } = tools::read(&mut fields, rules)?;
    if let Some(param) = common.form_param().filter(|_| !tools.is_empty()) {
        let message =
            format!("`{param}` does not go together with `tools`: leave one out, or say `tool_choice: none`");
        return Err(Invalid::new(param, message));
    }
    if let Some(form) = form {
        common.must_be(form, "tools");
    }
    let continues = continues(&mut fields, &messages)?;
    let template = fields.object("chat_template_kwargs")?.map(Fields::into_map).unwrap_or_default();
    refuse_what_is_not_honoured(&mut fields)?;
    fields.finish(rules.unknown)?;
    let delivery = Delivery { scored: common.sampling.logprobs.is_some(), ..common.delivery };
    let chat = Chat { messages, tools, single, continues, template, ..Chat::default() };
    Ok((common.ask(vec![Prompt::Chat(chat)], limit, asker)?, delivery))
}

/// Whether the answer goes on with the last message, as vLLM's clients say it.
fn continues(fields: &mut Fields, messages: &Value) -> Result<bool, Invalid> {
    let continues = fields.boolean("continue_final_message")?.unwrap_or(false);
    let param = "continue_final_message";
    if fields.boolean("add_generation_prompt")?.is_some_and(|opens| opens == continues) {
        let message =
            "`add_generation_prompt` is true, or false together with `continue_final_message: true`";
        return Err(Invalid::new("add_generation_prompt", message));
    }
    let last = messages.as_array().and_then(|messages| messages.last());
    let goes_on = last.is_some_and(|last| {
        last["role"] == "assistant" && last["content"].as_str().is_some_and(|said| !said.trim().is_empty())
    });
    if continues && !goes_on {
        let message = format!("`{param}`: the last message is not the assistant's, or has no text");
        return Err(Invalid::new(param, message));
    }
    Ok(continues)
}

/// Messages as templates take them: text content joined, `developer` as `system`.
///
/// Shared with `/tokenize`, which counts what a chat would cost.
pub(crate) fn messages_of(messages: Vec<Value>, unknown: UnknownFields) -> Result<Value, Invalid> {
    if messages.is_empty() {
        return Err(Invalid::new("messages", "`messages` is empty: send at least one message"));
    }
    let numbered = messages.into_iter().enumerate();
    let read = numbered.map(|(i, message)| self::message(&format!("messages[{i}]"), message, unknown));
    Ok(Value::Array(read.collect::<Result<_, _>>()?))
}

fn message(path: &str, value: Value, unknown: UnknownFields) -> Result<Value, Invalid> {
    let mut fields = Fields::of(path, value)?;
    let role_path = fields.path("role");
    let role = fields
        .string("role")?
        .ok_or_else(|| Invalid::new(&role_path, format!("`{role_path}` is required")))?;
    let mut message = Map::new();
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        other => {
            return Err(Invalid::new(
                &role_path,
                format!("`{role_path}` = {other:?}: use system, developer, user, assistant or tool"),
            ));
        }
    };
    message.insert("role".into(), json!(role));
    if let Some(name) = fields.string("name")? {
        message.insert("name".into(), json!(name));
    }
    let mut content_optional = false;
    match role {
        "assistant" => {
            let calls = fields.array("tool_calls")?.unwrap_or_default();
            if !calls.is_empty() {
                content_optional = true;
                let path = fields.path("tool_calls");
                message.insert("tool_calls".into(), tool_calls(&path, calls, unknown)?);
            }
            // What our own answers and OpenAI's carry, and clients send back as they got it.
            // What it thought; templates leave out or show it as their models want it.
            if let Some(thought) = fields.string("reasoning_content")? {
                message.insert("reasoning_content".into(), json!(thought));
            }
            fields.only("refusal", &[], "refusals are not kept in a conversation")?;
            fields.only("annotations", &[json!([])], "annotations are not read")?;
            fields.only("audio", &[], "only text is read")?;
            fields.only("function_call", &[], "use `tool_calls`")?;
            // What the `openai` and `litellm` packages note on the answers that they give out.
            fields.ignore(&["parsed", "provider_specific_fields"]);
        }
        "tool" => {
            let id_path = fields.path("tool_call_id");
            let id = fields.string("tool_call_id")?;
            let id = id.ok_or_else(|| Invalid::new(&id_path, format!("`{id_path}` is required")))?;
            message.insert("tool_call_id".into(), json!(id));
        }
        _ => {}
    }
    let content_path = fields.path("content");
    let text = match fields.take("content") {
        Some(content) => text_of(&content_path, content, unknown)?,
        None if content_optional => String::new(),
        None => return Err(Invalid::new(&content_path, format!("`{content_path}` is required"))),
    };
    message.insert("content".into(), json!(text));
    fields.finish(unknown)?;
    Ok(Value::Object(message))
}

/// A message's text: a string, or text parts with a line break between, as other servers put them together.
fn text_of(path: &str, content: Value, unknown: UnknownFields) -> Result<String, Invalid> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if parts.is_empty() => {
            return Err(Invalid::new(path, format!("`{path}` has no parts")));
        }
        Value::Array(parts) => parts,
        other => return Err(wrong_type(path, "a string or an array of parts", &other)),
    };
    let mut whole = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        if i > 0 {
            whole.push('\n');
        }
        let path = format!("{path}[{i}]");
        let mut fields = Fields::of(&path, part)?;
        let type_path = fields.path("type");
        match fields.string("type")?.as_deref() {
            Some("text") => {}
            Some(other) => {
                let message = format!("`{type_path}` = {other:?}: this server reads text only");
                return Err(Invalid::new(type_path, message));
            }
            None => return Err(Invalid::new(&type_path, format!("`{type_path}` is required"))),
        }
        let text_path = fields.path("text");
        let text = fields.string("text")?;
        let required = || Invalid::new(&text_path, format!("`{text_path}` is required"));
        whole.push_str(&text.ok_or_else(required)?);
        fields.finish(unknown)?;
    }
    Ok(whole)
}

/// An assistant's earlier calls, for the template. Arguments become an object where they are one:
/// templates print them with `tojson`.
fn tool_calls(path: &str, calls: Vec<Value>, unknown: UnknownFields) -> Result<Value, Invalid> {
    let mut read = Vec::with_capacity(calls.len());
    for (i, call) in calls.into_iter().enumerate() {
        let mut call = Fields::of(&format!("{path}[{i}]"), call)?;
        let function_path = call.path("function");
        let id = call.string("id")?;
        call.only("type", &[json!("function")], "only functions are called")?;
        call.ignore(&["index", "provider_specific_fields"]);
        let function = call
            .take("function")
            .ok_or_else(|| Invalid::new(&function_path, format!("`{function_path}` is required")))?;
        call.finish(unknown)?;
        let mut function = Fields::of(&function_path, function)?;
        let name_path = function.path("name");
        let name = function.string("name")?;
        let name = name.ok_or_else(|| Invalid::new(&name_path, format!("`{name_path}` is required")))?;
        let arguments_path = function.path("arguments");
        let arguments = match function.take("arguments") {
            Some(value) => string_at(&arguments_path, value)?,
            None => "{}".to_owned(),
        };
        function.ignore(&["parsed_arguments", "provider_specific_fields"]);
        function.finish(unknown)?;
        let arguments = serde_json::from_str(&arguments).unwrap_or(Value::String(arguments));
        read.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}));
    }
    Ok(Value::Array(read))
}

/// `logprobs: true` asks for the chosen token's, `top_logprobs` for that many alternatives besides.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Invalid> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    let top = top.map(|top| u32::try_from(top).expect("checked against its range"));
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(Invalid::new("top_logprobs", "`top_logprobs` needs `logprobs: true`")),
    }
}

/// OpenAI's fields that this server does not act on: the values that ask for nothing are fine.
fn refuse_what_is_not_honoured(fields: &mut Fields) -> Result<(), Invalid> {
    let none = [json!("none"), json!("auto")];
    fields.only("functions", &[json!([])], "use `tools`")?;
    fields.only("function_call", &none, "use `tool_choice`")?;
    fields.only("modalities", &[json!(["text"])], "answers are text")?;
    fields.only("audio", &[], "answers are text")?;
    fields.only("prediction", &[], "predicted outputs are not available")?;
    fields.only("reasoning_effort", &[json!("none")], "the effort cannot be set")?;
    fields.only("verbosity", &[json!("medium")], "the verbosity cannot be set")?;
    fields.only("web_search_options", &[], "there is no web search")?;
    fields.only(
        "prompt_cache_retention",
        &[json!("in_memory"), json!("in-memory")],
        "the cache is in memory",
    )?;
    // A hint that keeps requests with one prefix together. The prefix cache spans all of a tenant's
    // requests, so any key is honoured.
    fields.string("prompt_cache_key")?;
    Ok(())
}
