//! The encoder against `make_encoder.py`: ids of the `tokenizers` library, vectors of numpy in 64 bits.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use obol_kernels::{Cpu, Isa};
use obol_models::encoder::{Encoder, EncoderWeights, TextEncoder, WordPiece, load_encoder};
use serde_json::{Value, json};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoder")
}

/// Text, ids and, where it is not too long, the vector.
fn cases() -> Vec<(String, Vec<u32>, Option<Vec<f64>>)> {
    let text = fs::read_to_string(fixture().join("expected.json")).expect("the fixture");
    let all: Value = serde_json::from_str(&text).expect("JSON");
    let case = |case: &Value| {
        let ids = case["ids"].as_array().expect("ids").iter();
        let vector = case.get("vector").map(|vector| {
            vector.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
        });
        let text = case["text"].as_str().expect("a text").to_owned();
        (text, ids.map(|id| id.as_u64().expect("an id") as u32).collect(), vector)
    };
    all["cases"].as_array().expect("cases").iter().map(case).collect()
}

fn encode(encoder: &mut dyn TextEncoder, texts: &[&[u32]]) -> Vec<Vec<f32>> {
    let (mut vectors, mut meanwhile) = (Vec::new(), 0);
    encoder.encode(texts, &mut || meanwhile += 1, &mut vectors).expect("an encoding");
    assert_eq!(meanwhile, 1);
    vectors
}

#[test]
fn texts_have_the_ids_of_the_tokenizers_library() {
    let tokenizer = WordPiece::load(&fixture()).expect("a tokenizer");
    for (text, ids, _) in cases() {
        assert_eq!(tokenizer.encode(&text), ids, "{text:?}");
    }
    assert_eq!(tokenizer.decode(&tokenizer.encode("The cat: unaffable!")), "the cat : unaffable !");
}

#[test]
fn vectors_are_those_of_numpy_whatever_is_beside_them() {
    let weights = Arc::new(EncoderWeights::load(&fixture()).expect("weights"));
    let cases: Vec<(String, Vec<u32>, Vec<f64>)> =
        cases().into_iter().filter_map(|(text, ids, vector)| Some((text, ids, vector?))).collect();
    assert!(cases.len() > 6);
    let mut first: Option<Vec<Vec<f32>>> = None;
    for isa in Isa::available() {
        for threads in [1, 3] {
            let mut encoder = Encoder::new(Arc::clone(&weights), Cpu::with_isa(threads, isa));
            assert_eq!((encoder.width(), encoder.context_length()), (32, 48));
            let texts: Vec<&[u32]> = cases.iter().map(|(_, ids, _)| &**ids).collect();
            let together = encode(&mut encoder, &texts);
            for ((text, ids, expected), got) in cases.iter().zip(&together) {
                let cosine: f64 = expected.iter().zip(got).map(|(a, b)| a * f64::from(*b)).sum();
                assert!(cosine > 0.999_999, "{text:?} on {isa}: {cosine}");
                let worst =
                    expected.iter().zip(got).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
                assert!(worst < 2e-5, "{text:?} on {isa}: {worst}");
                assert!(encode(&mut encoder, &[ids]) == [got.clone()], "{text:?} alone");
            }
            let reversed: Vec<&[u32]> = texts.iter().rev().copied().collect();
            assert!(encode(&mut encoder, &reversed).into_iter().rev().eq(together.iter().cloned()));
            if isa == Isa::detect() {
                assert!(*first.get_or_insert_with(|| together.clone()) == together, "{threads} threads");
            }
        }
    }
}

#[test]
fn what_cannot_be_encoded_is_an_error_and_the_next_text_is_not() {
    let mut loaded = load_encoder(&fixture(), 1, 1).expect("an encoder");
    assert_eq!((loaded.info.width, loaded.info.context_length, loaded.replicas.len()), (32, 48, 1));
    assert_eq!((loaded.info.precision.as_str(), loaded.info.fingerprint.len()), ("F32", 64));
    let good = encode(&mut *loaded.encoder, &[&[2, 9, 3]]);
    for (bad, word) in [(vec![], "0 tokens"), (vec![2; 49], "49 tokens"), (vec![2, 9999], "token 9999")] {
        let error = loaded.encoder.encode(&[&bad], &mut || {}, &mut Vec::new()).expect_err(word);
        assert!(error.0.contains(word), "{error}");
    }
    assert!(encode(&mut *loaded.encoder, &[&[2, 9, 3]]) == good);
    assert!(encode(&mut *loaded.replicas[0], &[&[2, 9, 3]]) == good);
}

#[test]
fn files_of_another_kind_are_refused_with_what_is_wrong() {
    let check = |file: &str, change: &dyn Fn(&mut Value), word: &str| {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::copy(fixture().join(name), directory.path().join(name)).expect("a copy");
        }
        let path = directory.path().join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut value: Value = serde_json::from_str(&text).expect("JSON");
        change(&mut value);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(&path, value.to_string()).expect("written");
        let error = load_encoder(directory.path(), 1, 0).err().expect(word).to_string();
        assert!(error.contains(word), "{error}");
    };
    check("config.json", &|config| config["model_type"] = json!("llama"), "type bert are supported");
    check("config.json", &|config| config["num_attention_heads"] = json!(5), "5 heads do not share 32");
    check("config.json", &|config| config["hidden_size"] = json!(64), "should have the shape");
    check("config.json", &|config| config["num_hidden_layers"] = json!(3), "encoder.layer.2.");
    check("config.json", &|config| config["hidden_act"] = json!("relu"), "relu");
    check("config.json", &|config| config["vocab_size"] = json!(0), "0 is not between 1");
    check("tokenizer.json", &|file| file["model"]["type"] = json!("BPE"), "with WordPiece are supported");
    check("tokenizer.json", &|file| file["model"]["vocab"]["the"] = json!(0), "both have the id 0");
    check("tokenizer.json", &|file| file["model"]["unk_token"] = json!("[NO]"), "no [NO]");
    check(
        "1_Pooling/config.json",
        &|modes| modes["pooling_mode_max_tokens"] = json!(true),
        "neither mean nor cls",
    );
    let missing = load_encoder(Path::new("/nonexistent"), 1, 0).err().expect("nothing there").to_string();
    assert!(missing.contains("config.json"), "{missing}");
}
