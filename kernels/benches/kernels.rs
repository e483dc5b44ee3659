//! Throughput of the kernels at SmolLM2-135M's shapes: `cargo bench -p obol-kernels --bench kernels`, with
//! `-- 'packed int4'` for one group.
//!
//! Criterion's "elem/s" of a product is operations (2 m n k) a second: Gelem/s are GOPS. After each group of
//! products and attention stands what was reached, medians, beside the peaks of the same threads and
//! instruction set, measured right then. Threads: as many as the machine has.

mod figures;

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use figures::{Figures, Kind, Work};
use obol_kernels::{
    Act, Activations, Attention, Bits, Cpu, Dense, DenseData, GROUP, Isa, KvDtype, KvLayer, KvShape, Packed,
    Rows, ScaleKind, Span, SuperBlock, SuperKind,
};

/// (n, k): q and o, k or v, gate or up, down, the vocabulary.
const SHAPES: [(usize, usize); 5] = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)];
const ROWS: [usize; 4] = [1, 8, 32, 128];

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn weights(cpu: &Cpu, n: usize, k: usize, bits: Bits, kind: ScaleKind) -> Packed {
    Packed::build(cpu, n, k, bits, kind, &|row, group, q: &mut [u8; GROUP]| {
        for (i, q) in q.iter_mut().enumerate() {
            *q = ((row * 7 + group * 3 + i * 5) % 16) as u8;
        }
        (0.0625, -0.5)
    })
}

fn packed(c: &mut Criterion) {
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(threads(), isa);
        let mut group = c.benchmark_group(format!("packed int4 {isa}"));
        let mut figures = Figures::default();
        for (n, k) in SHAPES {
            if isa == Isa::Portable && n > 576 {
                continue;
            }
            // Enough copies that a model's worth of weights goes by, not one matrix in the cache.
            let copies = (90_000_000 / (n * k)).clamp(1, 60);
            let weights: Vec<Packed> =
                (0..copies).map(|_| weights(&cpu, n, k, Bits::Four, ScaleKind::F16)).collect();
            for m in ROWS {
                let mut x = Activations::new();
                cpu.quantize(&numbers(m * k), k, &mut x);
                let mut y = vec![0.0; m * n];
                let mut turn = 0;
                let work = Work::of(Kind::Int8, 2 * m * n * k, weights[0].bytes());
                figures.measure(&mut group, format!("{n}x{k}/{m}"), work, || {
                    turn = (turn + 1) % copies;
                    cpu.matmul_packed(black_box(&x), &weights[turn], None, &mut y);
                });
            }
        }
        group.finish();
        figures.print(&cpu);
    }
}

fn eight_bits_and_dense(c: &mut Criterion) {
    let (n, k) = (1536, 576);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(threads(), isa);
        let mut group = c.benchmark_group(format!("other weights {isa}"));
        let mut figures = Figures::default();
        let eight = weights(&cpu, n, k, Bits::Eight, ScaleKind::F16Centred);
        let half = numbers(n * k).into_iter().map(half::f16::from_f32).collect();
        let half = Dense::new(n, k, DenseData::F16(half));
        for m in [1, 32] {
            let x = numbers(m * k);
            let mut quantised = Activations::new();
            let mut y = vec![0.0; m * n];
            let work = Work::of(Kind::Int8, 2 * m * n * k, eight.bytes());
            figures.measure(&mut group, format!("int8 1536x576/{m}"), work, || {
                cpu.quantize(black_box(&x), k, &mut quantised);
                cpu.matmul_packed(&quantised, &eight, None, &mut y);
            });
            let work = Work::of(Kind::F32, 2 * m * n * k, half.bytes());
            figures.measure(&mut group, format!("f16 1536x576/{m}"), work, || {
                cpu.matmul_dense(black_box(&x), &half, None, &mut y);
            });
        }
        group.finish();
        figures.print(&cpu);
    }
}

/// The K-quants' scales beside Q4_1's, which have one step.
fn super_scales(c: &mut Criterion) {
    let (n, k) = (2048, 2048);
    for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Portable) {
        let cpu = Cpu::with_isa(threads(), isa);
        let mut group = c.benchmark_group(format!("super-blocks {isa}"));
        let mut figures = Figures::default();
        let fill = |row: usize, at: usize, out: &mut SuperBlock| {
            for (i, q) in out.q.iter_mut().enumerate() {
                *q = ((row * 7 + at * 3 + i * 5) % 16) as u8;
            }
            (out.d, out.dmin, out.scales, out.mins) = (half::f16::ONE, half::f16::ONE, [7; 16], [3; 16]);
        };
        for (name, w) in [
            ("q4_1", weights(&cpu, n, k, Bits::Four, ScaleKind::F16)),
            ("q4_k", Packed::build_super(&cpu, n, k, Bits::Four, SuperKind::WITH_MIN, &fill)),
            ("q2_k", Packed::build_super(&cpu, n, k, Bits::Four, SuperKind::HALVES_WITH_MIN, &fill)),
            ("q8_0", weights(&cpu, n, k, Bits::Eight, ScaleKind::F16Centred)),
            ("q6_k", Packed::build_super(&cpu, n, k, Bits::Eight, SuperKind::HALVES_CENTRED_32, &fill)),
        ] {
            for m in [1, 128] {
                let (mut x, mut y) = (Activations::new(), vec![0.0; m * n]);
                cpu.quantize(&numbers(m * k), k, &mut x);
                let work = Work::of(Kind::Int8, 2 * m * n * k, w.bytes());
                figures.measure(&mut group, format!("{name}/{m}"), work, || {
                    cpu.matmul_packed(black_box(&x), &w, None, &mut y);
                });
            }
        }
        group.finish();
        figures.print(&cpu);
    }
}

fn quantising_weights(c: &mut Criterion) {
    let cpu = Cpu::new(1);
    let mut group = c.benchmark_group("quantising weights");
    let x = numbers(64 * GROUP);
    let (groups, _) = x.as_chunks::<GROUP>();
    let mut q = [0; GROUP];
    group.throughput(Throughput::Elements(x.len() as u64));
    group.bench_function("int4", |b| {
        b.iter(|| {
            for x in groups {
                black_box(cpu.quantize_int4(x, &mut q));
            }
        });
    });
    group.bench_function("int8", |b| {
        b.iter(|| {
            for x in groups {
                black_box(cpu.quantize_int8(x, &mut q));
            }
        });
    });
    group.finish();
}

fn rows(c: &mut Criterion) {
    let cpu = Cpu::new(threads());
    let mut group = c.benchmark_group("rows");
    for m in [1, 128] {
        let (x, weight) = (numbers(m * 1536), vec![1.0; 576]);
        let (mut out, mut a) = (vec![0.0; m * 576], Activations::new());
        group.bench_function(BenchmarkId::new("rms_norm 576", m), |b| {
            b.iter(|| cpu.rms_norm(black_box(&x[..m * 576]), &weight, 1e-5, &mut out));
        });
        group.bench_function(BenchmarkId::new("quantize 1536", m), |b| {
            b.iter(|| cpu.quantize(black_box(&x), 1536, &mut a));
        });
        let gate_up = numbers(m * 3072);
        let mut out = vec![0.0; m * 1536];
        group.bench_function(BenchmarkId::new("silu-mul 1536", m), |b| {
            b.iter(|| cpu.act_mul(Act::Silu, black_box(&gate_up), 1536, &mut out));
        });
    }
    group.bench_function("pool: a section of 16 empty tasks", |b| {
        b.iter(|| {
            cpu.pool().run(16, &|task| {
                black_box(task);
            })
        });
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    let shape = KvShape { kv_heads: 3, head_dim: 64, block_size: 16, dtype: KvDtype::F16 };
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(threads(), isa);
        let mut group = c.benchmark_group(format!("attention {isa}"));
        let mut figures = Figures::default();
        // (sequences, new rows of each, context)
        for (sequences, new, context) in
            [(1, 1, 512), (1, 1, 4096), (32, 1, 512), (1, 128, 128), (1, 128, 2048)]
        {
            let blocks = sequences * context / 16;
            let layer = KvLayer::new(shape, blocks);
            let tables: Vec<u32> = (0..blocks as u32).collect();
            let spans: Vec<Span> = (0..sequences)
                .map(|i| Span {
                    rows: i * new..(i + 1) * new,
                    table: i * context / 16..(i + 1) * context / 16,
                })
                .collect();
            let positions: Vec<u32> =
                (0..sequences).flat_map(|_| (context - new) as u32..context as u32).collect();
            let q = numbers(positions.len() * 576);
            let mut out = vec![0.0; q.len()];
            let attention = Attention {
                layer: &layer,
                spans: &spans,
                positions: &positions,
                block_tables: &tables,
                heads: 9,
                scale: 0.125,
                window: None,
                softcap: None,
            };
            let name = format!("{sequences} x {new} rows at {context}");
            // Two products of q or p with each position that a row may see.
            let seen: usize = positions.iter().map(|p| *p as usize + 1).sum();
            let work = Work::of(Kind::F32, seen * 576 * 4, sequences * context * shape.token_bytes());
            figures.measure(&mut group, name, work, || {
                cpu.paged_attention(Rows::new(black_box(&q), 576), &attention, &mut out);
            });
        }
        group.finish();
        figures.print(&cpu);
    }
}

fn packing(c: &mut Criterion) {
    let cpu = Cpu::new(threads());
    let mut group = c.benchmark_group("packing");
    let source: Vec<u8> = (0..1536 * 576 / 2).map(|i| i as u8).collect();
    group.throughput(Throughput::Elements(1536 * 576));
    group.bench_function("1536x576 int4 weights", |b| {
        b.iter(|| {
            Packed::build(&cpu, 1536, 576, Bits::Four, ScaleKind::F16, &|row, group, q: &mut [u8; GROUP]| {
                let bytes = &source[(row * 18 + group) * 16..][..16];
                for i in 0..16 {
                    q[i] = bytes[i] & 15;
                    q[i + 16] = bytes[i] >> 4;
                }
                (0.5, 0.25)
            })
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .without_plots();
    targets = packed, eight_bits_and_dense, super_scales, quantising_weights, rows, attention, packing
}
criterion_main!(benches);
