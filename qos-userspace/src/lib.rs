//! The library behind `qosd` and `qos`.
