//! What metering adds to a step, in time: `cargo bench --bench meter`. Steps of SmolLM2-135M on a few cores take
//! milliseconds.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use obol::engine::blocks::Blocks;
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::{Coefficients, StepClass, Work, split, split_recompute};
use obol::meter::timeline::{Ran, Timeline};
use obol::units::DeviceNanos;
use obol::usage::HouseTime;

/// As an engine meters a step: weigh each sequence, book the step, split it, part what was recomputed.
fn meter(c: &mut Criterion) {
    let coefficients =
        Coefficients { step: 5_000_000_000, token: 400_000_000, attention: 90_000, logits: 70_000 };
    let calibration = Calibration::uniform(coefficients);
    let mut group = c.benchmark_group("metering a step");
    for sequences in [1, 32, 256] {
        let works: Vec<Work> =
            (0..sequences).map(|index| Work { tokens: 1, context: 100 + 31 * index, logits: 1 }).collect();
        let blocks = Blocks::new(8_192, 16, DeviceNanos(0));
        let mut partition = Partition::default();
        let (mut weights, mut shares) = (Vec::new(), Vec::new());
        let mut charged = vec![DeviceNanos(0); works.len()];
        group.bench_function(BenchmarkId::new("sequences", sequences), |b| {
            b.iter(|| {
                let of = calibration.of(StepClass::of(works.len(), 0));
                weights.clear();
                weights.extend(black_box(&works).iter().map(|work| of.weight(*work, works.len())));
                let start = partition.cursor() + DeviceNanos(1_003);
                let time = partition.step(start, start + DeviceNanos(7_000_001));
                blocks.tick(partition.cursor());
                split(time, &weights, &mut shares);
                for ((share, weight), charged) in shares.iter().zip(&weights).zip(&mut charged) {
                    let (pays, again) = split_recompute(*share, *weight, 0);
                    partition.return_to_house(HouseTime::Preemption, again);
                    *charged += pays;
                }
            });
        });
        assert_eq!(charged.iter().copied().sum::<DeviceNanos>(), partition.charged());
    }
    group.finish();
}

/// When a step ran, from what a device beside the host says of it.
fn timeline(c: &mut Criterion) {
    let mut timeline = Timeline::default();
    let (mut submitted, mut heard) = (DeviceNanos(0), DeviceNanos(0));
    c.bench_function("placing a step", |b| {
        b.iter(|| {
            let run = DeviceNanos(7_000_001);
            let next = heard;
            heard += run;
            let since_last_end = Some(run);
            let placed =
                timeline.place(black_box(Ran { submitted, behind: true, run, since_last_end, heard }));
            submitted = next;
            placed
        });
    });
}

criterion_group!(benches, meter, timeline);
criterion_main!(benches);
