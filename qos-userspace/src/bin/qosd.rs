//! qosd
fn main() {}
