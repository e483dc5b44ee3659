//! Integer and bit instructions against plain Rust over edge values.

use crate::opcode::Class::{Bits16, Bits32, Bits64, Predicate};
use crate::opcode::{check, check_on, product, results};
use crate::support::{Device, arguments};

/// Checks `opcode.type` for one type that plain Rust has as `$T`.
macro_rules! one {
    ($opcode:literal, $suffix:literal, $T:ty, $class:expr, (|$($x:ident),+| $body:expr)) => {{
        let sources = [$({ let _ = stringify!($x); $class }),+];
        check(concat!($opcode, ".", $suffix), $class, &sources, |operands| {
            let mut operands = operands.iter();
            $(let $x = *operands.next().expect("as many as names") as $T;)+
            let value: $T = $body;
            value as u64 & (u64::MAX >> (64 - <$T>::BITS))
        });
    }};
}

/// The same for several types.
macro_rules! each {
    ($opcode:literal, [$($suffix:literal: $T:ty, $class:expr);*], $code:tt) => {
        $(one!($opcode, $suffix, $T, $class, $code);)*
    };
}

macro_rules! integers {
    ($opcode:literal, $code:tt) => {
        each!($opcode, ["u16": u16, Bits16; "s16": i16, Bits16; "u32": u32, Bits32; "s32": i32, Bits32;
            "u64": u64, Bits64; "s64": i64, Bits64], $code)
    };
}

macro_rules! bits {
    ($opcode:literal, $code:tt) => {
        each!($opcode, ["b16": u16, Bits16; "b32": u32, Bits32; "b64": u64, Bits64], $code)
    };
}

#[test]
fn sums_products_and_extremes() {
    integers!("add", (|a, b| a.wrapping_add(b)));
    integers!("sub", (|a, b| a.wrapping_sub(b)));
    integers!("mul.lo", (|a, b| a.wrapping_mul(b)));
    integers!("mad.lo", (|a, b, c| a.wrapping_mul(b).wrapping_add(c)));
    integers!("min", (|a, b| a.min(b)));
    integers!("max", (|a, b| a.max(b)));
    each!("neg", ["s16": i16, Bits16; "s32": i32, Bits32; "s64": i64, Bits64], (|a| a.wrapping_neg()));
    each!("abs", ["s16": i16, Bits16; "s32": i32, Bits32; "s64": i64, Bits64], (|a| a.wrapping_abs()));
    each!("add.sat", ["s32": i32, Bits32], (|a, b| a.saturating_add(b)));
    each!("sub.sat", ["s32": i32, Bits32], (|a, b| a.saturating_sub(b)));
    each!("mul.hi", ["u32": u32, Bits32], (|a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32));
    each!("mul.hi", ["s32": i32, Bits32], (|a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32));
    each!("mul.hi", ["u64": u64, Bits64], (|a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64));
    each!("mul.hi", ["s64": i64, Bits64], (|a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64));
    each!("mul24.lo", ["u32": u32, Bits32], (|a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)));
}

#[test]
fn quotients_and_remainders() {
    // By zero PTX leaves them open.
    integers!("div", (|a, b| if b == 0 { !0 } else { a.wrapping_div(b) }));
    integers!("rem", (|a, b| if b == 0 { a } else { a.wrapping_rem(b) }));
}

#[test]
fn wide_products() {
    check("mul.wide.u32", Bits64, &[Bits32, Bits32], |x| x[0] * x[1]);
    check("mul.wide.s32", Bits64, &[Bits32, Bits32], |x| {
        (i64::from(x[0] as i32) * i64::from(x[1] as i32)) as u64
    });
    check("mul.wide.s16", Bits32, &[Bits16, Bits16], |x| {
        u64::from((i32::from(x[0] as i16) * i32::from(x[1] as i16)) as u32)
    });
    check("mad.wide.u32", Bits64, &[Bits32, Bits32, Bits64], |x| (x[0] * x[1]).wrapping_add(x[2]));
    check("mad.wide.s32", Bits64, &[Bits32, Bits32, Bits64], |x| {
        (i64::from(x[0] as i32) * i64::from(x[1] as i32)).wrapping_add(x[2] as i64) as u64
    });
}

#[test]
fn logic() {
    bits!("and", (|a, b| a & b));
    bits!("or", (|a, b| a | b));
    bits!("xor", (|a, b| a ^ b));
    bits!("not", (|a| !a));
    check("and.pred", Predicate, &[Predicate; 2], |x| x[0] & x[1]);
    check("or.pred", Predicate, &[Predicate; 2], |x| x[0] | x[1]);
    check("xor.pred", Predicate, &[Predicate; 2], |x| x[0] ^ x[1]);
    check("not.pred", Predicate, &[Predicate], |x| 1 - x[0]);
    for table in [0xe8_u32, 0x96, 0x01, 0xca, 0x3c, 0xff, 0] {
        let cases = product(&[Bits32.edges(); 3]);
        let found = results(&format!("lop3.b32 %d, %a, %b, %c, {table};"), Bits32, &[Bits32; 3], &cases);
        for (case, found) in cases.iter().zip(found) {
            let bit = |k: u32| {
                let at = |x: u64| (x >> k & 1) as u32;
                table >> (4 * at(case[0]) + 2 * at(case[1]) + at(case[2])) & 1
            };
            let expected: u32 = (0..32).map(|k| bit(k) << k).sum();
            assert_eq!(found, u64::from(expected), "lop3 {table:#x} of {case:x?}");
        }
    }
}

#[test]
fn shifts() {
    check("shl.b32", Bits32, &[Bits32; 2], |x| if x[1] < 32 { x[0] << x[1] & 0xffff_ffff } else { 0 });
    check("shl.b16", Bits16, &[Bits16, Bits32], |x| if x[1] < 16 { x[0] << x[1] & 0xffff } else { 0 });
    check("shl.b64", Bits64, &[Bits64, Bits32], |x| if x[1] < 64 { x[0] << x[1] } else { 0 });
    check("shr.u32", Bits32, &[Bits32; 2], |x| if x[1] < 32 { x[0] >> x[1] } else { 0 });
    check("shr.u64", Bits64, &[Bits64, Bits32], |x| if x[1] < 64 { x[0] >> x[1] } else { 0 });
    check("shr.s32", Bits32, &[Bits32; 2], |x| u64::from((x[0] as i32 >> x[1].min(31)) as u32));
    check("shr.s16", Bits16, &[Bits16, Bits32], |x| u64::from((x[0] as i16 >> x[1].min(15)) as u16));
    check("shr.s64", Bits64, &[Bits64, Bits32], |x| (x[0] as i64 >> x[1].min(63)) as u64);
    let pair = |x: &[u64]| x[1] << 32 | x[0];
    check("shf.l.wrap.b32", Bits32, &[Bits32; 3], |x| pair(x) << (x[2] & 31) >> 32);
    check("shf.l.clamp.b32", Bits32, &[Bits32; 3], |x| pair(x) << x[2].min(32) >> 32);
    check("shf.r.wrap.b32", Bits32, &[Bits32; 3], |x| pair(x) >> (x[2] & 31) & 0xffff_ffff);
    check("shf.r.clamp.b32", Bits32, &[Bits32; 3], |x| pair(x) >> x[2].min(32) & 0xffff_ffff);
}

#[test]
fn counts_of_bits() {
    check("popc.b32", Bits32, &[Bits32], |x| u64::from(x[0].count_ones()));
    check("popc.b64", Bits32, &[Bits64], |x| u64::from(x[0].count_ones()));
    check("clz.b32", Bits32, &[Bits32], |x| u64::from((x[0] as u32).leading_zeros()));
    check("clz.b64", Bits32, &[Bits64], |x| u64::from(x[0].leading_zeros()));
    check("brev.b32", Bits32, &[Bits32], |x| u64::from((x[0] as u32).reverse_bits()));
    check("brev.b64", Bits64, &[Bits64], |x| x[0].reverse_bits());
    let highest = |x: u64| if x == 0 { 0xffff_ffff } else { u64::from(63 - x.leading_zeros()) };
    check("bfind.u32", Bits32, &[Bits32], |x| highest(x[0]));
    check("bfind.u64", Bits32, &[Bits64], |x| highest(x[0]));
    check("bfind.s32", Bits32, &[Bits32], |x| {
        let value = x[0] as i32;
        highest(u64::from(if value < 0 { !value } else { value } as u32))
    });
    check("bfind.shiftamt.u32", Bits32, &[Bits32], |x| {
        if x[0] == 0 { 0xffff_ffff } else { u64::from((x[0] as u32).leading_zeros()) }
    });
}

/// Bit `k` of the field of `length` bits of `a` from `start` on, as the PTX ISA's text for `bfe` says.
fn extracted(a: u64, start: u64, length: u64, bits: u64, signed: bool) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    let top = bits - 1;
    let sign = if !signed || length == 0 { 0 } else { a >> (start + length - 1).min(top) & 1 };
    let bit = |k: u64| if k < length && start + k <= top { a >> (start + k) & 1 } else { sign };
    (0..bits).map(|k| bit(k) << k).sum()
}

#[test]
fn fields_of_bits() {
    let places: &[u64] = &[0, 1, 3, 8, 31, 32, 33, 63, 64, 255, 256];
    let cases = |values: &[u64]| product(&[values, places, places]);
    let narrow = cases(Bits32.edges());
    let wide = cases(Bits64.edges());
    check_on("bfe.u32", Bits32, &[Bits32; 3], &narrow, |x| extracted(x[0], x[1], x[2], 32, false));
    check_on("bfe.s32", Bits32, &[Bits32; 3], &narrow, |x| extracted(x[0], x[1], x[2], 32, true));
    check_on("bfe.u64", Bits64, &[Bits64, Bits32, Bits32], &wide, |x| extracted(x[0], x[1], x[2], 64, false));
    check_on("bfe.s64", Bits64, &[Bits64, Bits32, Bits32], &wide, |x| extracted(x[0], x[1], x[2], 64, true));
    let inserted = |a: u64, b: u64, start: u64, length: u64, bits: u64| {
        let (start, length) = (start & 0xff, length & 0xff);
        let within = |k: u64| k >= start && k < start + length;
        (0..bits).map(|k| (if within(k) { a >> (k - start) } else { b >> k } & 1) << k).sum()
    };
    let narrow = product(&[&[0x1234_5678, 0xffff_ffff, 0], &[0, 0xa5a5_a5a5], places, places]);
    check_on("bfi.b32", Bits32, &[Bits32; 4], &narrow, |x| inserted(x[0], x[1], x[2], x[3], 32));
    let wide = product(&[&[0x1234_5678_9abc_def0, u64::MAX], &[0, 0xa5a5_a5a5_a5a5_a5a5], places, places]);
    let classes = [Bits64, Bits64, Bits32, Bits32];
    check_on("bfi.b64", Bits64, &classes, &wide, |x| inserted(x[0], x[1], x[2], x[3], 64));
}

#[test]
fn bytes_are_permuted_and_multiplied() {
    let bytes = |x: u64| (x as u32).to_le_bytes();
    let selectors: &[u64] = &[0x3210, 0x7654, 0x0123, 0x89ab, 0xfedc, 0x5140, 0xffff_7531];
    let cases = product(&[Bits32.edges(), &[0x80ff_017f, 0x1234_5678], selectors]);
    check_on("prmt.b32", Bits32, &[Bits32; 3], &cases, |x| {
        let all = [bytes(x[0]), bytes(x[1])].concat();
        let pick = |k: usize| {
            let nibble = x[2] as usize >> (4 * k) & 15;
            let byte = all[nibble & 7];
            if nibble < 8 { byte } else { 0xff * (byte >> 7) }
        };
        u64::from(u32::from_le_bytes([pick(0), pick(1), pick(2), pick(3)]))
    });
    for (types, a_signed, b_signed) in [
        ("s32.s32", true, true),
        ("u32.u32", false, false),
        ("s32.u32", true, false),
        ("u32.s32", false, true),
    ] {
        let widen = |byte: u8, signed| if signed { i64::from(byte as i8) } else { i64::from(byte) };
        let cases = product(&[
            &[0x80ff_017f, 0x1234_5678, 0, 0xffff_ffff, 0x8080_8080],
            Bits32.edges(),
            &[0, 0x7fff_ffff, 0xffff_fffb],
        ]);
        check_on(&format!("dp4a.{types}"), Bits32, &[Bits32; 3], &cases, |x| {
            let products = (0..4).map(|k| widen(bytes(x[0])[k], a_signed) * widen(bytes(x[1])[k], b_signed));
            u64::from((products.sum::<i64>() + x[2] as i64) as u32)
        });
        let half = |x: u64, k: usize| {
            let half = (x >> (16 * k)) as u16;
            if a_signed { i64::from(half as i16) } else { i64::from(half) }
        };
        for (part, first) in [("lo", 0), ("hi", 2)] {
            check_on(&format!("dp2a.{part}.{types}"), Bits32, &[Bits32; 3], &cases, |x| {
                let products = (0..2).map(|k| half(x[0], k) * widen(bytes(x[1])[first + k], b_signed));
                u64::from((products.sum::<i64>() + x[2] as i64) as u32)
            });
        }
    }
    check("vabsdiff4.u32.u32.u32", Bits32, &[Bits32; 3], |x| {
        let (a, b) = (bytes(x[0]), bytes(x[1]));
        u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|k| a[k].abs_diff(b[k]))))
    });
    check("sad.s32", Bits32, &[Bits32; 3], |x| {
        u64::from((x[0] as i32).abs_diff(x[1] as i32).wrapping_add(x[2] as u32))
    });
    check("sad.u32", Bits32, &[Bits32; 3], |x| {
        u64::from((x[0] as u32).abs_diff(x[1] as u32).wrapping_add(x[2] as u32))
    });
}

#[test]
fn carries_go_from_one_sum_to_the_next() {
    // A sum of 128 bits in four words, and the product of two of 64.
    let words = "
	.reg .b32 %l<8>;
	mov.b64 {%l0, %l1}, %a;
	mov.b64 {%l2, %l3}, %b;
	";
    let cases = product(&[Bits64.edges(); 2]);
    let sum = format!(
        "{words} add.cc.u32 %l4, %l0, %l2; addc.cc.u32 %l5, %l1, %l3; addc.u32 %l6, 0, 0;
	add.u32 %l4, %l4, %l6; mov.b64 %d, {{%l4, %l5}};"
    );
    for (case, found) in cases.iter().zip(results(&sum, Bits64, &[Bits64; 2], &cases)) {
        let (low, over) = case[0].overflowing_add(case[1]);
        let expected = low & !0xffff_ffff | u64::from((low as u32).wrapping_add(u32::from(over)));
        assert_eq!(found, expected, "{case:x?}");
    }
    let difference = format!(
        "{words} sub.cc.u32 %l4, %l0, %l2; subc.cc.u32 %l5, %l1, %l3; subc.u32 %l6, 0, 0;
	xor.b32 %l4, %l4, %l6; mov.b64 %d, {{%l4, %l5}};"
    );
    for (case, found) in cases.iter().zip(results(&difference, Bits64, &[Bits64; 2], &cases)) {
        let (low, under) = case[0].overflowing_sub(case[1]);
        let expected = low ^ if under { 0xffff_ffff } else { 0 };
        assert_eq!(found, expected, "{case:x?}");
    }
    let high = format!(
        "{words} mul.hi.u32 %l4, %l0, %l2; mad.lo.cc.u32 %l4, %l0, %l3, %l4;
	madc.hi.u32 %l5, %l0, %l3, 0; mad.lo.cc.u32 %l4, %l1, %l2, %l4; madc.hi.cc.u32 %l5, %l1, %l2, %l5;
	addc.u32 %l6, 0, 0; mad.lo.cc.u32 %l5, %l1, %l3, %l5; madc.hi.u32 %l6, %l1, %l3, %l6;
	mov.b64 %d, {{%l5, %l6}};"
    );
    for (case, found) in cases.iter().zip(results(&high, Bits64, &[Bits64; 2], &cases)) {
        let expected = (u128::from(case[0]) * u128::from(case[1])) >> 64;
        assert_eq!(u128::from(found), expected, "{case:x?}");
    }
    check("add.cc.u64", Bits64, &[Bits64; 2], |x| x[0].wrapping_add(x[1]));
}

#[test]
fn comparisons_and_choices() {
    macro_rules! compare {
        ($name:literal, $op:tt) => {
            check(concat!("setp.", $name, ".s32"), Predicate, &[Bits32; 2], |x| u64::from((x[0] as i32) $op (x[1] as i32)));
            check(concat!("setp.", $name, ".u16"), Predicate, &[Bits16; 2], |x| u64::from(x[0] $op x[1]));
            check(concat!("setp.", $name, ".u64"), Predicate, &[Bits64; 2], |x| u64::from(x[0] $op x[1]));
            check(concat!("setp.", $name, ".s64"), Predicate, &[Bits64; 2], |x| u64::from((x[0] as i64) $op (x[1] as i64)));
        };
    }
    compare!("eq", ==);
    compare!("ne", !=);
    compare!("lt", <);
    compare!("le", <=);
    compare!("gt", >);
    compare!("ge", >=);
    check("setp.lo.u32", Predicate, &[Bits32; 2], |x| u64::from(x[0] < x[1]));
    check("setp.lt.and.s32", Predicate, &[Bits32, Bits32, Predicate], |x| {
        u64::from((x[0] as i32) < (x[1] as i32)) & x[2]
    });
    check("selp.b32", Bits32, &[Bits32, Bits32, Predicate], |x| x[if x[2] == 0 { 1 } else { 0 }]);
    check("selp.b64", Bits64, &[Bits64, Bits64, Predicate], |x| x[if x[2] == 0 { 1 } else { 0 }]);
    check("slct.u32.s32", Bits32, &[Bits32; 3], |x| x[if (x[2] as i32) < 0 { 1 } else { 0 }]);
    check("set.gt.u32.s32", Bits32, &[Bits32; 2], |x| {
        if (x[0] as i32) > (x[1] as i32) { 0xffff_ffff } else { 0 }
    });
    let cases = product(&[Bits32.edges(), Bits32.edges(), &[0, 1]]);
    let both =
        ".reg .pred %p, %q; setp.lt.or.u32 %p|%q, %a, %b, !%c; .reg .b32 %u, %v; selp.u32 %u, 1, 0, %p;
	selp.u32 %v, 2, 0, %q; or.b32 %d, %u, %v;";
    let found = results(both, Bits32, &[Bits32, Bits32, Predicate], &cases);
    for (x, found) in cases.iter().zip(found) {
        let (less, not_c) = (x[0] < x[1], x[2] == 0);
        let expected = u64::from(less | not_c) + 2 * u64::from(!less | not_c);
        assert_eq!(found, expected, "{x:x?}");
    }
}

#[test]
fn atomics_of_many_blocks_lose_nothing() {
    let text = "
.visible .entry k(.param .u64 data)
{
	.reg .b32 %r<16>;
	.reg .b64 %rd<8>;
	.reg .f32 %f<8>;
	.reg .f64 %fd<4>;
	.reg .pred %p<4>;
	ld.param.u64 %rd1, [data];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mov.u32 %r3, %ntid.x;
	mad.lo.u32 %r4, %r2, %r3, %r1;
	atom.global.add.u32 %r5, [%rd1], 3;
	atom.global.max.s32 %r6, [%rd1+4], %r4;
	red.global.min.s32 [%rd1+8], %r4;
	red.global.or.b32 [%rd1+12], %r4;
	red.global.xor.b32 [%rd1+16], %r4;
	atom.global.inc.u32 %r7, [%rd1+20], 9;
	red.global.add.f32 [%rd1+24], 0f3F800000;
	red.global.and.b32 [%rd1+28], %r4;
	cvt.u64.u32 %rd2, %r4;
	red.global.add.u64 [%rd1+32], %rd2;
	red.global.add.f64 [%rd1+40], 0d3FE0000000000000;
	mov.b32 %r8, 0x3C003800;
	atom.global.add.noftz.f16x2 %r9, [%rd1+48], %r8;
$again:
	ld.volatile.global.u32 %r10, [%rd1+52];
	add.u32 %r11, %r10, 2;
	atom.global.cas.b32 %r12, [%rd1+52], %r10, %r11;
	setp.ne.u32 %p1, %r12, %r10;
	@%p1 bra $again;
	ret;
}";
    let device = Device::new(text);
    let data = device.put(&[0_u32, 0, 5000, 0, 0, 0, 0, u32::MAX, 0, 0, 0, 0, 0, 0]);
    let (blocks, threads) = (20_u32, 96_u32);
    device.run("k", blocks, threads, &arguments![data]).expect("runs");
    let found = device.get::<u32>(data, 14);
    let all = 0..blocks * threads;
    let count = all.len() as u32;
    assert_eq!(found[0], 3 * count);
    assert_eq!(found[1], count - 1);
    assert_eq!(found[2], 0);
    assert_eq!(found[3], all.clone().fold(0, |x, y| x | y));
    assert_eq!(found[4], all.clone().fold(0, |x, y| x ^ y));
    assert_eq!(found[5], count % 10);
    assert_eq!(f32::from_bits(found[6]), count as f32);
    assert_eq!(found[7], 0);
    let word = |k: usize| u64::from(found[k + 1]) << 32 | u64::from(found[k]);
    assert_eq!(word(8), all.map(u64::from).sum::<u64>());
    assert_eq!(f64::from_bits(word(10)), f64::from(count) / 2.0);
    // 1920 halves and as many ones are still exact in f16.
    let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
    assert_eq!([half(found[12]), half(found[12] >> 16)], [960.0, 1920.0]);
    assert_eq!(found[13], 2 * count);
}
