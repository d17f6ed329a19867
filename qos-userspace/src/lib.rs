//! The library behind `qosd` and `qos`.

pub mod domain;
pub mod gateway;
