//! A model's files to its tokenizer and chat template. Knows where the files keep them and nothing of their insides.

use std::path::Path;

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

/// From a Hugging Face directory: `tokenizer.json` and the files beside it.
///
/// # Errors
/// As [`from_gguf`], and when a file cannot be read.
pub fn from_directory(directory: &Path) -> Result<Text, LoadError> {
    let _ = directory;
    Err(LoadError::Tokenizer("tokenizers of Hugging Face directories are not supported yet".into()))
}

fn template(source: Option<&str>, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, LoadError> {
    let Some(source) = source else {
        // A vocabulary that has ChatML's markers was trained on them.
        let has = |text: &&str| tokenizer.control_token(text).is_some();
        return Ok(["<|im_start|>", "<|im_end|>"].iter().all(has).then(ChatTemplate::chatml));
    };
    let text = |token: Option<u32>| token.map_or_else(String::new, |id| tokenizer.token_text(id));
    let template = ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()));
    Ok(Some(template.map_err(|error| LoadError::Template(error.to_string()))?))
}
