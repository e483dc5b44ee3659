//! The one integration binary: every test that looks at the crates from outside.

mod engine_sim;
mod ledger;
mod tidy;
