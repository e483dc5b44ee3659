//! Threads that find out which tokens may come next, while the device is at work on the step that will ask.

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

use crate::request::{Guide, GuideError};

/// The threads. They end when no guide and no copy of this is left.
#[derive(Clone)]
pub(super) struct Masks {
    jobs: Sender<Job>,
}

/// Before a text's first token.
pub(super) struct Start {
    pub(super) matcher: Matcher,
    pub(super) allowed: SimpleVob,
}

/// Where a text stands.
enum Place {
    Start(Arc<Start>),
    Within(Box<Matcher>),
}

/// The token that a text goes on with.
struct Job {
    place: Place,
    drawn: u32,
    done: Sender<Done>,
}

struct Done {
    matcher: Box<Matcher>,
    allowed: Result<SimpleVob, GuideError>,
}

impl Masks {
    pub(super) fn new(threads: usize) -> Self {
        let (jobs, inbox) = channel::<Job>();
        let inbox = Arc::new(Mutex::new(inbox));
        for index in 0..threads.max(1) {
            let inbox = Arc::clone(&inbox);
            std::thread::Builder::new()
                .name(format!("grammar-{index}"))
                .spawn(move || work(&inbox))
                .expect("a thread for grammars");
        }
        Self { jobs }
    }

    /// A guide for a text that has not begun.
    pub(super) fn guide(&self, start: Arc<Start>) -> MaskGuide {
        MaskGuide { masks: self.clone(), state: State::Beginning(start) }
    }
}

fn work(inbox: &Mutex<Receiver<Job>>) {
    loop {
        // Nobody panics with the lock held.
        let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { place, drawn, done }) = job else { return };
        let mut matcher = match place {
            Place::Start(start) => Box::new(start.matcher.deep_clone()),
            Place::Within(matcher) => matcher,
        };
        let allowed = matcher.consume_token(drawn).and_then(|()| matcher.compute_mask_or_eos());
        let allowed = match allowed {
            Ok(allowed) if allowed.is_zero() => Err(GuideError("no token may come next".to_owned())),
            Ok(allowed) => Ok(allowed),
            Err(error) => Err(GuideError(super::tidy(&error.to_string()))),
        };
        // The sequence may have ended meanwhile.
        let _gone = done.send(Done { matcher, allowed });
    }
}

/// Why there is no answer from the threads: only a bug ends one.
fn gone() -> GuideError {
    GuideError("its thread has failed".to_owned())
}

pub(super) struct MaskGuide {
    masks: Masks,
    state: State,
}

enum State {
    Beginning(Arc<Start>),
    /// A thread is at it.
    Looking(Receiver<Done>),
    Known(Box<Matcher>, SimpleVob),
    Failed(GuideError),
}

impl MaskGuide {
    fn look(&mut self, place: Place, drawn: u32) {
        let (done, outcome) = channel();
        let sent = self.masks.jobs.send(Job { place, drawn, done });
        self.state = sent.map_or_else(|_| State::Failed(gone()), |()| State::Looking(outcome));
    }
}

impl fmt::Debug for MaskGuide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MaskGuide").finish_non_exhaustive()
    }
}

impl Guide for MaskGuide {
    fn allowed(&mut self) -> Result<&[u32], GuideError> {
        if let State::Looking(outcome) = &self.state {
            self.state = match outcome.recv() {
                Ok(Done { matcher, allowed: Ok(allowed) }) => State::Known(matcher, allowed),
                Ok(Done { allowed: Err(error), .. }) => State::Failed(error),
                Err(_) => State::Failed(gone()),
            };
        }
        match &self.state {
            State::Beginning(start) => Ok(start.allowed.as_slice()),
            State::Known(_, allowed) => Ok(allowed.as_slice()),
            State::Failed(error) => Err(error.clone()),
            State::Looking(_) => unreachable!("it was waited for"),
        }
    }

    fn drew(&mut self, token: u32) {
        match std::mem::replace(&mut self.state, State::Failed(gone())) {
            State::Beginning(start) => self.look(Place::Start(start), token),
            State::Known(matcher, _) => self.look(Place::Within(matcher), token),
            // Nothing is drawn before it is known what may be.
            other => self.state = other,
        }
    }
}
