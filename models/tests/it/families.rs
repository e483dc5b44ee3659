//! Every family against HF transformers, from its safetensors and its GGUF file, and against itself in other
//! batches. The fixtures are `tests/make_families.py`'s.

use std::path::{Path, PathBuf};

use obol_kernels::{Cpu, Isa, KvDtype};
use obol_models::batch::{Batch, CausalLm, Span};
#[cfg(feature = "cuda")]
use obol_models::device::ComputeDtype;
use obol_models::load::LoadOptions;
use obol_models::{Decoder, ModelFiles};

use crate::support::{self, BLOCK_SIZE, Random, Sequence, alone, continuation, fixture, step};

/// Names of all families' directories, but for those whose weights are quantised.
fn families() -> Vec<String> {
    let quantised = |name: &String| ["gptq_", "awq_", "llama_q"].iter().any(|start| name.starts_with(start));
    let entries = std::fs::read_dir(fixture("families")).expect("the fixtures");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !quantised(name))
        .collect();
    names.sort();
    names
}

fn directory(name: &str) -> PathBuf {
    fixture("families").join(name)
}

/// What computes.
#[derive(Debug, Clone, Copy)]
enum On {
    Cpu(Isa),
    #[cfg(feature = "cuda")]
    Cuda,
}

impl On {
    /// Every instruction set of this machine, and in a CUDA build the CUDA device, which must be there.
    fn everywhere() -> Vec<Self> {
        let cpus = Isa::available().into_iter().map(Self::Cpu);
        #[cfg(feature = "cuda")]
        return cpus.chain([Self::Cuda]).collect();
        #[cfg(not(feature = "cuda"))]
        cpus.collect()
    }
}

/// The model of a family's directory or file, with K and V in f32 as the expected logits have them.
fn load(path: &Path, threads: usize, on: On, blocks: usize) -> Box<dyn CausalLm> {
    let files = ModelFiles::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let options = LoadOptions { kv_dtype: KvDtype::F32, ..LoadOptions::default() };
    let failed = |error| -> Box<dyn CausalLm> { panic!("{}: {error}", path.display()) };
    let boxed = |model| -> Box<dyn CausalLm> { Box::new(model) };
    let mut model: Box<dyn CausalLm> = match on {
        On::Cpu(isa) => {
            Decoder::load(&files, Cpu::with_isa(threads, isa), &options).map_or_else(failed, boxed)
        }
        #[cfg(feature = "cuda")]
        On::Cuda => {
            let weights = obol_models::Weights::load(&files, &Cpu::new(threads), &options);
            let options = LoadOptions { dtype: Some(ComputeDtype::F32), ..options };
            let model = weights.and_then(|weights| obol_models::CudaDecoder::new(weights, 0, &options));
            model.map_or_else(failed, |model| Box::new(model))
        }
    };
    model.allocate_kv(blocks, BLOCK_SIZE).expect("a small pool");
    model
}

/// What transformers computed.
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    /// What greedily continues the first [`START`] tokens.
    greedy: Vec<u32>,
}

const START: usize = 16;
const POOL: usize = 8;

fn expected(name: &str, file: &str) -> Expected {
    let text = std::fs::read_to_string(directory(name).join(file)).expect("the expected logits");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let get = |key: &str| json[key].clone();
    Expected {
        tokens: serde_json::from_value(get("tokens")).expect("tokens"),
        logits: serde_json::from_value(get("logits")).expect("logits"),
        greedy: serde_json::from_value(get("greedy")).expect("greedy"),
    }
}

fn worst(logits: &[Vec<u32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(logits.len(), expected.len(), "a row of logits for each token");
    let largest = expected.iter().flatten().fold(0f32, |largest, x| largest.max(x.abs()));
    let pairs = logits.iter().flatten().zip(expected.iter().flatten());
    pairs.fold(0f32, |worst, (ours, theirs)| worst.max((f32::from_bits(*ours) - theirs).abs() / largest))
}

fn files(name: &str) -> Vec<PathBuf> {
    support::files(&directory(name))
}

#[test]
fn every_family_equals_transformers() {
    for name in families() {
        let expected = expected(&name, "expected.json");
        for path in files(&name) {
            for on in On::everywhere() {
                let mut model = load(&path, 2, on, POOL);
                let off = worst(&alone(model.as_mut(), &expected.tokens), &expected.logits);
                println!("{name} ({}) on {on:?}: off by {off:.1e}", path.extension().is_some());
                // Its converter added the 1 of 1 + w in f16, which rounds.
                let rounded = name.starts_with("gemma") && name.ends_with("_gguf");
                let tolerance = if rounded { 5e-3 } else { 1e-3 };
                assert!(off < tolerance, "{} on {on:?}: off by {off}", path.display());
                let greedy =
                    continuation(model.as_mut(), &expected.tokens[..START], expected.greedy.len(), POOL);
                assert_eq!(greedy, expected.greedy, "{} on {on:?}", path.display());
            }
        }
    }
}

/// One chunk, many chunks, other threads, random company, and a prefix that another sequence has computed.
#[test]
fn every_family_gives_the_same_bits_in_every_batch() {
    for name in families() {
        let tokens = expected(&name, "expected.json").tokens;
        let others: Vec<u32> = tokens.iter().rev().copied().collect();
        for on in On::everywhere() {
            let path = &files(&name)[0];
            let alone_in_one = alone(load(path, 1, on, POOL).as_mut(), &tokens);
            let mut model = load(path, 3, on, 3 * POOL);
            let check = |what: &str, logits: &[Vec<u32>]| {
                assert!(
                    *logits == alone_in_one[alone_in_one.len() - logits.len()..],
                    "{name} on {on:?}: {what}"
                );
            };
            check("3 threads", &alone(model.as_mut(), &tokens));
            for chunk in [1, 7, 16, 33] {
                let mut sequences = [Sequence::new(&tokens, vec![5, 0, 3])];
                while sequences[0].done < tokens.len() {
                    let count = chunk.min(tokens.len() - sequences[0].done);
                    step(model.as_mut(), &mut sequences, &[(0, count)]);
                }
                check(&format!("chunks of {chunk}"), &sequences[0].logits);
            }
            let mut random = Random(77);
            let mut sequences = [
                Sequence::new(&tokens, vec![9, 1, 7]),
                Sequence::new(&others, vec![2, 8, 4]),
                Sequence::new(&others, vec![0, 10, 11]),
            ];
            while sequences.iter().any(|sequence| sequence.done < sequence.tokens.len()) {
                let mut work = Vec::new();
                for (index, sequence) in sequences.iter().enumerate() {
                    let left = sequence.tokens.len() - sequence.done;
                    if left > 0 && random.below(3) > 0 {
                        work.push((index, 1 + random.below(left.min(20))));
                    }
                }
                step(model.as_mut(), &mut sequences, &work);
            }
            check("in company", &sequences[0].logits);
            // The first two blocks are those that the first sequence has filled.
            let mut cached = [Sequence::new(&tokens, vec![9, 1, 14])];
            cached[0].done = 2 * BLOCK_SIZE;
            step(model.as_mut(), &mut cached, &[(0, tokens.len() - 2 * BLOCK_SIZE)]);
            check("with a cached prefix", &cached[0].logits);
        }
    }
}

/// The factors are chosen by the served context.
#[test]
fn longrope_is_short_where_no_more_than_the_original_context_is_served() {
    let name = "phi3_longrope_long";
    let expected = expected(name, "expected.short.json");
    let files = ModelFiles::open(&directory(name)).expect("the fixture");
    let options = LoadOptions { kv_dtype: KvDtype::F32, max_model_len: Some(32), ..LoadOptions::default() };
    let mut model = Decoder::load(&files, Cpu::new(2), &options).expect("the model");
    model.allocate_kv(POOL, BLOCK_SIZE).expect("a small pool");
    let off = worst(&alone(&mut model, &expected.tokens), &expected.logits);
    assert!(off < 1e-3, "off by {off}");
    let greedy = continuation(&mut model, &expected.tokens[..START], expected.greedy.len(), POOL);
    assert_eq!(greedy, expected.greedy);
}

/// Only the wanted rows are computed to the end, and they are the same.
#[test]
fn rows_that_nobody_asks_for_change_nothing() {
    for name in families() {
        let tokens = expected(&name, "expected.json").tokens;
        let mut model = load(&files(&name)[0], 2, On::Cpu(Isa::detect()), POOL);
        let all = alone(model.as_mut(), &tokens);
        let mut batch = Batch {
            positions: (0..tokens.len() as u32).collect(),
            spans: vec![Span { rows: 0..tokens.len(), table: 0..POOL }],
            block_tables: (0..POOL as u32).collect(),
            logit_rows: vec![3, 20, tokens.len() - 1],
            hidden_rows: Vec::new(),
            tokens,
        };
        let some: Vec<u32> =
            model.forward(&batch).expect("forward").iter().map(|logit| logit.to_bits()).collect();
        let wanted: Vec<u32> = batch.logit_rows.iter().flat_map(|&row| all[row].clone()).collect();
        assert!(some == wanted, "{name}");
        batch.logit_rows.clear();
        assert!(model.forward(&batch).expect("forward").is_empty(), "{name}");
    }
}

/// The same models as transformers 4 described them.
#[test]
fn older_configurations_give_the_same_bits() {
    for name in families() {
        let old = directory(&name).join("config.v4.json");
        if !old.is_file() {
            continue;
        }
        let tokens = expected(&name, "expected.json").tokens;
        let copy = tempfile::tempdir().expect("a temporary directory");
        std::fs::copy(old, copy.path().join("config.json")).expect("a copy");
        let weights = "model.safetensors";
        std::fs::copy(directory(&name).join(weights), copy.path().join(weights)).expect("a copy");
        let logits = alone(load(copy.path(), 2, On::Cpu(Isa::detect()), POOL).as_mut(), &tokens);
        let expected = alone(load(&directory(&name), 2, On::Cpu(Isa::detect()), POOL).as_mut(), &tokens);
        assert!(logits == expected, "{name}");
    }
}
