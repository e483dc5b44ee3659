//! Tasks: an agent's whole run, of many calls, and the ceilings that halt one that runs away.
//!
//! Counts calls, how deep they are nested, and how often the same prompt came one after the other. What a run costs
//! is a budget's affair (`Scope::Task`).
//!
//! Does not know: what a prompt says (it sees a hash), HTTP. Invariant: a call that is refused changes no count but
//! that of refusals.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::units::{RequestId, UnixNanos};

/// Runs are forgotten when they were quiet for so long, once there are many.
const QUIET: u64 = 24 * 3_600 * 1_000_000_000;
const KNOWN_MAX: usize = 100_000;
/// Calls of a run whose depth is remembered for calls below them.
const CALLS_KNOWN_MAX: usize = 10_000;

/// What one run may do. `None`: no ceiling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ceilings {
    pub calls: Option<u64>,
    /// Of nested calls; a call that no other made is at depth 1.
    pub depth: Option<u64>,
    /// The same prompt so many times one after the other.
    pub repeats: Option<u64>,
}

/// One call of a run.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    pub request: &'a RequestId,
    /// As the client says.
    pub depth: Option<u64>,
    /// The call that made this one.
    pub parent: Option<&'a str>,
    /// Of the prompt.
    pub hash: u64,
}

/// Why a run was halted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halted {
    Calls { most: u64 },
    Depth { depth: u64, most: u64 },
    Repeats { most: u64 },
}

impl std::fmt::Display for Halted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Calls { most } => write!(f, "this task has made its {most} calls; begin a new task"),
            Self::Depth { depth, most } => {
                write!(f, "this call is nested {depth} deep, and a task may be {most} deep")
            }
            Self::Repeats { most } => {
                write!(
                    f,
                    "this task has sent the same prompt {most} times one after the other; it seems to loop"
                )
            }
        }
    }
}

/// What a run has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    pub calls: u64,
    /// Of the deepest call.
    pub depth: u64,
    /// How often the last prompt came.
    pub repeats: u64,
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Run {
    progress: Progress,
    hash: Option<u64>,
    depths: HashMap<String, u64>,
    last: UnixNanos,
}

/// All runs; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Tasks(Arc<Mutex<HashMap<(String, String), Run>>>);

impl Tasks {
    fn runs(&self) -> MutexGuard<'_, HashMap<(String, String), Run>> {
        // Each change is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call of `tenant`'s run `task`, if it stands.
    ///
    /// # Errors
    /// Which ceiling it would pass.
    pub fn call(
        &self,
        tenant: &str,
        task: &str,
        call: &Call<'_>,
        ceilings: &Ceilings,
        now: UnixNanos,
    ) -> Result<Called, Halted> {
        let mut runs = self.runs();
        if runs.len() >= KNOWN_MAX {
            runs.retain(|_, run| now.0.saturating_sub(run.last.0) < QUIET);
        }
        let run = runs.entry((tenant.to_owned(), task.to_owned())).or_default();
        run.last = now;
        let below = call.parent.map(|parent| run.depths.get(parent).copied().unwrap_or(1) + 1);
        let depth = call.depth.unwrap_or(1).max(below.unwrap_or(1));
        let repeats = if run.hash == Some(call.hash) { run.progress.repeats + 1 } else { 1 };
        let halted = match *ceilings {
            Ceilings { calls: Some(most), .. } if run.progress.calls >= most => Some(Halted::Calls { most }),
            Ceilings { depth: Some(most), .. } if depth > most => Some(Halted::Depth { depth, most }),
            Ceilings { repeats: Some(most), .. } if repeats > most => Some(Halted::Repeats { most }),
            _ => None,
        };
        if let Some(halted) = halted {
            run.progress.refused += 1;
            return Err(halted);
        }
        let Progress { calls, refused, .. } = run.progress;
        run.progress = Progress { calls: calls + 1, depth: depth.max(run.progress.depth), repeats, refused };
        run.hash = Some(call.hash);
        if run.depths.len() >= CALLS_KNOWN_MAX {
            // A call so long ago makes none any more; those that do are as deep as they say themselves.
            run.depths.clear();
        }
        run.depths.insert(call.request.0.clone(), depth);
        drop(runs);
        let run = (tenant.to_owned(), task.to_owned());
        Ok(Called { tasks: self.clone(), run, request: call.request.clone(), stands: false })
    }

    /// Counts a call that was made before this server started.
    pub fn replay(&self, tenant: &str, task: &str, at: UnixNanos) {
        let mut runs = self.runs();
        let run = runs.entry((tenant.to_owned(), task.to_owned())).or_default();
        run.progress.calls += 1;
        run.progress.depth = run.progress.depth.max(1);
        run.last = run.last.max(at);
    }

    #[must_use]
    pub fn progress(&self, tenant: &str, task: &str) -> Option<Progress> {
        self.runs().get(&(tenant.to_owned(), task.to_owned())).map(|run| run.progress)
    }
}

/// A call that is counted. Dropped before it stands it was refused by somebody else.
#[must_use]
#[derive(Debug)]
pub struct Called {
    tasks: Tasks,
    run: (String, String),
    request: RequestId,
    stands: bool,
}

impl Called {
    /// The call is made.
    pub fn stands(mut self) {
        self.stands = true;
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        if self.stands {
            return;
        }
        let mut runs = self.tasks.runs();
        let Some(run) = runs.get_mut(&self.run) else { return };
        run.progress.calls -= 1;
        run.progress.refused += 1;
        run.progress.repeats = run.progress.repeats.saturating_sub(1);
        run.depths.remove(&self.request.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

    fn call(
        tasks: &Tasks,
        task: &str,
        id: &str,
        ceilings: Ceilings,
        with: impl Fn(&mut Call<'_>),
    ) -> Result<(), Halted> {
        let request = RequestId(id.to_owned());
        let mut call = Call { request: &request, depth: None, parent: None, hash: 0 };
        call.hash = id.bytes().map(u64::from).sum();
        with(&mut call);
        tasks.call("a", task, &call, &ceilings, NOW).map(Called::stands)
    }

    #[test]
    fn a_run_ends_at_its_calls() {
        let (tasks, ceilings) = (Tasks::default(), Ceilings { calls: Some(2), ..Ceilings::default() });
        tasks.replay("a", "t", NOW);
        assert_eq!(call(&tasks, "t", "1", ceilings, |_| {}), Ok(()));
        assert_eq!(call(&tasks, "t", "2", ceilings, |_| {}), Err(Halted::Calls { most: 2 }));
        assert_eq!(call(&tasks, "u", "3", ceilings, |_| {}), Ok(()), "another run");
        let progress = tasks.progress("a", "t").expect("it is known");
        assert_eq!((progress.calls, progress.refused), (2, 1));
        assert_eq!(tasks.progress("b", "t"), None, "of another tenant");
    }

    #[test]
    fn a_call_that_somebody_else_refuses_is_none() {
        let (tasks, ceilings) = (Tasks::default(), Ceilings { calls: Some(1), ..Ceilings::default() });
        let request = RequestId("1".to_owned());
        let first = Call { request: &request, depth: None, parent: None, hash: 7 };
        drop(tasks.call("a", "t", &first, &ceilings, NOW).expect("there is room"));
        let progress = tasks.progress("a", "t").expect("it is known");
        assert_eq!((progress.calls, progress.repeats, progress.refused), (0, 0, 1));
        assert_eq!(call(&tasks, "t", "2", ceilings, |_| {}), Ok(()));
    }

    #[test]
    fn depth_is_what_the_call_says_or_one_below_its_parent() {
        let (tasks, ceilings) = (Tasks::default(), Ceilings { depth: Some(2), ..Ceilings::default() });
        assert_eq!(call(&tasks, "t", "1", ceilings, |_| {}), Ok(()));
        assert_eq!(call(&tasks, "t", "2", ceilings, |call| call.parent = Some("1")), Ok(()));
        let deep = Err(Halted::Depth { depth: 3, most: 2 });
        assert_eq!(call(&tasks, "t", "3", ceilings, |call| call.parent = Some("2")), deep);
        assert_eq!(call(&tasks, "t", "4", ceilings, |call| call.depth = Some(3)), deep);
        assert_eq!(tasks.progress("a", "t").expect("known").depth, 2);
    }

    #[test]
    fn the_same_prompt_again_and_again_is_a_loop() {
        let (tasks, ceilings) = (Tasks::default(), Ceilings { repeats: Some(3), ..Ceilings::default() });
        let same = |tasks: &Tasks, id: &str| call(tasks, "t", id, ceilings, |call| call.hash = 7);
        for id in ["1", "2", "3"] {
            assert_eq!(same(&tasks, id), Ok(()));
        }
        assert_eq!(same(&tasks, "4"), Err(Halted::Repeats { most: 3 }));
        assert_eq!(call(&tasks, "t", "5", ceilings, |_| {}), Ok(()), "something else");
        assert_eq!(same(&tasks, "6"), Ok(()));
    }
}
