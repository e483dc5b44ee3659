//! From a body in Anthropic's shape to an `Ask`: blocks become the messages that chat templates take.

use serde_json::{Map, Value, json};

use crate::config::UnknownFields;
use crate::grammar::Form;
use crate::http::fields::{Fields, Invalid, required, wrong_type};
use crate::http::openai::{
    Common, MaxTokens, Rules, ToolChoice, Tools, decide_tools, metadata, strings_to_stop_at, tool_name,
};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Prompt};
use crate::text::dialect::Chat;

/// The request, and whether its answer is streamed.
pub(in crate::http) fn parse(body: &[u8], rules: &Rules, asker: Asker) -> Result<(Ask, bool), Invalid> {
    let mut fields = Fields::parse(body)?;
    let mut common = Common::read_core(&mut fields, rules)?;
    let limit = MaxTokens::read(&mut fields)?;
    if limit.value.is_none() {
        let message = "`max_tokens` is required: the most tokens that the answer may have";
        return Err(Invalid::new("max_tokens", message));
    }
    let stream = fields.boolean("stream")?.unwrap_or(false);
    common.stop = strings_to_stop_at(&mut fields, "stop_sequences")?;
    common.metadata = metadata(&mut fields)?;
    common.user = common.metadata.remove("user_id");
    let Asked { chat, form } = Asked::read(&mut fields, rules)?;
    if let Some((form, param)) = form {
        common.must_be(form, param);
    }
    fields.finish(rules.unknown)?;
    Ok((common.ask(vec![Prompt::Chat(chat)], limit, asker)?, stream))
}

/// The model and the chat whose tokens are to be counted.
pub(in crate::http) fn parse_count(body: &[u8], rules: &Rules) -> Result<(String, Chat), Invalid> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model")?;
    let model = model.ok_or_else(|| required("model"))?;
    let chat = Asked::read(&mut fields, rules)?.chat;
    fields.finish(rules.unknown)?;
    Ok((model, chat))
}

/// What both endpoints read.
struct Asked {
    chat: Chat,
    form: Option<(Form, &'static str)>,
}

impl Asked {
    fn read(fields: &mut Fields, rules: &Rules) -> Result<Self, Invalid> {
        let unknown = rules.unknown;
        cache_control(fields, unknown)?;
        let mut template = Map::new();
        if let Some(thinking) = fields.object("thinking")? {
            template = self::thinking(thinking, unknown)?;
        }
        let mut messages = Vec::new();
        if let Some(system) = fields.take("system") {
            let text = texts("system", system, unknown)?;
            messages.push(json!({"role": "system", "content": text}));
        }
        let given = fields.array("messages")?.ok_or_else(|| required("messages"))?;
        if given.is_empty() {
            return Err(Invalid::new("messages", "`messages` is empty: send at least one message"));
        }
        for (i, message) in given.into_iter().enumerate() {
            read_message(&format!("messages[{i}]"), message, unknown, &mut messages)?;
        }
        let continues = goes_on(&mut messages)?;
        let Tools { tools, single, form } = tools(fields, rules)?;
        let mut form = form.map(|form| (form, "tools"));
        if let Some(schema) = output_config(fields, unknown)? {
            if !tools.is_empty() {
                let message = "`output_config.format` does not go together with `tools`: leave one out, or \
                               say `tool_choice: {\"type\": \"none\"}`";
                return Err(Invalid::new("output_config.format", message));
            }
            form = Some((Form::JsonSchema(schema), "output_config.format"));
        }
        refuse_what_is_not_honoured(fields)?;
        let messages = Value::Array(messages);
        let chat = Chat { messages, tools, single, continues, template, ..Chat::default() };
        Ok(Self { chat, form })
    }
}

/// Marks of what should be cached: all prefixes are.
fn cache_control(fields: &mut Fields, unknown: UnknownFields) -> Result<(), Invalid> {
    let Some(mut control) = fields.object("cache_control")? else { return Ok(()) };
    let path = control.path("type");
    let kind = control.string("type")?;
    if kind.as_deref() != Some("ephemeral") {
        return Err(Invalid::new(&path, format!("`{path}` is \"ephemeral\"")));
    }
    control.only("ttl", &[json!("5m"), json!("1h")], "prefixes are kept while there is room")?;
    control.finish(unknown)
}

/// Names for the template.
fn thinking(mut thinking: Fields, unknown: UnknownFields) -> Result<Map<String, Value>, Invalid> {
    let path = thinking.path("type");
    let mut template = Map::new();
    match thinking.string("type")?.as_deref() {
        // The model thinks as long as it will, if it is one that thinks.
        Some("adaptive") => thinking.only("display", &[json!("summarized")], "thoughts are told")?,
        Some("disabled") => {
            template.insert("enable_thinking".into(), json!(false));
        }
        Some("enabled") => {
            let message = "`thinking.type` = \"enabled\": how many tokens are thought for cannot be set; use \
                           \"adaptive\" or \"disabled\"";
            return Err(Invalid::new(&path, message));
        }
        _ => return Err(Invalid::new(&path, format!("`{path}` is \"adaptive\" or \"disabled\""))),
    }
    thinking.finish(unknown)?;
    Ok(template)
}

/// A text, or blocks of text with a line break between.
fn texts(path: &str, content: Value, unknown: UnknownFields) -> Result<String, Invalid> {
    let blocks = match content {
        Value::String(text) => return Ok(text),
        Value::Array(blocks) => blocks,
        other => return Err(wrong_type(path, "a string or an array of blocks", &other)),
    };
    let mut whole = Vec::with_capacity(blocks.len());
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::of(&format!("{path}[{i}]"), block)?;
        match kind(&mut block)?.as_str() {
            "text" => whole.push(text_block(block, unknown)?),
            other => return Err(not_read(&block, other, "text")),
        }
    }
    Ok(whole.join("\n"))
}

fn kind(block: &mut Fields) -> Result<String, Invalid> {
    block.needed("type")
}

fn not_read(block: &Fields, kind: &str, read: &str) -> Invalid {
    let path = block.path("type");
    let message = format!("`{path}` = {kind:?}: this server reads {read} here");
    Invalid::new(path, message)
}

fn text_block(mut block: Fields, unknown: UnknownFields) -> Result<String, Invalid> {
    let text = block.needed("text")?;
    cache_control(&mut block, unknown)?;
    block.only("citations", &[json!([])], "there are no citations")?;
    block.finish(unknown)?;
    Ok(text)
}

/// Adds what a message says to those for the template; what a tool gave is a message of its own there.
fn read_message(
    path: &str,
    value: Value,
    unknown: UnknownFields,
    messages: &mut Vec<Value>,
) -> Result<(), Invalid> {
    let mut message = Fields::of(path, value)?;
    let role_path = message.path("role");
    let role = message.needed("role")?;
    let content_path = message.path("content");
    let content = message.take("content").ok_or_else(|| required(&content_path))?;
    message.finish(unknown)?;
    match (role.as_str(), content) {
        ("user" | "assistant", Value::String(text)) => add(messages, &role, text),
        ("system", content) => add(messages, &role, texts(&content_path, content, unknown)?),
        ("user", Value::Array(blocks)) => user_blocks(&content_path, blocks, unknown, messages)?,
        ("assistant", Value::Array(blocks)) => assistant_blocks(&content_path, blocks, unknown, messages)?,
        ("user" | "assistant", other) => {
            return Err(wrong_type(&content_path, "a string or an array of blocks", &other));
        }
        (other, _) => {
            let message = format!("`{role_path}` = {other:?}: use user or assistant");
            return Err(Invalid::new(role_path, message));
        }
    }
    Ok(())
}

/// A turn's text; neighbours of one role are one turn, as in Anthropic's API.
fn add(messages: &mut Vec<Value>, role: &str, text: String) {
    match messages.last_mut() {
        Some(last) if last["role"] == role && role != "system" && last.get("tool_calls").is_none() => {
            let said = last["content"].as_str().unwrap_or_default();
            let between = if said.is_empty() || text.is_empty() { "" } else { "\n" };
            last["content"] = json!(format!("{said}{between}{text}"));
        }
        _ => messages.push(json!({"role": role, "content": text})),
    }
}

fn user_blocks(
    path: &str,
    blocks: Vec<Value>,
    unknown: UnknownFields,
    messages: &mut Vec<Value>,
) -> Result<(), Invalid> {
    if blocks.is_empty() {
        return Err(Invalid::new(path, format!("`{path}` has no blocks")));
    }
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::of(&format!("{path}[{i}]"), block)?;
        match kind(&mut block)?.as_str() {
            "text" => add(messages, "user", text_block(block, unknown)?),
            "tool_result" => messages.push(tool_result(block, unknown)?),
            other => return Err(not_read(&block, other, "text and tool_result")),
        }
    }
    Ok(())
}

/// Templates have no word for a tool that failed, so the text says it.
fn tool_result(mut block: Fields, unknown: UnknownFields) -> Result<Value, Invalid> {
    let id = block.needed("tool_use_id")?;
    let path = block.path("content");
    let text = match block.take("content") {
        Some(content) => texts(&path, content, unknown)?,
        None => String::new(),
    };
    let failed = block.boolean("is_error")?.unwrap_or(false);
    cache_control(&mut block, unknown)?;
    block.finish(unknown)?;
    let text = if failed { format!("Error: {text}") } else { text };
    Ok(json!({"role": "tool", "tool_call_id": id, "content": text}))
}

fn assistant_blocks(
    path: &str,
    blocks: Vec<Value>,
    unknown: UnknownFields,
    messages: &mut Vec<Value>,
) -> Result<(), Invalid> {
    let (mut thoughts, mut said, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::of(&format!("{path}[{i}]"), block)?;
        match kind(&mut block)?.as_str() {
            "text" => said.push(text_block(block, unknown)?),
            "thinking" => {
                thoughts.push(block.needed("thinking")?);
                // Of no use here: thoughts are not kept from the client.
                block.string("signature")?;
                block.finish(unknown)?;
            }
            "tool_use" => calls.push(tool_use(block, unknown)?),
            other => return Err(not_read(&block, other, "text, thinking and tool_use")),
        }
    }
    let text = said.join("\n");
    if thoughts.is_empty() && calls.is_empty() {
        add(messages, "assistant", text);
        return Ok(());
    }
    let mut message = json!({"role": "assistant", "content": text});
    if !thoughts.is_empty() {
        message["reasoning_content"] = json!(thoughts.join("\n"));
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    messages.push(message);
    Ok(())
}

fn tool_use(mut block: Fields, unknown: UnknownFields) -> Result<Value, Invalid> {
    let id = block.needed("id")?;
    let name = block.needed("name")?;
    let path = block.path("input");
    let input = block.object("input")?.ok_or_else(|| required(&path))?.into_value();
    cache_control(&mut block, unknown)?;
    block.only("caller", &[json!({"type": "direct"})], "only the model calls")?;
    block.finish(unknown)?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
}

/// Whether the answer goes on with the last message. One that says nothing is left out, as in Anthropic's API.
fn goes_on(messages: &mut Vec<Value>) -> Result<bool, Invalid> {
    let Some(last) = messages.last().filter(|last| last["role"] == "assistant") else { return Ok(false) };
    if last.get("tool_calls").is_some() {
        let message = "`messages` ends with a tool_use: send what it gave, as a tool_result, behind it";
        return Err(Invalid::new("messages", message));
    }
    let text = last["content"].as_str().unwrap_or_default();
    if text.is_empty() {
        messages.pop();
        return Ok(false);
    }
    if text.ends_with(char::is_whitespace) {
        let message =
            "`messages`: the text of the last message, which the answer goes on with, ends with a space";
        return Err(Invalid::new("messages", message));
    }
    Ok(true)
}

fn tools(fields: &mut Fields, rules: &Rules) -> Result<Tools, Invalid> {
    let given = fields.array("tools")?.unwrap_or_default().into_iter().enumerate();
    let tools = given.map(|(i, tool)| tool_of(&format!("tools[{i}]"), tool, rules));
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let (choice, single) = match fields.object("tool_choice")? {
        None => (ToolChoice::Auto, false),
        Some(mut choice) => {
            let kind = kind(&mut choice)?;
            let single = choice.boolean("disable_parallel_tool_use")?.unwrap_or(false);
            let chosen = match kind.as_str() {
                "auto" => ToolChoice::Auto,
                "any" => ToolChoice::Required,
                "none" => ToolChoice::None,
                "tool" => ToolChoice::Named(choice.needed("name")?),
                other => {
                    let message = format!("`tool_choice.type` = {other:?}: use auto, any, tool or none");
                    return Err(Invalid::new("tool_choice.type", message));
                }
            };
            choice.finish(rules.unknown)?;
            (chosen, single)
        }
    };
    decide_tools(tools, "name", choice, single, rules)
}

/// A tool in OpenAI's form.
fn tool_of(path: &str, tool: Value, rules: &Rules) -> Result<Value, Invalid> {
    let mut tool = Fields::of(path, tool)?;
    tool.only("type", &[json!("custom")], "only tools of the client's own are called")?;
    let mut function = Map::new();
    function.insert("name".into(), json!(tool_name(&mut tool)?));
    if let Some(description) = tool.string("description")? {
        function.insert("description".into(), json!(description));
    }
    let path = tool.path("input_schema");
    let schema = tool.object("input_schema")?.ok_or_else(|| required(&path))?;
    function.insert("parameters".into(), schema.into_value());
    cache_control(&mut tool, rules.unknown)?;
    // Inputs of calls that must be made keep to the schema, and all are told as they come.
    tool.boolean("strict")?;
    tool.boolean("eager_input_streaming")?;
    tool.only("defer_loading", &[json!(false)], "all tools are shown to the model")?;
    tool.only("allowed_callers", &[json!(["direct"])], "only the model calls")?;
    tool.only("input_examples", &[json!([])], "put examples into the description")?;
    tool.finish(rules.unknown)?;
    Ok(json!({"type": "function", "function": function}))
}

/// The schema of the answer.
fn output_config(fields: &mut Fields, unknown: UnknownFields) -> Result<Option<Value>, Invalid> {
    let Some(mut config) = fields.object("output_config")? else { return Ok(None) };
    config.only("effort", &[], "the effort cannot be set")?;
    let format = config.object("format")?;
    config.finish(unknown)?;
    let Some(mut format) = format else { return Ok(None) };
    match kind(&mut format)?.as_str() {
        "json_schema" => {}
        other => return Err(not_read(&format, other, "json_schema")),
    }
    let path = format.path("schema");
    let schema = format.object("schema")?.ok_or_else(|| required(&path))?.into_value();
    format.finish(unknown)?;
    Ok(Some(schema))
}

fn refuse_what_is_not_honoured(fields: &mut Fields) -> Result<(), Invalid> {
    fields.only("service_tier", &[json!("auto"), json!("standard_only")], "there is one tier")?;
    fields.only("speed", &[json!("standard")], "there is one speed")?;
    fields.only("container", &[], "there are no containers")?;
    fields.only("mcp_servers", &[json!([])], "this server calls no others")?;
    fields.only("context_management", &[json!({"edits": []})], "conversations are not edited")?;
    fields.only("inference_geo", &[], "answers are computed here")?;
    // The package's tool runner asks for one first. By this code it knows to send all messages, and goes on.
    let thread = fields.only("thread", &[], "conversations are not kept; send all their messages");
    thread.map_err(|error| error.coded("thread_unsupported_request"))?;
    fields.only("diagnostics", &[], "receipts say how much of the prompt was cached")
}
