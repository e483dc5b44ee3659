//! Obol: an LLM inference server that knows what each request cost. The modules, in a request's order.

pub mod clock;
pub mod ledger;
pub mod metrics;
pub mod request;
pub mod text;
pub mod units;
pub mod usage;

pub mod meter;

pub mod engine;

pub mod pipeline;

pub mod http;
