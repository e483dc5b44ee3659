//! Lanes that part and meet, calls, barriers, shared memory and asynchronous copies.

use crate::support::{Device, arguments};
use obol_emulator::exec::WarpOrder;

/// A kernel `k(out, n)` of one block, whose body has the thread's index in `%tid` and the address of
/// its 32-bit result in `%to`, and leaves the result in `%r0`.
fn kernel(before: &str, body: &str) -> String {
    format!(
        "{before}
.visible .entry k(.param .u64 out, .param .u32 n)
{{
	.reg .pred %p<16>;
	.reg .b16 %h<16>;
	.reg .b32 %r<64>, %tid, %n;
	.reg .f32 %f<64>;
	.reg .b64 %rd<32>, %to;
	mov.u32 %tid, %tid.x;
	ld.param.u32 %n, [n];
	ld.param.u64 %rd30, [out];
	cvta.to.global.u64 %rd31, %rd30;
	mul.wide.u32 %rd29, %tid, 4;
	add.s64 %to, %rd31, %rd29;
	{body}
	st.global.u32 [%to], %r0;
	ret;
}}"
    )
}

/// Runs the kernel with `threads` threads in both orders of warps; the results must agree.
fn run(before: &str, body: &str, threads: u32, n: u32) -> Vec<u32> {
    let mut device = Device::new(&kernel(before, body));
    let mut results = [WarpOrder::Forward, WarpOrder::Reverse].map(|order| {
        device.options.warp_order = order;
        let out = device.room::<u32>(threads as usize);
        let launched = device.launch("k", [[1; 3], [threads, 1, 1]], 4096, &arguments![out, n]);
        launched.expect("runs");
        device.get::<u32>(out, threads as usize)
    });
    assert_eq!(results[0], results[1], "the order of warps changes nothing");
    std::mem::take(&mut results[0])
}

fn each(threads: u32, f: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..threads).map(f).collect()
}

#[test]
fn lanes_loop_as_often_as_each_of_them_wants() {
    let body = "
	mov.u32 %r0, 0;
	mov.u32 %r1, 0;
	rem.u32 %r2, %tid, 7;
$loop:
	setp.ge.u32 %p1, %r1, %r2;
	@%p1 bra $done;
	add.u32 %r1, %r1, 1;
	and.b32 %r3, %r1, 1;
	setp.eq.u32 %p2, %r3, 0;
	@!%p2 bra $odd;
	add.u32 %r0, %r0, %tid;
	bra.uni $loop;
$odd:
	add.u32 %r0, %r0, 1;
	bra.uni $loop;
$done:
	add.u32 %r0, %r0, %n;";
    let expected = |t: u32| t % 7 / 2 * t + (t % 7).div_ceil(2) + 5;
    assert_eq!(run("", body, 70, 5), each(70, expected));
}

#[test]
fn lanes_that_exit_early_leave_the_others_running() {
    let body = "
	mov.u32 %r0, 1;
	st.global.u32 [%to], %r0;
	setp.lt.u32 %p1, %tid, %n;
	@%p1 exit;
	mov.u32 %r0, 2;";
    assert_eq!(run("", body, 50, 33), each(50, |t| if t < 33 { 1 } else { 2 }));
}

#[test]
fn lanes_meet_again_behind_a_branch() {
    // Lock-step counts: activemask after the branch must be whole again.
    let body = "
	and.b32 %r1, %tid, 3;
	setp.eq.u32 %p1, %r1, 0;
	@%p1 bra $a;
	add.u32 %r2, %tid, 1;
	bra.uni $join;
$a:
	add.u32 %r2, %tid, 2;
$join:
	activemask.b32 %r0;";
    assert_eq!(run("", body, 64, 0), each(64, |_| u32::MAX));
}

#[test]
fn indexed_branches_go_where_the_table_says() {
    let body = "
	and.b32 %r1, %tid, 3;
	$table: .branchtargets $a, $b, $c, $a;
	brx.idx %r1, $table;
$a:
	mov.u32 %r0, 10;
	bra.uni $end;
$b:
	mov.u32 %r0, 20;
	bra.uni $end;
$c:
	mov.u32 %r0, 30;
$end:";
    assert_eq!(run("", body, 40, 0), each(40, |t| [10, 20, 30, 10][t as usize % 4]));
}

#[test]
fn nested_calls_pass_arguments_and_results_lane_by_lane() {
    let before = "
.func (.param .b32 back) square(.param .b32 a)
{
	.reg .b32 %r<4>;
	ld.param.u32 %r1, [a];
	mul.lo.u32 %r2, %r1, %r1;
	st.param.b32 [back], %r2;
	ret;
}
.func (.param .b32 back) sum(.param .b32 a, .param .b64 count)
{
	.reg .pred %p<2>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<4>;
	ld.param.u32 %r1, [a];
	ld.param.u64 %rd1, [count];
	cvt.u32.u64 %r2, %rd1;
	mov.u32 %r3, 0;
$next:
	setp.eq.u32 %p1, %r2, 0;
	@%p1 bra $out;
	{
	.param .b32 param0;
	.param .b32 retval0;
	add.u32 %r4, %r1, %r2;
	st.param.b32 [param0+0], %r4;
	call.uni (retval0), square, (param0);
	ld.param.b32 %r5, [retval0+0];
	}
	add.u32 %r3, %r3, %r5;
	sub.u32 %r2, %r2, 1;
	bra.uni $next;
$out:
	st.param.b32 [back], %r3;
	ret;
}";
    let body = "
	mov.u32 %r0, 7;
	and.b32 %r1, %tid, 1;
	setp.eq.u32 %p1, %r1, 1;
	@%p1 bra $skip;
	{
	.param .b32 param0;
	.param .b64 param1;
	.param .b32 retval0;
	st.param.b32 [param0], %tid;
	and.b32 %r2, %tid, 3;
	cvt.u64.u32 %rd1, %r2;
	st.param.b64 [param1], %rd1;
	call (retval0), sum, (param0, param1);
	ld.param.b32 %r0, [retval0];
	}
$skip:
	activemask.b32 %r3;
	and.b32 %r3, %r3, 1;
	add.u32 %r0, %r0, %r3;";
    let expected = |t: u32| {
        let sum: u32 = (1..=t % 4).map(|k| (t + k) * (t + k)).sum();
        1 + if t % 2 == 1 { 7 } else { sum }
    };
    assert_eq!(run(before, body, 64, 0), each(64, expected));
}

#[test]
fn shared_memory_carries_values_across_warps() {
    let body = "
	.shared .align 4 .b8 cells[1024];
	mov.u32 %r1, cells;
	shl.b32 %r2, %tid, 2;
	add.u32 %r3, %r1, %r2;
	mul.lo.u32 %r4, %tid, 3;
	st.shared.u32 [%r3], %r4;
	bar.sync 0;
	mov.u32 %r5, %ntid.x;
	sub.u32 %r5, %r5, %tid;
	shl.b32 %r5, %r5, 2;
	add.u32 %r6, %r1, %r5;
	ld.shared.u32 %r0, [%r6+-4];";
    assert_eq!(run("", body, 200, 0), each(200, |t| (199 - t) * 3));
}

#[test]
fn dynamic_shared_memory_lies_behind_the_static_part() {
    let before = ".extern .shared .align 16 .b8 dynamic[];";
    let body = "
	.shared .align 4 .b8 own[4];
	mov.u64 %rd1, dynamic;
	cvta.shared.u64 %rd2, %rd1;
	shl.b32 %r2, %tid, 2;
	cvt.u64.u32 %rd3, %r2;
	add.s64 %rd4, %rd2, %rd3;
	st.u32 [%rd4], %tid;
	setp.eq.u32 %p1, %tid, 0;
	@%p1 st.shared.u32 [own], 1000;
	bar.sync 0;
	xor.b32 %r2, %r2, 4;
	mov.u32 %r3, dynamic;
	add.u32 %r3, %r3, %r2;
	ld.shared.u32 %r4, [%r3];
	ld.shared.u32 %r5, [own];
	add.u32 %r0, %r4, %r5;";
    assert_eq!(run(before, body, 96, 0), each(96, |t| (t ^ 1) + 1000));
}

#[test]
fn barriers_count_and_vote() {
    let body = "
	setp.lt.u32 %p1, %tid, %n;
	bar.red.popc.u32 %r0, 0, %p1;
	bar.red.and.pred %p2, 0, %p1;
	bar.red.or.pred %p3, 1, !%p1;
	selp.u32 %r1, 1000, 0, %p2;
	selp.u32 %r2, 10000, 0, %p3;
	add.u32 %r0, %r0, %r1;
	add.u32 %r0, %r0, %r2;";
    assert_eq!(run("", body, 100, 37), each(100, |_| 10_037));
    assert_eq!(run("", body, 100, 100), each(100, |_| 1_100));
}

#[test]
fn a_named_barrier_waits_for_its_own_threads_only() {
    // Warps 0 and 1 meet at barrier 1; warps 2 and 3 do not come by.
    let body = "
	.shared .align 4 .b8 cells[256];
	mov.u32 %r0, %tid;
	setp.ge.u32 %p1, %tid, 64;
	@%p1 bra $end;
	shl.b32 %r1, %tid, 2;
	mov.u32 %r2, cells;
	add.u32 %r3, %r2, %r1;
	st.shared.u32 [%r3], %tid;
	bar.sync 1, 64;
	xor.b32 %r1, %r1, 128;
	add.u32 %r3, %r2, %r1;
	ld.shared.u32 %r0, [%r3];
$end:
	bar.sync 0;";
    assert_eq!(run("", body, 128, 0), each(128, |t| if t < 64 { t ^ 32 } else { t }));
}

#[test]
fn local_memory_is_each_threads_own() {
    let body = "
	.local .align 16 .b8 depot[32];
	mov.u64 %rd1, depot;
	cvta.local.u64 %rd2, %rd1;
	add.u32 %r1, %tid, 1;
	st.local.v2.u32 [depot+8], {%tid, %r1};
	and.b32 %r2, %tid, 1;
	mul.wide.u32 %rd3, %r2, 4;
	add.s64 %rd4, %rd2, %rd3;
	ld.u32 %r0, [%rd4+8];";
    assert_eq!(run("", body, 64, 0), each(64, |t| t + t % 2));
}

#[test]
fn asynchronous_copies_arrive_at_the_wait_that_covers_them() {
    // Before the wait the cell holds what it held; behind it, what was copied. `%n` bytes are copied
    // of the second group, the rest is zero.
    let before = ".global .align 16 .u32 source[8] = {11, 12, 13, 14, 21, 22, 23, 24};";
    let body = "
	.shared .align 16 .b8 cells[32];
	mov.u32 %r1, cells;
	st.shared.v4.u32 [cells], {1, 2, 3, 4};
	mov.u64 %rd1, source;
	cp.async.cg.shared.global [%r1], [%rd1], 16;
	cp.async.commit_group;
	cp.async.ca.shared.global.L2::128B [%r1+16], [%rd1+16], 16, %n;
	cp.async.commit_group;
	ld.shared.u32 %r2, [cells+4];
	cp.async.wait_group 1;
	ld.shared.u32 %r3, [cells+4];
	ld.shared.u32 %r4, [cells+20];
	cp.async.wait_all;
	ld.shared.u32 %r5, [cells+20];
	ld.shared.u32 %r6, [cells+24];
	mov.u32 %r0, 0;
	setp.eq.u32 %p1, %r2, 2;
	@%p1 add.u32 %r0, %r0, 1;
	setp.eq.u32 %p1, %r3, 12;
	@%p1 add.u32 %r0, %r0, 10;
	setp.eq.u32 %p1, %r4, -1;
	@%p1 add.u32 %r0, %r0, 100;
	setp.eq.u32 %p1, %r5, 22;
	@%p1 add.u32 %r0, %r0, 1000;
	setp.eq.u32 %p1, %r6, 0;
	@%p1 add.u32 %r0, %r0, 10000;";
    assert_eq!(run(before, body, 1, 8), [11_111]);
}

#[test]
fn shuffles_votes_and_reductions_join_lanes() {
    let shuffle = |text: &str, f: fn(u32) -> u32| {
        let body = format!("{text}\n selp.u32 %r5, 1000, 0, %p1;\n add.u32 %r0, %r0, %r5;");
        assert_eq!(run("", &body, 32, 0), each(32, f), "{text}");
    };
    shuffle("shfl.sync.bfly.b32 %r0|%p1, %tid, 5, 31, -1;", |t| (t ^ 5) + 1000);
    shuffle("shfl.sync.down.b32 %r0|%p1, %tid, 3, 31, -1;", |t| if t < 29 { t + 1003 } else { t });
    shuffle("shfl.sync.up.b32 %r0|%p1, %tid, 3, 0, -1;", |t| if t >= 3 { t + 997 } else { t });
    shuffle("shfl.sync.idx.b32 %r0|%p1, %tid, 3, 0x181f, -1;", |t| t / 8 * 8 + 1003);
    shuffle("setp.gt.u32 %p2, %tid, 29; vote.sync.ballot.b32 %r0, %p2, -1; setp.eq.u32 %p1, 0, 1;", |_| {
        0xc000_0000
    });
    shuffle("setp.gt.u32 %p2, %tid, 29; mov.u32 %r0, 1; vote.sync.any.pred %p1, %p2, -1;", |_| 1001);
    shuffle("setp.gt.u32 %p2, %tid, 29; mov.u32 %r0, 1; vote.sync.all.pred %p1, !%p2, -1;", |_| 1);
    shuffle("redux.sync.add.s32 %r0, %tid, -1; setp.eq.u32 %p1, 0, 1;", |_| 496);
    shuffle("redux.sync.max.u32 %r0, %tid, -1; setp.eq.u32 %p1, 0, 1;", |_| 31);
    shuffle("shr.u32 %r1, %tid, 3; match.any.sync.b32 %r0, %r1, -1; setp.eq.u32 %p1, 0, 1;", |t| {
        0xff << (t / 8 * 8)
    });
}

#[test]
fn halves_of_a_warp_may_shuffle_apart() {
    // Both halves come to the shuffle at different times, each with its own members.
    let body = "
	setp.lt.u32 %p1, %tid, 16;
	@%p1 bra $low;
	shfl.sync.bfly.b32 %r0, %tid, 1, 31, 0xffff0000;
	bra.uni $end;
$low:
	shfl.sync.bfly.b32 %r0, %tid, 2, 31, 0xffff;
$end:
	bar.warp.sync -1;";
    assert_eq!(run("", body, 32, 0), each(32, |t| if t < 16 { t ^ 2 } else { t ^ 1 }));
}

#[test]
fn threads_know_where_they_are() {
    let text = "
.visible .entry k(.param .u64 out)
{
	.reg .b32 %r<32>;
	.reg .b64 %rd<8>;
	ld.param.u64 %rd1, [out];
	mov.u32 %r1, %ctaid.x;
	mov.u32 %r2, %ctaid.y;
	mov.u32 %r3, %ctaid.z;
	mov.u32 %r4, %nctaid.x;
	mov.u32 %r5, %nctaid.y;
	mad.lo.u32 %r6, %r3, %r5, %r2;
	mad.lo.u32 %r6, %r6, %r4, %r1;
	mov.u32 %r7, %tid.x;
	mov.u32 %r8, %tid.y;
	mov.u32 %r9, %tid.z;
	mov.u32 %r10, %ntid.x;
	mov.u32 %r11, %ntid.y;
	mov.u32 %r12, %ntid.z;
	mad.lo.u32 %r13, %r9, %r11, %r8;
	mad.lo.u32 %r13, %r13, %r10, %r7;
	mul.lo.u32 %r14, %r10, %r11;
	mul.lo.u32 %r14, %r14, %r12;
	mad.lo.u32 %r15, %r6, %r14, %r13;
	mul.wide.u32 %rd2, %r15, 4;
	add.s64 %rd3, %rd1, %rd2;
	mov.u32 %r16, %laneid;
	mov.u32 %r17, %warpid;
	mad.lo.u32 %r18, %r17, 32, %r16;
	mad.lo.u32 %r18, %r6, 1000, %r18;
	st.global.u32 [%rd3], %r18;
	ret;
}";
    let device = Device::new(text);
    let (grid, block) = ([3, 4, 2], [5, 7, 3]);
    let (blocks, threads) = (24, 105);
    let out = device.room::<u32>(blocks * threads);
    device.launch("k", [grid, block], 0, &arguments![out]).expect("runs");
    let expected: Vec<u32> =
        (0..blocks as u32).flat_map(|b| (0..threads as u32).map(move |t| 1000 * b + t)).collect();
    assert_eq!(device.get::<u32>(out, blocks * threads), expected);
}
