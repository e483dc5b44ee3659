//! Mistakes that a kernel is stopped for, and what is said of them.

use crate::support::{Arguments, Device, arguments};
use obol_emulator::exec::WarpOrder;
use obol_emulator::fault::{Fault, FaultKind};

/// `k(data)` with the thread's index in `%tid` and the address of its word in `%rd2`.
fn kernel(body: &str) -> String {
    format!(
        "
.visible .entry k(.param .u64 data)
{{
	.reg .pred %p<8>;
	.reg .b32 %r<16>, %tid;
	.reg .f32 %f<8>;
	.reg .b64 %rd<8>;
	.shared .align 4 .b8 cells[256];
	ld.param.u64 %rd1, [data];
	mov.u32 %tid, %tid.x;
	mul.wide.u32 %rd3, %tid, 4;
	add.s64 %rd2, %rd1, %rd3;
	shl.b32 %r1, %tid, 2;
	{body}
	ret;
}}"
    )
}

/// The fault of the kernel in one block of 64 threads, on 64 words of memory.
fn fault(body: &str) -> Fault {
    let device = Device::new(&kernel(body));
    let data = device.room::<u32>(64);
    device.run("k", 1, 64, &arguments![data]).expect_err("it is stopped")
}

#[test]
fn a_global_read_behind_an_allocation_is_found() {
    let fault = fault("ld.global.u32 %r2, [%rd2+128];");
    assert!(matches!(fault.kind, FaultKind::OutOfBounds { bytes: 4, .. }));
    assert_eq!(fault.place.thread, Some([32, 0, 0]));
    assert_eq!(fault.place.block, Some([0, 0, 0]));
    let text = fault.to_string();
    assert!(text.starts_with("out-of-bounds access of 4 bytes at 0x"), "{text}");
    let place = " in kernel k, block (0, 0, 0), thread (32, 0, 0), at: ld.global.u32 %r2, [%rd2+128]";
    assert!(text.ends_with(place), "{text}");
}

#[test]
fn a_write_to_memory_that_was_given_back_is_found() {
    let device = Device::new(&kernel("st.global.u32 [%rd2], %tid;"));
    let data = device.room::<u32>(64);
    device.run("k", 1, 64, &arguments![data]).expect("the memory lives");
    assert!(device.memory.free(data));
    let fault = device.run("k", 1, 64, &arguments![data]).expect_err("it is gone");
    assert!(matches!(fault.kind, FaultKind::OutOfBounds { .. }));
}

#[test]
fn a_shared_access_behind_the_end_is_found() {
    let fault = fault("mov.u32 %r2, cells; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3+4], %tid;");
    assert_eq!(fault.kind, FaultKind::SharedOutOfBounds { address: 256, bytes: 4, size: 256 });
    assert_eq!(fault.place.thread, Some([63, 0, 0]));
}

#[test]
fn a_misaligned_access_is_found() {
    let fault = fault("ld.global.v2.u32 {%r2, %r3}, [%rd1+4];");
    assert!(matches!(fault.kind, FaultKind::Misaligned { bytes: 8, .. }));
}

#[test]
fn a_barrier_that_part_of_a_warp_comes_to_is_found() {
    let fault = fault("setp.eq.u32 %p1, %tid, 0; @!%p1 bra $end; bar.sync 0; $end:");
    assert_eq!(fault.kind, FaultKind::Barrier { waiting: 1, missing: 31 });
    assert_eq!(fault.place.instruction.as_deref(), Some("bar.sync 0"));
}

#[test]
fn a_barrier_that_one_warp_does_not_come_to_is_found() {
    let fault = fault("setp.ge.u32 %p1, %tid, 32; @%p1 bra $end; bar.sync 0; $end:");
    assert_eq!(fault.kind, FaultKind::Barrier { waiting: 32, missing: 32 });
}

#[test]
fn a_shuffle_with_missing_lanes_is_found() {
    let body = "setp.lt.u32 %p1, %tid, 7; @!%p1 bra $end; shfl.sync.bfly.b32 %r2, %tid, 1, 31, -1; $end:
	bar.warp.sync -1;";
    let fault = fault(body);
    assert_eq!(fault.kind, FaultKind::MissingLanes { members: u32::MAX, arrived: 0x7f });
    assert!(fault.place.instruction.expect("is known").starts_with("shfl.sync.bfly.b32"));
}

/// Warp 1 reads what warp 0 writes, behind a barrier or not.
fn exchange(barrier: &str) -> String {
    kernel(&format!(
        "mov.u32 %r2, cells;
	xor.b32 %r3, %r1, 128;
	add.u32 %r4, %r2, %r1;
	add.u32 %r5, %r2, %r3;
	cvt.rn.f32.u32 %f1, %tid;
	st.shared.f32 [%r4], %f1;
	{barrier}
	ld.shared.f32 %f2, [%r5];
	st.global.f32 [%rd2], %f2;"
    ))
}

#[test]
fn a_missing_barrier_reads_nan_or_is_a_race() {
    let run = |barrier, order, racecheck| {
        let mut device = Device::new(&exchange(barrier));
        device.options.warp_order = order;
        device.options.racecheck = racecheck;
        let data = device.room::<f32>(64);
        device.run("k", 1, 64, &arguments![data]).map(|_| device.get::<f32>(data, 64))
    };
    let right: Vec<f32> = (0..64).map(|t| (t ^ 32) as f32).collect();
    for order in [WarpOrder::Forward, WarpOrder::Reverse] {
        assert_eq!(run("bar.sync 0;", order, true).expect("no race"), right);
        let wrong = run("", order, false).expect("runs");
        assert_eq!(wrong.iter().filter(|v| v.is_nan()).count(), 32, "the first warp reads what nobody wrote");
        let fault = run("", order, true).expect_err("a race");
        assert!(matches!(fault.kind, FaultKind::Race { .. }), "{fault}");
    }
}

#[test]
fn atomics_of_two_warps_do_not_race_but_a_read_beside_them_does() {
    let run = |body: &str| {
        let mut device = Device::new(&kernel(body));
        device.options.racecheck = true;
        let data = device.room::<u32>(64);
        device.run("k", 1, 64, &arguments![data])
    };
    run("atom.shared.add.u32 %r2, [cells], 1;").expect("atomics are ordered");
    let fault = run("red.shared.add.u32 [cells], 1; ld.shared.u32 %r2, [cells];").expect_err("a race");
    assert!(matches!(fault.kind, FaultKind::Race { address: 0, other_warp: 0 }), "{fault}");
}

#[test]
fn memory_that_nobody_wrote_is_nan() {
    let body = "ld.global.f32 %f1, [%rd2]; ld.shared.f32 %f2, [cells]; add.f32 %f3, %f1, %f2;
	st.global.f32 [%rd2], %f3;";
    let device = Device::new(&kernel(body));
    let data = device.room::<f32>(64);
    device.run("k", 1, 64, &arguments![data]).expect("runs");
    assert!(device.get::<f32>(data, 64).iter().all(|v| v.is_nan()));
}

#[test]
fn traps_and_failed_asserts_are_told() {
    assert_eq!(fault("setp.eq.u32 %p1, %tid, 9; @%p1 trap;").kind, FaultKind::Trap);
    let text = format!(
        "
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 message[6] = {{120, 32, 62, 32, 48, 0}};
.global .align 1 .b8 file[5] = {{97, 46, 99, 117, 0}};
{}",
        kernel(
            "{
	.param .b64 param0; .param .b64 param1; .param .b32 param2; .param .b64 param3; .param .b64 param4;
	mov.u64 %rd4, message;
	st.param.b64 [param0], %rd4;
	mov.u64 %rd5, file;
	st.param.b64 [param1], %rd5;
	st.param.b32 [param2], 39;
	st.param.b64 [param3], %rd5;
	st.param.b64 [param4], 1;
	call.uni __assertfail, (param0, param1, param2, param3, param4);
	}"
        )
    );
    let device = Device::new(&text);
    let data = device.room::<u32>(64);
    let fault = device.run("k", 1, 64, &arguments![data]).expect_err("the assert fails");
    assert_eq!(fault.kind, FaultKind::Assert("x > 0 (a.cu:39)".to_owned()));
}

#[test]
fn an_instruction_that_is_not_had_stops_only_who_comes_to_it() {
    let text =
        kernel("setp.gt.u32 %p1, %tid, 63; @%p1 bra $rare; bra.uni $end; $rare: tex.1d.v4.f32 %f1; $end:");
    let device = Device::new(&text);
    let data = device.room::<u32>(65);
    device.run("k", 1, 64, &arguments![data]).expect("nobody comes there");
    let fault = device.run("k", 1, 65, &arguments![data]).expect_err("one thread does");
    assert_eq!(fault.kind, FaultKind::Unsupported("tex is not known".to_owned()));
    assert_eq!(fault.place.instruction.as_deref(), Some("tex.1d.v4.f32 %f1"));
    let listed = device.module.function("k").expect("is there").unsupported().expect("decodes");
    assert_eq!(listed, ["tex.1d.v4.f32 %f1 (tex is not known)"]);
}

#[test]
fn launches_that_no_device_takes_are_refused() {
    let device = Device::new(&kernel(""));
    let refused = |grid, block, arguments: &Arguments| {
        let fault = device.run("k", grid, block, arguments).expect_err("refused");
        assert!(matches!(fault.kind, FaultKind::Launch(_)), "{fault}");
    };
    refused(0, 1, &arguments![0_u64]);
    refused(1, 0, &arguments![0_u64]);
    refused(1, 1025, &arguments![0_u64]);
    refused(1, 1, &arguments![]);
}
