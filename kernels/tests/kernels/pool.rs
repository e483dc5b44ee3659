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
