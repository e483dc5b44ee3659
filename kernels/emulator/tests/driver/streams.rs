//! The order of work in and between streams.

use std::ffi::c_void;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use obol_emulator::driver::Config;
use obol_emulator::driver::api::contexts::cuCtxSynchronize;
use obol_emulator::driver::api::memory::{cuMemcpyDtoHAsync_v2, cuMemsetD8Async, cuMemsetD32Async};
use obol_emulator::driver::api::streams::*;

use crate::support::*;

/// A stream that is ordered with the legacy default stream.
fn blocking_stream() -> u64 {
    made!(cuStreamCreate, 0)
}

const LEGACY: u64 = 1;
const PER_THREAD: u64 = 2;

#[test]
fn work_is_done_in_order_when_somebody_waits() {
    let _machine = machine();
    let (stream, log) = (stream(), Arc::default());
    note(stream, &log, "one");
    note(stream, &log, "two");
    assert!(notes(&log).is_empty());
    synchronize(stream);
    assert_eq!(notes(&log), ["one", "two"]);
}

#[test]
fn an_eager_machine_does_work_at_once() {
    let _machine = machine_of(Config { eager: true, ..Config::default() });
    let (stream, log) = (stream(), Arc::default());
    note(stream, &log, "one");
    assert_eq!(notes(&log), ["one"]);
}

#[test]
fn a_query_does_the_work_and_says_that_it_was_not_done() {
    let _machine = machine();
    let (stream, event, log) = (stream(), event(), Arc::default());
    note(stream, &log, "one");
    ok!(cuEventRecord, event, stream);
    note(stream, &log, "two");
    assert_eq!(code!(cuEventQuery, event), NOT_READY);
    assert_eq!(notes(&log), ["one"], "what is behind the event waits");
    ok!(cuEventQuery, event);
    assert_eq!(code!(cuStreamQuery, stream), NOT_READY);
    ok!(cuStreamQuery, stream);
    assert_eq!(notes(&log), ["one", "two"]);
}

#[test]
fn a_stream_waits_for_the_event_of_another() {
    let _machine = machine();
    let (first, second, event, log) = (stream(), stream(), event(), Arc::default());
    note(first, &log, "first");
    ok!(cuEventRecord, event, first);
    note(first, &log, "not waited for");
    ok!(cuStreamWaitEvent, second, event, 0);
    note(second, &log, "second");
    synchronize(second);
    assert_eq!(notes(&log), ["first", "second"]);
    synchronize(first);
    assert_eq!(notes(&log), ["first", "second", "not waited for"]);
}

#[test]
fn a_wait_is_for_the_record_before_it() {
    let _machine = machine();
    let (first, second, event, log) = (stream(), stream(), event(), Arc::default());
    ok!(cuStreamWaitEvent, second, event, 0);
    note(first, &log, "early");
    ok!(cuEventRecord, event, first);
    ok!(cuStreamWaitEvent, second, event, 0);
    note(first, &log, "late");
    ok!(cuEventRecord, event, first);
    note(second, &log, "second");
    ok!(cuEventDestroy_v2, event);
    synchronize(second);
    assert_eq!(notes(&log), ["early", "second"]);
}

#[test]
fn the_legacy_stream_is_ordered_with_blocking_streams() {
    let _machine = machine();
    let (blocking, free, log) = (blocking_stream(), stream(), Arc::default());
    note(blocking, &log, "blocking");
    note(free, &log, "free");
    note(LEGACY, &log, "legacy");
    note(blocking, &log, "after");
    synchronize(blocking);
    assert_eq!(notes(&log), ["blocking", "legacy", "after"]);
    note(PER_THREAD, &log, "thread");
    synchronize(0);
    assert_eq!(notes(&log), ["blocking", "legacy", "after", "thread"]);
    ok!(cuCtxSynchronize);
    assert_eq!(notes(&log).last(), Some(&"free"));
}

#[test]
fn events_give_the_time_between_them() {
    extern "C" fn nap(_: *mut c_void) {
        thread::sleep(Duration::from_millis(5));
    }
    let _machine = machine();
    let (stream, before, after) = (stream(), event(), event());
    ok!(cuEventRecord, before, stream);
    ok!(cuLaunchHostFunc, stream, Some(nap), std::ptr::null_mut());
    ok!(cuEventRecord, after, stream);
    let mut milliseconds = 0_f32;
    assert_eq!(code!(cuEventElapsedTime_v2, &raw mut milliseconds, before, after), NOT_READY);
    ok!(cuEventSynchronize, after);
    ok!(cuEventElapsedTime_v2, &raw mut milliseconds, before, after);
    assert!(milliseconds >= 5.0, "{milliseconds} ms around a nap of 5");
    ok!(cuEventElapsedTime_v2, &raw mut milliseconds, after, before);
    assert!(milliseconds <= -5.0);
}

#[test]
fn an_event_without_time_or_record_gives_none() {
    let _machine = machine();
    let (stream, timed) = (stream(), event());
    let untimed: u64 = made!(cuEventCreate, 2);
    let mut milliseconds = 0_f32;
    assert_eq!(code!(cuEventElapsedTime_v2, &raw mut milliseconds, timed, timed), 400, "never recorded");
    ok!(cuEventRecord, timed, stream);
    ok!(cuEventRecord, untimed, stream);
    synchronize(stream);
    assert_eq!(code!(cuEventElapsedTime_v2, &raw mut milliseconds, timed, untimed), 400);
    let unused: u64 = made!(cuEventCreate, 0);
    ok!(cuEventQuery, unused);
}

#[test]
fn a_destroyed_stream_does_its_work() {
    let _machine = machine();
    let (stream, log) = (stream(), Arc::default());
    note(stream, &log, "one");
    ok!(cuStreamDestroy_v2, stream);
    assert_eq!(notes(&log), ["one"]);
    assert_eq!(code!(cuStreamSynchronize, stream), 400);
    assert_eq!(code!(cuStreamDestroy_v2, stream), 400);
}

#[test]
fn threads_use_streams_of_one_machine() {
    let machine = machine();
    let targets: Vec<u64> = (0..4).map(|_| device_of(&[0_u8; 1000])).collect();
    thread::scope(|scope| {
        for (value, &target) in (1..).zip(&targets) {
            let driver = &machine.driver;
            scope.spawn(move || {
                let _entered = driver.enter();
                use_device(0);
                let stream = stream();
                for _ in 0..50 {
                    ok!(cuMemsetD8Async, target, value, 1000, stream);
                    synchronize(stream);
                }
            });
        }
    });
    for (value, target) in (1..).zip(targets) {
        assert_eq!(read::<u8>(target, 1000), [value; 1000]);
    }
}

/// Each thread has a stream and an event. Again and again it puts a number into its memory, waits for an
/// event of another thread and copies that one's number, which can then only have grown.
#[test]
fn threads_that_wait_for_each_others_events_all_get_on() {
    const THREADS: usize = 3;
    const TURNS: u32 = 200;
    let machine = machine();
    let numbers: Vec<u64> = (0..THREADS).map(|_| device_of(&[0_u32])).collect();
    let events: Vec<u64> = (0..THREADS).map(|_| event()).collect();
    let turns = |own: usize| {
        let _entered = machine.driver.enter();
        use_device(0);
        let (stream, seen) = (stream(), Pinned::of(&[0; TURNS as usize]));
        let mut random = own as u32 + 1;
        for turn in 0..TURNS {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let other = (own + 1 + random as usize / 7 % (THREADS - 1)) % THREADS;
            ok!(cuMemsetD32Async, numbers[own], turn + 1, 1, stream);
            ok!(cuEventRecord, events[own], stream);
            ok!(cuStreamWaitEvent, stream, events[other], 0);
            // SAFETY: the turn is one of those there is room for.
            let to = unsafe { seen.address().cast::<u32>().add(turn as usize) };
            ok!(cuMemcpyDtoHAsync_v2, to.cast(), numbers[(own + 1) % THREADS], 4, stream);
            if random.is_multiple_of(5) {
                synchronize(stream);
            }
        }
        synchronize(stream);
        assert!(seen.values().is_sorted(), "{:?}", seen.values());
        assert!(seen.values().iter().all(|&number| number <= TURNS));
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|own| {
                scope.spawn({
                    let turns = &turns;
                    move || turns(own)
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    });
    for number in numbers {
        assert_eq!(read::<u32>(number, 1), [TURNS]);
    }
}

#[test]
fn a_full_stream_makes_room_by_doing_its_work() {
    let _machine = machine();
    let (stream, log) = (stream(), Arc::default());
    for _ in 0..2000 {
        note(stream, &log, "");
    }
    let early = notes(&log).len();
    assert!(early > 0 && early < 2000, "{early} entries were done while enqueueing");
    synchronize(stream);
    assert_eq!(notes(&log).len(), 2000);
}
