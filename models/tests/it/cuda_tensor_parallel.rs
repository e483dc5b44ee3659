//! Models whose layers several CUDA devices compute together: the logits of one device but for the order of sums, the
//! same tokens, step by step or through the queue of steps, and what does not run so.

use std::path::Path;

use obol_kernels::{Cpu, KvDtype};
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::device::{ComputeDtype, DeviceId};
use obol_models::load::LoadOptions;
use obol_models::queue::{Feed, RowDraw, Step, StepLimits, StepOutput};
use obol_models::{CudaDecoder, CudaTensorParallel, ModelFiles, Weights};

use crate::support::{BLOCK_SIZE, Random, alone, continuation, difference, fixture};

const POOL: usize = 8;

/// On this number of devices, which must be there.
fn model(path: &Path, devices: usize, graphs: bool) -> Result<Box<dyn CausalLm>, String> {
    let files = ModelFiles::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let options = LoadOptions {
        tensor_parallel: devices,
        kv_dtype: KvDtype::F32,
        device: DeviceId::Cuda(0),
        dtype: Some(ComputeDtype::F32),
        graphs,
        ..LoadOptions::default()
    };
    let weights = Weights::load(&files, &Cpu::new(2), &options).map_err(|error| error.to_string())?;
    let mut model: Box<dyn CausalLm> = if devices == 1 {
        Box::new(CudaDecoder::new(weights, 0, &options).map_err(|error| error.to_string())?)
    } else {
        let ordinals: Vec<usize> = (0..devices).collect();
        Box::new(CudaTensorParallel::new(weights, &ordinals, &options).map_err(|error| error.to_string())?)
    };
    model
        .reserve(StepLimits { rows: 64, sequences: 4, table_entries: 64 })
        .and_then(|()| model.allocate_kv(POOL, BLOCK_SIZE))
        .map_err(|error| error.to_string())?;
    Ok(model)
}

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(90) as u32).collect()
}

/// Greedy tokens by steps of which two are in flight, each but the first fed by the one ahead.
fn queued(model: &mut dyn CausalLm, start: &[u32], count: usize) -> Vec<u32> {
    let queue = model.queue().expect("a device beside the host");
    let (mut drawn, mut output) = (Vec::new(), StepOutput::default());
    let mut pending = 0;
    for number in 0..count {
        let fed = number > 0;
        let rows = if fed { 1 } else { start.len() };
        let first = if fed { start.len() + number - 1 } else { 0 };
        let step = Step {
            batch: Batch {
                tokens: if fed { vec![0] } else { start.to_vec() },
                positions: (first..first + rows).map(|position| position as u32).collect(),
                spans: vec![Span { rows: 0..rows, table: 0..POOL }],
                block_tables: (0..POOL as u32).collect(),
                logit_rows: vec![rows - 1],
                hidden_rows: Vec::new(),
            },
            feeds: if fed { vec![Feed { row: 0, draw: 0 }] } else { Vec::new() },
            draws: vec![RowDraw { position: (first + rows) as u64, ..RowDraw::GREEDY }],
            ..Step::default()
        };
        queue.submit(&step).expect("a step");
        pending += 1;
        if pending == queue.depth() || number + 1 == count {
            while pending > usize::from(number + 1 < count) {
                queue.wait(&mut output).expect("its outcome");
                drawn.push(output.draws[0].token.expect("a token"));
                assert!(output.time.run > 0, "a step takes time");
                pending -= 1;
            }
        }
    }
    drawn
}

#[test]
fn two_cuda_devices_have_the_logits_and_tokens_of_one() {
    let start = 16;
    for name in ["families/llama", "families/qwen2", "families/gemma2", "families/mixtral", "families/gpt2"] {
        let path = fixture(name);
        let tokens = tokens(9, 40);
        let mut one = model(&path, 1, false).unwrap_or_else(|error| panic!("{name}: {error}"));
        let logits = alone(&mut *one, &tokens);
        let greedy = continuation(&mut *one, &tokens[..start], 12, POOL);
        for graphs in [false, true] {
            let what = format!("{name} with graphs: {graphs}");
            let mut two = model(&path, 2, graphs).unwrap_or_else(|error| panic!("{what}: {error}"));
            let off = difference(&alone(&mut *two, &tokens), &logits);
            println!("{what}: off by {off:.1e}");
            assert!(off < 1e-4, "{what}: off by {off}");
            assert_eq!(continuation(&mut *two, &tokens[..start], 12, POOL), greedy, "{what}");
            assert_eq!(queued(&mut *two, &tokens[..start], 12), greedy, "{what}: through the queue");
            assert_eq!(two.kv_bytes_per_token(), one.kv_bytes_per_token(), "{what}: each has half");
        }
    }
}

#[test]
fn what_two_cuda_devices_refuse_leaves_them_ready() {
    let path = fixture("families/llama");
    let mut two = model(&path, 2, true).expect("a model on two devices");
    let tokens = tokens(10, 20);
    let expected = alone(&mut *two, &tokens);
    let batch = Batch {
        tokens: vec![1],
        positions: vec![0],
        spans: vec![Span { rows: 0..1, table: 0..1 }],
        block_tables: vec![POOL as u32],
        logit_rows: vec![0],
        hidden_rows: Vec::new(),
    };
    assert!(two.forward(&batch).is_err(), "no such block");
    let step = Step { batch, ..Step::default() };
    assert!(two.queue().expect("a queue").submit(&step).is_err(), "a row of logits that nobody draws from");
    assert!(two.forward(&Batch::default()).expect("an empty batch").is_empty());
    assert!(alone(&mut *two, &tokens) == expected);
    two.allocate_kv(1 << 40, BLOCK_SIZE).expect_err("no such memory");
    assert!(two.forward(&step.batch).is_err(), "there is no pool");
    two.allocate_kv(POOL, BLOCK_SIZE).expect("a small pool");
    assert!(alone(&mut *two, &tokens) == expected);
    let greedy = continuation(&mut *two, &tokens[..16], 6, POOL);
    assert_eq!(queued(&mut *two, &tokens[..16], 6), greedy);
}

#[test]
fn what_does_not_run_on_several_cuda_devices_says_so() {
    let error = model(&fixture("families/olmo2"), 2, false).map(drop).expect_err("norms over all heads");
    assert_eq!(
        error,
        "tensor parallel: a olmo2 model norms all heads together, which does not run on several CUDA devices; leave \
         --tensor-parallel away"
    );
    let error = model(&fixture("families/llama"), 4, false).map(drop).expect_err("two devices are here");
    assert!(error.contains("there is no device cuda:"), "{error}");
}
