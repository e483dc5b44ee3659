//! What is read from a module's text before anything runs.

use obol_emulator::memory::Memory;
use obol_emulator::ptx::{Module, Param, ParseError};

const TEXT: &str = r#"
// a comment with { and ;
.version 9.0
.target sm_80
.address_size 64
.extern .func  (.param .b32 func_retval0) vprintf (.param .b64 a, .param .b64 b);
.visible .global .align 4 .u32 table[3] = {1, 0x10, -1};
.const .align 8 .f64 pi = 0d400921FB54442D18;
.global .align 8 .u64 where[2] = {table, generic(table)+4};
.extern .shared .align 16 .b8 smem[];
.visible .entry first(
	.param .u64 .ptr .align 1 first_param_0,
	.param .u32 first_param_1,
	.param .align 8 .b8 first_param_2[24]
)
.maxntid 128, 2, 1
.minnctapersm 1
{
	.shared .align 4 .b8 a[6];
	.shared .align 16 .b8 b[32];
	ret;
}
.entry second() { ret; /* } */ }
"#;

fn words<const N: usize, T: Copy>(address: u64) -> [T; N] {
    let start = std::ptr::with_exposed_provenance::<[T; N]>(address as usize);
    // SAFETY: callers pass addresses of module variables of at least that size.
    unsafe { start.read_unaligned() }
}

#[test]
fn heads_of_functions_give_sizes_and_places() {
    let memory = Memory::new(1 << 20);
    let module = Module::parse(TEXT, &memory).expect("parses");
    let first = module.function("first").expect("is there");
    let place = |offset, size, align| Param { offset, size, align };
    assert_eq!(first.params, [place(0, 8, 8), place(8, 4, 4), place(16, 24, 8)]);
    assert_eq!((first.param_bytes, first.shared_bytes, first.max_threads), (40, 48, 256));
    let second = module.function("second").expect("is there");
    assert_eq!((second.param_bytes, second.shared_bytes, second.max_threads), (0, 0, 1024));
    assert!(module.function("vprintf").is_none(), "only declared");
    let mut names: Vec<_> = module.entries().collect();
    names.sort_unstable();
    assert_eq!(names, ["first", "second"]);
}

#[test]
fn variables_are_placed_with_their_values_and_given_back() {
    let memory = Memory::new(1 << 20);
    let module = Module::parse(TEXT, &memory).expect("parses");
    let (table, bytes) = module.variable("table").expect("is there");
    assert_eq!((words::<3, i32>(table), bytes), ([1, 16, -1], 12));
    let (pi, _) = module.variable("pi").expect("is there");
    assert_eq!(words::<1, f64>(pi), [std::f64::consts::PI]);
    let (pointers, _) = module.variable("where").expect("is there");
    assert_eq!(words::<2, u64>(pointers), [table, table + 4]);
    assert_eq!(memory.used(), 36);
    module.unload(&memory);
    assert_eq!(memory.used(), 0);
}

#[test]
fn a_text_that_is_no_module_is_refused() {
    let memory = Memory::new(16);
    assert!(matches!(Module::parse(".visible .entry f( {", &memory), Err(ParseError::Syntax(_))));
    let large = ".global .align 4 .b8 large[17];";
    assert!(matches!(Module::parse(large, &memory), Err(ParseError::Memory(_))));
}
