//! What work cost, physically: the partition of device time, each step's split over its sequences,
//! and KV memory by block and holder. Knows no money, account of a customer, or reason of the scheduler.
//!
//! Invariants: every nanosecond of the device and every block-nanosecond of the pool is in exactly
//! one place, and the sums are integers that match the clock.

pub mod calibration;
pub mod energy;
pub mod kv;
pub mod partition;
pub mod share;
pub mod timeline;
