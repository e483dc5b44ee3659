//! The packed product against the reference, and its row invariance, for each instruction set.

use crate::common::{KINDS, cpus, packed};
use crate::numbers::{Random, assert_close, assert_same_bits};
use obol_kernels::{Activations, Bits, Cpu, GROUP, Packed, ScaleKind, reference};

fn product(cpu: &Cpu, x: &[f32], w: &Packed, bias: Option<&[f32]>) -> (Activations, Vec<f32>) {
    let mut a = Activations::new();
    cpu.quantize(x, w.k(), &mut a);
    let mut y = vec![f32::NAN; a.m() * w.n()];
    cpu.matmul_packed(&a, w, bias, &mut y);
    (a, y)
}

/// The sizes that hurt.
const SIZES: [(usize, usize); 7] =
    [(1, 32), (15, 64), (16, 576), (17, 96), (33, 1536), (192, 576), (576, 576)];
const ROWS: [usize; 6] = [1, 2, 7, 8, 9, 33];

#[test]
fn agrees_with_the_reference() {
    let mut random = Random(1);
    for cpu in cpus() {
        for (n, k) in SIZES {
            for bits in [Bits::Four, Bits::Eight] {
                for kind in KINDS {
                    let w = packed(&cpu, n, k, bits, kind, random.next());
                    let bias = random.vec(n);
                    for m in if n < 100 { &ROWS[..] } else { &ROWS[3..5] } {
                        let (a, y) = product(&cpu, &random.vec(m * k), &w, Some(&bias));
                        let mut expected = vec![0.0; y.len()];
                        reference::matmul_packed(&a, &w, Some(&bias), &mut expected);
                        // The terms reach 0.1 * 255 * 32: rounding of k / 32 of them.
                        let bound = 2e-7 * k as f32 * if bits == Bits::Four { 1.0 } else { 8.0 };
                        let what = format!("{} {n}x{k} {bits:?} {kind:?} m={m}", cpu.isa());
                        assert_close(&y, &expected, bound, &what);
                    }
                }
            }
        }
    }
}

/// With scales of one and no min all sums are integers under 2^24: any saturation or lost product shows.
#[test]
fn integer_sums_are_exact() {
    for cpu in cpus() {
        for (bits, most) in [(Bits::Four, 15u8), (Bits::Eight, 255)] {
            for extreme in [true, false] {
                let (n, k) = (33, 96);
                let w =
                    Packed::build(&cpu, n, k, bits, ScaleKind::F16, &|row, group, q: &mut [u8; GROUP]| {
                        let mut random = Random((row * 100 + group) as u64);
                        q.fill_with(
                            || if extreme { most } else { random.below(usize::from(most) + 1) as u8 },
                        );
                        (1.0, 0.0)
                    });
                let mut random = Random(7);
                let m = 9;
                // Every group's largest is 127, so that the activations are integers too.
                let x: Vec<f32> = (0..m * k)
                    .map(|i| match (extreme, i % GROUP) {
                        (true, _) => {
                            if i / k % 2 == 0 {
                                127.0
                            } else {
                                -127.0
                            }
                        }
                        (false, 0) => 127.0,
                        (false, _) => random.below(255) as f32 - 127.0,
                    })
                    .collect();
                let (_, y) = product(&cpu, &x, &w, None);
                for (i, y) in y.iter().enumerate() {
                    let expected: i64 = (0..k)
                        .map(|j| {
                            let q = w.group(i % n, j / GROUP).q;
                            i64::from(q[j % GROUP]) * x[i / n * k + j] as i64
                        })
                        .sum();
                    assert_eq!(*y as i64, expected, "{} {bits:?} output {i}", cpu.isa());
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_every_batch() {
    let mut random = Random(3);
    for isa in obol_kernels::Isa::available() {
        let cpus = [1, 2, 5].map(|threads| Cpu::with_isa(threads, isa));
        for (n, k, m) in [(1, 32, 9), (15, 64, 33), (17, 576, 33), (200, 1536, 9), (576, 576, 300)] {
            for (bits, kind) in [(Bits::Four, ScaleKind::F16), (Bits::Eight, ScaleKind::F16Centred)] {
                let w = packed(&cpus[0], n, k, bits, kind, random.next());
                let (x, bias) = (random.vec(m * k), random.vec(n));
                let (_, all) = product(&cpus[0], &x, &w, Some(&bias));
                for cpu in &cpus {
                    let (_, again) = product(cpu, &x, &w, Some(&bias));
                    assert_same_bits(
                        &again,
                        &all,
                        &format!("{isa} {n}x{k} threads {}", cpu.pool().threads()),
                    );
                    let mut row = 0;
                    while row < m {
                        let rows = (1 + random.below(9)).min(m - row);
                        let (_, some) = product(cpu, &x[row * k..(row + rows) * k], &w, Some(&bias));
                        let what = format!("{isa} {n}x{k} {bits:?} rows {row}+{rows}");
                        assert_same_bits(&some, &all[row * n..(row + rows) * n], &what);
                        row += rows;
                    }
                }
            }
        }
    }
}

#[test]
fn quantises_as_the_reference_on_every_instruction_set() {
    let mut random = Random(4);
    for cpu in cpus() {
        for (m, k) in [(1, 32), (9, 576), (40, 1536)] {
            let mut x = random.vec(m * k);
            x[..32].fill(0.0);
            x[7] = if m == 9 { 1e-40 } else { 0.0 };
            let (q, scales) = reference::quantize(&x);
            let mut a = Activations::new();
            cpu.quantize(&x, k, &mut a);
            assert_eq!((a.m(), a.k()), (m, k));
            for row in 0..m {
                for group in 0..k / GROUP {
                    let at = row * k / GROUP + group;
                    let expected = (&q[at * GROUP..][..GROUP], scales[at]);
                    assert_eq!(a.group(row, group), expected, "{} row {row} group {group}", cpu.isa());
                }
            }
        }
    }
}

#[test]
fn gives_back_what_was_packed() {
    for cpu in cpus() {
        for bits in [Bits::Four, Bits::Eight] {
            for kind in KINDS {
                let (n, k) = (37, 96);
                let w = packed(&cpu, n, k, bits, kind, 5);
                let mut row = vec![0.0; k];
                for r in 0..n {
                    w.dequantize_row(r, &mut row);
                    for g in 0..k / GROUP {
                        let group = w.group(r, g);
                        let (scale, min) = group.halves[0];
                        assert_eq!(group.halves[1], (scale, min));
                        for i in 0..GROUP {
                            assert_eq!(row[g * GROUP + i], scale * f32::from(group.q[i]) + min);
                        }
                    }
                }
            }
        }
    }
    let cpu = Cpu::new(1);
    let w = Packed::build(&cpu, 20, 32, Bits::Four, ScaleKind::F32, &|row, _, q: &mut [u8; GROUP]| {
        for (i, q) in q.iter_mut().enumerate() {
            *q = ((row + 3 * i) % 16) as u8;
        }
        (row as f32, 0.1)
    });
    for row in 0..20 {
        let group = w.group(row, 0);
        assert_eq!(group.halves, [(row as f32, 0.1); 2]);
        assert!(group.q.iter().enumerate().all(|(i, q)| usize::from(*q) == (row + 3 * i) % 16));
    }
}

#[test]
fn the_embedding_error_of_the_whole_product_is_that_of_int8() {
    let mut random = Random(6);
    let cpu = Cpu::new(2);
    let (n, k) = (64, 576);
    let w = packed(&cpu, n, k, Bits::Four, ScaleKind::F16Centred, 9);
    let x = random.vec(k);
    let (_, y) = product(&cpu, &x, &w, None);
    let mut row = vec![0.0; k];
    for (i, y) in y.iter().enumerate() {
        w.dequantize_row(i, &mut row);
        let exact: f64 = x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        // Each activation is off by at most 1/254 of its group's largest.
        let bound: f32 = row.iter().map(|w| w.abs() / 254.0).sum();
        assert!((y - exact as f32).abs() <= bound, "output {i}: {y}, exactly {exact}, bound {bound}");
    }
}
