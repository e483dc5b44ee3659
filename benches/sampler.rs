//! Time of drawing one token from 49,152 logits, SmolLM2's vocabulary: `cargo bench --bench sampler`.
//!
//! Criterion's "elem/s" are logits a second.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use obol::engine::sampler::{Bars, Draw, History, Scratch, sample};
use obol::request::Sampling;

const VOCAB: usize = 49_152;

/// Likelihoods that fall with a power of the rank, as those of text do, scattered over the vocabulary.
fn row() -> Vec<f32> {
    let mut row = vec![0.0; VOCAB];
    for rank in 0..VOCAB {
        let noise = (rank * 2_654_435_761 % 1000) as f32 / 1000.0;
        row[rank * 20_011 % VOCAB] = 18.0 - 1.3 * ((rank + 1) as f32).ln() + noise;
    }
    row
}

fn sampler(c: &mut Criterion) {
    let row = row();
    let prompt: Vec<u32> = (0..200).map(|i| i * 97 % VOCAB as u32).collect();
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let all = Sampling {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.05,
        presence_penalty: 0.1,
        repetition_penalty: 1.1,
        logprobs: Some(5),
        ..Sampling::default()
    };
    let mut group = c.benchmark_group("sampler");
    group.throughput(Throughput::Elements(VOCAB as u64));
    for (name, sampling) in [
        ("greedy", greedy.clone()),
        ("greedy, 5 logprobs", Sampling { logprobs: Some(5), ..greedy.clone() }),
        ("greedy, penalties", Sampling { repetition_penalty: 1.1, ..greedy }),
        ("temperature 1", Sampling::default()),
        ("top-p 0.9", Sampling { top_p: 0.9, ..Sampling::default() }),
        ("top-k 40", Sampling { top_k: 40, ..Sampling::default() }),
        ("min-p 0.05", Sampling { min_p: 0.05, ..Sampling::default() }),
        ("all", all),
    ] {
        let mut history = History::new(&prompt, &sampling);
        (0..64).for_each(|token| history.push(token * 31));
        let mut scratch = Scratch::default();
        let mut position = 0;
        group.bench_function(name, |b| {
            b.iter(|| {
                position += 1;
                let draw = Draw { seed: 1, choice: 0, position };
                sample(black_box(&row), &sampling, &history, Bars::default(), draw, &mut scratch)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, sampler);
criterion_main!(benches);
