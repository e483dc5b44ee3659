//! The one integration binary: every test that looks at the crates from outside.

mod bench;
mod bench_servers;
mod commands;
mod compare;
mod engine_budgets;
mod engine_queue;
mod engine_sim;
mod engine_speculation;
mod fake_device;
mod http_answers;
mod http_budgets;
mod http_errors;
mod http_keys;
mod http_probes;
mod http_replicas;
mod http_sockets;
mod http_spend;
mod http_tokens;
mod http_world;
mod keys_commands;
mod ledger;
mod ledger_devices;
mod reports;
mod tidy;
mod tiny_model;
