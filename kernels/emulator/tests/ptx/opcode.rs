//! One instruction over all combinations of some values of its operands.

use crate::support::{Device, Plain, arguments};

/// A register's class: how many bytes, and the letter that PTX has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Bits16,
    Bits32,
    Bits64,
    /// A predicate, held in memory as a word that is zero or not.
    Predicate,
}

use Class::{Bits16, Bits32, Bits64, Predicate};

impl Class {
    /// Values at which arithmetic is likely to go wrong, as integers.
    pub(crate) fn edges(self) -> &'static [u64] {
        match self {
            Bits16 => &[0, 1, 2, 7, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff, 0x1234, 0xa5c3],
            Bits32 => &[
                0,
                1,
                2,
                5,
                31,
                32,
                33,
                0x7fff_ffff,
                0x8000_0000,
                0x8000_0001,
                0xffff_fffe,
                0xffff_ffff,
                0x1234_5678,
                0x9e37_79b9,
                0x0001_0000,
            ],
            Bits64 => &[
                0,
                1,
                2,
                0x7fff_ffff_ffff_ffff,
                0x8000_0000_0000_0000,
                0xffff_ffff_ffff_ffff,
                0xffff_ffff,
                0x1_0000_0000,
                0x1234_5678_9abc_def0,
                0x9e37_79b9_7f4a_7c15,
            ],
            Predicate => &[0, 1],
        }
    }

    fn bytes(self) -> usize {
        match self {
            Bits16 => 2,
            Bits32 | Predicate => 4,
            Bits64 => 8,
        }
    }

    /// The declaration of a register `name`, and how it gets its value from the address in `%at`.
    fn load(self, name: &str, at: &str) -> String {
        match self {
            Predicate => format!(
                ".reg .pred {name}; .reg .b32 {name}w; ld.global.u32 {name}w, [{at}];
	setp.ne.u32 {name}, {name}w, 0;"
            ),
            _ => {
                let bits = 8 * self.bytes();
                format!(".reg .b{bits} {name}; ld.global.b{bits} {name}, [{at}];")
            }
        }
    }

    fn store(self, name: &str, at: &str) -> String {
        match self {
            Predicate => {
                format!(".reg .b32 {name}w; selp.u32 {name}w, 1, 0, {name}; st.global.u32 [{at}], {name}w;")
            }
            _ => format!("st.global.b{} [{at}], {name};", 8 * self.bytes()),
        }
    }
}

/// Runs `instruction`, written with `%d`, `%a`, `%b`, ..., on each tuple of `cases`; the results as bits.
pub(crate) fn results(instruction: &str, target: Class, sources: &[Class], cases: &[Vec<u64>]) -> Vec<u64> {
    let names = ["%a", "%b", "%c", "%e"];
    let mut body = String::new();
    for (k, source) in sources.iter().enumerate() {
        let bytes = source.bytes();
        body += &format!(
            "	.reg .b64 %at{k}; ld.param.u64 %at{k}, [p{k}]; mad.wide.u32 %at{k}, %i, {bytes}, %at{k};
	{}\n",
            source.load(names[k], &format!("%at{k}"))
        );
    }
    let declared = match target {
        Predicate => "pred".to_owned(),
        _ => format!("b{}", 8 * target.bytes()),
    };
    let text = format!(
        "
.visible .entry k(.param .u64 out, .param .u32 n, .param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)
{{
	.reg .pred %guard;
	.reg .b32 %i, %x, %n;
	.reg .b64 %to;
	.reg .{declared} %d;
	mov.u32 %i, %tid.x;
	mov.u32 %x, %ctaid.x;
	mad.lo.u32 %i, %x, 64, %i;
	ld.param.u32 %n, [n];
	setp.ge.u32 %guard, %i, %n;
	@%guard exit;
{body}
	{instruction}
	ld.param.u64 %to, [out];
	mad.wide.u32 %to, %i, {}, %to;
	{}
	ret;
}}",
        target.bytes(),
        target.store("%d", "%to")
    );
    let device = Device::new(&text);
    let listed = device.module.function("k").expect("is there").unsupported().expect("decodes");
    assert!(listed.is_empty(), "{listed:?}");
    let column = |k: usize| {
        let Some(class) = sources.get(k) else { return 0 };
        let values = cases.iter().map(|case| case[k]);
        match class.bytes() {
            2 => device.put(&values.map(|v| v as u16).collect::<Vec<_>>()),
            4 => device.put(&values.map(|v| v as u32).collect::<Vec<_>>()),
            _ => device.put(&values.collect::<Vec<_>>()),
        }
    };
    let columns = [0, 1, 2, 3].map(column);
    let out = device.room::<u64>(cases.len());
    let [p0, p1, p2, p3] = columns;
    let count = cases.len() as u32;
    device.run("k", count.div_ceil(64), 64, &arguments![out, count, p0, p1, p2, p3]).expect("runs");
    fn widen<T: Plain + Into<u64>>(device: &Device, out: u64, count: usize) -> Vec<u64> {
        device.get::<T>(out, count).into_iter().map(Into::into).collect()
    }
    match target.bytes() {
        2 => widen::<u16>(&device, out, cases.len()),
        4 => widen::<u32>(&device, out, cases.len()),
        _ => widen::<u64>(&device, out, cases.len()),
    }
}

/// All tuples with one value of each list.
pub(crate) fn product(lists: &[&[u64]]) -> Vec<Vec<u64>> {
    lists.iter().fold(vec![Vec::new()], |tuples, list| {
        let longer = tuples.iter().flat_map(|t| list.iter().map(|&v| t.iter().copied().chain([v]).collect()));
        longer.collect()
    })
}

/// Checks `opcode d, a, b, ..` over the edges of its operands' classes against `expected`, which takes
/// and gives bits.
pub(crate) fn check(opcode: &str, target: Class, sources: &[Class], expected: impl Fn(&[u64]) -> u64) {
    let lists: Vec<&[u64]> = sources.iter().map(|s| s.edges()).collect();
    check_on(opcode, target, sources, &product(&lists), expected);
}

/// The same over given operands.
pub(crate) fn check_on(
    opcode: &str,
    target: Class,
    sources: &[Class],
    cases: &[Vec<u64>],
    expected: impl Fn(&[u64]) -> u64,
) {
    let operands = ["%a", "%b", "%c", "%e"][..sources.len()].join(", ");
    let results = results(&format!("{opcode} %d, {operands};"), target, sources, cases);
    for (case, result) in cases.iter().zip(results) {
        let expected = expected(case);
        assert_eq!(result, expected, "{opcode} of {case:x?} is {result:#x}, not {expected:#x}");
    }
}
