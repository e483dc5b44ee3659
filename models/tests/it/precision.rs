//! Models in every precision: close to full precision, the row law kept, their bytes as stated.

use std::path::PathBuf;

use obol_kernels::{Cpu, Isa, KvDtype};
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::load::{LoadOptions, load};
use obol_models::quant::Quant;
use obol_models::{Decoder, ModelFiles};

use crate::support::{Sequence, alone, difference, fixture, load_as, step};

/// How far logits of a small random model, whose errors nothing averages out, may be from f32's.
#[test]
fn every_precision_is_close_to_f32() {
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 160).collect();
    for name in ["llama_tied", "llama_untied", "llama_mixed", "qwen2_q4_1"] {
        let full = alone(&mut load_as(name, Quant::F32, 2, Isa::detect(), 4), &tokens);
        for (quant, tolerance) in
            [(Quant::F16, 6e-3), (Quant::Bf16, 5e-2), (Quant::Int8, 0.1), (Quant::Int4, 0.8)]
        {
            let off = difference(&alone(&mut load_as(name, quant, 2, Isa::detect(), 4), &tokens), &full);
            println!("{name} as {quant}: off by {off:e}");
            assert!(off > 0.0 && off < tolerance, "{name} as {quant}: off by {off}");
        }
    }
}

#[test]
fn chunks_and_threads_do_not_matter_in_any_precision() {
    let tokens: Vec<u32> = (0..40).map(|i| i * 11 % 160).collect();
    for quant in Quant::ALL {
        for isa in Isa::available() {
            let expected = alone(&mut load_as("llama_mixed", quant, 1, isa, 4), &tokens);
            let mut model = load_as("llama_mixed", quant, 3, isa, 4);
            let mut sequences = [Sequence::new(&tokens, vec![2, 0, 3, 1])];
            for chunk in [1, 17, 5, 17] {
                step(&mut model, &mut sequences, &[(0, chunk)]);
            }
            assert!(sequences[0].logits == expected, "{quant} on {isa}");
        }
    }
}

/// Files that are quantised: the values are as transformers has them. What int8 activations cost is large in
/// random models this small; the integers themselves are checked value by value elsewhere.
#[test]
fn quantised_files_equal_transformers() {
    for (name, file, precision) in [
        ("llama_q2_k", "model.gguf", "Q2_K"),
        ("llama_q3_k", "model.gguf", "Q3_K"),
        ("llama_q4_k_m", "model.gguf", "Q4_K"),
        ("llama_q5_k", "model.gguf", "Q5_K"),
        ("gptq_g128", "", "GPTQ int4"),
        ("gptq_g32_act_order", "", "GPTQ int4"),
        ("gptq_v2_g64", "", "GPTQ int4"),
        ("awq_g64", "", "AWQ int4"),
        ("awq_g128", "", "AWQ int4"),
    ] {
        let directory = fixture("families").join(name);
        let json = std::fs::read_to_string(directory.join("expected.json")).expect("the expected logits");
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let tokens: Vec<u32> = serde_json::from_value(json["tokens"].clone()).expect("tokens");
        let expected: Vec<Vec<f32>> = serde_json::from_value(json["logits"].clone()).expect("logits");
        let expected: Vec<Vec<u32>> =
            expected.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
        let path = if file.is_empty() { directory } else { directory.join(file) };
        let files = ModelFiles::open(&path).expect("a good model");
        for (quant, tolerance) in [(Quant::F32, 1e-4), (Quant::File, 0.1)] {
            let options = LoadOptions { quant, kv_dtype: KvDtype::F32, ..LoadOptions::default() };
            let mut model = Decoder::load(&files, Cpu::new(2), &options).expect("a good model");
            model.allocate_kv(8, 16).expect("a small pool");
            let off = difference(&alone(&mut model, &tokens), &expected);
            println!("{name} as {quant}: off by {off:e}, {} bytes", model.weight_bytes());
            assert!(off < tolerance, "{name} as {quant}: off by {off}");
        }
        assert_eq!(files.precision().expect("a precision"), precision, "{name}");
    }
}

/// The default model, 134.5 million weights, as each precision.
#[test]
fn the_real_model_is_as_large_and_as_good_as_its_precision() {
    let path = std::env::var_os("OBOL_TEST_MODEL")
        .map(PathBuf::from)
        .expect("OBOL_TEST_MODEL is not set: run scripts/test, which fetches the model");
    let embedding = 49_152 * 576;
    let layers = 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536);
    let norms = 61 * 576 * 4;
    let mut full: Vec<f32> = Vec::new();
    for (quant, bytes, tolerance) in [
        (Quant::F32, (embedding + layers) * 4, 0.0),
        (Quant::F16, (embedding + layers) * 2, 2e-3),
        (Quant::Bf16, (embedding + layers) * 2, 3e-2),
        (Quant::Int8, (embedding + layers) / 32 * 34, 0.1),
        (Quant::Int4, embedding / 32 * 34 + layers / 32 * 20, 0.2),
    ] {
        let options = LoadOptions { quant, ..LoadOptions::default() };
        let mut loaded = load(&path, &options).expect("the default model");
        assert_eq!(loaded.info.precision, quant.name());
        assert_eq!(loaded.info.weight_bytes, (bytes + norms) as u64, "{quant}");
        loaded.model.allocate_kv(1, 16).expect("a small pool");
        let batch = Batch {
            tokens: vec![504, 3575, 282, 4649, 314], // "The capital of France is"
            positions: (0..5).collect(),
            spans: vec![Span { rows: 0..5, table: 0..1 }],
            block_tables: vec![0],
            logit_rows: vec![4],
            hidden_rows: Vec::new(),
        };
        let logits = loaded.model.forward(&batch).expect("forward").to_vec();
        if quant == Quant::F32 {
            full.clone_from(&logits);
        }
        let largest = full.iter().fold(0f32, |a, x| a.max(x.abs()));
        let off = logits.iter().zip(&full).fold(0f32, |a, (x, y)| a.max((x - y).abs())) / largest;
        println!("{quant}: off by {off:e}");
        assert!(off <= tolerance, "{quant}: off by {off}");
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a logit");
        assert_eq!(loaded.tokenizer.token_text(best as u32), " Paris", "{quant}");
    }
}
