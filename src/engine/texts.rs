//! Texts that wait for the encoder: a line for each tenant and tier. Knows no counter, block or device.
//!
//! Invariant: each line is in order of arrival.

use std::collections::VecDeque;

use super::fair::Account;
use super::lines::{Line, account, takes_turns};
use super::sequence::RequestKey;

/// A choice of a request whose prompt waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) request: RequestKey,
    pub(super) choice: u32,
    pub(super) tokens: usize,
}

#[derive(Default)]
pub(super) struct Texts {
    lines: Vec<VecDeque<Text>>,
    len: usize,
}

impl Texts {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Behind all others of its line.
    pub(super) fn push(&mut self, line: Line, text: Text) {
        if line >= self.lines.len() {
            self.lines.resize_with(line + 1, VecDeque::new);
        }
        self.lines[line].push_back(text);
        self.len += 1;
    }

    /// Lines in which a text waits.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Line> {
        self.lines.iter().enumerate().filter(|(_, line)| !line.is_empty()).map(|(line, _)| line)
    }

    /// Accounts whose texts wait for nothing but their turn.
    pub(super) fn accounts(&self) -> impl Iterator<Item = Account> {
        self.waiting().filter(|line| takes_turns(*line)).map(account)
    }

    pub(super) fn head(&self, line: Line) -> Option<Text> {
        self.lines.get(line)?.front().copied()
    }

    pub(super) fn pop(&mut self, line: Line) -> Option<Text> {
        let text = self.lines.get_mut(line)?.pop_front();
        self.len -= usize::from(text.is_some());
        text
    }

    /// Removes one text, if it waits.
    pub(super) fn remove(&mut self, line: Line, request: RequestKey, choice: u32) -> bool {
        let before = self.len;
        self.retain(line, |text| (text.request, text.choice) != (request, choice));
        self.len < before
    }

    /// Removes all of a request, and gives the numbers of its choices.
    pub(super) fn remove_all(&mut self, line: Line, request: RequestKey) -> Vec<u32> {
        let mut choices = Vec::new();
        self.retain(line, |text| {
            let stays = text.request != request;
            choices.extend((!stays).then_some(text.choice));
            stays
        });
        choices
    }

    fn retain(&mut self, line: Line, stays: impl FnMut(&Text) -> bool) {
        let Some(line) = self.lines.get_mut(line) else { return };
        let before = line.len();
        line.retain(stays);
        self.len -= before - line.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::lines::line;
    use crate::request::Tier;

    #[test]
    fn texts_leave_in_order_of_arrival_or_with_their_request() {
        let text = |request, choice| Text { request, choice, tokens: 3 };
        let mut texts = Texts::default();
        let [own, later] = [line(2, Tier::Default), line(0, Tier::Batch)];
        for (line, request, choice) in [(own, 1, 0), (own, 1, 1), (own, 2, 0), (later, 3, 0)] {
            texts.push(line, text(request, choice));
        }
        assert_eq!((texts.len(), texts.waiting().collect::<Vec<_>>()), (4, vec![later, own]));
        assert_eq!(texts.accounts().collect::<Vec<_>>(), [2], "a batch waits for more than its turn");
        assert_eq!((texts.head(own), texts.head(own + 1)), (Some(text(1, 0)), None));
        assert!(texts.remove(own, 1, 1) && !texts.remove(own, 1, 1));
        assert_eq!((texts.pop(own), texts.pop(0)), (Some(text(1, 0)), None));
        assert_eq!((texts.remove_all(own, 2), texts.remove_all(own, 2)), (vec![0], vec![]));
        assert_eq!(texts.pop(later), Some(text(3, 0)));
        assert!(texts.is_empty());
    }
}
