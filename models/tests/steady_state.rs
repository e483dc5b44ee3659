//! A forward pass allocates nothing once it has seen its largest batch.
//!
//! Counted on the threads that compute, one for each device: the test harness's own thread allocates when it
//! likes, and which of several threads of a device first meets a size is chance.

mod counting;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use obol_kernels::Cpu;
use obol_models::batch::{Batch, CausalLm, Span, SpanOutput};
use obol_models::load::LoadOptions;
use obol_models::quant::Quant;
use obol_models::{Decoder, ModelFiles, TensorParallel, Weights};

use counting::{ALLOCATIONS, BY_THREAD, THREADS};

fn open(name: &str) -> ModelFiles {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    ModelFiles::open(&path).expect("the fixture")
}

/// Runs batches of many sizes; `allocations` of them after the first and largest are none.
fn check(what: &str, model: &mut dyn CausalLm, allocations: &dyn Fn() -> usize) {
    model.allocate_kv(8, 16).expect("a small pool");
    // Other tokens take other experts.
    let batch = |rows: usize| Batch {
        tokens: (0..rows as u32).map(|row| (row * 7 + rows as u32) % 160).collect(),
        positions: (0..rows as u32).collect(),
        spans: vec![Span { rows: 0..rows, table: 0..8 }],
        block_tables: (0..8).collect(),
        logit_rows: (0..rows).collect(),
        hidden_rows: Vec::new(),
    };
    let batches: Vec<Batch> = [100, 1, 17, 64, 100].into_iter().map(batch).collect();
    // Twice, as what devices exchange lies in one of two places by turns.
    for batch in [&batches[0], &batches[1], &batches[0], &batches[0]] {
        model.forward(batch).expect("the largest");
    }
    let (mut meanwhile, seen) = (0, AtomicUsize::new(0));
    let before = allocations();
    for batch in &batches {
        model.forward(batch).expect("forward");
        let each = |_: usize, _: usize, made: SpanOutput<'_>| {
            if let SpanOutput::Logits(logits) = made {
                seen.fetch_add(logits.len(), Relaxed);
            }
        };
        model.forward_each(batch, &mut || meanwhile += 1, &each).expect("forward");
    }
    assert_eq!(allocations() - before, 0, "{what}");
    let rows: usize = batches.iter().map(|batch| batch.logit_rows.len()).sum();
    assert_eq!((meanwhile, seen.into_inner()), (batches.len(), rows * model.vocab_size()));
}

#[test]
fn steps_after_the_largest_allocate_nothing() {
    let as_they_are = ["llama_mixed.gguf", "qwen2_untied.gguf", "families/mixtral", "families/gemma3"];
    let packed = ["families/mixtral", "families/qwen3_moe"].map(|name| (name, Quant::Int8));
    for (name, quant) in as_they_are.map(|name| (name, Quant::File)).into_iter().chain(packed) {
        let options = LoadOptions { quant, ..LoadOptions::default() };
        let mut model = Decoder::load(&open(name), Cpu::new(1), &options).expect("the model");
        check(name, &mut model, &|| ALLOCATIONS.get());
    }
    for name in ["llama_mixed.gguf", "families/olmo2", "families/mixtral"] {
        let options = LoadOptions { tensor_parallel: 2, ..LoadOptions::default() };
        let weights = Weights::load(&open(name), &Cpu::new(1), &options).expect("the model");
        let known = THREADS.load(Relaxed);
        let mut model = TensorParallel::new(&Arc::new(weights), vec![Cpu::new(1), Cpu::new(1)]);
        let others = || BY_THREAD[known..].iter().map(|count| count.load(Relaxed)).sum::<usize>();
        check(name, &mut model, &|| ALLOCATIONS.get() + others());
        assert!(others() > 0, "{name}: the other device's are counted");
    }
}
