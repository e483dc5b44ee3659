//! Loading a whole model: weights, tokenizer, template and what it is.

use std::path::PathBuf;
use std::{env, fs};

use obol_models::batch::{Batch, Span};
use obol_models::error::LoadError;
use obol_models::load::{LoadOptions, Loaded, load};

use crate::parts::{ARRAY, Parts, STRING, string};

fn strings(texts: &[&str]) -> Vec<u8> {
    let texts_bytes: Vec<u8> = texts.iter().flat_map(|text| string(text)).collect();
    [&STRING.to_le_bytes()[..], &(texts.len() as u64).to_le_bytes(), &texts_bytes].concat()
}

/// The good file with a vocabulary of its 8 tokens and a template.
fn with_text() -> Parts {
    let mut parts = Parts::good();
    parts.set("tokenizer.ggml.model", STRING, &string("gpt2"));
    parts.set("tokenizer.ggml.tokens", ARRAY, &strings(&["a", "b", "c", "d", "ab", "cd", "e", "f"]));
    parts.set("tokenizer.ggml.merges", ARRAY, &strings(&["a b", "c d"]));
    parts.set_u32("tokenizer.ggml.eos_token_id", 7);
    parts.set("tokenizer.chat_template", STRING, &string("{{ messages[0].content }}"));
    parts
}

fn load_parts(parts: &Parts, options: &LoadOptions) -> Result<Loaded, LoadError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("tiny.gguf");
    fs::write(&path, parts.bytes()).expect("a temporary file");
    load(&path, options)
}

#[test]
fn a_model_comes_with_its_text_and_says_what_it_is() {
    let options = LoadOptions { threads: 2, max_model_len: Some(48), ..LoadOptions::default() };
    let loaded = load_parts(&with_text(), &options).expect("a good file");
    assert_eq!(loaded.tokenizer.end_tokens(), [7]);
    assert!(loaded.template.is_some());
    assert_eq!(loaded.model.context_length(), 48);
    let info = &loaded.info;
    assert_eq!((info.name.as_str(), info.architecture.as_str()), ("tiny", "llama"));
    assert_eq!(info.precision, "Q4_1");
    assert_eq!((info.context_length, info.vocab_size, info.layers), (48, 8, 1));
    // Embedding 8 x 32 and three norms in f32; 288 rows of 32 or 16 + 16 of 64 inputs at 20 bytes a group.
    assert_eq!(info.weight_bytes, (8 * 32 + 3 * 32) * 4 + (32 + 16 + 16 + 32 + 64 + 64 + 2 * 32) * 20);

    let again =
        load_parts(&with_text(), &LoadOptions { threads: 1, ..LoadOptions::default() }).expect("good");
    assert_eq!(again.info.fingerprint, info.fingerprint);
    assert_eq!(again.info.context_length, 64);
    let mut named = with_text();
    named.set("general.name", STRING, &string("Tiny Model"));
    let named = load_parts(&named, &options).expect("good");
    assert_eq!(named.info.name, "Tiny Model");
    assert_ne!(named.info.fingerprint, info.fingerprint);

    let mut bare = with_text();
    bare.keys.retain(|key| key.0 != "tokenizer.chat_template");
    assert!(load_parts(&bare, &options).expect("good").template.is_none());
}

#[test]
fn what_cannot_be_served_is_refused() {
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let check = |parts: &Parts, options: &LoadOptions, message: &str| {
        let error = load_parts(parts, options).err().expect(message).to_string();
        assert!(error.contains(message), "expected: {message}\ngot: {error}");
    };
    let whole = |parts: &Parts, message: &str| {
        let error = load_parts(parts, &options).err().expect(message).to_string();
        assert_eq!(error, message, "\ngot: {error}");
    };
    whole(
        &Parts::good(),
        "GGUF metadata has no key `tokenizer.ggml.model`, which is needed; download or convert the model \
         again",
    );
    for kind in ["bert", "t5"] {
        let mut other = with_text();
        other.set("tokenizer.ggml.model", STRING, &string(kind));
        let message = format!(
            "the model's tokenizer cannot be used: its kind `{kind}` is not supported; supported: gpt2 \
             (byte-level BPE), llama (SentencePiece BPE), gemma4"
        );
        whole(&other, &message);
    }
    check(&with_text(), &LoadOptions { threads: 0, ..options }, "0 threads");
    check(&with_text(), &LoadOptions { threads: 1 << 40, ..options }, "threads");
    check(&with_text(), &LoadOptions { max_model_len: Some(65), ..options }, "context has 64");
    check(&with_text(), &LoadOptions { max_model_len: Some(0), ..options }, "context has 64");
    let mut template = with_text();
    template.set("tokenizer.chat_template", STRING, &string("{% if %}"));
    check(&template, &options, "chat template cannot be used");
    let mut vocabulary = with_text();
    let tokens = ["a", "b", "c", "d", "ab", "cd", "e", "f", "g"];
    vocabulary.set("tokenizer.ggml.tokens", ARRAY, &strings(&tokens));
    whole(
        &vocabulary,
        "the model's tokenizer cannot be used: it has 9 tokens, the embedding 8 rows; they are not of one \
         model",
    );
}

/// The default model continues a known text as llama.cpp does.
#[test]
fn the_real_model_runs() {
    let path = env::var_os("OBOL_TEST_MODEL")
        .map(PathBuf::from)
        .expect("OBOL_TEST_MODEL is not set: run scripts/test, which fetches the model");
    let mut loaded = load(&path, &LoadOptions::default()).expect("the default model");
    assert_eq!((loaded.info.architecture.as_str(), loaded.info.precision.as_str()), ("llama", "Q4_1"));
    assert_eq!((loaded.info.vocab_size, loaded.info.context_length, loaded.info.layers), (49_152, 8192, 30));
    loaded.model.allocate_kv(4, 16).expect("a small pool");
    let mut tokens: Vec<u32> = vec![504, 3575, 282, 4649, 314]; // "The capital of France is"
    let start = tokens.len();
    for step in 0..2 {
        let rows = if step == 0 { start } else { 1 };
        let batch = Batch {
            tokens: tokens[tokens.len() - rows..].to_vec(),
            positions: (tokens.len() as u32 - rows as u32..tokens.len() as u32).collect(),
            spans: vec![Span { rows: 0..rows, table: 0..4 }],
            block_tables: vec![0, 1, 2, 3],
            logit_rows: vec![rows - 1],
            hidden_rows: Vec::new(),
        };
        let logits = loaded.model.forward(&batch).expect("forward");
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a logit");
        tokens.push(best as u32);
    }
    assert_eq!(loaded.tokenizer.decode(&tokens, true), "The capital of France is Paris.");
}
