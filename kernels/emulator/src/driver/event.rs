//! Events: points of streams, and when they were reached.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::Driver;
use super::capture::Safety;
use super::codes::{Error, Result};
use super::perform::Op;
use super::queue::{Entry, Point, StreamId};
use super::state::State;

/// The event carries no time.
const DISABLE_TIMING: u32 = 2;
const FLAGS: u32 = 7;

/// When a record was reached.
pub(super) type Mark = OnceLock<Instant>;

/// A mark that can be put into streams again and again.
#[derive(Debug)]
pub(super) struct Event {
    device: usize,
    flags: u32,
    last: Record,
}

/// Where an event was recorded last.
#[derive(Clone, Debug)]
enum Record {
    Never,
    At(Point, Arc<Mark>),
    /// In a capture, behind these of its nodes.
    Captured(u64, BTreeSet<usize>),
}

impl State {
    fn event(&self, event: u64) -> Result<&Event> {
        self.events.get(&event).ok_or(Error::INVALID_HANDLE)
    }

    /// Where an event stands in its stream; `None` where it was never recorded.
    fn point_of(&mut self, event: u64) -> Result<Option<Point>> {
        match self.event(event)?.last.clone() {
            Record::Never => Ok(None),
            Record::At(point, _) => Ok(Some(point)),
            Record::Captured(capture, _) => {
                self.invalidate(capture);
                Err(Error::CAPTURED_EVENT)
            }
        }
    }

    /// The moment an event was reached.
    fn moment(&self, event: u64) -> Result<Instant> {
        let event = self.event(event)?;
        if event.flags & DISABLE_TIMING != 0 {
            return Err(Error::INVALID_HANDLE);
        }
        match &event.last {
            Record::Never => Err(Error::INVALID_HANDLE),
            Record::At(_, mark) => mark.get().copied().ok_or(Error::NOT_READY),
            Record::Captured(..) => Err(Error::CAPTURED_EVENT),
        }
    }

    /// The device an event was made on.
    fn device_of_event(&self, event: u64) -> Result<usize> {
        self.event(event).map(|event| event.device)
    }
}

impl Driver {
    /// `cuEventCreate`.
    pub(super) fn create_event(&self, device: usize, flags: u32) -> Result<u64> {
        if flags & !FLAGS != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let mut state = self.lock();
        let handle = state.handle();
        state.events.insert(handle, Event { device, flags, last: Record::Never });
        Ok(handle)
    }

    /// `cuEventDestroy`. Work that waits for it goes on when its point is reached.
    pub(super) fn destroy_event(&self, event: u64) -> Result<()> {
        self.lock().events.remove(&event).map(drop).ok_or(Error::INVALID_HANDLE)
    }

    /// `cuEventRecord`.
    pub(super) fn record(&self, event: u64, id: StreamId) -> Result<()> {
        let mut state = self.lock();
        let stream = &state.streams[&id];
        if state.device_of_event(event)? != stream.device {
            return Err(Error::INVALID_HANDLE);
        }
        if let Some(capture) = stream.capture {
            let frontier = state.frontier(capture, id)?;
            state.events.get_mut(&event).expect("looked up above").last = Record::Captured(capture, frontier);
            return Ok(());
        }
        state.check_legacy(id)?;
        state.healthy(state.streams[&id].device)?;
        let mark = Arc::new(Mark::new());
        let point = state.push(id, Entry::Work(Op::Record(Arc::clone(&mark))));
        state.events.get_mut(&event).expect("looked up above").last = Record::At(point, mark);
        self.pushed(state, id)
    }

    /// `cuStreamWaitEvent`.
    pub(super) fn wait_for_event(&self, id: StreamId, event: u64) -> Result<()> {
        let mut state = self.lock();
        let capturing = state.streams[&id].capture;
        match (state.event(event)?.last.clone(), capturing) {
            (Record::Never, _) => Ok(()),
            (Record::At(point, _), None) => {
                state.check_legacy(id)?;
                state.healthy(state.streams[&id].device)?;
                state.push(id, Entry::Wait(point));
                self.pushed(state, id)
            }
            (Record::At(..), Some(capture)) => {
                state.invalidate(capture);
                Err(Error::STREAM_CAPTURE_ISOLATION)
            }
            (Record::Captured(of, frontier), _) => state.join(id, of, &frontier),
        }
    }

    /// `cuEventSynchronize`.
    pub(super) fn synchronize_event(&self, event: u64) -> Result<()> {
        let (device, point) = self.event_point(event)?;
        match point {
            Some(point) => self.wait(device, point),
            None => Ok(()),
        }
    }

    /// `cuEventQuery`.
    pub(super) fn query_event(&self, event: u64) -> Result<()> {
        let (device, point) = self.event_point(event)?;
        match point {
            Some(point) => self.query(device, point),
            None => Ok(()),
        }
    }

    fn event_point(&self, event: u64) -> Result<(usize, Option<Point>)> {
        let mut state = self.lock();
        let device = state.device_of_event(event)?;
        state.healthy(device)?;
        let point = state.point_of(event)?;
        state.check_safe(Safety::Unsafe)?;
        Ok((device, point))
    }

    /// `cuEventElapsedTime`: milliseconds from one event to another.
    pub(super) fn elapsed(&self, start: u64, end: u64) -> Result<f32> {
        let state = self.lock();
        let device = state.device_of_event(start)?;
        state.healthy(device)?;
        if state.device_of_event(end)? != device {
            return Err(Error::INVALID_HANDLE);
        }
        let (start, end) = (state.moment(start)?, state.moment(end)?);
        let seconds = match end.checked_duration_since(start) {
            Some(later) => later.as_secs_f64(),
            None => -start.duration_since(end).as_secs_f64(),
        };
        Ok((seconds * 1e3) as f32)
    }
}
