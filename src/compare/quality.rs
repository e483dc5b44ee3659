//! A text through a model, chunk by chunk from an empty context, and what its second halves score.
//!
//! The convention is that of llama.cpp's `llama-perplexity`: the whole text is tokenised once, cut into
//! chunks of equal length, each chunk is evaluated on its own, its first token replaced by the beginning
//! of text where the vocabulary wants one, and only the tokens predicted from the second half on count.

use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::tokenizer::{Special, Tokenizer};

use super::Settings;
use super::score::{Distance, Pair, Perplexity, Row, distance, divergence, in_parallel, perplexity, row};
use super::spool::Spool;
use crate::measure::MeasureError;
use crate::measure::progress::Progress;

/// Rows whose logits are held at a time: 64 MiB with the largest vocabularies.
const ROWS: usize = 64;
/// Positions of a KV block; every model's pool takes it.
const BLOCK: usize = 16;

/// A text as token ids, cut.
pub(super) struct Chunks {
    /// All of the text's tokens.
    pub(super) tokens: Vec<u32>,
    /// What each chunk begins with instead of its first token.
    pub(super) begin: Option<u32>,
    pub(super) length: usize,
    pub(super) count: usize,
}

/// What the text says about one variant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    pub perplexity: Perplexity,
    /// `None` for the reference itself.
    pub distance: Option<Distance>,
}

/// The beginning of text, where the vocabulary wants texts to begin with it.
pub(super) fn begin(tokenizer: &Tokenizer) -> Option<u32> {
    let encode = |add| tokenizer.encode("a", Special { parse: false, add });
    let bos = tokenizer.bos()?;
    (encode(true).first() == Some(&bos) && encode(false).first() != Some(&bos)).then_some(bos)
}

impl Chunks {
    /// Cuts the text; at most `settings.chunks` chunks, all of them for 0.
    pub(super) fn cut(
        tokenizer: &Tokenizer,
        context: usize,
        settings: &Settings,
    ) -> Result<Self, MeasureError> {
        let length = settings.chunk_tokens;
        let tokens = tokenizer.encode(&settings.text.content, Special { parse: false, add: true });
        if length > context {
            return Err(MeasureError::Input(format!(
                "--chunk-tokens: {length} is more than the model's context of {context}"
            )));
        }
        let all = tokens.len() / length;
        if all == 0 {
            return Err(MeasureError::Input(format!(
                "the text {} has {} tokens, and one chunk needs {length}; give a longer --text or lower \
                 --chunk-tokens",
                settings.text.name,
                tokens.len()
            )));
        }
        let count = if settings.chunks == 0 { all } else { all.min(settings.chunks) };
        Ok(Self { tokens, begin: begin(tokenizer), length, count })
    }

    /// Positions that count, of all chunks.
    pub(super) fn positions(&self) -> usize {
        self.count * (self.length - 1 - self.length / 2)
    }

    fn chunk(&self, index: usize) -> Vec<u32> {
        let mut tokens = self.tokens[index * self.length..(index + 1) * self.length].to_vec();
        tokens[0] = self.begin.unwrap_or(tokens[0]);
        tokens
    }
}

/// Scores the reference and keeps its logits.
pub(super) fn reference(
    model: &mut dyn CausalLm,
    chunks: &Chunks,
    settings: &Settings,
    progress: &Progress,
) -> Result<(Quality, Spool), MeasureError> {
    let mut spool = Spool::create(&settings.spool, chunks.positions(), model.vocab_size())?;
    evaluate(model, chunks, settings, progress, |logits, rows| {
        spool.write(logits, rows).map_err(|error| {
            MeasureError::Failed(format!("cannot keep the reference's log-probabilities: {error}"))
        })
    })?;
    let nlls: Vec<f64> = spool.rows.iter().map(|row| row.nll).collect();
    Ok((Quality { perplexity: perplexity(&nlls), distance: None }, spool))
}

/// Scores a model that nothing is compared with.
pub(super) fn alone(
    model: &mut dyn CausalLm,
    chunks: &Chunks,
    settings: &Settings,
    progress: &Progress,
) -> Result<Quality, MeasureError> {
    let mut nlls = Vec::with_capacity(chunks.positions());
    evaluate(model, chunks, settings, progress, |_, rows| {
        nlls.extend(rows.iter().map(|row| row.nll));
        Ok(())
    })?;
    Ok(Quality { perplexity: perplexity(&nlls), distance: None })
}

/// Scores a variant against the reference.
pub(super) fn variant(
    model: &mut dyn CausalLm,
    chunks: &Chunks,
    spool: &mut Spool,
    settings: &Settings,
    progress: &Progress,
) -> Result<Quality, MeasureError> {
    let failed =
        |error| MeasureError::Failed(format!("cannot read the reference's log-probabilities: {error}"));
    let vocab = model.vocab_size();
    let mut pairs = Vec::with_capacity(chunks.positions());
    let mut theirs = Vec::new();
    spool.rewind().map_err(failed)?;
    evaluate(model, chunks, settings, progress, |ours, rows| {
        spool.read(rows.len(), &mut theirs).map_err(failed)?;
        let references = &spool.rows[pairs.len()..pairs.len() + rows.len()];
        pairs.extend(in_parallel(rows.len(), settings.threads, |index| {
            let (row, reference) = (rows[index], references[index]);
            let span = index * vocab..(index + 1) * vocab;
            Pair {
                nll: row.nll,
                reference_nll: reference.nll,
                divergence: divergence((&theirs[span.clone()], reference.log_z), (&ours[span], row.log_z)),
                same_top: row.top == reference.top,
            }
        }));
        Ok(())
    })?;
    let nlls: Vec<f64> = pairs.iter().map(|pair| pair.nll).collect();
    Ok(Quality { perplexity: perplexity(&nlls), distance: Some(distance(&pairs)) })
}

/// Runs all chunks through the model's own KV pool, and hands over the rows that count with their logits.
fn evaluate(
    model: &mut dyn CausalLm,
    chunks: &Chunks,
    settings: &Settings,
    progress: &Progress,
    mut take: impl FnMut(&[f32], &[Row]) -> Result<(), MeasureError>,
) -> Result<(), MeasureError> {
    let failed = |error: obol_models::batch::ForwardError| MeasureError::Failed(error.to_string());
    let (length, vocab) = (chunks.length, model.vocab_size());
    let blocks = length.div_ceil(BLOCK);
    model.allocate_kv(blocks, BLOCK).map_err(failed)?;
    let mut batch = Batch::default();
    for index in 0..chunks.count {
        let tokens = chunks.chunk(index);
        // The last token predicts nothing that is in the chunk.
        let (first, end) = (length / 2, length - 1);
        let parts = (0..first).step_by(ROWS).map(|start| start..first.min(start + ROWS));
        let parts = parts.chain((first..end).step_by(ROWS).map(|start| start..end.min(start + ROWS)));
        for part in parts {
            let rows = 0..part.len();
            batch.clear();
            batch.tokens.extend_from_slice(&tokens[part.clone()]);
            batch.positions.extend(part.clone().map(|position| position as u32));
            batch.block_tables.extend(0..blocks as u32);
            batch.spans.push(Span { rows: rows.clone(), table: 0..blocks });
            let counts = part.start >= first;
            if counts {
                batch.logit_rows.extend(rows.clone());
            }
            let logits = model.forward(&batch).map_err(failed)?;
            if !counts {
                continue;
            }
            let scored: Option<Vec<Row>> = in_parallel(part.len(), settings.threads, |at| {
                row(&logits[at * vocab..(at + 1) * vocab], tokens[part.start + at + 1])
            })
            .into_iter()
            .collect();
            let scored = scored.ok_or_else(|| {
                MeasureError::Failed("the model's logits are not numbers; its file may be broken".into())
            })?;
            take(logits, &scored)?;
        }
        progress.at(index as u64 + 1);
    }
    Ok(())
}
