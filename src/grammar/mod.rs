//! Structured output: what an answer's text must look like, as the sets of tokens that may come next.
//!
//! Knows llguidance, which computes the sets, and the tokenizer's vocabulary; no request, API or device. The sets are
//! computed on threads of their own (`masks`) while the device is at work. A control token is never part of a
//! text, whatever the grammar; the tokens that end an answer are allowed where the text is complete.

mod gbnf;
mod masks;

use std::fmt;
use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher};
use obol_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::request::{Grammar, Guide};
use masks::{Masks, Start};

/// Longest grammar, schema or pattern, in bytes of its text.
const BYTES_MAX: usize = 256 << 10;

/// States that one answer's lexer may have.
const LEXER_STATES_MAX: usize = 50_000;

/// What an answer's text must look like, as requests say it.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema(Value),
    /// A regular expression that the whole text matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Calls of tools.
    Calls(Calls),
    /// A context-free grammar in llguidance's kind of Lark, or in llama.cpp's GBNF (known by its `::=`).
    Grammar(String),
}

/// What calls look like: `before`, calls with `between` between them, `after`.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// A special token that comes first, by its text.
    pub mark: Option<&'static str>,
    pub before: &'static str,
    /// One of these each: what is before and behind its arguments, and their schema.
    pub calls: Vec<(String, Value, &'static str)>,
    pub between: &'static str,
    pub after: &'static str,
    /// Most calls.
    pub most: u32,
}

/// Why a form cannot be followed; the request is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    #[error("it has {0} bytes; at most {BYTES_MAX} are taken")]
    TooLong(usize),
    #[error("there is nothing to choose from")]
    NoChoice,
    /// Not understood, or no text can look like it.
    #[error("{0}")]
    Impossible(String),
    /// The model's vocabulary cannot be guided.
    #[error("this model's answers cannot be guided: {0}")]
    Vocabulary(String),
}

/// Compiles forms for one model's vocabulary.
pub struct Grammars {
    factory: Result<ParserFactory, String>,
    masks: Masks,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// Takes a tenth of a second for a large vocabulary. `threads` compute what may come next.
    ///
    /// # Panics
    /// When the operating system gives no thread.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, threads: usize) -> Self {
        Self { factory: factory(tokenizer), masks: Masks::new(threads) }
    }

    /// Reads a form. Takes up to some tens of milliseconds: not for async threads.
    ///
    /// # Errors
    /// When it is not understood, too large, or nothing can look like it.
    pub fn compile(&self, form: &Form) -> Result<Arc<dyn Grammar>, FormError> {
        let factory = self.factory.as_ref().map_err(|why| FormError::Vocabulary(why.clone()))?;
        let parser = factory
            .create_parser(top_level(factory.tok_env().tok_trie(), form)?)
            .map_err(|error| impossible(&error))?;
        let mut matcher = Matcher::new(Ok(parser));
        // What no text can look like allows no first token.
        let allowed = matcher.compute_mask_or_eos().map_err(|error| impossible(&error))?;
        if allowed.is_zero() {
            return Err(FormError::Impossible("no text can look like it".to_owned()));
        }
        Ok(Arc::new(Compiled { start: Arc::new(Start { matcher, allowed }), masks: self.masks.clone() }))
    }
}

/// A form that was understood.
struct Compiled {
    start: Arc<Start>,
    masks: Masks,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl Grammar for Compiled {
    fn guide(&self) -> Box<dyn Guide> {
        Box::new(self.masks.guide(Arc::clone(&self.start)))
    }
}

fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory, String> {
    let ends = tokenizer.end_tokens();
    let Some(end) = ends.first() else {
        return Err("it has no token that ends an answer".to_owned());
    };
    let size = u32::try_from(tokenizer.vocab_size()).map_err(|error| error.to_string())?;
    let words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id)).collect();
    let trie = TokTrie::from(&TokRxInfo::new(size, *end), &words).with_eos_tokens(ends);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.verbose_errors = false;
    // Up to two kilobytes each.
    limits.max_lexer_states = LEXER_STATES_MAX;
    Ok(factory)
}

/// A token's bytes; a control token's name behind the mark by which llguidance tells them from text.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    if tokenizer.is_special(id) {
        let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        word.extend_from_slice(tokenizer.token_text(id).as_bytes());
        return word;
    }
    // A text's bytes cannot begin with the mark: it is part of no UTF-8.
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) { Vec::new() } else { bytes.to_vec() }
}

fn top_level(trie: &TokTrie, form: &Form) -> Result<TopLevelGrammar, FormError> {
    let bounded = |text: String| match text.len() {
        bytes if bytes > BYTES_MAX => Err(FormError::TooLong(bytes)),
        _ => Ok(text),
    };
    Ok(match form {
        Form::JsonObject => TopLevelGrammar::from_json_schema(spaced(json!({"type": "object"}))),
        Form::JsonSchema(schema) => {
            bounded(schema.to_string())?;
            TopLevelGrammar::from_json_schema(spaced(schema.clone()))
        }
        Form::Regex(pattern) => TopLevelGrammar::from_regex(&bounded(pattern.clone())?),
        Form::Choice(texts) if texts.is_empty() => return Err(FormError::NoChoice),
        Form::Choice(texts) => {
            let quoted: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
            TopLevelGrammar::from_lark(bounded(format!("start: {}", quoted.join(" | ")))?)
        }
        Form::Calls(calls) => TopLevelGrammar::from_lark(bounded(lark_of(trie, calls)?)?),
        Form::Grammar(text) if text.contains("::=") => {
            let lark = gbnf::to_lark(&bounded(text.clone())?);
            TopLevelGrammar::from_lark(lark.map_err(|error| impossible(&error))?)
        }
        Form::Grammar(text) => TopLevelGrammar::from_lark(bounded(text.clone())?),
    })
}

fn lark_of(trie: &TokTrie, form: &Calls) -> Result<String, FormError> {
    let text = |text: &str| json!(text).to_string();
    let mark = match form.mark {
        None => String::new(),
        Some(mark) => {
            let token = trie.get_special_token(mark);
            let missing = || FormError::Vocabulary(format!("it has no token {mark}"));
            format!("<[{}]>", token.ok_or_else(missing)?)
        }
    };
    let (before, between, after) = (text(form.before), text(form.between), text(form.after));
    let more = match form.most.saturating_sub(1) {
        0 => String::new(),
        most => format!("({between} call){{0,{most}}}"),
    };
    let names: Vec<String> = (0..form.calls.len()).map(|at| format!("call_{at}")).collect();
    let mut lark = format!("start: {mark} {before} call {more} {after}\ncall: {}\n", names.join(" | "));
    for (name, (before, schema, after)) in names.iter().zip(&form.calls) {
        lark.push_str(&format!(
            "{name}: {} %json {} {}\n",
            text(before),
            spaced(schema.clone()),
            text(after)
        ));
    }
    Ok(lark)
}

/// The schema with JSON's spaces as Python writes them: a model that may put spaces anywhere may go on with them for
/// ever.
fn spaced(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else {
        // `true` and `false` are schemas, too; what is none is refused by the reader.
        return schema;
    };
    let options = JsonCompileOptions {
        item_separator: ", ".to_owned(),
        key_separator: ": ".to_owned(),
        whitespace_flexible: false,
        ..JsonCompileOptions::default()
    };
    // What a request says under this name is not ours to follow: it could ask for more than a schema.
    schema.insert("x-guidance".to_owned(), json!(options));
    Value::Object(schema)
}

fn impossible(why: &dyn fmt::Display) -> FormError {
    FormError::Impossible(tidy(&why.to_string()))
}

/// An error's text on one line, without what follows its first paragraph.
fn tidy(text: &str) -> String {
    let first = text.split("\n\n").next().unwrap_or_default();
    first.split_whitespace().collect::<Vec<_>>().join(" ")
}
