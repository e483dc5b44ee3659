//! One model in several precisions beside each other: quality against a reference, speed, cost, memory.
//!
//! Does: run the variants one after another, each loaded alone, and set what was measured beside the
//! first one's. Knows no command line and no model file: a `Site` opens variants and starts engines.
//! Nothing is written to the ledger; costs are priced as on receipts, from the meter's exact charges.

mod plot;
mod prompts;
mod quality;
mod render;
mod score;
mod speed;
mod spool;
mod variant;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use obol_models::chat_template::TemplateOptions;
use obol_models::load::Loaded;
use obol_models::tokenizer::Tokenizer;
use serde_json::json;

pub use quality::Quality;
pub use score::{Distance, Perplexity};
pub use speed::{Agreement, Speed};
pub use variant::Variant;

use crate::ledger::RateCard;
use crate::measure::MeasureError;
use crate::measure::asking::Running;
use crate::measure::progress::Progress;
use crate::measure::table::counted;
use crate::text::prompt;
use quality::Chunks;
use speed::Prompts;
use spool::Spool;

/// What perplexity is measured on.
#[derive(Debug, Clone)]
pub struct Text {
    pub name: String,
    pub content: String,
}

impl Text {
    /// Public domain: the first chapters of Jane Austen's "Persuasion" (1818), from the Debian package
    /// r-cran-janeaustenr 1.0.0-1.
    #[must_use]
    pub fn bundled() -> Self {
        Self {
            name: "Persuasion by Jane Austen, chapters 1 to 6".into(),
            content: include_str!("austen.txt").into(),
        }
    }

    #[must_use]
    pub fn blake3(&self) -> String {
        blake3::hash(self.content.as_bytes()).to_hex().to_string()
    }
}

/// Which measurements are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stages {
    pub quality: bool,
    pub answers: bool,
    pub speed: bool,
}

/// Everything that is the same for all variants.
#[derive(Debug, Clone)]
pub struct Settings {
    pub text: Text,
    /// Most chunks of the text; 0 is all.
    pub chunks: usize,
    /// At least 4.
    pub chunk_tokens: usize,
    /// Asked greedily; empty for the built-in ones.
    pub prompts: Vec<String>,
    pub answer_tokens: usize,
    /// Numbers of clients, ascending.
    pub clients: Vec<usize>,
    pub rounds: usize,
    /// Of one client in one round.
    pub requests: usize,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub stages: Stages,
    pub rate: RateCard,
    pub threads: usize,
    /// For people: the processor.
    pub machine: String,
    pub kv_memory: u64,
    /// Where the reference's logits may wait, the first with room.
    pub spool: Vec<PathBuf>,
}

/// A variant in memory.
pub struct Subject {
    pub loaded: Loaded,
    pub load: Duration,
}

/// Where variants come from.
pub trait Site {
    /// Loads a variant.
    ///
    /// # Errors
    /// Says what is wrong with its file.
    fn open(&mut self, variant: &Variant) -> Result<Subject, MeasureError>;

    /// Starts the engine that a server would start, over the same model.
    ///
    /// # Errors
    /// When there is no memory for the KV pool.
    fn start(&mut self, variant: &Variant, loaded: Loaded) -> Result<Running, MeasureError>;
}

/// What was measured of one variant.
#[derive(Debug, Clone)]
pub struct Measured {
    pub label: String,
    pub quant: String,
    pub kv_dtype: String,
    /// As the loader and receipts call it.
    pub precision: String,
    pub fingerprint: String,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    pub load: Duration,
    pub quality: Option<Quality>,
    /// With the reference's answers; `None` for the reference itself.
    pub agreement: Option<Agreement>,
    pub speeds: Vec<Speed>,
}

impl Measured {
    /// The precision of the weights alone.
    fn weights(&self) -> &str {
        self.precision.split('+').next().unwrap_or_default()
    }
}

/// All variants; the first is the reference.
#[derive(Debug, Clone)]
pub struct Comparison {
    pub model: String,
    pub architecture: String,
    pub vocab_size: usize,
    pub text: Text,
    pub text_tokens: usize,
    pub chunks: usize,
    pub positions: usize,
    pub settings: Settings,
    pub variants: Vec<Measured>,
}

/// What the reference leaves for the others.
struct Reference {
    tokenizer: Arc<Tokenizer>,
    vocab: usize,
    label: String,
    chunks: Option<Chunks>,
    spool: Option<Spool>,
    prompts: Vec<Arc<[u32]>>,
    answers: Vec<Vec<u32>>,
    windows: Option<Prompts>,
}

/// Measures all variants, one after another.
///
/// # Errors
/// When a variant cannot be opened or does not belong to the reference's model, or the text, prompts and
/// context do not fit together.
///
/// # Panics
/// Without variants.
pub fn compare(
    variants: &[Variant],
    site: &mut dyn Site,
    settings: &Settings,
    progress: &Progress,
) -> Result<Comparison, MeasureError> {
    let (mut reference, mut comparison): (Option<Reference>, Option<Comparison>) = (None, None);
    for variant in variants {
        let label = variant.label();
        progress.stage(&label, "loading", 1);
        let subject = site.open(variant)?;
        let known = match &mut reference {
            Some(reference) => {
                reference.check(&label, &subject.loaded)?;
                reference
            }
            None => {
                let made = Reference::new(label.clone(), &subject.loaded, settings)?;
                comparison = Some(Comparison::of(&subject.loaded, &made, settings));
                reference.insert(made)
            }
        };
        let alone = variants.len() == 1;
        let measured = measure(variant, label, subject, site, known, settings, progress, alone)?;
        comparison.as_mut().expect("made with the reference").variants.push(measured);
    }
    Ok(comparison.expect("there is a variant at least"))
}

fn measure(
    variant: &Variant,
    label: String,
    mut subject: Subject,
    site: &mut dyn Site,
    reference: &mut Reference,
    settings: &Settings,
    progress: &Progress,
    alone: bool,
) -> Result<Measured, MeasureError> {
    let info = &subject.loaded.info;
    let mut measured = Measured {
        label: label.clone(),
        quant: variant.quant.to_string(),
        kv_dtype: variant.kv_dtype.to_string(),
        precision: info.precision.clone(),
        fingerprint: info.fingerprint.clone(),
        weight_bytes: info.weight_bytes,
        kv_bytes_per_token: subject.loaded.model.kv_bytes_per_token(),
        load: subject.load,
        quality: None,
        agreement: None,
        speeds: Vec::new(),
    };
    if let Some(chunks) = &reference.chunks {
        let what = format!("perplexity, {} of {} tokens", counted(chunks.count, "chunk"), chunks.length);
        progress.stage(&label, &what, chunks.count as u64);
        let model = subject.loaded.model.as_mut();
        measured.quality = Some(match &mut reference.spool {
            Some(spool) => quality::variant(model, chunks, spool, settings, progress)?,
            None if alone => quality::alone(model, chunks, settings, progress)?,
            None => {
                let (quality, spool) = quality::reference(model, chunks, settings, progress)?;
                reference.spool = Some(spool);
                quality
            }
        });
    }
    if !settings.stages.answers && !settings.stages.speed {
        return Ok(measured);
    }
    progress.stage(&label, "starting the engine", 1);
    let running = site.start(variant, subject.loaded)?;
    if settings.stages.answers {
        let what = format!(
            "answers, {} tokens each to {}",
            settings.answer_tokens,
            counted(reference.prompts.len(), "prompt")
        );
        progress.stage(&label, &what, reference.prompts.len() as u64);
        let answers = speed::answers(&running, &reference.prompts, settings, progress)?;
        if reference.answers.is_empty() {
            reference.answers = answers;
        } else {
            measured.agreement = Some(speed::agreement(&reference.answers, &answers));
        }
    }
    if let Some(prompts) = &reference.windows {
        let clients: Vec<String> = settings.clients.iter().map(usize::to_string).collect();
        let what =
            format!("speed at {} clients, {}", clients.join(" and "), counted(settings.rounds, "round"));
        progress.stage(&label, &what, (settings.rounds * clients.len()) as u64);
        measured.speeds = speed::speeds(&running, prompts, settings, progress)?;
    }
    Ok(measured)
}

impl Comparison {
    /// A line for each limit that a variant passes: perplexity lost, as a part of 1, and mean divergence.
    #[must_use]
    pub fn exceeded(&self, loss_max: Option<f64>, kl_max: Option<f64>) -> Vec<String> {
        let mut lines = Vec::new();
        for variant in &self.variants {
            let Some(distance) = variant.quality.and_then(|quality| quality.distance) else { continue };
            let label = &variant.label;
            if let Some(max) = loss_max.filter(|&max| distance.loss > max) {
                let (loss, max) = (distance.loss * 100.0, max * 100.0);
                lines.push(format!(
                    "{label} loses {loss:.3} % of perplexity, {:.3} points more than the {max} % allowed",
                    loss - max
                ));
            }
            if let Some(max) = kl_max.filter(|&max| distance.kl_mean > max) {
                let kl = distance.kl_mean;
                lines.push(format!(
                    "{label} has a mean KL divergence of {kl:.5}, {:.5} more than the {max} allowed",
                    kl - max
                ));
            }
        }
        lines
    }

    fn of(loaded: &Loaded, reference: &Reference, settings: &Settings) -> Self {
        let chunks = reference.chunks.as_ref();
        Self {
            model: loaded.info.name.clone(),
            architecture: loaded.info.architecture.clone(),
            vocab_size: loaded.info.vocab_size,
            text: settings.text.clone(),
            text_tokens: chunks.map_or(0, |chunks| chunks.tokens.len()),
            chunks: chunks.map_or(0, |chunks| chunks.count),
            positions: chunks.map_or(0, Chunks::positions),
            settings: settings.clone(),
            variants: Vec::new(),
        }
    }
}

impl Reference {
    fn new(label: String, loaded: &Loaded, settings: &Settings) -> Result<Self, MeasureError> {
        let (tokenizer, context) = (loaded.tokenizer.clone(), loaded.model.context_length());
        let stages = settings.stages;
        let prompts = if stages.answers { asked(loaded, settings)? } else { Vec::new() };
        Ok(Self {
            chunks: if stages.quality { Some(Chunks::cut(&tokenizer, context, settings)?) } else { None },
            windows: if stages.speed { Some(windows(&tokenizer, context, settings)?) } else { None },
            vocab: loaded.model.vocab_size(),
            tokenizer,
            label,
            spool: None,
            prompts,
            answers: Vec::new(),
        })
    }

    /// Probabilities can be compared only over one vocabulary.
    fn check(&self, label: &str, loaded: &Loaded) -> Result<(), MeasureError> {
        let (ours, theirs) = (&self.tokenizer, &loaded.tokenizer);
        let differ = |how: String| {
            MeasureError::Input(format!(
                "{label} has another vocabulary than {}: {how}; compare variants of one model",
                self.label
            ))
        };
        if loaded.model.vocab_size() != self.vocab {
            return Err(differ(format!("{} tokens, not {}", loaded.model.vocab_size(), self.vocab)));
        }
        // Rows past the shorter vocabulary have names in some files and none in others.
        let ids = 0..ours.vocab_size().min(theirs.vocab_size()) as u32;
        match ids.into_iter().find(|&id| ours.token_bytes(id) != theirs.token_bytes(id)) {
            Some(id) => Err(differ(format!(
                "token {id} is {:?}, not {:?}",
                theirs.token_text(id),
                ours.token_text(id)
            ))),
            None => Ok(()),
        }
    }
}

/// The prompts for greedy answers, through the model's template where it has one.
fn asked(loaded: &Loaded, settings: &Settings) -> Result<Vec<Arc<[u32]>>, MeasureError> {
    let context = loaded.model.context_length();
    let built_in = || prompts::PROMPTS.iter().map(|&text| text.to_owned()).collect();
    let texts: Vec<String> = if settings.prompts.is_empty() { built_in() } else { settings.prompts.clone() };
    let encoded = texts.iter().map(|text| {
        let tokens = match &loaded.template {
            None => prompt::encode(&loaded.tokenizer, text, true),
            Some(template) => {
                let messages = json!([{ "role": "user", "content": text }]);
                let options = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
                prompt::render_and_encode(template, &loaded.tokenizer, &messages, options)
                    .map_err(|error| MeasureError::Input(format!("prompt {text:?}: {error}")))?
            }
        };
        let longest = tokens.len() + settings.answer_tokens;
        if tokens.is_empty() || longest > context {
            return Err(MeasureError::Input(format!(
                "prompt {text:?}: its {} tokens and {} of answer do not fit the context of {context}",
                tokens.len(),
                settings.answer_tokens
            )));
        }
        Ok(tokens.into())
    });
    encoded.collect()
}

/// Pieces of the text as prompts for the closed loops.
fn windows(tokenizer: &Tokenizer, context: usize, settings: &Settings) -> Result<Prompts, MeasureError> {
    let (length, longest) = (settings.prompt_tokens, settings.prompt_tokens + settings.output_tokens);
    if longest > context {
        return Err(MeasureError::Input(format!(
            "--prompt-tokens and --output-tokens make {longest}, more than the context of {context}"
        )));
    }
    let tokens = prompt::encode(tokenizer, &settings.text.content, false);
    if tokens.len() < length {
        return Err(MeasureError::Input(format!(
            "the text {} has {} tokens, and a prompt needs {length}; give a longer --text or lower \
             --prompt-tokens",
            settings.text.name,
            tokens.len()
        )));
    }
    Ok(Prompts::new(tokens, quality::begin(tokenizer), length))
}
