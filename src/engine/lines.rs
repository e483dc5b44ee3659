//! Sequences that wait: a line for each tenant and tier. Knows no counter, block or device.
//!
//! Invariant: each line is in order of arrival.

use std::collections::VecDeque;
use std::ops::Range;

use super::fair::Account;
use super::sequence::{RequestKey, Sequence};
use crate::request::Tier;

/// A line's number: account `a` has as many as there are tiers, from `TIERS * a` on.
pub(super) type Line = usize;

const TIERS: usize = Tier::ALL.len();

pub(super) fn line(account: Account, tier: Tier) -> Line {
    TIERS * account + tier as usize
}

pub(super) fn account(line: Line) -> Account {
    line / TIERS
}

pub(super) fn tier(line: Line) -> Tier {
    Tier::ALL[line % TIERS]
}

/// The lines of an account.
pub(super) fn of(account: Account) -> Range<Line> {
    TIERS * account..TIERS * (account + 1)
}

/// Whether it waits for nothing but its tenant's turn.
pub(super) fn takes_turns(line: Line) -> bool {
    tier(line) <= Tier::Default
}

#[derive(Default)]
pub(super) struct Lines {
    lines: Vec<VecDeque<Sequence>>,
    len: usize,
    /// Whose line was served or left to its end last, of those that take turns.
    last: Account,
}

fn place(sequence: &Sequence) -> (RequestKey, u32) {
    (sequence.request, sequence.choice)
}

impl Lines {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The sequence that is so many places behind the line's head.
    pub(super) fn get(&self, line: Line, behind: usize) -> Option<&Sequence> {
        self.lines.get(line)?.get(behind)
    }

    /// Sequences of the request at the line's head: all of them, next to each other.
    pub(super) fn of_head(&self, line: Line) -> usize {
        let Some(line) = self.lines.get(line) else { return 0 };
        line.front().map_or(0, |head| line.partition_point(|sequence| sequence.request <= head.request))
    }

    /// Lines in which somebody waits.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Line> {
        self.lines.iter().enumerate().filter(|(_, line)| !line.is_empty()).map(|(line, _)| line)
    }

    /// Accounts whose sequences wait for nothing but their turn.
    pub(super) fn accounts(&self) -> impl Iterator<Item = Account> {
        self.waiting().filter(|line| takes_turns(*line)).map(account)
    }

    /// Of the tenant that was the last to wait for nothing but its turn.
    pub(super) fn last(&self) -> Account {
        self.last
    }

    pub(super) fn insert(&mut self, sequence: Sequence) {
        let line = sequence.line;
        if line >= self.lines.len() {
            self.lines.resize_with(line + 1, VecDeque::new);
        }
        let line = &mut self.lines[line];
        line.insert(line.partition_point(|s| place(s) < place(&sequence)), sequence);
        self.len += 1;
    }

    pub(super) fn pop(&mut self, line: Line) -> Option<Sequence> {
        let sequence = self.lines.get_mut(line)?.pop_front();
        self.left(line, usize::from(sequence.is_some()));
        sequence
    }

    pub(super) fn remove(&mut self, line: Line, request: RequestKey, choice: u32) -> Option<Sequence> {
        let sequences = self.lines.get_mut(line)?;
        let sequence = sequences.remove(sequences.binary_search_by_key(&(request, choice), place).ok()?);
        self.left(line, usize::from(sequence.is_some()));
        sequence
    }

    /// Removes all of a request, and gives the numbers of its choices.
    pub(super) fn remove_all(&mut self, line: Line, request: RequestKey) -> Vec<u32> {
        let Some(sequences) = self.lines.get_mut(line) else { return Vec::new() };
        let (from, to) = (
            sequences.partition_point(|s| s.request < request),
            sequences.partition_point(|s| s.request <= request),
        );
        let choices: Vec<u32> = sequences.drain(from..to).map(|s| s.choice).collect();
        self.left(line, choices.len());
        choices
    }

    fn left(&mut self, line: Line, sequences: usize) {
        self.len -= sequences;
        if sequences > 0 && takes_turns(line) && self.lines[line].is_empty() {
            self.last = account(line);
        }
    }
}
