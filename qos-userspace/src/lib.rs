//! The library behind the daemon `qosd` and the command line `qos`.
//!
//! Arrows point one way: `cli` and `api` → `manager` → `domain`; `gateway` and `store` carry out
//! what the manager decides. Nothing imports `cli` or `api` but `daemon`, which puts all together.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod domain;
pub mod gateway;
pub mod hex;
pub mod manager;
mod notify;
mod plural;
pub mod source;
pub mod store;
