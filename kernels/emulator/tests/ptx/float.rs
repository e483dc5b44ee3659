//! Floating-point instructions against plain Rust.

use half::{bf16, f16};

use crate::opcode::Class::{Bits16, Bits32, Bits64, Predicate};
use crate::opcode::{check_on, product, results};

/// Floats at which arithmetic is likely to go wrong, as bits.
fn singles() -> Vec<u64> {
    let plain = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        3.0,
        -7.25,
        1e-3,
        0.1,
        1e10,
        -1e10,
        65504.0,
        1e38,
        3.4e38,
        -3.4e38,
        1.175_494_4e-38,
        1e-40,
        -1e-42,
        f32::MIN_POSITIVE,
        f32::EPSILON,
        16_777_217.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    plain.iter().map(|v: &f32| u64::from(v.to_bits())).collect()
}

fn doubles() -> Vec<u64> {
    let plain = [0.0, -0.0, 1.0, -2.5, 0.1, 1e300, -1e-300, 5e-324, 4.5e15, f64::INFINITY, f64::NAN];
    plain.iter().map(|v: &f64| v.to_bits()).collect()
}

fn halves() -> Vec<u64> {
    vec![
        0, 0x8000, 0x3c00, 0xbc00, 0x3555, 0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e01,
        0x4248, 0x1234, 0x5678, 0x3f80, 0xbf80, 0x7f80, 0xff80, 0x7f7f, 0x0080,
    ]
}

/// NaNs are all one.
fn same(bits: u64, kind: fn(u64) -> bool) -> u64 {
    if kind(bits) { u64::MAX } else { bits }
}

fn single(v: f32) -> u64 {
    if v.is_nan() { u64::MAX } else { u64::from(v.to_bits()) }
}

/// Checks an f32 instruction over all combinations.
fn check_single(opcode: &str, sources: usize, expected: impl Fn(&[f32]) -> f32) {
    let values = singles();
    let cases = product(&vec![&values[..]; sources]);
    let operands = ["%a", "%b", "%c"][..sources].join(", ");
    let found = results(&format!("{opcode} %d, {operands};"), Bits32, &vec![Bits32; sources], &cases);
    for (case, found) in cases.iter().zip(found) {
        let inputs: Vec<f32> = case.iter().map(|&b| f32::from_bits(b as u32)).collect();
        let expected = expected(&inputs);
        let found = f32::from_bits(found as u32);
        assert_eq!(single(found), single(expected), "{opcode} of {inputs:?} is {found:e}, not {expected:e}");
    }
}

fn check_double(opcode: &str, sources: usize, expected: impl Fn(&[f64]) -> f64) {
    let values = doubles();
    let cases = product(&vec![&values[..]; sources]);
    let operands = ["%a", "%b", "%c"][..sources].join(", ");
    let found = results(&format!("{opcode} %d, {operands};"), Bits64, &vec![Bits64; sources], &cases);
    let is_nan = |bits| f64::from_bits(bits).is_nan();
    for (case, found) in cases.iter().zip(found) {
        let inputs: Vec<f64> = case.iter().map(|&b| f64::from_bits(b)).collect();
        let expected = expected(&inputs).to_bits();
        assert_eq!(same(found, is_nan), same(expected, is_nan), "{opcode} of {inputs:?}");
    }
}

#[test]
fn single_precision() {
    check_single("add.f32", 2, |x| x[0] + x[1]);
    check_single("add.rn.f32", 2, |x| x[0] + x[1]);
    check_single("sub.f32", 2, |x| x[0] - x[1]);
    check_single("mul.f32", 2, |x| x[0] * x[1]);
    check_single("fma.rn.f32", 3, |x| x[0].mul_add(x[1], x[2]));
    check_single("div.rn.f32", 2, |x| x[0] / x[1]);
    check_single("sqrt.rn.f32", 1, |x| x[0].sqrt());
    check_single("rcp.rn.f32", 1, |x| 1.0 / x[0]);
    check_single("neg.f32", 1, |x| -x[0]);
    check_single("abs.f32", 1, |x| x[0].abs());
    check_single("copysign.f32", 2, |x| x[1].copysign(x[0]));
    let clamp = |v: f32| if v > 0.0 { v.min(1.0) } else { 0.0 };
    check_single("add.sat.f32", 2, |x| clamp(x[0] + x[1]));
    let flush = |v: f32| if v.is_subnormal() { 0.0_f32.copysign(v) } else { v };
    check_single("mul.ftz.f32", 2, |x| flush(flush(x[0]) * flush(x[1])));
    check_single("ex2.approx.ftz.f32", 1, |x| flush(flush(x[0]).exp2()));
}

#[test]
fn extremes_prefer_numbers_to_nan_unless_told() {
    let order = |x: f32, y: f32| x.total_cmp(&y).is_lt();
    let least = |x: &[f32]| if order(x[0], x[1]) { x[0] } else { x[1] };
    let greatest = |x: &[f32]| if order(x[0], x[1]) { x[1] } else { x[0] };
    let number = |x: &[f32]| x.iter().copied().find(|v| !v.is_nan()).unwrap_or(f32::NAN);
    let any_nan = |x: &[f32]| x.iter().any(|v| v.is_nan());
    check_single("min.f32", 2, |x| if any_nan(x) { number(x) } else { least(x) });
    check_single("max.f32", 2, |x| if any_nan(x) { number(x) } else { greatest(x) });
    check_single("min.NaN.f32", 2, |x| if any_nan(x) { f32::NAN } else { least(x) });
    check_single("max.NaN.f32", 2, |x| if any_nan(x) { f32::NAN } else { greatest(x) });
}

#[test]
fn approximations_are_near() {
    let near = |opcode: &str, function: fn(f64) -> f64| {
        let values: Vec<u64> =
            (1..200).map(|k| u64::from((k as f32 * 0.07).to_bits())).chain(singles()).collect();
        let cases = product(&[&values]);
        let found = results(&format!("{opcode} %d, %a;"), Bits32, &[Bits32], &cases);
        for (case, found) in cases.iter().zip(found) {
            let input = f32::from_bits(case[0] as u32);
            let (exact, found) = (function(f64::from(input)), f32::from_bits(found as u32));
            let expected = exact as f32;
            let close = (f64::from(found) - exact).abs() <= 1e-6 * exact.abs() + 1e-6;
            let same = single(found) == single(expected);
            assert!(close || same, "{opcode} of {input:e} is {found:e}, not {expected:e}");
        }
    };
    near("sqrt.approx.f32", f64::sqrt);
    near("rsqrt.approx.f32", |x| 1.0 / x.sqrt());
    near("rcp.approx.f32", |x| 1.0 / x);
    near("ex2.approx.f32", f64::exp2);
    near("lg2.approx.f32", f64::log2);
    near("sin.approx.f32", f64::sin);
    near("cos.approx.f32", f64::cos);
    near("tanh.approx.f32", f64::tanh);
}

#[test]
fn double_precision() {
    check_double("add.f64", 2, |x| x[0] + x[1]);
    check_double("sub.f64", 2, |x| x[0] - x[1]);
    check_double("mul.f64", 2, |x| x[0] * x[1]);
    check_double("fma.rn.f64", 3, |x| x[0].mul_add(x[1], x[2]));
    check_double("div.rn.f64", 2, |x| x[0] / x[1]);
    check_double("sqrt.rn.f64", 1, |x| x[0].sqrt());
    check_double("neg.f64", 1, |x| -x[0]);
    check_double("abs.f64", 1, |x| x[0].abs());
}

#[test]
fn roundings_to_one_side_enclose_the_exact_value() {
    // Values whose sums and products an f64 holds exactly.
    let values: Vec<u64> = [0.1_f32, -0.1, 1.0, 3.3e4, -7.7, 16_777_215.0, 1.0e-3, -1.0, 0.333_333_34]
        .iter()
        .map(|v| u64::from(v.to_bits()))
        .collect();
    let check = |name: &str, sources: usize, exact: fn(&[f64]) -> f64| {
        let cases = product(&vec![&values[..]; sources]);
        let operands = ["%a", "%b", "%c"][..sources].join(", ");
        let run = |mode: &str| {
            results(&format!("{name}.{mode}.f32 %d, {operands};"), Bits32, &vec![Bits32; sources], &cases)
        };
        let (down, up, zero) = (run("rm"), run("rp"), run("rz"));
        for (k, case) in cases.iter().enumerate() {
            let inputs: Vec<f64> = case.iter().map(|&b| f64::from(f32::from_bits(b as u32))).collect();
            let exact = exact(&inputs);
            let float = |bits: &[u64]| f32::from_bits(bits[k] as u32);
            let (down, up, zero) = (float(&down), float(&up), float(&zero));
            assert!(f64::from(down) <= exact && exact <= f64::from(up), "{name} of {inputs:?}");
            let width = if f64::from(down) == exact { down } else { down.next_up() };
            assert_eq!(width, up, "{name} of {inputs:?} is enclosed by neighbours");
            assert_eq!(zero, if exact < 0.0 { up } else { down }, "{name} of {inputs:?}");
        }
    };
    check("add", 2, |x| x[0] + x[1]);
    check("sub", 2, |x| x[0] - x[1]);
    check("mul", 2, |x| x[0] * x[1]);
    // With a whole `c` the sum of product and `c` is exact as well.
    let cases = [[0.1_f32, 0.3, 1.0], [1.5, 16_777_213.0, 0.25], [-0.1, 0.7, -2.0], [3.0, 5.0, -15.0]];
    for case in cases {
        let bits = vec![case.iter().map(|v| u64::from(v.to_bits())).collect::<Vec<_>>()];
        let exact = case.map(f64::from);
        let exact = exact[0] * exact[1] + exact[2];
        let run = |mode: &str| {
            let found = results(&format!("fma.{mode}.f32 %d, %a, %b, %c;"), Bits32, &[Bits32; 3], &bits);
            f64::from(f32::from_bits(found[0] as u32))
        };
        assert!(run("rm") <= exact && exact <= run("rp"), "{case:?}");
        assert!(run("rp") - run("rm") <= exact.abs() * f64::from(f32::EPSILON), "{case:?}");
    }
}

#[test]
fn half_precision() {
    macro_rules! check_half {
        ($name:literal, $suffix:literal, $H:ty, |$($x:ident),+| $body:expr) => {{
            let values = halves();
            let lists = [$({ let _ = stringify!($x); &values[..] }),+];
            let cases = product(&lists);
            let operands = ["%a", "%b", "%c"][..lists.len()].join(", ");
            let instruction = format!("{}.{} %d, {operands};", $name, $suffix);
            let found = results(&instruction, Bits16, &vec![Bits16; lists.len()], &cases);
            // The same on both halves of a pair, the other half being one.
            let paired: Vec<Vec<u64>> =
                cases.iter().map(|case| case.iter().map(|v| v << 16 | 0x3c00).collect()).collect();
            let instruction = format!("{}.{}x2 %d, {operands};", $name, $suffix);
            let pairs = results(&instruction, Bits32, &vec![Bits32; lists.len()], &paired);
            for ((case, found), pair) in cases.iter().zip(found).zip(pairs) {
                let mut operands = case.iter();
                $(let $x = <$H>::from_bits(*operands.next().expect("as many") as u16);)+
                let expected: $H = $body;
                let bits = |v: $H| if v.is_nan() { 0x7fff } else { v.to_bits() };
                let found = bits(<$H>::from_bits(found as u16));
                assert_eq!(found, bits(expected), "{} of {case:x?}", $name);
                assert_eq!(bits(<$H>::from_bits((pair >> 16) as u16)), found, "{} of a pair", $name);
            }
        }};
    }
    macro_rules! both {
        ($name:literal, |$($x:ident),+| $body:expr) => {
            check_half!($name, "f16", f16, |$($x),+| { let f = f16::from_f64; let _ = f; $body(f, $($x.to_f64()),+) });
            check_half!($name, "bf16", bf16, |$($x),+| { let f = bf16::from_f64; let _ = f; $body(f, $($x.to_f64()),+) });
        };
    }
    /// Gives the exact value to the rounding of the type.
    fn with1<H>(f: fn(f64) -> f64) -> impl Fn(fn(f64) -> H, f64) -> H {
        move |round, a| round(f(a))
    }
    fn with2<H>(f: fn(f64, f64) -> f64) -> impl Fn(fn(f64) -> H, f64, f64) -> H {
        move |round, a, b| round(f(a, b))
    }
    both!("add.rn", |a, b| with2(|a, b| a + b));
    both!("sub.rn", |a, b| with2(|a, b| a - b));
    both!("mul.rn", |a, b| with2(|a, b| a * b));
    both!("neg", |a| with1(|a| -a));
    both!("abs", |a| with1(f64::abs));
    check_half!("fma.rn", "f16", f16, |a, b, c| nearest(a.to_f64() * b.to_f64() + c.to_f64()));
}

/// The f16 next to `exact`. The crate's own way goes by way of f32, which may round twice.
fn nearest(exact: f64) -> f16 {
    let near = f16::from_f64(exact);
    if !near.is_finite() {
        return near;
    }
    let distance = |h: f16| (h.to_f64() - exact).abs();
    let even = |h: f16, than: f16| distance(h) == distance(than) && h.to_bits() & 1 == 0;
    let beside = [near.to_bits().wrapping_sub(1), near.to_bits() + 1].map(f16::from_bits);
    let closer = |best, h| if distance(h) < distance(best) || even(h, best) { h } else { best };
    beside.into_iter().fold(near, closer)
}

#[test]
fn a_fused_half_product_is_rounded_once() {
    // The product lies halfway between two bf16; a tiny addend decides.
    let a = bf16::from_f32(1.007_812_5).to_bits(); // 1 + 2^-7
    let b = bf16::from_f32(1.5).to_bits();
    let tiny = bf16::from_f32(1e-30).to_bits();
    let case = |c: u16| vec![vec![u64::from(a), u64::from(b), u64::from(c)]];
    let run = |c: u16| results("fma.rn.bf16 %d, %a, %b, %c;", Bits16, &[Bits16; 3], &case(c))[0] as u16;
    // 1.51171875 is between 1.5078125 (odd) and 1.515625 (even).
    assert_eq!(bf16::from_bits(run(0)).to_f32(), 1.515_625);
    assert_eq!(bf16::from_bits(run(tiny)).to_f32(), 1.515_625);
    assert_eq!(bf16::from_bits(run(tiny | 0x8000)).to_f32(), 1.507_812_5);
}

#[test]
fn comparisons_know_nan() {
    let values = singles();
    let cases = product(&[&values, &values]);
    let check = |name: &str, ordered: fn(f32, f32) -> bool, of_nan: bool| {
        check_on(&format!("setp.{name}.f32"), Predicate, &[Bits32; 2], &cases, |x| {
            let (a, b) = (f32::from_bits(x[0] as u32), f32::from_bits(x[1] as u32));
            u64::from(if a.is_nan() || b.is_nan() { of_nan } else { ordered(a, b) })
        });
    };
    check("eq", |a, b| a == b, false);
    check("ne", |a, b| a != b, false);
    check("lt", |a, b| a < b, false);
    check("le", |a, b| a <= b, false);
    check("gt", |a, b| a > b, false);
    check("ge", |a, b| a >= b, false);
    check("equ", |a, b| a == b, true);
    check("neu", |a, b| a != b, true);
    check("ltu", |a, b| a < b, true);
    check("leu", |a, b| a <= b, true);
    check("gtu", |a, b| a > b, true);
    check("geu", |a, b| a >= b, true);
    check("num", |_, _| true, false);
    check("nan", |_, _| false, true);
    let halves = halves();
    let cases = product(&[&halves, &halves]);
    check_on("setp.lt.f16", Predicate, &[Bits16; 2], &cases, |x| {
        u64::from(f16::from_bits(x[0] as u16) < f16::from_bits(x[1] as u16))
    });
    let pairs: Vec<Vec<u64>> = cases.iter().map(|c| vec![c[0] << 16 | c[1], c[1] << 16 | c[1]]).collect();
    check_on("set.gt.f16x2.f16x2", Bits32, &[Bits32; 2], &pairs, |x| {
        let half = |x: u64, k: u32| f16::from_bits((x >> (16 * k)) as u16);
        let one = |k: u32| if half(x[0], k) > half(x[1], k) { 0x3c00 << (16 * k) } else { 0 };
        one(0) | one(1)
    });
    check_on("testp.finite.f32", Predicate, &[Bits32], &product(&[&singles()]), |x| {
        u64::from(f32::from_bits(x[0] as u32).is_finite())
    });
}
