//! The packed product against the reference, and its row invariance, for each kind of scales.

use crate::common::{KINDS, packed};
use crate::device::rounded;
use crate::device::{gpu, upload};
use crate::numbers::{Random, assert_close, assert_same_bits};
use crate::scattered::Scattered;
use half::f16;
use obol_kernels::cuda::{DeviceActivations, DevicePacked, Dtype, Gpu};
use obol_kernels::{Activations, Bits, Cpu, GROUP, Packed, ScaleKind, SuperBlock, SuperKind, reference};

/// As Q4_K, Q5_K, Q6_K, Q3_K and Q2_K, and the kinds that no format has: name, bits, kind, and the most that their
/// integers can be.
const SUPER_KINDS: [(&str, Bits, SuperKind, u8); 8] = [
    ("q4_k", Bits::Four, SuperKind::WITH_MIN, 15),
    ("q5_k", Bits::Eight, SuperKind::WITH_MIN, 31),
    ("q6_k", Bits::Eight, SuperKind::HALVES_CENTRED_32, 63),
    ("q3_k", Bits::Four, SuperKind::HALVES_CENTRED_4, 7),
    ("q2_k", Bits::Four, SuperKind::HALVES_WITH_MIN, 3),
    ("8 bits, halves, minima", Bits::Eight, SuperKind::HALVES_WITH_MIN, 255),
    ("4 bits, centred", Bits::Four, SuperKind { halves: false, has_min: false, centre: 8 }, 15),
    ("8 bits, centred", Bits::Eight, SuperKind { halves: false, has_min: false, centre: 128 }, 255),
];

fn super_packed(
    cpu: &Cpu,
    n: usize,
    k: usize,
    (_, bits, kind, most): (&str, Bits, SuperKind, u8),
    seed: u64,
) -> Packed {
    Packed::build_super(cpu, n, k, bits, kind, &|row, at, out: &mut SuperBlock| {
        let mut random = Random(seed ^ ((row as u64) << 32 | at as u64));
        *out = SuperBlock {
            q: std::array::from_fn(|_| random.below(usize::from(most) + 1) as u8),
            d: f16::from_f32(random.unit() * 0.01),
            dmin: f16::from_f32(random.unit() * 0.01),
            scales: std::array::from_fn(|_| random.below(256) as u8 as i8),
            mins: std::array::from_fn(|_| random.below(128) as u8),
        };
    })
}

/// Every kind of weights of (n, k), with its name; those of two-step scales where k allows.
pub(crate) fn every_kind(n: usize, k: usize, seed: u64) -> Vec<(String, Packed)> {
    let cpu = Cpu::new(1);
    let mut all = Vec::new();
    for bits in [Bits::Four, Bits::Eight] {
        for kind in KINDS {
            all.push((format!("{bits:?} {kind:?}"), packed(&cpu, n, k, bits, kind, seed)));
        }
    }
    if k.is_multiple_of(256) {
        for kind in SUPER_KINDS {
            all.push((kind.0.into(), super_packed(&cpu, n, k, kind, seed)));
        }
    }
    all
}

/// y (m, n) of rows x, quantised on the device.
pub(crate) fn product(gpu: &Gpu, x: &[f32], w: &DevicePacked, bias: Option<&[f32]>) -> Vec<f32> {
    let m = x.len() / w.k();
    let mut a = DeviceActivations::new(gpu, m, w.k()).unwrap();
    let rows = Scattered::dense(gpu, x, w.k(), Dtype::F32);
    gpu.quantize(rows.rows(), m, w.k(), &mut a).unwrap();
    let bias = bias.map(|bias| upload(gpu, bias, Dtype::F32));
    let y = Scattered::room(gpu, m, w.n(), Dtype::F32, 5, w.n() + 3);
    gpu.matmul_packed(&a, m, w, bias.as_ref(), y.rows()).unwrap();
    y.read(gpu)
}

fn expected(x: &[f32], w: &Packed, bias: Option<&[f32]>) -> Vec<f32> {
    let mut a = Activations::new();
    Cpu::new(1).quantize(x, w.k(), &mut a);
    let mut y = vec![0.0; a.m() * w.n()];
    reference::matmul_packed(&a, w, bias, &mut y);
    y
}

/// (m, n, k), each of the sizes that hurt at least once.
const SIZES: [(usize, usize, usize); 16] = [
    (1, 1, 32),
    (2, 15, 64),
    (7, 16, 96),
    (8, 17, 288),
    (9, 48, 576),
    (16, 200, 64),
    (17, 16, 1536),
    (33, 17, 2080),
    (64, 48, 96),
    (65, 200, 32),
    (130, 17, 288),
    (1, 200, 512),
    (9, 33, 2304),
    (33, 15, 768),
    (65, 130, 256),
    (130, 1, 256),
];

#[test]
fn agrees_with_the_reference() {
    let gpu = &*gpu();
    let mut random = Random(1);
    for (m, n, k) in SIZES {
        for (i, (name, w)) in every_kind(n, k, random.next()).into_iter().enumerate() {
            let device = gpu.upload_packed(&w).unwrap();
            assert_eq!((device.n(), device.k()), (n, k));
            let (x, bias) = (random.vec(m * k), random.vec(n));
            let bias = (i % 2 == 0).then_some(&bias[..]);
            let y = product(gpu, &x, &device, bias);
            // The terms reach 0.1 * 255 * 32: rounding of k / 32 of them; with two steps 0.01 * 128 * 255 * 16.
            let bound = 4e-7 * k as f32 * if w.bits() == Bits::Four { 1.0 } else { 8.0 };
            assert_close(&y, &expected(&x, &w, bias), bound, &format!("{name} m={m} {n}x{k}"));
        }
    }
}

/// With scales of one and no min all sums are integers under 2^24: any saturation or lost product shows.
#[test]
fn integer_sums_are_exact() {
    let gpu = &*gpu();
    let (n, k, cpu) = (33, 96, Cpu::new(1));
    for (bits, most) in [(Bits::Four, 15u8), (Bits::Eight, 255)] {
        for kind in [ScaleKind::F16, ScaleKind::F16Centred] {
            for extreme in [true, false] {
                let w = Packed::build(&cpu, n, k, bits, kind, &|row, group, q: &mut [u8; GROUP]| {
                    let mut random = Random((row * 100 + group) as u64);
                    // The least is the farthest from the centre.
                    let all = if kind == ScaleKind::F16 { most } else { 0 };
                    q.fill_with(|| if extreme { all } else { random.below(usize::from(most) + 1) as u8 });
                    (1.0, 0.0)
                });
                for m in [9, 40] {
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
                    let y = product(gpu, &x, &gpu.upload_packed(&w).unwrap(), None);
                    let mut row = vec![0.0; k];
                    for (i, y) in y.iter().enumerate() {
                        w.dequantize_row(i % n, &mut row);
                        let x = &x[i / n * k..][..k];
                        let expected: f64 =
                            x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        assert_eq!(f64::from(*y), expected, "{bits:?} {kind:?} m={m} output {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_every_batch() {
    let gpu = &*gpu();
    let mut random = Random(3);
    for (n, k, m) in [(17, 96, 70), (130, 2304, 41)] {
        for (name, w) in every_kind(n, k, random.next()) {
            let w = gpu.upload_packed(&w).unwrap();
            let (x, bias) = (random.vec(m * k), random.vec(n));
            let all = product(gpu, &x, &w, Some(&bias));
            for rows in [1, 8, 13, 32, 33] {
                for first in [0, m - rows, random.below(m - rows)] {
                    let some = product(gpu, &x[first * k..(first + rows) * k], &w, Some(&bias));
                    let what = format!("{name} {n}x{k} rows {first}+{rows} of {m}");
                    assert_same_bits(&some, &all[first * n..(first + rows) * n], &what);
                }
            }
        }
    }
}

/// Of rows quantised together the first can be multiplied alone.
#[test]
fn multiplies_fewer_rows_than_are_quantised() {
    let gpu = &*gpu();
    let (m, n, k) = (20, 17, 96);
    let x = Random(4).vec(m * k);
    let w = gpu.upload_packed(&packed(&Cpu::new(1), n, k, Bits::Four, ScaleKind::F16, 5)).unwrap();
    let all = product(gpu, &x, &w, None);
    let mut a = DeviceActivations::new(gpu, m, k).unwrap();
    let rows = Scattered::dense(gpu, &x, k, Dtype::F32);
    gpu.quantize(rows.rows(), m, k, &mut a).unwrap();
    for rows in [0, 1, 11] {
        let y = Scattered::room(gpu, rows, n, Dtype::F32, 0, n);
        gpu.matmul_packed(&a, rows, &w, None, y.rows()).unwrap();
        assert_same_bits(&y.read(gpu), &all[..rows * n], &format!("{rows} rows"));
    }
}

#[test]
fn results_are_rounded_to_their_type() {
    let gpu = &*gpu();
    let (n, k) = (17, 96);
    let w = gpu.upload_packed(&packed(&Cpu::new(1), n, k, Bits::Eight, ScaleKind::F32, 5)).unwrap();
    for m in [3, 20, 40] {
        let x = Random(6).vec(m * k);
        let single = product(gpu, &x, &w, None);
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let mut a = DeviceActivations::new(gpu, m, k).unwrap();
            let rows = Scattered::dense(gpu, &x, k, Dtype::F32);
            gpu.quantize(rows.rows(), m, k, &mut a).unwrap();
            let y = Scattered::room(gpu, m, n, dtype, 1, n + 1);
            gpu.matmul_packed(&a, m, &w, None, y.rows()).unwrap();
            assert_same_bits(&y.read(gpu), &rounded(&single, dtype), &format!("{dtype:?} m={m}"));
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let gpu = &*gpu();
    let (n, k) = (33, 160);
    for bits in [Bits::Four, Bits::Eight] {
        let w = gpu.upload_packed(&packed(&Cpu::new(1), n, k, bits, ScaleKind::F16, 5)).unwrap();
        for m in [2, 9, 40] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = Random(8).vec(m * k);
                x[k + 70] = bad;
                for (i, y) in product(gpu, &x, &w, None).iter().enumerate() {
                    assert_eq!(y.is_finite(), i / n != 1, "{bits:?} m={m} {bad}: output {i} is {y}");
                }
            }
        }
    }
}

#[test]
fn a_recorded_product_does_what_it_did() {
    let gpu = &*gpu();
    let (m, n, k) = (5, 48, 96);
    let w = gpu.upload_packed(&packed(&Cpu::new(1), n, k, Bits::Four, ScaleKind::F16Centred, 5)).unwrap();
    let mut a = DeviceActivations::new(gpu, m, k).unwrap();
    let mut random = Random(9);
    let rows = Scattered::dense(gpu, &random.vec(m * k), k, Dtype::F32);
    let y = Scattered::room(gpu, m, n, Dtype::F32, 0, n);
    let graph = gpu
        .capture(|| {
            gpu.quantize(rows.rows(), m, k, &mut a)?;
            gpu.matmul_packed(&a, m, &w, None, y.rows())
        })
        .unwrap();
    for _ in 0..2 {
        let x = random.vec(m * k);
        gpu.write(&rows.buffer, 0, &crate::device::bytes_of(&x, Dtype::F32)).unwrap();
        graph.launch().unwrap();
        assert_same_bits(&y.read(gpu), &product(gpu, &x, &w, None), "recorded");
    }
}

#[test]
#[should_panic(expected = "k differs, 64 and 32")]
fn refuses_rows_of_another_length() {
    let gpu = &*gpu();
    let w = gpu.upload_packed(&packed(&Cpu::new(1), 16, 32, Bits::Four, ScaleKind::F16, 5)).unwrap();
    let mut a = DeviceActivations::new(gpu, 1, 64).unwrap();
    let x = Scattered::dense(gpu, &[0.0; 64], 64, Dtype::F32);
    gpu.quantize(x.rows(), 1, 64, &mut a).unwrap();
    let y = Scattered::room(gpu, 1, 16, Dtype::F32, 0, 16);
    gpu.matmul_packed(&a, 1, &w, None, y.rows()).unwrap();
}

#[test]
#[should_panic(expected = "too far from the centre 4")]
fn refuses_weights_that_have_no_sign() {
    let gpu = &*gpu();
    let kind = ("12 - 4 is over 7", Bits::Four, SuperKind::HALVES_CENTRED_4, 15);
    let w = super_packed(&Cpu::new(1), 16, 256, kind, 1);
    gpu.upload_packed(&w).unwrap();
}
