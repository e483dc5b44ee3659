//! Weights rounded to 4 and 8 bits: never worse than spanning the range, exact in f16, or refused.

use crate::common::cpus;
use crate::numbers::Random;
use half::f16;
use obol_kernels::{Bits, Cpu, GROUP, Packed, ScaleKind};

type Weights = [f32; GROUP];

/// Groups of many kinds: bell-shaped, even, with an outlier, far from zero, of few values, from tiny to huge.
fn groups() -> Vec<Weights> {
    let mut random = Random(1);
    let mut groups = vec![[0.0; GROUP], [-0.0; GROUP], [1.0; GROUP], [0.3; GROUP], [-1234.567; GROUP]];
    for i in 0..4000 {
        let size = [1e-9, 3e-7, 1e-5, 0.02, 1.0, 300.0, 20_000.0][i % 7];
        let mut group: Weights = std::array::from_fn(|_| match i / 7 % 3 {
            0 => (0..6).map(|_| random.unit()).sum::<f32>() * size / 3.0,
            1 => random.unit() * size,
            _ => (random.below(4) as f32 - 1.0) * size,
        });
        match i / 21 % 4 {
            0 => group[random.below(GROUP)] *= 10.0,
            1 => group.iter_mut().for_each(|x| *x += 20.0 * size),
            2 => group.iter_mut().for_each(|x| *x = x.abs()),
            _ => {}
        }
        groups.push(group.map(|x| x.clamp(-60_000.0, 60_000.0)));
    }
    groups
}

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn error(x: &Weights, value: impl Fn(usize) -> f32) -> f64 {
    (0..GROUP).map(|i| (f64::from(x[i]) - f64::from(value(i))).powi(2)).sum()
}

/// Squares under f32's range are nobody's concern.
const NOTHING: f64 = 1e-30;

#[test]
fn four_bits_are_never_worse_than_spanning_the_range() {
    let (mut ours, mut plain) = (0.0, 0.0);
    let mut first: Option<Vec<([u8; GROUP], f32, f32)>> = None;
    for cpu in cpus() {
        let mut all = Vec::new();
        for x in groups() {
            let mut q = [0; GROUP];
            let (scale, min) = cpu.quantize_int4(&x, &mut q).expect("these fit");
            assert_eq!((half(scale), half(min)), (scale, min), "exact in f16");
            assert!(q.iter().all(|q| *q < 16));
            let low = x.iter().copied().fold(f32::INFINITY, f32::min);
            let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (step, bottom) = (half((high - low) / 15.0), half(low));
            let spanned = error(&x, |i| {
                let q = if step == 0.0 { 0.0 } else { ((x[i] - bottom) / step).round().clamp(0.0, 15.0) };
                step * q + bottom
            });
            let found = error(&x, |i| scale * f32::from(q[i]) + min);
            assert!(found <= spanned * 1.0001 + NOTHING, "{found}, spanning {spanned}: {x:?}");
            // Ordinary weights: with others f16 itself may lose more than the integers.
            let unit = f64::from(high - low).powi(2);
            if low < 0.0 && high > 0.0 && high - low > 0.01 {
                (ours, plain) = (ours + found / unit, plain + spanned / unit);
            }
            all.push((q, scale, min));
        }
        let first = first.get_or_insert_with(|| all.clone());
        assert!(*first == all, "{}: the same on every instruction set", cpu.isa());
    }
    assert!(ours < 0.9 * plain, "squared errors {ours}, spanning the range {plain}");
}

#[test]
fn eight_bits_are_within_half_a_step() {
    for cpu in cpus() {
        for x in groups() {
            let mut q = [0; GROUP];
            let scale = cpu.quantize_int8(&x, &mut q).expect("these fit");
            assert_eq!(half(scale), scale, "exact in f16");
            for (x, q) in x.iter().zip(q) {
                let value = scale * (f32::from(q) - 128.0);
                assert!((x - value).abs() <= 0.5001 * scale, "{x} became {value}, step {scale}");
            }
            let amax = x.iter().fold(0f32, |a, x| a.max(x.abs()));
            assert!(scale <= amax / 127.0 * 1.001 + 6e-8, "a step of {scale} for {amax}");
        }
    }
}

#[test]
fn what_f16_cannot_hold_is_refused() {
    let cpu = Cpu::new(1);
    let mut q = [0; GROUP];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38] {
        for at in [0, 13, 31] {
            let mut x = [0.5; GROUP];
            x[at] = bad;
            assert_eq!(cpu.quantize_int8(&x, &mut q), None, "{bad}");
            assert_eq!(cpu.quantize_int4(&x, &mut q), None, "{bad}");
        }
    }
    let mut x = [0.0; GROUP];
    (x[0], x[1]) = (f32::MAX, -f32::MAX);
    assert_eq!(cpu.quantize_int4(&x, &mut q), None);
    (x[0], x[1]) = (900_000.0, -60_000.0);
    let (scale, min) = cpu.quantize_int4(&x, &mut q).expect("the steps fit");
    assert!(scale.is_finite() && min.is_finite() && q[0] == 15 && q[1] == 0);
    assert!(cpu.quantize_int8(&x, &mut q).is_some());
}

#[test]
fn a_constant_is_all_but_exact() {
    let cpu = Cpu::new(1);
    for value in [0.0, 1.0, 0.3, -0.7, 1234.567, -5e-5] {
        let mut q = [0; GROUP];
        let (scale, min) = cpu.quantize_int4(&[value; GROUP], &mut q).expect("fits");
        let back = scale * f32::from(q[0]) + min;
        assert!((back - value).abs() <= value.abs() * 1e-6 + 3e-8, "{value} became {back}");
    }
}

#[test]
fn packs_what_was_rounded() {
    let cpu = Cpu::new(2);
    let (n, k) = (20, 64);
    let weights = Random(3).vec(n * k);
    let group = |row: usize, group: usize| -> &Weights {
        weights[row * k + group * GROUP..][..GROUP].try_into().expect("32 weights")
    };
    let four = Packed::build(&cpu, n, k, Bits::Four, ScaleKind::F16, &|row, at, q| {
        cpu.quantize_int4(group(row, at), q).expect("fits")
    });
    let eight = Packed::build(&cpu, n, k, Bits::Eight, ScaleKind::F16Centred, &|row, at, q| {
        (cpu.quantize_int8(group(row, at), q).expect("fits"), 0.0)
    });
    let mut row = vec![0.0; k];
    for r in 0..n {
        for (packed, bound) in [(&four, 0.1), (&eight, 0.004)] {
            packed.dequantize_row(r, &mut row);
            for (x, w) in row.iter().zip(&weights[r * k..]) {
                assert!((x - w).abs() < bound, "{w} became {x}");
            }
        }
    }
}
