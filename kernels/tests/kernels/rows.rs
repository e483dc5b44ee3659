//! Norms, activations, rotation and the dense product against the reference, and their row invariance.

use crate::common::{cpus, rope};
use crate::numbers::{Random, assert_close, assert_same_bits};
use half::{bf16, f16};
use obol_kernels::{Act, Cpu, Dense, DenseData, Isa, RopeScaling, RopeStyle, RopeTable, Rows, reference};

#[test]
fn norms_agree_with_the_reference_and_row_by_row() {
    let mut random = Random(1);
    for cpu in cpus() {
        for (m, width) in [(1, 576), (9, 15), (33, 17), (40, 1536), (3, 64)] {
            let what = format!("{} {m}x{width}", cpu.isa());
            let (x, delta, weight) = (random.vec(m * width), random.vec(m * width), random.vec(width));
            let (mut y, mut expected) = (vec![0.0; m * width], vec![0.0; m * width]);
            cpu.rms_norm(&x, &weight, 1e-5, &mut y);
            reference::rms_norm(&x, &weight, 1e-5, &mut expected);
            assert_close(&y, &expected, 1e-6, &what);
            let mut one = vec![0.0; width];
            cpu.rms_norm(&x[(m - 1) * width..], &weight, 1e-5, &mut one);
            assert_same_bits(&one, &y[(m - 1) * width..], &what);

            let (mut residual, mut residual_expected) = (x.clone(), x.clone());
            cpu.add_rms_norm(&mut residual, &delta, &weight, 1e-5, &mut y);
            reference::add_rms_norm(&mut residual_expected, &delta, &weight, 1e-5, &mut expected);
            assert_same_bits(&residual, &residual_expected, &what);
            assert_close(&y, &expected, 1e-6, &what);
            // The fused norm is the plain norm of the sum.
            cpu.rms_norm(&residual, &weight, 1e-5, &mut expected);
            assert_same_bits(&y, &expected, &what);
        }
    }
}

#[test]
fn head_norms_leave_the_rest_of_a_row() {
    let mut random = Random(2);
    for cpu in cpus() {
        let (rows, stride, heads, dim) = (5, 100, 3, 24);
        let x = random.vec(rows * stride);
        let weight = random.vec(dim);
        let mut y = x.clone();
        cpu.rms_norm_heads(&mut y, stride, heads, &weight, 1e-6);
        for row in 0..rows {
            let (x, y) = (&x[row * stride..][..stride], &y[row * stride..][..stride]);
            let mut expected = vec![0.0; heads * dim];
            reference::rms_norm(&x[..heads * dim], &weight, 1e-6, &mut expected);
            assert_close(&y[..heads * dim], &expected, 1e-6, "heads");
            assert_same_bits(&y[heads * dim..], &x[heads * dim..], "the rest");
        }
    }
}

#[test]
fn layer_norms_agree_with_the_reference_and_row_by_row() {
    let mut random = Random(6);
    for cpu in cpus() {
        for (m, width) in [(1, 768), (9, 15), (33, 17), (40, 1536), (3, 1)] {
            let what = format!("{} {m}x{width}", cpu.isa());
            // Rows far from zero, as the variance must not be taken from the mean square.
            let x: Vec<f32> = random.vec(m * width).iter().map(|x| x + 20.0).collect();
            let (weight, bias) = (random.vec(width), random.vec(width));
            for bias in [None, Some(&bias[..])] {
                let (mut y, mut expected) = (vec![0.0; m * width], vec![0.0; m * width]);
                cpu.layer_norm(&x, &weight, bias, 1e-5, &mut y);
                reference::layer_norm(&x, &weight, bias, 1e-5, &mut expected);
                assert_close(&y, &expected, if width == 1 { 1e-3 } else { 1e-5 }, &what);
                let mut one = vec![0.0; width];
                cpu.layer_norm(&x[(m - 1) * width..], &weight, bias, 1e-5, &mut one);
                assert_same_bits(&one, &y[(m - 1) * width..], &what);
            }
        }
        let mut y = vec![1.0; 40];
        cpu.layer_norm(&[3.0; 40], &[1.0; 20], Some(&[0.5; 20]), 1e-5, &mut y);
        assert_eq!(y, [0.5; 40], "a constant row is its bias");
    }
}

const ACTS: [Act; 3] = [Act::Silu, Act::GeluTanh, Act::Gelu];

#[test]
fn gated_activations_agree_with_the_reference_also_far_out() {
    let mut random = Random(3);
    for (act, cpu) in ACTS.into_iter().flat_map(|act| cpus().into_iter().map(move |cpu| (act, cpu))) {
        for (m, f) in [(1, 1536), (9, 17), (33, 96)] {
            let mut x: Vec<f32> = random.vec(m * 2 * f).iter().map(|x| x * 20.0).collect();
            (x[0], x[1], x[2], x[3]) = (0.0, -200.0, 200.0, -85.0);
            let (mut y, mut expected) = (vec![0.0; m * f], vec![0.0; m * f]);
            cpu.act_mul(act, &x, f, &mut y);
            reference::act_mul(act, Rows::new(&x, 2 * f), Rows::new(&x[f..], 2 * f), f, &mut expected);
            assert_close(&y, &expected, 1e-6, &format!("{} {act:?} {m}x{f}", cpu.isa()));
            let split = |start: usize| -> Vec<f32> {
                x.chunks(2 * f).flat_map(|row| row[start..start + f].to_vec()).collect()
            };
            cpu.act_mul_split(act, &split(0), &split(f), f, &mut expected);
            assert_same_bits(&expected, &y, "gate and up apart");
            let mut one = vec![0.0; f];
            cpu.act_mul(act, &x[(m - 1) * 2 * f..], f, &mut one);
            assert_same_bits(&one, &y[(m - 1) * f..], "the last row alone");
        }
    }
}

/// Every place of a vector and of a task gives an element the same bits.
fn check_elements(f: &dyn Fn(&Cpu, &mut [f32]), exact: &dyn Fn(f32) -> f64, bound: f32, what: &str) {
    let mut x: Vec<f32> = (-4000..=4000).map(|i| i as f32 / 250.0).collect();
    x.extend([0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0, 1e15, -1e15, 1e-4]);
    // More than one task.
    x.extend(Random(7).vec(20_000));
    let expected: Vec<f32> = x.iter().map(|x| exact(*x) as f32).collect();
    for cpu in cpus() {
        let mut y = x.clone();
        f(&cpu, &mut y);
        assert_close(&y, &expected, bound, &format!("{what} {}", cpu.isa()));
        for start in [1, 5, 7990, 16_383] {
            let mut some = x[start..start + 37].to_vec();
            f(&cpu, &mut some);
            assert_same_bits(&some, &y[start..start + 37], what);
        }
    }
}

#[test]
fn activations_agree_with_the_reference_element_by_element() {
    for act in ACTS {
        check_elements(
            &|cpu, x| cpu.act(act, x),
            &|x| reference::act(act, f64::from(x)),
            5e-7,
            &format!("{act:?}"),
        );
    }
}

#[test]
fn caps_and_factors_agree_with_the_reference_element_by_element() {
    for cap in [1.5, 30.0] {
        let exact = |x: f32| {
            let mut one = [x];
            reference::softcap(&mut one, cap);
            f64::from(one[0])
        };
        check_elements(&|cpu, x| cpu.softcap(x, cap), &exact, 5e-7, "softcap");
        for cpu in cpus() {
            let (mut x, mut expected) = ([1e-4, -3e-3, 0.2], [1e-4, -3e-3, 0.2]);
            cpu.softcap(&mut x, cap);
            reference::softcap(&mut expected, cap);
            for (x, expected) in x.iter().zip(expected) {
                assert!((x / expected - 1.0).abs() < 5e-7, "near zero: {x}, expected {expected}");
            }
        }
    }
    check_elements(&|cpu, x| cpu.scale(x, 0.22), &|x| f64::from(x * 0.22), 0.0, "scale");
    let twice = |cpu: &Cpu, x: &mut [f32]| {
        let delta = x.to_vec();
        cpu.add(x, &delta);
    };
    check_elements(&twice, &|x| f64::from(x + x), 0.0, "add");
}

#[test]
fn rotation_agrees_with_the_reference() {
    let mut random = Random(4);
    for cpu in cpus() {
        for (head_dim, rotary, style) in [
            (64, 64, RopeStyle::Interleaved),
            (64, 64, RopeStyle::Halves),
            (80, 32, RopeStyle::Halves),
            (24, 24, RopeStyle::Interleaved),
        ] {
            let mut table = RopeTable::new(rotary, 10_000.0, &RopeScaling::None);
            let (rows, heads, stride) = (40, 3, 3 * head_dim + 5);
            let positions: Vec<u32> = (0..rows).map(|_| random.below(5000) as u32).collect();
            table.turn_to(&positions);
            let x = random.vec(rows * stride);
            let (mut y, mut expected) = (x.clone(), x.clone());
            rope(&cpu, &mut y, stride, heads, head_dim, &table, style);
            reference::rope(&mut expected, stride, heads, head_dim, &table, style);
            assert_close(&y, &expected, 1e-6, &format!("{} {head_dim} {style:?}", cpu.isa()));
            let last = (rows - 1) * stride;
            let mut one = x[last..].to_vec();
            table.turn_to(&positions[rows - 1..]);
            rope(&cpu, &mut one, stride, heads, head_dim, &table, style);
            assert_same_bits(&one, &y[last..], "the last row alone");
        }
    }
}

#[test]
fn frequencies_are_scaled() {
    let plain = RopeTable::new(4, 100.0, &RopeScaling::None);
    let linear = RopeTable::new(4, 100.0, &RopeScaling::Linear(4.0));
    let factors = RopeTable::new(4, 100.0, &RopeScaling::Factors(vec![1.0, 4.0]));
    let cpu = Cpu::new(1);
    let turn = |table: &RopeTable, position| {
        let mut table = table.clone();
        table.turn_to(&[position]);
        let mut x = vec![1.0, 0.0, 1.0, 0.0];
        rope(&cpu, &mut x, 4, 1, 4, &table, RopeStyle::Interleaved);
        x
    };
    assert_eq!(turn(&linear, 8), turn(&plain, 2));
    assert_eq!(turn(&factors, 8)[..2], turn(&plain, 8)[..2]);
    assert_eq!(turn(&factors, 8)[2..], turn(&plain, 2)[2..]);
}

#[test]
fn frequencies_may_be_handed_over() {
    let plain = RopeTable::new(6, 100.0, &RopeScaling::None);
    let frequencies: Vec<f64> = (0..3).map(|i| 100f64.powf(-2.0 * f64::from(i) / 6.0)).collect();
    let turn = |table: &RopeTable| {
        let mut table = table.clone();
        table.turn_to(&[5]);
        let mut x = [1.0, 0.5, -1.0, 0.25, 2.0, 0.125];
        rope(&Cpu::new(1), &mut x, 6, 1, 6, &table, RopeStyle::Halves);
        x
    };
    let same = RopeTable::from_frequencies(frequencies.clone(), 1.0);
    assert_eq!(turn(&same), turn(&plain));
    let larger = RopeTable::from_frequencies(frequencies, 2.0);
    assert_eq!(turn(&larger), turn(&plain).map(|x| 2.0 * x));
    let still = RopeTable::from_frequencies(vec![0.0; 3], 1.0);
    assert_eq!(turn(&still), [1.0, 0.5, -1.0, 0.25, 2.0, 0.125]);
}

#[test]
fn the_dense_product_agrees_with_the_reference_and_row_by_row() {
    let mut random = Random(5);
    for isa in Isa::available() {
        for (n, k) in [(1, 32), (15, 33), (17, 576), (70, 100), (16, 1536), (3, 7)] {
            let w = random.vec(n * k);
            let bias = random.vec(n);
            for kind in 0..3 {
                let data = match kind {
                    0 => DenseData::F32(w.clone()),
                    1 => DenseData::F16(w.iter().map(|w| f16::from_f32(*w)).collect()),
                    _ => DenseData::Bf16(w.iter().map(|w| bf16::from_f32(*w)).collect()),
                };
                let w = Dense::new(n, k, data);
                for m in [1, 2, 7, 8, 9, 33] {
                    let x = random.vec(m * k);
                    let (mut y, mut expected) = (vec![0.0; m * n], vec![0.0; m * n]);
                    Cpu::with_isa(3, isa).matmul_dense(&x, &w, Some(&bias), &mut y);
                    reference::matmul_dense(&x, &w, Some(&bias), &mut expected);
                    let what = format!("{isa} {n}x{k} kind {kind} m={m}");
                    assert_close(&y, &expected, 1e-7 * k as f32 + 1e-6, &what);
                    for row in 0..m {
                        let mut one = vec![0.0; n];
                        Cpu::with_isa(1, isa).matmul_dense(&x[row * k..][..k], &w, Some(&bias), &mut one);
                        assert_same_bits(&one, &y[row * n..][..n], &what);
                    }
                }
            }
        }
    }
}

#[test]
fn every_16_bit_weight_has_its_value() {
    let every = || 0..=u16::MAX;
    for isa in Isa::available() {
        for k in [1, 16] {
            let spread = |bits: u16| std::iter::once(bits).chain(std::iter::repeat_n(0, k - 1));
            let halves = every().flat_map(spread).map(f16::from_bits).collect();
            let brains = every().flat_map(spread).map(bf16::from_bits).collect();
            for data in [DenseData::F16(halves), DenseData::Bf16(brains)] {
                let values: Vec<f32> = match &data {
                    DenseData::F16(_) => every().map(|bits| f16::from_bits(bits).to_f32()).collect(),
                    _ => every().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
                };
                let w = Dense::new(1 << 16, k, data);
                let mut y = vec![0.0; 1 << 16];
                Cpu::with_isa(1, isa).matmul_dense(&vec![1.0; k], &w, None, &mut y);
                for (bits, (y, value)) in y.iter().zip(&values).enumerate() {
                    assert!(
                        y == value || y.is_nan() && value.is_nan(),
                        "{isa} {bits:#06x}: {y}, not {value}"
                    );
                }
            }
        }
    }
}
