//! Steps that the device has and that were not read yet: who takes part in each, and with what weight. Knows no
//! device, clock or token.

use std::collections::VecDeque;

use crate::units::DeviceNanos;

use super::lines::Line;
use super::sequence::{Part, RequestKey, Sequence};

/// A sequence's part in a step, as it was when the device was given the step.
pub(super) struct Member {
    pub(super) request: RequestKey,
    pub(super) choice: u32,
    pub(super) line: Line,
    /// Tokens that it computes.
    pub(super) rows: usize,
    /// The place of its draw among the step's.
    pub(super) draw: Option<usize>,
    /// Whether it computes prompt tokens.
    pub(super) prefill: bool,
    pub(super) part: Part,
}

#[derive(Default)]
pub(super) struct Flight {
    /// In the order of `running`.
    pub(super) members: Vec<Member>,
    /// When the device was given the step.
    pub(super) submitted: DeviceNanos,
    /// The device had another step then.
    pub(super) behind: bool,
}

/// The member's place in `running`, which is not before `from`: both are in order of arrival.
pub(super) fn find(running: &[Sequence], from: usize, member: &Member) -> usize {
    let place = |s: &Sequence| (s.request, s.choice) == (member.request, member.choice);
    from + running[from..].iter().position(place).expect("what takes part in a step still runs")
}

/// In the order in which the device was given them.
#[derive(Default)]
pub(super) struct Flights {
    flying: VecDeque<Flight>,
    /// To be used again.
    spare: Vec<Flight>,
}

impl Flights {
    pub(super) fn len(&self) -> usize {
        self.flying.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flight> {
        self.flying.iter()
    }

    /// An empty flight, to be filled and sent off.
    pub(super) fn fresh(&mut self) -> Flight {
        self.spare.pop().unwrap_or_default()
    }

    pub(super) fn take_off(&mut self, flight: Flight) {
        self.flying.push_back(flight);
    }

    /// The oldest; it is to be given back.
    pub(super) fn land(&mut self) -> Option<Flight> {
        self.flying.pop_front()
    }

    pub(super) fn give_back(&mut self, mut flight: Flight) {
        flight.members.clear();
        self.spare.push(flight);
    }
}
