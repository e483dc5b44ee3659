//! Kernels for tests, and ways to load and launch them.

use std::ffi::c_void;

use obol_emulator::driver::api::modules::{cuLaunchKernel, cuModuleGetFunction, cuModuleLoadData};

use crate::support::*;

/// Kernels and a variable `answer`:
/// - `add(out, left, right, count)`, a thread for each element;
/// - `store(out, value)` and `stopped()`, which traps;
/// - `limited()`, with 40 KiB of shared memory and at most 64 threads;
/// - `tickets(counter, out)`: the first lane of each warp draws a number;
/// - `races()`: all warps write one word of shared memory;
/// - `counts(turns)`: one thread is busy for so many turns.
pub(crate) const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64

.visible .global .align 4 .u32 answer = 42;

.visible .entry add(.param .u64 out, .param .u64 left, .param .u64 right, .param .u32 count)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [left];
    ld.param.u64 %rd3, [right];
    ld.param.u32 %r1, [count];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.s32 %p1, %r5, %r1;
    @%p1 bra done;
    mul.wide.s32 %rd4, %r5, 4;
    add.s64 %rd5, %rd2, %rd4;
    add.s64 %rd6, %rd3, %rd4;
    add.s64 %rd7, %rd1, %rd4;
    ld.global.f32 %f1, [%rd5];
    ld.global.f32 %f2, [%rd6];
    add.f32 %f3, %f1, %f2;
    st.global.f32 [%rd7], %f3;
done:
    ret;
}

.visible .entry store(.param .u64 out, .param .u32 value)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [value];
    st.global.u32 [%rd1], %r1;
    ret;
}

.visible .entry stopped()
{
    trap;
}

.visible .entry tickets(.param .u64 counter, .param .u64 out)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [counter];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 31;
    setp.ne.s32 %p1, %r2, 0;
    @%p1 bra done;
    atom.global.add.u32 %r3, [%rd1], 1;
    shr.u32 %r4, %r1, 5;
    mul.wide.u32 %rd3, %r4, 4;
    add.s64 %rd4, %rd2, %rd3;
    st.global.u32 [%rd4], %r3;
done:
    ret;
}

.visible .entry races()
{
    .shared .align 4 .b8 word[4];
    .reg .b32 %r<3>;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, word;
    st.shared.u32 [%r2], %r1;
    ret;
}

.visible .entry counts(.param .u32 turns)
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    ld.param.u32 %r1, [turns];
again:
    add.s32 %r1, %r1, -1;
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra again;
    ret;
}

.visible .entry limited()
.maxntid 64, 1, 1
{
    .shared .align 4 .b8 tile[40960];
    ret;
}
";

pub(crate) fn module_of(image: &[u8]) -> u64 {
    made!(cuModuleLoadData, image.as_ptr().cast())
}

pub(crate) fn text(ptx: &str) -> Vec<u8> {
    [ptx.as_bytes(), b"\0"].concat()
}

pub(crate) fn function(module: u64, name: &str) -> u64 {
    made!(cuModuleGetFunction, module, text(name).as_ptr().cast())
}

pub(crate) fn kernel(name: &str) -> u64 {
    function(module_of(&text(PTX)), name)
}

/// A launch of as many blocks of as many threads.
pub(crate) fn launch(
    function: u64,
    [blocks, threads]: [u32; 2],
    shared: u32,
    stream: u64,
    params: &[*const c_void],
) -> u32 {
    code!(
        cuLaunchKernel,
        function,
        blocks,
        1,
        1,
        threads,
        1,
        1,
        shared,
        stream,
        params.as_ptr(),
        std::ptr::null()
    )
}

pub(crate) fn address_of<T>(value: &T) -> *const c_void {
    std::ptr::from_ref(value).cast()
}

/// A fat binary with entries of a kind, an architecture, flags and a payload.
pub(crate) fn fat_binary(entries: &[(u16, u32, u64, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, architecture, flags, payload) in entries {
        let mut header = vec![0_u8; 64];
        header[0..2].copy_from_slice(&kind.to_le_bytes());
        header[4..8].copy_from_slice(&64_u32.to_le_bytes());
        header[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        header[28..32].copy_from_slice(&architecture.to_le_bytes());
        header[40..48].copy_from_slice(&flags.to_le_bytes());
        body.extend([header.as_slice(), payload].concat());
    }
    let mut image = 0xba55_ed50_u32.to_le_bytes().to_vec();
    image.extend([1_u16.to_le_bytes(), 16_u16.to_le_bytes()].concat());
    image.extend((body.len() as u64).to_le_bytes());
    image.extend(body);
    image
}
