//! Set-up, build, demo, tests and benchmarks of qos.
fn main() {}
