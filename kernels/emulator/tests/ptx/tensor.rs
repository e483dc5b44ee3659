//! Products of matrices by a warp against plain loops.

use half::{bf16, f16};

use crate::support::{Device, arguments};

const M: usize = 16;
const N: usize = 8;

/// A product `d = a * b + c` as an `mma` sees it: registers by lane and by number.
struct Case {
    opcode: &'static str,
    k: usize,
    /// Elements of `a` and `b` in one register.
    each: usize,
    /// Registers of `c` and `d` a lane.
    sums: usize,
}

/// A kernel that loads the registers of all operands, one word after the other, and stores `d`.
fn kernel(case: &Case) -> String {
    let of_a = case.k / (2 * case.each);
    let list = |letter: &str, count: usize| {
        let names: Vec<_> = (0..count).map(|k| format!("%{letter}{k}")).collect();
        format!("{{{}}}", names.join(", "))
    };
    let mut loads = String::new();
    for (letter, count) in [("a", of_a), ("b", of_a / 2), ("c", case.sums)] {
        for k in 0..count {
            loads += &format!("	ld.global.b32 %{letter}{k}, [%from]; add.s64 %from, %from, 128;\n");
        }
    }
    let stores: String =
        (0..case.sums).map(|k| format!("	st.global.b32 [%to+{}], %d{k};\n", 128 * k)).collect();
    format!(
        "
.visible .entry k(.param .u64 out, .param .u64 in)
{{
	.reg .b32 %a<8>, %b<8>, %c<8>, %d<8>, %tid;
	.reg .b64 %from, %to;
	mov.u32 %tid, %tid.x;
	ld.param.u64 %from, [in];
	ld.param.u64 %to, [out];
	mad.wide.u32 %from, %tid, 4, %from;
	mad.wide.u32 %to, %tid, 4, %to;
{loads}
	{} {}, {}, {}, {};
{stores}
	ret;
}}",
        case.opcode,
        list("d", case.sums),
        list("a", of_a),
        list("b", of_a / 2),
        list("c", case.sums),
    )
}

/// The words of all operands, register by register, 32 lanes each. Places are those of the figures in
/// the PTX ISA: a lane has rows `lane / 4` and 8 further down of `a`, column `lane / 4` of `b`.
fn fragments(
    case: &Case,
    word_a: impl Fn(usize, usize) -> u32,
    word_b: impl Fn(usize, usize) -> u32,
    word_c: impl Fn(usize, usize) -> u32,
) -> Vec<u32> {
    let mut words = Vec::new();
    let of_a = case.k / (2 * case.each);
    for r in 0..of_a {
        for lane in 0..32 {
            let row = lane / 4 + if r % 2 == 1 { 8 } else { 0 };
            let column = lane % 4 * case.each + if r >= 2 { 4 * case.each } else { 0 };
            words.push(word_a(row, column));
        }
    }
    for r in 0..of_a / 2 {
        for lane in 0..32 {
            words.push(word_b(lane % 4 * case.each + r * 4 * case.each, lane / 4));
        }
    }
    for r in 0..case.sums {
        for lane in 0..32 {
            // With two registers each holds two columns.
            let rows_apart = if case.sums == 4 { r / 2 } else { r };
            let column = lane % 4 * 2 + if case.sums == 4 { r % 2 } else { 0 };
            words.push(word_c(lane / 4 + 8 * rows_apart, column));
        }
    }
    words
}

fn run(case: &Case, words: &[u32]) -> Vec<u32> {
    let device = Device::new(&kernel(case));
    let input = device.put(words);
    let out = device.room::<u32>(32 * case.sums);
    device.run("k", 1, 32, &arguments![out, input]).expect("runs");
    device.get(out, 32 * case.sums)
}

/// Small numbers that differ from place to place.
fn number(row: usize, column: usize, seed: usize) -> i32 {
    ((row * 31 + column * 17 + seed * 7 + row * column) % 23) as i32 - 11
}

fn check_floats(case: &Case, word: impl Fn(&[f32]) -> u32) {
    let a = |row: usize, k: usize| number(row, k, 1) as f32 / 4.0;
    let b = |k: usize, column: usize| number(k, column, 2) as f32 / 8.0;
    let c = |row: usize, column: usize| number(row, column, 3) as f32;
    let pack = |f: &dyn Fn(usize) -> f32| word(&(0..case.each).map(f).collect::<Vec<_>>());
    let halves = case.sums == 2;
    let pair = |low: f32, high: f32| {
        u32::from(f16::from_f32(high).to_bits()) << 16 | u32::from(f16::from_f32(low).to_bits())
    };
    let words = fragments(
        case,
        |row, column| pack(&|e| a(row, column + e)),
        |row, column| pack(&|e| b(row + e, column)),
        |row, column| {
            if halves { pair(c(row, column), c(row, column + 1)) } else { c(row, column).to_bits() }
        },
    );
    let found = run(case, &words);
    // All sums here are exact in f32 and in f16, so that their order does not show.
    let expected = |row: usize, column: usize| {
        assert!(row < M && column < N);
        c(row, column) + (0..case.k).map(|k| a(row, k) * b(k, column)).sum::<f32>()
    };
    for lane in 0..32 {
        for r in 0..case.sums {
            let word = found[32 * r + lane];
            if halves {
                let (row, column) = (lane / 4 + 8 * r, lane % 4 * 2);
                assert_eq!(word, pair(expected(row, column), expected(row, column + 1)), "{}", case.opcode);
            } else {
                let (row, column) = (lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2);
                assert_eq!(f32::from_bits(word), expected(row, column), "{}", case.opcode);
            }
        }
    }
}

#[test]
fn products_of_floats() {
    let f16s =
        |v: &[f32]| u32::from(f16::from_f32(v[1]).to_bits()) << 16 | u32::from(f16::from_f32(v[0]).to_bits());
    let bf16s = |v: &[f32]| {
        u32::from(bf16::from_f32(v[1]).to_bits()) << 16 | u32::from(bf16::from_f32(v[0]).to_bits())
    };
    let case = |opcode, k, each, sums| Case { opcode, k, each, sums };
    check_floats(&case("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16, 2, 4), f16s);
    check_floats(&case("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", 8, 2, 4), f16s);
    check_floats(&case("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", 16, 2, 2), f16s);
    check_floats(&case("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16, 2, 4), bf16s);
    check_floats(&case("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", 8, 2, 4), bf16s);
    check_floats(&case("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 8, 1, 4), |v| v[0].to_bits());
    check_floats(&case("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", 4, 1, 4), |v| v[0].to_bits());
}

#[test]
fn products_of_bytes_with_all_signs() {
    for (opcode, k, a_signed, b_signed) in [
        ("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32", 16, true, true),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", 32, true, true),
        ("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", 32, false, true),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32", 32, true, false),
        ("mma.sync.aligned.m16n8k16.row.col.s32.u8.u8.s32", 16, false, false),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", 32, true, true),
    ] {
        let case = Case { opcode, k, each: 4, sums: 4 };
        // Both halves of the range, so that signs matter.
        let a = |row: usize, k: usize| (number(row, k, 1) * 23) as u8;
        let b = |k: usize, column: usize| (number(k, column, 2) * 19) as u8;
        let full = opcode.contains("satfinite");
        let c = |row: usize, column: usize| if full { i32::MAX } else { number(row, column, 3) * 1000 };
        let words = fragments(
            &case,
            |row, column| u32::from_le_bytes([0, 1, 2, 3].map(|e| a(row, column + e))),
            |row, column| u32::from_le_bytes([0, 1, 2, 3].map(|e| b(row + e, column))),
            |row, column| c(row, column) as u32,
        );
        let found = run(&case, &words);
        let widen = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
        for lane in 0..32 {
            for r in 0..4 {
                let (row, column) = (lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2);
                let sum: i32 =
                    (0..k).map(|k| widen(a(row, k), a_signed) * widen(b(k, column), b_signed)).sum();
                let expected = c(row, column).saturating_add(sum);
                assert_eq!(found[32 * r + lane] as i32, expected, "{opcode} at {row}, {column}");
            }
        }
    }
}

#[test]
fn matrices_are_loaded_stored_and_turned() {
    // Four matrices of 8 x 8 whose rows lie one after the other; lane l points at row l.
    let kernel = |load: &str| {
        format!(
            "
.visible .entry k(.param .u64 out, .param .u64 in)
{{
	.reg .b32 %r<16>, %tid, %at;
	.reg .b64 %from, %to;
	.shared .align 16 .b8 tile[512];
	.shared .align 16 .b8 back[512];
	mov.u32 %tid, %tid.x;
	ld.param.u64 %from, [in];
	ld.param.u64 %to, [out];
	mad.wide.u32 %from, %tid, 16, %from;
	mad.wide.u32 %to, %tid, 16, %to;
	mov.u32 %at, tile;
	mad.lo.u32 %at, %tid, 16, %at;
	ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%from];
	st.shared.v4.u32 [%at], {{%r4, %r5, %r6, %r7}};
	bar.warp.sync -1;
	mov.u32 %r0, 0;
	mov.u32 %r1, 0;
	mov.u32 %r2, 0;
	mov.u32 %r3, 0;
	{load}
	st.global.v4.u32 [%to], {{%r0, %r1, %r2, %r3}};
	ret;
}}"
        )
    };
    let input: Vec<u16> = (0..256).collect();
    let run = |load: &str| {
        let device = Device::new(&kernel(load));
        let from = device.put(&input);
        let out = device.room::<u32>(128);
        device.run("k", 1, 32, &arguments![out, from]).expect("runs");
        device.get::<u32>(out, 128)
    };
    let element = |matrix: usize, row: usize, column: usize| u32::from(input[64 * matrix + 8 * row + column]);
    for (count, suffix, registers) in
        [(4, "x4", "{%r0, %r1, %r2, %r3}"), (2, "x2", "{%r0, %r1}"), (1, "x1", "{%r0}")]
    {
        let plain = run(&format!("ldmatrix.sync.aligned.m8n8.{suffix}.shared.b16 {registers}, [%at];"));
        let turned =
            run(&format!("ldmatrix.sync.aligned.m8n8.{suffix}.trans.shared.b16 {registers}, [%at];"));
        for lane in 0..32 {
            let (group, pair) = (lane / 4, lane % 4 * 2);
            for matrix in 0..4 {
                let there = u32::from(matrix < count);
                let expected = element(matrix, group, pair) | element(matrix, group, pair + 1) << 16;
                assert_eq!(plain[4 * lane + matrix], expected * there, "{suffix}");
                let expected = element(matrix, pair, group) | element(matrix, pair + 1, group) << 16;
                assert_eq!(turned[4 * lane + matrix], expected * there, "{suffix}.trans");
            }
        }
    }
    let moved = run("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%at];
	movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r4;");
    let turned = run("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r0}, [%at];");
    assert_eq!(moved, turned);
    // What stmatrix writes, a row by each lane reads.
    let stored = run("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%at];
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%at+512], {%r0, %r1, %r2, %r3};
	ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%at+512];");
    let words: Vec<u32> =
        input.as_chunks::<2>().0.iter().map(|p| u32::from(p[1]) << 16 | u32::from(p[0])).collect();
    assert_eq!(stored, words);
}

#[test]
fn a_product_by_part_of_a_warp_is_stopped() {
    let case = Case { opcode: "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", k: 8, each: 2, sums: 4 };
    let device = Device::new(&kernel(&case));
    let memory = device.room::<u32>(1024);
    let fault = device.run("k", 1, 31, &arguments![memory, memory]).expect_err("a lane is missing");
    assert!(fault.to_string().starts_with("warp operation of lanes 0xffffffff waits"), "{fault}");
}
