//! `cvt` between all types against plain Rust.

use half::{bf16, f16};

use crate::opcode::Class::{Bits16, Bits32, Bits64};
use crate::opcode::{check_on, product, results};

type Rounded = fn(f32) -> f32;

fn floats() -> Vec<f32> {
    vec![
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        0.49,
        127.5,
        128.4,
        -128.6,
        255.5,
        32767.6,
        -40000.0,
        65519.0,
        65520.0,
        1e9,
        2_147_483_600.0,
        3e9,
        -3e9,
        1e19,
        2e19,
        1e-8,
        5.97e-8,
        6.1e-5,
        1e-40,
        1e38,
        0.1,
        3.3,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ]
}

fn singles() -> Vec<Vec<u64>> {
    floats().into_iter().map(|v| vec![u64::from(v.to_bits())]).collect()
}

fn float(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

#[test]
fn integers_are_cut_extended_and_clamped() {
    let wide: Vec<u64> =
        Bits64.edges().iter().chain(&[127, 128, 255, 256, 0xffff_ff80, 0xff7f]).copied().collect();
    let cases = product(&[&wide]);
    check_on("cvt.u32.u64", Bits32, &[Bits64], &cases, |x| x[0] & 0xffff_ffff);
    check_on("cvt.u16.u64", Bits16, &[Bits64], &cases, |x| x[0] & 0xffff);
    check_on("cvt.sat.s32.s64", Bits32, &[Bits64], &cases, |x| {
        u64::from((x[0] as i64).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32)
    });
    check_on("cvt.sat.u8.s64", Bits16, &[Bits64], &cases, |x| (x[0] as i64).clamp(0, 255) as u64);
    let words: Vec<u64> =
        Bits32.edges().iter().chain(&[127, 128, 255, 0xffff_ff80, 0xff7f]).copied().collect();
    let cases = product(&[&words]);
    check_on("cvt.s64.s32", Bits64, &[Bits32], &cases, |x| i64::from(x[0] as i32) as u64);
    check_on("cvt.u64.u32", Bits64, &[Bits32], &cases, |x| x[0]);
    // A register may be wider than the type that is read from it or written to it.
    check_on("cvt.s32.s8", Bits32, &[Bits32], &cases, |x| u64::from(i32::from(x[0] as i8) as u32));
    check_on("cvt.u32.u8", Bits32, &[Bits32], &cases, |x| x[0] & 0xff);
    check_on("cvt.s16.s8", Bits16, &[Bits32], &cases, |x| u64::from(i16::from(x[0] as i8) as u16));
    check_on("cvt.s8.s32", Bits32, &[Bits32], &cases, |x| u64::from(i32::from(x[0] as i8) as u32));
    check_on("cvt.u8.u32", Bits16, &[Bits32], &cases, |x| x[0] & 0xff);
    check_on("cvt.sat.s8.s32", Bits32, &[Bits32], &cases, |x| {
        u64::from((x[0] as i32).clamp(-128, 127) as u32)
    });
    check_on("cvt.s32.s16", Bits32, &[Bits16], &product(&[Bits16.edges()]), |x| {
        u64::from(i32::from(x[0] as i16) as u32)
    });
    let pairs = product(&[Bits32.edges(), Bits32.edges(), &[0, 0xabcd_1234]]);
    check_on("cvt.pack.sat.s8.s32.b32", Bits32, &[Bits32; 3], &pairs, |x| {
        let one = |v: u64| (v as i32).clamp(-128, 127) as u64 & 0xff;
        x[2] << 16 & 0xffff_ffff | one(x[0]) << 8 | one(x[1])
    });
}

#[test]
fn floats_become_integers_as_they_are_told_to_round() {
    let cases = singles();
    let roundings: [(&str, Rounded); 4] =
        [("rzi", f32::trunc), ("rni", f32::round_ties_even), ("rmi", f32::floor), ("rpi", f32::ceil)];
    for (name, round) in roundings {
        let of = |x: &[u64]| round(float(x[0]));
        check_on(&format!("cvt.{name}.s32.f32"), Bits32, &[Bits32], &cases, |x| {
            u64::from(of(x) as i32 as u32)
        });
        check_on(&format!("cvt.{name}.u32.f32"), Bits32, &[Bits32], &cases, |x| u64::from(of(x) as u32));
        check_on(&format!("cvt.{name}.s64.f32"), Bits64, &[Bits32], &cases, |x| of(x) as i64 as u64);
        check_on(&format!("cvt.{name}.u64.f32"), Bits64, &[Bits32], &cases, |x| of(x) as u64);
        check_on(&format!("cvt.{name}.s16.f32"), Bits16, &[Bits32], &cases, |x| {
            u64::from(of(x) as i16 as u16)
        });
        check_on(&format!("cvt.{name}.s8.f32"), Bits32, &[Bits32], &cases, |x| {
            u64::from(i32::from(of(x) as i8) as u32)
        });
        let numbers: Vec<_> = cases.iter().filter(|c| !float(c[0]).is_nan()).cloned().collect();
        check_on(&format!("cvt.{name}.f32.f32"), Bits32, &[Bits32], &numbers, |x| u64::from(of(x).to_bits()));
    }
}

#[test]
fn integers_become_floats_rounded_once() {
    let words = product(&[Bits32.edges()]);
    let longs: Vec<u64> =
        Bits64.edges().iter().chain(&[(1 << 53) + 1, (1 << 54) + (1 << 30) + 1]).copied().collect();
    let longs = product(&[&longs]);
    check_on("cvt.rn.f32.s32", Bits32, &[Bits32], &words, |x| u64::from((x[0] as i32 as f32).to_bits()));
    check_on("cvt.rn.f32.u32", Bits32, &[Bits32], &words, |x| u64::from((x[0] as u32 as f32).to_bits()));
    check_on("cvt.rn.f32.s64", Bits32, &[Bits64], &longs, |x| u64::from((x[0] as i64 as f32).to_bits()));
    check_on("cvt.rn.f32.u64", Bits32, &[Bits64], &longs, |x| u64::from((x[0] as f32).to_bits()));
    check_on("cvt.rn.f64.s64", Bits64, &[Bits64], &longs, |x| (x[0] as i64 as f64).to_bits());
    check_on("cvt.rn.f32.s8", Bits32, &[Bits32], &words, |x| u64::from(f32::from(x[0] as i8).to_bits()));
    check_on("cvt.rz.f32.u32", Bits32, &[Bits32], &words, |x| {
        let near = x[0] as u32 as f32;
        let below = if f64::from(near) > x[0] as f64 { near.next_down() } else { near };
        u64::from(below.to_bits())
    });
    let small: Vec<u64> = vec![0, 1, 2047, 2049, 2051, 65504, 65519, 65520, 0xffff_ffff, 0xffff_f7ff];
    check_on("cvt.rn.f16.s32", Bits16, &[Bits32], &product(&[&small]), |x| {
        u64::from(f16::from_f64(f64::from(x[0] as i32)).to_bits())
    });
}

#[test]
fn floats_change_their_width() {
    let cases = singles();
    let nan = |bits: u16, is_nan: bool| u64::from(if is_nan { 0x7fff } else { bits });
    check_on("cvt.rn.f16.f32", Bits16, &[Bits32], &cases, |x| {
        nan(f16::from_f32(float(x[0])).to_bits(), float(x[0]).is_nan())
    });
    check_on("cvt.rn.bf16.f32", Bits16, &[Bits32], &cases, |x| {
        nan(bf16::from_f32(float(x[0])).to_bits(), float(x[0]).is_nan())
    });
    check_on("cvt.rn.f16x2.f32", Bits32, &[Bits32; 2], &pairs(), |x| {
        let half = |v: u64| nan(f16::from_f32(float(v)).to_bits(), float(v).is_nan());
        half(x[0]) << 16 | half(x[1])
    });
    check_on("cvt.rn.bf16x2.f32", Bits32, &[Bits32; 2], &pairs(), |x| {
        let half = |v: u64| nan(bf16::from_f32(float(v)).to_bits(), float(v).is_nan());
        half(x[0]) << 16 | half(x[1])
    });
    // Every half, but for NaNs, whose bits PTX leaves open.
    let halves: Vec<Vec<u64>> =
        (0..=u16::MAX).filter(|&h| !f16::from_bits(h).is_nan()).map(|h| vec![u64::from(h)]).collect();
    check_on("cvt.f32.f16", Bits32, &[Bits16], &halves, |x| {
        u64::from(f16::from_bits(x[0] as u16).to_f32().to_bits())
    });
    check_on("cvt.f32.bf16", Bits32, &[Bits16], &halves, |x| x[0] << 16);
    // Around every half: the middle to the next one and its neighbours.
    let middles: Vec<Vec<u64>> = (0..0x7bff_u16)
        .step_by(7)
        .flat_map(|h| {
            let (low, high) = (f16::from_bits(h).to_f32(), f16::from_bits(h + 1).to_f32());
            let middle = (low + high) / 2.0;
            [middle.next_down(), middle, middle.next_up()].map(|v| vec![u64::from(v.to_bits())])
        })
        .collect();
    check_on("cvt.rn.f16.f32", Bits16, &[Bits32], &middles, |x| {
        u64::from(f16::from_f32(float(x[0])).to_bits())
    });
    check_on("cvt.rz.f16.f32", Bits16, &[Bits32], &middles, |x| {
        let near = f16::from_f32(float(x[0]));
        u64::from(near.to_bits() - u16::from(near.to_f32() > float(x[0])))
    });
    check_on("cvt.rn.relu.f16.f32", Bits16, &[Bits32], &cases, |x| {
        let value = float(x[0]);
        nan(f16::from_f32(if value <= 0.0 { 0.0 } else { value }).to_bits(), value.is_nan())
    });
    let numbers: Vec<_> = cases.iter().filter(|c| !float(c[0]).is_nan()).cloned().collect();
    check_on("cvt.f64.f32", Bits64, &[Bits32], &numbers, |x| f64::from(float(x[0])).to_bits());
    check_on("cvt.sat.f32.f32", Bits32, &[Bits32], &cases, |x| {
        let value = float(x[0]);
        u64::from(if value > 0.0 { value.min(1.0) } else { 0.0 }.to_bits())
    });
    let doubles: Vec<Vec<u64>> =
        [0.1, -1e300, 1.0 + 1e-9, 1e-46, 3.5e38].iter().map(|v: &f64| vec![v.to_bits()]).collect();
    check_on("cvt.rn.f32.f64", Bits32, &[Bits64], &doubles, |x| {
        u64::from((f64::from_bits(x[0]) as f32).to_bits())
    });
    check_on("cvt.rm.f32.f64", Bits32, &[Bits64], &doubles, |x| {
        let exact = f64::from_bits(x[0]);
        let near = exact as f32;
        u64::from(if f64::from(near) > exact { near.next_down() } else { near }.to_bits())
    });
    // f16 to bf16 goes by way of what it stands for.
    check_on("cvt.rn.bf16.f32", Bits16, &[Bits32], &numbers, |x| {
        u64::from(bf16::from_f32(float(x[0])).to_bits())
    });
}

fn pairs() -> Vec<Vec<u64>> {
    let values: Vec<u64> = floats().into_iter().map(|v| u64::from(v.to_bits())).collect();
    product(&[&values, &values])
}

#[test]
fn tf32_keeps_ten_bits_of_fraction() {
    let cases: Vec<Vec<u64>> = [1.0_f32, 1.000_488_3, 1.000_488_4, 3.337_7, -0.1]
        .iter()
        .map(|v| vec![u64::from(v.to_bits())])
        .collect();
    let found = results("cvt.rna.tf32.f32 %d, %a;", Bits32, &[Bits32], &cases);
    for (case, found) in cases.iter().zip(found) {
        let (value, kept) = (float(case[0]), float(found));
        assert_eq!(found & 0x1fff, 0);
        assert!((value - kept).abs() <= value.abs() * 2.0_f32.powi(-11), "{value} became {kept}");
    }
}
