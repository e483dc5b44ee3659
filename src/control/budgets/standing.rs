//! Where budgets stand, and what of it somebody should hear.

use super::{Mode, Scope};
use crate::control::window::Span;
use crate::units::{Picos, UnixNanos};

/// A soft limit, or the cap, that what was spent has just reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crossing {
    pub budget: String,
    pub scope: Scope,
    pub value: String,
    pub percent: u8,
    pub spent: Picos,
    pub cap: Picos,
    pub span: Span,
}

/// What a budget's window stands at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub budget: String,
    pub scope: Scope,
    pub value: String,
    pub mode: Mode,
    pub cap: Picos,
    pub spent: Picos,
    pub leased: Picos,
    pub span: Span,
    /// The rule has an account for each value, not for one.
    pub is_each: bool,
    /// From then on nothing may be spent any more.
    pub until: Option<UnixNanos>,
    /// The soft limits that were reached, in per cent.
    pub reached: Vec<u8>,
}

impl Standing {
    /// The window, up to the budget's end if that comes first.
    #[must_use]
    pub fn until_end(&self) -> Span {
        Span { start: self.span.start, end: self.span.end.into_iter().chain(self.until).min() }
    }

    /// The alerts of this window: what `take_crossings` has given out since it began.
    pub fn crossings(&self) -> impl Iterator<Item = Crossing> + '_ {
        let heard = self.mode != Mode::Observe;
        self.reached.iter().filter(move |_| heard).map(|percent| Crossing {
            budget: self.budget.clone(),
            scope: self.scope,
            value: self.value.clone(),
            percent: *percent,
            spent: self.spent,
            cap: self.cap,
            span: self.span,
        })
    }
}
