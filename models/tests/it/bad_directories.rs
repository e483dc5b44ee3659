//! Directories that are incomplete, broken or of what is not supported: each with its whole message, in which
//! DIR stands for the directory.

use std::fs;
use std::path::{Path, PathBuf};

use obol_models::load::{LoadOptions, load};
use serde_json::{Map, Value, json};

use crate::support::fixture;

/// A directory that can be spoiled.
struct Directory(tempfile::TempDir);

impl Directory {
    /// A copy of the family's, with a small tokenizer.
    fn copy(family: &str) -> Self {
        let directory = Self(tempfile::tempdir().expect("a temporary directory"));
        for entry in fs::read_dir(fixture("families").join(family)).expect("the fixture") {
            let entry = entry.expect("a file");
            let name = entry.file_name().into_string().expect("a name");
            if name.ends_with(".safetensors") || name == "config.json" || name == INDEX {
                fs::copy(entry.path(), directory.file(&name)).expect("a copy");
            }
        }
        let model = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
        directory.write("tokenizer.json", json!({"model": model}).to_string());
        directory
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.file(name), bytes).expect("a file");
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).expect("a file");
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.file(from), self.file(to)).expect("a file");
    }

    fn cut(&self, name: &str, bytes: impl FnOnce(usize) -> usize) {
        let whole = fs::read(self.file(name)).expect("a file");
        self.write(name, &whole[..bytes(whole.len())]);
    }

    /// Sets a key of a JSON file; null takes it away.
    fn set(&self, file: &str, key: &str, value: Value) {
        let text = fs::read_to_string(self.file(file)).expect("a file");
        let mut values: Map<String, Value> = serde_json::from_str(&text).expect("an object");
        match value {
            Value::Null => drop(values.remove(key)),
            value => drop(values.insert(key.into(), value)),
        }
        self.write(file, Value::Object(values).to_string());
    }

    /// Rewrites the header and the data of a safetensors file.
    fn weights(&self, file: &str, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
        let bytes = fs::read(self.file(file)).expect("a file");
        let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let mut header: Value = serde_json::from_slice(header).expect("a header");
        let mut data = data.to_vec();
        change(&mut header, &mut data);
        self.write(file, whole(header.to_string().as_bytes(), &data));
    }
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const FIRST_SHARD: &str = "model-00001-of-00004.safetensors";

/// A safetensors file.
fn whole(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

fn error_of(directory: &Path) -> Option<String> {
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let error = load(directory, &options).err()?.to_string();
    Some(error.replace(&directory.display().to_string(), "DIR"))
}

/// The family's directory with `change` fails with this message, whole.
#[track_caller]
fn refused(family: &str, message: &str, change: impl FnOnce(&Directory)) {
    let directory = Directory::copy(family);
    change(&directory);
    let error = error_of(directory.0.path()).expect(message);
    assert_eq!(error, message, "\ngot: {error}");
}

#[test]
fn the_good_directories_are_good() {
    for family in ["llama", "llama_sharded"] {
        assert_eq!(error_of(Directory::copy(family).0.path()), None);
    }
}

#[test]
fn what_is_no_models_directory_is_refused() {
    let empty = tempfile::tempdir().expect("a temporary directory");
    assert_eq!(
        error_of(empty.path()).as_deref(),
        Some(
            "DIR has no config.json; a model is a GGUF file, or a directory with config.json, safetensors and \
         tokenizer.json"
        )
    );
    refused(
        "llama",
        "DIR has no config.json; a model is a GGUF file, or a directory with config.json, safetensors and \
         tokenizer.json",
        |directory| directory.remove(CONFIG),
    );
    refused("llama", "DIR has no config.json, but model-q4_k_m.gguf; name that file itself", |directory| {
        directory.rename(CONFIG, "model-q4_k_m.gguf")
    });
    refused(
        "llama",
        "DIR has no config.json, but adapter_config.json: it holds an adapter; merge it into its base model",
        |directory| directory.rename(CONFIG, "adapter_config.json"),
    );
    refused(
        "llama",
        "DIR has no weights: neither model.safetensors nor model.safetensors.index.json is there; download \
         them",
        |directory| directory.remove(SINGLE),
    );
    refused(
        "llama",
        "DIR has no weights that can be read: pytorch_model.bin is there, but safetensors are needed; \
         download those, or have transformers write them \
         (AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY))",
        |directory| directory.rename(SINGLE, "pytorch_model.bin"),
    );
    refused(
        "llama_sharded",
        "DIR has no model.safetensors, but model-00001-of-00004.safetensors, and no \
         model.safetensors.index.json that names it; download the one that is missing",
        |directory| directory.remove(INDEX),
    );
}

#[test]
fn configurations_that_cannot_be_read_are_refused() {
    refused(
        "llama",
        "DIR/config.json: it holds no JSON object: expected ident at line 1 column 2; download it again",
        |directory| directory.write(CONFIG, "not JSON"),
    );
    refused(
        "llama",
        "DIR/config.json: it holds no JSON object: invalid type: sequence, expected a map at line 1 column \
         0; download it again",
        |directory| directory.write(CONFIG, "[1]"),
    );
    refused(
        "llama",
        "DIR/config.json: it is an HTML page, such as a site's login or error page; download the file \
         itself",
        |directory| directory.write(CONFIG, "<html>no access"),
    );
    refused(
        "llama",
        "DIR/config.json: no key `hidden_size`, which is needed; download the file again",
        |directory| directory.set(CONFIG, "hidden_size", Value::Null),
    );
    refused(
        "llama",
        "DIR/config.json: key `hidden_size` should hold a number but holds \"64\"; correct it or \
         download the file again",
        |directory| directory.set(CONFIG, "hidden_size", json!("64")),
    );
    refused(
        "llama",
        "DIR/config.json: key `model_type`: `mamba` is not supported; supported: llama, qwen2, qwen3, \
         qwen3_moe, mistral, mixtral, gemma, gemma2, gemma3_text, phi3, granite, olmo2, smollm3, gpt2",
        |directory| directory.set(CONFIG, "model_type", json!("mamba")),
    );
    refused(
        "llama",
        "DIR/config.json: no key `model_type`, which is needed; download the file again",
        |directory| directory.set(CONFIG, "model_type", Value::Null),
    );
}

#[test]
fn weights_quantised_otherwise_are_refused() {
    let cases = [
        (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "`bitsandbytes`"),
        (json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), "`fp8`"),
        (json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}), "`compressed-tensors`"),
        (json!({"quant_method": "gptq", "bits": 8, "group_size": 128}), "gptq with 8 bits"),
        (json!({"bits": 4, "group_size": 128}), "a quantisation without `quant_method`"),
    ];
    for (quantization, what) in cases {
        let message = format!(
            "DIR/config.json: key `quantization_config`: {what} is not supported; supported: gptq with 4 bits \
             (checkpoint_format gptq or gptq_v2), awq with 4 bits (version gemm), both in groups of a multiple of 32 \
             or -1; or choose the unquantised model and --quant"
        );
        refused("llama", &message, |directory| directory.set(CONFIG, "quantization_config", quantization));
    }
}

#[test]
fn weights_that_are_broken_are_refused() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 99\n";
    refused(
        "llama",
        "DIR/model.safetensors: it is a Git LFS pointer, which only names the real file; download that \
         (`git lfs pull`, or `obol pull`)",
        |directory| directory.write(SINGLE, pointer),
    );
    refused(
        "llama",
        "DIR/model.safetensors: it is an HTML page, such as a site's login or error page; download the file \
         itself",
        |directory| directory.write(SINGLE, "<html>no access"),
    );
    refused(
        "llama",
        "DIR/model.safetensors: it is a GGUF file; give it a name that ends in .gguf, and name it instead \
         of the directory",
        |directory| directory.write(SINGLE, "GGUF\x03\0\0\0\0\0\0\0\0\0\0\0"),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: it is empty; download it \
         again",
        |directory| directory.write(SINGLE, ""),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: it has 3 bytes, too few for a \
         header; download it again",
        |directory| directory.write(SINGLE, "\x02\0\0"),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: its header should have 2136 \
         bytes, but the file has 100; download it again",
        |directory| directory.cut(SINGLE, |_| 100),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: its tensors end at byte \
         158432 but the file has 158430; download it again",
        |directory| directory.cut(SINGLE, |length| length - 2),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: its header cannot be read: \
         trailing comma at line 1 column 10; download it again",
        |directory| directory.write(SINGLE, whole(b"{\"a\": 1, }", b"")),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: its header should have \
         18446744073709551615 bytes, but the file has 8; download it again",
        |directory| directory.write(SINGLE, u64::MAX.to_le_bytes()),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: its tensors end at byte \
         158425 but the file has 158431; download it again",
        |directory| directory.weights(SINGLE, |_, data| data.extend([0; 6])),
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: the data of tensor \
         `model.norm.weight` does not begin where the tensor before it ends; download it again",
        |directory| {
            directory.weights(SINGLE, |header, _| {
                let offsets = &mut header["model.norm.weight"]["data_offsets"];
                let begin = offsets[0].as_u64().expect("a number");
                offsets[0] = json!(begin - 2);
            });
        },
    );
    refused(
        "llama",
        "DIR/model.safetensors: the safetensors file is broken or incomplete: tensor `model.norm.weight` of \
         type BF16 and shape [65] does not fill bytes 156160 to 156288 of the data; download it again",
        |directory| {
            directory.weights(SINGLE, |header, _| header["model.norm.weight"]["shape"] = json!([65]));
        },
    );
}

/// Appends a tensor to a file.
fn append(header: &mut Value, data: &mut Vec<u8>, name: &str, dtype: &str, shape: &[usize], bytes: usize) {
    let offsets = [data.len(), data.len() + bytes];
    header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    data.resize(offsets[1], 0);
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    const NORM: &str = "model.norm.weight";
    let rename = |header: &mut Value, to: &str| {
        let tensor = header.as_object_mut().expect("an object").remove(NORM).expect("the tensor");
        header[to] = tensor;
    };
    refused(
        "llama",
        "tensor `model.norm.weight` has the type I64, which is not supported here; supported: F32, F16, \
         BF16",
        |directory| {
            directory.weights(SINGLE, |header, data| {
                rename(header, "model.rotary_emb.inv_freq");
                append(header, data, NORM, "I64", &[64], 512);
            });
        },
    );
    refused(
        "llama",
        "tensor `model.norm.weight` has the type F8_E4M3, which is not supported here; supported: F32, F16, \
         BF16",
        |directory| {
            directory.weights(SINGLE, |header, data| {
                rename(header, "model.rotary_emb.inv_freq");
                append(header, data, NORM, "F8_E4M3", &[64], 64);
            });
        },
    );
    refused(
        "llama",
        "there is no tensor `model.norm.weight`, which the model needs; the files are incomplete or not of \
         one model",
        |directory| {
            directory.weights(SINGLE, |header, _| rename(header, "model.rotary_emb.inv_freq"));
        },
    );
    refused(
        "llama",
        "tensor `model.norm.weight` should have the shape [64] but has [32, 2]; the weights and the \
         configuration are not of one model",
        |directory| {
            directory.weights(SINGLE, |header, _| header[NORM]["shape"] = json!([32, 2]));
        },
    );
    refused(
        "llama",
        "tensor `model.extra.weight`: not part of a llama model of 2 layers; the weights and the \
         configuration are not of one model",
        |directory| {
            directory
                .weights(SINGLE, |header, data| append(header, data, "model.extra.weight", "F32", &[2], 8));
        },
    );
    refused(
        "llama",
        "tensor `score.weight`: not part of a llama model of 2 layers; the weights and the configuration \
         are not of one model",
        |directory| {
            directory.weights(SINGLE, |header, data| append(header, data, "score.weight", "F32", &[2, 0], 0));
        },
    );
}

#[test]
fn shards_that_do_not_fit_are_refused() {
    let map = |directory: &Directory, tensor: &str, file: &str| {
        let text = fs::read_to_string(directory.file(INDEX)).expect("the index");
        let mut index: Value = serde_json::from_str(&text).expect("JSON");
        index["weight_map"][tensor] = json!(file);
        directory.write(INDEX, index.to_string());
    };
    refused(
        "llama_sharded",
        "DIR/model.safetensors.index.json: names model-00003-of-00004.safetensors, which is not there; \
         download it",
        |directory| directory.remove("model-00003-of-00004.safetensors"),
    );
    refused(
        "llama_sharded",
        "DIR/model.safetensors.index.json: names `../x`, which is no file of this directory; download it \
         again",
        |directory| map(directory, "lm_head.weight", "../x"),
    );
    refused(
        "llama_sharded",
        "DIR/model.safetensors.index.json: says that tensor `lm_head.weight` is in \
         model-00001-of-00004.safetensors, which does not have it; download both again",
        |directory| map(directory, "lm_head.weight", FIRST_SHARD),
    );
    refused(
        "llama_sharded",
        "DIR/model.safetensors.index.json: says that tensor `lm_tail.weight` is in \
         model-00001-of-00004.safetensors, which does not have it; download both again",
        |directory| map(directory, "lm_tail.weight", FIRST_SHARD),
    );
    refused(
        "llama_sharded",
        "DIR/model-00004-of-00004.safetensors: tensor `lm_head.weight` is in \
         model-00001-of-00004.safetensors, too; the files are not of one model",
        |directory| {
            directory.weights(FIRST_SHARD, |header, data| {
                append(header, data, "lm_head.weight", "BF16", &[160, 64], 160 * 64 * 2);
            });
        },
    );
    refused(
        "llama_sharded",
        "DIR/model.safetensors.index.json: it is no index: missing field `weight_map` at line 1 column 2; \
         download it again",
        |directory| directory.write(INDEX, "{}"),
    );
    refused(
        "llama_sharded",
        "DIR/model-00001-of-00004.safetensors: the safetensors file is broken or incomplete: its tensors \
         end at byte 18872 but the file has 9436; download it again",
        |directory| directory.cut(FIRST_SHARD, |length| length / 2),
    );
}

#[test]
fn tokenizers_that_cannot_be_read_are_refused() {
    const TOKENIZER: &str = "tokenizer.json";
    refused(
        "llama",
        "the model's tokenizer cannot be used: there is no tokenizer.json; download it",
        |directory| directory.remove(TOKENIZER),
    );
    refused(
        "llama",
        "the model's tokenizer cannot be used: there is only a tokenizer.model, and tokenizer.json is \
         needed: transformers.AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY) writes it",
        |directory| directory.rename(TOKENIZER, "tokenizer.model"),
    );
    refused(
        "llama",
        "the model's tokenizer cannot be used: tokenizer.json: EOF while parsing an object at line 1 column \
         35; download it again",
        |directory| directory.cut(TOKENIZER, |length| length / 2),
    );
    refused(
        "llama",
        "the model's tokenizer cannot be used: tokenizer.json: it is a Git LFS pointer, which only names \
         the real file; download that (`git lfs pull`, or `obol pull`)",
        |directory| {
            directory.write(TOKENIZER, "version https://git-lfs.github.com/spec/v1\n");
        },
    );
    refused(
        "llama",
        "the model's tokenizer cannot be used: tokenizer.json: `model.type` is `Unigram`, which is not \
         supported; supported: BPE, over bytes or characters",
        |directory| {
            directory.set(TOKENIZER, "model", json!({"type": "Unigram", "vocab": [["a", 0.0]]}));
        },
    );
    refused(
        "llama",
        "the model's tokenizer cannot be used: it has 200 tokens, the embedding 160 rows; they are not of \
         one model",
        |directory| {
            let vocab: Map<String, Value> = (0..200).map(|id| (format!("w{id}"), json!(id))).collect();
            directory.set(TOKENIZER, "model", json!({"type": "BPE", "vocab": vocab, "merges": []}));
        },
    );
}
