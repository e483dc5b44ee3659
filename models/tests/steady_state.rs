//! A forward pass allocates nothing once it has seen its largest batch.
//!
//! Counted on the calling thread alone, which is then the only one that computes: the test harness's own
//! thread allocates when it likes, and which of several threads first meets a size is chance.

mod counting;

use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use obol_kernels::Cpu;
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::load::LoadOptions;
use obol_models::quant::Quant;
use obol_models::{Decoder, ModelFiles};

use counting::ALLOCATIONS;

#[test]
fn steps_after_the_largest_allocate_nothing() {
    let as_they_are = ["llama_mixed.gguf", "qwen2_untied.gguf", "families/mixtral", "families/gemma3"];
    let packed = ["families/mixtral", "families/qwen3_moe"].map(|name| (name, Quant::Int8));
    for (name, quant) in as_they_are.map(|name| (name, Quant::File)).into_iter().chain(packed) {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let files = ModelFiles::open(&path).expect("the fixture");
        let mut model = Decoder::load(&files, Cpu::new(1), &LoadOptions { quant, ..LoadOptions::default() })
            .expect("the model");
        model.allocate_kv(8, 16).expect("a small pool");
        // Other tokens take other experts.
        let batch = |rows: usize| Batch {
            tokens: (0..rows as u32).map(|row| (row * 7 + rows as u32) % 160).collect(),
            positions: (0..rows as u32).collect(),
            spans: vec![Span { rows: 0..rows, table: 0..8 }],
            block_tables: (0..8).collect(),
            logit_rows: (0..rows).collect(),
        };
        let batches: Vec<Batch> = [100, 1, 17, 64, 100].into_iter().map(batch).collect();
        model.forward(&batches[0]).expect("the largest");
        let (mut meanwhile, seen) = (0, AtomicUsize::new(0));
        let before = ALLOCATIONS.get();
        for batch in &batches {
            model.forward(batch).expect("forward");
            let each = |_: usize, _: usize, logits: &[f32]| {
                seen.fetch_add(logits.len(), Relaxed);
            };
            model.forward_each(batch, &mut || meanwhile += 1, &each).expect("forward");
        }
        assert_eq!(ALLOCATIONS.get() - before, 0, "{name}");
        let rows: usize = batches.iter().map(|batch| batch.logit_rows.len()).sum();
        assert_eq!((meanwhile, seen.into_inner()), (batches.len(), rows * model.vocab_size()));
    }
}
