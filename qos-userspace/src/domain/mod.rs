//! Plain types of what is managed. No IO.

pub mod units;
