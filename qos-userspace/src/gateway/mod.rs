//! The kernel side as userspace sees it: programs, maps and schedulers, kept equal to the state.

pub mod report;
pub mod scheduler;
