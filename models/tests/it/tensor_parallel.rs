//! Models whose layers several devices compute together: the same logits as one device's but for the order of
//! sums, the same tokens, the law of rows, and what cannot be divided.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use obol_kernels::{Cpu, KvDtype};
use obol_models::batch::{Batch, CausalLm, Span, SpanOutput};
use obol_models::load::{LoadOptions, ModelInfo, load};
use obol_models::quant::Quant;
use obol_models::{ModelFiles, TensorParallel, Weights};

use crate::support::{BLOCK_SIZE, Random, Sequence, alone, continuation, difference, files, fixture, step};

const POOL: usize = 8;

fn options(devices: usize, quant: Quant) -> LoadOptions {
    LoadOptions {
        threads: 2,
        tensor_parallel: devices,
        quant,
        kv_dtype: KvDtype::F32,
        ..LoadOptions::default()
    }
}

fn weights(path: &Path, options: &LoadOptions) -> Result<Arc<Weights>, String> {
    let files = ModelFiles::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Weights::load(&files, &Cpu::new(2), options).map(Arc::new).map_err(|error| error.to_string())
}

/// A model on devices of these numbers of threads.
fn model(path: &Path, quant: Quant, threads: &[usize], blocks: usize) -> Box<dyn CausalLm> {
    let weights = weights(path, &options(threads.len(), quant))
        .unwrap_or_else(|error| panic!("{} on {}: {error}", path.display(), threads.len()));
    let cpus: Vec<Cpu> = threads.iter().map(|&threads| Cpu::new(threads)).collect();
    let mut model: Box<dyn CausalLm> = match <[Cpu; 1]>::try_from(cpus) {
        Ok([cpu]) => Box::new(obol_models::Decoder::new(weights, cpu)),
        Err(cpus) => Box::new(TensorParallel::new(&weights, cpus)),
    };
    model.allocate_kv(blocks, BLOCK_SIZE).expect("a small pool");
    model
}

/// Every fixture's files.
fn fixtures() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixture("families")).expect("the fixtures");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .flat_map(|path| files(&path))
        .collect();
    let alone = ["llama_mixed", "llama_tied", "llama_untied", "qwen2_q4_1", "qwen2_tied", "qwen2_untied"];
    paths.extend(alone.map(|name| fixture(&format!("{name}.gguf"))));
    paths.sort();
    paths
}

/// Numbers of devices that the kv heads of a model can be divided among.
fn divisions(path: &Path) -> Vec<usize> {
    let spec = ModelFiles::open(path).and_then(|files| files.spec());
    let kv_heads = spec.unwrap_or_else(|error| panic!("{}: {error}", path.display())).kv_heads;
    (2..=kv_heads).filter(|devices| kv_heads.is_multiple_of(*devices)).collect()
}

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(90) as u32).collect()
}

/// In f32: where activations are rounded to 8 bits, the order of a sum can move one over the edge between two
/// integers.
#[test]
fn several_devices_have_the_logits_and_tokens_of_one() {
    let (mut checked, tokens) = (0, tokens(5, 40));
    for path in fixtures() {
        let one = alone(&mut *model(&path, Quant::F32, &[2], POOL), &tokens);
        let greedy = continuation(&mut *model(&path, Quant::F32, &[2], POOL), &tokens[..16], 24, POOL);
        for devices in divisions(&path) {
            let what = format!("{} on {devices} devices", path.display());
            if let Err(error) = weights(&path, &options(devices, Quant::F32)) {
                assert!(error.contains("a group of 256 that share their scales"), "{what}: {error}");
                continue;
            }
            let mut several = model(&path, Quant::F32, &vec![1; devices], POOL);
            let off = difference(&alone(&mut *several, &tokens), &one);
            println!("{what}: off by {off:.1e}");
            assert!(off < 1e-4, "{what}: off by {off}");
            assert_eq!(continuation(&mut *several, &tokens[..16], 24, POOL), greedy, "{what}");
            checked += 1;
        }
    }
    assert!(checked > 25, "{checked} divisions");
}

/// Packed weights, whose activations are rounded to 8 bits.
#[test]
fn several_devices_keep_the_precision_of_a_file() {
    let (mut checked, tokens) = (0, tokens(6, 40));
    for path in fixtures() {
        for quant in [Quant::File, Quant::Int8, Quant::Int4] {
            let one = alone(&mut *model(&path, quant, &[2], POOL), &tokens);
            for devices in divisions(&path) {
                let what = format!("{} as {quant} on {devices} devices", path.display());
                match weights(&path, &options(devices, quant)) {
                    Ok(_) => {
                        let mut several = model(&path, quant, &vec![1; devices], POOL);
                        let off = difference(&alone(&mut *several, &tokens), &one);
                        println!("{what}: off by {off:.1e}");
                        assert!(off < 0.03, "{what}: off by {off}");
                        checked += 1;
                    }
                    Err(error) => assert!(
                        error.contains("share their scales") || error.contains("too few"),
                        "{what}: {error}"
                    ),
                }
            }
        }
    }
    assert!(checked > 40, "{checked} divisions");
}

/// One chunk, many chunks, other threads, company, and a prefix that another sequence has computed.
#[test]
fn several_devices_give_the_same_bits_in_every_batch() {
    for (name, quant) in [
        ("llama_mixed.gguf", Quant::File),
        ("families/olmo2", Quant::F32),
        ("families/mixtral", Quant::F16),
        ("families/gpt2", Quant::F32),
        ("families/gptq_g128", Quant::File),
    ] {
        let (path, tokens) = (fixture(name), tokens(7, 45));
        let expected = alone(&mut *model(&path, quant, &[1, 1], POOL), &tokens);
        let mut several = model(&path, quant, &[2, 1], 3 * POOL);
        let check = |what: &str, logits: &[Vec<u32>]| {
            assert!(*logits == expected[expected.len() - logits.len()..], "{name}: {what}");
        };
        check("other threads", &alone(&mut *several, &tokens));
        for chunk in [1, 7, 16, 33] {
            let others: Vec<u32> = tokens.iter().rev().copied().collect();
            let mut sequences =
                [Sequence::new(&tokens, vec![5, 0, 3]), Sequence::new(&others, vec![2, 8, 4])];
            while sequences[0].done < tokens.len() {
                let count = |sequence: &Sequence| chunk.min(tokens.len() - sequence.done);
                let company = (1, count(&sequences[1]).min(3));
                let work = [company, (0, count(&sequences[0]))];
                step(&mut *several, &mut sequences, &work[usize::from(company.1 == 0)..]);
            }
            check(&format!("chunks of {chunk}"), &sequences[0].logits);
        }
        let mut cached = [Sequence::new(&tokens, vec![5, 0, 14])];
        cached[0].done = 2 * BLOCK_SIZE;
        step(&mut *several, &mut cached, &[(0, tokens.len() - 2 * BLOCK_SIZE)]);
        check("with a cached prefix", &cached[0].logits);
    }
}

/// The first span's logits and the second's come to whom they belong, and the caller's own work is done once.
#[test]
fn spans_are_given_their_logits_and_the_caller_its_time() {
    let mut several = model(&fixture("llama_untied.gguf"), Quant::File, &[1, 1], POOL);
    let batch = Batch {
        tokens: vec![1, 2, 3, 4, 5],
        positions: vec![0, 1, 2, 0, 1],
        spans: vec![Span { rows: 0..3, table: 0..1 }, Span { rows: 3..5, table: 1..2 }],
        block_tables: vec![0, 1],
        logit_rows: vec![2, 4],
        hidden_rows: Vec::new(),
    };
    let vocab = several.vocab_size();
    let expected = several.forward(&batch).expect("forward").to_vec();
    let given = std::sync::Mutex::new(vec![Vec::new(); 2]);
    let mut times = 0;
    let each = |_: usize, span: usize, made: SpanOutput<'_>| {
        let SpanOutput::Logits(logits) = made else { panic!("hidden states that nobody asked for") };
        given.lock().expect("no panic")[span] = logits.to_vec();
    };
    several.forward_each(&batch, &mut || times += 1, &each).expect("forward");
    assert_eq!(times, 1);
    assert!(given.into_inner().expect("no panic").concat() == expected && expected.len() == 2 * vocab);
    // A panic of the caller's is the caller's, and the devices are ready for the next step.
    let panicking = std::panic::AssertUnwindSafe(|| {
        drop(several.forward_each(&batch, &mut || panic!("the caller's"), &|_, _, _| {}));
    });
    let panic = std::panic::catch_unwind(panicking).expect_err("the caller's panic");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"the caller's"));
    assert!(several.forward(&batch).expect("forward") == expected);
}

#[test]
fn a_batch_or_a_pool_that_cannot_be_is_an_error_and_the_next_step_works() {
    let mut several = model(&fixture("llama_tied.gguf"), Quant::File, &[1, 1], POOL);
    let tokens = tokens(8, 20);
    let expected = alone(&mut *several, &tokens);
    let batch = Batch {
        tokens: vec![1],
        positions: vec![0],
        spans: vec![Span { rows: 0..1, table: 0..1 }],
        block_tables: vec![POOL as u32],
        logit_rows: vec![0],
        hidden_rows: Vec::new(),
    };
    assert!(several.forward(&batch).is_err(), "no such block");
    assert!(several.forward(&Batch::default()).expect("an empty batch").is_empty());
    assert!(alone(&mut *several, &tokens) == expected);
    assert_eq!(several.kv_bytes_per_token(), 2 * 2 * 2 * 4 * 16, "2 layers, K and V, 2 heads of 16, f32");
    several.allocate_kv(1 << 50, BLOCK_SIZE).expect_err("no such memory");
    assert!(several.forward(&Batch { block_tables: vec![0], ..batch }).is_err(), "no blocks are left");
    several.allocate_kv(POOL, BLOCK_SIZE).expect("a small pool");
    assert!(alone(&mut *several, &tokens) == expected);
}

#[test]
fn what_cannot_be_divided_is_refused_with_what_can() {
    let check = |name: &str, quant, devices, message: &str| {
        let error = weights(&fixture(name), &options(devices, quant)).map(drop).expect_err(message);
        assert_eq!(error, message);
    };
    check(
        "families/llama",
        Quant::File,
        3,
        "tensor parallel 3: each device takes as many of the model's 4 kv heads; possible here: 1, 2 and 4",
    );
    check(
        "families/gemma",
        Quant::File,
        2,
        "tensor parallel 2: each device takes as many of the model's 1 kv heads; possible here: 1",
    );
    check(
        "families/llama",
        Quant::File,
        0,
        "tensor parallel 0: each device takes as many of the model's 4 kv heads; possible here: 1, 2 and 4",
    );
    check(
        "families/llama",
        Quant::Int8,
        4,
        "tensor parallel 4: tensor `model.layers.0.self_attn.o_proj.weight` (BF16) would be cut at input 16, inside \
         a group of 32 that share their scales; choose another number of devices",
    );
}

/// The default model, which has 3 kv heads, through the loader that serves.
#[test]
fn the_real_model_on_three_devices_continues_as_on_one() {
    let path = std::env::var_os("OBOL_TEST_MODEL")
        .map(PathBuf::from)
        .expect("OBOL_TEST_MODEL is not set: run scripts/test, which fetches the model");
    let start = [504, 3575, 282, 4649, 314]; // "The capital of France is"
    let run = |devices, quant| {
        let mut loaded = load(&path, &options(devices, quant)).expect("the default model");
        loaded.model.allocate_kv(2, BLOCK_SIZE).expect("a small pool");
        let logits = alone(&mut *loaded.model, &start);
        (loaded.info, logits, continuation(&mut *loaded.model, &start, 8, 2))
    };
    // The second as the file has it: what rounding activations to 8 bits costs is larger than the difference.
    for (quant, tolerance) in [(Quant::F32, 1e-4), (Quant::File, 0.1)] {
        let (one_info, one, one_greedy) = run(1, quant);
        let (info, three, greedy) = run(3, quant);
        let off = difference(&three, &one);
        println!("{quant}: off by {off:.1e}");
        assert!(off < tolerance, "{quant}: off by {off}");
        let sure = if quant == Quant::F32 { greedy.len() } else { 2 };
        assert_eq!(greedy[..sure], one_greedy[..sure], "{quant}");
        let norms_of_others = 2 * 60 * 576 * 4;
        let weight_bytes = one_info.weight_bytes + norms_of_others;
        let expected = ModelInfo { weight_bytes, device: "cpu x3".into(), ..one_info };
        assert_eq!(info, expected, "only norms are there more than once");
    }
}
