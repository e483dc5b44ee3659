//! Decodes greedily from token ids: a quick check of a model file and of speed.
//!
//! `cargo run -p obol-models --example generate -- MODEL.gguf [--threads N] [--tokens N] ID...`

use std::path::PathBuf;
use std::time::Instant;

use obol_kernels::Cpu;
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::load::LoadOptions;
use obol_models::{Decoder, ModelFiles};

const BLOCK_SIZE: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path =
        PathBuf::from(args.next().ok_or("usage: generate MODEL.gguf [--threads N] [--tokens N] ID...")?);
    let mut threads = std::thread::available_parallelism()?.get();
    let mut count = 64;
    let mut tokens: Vec<u32> = Vec::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => threads = args.next().ok_or("--threads needs a number")?.parse()?,
            "--tokens" => count = args.next().ok_or("--tokens needs a number")?.parse()?,
            id => tokens.push(id.parse()?),
        }
    }

    let start = Instant::now();
    let files = ModelFiles::open(&path)?;
    let mut model = Decoder::load(&files, Cpu::new(threads), &LoadOptions::default())?;
    let loaded = start.elapsed();
    let blocks = (tokens.len() + count).div_ceil(BLOCK_SIZE);
    model.allocate_kv(blocks, BLOCK_SIZE)?;
    println!("loaded in {loaded:.2?}: {} MiB of weights", model.weight_bytes() >> 20);

    let mut generated: Vec<u32> = Vec::new();
    let mut input = tokens.clone();
    let mut position = 0;
    let mut prefill = std::time::Duration::ZERO;
    let start = Instant::now();
    while generated.len() < count {
        let batch = Batch {
            positions: (position..position + input.len() as u32).collect(),
            spans: vec![Span { rows: 0..input.len(), table: 0..blocks }],
            block_tables: (0..blocks as u32).collect(),
            logit_rows: vec![input.len().checked_sub(1).ok_or("give token ids to begin with")?],
            hidden_rows: Vec::new(),
            tokens: input,
        };
        let logits = model.forward(&batch)?;
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        position += batch.tokens.len() as u32;
        generated.push(best as u32);
        input = vec![best as u32];
        if generated.len() == 1 {
            prefill = start.elapsed();
        }
    }
    let decode = start.elapsed() - prefill;
    println!("{generated:?}");
    println!("prefill: {} tokens, {:.1} tokens/s", tokens.len(), tokens.len() as f64 / prefill.as_secs_f64());
    println!("decode: {count} tokens, {:.1} tokens/s", (count - 1) as f64 / decode.as_secs_f64());
    Ok(())
}
