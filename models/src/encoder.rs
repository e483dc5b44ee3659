//! Encoders of BERT's kind: texts to vectors, each text looked at as a whole.
//!
//! Knows no decoder and no KV pool: K and V live for one layer of one call. Invariant: a text's vector depends, bit
//! for bit, only on its own tokens, not on what is computed beside it or on the number of threads.

mod files;
mod wordpiece;

use std::path::Path;
use std::sync::Arc;

use obol_kernels::{Attention, Cpu, KvDtype, KvLayer, KvShape, Place, Pool, Qkv, Rows, Span};

use crate::batch::ForwardError;
use crate::error::LoadError;

pub use files::EncoderWeights;
use files::{EncoderPooling, Layer};
pub use wordpiece::WordPiece;

/// Makes vectors of texts.
pub trait TextEncoder: Send {
    /// Size of a vector.
    fn width(&self) -> usize;

    /// Most tokens of a text.
    fn context_length(&self) -> usize;

    /// Appends a vector of length 1 for each of `texts`, none of which is empty. `meanwhile` is called on the calling
    /// thread, at most once, while the device computes or before that.
    ///
    /// # Errors
    /// When the computation could not be carried out.
    fn encode(
        &mut self,
        texts: &[&[u32]],
        meanwhile: &mut dyn FnMut(),
        vectors: &mut Vec<Vec<f32>>,
    ) -> Result<(), ForwardError>;
}

/// Weights with working memory, on the CPU.
pub struct Encoder {
    weights: Arc<EncoderWeights>,
    cpu: Cpu,
    kv: KvLayer,
    work: Work,
}

/// Positions of a block of `kv`.
const BLOCK: usize = 16;

/// Buffers between operations, all (rows, width).
#[derive(Default)]
struct Work {
    hidden: Vec<f32>,
    summed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    wide: Vec<f32>,
    /// As the texts lie in the batch: their rows, the rows' positions, their blocks.
    texts: Vec<Span>,
    positions: Vec<u32>,
    table: Vec<u32>,
    /// Each row by itself, at its text's last position: so it sees the whole text.
    rows: Vec<Span>,
    lasts: Vec<u32>,
}

/// An encoder as its files have it.
pub struct LoadedEncoder {
    pub encoder: Box<dyn TextEncoder>,
    /// The same on further devices.
    pub replicas: Vec<Box<dyn TextEncoder>>,
    pub tokenizer: WordPiece,
    pub info: EncoderInfo,
}

/// What a loaded encoder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderInfo {
    /// The type of its weights, as "F32".
    pub precision: String,
    /// Bytes of weights held in memory.
    pub weight_bytes: u64,
    /// Most tokens of a text, special ones included.
    pub context_length: usize,
    /// Size of a vector.
    pub width: usize,
    /// blake3, in hex, of the weights' header, the configuration and the tokenizer.
    pub fingerprint: String,
}

/// Loads the directory of config.json, tokenizer.json and safetensors at `path`, for `1 + further` devices with
/// `threads` threads each.
///
/// # Errors
/// When a file is missing or broken, or the model is of another kind.
pub fn load_encoder(path: &Path, threads: usize, further: usize) -> Result<LoadedEncoder, LoadError> {
    let weights = Arc::new(EncoderWeights::load(path)?);
    let tokenizer = WordPiece::load(path)?;
    if tokenizer.vocab_size() > weights.vocab {
        let problem =
            format!("it has {} tokens, the embedding {} rows", tokenizer.vocab_size(), weights.vocab);
        return Err(LoadError::Tokenizer(problem));
    }
    let info = EncoderInfo {
        precision: weights.precision.clone(),
        weight_bytes: weights.bytes(),
        context_length: weights.context,
        width: weights.width,
        fingerprint: weights.fingerprint.clone(),
    };
    let encoder = || Box::new(Encoder::new(Arc::clone(&weights), Cpu::new(threads))) as Box<dyn TextEncoder>;
    Ok(LoadedEncoder {
        encoder: encoder(),
        replicas: (0..further).map(|_| encoder()).collect(),
        tokenizer,
        info,
    })
}

impl Encoder {
    /// # Panics
    /// Never, but for a kernel's bug.
    pub fn new(weights: Arc<EncoderWeights>, cpu: Cpu) -> Self {
        let kv = KvLayer::new(shape(&weights), 0);
        Self { weights, cpu, kv, work: Work::default() }
    }

    /// Lays the texts out one after another.
    fn place(&mut self, texts: &[&[u32]]) -> Result<(), ForwardError> {
        let Self { weights, kv, work, .. } = self;
        let Work { texts: spans, positions, table, rows, lasts, .. } = work;
        spans.clear();
        positions.clear();
        table.clear();
        rows.clear();
        lasts.clear();
        for text in texts {
            if text.is_empty() || text.len() > weights.context {
                return Err(ForwardError(format!(
                    "a text of {} tokens; from 1 to {}",
                    text.len(),
                    weights.context
                )));
            }
            if let Some(token) = text.iter().find(|token| **token as usize >= weights.vocab) {
                return Err(ForwardError(format!(
                    "token {token} outside the vocabulary of {}",
                    weights.vocab
                )));
            }
            let (first, blocks) = (positions.len(), table.len());
            positions.extend(0..text.len() as u32);
            table.extend(blocks as u32..(blocks + text.len().div_ceil(BLOCK)) as u32);
            spans.push(Span { rows: first..positions.len(), table: blocks..table.len() });
            for row in first..positions.len() {
                rows.push(Span { rows: row..row + 1, table: blocks..table.len() });
                lasts.push(text.len() as u32 - 1);
            }
        }
        if table.len() > kv.blocks() {
            *kv = KvLayer::try_new(shape(weights), table.len())
                .map_err(|error| ForwardError(error.to_string()))?;
        }
        Ok(())
    }

    /// The sums of word, position and type, normed.
    fn embed(&mut self, texts: &[&[u32]]) {
        let Self { weights, cpu, work, .. } = self;
        let width = weights.width;
        let summed = fit(&mut work.summed, work.positions.len() * width);
        let tokens = texts.iter().flat_map(|text| text.iter().enumerate());
        for ((position, token), row) in tokens.zip(summed.chunks_exact_mut(width)) {
            weights.words.dequantize_row(*token as usize, row);
            let place = &weights.places[position * width..][..width];
            row.iter_mut().zip(place).for_each(|(value, place)| *value += place);
        }
        let hidden = fit(&mut work.hidden, summed.len());
        weights.norm.apply(cpu, summed, hidden);
    }

    fn run_layer(&mut self, index: usize) {
        let Self { weights, cpu, kv, work } = self;
        let Layer { qkv: project, out, attention_norm, up, down, norm } = &weights.layers[index];
        let (width, rows) = (weights.width, work.positions.len());
        let hidden = fit(&mut work.hidden, rows * width);
        let qkv = fit(&mut work.qkv, rows * 3 * width);
        // ---- attention ----
        project.forward(cpu, hidden, qkv);
        let [q, k, v] = [0, width, 2 * width].map(|start| Place { start, stride: 3 * width });
        let read = Qkv { data: &mut *qkv, heads: weights.heads, q, k, v };
        cpu.rope_kv_write(read, None, kv, &work.texts, &work.positions, &work.table);
        let attention = Attention {
            layer: kv,
            spans: &work.rows,
            positions: &work.lasts,
            block_tables: &work.table,
            heads: weights.heads,
            scale: 1.0 / ((width / weights.heads) as f32).sqrt(),
            window: None,
            softcap: None,
        };
        let attended = fit(&mut work.attended, rows * width);
        cpu.paged_attention(Rows::new(qkv, 3 * width), &attention, attended);
        let summed = fit(&mut work.summed, rows * width);
        out.forward(cpu, attended, summed);
        cpu.add(summed, hidden);
        attention_norm.apply(cpu, summed, hidden);
        // ---- MLP ----
        let wide = fit(&mut work.wide, rows * up.width());
        up.forward(cpu, hidden, wide);
        cpu.act(weights.act, wide);
        down.forward(cpu, wide, summed);
        cpu.add(summed, hidden);
        norm.apply(cpu, summed, hidden);
    }

    /// The text's vector, from the rows that the last layer left.
    fn vector(&self, rows: &Span) -> Result<Vec<f32>, ForwardError> {
        let width = self.weights.width;
        let rows = match self.weights.pooling {
            EncoderPooling::Mean => rows.rows.clone(),
            EncoderPooling::First => rows.rows.start..rows.rows.start + 1,
        };
        let mut sum = vec![0.0; width];
        for row in self.work.hidden[rows.start * width..rows.end * width].chunks_exact(width) {
            sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        let length = sum.iter().map(|value: &f64| value * value).sum::<f64>().sqrt();
        if !length.is_finite() || length == 0.0 {
            return Err(ForwardError("the encoder's hidden states have no direction".into()));
        }
        Ok(sum.into_iter().map(|value| (value / length) as f32).collect())
    }

    fn run(&mut self, texts: &[&[u32]]) {
        self.embed(texts);
        (0..self.weights.layers.len()).for_each(|layer| self.run_layer(layer));
    }
}

impl TextEncoder for Encoder {
    fn width(&self) -> usize {
        self.weights.width
    }

    fn context_length(&self) -> usize {
        self.weights.context
    }

    fn encode(
        &mut self,
        texts: &[&[u32]],
        meanwhile: &mut dyn FnMut(),
        vectors: &mut Vec<Vec<f32>>,
    ) -> Result<(), ForwardError> {
        self.place(texts)?;
        if texts.is_empty() {
            return Ok(());
        }
        Pool::beside(meanwhile, || self.run(texts));
        for text in &self.work.texts {
            vectors.push(self.vector(text)?);
        }
        Ok(())
    }
}

/// Of the K and V of one layer.
fn shape(weights: &EncoderWeights) -> KvShape {
    let head_dim = weights.width / weights.heads;
    KvShape { kv_heads: weights.heads, head_dim, block_size: BLOCK, dtype: KvDtype::F32 }
}

/// The first `len` values of a buffer that grows when needed.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
