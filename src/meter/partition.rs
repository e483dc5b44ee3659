//! The device's life cut into half-open intervals, each booked once.
//!
//! Invariant: the house classes plus all steps handed out sum to the cursor, and the cursor only
//! moves forward.

use crate::units::DeviceNanos;
use crate::usage::HouseTime;

#[derive(Debug, Default)]
pub struct Partition {
    cursor: DeviceNanos,
    /// In the order of `HouseTime::ALL`.
    house: [DeviceNanos; HouseTime::ALL.len()],
    steps: DeviceNanos,
}

impl Partition {
    /// Where the books stand: everything before this instant is accounted for.
    #[must_use]
    pub fn cursor(&self) -> DeviceNanos {
        self.cursor
    }

    #[must_use]
    pub fn house(&self) -> &[DeviceNanos; HouseTime::ALL.len()] {
        &self.house
    }

    /// Books everything from the cursor to `now` to a house class. An instant before the cursor
    /// books nothing.
    pub fn book(&mut self, class: HouseTime, now: DeviceNanos) {
        if now > self.cursor {
            self.house[class as usize] += now - self.cursor;
            self.cursor = now;
        }
    }

    /// Books a step from `start` to `end`: what lies between the cursor and `start` was the host's
    /// doing. Returns the step's time, which the caller splits over its sequences.
    #[must_use]
    pub fn step(&mut self, start: DeviceNanos, end: DeviceNanos) -> DeviceNanos {
        self.book(HouseTime::HostGap, start);
        let end = end.max(self.cursor);
        let time = end - self.cursor;
        self.cursor = end;
        self.steps += time;
        time
    }

    /// Moves part of a step's time, already taken out by `step`, to a house class.
    pub fn return_to_house(&mut self, class: HouseTime, part: DeviceNanos) {
        self.steps = self.steps - part;
        self.house[class as usize] += part;
    }

    /// Time of steps charged to requests so far.
    #[must_use]
    pub fn charged(&self) -> DeviceNanos {
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nanosecond_is_booked_once() {
        let mut p = Partition::default();
        p.book(HouseTime::Load, DeviceNanos(100));
        p.book(HouseTime::Idle, DeviceNanos(150));
        let step = p.step(DeviceNanos(170), DeviceNanos(400));
        assert_eq!(step, DeviceNanos(230));
        p.return_to_house(HouseTime::Preemption, DeviceNanos(30));
        p.book(HouseTime::Idle, DeviceNanos(400)); // nothing left to book
        p.book(HouseTime::Idle, DeviceNanos(390)); // the past is closed
        assert_eq!(p.house(), &[20, 50, 100, 0, 30].map(DeviceNanos));
        assert_eq!(p.charged() + p.house().iter().copied().sum(), p.cursor());
    }

    #[test]
    fn a_step_that_seems_to_start_before_the_cursor_is_clipped() {
        let mut p = Partition::default();
        p.book(HouseTime::Idle, DeviceNanos(100));
        assert_eq!(p.step(DeviceNanos(90), DeviceNanos(120)), DeviceNanos(20));
        assert_eq!(p.step(DeviceNanos(90), DeviceNanos(110)), DeviceNanos(0));
        assert_eq!(p.cursor(), DeviceNanos(120));
    }
}
