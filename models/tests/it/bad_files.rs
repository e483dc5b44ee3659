//! Broken, hostile and unsuitable GGUF files: each an error that says what is wrong, never a panic.

use std::fs;

use obol_kernels::Cpu;
use obol_models::gguf::GgufFile;
use obol_models::load::LoadOptions;
use obol_models::{Decoder, ModelFiles};

use crate::parts::{ARRAY, F32, Parts, STRING, U32, string, tensor};
use crate::support::fixture;

/// Loads a file of these bytes as far as it goes.
fn load(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).expect("a temporary file");
    let files = ModelFiles::open(&path).map_err(|error| error.to_string())?;
    Decoder::load(&files, Cpu::new(1), &LoadOptions::default()).map(drop).map_err(|error| error.to_string())
}

/// The good file with `change` fails with an error that contains `message`.
#[track_caller]
fn check(message: &str, change: impl FnOnce(&mut Parts)) {
    let mut parts = Parts::good();
    change(&mut parts);
    match load(&parts.bytes()) {
        Ok(()) => panic!("loaded, expected: {message}"),
        Err(error) => assert!(error.contains(message), "expected: {message}\ngot: {error}"),
    }
}

#[test]
fn the_good_file_is_good() {
    assert_eq!(load(&Parts::good().bytes()), Ok(()));
}

/// These bytes fail with this message, whole.
#[track_caller]
fn refused(bytes: &[u8], message: &str) {
    let error = load(bytes).expect_err(message);
    assert_eq!(error, message, "\ngot: {error}");
}

/// The good file with `change` fails with this message, whole.
#[track_caller]
fn changed(message: &str, change: impl FnOnce(&mut Parts)) {
    let mut parts = Parts::good();
    change(&mut parts);
    refused(&parts.bytes(), message);
}

#[test]
fn what_is_something_else_is_called_by_its_name() {
    refused(b"", "not a GGUF file: the file is empty; download it again");
    refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 99\n",
        "not a GGUF file: it is a Git LFS pointer, which only names the real file; download that (`git lfs \
         pull`, or `obol pull`)",
    );
    refused(
        b"\n<!DOCTYPE html>\n<html>Please log in",
        "not a GGUF file: it is an HTML page, such as a site's login or error page; download the file \
         itself",
    );
    refused(
        b"PK\x03\x04\x14\0\0\0\x08\0",
        "not a GGUF file: it is a zip archive, as those of PyTorch are; a GGUF file or a directory with \
         safetensors is needed",
    );
    refused(b"\x80\x02}q\0", "not a GGUF file: it begins with \"\\x80\\x02}q\", not \"GGUF\"");
    let safetensors = fixture("families/llama/model.safetensors");
    refused(
        &fs::read(safetensors).expect("the fixture"),
        "not a GGUF file: it is a safetensors file; name the directory that has it and the model's \
         config.json and tokenizer.json",
    );
}

#[test]
fn headers_that_cannot_be_are_told_whole() {
    changed(
        "GGUF version 1 is not supported (versions 2 and 3 are); convert the model again, or download \
         another file of it",
        |parts| parts.version = 1,
    );
    changed(
        "the GGUF file is not supported: it is big-endian; download or convert the little-endian one",
        |parts| parts.version = 3u32.swap_bytes(),
    );
    changed(
        "the GGUF file is broken or incomplete: it announces 8 metadata keys and 1152921504606846976 \
         tensors, more than fit in its 8192 bytes; download it again",
        |parts| parts.tensor_count = Some(1 << 60),
    );
    changed(
        "GGUF metadata key `llama.block_count` occurs twice; download or convert the model again",
        |parts| parts.keys.push(parts.keys[1].clone()),
    );
    changed("tensor `output_norm.weight` occurs twice; download or convert the model again", |parts| {
        parts.tensors.push(parts.tensors[1].clone())
    });
    changed(
        "GGUF metadata key `general.alignment`: 0 is no power of two; download or convert the model \
         again",
        |parts| parts.set_u32("general.alignment", 0),
    );
    changed(
        "GGUF metadata key `general.alignment` should hold an unsigned 32-bit integer but holds a value of \
         type 8; download or convert the model again",
        |parts| parts.set("general.alignment", STRING, &string("32")),
    );
    changed(
        "the GGUF file is not supported: it is part 1 of a model split into 3 files (`split.count`); merge \
         them into one with llama.cpp's `llama-gguf-split --merge FIRST_PART MERGED`",
        |parts| {
            parts.set_u32("split.count", 3);
            parts.set_u32("split.no", 0);
        },
    );
    changed(
        "GGUF metadata has no key `llama.block_count`, which is needed; download or convert the model again",
        |parts| parts.keys.retain(|key| key.0 != "llama.block_count"),
    );
    changed(
        "GGUF metadata key `llama.block_count` should hold an unsigned 32-bit integer but holds the string \
         \"one\"; download or convert the model again",
        |parts| parts.set("llama.block_count", STRING, &string("one")),
    );
    changed(
        "GGUF metadata key `general.architecture`: `mamba` is not supported; supported: llama, qwen2, \
         qwen3, qwen3moe, gemma, gemma2, gemma3, phi3, granite, olmo2, smollm3, gpt2",
        |parts| parts.set("general.architecture", STRING, &string("mamba")),
    );
    let good = Parts::good().bytes();
    refused(
        &good[..20],
        "the GGUF file is broken or incomplete: the number of keys needs 4 bytes at byte 20, the file has \
         20; download it again",
    );
    refused(
        &good[..100],
        "the GGUF file is broken or incomplete: it announces 8 metadata keys and 11 tensors, more than fit \
         in its 100 bytes; download it again",
    );
    refused(
        &good[..600],
        "the GGUF file is broken or incomplete: a tensor's name needs 19 bytes at byte 586, the file has \
         600; download it again",
    );
    let mut keys = Parts::good();
    keys.tensor_count = Some(0);
    refused(
        &keys.bytes()[..215],
        "the GGUF file is broken or incomplete: llama.feed_forward_length needs 4 bytes at byte 213, the file has \
         215; download it again",
    );
    refused(
        &good[..good.len() - 64],
        "the GGUF file is broken or incomplete: tensor `blk.0.ffn_down.weight` ends at byte 8192 but the \
         file has 8128; download it again",
    );
}

#[test]
fn tensors_that_cannot_be_are_told_whole() {
    changed(
        "the GGUF file is broken or incomplete: tensor `blk.0.attn_v.weight` ends at byte 1049920 but the \
         file has 8192; download it again",
        |parts| parts.tensor("blk.0.attn_v.weight").offset = Some(1 << 20),
    );
    changed(
        "tensor `blk.0.attn_v.weight`: its shape [16, 32] or its offset 18446744073709551615 is absurd; \
         download or convert the model again",
        |parts| parts.tensor("blk.0.attn_v.weight").offset = Some(u64::MAX),
    );
    changed(
        "tensor `blk.0.attn_v.weight` should have the shape [16, 32] but has [8, 32]; the weights and the \
         configuration are not of one model",
        |parts| parts.tensor("blk.0.attn_v.weight").dims = vec![32, 8],
    );
    changed(
        "tensor `blk.0.attn_v.weight`: shape [32, 33] does not fit type Q4_1: rows are whole blocks of 32 \
         values; download or convert the model again",
        |parts| parts.tensor("blk.0.attn_v.weight").dims = vec![33, 32],
    );
    changed(
        "there is no tensor `blk.0.attn_v.weight`, which the model needs; the files are incomplete or not \
         of one model",
        |parts| parts.tensors.retain(|tensor| tensor.name != "blk.0.attn_v.weight"),
    );
    changed(
        "tensor `blk.1.attn_norm.weight`: not part of a llama model of 1 layer; the weights and the \
         configuration are not of one model",
        |parts| parts.tensors.push(tensor("blk.1.attn_norm.weight", &[32], 0, (1, 4))),
    );
    for (dtype, name) in [(16, "IQ2_XXS"), (23, "IQ4_XS"), (35, "TQ2_0"), (39, "MXFP4"), (999, "number 999")]
    {
        let message = format!(
            "tensor `blk.0.attn_v.weight` has the type {name}, which is not supported here; supported: F32, F16, \
             BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"
        );
        changed(&message, |parts| parts.tensor("blk.0.attn_v.weight").dtype = dtype);
    }
    changed(
        "tensor `blk.0.ffn_up.weight`: a scale is not a number, or out of range; download the file again, or choose another --quant",
        |parts| parts.tensor("blk.0.ffn_up.weight").data[20..22].copy_from_slice(&[0, 0x7e]),
    );
}

#[test]
fn what_is_no_gguf_file_is_refused() {
    for bytes in [&b""[..], b"G", b"GGUF", b"GGUF\x03\0\0\0", b"PK\x03\x04 a zip file", &[0; 100]] {
        load(bytes).expect_err("no GGUF file");
    }
    check("begins with \"GGML\"", |parts| parts.magic = *b"GGML");
    check("version 1", |parts| parts.version = 1);
    check("version 77", |parts| parts.version = 77);
    check("big-endian", |parts| parts.version = 3u32.swap_bytes());
    let missing = GgufFile::open(&fixture("no_such_file.gguf")).map(drop).expect_err("no file");
    assert!(missing.to_string().contains("no_such_file.gguf"));
    GgufFile::open(&fixture("")).map(drop).expect_err("a directory");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let good = fs::read(fixture("llama_mixed.gguf")).expect("the fixture");
    assert_eq!(load(&good), Ok(()));
    for len in (0..3000).chain((3000..good.len() - 32).step_by(997)) {
        let error = load(&good[..len]).expect_err("a cut file");
        let clear = error.contains("broken or incomplete") || error.starts_with("not a GGUF file: ");
        assert!(clear, "cut at {len}: {error}");
    }
}

/// Any answer will do, but it must be an answer.
#[test]
fn a_header_with_spoiled_bytes_is_survived() {
    let good = Parts::good().bytes();
    let header = good.len() - Parts::good().tensors.iter().map(|tensor| tensor.data.len()).sum::<usize>();
    for at in 0..header {
        for spoil in [0, 0x7f, 0xff, good[at] ^ 1, good[at] ^ 0x80] {
            let mut bytes = good.clone();
            bytes[at] = spoil;
            drop(load(&bytes));
        }
    }
}

#[test]
fn absurd_counts_and_lengths_are_refused() {
    for absurd in [1 << 20, u64::from(u32::MAX), 1 << 60, u64::MAX] {
        check("more than fit", |parts| parts.tensor_count = Some(absurd));
        check("more than fit", |parts| parts.key_count = Some(absurd));
        check("llama.x", |parts| parts.set("llama.x", STRING, &absurd.to_le_bytes()));
        for item_type in [0, U32, 7, STRING, ARRAY, 12] {
            let array = [&item_type.to_le_bytes()[..], &absurd.to_le_bytes()].concat();
            check("llama.x", |parts| parts.set("llama.x", ARRAY, &array));
        }
        check("ffn_norm", |parts| parts.tensor("blk.0.ffn_norm.weight").offset = Some(absurd));
        check("attn_q", |parts| parts.tensor("blk.0.attn_q.weight").dims = vec![absurd & !31, 32]);
        check("attn_q", |parts| parts.tensor("blk.0.attn_q.weight").dims = vec![32, absurd, absurd]);
    }
    check("nested too deep", |parts| {
        let one_more = [&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
        parts.set("a", ARRAY, &one_more.repeat(1000));
    });
    check("has 5 dimensions", |parts| parts.tensor("output_norm.weight").dims = vec![1; 5]);
    check("output_norm", |parts| parts.tensor("output_norm.weight").dims = vec![]);
    check("attn_q", |parts| parts.tensor("blk.0.attn_q.weight").dims = vec![0, 32]);
    check("whole blocks of 32", |parts| parts.tensor("blk.0.attn_q.weight").dims = vec![33, 32]);
}

#[test]
fn keys_that_are_missing_twice_there_or_wrong_are_named() {
    for (name, ..) in Parts::good().keys {
        if name.ends_with("head_count_kv") {
            continue;
        }
        check(&format!("no key `{name}`"), |parts| parts.keys.retain(|key| key.0 != name));
        check(&format!("`{name}` should hold"), |parts| {
            parts.set(&name, ARRAY, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        });
        check(&format!("`{name}` occurs twice"), |parts| {
            let again = parts.keys.iter().find(|key| key.0 == name).expect("the key").clone();
            parts.keys.push(again);
        });
    }
    check("unknown value type 99", |parts| parts.set("a", 99, &[0; 8]));
    check("general.alignment", |parts| parts.set_u32("general.alignment", 0));
    check("general.alignment", |parts| parts.set_u32("general.alignment", 48));
    check("`mamba` is not supported; supported: llama, qwen2, qwen3, qwen3moe, gemma", |parts| {
        parts.set("general.architecture", STRING, &string("mamba"));
    });
}

#[test]
fn sizes_that_contradict_are_named() {
    for name in ["block_count", "context_length", "embedding_length", "feed_forward_length"] {
        check(&format!("llama.{name}"), |parts| parts.set_u32(&format!("llama.{name}"), 0));
        check(&format!("llama.{name}"), |parts| parts.set_u32(&format!("llama.{name}"), u32::MAX));
    }
    check("head_count", |parts| parts.set_u32("llama.attention.head_count", 3));
    check("head_count", |parts| parts.set_u32("llama.attention.head_count", u32::MAX));
    check("head_count_kv", |parts| parts.set_u32("llama.attention.head_count_kv", 3));
    check("head_count_kv", |parts| parts.set_u32("llama.attention.head_count_kv", 0));
    check("dimension_count", |parts| parts.set_u32("llama.rope.dimension_count", 18));
    check("dimension_count", |parts| parts.set_u32("llama.rope.dimension_count", 7));
    check("vocab_size", |parts| parts.set_u32("llama.vocab_size", 9));
    check("value_length", |parts| parts.set_u32("llama.attention.value_length", 4));
    check("no key `llama.expert_used_count`", |parts| parts.set_u32("llama.expert_count", 8));
    check("rope.scaling.type", |parts| parts.set("llama.rope.scaling.type", STRING, &string("longrope")));
    check("rope.scaling.factor", |parts| parts.set("llama.rope.scaling.type", STRING, &string("linear")));
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let eps = "llama.attention.layer_norm_rms_epsilon";
        check(eps, |parts| parts.set(eps, F32, &bad.to_le_bytes()));
        check("freq_base", |parts| parts.set("llama.rope.freq_base", F32, &bad.to_le_bytes()));
    }
}

#[test]
fn tensors_that_are_missing_wrong_or_too_many_are_named() {
    for good in Parts::good().tensors {
        let name = good.name.as_str();
        check(&format!("`{name}`"), |parts| parts.tensors.retain(|tensor| tensor.name != name));
        check(&format!("`{name}` occurs twice"), |parts| parts.tensors.push(good.clone()));
        check(&format!("`{name}`"), |parts| {
            let tensor = parts.tensor(name);
            tensor.dims = vec![64, 7];
            tensor.data.resize(64 * 7 * 4, 0);
        });
    }
    check("blk.1.attn_norm.weight", |parts| {
        parts.tensors.push(tensor("blk.1.attn_norm.weight", &[32], 0, (1, 4)));
    });
    check("blk.0.attn_q_norm.weight", |parts| {
        parts.tensors.push(tensor("blk.0.attn_q_norm.weight", &[16], 0, (1, 4)));
    });
    check("`blk.0.attn_v.weight` has the type IQ4_XS", |parts| {
        parts.tensor("blk.0.attn_v.weight").dtype = 23
    });
    check("`blk.0.attn_v.weight` has the type number 999", |parts| {
        parts.tensor("blk.0.attn_v.weight").dtype = 999
    });
    check("`blk.0.attn_norm.weight` has the type Q8_0", |parts| {
        parts.tensor("blk.0.attn_norm.weight").dtype = 8
    });
    check(
        "`blk.0.attn_v.weight` has the type Q8_1, which is not supported here; supported: F32, F16",
        |parts| {
            *parts.tensor("blk.0.attn_v.weight") = tensor("blk.0.attn_v.weight", &[32, 16], 9, (32, 36));
        },
    );
    check("`blk.0.ffn_up.weight`: a scale is not a number", |parts| {
        parts.tensor("blk.0.ffn_up.weight").data[20..22].copy_from_slice(&[0, 0x7e]);
    });
}
