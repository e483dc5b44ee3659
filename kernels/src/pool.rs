//! A thread pool for many short parallel sections, one at a time.
//!
//! Workers spin briefly for the next section and then park, so that the pool neither costs microseconds in a
//! step nor burns a core between steps. Each worker has a share of neighbouring tasks, which it takes one by one
//! and in order, so that what it reads streams by; then it helps the others with theirs. So a worker that lost
//! its core holds back only the task it has. Knows nothing of what the tasks do.
//!
//! Invariants: `run` returns only when every task is done or skipped after a panic; a worker touches the
//! job only while it holds a task of that job.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// The task function of a section: (worker, task).
type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// What one section runs.
struct Job<'a> {
    tasks: usize,
    f: Task<'a>,
}

/// One worker's tasks of a section, in a cache line of its own: the section's number (high half) and how many
/// nobody has taken yet (low half).
#[repr(align(128))]
#[derive(Default)]
struct Share(AtomicU64);

/// Where worker `index`'s share of `tasks` begins; the next one's beginning is its end.
fn share_start(index: usize, workers: usize, tasks: usize) -> usize {
    index * tasks / workers
}

/// Turns of the spin loop before a thread parks: some 50 microseconds.
const SPINS: u32 = 2_000;

thread_local! {
    /// The worker index of this thread while it runs a task.
    static INSIDE: Cell<Option<usize>> = const { Cell::new(None) };
    /// What [`Pool::beside`] was given, until this thread's next section has begun.
    static BESIDE: Cell<Option<*mut dyn FnMut()>> = const { Cell::new(None) };
}

/// Threads that run the tasks of one section after another; the calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held during a section: concurrent callers take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The section's number.
    section: AtomicU64,
    shares: Vec<Share>,
    /// Points to the caller's `Job`.
    job: AtomicPtr<()>,
    /// Tasks not yet done.
    pending: AtomicUsize,
    panicked: AtomicBool,
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    /// Workers that parked.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// Set while the caller parks for the last tasks.
    caller_waits: AtomicBool,
    caller: Mutex<Option<Thread>>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data under these locks is valid at every point, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] included (at least 1).
    ///
    /// # Panics
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            section: AtomicU64::new(0),
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            job: AtomicPtr::new(std::ptr::null_mut()),
            pending: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            caller_waits: AtomicBool::new(false),
            caller: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map(|worker| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("obol-cpu-{worker}"))
                    .spawn(move || shared.work(worker))
                    .expect("the system refused a thread")
            })
            .collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// Threads that take part in a section.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(0)` to `f(tasks - 1)`, each once, in any order, and returns when all are done.
    ///
    /// Concurrent callers take turns. A call from inside a task runs its tasks on that thread.
    ///
    /// # Panics
    /// With the payload of the first task that panicked; tasks not yet begun are then skipped.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.run_indexed(tasks, &|_, task| f(task));
    }

    /// As [`Pool::run`], with `f(worker, task)`; `worker < threads()` is no one else's during the task.
    pub fn run_indexed(&self, tasks: usize, f: Task<'_>) {
        if let Some(worker) = INSIDE.get() {
            return (0..tasks).for_each(|task| f(worker, task));
        }
        if tasks == 0 {
            return;
        }
        let _turn = lock(&self.turn);
        if tasks == 1 || self.workers.is_empty() {
            let _inside = Inside::enter(0);
            return (0..tasks).for_each(|task| f(0, task));
        }
        self.shared.section(tasks, f);
    }

    /// Runs `body`, and on this thread `other` once, as soon as other threads are at work: in the first section
    /// of `body` that is shared out, before this thread takes tasks of it; after `body` when none is.
    /// What `other` asks of a pool it does alone.
    pub fn beside<R>(other: &mut dyn FnMut(), body: impl FnOnce() -> R) -> R {
        struct Clear;
        impl Drop for Clear {
            fn drop(&mut self) {
                BESIDE.set(None);
            }
        }
        let short: *mut (dyn FnMut() + '_) = other;
        // SAFETY: only the lifetime changes; `Clear` takes the pointer away before `other`'s borrow ends.
        let long =
            unsafe { std::mem::transmute::<*mut (dyn FnMut() + '_), *mut (dyn FnMut() + 'static)>(short) };
        BESIDE.set(Some(long));
        let _clear = Clear;
        let result = body();
        if let Some(other) = BESIDE.take() {
            // SAFETY: `other` is still borrowed, and nobody else has the pointer now.
            unsafe { (*other)() };
        }
        result
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics; one that died of something else has nothing to say here.
            worker.join().expect("a pool worker ends by itself; this is a bug");
        }
    }
}

/// Marks this thread as inside a task; restores what was before, also on a panic.
struct Inside(Option<usize>);

impl Inside {
    fn enter(worker: usize) -> Self {
        Self(INSIDE.replace(Some(worker)))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

impl Shared {
    /// One section, from the calling thread (worker 0), which holds the turn.
    fn section(&self, tasks: usize, f: Task<'_>) {
        assert!(u32::try_from(tasks).is_ok(), "tasks of a section fit 32 bits");
        let job = Job { tasks, f };
        self.job.store(std::ptr::from_ref(&job).cast_mut().cast(), Ordering::Relaxed);
        self.pending.store(tasks, Ordering::Relaxed);
        let number = self.section.load(Ordering::Relaxed).wrapping_add(1) & 0xffff_ffff;
        let workers = self.shares.len();
        for (index, share) in self.shares.iter().enumerate() {
            let count = share_start(index + 1, workers, tasks) - share_start(index, workers, tasks);
            share.0.store(number << 32 | count as u64, Ordering::Release);
        }
        self.section.store(number, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
        if let Some(other) = BESIDE.take() {
            let _inside = Inside::enter(0);
            // SAFETY: `Pool::beside` keeps it borrowed until its body, and so this section, has ended.
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| unsafe { (*other)() })) {
                self.keep_panic(payload);
            }
        }
        self.take_tasks(number, 0);
        self.await_last();
        if self.panicked.swap(false, Ordering::Acquire) {
            let payload = lock(&self.payload).take().expect("a panic left its payload; this is a bug");
            resume_unwind(payload);
        }
    }

    /// Takes tasks of section `number`, its own share first, until none is left.
    fn take_tasks(&self, number: u64, worker: usize) {
        let workers = self.shares.len();
        for turn in 0..workers {
            let owner = (worker + turn) % workers;
            while let Some((job, left)) = self.take(number, owner) {
                let task = share_start(owner + 1, workers, job.tasks) - left;
                self.run_task(job, worker, task);
            }
        }
    }

    /// Takes the first of the tasks that are left of a share in section `number`; how many there were with it.
    fn take(&self, number: u64, owner: usize) -> Option<(&Job<'_>, usize)> {
        let share = &self.shares[owner].0;
        loop {
            let ticket = share.load(Ordering::Acquire);
            // This is section `number`'s job if the exchange below succeeds: with a task left the section
            // cannot have ended in between.
            let job = self.job.load(Ordering::Relaxed);
            let left = ticket & 0xffff_ffff;
            if ticket >> 32 != number || left == 0 {
                return None;
            }
            if share.compare_exchange_weak(ticket, ticket - 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                // SAFETY: a task of this section is held, so `section` has not returned and its job is alive.
                return Some((unsafe { &*job.cast_const().cast::<Job<'_>>() }, left as usize));
            }
        }
    }

    /// Runs a task that was taken, and gives it back as done; the job may be gone then.
    fn run_task(&self, job: &Job<'_>, worker: usize, task: usize) {
        if !self.panicked.load(Ordering::Relaxed) {
            let _inside = Inside::enter(worker);
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (job.f)(worker, task))) {
                self.keep_panic(payload);
            }
        }
        if self.pending.fetch_sub(1, Ordering::SeqCst) == 1
            && worker != 0
            && self.caller_waits.load(Ordering::SeqCst)
            && let Some(caller) = lock(&self.caller).as_ref()
        {
            caller.unpark();
        }
    }

    /// The first panic of a section is the one that its caller sees.
    fn keep_panic(&self, payload: Box<dyn Any + Send>) {
        lock(&self.payload).get_or_insert(payload);
        self.panicked.store(true, Ordering::Release);
    }

    /// Waits for the tasks that other threads still hold.
    fn await_last(&self) {
        for _ in 0..SPINS {
            if self.pending.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        *lock(&self.caller) = Some(thread::current());
        self.caller_waits.store(true, Ordering::SeqCst);
        while self.pending.load(Ordering::SeqCst) != 0 {
            thread::park();
        }
        self.caller_waits.store(false, Ordering::SeqCst);
    }

    /// A worker's life.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            let number = self.next_section(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            self.take_tasks(number, worker);
            seen = number;
        }
    }

    /// Spins, then sleeps, until there is another section than `seen` or the pool stops.
    fn next_section(&self, seen: u64) -> u64 {
        let ready = || {
            let number = self.section.load(Ordering::SeqCst);
            (number != seen || self.stop.load(Ordering::SeqCst)).then_some(number)
        };
        for _ in 0..SPINS {
            if let Some(number) = ready() {
                return number;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let number = loop {
            if let Some(number) = ready() {
                break number;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        number
    }
}
