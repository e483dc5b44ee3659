//! A model's files to its tokenizer and chat template. Knows where the files keep them and nothing of their insides.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::chat_template::ChatTemplate;
use crate::error::LoadError;
use crate::gguf::GgufFile;
use crate::tokenizer::Tokenizer;

/// What turns messages into tokens and tokens into text.
#[derive(Debug)]
pub struct Text {
    pub tokenizer: Tokenizer,
    /// The files' own, else that of the family whose markers the vocabulary has, else none.
    pub template: Option<ChatTemplate>,
}

/// From a GGUF file's metadata.
///
/// # Errors
/// When the tokenizer or the template is missing parts, broken or of a kind that is not supported.
pub fn from_gguf(file: &GgufFile) -> Result<Text, LoadError> {
    let tokenizer = Tokenizer::from_gguf(file)?;
    let source = file.find_string("tokenizer.chat_template")?;
    let template = template(source, &tokenizer)?;
    Ok(Text { tokenizer, template })
}

/// From a Hugging Face directory: `tokenizer.json` and the files beside it; the template from
/// `chat_template.jinja`, else from `tokenizer_config.json`.
///
/// # Errors
/// As [`from_gguf`], and when a file cannot be read.
pub fn from_directory(directory: &Path) -> Result<Text, LoadError> {
    let tokenizer = Tokenizer::from_hf(directory)?;
    let source = template_source(directory)?;
    let template = template(source.as_deref(), &tokenizer)?;
    Ok(Text { tokenizer, template })
}

/// The names of a directory's files, in order; none where it cannot be read.
pub(crate) fn file_names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn template_source(directory: &Path) -> Result<Option<String>, LoadError> {
    let read = |name: &str| {
        let path = directory.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LoadError::Io { path, source }),
        }
    };
    if let Some(source) = read("chat_template.jinja")? {
        return Ok(Some(source));
    }
    let Some(config) = read("tokenizer_config.json")? else { return Ok(None) };
    let bad = |why: String| LoadError::Template(format!("tokenizer_config.json: {why}"));
    let config: Value = serde_json::from_str(&config).map_err(|error| bad(error.to_string()))?;
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        // Several by name: the default, else the first.
        Some(Value::Array(named)) => {
            let is_default = |entry: &&Value| entry["name"] == "default";
            let Some(chosen) = named.iter().find(is_default).or(named.first()) else { return Ok(None) };
            let source = chosen["template"].as_str();
            source.map(|source| Some(source.to_owned())).ok_or_else(|| {
                bad("`chat_template` should be a list of templates, each with `name` and `template`".into())
            })
        }
        Some(_) => Err(bad("`chat_template` should be a string or a list of named templates".into())),
    }
}

fn template(source: Option<&str>, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, LoadError> {
    let text = |token: Option<u32>| token.map_or_else(String::new, |id| tokenizer.token_text(id));
    let Some(source) = source else {
        // A vocabulary that has a family's markers was trained on them.
        let is_control = |text: &str| tokenizer.control_token(text).is_some();
        return Ok(ChatTemplate::by_markers(is_control, &text(tokenizer.bos())));
    };
    let template = ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()));
    Ok(Some(template.map_err(|error| LoadError::Template(error.to_string()))?))
}
