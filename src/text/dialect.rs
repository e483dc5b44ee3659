//! How a model's chat template takes tools, and how its family then writes calls: found out from the template
//! itself. Tools are described in words to models whose template knows none.

use obol_models::chat_template::{ChatTemplate, TemplateOptions};
use serde_json::{Map, Value, json};

use super::turn::CallFormat;

/// A chat as a client gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// The request field that it came in, for error messages.
    pub param: &'static str,
    /// In the shape that chat templates take: `[{"role", "content", ..}]`, content as text.
    pub messages: Value,
    /// Tools that may be called, in OpenAI's form.
    pub tools: Vec<Value>,
    /// At most one call counts.
    pub single: bool,
    /// The last message is the assistant's and goes on.
    pub continues: bool,
    /// Further names for the template.
    pub template: Map<String, Value>,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            param: "messages",
            messages: Value::Null,
            tools: Vec::new(),
            single: false,
            continues: false,
            template: Map::new(),
        }
    }
}

impl Chat {
    #[must_use]
    pub fn of(messages: Value) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// What is known of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dialect {
    /// How the model's family writes calls.
    pub calls: CallFormat,
    /// It writes thoughts between `<think>` and `</think>`.
    pub thinks: bool,
    /// Its template describes tools.
    knows_tools: bool,
    /// Its template writes what was called, and so what that gave.
    knows_calls: bool,
    /// Its template takes a system message.
    knows_system: bool,
}

impl Dialect {
    #[must_use]
    pub fn of(template: &ChatTemplate) -> Self {
        let source = template.source();
        let calls = if source.contains("[TOOL_CALLS]") {
            CallFormat::Mistral
        } else if source.contains("<tool_call>") {
            CallFormat::Hermes
        } else if source.contains("<|python_tag|>")
            || (source.contains("<|start_header_id|>") && source.contains("\"parameters\""))
        {
            CallFormat::Llama3
        } else {
            CallFormat::Hermes
        };
        let user = json!({"role": "user", "content": "a"});
        let probe = json!({"type": "function", "function": {"name": "obol_probe", "parameters": {}}});
        let options = TemplateOptions { tools: Some(json!([probe])), ..TemplateOptions::default() };
        let with_tools = template.render(&json!([user]), options);
        let call = json!({"id": "call_0001", "type": "function", "function": {"name": "obol_probe", "arguments": {}}});
        let assistant = json!({"role": "assistant", "content": "", "tool_calls": [call]});
        let with_calls = template.render(&json!([user, assistant]), TemplateOptions::default());
        let system = json!([{"role": "system", "content": "obol_probe"}, user]);
        let with_system = template.render(&system, TemplateOptions::default());
        let shows = |text: Result<String, _>| text.is_ok_and(|text| text.contains("obol_probe"));
        Self {
            calls,
            thinks: source.contains("</think>"),
            knows_tools: shows(with_tools),
            knows_calls: shows(with_calls),
            knows_system: shows(with_system),
        }
    }

    /// The messages and options with which the template writes the chat.
    #[must_use]
    pub fn prepare(&self, chat: Chat) -> (Value, TemplateOptions) {
        let Chat { messages, tools, continues, template, .. } = chat;
        let mut options = TemplateOptions { add_generation_prompt: !continues, tools: None, extra: template };
        if self.knows_tools {
            options.tools = (!tools.is_empty()).then_some(Value::Array(tools));
            return (messages, options);
        }
        let Value::Array(messages) = messages else { return (messages, options) };
        let told = |message| if self.knows_calls { message } else { in_words(message) };
        let mut messages: Vec<Value> = messages.into_iter().map(told).collect();
        if !tools.is_empty() {
            self.describe(&tools, &mut messages);
        }
        (Value::Array(messages), options)
    }

    /// Says in the system message, or else in the first one, what can be called, and how.
    fn describe(&self, tools: &[Value], messages: &mut Vec<Value>) {
        let functions: Vec<String> = tools.iter().map(|tool| tool["function"].to_string()).collect();
        let words = format!(
            "You can call functions. Each line describes one in JSON:\n{}\nTo call a function, write only\n\
             <tool_call>\n{{\"name\": \"its name\", \"arguments\": {{\"an argument's name\": \"its value\"}}}}\n\
             </tool_call>\nonce for each call. What it gives is then shown to you between <tool_response> and \
             </tool_response>.",
            functions.join("\n")
        );
        let is_system = messages.first().is_some_and(|first| first["role"] == "system");
        match messages.first_mut() {
            Some(first) if is_system || !self.knows_system => {
                let said = first["content"].as_str().unwrap_or_default();
                let text =
                    if is_system { format!("{said}\n\n{words}") } else { format!("{words}\n\n{said}") };
                first["content"] = json!(text);
            }
            _ => messages.insert(0, json!({"role": "system", "content": words})),
        }
    }
}

/// A message for a template that knows no tools: calls and what they gave as text.
fn in_words(mut message: Value) -> Value {
    if message["role"] == "tool" {
        let said = message["content"].as_str().unwrap_or_default();
        return json!({"role": "user", "content": format!("<tool_response>\n{said}\n</tool_response>")});
    }
    let calls = message.as_object_mut().and_then(|message| message.remove("tool_calls"));
    if let Some(Value::Array(calls)) = calls {
        let mut text = message["content"].as_str().unwrap_or_default().to_owned();
        for call in calls {
            let call = &call["function"];
            let call = json!({"name": call["name"], "arguments": call["arguments"]});
            let between = if text.is_empty() { "" } else { "\n" };
            text = format!("{text}{between}<tool_call>\n{call}\n</tool_call>");
        }
        message["content"] = json!(text);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool() -> Value {
        json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}})
    }

    fn written(source: &str, chat: Chat) -> (Dialect, String) {
        let template = ChatTemplate::new(source, "", "").expect("a template");
        let dialect = Dialect::of(&template);
        let (messages, options) = dialect.prepare(chat);
        (dialect, template.render(&messages, options).expect("a prompt"))
    }

    const PLAIN: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";

    #[test]
    fn a_template_that_takes_tools_is_given_them() {
        let source = format!(
            "{{% if tools %}}{{{{ tools[0].function.name }}}} <tool_call> </think>\n{{% endif %}}{PLAIN}"
        );
        let chat = Chat { tools: vec![tool()], ..Chat::of(json!([{"role": "user", "content": "1 + 1?"}])) };
        let (dialect, text) = written(&source, chat);
        assert!(dialect.thinks && dialect.knows_tools && dialect.knows_system);
        assert_eq!(text, "add <tool_call> </think>\nuser: 1 + 1?\n");
    }

    #[test]
    fn families_are_known_by_their_marks() {
        for (marks, expected) in [
            ("[TOOL_CALLS]", CallFormat::Mistral),
            ("<tool_call>", CallFormat::Hermes),
            ("<|python_tag|>", CallFormat::Llama3),
            ("<|start_header_id|> \"parameters\"", CallFormat::Llama3),
            ("", CallFormat::Hermes),
        ] {
            let (dialect, _) = written(&format!("{marks}{PLAIN}"), Chat::of(json!([])));
            assert_eq!(dialect.calls, expected, "{marks}");
            assert!(!dialect.knows_tools && !dialect.thinks);
        }
    }

    #[test]
    fn a_template_without_tools_is_told_of_them_in_words() {
        let messages = json!([
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            ]},
            {"role": "tool", "tool_call_id": "x", "content": "2"},
        ]);
        let chat = Chat { tools: vec![tool()], ..Chat::of(messages) };
        let (_, text) = written(PLAIN, chat.clone());
        assert!(text.starts_with("system: You can call functions."), "{text}");
        assert!(text.contains("{\"name\":\"add\",\"parameters\":{\"type\":\"object\"}}\n"), "{text}");
        let rest = "user: 1 + 1?\nassistant: <tool_call>\n{\"name\":\"add\",\"arguments\":{\"a\":1}}\n</tool_call>\n\
                    user: <tool_response>\n2\n</tool_response>\n";
        assert!(text.ends_with(rest), "{text}");
        let refuses = format!(
            "{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{PLAIN}"
        );
        let (dialect, text) = written(&refuses, chat);
        assert!(!dialect.knows_system && text.starts_with("user: You can call functions."), "{text}");
    }
}
