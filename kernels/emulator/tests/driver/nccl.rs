//! Collectives of several devices.

use std::sync::Arc;
use std::thread;

use half::{bf16, f16};
use obol_emulator::driver::Config;
use obol_emulator::driver::api::memory::cuMemsetD32Async;
use obol_emulator::driver::api::streams::{cuStreamBeginCapture_v2, cuStreamEndCapture};
use obol_emulator::driver::api::{contexts, graphs, streams};
use obol_emulator::nccl::*;

use crate::support::*;

const I32: u32 = 2;
const F16: u32 = 6;
const F32: u32 = 7;
const F64: u32 = 8;
const BF16: u32 = 9;
const SUM: u32 = 0;
const MAX: u32 = 2;
const INVALID_USAGE: u32 = 5;

/// A rank with its stream, and memory with its own values.
struct Rank {
    communicator: u64,
    stream: u64,
    send: u64,
    receive: u64,
}

fn devices(count: usize) -> Machine {
    machine_of(Config { devices: count, memory_bytes: 16 << 20, ..Config::default() })
}

/// Ranks of one thread, one for each row of values.
fn ranks<T: Copy>(rows: &[&[T]], received: usize) -> Vec<Rank> {
    let mut communicators = vec![0; rows.len()];
    ok!(ncclCommInitAll, communicators.as_mut_ptr(), rows.len() as i32, std::ptr::null());
    let rank = |(rank, row): (usize, &&[T])| {
        use_device(rank as i32);
        let receive = device_of(&vec![row[0]; received]);
        Rank { communicator: communicators[rank], stream: stream(), send: device_of(row), receive }
    };
    rows.iter().enumerate().map(rank).collect()
}

fn all_reduce(rank: &Rank, count: usize, element: u32, op: u32) -> u32 {
    let Rank { communicator, stream, send, receive } = *rank;
    code!(ncclAllReduce, send as *const _, receive as *mut _, count, element, op, communicator, stream)
}

fn received<T: Copy + Default>(ranks: &[Rank], count: usize) -> Vec<Vec<T>> {
    for (device, rank) in ranks.iter().enumerate() {
        use_device(device as i32);
        synchronize(rank.stream);
    }
    ranks.iter().map(|rank| read(rank.receive, count)).collect()
}

fn check_sum<T: Copy + Default + PartialEq + std::fmt::Debug>(element: u32, rows: [&[T]; 2], sums: &[T]) {
    let _machine = devices(2);
    let ranks = ranks(&rows, sums.len());
    ok!(ncclGroupStart);
    for rank in &ranks {
        // A rank may be of another device than the thread's context.
        assert_eq!(all_reduce(rank, sums.len(), element, SUM), 0);
    }
    ok!(ncclGroupEnd);
    assert_eq!(received::<T>(&ranks, sums.len()), [sums, sums]);
}

#[test]
fn one_thread_sums_over_all_its_ranks() {
    check_sum::<f32>(F32, [&[1.0, 2.0, 3.0], &[10.0, 20.0, 30.0]], &[11.0, 22.0, 33.0]);
    check_sum::<f64>(F64, [&[0.5], &[0.25]], &[0.75]);
    check_sum::<i32>(I32, [&[-1, 7], &[3, i32::MAX]], &[2, i32::MIN + 6]);
    let (half, brain) = (f16::from_f32, bf16::from_f32);
    check_sum(F16, [&[half(1.5)], &[half(2048.0)]], &[half(2050.0)]);
    check_sum(BF16, [&[brain(1.0)], &[brain(3.0)]], &[brain(4.0)]);
}

#[test]
fn threads_with_a_rank_each_wait_for_each_other() {
    let machine = devices(3);
    let mut id = UniqueId { bytes: [0; 128] };
    ok!(ncclGetUniqueId, &raw mut id);
    let rank_of = |rank: i32| {
        let _entered = machine.driver.enter();
        use_device(rank);
        let communicator: u64 = made!(ncclCommInitRank, 3, id, rank);
        let (send, receive) = (device_of(&[rank as f32, 1.0]), device_of(&[0_f32; 2]));
        let own = Rank { communicator, stream: stream(), send, receive };
        let mut sums = Vec::new();
        for _ in 0..20 {
            assert_eq!(all_reduce(&own, 2, F32, SUM), 0);
            synchronize(own.stream);
            sums.push(read::<f32>(own.receive, 2));
        }
        ok!(ncclCommDestroy, communicator);
        sums
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|rank| scope.spawn(move || rank_of(rank))).collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic"), vec![vec![3.0, 3.0]; 20]);
        }
    });
}

#[test]
fn waiting_for_one_rank_does_what_the_others_have_before() {
    let _machine = devices(2);
    let ranks = ranks::<f32>(&[&[1.0], &[2.0]], 1);
    let log = Arc::default();
    note(ranks[0].stream, &log, "before");
    assert_eq!(all_reduce(&ranks[0], 1, F32, MAX), 0);
    note(ranks[0].stream, &log, "behind");
    assert_eq!(code!(streams::cuStreamQuery, ranks[0].stream), NOT_READY);
    assert_eq!(code!(streams::cuStreamQuery, ranks[0].stream), NOT_READY, "the other rank has not called");
    assert_eq!(all_reduce(&ranks[1], 1, F32, MAX), 0);
    synchronize(ranks[1].stream);
    assert_eq!(notes(&log), ["before"]);
    assert_eq!(received::<f32>(&ranks, 1), [[2.0], [2.0]]);
}

#[test]
fn other_shapes_go_where_they_should() {
    let _machine = devices(2);
    let ranks = ranks::<i32>(&[&[1, 2], &[10, 20]], 4);
    let buffers =
        |rank: &Rank| (rank.send as *const _, rank.receive as *mut _, rank.communicator, rank.stream);
    for rank in &ranks {
        let (send, receive, communicator, stream) = buffers(rank);
        ok!(ncclAllGather, send, receive, 2, I32, communicator, stream);
    }
    assert_eq!(received::<i32>(&ranks, 4), [[1, 2, 10, 20], [1, 2, 10, 20]]);
    for rank in &ranks {
        let (send, receive, communicator, stream) = buffers(rank);
        ok!(ncclBroadcast, send, receive, 2, I32, 1, communicator, stream);
    }
    assert_eq!(received::<i32>(&ranks, 2), [[10, 20], [10, 20]]);
    for rank in &ranks {
        let (send, receive, communicator, stream) = buffers(rank);
        ok!(ncclReduceScatter, send, receive, 1, I32, SUM, communicator, stream);
    }
    assert_eq!(received::<i32>(&ranks, 2), [[11, 20], [22, 20]]);
    for rank in &ranks {
        let (send, receive, communicator, stream) = buffers(rank);
        ok!(ncclReduce, send, receive, 2, I32, SUM, 0, communicator, stream);
    }
    assert_eq!(received::<i32>(&ranks, 2), [[11, 22], [22, 20]]);
}

#[test]
fn collectives_are_captured_and_replayed() {
    let _machine = devices(2);
    let ranks = ranks::<i32>(&[&[1], &[2]], 1);
    let mut execs = Vec::new();
    for (device, rank) in ranks.iter().enumerate() {
        use_device(device as i32);
        ok!(cuStreamBeginCapture_v2, rank.stream, 1);
        assert_eq!(all_reduce(rank, 1, I32, SUM), 0);
        let mut graph = 0;
        ok!(cuStreamEndCapture, rank.stream, &raw mut graph);
        execs.push(made!(graphs::cuGraphInstantiateWithFlags, graph, 0));
    }
    for value in [5, 6] {
        ok!(cuMemsetD32Async, ranks[0].send, value, 1, ranks[0].stream);
        for (rank, &exec) in ranks.iter().zip(&execs) {
            ok!(graphs::cuGraphLaunch, exec, rank.stream);
        }
        let sum = value as i32 + 2;
        assert_eq!(received::<i32>(&ranks, 1), [[sum], [sum]]);
    }
}

#[test]
fn ranks_that_disagree_fail() {
    let _machine = devices(2);
    let ranks = ranks::<f32>(&[&[1.0, 1.0], &[2.0, 2.0]], 2);
    assert_eq!(all_reduce(&ranks[0], 1, F32, SUM), 0);
    assert_eq!(all_reduce(&ranks[1], 2, F32, SUM), 0);
    use_device(0);
    assert_eq!(code!(streams::cuStreamSynchronize, ranks[0].stream), 719);
    let mut error = 0;
    ok!(ncclCommGetAsyncError, ranks[1].communicator, &raw mut error);
    assert_eq!(error, 1);
}

#[test]
fn a_clique_has_each_rank_and_device_once() {
    let _machine = devices(2);
    let mut id = UniqueId { bytes: [0; 128] };
    ok!(ncclGetUniqueId, &raw mut id);
    let mut communicator = 0_u64;
    ok!(ncclCommInitRank, &raw mut communicator, 2, id, 0);
    let (mut count, mut rank, mut device) = (0, 9, 9);
    ok!(ncclCommCount, communicator, &raw mut count);
    ok!(ncclCommUserRank, communicator, &raw mut rank);
    ok!(ncclCommCuDevice, communicator, &raw mut device);
    assert_eq!((count, rank, device), (2, 0, 0));
    let mut other = 0_u64;
    assert_eq!(code!(ncclCommInitRank, &raw mut other, 2, id, 1), INVALID_USAGE, "on the same device");
    use_device(1);
    assert_eq!(code!(ncclCommInitRank, &raw mut other, 2, id, 0), INVALID_USAGE);
    assert_eq!(code!(ncclCommInitRank, &raw mut other, 2, id, 2), 4);
    ok!(ncclCommInitRank, &raw mut other, 2, id, 1);
    assert_eq!(code!(ncclCommInitRank, &raw mut other, 2, UniqueId { bytes: [0; 128] }, 1), 4);
    ok!(contexts::cuCtxSynchronize);
}

#[test]
fn a_rank_that_gives_up_lets_the_others_go_on() {
    let _machine = devices(2);
    let ranks = ranks::<f32>(&[&[1.0], &[2.0]], 1);
    assert_eq!(all_reduce(&ranks[0], 1, F32, SUM), 0);
    use_device(0);
    assert_eq!(code!(streams::cuStreamQuery, ranks[0].stream), NOT_READY);
    ok!(ncclCommAbort, ranks[1].communicator);
    synchronize(ranks[0].stream);
    assert_eq!(all_reduce(&ranks[0], 1, F32, SUM), 0);
    ok!(ncclCommAbort, ranks[0].communicator);
    synchronize(ranks[0].stream);
    assert_eq!(read::<f32>(ranks[0].receive, 1), [1.0], "nothing was added");
}
