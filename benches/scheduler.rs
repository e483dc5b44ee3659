//! Time of planning one step: `cargo bench --bench scheduler`.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use obol::engine::scheduler::{Limits, Running, StepPlan, Turn, Waiting, plan};

const BLOCK: usize = 16;

/// Every eighth sequence computes its prompt, the others decode.
fn running(sequences: usize) -> Vec<Running> {
    let sequence = |index: usize| {
        let computed = 100 + index * 7 % 900;
        let length = if index.is_multiple_of(8) { computed + 300 } else { computed + 1 };
        let blocks = computed.div_ceil(BLOCK);
        Running { line: 0, computed, length, blocks, exclusive: blocks, crowd: false, held: false }
    };
    (0..sequences).map(sequence).collect()
}

fn scheduler(c: &mut Criterion) {
    let running = running(256);
    let waiting = (0..1_000).map(|index| {
        Turn::Waiting(Waiting {
            line: 0,
            length: 50 + index * 13 % 400,
            cached_blocks: index % 3,
            cached_unheld: index % 2,
            crowd: false,
        })
    });
    let prefills = (0..running.len()).filter(|index| running[*index].remaining() > 1).map(Turn::Running);
    let turns: Vec<Turn> = prefills.chain(waiting).collect();
    let mut group = c.benchmark_group("plan of 256 running and 1,000 waiting");
    let limits = Limits {
        step_tokens: 512,
        crowd_tokens: 512,
        batch_tokens: 512,
        batch_tokens_beside: 512,
        favoured: None,
        sequences: 256,
        block_size: BLOCK,
    };
    for (name, limits, available) in [
        ("full", limits, 8_000),
        (
            "admitting",
            Limits { step_tokens: 16_384, crowd_tokens: 16_384, sequences: 1_256, ..limits },
            30_000,
        ),
        ("preempting", limits, 3),
    ] {
        group.bench_function(name, |b| {
            let mut step = StepPlan::default();
            b.iter(|| plan(black_box(&running), turns.iter().copied(), available, &limits, &mut step));
        });
    }
    group.finish();
}

criterion_group!(benches, scheduler);
criterion_main!(benches);
