//! Packed weights with scales of two steps (the K-quants'): values, products, row invariance.

use crate::common::cpus;
use crate::numbers::{Random, assert_close, assert_same_bits};
use half::f16;
use obol_kernels::{
    Activations, Bits, Cpu, GROUP, Isa, Packed, SUPER_BLOCK, SuperBlock, SuperKind, reference,
};

/// As Q4_K, Q5_K, Q6_K, Q3_K and Q2_K, with the most that their integers, scales and minima can be.
const K_QUANTS: [(&str, Bits, SuperKind, u8, u8, u8); 5] = [
    ("q4_k", Bits::Four, SuperKind::WITH_MIN, 15, 63, 63),
    ("q5_k", Bits::Eight, SuperKind::WITH_MIN, 31, 63, 63),
    ("q6_k", Bits::Eight, SuperKind::HALVES_CENTRED_32, 63, 127, 0),
    ("q3_k", Bits::Four, SuperKind::HALVES_CENTRED_4, 7, 31, 0),
    ("q2_k", Bits::Four, SuperKind::HALVES_WITH_MIN, 3, 15, 15),
];

type KQuant = (&'static str, Bits, SuperKind, u8, u8, u8);

fn block((_, _, kind, most, scale, min): KQuant, seed: u64, row: usize, at: usize) -> SuperBlock {
    let mut random = Random(seed ^ ((row as u64) << 32 | at as u64));
    let signed = !kind.has_min;
    SuperBlock {
        q: std::array::from_fn(|_| random.below(usize::from(most) + 1) as u8),
        d: f16::from_f32(random.unit() * 0.01),
        dmin: f16::from_f32(random.unit() * 0.01),
        scales: std::array::from_fn(|_| {
            let magnitude = random.below(usize::from(scale) + 1) as i8;
            if signed && random.below(2) == 0 { -magnitude - 1 } else { magnitude }
        }),
        mins: std::array::from_fn(|_| random.below(usize::from(min) + 1) as u8),
    }
}

fn build(cpu: &Cpu, n: usize, k: usize, quant: KQuant, seed: u64) -> Packed {
    Packed::build_super(cpu, n, k, quant.1, quant.2, &|row, at, out| *out = block(quant, seed, row, at))
}

fn product(cpu: &Cpu, x: &[f32], w: &Packed) -> (Activations, Vec<f32>) {
    let mut a = Activations::new();
    cpu.quantize(x, w.k(), &mut a);
    let mut y = vec![f32::NAN; a.m() * w.n()];
    cpu.matmul_packed(&a, w, None, &mut y);
    (a, y)
}

#[test]
fn values_are_those_of_the_parts() {
    for cpu in cpus() {
        for quant in K_QUANTS {
            let (name, _, kind, ..) = quant;
            let (n, k) = (37, 512);
            let w = build(&cpu, n, k, quant, 5);
            let mut row = vec![0.0; k];
            for r in 0..n {
                w.dequantize_row(r, &mut row);
                for (i, value) in row.iter().enumerate() {
                    let block = block(quant, 5, r, i / SUPER_BLOCK);
                    let i = i % SUPER_BLOCK;
                    let part = if kind.halves { i / 16 } else { i / GROUP };
                    // As ggml computes them.
                    let scale = block.d.to_f32() * f32::from(block.scales[part]);
                    let expected = if kind.has_min {
                        scale * f32::from(block.q[i]) - block.dmin.to_f32() * f32::from(block.mins[part])
                    } else {
                        scale * (f32::from(block.q[i]) - f32::from(kind.centre))
                    };
                    assert!(*value == expected, "{name} row {r}, weight {i}: {value}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn products_agree_with_the_reference() {
    let mut random = Random(1);
    for cpu in cpus() {
        for quant in K_QUANTS {
            for (n, k) in [(1, 256), (15, 512), (33, 1536), (192, 768)] {
                let w = build(&cpu, n, k, quant, random.next());
                for m in [1, 2, 3, 9, 33] {
                    let (a, y) = product(&cpu, &random.vec(m * k), &w);
                    let mut expected = vec![0.0; y.len()];
                    reference::matmul_packed(&a, &w, None, &mut expected);
                    // The terms reach 0.01 * 127 * 63 * 16: rounding of k / 16 of them.
                    let bound = 4e-7 * k as f32 * if quant.1 == Bits::Four { 1.0 } else { 8.0 };
                    assert_close(&y, &expected, bound, &format!("{} {} {n}x{k} m={m}", cpu.isa(), quant.0));
                }
            }
        }
    }
}

/// All terms are integers under 2^24: any saturation, lost product or wrong half shows.
#[test]
fn integer_sums_are_exact() {
    for cpu in cpus() {
        for (name, bits, kind, most, ..) in K_QUANTS {
            let most = if bits == Bits::Eight && kind.has_min { 255 } else { most };
            for extreme in [true, false] {
                let (n, k, m) = (33, 256, 9);
                let w = Packed::build_super(&cpu, n, k, bits, kind, &|row, _, out| {
                    let mut random = Random(row as u64);
                    out.q
                        .fill_with(|| if extreme { most } else { random.below(usize::from(most) + 1) as u8 });
                    (out.d, out.dmin) = (f16::ONE, f16::ONE);
                    out.scales = std::array::from_fn(|i| if i % 2 == 0 || extreme { 1 } else { -1 });
                    out.mins = std::array::from_fn(|i| (i % 3) as u8);
                });
                let mut random = Random(7);
                // Every group's largest is 127, so that the activations are integers too.
                let x: Vec<f32> = (0..m * k)
                    .map(|i| match (extreme, i % GROUP) {
                        (true, _) if i / k % 2 == 0 => 127.0,
                        (true, _) => -127.0,
                        (false, 0) => 127.0,
                        (false, _) => random.below(255) as f32 - 127.0,
                    })
                    .collect();
                let (_, y) = product(&cpu, &x, &w);
                let mut row = vec![0.0; k];
                for (i, y) in y.iter().enumerate() {
                    w.dequantize_row(i % n, &mut row);
                    let x = &x[i / n * k..][..k];
                    let expected: f64 = x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert_eq!(f64::from(*y), expected, "{} {name} output {i}", cpu.isa());
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_every_batch() {
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpus = [1, 2, 5].map(|threads| Cpu::with_isa(threads, isa));
        for quant in K_QUANTS {
            for (n, k, m) in [(1, 256, 9), (17, 768, 33), (200, 512, 140)] {
                let w = build(&cpus[0], n, k, quant, random.next());
                let x = random.vec(m * k);
                let (_, all) = product(&cpus[0], &x, &w);
                for cpu in &cpus {
                    let (_, again) = product(cpu, &x, &w);
                    assert_same_bits(&again, &all, &format!("{isa} {} {n}x{k}", quant.0));
                    let mut row = 0;
                    while row < m {
                        let rows = (1 + random.below(9)).min(m - row);
                        let (_, some) = product(cpu, &x[row * k..(row + rows) * k], &w);
                        let what = format!("{isa} {} {n}x{k} rows {row}+{rows}", quant.0);
                        assert_same_bits(&some, &all[row * n..(row + rows) * n], &what);
                        row += rows;
                    }
                }
            }
        }
    }
}

#[test]
fn states_the_bytes_it_holds() {
    let cpu = Cpu::new(1);
    // Of 256 weights: 4 or 8 bits each, 2 bytes for each factor, 1 for each scale and minimum.
    for (quant, bytes) in
        K_QUANTS.into_iter().zip([128 + 4 + 16, 256 + 4 + 16, 256 + 2 + 16, 128 + 2 + 16, 128 + 4 + 32])
    {
        assert_eq!(build(&cpu, 32, 1024, quant, 1).bytes(), 32 * 4 * bytes, "{}", quant.0);
    }
}
