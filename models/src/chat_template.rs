//! Chat templates: the Jinja text of a model file, rendered under the conventions of HF transformers. Knows no
//! tokenizer: what the text's markers mean is decided when it is encoded.
//!
//! The conventions: blocks eat the newline after them and the spaces before them; `raise_exception(text)`,
//! `strftime_now(format)` (UTC here), `tojson` as Python's `json.dumps` writes it (no HTML escapes, keys in the
//! given order), loop controls, Python's string and mapping methods, `{% generation %}` ignored; the names
//! `messages`, `tools`, `documents`, `add_generation_prompt`, `bos_token`, `eos_token`.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};

mod json;

/// ChatML, for files that carry ChatML's tokens and no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Gemma's, for files that carry its tokens and no template: no system role, the model is called `model`.
const GEMMA: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('this model takes no system message') }}{% endif %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

/// Llama 3's, for files that carry its tokens and no template.
const LLAMA3: &str = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/// Families whose markers no other has: all of the tokens must be there.
const BUILT_IN: &[(&[&str], &str)] = &[
    (&["<|im_start|>", "<|im_end|>"], CHATML),
    (&["<start_of_turn>", "<end_of_turn>"], GEMMA),
    (&["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3),
];

/// The name under which the template is kept; it shows in error messages.
const NAME: &str = "chat_template";

/// A parsed template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    built_in: bool,
}

/// What a rendering takes besides the messages.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tools in OpenAI's form.
    pub tools: Option<serde_json::Value>,
    /// Further names (`chat_template_kwargs`); they win over the others but for `messages`.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// Why a template cannot be used, or refuses the messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template's text is broken.
    #[error("the chat template cannot be parsed: {0}")]
    Parse(String),
    /// The template called `raise_exception`: the messages are not what the model takes.
    #[error("the model's chat template refuses the messages: {0}")]
    Refused(String),
    /// Another failure while rendering.
    #[error("the chat template failed: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// Parses `source`. `bos` and `eos` are the texts of those tokens, empty if the model has none.
    ///
    /// # Errors
    /// [`TemplateError::Parse`] with the place.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Parse(error.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", json::tojson);
        // None is not iterable in Python; templates ask this before they take the tools' length.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| TemplateError::Parse(describe(&error)))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            built_in: false,
        })
    }

    /// The template for models whose file has ChatML's tokens but no template.
    #[must_use]
    pub fn chatml() -> Self {
        Self::built_in(CHATML, "")
    }

    /// The template of the family whose markers are all control tokens of the vocabulary, for files without one.
    #[must_use]
    pub fn by_markers(is_control_token: impl Fn(&str) -> bool, bos: &str) -> Option<Self> {
        let family = BUILT_IN.iter().find(|(markers, _)| markers.iter().all(|text| is_control_token(text)));
        family.map(|(_, source)| Self::built_in(source, bos))
    }

    fn built_in(source: &str, bos: &str) -> Self {
        let template = Self::new(source, bos, "").expect("the built-in templates are tested; this is a bug");
        Self { built_in: true, ..template }
    }

    /// The template's own text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Not from the model's file.
    #[must_use]
    pub fn is_built_in(&self) -> bool {
        self.built_in
    }

    /// The prompt for `messages`, an array of OpenAI messages.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the template raises an exception, [`TemplateError::Render`] when it fails
    /// (mostly: a field it needs is missing or of another type).
    pub fn render(
        &self,
        messages: &serde_json::Value,
        options: TemplateOptions,
    ) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        let mut names = BTreeMap::from([
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
            ("tools", options.tools.as_ref().map_or(Value::from(()), json::to_value)),
            ("documents", Value::from(())),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
        ]);
        names.extend(options.extra.iter().map(|(name, value)| (name.as_str(), json::to_value(value))));
        names.insert("messages", json::to_value(messages));
        template.render(names).map_err(|error| failure(&error))
    }
}

/// `{% generation %}` only marks what the assistant said, for training.
fn without_generation_blocks(source: &str) -> String {
    let tag = |name: &str| {
        let pattern = regex::Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}"));
        pattern.expect("the pattern is constant; this is a bug")
    };
    let opened = tag("generation").replace_all(source, "{%$1 if true $2%}");
    tag("endgeneration").replace_all(&opened, "{%$1 endif $2%}").into_owned()
}

/// Marks the errors of `raise_exception` among those of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(text: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    format_time(since, format)
}

/// `format` as C's strftime, of seconds since 1970 in UTC.
fn format_time(seconds: u64, format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let bad = || minijinja::Error::new(ErrorKind::InvalidOperation, format!("bad time format {format:?}"));
    let time = i64::try_from(seconds).ok().and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    let mut text = String::new();
    write!(text, "{}", time.ok_or_else(bad)?.format(format)).map_err(|_| bad())?;
    Ok(text)
}

fn failure(error: &minijinja::Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(text)) = inner.downcast_ref() {
            return TemplateError::Refused(text.clone());
        }
        cause = inner.source();
    }
    TemplateError::Render(describe(error))
}

/// The error and its causes in one line.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests;
