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
pub(crate) fn step(model: &mut Decoder, sequences: &mut [Sequence], work: &[(usize, usize)]) {
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
pub(crate) fn alone(model: &mut Decoder, tokens: &[u32]) -> Vec<Vec<u32>> {
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
