//! What spoiled files have found, one by one.

use std::path::Path;

use obol_kernels::Cpu;
use obol_models::load::LoadOptions;
use obol_models::{Decoder, ModelFiles};

use crate::random::Random;
use crate::{alone, gguf, safetensors, try_model};

const F32: u32 = 0;
const F16: u32 = 1;

fn load(path: &Path) -> Result<Decoder, String> {
    let files = ModelFiles::open(path).map_err(|error| error.to_string())?;
    Decoder::load(&files, Cpu::new(1), &LoadOptions::default()).map_err(|error| error.to_string())
}

#[test]
fn scalars_in_place_of_matrices_are_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (seed, name) in
        [("gemma3_gguf", "blk.3.ffn_up.weight"), ("phi3_longrope_long", "blk.0.attn_qkv.weight")]
    {
        let path = gguf::with_tensor(dir.path(), seed, name, F32, Some(&[]), 0);
        let error = load(&path).err().expect("a scalar");
        assert!(error.contains(&format!("`{name}` should have the shape")), "{error}");
    }
    let name = "transformer.h.0.attn.c_attn.weight";
    let error = load(&safetensors::with_scalar(dir.path(), "gpt2", name)).err().expect("a scalar");
    assert!(error.contains(&format!("`{name}` should have the shape")), "{error}");
}

#[test]
fn vectors_of_no_numbers_are_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let name = "blk.1.attn_v.bias";
    let path = gguf::with_tensor(dir.path(), "qwen2_q4_1.gguf", name, F16, None, 0xff);
    let error = load(&path).err().expect("not numbers");
    assert_eq!(error, format!("tensor `{name}`: a value is not a finite number"));
}

/// Numbers whose products overflow: any logits will do.
#[test]
fn overflow_is_computed_with() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (seed, name) in
        [("llama_q4_k_m", "blk.0.attn_norm.weight"), ("llama_mixed.gguf", "output_norm.weight")]
    {
        // 3.4e38
        let path = gguf::with_tensor(dir.path(), seed, name, F32, None, 0x7f);
        for case in 0..8 {
            assert_eq!(try_model(&path, &mut Random::new(case)), "loaded", "{seed}: {name}");
        }
    }
}

/// What a position needs is not held for each one that the file states.
#[test]
fn a_long_context_costs_nothing_before_there_is_a_pool_for_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = gguf::with_key(dir.path(), "llama", "llama.context_length", 1 << 21);
    let before = std::time::Instant::now();
    assert_eq!(try_model(&path, &mut Random::new(1)), "loaded");
    assert!(before.elapsed().as_secs() < 1, "{:?}", before.elapsed());
}

/// A byte in the file is 32 in memory.
#[test]
fn arrays_of_bytes_without_end_are_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    for len in [(8u64 << 20) + 1, 100 << 20] {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([0u64, 1, 1].map(u64::to_le_bytes).concat());
        bytes.extend(b"a\x09\0\0\0\0\0\0\0");
        bytes.extend(len.to_le_bytes());
        bytes.resize(bytes.len() + len as usize, 0);
        std::fs::write(&path, bytes).expect("a temporary file");
        let error = load(&path).err().expect("too many");
        let expected = format!("`a`: with its {len} items the header's arrays have more than 8388608");
        assert!(error.contains(&expected), "{error}");
    }
}

/// Two bytes of text are 32 or more in memory.
#[test]
fn configurations_without_end_are_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = format!("{{\"model_type\":\"llama\",\"a\":[{}0]}}", "0,".repeat(4 << 20));
    std::fs::write(dir.path().join("config.json"), &text).expect("a temporary file");
    let error = load(dir.path()).err().expect("too long");
    let expected = format!("config.json: it has {} bytes, more than 4194304", text.len());
    assert!(error.contains(&expected), "{error}");
}
