//! Obol: an LLM inference server that knows what each request cost. The modules, in a request's order.

pub mod clock;
pub mod config;
pub mod metrics;
#[cfg(test)]
mod random;
pub mod request;
pub mod units;
pub mod usage;

pub mod archive;
pub mod batches;
pub mod control;
pub mod grammar;
pub mod ledger;
pub mod meter;
pub mod nvml;
pub mod text;

pub mod alerting;
pub mod engine;
pub mod measure;

pub mod bench;
pub mod compare;
pub mod pipeline;

pub mod cli;
pub mod http;
