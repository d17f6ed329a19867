//! The library behind the daemon `qosd` and the command line `qos`.
//!
//! Arrows point one way: `cli` and `api` → `manager` → `domain`; `gateway` and `store` carry out
//! what the manager decides. Nothing imports `cli` or `api`.

pub mod config;
pub mod domain;
pub mod gateway;
pub mod manager;
pub mod store;
