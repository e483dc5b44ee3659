//! `tools`, `tool_choice` and `parallel_tool_calls`: which functions may be called, and which must be.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::params::Rules;
use crate::grammar::{Calls, Form};
use crate::http::fields::{Fields, Invalid};
use crate::text::turn::CallFormat;

const TOOLS_MAX: usize = 128;
const NAME_CHARS_MAX: usize = 64;
/// Most calls of one answer that must call.
const CALLS_MAX: u32 = 8;

/// What a chat may and must call.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// In OpenAI's form; none where nothing may be called.
    pub(crate) tools: Vec<Value>,
    /// At most one call.
    pub(crate) single: bool,
    /// What the answer must look like, if it must call.
    pub(crate) form: Option<Form>,
}

/// What must be called.
pub(crate) enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

pub(crate) fn read(fields: &mut Fields, rules: &Rules) -> Result<Tools, Invalid> {
    let tools = fields.array("tools")?.unwrap_or_default();
    let numbered = tools.into_iter().enumerate();
    let tools = numbered.map(|(i, tool)| tool_of(&format!("tools[{i}]"), tool, rules));
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let choice = choice(fields, rules)?;
    let single = fields.boolean("parallel_tool_calls")? == Some(false);
    decide(tools, "function.name", choice, single, rules)
}

/// What follows from tools in OpenAI's form and a choice, in whatever API they came; `name_path` is where that has a
/// tool's name.
pub(crate) fn decide(
    tools: Vec<Value>,
    name_path: &str,
    choice: Choice,
    single: bool,
    rules: &Rules,
) -> Result<Tools, Invalid> {
    if tools.len() > TOOLS_MAX {
        return Err(Invalid::new("tools", format!("`tools` has over {TOOLS_MAX} tools")));
    }
    let mut names = BTreeSet::new();
    if let Some((i, tool)) = tools.iter().enumerate().find(|(_, tool)| !names.insert(name_of(tool))) {
        let path = format!("tools[{i}].{name_path}");
        let message = format!("`{path}`: there are two tools {:?}", name_of(tool));
        return Err(Invalid::new(path, message));
    }
    let called: Vec<&Value> = match &choice {
        Choice::None => return Ok(Tools::default()),
        Choice::Auto => return Ok(Tools { tools, single, form: None }),
        Choice::Required => tools.iter().collect(),
        Choice::Named(name) => tools.iter().filter(|tool| name_of(tool) == name).collect(),
    };
    if called.is_empty() {
        let message = match choice {
            Choice::Named(name) => format!("`tool_choice` names {name:?}, which is not among `tools`"),
            _ => "`tool_choice` wants a call, but there are no `tools`".to_owned(),
        };
        return Err(Invalid::new("tool_choice", message));
    }
    let single = single || matches!(choice, Choice::Named(_));
    let form = rules.dialect.map(|dialect| Form::Calls(calls(dialect.calls, &called, single)));
    Ok(Tools { tools, single, form })
}

fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().expect("a tool that was read has a name")
}

fn tool_of(path: &str, tool: Value, rules: &Rules) -> Result<Value, Invalid> {
    let mut tool = Fields::of(path, tool)?;
    let type_path = tool.path("type");
    match tool.string("type")?.as_deref() {
        Some("function") => {}
        Some(other) => {
            return Err(Invalid::new(
                &type_path,
                format!("`{type_path}` = {other:?}: only functions are called"),
            ));
        }
        None => return Err(Invalid::new(&type_path, format!("`{type_path}` is required"))),
    }
    let function_path = tool.path("function");
    let function = tool.object("function")?;
    tool.finish(rules.unknown)?;
    let function =
        function.ok_or_else(|| Invalid::new(&function_path, format!("`{function_path}` is required")))?;
    Ok(json!({"type": "function", "function": function_of(function, rules)?}))
}

/// A function's name, description and parameters, as the template gets them.
pub(crate) fn function_of(mut function: Fields, rules: &Rules) -> Result<Value, Invalid> {
    let mut described = Map::new();
    described.insert("name".into(), json!(name_at(&mut function)?));
    if let Some(description) = function.string("description")? {
        described.insert("description".into(), json!(description));
    }
    let parameters = match function.object("parameters")? {
        Some(parameters) => parameters.into_value(),
        None => json!({"type": "object", "properties": {}}),
    };
    described.insert("parameters".into(), parameters);
    // Arguments of calls that must be made keep to the schema; others are as the model writes them.
    function.boolean("strict")?;
    function.finish(rules.unknown)?;
    Ok(Value::Object(described))
}

/// The name of a tool.
pub(crate) fn name_at(function: &mut Fields) -> Result<String, Invalid> {
    let path = function.path("name");
    let name = function.string("name")?;
    let name = name.ok_or_else(|| Invalid::new(&path, format!("`{path}` is required")))?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.chars().all(fits) {
        let message = format!("`{path}` has 1 to {NAME_CHARS_MAX} letters, digits, `_`, `-` and `.`");
        return Err(Invalid::new(&path, message));
    }
    Ok(name)
}

fn choice(fields: &mut Fields, rules: &Rules) -> Result<Choice, Invalid> {
    let words = "`tool_choice` is none, auto, required, or names a function";
    match fields.take("tool_choice") {
        None => Ok(Choice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(Choice::None),
            "auto" => Ok(Choice::Auto),
            "required" => Ok(Choice::Required),
            _ => Err(Invalid::new("tool_choice", format!("{words}, got {word:?}"))),
        },
        Some(value) => {
            let mut named = Fields::of("tool_choice", value)?;
            if named.string("type")?.as_deref() != Some("function") {
                return Err(Invalid::new("tool_choice.type", words));
            }
            let function = named.object("function")?;
            named.finish(rules.unknown)?;
            let required =
                || Invalid::new("tool_choice.function.name", "`tool_choice.function.name` is required");
            let mut function = function.ok_or_else(required)?;
            let name = function.string("name")?.ok_or_else(required)?;
            function.finish(rules.unknown)?;
            Ok(Choice::Named(name))
        }
    }
}

/// Calls of these tools as the model's family writes them.
fn calls(format: CallFormat, tools: &[&Value], single: bool) -> Calls {
    let (key, before, behind) = match format {
        CallFormat::Hermes => ("arguments", "<tool_call>\n", "}\n</tool_call>"),
        CallFormat::Llama3 => ("parameters", "", "}"),
        CallFormat::Mistral => ("arguments", "", "}"),
    };
    let of_tool = |tool: &&Value| {
        let before = format!("{before}{{\"name\": \"{}\", \"{key}\": ", name_of(tool));
        (before, tool["function"]["parameters"].clone(), behind)
    };
    let calls = tools.iter().map(of_tool).collect();
    let most = if single { 1 } else { CALLS_MAX };
    let (mark, before, between, after, most) = match format {
        CallFormat::Hermes => (None, "", "\n", "", most),
        // Its models make one call a turn.
        CallFormat::Llama3 => (None, "", "", "", 1),
        CallFormat::Mistral => (Some(format.mark()), "[", ", ", "]", most),
    };
    Calls { mark, before, calls, between, after, most }
}
