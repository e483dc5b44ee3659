//! Who may spend what: budgets.
//!
//! Does not know: HTTP, the engine, the ledger.

pub mod budgets;
pub mod rules;
pub mod window;
