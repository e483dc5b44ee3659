//! The thread pool: every task once, panics reach the caller, callers take turns.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use obol_kernels::Pool;

fn check_once(pool: &Pool, tasks: usize) {
    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    pool.run(tasks, &|task| {
        counts[task].fetch_add(1, Ordering::Relaxed);
    });
    for (task, count) in counts.iter().enumerate() {
        assert_eq!(count.load(Ordering::Relaxed), 1, "task {task} of {tasks}");
    }
}

#[test]
fn runs_every_task_once() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 7, 64, 1000] {
            check_once(&pool, tasks);
        }
    }
}

#[test]
fn survives_many_tiny_sections() {
    let pool = Pool::new(4);
    for i in 0..20_000 {
        check_once(&pool, i % 9);
    }
}

#[test]
fn wakes_parked_workers() {
    let pool = Pool::new(3);
    for _ in 0..20 {
        check_once(&pool, 8);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    for threads in [1, 2, 4] {
        let pool = Pool::new(threads);
        for bad in [0, 5, 31] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(32, &|task| assert!(task != bad, "task {task} fails"));
            }));
            let payload = result.expect_err("the panic was lost");
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("task {bad} fails")));
            check_once(&pool, 32);
        }
    }
}

#[test]
fn concurrent_callers_take_turns() {
    let pool = Pool::new(3);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..500).for_each(|i| check_once(&pool, i % 17)));
        }
    });
}

#[test]
fn a_task_may_start_tasks() {
    let pool = Pool::new(2);
    let count = AtomicUsize::new(0);
    pool.run(4, &|_| {
        pool.run(4, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(count.into_inner(), 16);
}

#[test]
fn a_worker_index_is_held_by_one_task_at_a_time() {
    let pool = Pool::new(4);
    let busy: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
    pool.run_indexed(2000, &|worker, _| {
        assert_eq!(busy[worker].fetch_add(1, Ordering::SeqCst), 0, "worker {worker} runs two tasks");
        busy[worker].fetch_sub(1, Ordering::SeqCst);
    });
}

#[test]
fn what_runs_beside_runs_once_on_the_calling_thread_while_others_are_at_work() {
    let caller = std::thread::current().id();
    for threads in [1, 3] {
        let pool = Pool::new(threads);
        let calls = AtomicUsize::new(0);
        let mut other = || {
            assert_eq!(std::thread::current().id(), caller);
            calls.fetch_add(1, Ordering::Relaxed);
            // A section of its own is done alone, on this thread.
            check_once(&pool, 5);
        };
        Pool::beside(&mut other, || {
            check_once(&pool, 1);
            check_once(&pool, 7);
            check_once(&pool, 7);
        });
        assert_eq!(calls.swap(0, Ordering::Relaxed), 1, "{threads} threads");
        Pool::beside(&mut other, || {});
        assert_eq!(calls.load(Ordering::Relaxed), 1, "no section to run beside");
    }
    // With another thread at work the tasks do not wait for it.
    let pool = Pool::new(2);
    let begun = AtomicUsize::new(0);
    let mut other = || {
        while begun.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
    };
    let task = |_: usize| {
        begun.fetch_add(1, Ordering::Release);
    };
    Pool::beside(&mut other, || pool.run(4, &task));
    assert_eq!(begun.load(Ordering::Relaxed), 4);
}

#[test]
fn a_panic_beside_a_section_reaches_the_caller_when_the_section_is_over() {
    let pool = Pool::new(2);
    let mut other = || panic!("beside");
    let ended = catch_unwind(AssertUnwindSafe(|| Pool::beside(&mut other, || pool.run(9, &|_| {}))));
    assert_eq!(*ended.expect_err("the panic").downcast_ref::<&str>().expect("a message"), "beside");
    check_once(&pool, 9);
    // A body that fails before any section leaves nothing behind for the next one.
    let mut never = || panic!("not reached");
    let ended = catch_unwind(AssertUnwindSafe(|| Pool::beside(&mut never, || panic!("body"))));
    ended.expect_err("the body's");
    check_once(&pool, 9);
}
