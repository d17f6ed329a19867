//! qos
fn main() {}
