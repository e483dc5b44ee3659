//! Fixtures, and running token sequences through a model.

use std::path::PathBuf;

use obol_kernels::{Cpu, Isa};
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::load::LoadOptions;
use obol_models::quant::Quant;
use obol_models::{Decoder, ModelFiles};

pub(crate) const BLOCK_SIZE: usize = 16;

/// A committed file made by `tests/make_fixtures.py`.
pub(crate) fn fixture(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(file)
}

/// The model of a fixture, with a pool of `blocks` blocks of 16 tokens.
pub(crate) fn load(name: &str, threads: usize, isa: Isa, blocks: usize) -> Decoder {
    load_as(name, Quant::File, threads, isa, blocks)
}

/// As [`load`], in a chosen precision.
pub(crate) fn load_as(name: &str, quant: Quant, threads: usize, isa: Isa, blocks: usize) -> Decoder {
    let files = ModelFiles::open(&fixture(&format!("{name}.gguf"))).expect("the fixture is good");
    let options = LoadOptions { quant, ..LoadOptions::default() };
    let mut model = Decoder::load(&files, Cpu::with_isa(threads, isa), &options).expect("the model is good");
    model.allocate_kv(blocks, BLOCK_SIZE).expect("a small pool");
    model
}

/// A sequence in the making.
pub(crate) struct Sequence {
    pub tokens: Vec<u32>,
    pub done: usize,
    pub table: Vec<u32>,
    /// Logits of each computed row, as bits, so that equal means equal.
    pub logits: Vec<Vec<u32>>,
}

impl Sequence {
    pub(crate) fn new(tokens: &[u32], table: Vec<u32>) -> Self {
        Self { tokens: tokens.to_vec(), done: 0, table, logits: Vec::new() }
    }
}

/// One step: the next `count` tokens of each named sequence, logits of all rows.
pub(crate) fn step(model: &mut dyn CausalLm, sequences: &mut [Sequence], work: &[(usize, usize)]) {
    let mut batch = Batch::default();
    for &(index, count) in work {
        let sequence = &sequences[index];
        let row = batch.tokens.len();
        let positions = sequence.done..sequence.done + count;
        batch.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
        batch.positions.extend(positions.map(|position| position as u32));
        let entry = batch.block_tables.len();
        batch.block_tables.extend_from_slice(&sequence.table);
        batch.spans.push(Span { rows: row..row + count, table: entry..batch.block_tables.len() });
    }
    batch.logit_rows = (0..batch.tokens.len()).collect();
    let vocab = model.vocab_size();
    let logits = model.forward(&batch).expect("forward");
    let mut rows = logits.chunks_exact(vocab);
    for &(index, count) in work {
        let sequence = &mut sequences[index];
        for row in rows.by_ref().take(count) {
            sequence.logits.push(row.iter().map(|logit| logit.to_bits()).collect());
        }
        sequence.done += count;
    }
}

/// All logits of `tokens` (bits), alone in one chunk.
pub(crate) fn alone(model: &mut dyn CausalLm, tokens: &[u32]) -> Vec<Vec<u32>> {
    let table = (0..tokens.len().div_ceil(BLOCK_SIZE) as u32).collect();
    let mut sequences = [Sequence::new(tokens, table)];
    step(model, &mut sequences, &[(0, tokens.len())]);
    let [sequence] = sequences;
    sequence.logits
}

/// A small deterministic generator for test data (xorshift64*).
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// The largest difference of two models' logits, as a part of the largest logit.
pub(crate) fn difference(a: &[Vec<u32>], b: &[Vec<u32>]) -> f32 {
    assert_eq!(a.len(), b.len(), "as many rows of logits");
    let values = |rows: &[Vec<u32>]| rows.iter().flatten().map(|&x| f32::from_bits(x)).collect::<Vec<_>>();
    let (a, b) = (values(a), values(b));
    let largest = b.iter().fold(0f32, |a, x| a.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |worst, (a, b)| worst.max((a - b).abs() / largest))
}

pub(crate) fn best(logits: &[u32]) -> u32 {
    let value = |index: usize| f32::from_bits(logits[index]);
    (0..logits.len()).rev().max_by(|&a, &b| value(a).total_cmp(&value(b))).expect("a logit") as u32
}

/// The greedy continuation of `start`, token by token, in a pool of as many blocks as `blocks`.
pub(crate) fn continuation(model: &mut dyn CausalLm, start: &[u32], count: usize, blocks: usize) -> Vec<u32> {
    let mut sequences = [Sequence::new(start, (0..blocks as u32).collect())];
    let mut rows = start.len();
    while sequences[0].tokens.len() < start.len() + count {
        step(model, &mut sequences, &[(0, rows)]);
        let next = best(sequences[0].logits.last().expect("a row"));
        sequences[0].tokens.push(next);
        rows = 1;
    }
    sequences[0].tokens.split_off(start.len())
}

/// A family's files: its directory where it holds safetensors, and its GGUF file.
pub(crate) fn files(directory: &std::path::Path) -> Vec<PathBuf> {
    let safetensors = directory.join("config.json").is_file().then(|| directory.into());
    let gguf = Some(directory.join("model.gguf")).filter(|path| path.is_file());
    safetensors.into_iter().chain(gguf).collect()
}
