//! Capture into graphs, and what it forbids.

use std::sync::Arc;
use std::thread;

use obol_emulator::driver::api::contexts::{
    cuCtxSynchronize, cuDevicePrimaryCtxReset_v2, cuThreadExchangeStreamCaptureMode,
};
use obol_emulator::driver::api::graphs::*;
use obol_emulator::driver::api::memory::*;
use obol_emulator::driver::api::streams::*;

use crate::support::*;

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;
const ACTIVE: u32 = 1;
const INVALIDATED: u32 = 2;

fn begin(stream: u64, mode: u32) {
    ok!(cuStreamBeginCapture_v2, stream, mode);
}

fn end(stream: u64) -> u64 {
    let mut graph = 0;
    ok!(cuStreamEndCapture, stream, &raw mut graph);
    graph
}

/// Ends a capture that failed.
fn end_failed(stream: u64, expected: u32) {
    let mut graph = 1;
    assert_eq!(code!(cuStreamEndCapture, stream, &raw mut graph), expected);
    assert_eq!(graph, 0);
    let mut status = 9;
    ok!(cuStreamIsCapturing, stream, &raw mut status);
    assert_eq!(status, 0, "the stream can be used again");
}

fn exec_of(graph: u64) -> u64 {
    made!(cuGraphInstantiateWithFlags, graph, 0)
}

#[test]
fn a_capture_does_nothing_and_each_replay_does_all() {
    let _machine = machine();
    let stream = stream();
    let (source, target) = (device_of(&[1_u32, 2]), device_of(&[0_u32, 0]));
    begin(stream, THREAD_LOCAL);
    ok!(cuMemsetD32Async, source, 7, 1, stream);
    ok!(cuMemcpyDtoDAsync_v2, target, source, 8, stream);
    let graph = end(stream);
    let mut count = 0;
    ok!(cuGraphGetNodes, graph, std::ptr::null_mut(), &raw mut count);
    assert_eq!(count, 2);
    let exec = exec_of(graph);
    ok!(cuGraphDestroy, graph);
    synchronize(stream);
    assert_eq!(read::<u32>(target, 2), [0, 0]);
    for second in [2, 9] {
        ok!(cuMemsetD32_v2, source + 4, second, 1);
        ok!(cuCtxSynchronize);
        ok!(cuGraphLaunch, exec, stream);
        synchronize(stream);
        assert_eq!(read::<u32>(target, 2), [7, second]);
    }
    ok!(cuGraphLaunch, exec, stream);
    ok!(cuGraphExecDestroy, exec);
    synchronize(stream);
    assert_eq!(code!(cuGraphLaunch, exec, stream), INVALID_VALUE);
}

#[test]
fn replays_read_pinned_memory_anew() {
    let _machine = machine();
    let stream = stream();
    let target = device_of(&[0_u32]);
    let mut host = Pinned::of(&[1]);
    begin(stream, GLOBAL);
    ok!(cuMemcpyHtoDAsync_v2, target, host.address(), 4, stream);
    let exec = exec_of(end(stream));
    for value in [5, 6] {
        host.values_mut()[0] = value;
        ok!(cuGraphLaunch, exec, stream);
        synchronize(stream);
        assert_eq!(read::<u32>(target, 1), [value]);
    }
}

#[test]
fn waiting_for_a_capturing_stream_invalidates_the_capture() {
    let _machine = machine();
    let (stream, target) = (stream(), device_of(&[0_u8; 4]));
    for wait in [cuStreamSynchronize, cuStreamQuery] {
        begin(stream, RELAXED);
        assert_eq!(code!(wait, stream), CAPTURE_UNSUPPORTED);
        let mut status = 0;
        ok!(cuStreamIsCapturing, stream, &raw mut status);
        assert_eq!(status, INVALIDATED);
        assert_eq!(code!(cuMemsetD8Async, target, 0, 4, stream), CAPTURE_INVALIDATED);
        end_failed(stream, CAPTURE_INVALIDATED);
    }
    begin(stream, RELAXED);
    assert_eq!(code!(cuCtxSynchronize), CAPTURE_UNSUPPORTED);
    end_failed(stream, CAPTURE_INVALIDATED);
}

#[test]
fn copies_of_pageable_memory_cannot_be_captured() {
    let _machine = machine();
    let (stream, device) = (stream(), device_of(&[0_u32]));
    let mut host = 0_u32;
    begin(stream, RELAXED);
    assert_eq!(code!(cuMemcpyHtoDAsync_v2, device, (&raw const host).cast(), 4, stream), CAPTURE_UNSUPPORTED);
    end_failed(stream, CAPTURE_INVALIDATED);
    begin(stream, RELAXED);
    assert_eq!(code!(cuMemcpyDtoHAsync_v2, (&raw mut host).cast(), device, 4, stream), CAPTURE_UNSUPPORTED);
    end_failed(stream, CAPTURE_INVALIDATED);
}

#[test]
fn unsafe_calls_are_refused_as_the_modes_say() {
    let machine = machine();
    let stream = stream();
    let mut address = 0;
    for mode in [GLOBAL, THREAD_LOCAL] {
        begin(stream, mode);
        assert_eq!(code!(cuMemAlloc_v2, &raw mut address, 4), CAPTURE_UNSUPPORTED);
        end_failed(stream, CAPTURE_INVALIDATED);
    }
    begin(stream, RELAXED);
    ok!(cuMemAlloc_v2, &raw mut address, 4);
    end(stream);
    begin(stream, GLOBAL);
    let mut own = RELAXED;
    ok!(cuThreadExchangeStreamCaptureMode, &raw mut own);
    assert_eq!(own, GLOBAL);
    ok!(cuMemAlloc_v2, &raw mut address, 4);
    ok!(cuThreadExchangeStreamCaptureMode, &raw mut own);
    end(stream);
    let elsewhere = || {
        let _entered = machine.driver.enter();
        use_device(0);
        let mut address = 0;
        code!(cuMemAlloc_v2, &raw mut address, 4)
    };
    for (mode, expected) in [(THREAD_LOCAL, SUCCESS), (GLOBAL, CAPTURE_UNSUPPORTED)] {
        begin(stream, mode);
        let code = thread::scope(|scope| scope.spawn(elsewhere).join().expect("no panic"));
        assert_eq!(code, expected);
        if expected == SUCCESS {
            end(stream);
        } else {
            end_failed(stream, CAPTURE_INVALIDATED);
        }
    }
}

#[test]
fn a_fork_is_captured_and_must_be_joined() {
    let _machine = machine();
    let (origin, branch, fork, join) = (stream(), stream(), event(), event());
    let target = device_of(&[0_u8; 2]);
    for joined in [true, false] {
        begin(origin, GLOBAL);
        ok!(cuMemsetD8Async, target, 1, 1, origin);
        ok!(cuEventRecord, fork, origin);
        ok!(cuStreamWaitEvent, branch, fork, 0);
        let mut status = 0;
        ok!(cuStreamIsCapturing, branch, &raw mut status);
        assert_eq!(status, ACTIVE);
        ok!(cuMemsetD8Async, target + 1, 2, 1, branch);
        ok!(cuEventRecord, join, branch);
        if !joined {
            end_failed(origin, 904);
            continue;
        }
        ok!(cuStreamWaitEvent, origin, join, 0);
        let exec = exec_of(end(origin));
        assert_eq!(read::<u8>(target, 2), [0, 0]);
        ok!(cuGraphLaunch, exec, origin);
        synchronize(origin);
        assert_eq!(read::<u8>(target, 2), [1, 2]);
    }
}

#[test]
fn captured_and_other_work_cannot_depend_on_each_other() {
    let _machine = machine();
    let (stream, other, event) = (stream(), stream(), event());
    ok!(cuEventRecord, event, other);
    begin(stream, GLOBAL);
    assert_eq!(code!(cuStreamWaitEvent, stream, event, 0), 905);
    end_failed(stream, CAPTURE_INVALIDATED);
    begin(stream, GLOBAL);
    ok!(cuEventRecord, event, stream);
    assert_eq!(code!(cuEventQuery, event), 907);
    end_failed(stream, CAPTURE_INVALIDATED);
    begin(stream, GLOBAL);
    begin(other, GLOBAL);
    ok!(cuEventRecord, event, stream);
    assert_eq!(code!(cuStreamWaitEvent, other, event, 0), 902);
    end_failed(stream, CAPTURE_INVALIDATED);
    end_failed(other, CAPTURE_INVALIDATED);
}

#[test]
fn the_legacy_stream_takes_no_part_in_captures() {
    let _machine = machine();
    let target = device_of(&[0_u8; 4]);
    assert_eq!(code!(cuStreamBeginCapture_v2, 0, GLOBAL), CAPTURE_UNSUPPORTED);
    let blocking: u64 = made!(cuStreamCreate, 0);
    begin(blocking, RELAXED);
    assert_eq!(code!(cuMemsetD8Async, target, 0, 4, 0), 906);
    end_failed(blocking, CAPTURE_INVALIDATED);
    let free = stream();
    begin(free, RELAXED);
    ok!(cuMemsetD8Async, target, 0, 4, 0);
    end(free);
}

#[test]
fn captures_end_where_and_by_whom_they_began() {
    let machine = machine();
    let (stream, other) = (stream(), stream());
    let mut graph = 0;
    assert_eq!(code!(cuStreamEndCapture, stream, &raw mut graph), 401);
    begin(stream, GLOBAL);
    assert_eq!(code!(cuStreamBeginCapture_v2, stream, GLOBAL), 401);
    let elsewhere = || {
        let _entered = machine.driver.enter();
        use_device(0);
        let mut graph = 0;
        code!(cuStreamEndCapture, stream, &raw mut graph)
    };
    assert_eq!(thread::scope(|scope| scope.spawn(elsewhere).join().expect("no panic")), 908);
    let fork = event();
    ok!(cuEventRecord, fork, stream);
    ok!(cuStreamWaitEvent, other, fork, 0);
    assert_eq!(code!(cuStreamEndCapture, other, &raw mut graph), 903);
    end_failed(stream, CAPTURE_INVALIDATED);
}

#[test]
fn memory_allocated_in_a_capture_lives_as_long_as_its_graph() {
    let machine = machine();
    let stream = stream();
    let used = || {
        let (mut free, mut total) = (0_usize, 0_usize);
        ok!(cuMemGetInfo_v2, &raw mut free, &raw mut total);
        total - free
    };
    let target = device_of(&[0_u32]);
    let before = used();
    begin(stream, THREAD_LOCAL);
    let address: u64 = made!(cuMemAllocAsync, 4, stream);
    ok!(cuMemcpyDtoDAsync_v2, target, address, 4, stream);
    ok!(cuMemsetD32Async, address, 5, 1, stream);
    ok!(cuMemFreeAsync, address, stream);
    let graph = end(stream);
    assert_eq!(used(), before + 4, "the free was captured");
    let exec = exec_of(graph);
    for _ in 0..2 {
        ok!(cuGraphLaunch, exec, stream);
        synchronize(stream);
        assert_eq!(read::<u32>(target, 1), [u32::MAX], "each replay has fresh memory");
    }
    ok!(cuGraphLaunch, exec, stream);
    ok!(cuGraphDestroy, graph);
    ok!(cuGraphExecDestroy, exec);
    synchronize(stream);
    assert_eq!(used(), before);
    drop(machine);
}

#[test]
fn a_capture_frees_nothing_that_it_did_not_allocate() {
    let _machine = machine();
    let (stream, log) = (stream(), Arc::default());
    let address: u64 = made!(cuMemAllocAsync, 4, stream);
    begin(stream, GLOBAL);
    assert_eq!(code!(cuMemFreeAsync, address, stream), INVALID_VALUE);
    end_failed(stream, CAPTURE_INVALIDATED);
    ok!(cuMemFreeAsync, address, stream);
    note(stream, &log, "still works");
    synchronize(stream);
    assert_eq!(notes(&log), ["still works"]);
}

#[test]
fn an_update_replaces_values_but_not_shapes() {
    let _machine = machine();
    let stream = stream();
    let target = device_of(&[0_u32]);
    let captured = |values: &[u32]| {
        begin(stream, GLOBAL);
        for &value in values {
            ok!(cuMemsetD32Async, target, value, 1, stream);
        }
        end(stream)
    };
    let exec = exec_of(captured(&[1]));
    let mut info = UpdateInfo::default();
    ok!(cuGraphExecUpdate_v2, exec, captured(&[2]), &raw mut info);
    assert_eq!(code!(cuGraphExecUpdate_v2, exec, captured(&[3, 4]), &raw mut info), 910);
    assert_ne!(info.result, 0);
    ok!(cuGraphLaunch, exec, stream);
    synchronize(stream);
    assert_eq!(read::<u32>(target, 1), [2]);
}

#[test]
fn graphs_are_made_launchable_from_the_host_only() {
    let _machine = machine();
    let stream = stream();
    begin(stream, GLOBAL);
    let graph = end(stream);
    let mut exec = 0;
    assert_eq!(code!(cuGraphInstantiateWithFlags, &raw mut exec, graph, 1 | 4), INVALID_VALUE);
    assert_eq!(code!(cuGraphInstantiateWithFlags, &raw mut exec, graph, 4), 801);
    ok!(cuGraphInstantiateWithFlags, &raw mut exec, graph, 1 | 8);
    ok!(cuGraphUpload, exec, stream);
    ok!(cuGraphLaunch, exec, stream);
    synchronize(stream);
}

#[test]
fn a_reset_ends_graphs_and_their_memory() {
    let machine = machine();
    let stream = stream();
    begin(stream, THREAD_LOCAL);
    let address: u64 = made!(cuMemAllocAsync, 4, stream);
    let graph = end(stream);
    let exec = exec_of(graph);
    ok!(cuMemFree_v2, address);
    ok!(cuDevicePrimaryCtxReset_v2, 0);
    let mut count = 0;
    assert_eq!(code!(cuGraphGetNodes, graph, std::ptr::null_mut(), &raw mut count), INVALID_VALUE);
    assert_eq!(code!(cuGraphExecDestroy, exec), INVALID_VALUE);
    drop(machine);
}
