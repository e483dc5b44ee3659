//! `POST /v1/responses`: from the body's bytes to an `Ask`, by way of what came before.

use serde_json::{Map, Value, json};

use super::items;
use crate::config::UnknownFields;
use crate::grammar::Form;
use crate::http::fields::{Fields, Invalid, required};
use crate::http::openai::{
    Common, MaxTokens, Rules, TOP_LOGPROBS_MAX, ToolChoice, Tools, decide_tools, form_beside, function_of,
    metadata, schema_at, strings_to_stop_at, tier, user,
};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Prompt};
use crate::text::dialect::Chat;
use crate::units::RequestId;

const LOGPROBS: &str = "message.output_text.logprobs";
/// What else the API can be asked to include: it belongs to items that are never made here, and thoughts come as text,
/// which can be sent back as well as their encrypted form.
const INCLUDES_NOTHING: [&str; 7] = [
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
];

/// A request for a response, before what it goes on from is known.
pub(in crate::http) struct Requested {
    common: Common,
    limit: MaxTokens,
    chat: Spoken,
    pub(super) stream: bool,
    pub(super) store: Option<bool>,
    /// What the answer repeats of the request.
    pub(super) settings: Map<String, Value>,
}

/// What is said to the model, as far as this request has it.
pub(super) struct Spoken {
    pub(super) previous: Option<String>,
    instructions: Option<String>,
    items: Vec<Value>,
    tools: Vec<Value>,
    single: bool,
    template: Map<String, Value>,
}

impl Requested {
    pub(in crate::http) fn read(body: &[u8], rules: &Rules, request: &RequestId) -> Result<Self, Invalid> {
        let mut fields = Fields::parse(body)?;
        let settings = settings(&fields);
        let mut common = Common::read_core(&mut fields, rules)?;
        let limit = MaxTokens { value: fields.count("max_output_tokens", 1)?, param: "max_output_tokens" };
        let stream = stream(&mut fields, rules.unknown)?;
        common.stop = strings_to_stop_at(&mut fields, "stop")?;
        common.metadata = metadata(&mut fields)?;
        common.user = user(&mut fields)?;
        common.tier = tier(&mut fields)?;
        common.sampling.logprobs = logprobs(&mut fields)?;
        let store = fields.boolean("store")?;
        let (chat, form) = Spoken::read(&mut fields, rules, request)?;
        if let Some((form, param)) = form {
            common.must_be(form, param);
        }
        if common.sampling.logprobs.is_some() && !chat.is_plain(rules) {
            let message = format!(
                "`include` = {LOGPROBS:?} is for answers that are text alone: leave out `tools`, and say \
                 `reasoning: {{\"effort\": \"none\"}}` to a model that thinks"
            );
            return Err(Invalid::new("include", message));
        }
        refuse_what_is_not_honoured(&mut fields)?;
        fields.finish(rules.unknown)?;
        Ok(Self { common, limit, chat, stream, store, settings })
    }

    pub(super) fn previous(&self) -> Option<&str> {
        self.chat.previous.as_deref()
    }

    pub(super) fn items(&self) -> &[Value] {
        &self.chat.items
    }

    /// The whole request, going on from `history`.
    pub(super) fn ask(self, history: &[Value], asker: Asker) -> Result<Ask, Invalid> {
        let chat = self.chat.after(history);
        self.common.ask(vec![Prompt::Chat(chat)], self.limit, asker)
    }
}

/// The model, and what is said to it, for who asks how many tokens that has.
pub(super) fn read_to_count(
    body: &[u8],
    rules: &Rules,
    request: &RequestId,
) -> Result<(String, Spoken), Invalid> {
    let mut fields = Fields::parse(body)?;
    let model = fields.needed("model")?;
    let (chat, _) = Spoken::read(&mut fields, rules, request)?;
    fields.only("conversation", &[], "use `previous_response_id`")?;
    fields.only("truncation", &[json!("disabled")], "no items are left out by themselves")?;
    fields.finish(rules.unknown)?;
    Ok((model, chat))
}

type Named = (Form, &'static str);

impl Spoken {
    fn read(
        fields: &mut Fields,
        rules: &Rules,
        request: &RequestId,
    ) -> Result<(Self, Option<Named>), Invalid> {
        let previous = fields.string("previous_response_id")?;
        let instructions = fields.string("instructions")?;
        let input = fields.take("input").ok_or_else(|| required("input"))?;
        let items = items::read(input, request, rules.unknown)?;
        let template = reasoning(fields, rules.unknown)?;
        let own = text_format(fields, rules.unknown)?;
        let asked = form_beside(own, fields, rules.unknown)?;
        let Tools { tools, single, form } = tools(fields, rules)?;
        if let Some((_, param)) = asked.as_ref().filter(|_| !tools.is_empty()) {
            let message = format!(
                "`{param}` does not go together with `tools`: leave one out, or say `tool_choice: none`"
            );
            return Err(Invalid::new(*param, message));
        }
        let form = form.map(|form| (form, "tools")).or(asked);
        Ok((Self { previous, instructions, items, tools, single, template }, form))
    }

    /// Whether answers to it are text alone.
    fn is_plain(&self, rules: &Rules) -> bool {
        let thinks = rules.dialect.is_some_and(|dialect| dialect.thinks);
        self.tools.is_empty() && (!thinks || self.template.contains_key("enable_thinking"))
    }

    /// The chat that goes on from `history`.
    pub(super) fn after(self, history: &[Value]) -> Chat {
        let items = history.iter().chain(&self.items);
        let messages = items::messages(self.instructions.as_deref(), items);
        Chat {
            param: "input",
            messages: Value::Array(messages),
            tools: self.tools,
            single: self.single,
            continues: false,
            template: self.template,
        }
    }
}

/// What the answer repeats, but for the tier: what was given, else what holds without it.
fn settings(fields: &Fields) -> Map<String, Value> {
    let given = |name: &str, or: Value| fields.peek(name).cloned().unwrap_or(or);
    let within = |name: &str, defaults: Value| {
        let (mut object, given) = (defaults, given(name, json!({})));
        for (name, value) in given.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            object[name] = value.clone();
        }
        object
    };
    let settings = json!({
        "background": false,
        "instructions": given("instructions", Value::Null),
        "max_output_tokens": given("max_output_tokens", Value::Null),
        "max_tool_calls": given("max_tool_calls", Value::Null),
        "metadata": given("metadata", json!({})),
        "parallel_tool_calls": given("parallel_tool_calls", json!(true)),
        "previous_response_id": given("previous_response_id", Value::Null),
        "prompt_cache_key": given("prompt_cache_key", Value::Null),
        "reasoning": within("reasoning", json!({"effort": null, "summary": null})),
        "safety_identifier": given("safety_identifier", Value::Null),
        "temperature": given("temperature", json!(1.0)),
        "text": within("text", json!({"format": {"type": "text"}})),
        "tool_choice": given("tool_choice", json!("auto")),
        "tools": given("tools", json!([])),
        "top_logprobs": given("top_logprobs", json!(0)),
        "top_p": given("top_p", json!(1.0)),
        "truncation": "disabled",
        "user": given("user", Value::Null),
    });
    let Value::Object(settings) = settings else { unreachable!("an object was made") };
    settings
}

fn stream(fields: &mut Fields, unknown: UnknownFields) -> Result<bool, Invalid> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    if let Some(mut options) = fields.object("stream_options")? {
        if !stream {
            let message = "`stream_options` is only for requests with `stream: true`";
            return Err(Invalid::new("stream_options", message));
        }
        options.only("include_obfuscation", &[json!(false)], "streams are not padded")?;
        options.finish(unknown)?;
    }
    Ok(stream)
}

/// Log-probabilities are asked for by `include`; `top_logprobs` says how many alternatives come along.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Invalid> {
    let mut wanted = false;
    for (i, value) in fields.array("include")?.unwrap_or_default().into_iter().enumerate() {
        match value.as_str() {
            Some(LOGPROBS) => wanted = true,
            Some(other) if INCLUDES_NOTHING.contains(&other) => {}
            _ => {
                let path = format!("include[{i}]");
                let message = format!("`{path}` is not known: this server can include {LOGPROBS:?}");
                return Err(Invalid::new(path, message));
            }
        }
    }
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?.unwrap_or(0);
    if top > 0 && !wanted {
        let message = format!("`top_logprobs` needs `include: [{LOGPROBS:?}]`");
        return Err(Invalid::new("top_logprobs", message));
    }
    Ok(wanted.then(|| u32::try_from(top).expect("checked against its range")))
}

/// Names for the template.
fn reasoning(fields: &mut Fields, unknown: UnknownFields) -> Result<Map<String, Value>, Invalid> {
    let mut template = Map::new();
    let Some(mut reasoning) = fields.object("reasoning")? else { return Ok(template) };
    let path = reasoning.path("effort");
    match reasoning.string("effort")?.as_deref() {
        None => {}
        Some("none") => {
            template.insert("enable_thinking".into(), json!(false));
        }
        Some(other) => {
            let message = format!(
                "`{path}` = {other:?}: how much is thought cannot be set; leave it out, or say \"none\" to \
                 have no thoughts"
            );
            return Err(Invalid::new(path, message));
        }
    }
    let summaries = "thoughts are told whole, not in summaries";
    reasoning.only("summary", &[json!("auto")], summaries)?;
    reasoning.only("generate_summary", &[json!("auto")], summaries)?;
    reasoning.only("context", &[json!("auto")], "which thoughts are told again is the chat template's")?;
    reasoning.only("mode", &[json!("standard")], "there is one mode")?;
    reasoning.finish(unknown)?;
    Ok(template)
}

/// `text`: what the answer must look like.
fn text_format(fields: &mut Fields, unknown: UnknownFields) -> Result<Option<Named>, Invalid> {
    let Some(mut text) = fields.object("text")? else { return Ok(None) };
    text.only("verbosity", &[json!("medium")], "the verbosity cannot be set")?;
    let format = text.object("format")?;
    text.finish(unknown)?;
    let Some(mut format) = format else { return Ok(None) };
    let path = format.path("type");
    let form = match format.needed("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Form::JsonObject),
        "json_schema" => {
            format.string("name")?;
            format.string("description")?;
            // The schema is always kept to.
            format.boolean("strict")?;
            let schema = schema_at(&mut format, "schema")?;
            Some(schema.ok_or_else(|| required(&format.path("schema")))?)
        }
        other => {
            let message = format!("`{path}` = {other:?}: use text, json_object or json_schema");
            return Err(Invalid::new(path, message));
        }
    };
    format.finish(unknown)?;
    Ok(form.map(|form| (form, "text.format")))
}

fn tools(fields: &mut Fields, rules: &Rules) -> Result<Tools, Invalid> {
    let given = fields.array("tools")?.unwrap_or_default().into_iter().enumerate();
    let tools = given.map(|(i, tool)| tool_of(&format!("tools[{i}]"), tool, rules));
    let mut tools = tools.collect::<Result<Vec<_>, _>>()?;
    let choice = tool_choice(fields, &mut tools, rules.unknown)?;
    let single = fields.boolean("parallel_tool_calls")? == Some(false);
    decide_tools(tools, "name", choice, single, rules)
}

/// A tool in the form of chat completions.
fn tool_of(path: &str, tool: Value, rules: &Rules) -> Result<Value, Invalid> {
    let mut tool = Fields::of(path, tool)?;
    let path = tool.path("type");
    let kind = tool.needed("type")?;
    if kind != "function" {
        let message = format!(
            "`{path}` = {kind:?}: this server has no tools of its own; describe a function that you call"
        );
        return Err(Invalid::new(path, message));
    }
    tool.only("defer_loading", &[json!(false)], "all tools are shown to the model")?;
    tool.only("allowed_callers", &[json!(["direct"])], "only the model calls")?;
    tool.only("async", &[json!(false)], "calls are answered before the model goes on")?;
    tool.only("output_schema", &[], "put what the function gives into its description")?;
    Ok(json!({"type": "function", "function": function_of(tool, rules)?}))
}

/// What must be called. A choice among some of the tools leaves the others out.
fn tool_choice(
    fields: &mut Fields,
    tools: &mut Vec<Value>,
    unknown: UnknownFields,
) -> Result<ToolChoice, Invalid> {
    let words = "`tool_choice` is none, auto, required, {\"type\": \"function\", \"name\": ..} or \
                 {\"type\": \"allowed_tools\", ..}";
    let mut choice = match fields.take("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => return word_of(&word).ok_or_else(|| Invalid::new("tool_choice", words)),
        Some(value) => Fields::of("tool_choice", value)?,
    };
    let chosen = match choice.needed("type")?.as_str() {
        "function" => ToolChoice::Named(choice.needed("name")?),
        "allowed_tools" => {
            let mode = choice.needed("mode")?;
            let mode = word_of(&mode).filter(|mode| !matches!(mode, ToolChoice::None));
            let mode = mode
                .ok_or_else(|| Invalid::new("tool_choice.mode", "`tool_choice.mode` is auto or required"))?;
            let allowed = choice.array("tools")?.ok_or_else(|| required("tool_choice.tools"))?;
            keep_allowed(tools, allowed, unknown)?;
            mode
        }
        _ => return Err(Invalid::new("tool_choice.type", words)),
    };
    choice.finish(unknown)?;
    Ok(chosen)
}

fn word_of(word: &str) -> Option<ToolChoice> {
    match word {
        "none" => Some(ToolChoice::None),
        "auto" => Some(ToolChoice::Auto),
        "required" => Some(ToolChoice::Required),
        _ => None,
    }
}

fn keep_allowed(tools: &mut Vec<Value>, allowed: Vec<Value>, unknown: UnknownFields) -> Result<(), Invalid> {
    let mut names = Vec::with_capacity(allowed.len());
    for (i, tool) in allowed.into_iter().enumerate() {
        let mut tool = Fields::of(&format!("tool_choice.tools[{i}]"), tool)?;
        tool.only("type", &[json!("function")], "only functions are called")?;
        let path = tool.path("name");
        let name = tool.needed("name")?;
        tool.finish(unknown)?;
        if !tools.iter().any(|tool| tool["function"]["name"] == *name) {
            return Err(Invalid::new(&path, format!("`{path}` = {name:?} is not among `tools`")));
        }
        names.push(name);
    }
    tools.retain(|tool| names.iter().any(|name| tool["function"]["name"] == **name));
    Ok(())
}

/// OpenAI's fields that this server does not act on: the values that ask for nothing are fine.
fn refuse_what_is_not_honoured(fields: &mut Fields) -> Result<(), Invalid> {
    fields.only("background", &[json!(false)], "responses are answered while their client waits")?;
    fields.only("background_options", &[], "responses are answered while their client waits")?;
    fields.only("conversation", &[], "use `previous_response_id`")?;
    fields.only("context_management", &[json!([])], "conversations are not made shorter")?;
    fields.only("image", &[], "only text is read")?;
    fields.only("moderation", &[], "nothing is moderated")?;
    fields.only("prompt", &[], "prompts are not kept here; send `instructions` and `input`")?;
    fields.only("truncation", &[json!("disabled")], "no items are left out by themselves")?;
    fields.only(
        "prompt_cache_options",
        &[json!({}), json!({"mode": "implicit"})],
        "all prefixes are cached",
    )?;
    fields.only(
        "prompt_cache_retention",
        &[json!("in_memory"), json!("in-memory")],
        "the cache is in memory",
    )?;
    // It bounds calls of tools that the server has itself: there are none.
    fields.count("max_tool_calls", 1)?;
    // A hint that keeps requests with one prefix together. The prefix cache spans all of a tenant's
    // requests, so any key is honoured.
    fields.string("prompt_cache_key")?;
    Ok(())
}
