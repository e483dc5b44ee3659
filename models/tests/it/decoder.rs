//! The decoder against HF transformers, and against itself in other batches.

use obol_kernels::Isa;
use obol_models::batch::{Batch, CausalLm};

use crate::support::{BLOCK_SIZE, Random, Sequence, alone, fixture, load, step};

/// Our logits differ from transformers' (f32, but for K and V rounded to f16 as ours are) by less than
/// `tolerance`, as a part of the largest logit.
fn check_logits(name: &str, tolerance: f32) {
    let text = std::fs::read_to_string(fixture(&format!("{name}.json"))).expect("the expected logits");
    let expected: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let tokens: Vec<u32> = serde_json::from_value(expected["tokens"].clone()).expect("tokens");
    let expected: Vec<Vec<f32>> = serde_json::from_value(expected["logits"].clone()).expect("logits");
    for isa in Isa::available() {
        let logits = alone(&mut load(name, 2, isa, 8), &tokens);
        let largest = expected.iter().flatten().fold(0f32, |a, x| a.max(x.abs()));
        let mut worst = 0f32;
        for (ours, theirs) in logits.iter().flatten().zip(expected.iter().flatten()) {
            worst = worst.max((f32::from_bits(*ours) - theirs).abs() / largest);
        }
        println!("{name} on {isa}: off by {worst:e}");
        assert!(worst < tolerance, "{name} on {isa}: off by {worst}");
        assert_eq!(logits.len(), expected.len(), "{name}: a row of logits for each token");
    }
}

#[test]
fn dense_models_equal_transformers() {
    for name in ["llama_tied", "llama_untied", "qwen2_tied", "qwen2_untied"] {
        // A K or V that lies between two f16 may be rounded the other way, so not closer than this.
        check_logits(name, 5e-4);
    }
}

/// Transformers computed with the dequantised weights; ours also rounds activations to int8.
#[test]
fn quantised_models_are_close_to_transformers() {
    for name in ["llama_mixed", "qwen2_q4_1"] {
        check_logits(name, 6e-2);
    }
}

fn tokens(random: &mut Random, len: usize) -> Vec<u32> {
    (0..len).map(|_| random.below(160) as u32).collect()
}

const ALL: [&str; 6] =
    ["llama_tied", "llama_untied", "llama_mixed", "qwen2_tied", "qwen2_untied", "qwen2_q4_1"];

#[test]
fn chunks_and_threads_do_not_matter_to_the_last_bit() {
    let mut random = Random(11);
    for name in ALL {
        let tokens = tokens(&mut random, 60);
        for isa in Isa::available() {
            let expected = alone(&mut load(name, 1, isa, 4), &tokens);
            for threads in [1, 2, 3, 5] {
                let mut model = load(name, threads, isa, 4);
                assert!(alone(&mut model, &tokens) == expected, "{name} on {isa}: {threads} threads");
                for chunk in [1, 7, 16, 33] {
                    let mut sequences = [Sequence::new(&tokens, vec![2, 0, 3, 1])];
                    while sequences[0].done < tokens.len() {
                        let count = chunk.min(tokens.len() - sequences[0].done);
                        step(&mut model, &mut sequences, &[(0, count)]);
                    }
                    let same = sequences[0].logits == expected;
                    assert!(same, "{name} on {isa}: {threads} threads, chunks of {chunk}");
                }
            }
        }
    }
}

/// 16 sequences of many lengths, prefilled and decoded in random company, in a pool full of others' leavings.
#[test]
fn a_batch_of_sixteen_equals_one_by_one_to_the_last_bit() {
    for (seed, name) in ALL.into_iter().enumerate() {
        let mut random = Random(100 + seed as u64);
        let texts: Vec<Vec<u32>> = (0..16)
            .map(|i| {
                let len = [1, 15, 16, 17, 31, 33, 48, 64][i % 8];
                tokens(&mut random, len)
            })
            .collect();
        for isa in Isa::available() {
            let mut single = load(name, 1, isa, 4);
            let expected: Vec<_> = texts.iter().map(|tokens| alone(&mut single, tokens)).collect();
            let mut model = load(name, 2, isa, 64);
            // Leave something in every block.
            let table = |i: usize| (0..4).map(|block| ((i + 16 * block) * 5 % 64) as u32).collect();
            for i in 0..16 {
                let mut dirty = [Sequence::new(&vec![i as u32; 64], table(i))];
                step(&mut model, &mut dirty, &[(0, 64)]);
            }
            let mut sequences: Vec<Sequence> =
                texts.iter().enumerate().map(|(i, tokens)| Sequence::new(tokens, table(i))).collect();
            while sequences.iter().any(|sequence| sequence.done < sequence.tokens.len()) {
                let mut work = Vec::new();
                for (i, sequence) in sequences.iter().enumerate() {
                    let left = sequence.tokens.len() - sequence.done;
                    if left > 0 && random.below(4) > 0 {
                        let count = if random.below(2) == 0 { 1 } else { 1 + random.below(left) };
                        work.push((i, count));
                    }
                }
                step(&mut model, &mut sequences, &work);
            }
            for (i, (sequence, expected)) in sequences.iter().zip(&expected).enumerate() {
                assert!(sequence.logits == *expected, "{name} on {isa}: sequence {i} (seed {})", 100 + seed);
            }
        }
    }
}

#[test]
fn logits_come_for_the_wanted_rows_only() {
    let mut model = load("llama_mixed", 2, Isa::detect(), 4);
    let tokens: Vec<u32> = (0..20).collect();
    let all = alone(&mut model, &tokens);
    let mut batch = Batch {
        tokens,
        positions: (0..20).collect(),
        spans: vec![obol_models::batch::Span { rows: 0..20, table: 0..2 }],
        block_tables: vec![0, 1],
        logit_rows: vec![0, 7, 19],
        hidden_rows: Vec::new(),
    };
    let some = model.forward(&batch).expect("forward").to_vec();
    let expected: Vec<f32> =
        [&all[0], &all[7], &all[19]].into_iter().flatten().map(|bits| f32::from_bits(*bits)).collect();
    assert!(some == expected);
    batch.logit_rows.clear();
    assert!(model.forward(&batch).expect("forward").is_empty());
    assert!(model.forward(&Batch::default()).expect("an empty batch").is_empty());
}

/// Hidden states come for the wanted rows, whatever else the batch has, and the logits beside them stay as they are.
#[test]
fn hidden_states_come_beside_logits_and_depend_on_their_own_sequence() {
    use obol_models::batch::{Span, SpanOutput};
    for name in ["llama_mixed", "llama_tied"] {
        let mut model = load(name, 2, Isa::detect(), 4);
        let width = model.hidden_size().expect("the CPU gives them");
        let tokens: Vec<u32> = (0..20).collect();
        let all = alone(&mut model, &tokens);
        let mut run = |from: usize, hidden: &[usize]| {
            // The second sequence asks for logits, in other blocks.
            let batch = Batch {
                tokens: [&tokens[from..], &tokens[..3]].concat(),
                positions: (from as u32..20).chain(0..3).collect(),
                spans: vec![
                    Span { rows: 0..20 - from, table: 0..2 },
                    Span { rows: 20 - from..23 - from, table: 2..3 },
                ],
                block_tables: vec![0, 1, 2],
                logit_rows: vec![21 - from, 22 - from],
                hidden_rows: hidden.iter().map(|position| position - from).collect(),
            };
            let given = std::sync::Mutex::new((Vec::new(), Vec::new()));
            let each = |_: usize, span: usize, made: SpanOutput<'_>| {
                let mut given = given.lock().expect("no panic");
                match (span, made) {
                    (0, SpanOutput::Hidden(rows)) => given.0 = rows.to_vec(),
                    (1, SpanOutput::Logits(rows)) => given.1 = rows.to_vec(),
                    other => panic!("nobody asked for this: {other:?}"),
                }
            };
            model.forward_each(&batch, &mut || {}, &each).expect("forward");
            let (hidden, logits) = given.into_inner().expect("no panic");
            let bits: Vec<u32> = logits.iter().map(|logit| logit.to_bits()).collect();
            assert!(bits == [&*all[1], &all[2]].concat(), "{name}: the neighbour's logits");
            hidden
        };
        let whole = run(0, &(0..20).collect::<Vec<_>>());
        assert_eq!(whole.len(), 20 * width);
        assert!(whole.iter().all(|value| value.is_finite()));
        assert!(
            run(0, &[0, 7, 19])
                == [&whole[..width], &whole[7 * width..8 * width], &whole[19 * width..]].concat()
        );
        // In another chunk.
        assert!(run(13, &[13, 19]) == [&whole[13 * width..14 * width], &whole[19 * width..]].concat());
    }
}

#[test]
fn pools_that_cannot_be_had_are_errors() {
    let mut model = load("llama_tied", 1, Isa::detect(), 4);
    assert_eq!(model.kv_bytes_per_token(), 2 * 2 * 2 * 2 * 16, "2 layers, K and V, 2 heads of 16, f16");
    for (blocks, block_size) in [(usize::MAX, BLOCK_SIZE), (1 << 50, BLOCK_SIZE), (4, 0), (4, 10)] {
        let error = model.allocate_kv(blocks, block_size).expect_err("no such pool");
        assert!(!error.to_string().is_empty());
    }
    let empty = model.forward(&Batch {
        tokens: vec![1],
        positions: vec![0],
        spans: vec![obol_models::batch::Span { rows: 0..1, table: 0..1 }],
        block_tables: vec![0],
        logit_rows: vec![0],
        hidden_rows: Vec::new(),
    });
    assert!(empty.is_err(), "no blocks are left after a failed allocation");
}
